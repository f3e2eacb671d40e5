//! A workload: a pod, a virtual machine, or an endpoint outside the mesh.

use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;

use super::Str;
use super::address::{GatewayAddress, Locality};
use super::decode::{Context, DecodeError, Problem};
use crate::identity::SpiffeId;
use crate::xds::ENROL_EXTENSION;
use crate::xds::proto::workload as wire;

/// The cluster of a workload that names none.
const DEFAULT_CLUSTER: &str = "Kubernetes";

/// Something that has an identity and takes part in traffic. Field meanings: Istio's `istio.workload.Workload`.
#[derive(Debug, Clone, PartialEq)]
pub struct Workload {
    /// Primary key, for example `Kubernetes//Pod/shop/cart-7d`.
    pub uid: Str,
    /// Name of the pod (the instance).
    pub name: Str,
    /// Kubernetes namespace.
    pub namespace: Str,
    /// Own addresses within [`Self::network`].
    pub addresses: Vec<IpAddr>,
    /// A DNS name to resolve when there is no address.
    pub hostname: Option<Str>,
    /// Name of the network; empty is the default one.
    pub network: Str,
    /// How to reach it.
    pub tunnel: TunnelProtocol,
    /// Who it is.
    pub identity: SpiffeId,
    /// Waypoint for traffic that was addressed to the workload itself.
    pub waypoint: Option<GatewayAddress>,
    /// Gateway of its network, for clients of other networks.
    pub network_gateway: Option<GatewayAddress>,
    /// Name of the node that it runs on.
    pub node: Str,
    /// Canonical service name (the application).
    pub canonical_name: Str,
    /// Canonical revision (the version).
    pub canonical_revision: Str,
    /// Kind of the owner; Istio's control plane always says pod.
    pub workload_type: WorkloadType,
    /// Name of the owning controller, for example the Deployment.
    pub workload_name: Str,
    /// Speaks HBONE itself.
    pub native_tunnel: bool,
    /// How its application wants tunnelled traffic handed over.
    pub application_tunnel: Option<ApplicationTunnel>,
    /// The services that it is an endpoint of, by `namespace/hostname`, in key order, with this endpoint's ports.
    pub services: Vec<(Str, PortMap)>,
    /// Keys `namespace/name` of the selector policies that apply to it.
    pub authorization_policies: Vec<Str>,
    /// Whether it takes service traffic.
    pub health: Health,
    /// Name of its cluster.
    pub cluster_id: Str,
    /// Where it runs.
    pub locality: Locality,
    /// Whether it owns its address.
    pub network_mode: NetworkMode,
    /// Weight in load balancing; 0 takes no traffic.
    pub capacity: u32,
    /// Extensions by name with their payload; unknown ones are kept and ignored.
    pub extensions: Extensions,
}

/// Extension payloads by name.
pub type Extensions = Vec<(Str, Bytes)>;

/// Service port to target port of one endpoint. Short lists: a slice is smaller and faster than a map.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct PortMap(Arc<[(u16, u16)]>);

impl PortMap {
    /// Takes pairs of service port and target port.
    #[must_use]
    pub fn new(pairs: impl IntoIterator<Item = (u16, u16)>) -> Self {
        Self(pairs.into_iter().collect())
    }

    /// Whether somebody else holds the very same.
    pub(super) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    /// This endpoint's own target port for a service port.
    #[must_use]
    pub fn target(&self, service_port: u16) -> Option<u16> {
        self.0.iter().find(|(port, _)| *port == service_port).map(|(_, target)| *target)
    }

    /// All pairs of service port and target port.
    pub fn iter(&self) -> impl Iterator<Item = (u16, u16)> + '_ {
        self.0.iter().copied()
    }
}

/// How a peer reaches a workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TunnelProtocol {
    /// Plain TCP.
    None,
    /// HBONE to the workload's own address.
    Hbone,
}

/// Whether a workload takes service traffic. It stays reachable by its own address either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Health {
    /// Ready.
    Healthy,
    /// Not ready, or terminating.
    Unhealthy,
}

/// Kind of the owner of a workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WorkloadType {
    /// A Deployment.
    Deployment,
    /// A CronJob.
    CronJob,
    /// A bare pod, or anything else.
    Pod,
    /// A Job.
    Job,
}

impl WorkloadType {
    /// The spelling of baggage keys and dumps: `deployment`, `cronjob`, `pod`, `job`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Deployment => "deployment",
            Self::CronJob => "cronjob",
            Self::Pod => "pod",
            Self::Job => "job",
        }
    }
}

/// Whether a workload owns its address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NetworkMode {
    /// Has its own network namespace.
    Standard,
    /// Shares the address of its node: never found by address.
    HostNetwork,
}

/// What an application behind a tunnel listens for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ApplicationTunnel {
    /// Wants a PROXY protocol v2 header first.
    pub proxy_protocol: bool,
    /// Overrides the target port.
    pub port: Option<u16>,
}

/// Application protocol of a service port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AppProtocol {
    /// Not declared.
    Unknown,
    /// HTTP/1.1.
    Http11,
    /// HTTP/2.
    Http2,
    /// gRPC.
    Grpc,
    /// Opaque TCP.
    Tcp,
    /// TLS that is passed through.
    Tls,
}

impl Workload {
    /// Whether peers reach it through HBONE.
    #[must_use]
    pub fn is_hbone(&self) -> bool {
        self.tunnel == TunnelProtocol::Hbone
    }

    /// Whether the control plane asks this workload's node to capture it before it is announced as HBONE.
    #[must_use]
    pub fn wants_enrolment(&self) -> bool {
        self.is_hbone() || self.extension(ENROL_EXTENSION).is_some()
    }

    /// Payload of an extension, when the workload carries it.
    #[must_use]
    pub fn extension(&self, name: &str) -> Option<&[u8]> {
        self.extensions.iter().find(|(n, _)| &**n == name).map(|(_, payload)| &payload[..])
    }

    /// Validates the wire form.
    ///
    /// # Errors
    /// The first field that cannot be honoured; see [`Problem`]. Empty trust domain, service account and cluster
    /// take Istio's defaults.
    pub fn decode(msg: &wire::Workload) -> Result<Self, DecodeError> {
        let cx = Context { kind: "workload", key: &msg.uid };
        if msg.uid.is_empty() {
            return Err(cx.error("uid", Problem::Missing("the primary key")));
        }
        let gateway = |field, gateway: &Option<wire::GatewayAddress>| {
            gateway.as_ref().map(|g| GatewayAddress::decode(cx, field, g)).transpose()
        };
        let addresses = msg
            .addresses
            .iter()
            .enumerate()
            .map(|(i, bytes)| cx.ip(&format!("addresses[{i}]"), bytes))
            .collect::<Result<_, _>>()?;
        let services = msg
            .services
            .iter()
            .map(|(key, ports)| Ok((key.as_str().into(), decode_ports(cx, key, ports)?)))
            .collect::<Result<_, _>>()?;
        let locality = msg.locality.clone().unwrap_or_default();
        Ok(Self {
            uid: msg.uid.as_str().into(),
            name: msg.name.as_str().into(),
            namespace: msg.namespace.as_str().into(),
            addresses,
            hostname: (!msg.hostname.is_empty()).then(|| msg.hostname.as_str().into()),
            network: msg.network.as_str().into(),
            tunnel: decode_tunnel(cx, msg.tunnel_protocol)?,
            identity: SpiffeId::new(&msg.trust_domain, &msg.namespace, &msg.service_account),
            waypoint: gateway("waypoint", &msg.waypoint)?,
            network_gateway: gateway("network_gateway", &msg.network_gateway)?,
            node: msg.node.as_str().into(),
            canonical_name: msg.canonical_name.as_str().into(),
            canonical_revision: msg.canonical_revision.as_str().into(),
            workload_type: decode_type(cx, msg.workload_type)?,
            workload_name: msg.workload_name.as_str().into(),
            native_tunnel: msg.native_tunnel,
            application_tunnel: msg
                .application_tunnel
                .as_ref()
                .map(|tunnel| decode_application_tunnel(cx, tunnel))
                .transpose()?,
            services,
            authorization_policies: msg
                .authorization_policies
                .iter()
                .map(|key| key.as_str().into())
                .collect(),
            health: decode_health(cx, msg.status)?,
            cluster_id: if msg.cluster_id.is_empty() { DEFAULT_CLUSTER } else { &msg.cluster_id }.into(),
            locality: Locality {
                region: locality.region.into(),
                zone: locality.zone.into(),
                subzone: locality.subzone.into(),
            },
            network_mode: match cx.known("network_mode", msg.network_mode, "STANDARD=0, HOST_NETWORK=1")? {
                wire::NetworkMode::Standard => NetworkMode::Standard,
                wire::NetworkMode::HostNetwork => NetworkMode::HostNetwork,
            },
            capacity: msg.capacity.unwrap_or(1),
            extensions: decode_extensions(&msg.extensions),
        })
    }
}

pub(super) fn decode_extensions(extensions: &[wire::Extension]) -> Extensions {
    let payload =
        |e: &wire::Extension| e.config.as_ref().map(|any| any.value.clone().into()).unwrap_or_default();
    extensions.iter().map(|e| (e.name.as_str().into(), payload(e))).collect()
}

fn decode_tunnel(cx: Context<'_>, value: i32) -> Result<TunnelProtocol, DecodeError> {
    let field = "tunnel_protocol";
    match cx.known(field, value, "NONE=0, HBONE=1")? {
        wire::TunnelProtocol::None => Ok(TunnelProtocol::None),
        wire::TunnelProtocol::Hbone => Ok(TunnelProtocol::Hbone),
        wire::TunnelProtocol::LegacyIstioMtls => {
            Err(cx
                .error(field, Problem::Unsupported { value: "LEGACY_ISTIO_MTLS", instead: "HBONE or NONE" }))
        }
    }
}

fn decode_type(cx: Context<'_>, value: i32) -> Result<WorkloadType, DecodeError> {
    Ok(match cx.known("workload_type", value, "DEPLOYMENT=0, CRONJOB=1, POD=2, JOB=3")? {
        wire::WorkloadType::Deployment => WorkloadType::Deployment,
        wire::WorkloadType::Cronjob => WorkloadType::CronJob,
        wire::WorkloadType::Pod => WorkloadType::Pod,
        wire::WorkloadType::Job => WorkloadType::Job,
    })
}

fn decode_health(cx: Context<'_>, value: i32) -> Result<Health, DecodeError> {
    Ok(match cx.known("status", value, "HEALTHY=0, UNHEALTHY=1")? {
        wire::WorkloadStatus::Healthy => Health::Healthy,
        wire::WorkloadStatus::Unhealthy => Health::Unhealthy,
    })
}

fn decode_application_tunnel(
    cx: Context<'_>,
    msg: &wire::ApplicationTunnel,
) -> Result<ApplicationTunnel, DecodeError> {
    use wire::application_tunnel::Protocol;
    let protocol = cx.known("application_tunnel.protocol", msg.protocol, "NONE=0, PROXY=1")?;
    Ok(ApplicationTunnel {
        proxy_protocol: matches!(protocol, Protocol::Proxy),
        port: cx.optional_port("application_tunnel.port", msg.port)?,
    })
}

/// The endpoint's own ports of one service. A pair without a target port says nothing and is left out.
fn decode_ports(cx: Context<'_>, service: &str, ports: &wire::PortList) -> Result<PortMap, DecodeError> {
    let mut pairs = Vec::with_capacity(ports.ports.len());
    for (i, port) in ports.ports.iter().enumerate() {
        let field = format!("services[{service}].ports[{i}]");
        let service_port = cx.port(&format!("{field}.service_port"), port.service_port)?;
        if let Some(target) = cx.optional_port(&format!("{field}.target_port"), port.target_port)? {
            pairs.push((service_port, target));
        }
    }
    Ok(PortMap::new(pairs))
}
