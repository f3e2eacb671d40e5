//! Sockets: HBONE and HTTP on both sides. A connection stays on the worker that accepted it, from its first byte to its
//! last.
//!
//! | module | for |
//! |---|---|
//! | [`worker`] | threads and listeners |
//! | [`inbound`] | tunnels from peers |
//! | [`target`] | what a CONNECT leads to: pure |
//! | [`destination`] | where a request goes |
//! | [`detect`] | what a stream speaks: pure |
//! | [`io`] | streams and sockets as transports |
//! | [`http`] | the server's side of HTTP |
//! | [`forward`] | one request, from its head to the end of its answer |
//! | [`message`] | a request's head, and what an endpoint gets of it: pure |
//! | [`refused`] | answers of our own |
//! | [`gate`] | tokens, policies, external authorizers |
//! | [`tries`] | endpoints, limits, timeouts, retries |
//! | [`mirror`] | copies of requests |
//! | [`headers`] | what a proxy takes from a message and adds to it: pure |
//! | [`body`] | bodies on their way |
//! | [`pool`] | tunnels and connections to endpoints |
//! | [`dial`] | how those are opened |
//! | `secure` | TLS to applications |
//! | [`tcp`] | streams that are not HTTP |

pub mod body;
pub mod destination;
pub mod detect;
pub mod dial;
pub mod forward;
pub mod gate;
pub mod headers;
pub mod http;
pub mod inbound;
pub mod io;
pub mod message;
pub mod mirror;
pub mod pool;
pub mod refused;
mod secure;
pub mod target;
pub mod tcp;
#[cfg(test)]
mod tests;
pub mod tries;
pub mod worker;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use arc_swap::ArcSwap;
use tokio_util::sync::CancellationToken;

use crate::certificate;
use crate::cli::Config;
use crate::config::Snapshot;
use crate::telemetry::Telemetry;
use crate::upstream::{Clusters, RateLimiters, View};

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
    /// Told when nothing new is taken.
    pub drain: CancellationToken,
    tunnels: AtomicUsize,
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
        Self {
            config,
            snapshot: ArcSwap::new(snapshot),
            certificate,
            telemetry,
            clusters,
            rates: RateLimiters::default(),
            drain: CancellationToken::new(),
            tunnels: AtomicUsize::new(0),
        }
    }

    /// Makes `snapshot` the one that requests are decided by from now on.
    pub fn publish(&self, snapshot: Arc<Snapshot>) {
        self.clusters.apply(View::from(&*snapshot), Instant::now());
        let limited: HashSet<&str> = snapshot.routes.rate_limits().map(|limit| &*limit.name).collect();
        self.rates.retain(|name| limited.contains(name));
        self.snapshot.store(snapshot);
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

/// One open stream.
struct Counted(Arc<Shared>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.telemetry.streams.dec();
    }
}

/// One open tunnel.
struct CountedTunnel(Arc<Shared>);

impl Drop for CountedTunnel {
    fn drop(&mut self) {
        self.0.tunnels.fetch_sub(1, Ordering::Relaxed);
    }
}
