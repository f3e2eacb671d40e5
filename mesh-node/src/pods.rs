//! The pods of this node, whatever tells about them: a container runtime on Kubernetes, a directory of JSON files
//! elsewhere.

mod cri;
mod directory;
pub mod kubelet;

pub use cri::CriSource;
pub use directory::DirectorySource;

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

/// A pod of this node, as a [`PodSource`] reports it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PodInfo {
    /// Unique for the life of the pod.
    pub uid: String,
    pub name: String,
    pub namespace: String,
    /// Empty where the source does not know it: then the control plane tells.
    pub service_account: String,
    /// Path of the network namespace, such as `/var/run/netns/cni-…`.
    pub netns: PathBuf,
    /// Path of the pod's directory in the cgroup2 hierarchy, for people: capture knows a pod by its network namespace.
    pub cgroup: PathBuf,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// TCP ports that the kubelet probes; probes reach the application without the mesh.
    #[serde(default)]
    pub probe_ports: Vec<u16>,
    /// The search list of the pod's `resolv.conf`. Without it: what Kubernetes writes for `ClusterFirst`.
    #[serde(default)]
    pub dns_search: Option<Vec<String>>,
    /// A pod in the node's own network namespace is never enrolled.
    #[serde(default)]
    pub host_network: bool,
}

impl PodInfo {
    /// Who the pod is for the control plane.
    #[must_use]
    pub fn key(&self) -> PodKey {
        PodKey {
            namespace: self.namespace.clone(),
            name: self.name.clone(),
            service_account: self.service_account.clone(),
        }
    }
}

/// What a workload of the control plane and a pod of this node have in common.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PodKey {
    pub namespace: String,
    pub name: String,
    pub service_account: String,
}

/// What a source knows at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodSnapshot {
    pub pods: Vec<PodInfo>,
    /// Entries that could not be read: what they are called, and what is wrong with them.
    pub rejected: Vec<(String, String)>,
}

/// Finds the pods of this node.
pub trait PodSource: Send + Sync {
    /// The pods of this moment.
    ///
    /// # Errors
    /// The source as a whole cannot be read; the text names the cause and the fix.
    fn snapshot(&self) -> Result<PodSnapshot, SourceError>;

    /// Calls `changed` whenever a snapshot may differ from the last one; stops when the guard is dropped. A source
    /// that misses a change is caught by the reconciler's periodic look.
    ///
    /// # Errors
    /// As for [`PodSource::snapshot`].
    fn watch(&self, changed: Arc<dyn Fn() + Send + Sync>) -> Result<WatchGuard, SourceError>;
}

/// Keeps a watch alive.
pub struct WatchGuard(#[allow(dead_code, reason = "held for its Drop")] Box<dyn std::any::Any + Send>);

impl WatchGuard {
    /// Wraps whatever ends the watch when dropped.
    pub fn new(inner: impl std::any::Any + Send) -> Self {
        Self(Box::new(inner))
    }
}

/// A pod source that cannot be read at all.
#[derive(Debug, thiserror::Error)]
#[error("pods of this node: {path}: {problem}")]
pub struct SourceError {
    pub path: PathBuf,
    pub problem: String,
}
