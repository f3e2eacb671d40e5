//! The clusters of the process: what is known and counted of each backend.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use arc_swap::ArcSwap;
use mesh_core::state::{MeshState, Str, Workload};

use super::cluster::Cluster;
use super::destinations::{Changes, Destinations};
use super::registry::Registry;
use crate::config::{Labels, Own, Snapshot};

/// What clusters are built from.
#[derive(Debug, Clone)]
pub struct View {
    /// Which waypoint this is.
    pub own: Arc<Own>,
    /// Workloads and services.
    pub mesh: Arc<MeshState>,
    /// Labels by workload uid.
    pub labels: Arc<HashMap<Str, Arc<Labels>>>,
    /// Policies.
    pub destinations: Destinations,
    replicas: OnceLock<Vec<Arc<Workload>>>,
}

impl View {
    /// Puts the parts together.
    #[must_use]
    pub fn new(
        own: Arc<Own>,
        mesh: Arc<MeshState>,
        labels: Arc<HashMap<Str, Arc<Labels>>>,
        destinations: Destinations,
    ) -> Self {
        Self { own, mesh, labels, destinations, replicas: OnceLock::new() }
    }

    /// The workloads of this waypoint. Looked for once, when somebody asks.
    pub(super) fn replicas(&self) -> &[Arc<Workload>] {
        self.replicas.get_or_init(|| {
            let Own { namespace, gateway, .. } = &*self.own;
            let is_replica = |w: &&Arc<Workload>| {
                *w.namespace == **namespace
                    && !gateway.is_empty()
                    && (*w.workload_name == **gateway || *w.canonical_name == **gateway)
            };
            self.mesh.workloads().filter(is_replica).cloned().collect()
        })
    }

    /// A workload of this waypoint, of this node if there is one.
    pub(super) fn home(&self) -> Option<&Arc<Workload>> {
        let replicas = self.replicas();
        replicas.iter().find(|w| *w.node == *self.own.node).or(replicas.first())
    }
}

impl From<&Snapshot> for View {
    fn from(snapshot: &Snapshot) -> Self {
        let Snapshot { own, mesh, labels, destinations, .. } = snapshot;
        Self::new(own.clone(), mesh.clone(), labels.clone(), destinations.clone())
    }
}

/// The name of no subset: every request asks for a cluster, and few for a subset.
static WHOLE: LazyLock<Str> = LazyLock::new(|| "".into());

/// Names a cluster.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ClusterKey {
    /// Whose endpoints.
    pub target: Target,
    /// Of the service, or of the workload.
    pub port: u16,
    /// Empty: all endpoints.
    pub subset: Str,
}

/// Whose endpoints a cluster has.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    /// Those of a service, by `namespace/hostname`.
    Service(Str),
    /// The workload itself, by uid: no destination rule applies to it.
    Workload(Str),
}

impl ClusterKey {
    /// A service port, or a subset of it where the name is not empty.
    #[must_use]
    pub fn service(key: &Str, port: u16, subset: &str) -> Self {
        let subset = if subset.is_empty() { WHOLE.clone() } else { subset.into() };
        Self { target: Target::Service(key.clone()), port, subset }
    }

    /// A port of a workload.
    #[must_use]
    pub fn workload(uid: &Str, port: u16) -> Self {
        Self { target: Target::Workload(uid.clone()), port, subset: WHOLE.clone() }
    }
}

impl fmt::Display for ClusterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Target::Service(name) | Target::Workload(name)) = &self.target;
        write!(f, "{name}:{}", self.port)?;
        if self.subset.is_empty() { Ok(()) } else { write!(f, " (subset {})", self.subset) }
    }
}

/// A route names something that is not there (response flag NC, status 503).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnknownCluster {
    /// No such service.
    #[error("service {0} is not known to this waypoint; is its namespace or ServiceEntry visible here?")]
    Service(Str),
    /// The service has other ports.
    #[error("service {service} has no port {port}; it has {known}")]
    Port {
        /// `namespace/hostname`.
        service: Str,
        /// What was asked for.
        port: u16,
        /// What there is.
        known: String,
    },
    /// No destination rule defines the subset.
    #[error(
        "no destination rule that applies to service {service} defines the subset {subset:?}; defined are: {known}"
    )]
    Subset {
        /// `namespace/hostname`.
        service: Str,
        /// What was asked for.
        subset: Str,
        /// What there is.
        known: String,
    },
    /// No such workload.
    #[error("workload {0} is not known to this waypoint")]
    Workload(Str),
}

/// All clusters; shared by all workers.
#[derive(Debug)]
pub struct Clusters {
    epoch: Instant,
    view: ArcSwap<Option<View>>,
    clusters: Registry<ClusterKey, Cluster>,
    /// Held while clusters are made or changed.
    building: Mutex<()>,
}

impl Clusters {
    /// None yet; times are counted from `now`.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self { epoch: now, view: ArcSwap::default(), clusters: Registry::default(), building: Mutex::new(()) }
    }

    /// Takes over what a new snapshot says, before the snapshot itself is published. Clusters that exist keep what they
    /// have counted; those whose service or subset is gone are forgotten, once nothing uses them any more.
    pub fn apply(&self, view: View, now: Instant) {
        let _building = lock(&self.building);
        let changes = match &**self.view.load() {
            Some(earlier) => view.destinations.changes_since(&earlier.destinations),
            None => Changes::All,
        };
        self.clusters.retain(|_, cluster| cluster.refresh(&view, &changes, now).is_ok());
        self.view.store(Arc::new(Some(view)));
    }

    /// The cluster of a backend.
    ///
    /// # Errors
    /// Nothing has that name.
    pub fn cluster(&self, key: &ClusterKey, now: Instant) -> Result<Arc<Cluster>, UnknownCluster> {
        if let Some(cluster) = self.clusters.get(key) {
            return Ok(cluster);
        }
        let _building = lock(&self.building);
        let view = self.view.load();
        let Some(view) = &**view else {
            let (Target::Service(name) | Target::Workload(name)) = &key.target;
            return Err(UnknownCluster::Service(name.clone()));
        };
        let cluster = Arc::new(Cluster::new(key, self.epoch));
        cluster.refresh(view, &Changes::All, now)?;
        Ok(self.clusters.get_or_insert(key, &cluster))
    }

    /// Those that have been used, in no order.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Cluster>> {
        self.clusters.values()
    }
}

/// A panic of another thread leaves nothing half done here: tables are replaced whole.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
