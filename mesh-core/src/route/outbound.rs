//! The way of a connection that a local workload opens.

use std::borrow::Cow;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::balance::{Resolution, Selected, choose_address, pick_weighted, select};
use super::{
    Dial, GatewayProblem, HBONE_PORT, NoCandidate, Outbound, Protocol, Route, RouteError, RouteKind, Tunnel,
};
use crate::hbone::Authority;
use crate::identity::SpiffeId;
use crate::state::{
    Address, GatewayAddress, IpFamilies, MeshState, Mode, Service, ServiceEndpoints, Workload,
};

/// Decides where a connection goes.
///
/// Ask again with the workload of [`Route::chosen`] excluded to get the next candidate, as long as no byte of the
/// application was delivered.
///
/// # Errors
/// When it may not go anywhere: the application's connection is reset, never sent in clear or around a waypoint.
pub fn outbound(
    state: &MeshState,
    request: &Outbound<'_>,
    rng: &mut fastrand::Rng,
) -> Result<Route, RouteError> {
    let Outbound { source, destination, .. } = *request;
    let ip = destination.ip().to_canonical();
    if ip.is_loopback() && request.illegal_ports.contains(&destination.port()) {
        return Err(RouteError::SelfCall);
    }
    let network = &*state.options().network;
    let client = Some(&*source.namespace);

    // What was addressed: a workload of that address hides a service.
    let service = match state.address(network, ip, client) {
        Some(Address::Service(service)) => Some(service),
        Some(Address::Workload(_)) | None => None,
    };
    if let Some(service) = service
        && let Some(waypoint) = service_waypoint(&service.service, rng)
    {
        return through_service_waypoint(state, request, &service.service, waypoint, rng);
    }

    // What takes it: here a service hides a workload.
    let upstream = match state.service_by_ip(network, ip, client) {
        Some(found) if found.service.load_balancing.mode == Mode::Passthrough => {
            return Ok(untouched(RouteKind::Passthrough, destination, Some(&found.service)));
        }
        Some(found) => match pick(state, request, found, rng)? {
            Picked::Here(upstream) => upstream,
            Picked::Elsewhere { upstream, via } => {
                let Some(service) = service else { return Err(RouteError::NoService(destination)) };
                return through_gateway(request, &service.service, upstream, via);
            }
        },
        None => match state.workload_by_ip(network, ip) {
            // Only connections to services cross networks.
            Some(workload) if workload.network != source.network => {
                return Err(RouteError::NoService(destination));
            }
            Some(workload) => Upstream::of_workload(workload, destination.port(), destination),
            None => return Ok(untouched(RouteKind::Unknown, destination, None)),
        },
    };

    if service.is_none()
        && let Some(waypoint) = workload_waypoint_applies(state, &upstream.workload, source, request.client)
    {
        let via = resolve_waypoint(state, request, waypoint, rng)?;
        if via.workload.network != source.network {
            return Err(RouteError::UnknownWaypoint {
                waypoint: waypoint.to_string(),
                reason: GatewayProblem::OtherNetwork(via.workload.network.clone()),
            });
        }
        let addressed = upstream.service;
        let authority = Authority::from(destination);
        return tunnel_to_gateway(RouteKind::WorkloadWaypoint, via, authority, addressed);
    }
    direct(upstream)
}

/// The waypoint of a workload that traffic to its own address takes; none when the traffic comes from that very
/// waypoint, which is so when `source` has the identity of an instance and `client` is that instance's address.
#[must_use]
pub fn workload_waypoint_applies<'a>(
    state: &MeshState,
    workload: &'a Workload,
    source: &Workload,
    client: IpAddr,
) -> Option<&'a GatewayAddress> {
    let waypoint = workload.waypoint.as_ref()?;
    let client = client.to_canonical();
    let is_source =
        |instance: &Workload| instance.identity == source.identity && instance.addresses.contains(&client);
    let found = match waypoint {
        GatewayAddress::Hostname(name, _) => state.named(name),
        GatewayAddress::Address(address, _) => {
            state.address(&address.network, address.ip, Some(&source.namespace))
        }
    };
    let from_waypoint = match found {
        Some(Address::Workload(instance)) => is_source(instance),
        Some(Address::Service(service)) => {
            service.all_endpoints().any(|endpoint| is_source(&endpoint.workload))
        }
        None => false,
    };
    (!from_waypoint).then_some(waypoint)
}

/// A workload that was picked, with the port on it and, when it was picked behind a service, that service.
struct Upstream {
    workload: Arc<Workload>,
    port: u16,
    service: Option<Arc<Service>>,
    /// The address that was asked for: the workload's own one, or one whose family is preferred.
    asked: SocketAddr,
}

impl Upstream {
    fn of_service(selected: Selected<'_>, service: &ServiceEndpoints, asked: SocketAddr) -> Self {
        let workload = selected.endpoint.workload.clone();
        Self { workload, port: selected.port, service: Some(service.service.clone()), asked }
    }

    fn of_workload(workload: &Arc<Workload>, port: u16, asked: SocketAddr) -> Self {
        Self { workload: workload.clone(), port, service: None, asked }
    }

    /// The workload's identity and the names that its service allows besides.
    fn expected(&self) -> Vec<SpiffeId> {
        let mut expected = vec![self.workload.identity.clone()];
        if let Some(service) = &self.service {
            expected
                .extend(service.subject_alt_names.iter().filter(|s| **s != self.workload.identity).cloned());
        }
        expected
    }

    fn dial(&self, port: u16) -> Result<Dial, RouteError> {
        let families = self.service.as_ref().map_or(IpFamilies::Automatic, |service| service.ip_families);
        if let Some(ip) = choose_address(&self.workload, self.asked, families) {
            return Ok(Dial::Address(SocketAddr::new(ip, port)));
        }
        match &self.workload.hostname {
            Some(hostname) if self.workload.addresses.is_empty() => {
                let prefer_v4 = self.asked.ip().to_canonical().is_ipv4();
                Ok(Dial::Hostname { hostname: hostname.clone(), port, families, prefer_v4 })
            }
            _ => Err(RouteError::NoAddress(self.workload.uid.clone())),
        }
    }
}

/// An endpoint of a service.
enum Picked {
    /// In the own network.
    Here(Upstream),
    /// In another one, with the gateway there.
    Elsewhere { upstream: Upstream, via: Upstream },
}

/// Picks an endpoint that can be reached: one whose gateway cannot be used is left out, like one that refused.
fn pick(
    state: &MeshState,
    request: &Outbound<'_>,
    found: &ServiceEndpoints,
    rng: &mut fastrand::Rng,
) -> Result<Picked, RouteError> {
    let Outbound { source, destination, .. } = *request;
    let mut excluded = Cow::Borrowed(request.excluded);
    let mut unreachable = None;
    loop {
        match select(found, source, destination.port(), Resolution::Standard, &excluded, rng) {
            Ok(selected) => {
                let upstream = Upstream::of_service(selected, found, destination);
                if upstream.workload.network == source.network {
                    return Ok(Picked::Here(upstream));
                }
                match resolve_gateway(state, request, &upstream.workload, rng) {
                    Ok(via) => return Ok(Picked::Elsewhere { upstream, via }),
                    Err(error) => {
                        excluded.to_mut().push(upstream.workload.uid.clone());
                        unreachable.get_or_insert(error);
                    }
                }
            }
            Err(reason) => return Err(unreachable.unwrap_or_else(|| no_upstream(destination, found, reason))),
        }
    }
}

/// A canary set is sampled by weight; without a positive weight the plain waypoint counts.
fn service_waypoint<'a>(service: &'a Service, rng: &mut fastrand::Rng) -> Option<&'a GatewayAddress> {
    let sampled = pick_weighted(&service.weighted_waypoints, |w| w.weight, rng).map(|w| &w.destination);
    sampled.or(service.waypoint.as_ref())
}

fn through_service_waypoint(
    state: &MeshState,
    request: &Outbound<'_>,
    service: &Arc<Service>,
    waypoint: &GatewayAddress,
    rng: &mut fastrand::Rng,
) -> Result<Route, RouteError> {
    let via = resolve_waypoint(state, request, waypoint, rng)?;
    if via.workload.network != request.source.network {
        let gateway = resolve_gateway(state, request, &via.workload, rng)?;
        return through_gateway(request, service, via, gateway);
    }
    let (authority, addressed) = (Authority::from(request.destination), Some(service.clone()));
    tunnel_to_gateway(RouteKind::ServiceWaypoint, via, authority, addressed)
}

/// One tunnel to a waypoint; `addressed` is what the application asked for.
fn tunnel_to_gateway(
    kind: RouteKind,
    via: Upstream,
    authority: Authority,
    addressed: Option<Arc<Service>>,
) -> Result<Route, RouteError> {
    let dial = via.dial(via.port)?;
    let tunnel = Tunnel { authority, expected: via.expected() };
    Ok(Route {
        kind,
        dial,
        protocol: Protocol::Hbone(tunnel),
        upstream: Some(via.workload),
        service: addressed,
        endpoint: None,
    })
}

/// The gateway of a workload in another network.
fn resolve_gateway(
    state: &MeshState,
    request: &Outbound<'_>,
    workload: &Workload,
    rng: &mut fastrand::Rng,
) -> Result<Upstream, RouteError> {
    let Some(gateway) = &workload.network_gateway else {
        let reason = GatewayProblem::NotNamed;
        return Err(RouteError::UnknownGateway { gateway: format!("of workload {}", workload.uid), reason });
    };
    resolve(state, request, gateway, Resolution::Standard, rng)
        .map_err(|reason| RouteError::UnknownGateway { gateway: gateway.to_string(), reason })
}

/// Across networks: a tunnel to the gateway of the endpoint's network, and inside it one to the endpoint.
fn through_gateway(
    request: &Outbound<'_>,
    service: &Arc<Service>,
    upstream: Upstream,
    via: Upstream,
) -> Result<Route, RouteError> {
    let dial = via.dial(via.port)?;
    let host = service.host.hostname().into();
    let authority = Authority::Host { host, port: request.destination.port() };
    let outer = Tunnel { authority: authority.clone(), expected: via.expected() };
    // The gateway does not open the inner tunnel: only the names of the chosen endpoint's service count there.
    let expected = upstream.service.map(|s| s.subject_alt_names.clone()).unwrap_or_default();
    let inner = Tunnel { authority, expected };
    Ok(Route {
        kind: RouteKind::Gateway,
        dial,
        protocol: Protocol::DoubleHbone { outer, inner },
        upstream: Some(via.workload),
        service: Some(service.clone()),
        endpoint: Some(upstream.workload),
    })
}

fn direct(upstream: Upstream) -> Result<Route, RouteError> {
    let hbone = upstream.workload.is_hbone();
    let dial = upstream.dial(if hbone { HBONE_PORT } else { upstream.port })?;
    let protocol = if hbone {
        let authority = match &dial {
            Dial::Address(address) => SocketAddr::new(address.ip(), upstream.port).into(),
            // Becomes the address when the name is resolved (`Route::resolved`).
            Dial::Hostname { hostname, .. } => {
                Authority::Host { host: (**hostname).into(), port: upstream.port }
            }
        };
        Protocol::Hbone(Tunnel { authority, expected: upstream.expected() })
    } else {
        Protocol::Tcp
    };
    let Upstream { workload, service, .. } = upstream;
    Ok(Route { kind: RouteKind::Direct, dial, protocol, upstream: Some(workload), service, endpoint: None })
}

fn untouched(kind: RouteKind, destination: SocketAddr, service: Option<&Arc<Service>>) -> Route {
    let (dial, protocol, service) = (Dial::Address(destination), Protocol::Tcp, service.cloned());
    Route { kind, dial, protocol, upstream: None, service, endpoint: None }
}

fn no_upstream(destination: SocketAddr, service: &ServiceEndpoints, reason: NoCandidate) -> RouteError {
    RouteError::NoHealthyUpstream { destination, service: service.service.host.key().clone(), reason }
}

fn resolve_waypoint(
    state: &MeshState,
    request: &Outbound<'_>,
    waypoint: &GatewayAddress,
    rng: &mut fastrand::Rng,
) -> Result<Upstream, RouteError> {
    resolve(state, request, waypoint, Resolution::Waypoint, rng)
        .map_err(|reason| RouteError::UnknownWaypoint { waypoint: waypoint.to_string(), reason })
}

/// One endpoint of a gateway or waypoint. A reference by address pins the family of that address, one by hostname
/// adapts to the caller's.
fn resolve(
    state: &MeshState,
    request: &Outbound<'_>,
    gateway: &GatewayAddress,
    resolution: Resolution,
    rng: &mut fastrand::Rng,
) -> Result<Upstream, GatewayProblem> {
    let (port, source) = (gateway.port(), request.source);
    let asked = match gateway {
        GatewayAddress::Address(address, port) => SocketAddr::new(address.ip, *port),
        GatewayAddress::Hostname(..) => request.destination,
    };
    match find_gateway(state, gateway, source).ok_or(GatewayProblem::NotFound)? {
        Address::Service(service) => {
            let selected = select(service, source, port, resolution, request.excluded, rng);
            Ok(Upstream::of_service(selected.map_err(GatewayProblem::NoEndpoint)?, service, asked))
        }
        Address::Workload(workload) => Ok(Upstream::of_workload(workload, port, asked)),
    }
}

/// By hostname: exactly that one. By address: an upstream, so a service hides a workload.
fn find_gateway<'a>(
    state: &'a MeshState,
    gateway: &GatewayAddress,
    source: &Workload,
) -> Option<Address<'a>> {
    match gateway {
        GatewayAddress::Hostname(name, _) => state.named(name),
        GatewayAddress::Address(address, _) => {
            let service = state.service_by_ip(&address.network, address.ip, Some(&source.namespace));
            let workload = || state.workload_by_ip(&address.network, address.ip).map(Address::Workload);
            service.map(Address::Service).or_else(workload)
        }
    }
}
