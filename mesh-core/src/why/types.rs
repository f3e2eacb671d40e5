//! What an explanation is made from and made of.

use std::collections::HashMap;
use std::fmt;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::admin;
use crate::flows::Flow;
use crate::identity::SpiffeId;

/// What one node knows besides the state of the mesh.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Name of the node.
    pub node: String,
    /// Whether two pods of this node may talk over plain kernel TCP (`sameNode: fast`).
    pub fast_path: bool,
    /// Pods of this node that are enrolled or should be.
    pub pods: Vec<admin::Pod>,
    /// Certificates of the identities of this node's pods.
    pub certificates: HashMap<SpiffeId, CertificateFact>,
    /// The last real failures on this node, newest first.
    pub failures: Vec<admin::Failure>,
    /// What tracing told lately on this node, oldest first; empty where nothing is traced.
    pub flows: Vec<Flow>,
    /// Ports of the mesh's own listeners.
    pub illegal_ports: Vec<u16>,
    /// The workload feed: without it the state may be old.
    pub xds: admin::Upstream,
    /// The moment to which certificates are compared.
    pub now: SystemTime,
}

/// What the certificate store knows of one identity.
#[derive(Debug, Clone, Default)]
pub struct CertificateFact {
    /// Begin and end of validity of the newest certificate.
    pub validity: Option<(SystemTime, SystemTime)>,
    /// Why the last fetch failed, if it did.
    pub problem: Option<String>,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// The node whose view this is; several joined by commas after a merge.
    pub node: String,
    /// Who connects.
    pub source: Object,
    /// To whom.
    pub destination: Object,
    /// Destination port as the client would use it; none when it was not given and does not matter.
    pub port: Option<u16>,
    /// The outcome.
    pub verdict: Verdict,
    /// How the bytes travel, as far as the connection gets.
    pub path: Option<Path>,
    /// One sentence: the outcome and its reason.
    pub summary: String,
    /// The object that decides, when one does.
    pub decided_by: Option<Object>,
    /// What to do about it, when something is to be done.
    pub fix: Option<String>,
    /// The way of the connection, in order. The first blocked step is the reason of the verdict.
    pub steps: Vec<Step>,
    /// Whether the source is a pod of the answering node.
    pub source_is_local: bool,
    /// Whether the destination (for a service: one of its endpoints) is a pod of the answering node.
    pub destination_is_local: bool,
}

impl Explanation {
    /// Sets verdict, summary, deciding object and fix from the steps: the first one that blocks decides; without
    /// one, the policy step does.
    pub(super) fn conclude(&mut self) {
        let ends = format!("{} -> {}", self.source, self.destination);
        let ends = self.port.map_or(ends.clone(), |port| format!("{ends} port {port}"));
        if let Some(step) = self.steps.iter().find(|step| step.outcome == Outcome::Blocked) {
            self.verdict = if step.stage == Stage::Policy { Verdict::Denied } else { Verdict::Unreachable };
            self.summary =
                format!("{ends}: {} at {}: {}", self.verdict.as_str(), step.stage.as_str(), step.detail);
            self.decided_by.clone_from(&step.object);
            self.fix.clone_from(&step.fix);
            return;
        }
        let deciding = self.steps.iter().find(|step| step.stage == Stage::Policy);
        let how = self.path.map_or_else(String::new, |path| format!(", {}", path.as_str()));
        self.verdict = Verdict::Allowed;
        self.summary = format!("{ends}: allowed{how}");
        self.decided_by = deciding.and_then(|step| step.object.clone());
        self.fix = None;
    }
}

/// One stage of the way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Step {
    /// Which one.
    pub stage: Stage,
    /// How it goes.
    pub outcome: Outcome,
    /// The object that decides this step.
    pub object: Option<Object>,
    /// What was found, one sentence.
    pub detail: String,
    /// What to do about it.
    pub fix: Option<String>,
}

/// A stage of the way of a connection, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Stage {
    /// What the answering node knows.
    View,
    /// Who connects.
    Source,
    /// To whom.
    Destination,
    /// Whether the source's connections are captured.
    SourceEnrolment,
    /// Which endpoint, through which waypoint or gateway.
    Routing,
    /// Whether the destination's connections are captured, so that its policies hold.
    DestinationEnrolment,
    /// Whether the source can prove its identity.
    SourceCertificate,
    /// Whether the destination can prove its identity.
    DestinationCertificate,
    /// L4 authorization at the destination.
    Policy,
    /// What really failed lately.
    LastFailure,
    /// What tracing saw between the two lately.
    Traffic,
}

impl Stage {
    /// For tables.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Source => "source",
            Self::Destination => "destination",
            Self::SourceEnrolment => "source enrolment",
            Self::Routing => "routing",
            Self::DestinationEnrolment => "destination enrolment",
            Self::SourceCertificate => "source certificate",
            Self::DestinationCertificate => "destination certificate",
            Self::Policy => "policy",
            Self::LastFailure => "last failure",
            Self::Traffic => "traffic",
        }
    }
}

/// How a stage goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// The connection gets past it.
    Ok,
    /// It gets past it, and somebody should know how.
    Warn,
    /// It ends here.
    Blocked,
    /// Only another node can tell.
    Elsewhere,
}

impl Outcome {
    /// For tables.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Blocked => "blocked",
            Self::Elsewhere => "elsewhere",
        }
    }
}

/// The outcome for the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It arrives.
    Allowed,
    /// A policy refuses it, at least at some of the endpoints that it may reach.
    Denied,
    /// It cannot arrive, policy aside.
    Unreachable,
}

impl Verdict {
    /// For people and tables.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Denied => "denied",
            Self::Unreachable => "unreachable",
        }
    }
}

/// How the bytes travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Path {
    /// Plain kernel TCP within the node, identity attested by the kernel.
    Fast,
    /// HBONE to the destination's own address: mutual TLS.
    Tunnel,
    /// HBONE to a waypoint.
    Waypoint,
    /// HBONE within HBONE through the gateway of another network.
    Gateway,
    /// Plain TCP between an end outside the mesh and one inside.
    Plaintext,
    /// Plain TCP to an address that the mesh does not know.
    Passthrough,
    /// Neither end is in the mesh: the mesh does not see the connection.
    Outside,
}

impl Path {
    /// For people.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Fast => "fast path",
            Self::Tunnel => "tunnel",
            Self::Waypoint => "tunnel to waypoint",
            Self::Gateway => "tunnel through gateway",
            Self::Plaintext => "plaintext",
            Self::Passthrough => "passthrough",
            Self::Outside => "outside the mesh",
        }
    }
}

/// Names an object: `AuthorizationPolicy shop/backend`. Things without a namespace, such as an address, have an
/// empty one.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Object {
    /// For example `AuthorizationPolicy`, `PeerAuthentication`, `Workload`, `Service`, `Address`.
    pub kind: String,
    /// Kubernetes namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl Object {
    /// Names an object.
    #[must_use]
    pub fn new(kind: &str, namespace: &str, name: &str) -> Self {
        Self { kind: kind.to_owned(), namespace: namespace.to_owned(), name: name.to_owned() }
    }

    /// The object that a policy's key `namespace/name` came from. The control plane converts PeerAuthentications to
    /// policies of reserved names (Istio's): those are named as what the user wrote.
    #[must_use]
    pub fn of_policy(key: &str) -> Self {
        let (namespace, name) = key.split_once('/').unwrap_or(("", key));
        if let Some(original) = name.strip_prefix("converted_peer_authentication_") {
            return Self::new("PeerAuthentication", namespace, original);
        }
        if name == STRICT_POLICY {
            return Self::new("PeerAuthentication", "", "STRICT");
        }
        Self::new("AuthorizationPolicy", namespace, name)
    }
}

/// Name of the policy by which Istio's control planes send `mode: STRICT`.
pub(super) const STRICT_POLICY: &str = "istio_converted_static_strict";

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, namespace, name } = self;
        if namespace.is_empty() { write!(f, "{kind} {name}") } else { write!(f, "{kind} {namespace}/{name}") }
    }
}
