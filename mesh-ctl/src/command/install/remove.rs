//! `uninstall`: nothing is left, neither in the cluster nor on its nodes.
//!
//! While agents leave, pods of another DaemonSet wait on every node and clean it as soon as its agent has gone: the
//! kernel programs and their pins, routes in pods' namespaces, the CNI plugin and its place in the configuration.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::record::{self, Record};
use super::{POLL, Problem, Progress, connect, wait, why_not};
use crate::cli::{Global, UninstallArgs};
use crate::cluster::{Cluster, Reference};
use crate::output::{Block, Report};
use crate::table::Tone;

const AGENT: &str = "undermesh-node";
const CLEANER: &str = "undermesh-node-uninstall";
/// An agent that is told to leave for good carries nothing on: the mesh goes.
const GRACE: u32 = 5;

/// Runs the command.
pub async fn uninstall(global: &Global, args: &UninstallArgs) -> Report {
    match uninstall_or_say(global, args).await {
        Ok(report) => report,
        Err(problem) => problem.report(),
    }
}

async fn uninstall_or_say(global: &Global, args: &UninstallArgs) -> Result<Report, Problem> {
    let cluster = connect(&args.cluster).await?;
    let namespace = args.cluster.namespace.as_str();
    let Some(record) = Record::read(&cluster, namespace).await? else {
        let told = format!("`meshctl install` has installed nothing in namespace {namespace}");
        return Err(Problem::Told(told));
    };
    let say = Progress::new(global);
    let until = Instant::now() + args.wait_timeout;
    let agent = Reference::new("apps/v1", "DaemonSet", Some(namespace), AGENT);
    if let Some(daemon) = cluster.get(&agent).await? {
        clean_nodes(&cluster, namespace, &daemon, until, &say).await?;
    }
    let mut objects = record.objects;
    objects.reverse();
    for object in objects.iter().filter(|object| keep(object, args.keep_namespace).is_none()) {
        if cluster.delete(object, None).await? {
            say.line(&format!("removed  {object}"));
        }
    }
    cluster.delete(&record::reference(namespace), None).await?;
    Ok(Report::new(global.output, &json!({"namespace": namespace, "removed": objects.len()}), || {
        let text = format!("undermesh is gone from namespace {namespace} and from every node");
        vec![Block::Line(Tone::Good, text)]
    }))
}

/// Why an object stays.
fn keep(object: &Reference, keep_namespace: bool) -> Option<&'static str> {
    match object.kind.as_str() {
        "Namespace" if keep_namespace => Some("asked for"),
        // With them every object of the kinds would go.
        "CustomResourceDefinition" => Some("other software may use it"),
        _ => None,
    }
}

async fn clean_nodes(
    cluster: &Cluster,
    namespace: &str,
    daemon: &Value,
    until: Instant,
    say: &Progress,
) -> Result<(), Problem> {
    let cleaner = cleaner(daemon);
    let reference = Reference::of(&cleaner)?;
    cluster.apply(&cleaner).await?;
    running(cluster, namespace, daemon, until).await?;
    say.line("waiting  agents leave");
    let agent = Reference::new("apps/v1", "DaemonSet", Some(namespace), AGENT);
    cluster.delete(&agent, None).await?;
    let label = format!("app={AGENT}");
    for pod in cluster.list("v1", "Pod", Some(namespace), &label).await? {
        cluster.delete(&Reference::of(&named("Pod", &pod))?, Some(GRACE)).await?;
    }
    while !cluster.list("v1", "Pod", Some(namespace), &label).await?.is_empty() {
        overdue(cluster, &agent, until).await?;
        tokio::time::sleep(POLL).await;
    }
    let left = until.saturating_duration_since(Instant::now()).max(Duration::from_secs(1));
    wait(cluster, std::slice::from_ref(&reference), left, say).await?;
    cluster.delete(&reference, None).await?;
    let label = format!("app={CLEANER}");
    for pod in cluster.list("v1", "Pod", Some(namespace), &label).await? {
        cluster.delete(&Reference::of(&named("Pod", &pod))?, Some(1)).await?;
    }
    say.line("removed  programs, pins, routes and CNI configuration of every node");
    Ok(())
}

/// Waits until the cleaner's pods run, though not clean yet, on as many nodes as there are agents.
async fn running(cluster: &Cluster, namespace: &str, daemon: &Value, until: Instant) -> Result<(), Problem> {
    let wanted = daemon.pointer("/status/desiredNumberScheduled").and_then(Value::as_u64).unwrap_or(0);
    let cleaner = Reference::new("apps/v1", "DaemonSet", Some(namespace), CLEANER);
    loop {
        let pods = cluster.list("v1", "Pod", Some(namespace), &format!("app={CLEANER}")).await?;
        let phase = |pod: &&Value| pod.pointer("/status/phase").and_then(Value::as_str) == Some("Running");
        if pods.iter().filter(phase).count() as u64 >= wanted {
            return Ok(());
        }
        overdue(cluster, &cleaner, until).await?;
        tokio::time::sleep(POLL).await;
    }
}

async fn overdue(cluster: &Cluster, object: &Reference, until: Instant) -> Result<(), Problem> {
    if Instant::now() < until {
        return Ok(());
    }
    let why = why_not(cluster, object).await;
    Err(Problem::Told(format!("{object} takes too long; `meshctl uninstall` goes on where it stopped{why}")))
}

/// Listed objects name no kind.
fn named(kind: &str, object: &Value) -> Value {
    let mut named = object.clone();
    if let Some(map) = named.as_object_mut() {
        map.insert("kind".to_owned(), kind.into());
        map.insert("apiVersion".to_owned(), "v1".into());
    }
    named
}

/// The agents' DaemonSet, made into one that cleans.
fn cleaner(daemon: &Value) -> Value {
    let mut pod = daemon.pointer("/spec/template/spec").cloned().unwrap_or_default();
    if let Some(map) = pod.as_object_mut() {
        map.insert("terminationGracePeriodSeconds".to_owned(), 1.into());
    }
    if let Some(container) = pod.pointer_mut("/containers/0").and_then(Value::as_object_mut) {
        container.insert("args".to_owned(), json!(["uninstall", "--stay"]));
        let probe = json!({"httpGet": {"path": "/healthz/ready", "port": 15021}, "periodSeconds": 1});
        container.insert("readinessProbe".to_owned(), probe);
        // Neither is there any more when the control plane goes.
        without(container, "volumeMounts", &["root-cert", "token"]);
    }
    if let Some(map) = pod.as_object_mut() {
        without(map, "volumes", &["root-cert", "token"]);
    }
    let text = |pointer: &str| daemon.pointer(pointer).cloned().unwrap_or_default();
    json!({
        "apiVersion": "apps/v1", "kind": "DaemonSet",
        "metadata": {"name": CLEANER, "namespace": text("/metadata/namespace")},
        "spec": {
            "selector": {"matchLabels": {"app": CLEANER}},
            "template": {
                "metadata": {"labels": {"app": CLEANER, "istio.io/dataplane-mode": "none"}},
                "spec": pod,
            },
        },
    })
}

fn without(map: &mut serde_json::Map<String, Value>, list: &str, names: &[&str]) {
    if let Some(items) = map.get_mut(list).and_then(Value::as_array_mut) {
        items.retain(|item| {
            !item.get("name").and_then(Value::as_str).is_some_and(|name| names.contains(&name))
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chart::{self, Release};

    #[test]
    fn the_cleaner_sees_what_the_agents_saw_and_needs_no_control_plane() {
        let release =
            Release { name: "undermesh".into(), namespace: "mesh".into(), service: "meshctl".into() };
        let objects = chart::objects(&release, &chart::defaults().unwrap()).unwrap();
        let daemon = objects.iter().find(|o| o["kind"] == "DaemonSet").unwrap();
        let cleaner = cleaner(daemon);
        let container = &cleaner["spec"]["template"]["spec"]["containers"][0];
        assert_eq!(container["args"], json!(["uninstall", "--stay"]));
        let mounts: Vec<_> = container["volumeMounts"]
            .as_array()
            .unwrap()
            .iter()
            .map(|m| m["name"].as_str().unwrap())
            .collect();
        assert_eq!(mounts, ["cri", "netns", "bpf", "cgroup", "run", "cni-bin", "cni-conf", "cni-state"]);
        assert_eq!(cleaner["spec"]["template"]["spec"]["volumes"].as_array().unwrap().len(), mounts.len());
        assert_eq!(cleaner["spec"]["template"]["metadata"]["labels"]["app"], CLEANER);
    }

    #[test]
    fn definitions_of_kinds_stay_and_the_namespace_if_asked() {
        let of = |kind: &str| Reference::new("v1", kind, None, "a");
        assert!(keep(&of("CustomResourceDefinition"), false).is_some());
        assert!(keep(&of("Namespace"), true).is_some());
        assert!(keep(&of("Namespace"), false).is_none() && keep(&of("Service"), true).is_none());
    }
}
