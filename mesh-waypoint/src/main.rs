//! `mesh-waypoint`: command line only; what it does is in the library.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Parser)]
#[command(name = "mesh-waypoint", version, about = "The L7 proxy of the mesh: routing, resilience, security")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs a waypoint until it is told to drain (SIGTERM, SIGINT).
    Run(Box<mesh_waypoint::cli::RunArgs>),
    /// Prints the version.
    Version,
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Run(args) => args.complete().map_err(Into::into).and_then(mesh_waypoint::runtime::run),
        Command::Version => {
            println!("mesh-waypoint {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
