//! Whether a pod is held: pure.

use super::message::{Starting, State};
use crate::control::assign::{Assigned, Assignment};

/// Namespaces whose pods are never held: without them there is no cluster.
const NEVER: [&str; 3] = ["kube-system", "kube-public", "kube-node-lease"];

/// What to do with a pod that starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gate {
    /// It is not of the mesh, or nobody can tell.
    Pass,
    /// It is of the mesh: it goes on once it is captured.
    Hold,
    /// It may be, and the control plane does not know it yet.
    Wait,
}

/// Decides while an agent serves. `home` is the namespace of the agent.
#[must_use]
pub fn with_agent(pod: &Starting, assigned: &Assigned, home: &str) -> Gate {
    if is_never_held(&pod.namespace, home) {
        return Gate::Pass;
    }
    let Assigned::Known(assignment) = assigned else { return Gate::Pass };
    match of_assignment(pod, assignment) {
        Some(true) => Gate::Hold,
        Some(false) => Gate::Pass,
        None if pod.uid.is_empty() => Gate::Pass,
        None if assignment.namespaces.contains(&pod.namespace) => Gate::Wait,
        None => Gate::Pass,
    }
}

fn of_assignment(pod: &Starting, assignment: &Assignment) -> Option<bool> {
    assignment.pod(&pod.uid, &pod.namespace, &pod.name).map(|pod| pod.enrol)
}

/// Decides without an agent: whether the pod has to wait for one.
#[must_use]
pub fn without_agent(pod: &Starting, state: &State) -> bool {
    !is_never_held(&pod.namespace, "") && !state.fail_open && state.namespaces.contains(&pod.namespace)
}

/// What stands in for the agent while it is away. Its own namespace is never part.
#[must_use]
pub fn state(assigned: &Assigned, fail_open: bool, home: &str) -> Option<State> {
    let Assigned::Known(assignment) = assigned else { return None };
    let held = assignment.namespaces.iter().filter(|namespace| !is_never_held(namespace, home));
    Some(State { namespaces: held.cloned().collect(), fail_open })
}

fn is_never_held(namespace: &str, home: &str) -> bool {
    namespace == home || NEVER.contains(&namespace)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use mesh_core::xds::proto::node::{AssignedPod, EnrolmentAck};

    use super::*;

    fn pod(uid: &str, namespace: &str, name: &str) -> Starting {
        Starting { uid: uid.into(), namespace: namespace.into(), name: name.into(), netns: "/n".into() }
    }

    fn assigned() -> Assigned {
        let pod = |uid: &str, namespace: &str, enrol| AssignedPod {
            uid: uid.into(),
            namespace: namespace.into(),
            name: "a".into(),
            enrol,
            ..AssignedPod::default()
        };
        let message = EnrolmentAck {
            assigns: true,
            pods: vec![pod("1", "shop", true), pod("2", "plain", false)],
            namespaces: vec!["shop".into(), "kube-system".into(), "istio-system".into()],
        };
        Assigned::Known(Arc::new(Assignment::read(message).unwrap()))
    }

    #[test]
    fn a_pod_of_the_mesh_is_held_and_one_that_is_not_never_is() {
        let gate = |pod: Starting| with_agent(&pod, &assigned(), "istio-system");
        assert_eq!(gate(pod("1", "shop", "a")), Gate::Hold);
        assert_eq!(gate(pod("2", "plain", "a")), Gate::Pass);
        assert_eq!(gate(pod("9", "plain", "b")), Gate::Pass, "unknown yet, outside the mesh");
        assert_eq!(gate(pod("9", "shop", "b")), Gate::Wait, "unknown yet, in a namespace of the mesh");
        assert_eq!(gate(pod("9", "shop", "a")), Gate::Wait, "made again under its name");
        assert_eq!(gate(pod("", "shop", "b")), Gate::Pass, "the runtime does not say which it is");
        for namespace in ["kube-system", "istio-system"] {
            assert_eq!(gate(pod("9", namespace, "b")), Gate::Pass);
        }
        for nothing in [Assigned::Unknown, Assigned::NotOffered] {
            assert_eq!(with_agent(&pod("1", "shop", "a"), &nothing, "istio-system"), Gate::Pass);
        }
    }

    #[test]
    fn without_an_agent_only_pods_of_the_meshs_namespaces_wait_unless_the_mesh_fails_open() {
        let closed = state(&assigned(), false, "istio-system").unwrap();
        assert_eq!(closed.namespaces.iter().map(String::as_str).collect::<Vec<_>>(), ["shop"]);
        assert!(without_agent(&pod("1", "shop", "a"), &closed));
        for namespace in ["plain", "kube-system", "istio-system"] {
            assert!(!without_agent(&pod("1", namespace, "a"), &closed), "{namespace}");
        }
        let open = state(&assigned(), true, "istio-system").unwrap();
        assert!(!without_agent(&pod("1", "shop", "a"), &open));
        assert!(state(&Assigned::Unknown, false, "x").is_none(), "what an earlier agent wrote holds");
    }
}
