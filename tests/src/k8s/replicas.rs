//! Several control planes, and one that takes the place of another.

use super::change::{PATIENCE, under_load, unharmed};
use super::mesh::{MODE, STRICT};
use super::{Bed, SYSTEM, Scenario, Space, scenario};
use crate::bed::wait;
use crate::cluster::kubectl::name;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::collections::BTreeSet;

pub(super) const SCENARIOS: &[Scenario] = &[scenario(
    "replicas of the control plane know what agents tell each other, and replacing all of them under STRICT fails nothing",
    300,
    replaced,
)];

const DEPLOYMENT: &str = "deployment/istiod";

fn running(bed: &Bed) -> Result<BTreeSet<String>> {
    let args = ["--namespace", SYSTEM, "get", "pods", "--selector", "app=istiod"];
    let list = bed.kubectl.json(&args)?;
    let items = list["items"].as_array().cloned().unwrap_or_default();
    Ok(items.iter().filter(|pod| pod["metadata"]["deletionTimestamp"].is_null()).map(name).collect())
}

/// Whether a replica announces the servers of a space as reachable by tunnel.
fn announces(bed: &Bed, space: &Space<'_>, replica: &str) -> Result<bool> {
    let path = format!("/api/v1/namespaces/{SYSTEM}/pods/{replica}:15014/proxy/debug/config_dump");
    let dump: Value = serde_json::from_str(&bed.kubectl.run(&["get", "--raw", &path])?)?;
    let workloads = dump["workloads"].as_array().context("no workloads in the dump")?;
    let captured = |name: &str| {
        let of = |w: &&Value| w["namespace"] == space.name() && w["name"] == name;
        workloads.iter().find(of).is_some_and(|w| w["tunnelProtocol"] == "HBONE")
    };
    Ok(["web", "echo", "requests", "trips"].iter().all(|name| captured(name)))
}

fn settled(bed: &Bed, space: &Space<'_>, replicas: usize) -> Result<BTreeSet<String>> {
    bed.kubectl.run(&["--namespace", SYSTEM, "rollout", "status", DEPLOYMENT, "--timeout=90s"])?;
    wait::until(&format!("{replicas} replicas that know of every captured pod"), PATIENCE, || {
        let all = running(bed)?;
        for replica in &all {
            if all.len() != replicas || !announces(bed, space, replica)? {
                return Ok(None);
            }
        }
        Ok(Some(all))
    })
}

const ANYBODY: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: anybody}
spec: {rules: [{}]}
";

/// Whichever replica they are connected to, the agents of all nodes are counted.
fn counted(bed: &Bed, space: &Space<'_>) -> Result<()> {
    space.apply(ANYBODY)?;
    wait::until_true("policy that every agent has acknowledged", PATIENCE, || {
        let policy = space.get("authorizationpolicy", "anybody")?;
        let conditions = policy["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let programmed = conditions.iter().find(|condition| condition["type"] == "undermesh.io/Programmed");
        let message = programmed.and_then(|condition| condition["message"].as_str()).unwrap_or_default();
        let count = |word: usize| message.split(' ').nth(word)?.parse::<usize>().ok();
        ensure!(message.starts_with("acknowledged by "), "its status says {message:?}");
        let (have, of) = (count(2), count(4));
        if have == of && have < Some(bed.nodes.len()) {
            // An agent was on its way from one replica to another, and this version is settled without it.
            space.kubectl(&["delete", "authorizationpolicy", "anybody"])?;
            space.apply(ANYBODY)?;
            return Ok(false);
        }
        Ok(have == of)
    })
}

fn replaced(bed: &Bed) -> Result<()> {
    bed.layout()?;
    bed.mesh()?;
    let space = bed.space(&[(MODE, "ambient")])?;
    space.apply(STRICT)?;
    under_load(bed, &space)?;
    let outcome = replace(bed, &space);
    bed.kubectl.run(&["--namespace", SYSTEM, "scale", DEPLOYMENT, "--replicas=1"])?;
    settled(bed, &space, 1)?;
    outcome?;
    unharmed(&space, 500)
}

fn replace(bed: &Bed, space: &Space<'_>) -> Result<()> {
    let restart = ["--namespace", SYSTEM, "rollout", "restart", DEPLOYMENT];
    bed.kubectl.run(&["--namespace", SYSTEM, "scale", DEPLOYMENT, "--replicas=2"])?;
    let two = settled(bed, space, 2)?;
    bed.kubectl.run(&restart)?;
    let others = settled(bed, space, 2)?;
    ensure!(two.is_disjoint(&others), "a replica was not replaced: {two:?}, {others:?}");
    counted(bed, space)?;
    bed.kubectl.run(&["--namespace", SYSTEM, "scale", DEPLOYMENT, "--replicas=1"])?;
    let one = settled(bed, space, 1)?;
    bed.kubectl.run(&restart)?;
    let next = settled(bed, space, 1)?;
    ensure!(one.is_disjoint(&next), "the control plane was not replaced");
    // Nobody is there whom the next one could ask: its agents tell it.
    bed.kubectl.run(&["--namespace", SYSTEM, "scale", DEPLOYMENT, "--replicas=0"])?;
    wait::until_true("end of the control plane", PATIENCE, || {
        let args = ["--namespace", SYSTEM, "get", "pods", "--selector", "app=istiod"];
        Ok(bed.kubectl.json(&args)?["items"].as_array().is_some_and(Vec::is_empty))
    })?;
    bed.kubectl.run(&["--namespace", SYSTEM, "scale", DEPLOYMENT, "--replicas=1"])?;
    settled(bed, space, 1)?;
    Ok(())
}
