//! `mesh-node`: command line only; what it does is in the library.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use mesh_core::admin::Fitness;
use mesh_node::capture::{ObjectSource, doctor};
use mesh_node::pods::DirectorySource;

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
    /// Probes this machine: what the mesh needs, what is missing, what that costs, and the fix.
    Doctor {
        /// The compiled kernel programs, if not the ones that were embedded at build time.
        #[arg(long, value_name = "FILE", env = "UM_BPF_OBJECT")]
        bpf_object: Option<PathBuf>,
        /// Where this node's pods are described.
        #[arg(long, default_value = "/run/undermesh/pods")]
        pods_dir: PathBuf,
        /// Prints JSON.
        #[arg(long)]
        json: bool,
    },
    /// Is a CNI plugin, as the container runtime calls one (environment and standard input); the agent installs it under
    /// the name undermesh-cni.
    Cni,
    /// Waits until no agent of this node runs, and removes everything that agents left on the node: programs, pins, routes,
    /// the CNI plugin.
    Uninstall(mesh_node::uninstall::UninstallArgs),
    /// Prints the version.
    Version,
}

fn main() -> ExitCode {
    let name = std::env::args_os().next().map(PathBuf::from);
    if name.as_deref().and_then(std::path::Path::file_name).is_some_and(|name| name == mesh_node::cni::NAME) {
        return mesh_node::cni::plugin::run();
    }
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<ExitCode> {
    match Cli::parse().command {
        Command::Run(args) => mesh_node::runtime::run(args.load()?)?,
        Command::Cni => return Ok(mesh_node::cni::plugin::run()),
        Command::Uninstall(args) => mesh_node::uninstall::run(&args)?,
        Command::Doctor { bpf_object, pods_dir, json } => {
            let object = bpf_object.map_or(ObjectSource::Embedded, ObjectSource::File);
            let probes = doctor::examine(&object, &DirectorySource::new(pods_dir));
            if json {
                println!("{}", serde_json::to_string_pretty(&probes)?);
            } else {
                print!("{}", doctor::text(&probes));
            }
            let missing = probes.iter().filter(|probe| probe.state == Fitness::Missing).count();
            anyhow::ensure!(missing == 0, "{missing} of {} probes found something missing", probes.len());
        }
        Command::Version => println!("mesh-node {}", env!("CARGO_PKG_VERSION")),
    }
    Ok(ExitCode::SUCCESS)
}
