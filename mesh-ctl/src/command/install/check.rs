//! `precheck` and `verify`.

use serde::Serialize;
use serde_json::Value;

use super::record::Record;
use super::{Problem, connect, state, why_not};
use crate::cli::{ClusterArgs, Global};
use crate::cluster::{Cluster, Reference};
use crate::output::{Block, Exit, Report};
use crate::table::{Cell, Table, Tone};

/// Kernels from here on have all that capture needs; the program that steers SYNs does not load before.
const LEAST_KERNEL: (u32, u32) = (5, 17);
/// The API server's oldest version.
const LEAST_SERVER: (u32, u32) = (1, 25);
/// What an installation creates and the caller must be allowed to.
const NEEDED: [(&str, &str); 6] = [
    ("", "namespaces"),
    ("", "configmaps"),
    ("apps", "daemonsets"),
    ("apps", "deployments"),
    ("rbac.authorization.k8s.io", "clusterroles"),
    ("admissionregistration.k8s.io", "validatingwebhookconfigurations"),
];

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    what: String,
    ok: bool,
    detail: String,
}

impl Finding {
    fn new(what: impl Into<String>, ok: bool, detail: impl Into<String>) -> Self {
        Self { what: what.into(), ok, detail: detail.into() }
    }
}

fn report(global: &Global, findings: &[Finding]) -> Report {
    let exit = if findings.iter().all(|f| f.ok) { Exit::Fine } else { Exit::No };
    Report::new(global.output, &findings, || {
        let mut table = Table::new(&["", "WHAT", "DETAIL"]);
        for finding in findings {
            let mark = if finding.ok { Cell::new("ok", Tone::Good) } else { Cell::new("no", Tone::Bad) };
            table.row([mark, finding.what.clone().into(), finding.detail.clone().into()]);
        }
        vec![Block::Table(table)]
    })
    .exit(exit)
}

/// Whether the mesh can be installed: the API server, the caller's rights, the nodes, other installations.
pub async fn precheck(global: &Global, args: &ClusterArgs) -> Report {
    match precheck_or_say(args).await {
        Ok(findings) => report(global, &findings),
        Err(problem) => problem.report(),
    }
}

async fn precheck_or_say(args: &ClusterArgs) -> Result<Vec<Finding>, Problem> {
    let cluster = connect(args).await?;
    let mut findings = Vec::new();
    let version = cluster.version().await?;
    let enough = numbers(&version).is_some_and(|v| v >= LEAST_SERVER);
    let least = format!("{}.{}", LEAST_SERVER.0, LEAST_SERVER.1);
    let detail = if enough { version } else { format!("{version}: {least} is the oldest that works") };
    findings.push(Finding::new("API server", enough, detail));
    for (group, resource) in NEEDED {
        let may = cluster.may("create", group, resource).await?;
        let detail = if may { "allowed" } else { "forbidden: use an administrator's credentials" };
        findings.push(Finding::new(format!("create {resource}"), may, detail));
    }
    for node in cluster.list("v1", "Node", None, "kubernetes.io/os=linux").await? {
        findings.push(node_finding(&node));
    }
    let others = refuse_second(&cluster, &args.namespace).await;
    let detail = others.as_ref().err().map_or_else(|| "none".to_owned(), ToString::to_string);
    findings.push(Finding::new("other installations", others.is_ok(), detail));
    Ok(findings)
}

fn node_finding(node: &Value) -> Finding {
    let text = |pointer: &str| node.pointer(pointer).and_then(Value::as_str).unwrap_or("unknown");
    let (name, kernel) = (text("/metadata/name"), text("/status/nodeInfo/kernelVersion"));
    let runtime = text("/status/nodeInfo/containerRuntimeVersion");
    let version = numbers(kernel).unwrap_or_default();
    let note = if version >= LEAST_KERNEL { "" } else { ": older than 5.17, which capture needs" };
    Finding::new(format!("node {name}"), version >= LEAST_KERNEL, format!("Linux {kernel}, {runtime}{note}"))
}

/// Major and minor of `v1.34.4` or `6.18.0-rc1`.
fn numbers(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.trim_start_matches('v').split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Two meshes would capture the same pods, and two control planes write the same status.
pub(super) async fn refuse_second(cluster: &Cluster, namespace: &str) -> Result<(), Problem> {
    for daemon in cluster.list("apps/v1", "DaemonSet", None, "app.kubernetes.io/name=undermesh").await? {
        let text = |pointer: &str| daemon.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        let (there, by) =
            (text("/metadata/namespace"), text("/metadata/labels/app.kubernetes.io~1managed-by"));
        if there != namespace {
            let told = format!(
                "the mesh is already installed in namespace {there}; a cluster has one (give -n {there})"
            );
            return Err(Problem::Told(told));
        }
        if by == "Helm" {
            let told = format!(
                "Helm installed the mesh in namespace {there}; use `helm upgrade` or `helm uninstall`"
            );
            return Err(Problem::Told(told));
        }
    }
    let istiod = Reference::new("apps/v1", "Deployment", Some(namespace), "istiod");
    let Some(found) = cluster.get(&istiod).await? else { return Ok(()) };
    let label = found.pointer("/metadata/labels/app.kubernetes.io~1name").and_then(Value::as_str);
    if label == Some("undermesh") {
        return Ok(());
    }
    Err(Problem::Told(format!(
        "namespace {namespace} has an istiod that is not ours; remove it, or install into another namespace with -n"
    )))
}

/// Whether what was installed is there and runs.
pub async fn verify(global: &Global, args: &ClusterArgs) -> Report {
    match verify_or_say(args).await {
        Ok(findings) => report(global, &findings),
        Err(problem) => problem.report(),
    }
}

async fn verify_or_say(args: &ClusterArgs) -> Result<Vec<Finding>, Problem> {
    let cluster = connect(args).await?;
    let namespace = &args.namespace;
    let Some(record) = Record::read(&cluster, namespace).await? else {
        let told = format!("`meshctl install` has installed nothing in namespace {namespace}");
        return Err(Problem::Told(told));
    };
    let mut findings = vec![Finding::new("version", true, record.version.clone())];
    for reference in &record.objects {
        let (ok, detail) = match state(&cluster, reference).await? {
            None => (false, "is gone; `meshctl upgrade` puts it back".to_owned()),
            Some((_, Some(state))) if !state.done => {
                (false, format!("{state}{}", why_not(&cluster, reference).await))
            }
            Some((_, Some(state))) => (true, state.to_string()),
            Some((_, None)) => (true, String::new()),
        };
        findings.push(Finding::new(reference.to_string(), ok, detail));
    }
    let roots = Reference::new("v1", "ConfigMap", Some(namespace), "istio-ca-root-cert");
    let written = cluster.get(&roots).await?.is_some();
    let detail = if written { "" } else { "is not there: the control plane writes it" };
    findings.push(Finding::new(roots.to_string(), written, detail));
    Ok(findings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_they_are_written() {
        assert_eq!(numbers("v1.34.4"), Some((1, 34)));
        assert_eq!(numbers("5.10.0-28-amd64"), Some((5, 10)));
        assert_eq!(numbers("6.18+"), Some((6, 18)));
        assert_eq!(numbers("unknown"), None);
    }

    #[test]
    fn a_node_with_a_kernel_that_is_too_old_is_named() {
        let node = |kernel: &str| {
            let info =
                serde_json::json!({"kernelVersion": kernel, "containerRuntimeVersion": "containerd://1.7"});
            serde_json::json!({"metadata": {"name": "n1"}, "status": {"nodeInfo": info}})
        };
        assert!(node_finding(&node("6.1.0")).ok);
        let old = node_finding(&node("5.15.0"));
        assert!(!old.ok && old.detail.contains("5.17"), "{old:?}");
    }
}
