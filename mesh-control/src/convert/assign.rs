//! What each node is told of its own pods (`undermesh.node.v1.EnrolmentAck`): which pod is whose, and which should be
//! enrolled, as soon as it is bound to the node and before it has an address.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_core::xds::proto::node::{AssignedPod, EnrolmentAck};

use super::Mesh;
use super::enrol;
use super::workload::{announced_trust_domain, pod_uid};
use crate::model::{Objects, Pod};

/// The pods of every node.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Assignments {
    /// Whether the source knows pods by uid; otherwise nodes are told nothing.
    known: bool,
    nodes: BTreeMap<String, Vec<Arc<AssignedPod>>>,
    namespaces: Vec<String>,
}

impl Assignments {
    /// What a node is told; none where nothing is known.
    #[must_use]
    pub fn of(&self, node: &str) -> Option<EnrolmentAck> {
        self.known.then(|| EnrolmentAck {
            assigns: true,
            pods: self.nodes.get(node).into_iter().flatten().map(|pod| AssignedPod::clone(pod)).collect(),
            namespaces: self.namespaces.clone(),
        })
    }
}

impl Assignments {
    /// Without any pod yet.
    pub(super) fn new(objects: &Objects) -> Self {
        let joins = |namespace: &&String| enrol::namespace_joins(objects, namespace);
        Self {
            known: objects.pods.values().all(|pod| !pod.uid.is_empty()),
            nodes: BTreeMap::new(),
            namespaces: objects.namespaces.keys().filter(joins).cloned().collect(),
        }
    }

    pub(super) fn add(&mut self, node: &str, pod: Arc<AssignedPod>) {
        match self.nodes.get_mut(node) {
            Some(pods) => pods.push(pod),
            None => drop(self.nodes.insert(node.to_owned(), vec![pod])),
        }
    }
}

/// What a pod's node is told of it, unless it has ended or has no node.
pub(super) fn pod(objects: &Objects, mesh: &Mesh, pod: &Pod) -> Option<AssignedPod> {
    (!pod.node.is_empty() && !pod.terminal).then(|| AssignedPod {
        uid: pod.uid.clone(),
        namespace: pod.meta.namespace.clone(),
        name: pod.meta.name.clone(),
        service_account: pod.service_account.clone(),
        trust_domain: announced_trust_domain(&mesh.trust_domain),
        workload_uid: pod_uid(&mesh.cluster_id, &pod.meta),
        enrol: enrol::decide(objects, pod) == enrol::Decision::Enrol,
        probe_ports: pod.probe_ports.iter().map(|port| u32::from(*port)).collect(),
    })
}

#[cfg(test)]
mod tests {
    use crate::testing::resources;

    const MESH: &str = r"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Namespace
metadata: {name: kube-system, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Namespace
metadata: {name: plain}
---
apiVersion: v1
kind: Pod
metadata: {name: starting, namespace: shop, uid: u1}
spec:
  nodeName: n1
  serviceAccountName: cart
  containers: [{name: c, readinessProbe: {httpGet: {port: 8080}}}]
---
apiVersion: v1
kind: Pod
metadata: {name: out, namespace: plain, uid: u2}
spec: {nodeName: n1, containers: [{name: c}]}
status: {podIP: 10.0.0.2}
---
apiVersion: v1
kind: Pod
metadata: {name: static, namespace: shop, uid: u3, annotations: {kubernetes.io/config.hash: h3}}
spec: {nodeName: n2, containers: [{name: c}]}
---
apiVersion: v1
kind: Pod
metadata: {name: done, namespace: shop, uid: u4}
spec: {nodeName: n1, containers: [{name: c}]}
status: {phase: Succeeded}
";

    #[test]
    fn a_node_is_told_of_its_own_pods_before_they_have_an_address() {
        let assignments = resources(MESH).assignments;
        let n1 = assignments.of("n1").unwrap();
        let pods: Vec<_> =
            n1.pods.iter().map(|p| (p.uid.as_str(), p.enrol, p.service_account.as_str())).collect();
        assert_eq!(pods, [("u2", false, "default"), ("u1", true, "cart")]);
        assert_eq!(n1.pods[1].probe_ports, [8080]);
        assert_eq!(n1.pods[1].workload_uid, "Kubernetes//Pod/shop/starting");
        assert_eq!(n1.namespaces, ["shop"], "kube-system never joins");
        let n2 = assignments.of("n2").unwrap();
        assert_eq!(n2.pods[0].uid, "h3", "as the runtime knows a static pod");
        assert!(assignments.of("n3").unwrap().pods.is_empty());
    }

    #[test]
    fn without_uids_nodes_are_told_nothing() {
        let assignments = resources(&MESH.replace(", uid: u1", "")).assignments;
        assert_eq!(assignments.of("n1"), None);
    }
}
