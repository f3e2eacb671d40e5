//! Every metric of the node agent besides `istio_tcp_*` of connections. The names are ztunnel's, so that its dashboards
//! work; `workload_manager_*` has no `istio_` prefix.

use std::collections::HashMap;

use prometheus_client::encoding::{EncodeLabelSet, LabelSetEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::labels::{Reporter, encode};
use crate::policy::DryRun;
use crate::state::{Str, Workload};

/// Buckets of DNS upstream latency, in seconds.
const DNS_BUCKETS: [f64; 6] = [0.0005, 0.001, 0.01, 0.1, 1.0, 5.0];

/// Label `reporter`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ReporterLabels(pub Reporter);

impl EncodeLabelSet for ReporterLabels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), std::fmt::Error> {
        encode(encoder, "reporter", self.0.as_str())
    }
}

/// Labels of DNS metrics.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DnsLabels {
    /// `A`, `AAAA`, ...
    pub query_type: Str,
    /// `udp` or `tcp`.
    pub protocol: &'static str,
    /// Canonical name of the asking workload.
    pub source_canonical_service: Str,
    /// Its canonical revision.
    pub source_canonical_revision: Str,
}

impl EncodeLabelSet for DnsLabels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), std::fmt::Error> {
        encode(encoder, "request_query_type", &self.query_type)?;
        encode(encoder, "request_protocol", self.protocol)?;
        encode(encoder, "source_canonical_service", &self.source_canonical_service)?;
        encode(encoder, "source_canonical_revision", &self.source_canonical_revision)
    }
}

/// Labels of look-ups that a connection had to wait for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct OnDemandDnsLabels {
    hostname: Str,
    source: [Str; 7],
}

impl OnDemandDnsLabels {
    /// Who asked for what.
    #[must_use]
    pub fn new(source: &Workload, hostname: &Str) -> Self {
        let source = [
            source.workload_name.clone(),
            source.canonical_name.clone(),
            source.canonical_revision.clone(),
            source.namespace.clone(),
            source.identity.to_string().into(),
            source.canonical_name.clone(),
            source.cluster_id.clone(),
        ];
        Self { hostname: hostname.clone(), source }
    }
}

impl EncodeLabelSet for OnDemandDnsLabels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), std::fmt::Error> {
        let [workload, service, revision, namespace, principal, app, cluster] = &self.source;
        encode(encoder, "source_workload", workload)?;
        encode(encoder, "source_canonical_service", service)?;
        encode(encoder, "source_canonical_revision", revision)?;
        encode(encoder, "source_workload_namespace", namespace)?;
        encode(encoder, "source_principal", principal)?;
        encode(encoder, "source_app", app)?;
        encode(encoder, "source_version", revision)?;
        encode(encoder, "source_cluster", cluster)?;
        encode(encoder, "hostname", &self.hostname)
    }
}

/// Label `url`: a type URL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct UrlLabels(pub &'static str);

impl EncodeLabelSet for UrlLabels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), std::fmt::Error> {
        encode(encoder, "url", self.0)
    }
}

/// How an xDS stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TerminationReason {
    /// It could not be opened.
    ConnectionError,
    /// It failed.
    Error,
    /// The server asked to come back.
    Reconnect,
    /// It ended well.
    Complete,
}

impl EncodeLabelSet for TerminationReason {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), std::fmt::Error> {
        let reason = match self {
            Self::ConnectionError => "ConnectionError",
            Self::Error => "Error",
            Self::Reconnect => "Reconnect",
            Self::Complete => "Complete",
        };
        encode(encoder, "reason", reason)
    }
}

/// Labels of dry-run results.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DryRunLabels {
    policy: Str,
    would: &'static str,
}

impl From<&DryRun> for DryRunLabels {
    fn from(result: &DryRun) -> Self {
        let (policy, would) = match result {
            DryRun::WouldDeny(policy) => (policy.clone(), "deny"),
            DryRun::WouldAllow(policy) => (policy.clone(), "allow"),
            // Policies are `namespace/name`: none is called so.
            DryRun::WouldDenyNoneAllowed => ("none".into(), "deny"),
        };
        Self { policy, would }
    }
}

impl EncodeLabelSet for DryRunLabels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), std::fmt::Error> {
        encode(encoder, "policy", &self.policy)?;
        encode(encoder, "would", self.would)
    }
}

/// Results of dry-run policies that a worker keeps counters for. Beyond, it starts over.
const CACHED_DRY_RUNS: usize = 256;

/// Counters of dry-run results, kept by one worker: a result that came before costs one look-up of its own.
#[derive(Debug)]
pub struct DryRunCounters {
    family: Family<DryRunLabels, Counter>,
    known: HashMap<DryRun, Counter>,
}

impl DryRunCounters {
    /// Counts into `metrics`.
    #[must_use]
    pub fn new(metrics: &NodeMetrics) -> Self {
        Self { family: metrics.dry_run.clone(), known: HashMap::new() }
    }

    /// Counts one result for one connection.
    pub fn count(&mut self, result: &DryRun) {
        if let Some(counter) = self.known.get(result) {
            counter.inc();
            return;
        }
        if self.known.len() >= CACHED_DRY_RUNS {
            self.known.clear();
        }
        let counter = self.family.get_or_create_owned(&DryRunLabels::from(result));
        counter.inc();
        self.known.insert(result.clone(), counter);
    }
}

/// Label `limit`: which limit of open connections was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LimitLabels(pub &'static str);

impl LimitLabels {
    /// The limits that there are.
    const ALL: [&str; 4] = ["node", "pod", "share", "memory"];
}

impl EncodeLabelSet for LimitLabels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), std::fmt::Error> {
        encode(encoder, "limit", self.0)
    }
}

/// Labels of `istio_build`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct BuildLabels {
    component: &'static str,
    tag: &'static str,
}

impl EncodeLabelSet for BuildLabels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), std::fmt::Error> {
        encode(encoder, "component", self.component)?;
        encode(encoder, "tag", self.tag)
    }
}

/// Registers `istio_build`, by which tools list versions: component `ztunnel` for the node agent, `pilot` for the
/// control plane.
pub fn register_build(registry: &mut Registry, component: &'static str, tag: &'static str) {
    let build = Family::<BuildLabels, Gauge>::default();
    build.get_or_create(&BuildLabels { component, tag }).set(1);
    registry.register("istio_build", "Version of the component", build);
}

/// The metrics.
#[derive(Debug, Clone)]
pub struct NodeMetrics {
    /// Names that connections had to wait for.
    pub on_demand_dns: Family<OnDemandDnsLabels, Counter>,
    /// Connections that were refused or closed because of a revoked certificate.
    pub crl_rejections: Family<ReporterLabels, Counter>,
    /// Connections that a new revocation list could not be applied to.
    pub crl_untracked: Family<ReporterLabels, Counter>,
    /// DNS questions.
    pub dns_requests: Family<DnsLabels, Counter>,
    /// Those that were forwarded.
    pub dns_upstream_requests: Family<DnsLabels, Counter>,
    /// Those whose server did not answer.
    pub dns_upstream_failures: Family<DnsLabels, Counter>,
    /// How long servers took, in seconds.
    pub dns_upstream_duration: Family<DnsLabels, Histogram, fn() -> Histogram>,
    /// Streams to the control plane that ended.
    pub xds_terminations: Family<TerminationReason, Counter>,
    /// Responses of the control plane.
    pub xds_messages: Family<UrlLabels, Counter>,
    /// Their size.
    pub xds_message_bytes: Family<UrlLabels, Counter>,
    /// Pods under capture.
    pub active_pods: Gauge,
    /// Pods that should be and are not.
    pub pending_pods: Gauge,
    /// Pods ever taken under capture.
    pub pods_started: Counter,
    /// Pods ever let go.
    pub pods_stopped: Counter,
    /// Access log lines that were dropped.
    pub access_log_dropped: Counter,
    /// Connections that were refused because of a limit.
    pub connections_shed: Family<LimitLabels, Counter>,
    /// Spans of connections that the collector took.
    pub spans_sent: Counter,
    /// Those that it did not.
    pub spans_lost: Counter,
    /// What dry-run policies would have done to connections.
    pub dry_run: Family<DryRunLabels, Counter>,
}

impl NodeMetrics {
    /// Creates and registers them.
    #[must_use]
    pub fn register(registry: &mut Registry) -> Self {
        let histogram: fn() -> Histogram = || Histogram::new(DNS_BUCKETS);
        let m = Self {
            on_demand_dns: Family::default(),
            crl_rejections: Family::default(),
            crl_untracked: Family::default(),
            dns_requests: Family::default(),
            dns_upstream_requests: Family::default(),
            dns_upstream_failures: Family::default(),
            dns_upstream_duration: Family::new_with_constructor(histogram),
            xds_terminations: Family::default(),
            xds_messages: Family::default(),
            xds_message_bytes: Family::default(),
            active_pods: Gauge::default(),
            pending_pods: Gauge::default(),
            pods_started: Counter::default(),
            pods_stopped: Counter::default(),
            access_log_dropped: Counter::default(),
            connections_shed: Family::default(),
            spans_sent: Counter::default(),
            spans_lost: Counter::default(),
            dry_run: Family::default(),
        };
        let r = registry;
        r.register("istio_on_demand_dns", "Names that connections had to wait for", m.on_demand_dns.clone());
        let what = "Connections refused or closed because a certificate was revoked";
        r.register("istio_crl_policy_rejections", what, m.crl_rejections.clone());
        let what = "Connections that a new revocation list could not be applied to";
        r.register("istio_crl_untracked_connections", what, m.crl_untracked.clone());
        r.register("istio_dns_requests", "DNS questions", m.dns_requests.clone());
        let what = "DNS questions that were forwarded";
        r.register("istio_dns_upstream_requests", what, m.dns_upstream_requests.clone());
        let what = "Forwarded DNS questions without an answer";
        r.register("istio_dns_upstream_failures", what, m.dns_upstream_failures.clone());
        let what = "How long name servers took";
        r.register("istio_dns_upstream_request_duration_seconds", what, m.dns_upstream_duration.clone());
        let what = "Streams to the control plane that ended";
        r.register("istio_xds_connection_terminations", what, m.xds_terminations.clone());
        r.register("istio_xds_message", "Responses of the control plane", m.xds_messages.clone());
        let what = "Bytes of the control plane's responses";
        r.register("istio_xds_message_bytes", what, m.xds_message_bytes.clone());
        r.register("workload_manager_active_proxy_count", "Pods under capture", m.active_pods.clone());
        let what = "Pods that should be under capture and are not";
        r.register("workload_manager_pending_proxy_count", what, m.pending_pods.clone());
        let what = "Pods ever taken under capture";
        r.register("workload_manager_proxies_started", what, m.pods_started.clone());
        r.register("workload_manager_proxies_stopped", "Pods ever let go", m.pods_stopped.clone());
        let what = "Access log lines dropped because the writer did not keep up";
        r.register("undermesh_access_log_dropped", what, m.access_log_dropped.clone());
        let what =
            "Connections refused because a limit was reached: node, pod, or share (the pod's fair share)";
        r.register("undermesh_connections_shed", what, m.connections_shed.clone());
        // A series that begins with the first refusal hides it from rates.
        for limit in LimitLabels::ALL {
            drop(m.connections_shed.get_or_create(&LimitLabels(limit)));
        }
        let what = "Spans of connections that the collector took";
        r.register("undermesh_connection_spans_sent", what, m.spans_sent.clone());
        let what = "Spans of connections that no collector took";
        r.register("undermesh_connection_spans_lost", what, m.spans_lost.clone());
        let what = "Connections that a dry-run policy would have allowed or denied";
        r.register("undermesh_policy_dry_run", what, m.dry_run.clone());
        m
    }
}
