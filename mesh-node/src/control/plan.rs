//! Which pods are taken under capture and which are let go: a pure comparison of what the control plane wants, which
//! pods the node has, and what is captured now.
//!
//! A pod that is no longer wanted stays captured for a few seconds, so that tunnels of peers that have not heard yet
//! still work; then it leaves, and its open connections go on. A pod that the node no longer has, or whose network
//! namespace is another one, is gone at once, and so are its connections.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use mesh_core::identity::SpiffeId;
use mesh_core::state::{MeshState, Str};

use crate::pods::{PodInfo, PodKey};

/// A pod that the control plane wants captured on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Primary key of its workload, for the report.
    pub workload: Str,
    /// Whose certificate it needs.
    pub identity: SpiffeId,
}

/// The pods of `node` that the control plane wants captured.
#[must_use]
pub fn wanted(state: &MeshState, node: &str) -> BTreeMap<PodKey, Wanted> {
    let ours = state.workloads().filter(|w| *w.node == *node && w.wants_enrolment());
    ours.map(|w| {
        let key = PodKey {
            namespace: w.namespace.to_string(),
            name: w.name.to_string(),
            service_account: w.identity.service_account().to_owned(),
        };
        (key, Wanted { workload: w.uid.clone(), identity: w.identity.clone() })
    })
    .collect()
}

/// A pod under capture.
#[derive(Debug, Clone)]
pub struct Held {
    /// As the node knew it when it was captured.
    pub info: PodInfo,
    /// Since when it is not wanted any more.
    pub unwanted_since: Option<Instant>,
    /// Whether its network namespace is still the one behind its path.
    pub alive: bool,
}

/// What to do now.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Take under capture.
    pub enrol: Vec<PodKey>,
    /// Let go; they live on.
    pub leave: Vec<PodKey>,
    /// Let go; they are gone.
    pub release: Vec<PodKey>,
    /// Wanted, and the node does not have it (yet).
    pub missing: Vec<PodKey>,
    /// When something is due again without any change.
    pub again: Option<Duration>,
}

/// Compares, and remembers in `held` since when a pod is unwanted.
pub fn plan(
    wanted: &BTreeMap<PodKey, Wanted>,
    present: &HashMap<PodKey, PodInfo>,
    held: &mut BTreeMap<PodKey, Held>,
    now: Instant,
    linger: Duration,
) -> Plan {
    let mut plan = Plan::default();
    for (key, held) in &mut *held {
        let same = present
            .get(key)
            .is_some_and(|info| (&info.uid, &info.netns) == (&held.info.uid, &held.info.netns));
        if !same || !held.alive {
            plan.release.push(key.clone());
        } else if wanted.contains_key(key) {
            held.unwanted_since = None;
        } else {
            let left = linger.saturating_sub(now.duration_since(*held.unwanted_since.get_or_insert(now)));
            if left.is_zero() {
                plan.leave.push(key.clone());
            } else {
                plan.again = Some(plan.again.map_or(left, |again| again.min(left)));
            }
        }
    }
    for key in wanted.keys() {
        let stays = held.contains_key(key) && !plan.release.contains(key);
        match present.get(key) {
            Some(_) if !stays => plan.enrol.push(key.clone()),
            None => plan.missing.push(key.clone()),
            Some(_) => {}
        }
    }
    plan
}
