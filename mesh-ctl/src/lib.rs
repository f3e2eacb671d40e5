//! `meshctl`: what the mesh is doing, in words, from the admin endpoints of nodes and the control plane.
//!
//! | module | for |
//! |---|---|
//! | [`cli`] | commands, flags, help |
//! | [`endpoint`] | where nodes and the control plane are asked, and how they are found |
//! | [`ask`] | HTTP over TCP and unix sockets, all endpoints at once |
//! | [`table`] | tables that line up, colour |
//! | [`output`] | table, JSON or YAML; errors; exit codes |
//! | [`command`] | one module per command: which endpoints it asks and what it shows |
//!
//! Everything goes through [`run`], which takes what a process has (arguments, environment, terminal) as values.
#![forbid(unsafe_code)]

pub mod ask;
pub mod cli;
pub mod command;
pub mod endpoint;
pub mod output;
pub mod table;

pub use output::{Answer, Exit};

use cli::{Cli, Command};
use command::{certs, doctor, policies, services, status, version, why, workloads};
use endpoint::Places;

/// What a process brings along besides its arguments.
#[derive(Debug, Clone)]
pub struct Surroundings {
    /// Whether standard output is a terminal that wants colour.
    pub colour: bool,
    /// Directory below which agents make their sockets; `/run/undermesh` except in tests.
    pub run_dir: std::path::PathBuf,
}

/// Runs one command to its end and returns what to print and the exit code.
pub async fn run(cli: &Cli, surroundings: &Surroundings) -> Answer {
    let places = Places::new(&cli.global, &surroundings.run_dir);
    let result = match &cli.command {
        Command::Status(args) => status::run(&places, &cli.global, args).await,
        Command::Workloads(filter) => workloads::run(&places, &cli.global, filter).await,
        Command::Services(filter) => services::run(&places, &cli.global, filter).await,
        Command::Policies(filter) => policies::run(&places, &cli.global, filter).await,
        Command::Certs(filter) => certs::run(&places, &cli.global, filter).await,
        Command::Why(args) => why::run(&places, &cli.global, args).await,
        Command::Doctor => doctor::run(&places, &cli.global).await,
        Command::Version(args) => version::run(&places, &cli.global, args).await,
        Command::Completion { shell } => command::completion(*shell),
    };
    result.finish(surroundings.colour)
}
