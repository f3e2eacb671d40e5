//! The objects of the mesh as every later step sees them: validated, typed, and blind to where they came from.
//!
//! Sources build them through [`read`], which refuses what Kubernetes or Istio would refuse; [`crate::convert`]
//! turns a set of them into wire resources.

pub mod credential;
pub mod istio;
pub mod istio_gateway;
pub mod kube;
pub mod l7;
pub mod mesh;
pub mod read;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::sync::Arc;

use serde::Serialize;

pub use credential::Credential;
pub use istio::*;
pub use istio_gateway::IstioGateway;
pub use kube::*;
pub use l7::{
    DestinationRule, GatewayRoute, ReferenceGrant, RequestAuthentication, Telemetry, VirtualService,
};
pub use mesh::MeshSettings;

/// A kind that the control plane reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[allow(missing_docs, reason = "the names are the API's own")]
pub enum Kind {
    Namespace,
    Node,
    ServiceAccount,
    Pod,
    Service,
    EndpointSlice,
    ConfigMap,
    Secret,
    PeerAuthentication,
    AuthorizationPolicy,
    ServiceEntry,
    WorkloadEntry,
    GatewayClass,
    Gateway,
    /// The Gateway of `networking.istio.io`.
    #[serde(rename = "Gateway.networking.istio.io")]
    IstioGateway,
    VirtualService,
    DestinationRule,
    HTTPRoute,
    GRPCRoute,
    TCPRoute,
    TLSRoute,
    ReferenceGrant,
    RequestAuthentication,
    Telemetry,
}

impl Kind {
    /// As an API server calls it, which two groups may do.
    #[must_use]
    pub fn name(self) -> String {
        match self {
            Self::IstioGateway => "Gateway".to_owned(),
            _ => self.to_string(),
        }
    }
}

/// With the group where the name alone would mean another kind.
impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::IstioGateway => f.write_str("Gateway.networking.istio.io"),
            _ => fmt::Debug::fmt(self, f),
        }
    }
}

/// Namespace and name; the namespace of cluster-scoped objects is empty.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Key {
    pub namespace: String,
    pub name: String,
}

impl Key {
    /// Builds a key.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            f.write_str(&self.name)
        } else {
            write!(f, "{}/{}", self.namespace, self.name)
        }
    }
}

/// Names one object: `AuthorizationPolicy shop/backend`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct ObjectRef {
    pub kind: Kind,
    #[serde(flatten)]
    pub key: Key,
}

impl ObjectRef {
    /// Names an object of `kind` by its metadata.
    #[must_use]
    pub fn of(kind: Kind, meta: &Meta) -> Self {
        Self { kind, key: meta.key() }
    }
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.key)
    }
}

/// What an object has in `metadata` that matters here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Meta {
    /// Empty for cluster-scoped objects.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
    /// `metadata.annotations`.
    pub annotations: BTreeMap<String, String>,
    /// `metadata.creationTimestamp` in seconds since 1970. Objects without one count as the oldest, as a zero
    /// time does in Istio; among equals the name decides.
    pub created: Option<i64>,
    /// `metadata.deletionTimestamp` is set.
    pub deleting: bool,
    /// `metadata.uid`; empty for objects of files that have none.
    pub uid: String,
    /// `metadata.generation`; 0 for objects that have none.
    pub generation: i64,
}

impl Meta {
    /// Namespace and name.
    #[must_use]
    pub fn key(&self) -> Key {
        Key::new(&self.namespace, &self.name)
    }

    /// A label's value.
    #[must_use]
    pub fn label(&self, name: &str) -> Option<&str> {
        self.labels.get(name).map(String::as_str)
    }

    /// An annotation's value.
    #[must_use]
    pub fn annotation(&self, name: &str) -> Option<&str> {
        self.annotations.get(name).map(String::as_str)
    }

    /// Sort key for "the oldest wins".
    #[must_use]
    pub fn age(&self) -> (Option<i64>, &str, &str) {
        (self.created, &self.namespace, &self.name)
    }
}

/// True when every label of the selector is on the object. An empty selector selects everything.
#[must_use]
pub fn selects(selector: &BTreeMap<String, String>, labels: &BTreeMap<String, String>) -> bool {
    selector.iter().all(|(k, v)| labels.get(k) == Some(v))
}

/// One validated object.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "one variant per kind")]
pub enum Object {
    Namespace(Arc<Namespace>),
    Node(Arc<Node>),
    ServiceAccount(Arc<ServiceAccount>),
    Pod(Arc<Pod>),
    Service(Arc<Service>),
    EndpointSlice(Arc<EndpointSlice>),
    /// The ConfigMap with the mesh settings; other ConfigMaps are [`Object::Ignored`].
    MeshSettings(Arc<Meta>, Arc<MeshSettings>),
    /// A Secret that has a certificate; others are [`Object::Ignored`].
    Credential(Arc<Credential>),
    PeerAuthentication(Arc<PeerAuthentication>),
    AuthorizationPolicy(Arc<AuthorizationPolicy>),
    ServiceEntry(Arc<ServiceEntry>),
    WorkloadEntry(Arc<WorkloadEntry>),
    GatewayClass(Arc<GatewayClass>),
    Gateway(Arc<Gateway>),
    IstioGateway(Arc<IstioGateway>),
    VirtualService(Arc<VirtualService>),
    DestinationRule(Arc<DestinationRule>),
    /// HTTPRoute, GRPCRoute, TCPRoute or TLSRoute.
    Route(Kind, Arc<GatewayRoute>),
    ReferenceGrant(Arc<ReferenceGrant>),
    RequestAuthentication(Arc<RequestAuthentication>),
    Telemetry(Arc<Telemetry>),
    /// Valid, and without meaning to the mesh.
    Ignored(Arc<Meta>),
}

/// Every object in force. Immutable once published.
#[derive(Debug, Clone, Default)]
#[allow(missing_docs, reason = "one map per kind")]
pub struct Objects {
    pub namespaces: BTreeMap<String, Arc<Namespace>>,
    pub nodes: BTreeMap<String, Arc<Node>>,
    pub service_accounts: BTreeMap<Key, Arc<ServiceAccount>>,
    pub pods: BTreeMap<Key, Arc<Pod>>,
    pub services: BTreeMap<Key, Arc<Service>>,
    pub endpoint_slices: BTreeMap<Key, Arc<EndpointSlice>>,
    /// Secrets with certificates that a gateway may name and does.
    pub credentials: BTreeMap<Key, Arc<Credential>>,
    pub peer_authentications: BTreeMap<Key, Arc<PeerAuthentication>>,
    pub authorization_policies: BTreeMap<Key, Arc<AuthorizationPolicy>>,
    pub service_entries: BTreeMap<Key, Arc<ServiceEntry>>,
    pub workload_entries: BTreeMap<Key, Arc<WorkloadEntry>>,
    pub gateway_classes: BTreeMap<String, Arc<GatewayClass>>,
    pub gateways: BTreeMap<Key, Arc<Gateway>>,
    pub istio_gateways: BTreeMap<Key, Arc<IstioGateway>>,
    pub virtual_services: BTreeMap<Key, Arc<VirtualService>>,
    pub destination_rules: BTreeMap<Key, Arc<DestinationRule>>,
    /// HTTPRoutes, GRPCRoutes, TCPRoutes and TLSRoutes.
    pub routes: BTreeMap<ObjectRef, Arc<GatewayRoute>>,
    pub reference_grants: BTreeMap<Key, Arc<ReferenceGrant>>,
    pub request_authentications: BTreeMap<Key, Arc<RequestAuthentication>>,
    pub telemetries: BTreeMap<Key, Arc<Telemetry>>,
    /// The one ConfigMap `istio` of the root namespace.
    pub settings: Option<Arc<MeshSettings>>,
}

impl Objects {
    /// Adds or replaces an object; false when the very same was there before.
    pub fn insert(&mut self, object: Object) -> bool {
        match object {
            Object::Namespace(o) => put(&mut self.namespaces, o.meta.name.clone(), o),
            Object::Node(o) => put(&mut self.nodes, o.meta.name.clone(), o),
            Object::ServiceAccount(o) => put(&mut self.service_accounts, o.meta.key(), o),
            Object::Pod(o) => put(&mut self.pods, o.meta.key(), o),
            Object::Service(o) => put(&mut self.services, o.meta.key(), o),
            Object::EndpointSlice(o) => put(&mut self.endpoint_slices, o.meta.key(), o),
            Object::MeshSettings(_, o) => {
                let changed = self.settings.as_ref() != Some(&o);
                self.settings = Some(o);
                changed
            }
            Object::Credential(o) => {
                let key = o.meta.key();
                let o = o.over(self.credentials.get(&key));
                put(&mut self.credentials, key, o)
            }
            Object::PeerAuthentication(o) => put(&mut self.peer_authentications, o.meta.key(), o),
            Object::AuthorizationPolicy(o) => put(&mut self.authorization_policies, o.meta.key(), o),
            Object::ServiceEntry(o) => put(&mut self.service_entries, o.meta.key(), o),
            Object::WorkloadEntry(o) => put(&mut self.workload_entries, o.meta.key(), o),
            Object::GatewayClass(o) => {
                let changed = put(&mut self.gateway_classes, o.meta.name.clone(), o);
                self.classify();
                changed
            }
            Object::Gateway(o) => {
                let o = self.classified(o);
                put(&mut self.gateways, o.meta.key(), o)
            }
            Object::IstioGateway(o) => put(&mut self.istio_gateways, o.meta.key(), o),
            Object::VirtualService(o) => put(&mut self.virtual_services, o.meta.key(), o),
            Object::DestinationRule(o) => put(&mut self.destination_rules, o.meta.key(), o),
            Object::Route(kind, o) => put(&mut self.routes, ObjectRef::of(kind, &o.meta), o),
            Object::ReferenceGrant(o) => put(&mut self.reference_grants, o.meta.key(), o),
            Object::RequestAuthentication(o) => put(&mut self.request_authentications, o.meta.key(), o),
            Object::Telemetry(o) => put(&mut self.telemetries, o.meta.key(), o),
            Object::Ignored(_) => false,
        }
    }

    /// Metadata of an object that is in force. The mesh settings have none.
    #[must_use]
    pub fn meta(&self, object: &ObjectRef) -> Option<&Meta> {
        let key = &object.key;
        Some(match object.kind {
            Kind::Namespace => &self.namespaces.get(&key.name)?.meta,
            Kind::Node => &self.nodes.get(&key.name)?.meta,
            Kind::ServiceAccount => &self.service_accounts.get(key)?.meta,
            Kind::Pod => &self.pods.get(key)?.meta,
            Kind::Service => &self.services.get(key)?.meta,
            Kind::EndpointSlice => &self.endpoint_slices.get(key)?.meta,
            Kind::ConfigMap => return None,
            Kind::Secret => &self.credentials.get(key)?.meta,
            Kind::PeerAuthentication => &self.peer_authentications.get(key)?.meta,
            Kind::AuthorizationPolicy => &self.authorization_policies.get(key)?.meta,
            Kind::ServiceEntry => &self.service_entries.get(key)?.meta,
            Kind::WorkloadEntry => &self.workload_entries.get(key)?.meta,
            Kind::GatewayClass => &self.gateway_classes.get(&key.name)?.meta,
            Kind::Gateway => &self.gateways.get(key)?.meta,
            Kind::IstioGateway => &self.istio_gateways.get(key)?.meta,
            Kind::VirtualService => &self.virtual_services.get(key)?.meta,
            Kind::DestinationRule => &self.destination_rules.get(key)?.meta,
            Kind::HTTPRoute | Kind::GRPCRoute | Kind::TCPRoute | Kind::TLSRoute => {
                &self.routes.get(object)?.meta
            }
            Kind::ReferenceGrant => &self.reference_grants.get(key)?.meta,
            Kind::RequestAuthentication => &self.request_authentications.get(key)?.meta,
            Kind::Telemetry => &self.telemetries.get(key)?.meta,
        })
    }

    /// Whether an object is in force.
    #[must_use]
    pub fn contains(&self, object: &ObjectRef) -> bool {
        match object.kind {
            Kind::ConfigMap => self.settings.is_some(),
            _ => self.meta(object).is_some(),
        }
    }

    /// Removes an object; false when it was not there.
    pub fn remove(&mut self, object: &ObjectRef) -> bool {
        let key = &object.key;
        match object.kind {
            Kind::Namespace => self.namespaces.remove(&key.name).is_some(),
            Kind::Node => self.nodes.remove(&key.name).is_some(),
            Kind::ServiceAccount => self.service_accounts.remove(key).is_some(),
            Kind::Pod => self.pods.remove(key).is_some(),
            Kind::Service => self.services.remove(key).is_some(),
            Kind::EndpointSlice => self.endpoint_slices.remove(key).is_some(),
            // Only the one with the mesh settings is ever in force.
            Kind::ConfigMap => self.settings.take().is_some(),
            Kind::Secret => self.credentials.remove(key).is_some(),
            Kind::PeerAuthentication => self.peer_authentications.remove(key).is_some(),
            Kind::AuthorizationPolicy => self.authorization_policies.remove(key).is_some(),
            Kind::ServiceEntry => self.service_entries.remove(key).is_some(),
            Kind::WorkloadEntry => self.workload_entries.remove(key).is_some(),
            Kind::GatewayClass => {
                let gone = self.gateway_classes.remove(&key.name).is_some();
                self.classify();
                gone
            }
            Kind::Gateway => self.gateways.remove(key).is_some(),
            Kind::IstioGateway => self.istio_gateways.remove(key).is_some(),
            Kind::VirtualService => self.virtual_services.remove(key).is_some(),
            Kind::DestinationRule => self.destination_rules.remove(key).is_some(),
            Kind::HTTPRoute | Kind::GRPCRoute | Kind::TCPRoute | Kind::TLSRoute => {
                self.routes.remove(object).is_some()
            }
            Kind::ReferenceGrant => self.reference_grants.remove(key).is_some(),
            Kind::RequestAuthentication => self.request_authentications.remove(key).is_some(),
            Kind::Telemetry => self.telemetries.remove(key).is_some(),
        }
    }

    /// The objects of a kind that are in force. The mesh settings have no key of their own.
    #[must_use]
    pub fn keys(&self, kind: Kind) -> Vec<Key> {
        let names = |names: Vec<&String>| names.into_iter().map(|name| Key::new("", name)).collect();
        match kind {
            Kind::Namespace => names(self.namespaces.keys().collect()),
            Kind::Node => names(self.nodes.keys().collect()),
            Kind::ServiceAccount => self.service_accounts.keys().cloned().collect(),
            Kind::Pod => self.pods.keys().cloned().collect(),
            Kind::Service => self.services.keys().cloned().collect(),
            Kind::EndpointSlice => self.endpoint_slices.keys().cloned().collect(),
            Kind::ConfigMap => Vec::new(),
            Kind::Secret => self.credentials.keys().cloned().collect(),
            Kind::PeerAuthentication => self.peer_authentications.keys().cloned().collect(),
            Kind::AuthorizationPolicy => self.authorization_policies.keys().cloned().collect(),
            Kind::ServiceEntry => self.service_entries.keys().cloned().collect(),
            Kind::WorkloadEntry => self.workload_entries.keys().cloned().collect(),
            Kind::GatewayClass => names(self.gateway_classes.keys().collect()),
            Kind::Gateway => self.gateways.keys().cloned().collect(),
            Kind::IstioGateway => self.istio_gateways.keys().cloned().collect(),
            Kind::VirtualService => self.virtual_services.keys().cloned().collect(),
            Kind::DestinationRule => self.destination_rules.keys().cloned().collect(),
            Kind::HTTPRoute | Kind::GRPCRoute | Kind::TCPRoute | Kind::TLSRoute => {
                self.routes.keys().filter(|r| r.kind == kind).map(|r| r.key.clone()).collect()
            }
            Kind::ReferenceGrant => self.reference_grants.keys().cloned().collect(),
            Kind::RequestAuthentication => self.request_authentications.keys().cloned().collect(),
            Kind::Telemetry => self.telemetries.keys().cloned().collect(),
        }
    }

    /// A Gateway with the controller of its class.
    fn classified(&self, mut gateway: Arc<Gateway>) -> Arc<Gateway> {
        let said = self.gateway_classes.get(&gateway.class).map(|class| class.controller.as_str());
        let controller = controller_of(&gateway.class, said);
        if gateway.controller != controller {
            Arc::make_mut(&mut gateway).controller = controller;
        }
        gateway
    }

    fn classify(&mut self) {
        let classified =
            self.gateways.iter().map(|(key, gateway)| (key.clone(), self.classified(Arc::clone(gateway))));
        self.gateways = classified.collect();
    }

    /// A namespace's label, none when the namespace object is unknown.
    #[must_use]
    pub fn namespace_label(&self, namespace: &str, label: &str) -> Option<&str> {
        self.namespaces.get(namespace)?.meta.label(label)
    }

    /// Number of objects by kind, for people.
    #[must_use]
    pub fn counts(&self) -> BTreeMap<&'static str, usize> {
        let routes = |kind| self.routes.keys().filter(|o| o.kind == kind).count();
        BTreeMap::from([
            ("VirtualService", self.virtual_services.len()),
            ("DestinationRule", self.destination_rules.len()),
            ("HTTPRoute", routes(Kind::HTTPRoute)),
            ("GRPCRoute", routes(Kind::GRPCRoute)),
            ("TCPRoute", routes(Kind::TCPRoute)),
            ("TLSRoute", routes(Kind::TLSRoute)),
            ("ReferenceGrant", self.reference_grants.len()),
            ("RequestAuthentication", self.request_authentications.len()),
            ("Telemetry", self.telemetries.len()),
            ("Namespace", self.namespaces.len()),
            ("Node", self.nodes.len()),
            ("ServiceAccount", self.service_accounts.len()),
            ("Pod", self.pods.len()),
            ("Service", self.services.len()),
            ("EndpointSlice", self.endpoint_slices.len()),
            ("Secret", self.credentials.len()),
            ("PeerAuthentication", self.peer_authentications.len()),
            ("AuthorizationPolicy", self.authorization_policies.len()),
            ("ServiceEntry", self.service_entries.len()),
            ("WorkloadEntry", self.workload_entries.len()),
            ("GatewayClass", self.gateway_classes.len()),
            ("Gateway", self.gateways.len()),
            ("Gateway.networking.istio.io", self.istio_gateways.len()),
        ])
    }
}

fn put<K: Ord, V: PartialEq>(map: &mut BTreeMap<K, Arc<V>>, key: K, value: Arc<V>) -> bool {
    match map.entry(key) {
        Entry::Occupied(entry) if **entry.get() == *value => false,
        Entry::Occupied(mut entry) => {
            entry.insert(value);
            true
        }
        Entry::Vacant(entry) => {
            entry.insert(value);
            true
        }
    }
}

/// What the control plane says about one object, in the shape of a Kubernetes status condition.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Condition {
    /// The object it is about.
    pub object: ObjectRef,
    /// For example `ZtunnelAccepted`, `istio.io/WaypointBound`.
    #[serde(rename = "type")]
    pub kind: String,
    /// True: the good case.
    pub status: bool,
    /// One CamelCase word for programs.
    pub reason: String,
    /// A sentence for people.
    pub message: String,
}

impl Condition {
    /// Builds a condition.
    pub fn new(
        object: ObjectRef,
        kind: &str,
        status: bool,
        reason: &str,
        message: impl Into<String>,
    ) -> Self {
        Self { object, kind: kind.to_owned(), status, reason: reason.to_owned(), message: message.into() }
    }
}
