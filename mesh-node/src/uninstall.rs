//! `mesh-node uninstall`: takes everything of the mesh off this node.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use mesh_core::admin::http;
use mesh_core::admin::readiness::{self, Readiness};
use mesh_core::signals::Signals;
use tokio_util::sync::CancellationToken;

use crate::capture;
use crate::cni::{self, install};
use crate::config::Config;
use crate::generations;
use crate::pods::{CriSource, PodSource};

/// How often it is looked whether agents still live.
const LOOK: Duration = Duration::from_millis(50);
/// Name in the list of what readiness waits for.
const PENDING: &str = "agents of this node leave";

/// `mesh-node uninstall`.
#[derive(Debug, Clone, clap::Args)]
pub struct UninstallArgs {
    /// Name of this node
    #[arg(long, value_name = "NAME", env = "NODE_NAME")]
    pub node: String,
    /// bpffs directory of the pins [default: /sys/fs/bpf/undermesh/NODE]
    #[arg(long, value_name = "DIR", env = "UM_PIN_DIR")]
    pub pin_dir: Option<PathBuf>,
    /// Directory of admin.sock
    #[arg(long, value_name = "DIR", env = "UM_RUN_DIR", default_value = "/run/undermesh")]
    pub run_dir: PathBuf,
    /// Socket of the container runtime (CRI), to find the pods whose routes go
    #[arg(long, value_name = "SOCKET", env = "UM_CRI_SOCKET")]
    pub cri_socket: Option<PathBuf>,
    /// Directory of CNI plugins
    #[arg(long, value_name = "DIR", env = "UM_CNI_BIN_DIR")]
    pub cni_bin_dir: Option<PathBuf>,
    /// Directory of CNI configuration
    #[arg(long, value_name = "DIR", env = "UM_CNI_CONF_DIR")]
    pub cni_conf_dir: Option<PathBuf>,
    /// Directory for what the CNI plugin reads while no agent answers
    #[arg(long, value_name = "DIR", env = "UM_CNI_STATE_DIR", default_value = cni::STATE_DIR)]
    pub cni_state_dir: PathBuf,
    /// Stays afterwards, and is ready then (GET /healthz/ready on port 15021), until a signal comes
    #[arg(long)]
    pub stay: bool,
}

/// Waits until no agent of this node lives, and removes everything.
///
/// # Errors
/// What cannot be removed; everything else is.
pub fn run(args: &UninstallArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, uninstall(args))
}

async fn uninstall(args: &UninstallArgs) -> anyhow::Result<()> {
    let mut signals = Signals::new().context("cannot listen for signals")?;
    let readiness = Arc::new(Readiness::new(&[PENDING]));
    if args.stay {
        let address = Config::default().admin.readiness;
        let listener = http::bind(address).with_context(|| format!("cannot listen on {address}"))?;
        let handler = readiness::handler(Arc::clone(&readiness));
        tokio::task::spawn_local(http::serve_tcp(listener, handler, CancellationToken::new()));
    }
    while !generations::list(&args.run_dir).is_empty() {
        tokio::select! {
            () = signals.next() => anyhow::bail!("told to stop while agents of this node still run"),
            () = tokio::time::sleep(LOOK) => {}
        }
    }
    // First, so that no pod waits for an agent that does not come.
    if let (Some(bin_dir), Some(conf_dir)) = (&args.cni_bin_dir, &args.cni_conf_dir) {
        install::remove(bin_dir, conf_dir).context("the CNI plugin")?;
    }
    let pins = args.pin_dir.clone().unwrap_or_else(|| Path::new(capture::PINS).join(&args.node));
    capture::remove_pins(&pins).context("the kernel programs")?;
    if let Some(socket) = &args.cri_socket {
        clean_pods(socket);
    }
    empty(&args.run_dir, &["agents", "admin.sock", cni::SOCKET])?;
    empty(&args.cni_state_dir, &[cni::STATE])?;
    println!("nothing of the mesh is left on node {}", args.node);
    readiness.done(PENDING);
    if args.stay {
        signals.next().await;
    }
    Ok(())
}

/// Rules and routes of the agent's connections in pods' namespaces. Where that fails the pod's next start is clean.
fn clean_pods(socket: &Path) {
    let pods = CriSource::start(socket).and_then(|source| source.snapshot());
    match pods {
        Ok(snapshot) => {
            for pod in snapshot.pods.iter().filter(|pod| !pod.host_network) {
                if let Err(error) = capture::clean_namespace(&pod.netns) {
                    eprintln!("pod {pod}: its rule and route stay until it is made again: {error}");
                }
            }
        }
        Err(error) => eprintln!("rules and routes stay in pods until they are made again: {error}"),
    }
}

/// Removes what agents wrote; the directory itself may be a mount.
fn empty(directory: &Path, names: &[&str]) -> anyhow::Result<()> {
    for name in names {
        let path = directory.join(name);
        let removed = match std::fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_dir() => std::fs::remove_dir_all(&path),
            Ok(_) => std::fs::remove_file(&path),
            Err(error) => Err(error),
        };
        match removed {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove {}", path.display()));
            }
            _ => {}
        }
    }
    Ok(())
}
