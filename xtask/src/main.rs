//! Every developer command of the project, as `cargo xtask COMMAND`.
//!
//! This crate only decides what to run and in which order; the programs it runs are cargo, the distribution's package
//! manager and `mesh-tests` (the testbed, the scenarios, the demo and the benches live there). It has few
//! dependencies on purpose: it is what a machine runs before anything else is installed.
#![forbid(unsafe_code)]

mod bpf;
mod build;
mod clean;
mod cluster;
mod conformance;
mod dashboards;
mod docs;
mod fuzz;
mod images;
mod kubernetes;
mod lint;
mod map;
mod paths;
mod peers;
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
    /// Measure: `bench l4 [--json] [--quick] [--ztunnel PATH]`, `bench l7 [--json] [--quick]`,
    /// `bench trace [--json] [--quick]`, `bench control [--json] [--quick]`, `bench instructions [--json] [--record]`
    Bench {
        /// The bench and its options, see `cargo xtask bench -- --help`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// A real Kubernetes of several nodes on this machine, in the background
    #[command(subcommand)]
    Cluster(cluster::Action),
    /// Mixed load with churn of pods, policies and certificates: `soak [--minutes N]`
    Soak {
        /// Passed on, see `cargo xtask soak -- --help`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Fuzz every parser that faces the network or the control plane, a minute each by default
    Fuzz(fuzz::Args),
    /// Bundle the map that mesh-control serves, and print where its page is (UM_MAP of a build by hand)
    Map,
    /// Write docs/api: which fields of the APIs have an effect, out of what the control plane says of them
    Docs,
    /// Write Grafana dashboards and alert rules into deploy/ from their table
    Dashboards {
        /// Only say whether they are up to date
        #[arg(long)]
        check: bool,
    },
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
        Command::Cluster(action) => cluster::run(&action),
        Command::Soak { args } => testbed::soak(&args),
        Command::Fuzz(args) => fuzz::run(&args),
        Command::Map => map::build().map(|page| println!("{}", page.display())),
        Command::Docs => docs::run(),
        Command::Dashboards { check } => dashboards::run(check),
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
