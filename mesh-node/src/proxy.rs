//! The data path: from an accepted socket to the last byte, on one worker thread.
//!
//! | module | for |
//! |---|---|
//! | [`worker`] | the threads, what the control runtime tells them, listeners and accepting |
//! | [`outbound`] | connections of the pod's application |
//! | [`inbound`] | tunnels from peers |
//! | [`plaintext`] | connections from peers without a tunnel |
//! | [`dial`] | sockets, TLS and HTTP/2 towards a peer or the application |
//! | [`pool`] | which tunnel a stream uses |
//! | [`expiry`] | until when a tunnel takes new streams |
//! | [`suspects`] | endpoints that lately did not take a connection |
//! | [`live`] | inbound connections that are evaluated again when policy changes |
//! | [`session`] | metrics, access log and failures of one connection |
//! | [`limits`] | how many connections at once |
//! | [`busy`] | how much of the workers each pod takes |
//! | [`net`] | how sockets enter and leave a pod; the seam to the kernel |

mod busy;
pub mod dial;
mod early;
mod expiry;
pub mod failed;
pub mod failures;
mod inbound;
pub mod limits;
pub mod live;
pub mod net;
mod once;
mod outbound;
mod plaintext;
pub(crate) mod pool;
pub mod proxy_header;
mod session;
mod suspects;
#[cfg(test)]
pub(crate) mod tests;
pub mod worker;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use mesh_core::error::Code;
use mesh_core::state::{LocalWorkload, MeshState, Workload};
use mesh_core::telemetry::{NodeMetrics, Telemetry};
use mesh_core::xds::again::Again;
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::certs::Certificates;
use crate::config::Config;
use failed::Failed;
use failures::Failures;
use limits::{Gauge, PodGauge};
use net::PodNet;

/// Ports of the mesh itself; a tunnel must not lead to them (HBONE reference, inbound step 5).
pub const OWN_PORTS: [u16; 4] = [15_001, 15_006, 15_008, 15_080];

/// A socket address as policies, keys and logs have it: IPv4-mapped IPv6 is IPv4.
#[must_use]
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// What every worker and the control runtime share. Nothing in it is locked on the path of a byte.
pub struct Shared {
    /// Settings.
    pub config: Config,
    /// The newest snapshot of the mesh.
    pub state: ArcSwap<MeshState>,
    /// Counts snapshots, for those who wait for one.
    pub published: watch::Sender<u64>,
    /// Certificates of this node's pods.
    pub certificates: Certificates,
    /// Metrics and access log.
    pub telemetry: Telemetry,
    /// The other metrics.
    pub metrics: NodeMetrics,
    /// Connections of all pods.
    pub gauge: Arc<Gauge>,
    /// The last failures.
    pub failures: Failures,
    /// Connections within the node that worked through the tunnel: candidates for the fast path.
    pub candidates: mpsc::Sender<crate::fastpath::Candidate>,
    /// Policies of the fast path by the number that the kernel has for them, less one.
    pub fast_path_policies: ArcSwap<Vec<mesh_core::state::Str>>,
    /// Names of connections to applications, for tracing; none where nothing is traced.
    pub named: Option<std::sync::mpsc::SyncSender<crate::trace::join::Named>>,
    /// Has the control plane asked again at once.
    pub again: Again,
    /// Told when the agent takes no new connections.
    pub drain: CancellationToken,
}

impl Shared {
    /// Makes `state` the snapshot that connections see from now on.
    pub fn publish(&self, state: Arc<MeshState>) {
        self.state.store(state);
        self.published.send_modify(|n| *n += 1);
    }
}

/// A pod of this node whose traffic is captured.
pub struct Pod {
    /// Kubernetes uid of the pod.
    pub uid: String,
    /// Namespace, name, service account, node.
    pub local: LocalWorkload,
    /// `namespace/name`, for logs.
    pub label: String,
    /// Its network.
    pub net: Box<dyn PodNet>,
    /// Its connections.
    pub gauge: Arc<PodGauge>,
    /// Told when the pod is gone: its connections end.
    pub gone: CancellationToken,
    /// Told when the pod has left the mesh and lives on: its connections go on until they end, and it gets no new ones.
    pub left: CancellationToken,
    /// Told when the pod stops being an endpoint, as when it begins to terminate: peers are to look for another.
    pub leaving: Notify,
}

impl Pod {
    /// The pod's workload, waiting up to `patience` for the control plane to announce it.
    ///
    /// # Errors
    /// [`Code::WorkloadUnknown`] if it does not.
    pub async fn workload(
        &self,
        shared: &Shared,
        patience: Duration,
    ) -> Result<(Arc<MeshState>, Arc<Workload>), Failed> {
        let look = || {
            let state = shared.state.load_full();
            let workload = state.local_workload(&self.local).cloned();
            workload.map(|w| (state, w))
        };
        if let Some(found) = look() {
            return Ok(found);
        }
        let mut published = shared.published.subscribe();
        shared.again.now();
        let arrival = async {
            loop {
                if let Some(found) = look() {
                    return Some(found);
                }
                published.changed().await.ok()?;
            }
        };
        tokio::time::timeout(patience, arrival).await.ok().flatten().ok_or_else(|| {
            Failed::new(
                Code::WorkloadUnknown,
                format!(
                    "failed to fetch information about local workload: {} is not known after {patience:?}",
                    self.label
                ),
            )
        })
    }
}
