//! The cold first connection.

use super::rig::{ECHO, Rig, Shape, Variant, options};
use super::rows::{Bar, Row};
use super::zpeer;
use anyhow::Result;

/// Its rows.
///
/// # Errors
/// An agent does not come back.
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
        Row::skipped(name, "ratio", Bar::AtMost(0.5), zpeer::MISSING)
    } else {
        Row::ratio(name, Bar::AtMost(0.5), ours.iter().zip(&theirs).map(|(a, b)| a / b).collect(), None)
    };
    Ok(vec![Row::of("tunnel.cold", "ms", Bar::None, ours), against])
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
