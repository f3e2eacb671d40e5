//! The objects of the mesh as every later step sees them: validated, typed, and blind to where they came from.
//!
//! Sources build them through [`read`], which refuses what Kubernetes or Istio would refuse; [`crate::convert`]
//! turns a set of them into wire resources.

pub mod istio;
pub mod kube;
pub mod l7;
pub mod mesh;
pub mod read;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::Serialize;

pub use istio::*;
pub use kube::*;
pub use l7::{DestinationRule, GatewayRoute, ReferenceGrant, RequestAuthentication, VirtualService};
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
    PeerAuthentication,
    AuthorizationPolicy,
    ServiceEntry,
    WorkloadEntry,
    Gateway,
    VirtualService,
    DestinationRule,
    HTTPRoute,
    GRPCRoute,
    TCPRoute,
    TLSRoute,
    ReferenceGrant,
    RequestAuthentication,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
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
    PeerAuthentication(Arc<PeerAuthentication>),
    AuthorizationPolicy(Arc<AuthorizationPolicy>),
    ServiceEntry(Arc<ServiceEntry>),
    WorkloadEntry(Arc<WorkloadEntry>),
    Gateway(Arc<Gateway>),
    VirtualService(Arc<VirtualService>),
    DestinationRule(Arc<DestinationRule>),
    /// HTTPRoute, GRPCRoute, TCPRoute or TLSRoute.
    Route(Kind, Arc<GatewayRoute>),
    ReferenceGrant(Arc<ReferenceGrant>),
    RequestAuthentication(Arc<RequestAuthentication>),
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
    pub peer_authentications: BTreeMap<Key, Arc<PeerAuthentication>>,
    pub authorization_policies: BTreeMap<Key, Arc<AuthorizationPolicy>>,
    pub service_entries: BTreeMap<Key, Arc<ServiceEntry>>,
    pub workload_entries: BTreeMap<Key, Arc<WorkloadEntry>>,
    pub gateways: BTreeMap<Key, Arc<Gateway>>,
    pub virtual_services: BTreeMap<Key, Arc<VirtualService>>,
    pub destination_rules: BTreeMap<Key, Arc<DestinationRule>>,
    /// HTTPRoutes, GRPCRoutes, TCPRoutes and TLSRoutes.
    pub routes: BTreeMap<ObjectRef, Arc<GatewayRoute>>,
    pub reference_grants: BTreeMap<Key, Arc<ReferenceGrant>>,
    pub request_authentications: BTreeMap<Key, Arc<RequestAuthentication>>,
    /// The one ConfigMap `istio` of the root namespace.
    pub settings: Option<Arc<MeshSettings>>,
}

impl Objects {
    /// Adds or replaces an object.
    pub fn insert(&mut self, object: Object) {
        match object {
            Object::Namespace(o) => drop(self.namespaces.insert(o.meta.name.clone(), o)),
            Object::Node(o) => drop(self.nodes.insert(o.meta.name.clone(), o)),
            Object::ServiceAccount(o) => drop(self.service_accounts.insert(o.meta.key(), o)),
            Object::Pod(o) => drop(self.pods.insert(o.meta.key(), o)),
            Object::Service(o) => drop(self.services.insert(o.meta.key(), o)),
            Object::EndpointSlice(o) => drop(self.endpoint_slices.insert(o.meta.key(), o)),
            Object::MeshSettings(_, o) => self.settings = Some(o),
            Object::PeerAuthentication(o) => drop(self.peer_authentications.insert(o.meta.key(), o)),
            Object::AuthorizationPolicy(o) => drop(self.authorization_policies.insert(o.meta.key(), o)),
            Object::ServiceEntry(o) => drop(self.service_entries.insert(o.meta.key(), o)),
            Object::WorkloadEntry(o) => drop(self.workload_entries.insert(o.meta.key(), o)),
            Object::Gateway(o) => drop(self.gateways.insert(o.meta.key(), o)),
            Object::VirtualService(o) => drop(self.virtual_services.insert(o.meta.key(), o)),
            Object::DestinationRule(o) => drop(self.destination_rules.insert(o.meta.key(), o)),
            Object::Route(kind, o) => drop(self.routes.insert(ObjectRef::of(kind, &o.meta), o)),
            Object::ReferenceGrant(o) => drop(self.reference_grants.insert(o.meta.key(), o)),
            Object::RequestAuthentication(o) => drop(self.request_authentications.insert(o.meta.key(), o)),
            Object::Ignored(_) => {}
        }
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
            ("Namespace", self.namespaces.len()),
            ("Node", self.nodes.len()),
            ("ServiceAccount", self.service_accounts.len()),
            ("Pod", self.pods.len()),
            ("Service", self.services.len()),
            ("EndpointSlice", self.endpoint_slices.len()),
            ("PeerAuthentication", self.peer_authentications.len()),
            ("AuthorizationPolicy", self.authorization_policies.len()),
            ("ServiceEntry", self.service_entries.len()),
            ("WorkloadEntry", self.workload_entries.len()),
            ("Gateway", self.gateways.len()),
        ])
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
