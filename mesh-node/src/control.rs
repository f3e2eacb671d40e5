//! The control runtime: one thread for everything that is not the data path.
//!
//! | module | for |
//! |---|---|
//! | [`answers`] | what the control plane asks on behalf of operators |
//! | [`assign`] | which pod of the node is which workload: pure |
//! | [`attempts`] | when a stream to the control plane is tried again: pure |
//! | [`plan`] | which pods are taken under capture and let go: pure |
//! | [`enrol`] | carrying that out |
//! | [`left`] | pods that have left the mesh, while connections of theirs go on |
//! | [`report`] | telling the control plane |
//! | [`relay`] | sending it what tracing tells |
//! | [`authority`] | certificates over gRPC |
//! | [`net`] | a pod's network for the proxies |
//! | [`settings`] | which settings of capture hold: pure |
//! | [`revocations`] | the revocation lists' file |

pub mod answers;
pub mod assign;
pub mod attempts;
pub mod authority;
pub mod enrol;
mod left;
pub mod net;
pub mod plan;
pub mod relay;
pub mod report;
pub mod revocations;
pub mod settings;

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use mesh_core::policy::UnknownPolicy;
use mesh_core::state::{MeshOptions, MeshState, StateIndex};
use mesh_core::xds::again::Again;
use mesh_core::xds::channel::ControlPlane;
use mesh_core::xds::client::{self, Feed, NodeDescription, NodeKind, Status};
use tokio::sync::watch;

use crate::config::{Config, Upstream};
use crate::proxy::Shared;
use crate::proxy::worker::{Command, Worker};
use mesh_core::admin::readiness::Readiness;

/// Name in the list of what readiness waits for.
pub const READY: &str = "workloads and policies";

/// The workload feed's server.
#[must_use]
pub fn xds_server(config: &Config, again: &Again) -> ControlPlane {
    let Upstream { address, root_cert, token, alt_hostname } = config.xds.clone();
    ControlPlane {
        address,
        root_cert,
        server_name: alt_hostname,
        token,
        cluster_id: config.node.cluster_id.clone(),
        headers: Vec::new(),
        again: again.clone(),
    }
}

/// The certificate authority's server.
#[must_use]
pub fn ca_server(config: &Config, again: &Again) -> ControlPlane {
    ControlPlane {
        address: config.ca.address.clone(),
        root_cert: config.ca.root_cert.clone(),
        server_name: config.ca.alt_hostname.clone(),
        ..xds_server(config, again)
    }
}

/// Follows the workload feed for ever: publishes each snapshot and has live connections evaluated again when policy
/// changed.
pub async fn follow(
    shared: Arc<Shared>,
    workers: Rc<Vec<Worker>>,
    readiness: Arc<Readiness>,
    synced: watch::Sender<bool>,
    status: watch::Sender<Status>,
) {
    let config = &shared.config;
    let metadata: BTreeMap<String, String> = [
        ("CLUSTER_ID", &config.node.cluster_id),
        ("NETWORK", &config.node.network),
        ("SERVICE_ACCOUNT", &config.node.service_account),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value.clone()))
    .collect();
    let node = NodeDescription {
        kind: NodeKind::Agent,
        ip: String::new(),
        name: format!("mesh-node-{}", config.node.name),
        namespace: config.node.namespace.clone(),
        node: config.node.name.clone(),
        metadata,
    };
    let options =
        MeshOptions { network: config.node.network.as_str().into(), unknown_policy: UnknownPolicy::Deny };
    let server = xds_server(config, &shared.again);
    let publisher = Arc::clone(&shared);
    let publish = move |state: Arc<MeshState>, complete: bool| {
        let policies_changed = publisher.state.load().policy_version() != state.policy_version();
        publisher.publish(state);
        if policies_changed {
            workers.iter().for_each(|w| w.tell(Command::Reevaluate));
        }
        if complete {
            readiness.done(READY);
            synced.send_if_modified(|known| !std::mem::replace(known, true));
        }
    };
    let feed = Feed { index: StateIndex::new(options), publish };
    client::run(&server, &node, feed, &status, Some(&shared.metrics)).await;
}
