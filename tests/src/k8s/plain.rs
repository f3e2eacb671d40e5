//! The cluster itself, without the mesh: what the other scenarios take for granted.

use super::pods::{self, IMAGE};
use super::{Bed, Scenario, scenario};
use crate::bed::wait;
use crate::cluster::{life, node};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("without a mesh, pods of two nodes talk by address, by service and by name", 120, talk),
    scenario(
        "without a mesh, a privileged pod sees its node's cgroups, programs and namespaces",
        120,
        node_agent,
    ),
    scenario("without a mesh, pods go on while their kubelet is killed and comes back", 120, kubelet),
    scenario("without a mesh, a node that loses power comes back with its pods", 180, power),
];

/// Who the web service says has asked it.
pub(super) fn asked(answer: &str) -> Result<(String, String)> {
    let answer: Value = serde_json::from_str(answer).with_context(|| format!("not JSON: {answer}"))?;
    let text = |key: &str| answer[key].as_str().unwrap_or_default().to_owned();
    Ok((text("service"), text("client")))
}

pub(super) fn talk(bed: &Bed) -> Result<()> {
    let space = bed.space(&[])?;
    let (a, b) = (&bed.nodes[0], &bed.nodes[1]);
    let objects = [
        pods::web("near", a),
        pods::web("far", b),
        pods::client("client", a),
        pods::service("near"),
        pods::service("far"),
    ];
    space.apply(&objects.concat())?;
    space.wait_ready(&["near", "far", "client"])?;
    let own = space.address("client")?;
    for to in ["near", "far"] {
        let pod = space.server(to)?;
        let service = &space.get("service", to)?["spec"]["clusterIP"];
        let service: IpAddr =
            service.as_str().unwrap_or_default().parse().context("the service's address")?;
        let service = SocketAddr::new(service, 80);
        let name = format!("{to}.{}.svc.cluster.local", space.name());
        for url in [format!("http://{pod}/"), format!("http://{service}/"), format!("http://{name}/")] {
            // A service's rules reach a node a moment after its pod is ready.
            let (service, client) =
                wait::until(&format!("answer from {url}"), Duration::from_secs(20), || {
                    asked(&space.curl("client", &url)?).map(Some)
                })?;
            ensure!(service == to, "{url} was answered by {service}");
            ensure!(client == own.to_string(), "{to} was asked by {client} instead of {own} through {url}");
        }
    }
    Ok(())
}

/// A pod with what an agent of a node asks of it.
fn privileged(name: &str, node: &str) -> String {
    format!(
        "---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {name}}}}}
spec:
  nodeSelector: {{kubernetes.io/hostname: {node}}}
  terminationGracePeriodSeconds: 1
  hostPID: true
  containers:
  - name: main
    image: {IMAGE}
    imagePullPolicy: IfNotPresent
    command: [sleep, infinity]
    securityContext: {{privileged: true}}
    volumeMounts:
    - {{name: bpf, mountPath: /sys/fs/bpf, mountPropagation: Bidirectional}}
    - {{name: cgroup, mountPath: /host/sys/fs/cgroup, mountPropagation: HostToContainer}}
    - {{name: netns, mountPath: /var/run/netns, mountPropagation: HostToContainer}}
    - {{name: containerd, mountPath: /run/containerd}}
    - {{name: conf, mountPath: /host/cni/conf}}
    - {{name: bin, mountPath: /host/cni/bin}}
  volumes:
  - {{name: bpf, hostPath: {{path: /sys/fs/bpf}}}}
  - {{name: cgroup, hostPath: {{path: /sys/fs/cgroup}}}}
  - {{name: netns, hostPath: {{path: /var/run/netns}}}}
  - {{name: containerd, hostPath: {{path: /run/containerd}}}}
  - {{name: conf, hostPath: {{path: /etc/cni/net.d}}}}
  - {{name: bin, hostPath: {{path: /opt/cni/bin}}}}
"
    )
}

fn node_agent(bed: &Bed) -> Result<()> {
    bed.layout()?;
    let space = bed.space(&[])?;
    let (a, b) = (&bed.nodes[0], &bed.nodes[1]);
    space.apply(&[privileged("agent", a), pods::web("near", a), pods::web("far", b)].concat())?;
    space.wait_ready(&["agent", "near", "far"])?;
    let uid = |pod: &str| -> Result<String> {
        Ok(space.get("pod", pod)?["metadata"]["uid"].as_str().unwrap_or_default().to_owned())
    };
    let (near, far) = (uid("near")?, uid("far")?);
    let sh = |script: &str| space.exec("agent", &["sh", "-c", script]);
    let mounts = sh("cat /proc/mounts")?;
    for (at, kind) in [("/sys/fs/bpf", "bpf"), ("/host/sys/fs/cgroup", "tmpfs")] {
        let there = mounts.lines().any(|line| {
            let mut fields = line.split(' ').skip(1);
            fields.next() == Some(at) && fields.next() == Some(kind)
        });
        // Where there is version 2 only, the directory is its mount.
        ensure!(there || kind == "tmpfs", "{at} is no {kind} in the pod:\n{mounts}");
    }
    let cgroups = sh(
        "ls -d /host/sys/fs/cgroup/kubepods/*/* /host/sys/fs/cgroup/unified/kubepods/*/* 2>/dev/null; true",
    )?;
    ensure!(cgroups.contains(&near), "the cgroup of a pod of the same node is not seen:\n{cgroups}");
    ensure!(!cgroups.contains(&far), "the cgroup of a pod of another node is seen:\n{cgroups}");
    // The agent reaches pods through their network namespaces, also of pods that came after it.
    space.apply(&pods::web("late", a))?;
    space.wait_ready(&["late"])?;
    let late = space.address("late")?;
    let seen = sh("for n in /var/run/netns/*; do nsenter --net=$n ip -o -4 address; done")?;
    ensure!(seen.contains(&format!("{late}/")), "the namespace of a later pod is not seen:\n{seen}");
    let processes = sh("cat /proc/[0-9]*/cgroup 2>/dev/null; true")?;
    ensure!(processes.contains(&near), "processes of other pods of the node are not seen");
    ensure!(!processes.contains(&far), "processes of another node are seen");
    let files = sh("ls /host/cni/conf /host/cni/bin /run/containerd/containerd.sock")?;
    ensure!(
        files.contains(".conflist") && files.contains("ptp"),
        "the node's pod network is not seen:\n{files}"
    );
    Ok(())
}

fn kubelet(bed: &Bed) -> Result<()> {
    let layout = bed.layout()?;
    let space = bed.space(&[])?;
    let name = &bed.nodes[1];
    space.apply(&[pods::web("server", name), pods::client("client", &bed.nodes[0])].concat())?;
    space.wait_ready(&["server", "client"])?;
    let id = |pod: &str| -> Result<String> { Ok(space.get("pod", pod)?["status"].to_string()) };
    let before = id("server")?;
    let pid = || -> Result<String> {
        let out =
            node::inside(layout, name)?.args(["pidof", "kubelet"]).output().context("cannot run pidof")?;
        Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned())
    };
    let old = pid()?;
    ensure!(!old.is_empty(), "no kubelet runs on {name}");
    node::inside(layout, name)?.args(["kill", "-9", &old]).status().context("cannot run kill")?;
    let url = format!("http://{}/", space.server("server")?);
    space.curl("client", &url).context("without a kubelet")?;
    wait::until_true("another kubelet", Duration::from_secs(20), || {
        let new = pid()?;
        Ok(!new.is_empty() && new != old)
    })?;
    wait::until_true("program in the pod", Duration::from_secs(30), || {
        Ok(space.exec("server", &["cat", "/etc/hostname"])?.trim() == "server")
    })?;
    let container = |status: &str| -> Option<String> {
        let status: Value = serde_json::from_str(status).ok()?;
        Some(status["containerStatuses"][0]["containerID"].as_str()?.to_owned())
    };
    ensure!(container(&before) == container(&id("server")?), "the container was started again");
    Ok(())
}

fn power(bed: &Bed) -> Result<()> {
    let layout = bed.layout()?;
    let space = bed.space(&[])?;
    let name = bed.nodes[1].clone();
    space.apply(&[pods::web("server", &name), pods::client("client", &bed.nodes[0])].concat())?;
    space.wait_ready(&["server", "client"])?;
    node::kill(layout, &name)?;
    wait::until_true("node that is not ready", Duration::from_secs(60), || {
        Ok(!bed.kubectl.ready_nodes()?.contains(&name))
    })?;
    node::boot(layout, &name)?;
    life::wait_nodes(layout, std::slice::from_ref(&name))?;
    wait::until_true("answer of the pod that came back", Duration::from_secs(60), || {
        let url = format!("http://{}/", space.server("server")?);
        Ok(space.curl("client", &url).is_ok())
    })?;
    let restarts = space.get("pod", "server")?["status"]["containerStatuses"][0]["restartCount"].as_u64();
    ensure!(restarts.is_some_and(|n| n > 0), "the container was never started again: {restarts:?}");
    Ok(())
}
