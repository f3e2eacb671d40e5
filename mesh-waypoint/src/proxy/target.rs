//! What a CONNECT leads to: a service or a workload that is bound to this waypoint, and nothing else.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use mesh_core::hbone::Authority;
use mesh_core::state::{AppProtocol, GatewayAddress, MeshState, ServiceEndpoints, Workload};

use crate::config::{Own, Snapshot};
use crate::request::Addressed;

/// What was asked for.
#[derive(Debug, Clone)]
pub struct Target {
    /// Service or workload.
    pub addressed: Addressed,
    /// The local address of the application's connection.
    pub destination: SocketAddr,
    /// What the port is declared to speak.
    pub protocol: AppProtocol,
}

/// Why a CONNECT leads nowhere.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Nothing of that name or address.
    #[error("{0} is neither a service nor a workload of the mesh")]
    Unknown(Authority),
    /// It is there, for another waypoint or for none.
    #[error("{what} is not bound to waypoint {waypoint}")]
    NotBound {
        /// Service or workload.
        what: String,
        /// `namespace/name`.
        waypoint: String,
    },
    /// The service does not have the port.
    #[error("service {service} has no port {port}")]
    NoPort {
        /// `namespace/hostname`.
        service: String,
        /// What was asked for.
        port: u16,
    },
}

/// Finds what `authority` means to a client of `namespace`.
///
/// # Errors
/// Why the waypoint does not serve it.
pub fn resolve(snapshot: &Snapshot, authority: &Authority, namespace: &str) -> Result<Target, Refusal> {
    let (mesh, own) = (&*snapshot.mesh, &*snapshot.own);
    let candidates: Vec<&ServiceEndpoints> = match authority {
        Authority::Socket(address) => {
            mesh.service_by_ip(&own.network, address.ip(), Some(namespace)).into_iter().collect()
        }
        Authority::Host { host, .. } => {
            // The one that the client sees goes first.
            let seen = mesh.service_by_hostname(host, Some(namespace));
            seen.into_iter().chain(mesh.services_by_hostname(host)).collect()
        }
    };
    if let Some(service) = candidates.iter().find(|service| serves(own, mesh, service)) {
        return of_service(own, service, authority);
    }
    let workload = match authority {
        Authority::Socket(address) => mesh.workload_by_ip(&own.network, address.ip()),
        Authority::Host { .. } => None,
    };
    let waypoint = || format!("{}/{}", own.namespace, own.gateway);
    match (workload, candidates.first()) {
        (Some(workload), _) if workload.waypoint.as_ref().is_some_and(|w| is_own(own, mesh, w)) => {
            Ok(of_workload(mesh, workload, authority))
        }
        (Some(workload), _) => {
            Err(Refusal::NotBound { what: format!("workload {}", workload.uid), waypoint: waypoint() })
        }
        (None, Some(service)) => Err(Refusal::NotBound {
            what: format!("service {}", service.service.host.key()),
            waypoint: waypoint(),
        }),
        (None, None) => Err(Refusal::Unknown(authority.clone())),
    }
}

/// Whether the service's requests go through this waypoint.
fn serves(own: &Own, mesh: &MeshState, service: &ServiceEndpoints) -> bool {
    let service = &service.service;
    let weighted = service.weighted_waypoints.iter().map(|w| &w.destination);
    service.waypoint.iter().chain(weighted).any(|waypoint| is_own(own, mesh, waypoint))
}

/// Whether a reference means this waypoint: by its name, or by an address of the service with that name.
fn is_own(own: &Own, mesh: &MeshState, waypoint: &GatewayAddress) -> bool {
    match waypoint {
        GatewayAddress::Hostname(name, _) => {
            name.namespace() == own.namespace && name.hostname().eq_ignore_ascii_case(&own.hostname)
        }
        GatewayAddress::Address(address, _) => {
            let services = mesh.services_by_hostname(&own.hostname);
            let mut own_services = services.filter(|s| s.service.host.namespace() == own.namespace);
            own_services.any(|s| {
                let is_vip = s.service.vips.contains(address);
                is_vip || s.all_endpoints().any(|e| e.workload.network_addresses().any(|a| a == *address))
            })
        }
    }
}

fn of_service(own: &Own, found: &ServiceEndpoints, authority: &Authority) -> Result<Target, Refusal> {
    let service = &found.service;
    let port = authority.port();
    let Some(spec) = service.ports.get(&port) else {
        return Err(Refusal::NoPort { service: service.host.key().to_string(), port });
    };
    let destination = match authority {
        Authority::Socket(address) => *address,
        Authority::Host { .. } => {
            let vip = service.vips.iter().filter(|v| *v.network == *own.network).map(|v| v.ip);
            let vip = vip.min_by_key(IpAddr::is_ipv6).unwrap_or(Ipv4Addr::UNSPECIFIED.into());
            SocketAddr::new(vip, port)
        }
    };
    Ok(Target {
        addressed: Addressed::Service { key: Arc::clone(service.host.key()), port },
        destination,
        protocol: spec.protocol,
    })
}

fn of_workload(mesh: &MeshState, workload: &Arc<Workload>, authority: &Authority) -> Target {
    let port = authority.port();
    let destination = match authority {
        Authority::Socket(address) => *address,
        Authority::Host { .. } => SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port),
    };
    Target {
        addressed: Addressed::Workload { workload: Arc::clone(workload), port },
        destination,
        protocol: declared(mesh, workload, port),
    }
}

/// What the services of a workload declare of its port; the first that does counts.
fn declared(mesh: &MeshState, workload: &Workload, port: u16) -> AppProtocol {
    let services = workload.services.iter().filter_map(|(key, own)| Some((mesh.service(key)?, own)));
    let mut ports = services.flat_map(|(service, own)| {
        let ports = service.service.ports.iter();
        ports.map(|(at, spec)| (own.target(*at).or(spec.target), spec.protocol))
    });
    let found = ports.find(|(target, protocol)| *target == Some(port) && *protocol != AppProtocol::Unknown);
    found.map_or(AppProtocol::Unknown, |(_, protocol)| protocol)
}
