//! Memory of an agent: idle, with connections open, and ten seconds after they are closed.
//!
//! An idle agent is one that has been at work: it has started long enough ago for what only the start needed to be gone,
//! and has then carried connections and been scraped, so that what it gave back and needs after all counts.

use super::rig::{ECHO, Rig, Shape, Variant, client_of};
use super::rows::{Bar, Row};
use super::zpeer;
use crate::bed::process::Proc;
use crate::bed::wait;
use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use std::time::{Duration, Instant};

const MIB: f64 = 1024.0 * 1024.0;
/// An agent has given back what its start needed after this long.
const STARTED: Duration = Duration::from_secs(12);
/// Within this time after the close, memory comes back.
const BACK: Duration = Duration::from_secs(10);

/// Resident bytes of both sides, the client's first.
type Sides = [f64; 2];

/// Rows for our agents, and for the peer's beside them.
///
/// # Errors
/// Connections cannot be opened.
pub(super) fn rows(rig: &Rig, quick: bool) -> Result<Vec<Row>> {
    let counts: &[usize] = if quick { &[1_000] } else { &[1_000, 10_000] };
    let ours = side(rig, Variant::Tunnel, counts)?;
    let theirs = rig.peer.is_some().then(|| side(rig, Variant::Ztunnel, counts)).transpose()?;
    let mut rows = Vec::new();
    for (i, (name, unit, values)) in ours.iter().enumerate() {
        rows.push(Row::largest(&format!("memory.{name}"), unit, bar(name), values.to_vec()));
        let name = format!("memory.{name}.vs_ztunnel");
        rows.push(match &theirs {
            Some(theirs) => {
                let pairs = values.iter().zip(&theirs[i].2).map(|(ours, theirs)| ours / theirs).collect();
                Row::ratio(&name, Bar::AtMost(1.0), pairs, None)
            }
            None => Row::skipped(&name, "ratio", Bar::AtMost(1.0), zpeer::MISSING),
        });
    }
    Ok(rows)
}

/// What each agent keeps.
fn bar(name: &str) -> Bar {
    match name {
        "idle" => Bar::AtMost(12.0),
        "after_close_vs_idle" => Bar::AtMost(1.2),
        _ => Bar::AtMost(3.0),
    }
}

/// Has an agent that started long ago do a little of everything, and waits until it rests.
fn idle(rig: &Rig, variant: Variant) -> Result<Sides> {
    crate::bed::run::pause(STARTED)?;
    rig.run(variant, Shape { name: "used", load: "crr", connections: 4 }, 0.3)?;
    if variant == Variant::Tunnel {
        for node in ["a", "b"] {
            rig.bed.metrics(node)?;
            rig.bed.admin(node, "/status")?;
        }
    }
    settled(rig, variant)
}

fn side(rig: &Rig, variant: Variant, counts: &[usize]) -> Result<Vec<(String, &'static str, Sides)>> {
    let idle = idle(rig, variant)?;
    let mut rows = vec![("idle".to_owned(), "MiB", idle.map(|bytes| bytes / MIB))];
    for &count in counts {
        let mut held = hold(rig, variant, count)?;
        let open = resident(rig, variant)?;
        let each = [0, 1].map(|i| (open[i] - idle[i]) / count as f64 / 1024.0);
        rows.push((format!("connection_{count}"), "KiB", each));
        held.signal(Signal::TERM)?;
        held.wait(Duration::from_secs(30))?;
    }
    crate::bed::run::pause(BACK)?;
    let after = resident(rig, variant)?;
    rows.push(("after_close_vs_idle".to_owned(), "ratio", [0, 1].map(|i| after[i] / idle[i])));
    Ok(rows)
}

/// Opens connections one after the other, each with a round trip, and leaves them open.
fn hold(rig: &Rig, variant: Variant, count: usize) -> Result<Proc> {
    let pod = rig.bed.pod(client_of(variant))?;
    let to = rig.target(variant, ECHO)?.to_string();
    let count_text = count.to_string();
    let argv = [
        "mesh-tests",
        "tool",
        "load",
        "--to",
        &to,
        "--shape",
        "hold",
        "--conns",
        &count_text,
        "--seconds",
        "0",
    ];
    let held = pod.spawn(argv)?;
    let said = |held: &Proc| held.log().lines().find(|line| line.starts_with("holding ")).map(str::to_owned);
    let line =
        wait::until(&format!("{count} connections over {variant:?}"), Duration::from_secs(120), || {
            Ok(said(&held))
        })
        .with_context(|| format!("the load says: {}", held.log()))?;
    // What is divided by their number must be their number.
    ensure!(line.starts_with(&format!("holding {count} (0 failed")), "over {variant:?}: {line}");
    settled(rig, variant)?;
    Ok(held)
}

fn resident(rig: &Rig, variant: Variant) -> Result<Sides> {
    let pids = match variant {
        Variant::Ztunnel => rig.peer.as_ref().map(zpeer::Peer::pids).unwrap_or_default(),
        _ => ["a", "b"]
            .iter()
            .map(|node| Ok(rig.bed.node(node)?.agents.last().context("no agent runs")?.pid()))
            .collect::<Result<_>>()?,
    };
    let of = |pid: &u32| -> Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).context("a proxy has ended")?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        let kib: f64 = line.trim().trim_end_matches("kB").trim().parse().context("VmRSS is no number")?;
        Ok(kib * 1024.0)
    };
    match pids.as_slice() {
        [first, second] => Ok([of(first)?, of(second)?]),
        _ => anyhow::bail!("{variant:?} has no two proxies"),
    }
}

/// Waits up to ten seconds for memory to stop changing.
fn settled(rig: &Rig, variant: Variant) -> Result<Sides> {
    let end = Instant::now() + Duration::from_secs(10);
    let mut last = resident(rig, variant)?;
    let mut calm = 0;
    while calm < 4 && Instant::now() < end {
        crate::bed::run::pause(Duration::from_millis(500))?;
        let now = resident(rig, variant)?;
        let still = (0..2).all(|i| (now[i] - last[i]).abs() < 256.0 * 1024.0);
        calm = if still { calm + 1 } else { 0 };
        last = now;
    }
    Ok(last)
}
