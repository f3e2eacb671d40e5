//! Where a connection goes: pure decisions over a [`crate::state::MeshState`].
//!
//! [`outbound`] answers for a connection that a local workload opens, [`inbound`] for a tunnel that arrives at one.
//! Neither dials, waits or resolves names; what remains to be done is in the answer. The rules, and the two orders
//! of lookup (workload before service to find out what was addressed, service before workload to pick an
//! upstream), are those of Istio ambient's node proxy.
//!
//! A waypoint that was asked for and has no endpoint fails the connection; nothing here ever goes around it.

mod balance;
mod inbound;
mod outbound;
#[cfg(test)]
mod tests;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

pub use balance::{Candidates, Resolution, Selected, candidates, select};
pub use inbound::{InboundError, InboundTarget, ResolvedBy, inbound};
pub use outbound::{outbound, workload_waypoint_applies};

use crate::error::Code;
use crate::hbone::Authority;
use crate::identity::SpiffeId;
use crate::state::{IpFamilies, Service, Str, Workload};

/// Port on which workloads, waypoints and gateways speak HBONE.
pub const HBONE_PORT: u16 = 15008;

/// A connection that a local workload opens.
#[derive(Debug, Clone, Copy)]
pub struct Outbound<'a> {
    /// The workload that opens it.
    pub source: &'a Workload,
    /// Its address on this connection.
    pub client: IpAddr,
    /// Where the application wanted to go.
    pub destination: SocketAddr,
    /// Uids of workloads that did not take the connection: the next candidate is picked among the others.
    pub excluded: &'a [Str],
    /// Ports of the mesh's own listeners.
    pub illegal_ports: &'a [u16],
}

/// Where a connection goes and how.
#[derive(Debug, Clone, PartialEq)]
pub struct Route {
    /// Why this way.
    pub kind: RouteKind,
    /// What TCP connects to.
    pub dial: Dial,
    /// What is spoken there.
    pub protocol: Protocol,
    /// The workload that TCP connects to: the destination, or a waypoint or gateway before it. Metrics and logs
    /// call it the destination workload.
    pub upstream: Option<Arc<Workload>>,
    /// The service that was addressed, whatever carries the connection there.
    pub service: Option<Arc<Service>>,
    /// The endpoint that was chosen behind the upstream, where the upstream is the gateway of another network.
    pub endpoint: Option<Arc<Workload>>,
}

/// Why a connection goes this way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RouteKind {
    /// The mesh does not know the address.
    Unknown,
    /// The service asks for no load balancing (mode PASSTHROUGH).
    Passthrough,
    /// To the workload, or to an endpoint of the service.
    Direct,
    /// To the waypoint of the service.
    ServiceWaypoint,
    /// To the waypoint of the workload.
    WorkloadWaypoint,
    /// To another network, through its gateway.
    Gateway,
}

/// What TCP connects to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dial {
    /// An address.
    Address(SocketAddr),
    /// A name that is resolved first, for workloads without an address.
    Hostname {
        /// Name to resolve (A and AAAA).
        hostname: Str,
        /// Port to connect to.
        port: u16,
        /// Families that the answer is filtered by.
        families: IpFamilies,
        /// Family to prefer: whether the application asked for IPv4.
        prefer_v4: bool,
    },
}

/// What is spoken to the upstream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Protocol {
    /// The application's bytes.
    Tcp,
    /// One tunnel.
    Hbone(Tunnel),
    /// A tunnel through the gateway of another network, inside a tunnel to that gateway. The inner CONNECT carries
    /// `x-forwarded-network` with the name of the own network, the outer one does not.
    DoubleHbone {
        /// To the gateway.
        outer: Tunnel,
        /// To the endpoint, or to the waypoint before it. Never pooled.
        inner: Tunnel,
    },
}

/// One HBONE tunnel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tunnel {
    /// `:authority` of the CONNECT request.
    pub authority: Authority,
    /// Identities of which the server must prove one. Empty: no server can, the handshake fails.
    pub expected: Vec<SpiffeId>,
}

impl Route {
    /// Whether another endpoint may exist when this one does not take the connection: exclude
    /// [`Self::chosen`] and ask again.
    #[must_use]
    pub fn has_alternatives(&self) -> bool {
        match self.kind {
            RouteKind::Unknown | RouteKind::Passthrough => false,
            RouteKind::ServiceWaypoint | RouteKind::WorkloadWaypoint | RouteKind::Gateway => true,
            RouteKind::Direct => self.service.is_some(),
        }
    }

    /// The route with its hostname resolved: to an address of an allowed family, the preferred one first, random
    /// among equals. A route that dials an address stays as it is.
    ///
    /// # Errors
    /// No resolved address may be dialled.
    pub fn resolved(mut self, addresses: &[IpAddr], rng: &mut fastrand::Rng) -> Result<Self, RouteError> {
        let Dial::Hostname { hostname, port, families, prefer_v4 } = &self.dial else { return Ok(self) };
        let of_family =
            |v4: bool| addresses.iter().filter(move |ip| families.allow(**ip) && ip.is_ipv4() == v4);
        let preferred = rng.choice(of_family(*prefer_v4).collect::<Vec<_>>());
        let Some(ip) = preferred.or_else(|| rng.choice(of_family(!*prefer_v4).collect::<Vec<_>>())) else {
            return Err(RouteError::NotResolved(self.chosen().cloned().unwrap_or_else(|| hostname.clone())));
        };
        let address = SocketAddr::new(*ip, *port);
        if self.kind == RouteKind::Direct
            && let Protocol::Hbone(tunnel) = &mut self.protocol
        {
            // The receiver knows its own address, not the name.
            tunnel.authority = SocketAddr::new(*ip, tunnel.authority.port()).into();
        }
        self.dial = Dial::Address(address);
        Ok(self)
    }

    /// Uid of the workload that is dialled: what to exclude when it does not take the connection. Across networks that
    /// is the instance of the gateway; an endpoint whose gateway has no instance left is not picked again.
    #[must_use]
    pub fn chosen(&self) -> Option<&Str> {
        self.upstream.as_ref().map(|workload| &workload.uid)
    }
}

/// Why a connection has no way. The texts are those of the reference where it logs one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RouteError {
    /// The application called one of the mesh's ports on loopback.
    #[error("attempted recursive call to ourselves")]
    SelfCall,
    /// No endpoint can take the connection.
    #[error("no healthy upstream: {destination} ({service}: {reason})")]
    NoHealthyUpstream {
        /// Where the application wanted to go.
        destination: SocketAddr,
        /// `namespace/hostname`.
        service: Str,
        /// Why each endpoint was left out.
        reason: NoCandidate,
    },
    /// The workload has no address that may be dialled.
    #[error("no endpoints for workload: {0}")]
    NoAddress(Str),
    /// The workload's hostname gave no address that may be dialled.
    #[error("no ip addresses were resolved for workload: {0}")]
    NotResolved(Str),
    /// The waypoint is not known, or none of its endpoints can take the connection.
    #[error("unknown waypoint: {waypoint} ({reason})")]
    UnknownWaypoint {
        /// The reference to it.
        waypoint: String,
        /// What failed.
        reason: GatewayProblem,
    },
    /// The gateway of the other network is not known, or none of its endpoints can take the connection.
    #[error("unknown network gateway: {gateway} ({reason})")]
    UnknownGateway {
        /// The reference to it, or the workload that lacks one.
        gateway: String,
        /// What failed.
        reason: GatewayProblem,
    },
    /// Only connections to services cross networks.
    #[error("no service for target address: {0}")]
    NoService(SocketAddr),
}

impl RouteError {
    /// The stable code.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::SelfCall => Code::SelfCall,
            Self::NoHealthyUpstream { .. } | Self::NoAddress(_) | Self::NotResolved(_) => Code::NoEndpoint,
            Self::UnknownWaypoint { .. } => Code::WaypointUnavailable,
            Self::UnknownGateway { .. } | Self::NoService(_) => Code::GatewayUnavailable,
        }
    }
}

/// Why a gateway or waypoint cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GatewayProblem {
    /// Nothing has that address or hostname.
    #[error("not found")]
    NotFound,
    /// The workload names no gateway.
    #[error("the workload is in another network and names no gateway")]
    NotNamed,
    /// It is in another network itself, where only a service's waypoint may be.
    #[error("is in network {0:?}, which cannot be reached directly")]
    OtherNetwork(Str),
    /// It is a service without a usable endpoint.
    #[error("{0}")]
    NoEndpoint(NoCandidate),
}

/// Why a service has no endpoint for a connection: how many were left out for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NoCandidate {
    /// The service does not have the port.
    pub unknown_port: bool,
    /// All attached endpoints.
    pub endpoints: usize,
    /// Not ready or terminating.
    pub unhealthy: usize,
    /// Neither address nor hostname nor gateway.
    pub unreachable: usize,
    /// The named target port is missing on the endpoint.
    pub without_port: usize,
    /// Did not match the scopes of a STRICT service.
    pub out_of_scope: usize,
    /// Capacity 0.
    pub without_capacity: usize,
    /// Did not take this connection before.
    pub excluded: usize,
}

impl std::fmt::Display for NoCandidate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.unknown_port {
            return f.write_str("the service does not have this port");
        }
        write!(f, "{} endpoints", self.endpoints)?;
        let parts = [
            (self.unhealthy, "not ready"),
            (self.unreachable, "without an address"),
            (self.without_port, "without the port"),
            (self.out_of_scope, "outside of the traffic policy's scope"),
            (self.without_capacity, "with capacity 0"),
            (self.excluded, "refused this connection"),
        ];
        for (count, what) in parts.into_iter().filter(|(count, _)| *count > 0) {
            write!(f, ", {count} {what}")?;
        }
        Ok(())
    }
}
