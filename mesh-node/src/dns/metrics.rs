//! What is counted. The `istio_dns_*` families belong to the node's metrics; refusals are ours.

use std::time::Duration;

use hickory_proto::op::Message;
use hickory_proto::rr::RecordType;
use mesh_core::state::{Str, Workload};
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
#[derive(Debug, Clone)]
pub struct Metrics {
    node: NodeMetrics,
    refused: Family<RefusedLabels, Counter>,
}

impl Metrics {
    /// Counts into the node's metrics, and registers the counter of refusals.
    #[must_use]
    pub fn register(node: &NodeMetrics, registry: &mut Registry) -> Self {
        let refused = Family::default();
        let help = "DNS queries that were refused or dropped: malformed, or beyond the limit of their pod";
        registry.register("undermesh_dns_refused", help, refused.clone());
        Self { node: node.clone(), refused }
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
