//! Metrics of the control plane, by the names that Istio's dashboards ask for.
//!
//! Istio's counters are named without `_total`, which the text format of this library always adds; they are
//! gauges here, so that the names are right. Prometheus computes rates from both alike.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

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
    pub(crate) root_expiry: Gauge,
    pub(crate) chain_expiry: Gauge,
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
            root_expiry: Gauge::default(),
            chain_expiry: Gauge::default(),
        };
        out.register();
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
            "Seconds from objects to snapshot",
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
        r.register(
            "citadel_server_root_cert_expiry_timestamp",
            "End of the first root to end, seconds since 1970",
            self.root_expiry.clone(),
        );
        r.register(
            "citadel_server_cert_chain_expiry_timestamp",
            "End of the signing chain, seconds since 1970",
            self.chain_expiry.clone(),
        );
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

    pub(crate) fn authentication_failure(&self) {
        self.authentication_failures.inc();
    }

    pub(crate) fn observe_source(&self, state: &State, resources: &Resources) {
        let pods = || state.objects.pods.values().filter(|p| !p.terminal);
        let set = |gauge: &Gauge, n: usize| {
            gauge.set(i64::try_from(n).unwrap_or(i64::MAX));
        };
        set(&self.invalid, state.problems.len());
        set(&self.no_ip, pods().filter(|p| p.ips.is_empty()).count());
        set(&self.not_ready, pods().filter(|p| !p.ready).count());
        let services = resources.addresses.values().filter(|r| {
            matches!(r.address.r#type, Some(mesh_core::xds::proto::workload::address::Type::Service(_)))
        });
        set(&self.services, services.count());
    }
}
