//! Times that happen once: the cold first connection, and enrolment.

use super::rig::{ECHO, Rig, Shape, Variant, options};
use super::rows::{Bar, Row};
use super::zpeer;
use crate::bed::wait;
use anyhow::Result;
use std::time::{Duration, Instant};

/// Rows of both.
///
/// # Errors
/// An agent does not come back, or a pod is not enrolled.
pub(super) fn rows(rig: &mut Rig, quick: bool) -> Result<Vec<Row>> {
    let times = if quick { 2 } else { 7 };
    let mut ours = Vec::new();
    let mut theirs = Vec::new();
    for _ in 0..times {
        ours.push(cold(rig)?);
        if rig.peer.is_some() {
            theirs.push(cold_peer(rig)?);
        }
    }
    let name = "tunnel.cold.vs_ztunnel";
    let against = if theirs.is_empty() {
        Row::skipped(name, "ratio", Bar::AtMost(1.0), zpeer::MISSING)
    } else {
        Row::ratio(name, Bar::AtMost(1.0), ours.iter().zip(&theirs).map(|(a, b)| a / b).collect(), None)
    };
    let mut enrolled = Vec::new();
    for _ in 0..if quick { 3 } else { 20 } {
        enrolled.push(enrol(rig)?);
    }
    Ok(vec![
        Row::of("tunnel.cold", "ms", Bar::None, ours),
        against,
        Row::of("enrol.pod", "ms", Bar::None, enrolled),
    ])
}

/// The first connection between agents that have just started: no tunnel is open.
fn cold(rig: &mut Rig) -> Result<f64> {
    for node in ["a", "b"] {
        rig.bed.kill_agent(node)?;
        rig.bed.start_agent(node, &options())?;
    }
    for node in ["a", "b"] {
        rig.bed.wait_agent_ready(node)?;
    }
    rig.bed.wait_enrolled(&["mesh/client", "mesh/server"])?;
    first(rig, Variant::Tunnel)
}

fn cold_peer(rig: &mut Rig) -> Result<f64> {
    if let Some(peer) = &mut rig.peer {
        peer.restart(&rig.bed)?;
    }
    first(rig, Variant::Ztunnel)
}

/// Milliseconds from connect to the echo of the first message.
fn first(rig: &Rig, variant: Variant) -> Result<f64> {
    let _ = rig.target(variant, ECHO)?;
    // A run of no length makes one connection with one round trip.
    let once = Shape { name: "cold", load: "hold", connections: 1 };
    Ok(rig.run(variant, once, 0.05)?.figures.max_us / 1e3)
}

/// Milliseconds from the label on a pod to its capture, as its node says.
fn enrol(rig: &mut Rig) -> Result<f64> {
    let listed = |rig: &Rig| -> Result<bool> { Ok(rig.bed.admin("a", "/pods")?.contains("\"plain\"")) };
    let start = Instant::now();
    rig.bed.edit("Pod", "near", |pod| {
        if pod["metadata"]["namespace"] == "plain" {
            pod["metadata"]["labels"] = serde_json::json!({"istio.io/dataplane-mode": "ambient"});
        }
    })?;
    wait::until_true("capture of plain/near", Duration::from_secs(20), || listed(rig))?;
    let took = start.elapsed().as_secs_f64() * 1e3;
    rig.bed.edit("Pod", "near", |pod| {
        if pod["metadata"]["namespace"] == "plain" {
            pod["metadata"]["labels"] = serde_json::json!({});
        }
    })?;
    wait::until_true("release of plain/near", Duration::from_secs(30), || Ok(!listed(rig)?))?;
    Ok(took)
}
