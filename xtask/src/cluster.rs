//! `cargo xtask cluster`: decides what a cluster needs, builds it, and hands over to `mesh-tests`.

use crate::build::Built;
use crate::{build, images, kubernetes, run, setup, testbed};
use anyhow::Result;
use std::path::PathBuf;
use std::process::Command;

/// What to do with the cluster.
#[derive(clap::Subcommand)]
pub(crate) enum Action {
    /// Build what is missing, start a cluster of real nodes on this machine, and leave it running
    Up {
        /// How many nodes
        #[arg(long, default_value_t = 2)]
        nodes: u8,
        /// Families of the addresses of nodes, pods and services: both, ipv4, ipv6
        #[arg(long, default_value = "both")]
        families: String,
        #[command(flatten)]
        what: What,
    },
    /// End every process of it and remove all that it made
    Down,
    /// Say what runs
    Status,
    /// Build the images, and bring them into every node
    LoadImages {
        #[command(flatten)]
        what: What,
    },
    /// Build the images only, for clusters of other makes (`kind load image-archive`)
    Images {
        #[command(flatten)]
        what: What,
    },
    /// Print the path of a kubeconfig for this machine
    Kubeconfig,
    /// Print the end of a log, or the names of all logs
    Logs {
        /// Passed on: a log's name, `--lines N`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Run a program as root of a node: `exec n1 -- crictl ps`
    Exec {
        /// The node
        node: String,
        /// The program and its arguments
        #[arg(last = true, required = true)]
        program: Vec<String>,
    },
}

/// Which binaries the images hold: those that the tests run, unless said otherwise.
#[derive(clap::Args)]
pub(crate) struct What {
    /// Those that are shipped
    #[arg(long)]
    dist: bool,
    /// Those that were built last, as they are
    #[arg(long, conflicts_with = "dist")]
    built: bool,
}

impl What {
    fn build(&self) -> Result<Built> {
        match (self.built, self.dist) {
            (true, _) => testbed::last_built(),
            (false, true) => build::profile("dist"),
            (false, false) => build::run(false),
        }
    }
}

/// Does it.
pub(crate) fn run(action: &Action) -> Result<()> {
    match action {
        Action::Up { nodes, families, what } => {
            setup::run()?;
            setup::cluster()?;
            // The longest first: it needs nothing of ours.
            let kubernetes = kubernetes::build()?;
            let built = what.build()?;
            let images = images::build(&built, what.dist)?;
            let parts = Parts { built, kubernetes, images };
            let mut command = parts.command(&["cluster", "up", "--families", families])?;
            run::check(command.args(["--nodes", &nodes.to_string()]))
        }
        Action::LoadImages { what } => {
            let built = what.build()?;
            let images = images::build(&built, what.dist)?;
            let mut command = testbed::mesh_tests(&built)?;
            run::check(command.args(["cluster", "load-images"]).env("UM_IMAGES", images))
        }
        Action::Images { what } => images::build(&what.build()?, what.dist).map(drop),
        Action::Down => plain(&["down"]),
        Action::Status => plain(&["status"]),
        Action::Kubeconfig => plain(&["kubeconfig"]),
        Action::Logs { args } => {
            plain(&std::iter::once("logs").chain(args.iter().map(String::as_str)).collect::<Vec<_>>())
        }
        Action::Exec { node, program } => {
            let program = program.iter().map(String::as_str);
            plain(&["exec", node, "--"].into_iter().chain(program).collect::<Vec<_>>())
        }
    }
}

/// What a cluster is started from.
pub(crate) struct Parts {
    pub(crate) built: Built,
    pub(crate) kubernetes: PathBuf,
    images: PathBuf,
}

impl Parts {
    /// A `mesh-tests` command that finds them.
    pub(crate) fn command(&self, args: &[&str]) -> Result<Command> {
        let mut command = testbed::mesh_tests(&self.built)?;
        command
            .args(args)
            .env("UM_KUBERNETES", &self.kubernetes)
            .env("UM_IMAGES", &self.images)
            .env("UM_DEFINITIONS", kubernetes::definitions()?);
        Ok(command)
    }
}

/// All that the tests on Kubernetes need, around binaries that are built already.
pub(crate) fn parts(built: Built) -> Result<Parts> {
    setup::cluster()?;
    let kubernetes = kubernetes::build()?;
    let images = images::build(&built, false)?;
    Ok(Parts { built, kubernetes, images })
}

/// Why this machine cannot run a cluster, if so.
pub(crate) fn unable() -> Option<String> {
    let root = run::output(Command::new("id").arg("-u")).is_ok_and(|uid| uid.trim() == "0");
    if !root {
        return Some("only root can make nodes".to_owned());
    }
    if !kubernetes::built() && !run::have("go") && !run::have("apt-get") {
        return Some("Kubernetes is built with Go, and there is none".to_owned());
    }
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let free: Option<u64> = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:")?.trim_end_matches("kB").trim().parse().ok());
    match free {
        Some(kib) if kib < LEAST_MEMORY_KIB => Some(format!(
            "two nodes with the mesh take some {} MiB of memory, and {} MiB are free",
            LEAST_MEMORY_KIB / 1024,
            kib / 1024
        )),
        _ => None,
    }
}

/// Two nodes were seen to take 0.9 GiB, and the mesh and the pods of the tests as much again.
const LEAST_MEMORY_KIB: u64 = 2_500_000;

/// A command that needs no more than `mesh-tests` of the last build.
fn plain(args: &[&str]) -> Result<()> {
    run::check(testbed::mesh_tests(&testbed::last_built()?)?.arg("cluster").args(args))
}
