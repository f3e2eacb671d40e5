//! The policy of one backend, checked and complete: what a DestinationRule and the mesh settings come to for one port and
//! subset. Defaults are those of the API (`enrollment-and-apis`: DestinationRule) where the wire says nothing.

use std::sync::Arc;
use std::time::Duration;

use mesh_core::state::Locality;
use mesh_core::xds::proto::l7;

use super::hash::HashKey;

/// How requests to one backend are balanced, limited and protected.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    /// Names of the objects that it comes from, `Kind/namespace/name`.
    pub origins: Vec<String>,
    /// What holds for connections.
    pub connection: ConnectionPolicy,
    /// Circuit breaking.
    pub limits: Limits,
    /// Which endpoint.
    pub balancer: Balancer,
    /// When endpoints are left out for a while; none: never.
    pub outlier: Option<OutlierPolicy>,
    /// TLS to the application, inside of the tunnel where there is one. Mesh mutual TLS (ISTIO_MUTUAL) is none here: the
    /// tunnel is that.
    pub tls: Option<Arc<l7::ClientTls>>,
    /// Version of the PROXY header that is sent first.
    pub proxy_protocol: Option<u32>,
}

/// What holds for connections.
#[derive(Debug, Clone, PartialEq)]
pub struct ConnectionPolicy {
    /// Until a connection is made.
    pub connect_timeout: Duration,
    /// TCP keepalive.
    pub keepalive: Option<Keepalive>,
    /// Connections are not used for longer.
    pub max_duration: Option<Duration>,
    /// TCP connections end after so long without a byte; none: never.
    pub tcp_idle_timeout: Option<Duration>,
    /// HTTP connections end after so long without a request; none: never.
    pub http_idle_timeout: Option<Duration>,
    /// Requests after which a connection is not used any more.
    pub max_requests_per_connection: Option<u32>,
    /// Whether HTTP/1.1 is sent on as HTTP/2.
    pub h2_upgrade: bool,
    /// Send what the client spoke.
    pub use_client_protocol: bool,
    /// Streams at a time on one HTTP/2 connection.
    pub max_concurrent_streams: Option<u32>,
    /// HTTP/2 PING: how often, and until an answer.
    pub http2_keepalive: Option<(Duration, Duration)>,
}

/// TCP keepalive; what is none is the system's default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalive {
    /// Unanswered probes.
    pub probes: Option<u32>,
    /// Until the first one.
    pub time: Option<Duration>,
    /// Between them.
    pub interval: Option<Duration>,
}

/// Circuit breaking; none: no limit.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Limits {
    /// Connections to all endpoints together.
    pub connections: Option<u32>,
    /// Requests that wait for a connection.
    pub pending: Option<u32>,
    /// Requests at a time, of HTTP/1.1 as well.
    pub requests: Option<u32>,
    /// Retries at a time; a budget takes its place.
    pub retries: Option<u32>,
    /// Retries in proportion to requests.
    pub retry_budget: Option<RetryBudget>,
}

/// Retries in proportion to requests.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RetryBudget {
    /// Of the requests.
    pub percent: f64,
    /// Requests that began within this count beside the active ones; zero: only active ones do.
    pub interval: Duration,
    /// Always allowed.
    pub min_concurrency: u32,
}

/// Which endpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct Balancer {
    /// How.
    pub algorithm: Algorithm,
    /// What consistent hashing goes by.
    pub hash: Option<HashKey>,
    /// New endpoints get less at first.
    pub warmup: Option<Warmup>,
    /// What the destination says about localities.
    pub locality: Option<LocalityPolicy>,
    /// What the mesh settings say: holds where neither the destination nor the service says anything.
    pub mesh_locality: Option<LocalityPolicy>,
    /// Stay in the zone as far as it can take its share: from so many endpoints on.
    pub zone_aware: Option<u32>,
}

/// How an endpoint is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// The less loaded of two.
    LeastRequest,
    /// One after the other.
    RoundRobin,
    /// Any.
    Random,
    /// Where the client wanted to go.
    Passthrough,
    /// A ring of at least so many points.
    RingHash(u64),
    /// A table of so many places.
    Maglev(u64),
}

/// Slow start.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Warmup {
    /// Until an endpoint gets its full share.
    pub duration: Duration,
    /// Of its weight, at least; 0 to 100.
    pub minimum_percent: f64,
    /// 1 is linear, more rises faster at first.
    pub aggression: f64,
}

/// What is said about localities.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LocalityPolicy {
    /// Whether any of it counts.
    pub enabled: bool,
    /// Shares of localities (patterns, percent) by where we are (pattern).
    pub distribute: Vec<(Pattern, Vec<(Pattern, u32)>)>,
    /// From region to region.
    pub failover: Vec<(String, String)>,
    /// Label keys in their order, with a value where not our own label's is meant.
    pub failover_priority: Vec<(String, Option<String>)>,
}

/// `region/zone/subzone`, where `*` or nothing is any.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern([Option<String>; 3]);

/// Outlier detection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutlierPolicy {
    /// Answers of 500 and more in a row; 0: do not matter.
    pub consecutive_5xx: u32,
    /// 502, 503 and 504 in a row; 0: do not matter.
    pub consecutive_gateway_errors: u32,
    /// Failures of connections in a row; none: they count as gateway errors.
    pub consecutive_local_failures: Option<u32>,
    /// An endpoint that holds out so long is forgiven one earlier ejection.
    pub interval: Duration,
    /// Of the first ejection; the n-th in a row takes n times as long.
    pub base_ejection_time: Duration,
    /// Of all endpoints, at a time.
    pub max_ejection_percent: u32,
    /// With fewer of a hundred left, ejections are disregarded.
    pub min_health_percent: u32,
}

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const IDLE_TIMEOUT: Duration = Duration::from_secs(60 * 60);
/// Of HTTP/2 PINGs without a timeout of their own (Envoy's).
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// The parts of a policy that replace each other whole.
#[derive(Debug, Default, Clone)]
pub(super) struct Parts<'a> {
    pub(super) pool: Option<&'a l7::ConnectionPool>,
    pub(super) balancer: Option<&'a l7::LoadBalancer>,
    pub(super) outlier: Option<&'a l7::OutlierDetection>,
    pub(super) tls: Option<&'a l7::ClientTls>,
    pub(super) proxy_protocol: Option<&'a l7::ProxyProtocol>,
    pub(super) retry_budget: Option<&'a l7::RetryBudget>,
}

impl<'a> Parts<'a> {
    /// Replaces what `policy` has; its settings of the port then replace four parts altogether, also by nothing.
    pub(super) fn overlay(&mut self, policy: &'a l7::TrafficPolicy, port: u16) {
        self.pool = policy.connection_pool.as_ref().or(self.pool);
        self.balancer = policy.load_balancer.as_ref().or(self.balancer);
        self.outlier = policy.outlier_detection.as_ref().or(self.outlier);
        self.tls = policy.tls.as_ref().or(self.tls);
        self.proxy_protocol = policy.proxy_protocol.as_ref().or(self.proxy_protocol);
        self.retry_budget = policy.retry_budget.as_ref().or(self.retry_budget);
        if let Some(own) = policy.ports.iter().find(|own| own.port == u32::from(port)) {
            self.pool = own.connection_pool.as_ref();
            self.balancer = own.load_balancer.as_ref();
            self.outlier = own.outlier_detection.as_ref();
            self.tls = own.tls.as_ref();
        }
    }

    /// Fills what is missing from a policy of lower precedence.
    pub(super) fn underlay(&mut self, policy: &'a l7::TrafficPolicy, port: u16) {
        let own = policy.ports.iter().find(|own| own.port == u32::from(port));
        self.pool =
            self.pool.or(own.and_then(|p| p.connection_pool.as_ref())).or(policy.connection_pool.as_ref());
        self.balancer =
            self.balancer.or(own.and_then(|p| p.load_balancer.as_ref())).or(policy.load_balancer.as_ref());
        self.outlier = self
            .outlier
            .or(own.and_then(|p| p.outlier_detection.as_ref()))
            .or(policy.outlier_detection.as_ref());
        self.tls = self.tls.or(own.and_then(|p| p.tls.as_ref())).or(policy.tls.as_ref());
        self.proxy_protocol = self.proxy_protocol.or(policy.proxy_protocol.as_ref());
        self.retry_budget = self.retry_budget.or(policy.retry_budget.as_ref());
    }

    /// The policy; the mesh settings stand in for parts that are missing.
    pub(super) fn finish(self, settings: &l7::Settings, origins: Vec<String>) -> Policy {
        let pool = self.pool.or(settings.default_connection_pool.as_ref());
        let none = l7::ConnectionPool::default();
        let pool = pool.unwrap_or(&none);
        let outlier = self.outlier.or(settings.default_outlier_detection.as_ref());
        Policy {
            origins,
            connection: ConnectionPolicy::read(pool, settings),
            limits: Limits::read(pool, self.retry_budget),
            balancer: Balancer::read(self.balancer, settings),
            outlier: outlier.map(OutlierPolicy::read),
            tls: self.tls.filter(|tls| originates(tls)).map(|tls| Arc::new(tls.clone())),
            proxy_protocol: self.proxy_protocol.map(|proxy| proxy.version.clamp(1, 2)),
        }
    }
}

fn originates(tls: &l7::ClientTls) -> bool {
    use l7::client_tls::Mode;
    !tls.invalid.is_empty() || matches!(tls.mode(), Mode::Simple | Mode::Mutual)
}

impl Default for Policy {
    fn default() -> Self {
        Parts::default().finish(&l7::Settings::default(), Vec::new())
    }
}

/// A duration of the wire; negative ones are none.
pub(super) fn duration(wire: Option<&prost_types::Duration>) -> Option<Duration> {
    wire.and_then(|wire| Duration::try_from(*wire).ok())
}

/// A positive number: the API's zero is its default, no limit.
fn limit(number: Option<u32>) -> Option<u32> {
    number.filter(|n| *n > 0)
}

impl ConnectionPolicy {
    fn read(pool: &l7::ConnectionPool, settings: &l7::Settings) -> Self {
        use l7::connection_pool::UpgradePolicy;
        let positive =
            |wire: &Option<prost_types::Duration>| duration(wire.as_ref()).filter(|d| !d.is_zero());
        // An idle timeout of zero is none at all.
        let idle = |wire: &Option<prost_types::Duration>| {
            Some(duration(wire.as_ref()).unwrap_or(IDLE_TIMEOUT)).filter(|d| !d.is_zero())
        };
        Self {
            connect_timeout: positive(&pool.connect_timeout)
                .or_else(|| positive(&settings.connect_timeout))
                .unwrap_or(CONNECT_TIMEOUT),
            keepalive: pool.keepalive.as_ref().map(|k| Keepalive {
                probes: limit(Some(k.probes)),
                time: positive(&k.time),
                interval: positive(&k.interval),
            }),
            max_duration: positive(&pool.max_connection_duration),
            tcp_idle_timeout: idle(&pool.tcp_idle_timeout),
            http_idle_timeout: idle(&pool.http_idle_timeout),
            max_requests_per_connection: limit(pool.max_requests_per_connection),
            h2_upgrade: pool.h2_upgrade() == UpgradePolicy::Upgrade,
            use_client_protocol: pool.use_client_protocol,
            max_concurrent_streams: limit(pool.max_concurrent_streams),
            http2_keepalive: positive(&pool.http2_keepalive_interval)
                .map(|every| (every, positive(&pool.http2_keepalive_timeout).unwrap_or(PING_TIMEOUT))),
        }
    }
}

impl Limits {
    fn read(pool: &l7::ConnectionPool, budget: Option<&l7::RetryBudget>) -> Self {
        Self {
            connections: limit(pool.max_connections),
            pending: limit(pool.http1_max_pending_requests),
            requests: limit(pool.http2_max_requests),
            retries: limit(pool.max_retries),
            retry_budget: budget.map(|budget| RetryBudget {
                percent: budget.percent.unwrap_or(20.0).clamp(0.0, 100.0),
                interval: duration(budget.interval.as_ref()).unwrap_or_default(),
                min_concurrency: budget.min_concurrency.filter(|n| *n > 0).unwrap_or(3),
            }),
        }
    }
}

impl Balancer {
    fn read(wire: Option<&l7::LoadBalancer>, settings: &l7::Settings) -> Self {
        let none = l7::LoadBalancer::default();
        let wire = wire.unwrap_or(&none);
        let (algorithm, hash) = read_algorithm(wire);
        Self {
            algorithm,
            hash,
            warmup: wire.warmup.as_ref().and_then(Warmup::read),
            locality: wire.locality.as_ref().map(LocalityPolicy::read),
            mesh_locality: settings.locality.as_ref().map(LocalityPolicy::read),
            zone_aware: wire
                .zone_aware
                .as_ref()
                .filter(|zone| zone.enabled)
                .map(|zone| if zone.min_cluster_size == 0 { 6 } else { zone.min_cluster_size }),
        }
    }
}

fn read_algorithm(wire: &l7::LoadBalancer) -> (Algorithm, Option<HashKey>) {
    use l7::load_balancer::{Algorithm as Wire, Simple};
    match &wire.algorithm {
        Some(Wire::ConsistentHash(hash)) => {
            use l7::consistent_hash::Table;
            let algorithm = match hash.table {
                Some(Table::Maglev(size)) => Algorithm::Maglev(if size == 0 { 65_537 } else { size }),
                Some(Table::Ring(size)) if size > 0 => Algorithm::RingHash(size),
                Some(Table::Ring(_)) | None => Algorithm::RingHash(1024),
            };
            (algorithm, hash.key.as_ref().and_then(HashKey::read))
        }
        Some(Wire::Simple(_)) | None => {
            let algorithm = match wire.algorithm {
                Some(Wire::Simple(simple)) => match Simple::try_from(simple) {
                    Ok(Simple::RoundRobin) => Algorithm::RoundRobin,
                    Ok(Simple::Random) => Algorithm::Random,
                    Ok(Simple::Passthrough) => Algorithm::Passthrough,
                    Ok(Simple::LeastRequest | Simple::Unspecified) | Err(_) => Algorithm::LeastRequest,
                },
                _ => Algorithm::LeastRequest,
            };
            (algorithm, None)
        }
    }
}

impl Warmup {
    fn read(wire: &l7::load_balancer::Warmup) -> Option<Self> {
        let duration = duration(wire.duration.as_ref()).filter(|d| !d.is_zero())?;
        let aggression = wire.aggression.filter(|a| *a > 0.0).unwrap_or(1.0);
        let minimum_percent = wire.minimum_percent.unwrap_or(10.0).clamp(0.0, 100.0);
        Some(Self { duration, minimum_percent, aggression })
    }

    /// The part of its weight that an endpoint of this age gets, at most 1.
    pub(super) fn factor(&self, age: Duration) -> f64 {
        if age >= self.duration {
            return 1.0;
        }
        let time = age.as_secs_f64().max(0.001) / self.duration.as_secs_f64();
        time.powf(1.0 / self.aggression).clamp(self.minimum_percent / 100.0, 1.0)
    }
}

impl LocalityPolicy {
    fn read(wire: &l7::LocalitySetting) -> Self {
        let distribute = wire.distribute.iter().map(|rule| {
            let to = rule.to.iter().map(|(to, share)| (Pattern::read(to), *share)).collect();
            (Pattern::read(&rule.from), to)
        });
        let priority = wire.failover_priority.iter().map(|label| match label.split_once('=') {
            Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
            None => (label.clone(), None),
        });
        Self {
            enabled: wire.enabled.unwrap_or(true),
            distribute: distribute.collect(),
            failover: wire.failover.iter().map(|rule| (rule.from.clone(), rule.to.clone())).collect(),
            failover_priority: priority.collect(),
        }
    }
}

impl Pattern {
    pub(super) fn read(text: &str) -> Self {
        let mut parts =
            text.splitn(3, '/').map(|part| (!part.is_empty() && part != "*").then(|| part.to_owned()));
        Self(std::array::from_fn(|_| parts.next().flatten()))
    }

    /// Whether a locality is meant.
    #[must_use]
    pub fn matches(&self, locality: &Locality) -> bool {
        let parts = [&locality.region, &locality.zone, &locality.subzone];
        self.0
            .iter()
            .zip(parts)
            .all(|(wanted, part)| wanted.as_deref().is_none_or(|wanted| wanted == &**part))
    }
}

impl OutlierPolicy {
    fn read(wire: &l7::OutlierDetection) -> Self {
        let positive = |wire: &Option<prost_types::Duration>, default| {
            duration(wire.as_ref()).filter(|d| !d.is_zero()).unwrap_or(Duration::from_secs(default))
        };
        Self {
            consecutive_5xx: wire.consecutive_5xx.unwrap_or(5),
            consecutive_gateway_errors: wire.consecutive_gateway_errors.unwrap_or(0),
            consecutive_local_failures: wire
                .split_local_errors
                .then(|| wire.consecutive_local_failures.unwrap_or(5)),
            interval: positive(&wire.interval, 10),
            base_ejection_time: positive(&wire.base_ejection_time, 30),
            // Zero is not distinguished from nothing said in the API (Istio).
            max_ejection_percent: wire.max_ejection_percent.filter(|p| *p > 0).unwrap_or(10).min(100),
            min_health_percent: wire.min_health_percent.unwrap_or(0).min(100),
        }
    }
}
