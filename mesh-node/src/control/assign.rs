//! Which pod of the node is which workload of the mesh: pure.
//!
//! A container runtime knows a pod by uid, namespace and name, and not whose identity it has. That comes from the
//! control plane, which has it from the API server: by uid, so that a pod that was made again under its old name and
//! with another service account is never taken for the old one. A control plane that tells nothing of uids (Istio's) is
//! believed by namespace and name.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use mesh_core::identity::SpiffeId;
use mesh_core::state::MeshState;
use mesh_core::xds::proto::node::{AssignedPod, EnrolmentAck};

use super::plan::{Held, Wanted};
use crate::pods::{PodInfo, PodKey};

/// What the control plane told of the pods of this node.
#[derive(Debug, Clone, Default)]
pub enum Assigned {
    /// Nothing yet.
    #[default]
    Unknown,
    /// It tells nothing of them.
    NotOffered,
    /// The newest list.
    Known(Arc<Assignment>),
}

/// The pods of this node, as the control plane has them from the API server.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Assignment {
    /// By namespace and name, of which there is one at a time.
    pub pods: HashMap<(String, String), AssignedPod>,
    /// Namespaces whose pods join the mesh unless they say otherwise.
    pub namespaces: BTreeSet<String>,
}

impl Assignment {
    /// What a message says; none if it says nothing.
    #[must_use]
    pub fn read(message: EnrolmentAck) -> Option<Self> {
        message.assigns.then(|| Self {
            pods: message
                .pods
                .into_iter()
                .map(|pod| ((pod.namespace.clone(), pod.name.clone()), pod))
                .collect(),
            namespaces: message.namespaces.into_iter().collect(),
        })
    }

    /// The pod of a name, if it also has this uid.
    #[must_use]
    pub fn pod(&self, uid: &str, namespace: &str, name: &str) -> Option<&AssignedPod> {
        self.pods.get(&(namespace.to_owned(), name.to_owned())).filter(|pod| pod.uid == uid)
    }
}

/// The node's pods by what the mesh knows them by. Those whose service account neither the node nor the control plane
/// knows are left out.
#[must_use]
pub fn attribute(
    pods: &[PodInfo],
    held: &BTreeMap<PodKey, Held>,
    assigned: &Assigned,
    state: &MeshState,
    node: &str,
) -> HashMap<PodKey, PodInfo> {
    // A pod keeps its service account for life.
    let held: HashMap<_, _> = held.values().map(|held| (held.info.uid.as_str(), &held.info)).collect();
    let complete = |pod: &PodInfo| {
        if !pod.service_account.is_empty() {
            return Some(pod.clone());
        }
        let known = held.get(pod.uid.as_str());
        if let Some(known) =
            known.filter(|known| (&known.namespace, &known.name) == (&pod.namespace, &pod.name))
        {
            return Some(with(pod, &known.service_account, known.probe_ports.clone()));
        }
        match assigned {
            Assigned::Unknown => None,
            Assigned::Known(assignment) => {
                let told = assignment.pod(&pod.uid, &pod.namespace, &pod.name)?;
                let ports = told.probe_ports.iter().filter_map(|port| u16::try_from(*port).ok());
                Some(with(pod, &told.service_account, ports.filter(|port| *port != 0).collect()))
            }
            Assigned::NotOffered => {
                let mut named = state.workloads_by_name(&pod.namespace, &pod.name);
                let workload = named.find(|workload| *workload.node == *node)?;
                Some(with(pod, workload.identity.service_account(), Vec::new()))
            }
        }
    };
    pods.iter().filter_map(complete).map(|pod| (pod.key(), pod)).collect()
}

fn with(pod: &PodInfo, service_account: &str, probe_ports: Vec<u16>) -> PodInfo {
    PodInfo { service_account: service_account.to_owned(), probe_ports, ..pod.clone() }
}

/// Adds the pods that should be captured and have no workload yet, because they have no address yet.
pub fn add_wanted(wanted: &mut BTreeMap<PodKey, Wanted>, assigned: &Assigned) {
    let Assigned::Known(assignment) = assigned else { return };
    for pod in assignment.pods.values().filter(|pod| pod.enrol) {
        let key = PodKey {
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            service_account: pod.service_account.clone(),
        };
        wanted.entry(key).or_insert_with(|| Wanted {
            workload: pod.workload_uid.as_str().into(),
            identity: SpiffeId::new(&pod.trust_domain, &pod.namespace, &pod.service_account),
        });
    }
}
