//! A real Kubernetes on one machine: an API server, its controllers, and nodes with a kubelet and containerd each.
//!
//! ```text
//!   machine ── veth um-<cluster> ── um-<cluster>: bridge br0, etcd, kube-apiserver, controllers, scheduler
//!                                        │                    │
//!                              um-<cluster>-n1       um-<cluster>-n2     containerd, kubelet, kube-proxy
//!                                        │ veth per pod       │          in namespaces of their own (net, mount, pid,
//!                                       pods                 pods        uts, ipc, cgroup), as on a machine of their own
//! ```
//!
//! A cluster outlives the command that starts it: what it is stands in a directory ([`layout`]), and its processes are
//! found by their cgroup, so that any later command can end all of them. Nothing but one veth is in the machine's own
//! network namespace, so that clusters of different names (`UM_CLUSTER`) run side by side.

pub mod balancer;
mod cgroups;
mod config;
mod control;
pub mod images;
pub mod kubectl;
pub mod layout;
pub mod life;
mod network;
pub mod node;
mod pki;

pub use layout::Layout;

use anyhow::Result;
use std::path::PathBuf;

/// What to do with the cluster.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Start it and wait until every node is ready; it runs until `down`
    Up(life::UpArgs),
    /// End every process of it and remove all that it made
    Down,
    /// Say what runs
    Status,
    /// Import image archives (*.tar) into every node
    LoadImages {
        /// Directory of the archives
        #[arg(long, env = "UM_IMAGES")]
        images: PathBuf,
    },
    /// Print the path of a kubeconfig for this machine
    Kubeconfig,
    /// Print the end of a log, or the names of all logs
    Logs {
        /// Which log, for example `kube-apiserver` or `n1-kubelet`
        name: Option<String>,
        /// How many lines
        #[arg(long, default_value_t = 100)]
        lines: usize,
    },
    /// Run a program as root of a node, in all of its namespaces
    Exec {
        /// The node, for example `n1`
        node: String,
        /// The program and its arguments
        #[arg(last = true, required = true)]
        program: Vec<String>,
    },
    /// Become a node's first process
    #[command(hide = true)]
    Node {
        /// The node's name
        node: String,
    },
    /// Enter a node's cgroups and network namespace, then become its first process
    #[command(hide = true)]
    Enter {
        /// The node's name
        node: String,
    },
}

/// Runs a command; whether it found what it should.
///
/// # Errors
/// The command's own.
pub fn run(command: &Command) -> Result<bool> {
    let layout = Layout::named()?;
    match command {
        Command::Up(args) => life::up(&layout, args).map(|()| true),
        Command::Down => life::down(&layout).map(|()| true),
        Command::Status => life::status(&layout),
        Command::LoadImages { images } => images::load(&layout, images).map(|()| true),
        Command::Kubeconfig => {
            layout.state()?;
            println!("{}", layout.kubeconfig().display());
            Ok(true)
        }
        Command::Logs { name, lines } => life::logs(&layout, name.as_deref(), *lines).map(|()| true),
        Command::Exec { node, program } => node::exec(&layout, node, program).map(|()| true),
        Command::Node { node } => node::init(&layout, node).map(|()| true),
        Command::Enter { node } => node::enter(&layout, node).map(|()| true),
    }
}
