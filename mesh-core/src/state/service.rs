//! A service: names and virtual addresses in front of endpoints.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use indexmap::IndexMap;

use super::Str;
use super::address::{GatewayAddress, NamespacedHostname, NetworkAddress, NetworkCidr, Vip};
use super::decode::{Context, DecodeError, Problem};
use super::workload::{AppProtocol, Extensions, Health, PortMap, Workload, decode_extensions};
use crate::identity::SpiffeId;
use crate::xds::proto::workload as wire;

/// A service. Field meanings: Istio's `istio.workload.Service`.
#[derive(Debug, Clone, PartialEq)]
pub struct Service {
    /// Name of the object (short name).
    pub name: Str,
    /// Namespace and hostname, the primary key; the hostname may be a wildcard `*.x`.
    pub host: NamespacedHostname,
    /// Virtual addresses of one host each.
    pub vips: Vec<NetworkAddress>,
    /// Virtual addresses that are prefixes.
    pub cidr_vips: Vec<NetworkCidr>,
    /// Ports by service port.
    pub ports: Arc<BTreeMap<u16, ServicePort>>,
    /// Identities, besides the endpoint's own, that may answer for the service.
    pub subject_alt_names: Vec<SpiffeId>,
    /// Waypoint for traffic that was addressed to the service.
    pub waypoint: Option<GatewayAddress>,
    /// Waypoints with weights (canary); when set they are sampled instead of [`Self::waypoint`].
    pub weighted_waypoints: Vec<WeightedWaypoint>,
    /// How endpoints are chosen.
    pub load_balancing: LoadBalancing,
    /// Which address families endpoints may be dialled on.
    pub ip_families: IpFamilies,
    /// Wins among services of several namespaces with one hostname or address.
    pub canonical: bool,
    /// Ingress gateways send through the waypoint; nodes do not read it.
    pub ingress_use_waypoint: bool,
    /// Who sees the service.
    pub visibility: Visibility,
    /// Extensions by name with their payload; unknown ones are kept and ignored.
    pub extensions: Extensions,
}

/// One port of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ServicePort {
    /// Absent for a named target port: each endpoint's own mapping decides.
    pub target: Option<u16>,
    /// What the application speaks.
    pub protocol: AppProtocol,
}

/// A waypoint with its share of connections.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightedWaypoint {
    /// Where it is.
    pub destination: GatewayAddress,
    /// Share relative to the sum of all.
    pub weight: u32,
}

/// Who sees a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Visibility {
    /// Every client.
    Public,
    /// Clients of the same namespace.
    Namespace,
}

/// Address families of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IpFamilies {
    /// No restriction known.
    Automatic,
    /// IPv4 only.
    V4Only,
    /// IPv6 only.
    V6Only,
    /// Both.
    Dual,
}

impl IpFamilies {
    /// Whether an endpoint may be dialled at this address.
    #[must_use]
    pub fn allow(self, ip: IpAddr) -> bool {
        match self {
            Self::Automatic | Self::Dual => true,
            Self::V4Only => ip.is_ipv4(),
            Self::V6Only => ip.is_ipv6(),
        }
    }
}

/// How endpoints are chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadBalancing {
    /// Scopes in order of preference.
    pub scopes: Vec<Scope>,
    /// What the scopes mean.
    pub mode: Mode,
    /// Whether unhealthy endpoints take traffic.
    pub health_policy: HealthPolicy,
}

/// What [`LoadBalancing::scopes`] mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Nothing: every endpoint is as good.
    Unspecified,
    /// Only endpoints that match all scopes.
    Strict,
    /// The endpoints that match most scopes in a row.
    Failover,
    /// No choice: the original destination.
    Passthrough,
}

/// Something that source and endpoint may have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Locality region.
    Region,
    /// Locality zone.
    Zone,
    /// Locality subzone.
    Subzone,
    /// Node.
    Node,
    /// Cluster.
    Cluster,
    /// Network.
    Network,
}

/// Whether unhealthy endpoints take traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HealthPolicy {
    /// Only healthy endpoints.
    OnlyHealthy,
    /// All (publishNotReadyAddresses).
    AllowAll,
}

/// A workload behind a service.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// The workload.
    pub workload: Arc<Workload>,
    /// Its own target ports, which win over the service's.
    pub ports: PortMap,
}

/// A service with its endpoints.
#[derive(Debug, Clone)]
pub struct ServiceEndpoints {
    /// The service.
    pub service: Arc<Service>,
    /// By workload uid; dense, so that a pick can index it.
    pub(super) endpoints: Arc<IndexMap<Str, Endpoint>>,
}

impl ServiceEndpoints {
    /// Endpoints that the service's health policy lets take traffic.
    pub fn endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        self.endpoints.values().filter(|endpoint| self.takes_traffic(endpoint))
    }

    /// Every attached endpoint, whatever its health.
    pub fn all_endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        self.endpoints.values()
    }

    /// The endpoint of a workload, whatever its health.
    #[must_use]
    pub fn endpoint(&self, workload_uid: &str) -> Option<&Endpoint> {
        self.endpoints.get(workload_uid)
    }

    /// Whether both are one version of one service with one set of endpoints. Costs two comparisons of pointers, and may
    /// say no of equal ones.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.service, &other.service) && Arc::ptr_eq(&self.endpoints, &other.endpoints)
    }

    /// Whether the health policy lets this endpoint take traffic.
    #[must_use]
    pub fn takes_traffic(&self, endpoint: &Endpoint) -> bool {
        endpoint.workload.health == Health::Healthy
            || self.service.load_balancing.health_policy == HealthPolicy::AllowAll
    }
}

impl Service {
    /// Whether a client of this namespace sees the service; a client without a namespace sees public ones.
    #[must_use]
    pub fn visible_to(&self, namespace: Option<&str>) -> bool {
        self.visibility == Visibility::Public || namespace == Some(self.host.namespace())
    }

    /// Validates the wire form.
    ///
    /// # Errors
    /// The first field that cannot be honoured. An unknown visibility means public (Istio's rule for that enum);
    /// subject alternative names that are no SPIFFE identities are left out with a warning: no peer of the mesh
    /// could present them.
    pub fn decode(msg: &wire::Service) -> Result<Self, DecodeError> {
        let key = format!("{}/{}", msg.namespace, msg.hostname);
        let cx = Context { kind: "service", key: &key };
        if msg.hostname.is_empty() {
            return Err(cx.error("hostname", Problem::Missing("the hostname, part of the primary key")));
        }
        let (vips, cidr_vips) = decode_vips(cx, &msg.addresses)?;
        Ok(Self {
            name: msg.name.as_str().into(),
            host: NamespacedHostname::new(&msg.namespace, &msg.hostname),
            vips,
            cidr_vips,
            ports: Arc::new(decode_ports(cx, &msg.ports)?),
            subject_alt_names: decode_sans(&key, &msg.subject_alt_names),
            waypoint: msg.waypoint.as_ref().map(|w| GatewayAddress::decode(cx, "waypoint", w)).transpose()?,
            weighted_waypoints: decode_weighted(cx, &msg.weighted_waypoints)?,
            load_balancing: decode_load_balancing(cx, msg.load_balancing.as_ref())?,
            ip_families: match cx.known(
                "ip_families",
                msg.ip_families,
                "AUTOMATIC=0, IPV4_ONLY=1, IPV6_ONLY=2, DUAL=3",
            )? {
                wire::IpFamilies::Automatic => IpFamilies::Automatic,
                wire::IpFamilies::Ipv4Only => IpFamilies::V4Only,
                wire::IpFamilies::Ipv6Only => IpFamilies::V6Only,
                wire::IpFamilies::Dual => IpFamilies::Dual,
            },
            canonical: msg.canonical,
            ingress_use_waypoint: msg.ingress_use_waypoint,
            visibility: match wire::Visibility::try_from(msg.visibility) {
                Ok(wire::Visibility::Namespace) => Visibility::Namespace,
                Ok(wire::Visibility::Public) | Err(_) => Visibility::Public,
            },
            extensions: decode_extensions(&msg.extensions),
        })
    }
}

fn decode_vips(
    cx: Context<'_>,
    addresses: &[wire::NetworkAddress],
) -> Result<(Vec<NetworkAddress>, Vec<NetworkCidr>), DecodeError> {
    let (mut hosts, mut prefixes) = (Vec::new(), Vec::new());
    for (i, address) in addresses.iter().enumerate() {
        match Vip::decode(cx, &format!("addresses[{i}]"), address)? {
            Vip::Host(host) => hosts.push(host),
            Vip::Prefix(prefix) => prefixes.push(prefix),
        }
    }
    Ok((hosts, prefixes))
}

fn decode_ports(cx: Context<'_>, ports: &[wire::Port]) -> Result<BTreeMap<u16, ServicePort>, DecodeError> {
    let mut decoded = BTreeMap::new();
    for (i, port) in ports.iter().enumerate() {
        let field = format!("ports[{i}]");
        let service_port = cx.port(&format!("{field}.service_port"), port.service_port)?;
        let target = cx.optional_port(&format!("{field}.target_port"), port.target_port)?;
        let protocol = match cx.known(
            &format!("{field}.app_protocol"),
            port.app_protocol,
            "UNKNOWN=0, HTTP11=1, HTTP2=2, GRPC=3, TCP=4, TLS=5",
        )? {
            wire::AppProtocol::Unknown => AppProtocol::Unknown,
            wire::AppProtocol::Http11 => AppProtocol::Http11,
            wire::AppProtocol::Http2 => AppProtocol::Http2,
            wire::AppProtocol::Grpc => AppProtocol::Grpc,
            wire::AppProtocol::Tcp => AppProtocol::Tcp,
            wire::AppProtocol::Tls => AppProtocol::Tls,
        };
        decoded.insert(service_port, ServicePort { target, protocol });
    }
    Ok(decoded)
}

fn decode_sans(key: &str, names: &[String]) -> Vec<SpiffeId> {
    let mut identities = Vec::with_capacity(names.len());
    for name in names {
        match name.parse() {
            Ok(identity) => identities.push(identity),
            Err(error) => tracing::warn!("service {key}: subject_alt_names: left out: {error}"),
        }
    }
    identities
}

fn decode_weighted(
    cx: Context<'_>,
    waypoints: &[wire::WeightedWaypoint],
) -> Result<Vec<WeightedWaypoint>, DecodeError> {
    waypoints
        .iter()
        .enumerate()
        .map(|(i, waypoint)| {
            let field = format!("weighted_waypoints[{i}].destination");
            let Some(destination) = &waypoint.destination else {
                return Err(cx.error(field, Problem::Missing("a gateway address")));
            };
            let destination = GatewayAddress::decode(cx, &field, destination)?;
            Ok(WeightedWaypoint { destination, weight: waypoint.weight })
        })
        .collect()
}

fn decode_load_balancing(
    cx: Context<'_>,
    msg: Option<&wire::LoadBalancing>,
) -> Result<LoadBalancing, DecodeError> {
    use wire::load_balancing as lb;
    const SCOPES: &str = "REGION=1, ZONE=2, SUBZONE=3, NODE=4, CLUSTER=5, NETWORK=6";
    let Some(msg) = msg else {
        return Ok(LoadBalancing {
            scopes: Vec::new(),
            mode: Mode::Unspecified,
            health_policy: HealthPolicy::OnlyHealthy,
        });
    };
    let mut scopes = Vec::with_capacity(msg.routing_preference.len());
    for (i, value) in msg.routing_preference.iter().enumerate() {
        let field = format!("load_balancing.routing_preference[{i}]");
        scopes.push(match cx.known(&field, *value, SCOPES)? {
            lb::Scope::Region => Scope::Region,
            lb::Scope::Zone => Scope::Zone,
            lb::Scope::Subzone => Scope::Subzone,
            lb::Scope::Node => Scope::Node,
            lb::Scope::Cluster => Scope::Cluster,
            lb::Scope::Network => Scope::Network,
            lb::Scope::UnspecifiedScope => {
                return Err(cx.error(field, Problem::UnknownEnum { value: *value, known: SCOPES }));
            }
        });
    }
    let mode = "UNSPECIFIED_MODE=0, STRICT=1, FAILOVER=2, PASSTHROUGH=3";
    let health = "ONLY_HEALTHY=0, ALLOW_ALL=1";
    Ok(LoadBalancing {
        scopes,
        mode: match cx.known("load_balancing.mode", msg.mode, mode)? {
            lb::Mode::UnspecifiedMode => Mode::Unspecified,
            lb::Mode::Strict => Mode::Strict,
            lb::Mode::Failover => Mode::Failover,
            lb::Mode::Passthrough => Mode::Passthrough,
        },
        health_policy: match cx.known("load_balancing.health_policy", msg.health_policy, health)? {
            lb::HealthPolicy::OnlyHealthy => HealthPolicy::OnlyHealthy,
            lb::HealthPolicy::AllowAll => HealthPolicy::AllowAll,
        },
    })
}
