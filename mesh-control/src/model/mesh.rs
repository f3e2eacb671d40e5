//! Mesh-wide settings: the ConfigMap `istio` of the root namespace.
//!
//! Key `mesh` is Istio's MeshConfig, of which `rootNamespace`, `trustDomain` and `trustDomainAliases` are
//! honoured everywhere, and by waypoints what [`MeshSettings::waypoints`] holds; its other fields are known, have no
//! effect here and get a condition. Key `undermesh` holds what Istio has no word for; see [`Undermesh`].

use ipnet::IpNet;
use mesh_core::xds::proto::l7;
use serde::{Deserialize, Serialize};

/// What the ConfigMap says. Absent values are `None`, so that command-line defaults can fill them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MeshSettings {
    /// Namespace of mesh-wide policies.
    pub root_namespace: Option<String>,
    /// Trust domain of every identity that the mesh issues.
    pub trust_domain: Option<String>,
    /// Former or foreign trust domains that policies treat as the mesh's own.
    pub trust_domain_aliases: Vec<String>,
    /// MeshConfig fields that are set and have no effect here.
    pub unsupported: Vec<String>,
    /// What MeshConfig says to waypoints; the fields that are honoured everywhere are not set in it.
    pub waypoints: l7::Settings,
    /// Key `undermesh`.
    pub undermesh: Undermesh,
}

/// Settings that Istio has no word for. Nodes receive them as the extension `undermesh.io/settings` of each
/// workload that should be enrolled, so that they can differ by namespace and workload.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Undermesh {
    /// How two pods of one node talk. Annotation `undermesh.io/same-node` on a namespace or pod overrides it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub same_node: Option<SameNode>,
    /// Without a live agent: let traffic pass in plain (true) or refuse it (false, the default).
    #[serde(default)]
    pub fail_open: bool,
    /// Destinations that are never captured.
    #[serde(default, rename = "excludedCIDRs")]
    pub excluded_cidrs: Vec<IpNet>,
    /// Destination ports that are never captured.
    #[serde(default)]
    pub excluded_ports: Vec<u16>,
    /// Destinations outside the mesh: carried by the agent (true, the default) or left to the kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capture_outside: Option<bool>,
    /// Port 53 goes to the node's DNS proxy (true, the default).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dns_capture: Option<bool>,
    /// Istio's Gateways select proxies of their own namespace only (false, the default: of every one). Istio's
    /// `PILOT_SCOPE_GATEWAY_TO_NAMESPACE`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub scope_gateway_to_namespace: bool,
}

/// The path between two pods of one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum SameNode {
    /// The kernel fast path, where the node finds it safe.
    Fast,
    /// Always mutual TLS.
    Tunnel,
}

impl SameNode {
    /// Reads the value of the annotation `undermesh.io/same-node`.
    #[must_use]
    pub fn parse(value: &str) -> Option<Self> {
        match value {
            "fast" => Some(Self::Fast),
            "tunnel" => Some(Self::Tunnel),
            _ => None,
        }
    }

    /// The word of the settings.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Fast => "fast",
            Self::Tunnel => "tunnel",
        }
    }
}

/// The field names of Istio's MeshConfig that have no effect here.
pub(crate) const MESH_CONFIG_FIELDS: &[&str] = &[
    "caCertificates",
    "certificates",
    "configSources",
    "defaultDestinationRuleExportTo",
    "defaultServiceExportTo",
    "defaultVirtualServiceExportTo",
    "disableEnvoyListenerLog",
    "discoverySelectors",
    "dnsRefreshRate",
    "enableAutoMtls",
    "enableEnvoyAccessLogService",
    "enablePrometheusMerge",
    "h2UpgradePolicy",
    "hboneIdleTimeout",
    "inboundClusterStatName",
    "inboundTrafficPolicy",
    "ingressClass",
    "ingressControllerMode",
    "ingressSelector",
    "ingressService",
    "meshMTLS",
    "outboundClusterStatName",
    "outboundTrafficPolicy",
    "proxyHttpPort",
    "proxyInboundListenPort",
    "proxyListenPort",
    "serviceEntryVisibility",
    "serviceScopeConfigs",
    "serviceSettings",
    "tcpKeepalive",
    "tlsDefaults",
    "verifyCertificateAtClient",
];
