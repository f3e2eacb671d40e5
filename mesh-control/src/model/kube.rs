//! Kubernetes' own kinds, reduced to what the mesh reads.

use std::collections::BTreeMap;
use std::net::IpAddr;

use mesh_core::xds::proto::workload::{AppProtocol, IpFamilies};

use super::Meta;

/// A namespace: its labels enrol and bind waypoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace {
    /// Metadata.
    pub meta: Meta,
}

/// A node: its labels are the locality of its pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Metadata.
    pub meta: Meta,
}

/// A service account; pods name it, the mesh needs only that it exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceAccount {
    /// Metadata.
    pub meta: Meta,
}

/// A pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// Metadata.
    pub meta: Meta,
    /// `status.podIPs`, or `status.podIP`; empty until the pod has an address.
    pub ips: Vec<IpAddr>,
    /// `spec.nodeName`; empty while unscheduled.
    pub node: String,
    /// `spec.serviceAccountName`, `default` when absent.
    pub service_account: String,
    /// `spec.hostNetwork`.
    pub host_network: bool,
    /// Phase `Succeeded` or `Failed`.
    pub terminal: bool,
    /// Condition `Ready` is `True`.
    pub ready: bool,
    /// Named container ports: (name, transport) to number.
    pub ports: BTreeMap<(String, Transport), u16>,
    /// Kind and name of the controlling owner.
    pub owner: Option<(String, String)>,
    /// The uid by which the node's container runtime knows the pod: `metadata.uid`, or the hash of a static pod's
    /// manifest; empty where objects have none.
    pub uid: String,
    /// TCP ports of the pod that the kubelet connects to: probes and lifecycle hooks. Sorted.
    pub probe_ports: Vec<u16>,
}

/// Transport protocol of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Transport {
    Tcp,
    Udp,
    Sctp,
}

/// A Service. `ExternalName` services have `external_name` set and nothing else of interest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Metadata.
    pub meta: Meta,
    /// Virtual addresses; empty for headless services.
    pub cluster_ips: Vec<IpAddr>,
    /// The pods behind it; empty means that endpoints come from EndpointSlices only.
    pub selector: BTreeMap<String, String>,
    /// Ports.
    pub ports: Vec<ServicePort>,
    /// Address families.
    pub ip_families: IpFamilies,
    /// `spec.publishNotReadyAddresses`.
    pub publish_not_ready: bool,
    /// `spec.internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// `spec.trafficDistribution`.
    pub distribution: Option<Distribution>,
    /// `spec.type: ExternalName`.
    pub external_name: bool,
    /// `spec.type: LoadBalancer`.
    pub load_balancer: bool,
    /// `status.loadBalancer.ingress`: where a load balancer takes what is for it.
    pub ingress: Vec<super::GatewayHost>,
    /// Fields that are valid and have no effect here.
    pub unsupported: Vec<String>,
}

/// A port of a Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    /// `name`; empty when the only port has none.
    pub name: String,
    /// `port`.
    pub port: u16,
    /// `targetPort`.
    pub target: TargetPort,
    /// `protocol`.
    pub transport: Transport,
    /// From `appProtocol`, else from the prefix of the name.
    pub app_protocol: AppProtocol,
}

/// Where a service port leads on an endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetPort {
    /// The same number on every endpoint.
    Number(u16),
    /// A container port by name; each pod decides.
    Name(String),
}

/// Which endpoints are preferred.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Distribution {
    /// `PreferClose`, `PreferSameZone`.
    SameZone,
    /// `PreferSameNode`.
    SameNode,
}

impl Distribution {
    /// Reads the values of `spec.trafficDistribution` and of the annotation
    /// `networking.istio.io/traffic-distribution` (Istio compares the latter without regard to case).
    #[must_use]
    pub fn parse(value: &str) -> Option<Self> {
        match value.to_ascii_lowercase().as_str() {
            "preferclose" | "prefersamezone" => Some(Self::SameZone),
            "prefersamenode" => Some(Self::SameNode),
            _ => None,
        }
    }
}

/// An EndpointSlice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Metadata; the label `kubernetes.io/service-name` names the service.
    pub meta: Meta,
    /// Ports: name (empty when none), number, transport.
    pub ports: Vec<SlicePort>,
    /// Endpoints.
    pub endpoints: Vec<Endpoint>,
}

impl EndpointSlice {
    /// The service that the slice belongs to.
    #[must_use]
    pub fn service(&self) -> Option<&str> {
        self.meta.label("kubernetes.io/service-name")
    }
}

/// A port of an EndpointSlice.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the API's own")]
pub struct SlicePort {
    pub name: String,
    pub port: u16,
    pub transport: Transport,
}

/// One endpoint of an EndpointSlice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Its addresses; only the first is used, as Kubernetes does.
    pub addresses: Vec<IpAddr>,
    /// `conditions.ready`; absent counts as ready.
    pub ready: bool,
    /// Name of the pod that `targetRef` names.
    pub pod: Option<String>,
    /// `nodeName`.
    pub node: String,
}

/// The application protocol of a port: `appProtocol`, else the prefix of its name, as Istio reads them.
#[must_use]
pub fn app_protocol(app_protocol: Option<&str>, name: &str) -> AppProtocol {
    let from = |word: &str| match word {
        "http" | "kubernetes.io/ws" => Some(AppProtocol::Http11),
        "http2" | "h2c" | "kubernetes.io/h2c" => Some(AppProtocol::Http2),
        "grpc" | "grpc-web" => Some(AppProtocol::Grpc),
        "tcp" => Some(AppProtocol::Tcp),
        "https" | "tls" | "kubernetes.io/wss" => Some(AppProtocol::Tls),
        _ => None,
    };
    let lower = name.to_ascii_lowercase();
    let prefix =
        if lower.starts_with("grpc-web") { "grpc-web" } else { lower.split('-').next().unwrap_or("") };
    app_protocol.map(str::to_ascii_lowercase).map_or_else(|| from(prefix), |p| from(&p)).unwrap_or_default()
}
