//! Objects to wire resources, as pure functions: what a node needs to know, exactly as Istio's workload and
//! security APIs say it.
//!
//! Where Istio's conversion lets a predicate vanish, this one makes the policy stricter and says so in a
//! [`Condition`].

mod assign;
mod attachments;
mod datagrams;
mod endpoints;
mod enrol;
mod entry;
mod kept;
mod l7;
mod peer;
mod policy;
mod require;
mod resource;
mod service;
mod waypoint;
mod workload;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_core::xds::proto::l7::WorkloadLabels;
use mesh_core::xds::proto::security::Authorization;
use mesh_core::xds::proto::workload::{Address, Workload, address};

pub use assign::Assignments;
pub(crate) use attachments::MESH_CONTROLLER;
pub use attachments::{Attachments, ListenerState, ParentState, Refusal};
pub(crate) use enrol::{Decision, decide, namespace_joins};
pub(crate) use enrol::{MARK, REDIRECTION};
pub(crate) use l7::complete;
pub use l7::{Confidential, L7};
pub use resource::{Entry, Resource};
pub(crate) use workload::pod_uid;

use crate::model::mesh::Undermesh;
use crate::model::{Condition, Key, Kind, ObjectRef, Objects};

/// What holds for the whole mesh: command-line defaults, overridden by the mesh settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mesh {
    /// Cluster id, first part of workload uids.
    pub cluster_id: String,
    /// DNS suffix of services, `cluster.local`.
    pub cluster_domain: String,
    /// Trust domain of the mesh.
    pub trust_domain: String,
    /// Further trust domains that mean the mesh.
    pub trust_domain_aliases: Vec<String>,
    /// Namespace of mesh-wide policies.
    pub root_namespace: String,
    /// Our own settings.
    pub undermesh: Undermesh,
}

impl Default for Mesh {
    fn default() -> Self {
        Self {
            cluster_id: "Kubernetes".into(),
            cluster_domain: "cluster.local".into(),
            trust_domain: "cluster.local".into(),
            trust_domain_aliases: Vec::new(),
            root_namespace: "istio-system".into(),
            undermesh: Undermesh::default(),
        }
    }
}

impl Mesh {
    /// These defaults with the mesh settings of `objects` on top.
    #[must_use]
    pub fn with_settings(&self, objects: &Objects) -> Self {
        let mut mesh = self.clone();
        if let Some(settings) = &objects.settings {
            if let Some(domain) = &settings.trust_domain {
                mesh.trust_domain.clone_from(domain);
            }
            if let Some(namespace) = &settings.root_namespace {
                mesh.root_namespace.clone_from(namespace);
            }
            mesh.trust_domain_aliases.clone_from(&settings.trust_domain_aliases);
            mesh.undermesh.clone_from(&settings.undermesh);
        }
        mesh
    }

    /// Host name of a Kubernetes service.
    #[must_use]
    pub fn hostname(&self, namespace: &str, service: &str) -> String {
        format!("{service}.{namespace}.svc.{}", self.cluster_domain)
    }
}

/// Pods that their node has under capture: node name to workload uids.
pub type Captured = BTreeMap<String, BTreeSet<String>>;

/// Workloads and services by resource name.
pub type Addresses = BTreeMap<Arc<str>, Arc<Resource<Address>>>;

/// Everything that nodes and waypoints are told, by resource name, and what there is to say about the objects.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Resources {
    /// Workloads and services.
    pub addresses: Arc<Addresses>,
    /// L4 policies.
    pub authorizations: BTreeMap<String, Authorization>,
    /// What only waypoints are told.
    pub l7: L7,
    /// What each node is told of its own pods.
    pub assignments: Assignments,
    /// Status conditions, sorted by object.
    pub conditions: Vec<Condition>,
    /// What there is to say of listeners of gateways and of parents of routes.
    pub attachments: Attachments,
}

/// What the parts of the conversion share.
struct Context<'a> {
    objects: &'a Objects,
    mesh: &'a Mesh,
    captured: &'a Captured,
    waypoints: waypoint::Waypoints,
    peers: peer::PeerPolicies,
    policies: policy::SelectorPolicies,
    services: entry::ServiceIndex<'a>,
    /// Service (`namespace/hostname`) to the waypoint that it asks for.
    asked: BTreeMap<String, Key>,
    /// Service to what its endpoints are to be reached through.
    through: BTreeMap<String, require::Through>,
    /// Network id of this cluster.
    network: String,
    conditions: Vec<Condition>,
}

impl Context<'_> {
    /// Keys of the policies that a workload lists.
    fn policies_of(&self, namespace: &str, labels: &BTreeMap<String, String>) -> Vec<String> {
        let mut keys = self.policies.of(namespace, labels);
        keys.extend(self.peers.of(namespace, labels));
        keys
    }

    /// Says which fields of an object have no effect.
    fn unsupported(&mut self, object: &ObjectRef, fields: &[String]) {
        if !fields.is_empty() {
            let message = format!("no effect on the node's part of the mesh: {}", fields.join(", "));
            self.conditions.push(Condition::new(
                object.clone(),
                "Accepted",
                true,
                "UnsupportedValue",
                message,
            ));
        }
    }
}

/// Converts all objects. `mesh` has the settings of `objects` applied.
#[must_use]
pub fn convert(objects: &Objects, mesh: &Mesh, captured: &Captured) -> Resources {
    Converter::default().convert(objects, mesh, captured)
}

/// Converts a mesh again and again. What comes of it depends on the present objects alone; how long it takes, on what has
/// changed since the time before.
#[derive(Debug, Default)]
pub struct Converter {
    kept: kept::Kept,
}

impl Converter {
    /// As [`convert`].
    #[must_use]
    pub fn convert(&mut self, objects: &Objects, mesh: &Mesh, captured: &Captured) -> Resources {
        let (resources, kept) = convert_again(objects, mesh, captured, std::mem::take(&mut self.kept));
        self.kept = kept;
        resources
    }
}

fn convert_again(
    objects: &Objects,
    mesh: &Mesh,
    captured: &Captured,
    kept: kept::Kept,
) -> (Resources, kept::Kept) {
    let mut resources = Resources::default();
    let mut conditions = Vec::new();
    settings_conditions(objects, mesh, &mut conditions);
    let policies = policy::convert(objects, mesh, &mut resources.authorizations, &mut conditions);
    let peers = peer::convert(objects, mesh, &mut resources.authorizations, &mut conditions);
    let network = objects
        .namespace_label(&mesh.root_namespace, "topology.istio.io/network")
        .unwrap_or_default()
        .to_owned();
    let waypoints = waypoint::Waypoints::new(objects, mesh, &network, &mut conditions);
    let services = entry::ServiceIndex::new(objects, mesh, &mut conditions);
    let mut context = Context {
        objects,
        mesh,
        captured,
        waypoints,
        peers,
        policies,
        services,
        asked: BTreeMap::new(),
        through: BTreeMap::new(),
        network,
        conditions,
    };
    service::convert(&mut context, &mut resources);
    let kept = workload::convert(&mut context, &mut resources, kept);
    entry::convert(&mut context, &mut resources);
    l7::convert(&mut context, &mut resources);
    resources.conditions = context.conditions;
    resources.conditions.sort();
    resources.conditions.dedup();
    (resources, kept)
}

fn settings_conditions(objects: &Objects, mesh: &Mesh, conditions: &mut Vec<Condition>) {
    let Some(settings) = &objects.settings else { return };
    for field in &settings.unsupported {
        conditions.push(Condition::new(
            ObjectRef { kind: Kind::ConfigMap, key: Key::new(&mesh.root_namespace, "istio") },
            "Accepted",
            true,
            "UnsupportedValue",
            format!("MeshConfig field {field} has no effect here"),
        ));
    }
}

impl Resources {
    /// A workload, and its labels for waypoints.
    fn add_workload(&mut self, workload: Workload, labels: &BTreeMap<String, String>, aliases: Vec<String>) {
        let uid: Arc<str> = workload.uid.as_str().into();
        if let Some(labels) = labels_of(&uid, labels) {
            self.l7.labels.insert(Arc::clone(&uid), labels);
        }
        self.insert(uid, address(address::Type::Workload(workload), aliases));
    }

    /// What was made of a pod.
    fn add_pod(&mut self, node: &str, part: &kept::PodPart) {
        if let Some(assigned) = &part.assigned {
            self.assignments.add(node, Arc::clone(assigned));
        }
        let Some(workload) = &part.workload else { return };
        if let Some(labels) = &workload.labels {
            self.l7.labels.insert(Arc::clone(&workload.uid), Arc::clone(labels));
        }
        self.insert(Arc::clone(&workload.uid), Arc::clone(&workload.address));
    }

    fn add(&mut self, name: String, message: address::Type, aliases: Vec<String>) {
        self.insert(name.into(), address(message, aliases));
    }

    fn insert(&mut self, name: Arc<str>, address: Arc<Resource<Address>>) {
        Arc::make_mut(&mut self.addresses).insert(name, address);
    }
}

fn address(address: address::Type, aliases: Vec<String>) -> Arc<Resource<Address>> {
    Arc::new(Resource::new(Address { r#type: Some(address) }, aliases))
}

/// A workload's labels for waypoints, if it has any.
fn labels_of(uid: &str, labels: &BTreeMap<String, String>) -> Option<Arc<Resource<WorkloadLabels>>> {
    let message = || WorkloadLabels { workload_uid: uid.to_owned(), labels: labels.clone() };
    (!labels.is_empty()).then(|| Arc::new(Resource::new(message(), Vec::new())))
}

/// 4 or 16 bytes.
fn ip_bytes(ip: std::net::IpAddr) -> Vec<u8> {
    match ip {
        std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
        std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests;
