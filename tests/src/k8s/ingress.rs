//! The chart's ingress gateway with Istio's own kinds.

use super::pods;
use super::{Bed, SYSTEM, Scenario, Space, scenario};
use crate::bed::wait;
use crate::cluster::balancer::Balancer;
use crate::cluster::kubectl::has_condition;
use anyhow::{Context, Result, ensure};
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[scenario(
    "an Istio Gateway and its VirtualServices are served by the chart's ingress gateway",
    240,
    classic,
)];

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

fn classic(bed: &Bed) -> Result<()> {
    let layout = bed.layout()?;
    bed.mesh()?;
    let _balancer = Balancer::start(layout, &bed.kubectl)?;
    let upgrade = |more: &[&str]| {
        let settings =
            ["upgrade", "--set", "image.tag=dev", "--set", "node.drainSeconds=5", "--wait-timeout", "120s"];
        bed.meshctl()?.run(&[&settings[..], more].concat())
    };
    let space = bed.space(&[("istio.io/dataplane-mode", "ambient")])?;
    let served = upgrade(&["--set", "ingressGateway.enabled=true"]).and_then(|_| through(bed, &space));
    // An upgrade keeps the values that were given before.
    upgrade(&["--set", "ingressGateway.enabled=false"])?;
    served
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
