//! What the mesh has on nodes: the CNI plugin, which holds pods of the mesh and no others, and nothing once it is gone.

use super::mesh::STRICT;
use super::pods;
use super::{Bed, SYSTEM, Scenario, Space, scenario};
use crate::bed::wait;
use crate::cluster::{Layout, node};
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("with no agent pods of the mesh wait to start, and all others start", 240, no_agent),
    scenario(
        "a node that reboots while the API server is away comes back with its pods in the mesh",
        240,
        reboot,
    ),
    scenario("a CNI that writes its configuration again does not lose the plugin", 120, foreign_cni),
    scenario("uninstalling leaves nothing on nodes, and pods go on in plain text", 300, uninstall),
];

/// Label of namespaces and pods in the mesh.
const MODE: &str = "istio.io/dataplane-mode";
/// Name of the plugin, in the configuration and as a file.
const PLUGIN: &str = "undermesh-cni";
const PATIENCE: Duration = Duration::from_secs(60);

/// The CNI configuration of a node, as a file of this machine.
fn conflist(layout: &Layout, node: &str) -> PathBuf {
    layout.node_path(node, "cni-config").join("10-pods.conflist")
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Agents run on these nodes and no others.
pub(super) fn agents(bed: &Bed, on: &[String]) -> Result<()> {
    let all = on.len() == bed.nodes.len();
    let mark = || -> Result<()> {
        for node in &bed.nodes {
            let label = if !all && on.contains(node) { "um-agents=here" } else { "um-agents-" };
            bed.kubectl.run(&["label", "--overwrite", "node", node, label])?;
        }
        Ok(())
    };
    if !all {
        mark()?;
    }
    let selector = if all { "null" } else { "\"here\"" };
    let patch = format!(
        "{{\"spec\":{{\"template\":{{\"spec\":{{\"nodeSelector\":{{\"um-agents\":{selector}}}}}}}}}}}"
    );
    let daemon = "daemonset/undermesh-node";
    bed.kubectl.run(&["--namespace", SYSTEM, "patch", daemon, "--type", "merge", "--patch", &patch])?;
    // No agent leaves for want of a label, and no node keeps one.
    if all {
        mark()?;
    }
    let wanted = on.len() as u64;
    wait::until_true(&format!("{wanted} agents"), PATIENCE, || {
        let list =
            bed.kubectl.json(&["--namespace", SYSTEM, "get", "pods", "--selector", "app=undermesh-node"])?;
        let items = list["items"].as_array().cloned().unwrap_or_default();
        let ready = items.iter().filter(|pod| crate::cluster::kubectl::has_condition(pod, "Ready"));
        Ok(items.len() as u64 == wanted && ready.count() as u64 == wanted)
    })
}

fn no_agent(bed: &Bed) -> Result<()> {
    bed.mesh()?;
    let inside = bed.space(&[(MODE, "ambient")])?;
    // Agents have heard of the namespace once a pod of it is captured.
    inside.apply(&pods::client("before", &bed.nodes[0]))?;
    inside.apply(&pods::client("before-too", &bed.nodes[1]))?;
    inside.wait_ready(&["before", "before-too"])?;
    inside.wait_captured(&["before", "before-too"], true)?;
    agents(bed, &[])?;
    let outcome = starts_without_agent(bed, &inside);
    agents(bed, &bed.nodes)?;
    outcome?;
    inside.wait_ready(&["waits"])?;
    inside.wait_captured(&["waits"], true)
}

fn starts_without_agent(bed: &Bed, inside: &Space<'_>) -> Result<()> {
    inside.apply(&pods::client("waits", &bed.nodes[0]))?;
    let outside = bed.space(&[])?;
    outside.apply(&pods::web("starts", &bed.nodes[0]))?;
    outside.wait_ready(&["starts"])?;
    let reason = wait::until("reason why the pod waits", PATIENCE, || {
        let events = inside.kubectl(&["get", "events", "--field-selector", "involvedObject.name=waits"])?;
        Ok(events.contains("undermesh: pod").then_some(events))
    })?;
    ensure!(reason.contains("agent does not answer"), "the pod waits for another reason: {reason}");
    let phase = inside.get("pod", "waits")?["status"]["phase"].clone();
    ensure!(phase == "Pending", "a pod of the mesh started without an agent: {phase}");
    Ok(())
}

/// The plugin's configuration is on the node's disk when no agent runs yet: it must not hold what the agent itself needs.
fn reboot(bed: &Bed) -> Result<()> {
    let layout = bed.layout()?;
    bed.mesh()?;
    let (here, there) = (&bed.nodes[0], bed.nodes[1].clone());
    let (inside, outside) = (bed.space(&[(MODE, "ambient")])?, bed.space(&[])?);
    inside.apply(&[STRICT, &pods::client("client", here), &pods::web("server", &there)].concat())?;
    outside.apply(&(pods::client("client", here) + &pods::web("server", &there)))?;
    for space in [&inside, &outside] {
        space.wait_ready(&["client", "server"])?;
    }
    inside.wait_captured(&["client", "server"], true)?;
    let kubelet = || -> Result<bool> {
        let out = node::inside(layout, &there)?.args(["pidof", "kubelet"]).output()?;
        Ok(out.status.success())
    };
    crate::cluster::life::without_api(layout, || {
        node::kill(layout, &there)?;
        node::boot(layout, &there)?;
        wait::until_true("kubelet of the node that came back", PATIENCE, kubelet)
    })?;
    for (space, what) in [(&outside, "outside the mesh"), (&inside, "of the mesh")] {
        wait::until_true(&format!("pod {what}, started again"), PATIENCE, || {
            let status = &space.get("pod", "server")?["status"]["containerStatuses"][0];
            Ok(status["restartCount"].as_u64() > Some(0) && status["ready"] == true)
        })?;
        wait::until_true(&format!("answer of the pod {what}"), PATIENCE, || {
            let url = format!("http://{}/", space.server("server")?);
            Ok(space.curl("client", &url).is_ok())
        })?;
    }
    inside.wait_captured(&["server"], true)?;
    let url = format!("http://{}/", inside.server("server")?);
    ensure!(outside.curl("client", &url).is_err(), "the pod takes plain text, which STRICT forbids");
    Ok(())
}

fn foreign_cni(bed: &Bed) -> Result<()> {
    let layout = bed.layout()?;
    bed.mesh()?;
    let path = conflist(layout, &bed.nodes[1]);
    wait::until_true("chained plugin", PATIENCE, || Ok(read(&path)?.contains(PLUGIN)))?;
    let mut config: serde_json::Value = serde_json::from_str(&read(&path)?)?;
    let plugins = config["plugins"].as_array_mut().context("no plugins")?;
    plugins.retain(|plugin| plugin["type"] != PLUGIN);
    std::fs::write(&path, config.to_string())?;
    wait::until_true("plugin put back", PATIENCE, || Ok(read(&path)?.contains(PLUGIN)))?;
    let space = bed.space(&[(MODE, "ambient")])?;
    space.apply(&pods::web("server", &bed.nodes[1]))?;
    space.wait_ready(&["server"])?;
    space.wait_captured(&["server"], true)
}

pub(super) fn uninstall(bed: &Bed) -> Result<()> {
    let layout = bed.layout()?;
    bed.mesh()?;
    let space = bed.space(&[(MODE, "ambient")])?;
    space.apply(&(pods::client("client", &bed.nodes[0]) + &pods::web("server", &bed.nodes[1])))?;
    space.wait_ready(&["client", "server"])?;
    space.wait_captured(&["client", "server"], true)?;
    let url = format!("http://{}/", space.server("server")?);
    space.curl("client", &url)?;
    let left = |node: &str| -> Result<Vec<String>> {
        let mut found = Vec::new();
        if read(&conflist(layout, node))?.contains(PLUGIN) {
            found.push("CNI configuration".to_owned());
        }
        if layout.node_path(node, "cni-bin").join(PLUGIN).exists() {
            found.push("CNI plugin".to_owned());
        }
        let list =
            "ls -d /sys/fs/bpf/undermesh /run/undermesh/agents /var/lib/undermesh/cni.json 2>/dev/null; true";
        let output = node::inside(layout, node)?.args(["sh", "-c", list]).output()?;
        found.extend(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned));
        Ok(found)
    };
    for node in &bed.nodes {
        let found = left(node)?;
        ensure!(found.len() >= 4, "the scenario looks in the wrong places of {node}: only {found:?}");
    }
    let rule = space.exec("server", &["ip", "rule"])?;
    ensure!(rule.contains("0x539"), "the scenario looks for the wrong rule: {rule}");
    bed.meshctl()?.run(&["uninstall", "--wait-timeout", "120s"])?;
    let outcome = gone(bed, &space, &url, &left);
    // Later scenarios find the mesh as it was.
    wait::until_true("end of the namespace", PATIENCE, || {
        Ok(bed.kubectl.run(&["get", "namespace", SYSTEM]).is_err())
    })?;
    bed.install()?;
    outcome?;
    space.wait_captured(&["client", "server"], true)
}

fn gone(bed: &Bed, space: &Space<'_>, url: &str, left: &dyn Fn(&str) -> Result<Vec<String>>) -> Result<()> {
    for node in &bed.nodes {
        let found = left(node)?;
        ensure!(found.is_empty(), "node {node} still has {found:?}");
    }
    let rule = space.exec("server", &["ip", "rule"])?;
    ensure!(!rule.contains("0x539"), "a rule stays in the pod: {rule}");
    space.wait_captured(&["client", "server"], false)?;
    space.curl("client", url)?;
    let kinds = "clusterroles,clusterrolebindings,validatingwebhookconfigurations";
    let objects =
        bed.kubectl.run(&["get", kinds, "--selector", "app.kubernetes.io/name=undermesh", "-o", "name"])?;
    ensure!(objects.trim().is_empty(), "the cluster still has {objects}");
    Ok(())
}
