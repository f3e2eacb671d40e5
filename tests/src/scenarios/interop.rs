//! Stock ztunnel beside us, in both directions. Its binary is not part of the project: `UM_ZTUNNEL` names one, and
//! without it these scenarios are skipped.

use super::{Scenario, scenario, skip};
use crate::bed::mesh::MeshOptions;
use crate::bed::{Testbed, Topology, capture};
use crate::peer::agent::{self, Ztunnel};
use anyhow::{Result, ensure};
use std::path::PathBuf;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("two stock ztunnels live on our control plane's feed and certificates", 60, fed),
    scenario(
        "a pod behind our agent and one behind a stock ztunnel talk both ways over mutual TLS",
        60,
        both_ways,
    ),
    scenario(
        "a policy is enforced by a stock ztunnel on identities that our agent presents, and by us on its",
        60,
        policy,
    ),
];

fn binary() -> Result<PathBuf> {
    match std::env::var_os("UM_ZTUNNEL") {
        Some(path) => Ok(path.into()),
        None => Err(skip("no stock ztunnel binary: set UM_ZTUNNEL to one")),
    }
}

/// A pod that greets on 8081, on node `ours` (label) or on a node that runs stock ztunnel (annotation).
fn pod(name: &str, node: &str, stock: bool) -> String {
    let mark = if stock {
        "annotations: {ambient.istio.io/redirection: enabled}"
    } else {
        "labels: {istio.io/dataplane-mode: ambient}"
    };
    format!(
        "---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: shop, {mark}}}
spec:
  nodeName: {node}
  serviceAccountName: {name}
  containers:
  - name: main
    image: none
    command: [mesh-tests, tool, serve, --echo, '8080', --greet, '8081']
    ports: [{{containerPort: 8080}}, {{containerPort: 8081}}]
"
    )
}

const NAMESPACE: &str = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n";

fn talk(bed: &Testbed, from: &str, to: &str, words: &str) -> Result<()> {
    let (client, server) = (bed.pod(from)?, bed.pod(to)?);
    let (_, greeting) = client.greeted(&server.at(8081).to_string())?;
    ensure!(greeting.peer.ip() == client.at(0).ip(), "{to} saw {} instead of {from}", greeting.peer);
    let said = client.call(&server.at(8080).to_string(), &["--send", words, "--half-close"])?;
    ensure!(said.received == words, "the echo was {:?}", said.received);
    Ok(())
}

fn fed() -> Result<()> {
    let ztunnel = binary()?;
    let yaml = format!("{NAMESPACE}{}{}", pod("left", "c", true), pod("right", "d", true));
    let mut bed = Testbed::build(&Topology::nodes(&["c", "d"]), &yaml)?;
    bed.start_control(&MeshOptions::default())?;
    let mut agents = Vec::new();
    for node in ["c", "d"] {
        agent::redirect_pods(&bed, node)?;
        agents.push(Ztunnel::start(&bed, node, &ztunnel)?);
    }
    let wire = bed.capture("c")?;
    talk(&bed, "shop/left", "shop/right", "words between strangers")
        .map_err(|error| error.context(agents.iter().map(|a| a.process.log()).collect::<String>()))?;
    ensure!(
        !capture::carries(&wire.stop()?, b"words between strangers"),
        "the words crossed the underlay in the clear"
    );
    Ok(())
}

/// Node `a` runs our agent, node `c` stock ztunnel.
fn mixed(extra: &str) -> Result<(Testbed, Ztunnel)> {
    let ztunnel = binary()?;
    let yaml = format!("{NAMESPACE}{}{}{extra}", pod("ours", "a", false), pod("theirs", "c", true));
    let mut bed = Testbed::build(&Topology::nodes(&["a", "c"]), &yaml)?;
    let options = MeshOptions::default();
    bed.start_control(&options)?;
    agent::redirect_pods(&bed, "c")?;
    let theirs = Ztunnel::start(&bed, "c", &ztunnel)?;
    bed.start_agent("a", &options)?;
    bed.wait_agent_ready("a")?;
    bed.wait_enrolled(&["shop/ours", "shop/theirs"])?;
    Ok((bed, theirs))
}

fn both_ways() -> Result<()> {
    let (bed, theirs) = mixed("")?;
    let wire = bed.capture("a")?;
    for (from, to) in [("shop/ours", "shop/theirs"), ("shop/theirs", "shop/ours")] {
        talk(&bed, from, to, "mixed company")
            .map_err(|error| error.context(format!("ztunnel: {}", theirs.process.log())))?;
    }
    ensure!(
        !capture::carries(&wire.stop()?, b"mixed company"),
        "the words crossed the underlay in the clear"
    );
    let log = theirs.process.log();
    for identity in ["spiffe://cluster.local/ns/shop/sa/ours", "spiffe://cluster.local/ns/shop/sa/theirs"] {
        ensure!(log.contains(identity), "ztunnel's access log does not name {identity}: {log}");
    }
    Ok(())
}

fn policy() -> Result<()> {
    let deny = "---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: not-each-other, namespace: shop}
spec:
  action: DENY
  rules:
  - from: [{source: {principals: [cluster.local/ns/shop/sa/ours, cluster.local/ns/shop/sa/theirs]}}]
    to: [{operation: {ports: ['8081']}}]
";
    let (bed, theirs) = mixed(deny)?;
    for (from, to) in [("shop/ours", "shop/theirs"), ("shop/theirs", "shop/ours")] {
        let (client, server) = (bed.pod(from)?, bed.pod(to)?);
        let open = client.call(&server.at(8080).to_string(), &["--send", "x", "--half-close"])?;
        ensure!(open.received == "x", "{from} -> {to}:8080 is allowed but {}", open.problem());
        let denied = client.call(&server.at(8081).to_string(), &["--lines", "1"])?;
        ensure!(denied.received.is_empty(), "{from} -> {to}:8081 got through: {}", denied.received);
    }
    let log = theirs.process.log();
    ensure!(log.contains("not-each-other"), "ztunnel's access log does not name the policy: {log}");
    Ok(())
}
