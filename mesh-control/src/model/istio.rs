//! Istio's and the Gateway API's kinds, parsed as far as the node's part of the mesh evaluates them.
//!
//! Field meaning: `istio.io/api` security/v1, networking/v1; Gateway API v1.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use mesh_core::xds::proto::l7::AuthorizationRule;
use mesh_core::xds::proto::workload::AppProtocol;

use super::l7::Reference;
use super::{Key, Meta};

/// Mutual TLS mode of a PeerAuthentication.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the API's own")]
pub enum MtlsMode {
    Unset,
    Disable,
    Permissive,
    Strict,
}

/// A PeerAuthentication.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerAuthentication {
    /// Metadata.
    pub meta: Meta,
    /// `selector.matchLabels`; empty means the whole namespace (or mesh, in the root namespace).
    pub selector: BTreeMap<String, String>,
    /// `mtls.mode`.
    pub mode: MtlsMode,
    /// `portLevelMtls`, by workload port.
    pub ports: BTreeMap<u16, MtlsMode>,
}

/// What an AuthorizationPolicy does when a rule matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the API's own")]
pub enum Action {
    Allow,
    Deny,
    Audit,
    Custom,
}

/// An AuthorizationPolicy.
#[derive(Debug, Clone, PartialEq)]
pub struct AuthorizationPolicy {
    /// Metadata.
    pub meta: Meta,
    /// `selector.matchLabels`.
    pub selector: BTreeMap<String, String>,
    /// `targetRef`, `targetRefs`: a policy that has some is a waypoint's.
    pub targets: Vec<Reference>,
    /// `action`.
    pub action: Action,
    /// `provider.name`; empty unless the action is CUSTOM.
    pub provider: String,
    /// Annotation `istio.io/dry-run: "true"`.
    pub dry_run: bool,
    /// `rules`, OR-ed, as far as connections have what they ask for.
    pub rules: Vec<Rule>,
    /// `rules`, complete, for waypoints and gateways.
    pub requests: Vec<AuthorizationRule>,
}

/// One rule: all three parts must hold; an empty part always holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rule {
    /// `from[].source`, OR-ed.
    pub from: Vec<Source>,
    /// `to[].operation`, OR-ed.
    pub to: Vec<Operation>,
    /// `when[]`, AND-ed.
    pub when: Vec<When>,
}

/// Positive and negative values of one attribute: one of `any` (when there are some) and none of `not`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "described above")]
pub struct Values<T> {
    pub any: Vec<T>,
    pub not: Vec<T>,
}

impl<T> Default for Values<T> {
    fn default() -> Self {
        Self { any: Vec::new(), not: Vec::new() }
    }
}

impl<T> Values<T> {
    /// Neither positive nor negative values.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.any.is_empty() && self.not.is_empty()
    }
}

/// `from[].source`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the API's own")]
pub struct Source {
    pub principals: Values<String>,
    pub namespaces: Values<String>,
    /// Namespace and name.
    pub service_accounts: Values<Key>,
    pub trust_domains: Values<String>,
    pub ip_blocks: Values<IpNet>,
    /// Fields that only an L7 proxy can evaluate.
    pub l7: Vec<String>,
}

/// `to[].operation`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the API's own")]
pub struct Operation {
    pub ports: Values<u16>,
    /// Fields that only an L7 proxy can evaluate.
    pub l7: Vec<String>,
}

/// One entry of `when`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "one variant per key")]
pub enum When {
    SourceIp(Values<IpNet>),
    SourceNamespace(Values<String>),
    SourcePrincipal(Values<String>),
    SourceServiceAccount(Values<Key>),
    SourceTrustDomain(Values<String>),
    DestinationIp(Values<IpNet>),
    DestinationPort(Values<u16>),
    /// A key that only an L7 proxy can evaluate.
    L7(String),
}

/// How a ServiceEntry finds its endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the API's own")]
pub enum Resolution {
    None,
    Static,
    Dns,
    DnsRoundRobin,
    DynamicDns,
}

/// A ServiceEntry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceEntry {
    /// Metadata.
    pub meta: Meta,
    /// `hosts`, each one service.
    pub hosts: Vec<String>,
    /// `addresses`: hosts and CIDRs.
    pub addresses: Vec<IpNet>,
    /// `ports`.
    pub ports: Vec<EntryPort>,
    /// `location: MESH_INTERNAL`.
    pub internal: bool,
    /// `resolution`.
    pub resolution: Resolution,
    /// `endpoints`.
    pub endpoints: Vec<EntryEndpoint>,
    /// `workloadSelector.labels`.
    pub selector: Option<BTreeMap<String, String>>,
    /// `subjectAltNames`.
    pub subject_alt_names: Vec<String>,
    /// `status.addresses`: host (empty for all) and address.
    pub assigned: Vec<(String, IpAddr)>,
    /// `exportTo`; empty means everywhere.
    pub export_to: Vec<String>,
}

/// A port of a ServiceEntry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EntryPort {
    /// `name`.
    pub name: String,
    /// `number`.
    pub number: u16,
    /// `targetPort`, `number` when absent.
    pub target: u16,
    /// From `protocol`, else the name.
    pub app_protocol: AppProtocol,
    /// `protocol: UDP`.
    pub udp: bool,
}

/// Where an endpoint is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EndpointAddress {
    /// An IP address.
    Ip(IpAddr),
    /// A host name that the node resolves.
    Host(String),
    /// Only reachable through its network's gateway.
    Empty,
}

/// `WorkloadEntry.spec`, also inline in a ServiceEntry.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the API's own")]
pub struct EntryEndpoint {
    pub address: EndpointAddress,
    pub ports: BTreeMap<String, u16>,
    pub labels: BTreeMap<String, String>,
    pub network: String,
    /// Region, zone, subzone.
    pub locality: [String; 3],
    pub weight: Option<u32>,
    pub service_account: String,
}

/// A WorkloadEntry: a workload that is no pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkloadEntry {
    /// Metadata.
    pub meta: Meta,
    /// `spec`; its labels hold the labels of metadata as well, as Istio merges them.
    pub spec: EntryEndpoint,
    /// Condition `Healthy` is `False`.
    pub unhealthy: bool,
}

/// A Gateway of the Gateway API: a waypoint, or a way into the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gateway {
    /// Metadata.
    pub meta: Meta,
    /// `spec.gatewayClassName`.
    pub class: String,
    /// Controller of that class, if it is ours: of [`WAYPOINT_CLASSES`] or [`GATEWAY_CLASSES`].
    pub controller: Option<&'static str>,
    /// Listeners.
    pub listeners: Vec<Listener>,
    /// `status.addresses`, or `spec.addresses` where nothing has written a status.
    pub addresses: Vec<GatewayHost>,
    /// `spec.addresses`: somebody deploys this waypoint himself.
    pub manual: Vec<GatewayHost>,
    /// `spec.infrastructure.labels`, for everything that is deployed.
    pub infrastructure_labels: BTreeMap<String, String>,
    /// `spec.infrastructure.annotations`.
    pub infrastructure_annotations: BTreeMap<String, String>,
    /// `spec.infrastructure.parametersRef`: group, kind, name.
    pub parameters: Option<(String, String, String)>,
    /// `spec.tls.frontend`: clients are to show certificates.
    pub validates_clients: bool,
    /// Fields that are valid and have no effect here.
    pub unsupported: Vec<String>,
}

/// A GatewayClass: which controller serves its Gateways.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewayClass {
    /// Metadata.
    pub meta: Meta,
    /// `spec.controllerName`.
    pub controller: String,
    /// Fields that are valid and have no effect here.
    pub unsupported: Vec<String>,
}

/// Classes whose Gateways are waypoints, each with its `controllerName`. Other classes may have the same.
pub const WAYPOINT_CLASSES: &[(&str, &str)] =
    &[("istio-waypoint", "istio.io/mesh-controller"), ("undermesh-waypoint", "undermesh.io/mesh-controller")];

/// Classes whose Gateways are ways into the mesh for clients that are no peers of it, each with its `controllerName`.
pub const GATEWAY_CLASSES: &[(&str, &str)] =
    &[("istio", "istio.io/gateway-controller"), ("undermesh", "undermesh.io/gateway-controller")];

/// The controller of ours that a class has: by its name, or else by what its object says.
#[must_use]
pub fn controller_of(class: &str, said: Option<&str>) -> Option<&'static str> {
    let known = || WAYPOINT_CLASSES.iter().chain(GATEWAY_CLASSES);
    let by_name = known().find(|(name, _)| *name == class);
    let found = by_name.or_else(|| known().find(|(_, controller)| Some(*controller) == said));
    found.map(|(_, controller)| *controller)
}

impl Gateway {
    /// The controller of its class, when it is a way into the mesh.
    #[must_use]
    pub fn gateway_controller(&self) -> Option<&'static str> {
        self.controller.filter(|own| GATEWAY_CLASSES.iter().any(|(_, controller)| controller == own))
    }

    /// Name of what is deployed for it, its service account among it. A gateway's has its class in it, as Istio's has.
    #[must_use]
    pub fn deployed_name(&self) -> String {
        let name = &self.meta.name;
        match self.meta.annotation("gateway.istio.io/name-override") {
            Some(other) => other.to_owned(),
            None if self.is_waypoint() => name.clone(),
            None => format!("{name}-{}", self.class),
        }
    }

    /// The service account of its proxies: that of what is deployed for it, or where somebody deploys it himself the one
    /// that an annotation names.
    #[must_use]
    pub fn account(&self) -> Key {
        let own = self.meta.annotation("gateway.istio.io/service-account");
        Key::new(&self.meta.namespace, own.map_or_else(|| self.deployed_name(), str::to_owned))
    }

    /// Its class is one of a waypoint that is deployed from here.
    #[must_use]
    pub fn is_waypoint(&self) -> bool {
        self.controller.is_some_and(|own| WAYPOINT_CLASSES.iter().any(|(_, controller)| *controller == own))
    }
}

/// An address of a Gateway.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum GatewayHost {
    Ip(IpAddr),
    Hostname(String),
}

/// A listener of a Gateway.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the API's own")]
pub struct Listener {
    pub name: String,
    pub port: u16,
    pub protocol: String,
    /// Empty: every host.
    pub hostname: String,
    pub allowed: AllowedNamespaces,
    /// `allowedRoutes.kinds`: group and kind; empty: those that go with the protocol.
    pub kinds: Vec<(String, String)>,
    /// `tls`.
    pub tls: Option<ListenerTls>,
}

/// `tls` of a listener.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ListenerTls {
    /// `mode` is Passthrough.
    pub passthrough: bool,
    /// `certificateRefs`.
    pub certificates: Vec<Reference>,
    /// Option `gateway.istio.io/tls-terminate-mode`.
    pub clients: ClientMode,
}

/// Which certificates clients have to show.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ClientMode {
    /// None (SIMPLE).
    #[default]
    None,
    /// One of an authority that a Secret names (MUTUAL).
    Required,
    /// One of those, or none (`OPTIONAL_MUTUAL`).
    Optional,
    /// One of the mesh (`ISTIO_MUTUAL`): not served.
    Mesh,
}

/// `allowedRoutes.namespaces`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the API's own")]
pub enum AllowedNamespaces {
    Same,
    All,
    Selector(LabelSelector),
}

/// `metav1.LabelSelector`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LabelSelector {
    /// `matchLabels`.
    pub labels: BTreeMap<String, String>,
    /// `matchExpressions`: key, operator, values.
    pub expressions: Vec<(String, SelectorOperator, Vec<String>)>,
}

/// Operator of a match expression.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the API's own")]
pub enum SelectorOperator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
}

impl LabelSelector {
    /// True when the labels satisfy every requirement.
    #[must_use]
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        super::selects(&self.labels, labels)
            && self.expressions.iter().all(|(key, operator, values)| {
                let value = labels.get(key);
                match operator {
                    SelectorOperator::In => value.is_some_and(|v| values.contains(v)),
                    SelectorOperator::NotIn => value.is_none_or(|v| !values.contains(v)),
                    SelectorOperator::Exists => value.is_some(),
                    SelectorOperator::DoesNotExist => value.is_none(),
                }
            })
    }
}
