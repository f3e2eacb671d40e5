//! Metrics of the control plane, by the names that Istio's dashboards ask for.
//!
//! Istio's counters are named without `_total`, which the text format of this library always adds; they are
//! gauges here, so that the names are right. Prometheus computes rates from both alike.

use std::time::SystemTime;

use mesh_core::telemetry::ProcessCollector;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::ads::seconds;
use crate::ads::snapshot::{ResourceType, Snapshot};
use crate::convert::Resources;
use crate::source::State;

/// One label `type`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    r#type: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Build {
    component: &'static str,
    tag: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Version {
    version: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Verdict {
    verdict: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ObjectKind {
    kind: &'static str,
}

type ByKind = Family<ObjectKind, Gauge>;
type ByType = Family<Kind, Gauge>;
type Sizes = Family<Kind, Histogram, fn() -> Histogram>;

/// All metrics.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    pub(crate) clients: Gauge,
    pushes: ByType,
    rejects: ByType,
    expired: ByType,
    triggers: ByType,
    sizes: Sizes,
    pub(crate) push_time: Histogram,
    pub(crate) convergence: Histogram,
    pub(crate) mesh_convergence: Histogram,
    pub(crate) unfinished: Counter,
    pub(crate) behind: Gauge,
    pub(crate) conversion: Histogram,
    proxies: ByType,
    objects: ByKind,
    resources: ByType,
    resource_bytes: ByType,
    virtual_services: Gauge,
    pub(crate) debounce: Histogram,
    services: Gauge,
    no_ip: Gauge,
    not_ready: Gauge,
    invalid: Gauge,
    pub(crate) csr_count: Gauge,
    pub(crate) issued: Gauge,
    pub(crate) csr_parsing_errors: Gauge,
    pub(crate) csr_sign_errors: Gauge,
    authentication_failures: Gauge,
    pub(crate) expiry: Expiry,
    relay_events: Family<Verdict, Counter>,
    relay_missed: Family<Reason, Counter>,
    pub(crate) relay_nodes: Gauge,
}

/// When certificates end, seconds since 1970: told as moments, and as the time that is left at each scrape.
#[derive(Debug, Clone, Default)]
pub(crate) struct Expiry {
    pub(crate) root: Gauge,
    pub(crate) chain: Gauge,
}

impl Collector for Expiry {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let now = i64::try_from(seconds(SystemTime::now())).unwrap_or(i64::MAX);
        let names = [
            ("citadel_server_root_cert_expiry", "the first root to end", self.root.get()),
            ("citadel_server_cert_chain_expiry", "the signing chain", self.chain.get()),
        ];
        for (name, of, at) in names {
            let help = format!("End of {of}, seconds since 1970");
            let metric = ConstGauge::new(at);
            let name_at = format!("{name}_timestamp");
            metric.encode(encoder.encode_descriptor(&name_at, &help, None, metric.metric_type())?)?;
            let help = format!("Seconds until the end of {of}");
            let metric = ConstGauge::new(at.saturating_sub(now));
            let left = format!("{name}_seconds");
            metric.encode(encoder.encode_descriptor(&left, &help, None, metric.metric_type())?)?;
        }
        Ok(())
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Registers everything.
    #[must_use]
    pub fn new() -> Self {
        let seconds = || Histogram::new([0.01, 0.1, 0.5, 1.0, 3.0, 5.0, 10.0, 20.0, 30.0]);
        let mut out = Self {
            registry: Registry::default(),
            clients: Gauge::default(),
            pushes: Family::default(),
            rejects: Family::default(),
            expired: Family::default(),
            triggers: Family::default(),
            sizes: Family::new_with_constructor(|| Histogram::new(exponential_buckets(1_000.0, 10.0, 6))),
            push_time: seconds(),
            convergence: seconds(),
            mesh_convergence: seconds(),
            unfinished: Counter::default(),
            behind: Gauge::default(),
            conversion: seconds(),
            proxies: Family::default(),
            objects: Family::default(),
            resources: Family::default(),
            resource_bytes: Family::default(),
            virtual_services: Gauge::default(),
            debounce: seconds(),
            services: Gauge::default(),
            no_ip: Gauge::default(),
            not_ready: Gauge::default(),
            invalid: Gauge::default(),
            csr_count: Gauge::default(),
            issued: Gauge::default(),
            csr_parsing_errors: Gauge::default(),
            csr_sign_errors: Gauge::default(),
            authentication_failures: Gauge::default(),
            expiry: Expiry::default(),
            relay_events: Family::default(),
            relay_missed: Family::default(),
            relay_nodes: Gauge::default(),
        };
        // A series that begins with the first failure hides it from rates.
        for kind in ResourceType::ALL {
            drop(out.rejects.get_or_create(&Kind { r#type: kind.short() }));
        }
        out.register();
        out.register_ours();
        out.register_relay();
        out
    }

    fn register(&mut self) {
        let version = env!("CARGO_PKG_VERSION");
        let build: Family<Build, Gauge> = Family::default();
        build.get_or_create(&Build { component: "pilot", tag: version }).set(1);
        let info: Family<Version, Gauge> = Family::default();
        info.get_or_create(&Version { version }).set(1);
        let r = &mut self.registry;
        r.register("istio_build", "Component and version", build);
        r.register("pilot_info", "Version", info);
        r.register("pilot_xds", "Connected xDS clients", self.clients.clone());
        r.register("pilot_xds_pushes", "Responses sent, by type", self.pushes.clone());
        r.register("pilot_total_xds_rejects", "Responses rejected by clients", self.rejects.clone());
        r.register("pilot_xds_expired_nonce", "Requests with a nonce not waited for", self.expired.clone());
        r.register("pilot_push_triggers", "Why resources were built again", self.triggers.clone());
        r.register("pilot_xds_config_size_bytes", "Size of responses", self.sizes.clone());
        r.register("pilot_xds_push_time", "Seconds to make a response", self.push_time.clone());
        r.register(
            "pilot_proxy_convergence_time",
            "Seconds from a change to a proxy's acknowledgement of all that came of it",
            self.convergence.clone(),
        );
        r.register("pilot_debounce_time", "Seconds that changes were collected", self.debounce.clone());
        r.register("pilot_services", "Services known", self.services.clone());
        r.register("pilot_no_ip", "Pods without an address", self.no_ip.clone());
        r.register("pilot_endpoint_not_ready", "Pods that are not ready", self.not_ready.clone());
        r.register("galley_validation_failed", "Things wrong in the source now", self.invalid.clone());
        r.register("citadel_server_csr_count", "Certificate requests", self.csr_count.clone());
        r.register("citadel_server_success_cert_issuance_count", "Certificates issued", self.issued.clone());
        r.register(
            "citadel_server_csr_parsing_err_count",
            "Unusable requests",
            self.csr_parsing_errors.clone(),
        );
        r.register("citadel_server_csr_sign_err_count", "Failures to sign", self.csr_sign_errors.clone());
        r.register(
            "citadel_server_authentication_failure_count",
            "Clients refused",
            self.authentication_failures.clone(),
        );
    }

    /// What Istio has no metric for, and what it measures otherwise.
    fn register_ours(&mut self) {
        let r = &mut self.registry;
        r.register(
            "pilot_pushcontext_init_seconds",
            "Seconds from objects to snapshot",
            self.conversion.clone(),
        );
        r.register("pilot_virt_services", "VirtualServices in force", self.virtual_services.clone());
        r.register(
            "undermesh_convergence_seconds",
            "Seconds from a change to the last connected proxy's acknowledgement of all that came of it",
            self.mesh_convergence.clone(),
        );
        r.register(
            "undermesh_convergence_unfinished",
            "Changes that a proxy did not acknowledge within a minute",
            self.unfinished.clone(),
        );
        r.register(
            "undermesh_proxies_behind",
            "Connected proxies that have not acknowledged the newest snapshot",
            self.behind.clone(),
        );
        r.register("undermesh_proxies", "Connected proxies, by type", self.proxies.clone());
        r.register("undermesh_model_objects", "Objects in force, by kind", self.objects.clone());
        r.register("undermesh_model_resources", "Resources that are served, by type", self.resources.clone());
        r.register("undermesh_model_bytes", "Size of these resources", self.resource_bytes.clone());
        r.register_collector(Box::new(self.expiry.clone()));
        r.register_collector(Box::new(ProcessCollector));
    }

    fn register_relay(&mut self) {
        let r = &mut self.registry;
        r.register("undermesh_relay_events", "Events that nodes sent", self.relay_events.clone());
        r.register(
            "undermesh_relay_missed_events",
            "Events that did not reach readers: held_back by nodes as too many, kernel had no room, reader too slow",
            self.relay_missed.clone(),
        );
        r.register("undermesh_relay_nodes", "Nodes that send events", self.relay_nodes.clone());
    }

    /// The text exposition.
    ///
    /// # Errors
    /// The library failed to format.
    pub fn text(&self) -> Result<String, std::fmt::Error> {
        let mut out = String::new();
        prometheus_client::encoding::text::encode(&mut out, &self.registry)?;
        Ok(out)
    }

    pub(crate) fn pushes(&self, kind: &'static str) -> Gauge {
        self.pushes.get_or_create_owned(&Kind { r#type: kind })
    }

    pub(crate) fn rejects(&self, kind: &'static str) -> Gauge {
        self.rejects.get_or_create_owned(&Kind { r#type: kind })
    }

    pub(crate) fn expired_nonces(&self, kind: &'static str) -> Gauge {
        self.expired.get_or_create_owned(&Kind { r#type: kind })
    }

    pub(crate) fn triggers(&self, kind: &'static str) -> Gauge {
        self.triggers.get_or_create_owned(&Kind { r#type: kind })
    }

    pub(crate) fn observe_size(&self, kind: &'static str, bytes: usize) {
        self.sizes.get_or_create(&Kind { r#type: kind }).observe(bytes as f64);
    }

    pub(crate) fn relay_event(&self, verdict: &'static str) {
        self.relay_events.get_or_create(&Verdict { verdict }).inc();
    }

    /// Events that nodes did not send, and that their kernels had no room for.
    pub(crate) fn relay_lost(&self, held_back: u64, kernel: u64) {
        self.relay_missed.get_or_create(&Reason { reason: "held_back" }).inc_by(held_back);
        self.relay_missed.get_or_create(&Reason { reason: "kernel" }).inc_by(kernel);
    }

    /// Events that a reader came too late for.
    pub(crate) fn relay_forgotten(&self, events: u64) {
        self.relay_missed.get_or_create(&Reason { reason: "reader" }).inc_by(events);
    }

    pub(crate) fn authentication_failure(&self) {
        self.authentication_failures.inc();
    }

    pub(crate) fn proxies(&self, kind: &'static str) -> Gauge {
        self.proxies.get_or_create_owned(&Kind { r#type: kind })
    }

    pub(crate) fn observe_snapshot(&self, snapshot: &Snapshot) {
        let number = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        for kind in ResourceType::ALL {
            let (label, entries) = (Kind { r#type: kind.short() }, snapshot.entries(kind));
            self.resources.get_or_create(&label).set(number(entries.len()));
            let bytes = entries.values().map(|entry| entry.value.len()).sum();
            self.resource_bytes.get_or_create(&label).set(number(bytes));
        }
    }

    pub(crate) fn observe_source(&self, state: &State, resources: &Resources) {
        let pods = || state.objects.pods.values().filter(|p| !p.terminal);
        let set = |gauge: &Gauge, n: usize| {
            gauge.set(i64::try_from(n).unwrap_or(i64::MAX));
        };
        for (kind, number) in state.objects.counts() {
            set(&self.objects.get_or_create_owned(&ObjectKind { kind }), number);
        }
        set(&self.virtual_services, state.objects.virtual_services.len());
        set(&self.invalid, state.problems.len());
        set(&self.no_ip, pods().filter(|p| p.ips.is_empty()).count());
        set(&self.not_ready, pods().filter(|p| !p.ready).count());
        let services = resources.addresses.values().filter(|r| {
            matches!(r.message.r#type, Some(mesh_core::xds::proto::workload::address::Type::Service(_)))
        });
        set(&self.services, services.count());
    }
}
