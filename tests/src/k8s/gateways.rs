//! The chart's ingress and egress gateways with Istio's own kinds.

use super::mesh::MODE;
use super::plain::asked;
use super::pods;
use super::waypoint::{GATEWAY, programmed};
use super::{Bed, SYSTEM, Scenario, Space, scenario};
use crate::bed::wait;
use crate::cluster::balancer::Balancer;
use crate::cluster::kubectl::has_condition;
use anyhow::{Context, Result, ensure};
use std::net::IpAddr;
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario(
        "an Istio Gateway and its VirtualServices are served by the chart's ingress gateway",
        240,
        ingress,
    ),
    scenario(
        "what pods ask of a host outside leaves by the chart's egress gateway and no other way",
        240,
        egress,
    ),
];

const PATIENCE: Duration = Duration::from_secs(60);

const OBJECTS: &str = "
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: public}
spec:
  selector: {istio: ingressgateway}
  servers:
  - {port: {number: 80, name: http, protocol: HTTP}, hosts: ['*.example']}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: shop}
spec:
  hosts: [shop.example]
  gateways: [public]
  http:
  - match: [{uri: {prefix: /old}}]
    rewrite: {uri: /new}
    route: [{destination: {host: far, port: {number: 80}}}]
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: all}
spec: {mtls: {mode: STRICT}}
";

/// Does something while the mesh has one of the chart's gateways.
fn with(bed: &Bed, gateway: &str, during: impl FnOnce() -> Result<()>) -> Result<()> {
    let set = |enabled: bool| {
        let value = format!("{gateway}.enabled={enabled}");
        let settings = ["--set", "image.tag=dev", "--set", "node.drainSeconds=5", "--wait-timeout", "120s"];
        bed.meshctl()?.run(&[&["upgrade", "--set", &value], &settings[..]].concat())
    };
    let outcome = set(true).and_then(|_| during());
    // An upgrade keeps the values that were given before.
    set(false)?;
    outcome
}

fn ingress(bed: &Bed) -> Result<()> {
    let layout = bed.layout()?;
    bed.mesh()?;
    let _balancer = Balancer::start(layout, &bed.kubectl)?;
    let space = bed.space(&[(MODE, "ambient")])?;
    with(bed, "ingressGateway", || through(bed, &space))
}

fn through(bed: &Bed, space: &Space<'_>) -> Result<()> {
    space.apply(&[OBJECTS, &pods::web("far", &bed.nodes[1]), &pods::service("far")].concat())?;
    space.wait_ready(&["far"])?;
    let service = ["--namespace", SYSTEM, "get", "service", "istio-ingressgateway"];
    let address = wait::until("address of the ingress gateway", PATIENCE, || {
        let ingress = &bed.kubectl.json(&service)?["status"]["loadBalancer"]["ingress"][0]["ip"];
        Ok(ingress.as_str().map(str::to_owned))
    })?;
    let ask = |host: &str, path: &str| bed.ask_from_outside(&address, host, path);
    wait::until_true("answer through the gateway", PATIENCE, || {
        Ok(ask("shop.example", "/old/shoes").is_ok_and(|answer| answer.ends_with(" 200")))
    })?;
    let answer = ask("shop.example", "/old/shoes")?;
    ensure!(answer.contains("/new/shoes"), "the rewrite of the VirtualService is missing: {answer}");
    for (host, path) in [("shop.example", "/other"), ("other.example", "/old"), ("shop.test", "/old")] {
        let answer = ask(host, path)?;
        ensure!(answer.ends_with(" 404"), "{host}{path}: {answer} instead of 404");
    }
    for (kind, name) in [("gateways.networking.istio.io", "public"), ("virtualservice", "shop")] {
        wait::until_true("condition of the object", PATIENCE, || {
            Ok(has_condition(&space.get(kind, name)?, "Accepted"))
        })
        .with_context(|| format!("{kind} {name}"))?;
    }
    Ok(())
}

/// A host outside, and Istio's way to it through the egress gateway: from the pods (`mesh`, here at their waypoint) to the
/// gateway, and from there on.
fn way_out(outside: IpAddr) -> String {
    format!(
        "
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: outside}}
spec:
  hosts: [outside.example]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [{{number: 80, name: http, protocol: HTTP}}]
  endpoints: [{{address: '{outside}', ports: {{http: 8080}}}}]
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {{name: out}}
spec:
  selector: {{istio: egressgateway}}
  servers: [{{port: {{number: 80, name: http, protocol: HTTP}}, hosts: [outside.example]}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: out}}
spec:
  hosts: [outside.example]
  gateways: [out, mesh]
  http:
  - match: [{{gateways: [mesh], port: 80}}]
    route: [{{destination: {{host: istio-egressgateway.{SYSTEM}.svc.cluster.local, port: {{number: 80}}}}}}]
  - match: [{{gateways: [out], port: 80, uri: {{prefix: /old}}}}]
    rewrite: {{uri: /new}}
    route: [{{destination: {{host: outside.example, port: {{number: 80}}}}}}]
"
    )
}

fn egress(bed: &Bed) -> Result<()> {
    bed.mesh()?;
    let outside = bed.space(&[])?;
    outside.apply(&pods::web("server", &bed.nodes[1]))?;
    outside.wait_ready(&["server"])?;
    let space = bed.space(&[(MODE, "ambient"), ("istio.io/use-waypoint", "waypoint")])?;
    with(bed, "egressGateway", || leaves(bed, &space, outside.address("server")?))
}

fn leaves(bed: &Bed, space: &Space<'_>, outside: IpAddr) -> Result<()> {
    space.apply(&[GATEWAY, &way_out(outside), &pods::client("client", &bed.nodes[0])].concat())?;
    space.wait_ready(&["client"])?;
    space.wait_captured(&["client"], true)?;
    programmed(space)?;
    let answer = wait::until("answer from outside", PATIENCE, || {
        Ok(space.curl("client", "http://outside.example/old/shoes").ok())
    })?;
    ensure!(answer.contains("/new/shoes"), "the route of the egress gateway is missing: {answer}");
    let gateway = ["--namespace", SYSTEM, "get", "pods", "--selector", "istio=egressgateway"];
    let gateway = bed.kubectl.json(&gateway)?["items"][0]["status"]["podIP"].clone();
    let (_, client) = asked(&answer)?;
    ensure!(gateway == client, "the server outside was asked by {client}, and the gateway is {gateway}");
    // The gateway has a route for this path alone.
    let other = space.curl("client", "http://outside.example/other");
    ensure!(other.is_err(), "a path without a route was answered: {other:?}");
    Ok(())
}
