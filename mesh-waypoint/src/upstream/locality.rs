//! Near and far: which endpoints are used first, and which share a locality gets.
//!
//! What says so, in this order: the destination's locality settings, the service's traffic distribution (a list of scopes
//! from the control plane), the mesh's locality settings. Failover between localities needs outlier detection, as in
//! Istio; that of a traffic distribution does not.

use mesh_core::state::{LoadBalancing, Locality, Mode, Scope, Workload};

use super::clusters::View;
use super::policy::{LocalityPolicy, Pattern, Policy};
use crate::config::Labels;

/// The cluster of a process that does not know its own.
const DEFAULT_CLUSTER: &str = "Kubernetes";

/// What decides.
#[derive(Debug, Clone, Copy)]
pub(super) enum Scheme<'a> {
    /// Nothing: all are alike.
    Flat,
    /// The more of the scopes an endpoint shares with us, in their order, the earlier it is used.
    Scopes(&'a [Scope]),
    /// Region, zone and subzone; from region to region as the failover rules say.
    Localities(&'a [(String, String)]),
    /// Labels that are shared with us; among equals as for localities if there are failover rules.
    Labels(&'a LocalityPolicy),
    /// Shares of localities.
    Distribute(&'a [(Pattern, u32)]),
    /// The own zone as far as it can take its share.
    Zones,
}

/// What holds for a policy, a service and our place.
pub(super) fn scheme<'a>(
    policy: &'a Policy,
    service: Option<&'a LoadBalancing>,
    here: &Locality,
) -> Scheme<'a> {
    let explicit = policy.balancer.locality.as_ref();
    let found = match (explicit, service, policy.balancer.mesh_locality.as_ref()) {
        (Some(destination), _, _) => of_setting(destination, policy, here),
        (None, Some(service), _) if service.mode == Mode::Failover => Scheme::Scopes(&service.scopes),
        (None, _, Some(mesh)) => of_setting(mesh, policy, here),
        // The mesh has it enabled unless it says otherwise.
        (None, _, None) if policy.outlier.is_some() => Scheme::Localities(&[]),
        (None, _, None) => Scheme::Flat,
    };
    match found {
        Scheme::Flat if policy.balancer.zone_aware.is_some() => Scheme::Zones,
        found => found,
    }
}

fn of_setting<'a>(setting: &'a LocalityPolicy, policy: &Policy, here: &Locality) -> Scheme<'a> {
    if !setting.enabled {
        return Scheme::Flat;
    }
    if !setting.distribute.is_empty() {
        let ours = setting.distribute.iter().find(|(from, _)| from.matches(here));
        return ours.map_or(Scheme::Flat, |(_, to)| Scheme::Distribute(to));
    }
    // Nothing is ever out without outlier detection, so that only the nearest would ever be used.
    if policy.outlier.is_none() {
        return Scheme::Flat;
    }
    if setting.failover_priority.is_empty() {
        Scheme::Localities(&setting.failover)
    } else {
        Scheme::Labels(setting)
    }
}

impl Scheme<'_> {
    /// How far an endpoint is; 0 is nearest.
    pub(super) fn distance(&self, view: &View, workload: &Workload, labels: Option<&Labels>) -> usize {
        match self {
            Self::Flat | Self::Distribute(_) | Self::Zones => 0,
            Self::Scopes(scopes) => 2 * scopes.len() - shared_scopes(scopes, view, workload),
            Self::Localities(failover) => locality_distance(failover, &view.own.locality, &workload.locality),
            Self::Labels(setting) => {
                let by_labels = label_distance(&setting.failover_priority, view, workload, labels);
                let by_locality = match &setting.failover[..] {
                    [] => 0,
                    rules => locality_distance(rules, &view.own.locality, &workload.locality),
                };
                by_labels * 5 + by_locality
            }
        }
    }
}

/// Whether an endpoint shares a scope with this process. Parts are compared alone, and two unset ones are equal.
pub(super) fn shares(scope: Scope, view: &View, workload: &Workload) -> bool {
    let own = &view.own;
    match scope {
        Scope::Region => own.locality.region == workload.locality.region,
        Scope::Zone => own.locality.zone == workload.locality.zone,
        Scope::Subzone => own.locality.subzone == workload.locality.subzone,
        Scope::Node => *own.node == *workload.node,
        Scope::Cluster => {
            view.home().map_or(DEFAULT_CLUSTER, |home| &home.cluster_id) == &*workload.cluster_id
        }
        Scope::Network => *own.network == *workload.network,
    }
}

/// The scopes that both share up to the first that they do not. As first scope the network does not end the count, and
/// an endpoint of the same network beats every other (as for nodes, `mesh_core::route`).
fn shared_scopes(scopes: &[Scope], view: &View, workload: &Workload) -> usize {
    let shared = |scope: &&Scope| shares(**scope, view, workload);
    match scopes.split_first() {
        Some((Scope::Network, rest)) => {
            let after = rest.iter().take_while(shared).count();
            if shares(Scope::Network, view, workload) { scopes.len() + after } else { after }
        }
        _ => scopes.iter().take_while(shared).count(),
    }
}

/// 0: same subzone, 1: zone, 2: region, 3: elsewhere, 4: elsewhere, and the rules send our region somewhere else.
fn locality_distance(failover: &[(String, String)], here: &Locality, there: &Locality) -> usize {
    if here.region != there.region {
        let rule = failover.iter().find(|(from, _)| **from == *here.region);
        return if rule.is_some_and(|(_, to)| **to != *there.region) { 4 } else { 3 };
    }
    match (here.zone == there.zone, here.subzone == there.subzone) {
        (true, true) => 0,
        (true, false) => 1,
        (false, _) => 2,
    }
}

/// How many of the labels are left from the first one that is not shared.
fn label_distance(
    keys: &[(String, Option<String>)],
    view: &View,
    workload: &Workload,
    labels: Option<&Labels>,
) -> usize {
    let shared = keys.iter().take_while(|(key, value)| {
        let theirs = place_of_workload(key, workload).or_else(|| labels?.get(key).map(String::as_str));
        let ours = match value {
            Some(value) => Some(value.as_str()),
            None => place_of_view(key, view)
                .or_else(|| view.labels.get(&view.home()?.uid)?.get(key).map(String::as_str)),
        };
        ours.unwrap_or_default() == theirs.unwrap_or_default()
    });
    keys.len() - shared.count()
}

/// Labels that say where something is hold whether a pod carries them or not.
fn place_of_workload<'a>(key: &str, workload: &'a Workload) -> Option<&'a str> {
    Some(match key {
        "topology.kubernetes.io/region" => &workload.locality.region,
        "topology.kubernetes.io/zone" => &workload.locality.zone,
        "topology.istio.io/subzone" => &workload.locality.subzone,
        "topology.istio.io/network" => &workload.network,
        "topology.istio.io/cluster" => &workload.cluster_id,
        "kubernetes.io/hostname" => &workload.node,
        _ => return None,
    })
}

fn place_of_view<'a>(key: &str, view: &'a View) -> Option<&'a str> {
    Some(match key {
        "topology.kubernetes.io/region" => &view.own.locality.region,
        "topology.kubernetes.io/zone" => &view.own.locality.zone,
        "topology.istio.io/subzone" => &view.own.locality.subzone,
        "topology.istio.io/network" => &view.own.network,
        "topology.istio.io/cluster" => view.home().map_or(DEFAULT_CLUSTER, |home| &home.cluster_id),
        "kubernetes.io/hostname" => &view.own.node,
        _ => return None,
    })
}
