//! What is known of a connection, and the label set that it becomes.
//!
//! Names, order and values are Istio's: missing values are `unknown`, never empty and never absent, except for the
//! four locality labels, which appear together as soon as one side is a known workload.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use prometheus_client::encoding::{EncodeLabel, EncodeLabelSet, LabelSetEncoder};

use super::UNKNOWN;
use crate::error::ResponseFlag;
use crate::hbone::Baggage;
use crate::identity::SpiffeId;
use crate::state::{MeshState, Service, Str, Workload};

/// Which side reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reporter {
    /// The client's node.
    Source,
    /// The server's node.
    Destination,
    /// A waypoint between them.
    Waypoint,
}

impl Reporter {
    /// The label value.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
            Self::Waypoint => "waypoint",
        }
    }
}

/// Whether the reported leg was mutual TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SecurityPolicy {
    /// An HBONE tunnel.
    MutualTls,
    /// Anything else, the kernel's fast path included: its identity is attested, its bytes are not encrypted.
    Unknown,
}

impl SecurityPolicy {
    /// The label value; `none` is never emitted.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::MutualTls => "mutual_tls",
            Self::Unknown => UNKNOWN,
        }
    }
}

/// One side of a connection.
#[derive(Debug, Clone, Default)]
pub enum Peer {
    /// Not known.
    #[default]
    Unknown,
    /// A workload of the model.
    Workload(Arc<Workload>),
    /// Only what the other side said of itself.
    Derived(Arc<Baggage>),
}

impl Peer {
    /// A workload when one is known.
    #[must_use]
    pub fn known(workload: Option<&Arc<Workload>>) -> Self {
        workload.map_or(Self::Unknown, |workload| Self::Workload(workload.clone()))
    }

    pub(super) fn workload(&self) -> Option<&Arc<Workload>> {
        match self {
            Self::Workload(workload) => Some(workload),
            Self::Derived(_) | Self::Unknown => None,
        }
    }
}

/// What metrics and logs need to know of a connection, besides addresses and counts.
#[derive(Debug, Clone)]
pub struct Connection {
    /// Which side reports.
    pub reporter: Reporter,
    /// The client. Its workload by source address; else what it said of itself.
    pub source: Peer,
    /// The client's identity: our own one when the upstream leg is HBONE, or that of the client's certificate (on the
    /// fast path: the kernel's attestation).
    pub source_identity: Option<SpiffeId>,
    /// The server, or the waypoint before it.
    pub destination: Peer,
    /// The server's identity, where it is known from elsewhere than its workload (inner handshake across networks).
    pub destination_identity: Option<SpiffeId>,
    /// The service that was addressed.
    pub service: Option<Arc<Service>>,
    /// Whether the reported leg was mutual TLS.
    pub security: SecurityPolicy,
}

impl Connection {
    /// The identity that the destination has: from elsewhere, or computed from its workload.
    #[must_use]
    pub fn destination_principal(&self) -> Option<&SpiffeId> {
        let of_workload = || self.destination.workload().map(|workload| &workload.identity);
        self.destination_identity.as_ref().or_else(of_workload)
    }
}

/// The service that an inbound connection is attributed to: the one that the client named, if the workload belongs
/// to it; else the first of the workload's services with a port whose target is the destination port.
#[must_use]
pub fn infer_service(
    state: &MeshState,
    local: &Workload,
    port: u16,
    named_by_client: Option<&str>,
) -> Option<Arc<Service>> {
    let services = || local.services.iter().filter_map(|(key, ports)| Some((state.service(key)?, ports)));
    let named = named_by_client
        .and_then(|host| services().find(|(service, _)| service.service.host.hostname() == host));
    let by_port = || {
        services().find(|(service, own)| {
            let targets = service.service.ports.iter().map(|(port, spec)| own.target(*port).or(spec.target));
            targets.flatten().any(|target| target == port)
        })
    };
    named.or_else(by_port).map(|(service, _)| service.service.clone())
}

/// The label set of `istio_tcp_*` metrics.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ConnectionLabels {
    reporter: Reporter,
    source: PeerLabels,
    source_principal: Option<SpiffeId>,
    destination: PeerLabels,
    destination_principal: Option<SpiffeId>,
    service: Option<ServiceLabels>,
    flag: Option<FlagLabel>,
    security: SecurityPolicy,
}

/// [`ResponseFlag`] compares by its text, which is all that a label shows.
#[derive(Debug, Clone, Copy)]
struct FlagLabel(ResponseFlag);

impl PartialEq for FlagLabel {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_str() == other.0.as_str()
    }
}

impl Eq for FlagLabel {}

impl Hash for FlagLabel {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.as_str().hash(state);
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
struct PeerLabels {
    known: bool,
    workload: Str,
    canonical_service: Str,
    canonical_revision: Str,
    namespace: Str,
    app: Str,
    cluster: Str,
    region: Str,
    zone: Str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct ServiceLabels {
    hostname: Str,
    namespace: Str,
    name: Str,
}

impl PeerLabels {
    fn new(peer: &Peer) -> Self {
        match peer {
            Peer::Unknown => Self::default(),
            Peer::Workload(w) => Self {
                known: true,
                workload: w.workload_name.clone(),
                canonical_service: w.canonical_name.clone(),
                canonical_revision: w.canonical_revision.clone(),
                namespace: w.namespace.clone(),
                app: w.canonical_name.clone(),
                cluster: w.cluster_id.clone(),
                region: w.locality.region.clone(),
                zone: w.locality.zone.clone(),
            },
            Peer::Derived(b) => Self {
                known: true,
                workload: b.workload_name.as_str().into(),
                canonical_service: b.service_name.as_str().into(),
                canonical_revision: b.service_version.as_str().into(),
                namespace: b.namespace.as_str().into(),
                app: b.workload_name.as_str().into(),
                cluster: b.cluster.as_str().into(),
                region: b.region.as_str().into(),
                zone: b.zone.as_str().into(),
            },
        }
    }
}

impl ConnectionLabels {
    /// Labels of a connection that has not failed.
    #[must_use]
    pub fn new(connection: &Connection) -> Self {
        let service = connection.service.as_ref().map(|service| ServiceLabels {
            hostname: service.host.hostname().into(),
            namespace: service.host.namespace().into(),
            name: service.name.clone(),
        });
        Self {
            reporter: connection.reporter,
            source: PeerLabels::new(&connection.source),
            source_principal: connection.source_identity.clone(),
            destination: PeerLabels::new(&connection.destination),
            destination_principal: connection.destination_principal().cloned(),
            service,
            flag: None,
            security: connection.security,
        }
    }

    /// The same with `response_flags` set.
    #[must_use]
    pub fn with_flag(&self, flag: ResponseFlag) -> Self {
        Self { flag: Some(FlagLabel(flag)), ..self.clone() }
    }
}

impl ConnectionLabels {
    pub(super) const fn security(&self) -> SecurityPolicy {
        self.security
    }

    /// The labels that say who talks to whom: all up to what was spoken.
    pub(super) fn peers(&self, put: Put<'_>) -> std::fmt::Result {
        let principal = |id: &Option<SpiffeId>| id.as_ref().map_or_else(String::new, ToString::to_string);
        let (source, destination) = (&self.source, &self.destination);
        let source_principal = principal(&self.source_principal);
        let destination_principal = principal(&self.destination_principal);
        let service = self.service.as_ref();
        let labels: [(&str, &str); 20] = [
            ("reporter", self.reporter.as_str()),
            ("source_workload", &source.workload),
            ("source_canonical_service", &source.canonical_service),
            ("source_canonical_revision", &source.canonical_revision),
            ("source_workload_namespace", &source.namespace),
            ("source_principal", &source_principal),
            ("source_app", &source.app),
            ("source_version", &source.canonical_revision),
            ("source_cluster", &source.cluster),
            ("destination_service", service.map_or("", |s| &s.hostname)),
            ("destination_service_namespace", service.map_or("", |s| &s.namespace)),
            ("destination_service_name", service.map_or("", |s| &s.name)),
            ("destination_workload", &destination.workload),
            ("destination_canonical_service", &destination.canonical_service),
            ("destination_canonical_revision", &destination.canonical_revision),
            ("destination_workload_namespace", &destination.namespace),
            ("destination_principal", &destination_principal),
            ("destination_app", &destination.app),
            ("destination_version", &destination.canonical_revision),
            ("destination_cluster", &destination.cluster),
        ];
        labels.into_iter().try_for_each(|(name, value)| put(name, value))
    }
}

impl EncodeLabelSet for ConnectionLabels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), std::fmt::Error> {
        let (source, destination) = (&self.source, &self.destination);
        self.peers(&mut |name, value| encode(encoder, name, value))?;
        encode(encoder, "request_protocol", "tcp")?;
        encode(encoder, "response_flags", self.flag.map_or("-", |flag| flag.0.as_str()))?;
        encode(encoder, "connection_security_policy", self.security.as_str())?;
        if source.known || destination.known {
            encode(encoder, "source_region", &source.region)?;
            encode(encoder, "source_zone", &source.zone)?;
            encode(encoder, "destination_region", &destination.region)?;
            encode(encoder, "destination_zone", &destination.zone)?;
        }
        Ok(())
    }
}

/// Takes labels in their order.
pub(super) type Put<'a> = &'a mut dyn FnMut(&str, &str) -> std::fmt::Result;

/// Writes one label; an empty value would make Prometheus drop it.
pub(super) fn encode(
    encoder: &mut LabelSetEncoder<'_>,
    name: &str,
    value: &str,
) -> Result<(), std::fmt::Error> {
    (name, if value.is_empty() { UNKNOWN } else { value }).encode(encoder.encode_label())
}
