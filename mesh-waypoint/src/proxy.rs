//! Sockets: HBONE and HTTP on both sides. A connection stays on the worker that accepted it, from its first byte to its
//! last.
//!
//! | module | for |
//! |---|---|
//! | [`worker`] | threads and listeners |
//! | [`inbound`] | tunnels from peers |
//! | [`listeners`] | ports of a gateway, as its Gateway says |
//! | `hello` | what a TLS client says first |
//! | `client_certificate` | what of its certificate is told to endpoints: pure |
//! | [`target`] | what a CONNECT leads to: pure |
//! | [`destination`] | where a request goes |
//! | [`detect`] | what a stream speaks: pure |
//! | [`io`] | streams and sockets as transports |
//! | [`http`] | the server's side of HTTP |
//! | `http1` | the same for HTTP/1, which rests between requests |
//! | [`forward`] | one request, from its head to the end of its answer |
//! | [`message`] | a request's head, and what an endpoint gets of it: pure |
//! | [`refused`] | answers of our own |
//! | `ask` | requests of our own, to authorizers and collectors |
//! | [`spans`] | spans on their way to collectors |
//! | [`gate`] | tokens, policies, external authorizers |
//! | [`tries`] | endpoints, limits, timeouts, retries |
//! | [`mirror`] | copies of requests |
//! | [`headers`] | what a proxy takes from a message and adds to it: pure |
//! | [`body`] | bodies on their way |
//! | [`pool`] | tunnels and connections to endpoints |
//! | [`dial`] | how those are opened |
//! | `secure` | TLS to applications |
//! | [`tcp`] | streams that are not HTTP |

mod ask;
pub mod body;
mod client_certificate;
pub mod destination;
pub mod detect;
pub mod dial;
pub mod forward;
pub mod gate;
pub mod headers;
mod hello;
pub mod http;
mod http1;
pub mod inbound;
pub mod io;
pub mod listeners;
pub mod message;
pub mod mirror;
pub mod pool;
pub mod refused;
mod secure;
pub mod spans;
mod spoken;
pub mod target;
pub mod tcp;
#[cfg(test)]
mod tests;
pub mod tries;
pub mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use arc_swap::ArcSwap;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::cli::Config;
use crate::config::{Role, Snapshot};
use crate::tap::Tap;
use crate::telemetry::Telemetry;
use crate::upstream::{Clusters, RateLimiters, View};
use crate::{certificate, feed, trace};

/// What every worker and the control runtime share. Nothing in it is locked on the path of a byte.
pub struct Shared {
    /// Settings.
    pub config: Config,
    /// Everything a request is decided by.
    pub snapshot: ArcSwap<Snapshot>,
    /// The waypoint's certificate.
    pub certificate: certificate::Slot,
    /// Metrics and access log.
    pub telemetry: Telemetry,
    /// What is known and counted of backends.
    pub clusters: Clusters,
    /// Token buckets of rules.
    pub rates: RateLimiters,
    /// Who listens to requests.
    pub tap: Tap,
    /// Who spans are of.
    pub spans: SpanOrigin,
    /// Ports of a gateway's listeners.
    pub ports: watch::Sender<Vec<u16>>,
    /// Told when nothing new is taken.
    pub drain: CancellationToken,
    tunnels: AtomicUsize,
    resting: AtomicUsize,
}

impl Shared {
    /// What workers start with.
    #[must_use]
    pub fn new(
        config: Config,
        snapshot: Arc<Snapshot>,
        certificate: certificate::Slot,
        telemetry: Telemetry,
    ) -> Self {
        let now = Instant::now();
        let clusters = Clusters::new(now);
        clusters.apply(View::from(&*snapshot), now);
        let ports = watch::Sender::new(snapshot.ports.numbers());
        let spans = SpanOrigin::of(&config);
        Self {
            config,
            snapshot: ArcSwap::new(snapshot),
            certificate,
            telemetry,
            clusters,
            rates: RateLimiters::default(),
            tap: Tap::default(),
            spans,
            ports,
            drain: CancellationToken::new(),
            tunnels: AtomicUsize::new(0),
            resting: AtomicUsize::new(0),
        }
    }

    /// Makes `snapshot` the one that requests are decided by from now on.
    pub fn publish(&self, snapshot: Arc<Snapshot>) {
        self.clusters.apply(View::from(&*snapshot), Instant::now());
        self.rates.retain(snapshot.routes.rate_limits().map(|rule| (&rule.name, &rule.limit)));
        let ports = snapshot.ports.numbers();
        self.snapshot.store(snapshot);
        // After the snapshot: whoever comes finds the rules.
        self.ports.send_if_modified(|known| {
            *known != ports && {
                *known = ports;
                true
            }
        });
    }

    /// Tunnels of clients that are open: a stream's last bytes may still be in one.
    #[must_use]
    pub fn tunnels(&self) -> usize {
        self.tunnels.load(Ordering::Relaxed)
    }

    /// Counts a tunnel until the guard is dropped.
    fn count_tunnel(self: &Arc<Self>) -> CountedTunnel {
        self.tunnels.fetch_add(1, Ordering::Relaxed);
        CountedTunnel(Arc::clone(self))
    }

    /// Connections of HTTP/1 that are open and whose clients have been quiet.
    #[must_use]
    pub fn resting(&self) -> usize {
        self.resting.load(Ordering::Relaxed)
    }

    /// Counts a resting connection until the guard is dropped.
    fn count_resting(self: &Arc<Self>) -> CountedResting {
        self.resting.fetch_add(1, Ordering::Relaxed);
        CountedResting(Arc::clone(self))
    }

    /// Streams of tunnels that are open.
    #[must_use]
    pub fn open(&self) -> usize {
        usize::try_from(self.telemetry.streams.get()).unwrap_or_default()
    }

    /// Counts a stream until the guard is dropped.
    fn count(self: &Arc<Self>) -> Counted {
        self.telemetry.streams.inc();
        Counted(Arc::clone(self))
    }
}

/// Who spans are of: the same for all of this process.
#[derive(Debug, Default)]
pub struct SpanOrigin {
    /// The service that they belong to.
    pub service: trace::span::Service,
    /// What their tags say of this process.
    pub proxy: trace::request::Proxy,
}

impl SpanOrigin {
    fn of(config: &Config) -> Self {
        let own = &config.own;
        let service = trace::span::Service {
            name: format!("{}.{}", own.gateway, own.namespace),
            instance: config.pod.clone(),
            namespace: own.namespace.clone(),
        };
        let proxy = trace::request::Proxy {
            node_id: feed::node(config).to_node().id,
            mesh: config.identity.trust_domain().to_owned(),
            cluster: config.cluster_id.clone(),
            zone: own.locality.zone.to_string(),
            own: (own.role == Role::Gateway).then(|| [own.namespace.clone(), own.gateway.clone()]),
        };
        Self { service, proxy }
    }
}

/// One open stream.
struct Counted(Arc<Shared>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.telemetry.streams.dec();
    }
}

/// One resting connection.
struct CountedResting(Arc<Shared>);

impl Drop for CountedResting {
    fn drop(&mut self) {
        self.0.resting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One open tunnel.
struct CountedTunnel(Arc<Shared>);

impl Drop for CountedTunnel {
    fn drop(&mut self) {
        self.0.tunnels.fetch_sub(1, Ordering::Relaxed);
    }
}
