//! From the control plane's resources to a [`Snapshot`].
//!
//! Nothing is published before every type has been answered once: services without their policies would be open.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::sync::Arc;

use mesh_core::policy::UnknownPolicy;
use mesh_core::state::{Locality, MeshOptions, MeshState, StateIndex, Str};
use mesh_core::xds::client::{self, NodeDescription, NodeKind, Status};
use mesh_core::xds::delta::Handler;
use mesh_core::xds::l7;
use mesh_core::xds::proto::l7 as wire;
use mesh_core::xds::proto::security::Authorization;
use mesh_core::xds::proto::workload::{Address, address};
use prost::Message;
use tokio::sync::watch;

use crate::cli::Config;
use crate::config::{Changed, Own, Resources, Snapshot};
use crate::security::jwks::KeyStore;

/// Follows the control plane for ever; each snapshot goes to `publish`.
pub async fn follow(
    config: &Config,
    keys: KeyStore,
    publish: impl FnMut(Arc<Snapshot>),
    status: &watch::Sender<Status>,
) -> Infallible {
    client::run(&config.xds, &node(config), Feed::new(config, keys, publish), status, None).await
}

/// As whom the control plane knows this process.
#[must_use]
pub fn node(config: &Config) -> NodeDescription {
    let metadata = [
        ("CLUSTER_ID", config.cluster_id.as_str()),
        ("NETWORK", &config.own.network),
        ("SERVICE_ACCOUNT", config.identity.service_account()),
        ("GATEWAY_NAME", &config.own.gateway),
    ];
    NodeDescription {
        kind: NodeKind::Waypoint,
        ip: String::new(),
        name: config.pod.clone(),
        namespace: config.own.namespace.clone(),
        node: config.own.node.clone(),
        metadata: metadata.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
    }
}

/// Keeps what the control plane says.
struct Feed<F> {
    index: StateIndex,
    resources: Resources,
    /// Uids by name of the resource with the labels.
    labelled: HashMap<String, Str>,
    changed: Changed,
    own: Arc<Own>,
    pod: String,
    last: Option<Arc<Snapshot>>,
    keys: KeyStore,
    publish: F,
}

impl<F: FnMut(Arc<Snapshot>)> Feed<F> {
    fn new(config: &Config, keys: KeyStore, publish: F) -> Self {
        let network = config.own.network.as_str().into();
        let options = MeshOptions { network, unknown_policy: UnknownPolicy::Deny };
        Self {
            index: StateIndex::new(options),
            resources: Resources::default(),
            labelled: HashMap::new(),
            changed: Changed::ALL,
            own: Arc::new(config.own.clone()),
            pod: config.pod.clone(),
            last: None,
            keys,
            publish,
        }
    }

    /// Where we run is what the control plane says of our pod, unless we were told.
    fn locate(&mut self, mesh: &MeshState) {
        let own = &self.own;
        if own.locality != Locality::default() {
            return;
        }
        let found = mesh.workloads_by_name(&own.namespace, &self.pod).next();
        let Some(workload) = found.filter(|w| w.locality != Locality::default()) else { return };
        self.own = Arc::new(Own { locality: workload.locality.clone(), ..Own::clone(own) });
        self.changed = Changed::ALL;
    }
}

impl<F: FnMut(Arc<Snapshot>)> Handler for Feed<F> {
    fn address(&mut self, name: &str, address: &Address) -> Result<(), String> {
        self.changed.services |= matches!(address.r#type, Some(address::Type::Service(_)));
        self.index.apply_address(name, address).map_err(|error| error.to_string())
    }

    fn remove_address(&mut self, name: &str) {
        // Uids of pods are told from names of services by this; of anything else it does not matter.
        self.changed.services |= !name.contains("//");
        self.index.remove_address(name);
    }

    fn policy(&mut self, _name: &str, policy: &Authorization) -> Result<(), String> {
        self.index.apply_policy(policy).map_err(|error| error.to_string())
    }

    fn remove_policy(&mut self, name: &str) {
        self.index.remove_policy(name);
    }

    fn further_types(&self) -> &'static [&'static str] {
        &l7::TYPES
    }

    fn further(&mut self, type_url: &'static str, name: &str, payload: &[u8]) -> Result<(), String> {
        let (resources, changed) = (&mut self.resources, &mut self.changed);
        match type_url {
            l7::ROUTE_TYPE => {
                let route: wire::Route = decode(payload)?;
                resources.routes.insert(name.to_owned(), route.into());
                changed.routes = true;
            }
            l7::DESTINATION_TYPE => {
                changed.destinations |= put(&mut resources.destinations, name, payload)?;
            }
            l7::AUTHORIZATION_TYPE => {
                changed.policies |= put(&mut resources.authorizations, name, payload)?;
            }
            l7::AUTHENTICATION_TYPE => {
                changed.policies |= put(&mut resources.authentications, name, payload)?;
            }
            l7::LABELS_TYPE => {
                let labels: wire::WorkloadLabels = decode(payload)?;
                if labels.workload_uid.is_empty() {
                    return Err("workload_uid is empty".to_owned());
                }
                let known = Arc::new(labels.labels.into_iter().collect());
                let uid: Str = labels.workload_uid.into();
                Arc::make_mut(&mut resources.labels).insert(uid.clone(), known);
                self.labelled.insert(name.to_owned(), uid);
            }
            l7::SETTINGS_TYPE => {
                resources.settings = Arc::new(decode(payload)?);
                *changed = Changed::ALL;
            }
            l7::TELEMETRY_TYPE => {
                changed.telemetry |= put(&mut resources.telemetries, name, payload)?;
            }
            l7::GATEWAY_TYPE => {
                changed.routes |= put(&mut resources.gateways, name, payload)?;
                changed.ports = true;
            }
            l7::CREDENTIAL_TYPE => {
                changed.ports |= put(&mut resources.credentials, name, payload)?;
            }
            other => return Err(format!("nobody here reads {other}")),
        }
        Ok(())
    }

    fn remove_further(&mut self, type_url: &'static str, name: &str) {
        let (resources, changed) = (&mut self.resources, &mut self.changed);
        match type_url {
            l7::ROUTE_TYPE => changed.routes |= resources.routes.remove(name).is_some(),
            l7::DESTINATION_TYPE => changed.destinations |= resources.destinations.remove(name).is_some(),
            l7::AUTHORIZATION_TYPE => changed.policies |= resources.authorizations.remove(name).is_some(),
            l7::AUTHENTICATION_TYPE => changed.policies |= resources.authentications.remove(name).is_some(),
            l7::LABELS_TYPE => {
                if let Some(uid) = self.labelled.remove(name) {
                    Arc::make_mut(&mut resources.labels).remove(&uid);
                }
            }
            l7::TELEMETRY_TYPE => changed.telemetry |= resources.telemetries.remove(name).is_some(),
            l7::GATEWAY_TYPE => {
                changed.routes |= resources.gateways.remove(name).is_some();
                changed.ports = true;
            }
            l7::CREDENTIAL_TYPE => changed.ports |= resources.credentials.remove(name).is_some(),
            _ => {
                resources.settings = Arc::default();
                *changed = Changed::ALL;
            }
        }
    }

    fn commit(&mut self, synced: bool) {
        if !synced {
            return;
        }
        let mesh = self.index.snapshot();
        self.locate(&mesh);
        let changed = std::mem::take(&mut self.changed);
        let last = self.last.as_deref();
        let snapshot = Snapshot::compile(&self.own, mesh, &self.resources, changed, last, &self.keys);
        if changed.routes {
            snapshot.routes.settle(&mut self.resources.routes);
        }
        let snapshot = Arc::new(snapshot);
        report(&snapshot, changed);
        self.last = Some(Arc::clone(&snapshot));
        (self.publish)(snapshot);
    }
}

/// Says what of the rules and policies cannot be honoured.
fn report(snapshot: &Snapshot, changed: Changed) {
    if changed.routes {
        snapshot.routes.problems().for_each(|problem| tracing::warn!("{problem}"));
    }
    if changed.ports {
        snapshot.ports.problems().for_each(|problem| tracing::warn!("{problem}"));
    }
    if changed.policies {
        snapshot.policies.problems().iter().for_each(|problem| tracing::warn!("{problem}"));
    }
    if changed.telemetry {
        snapshot.observation.problems().iter().for_each(|problem| tracing::warn!("{problem}"));
    }
}

fn decode<M: Message + Default>(payload: &[u8]) -> Result<M, String> {
    M::decode(payload).map_err(|error| format!("cannot be decoded: {error}"))
}

/// Takes a resource; says that something changed.
fn put<M: Message + Default>(
    held: &mut BTreeMap<String, Arc<M>>,
    name: &str,
    payload: &[u8],
) -> Result<bool, String> {
    held.insert(name.to_owned(), Arc::new(decode(payload)?));
    Ok(true)
}
