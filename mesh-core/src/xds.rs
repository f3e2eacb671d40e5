//! The wire API between control plane and nodes: Istio's workload API over delta ADS, and the CA service.
//!
//! | module | for |
//! |---|---|
//! | [`proto`] | generated messages, clients and servers |
//! | [`channel`] | connections to the control plane: TLS, tokens, keepalive |
//! | [`delta`] | the client's side of delta ADS as pure state |
//! | [`client`] | the loop around it: streams, backoff, status |
//! | [`ca`] | certificate signing |

pub mod ca;
pub mod channel;
pub mod client;
pub mod delta;
pub mod proto;

/// Type URL of [`proto::workload::Address`] resources (workloads and services).
pub const ADDRESS_TYPE: &str = "type.googleapis.com/istio.workload.Address";
/// Type URL of [`proto::security::Authorization`] resources (L4 policies).
pub const AUTHORIZATION_TYPE: &str = "type.googleapis.com/istio.security.Authorization";
/// Name of the [`proto::workload::Extension`] by which our control plane asks a node to enrol a pod that is
/// not yet announced as reachable by HBONE. The extension carries no config.
pub const ENROL_EXTENSION: &str = "undermesh.io/enrol";
/// Name of the [`proto::workload::Extension`] that carries the mesh settings of one workload, when they are not
/// the defaults: a `google.protobuf.Struct` with the keys of the ConfigMap's `undermesh` part (`sameNode`:
/// "fast" or "tunnel", `failOpen`, `excludedCIDRs`, `excludedPorts`, `captureOutside`, `dnsCapture`).
pub const SETTINGS_EXTENSION: &str = "undermesh.io/settings";
