//! `mesh-node`: command line only; what it does is in the library.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "mesh-node",
    version,
    about = "The per-node agent of the mesh: capture, tunnel, L4 policy, DNS"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs the agent until it is told to drain (SIGTERM, SIGINT).
    Run(Box<mesh_node::config::RunArgs>),
    /// Prints the version.
    Version,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Run(args) => mesh_node::runtime::run(args.load()?),
        Command::Version => {
            println!("mesh-node {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
    }
}
