//! What a cloud is to a cluster: Services of type LoadBalancer get an address by which clients outside reach them, through a
//! node, whose kube-proxy knows what to do with it.
//!
//! A service's address follows from its cluster address, so that nothing has to be kept.

use super::kubectl::Kubectl;
use super::layout::{self, Layout};
use crate::bed::netns;
use anyhow::{Context, Result};
use serde_json::json;
use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt;
use std::process::{Child, Stdio};
use std::thread::JoinHandle;

/// What a line of the watch holds, as kubectl's template.
const LINE: &str = r#"jsonpath={.metadata.namespace} {.metadata.name} {.spec.type} {.spec.clusterIP} {.status.loadBalancer.ingress[0].ip}{"\n"}"#;

/// Gives addresses until it is dropped.
#[derive(Debug)]
pub struct Balancer {
    watch: Child,
    thread: Option<JoinHandle<()>>,
}

impl Balancer {
    /// Starts it: from the control plane's network namespace, the addresses are reached through the first node.
    ///
    /// # Errors
    /// No cluster is up, or kubectl does not start.
    pub fn start(layout: &Layout, kubectl: &Kubectl) -> Result<Self> {
        let route = format!("route replace {} via {}", layout::BALANCED, layout::node_address(1));
        netns::batch(&layout.prefix(), &[route])?;
        let mut watch = kubectl
            .command(&["get", "services", "--all-namespaces", "--watch", "-o", LINE])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .context("cannot start kubectl")?;
        let lines = watch.stdout.take().context("kubectl has no output")?;
        let kubectl = kubectl.clone();
        let thread = std::thread::spawn(move || {
            for line in BufReader::new(lines).lines().map_while(Result::ok) {
                if let Some((namespace, name, address)) = wanted(&line)
                    && let Err(error) = give(&kubectl, namespace, name, address)
                {
                    eprintln!("warning: service {namespace}/{name} gets no address: {error:#}");
                }
            }
        });
        Ok(Self { watch, thread: Some(thread) })
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        let _ = self.watch.kill();
        let _ = self.watch.wait();
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Namespace and name of a service that has no address yet, and the address that it gets.
fn wanted(line: &str) -> Option<(&str, &str, Ipv4Addr)> {
    let mut words = line.split_whitespace();
    let (namespace, name, kind, cluster) = (words.next()?, words.next()?, words.next()?, words.next()?);
    let cluster: Ipv4Addr = cluster.parse().ok()?;
    (kind == "LoadBalancer" && words.next().is_none()).then(|| {
        let [_, _, c, d] = cluster.octets();
        let [a, b, ..] = layout::FIRST_BALANCED.octets();
        (namespace, name, Ipv4Addr::new(a, b, c, d))
    })
}

fn give(kubectl: &Kubectl, namespace: &str, name: &str, address: Ipv4Addr) -> Result<()> {
    let status = json!({"status": {"loadBalancer": {"ingress": [{"ip": address.to_string()}]}}}).to_string();
    let patch = ["--namespace", namespace, "patch", "service", name, "--subresource=status", "--type=merge"];
    kubectl.run(&[&patch[..], &["-p", &status]].concat()).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_gets_an_address_that_follows_from_its_own_once() {
        let expected = Some(("shop", "in-istio", Ipv4Addr::new(10, 126, 3, 4)));
        assert_eq!(wanted("shop in-istio LoadBalancer 10.125.3.4 "), expected);
        assert_eq!(wanted("shop in-istio LoadBalancer 10.125.3.4 10.126.3.4"), None);
        assert_eq!(wanted("shop web ClusterIP 10.125.3.4 "), None);
        assert_eq!(wanted("shop web LoadBalancer None "), None);
    }
}
