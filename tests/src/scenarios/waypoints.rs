//! Traffic that has to go through a waypoint. The waypoint is a stand-in that we did not write (`foreign/hbone_server.py`):
//! it prints each CONNECT and gives the bytes back itself, so that what reaches the application went past it.

use super::peers;
use super::shop::{refused, talks};
use super::{Scenario, scenario};
use crate::bed::hbone::{Asked, asked, server};
use crate::bed::pki::{Leaf, Pki};
use crate::bed::{Testbed, wait};
use anyhow::{Context, Result, ensure};
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("a service with a waypoint is reached through it alone, from every node", 60, service),
    scenario("a pod with a waypoint is reached through it alone, from its own node too", 60, pod),
    scenario("without its waypoint a service is closed, never reached past it", 90, missing),
];

const SOON: Duration = Duration::from_secs(15);
const WAYPOINT: &str = "URI:spiffe://cluster.local/ns/shop/sa/wp";
const VIP: &str = "10.96.0.10:80";

/// Pod, Service and Gateway `shop/wp` on node a, with a certificate of that name.
fn waypoint(bed: &mut Testbed, pki: &Pki, san: &str) -> Result<()> {
    let certificate = pki.issue("wp", Leaf::of(san))?;
    let command = serde_json::to_string(&server(&bed.dir, &pki.root(), &certificate, &[])?)
        .context("a command is text")?;
    let yaml = format!(
        "
apiVersion: v1
kind: Pod
metadata:
  name: wp
  namespace: shop
  labels: {{istio.io/dataplane-mode: none, gateway.networking.k8s.io/gateway-name: wp}}
spec:
  nodeName: a
  serviceAccountName: wp
  containers: [{{name: main, image: none, command: {command}, ports: [{{containerPort: 15008}}]}}]
---
apiVersion: v1
kind: Service
metadata: {{name: wp, namespace: shop, labels: {{gateway.networking.k8s.io/gateway-name: wp}}}}
spec:
  clusterIP: 10.96.0.77
  clusterIPs: [10.96.0.77]
  selector: {{gateway.networking.k8s.io/gateway-name: wp}}
  ports: [{{name: hbone, port: 15008}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{name: wp, namespace: shop, labels: {{istio.io/waypoint-for: all}}}}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{{name: mesh, port: 15008, protocol: HBONE}}]
status:
  addresses: [{{type: Hostname, value: wp.shop.svc.cluster.local}}]
"
    );
    bed.apply("waypoint", &yaml)
}

fn at_waypoint(bed: &Testbed) -> Result<Vec<Asked>> {
    Ok(asked(&bed.pod("shop/wp")?.log()))
}

/// How many connections the application has seen.
fn reached(bed: &Testbed) -> Result<usize> {
    Ok(bed.pod("shop/backend")?.log().lines().filter(|line| line.contains("\"peer\"")).count())
}

/// Waits until the waypoint is asked for `authority` by `from`.
fn comes_by(bed: &Testbed, from: &str, to: &str, authority: &str) -> Result<()> {
    wait::until_true(&format!("CONNECT {authority} of {from} at the waypoint"), SOON, || {
        talks(bed, from, to)?;
        Ok(at_waypoint(bed)?.iter().any(|asked| asked.headers[":authority"] == authority))
    })
}

/// Each connection comes by the waypoint, as the pod that opens it, and none reaches the application.
fn only_by_waypoint(bed: &Testbed, from: &str, account: &str, to: &str) -> Result<()> {
    let (before, seen) = (at_waypoint(bed)?.len(), reached(bed)?);
    for _ in 0..5 {
        talks(bed, from, to)?;
    }
    let all = at_waypoint(bed)?;
    let new = &all[before..];
    ensure!(new.len() == 5, "the waypoint was asked {} times for 5 connections of {from}", new.len());
    for asked in new {
        let pseudo: Vec<_> = asked.headers.keys().filter(|name| name.starts_with(':')).collect();
        ensure!(pseudo == [":authority", ":method"], "{pseudo:?}");
        ensure!(asked.headers[":method"] == "CONNECT" && asked.headers[":authority"] == to, "{asked:?}");
        ensure!(asked.identity == [format!("spiffe://cluster.local/ns/shop/sa/{account}")], "{asked:?}");
        ensure!(asked.from.ip() == bed.pod(from)?.at(0).ip(), "{asked:?}");
    }
    ensure!(reached(bed)? == seen, "the application saw a connection of {from} to {to}");
    Ok(())
}

fn service() -> Result<()> {
    let (mut bed, pki) = peers::open(|_| Ok(Vec::new()))?;
    talks(&bed, "shop/frontend", VIP)?;
    waypoint(&mut bed, &pki, WAYPOINT)?;
    bed.label("Service", "backend", "istio.io/use-waypoint", Some("wp"))?;
    for (from, account) in
        [("shop/frontend", "frontend"), ("shop/local", "frontend"), ("shop/other", "other")]
    {
        comes_by(&bed, from, VIP, VIP)?;
        only_by_waypoint(&bed, from, account, VIP)?;
    }
    // What is addressed to the pod is not addressed to the service.
    let seen = reached(&bed)?;
    talks(&bed, "shop/frontend", &bed.pod("shop/backend")?.at(8080).to_string())?;
    ensure!(reached(&bed)? == seen + 1, "a connection to the pod's address did not reach it");
    bed.label("Service", "backend", "istio.io/use-waypoint", None)?;
    wait::until_true("connection straight to the application", SOON, || {
        let seen = reached(&bed)?;
        talks(&bed, "shop/frontend", VIP)?;
        Ok(reached(&bed)? > seen)
    })
}

fn pod() -> Result<()> {
    let (mut bed, pki) = peers::open(|_| Ok(Vec::new()))?;
    waypoint(&mut bed, &pki, WAYPOINT)?;
    let to = bed.pod("shop/backend")?.at(8080).to_string();
    // Within the node it is the kernel that carries these, until the waypoint is asked for.
    for _ in 0..5 {
        talks(&bed, "shop/local", &to)?;
    }
    bed.label("Pod", "backend", "istio.io/use-waypoint", Some("wp"))?;
    for from in ["shop/local", "shop/frontend"] {
        comes_by(&bed, from, &to, &to)?;
        only_by_waypoint(&bed, from, "frontend", &to)?;
    }
    // A service without a waypoint does not take its pod's.
    let seen = reached(&bed)?;
    talks(&bed, "shop/frontend", VIP)?;
    ensure!(reached(&bed)? == seen + 1, "a connection to the service did not reach its pod");
    Ok(())
}

/// The service refuses, with a code that the client's agent gives, and the application sees nothing.
fn closed(bed: &Testbed, why: &str, code: &str) -> Result<()> {
    let (start, code) = (bed.node("a")?.agent(0)?.log().len(), format!("code=\"{code}\""));
    wait::until_true(&format!("refusal with {code}: {why}"), SOON, || {
        refused(bed, "shop/frontend", VIP)?;
        Ok(bed.node("a")?.agent(0)?.log()[start..].contains(&code))
    })?;
    let seen = reached(bed)?;
    for _ in 0..3 {
        refused(bed, "shop/frontend", VIP).context(why.to_owned())?;
    }
    ensure!(reached(bed)? == seen, "{why}: the application saw a connection");
    Ok(())
}

fn missing() -> Result<()> {
    let (mut bed, pki) = peers::open(|_| Ok(Vec::new()))?;
    talks(&bed, "shop/frontend", VIP)?;
    bed.label("Service", "backend", "istio.io/use-waypoint", Some("wp"))?;
    closed(&bed, "there is no Gateway", "M0309")?;
    waypoint(&mut bed, &pki, WAYPOINT)?;
    comes_by(&bed, "shop/frontend", VIP, VIP)?;
    // It dies, and nobody has told the control plane yet.
    bed.pod("shop/wp")?.programs[0].signal(rustix::process::Signal::KILL)?;
    closed(&bed, "the waypoint does not listen", "M0316")?;
    bed.remove("waypoint")?;
    closed(&bed, "the waypoint is gone", "M0309")?;
    // Somebody else answers in its place, with a good certificate of the mesh.
    waypoint(&mut bed, &pki, "URI:spiffe://cluster.local/ns/shop/sa/other")?;
    // The log goes on where that of the first one ended.
    let before = at_waypoint(&bed)?.len();
    closed(&bed, "the waypoint is an impostor", "M0101")?;
    ensure!(at_waypoint(&bed)?.len() == before, "the impostor was asked");
    Ok(())
}
