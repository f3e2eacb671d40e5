//! `meshctl`: what the mesh is doing, in words, from the admin endpoints of nodes and the control plane.
//!
//! | module | for |
//! |---|---|
//! | [`cli`] | commands, flags, help |
//! | [`endpoint`] | where nodes and the control plane are asked, and how they are found |
//! | [`chart`] | the Helm chart and its values |
//! | [`ask`] | HTTP over TCP and unix sockets, all endpoints at once |
//! | [`cluster`] | the API server |
//! | [`rollout`] | whether a Deployment or DaemonSet runs |
//! | [`table`] | tables that line up, colour |
//! | [`output`] | table, JSON or YAML; errors; exit codes |
//! | [`command`] | one module per command: which endpoints it asks and what it shows |
//!
//! Everything goes through [`run`], which takes what a process has (arguments, environment, terminal) as values.
#![forbid(unsafe_code)]

pub mod ask;
pub mod chart;
pub mod cli;
pub mod cluster;
pub mod command;
pub mod endpoint;
pub mod output;
pub mod rollout;
pub mod table;

pub use output::{Answer, Exit};

use cli::{Cli, Command, WaypointCommand};
use command::{
    analyze, certs, doctor, flows, install, policies, services, status, tap, top, version, waypoint, why,
    workloads,
};
use endpoint::Places;
use output::Report;

/// What a process brings along besides its arguments.
#[derive(Debug, Clone)]
pub struct Surroundings {
    /// Whether standard output is a terminal that wants colour.
    pub colour: bool,
    /// Directory below which agents make their sockets; `/run/undermesh` except in tests.
    pub run_dir: std::path::PathBuf,
}

/// Runs a command that goes on until it is interrupted, giving text to `print` as it comes; nothing if it is none. `print`
/// says whether anybody still reads.
pub async fn stream(
    cli: &Cli,
    surroundings: &Surroundings,
    print: &mut dyn FnMut(&str) -> bool,
) -> Option<Answer> {
    let places = Places::new(&cli.global, &surroundings.run_dir);
    match &cli.command {
        Command::Flows(args) if args.follow => {
            let report = flows::follow(&places, &cli.global, args, surroundings.colour, print).await;
            Some(report.finish(surroundings.colour))
        }
        Command::Tap(args) | Command::Waypoint { command: WaypointCommand::Tap(args) } => {
            Some(tap::run(&cli.global, args, surroundings.colour, print).await.finish(surroundings.colour))
        }
        Command::Top(args) if !args.once => Some(top::run(&places, args).await.finish(surroundings.colour)),
        _ => None,
    }
}

/// Runs one command to its end and returns what to print and the exit code.
pub async fn run(cli: &Cli, surroundings: &Surroundings) -> Answer {
    let mut places = Places::new(&cli.global, &surroundings.run_dir);
    if places.relay && cli.command.asks_nodes() {
        match ask::relayed(&places).await {
            Ok(Some(nodes)) => places.nodes = nodes,
            Ok(None) => {}
            Err(error) => {
                return Report::default().unanswered(Exit::Unreachable, &[error]).finish(surroundings.colour);
            }
        }
    }
    let result = match &cli.command {
        Command::Status(args) => status::run(&places, &cli.global, args).await,
        Command::Workloads(filter) => workloads::run(&places, &cli.global, filter).await,
        Command::Services(filter) => services::run(&places, &cli.global, filter).await,
        Command::Policies(filter) => policies::run(&places, &cli.global, filter).await,
        Command::Certs(filter) => certs::run(&places, &cli.global, filter).await,
        Command::Why(args) => why::run(&places, &cli.global, args).await,
        Command::Flows(args) => flows::run(&places, &cli.global, args).await,
        Command::Trace(args) => flows::trace(&places, &cli.global, args).await,
        // On a terminal: see `stream`.
        Command::Top(args) => top::once(&places, &cli.global, args).await,
        Command::Sockets(args) => flows::sockets(&places, &cli.global, args).await,
        Command::Waypoint { command: WaypointCommand::Routes(args) } => {
            waypoint::routes(&cli.global, args).await
        }
        Command::Waypoint { command: WaypointCommand::Endpoints(args) } => {
            waypoint::endpoints(&cli.global, args).await
        }
        // Goes on until it is interrupted: see `stream`.
        Command::Tap(_) | Command::Waypoint { command: WaypointCommand::Tap(_) } => output::Report::default(),
        Command::Doctor => doctor::run(&places, &cli.global).await,
        Command::Analyze(args) => analyze::run(&cli.global, args).await,
        Command::Install(args) => install::install(&cli.global, args, false).await,
        Command::Upgrade(args) => install::install(&cli.global, args, true).await,
        Command::Uninstall(args) => install::uninstall(&cli.global, args).await,
        Command::Verify(args) => install::verify(&cli.global, args).await,
        Command::Precheck(args) => install::precheck(&cli.global, args).await,
        Command::Version(args) => version::run(&places, &cli.global, args).await,
        Command::Completion { shell } => command::completion(*shell),
    };
    result.finish(surroundings.colour)
}
