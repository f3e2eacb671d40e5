//! What a conversion keeps for the next one. Of a large mesh nearly everything is pods, and nearly all of them are as they
//! were: what was made of such a pod is taken over.
//!
//! A pod's part depends on what is compared here and on nothing else: the pod, its node, whether it is captured, the
//! EndpointSlices that name it and the policies that select it; of its namespace the metadata, the Services and the
//! ServiceEntries; and of the mesh its settings and the Gateways.

use std::collections::BTreeMap;
use std::iter::Peekable;
use std::sync::Arc;
use std::vec::IntoIter;

use mesh_core::xds::proto::l7::WorkloadLabels;
use mesh_core::xds::proto::node::AssignedPod;
use mesh_core::xds::proto::workload::Address;

use super::endpoints::{Slices, in_namespace};
use super::{Context, Mesh, Resource};
use crate::model::{Condition, EndpointSlice, Gateway, Key, Namespace, Node, Pod, Service, ServiceEntry};

/// Kept from one conversion to the next.
#[derive(Debug, Default)]
pub(super) struct Kept {
    mesh: Option<MeshScope>,
    namespaces: BTreeMap<String, NamespaceScope>,
    /// In the order of their keys.
    pods: Vec<Arc<PodPart>>,
}

/// What the parts of all pods depend on.
#[derive(Debug, PartialEq)]
struct MeshScope {
    mesh: Mesh,
    network: String,
    gateways: BTreeMap<Key, Arc<Gateway>>,
}

/// What the parts of a namespace's pods depend on.
#[derive(Debug, PartialEq)]
struct NamespaceScope {
    namespace: Option<Arc<Namespace>>,
    /// And whether there is an EndpointSlice of it.
    services: Vec<(Arc<Service>, bool)>,
    entries: Vec<Arc<ServiceEntry>>,
}

/// What one pod's part depends on.
#[derive(Debug, PartialEq)]
pub(super) struct PodScope {
    pod: Arc<Pod>,
    node: Option<Arc<Node>>,
    captured: bool,
    slices: Vec<Arc<EndpointSlice>>,
    policies: Vec<String>,
}

/// What is made of one pod.
#[derive(Debug)]
pub(super) struct PodPart {
    pub(super) scope: PodScope,
    /// It depends on more than the scope and is made anew each time.
    pub(super) once: bool,
    /// What its node is told, unless it has ended or has none.
    pub(super) assigned: Option<Arc<AssignedPod>>,
    /// None while it has no address.
    pub(super) workload: Option<WorkloadPart>,
    pub(super) conditions: Vec<Condition>,
}

/// A pod as a workload, by its uid.
#[derive(Debug)]
pub(super) struct WorkloadPart {
    pub(super) uid: Arc<str>,
    pub(super) address: Arc<Resource<Address>>,
    pub(super) labels: Option<Arc<Resource<WorkloadLabels>>>,
}

impl PodScope {
    pub(super) fn of(
        context: &Context<'_>,
        slices: &Slices<'_>,
        (key, pod): (&Key, &Arc<Pod>),
        uid: &str,
    ) -> Self {
        Self {
            pod: Arc::clone(pod),
            node: context.objects.nodes.get(&pod.node).cloned(),
            captured: context.captured.get(&pod.node).is_some_and(|uids| uids.contains(uid)),
            slices: slices.of(key).cloned().collect(),
            policies: context.policies_of(&pod.meta.namespace, &pod.meta.labels),
        }
    }

    pub(super) fn pod(&self) -> &Pod {
        &self.pod
    }

    pub(super) const fn captured(&self) -> bool {
        self.captured
    }

    pub(super) fn node(&self) -> Option<&Node> {
        self.node.as_deref()
    }

    pub(super) fn policies(&self) -> &[String] {
        &self.policies
    }
}

/// Goes through what was kept, pod by pod, and keeps what comes of it.
pub(super) struct Turn {
    before: Peekable<IntoIter<Arc<PodPart>>>,
    scopes: BTreeMap<String, NamespaceScope>,
    same_mesh: bool,
    /// The namespace of the last pod, and whether all is the same there.
    at: Option<(String, bool)>,
    now: Kept,
}

impl Kept {
    /// Begins a conversion.
    pub(super) fn turn(self, context: &Context<'_>) -> Turn {
        let mesh = MeshScope {
            mesh: context.mesh.clone(),
            network: context.network.clone(),
            gateways: context.objects.gateways.clone(),
        };
        let same_mesh = self.mesh.as_ref() == Some(&mesh);
        Turn {
            before: self.pods.into_iter().peekable(),
            scopes: self.namespaces,
            same_mesh,
            at: None,
            now: Self { mesh: Some(mesh), ..Self::default() },
        }
    }
}

impl Turn {
    /// What was made of a pod, if it would come out the same. Pods have to be asked for in the order of their keys.
    pub(super) fn unchanged(
        &mut self,
        context: &Context<'_>,
        slices: &Slices<'_>,
        scope: &PodScope,
    ) -> Option<Arc<PodPart>> {
        let meta = &scope.pod.meta;
        let name = (meta.namespace.as_str(), meta.name.as_str());
        let of = |part: &Arc<PodPart>| {
            let meta = &part.scope.pod.meta;
            (meta.namespace.as_str(), meta.name.as_str()).cmp(&name)
        };
        while self.before.next_if(|part| of(part).is_lt()).is_some() {}
        let known = self.before.next_if(|part| of(part).is_eq());
        let same = self.same_namespace(context, slices, &meta.namespace);
        known.filter(|part| same && !part.once && part.scope == *scope)
    }

    fn same_namespace(&mut self, context: &Context<'_>, slices: &Slices<'_>, namespace: &str) -> bool {
        if let Some((_, same)) = self.at.as_ref().filter(|(at, _)| at == namespace) {
            return *same;
        }
        let scope = NamespaceScope::of(context, slices, namespace);
        let same = self.same_mesh && self.scopes.get(namespace) == Some(&scope);
        self.now.namespaces.insert(namespace.to_owned(), scope);
        self.at = Some((namespace.to_owned(), same));
        same
    }

    /// Keeps a pod's part for the next turn.
    pub(super) fn keep(&mut self, part: Arc<PodPart>) {
        self.now.pods.push(part);
    }

    pub(super) fn end(self) -> Kept {
        self.now
    }
}

impl NamespaceScope {
    fn of(context: &Context<'_>, slices: &Slices<'_>, namespace: &str) -> Self {
        let objects = context.objects;
        let services = in_namespace(&objects.services, namespace);
        Self {
            namespace: objects.namespaces.get(namespace).cloned(),
            services: services.map(|(key, service)| (service.clone(), slices.are_of(key))).collect(),
            entries: in_namespace(&objects.service_entries, namespace).map(|(_, e)| e.clone()).collect(),
        }
    }
}
