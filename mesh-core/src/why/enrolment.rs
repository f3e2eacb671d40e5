//! Whether a workload's connections go through the mesh.

use super::types::{Facts, Object, Stage, Step};
use super::walk::workload_object;
use crate::admin::{Pod, PodState};
use crate::state::{NetworkMode, Workload};

const ENROL: &str = "label its namespace or pod with istio.io/dataplane-mode=ambient to put it into the mesh";

/// Where a workload stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Enrolment {
    /// Its connections are captured.
    Captured,
    /// They should be and are not (yet).
    Pending,
    /// Nobody wants them to be.
    Outside,
}

/// Judges a workload: for pods of the answering node by what capture really did, for others by what the control
/// plane announces, which is HBONE only once their node has reported them as captured.
pub(super) fn enrolment(workload: &Workload, facts: &Facts, stage: Stage) -> (Enrolment, Step) {
    let object = Some(workload_object(workload));
    let named = |w: &Workload| format!("{}/{}", w.namespace, w.name);
    if workload.network_mode == NetworkMode::HostNetwork {
        let detail = format!("{} shares the network of its node and is never enrolled", named(workload));
        let fix = "use a pod with its own network (hostNetwork: false)".to_owned();
        return (Enrolment::Outside, Step::warn(stage, object, detail, fix));
    }
    if workload.native_tunnel && workload.is_hbone() {
        return (
            Enrolment::Captured,
            Step::ok(stage, object, format!("{} speaks HBONE itself", named(workload))),
        );
    }
    let local = !facts.node.is_empty() && *workload.node == *facts.node;
    if local && let Some(pod) = pod_of(facts, workload) {
        return captured_here(pod, &facts.node, object, stage);
    }
    if workload.is_hbone() && !local {
        let node = &workload.node;
        let detail = format!("{} is announced as captured by its node {node}", named(workload));
        return (Enrolment::Captured, Step::ok(stage, object, detail));
    }
    if workload.wants_enrolment() {
        let detail = if local {
            format!("{} should be captured; node {} has not found the pod", named(workload), facts.node)
        } else {
            format!(
                "{} should be captured; its node {} has not reported it yet",
                named(workload),
                workload.node
            )
        };
        let fix = "see `meshctl status`: the pod must be listed in the node's pod source, with this service account";
        return (Enrolment::Pending, Step::warn(stage, object, detail, fix.to_owned()));
    }
    let detail = format!("{} is not in the mesh", named(workload));
    (Enrolment::Outside, Step::warn(stage, object, detail, ENROL.to_owned()))
}

fn pod_of<'a>(facts: &'a Facts, workload: &Workload) -> Option<&'a Pod> {
    facts.pods.iter().find(|pod| {
        pod.namespace == *workload.namespace
            && pod.name == *workload.name
            && pod.service_account == workload.identity.service_account()
    })
}

fn captured_here(pod: &Pod, node: &str, object: Option<Object>, stage: Stage) -> (Enrolment, Step) {
    let problem = pod.problem.as_deref().unwrap_or("no reason given");
    match pod.state {
        PodState::Captured => {
            (Enrolment::Captured, Step::ok(stage, object, format!("captured on node {node}")))
        }
        PodState::Releasing => {
            let detail = format!("leaves the mesh; still captured on node {node} for a few seconds");
            (Enrolment::Captured, Step::warn(stage, object, detail, ENROL.to_owned()))
        }
        PodState::Left => {
            let detail = format!("has left the mesh; node {node} carries what it had open until it ends");
            (Enrolment::Outside, Step::warn(stage, object, detail, ENROL.to_owned()))
        }
        PodState::Pending => {
            let detail = format!("node {node} is about to capture it");
            let fix = "wait a moment; if it stays like this see `meshctl status` and the node's log";
            (Enrolment::Pending, Step::warn(stage, object, detail, fix.to_owned()))
        }
        PodState::Failed => {
            let detail = format!("node {node} cannot capture it: {problem}");
            (
                Enrolment::Pending,
                Step::warn(stage, object, detail, "run `meshctl doctor` for that node".to_owned()),
            )
        }
    }
}
