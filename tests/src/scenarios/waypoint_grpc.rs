//! gRPC through a waypoint, between a client and a server of grpcio.

use super::shop::{SHOP, enrolled};
use super::waypoint::SOON;
use super::{Scenario, scenario, skip};
use crate::bed::mesh::MeshOptions;
use crate::bed::{Testbed, Topology, Waypoint, process, wait};
use anyhow::{Context, Result, ensure};
use std::process::Command;
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[scenario(
    "gRPC calls, streams, deadlines and statuses pass a waypoint, and what is unavailable is tried again",
    120,
    calls,
)];

const CLIENT: &str = include_str!("../foreign/grpc_client.py");
const SERVER: &str = include_str!("../foreign/grpc_server.py");
/// The distribution's, which has the library.
const PYTHON: &str = "/usr/bin/python3";
const WP: &str = "shop/wp";
const ADDRESS: &str = "10.96.0.40:80";

fn open() -> Result<Testbed> {
    let there = Command::new(PYTHON).args(["-c", "import grpc"]).output();
    if !there.is_ok_and(|done| done.status.success()) {
        return Err(skip("no grpcio: `cargo xtask setup` installs python3-grpcio"));
    }
    let mut bed = Testbed::build(&Topology::nodes(&["a", "b"]), SHOP)?;
    bed.start_mesh(&MeshOptions::default())?;
    bed.deploy_waypoint(&Waypoint::of_shop("b"))?;
    let script = bed.dir.join("server.py");
    std::fs::write(&script, SERVER).context("cannot write a script")?;
    let (script, log) = (script.display(), bed.dir.join("grpc.log"));
    let yaml = format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: echo, namespace: shop, labels: {{app: echo}}}}
spec:
  nodeName: a
  serviceAccountName: backend
  containers: [{{name: main, image: none, command: [{PYTHON}, {script}, '50051', {}], ports: [{{containerPort: 50051}}]}}]
---
apiVersion: v1
kind: Service
metadata: {{name: echo, namespace: shop, labels: {{istio.io/use-waypoint: wp}}}}
spec:
  clusterIP: 10.96.0.40
  clusterIPs: [10.96.0.40]
  selector: {{app: echo}}
  ports: [{{name: grpc, port: 80, targetPort: 50051}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: echo, namespace: shop}}
spec:
  hosts: [echo]
  http:
  - match: [{{uri: {{prefix: /shop.Echo/Fail}}}}]
    route: [{{destination: {{host: echo}}}}]
    retries: {{attempts: 0}}
  - route: [{{destination: {{host: echo}}}}]
    retries: {{attempts: 3, retryOn: unavailable}}
",
        log.display()
    );
    bed.apply("echo", &yaml)?;
    enrolled(&bed, &["shop/frontend", "shop/echo"])?;
    wait::until_true("rule at the waypoint", SOON, || {
        Ok(bed.at_waypoint(WP, 15_000, "/routes")?.contains("VirtualService/shop/echo"))
    })?;
    wait::until_true("answered call", SOON, || Ok(call(&bed, &["once"]).is_ok()))?;
    Ok(bed)
}

fn call(bed: &Testbed, args: &[&str]) -> Result<String> {
    let argv = [&[PYTHON, "-c", CLIENT, ADDRESS], args].concat();
    let done = process::finish(&bed.pod("shop/frontend")?.place, argv, Duration::from_secs(60))?;
    Ok(done.ok().context("the client")?.to_owned())
}

fn calls() -> Result<()> {
    let bed = open()?;
    let said = call(&bed, &[])?;
    let lines: Vec<&str> = said.lines().collect();
    let has = |line: &str| {
        ensure!(lines.contains(&line), "the client did not say {line:?}:\n{said}");
        Ok(())
    };
    has("unary hello you last")?;
    for code in 1..=16 {
        has(&format!("fail {code} {code} as asked"))?;
    }
    has("slow DEADLINE_EXCEEDED True")?;
    has("flaky at last")?;
    has("many True")?;
    has("collect 5000000")?;
    has("chat 100 True")?;
    // The server's side: it was tried three times, and told when the client gave up.
    let log = || std::fs::read_to_string(bed.dir.join("grpc.log")).context("the server's log");
    ensure!(log()?.contains("Flaky a 3") && !log()?.contains("Flaky a 4"), "{}", log()?);
    ensure!(log()?.contains("Slow began True"), "the server was not told of the deadline: {}", log()?);
    wait::until_true("cancelled call at the server", SOON, || Ok(log()?.contains("Slow cancelled")))?;
    for (status, least) in [("0", 5.0), ("14", 1.0), ("16", 1.0)] {
        let labels = ["request_protocol=\"grpc\"", &format!("grpc_response_status=\"{status}\"")];
        wait::until_true(&format!("metrics of status {status}"), SOON, || {
            Ok(bed.waypoint_metric(WP, "istio_requests_total", &labels)? >= least)
        })?;
    }
    Ok(())
}
