//! The wire API between control plane and nodes: Istio's workload API over delta ADS, and the CA service.
//!
//! | module | for |
//! |---|---|
//! | [`proto`] | generated messages, clients and servers |
//! | [`again`] | how long to wait before the next attempt |
//! | [`channel`] | connections to the control plane: TLS, tokens, keepalive |
//! | [`delta`] | the client's side of delta ADS as pure state |
//! | [`client`] | the loop around it: streams, backoff, status |
//! | [`ca`] | certificate signing |

pub mod again;
pub mod ca;
pub mod channel;
pub mod client;
pub mod delta;
pub mod proto;

/// Type URL of [`proto::workload::Address`] resources (workloads and services).
pub const ADDRESS_TYPE: &str = "type.googleapis.com/istio.workload.Address";
/// Type URL of [`proto::security::Authorization`] resources (L4 policies).
pub const AUTHORIZATION_TYPE: &str = "type.googleapis.com/istio.security.Authorization";
/// Type URLs of the resources for waypoints.
pub mod l7 {
    /// [`super::proto::l7::Route`]
    pub const ROUTE_TYPE: &str = "type.googleapis.com/undermesh.l7.v1.Route";
    /// [`super::proto::l7::Destination`]
    pub const DESTINATION_TYPE: &str = "type.googleapis.com/undermesh.l7.v1.Destination";
    /// [`super::proto::l7::Authorization`]
    pub const AUTHORIZATION_TYPE: &str = "type.googleapis.com/undermesh.l7.v1.Authorization";
    /// [`super::proto::l7::Authentication`]
    pub const AUTHENTICATION_TYPE: &str = "type.googleapis.com/undermesh.l7.v1.Authentication";
    /// [`super::proto::l7::WorkloadLabels`]
    pub const LABELS_TYPE: &str = "type.googleapis.com/undermesh.l7.v1.WorkloadLabels";
    /// [`super::proto::l7::Settings`]
    pub const SETTINGS_TYPE: &str = "type.googleapis.com/undermesh.l7.v1.Settings";
    /// [`super::proto::l7::Gateway`]
    pub const GATEWAY_TYPE: &str = "type.googleapis.com/undermesh.l7.v1.Gateway";
    /// [`super::proto::l7::Telemetry`]
    pub const TELEMETRY_TYPE: &str = "type.googleapis.com/undermesh.l7.v1.Telemetry";
    /// [`super::proto::l7::Credential`]
    pub const CREDENTIAL_TYPE: &str = "type.googleapis.com/undermesh.l7.v1.Credential";
    /// All of them. Credentials come before what names them.
    pub const TYPES: [&str; 9] = [
        ROUTE_TYPE,
        DESTINATION_TYPE,
        AUTHORIZATION_TYPE,
        AUTHENTICATION_TYPE,
        LABELS_TYPE,
        SETTINGS_TYPE,
        CREDENTIAL_TYPE,
        GATEWAY_TYPE,
        TELEMETRY_TYPE,
    ];
}
/// Name of the [`proto::workload::Extension`] by which our control plane asks a node to enrol a pod that is
/// not yet announced as reachable by HBONE. The extension carries no config.
pub const ENROL_EXTENSION: &str = "undermesh.io/enrol";
/// Name of the [`proto::workload::Extension`] that carries the mesh settings of one workload, when they are not
/// the defaults: a `google.protobuf.Struct` with the keys of the ConfigMap's `undermesh` part (`sameNode`:
/// "fast" or "tunnel", `failOpen`, `excludedCIDRs`, `excludedPorts`, `captureOutside`, `dnsCapture`).
pub const SETTINGS_EXTENSION: &str = "undermesh.io/settings";
