//! Stock ztunnel on two nodes of its own, fed by our control plane: the peer of the tunnel rows.

use crate::bed::net;
use crate::bed::process::Proc;
use crate::bed::{Testbed, wait};
use crate::peer::{redirect, zds};
use anyhow::{Context, Result};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Why rows against it are skipped.
pub(super) const MISSING: &str = "no stock ztunnel binary: give one with --ztunnel PATH";
/// Its nodes in the testbed.
pub(super) const NODES: [&str; 2] = ["c", "d"];
const PATIENCE: Duration = Duration::from_secs(20);

/// Two running ztunnels.
pub(super) struct Peer {
    binary: PathBuf,
    agents: Vec<Agent>,
}

struct Agent {
    process: Proc,
    _pods: zds::Connection,
}

impl Peer {
    /// Redirects the pods of its nodes and starts it there.
    ///
    /// # Errors
    /// It does not start, or refuses a pod.
    pub(super) fn start(bed: &Testbed, binary: &Path) -> Result<Self> {
        for pod in bed.pods.values().filter(|pod| NODES.contains(&pod.spec.node.as_str())) {
            pod.netns.nft(&redirect::nft_script())?;
            pod.netns.batch(&redirect::ip_lines(false))?;
            let v6: Vec<String> = redirect::ip_lines(true);
            pod.netns.batch(&v6)?;
        }
        let mut peer = Self { binary: binary.to_owned(), agents: Vec::new() };
        peer.restart(bed)?;
        Ok(peer)
    }

    /// Starts both anew: nothing is cached, no tunnel is open.
    ///
    /// # Errors
    /// As [`Peer::start`].
    pub(super) fn restart(&mut self, bed: &Testbed) -> Result<()> {
        self.agents.clear();
        for node in NODES {
            self.agents.push(start_on(bed, node, &self.binary)?);
        }
        Ok(())
    }

    /// Process ids, the client's node first.
    #[must_use]
    pub(super) fn pids(&self) -> Vec<u32> {
        self.agents.iter().map(|agent| agent.process.pid()).collect()
    }
}

fn start_on(bed: &Testbed, name: &str, binary: &Path) -> Result<Agent> {
    let node = bed.node(name)?;
    let token = node.dir.join("ztunnel-token");
    std::fs::write(&token, bed.token(name)?).context("cannot write the token")?;
    let socket = node.dir.join("zds.sock");
    let _ = std::fs::remove_file(&socket);
    let listener = zds::Listener::bind(&socket)?;
    let control = net::underlay_v4(net::CONTROL);
    let own = net::underlay_v4(net::node_place(node.index));
    let env = [
        ("PROXY_MODE", "shared".to_owned()),
        ("INPOD_UDS", socket.display().to_string()),
        ("XDS_ADDRESS", format!("https://{control}:15012")),
        ("CA_ADDRESS", format!("https://{control}:15012")),
        ("ALT_XDS_HOSTNAME", "istiod.istio-system.svc".to_owned()),
        ("ALT_CA_HOSTNAME", "istiod.istio-system.svc".to_owned()),
        ("XDS_ROOT_CA", bed.state_dir().join("root-cert.pem").display().to_string()),
        ("CA_ROOT_CA", bed.state_dir().join("root-cert.pem").display().to_string()),
        ("AUTH_TOKEN", token.display().to_string()),
        ("NODE_NAME", name.to_owned()),
        ("INSTANCE_IP", own.to_string()),
        ("POD_NAMESPACE", "istio-system".to_owned()),
        ("POD_NAME", format!("ztunnel-{name}")),
        ("RUST_LOG", "info".to_owned()),
    ];
    let program = crate::bed::process::Program {
        argv: vec![binary.to_string_lossy().into_owned(), "proxy".to_owned(), "ztunnel".to_owned()],
        env: env.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
        cpu: None,
    };
    let process = Proc::spawn(&node.agent_place, program, &node.dir.join("logs/ztunnel.log"))?;
    let pods: Vec<zds::Pod> = bed
        .pods
        .values()
        .filter(|pod| pod.spec.node == name)
        .map(|pod| zds::Pod {
            uid: pod.spec.uid(),
            name: pod.spec.name.clone(),
            namespace: pod.spec.namespace.clone(),
            service_account: pod.spec.service_account.clone(),
            netns: pod.netns.path(),
        })
        .collect();
    let held = listener.hand_over(&pods, PATIENCE).with_context(|| format!("its log: {}", process.log()))?;
    let ready: SocketAddr = ([127, 0, 0, 1], 15021).into();
    wait::until_true(&format!("ready ztunnel on {name}"), PATIENCE, || {
        node.netns.within(|| crate::bed::http::get_tcp(ready, "/healthz/ready"))?.map(|_| true)
    })?;
    Ok(Agent { process, _pods: held })
}
