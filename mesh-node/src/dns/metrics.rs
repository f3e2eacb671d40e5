//! What is counted. The `istio_dns_*` families belong to the node's metrics; refusals are ours.

use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::Message;
use hickory_proto::rr::RecordType;
use mesh_core::flows::Dns;
use mesh_core::state::{LocalWorkload, Str, Workload};
use mesh_core::telemetry::{DnsLabels, NodeMetrics};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use super::Transport;

/// Label of queries that were not worked on.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusedLabels {
    reason: &'static str,
}

/// A pod's own limit of waiting queries or connections was reached.
pub(super) const SHED: &str = "limit";

/// Counters of the DNS proxy.
#[derive(Clone)]
pub struct Metrics {
    node: NodeMetrics,
    refused: Family<RefusedLabels, Counter>,
    listener: Option<Listener>,
}

/// Hears of every answer that a pod gets, and how long it took.
pub type Listener = Arc<dyn Fn(&LocalWorkload, Dns, Duration) + Send + Sync>;

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").field("refused", &self.refused).finish_non_exhaustive()
    }
}

impl Metrics {
    /// Counts into the node's metrics, and registers the counter of refusals.
    #[must_use]
    pub fn register(node: &NodeMetrics, registry: &mut Registry) -> Self {
        let refused = Family::default();
        let help = "DNS queries that were refused or dropped: malformed, or beyond the limit of their pod";
        registry.register("undermesh_dns_refused", help, refused.clone());
        Self { node: node.clone(), refused, listener: None }
    }

    /// Tells `listener` of every answer.
    #[must_use]
    pub fn with_listener(self, listener: Listener) -> Self {
        Self { listener: Some(listener), ..self }
    }

    /// A pod got an answer with a response code; `local`: the node knew it.
    pub(super) fn answered(
        &self,
        pod: &LocalWorkload,
        query: &Message,
        code: u8,
        local: bool,
        took: Duration,
    ) {
        let (Some(listener), Some(question)) = (&self.listener, query.queries.first()) else { return };
        let kind: &'static str = question.query_type().into();
        let name = question.name().to_utf8();
        let dns = Dns {
            query: name.strip_suffix('.').unwrap_or(&name).to_owned(),
            query_type: kind.to_owned(),
            answer: response(code),
            local,
        };
        listener(pod, dns, took);
    }

    pub(super) fn request(&self, labels: &DnsLabels) {
        self.node.dns_requests.get_or_create(labels).inc();
    }

    pub(super) fn forwarded(&self, labels: &DnsLabels) {
        self.node.dns_upstream_requests.get_or_create(labels).inc();
    }

    pub(super) fn upstream(&self, labels: &DnsLabels, took: Duration, failed: bool) {
        self.node.dns_upstream_duration.get_or_create(labels).observe(took.as_secs_f64());
        if failed {
            self.node.dns_upstream_failures.get_or_create(labels).inc();
        }
    }

    pub(super) fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&RefusedLabels { reason }).inc();
    }
}

/// A response code as dig writes it.
fn response(code: u8) -> String {
    match code {
        0 => "NOERROR".to_owned(),
        1 => "FORMERR".to_owned(),
        2 => "SERVFAIL".to_owned(),
        3 => "NXDOMAIN".to_owned(),
        4 => "NOTIMP".to_owned(),
        5 => "REFUSED".to_owned(),
        other => format!("RCODE{other}"),
    }
}

/// The labels of a query. A type without a name is `Unknown`: a pod must not be able to make 65,536 time series.
pub(super) fn labels(query: &Message, transport: Transport, source: Option<&Workload>) -> DnsLabels {
    let unknown = || Str::from("unknown");
    let kind: &'static str = query.queries.first().map_or(RecordType::Unknown(0), |q| q.query_type()).into();
    DnsLabels {
        query_type: kind.into(),
        protocol: transport.as_str(),
        source_canonical_service: source.map_or_else(unknown, |w| w.canonical_name.clone()),
        source_canonical_revision: source.map_or_else(unknown, |w| w.canonical_revision.clone()),
    }
}
