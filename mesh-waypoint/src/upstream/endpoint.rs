//! One endpoint as a cluster sees it: how it is reached, and what is counted of it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use mesh_core::hbone::Authority;
use mesh_core::route::{Dial, HBONE_PORT, Protocol, Route, RouteKind, Tunnel};
use mesh_core::state::{
    Address, GatewayAddress, IpFamilies, MeshState, Service, ServiceEndpoints, Str, Workload,
};
use mesh_core::xds::proto::l7;

use super::outlier::Record;
use crate::config::Own;

/// An endpoint of a cluster. Immutable, but for what is counted of it.
#[derive(Debug)]
pub struct Endpoint {
    /// The workload; none where the client's own destination is dialled (passthrough).
    pub workload: Option<Arc<Workload>>,
    /// Port of the application there.
    pub port: u16,
    /// What to dial and to speak.
    pub route: Arc<Route>,
    /// TLS to the application, inside of the tunnel where there is one.
    pub tls: Option<Arc<l7::ClientTls>>,
    /// Stands for the endpoint in hashes and sticky sessions; the same in every process.
    pub(super) id: u64,
    pub(super) weight: u32,
    /// Of the levels that are used one after the other.
    pub(super) level: usize,
    pub(super) state: Arc<EndpointState>,
}

/// What outlives a change of configuration.
#[derive(Debug, Default)]
pub(super) struct EndpointState {
    /// Requests that are under way.
    pub(super) active: AtomicU32,
    /// Requests so far.
    pub(super) picked: AtomicU64,
    /// Tries that failed so far.
    pub(super) failed: AtomicU64,
    pub(super) record: Record,
    /// Milliseconds of the cluster's clock; 0: it was there before us.
    pub(super) added: u64,
}

impl Endpoint {
    /// Uid of the workload; empty for passthrough.
    #[must_use]
    pub fn uid(&self) -> &str {
        self.workload.as_ref().map_or("", |workload| &workload.uid)
    }

    /// Requests that are under way.
    #[must_use]
    pub fn active(&self) -> u32 {
        self.state.active.load(Ordering::Relaxed)
    }

    /// Stands for the endpoint in a session's cookie: the same in every replica of the waypoint.
    #[must_use]
    pub fn sticky(&self) -> u64 {
        self.id
    }

    /// An endpoint that nobody knows: what the client wanted to connect to.
    pub(super) fn passthrough(
        destination: SocketAddr,
        service: Option<&Arc<Service>>,
        tls: Option<Arc<l7::ClientTls>>,
    ) -> Self {
        let route = Route {
            kind: RouteKind::Passthrough,
            dial: Dial::Address(destination),
            protocol: Protocol::Tcp,
            upstream: None,
            service: service.cloned(),
            endpoint: None,
        };
        Self {
            workload: None,
            port: destination.port(),
            route: Arc::new(route),
            tls,
            id: 0,
            weight: 1,
            level: 0,
            state: Arc::default(),
        }
    }
}

/// How many endpoints were left out for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct LeftOut {
    /// All that are attached to the service.
    pub endpoints: usize,
    /// Not ready or terminating.
    pub unhealthy: usize,
    /// Neither an address that may be dialled, nor a hostname, nor a gateway.
    pub unreachable: usize,
    /// The named target port is missing.
    pub without_port: usize,
    /// Without the labels of the subset.
    pub other_subset: usize,
    /// Outside of what the traffic policy allows (STRICT, or a distribution over localities).
    pub out_of_scope: usize,
    /// Capacity 0.
    pub without_capacity: usize,
    /// Ejected at the moment.
    pub ejected: usize,
}

/// Why nothing can take a request (response flag UH, status 503).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no healthy endpoint of {cluster}: {left_out}")]
pub struct NoEndpoint {
    /// What was asked for.
    pub cluster: String,
    /// Why each endpoint was left out.
    pub left_out: LeftOut,
}

impl std::fmt::Display for LeftOut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} endpoints", self.endpoints)?;
        let parts = [
            (self.unhealthy, "not ready"),
            (self.unreachable, "without an address"),
            (self.without_port, "without the port"),
            (self.other_subset, "without the subset's labels"),
            (self.out_of_scope, "outside of the traffic policy's scope"),
            (self.without_capacity, "with capacity 0"),
            (self.ejected, "ejected by outlier detection"),
        ];
        for (count, what) in parts.into_iter().filter(|(count, _)| *count > 0) {
            write!(f, ", {count} {what}")?;
        }
        Ok(())
    }
}

/// The way to the port of a workload; none when there is no address, name or gateway that may be used.
pub(super) fn way(
    mesh: &MeshState,
    own: &Own,
    workload: &Arc<Workload>,
    service: Option<&Arc<Service>>,
    service_port: u16,
    port: u16,
) -> Option<Route> {
    if *workload.network != *own.network {
        return through_gateway(mesh, own, workload, service?, service_port);
    }
    let families = service.map_or(IpFamilies::Automatic, |service| service.ip_families);
    let dialled = if workload.is_hbone() { HBONE_PORT } else { port };
    let (dial, authority) = match workload.addresses.iter().find(|ip| families.allow(**ip)) {
        Some(ip) => (Dial::Address(SocketAddr::new(*ip, dialled)), SocketAddr::new(*ip, port).into()),
        None => {
            let hostname = workload.hostname.clone().filter(|_| workload.addresses.is_empty())?;
            // Becomes the address when the name is resolved (`Route::resolved`).
            let authority = Authority::Host { host: (*hostname).into(), port };
            (Dial::Hostname { hostname, port: dialled, families, prefer_v4: true }, authority)
        }
    };
    let protocol = if workload.is_hbone() {
        let mut expected = vec![workload.identity.clone()];
        let names = service.into_iter().flat_map(|service| &service.subject_alt_names);
        expected.extend(names.filter(|name| **name != workload.identity).cloned());
        Protocol::Hbone(Tunnel { authority, expected })
    } else {
        Protocol::Tcp
    };
    Some(Route {
        kind: RouteKind::Direct,
        dial,
        protocol,
        upstream: Some(workload.clone()),
        service: service.cloned(),
        endpoint: None,
    })
}

/// To a workload of another network: a tunnel to the gateway there, and inside of it one that the gateway hands on
/// unopened.
fn through_gateway(
    mesh: &MeshState,
    own: &Own,
    workload: &Arc<Workload>,
    service: &Arc<Service>,
    service_port: u16,
) -> Option<Route> {
    let (gateway, ip, port) = resolve_gateway(mesh, own, workload.network_gateway.as_ref()?)?;
    let authority = Authority::Host { host: service.host.hostname().into(), port: service_port };
    let outer = Tunnel { authority: authority.clone(), expected: vec![gateway.identity.clone()] };
    let inner = Tunnel { authority, expected: service.subject_alt_names.clone() };
    Some(Route {
        kind: RouteKind::Gateway,
        dial: Dial::Address(SocketAddr::new(ip, port)),
        protocol: Protocol::DoubleHbone { outer, inner },
        upstream: Some(gateway),
        service: Some(service.clone()),
        endpoint: Some(workload.clone()),
    })
}

/// One instance of a gateway that can be dialled from here.
fn resolve_gateway(
    mesh: &MeshState,
    own: &Own,
    gateway: &GatewayAddress,
) -> Option<(Arc<Workload>, IpAddr, u16)> {
    let found = match gateway {
        GatewayAddress::Hostname(name, _) => mesh.named(name)?,
        GatewayAddress::Address(address, _) => {
            let service = mesh.service_by_ip(&address.network, address.ip, Some(&own.namespace));
            let workload = || mesh.workload_by_ip(&address.network, address.ip).map(Address::Workload);
            service.map(Address::Service).or_else(workload)?
        }
    };
    let port = gateway.port();
    match found {
        Address::Workload(workload) => Some((workload.clone(), *workload.addresses.first()?, port)),
        Address::Service(service) => service.endpoints().find_map(|endpoint| {
            let port = target_port(service, endpoint.ports.target(port), port)?;
            Some((endpoint.workload.clone(), *endpoint.workload.addresses.first()?, port))
        }),
    }
}

/// The port on an endpoint: its own one for the service port, else that of the service.
pub(super) fn target_port(service: &ServiceEndpoints, own: Option<u16>, port: u16) -> Option<u16> {
    own.or_else(|| service.service.ports.get(&port)?.target)
}

/// What stands for a workload in hashes.
pub(super) fn id(uid: &Str) -> u64 {
    super::hash::bytes(uid.as_bytes())
}
