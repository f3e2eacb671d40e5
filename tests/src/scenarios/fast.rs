//! The fast path: two pods of one node over plain kernel TCP.

use super::shop::{self, ONLY_FRONTEND, open, open_with, talks};
use super::{Scenario, scenario};
use crate::bed::mesh::MeshOptions;
use crate::bed::{Load, Testbed, Topology, net, run, wait};
use anyhow::{Result, ensure};
use rustix::process::Signal;
use std::net::SocketAddr;
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("on one node, the second connection goes straight through the kernel", 60, direct),
    scenario("on the fast path, no byte goes through the agent", 60, no_bytes),
    scenario("with sameNode tunnel, pods of one node use the tunnel", 60, tunnel),
    scenario("a policy change ends a fast-path connection that it denies", 60, policy),
    scenario("a fast-path connection notices neither a crash nor an upgrade of the agent", 120, undisturbed),
    scenario(
        "direct connections work beside a thousand that the agent carries between the same pods",
        90,
        beside,
    ),
    scenario("a waypoint-less pair that policy denies never gets the fast path", 60, denied),
];

/// Whether the client's kernel shows a connection straight to the server's address: on the tunnel path the client's
/// socket leads to a listener inside its own pod instead.
fn is_direct(bed: &Testbed, to: SocketAddr) -> Result<bool> {
    Ok(net::established(&bed.pod("shop/local")?.netns)?.iter().any(|(_, remote)| *remote == to))
}

/// Holds a connection open and says whether it is direct.
fn direct_now(bed: &Testbed, to: SocketAddr) -> Result<bool> {
    let local = bed.pod("shop/local")?;
    let argv = ["mesh-tests", "tool", "call", "--to", &to.to_string(), "--send", "x", "--hold-ms", "10000"];
    let mut held = local.spawn(argv)?;
    let direct = wait::until("open connection", Duration::from_secs(10), || {
        let open = net::established(&local.netns)?;
        let captured = open.iter().any(|(own, remote)| own.ip() == remote.ip());
        Ok((is_direct(bed, to)? || captured).then_some(!captured))
    })?;
    held.kill();
    // The next look must not see this one.
    wait::until_true("end of a connection", Duration::from_secs(10), || {
        Ok(net::established(&local.netns)?
            .iter()
            .all(|(own, remote)| *remote != to && own.ip() != remote.ip()))
    })?;
    Ok(direct)
}

/// Connects until the pair is on the fast path.
fn warm(bed: &Testbed, to: SocketAddr) -> Result<()> {
    wait::until_true("fast path", Duration::from_secs(10), || direct_now(bed, to))
}

fn direct() -> Result<()> {
    let bed = open()?;
    let backend = bed.pod("shop/backend")?;
    for to in [backend.at(8081), backend.at6(8081)] {
        ensure!(!direct_now(&bed, to)?, "the first connection to {to} did not go through the tunnel");
        let (_, first) = bed.pod("shop/local")?.greeted(&to.to_string())?;
        warm(&bed, to)?;
        let (outcome, second) = bed.pod("shop/local")?.greeted(&to.to_string())?;
        ensure!(
            first.peer.ip() == second.peer.ip(),
            "the server saw {} and then {}",
            first.peer,
            second.peer
        );
        ensure!(outcome.peer == Some(to) && second.local == to, "{:?} {}", outcome.peer, second.local);
    }
    Ok(())
}

fn no_bytes() -> Result<()> {
    let bed = open()?;
    let to = bed.pod("shop/backend")?.at(8082);
    let local = bed.pod("shop/local")?;
    warm(&bed, to)?;
    let node = bed.node("b")?;
    let before = node.agent(0)?.cpu_seconds()?;
    let argv = ["--to".to_owned(), to.to_string(), "--shape".to_owned(), "bulk".to_owned()];
    let figures = crate::bed::load::measure(local, None, &argv, 2.0)?;
    let used = node.agent(0)?.cpu_seconds()? - before;
    #[expect(clippy::cast_precision_loss, reason = "gigabytes")]
    let gigabytes = figures.bytes as f64 / 1e9;
    ensure!(gigabytes > 0.2, "only {gigabytes:.2} GB in two seconds: {}", figures.first_error);
    // A proxy that carried them would need well above 0.3 s for each gigabyte.
    ensure!(used < 0.05 + 0.05 * gigabytes, "the agent used {used:.2} s of CPU for {gigabytes:.1} GB");
    Ok(())
}

fn tunnel() -> Result<()> {
    let bed = open_with(&Topology::nodes(&["a", "b"]), &MeshOptions::agent(&["--same-node", "tunnel"]))?;
    let backend = bed.pod("shop/backend")?;
    for _ in 0..5 {
        ensure!(!direct_now(&bed, backend.at(8080))?, "the pair uses the fast path");
    }
    let (_, seen) = bed.pod("shop/local")?.greeted(&backend.at(8081).to_string())?;
    ensure!(seen.peer.ip() == bed.pod("shop/local")?.at(0).ip(), "the server saw {}", seen.peer);
    Ok(())
}

fn policy() -> Result<()> {
    let mut bed = open()?;
    let to = bed.pod("shop/backend")?.at(8080);
    warm(&bed, to)?;
    let mut load = Load::start(
        bed.pod("shop/local")?,
        &to.to_string(),
        &["--shape", "pp", "--conns", "2", "--pause-ms", "2"],
    )?;
    wait::until_true("fast-path connections", Duration::from_secs(5), || is_direct(&bed, to))?;
    // A policy that changes nothing for the pair leaves it alone.
    bed.apply("policy", ONLY_FRONTEND)?;
    run::pause(Duration::from_secs(2))?;
    ensure!(load.running()?, "an allowed fast-path connection was cut");
    bed.apply("policy", &ONLY_FRONTEND.replace("sa/frontend", "sa/nobody"))?;
    wait::until_true("end of the denied connections", Duration::from_secs(10), || Ok(!load.running()?))?;
    let figures = load.figures()?;
    ensure!(figures.errors == 2, "{} connections were cut: {}", figures.errors, figures.first_error);
    shop::refused(&bed, "shop/local", &to.to_string())
}

fn undisturbed() -> Result<()> {
    let mut bed = open()?;
    let to = bed.pod("shop/backend")?.at(8080);
    warm(&bed, to)?;
    let load = Load::start(
        bed.pod("shop/local")?,
        &to.to_string(),
        &["--shape", "pp", "--conns", "4", "--pause-ms", "1"],
    )?;
    wait::until_true("fast-path connections", Duration::from_secs(5), || is_direct(&bed, to))?;
    bed.kill_agent("b")?;
    run::pause(Duration::from_secs(5))?;
    bed.start_agent("b", &MeshOptions::default())?;
    bed.wait_agent_ready("b")?;
    bed.start_agent("b", &MeshOptions::default())?;
    bed.wait_agent_ready("b")?;
    bed.node("b")?.agent(0)?.signal(Signal::TERM)?;
    run::pause(Duration::from_secs(2))?;
    let figures = load.stop()?;
    ensure!(figures.errors == 0 && figures.alive == 4, "{} failed: {}", figures.errors, figures.first_error);
    // A gap of several round trips would show as one long one.
    ensure!(figures.max_us < 1e6, "a round trip took {:.0} ms", figures.max_us / 1e3);
    Ok(())
}

/// The agent connects to the application from the client's address: its ports must not be those that the client's
/// kernel picks for direct connections.
fn beside() -> Result<()> {
    let mut bed = open_with(&Topology::nodes(&["a", "b"]), &MeshOptions::agent(&["--same-node", "tunnel"]))?;
    let to = bed.pod("shop/backend")?.at(8080);
    let mut held =
        Load::start(bed.pod("shop/local")?, &to.to_string(), &["--shape", "hold", "--conns", "1000"])?;
    held.wait_holding(1000, Duration::from_secs(60))?;
    bed.start_agent("b", &MeshOptions::default())?;
    bed.wait_agent_ready("b")?;
    bed.node("b")?.agent(0)?.signal(Signal::TERM)?;
    wait::until_true("fast path", Duration::from_secs(10), || {
        let local = bed.pod("shop/local")?;
        let one = ["mesh-tests", "tool", "call", "--to", &to.to_string(), "--hold-ms", "5000"];
        let mut one = local.spawn(one)?;
        let direct =
            wait::until_true("direct connection", Duration::from_millis(500), || is_direct(&bed, to));
        one.kill();
        Ok(direct.is_ok())
    })?;
    let argv = ["--to", &to.to_string(), "--shape", "crr", "--conns", "16"].map(str::to_owned);
    let figures = crate::bed::load::measure(bed.pod("shop/local")?, None, &argv, 3.0)?;
    ensure!(
        figures.ops > 1000 && figures.errors == 0,
        "{} of {} failed: {}",
        figures.errors,
        figures.ops,
        figures.first_error
    );
    let held = held.stop()?;
    ensure!(held.alive == 1000, "only {} held connections are alive: {}", held.alive, held.first_error);
    Ok(())
}

fn denied() -> Result<()> {
    let mut bed = open()?;
    bed.apply("policy", &ONLY_FRONTEND.replace("sa/frontend", "sa/other"))?;
    let to = bed.pod("shop/backend")?.at(8080);
    wait::until("policy in force", Duration::from_secs(10), || {
        shop::refused(&bed, "shop/local", &to.to_string()).map(Some)
    })?;
    for _ in 0..5 {
        shop::refused(&bed, "shop/local", &to.to_string())?;
    }
    talks(&bed, "shop/other", &to.to_string())
}
