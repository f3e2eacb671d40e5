//! HTTP/2 as its specification has it: h2spec against a gateway's port and against a service behind a waypoint.

use super::waypoint::{SOON, curl, open, server};
use super::{Scenario, scenario, skip};
use crate::bed::{Testbed, process, wait};
use anyhow::{Context, Result, ensure};
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("h2spec finds nothing wrong with HTTP/2 at a waypoint", 240, waypoint),
    scenario("h2spec finds nothing wrong with HTTP/2 at a gateway", 240, gateway),
];

/// Cases that fail for a reason that is not a fault: part of their lines, and why.
const EXCUSED: &[(&str, &str)] = &[(
    "Sends invalid connection preface",
    "the port speaks HTTP/1.1, too, and what is no preface is read as that: it is answered with 400, and closed",
)];

fn h2spec(bed: &Testbed, from: &str, host: &str) -> Result<()> {
    let program = process::find("h2spec")
        .ok_or_else(|| skip("no h2spec: `cargo xtask test testbed` builds it where there is Go"))?;
    let program = program.to_string_lossy();
    let argv = [&*program, "-h", host, "-p", "80", "-o", "3", "--strict"];
    let done = process::finish(&bed.pod(from)?.place, argv, Duration::from_secs(200))?;
    let failed: Vec<&str> = done.out.lines().map(str::trim).filter(|line| line.starts_with('×')).collect();
    let summary = done.out.lines().find(|line| line.contains(" tests, ")).context("h2spec ended early")?;
    eprintln!("  {}", summary.trim());
    let excuse = |line: &str| EXCUSED.iter().find(|(case, _)| line.contains(case));
    for (case, why) in failed.iter().filter_map(|line| excuse(line)).take(1) {
        eprintln!("  excused: {case}: {why}");
    }
    let wrong: Vec<_> = failed.iter().filter(|line| excuse(line).is_none()).collect();
    ensure!(wrong.is_empty(), "{wrong:#?}\n{}", done.out);
    Ok(())
}

fn waypoint() -> Result<()> {
    let bed = open(|bed| Ok(vec![server(bed, "v1", "a", false)?]))?;
    h2spec(&bed, "shop/frontend", "10.96.0.20")
}

const EDGE: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: edge, namespace: shop}
spec: {gatewayClassName: istio, listeners: [{name: http, port: 80, protocol: HTTP}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: edge, namespace: shop}
spec: {parentRefs: [{name: edge}], rules: [{backendRefs: [{name: web, port: 80}]}]}
";

fn gateway() -> Result<()> {
    let mut bed = open(|bed| Ok(vec![server(bed, "v1", "a", false)?]))?;
    let mut argv = bed.waypoint_command("shop", "edge", "b")?;
    argv.push("--role=gateway".to_owned());
    let command = serde_json::to_string(&argv).context("a command is text")?;
    bed.apply("edge-rules", EDGE)?;
    let pod = format!(
        "
apiVersion: v1
kind: Pod
metadata:
  name: edge
  namespace: shop
  labels: {{istio.io/dataplane-mode: none, gateway.networking.k8s.io/gateway-name: edge}}
spec:
  nodeName: b
  serviceAccountName: edge
  containers: [{{name: main, image: none, command: {command}, ports: [{{containerPort: 80}}]}}]
"
    );
    // It opens its port once it is told of the Gateway.
    bed.apply("edge", &pod)?;
    bed.wait_waypoint_ready("shop/edge")?;
    let address = bed.pod("shop/edge")?.v4.to_string();
    let url = format!("http://{address}/");
    wait::until_true("answer through the gateway", SOON, || {
        Ok(curl(&bed, "outside/visitor", &[&url]).is_ok_and(|said| said.starts_with("v1 ")))
    })?;
    h2spec(&bed, "outside/visitor", &address)
}
