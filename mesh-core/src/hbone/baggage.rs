//! The `baggage` header: what the sender says about its own workload.
//!
//! It is a hint for telemetry only, never for policy. The grammar is the one that node proxies speak, not the whole of
//! W3C Baggage: `key=value` separated by commas, no percent-encoding, no properties.

use http::HeaderValue;

use std::fmt::Write as _;

/// A workload's description. An empty field is absent on the wire.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Baggage {
    /// `k8s.cluster.name`
    pub cluster: String,
    /// `k8s.namespace.name`
    pub namespace: String,
    /// Which key carries the workload's name.
    pub workload_type: WorkloadType,
    /// `k8s.<type>.name`
    pub workload_name: String,
    /// `service.name`: the canonical name
    pub service_name: String,
    /// `service.version`: the canonical revision
    pub service_version: String,
    /// `cloud.region`
    pub region: String,
    /// `cloud.availability_zone`
    pub zone: String,
}

/// The kind of workload in `k8s.<type>.name`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the variants are the Kubernetes kinds of the same name")]
pub enum WorkloadType {
    Deployment,
    CronJob,
    #[default]
    Pod,
    Job,
}

impl WorkloadType {
    const KEYS: [(Self, &'static str); 4] = [
        (Self::Deployment, "k8s.deployment.name"),
        (Self::CronJob, "k8s.cronjob.name"),
        (Self::Pod, "k8s.pod.name"),
        (Self::Job, "k8s.job.name"),
    ];

    const fn key(self) -> &'static str {
        match self {
            Self::Deployment => Self::KEYS[0].1,
            Self::CronJob => Self::KEYS[1].1,
            Self::Pod => Self::KEYS[2].1,
            Self::Job => Self::KEYS[3].1,
        }
    }
}

/// A `baggage` header ready for the wire, or as received. Cheap to clone: a sender encodes a workload's once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaggageHeader(pub(super) HeaderValue);

impl BaggageHeader {
    /// Reads the description; unknown keys are ignored, of a repeated key the last counts.
    #[must_use]
    pub fn parse(&self) -> Baggage {
        // A header with bytes outside visible ASCII says nothing that we could repeat in a metric.
        self.0.to_str().map(Baggage::parse).unwrap_or_default()
    }
}

impl Baggage {
    /// Reads the value of a header. Never fails: what is not understood is left out.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut baggage = Self::default();
        for pair in text.split(',') {
            let mut halves = pair.split('=');
            let (Some(key), Some(value)) = (halves.next(), halves.next()) else { continue };
            let (key, value) = (key.trim(), value.trim());
            let field = match key {
                "k8s.cluster.name" => &mut baggage.cluster,
                "k8s.namespace.name" => &mut baggage.namespace,
                "service.name" => &mut baggage.service_name,
                "service.version" => &mut baggage.service_version,
                "cloud.region" => &mut baggage.region,
                "cloud.availability_zone" => &mut baggage.zone,
                _ => {
                    let Some((kind, _)) = WorkloadType::KEYS.iter().find(|(_, k)| *k == key) else {
                        continue;
                    };
                    baggage.workload_type = *kind;
                    &mut baggage.workload_name
                }
            };
            value.clone_into(field);
        }
        baggage
    }

    /// The header for the wire, or `None` when there is nothing to say.
    ///
    /// A value that the grammar cannot carry (a comma, an equals sign, anything but visible ASCII) is left out: the
    /// reader would take it for something else.
    #[must_use]
    pub fn to_header(&self) -> Option<BaggageHeader> {
        let mut text = String::new();
        for (key, value) in [
            ("k8s.cluster.name", &self.cluster),
            ("k8s.namespace.name", &self.namespace),
            (self.workload_type.key(), &self.workload_name),
            ("service.name", &self.service_name),
            ("service.version", &self.service_version),
            ("cloud.region", &self.region),
            ("cloud.availability_zone", &self.zone),
        ] {
            let carries = |b: u8| b.is_ascii_graphic() && b != b',' && b != b'=';
            if value.is_empty() || !value.bytes().all(carries) {
                continue;
            }
            let comma = if text.is_empty() { "" } else { "," };
            // Writing to a String cannot fail.
            let _ = write!(text, "{comma}{key}={value}");
        }
        if text.is_empty() {
            return None;
        }
        HeaderValue::try_from(text).ok().map(BaggageHeader)
    }
}
