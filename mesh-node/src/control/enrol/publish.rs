//! What the enroller tells others of the node's pods.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_core::admin::{self, PodState};
use mesh_core::state::MeshState;
use mesh_core::xds::proto::node::{EnrolledPod as Reported, EnrolmentReport};
use tokio::sync::watch;

use super::{Enroller, Wanted};
use crate::pods::PodKey;

impl Enroller {
    /// To the control plane, the status, the fast path and the metrics.
    pub(super) fn publish(&self, state: &MeshState, wanted: &BTreeMap<PodKey, Wanted>, missing: &[PodKey]) {
        let mut reported = Vec::new();
        for (key, enrolled) in &self.enrolled {
            let workload = wanted.get(key).map(|w| &w.workload);
            let workload = workload.or_else(|| state.local_workload(&enrolled.pod.local).map(|w| &w.uid));
            if let Some(uid) = workload {
                reported.push(Reported { workload_uid: uid.to_string(), problem: String::new() });
            }
        }
        for (key, problem) in &self.problems {
            if let Some(wanted) = wanted.get(key) {
                reported
                    .push(Reported { workload_uid: wanted.workload.to_string(), problem: problem.clone() });
            }
        }
        reported.sort_by(|a, b| a.workload_uid.cmp(&b.workload_uid));
        // While an agent takes over, a pod that still waits for its certificate is not one that has left: the control
        // plane would announce it as one without a tunnel, and the fast path would end its connections.
        let takes_over = !self.settled && (!self.waiting_since.is_empty() || self.unknown_pods().is_some());
        if !takes_over {
            let node = self.parts.shared.config.node.name.clone();
            change(&self.parts.report, Some(EnrolmentReport { node, pods: reported }));
        }
        change(&self.parts.status, self.status(wanted, missing));
        let mut kernel: Vec<_> = self.enrolled.values().map(|e| Arc::clone(&e.kernel)).collect();
        kernel.sort_by_key(|k| k.cookie);
        self.parts.enrolled.send_if_modified(|known| {
            let same = known.iter().map(|k| k.cookie).eq(kernel.iter().map(|k| k.cookie));
            let tell = !takes_over && !same;
            if tell {
                *known = Arc::new(kernel);
            }
            tell
        });
        let metrics = &self.parts.shared.metrics;
        metrics.active_pods.set(i64::try_from(self.enrolled.len()).unwrap_or(i64::MAX));
        let pending = self.problems.len() + self.waiting_since.len() + missing.len();
        metrics.pending_pods.set(i64::try_from(pending).unwrap_or(i64::MAX));
    }

    fn status(&self, wanted: &BTreeMap<PodKey, Wanted>, missing: &[PodKey]) -> Vec<admin::Pod> {
        let mut keys: BTreeSet<&PodKey> = wanted.keys().collect();
        keys.extend(self.enrolled.keys());
        let describe = |key: &PodKey| {
            let held = self.held.get(key);
            let problem = self.problems.get(key).cloned();
            let (state, problem) = match (held, problem) {
                (Some(held), None) if held.unwanted_since.is_some() => (PodState::Releasing, None),
                (Some(_), None) => (PodState::Captured, None),
                (_, Some(problem)) => (PodState::Failed, Some(problem)),
                (None, None) if missing.contains(key) => {
                    let why = "the control plane wants it captured here, but the node does not have this pod";
                    (PodState::Pending, Some(why.to_owned()))
                }
                (None, None) => (PodState::Pending, Some("waits for its certificate".to_owned())),
            };
            let addresses = self.enrolled.get(key).map(|e| e.kernel.addresses());
            admin::Pod {
                namespace: key.namespace.clone(),
                name: key.name.clone(),
                service_account: key.service_account.clone(),
                state,
                problem,
                addresses: addresses.iter().flat_map(|a| a.iter()).map(ToString::to_string).collect(),
            }
        };
        let left = self.left.status().filter(|(key, _)| !keys.contains(key)).map(|(_, pod)| pod);
        let left: Vec<_> = left.collect();
        keys.into_iter().map(describe).chain(left).collect()
    }
}

/// Sends a value unless the receivers have it.
pub(super) fn change<T: PartialEq>(to: &watch::Sender<T>, value: T) {
    to.send_if_modified(|known| {
        let changed = *known != value;
        if changed {
            *known = value;
        }
        changed
    });
}
