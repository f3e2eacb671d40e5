//! `mesh-tests`: the runner of scenarios, demo and benches, and the small programs that pods run.
#![forbid(unsafe_code)]

use clap::{Parser, Subcommand};
use mesh_tests::{bed, bench, cluster, demo, k8s, scenarios, soak, tools};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "mesh-tests", about = "Scenarios, demo and benches of the mesh on one machine", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run scenarios: all, or those whose name contains a filter
    Run(scenarios::RunArgs),
    /// List the scenarios
    List,
    /// Show the mesh at work, step by step
    Demo(demo::Args),
    /// Measure
    Bench(bench::Args),
    /// Mixed load with churn for as long as asked: nothing may fail, and nothing may grow
    Soak(soak::Args),
    /// Build the shop, with the mesh, and leave it running for exploration until Ctrl-C
    Up {
        /// More arguments of every agent
        #[arg(last = true)]
        agent: Vec<String>,
    },
    /// Remove what runs left behind whose process is gone
    Clean,
    /// A real Kubernetes of several nodes on this machine
    #[command(subcommand)]
    Cluster(cluster::Command),
    /// Scenarios on a real Kubernetes
    #[command(subcommand)]
    K8s(k8s::Command),
    /// Run a program in a network namespace and a cgroup
    #[command(hide = true)]
    In(bed::launch::Args),
    /// The small programs that pods run
    #[command(subcommand, hide = true)]
    Tool(tools::Tool),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::In(args) => bed::launch::exec(&args).map(|()| true),
        Command::Tool(tool) => tools::run(&tool).map(|()| true),
        Command::List => {
            scenarios::list();
            Ok(true)
        }
        Command::Clean => bed::leftovers::clean().map(|()| true),
        Command::Cluster(command @ cluster::Command::Up(_)) => bed::run::guarded(|| cluster::run(&command)),
        Command::Cluster(command) => cluster::run(&command),
        Command::K8s(k8s::Command::List) => {
            k8s::list();
            Ok(true)
        }
        Command::K8s(k8s::Command::Conformance(args)) => bed::run::guarded(|| k8s::conformance::run(&args)),
        Command::K8s(k8s::Command::Run(args)) => bed::run::guarded(|| k8s::run(&args)),
        Command::Run(args) => bed::run::guarded(|| scenarios::run(&args)),
        Command::Up { agent } => bed::run::guarded(|| scenarios::up(&agent)),
        Command::Demo(args) => bed::run::guarded(|| demo::run(&args)),
        Command::Bench(args) => bed::run::guarded(|| bench::run(&args)),
        Command::Soak(args) => bed::run::guarded(|| soak::run(&args)),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(_) if bed::run::cancelled() => {
            eprintln!("interrupted");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
