//! What a node's admin endpoint says about itself, in the types that both sides of that endpoint share: the node
//! writes them, `meshctl` reads them. Config dumps follow ztunnel's spelling, because Kiali reads those too; the rest
//! is ours. Readers ignore fields that they do not know and take defaults for those that are missing, so that a
//! `meshctl` and a node of different versions understand each other.
//!
//! | request | answer |
//! |---|---|
//! | `GET /status` | [`NodeStatus`] |
//! | `GET /pods` | `Vec<`[`Pod`]`>` |
//! | `GET /failures` | `Vec<`[`Failure`]`>`, newest first |
//! | `GET /config_dump` | [`ConfigDump`] |
//! | `GET /doctor` | `Vec<`[`Probe`]`>` |
//! | `GET /why?src=REF&dst=REF&port=N` | [`crate::why::Explanation`], or status 404 with [`crate::why::NameError`] |
//!
//! What waypoints answer: [`waypoint`].
//!
//! Moments are milliseconds since 1970, except in dumps (RFC 3339). How many may ask at once: [`slots`]; who
//! answers: [`http`]; what readiness waits for: [`readiness`].

pub mod http;
pub mod readiness;
pub mod slots;
pub mod waypoint;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A node's agent at a glance.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct NodeStatus {
    /// Name of the node.
    pub node: String,
    /// Version of the answering agent.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// When it started.
    pub started_ms: u64,
    /// What readiness still waits for, with the reason if there is one; empty when ready.
    pub pending: Vec<String>,
    /// All live agents of the node, oldest first: during an upgrade the old one drains while the new one serves.
    pub agents: Vec<Agent>,
    /// Pods of the node that are enrolled or should be.
    pub pods: Vec<Pod>,
    /// The workload feed.
    pub xds: Upstream,
    /// The certificate authority.
    pub ca: Upstream,
    /// How many identities of the node have which certificate state (`Available`, `Initializing`, `Unavailable`).
    pub certificates: BTreeMap<String, usize>,
    /// What happens to enrolled pods' traffic while no agent is alive: `open` or `closed`.
    pub fail: String,
    /// How two pods of the node talk: `fast` or `tunnel`.
    pub same_node: String,
    /// What is captured on the node.
    pub capture: CaptureSettings,
}

/// What the mesh does not do with UDP, in words.
pub const UDP_NOT_COVERED: &str =
    "UDP other than DNS (port 53) is neither captured nor encrypted, and no policy denies it";

/// Settings of capture that hold on a node: the mesh's, or what its operator gave.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct CaptureSettings {
    /// Destinations that are left to the kernel.
    pub excluded_cidrs: Vec<String>,
    /// Destination ports that are left to the kernel.
    pub excluded_ports: Vec<u16>,
    /// Whether destinations that the mesh does not know are captured.
    pub capture_outside: bool,
    /// What is set and cannot be done, each with what holds instead.
    pub problems: Vec<String>,
    /// Traffic of enrolled pods that is not the mesh's, in words.
    pub not_covered: Vec<String>,
}

impl Default for CaptureSettings {
    fn default() -> Self {
        Self {
            excluded_cidrs: Vec::new(),
            excluded_ports: Vec::new(),
            capture_outside: true,
            problems: Vec::new(),
            not_covered: Vec::new(),
        }
    }
}

impl NodeStatus {
    /// Whether nothing is pending.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.pending.is_empty()
    }
}

/// A server that a node depends on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Upstream {
    /// URL.
    pub address: String,
    /// Whether it answers now.
    pub connected: bool,
    /// Since when it has been like that; 0 when it never was reached.
    pub since_ms: u64,
    /// Resources in use by type, for the workload feed.
    pub resources: BTreeMap<String, usize>,
    /// The last thing that went wrong, if it still matters.
    pub problem: Option<String>,
}

/// What an agent is doing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// It has not taken over the pods yet.
    #[default]
    Starting,
    /// It takes new connections.
    Serving,
    /// It only carries connections that it had.
    Draining,
}

impl Phase {
    /// `starting`, `serving` or `draining`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Serving => "serving",
            Self::Draining => "draining",
        }
    }
}

/// One live agent process of a node.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Agent {
    /// Process id.
    pub pid: u32,
    /// Version of the program.
    pub version: String,
    /// When it started.
    pub started_ms: u64,
    /// What it is doing.
    pub phase: Phase,
    /// Since when it has been doing that.
    pub since_ms: u64,
    /// Connections that it carries.
    pub connections: usize,
}

/// Where a pod of the node stands with capture.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PodState {
    /// Wanted by the control plane, not captured yet.
    #[default]
    Pending,
    /// Its connections go through the mesh.
    Captured,
    /// No longer wanted; captured for a few seconds more for the sake of peers that have not heard yet.
    Releasing,
    /// Not in the mesh any more; the connections that it had with the agent go on until they end.
    Left,
    /// Capturing it failed; see the problem.
    Failed,
}

impl PodState {
    /// `pending`, `captured`, `releasing`, `left` or `failed`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Captured => "captured",
            Self::Releasing => "releasing",
            Self::Left => "left",
            Self::Failed => "failed",
        }
    }
}

/// A pod of the node that is enrolled or should be.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Pod {
    /// Kubernetes namespace.
    pub namespace: String,
    /// Name of the pod.
    pub name: String,
    /// Its service account.
    pub service_account: String,
    /// Where it stands.
    pub state: PodState,
    /// What is wrong.
    pub problem: Option<String>,
    /// Its addresses as the kernel has them.
    pub addresses: Vec<String>,
}

/// One connection that failed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Failure {
    /// When.
    pub at_ms: u64,
    /// `inbound` or `outbound`, as seen from [`Self::pod`].
    pub direction: String,
    /// `namespace/name` of the pod of this node.
    pub pod: String,
    /// Socket of the client.
    pub src: Option<String>,
    /// Identity of the client where it is proven.
    pub src_identity: Option<String>,
    /// Original destination.
    pub dst: Option<String>,
    /// Stable code, see [`crate::admin`]'s module head for where it is listed.
    pub code: String,
    /// As in the metric label `response_flags`.
    pub flag: String,
    /// The text of the access log's `error`.
    pub error: String,
    /// The object that decided, for example `AuthorizationPolicy shop/only-frontend`.
    pub decided_by: Option<String>,
}

/// How well the kernel or the machine offers one thing that the mesh needs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fitness {
    /// Works.
    #[default]
    Ok,
    /// Works in part, or in a slower way.
    Degraded,
    /// Does not work.
    Missing,
}

/// One finding of the node's doctor.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Probe {
    /// What was probed.
    pub name: String,
    /// How it is.
    pub state: Fitness,
    /// What was found.
    pub detail: String,
    /// What its lack costs; empty when it is there.
    pub cost: String,
    /// What to do about it; empty when nothing is to be done.
    pub fix: String,
}

/// ztunnel's config dump. Fields that `meshctl` does not show are kept in `rest`, so that `-o json` shows all.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ConfigDump {
    /// Every workload that the node knows.
    pub workloads: Vec<Workload>,
    /// Every service.
    pub services: Vec<Service>,
    /// Every L4 policy.
    pub policies: Vec<Policy>,
    /// Certificates of this node's identities.
    pub certificates: Vec<Certificate>,
    /// Settings.
    pub config: Value,
}

/// One entry of `workloads`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Workload {
    /// Primary key.
    pub uid: String,
    /// Name of the pod.
    pub name: String,
    /// Kubernetes namespace.
    pub namespace: String,
    /// Own addresses.
    pub workload_ips: Vec<String>,
    /// `HBONE` or `TCP`.
    pub protocol: String,
    /// Trust domain of its identity.
    pub trust_domain: String,
    /// Service account of its identity.
    pub service_account: String,
    /// Name of the owner, for example of the Deployment.
    pub workload_name: String,
    /// Node that it runs on.
    pub node: String,
    /// `Healthy` or `Unhealthy`.
    pub status: String,
    /// Services that it is an endpoint of, `namespace/hostname`.
    pub services: Vec<String>,
    /// Its waypoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waypoint: Option<Waypoint>,
    /// Everything else.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

/// One entry of `services`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Service {
    /// Short name.
    pub name: String,
    /// Kubernetes namespace.
    pub namespace: String,
    /// Full name.
    pub hostname: String,
    /// Virtual addresses, `network/ip`.
    pub vips: Vec<String>,
    /// Target port by service port; 0 for a named one.
    pub ports: BTreeMap<String, u16>,
    /// By workload uid.
    pub endpoints: BTreeMap<String, Endpoint>,
    /// Its waypoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waypoint: Option<Waypoint>,
    /// Everything else.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

/// A workload behind a service.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Endpoint {
    /// The workload.
    pub workload_uid: String,
    /// Its own target ports by service port.
    pub port: BTreeMap<String, u16>,
    /// `Healthy` or `Unhealthy`.
    pub status: String,
}

/// Where a waypoint is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Waypoint {
    /// `namespace/hostname` or `network/ip`, with port.
    pub destination: Value,
    /// Its HBONE port.
    pub hbone_mtls_port: u16,
}

/// One entry of `policies`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Policy {
    /// Name.
    pub name: String,
    /// Kubernetes namespace.
    pub namespace: String,
    /// `Global`, `Namespace` or `WorkloadSelector`.
    pub scope: String,
    /// `Allow` or `Deny`.
    pub action: String,
    /// Only reported, not enforced.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
    /// Rules, their clauses, and the matches of each clause.
    pub rules: Vec<Value>,
    /// Everything else.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

/// One entry of `certificates`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Certificate {
    /// SPIFFE URI.
    pub identity: String,
    /// `Available`, `Initializing` or `Unavailable`.
    pub state: String,
    /// Leaf first; empty while there is none.
    pub cert_chain: Vec<CertificateInfo>,
    /// Why the last fetch failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// Everything else.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

/// One certificate of a chain.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct CertificateInfo {
    /// PEM, or its base64.
    pub pem: String,
    /// Decimal or hex.
    pub serial_number: String,
    /// RFC 3339.
    pub valid_from: String,
    /// RFC 3339.
    pub expiration_time: String,
}
