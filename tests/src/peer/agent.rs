//! One stock ztunnel on one node of the testbed, fed by our control plane.

use super::{redirect, zds};
use crate::bed::net;
use crate::bed::process::{Proc, Program};
use crate::bed::{Testbed, netns, wait};
use anyhow::{Context, Result};
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(20);

/// A running ztunnel with the pods of its node.
pub struct Ztunnel {
    /// The process.
    pub process: Proc,
    _pods: zds::Connection,
}

/// Sends the traffic of every pod of a node into ztunnel's listeners. Once per pod.
///
/// # Errors
/// A pod's namespace refuses the rules.
pub fn redirect_pods(bed: &Testbed, node: &str) -> Result<()> {
    for pod in bed.pods.values().filter(|pod| pod.spec.node == node) {
        pod.netns.nft(&redirect::nft_script())?;
        for command in redirect::ip_commands() {
            let place = ["-n", pod.netns.name()];
            netns::command("ip", place.into_iter().chain(command.iter().map(String::as_str)))?;
        }
    }
    Ok(())
}

impl Ztunnel {
    /// Starts it on a node whose pods are redirected, and waits until it is ready.
    ///
    /// # Errors
    /// It does not start, refuses a pod, or does not become ready.
    pub fn start(bed: &Testbed, name: &str, binary: &Path) -> Result<Self> {
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
        let program = Program {
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
        let held =
            listener.hand_over(&pods, PATIENCE).with_context(|| format!("its log: {}", process.log()))?;
        let ready: SocketAddr = ([127, 0, 0, 1], 15021).into();
        wait::until_true(&format!("ready ztunnel on {name}"), PATIENCE, || {
            node.netns.within(|| crate::bed::http::get_tcp(ready, "/healthz/ready"))?.map(|_| true)
        })?;
        Ok(Self { process, _pods: held })
    }
}
