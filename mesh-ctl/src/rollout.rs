//! Whether a Deployment or DaemonSet runs as it should: pure, from the object as the API server has it.

use std::collections::BTreeSet;

use serde_json::Value;

/// How far a rollout is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rollout {
    /// Pods of the newest version that serve.
    pub ready: u64,
    /// Pods that there should be.
    pub wanted: u64,
    /// Whether it is over.
    pub done: bool,
}

impl std::fmt::Display for Rollout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {} ready", self.ready, self.wanted)
    }
}

/// The version of a DaemonSet's template, and its pods' label with the version that they are of.
const TEMPLATE: (&str, &str) = ("deprecated.daemonset.template.generation", "pod-template-generation");

/// Reads a DaemonSet with its pods. One that was replaced and still carries connections does not count: its status counts a
/// node's oldest pod, and so says that nothing is replaced for as long as any connection is open.
#[must_use]
pub fn daemon(object: &Value, pods: &[Value]) -> Option<Rollout> {
    let of_status = rollout(object)?;
    let text = |value: &Value, map: &str, key: &str| Some(value.pointer(map)?.get(key)?.as_str()?.to_owned());
    let Some(newest) = text(object, "/metadata/annotations", TEMPLATE.0) else { return Some(of_status) };
    let serves = |pod: &&Value| {
        let conditions = pod.pointer("/status/conditions").and_then(Value::as_array);
        let is_ready = |c: &Value| c["type"] == "Ready" && c["status"] == "True";
        pod.pointer("/metadata/deletionTimestamp").is_none()
            && text(pod, "/metadata/labels", TEMPLATE.1).as_ref() == Some(&newest)
            && conditions.is_some_and(|all| all.iter().any(is_ready))
    };
    let nodes: BTreeSet<&str> =
        pods.iter().filter(serves).filter_map(|pod| pod.pointer("/spec/nodeName")?.as_str()).collect();
    let number = |pointer: &str| object.pointer(pointer).and_then(Value::as_u64).unwrap_or(0);
    let seen = number("/status/observedGeneration") >= number("/metadata/generation");
    let ready = nodes.len() as u64;
    Some(Rollout { ready, wanted: of_status.wanted, done: seen && ready >= of_status.wanted })
}

/// Reads the status of a Deployment or DaemonSet; none for another kind.
#[must_use]
pub fn rollout(object: &Value) -> Option<Rollout> {
    let number = |pointer: &str| object.pointer(pointer).and_then(Value::as_u64);
    let status = |name: &str| number(&format!("/status/{name}")).unwrap_or(0);
    let seen = status("observedGeneration") >= number("/metadata/generation").unwrap_or(0);
    let (wanted, updated, available, all) = match object.get("kind")?.as_str()? {
        "Deployment" => {
            let wanted = number("/spec/replicas").unwrap_or(1);
            (wanted, status("updatedReplicas"), status("availableReplicas"), status("replicas"))
        }
        "DaemonSet" => {
            let wanted = status("desiredNumberScheduled");
            (wanted, status("updatedNumberScheduled"), status("numberAvailable"), wanted)
        }
        _ => return None,
    };
    let ready = updated.min(available);
    Some(Rollout { ready, wanted, done: seen && ready >= wanted && all <= wanted })
}

/// Why pods do not serve, in words: what the kubelet says of containers, else of the pod.
#[must_use]
pub fn reasons(pods: &[Value]) -> Vec<String> {
    pods.iter().filter_map(reason).collect()
}

fn reason(pod: &Value) -> Option<String> {
    let name = pod.pointer("/metadata/name")?.as_str()?;
    let lists = ["initContainerStatuses", "containerStatuses"];
    let containers =
        lists.iter().filter_map(|list| pod.pointer(&format!("/status/{list}"))?.as_array()).flatten();
    let text =
        |value: &Value, pointer: &str| value.pointer(pointer).and_then(Value::as_str).map(str::to_owned);
    for container in containers {
        let Some(why) = text(container, "/state/waiting/reason") else { continue };
        let message = text(container, "/lastState/terminated/message")
            .or_else(|| text(container, "/state/waiting/message"));
        return Some(format!("{name}: {why}{}", message.map(|m| format!(": {m}")).unwrap_or_default()));
    }
    let conditions = pod.pointer("/status/conditions")?.as_array()?;
    let bad = conditions.iter().find(|c| c.get("status").and_then(Value::as_str) == Some("False"))?;
    let why = text(bad, "/reason").unwrap_or_default();
    let message = text(bad, "/message").unwrap_or_default();
    Some(format!("{name}: {why}: {message}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_rollout_is_done_when_the_newest_version_serves_everywhere_and_nothing_older_is_left() {
        let deployment = |generation: u64, updated: u64, available: u64, all: u64| {
            json!({"kind": "Deployment", "metadata": {"generation": generation}, "spec": {"replicas": 2},
                "status": {"observedGeneration": 3, "updatedReplicas": updated, "availableReplicas": available,
                    "replicas": all}})
        };
        let done = |object: &Value| rollout(object).unwrap().done;
        assert!(done(&deployment(3, 2, 2, 2)));
        assert!(!done(&deployment(4, 2, 2, 2)), "the change was not seen yet");
        assert!(!done(&deployment(3, 1, 2, 2)), "one of the old version serves");
        assert!(!done(&deployment(3, 2, 2, 3)), "one of the old version is still there");
        let daemon = |available: u64| {
            json!({"kind": "DaemonSet", "metadata": {"generation": 1}, "status": {"observedGeneration": 1,
                "desiredNumberScheduled": 2, "updatedNumberScheduled": 2, "numberAvailable": available}})
        };
        assert!(done(&daemon(2)));
        assert_eq!(rollout(&daemon(1)).unwrap().to_string(), "1 of 2 ready");
        assert_eq!(rollout(&json!({"kind": "Service"})), None);
    }

    #[test]
    fn a_daemon_is_replaced_once_each_node_has_a_ready_pod_of_the_newest_version_whatever_the_old_ones_carry()
    {
        let object = json!({"kind": "DaemonSet",
            "metadata": {"generation": 2, "annotations": {"deprecated.daemonset.template.generation": "2"}},
            "status": {"observedGeneration": 2, "desiredNumberScheduled": 2, "updatedNumberScheduled": 0,
                "numberAvailable": 0}});
        let pod = |node: &str, version: &str, ready: &str| {
            json!({"metadata": {"labels": {"pod-template-generation": version}}, "spec": {"nodeName": node},
                "status": {"conditions": [{"type": "Ready", "status": ready}]}})
        };
        let mut leaving = pod("b", "2", "True");
        leaving["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
        let (old, new) = ([pod("a", "1", "False"), pod("b", "1", "True")], pod("a", "2", "True"));
        let of = |more: &[Value]| daemon(&object, &[&old[..], more].concat()).unwrap();
        let half = of(&[new.clone(), leaving, pod("b", "2", "False")]);
        assert_eq!((half.ready, half.done), (1, false));
        assert!(of(&[new, pod("b", "2", "True")]).done);
    }

    #[test]
    fn a_pod_that_does_not_serve_says_why() {
        let waiting = json!({"metadata": {"name": "a"}, "status": {"containerStatuses": [
            {"state": {"waiting": {"reason": "ErrImageNeverPull", "message": "no image"}}}]}});
        let pending = json!({"metadata": {"name": "b"}, "status": {"conditions": [
            {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no node"}]}});
        assert_eq!(
            reasons(&[waiting, pending]),
            ["a: ErrImageNeverPull: no image", "b: Unschedulable: no node"]
        );
    }
}
