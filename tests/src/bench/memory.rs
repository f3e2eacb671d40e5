//! Memory of an agent: idle, with connections open, and after they are closed.

use super::rig::{ECHO, Rig, Variant, client_of};
use super::rows::{Bar, Row};
use super::zpeer;
use crate::bed::process::Proc;
use crate::bed::wait;
use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use std::time::{Duration, Instant};

const MIB: f64 = 1024.0 * 1024.0;

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
        rows.push(Row::of(&format!("memory.{name}"), unit, Bar::None, values.to_vec()));
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

fn side(rig: &Rig, variant: Variant, counts: &[usize]) -> Result<Vec<(String, &'static str, Sides)>> {
    let idle = resident(rig, variant)?;
    let mut rows = vec![("idle".to_owned(), "MiB", idle.map(|bytes| bytes / MIB))];
    for &count in counts {
        let mut held = hold(rig, variant, count)?;
        let open = resident(rig, variant)?;
        let each = [0, 1].map(|i| (open[i] - idle[i]) / count as f64 / 1024.0);
        rows.push((format!("connection_{count}"), "KiB", each));
        held.signal(Signal::TERM)?;
        held.wait(Duration::from_secs(30))?;
    }
    let after = settled(rig, variant)?;
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

/// Waits up to ten seconds for memory to stop changing, as the promise gives it to come back.
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
