//! Kinds that waypoints honour. Their parts have the form of the wire already (`undermesh/l7.proto`); names are as they
//! are written in the object, and completed by [`crate::convert`].
//!
//! Field meaning: `istio.io/api` networking/v1, security/v1; Gateway API v1.

use std::collections::BTreeMap;

use mesh_core::xds::proto::l7;

use super::{Key, Meta};

/// The word for the mesh itself in `gateways` of a VirtualService.
pub const MESH_GATEWAY: &str = "mesh";

/// A VirtualService.
#[derive(Debug, Clone, PartialEq)]
pub struct VirtualService {
    /// Metadata.
    pub meta: Meta,
    /// `hosts`; none in a VirtualService that others delegate to.
    pub hosts: Vec<String>,
    /// `gateways`; empty means the mesh.
    pub gateways: Vec<String>,
    /// `exportTo`; empty means everywhere.
    pub export_to: Vec<String>,
    /// `http`.
    pub http: Vec<VirtualHttp>,
    /// `tls`, whose matches have SNI hosts.
    pub tls: Vec<VirtualTcp>,
    /// `tcp`.
    pub tcp: Vec<VirtualTcp>,
    /// Fields that are valid and have no effect here.
    pub unsupported: Vec<String>,
}

/// One entry of `http`.
#[derive(Debug, Clone, PartialEq)]
pub struct VirtualHttp {
    /// The rule without its matches.
    pub rule: l7::HttpRule,
    /// `match`.
    pub matches: Vec<VirtualMatch<l7::HttpMatch>>,
    /// `delegate`; its namespace is empty when not given.
    pub delegate: Option<Key>,
}

/// One entry of `tcp` or `tls`.
#[derive(Debug, Clone, PartialEq)]
pub struct VirtualTcp {
    /// `match`.
    pub matches: Vec<VirtualMatch<l7::TcpMatch>>,
    /// `route`.
    pub backends: Vec<l7::WeightedBackend>,
}

/// One entry of `match`.
#[derive(Debug, Clone, PartialEq)]
pub struct VirtualMatch<T> {
    /// `gateways`; empty means those of the object.
    pub gateways: Vec<String>,
    /// Why a waypoint cannot evaluate it: it never holds there.
    pub never: Option<String>,
    /// What has to hold.
    pub wire: T,
}

/// A DestinationRule.
#[derive(Debug, Clone, PartialEq)]
pub struct DestinationRule {
    /// Metadata.
    pub meta: Meta,
    /// `host`.
    pub host: String,
    /// `exportTo`; empty means everywhere.
    pub export_to: Vec<String>,
    /// `workloadSelector` is there: only for certain clients, which a waypoint cannot be.
    pub selective: bool,
    /// `trafficPolicy`.
    pub policy: Option<l7::TrafficPolicy>,
    /// `subsets`.
    pub subsets: Vec<l7::Subset>,
    /// Fields that are valid and have no effect here.
    pub unsupported: Vec<String>,
}

/// What a route or policy attaches to, or a route leads to.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the names are the API's own")]
pub struct Reference {
    pub group: String,
    pub kind: String,
    /// Empty: that of the object.
    pub namespace: String,
    pub name: String,
    /// Port number, or none.
    pub port: Option<u16>,
    pub section_name: String,
}

/// HTTPRoute, GRPCRoute, TCPRoute or TLSRoute.
#[derive(Debug, Clone, PartialEq)]
pub struct GatewayRoute {
    /// Metadata.
    pub meta: Meta,
    /// `parentRefs`.
    pub parents: Vec<Reference>,
    /// `hostnames`.
    pub hostnames: Vec<String>,
    /// Rules of HTTPRoute and GRPCRoute.
    pub http: Vec<GatewayHttp>,
    /// Rules of TCPRoute and TLSRoute.
    pub tcp: Vec<GatewayTcp>,
    /// Fields that are valid and have no effect here.
    pub unsupported: Vec<String>,
    /// Filters that this version cannot apply: the route is not accepted.
    pub refused: Vec<String>,
}

/// One rule of an HTTPRoute or GRPCRoute.
#[derive(Debug, Clone, PartialEq)]
pub struct GatewayHttp {
    /// The rule; its backends and mirrors have no service yet.
    pub rule: l7::HttpRule,
    /// `backendRefs`, one for each backend of the rule.
    pub backends: Vec<GatewayBackend>,
    /// What the rule's mirrors name.
    pub mirrors: Vec<Reference>,
}

/// One entry of `backendRefs` of an HTTP rule.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GatewayBackend {
    /// What it names.
    pub reference: Reference,
    /// What its own mirrors name.
    pub mirrors: Vec<Reference>,
}

/// One rule of a TCPRoute or TLSRoute.
#[derive(Debug, Clone, PartialEq)]
pub struct GatewayTcp {
    /// `name`.
    pub name: String,
    /// `backendRefs` with their weights.
    pub backends: Vec<(Reference, u32)>,
}

/// A ReferenceGrant: who may name objects of its namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReferenceGrant {
    /// Metadata.
    pub meta: Meta,
    /// `from`: group, kind, namespace.
    pub from: Vec<(String, String, String)>,
    /// `to`: group, kind, name (none: all).
    pub to: Vec<(String, String, Option<String>)>,
}

/// A RequestAuthentication.
#[derive(Debug, Clone, PartialEq)]
pub struct RequestAuthentication {
    /// Metadata.
    pub meta: Meta,
    /// `selector.matchLabels`: of gateways' pods, never a waypoint's.
    pub selector: BTreeMap<String, String>,
    /// `targetRef`, `targetRefs`.
    pub targets: Vec<Reference>,
    /// `jwtRules`.
    pub rules: Vec<l7::JwtRule>,
}

/// A Telemetry.
#[derive(Debug, Clone, PartialEq)]
pub struct Telemetry {
    /// Metadata.
    pub meta: Meta,
    /// `selector.matchLabels`: never a waypoint.
    pub selector: BTreeMap<String, String>,
    /// `targetRef`, `targetRefs`.
    pub targets: Vec<Reference>,
    /// `tracing`.
    pub tracing: Vec<l7::telemetry::Tracing>,
    /// `metrics`.
    pub metrics: Vec<l7::telemetry::Metrics>,
    /// `accessLogging`.
    pub access_logging: Vec<l7::telemetry::AccessLogging>,
    /// Fields that are valid and have no effect here.
    pub unsupported: Vec<String>,
}
