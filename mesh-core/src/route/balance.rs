//! Which endpoint of a service takes a connection: filter, rank, pick by weight.

use std::net::{IpAddr, SocketAddr};

use super::NoCandidate;
use crate::state::{Endpoint, IpFamilies, LoadBalancing, Mode, Scope, ServiceEndpoints, Str, Workload};

/// For what a service is resolved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolution {
    /// An application addressed it.
    Standard,
    /// It is a waypoint: endpoints with an application tunnel need not have the port.
    Waypoint,
}

/// The endpoints that may take a connection, and why others may not.
#[derive(Debug, Default)]
pub struct Candidates<'a> {
    /// Equally good, to be picked by capacity.
    pub endpoints: Vec<&'a Endpoint>,
    /// What was left out.
    pub left_out: NoCandidate,
}

/// The endpoint that takes a connection.
#[derive(Debug, Clone, Copy)]
pub struct Selected<'a> {
    /// The endpoint.
    pub endpoint: &'a Endpoint,
    /// Port on the workload.
    pub port: u16,
}

/// The endpoints of a service that may take a connection of `source` to a port of it: known, reachable, with the
/// port, and of the best rank that the service's load balancing knows.
#[must_use]
pub fn candidates<'a>(
    service: &'a ServiceEndpoints,
    source: &Workload,
    port: u16,
    resolution: Resolution,
    excluded: &[Str],
) -> Candidates<'a> {
    let mut left_out = NoCandidate::default();
    let service_port = service.service.ports.get(&port);
    if resolution == Resolution::Standard && service_port.is_none() {
        left_out.unknown_port = true;
        return Candidates { endpoints: Vec::new(), left_out };
    }
    let target = service_port.and_then(|port| port.target);
    let lb = &service.service.load_balancing;
    let ranked = lb.mode != Mode::Unspecified;

    let mut best_rank = 0;
    let mut endpoints = Vec::new();
    for endpoint in service.all_endpoints() {
        left_out.endpoints += 1;
        let workload = &*endpoint.workload;
        let has_port = match resolution {
            Resolution::Standard => target.is_some() || endpoint.ports.target(port).is_some(),
            Resolution::Waypoint => service_port.is_some() || workload.application_tunnel.is_some(),
        };
        let reason = if !service.takes_traffic(endpoint) {
            &mut left_out.unhealthy
        } else if !is_reachable(workload, source) {
            &mut left_out.unreachable
        } else if !has_port {
            &mut left_out.without_port
        } else if excluded.contains(&workload.uid) {
            &mut left_out.excluded
        } else if lb.mode == Mode::Strict && !lb.scopes.iter().all(|scope| scope.is_shared(source, workload))
        {
            &mut left_out.out_of_scope
        } else {
            let rank = if ranked { lb.rank(source, workload) } else { 0 };
            if rank > best_rank {
                endpoints.clear();
                best_rank = rank;
            }
            if rank == best_rank {
                endpoints.push(endpoint);
            }
            continue;
        };
        *reason += 1;
    }
    if endpoints.iter().all(|endpoint| endpoint.workload.capacity == 0) {
        left_out.without_capacity = endpoints.len();
        endpoints.clear();
    }
    Candidates { endpoints, left_out }
}

/// Picks one endpoint, randomly by capacity, with its port.
///
/// # Errors
/// What was left out, when nothing remains.
pub fn select<'a>(
    service: &'a ServiceEndpoints,
    source: &Workload,
    port: u16,
    resolution: Resolution,
    excluded: &[Str],
    rng: &mut fastrand::Rng,
) -> Result<Selected<'a>, NoCandidate> {
    let Candidates { endpoints, mut left_out } = candidates(service, source, port, resolution, excluded);
    let Some(endpoint) = pick_weighted(&endpoints, |e| e.workload.capacity, rng) else {
        return Err(left_out);
    };
    // The endpoint's own mapping wins over the service's; a waypoint with an application tunnel needs neither.
    let own = endpoint.ports.target(port);
    let of_service = || service.service.ports.get(&port).and_then(|port| port.target);
    let of_tunnel = || endpoint.workload.application_tunnel.and_then(|tunnel| tunnel.port).map(|_| port);
    match own.or_else(of_service).or_else(of_tunnel) {
        Some(port) => Ok(Selected { endpoint, port }),
        None => {
            left_out.without_port += 1;
            Err(left_out)
        }
    }
}

/// Picks randomly by weight; none when the weights sum up to 0.
pub(super) fn pick_weighted<'a, T>(
    items: &'a [T],
    weight: impl Fn(&T) -> u32,
    rng: &mut fastrand::Rng,
) -> Option<&'a T> {
    let total: u64 = items.iter().map(|item| u64::from(weight(item))).sum();
    if total == 0 {
        return None;
    }
    let mut at = rng.u64(0..total);
    items.iter().find(|item| match at.checked_sub(u64::from(weight(item))) {
        Some(rest) => {
            at = rest;
            false
        }
        None => true,
    })
}

/// Has an address or a hostname, or is in another network behind a gateway. A gateway is announced to clients of
/// the same network, too; they never use it.
fn is_reachable(workload: &Workload, source: &Workload) -> bool {
    let has_address = !workload.addresses.is_empty() || workload.hostname.is_some();
    has_address || (workload.network != source.network && workload.network_gateway.is_some())
}

impl LoadBalancing {
    /// How good an endpoint is for a source; higher is better. Counts the scopes that both share, up to the first
    /// that they do not. When the network is the first scope, it does not end the count, and an endpoint of the
    /// same network beats every other.
    fn rank(&self, source: &Workload, workload: &Workload) -> usize {
        let shared = |scope: &&Scope| scope.is_shared(source, workload);
        match self.scopes.split_first() {
            Some((Scope::Network, rest)) => {
                let after = rest.iter().take_while(shared).count();
                if Scope::Network.is_shared(source, workload) { self.scopes.len() + after } else { after }
            }
            _ => self.scopes.iter().take_while(shared).count(),
        }
    }
}

impl Scope {
    /// Whether both are in the same region, zone, and so on. Parts are compared alone: equal zones of different
    /// regions are equal, and two unset values are equal.
    pub(super) fn is_shared(self, a: &Workload, b: &Workload) -> bool {
        match self {
            Self::Region => a.locality.region == b.locality.region,
            Self::Zone => a.locality.zone == b.locality.zone,
            Self::Subzone => a.locality.subzone == b.locality.subzone,
            Self::Node => a.node == b.node,
            Self::Cluster => a.cluster_id == b.cluster_id,
            Self::Network => a.network == b.network,
        }
    }
}

/// The address of a workload to dial: the one that was asked for if it is one of its own; else one that the families
/// allow, of the family that was asked for if there is one.
pub(super) fn choose_address(workload: &Workload, asked: SocketAddr, families: IpFamilies) -> Option<IpAddr> {
    let asked = asked.ip().to_canonical();
    if workload.addresses.contains(&asked) {
        return Some(asked);
    }
    let mut allowed = workload.addresses.iter().copied().filter(|ip| families.allow(*ip));
    let first = allowed.clone().next();
    allowed.find(|ip| ip.is_ipv4() == asked.is_ipv4()).or(first)
}
