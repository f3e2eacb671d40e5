//! Whether a pair of pods may talk without the agent: pure.
//!
//! Every condition under which the tunnel would do more than carry bytes for an allowed connection keeps the pair on
//! the tunnel: a waypoint, an application tunnel, a destination that is not (only) the pod's own address, a missing
//! certificate, `sameNode: tunnel`. So does a shared layer-2 segment: there a neighbour with raw sockets can take another
//! pod's address, and only the tunnel's certificates tell them apart.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use mesh_core::identity::SpiffeId;
use mesh_core::policy::{AllowReason, Conn, DryRun, Verdict, evaluate};
use mesh_core::state::{LocalWorkload, MeshState, Str, Workload};

use crate::capture::Pair;
use crate::config::SameNode;
use crate::proxy::OWN_PORTS;

/// What the kernel attests of an enrolled pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodFacts {
    /// Of its network namespace.
    pub cookie: u64,
    /// Who it is, by enrolment.
    pub local: LocalWorkload,
    /// Its addresses of this moment.
    pub addresses: Arc<Vec<IpAddr>>,
    /// A neighbour on the link could claim an address of it, see [`crate::capture::EnrolledPod::on_segment`].
    pub on_segment: bool,
    /// It has left the mesh, and connections of before go on. All else is as it was then.
    pub left: bool,
}

/// What verdicts are made from, indexed: thousands of pairs are judged at once.
pub struct Judge<'a> {
    /// The mesh.
    pub state: &'a MeshState,
    by_cookie: HashMap<u64, &'a PodFacts>,
    by_address: HashMap<IpAddr, &'a PodFacts>,
    same_node: SameNode,
}

impl<'a> Judge<'a> {
    /// Judges by the mesh, the enrolled pods of this node and before them those that have left, and the node's setting.
    #[must_use]
    pub fn new(state: &'a MeshState, pods: &'a [PodFacts], same_node: SameNode) -> Self {
        let by_cookie = pods.iter().map(|p| (p.cookie, p)).collect();
        let by_address = pods.iter().flat_map(|p| p.addresses.iter().map(move |ip| (*ip, p))).collect();
        Self { state, by_cookie, by_address, same_node }
    }

    /// The workloads of both ends, if both are, or were, enrolled here with these very addresses.
    #[must_use]
    pub fn ends(&self, pair: &Pair) -> Option<(&'a Arc<Workload>, &'a Arc<Workload>)> {
        let source = self.by_cookie.get(&pair.netns).filter(|p| p.addresses.contains(&pair.source))?;
        let destination = self.by_address.get(&pair.destination)?;
        let workload = |pod: &PodFacts| self.state.local_workload(&pod.local);
        Some((workload(source)?, workload(destination)?))
    }

    fn on_segment(&self, pair: &Pair) -> bool {
        let ends = [self.by_cookie.get(&pair.netns), self.by_address.get(&pair.destination)];
        ends.into_iter().flatten().any(|pod| pod.on_segment)
    }

    /// Whether the pair may use the fast path, and the ALLOW policy that lets it, if one applies.
    #[must_use]
    pub fn allows(&self, pair: &Pair, vouched_for: impl Fn(&SpiffeId) -> bool) -> Option<Option<Str>> {
        let (source, destination) = self.eligible(pair).filter(|(_, to)| to.is_hbone())?;
        if self.facts(pair).is_none_or(|ends| ends.iter().any(|pod| pod.left)) {
            return None;
        }
        if ![source, destination].iter().all(|w| vouched_for(&w.identity)) {
            return None;
        }
        match self.policy(pair, source, destination) {
            Verdict::Allow(AllowReason::Allowed(policy)) => Some(Some(policy)),
            Verdict::Allow(AllowReason::NoAllowPolicies) => Some(None),
            Verdict::Deny(_) => None,
        }
    }

    /// Whether a connection that the pair has on the fast path must end. A policy that is listed and not there yet must
    /// not cut what it may allow. That an end leaves the mesh ends nothing: it was allowed when it began, and while the
    /// end is remembered, policy is still asked about it.
    #[must_use]
    pub fn ends_connections(&self, pair: &Pair, disowned: impl Fn(&SpiffeId) -> bool) -> bool {
        if self.facts(pair).is_none() {
            return false;
        }
        let Some((source, destination)) = self.eligible(pair) else { return true };
        if [source, destination].iter().any(|w| disowned(&w.identity)) {
            return true;
        }
        matches!(self.policy(pair, source, destination), Verdict::Deny(reason) if !reason.is_pending())
    }

    /// What is known of both ends' pods.
    fn facts(&self, pair: &Pair) -> Option<[&'a PodFacts; 2]> {
        Some([*self.by_cookie.get(&pair.netns)?, *self.by_address.get(&pair.destination)?])
    }

    /// Both workloads, if the tunnel would do no more for the pair than carry bytes. Whether the destination takes tunnels
    /// is another question.
    fn eligible(&self, pair: &Pair) -> Option<(&'a Arc<Workload>, &'a Arc<Workload>)> {
        if self.on_segment(pair) {
            return None;
        }
        let (source, destination) = self.ends(pair)?;
        let network = &self.state.options().network;
        let addressed = self.state.workload_by_ip(network, pair.destination)?;
        let client = Some(&*source.namespace);
        let eligible = self.same_node == SameNode::Fast
            && Arc::ptr_eq(addressed, destination)
            && self.state.service_by_ip(network, pair.destination, client).is_none()
            && source.network == destination.network
            && destination.waypoint.is_none()
            && destination.application_tunnel.is_none()
            && !OWN_PORTS.contains(&pair.port)
            && [source, destination].iter().all(|w| !w.keeps_to_tunnel());
        eligible.then_some((source, destination))
    }

    fn policy(&self, pair: &Pair, source: &Workload, destination: &Workload) -> Verdict {
        evaluate(&self.state.policies_for(destination), &conn(pair, source)).verdict
    }

    /// What dry-run policies would do to a connection of the pair.
    #[must_use]
    pub fn dry_run(&self, pair: &Pair) -> Vec<DryRun> {
        let Some((source, destination)) = self.ends(pair) else { return Vec::new() };
        evaluate(&self.state.policies_for(destination), &conn(pair, source)).dry_run
    }
}

/// A connection of the pair, as policies see it.
fn conn(pair: &Pair, source: &Workload) -> Conn {
    Conn {
        // Policies know no source ports.
        src: SocketAddr::new(pair.source, 0),
        identity: Some(source.identity.clone()),
        dst: SocketAddr::new(pair.destination, pair.port),
    }
}
