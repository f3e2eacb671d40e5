//! The testbed itself, without the mesh: what the other scenarios take for granted.

use super::{Scenario, scenario};
use crate::bed::net::Link;
use crate::bed::{Testbed, Topology, capture};
use anyhow::{Result, ensure};

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("without a mesh, pods of two nodes talk over IPv4 and IPv6 in the clear", 30, talk),
    scenario("without a mesh, a lossy link loses packets and TCP gets everything through", 60, lossy),
];

const TWO_PODS: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: server, namespace: shop}
spec:
  nodeName: b
  containers:
  - name: main
    image: none
    command: [mesh-tests, tool, serve, --echo, '8080', --greet, '8081']
    ports: [{containerPort: 8080}, {containerPort: 8081}]
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop}
spec: {nodeName: a, containers: [{name: main, image: none}]}
";

fn talk() -> Result<()> {
    let bed = Testbed::build(&Topology::nodes(&["a", "b"]), TWO_PODS)?;
    let (client, server) = (bed.pod("shop/client")?, bed.pod("shop/server")?);
    let capture = bed.capture("a")?;
    for (own, to) in [(client.at(0).ip(), server.at(8081)), (client.at6(0).ip(), server.at6(8081))] {
        let (outcome, greeting) = client.greeted(&to.to_string())?;
        ensure!(greeting.peer.ip() == own, "the server saw {} instead of {own}", greeting.peer);
        ensure!(outcome.peer == Some(to), "the client saw {:?} instead of {to}", outcome.peer);
    }
    let said = client.call(&server.at(8080).to_string(), &["--send", "plain words", "--half-close"])?;
    ensure!(said.received == "plain words", "the echo was {:?}", said.received);
    ensure!(capture::carries(&capture.stop()?, b"plain words"), "the capture does not show what was sent");
    Ok(())
}

fn lossy() -> Result<()> {
    let topology =
        Topology { link: Link { loss_percent: 3, ..Link::default() }, ..Topology::nodes(&["a", "b"]) };
    let bed = Testbed::build(&topology, TWO_PODS)?;
    let (client, server) = (bed.pod("shop/client")?, bed.pod("shop/server")?);
    let outcome = client.call(&server.at(8080).to_string(), &["--echo-bytes", "20000000"])?;
    ensure!(outcome.ok, "{}", outcome.problem());
    let retransmitted = client.netns.within(|| std::fs::read_to_string("/proc/thread-self/net/snmp"))??;
    let tcp: Vec<&str> = retransmitted.lines().filter(|line| line.starts_with("Tcp:")).collect();
    let column = |name| tcp.first().and_then(|head| head.split(' ').position(|column| column == name));
    let value = column("RetransSegs").and_then(|i| tcp.get(1)?.split(' ').nth(i)?.parse::<u64>().ok());
    ensure!(value.is_some_and(|count| count > 0), "nothing was retransmitted: the link loses nothing");
    Ok(())
}
