//! Every developer command of the project, as `cargo xtask COMMAND`.
//!
//! This crate only decides what to run and in which order; the programs it runs are cargo, the distribution's package
//! manager and `mesh-tests` (the testbed, the scenarios, the demo and the benches live there). It has few
//! dependencies on purpose: it is what a machine runs before anything else is installed.
#![forbid(unsafe_code)]

mod bpf;
mod build;
mod clean;
mod fuzz;
mod lint;
mod paths;
mod run;
mod setup;
mod test;
mod testbed;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Developer commands of Undermesh", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what is missing on this machine (Debian or Ubuntu, as root); safe to run again
    Setup,
    /// Build the kernel programs, then the workspace with them embedded
    Build {
        /// Optimised binaries (what the demo runs); the default is the dev profile (what the tests run)
        #[arg(long)]
        release: bool,
    },
    /// Run tests: every group, or one
    Test(test::Args),
    /// Watch the mesh work on two nodes, step by step, with figures
    Demo {
        /// Passed on to the demo, see `cargo xtask demo -- --help`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Measure: `bench l4 [--json] [--quick] [--ztunnel PATH]`, `bench instructions [--json] [--record]`
    Bench {
        /// The bench and its options, see `cargo xtask bench -- --help`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Mixed load with churn of pods, policies and certificates: `soak [--minutes N]`
    Soak {
        /// Passed on, see `cargo xtask soak -- --help`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Fuzz every parser that faces the network or the control plane, a minute each by default
    Fuzz(fuzz::Args),
    /// rustfmt, clippy with warnings as errors, and cargo-deny where it is installed
    Lint,
    /// Remove what crashed runs left: processes, network namespaces, cgroups, pins
    Clean,
}

fn main() -> ExitCode {
    run::watch_signals();
    let result = match Cli::parse().command {
        Command::Setup => setup::run(),
        Command::Build { release } => build::run(release).map(|_| ()),
        Command::Test(args) => test::run(&args),
        Command::Demo { args } => testbed::demo(&args),
        Command::Bench { args } => testbed::bench(&args),
        Command::Soak { args } => testbed::soak(&args),
        Command::Fuzz(args) => fuzz::run(&args),
        Command::Lint => lint::run(),
        Command::Clean => clean::run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) if run::interrupted() => {
            eprintln!("interrupted");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
