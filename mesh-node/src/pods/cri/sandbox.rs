//! What a runtime says of a sandbox, as a pod: pure.

use std::path::PathBuf;

use mesh_core::xds::proto::cri::{NamespaceMode, PodSandbox, PodSandboxStatusResponse};
use serde::Deserialize;

use super::cgroup;
use crate::dns::names::MAX_SEARCH;
use crate::pods::PodInfo;

/// A network namespace that is the node's own.
const HOST_NETNS: &str = "/proc/1/ns/net";
/// Labels of the kubelet, which are none of the pod's.
const KUBELET_LABELS: &str = "io.kubernetes.";

/// A pod that the runtime has a sandbox for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    /// Without service account and probes; its cgroup is relative to the hierarchy's root.
    pub(super) pod: PodInfo,
    /// Nanoseconds since the epoch.
    pub(super) created_at: i64,
}

/// The runtime's own description, as far as it is read: an OCI specification, and what the kubelet asked for.
#[derive(Deserialize)]
struct Info {
    #[serde(rename = "runtimeSpec")]
    spec: Option<Spec>,
    #[serde(default)]
    config: Option<Config>,
}

#[derive(Deserialize)]
struct Spec {
    linux: Option<Linux>,
}

#[derive(Default, Deserialize)]
struct Linux {
    #[serde(default)]
    namespaces: Vec<Namespace>,
    #[serde(rename = "cgroupsPath", default)]
    cgroups_path: String,
}

#[derive(Deserialize)]
struct Namespace {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    path: PathBuf,
}

#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    dns_config: Option<Dns>,
}

#[derive(Deserialize)]
struct Dns {
    #[serde(default)]
    searches: Vec<String>,
}

/// The pod of a sandbox.
///
/// # Errors
/// What the runtime's answer lacks.
pub(super) fn found(sandbox: &PodSandbox, status: &PodSandboxStatusResponse) -> Result<Found, String> {
    let metadata = sandbox.metadata.as_ref().ok_or("no metadata")?;
    for (field, value) in
        [("uid", &metadata.uid), ("name", &metadata.name), ("namespace", &metadata.namespace)]
    {
        if value.is_empty() {
            return Err(format!("metadata.{field} is empty, must name the pod"));
        }
    }
    let pod = format!("{}/{}", metadata.namespace, metadata.name);
    let options =
        status.status.as_ref().and_then(|s| s.linux.as_ref()?.namespaces.as_ref()?.options.as_ref());
    let host_network = options.is_some_and(|o| o.network() == NamespaceMode::Node);
    let text = status.info.get("info").ok_or_else(|| {
        format!("{pod}: the runtime tells no more of it (PodSandboxStatus, verbose, `info`)")
    })?;
    let info: Info = serde_json::from_str(text).map_err(|error| format!("{pod}: info: {error}"))?;
    let linux = info.spec.and_then(|spec| spec.linux).unwrap_or_default();
    let netns = linux.namespaces.into_iter().find(|namespace| namespace.kind == "network").map(|n| n.path);
    let netns = match netns.filter(|path| path.is_absolute()) {
        Some(path) if !host_network => path,
        _ if host_network => PathBuf::from(HOST_NETNS),
        _ => {
            return Err(format!(
                "{pod}: info.runtimeSpec.linux.namespaces has no path of a network namespace"
            ));
        }
    };
    let search = info.config.and_then(|config| config.dns_config).map(|dns| dns.searches);
    let own = |(key, _): &(&String, &String)| !key.starts_with(KUBELET_LABELS);
    Ok(Found {
        pod: PodInfo {
            uid: metadata.uid.clone(),
            name: metadata.name.clone(),
            namespace: metadata.namespace.clone(),
            service_account: String::new(),
            netns,
            cgroup: cgroup::of_pod(&linux.cgroups_path).unwrap_or_default(),
            labels: sandbox.labels.iter().filter(own).map(|(k, v)| (k.clone(), v.clone())).collect(),
            probe_ports: Vec::new(),
            dns_search: search.filter(|list| !list.is_empty() && list.len() <= MAX_SEARCH),
            host_network,
        },
        created_at: sandbox.created_at,
    })
}
