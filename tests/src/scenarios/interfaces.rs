//! Pods with a second interface, as plugins for several networks add them: what arrives there is under the same policies,
//! and what leaves there leaves as without a mesh.

use super::shop::{ONLY_FRONTEND, open, peer_authentication, refused, talks};
use super::{Scenario, scenario};
use crate::bed::{Testbed, wait};
use anyhow::{Context, Result, ensure};
use std::net::SocketAddr;
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("a pod's second interface serves and is served, with the addresses that it has", 60, serves),
    scenario("policies hold on a pod's second interface as on its first", 90, holds),
];

const SOON: Duration = Duration::from_secs(15);

/// A network of its own between two pods, added while they run. Returns the address of each there, without a port.
fn second(bed: &Testbed, one: &str, other: &str, network: u8) -> Result<[SocketAddr; 2]> {
    let (a, b) = (&bed.pod(one)?.netns, &bed.pod(other)?.netns);
    let device = format!("net{network}");
    a.batch(&[format!("link add {device} type veth peer name {device} netns {}", b.name())])?;
    let mut addresses = Vec::new();
    for (netns, host) in [(a, 1), (b, 2)] {
        let own = format!("192.168.{network}.{host}");
        netns.batch(&[
            format!("addr add {own}/24 dev {device}"),
            format!("link set {device} up"),
            // As all routes of the testbed.
            format!("route change 192.168.{network}.0/24 dev {device} src {own} congctl cubic"),
        ])?;
        addresses.push(SocketAddr::new(own.parse().context("no address")?, 0));
    }
    addresses.try_into().ok().context("two addresses")
}

fn at(address: SocketAddr, port: u16) -> SocketAddr {
    SocketAddr::new(address.ip(), port)
}

fn serves() -> Result<()> {
    let bed = open()?;
    let (visitor, frontend) = (bed.pod("outside/visitor")?, bed.pod("shop/frontend")?);
    // From outside of the mesh to a pod in it, from there to outside, and between two pods in it.
    let [outside, backend] = second(&bed, "outside/visitor", "shop/backend", 77)?;
    let [inside, site] = second(&bed, "shop/frontend", "outside/site", 78)?;
    let [client, server] = second(&bed, "shop/frontend", "shop/backend", 79)?;
    for (from, own, to) in [
        (visitor, outside, at(backend, 8081)),
        (frontend, inside, at(site, 8081)),
        (frontend, client, at(server, 8081)),
    ] {
        // The agent hears of a new address from the kernel.
        let (outcome, seen) =
            wait::until(&format!("an answer of {to}"), SOON, || from.greeted(&to.to_string()).map(Some))?;
        ensure!(seen.local == to, "the server saw itself as {} instead of {to}", seen.local);
        ensure!(seen.peer.ip() == own.ip(), "{to} saw {} as its client instead of {}", seen.peer, own.ip());
        ensure!(outcome.peer == Some(to), "getpeername said {:?} instead of {to}", outcome.peer);
    }
    // The first interface does what it did.
    talks(&bed, "shop/frontend", "10.96.0.10:80")
}

fn holds() -> Result<()> {
    let mut bed = open()?;
    let [_, backend] = second(&bed, "outside/visitor", "shop/backend", 77)?;
    let [_, server] = second(&bed, "shop/other", "shop/backend", 79)?;
    let (from_outside, between) = (at(backend, 8080).to_string(), at(server, 8080).to_string());
    for (from, to) in [("outside/visitor", &from_outside), ("shop/other", &between)] {
        wait::until("an answer", SOON, || talks(&bed, from, to).map(Some))?;
    }
    bed.apply("policy", ONLY_FRONTEND)?;
    for (from, to) in [("outside/visitor", &from_outside), ("shop/other", &between)] {
        wait::until("the policy on the second interface", SOON, || refused(&bed, from, to).map(Some))?;
    }
    bed.apply("policy", &peer_authentication("STRICT"))?;
    wait::until("STRICT on the second interface", SOON, || {
        refused(&bed, "outside/visitor", &from_outside).map(Some)
    })?;
    // An agent that comes later finds the interface there.
    bed.kill_agent("b")?;
    bed.start_agent("b", &crate::bed::mesh::MeshOptions::default())?;
    bed.wait_agent_ready("b")?;
    refused(&bed, "outside/visitor", &from_outside)?;
    talks(&bed, "shop/frontend", "10.96.0.10:80")
}
