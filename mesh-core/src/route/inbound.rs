//! The way of a tunnel that arrives at a local workload.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::error::Code;
use crate::hbone::Authority;
use crate::state::{Address, GatewayAddress, MeshState, NamespacedHostname, Service, Workload};

/// Where an accepted tunnel goes: always to the local workload, whatever address the authority names.
#[derive(Debug, Clone, PartialEq)]
pub struct InboundTarget {
    /// Address and port of the application. Policies see this port.
    pub address: SocketAddr,
    /// The application wants a PROXY protocol v2 header first and is dialled on loopback.
    pub proxy_protocol: bool,
    /// The service that the authority named, when it named one.
    pub service: Option<Arc<Service>>,
    /// Which rule let the authority in.
    pub resolved_by: ResolvedBy,
}

/// Which rule let an authority in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResolvedBy {
    /// It is the address of the connection itself.
    LocalAddress,
    /// The workload has an application tunnel: the authority is for the application.
    ApplicationTunnel,
    /// The local workload is the waypoint of what the authority names.
    WaypointOf,
    /// It is the name of a service.
    Hostname,
}

/// Why a tunnel is refused, with the HTTP status for the peer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InboundError {
    /// The authority is for somebody else.
    #[error("ip mismatch: {requested} != {local}")]
    NotHere {
        /// Address of the authority.
        requested: IpAddr,
        /// Address of the connection.
        local: IpAddr,
    },
    /// The service is not known, or not visible to this workload.
    #[error("no service or workload for hostname: {0}")]
    UnknownHost(String),
    /// The service does not have the port, or this endpoint does not.
    #[error("service {service} has no port {port} on this workload")]
    UnknownPort {
        /// `namespace/hostname`.
        service: String,
        /// Port of the authority.
        port: u16,
    },
    /// The target would be one of the mesh's own listeners.
    #[error("attempted recursive call to ourselves")]
    OwnPort(u16),
}

impl InboundError {
    /// Status of the CONNECT response: 400 for an address that is not here, 503 for what cannot be resolved.
    #[must_use]
    pub fn status(&self) -> u16 {
        match self {
            Self::NotHere { .. } => 400,
            Self::UnknownHost(_) | Self::UnknownPort { .. } | Self::OwnPort(_) => 503,
        }
    }

    /// The stable code.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::NotHere { .. } => Code::NotHere,
            Self::UnknownHost(_) | Self::UnknownPort { .. } => Code::ServiceUnresolved,
            Self::OwnPort(_) => Code::OwnPort,
        }
    }
}

/// Decides where a CONNECT request that arrived at `local` goes.
///
/// `local_ip` is the address of the TCP connection, `illegal_ports` are the mesh's own listeners.
///
/// # Errors
/// When it may not go anywhere; [`InboundError::status`] is for the peer.
pub fn inbound(
    state: &MeshState,
    local: &Workload,
    local_ip: IpAddr,
    authority: &Authority,
    illegal_ports: &[u16],
) -> Result<InboundTarget, InboundError> {
    let local_ip = local_ip.to_canonical();
    let (port, service, resolved_by) = match authority {
        Authority::Socket(requested) => {
            let resolved_by = admit_address(state, local, local_ip, requested.ip().to_canonical())?;
            (requested.port(), None, resolved_by)
        }
        Authority::Host { host, port } => {
            let (port, service) = resolve_host(state, local, host, *port)?;
            (port, Some(service), ResolvedBy::Hostname)
        }
    };
    if illegal_ports.contains(&port) {
        return Err(InboundError::OwnPort(port));
    }
    let tunnel = local.application_tunnel;
    let port = tunnel.and_then(|tunnel| tunnel.port).unwrap_or(port);
    Ok(InboundTarget {
        address: SocketAddr::new(local_ip, port),
        proxy_protocol: tunnel.is_some_and(|tunnel| tunnel.proxy_protocol),
        service,
        resolved_by,
    })
}

fn admit_address(
    state: &MeshState,
    local: &Workload,
    local_ip: IpAddr,
    requested: IpAddr,
) -> Result<ResolvedBy, InboundError> {
    if requested == local_ip {
        return Ok(ResolvedBy::LocalAddress);
    }
    if local.application_tunnel.is_some() {
        return Ok(ResolvedBy::ApplicationTunnel);
    }
    let network = &*state.options().network;
    let is_ours = |waypoint: &GatewayAddress| is_local(state, waypoint, local, local_ip);
    let is_waypoint = match state.address(network, requested, Some(&local.namespace)) {
        Some(Address::Workload(workload)) => workload.waypoint.as_ref().is_some_and(is_ours),
        Some(Address::Service(service)) => {
            let service = &service.service;
            let weighted = service.weighted_waypoints.iter().map(|waypoint| &waypoint.destination);
            service.waypoint.iter().chain(weighted).any(is_ours)
        }
        None => false,
    };
    if is_waypoint {
        Ok(ResolvedBy::WaypointOf)
    } else {
        Err(InboundError::NotHere { requested, local: local_ip })
    }
}

/// Whether a waypoint is the local workload: a service with it as an endpoint, or a workload that owns its address.
fn is_local(state: &MeshState, waypoint: &GatewayAddress, local: &Workload, local_ip: IpAddr) -> bool {
    let found = match waypoint {
        GatewayAddress::Hostname(name, _) => state.named(name),
        GatewayAddress::Address(address, _) => {
            state.address(&address.network, address.ip, Some(&local.namespace))
        }
    };
    match found {
        Some(Address::Service(service)) => service.endpoint(&local.uid).is_some(),
        Some(Address::Workload(workload)) => workload.addresses.contains(&local_ip),
        None => false,
    }
}

/// The service that a name means to the local workload, and the port on the workload.
fn resolve_host(
    state: &MeshState,
    local: &Workload,
    host: &str,
    port: u16,
) -> Result<(u16, Arc<Service>), InboundError> {
    let Some(found) = state.service_by_hostname(host, Some(&local.namespace)) else {
        return Err(InboundError::UnknownHost(host.to_owned()));
    };
    let own = found.endpoint(&local.uid).and_then(|endpoint| endpoint.ports.target(port));
    let of_service = || found.service.ports.get(&port).and_then(|port| port.target);
    let unknown_port = || {
        let service: &NamespacedHostname = &found.service.host;
        InboundError::UnknownPort { service: service.to_string(), port }
    };
    let target = own.or_else(of_service).ok_or_else(unknown_port)?;
    Ok((target, found.service.clone()))
}
