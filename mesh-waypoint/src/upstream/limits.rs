//! Circuit breaking: how many connections, requests and retries a cluster may have at a time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use super::cluster::Cluster;
use super::policy::{Limits, RetryBudget};

/// What is limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Limit {
    /// A connection to an endpoint, from before it is dialled until it is closed (`maxConnections`).
    Connection,
    /// A request that waits for a connection (`http1MaxPendingRequests`).
    Pending,
    /// A request, until its answer is complete (`http2MaxRequests`; HTTP/1.1 counts as well).
    Request,
    /// A further try, from its wait until its answer is complete (`maxRetries`, or the retry budget).
    Retry,
}

impl Limit {
    /// The field of the API.
    #[must_use]
    pub fn field(self) -> &'static str {
        match self {
            Self::Connection => "maxConnections",
            Self::Pending => "http1MaxPendingRequests",
            Self::Request => "http2MaxRequests",
            Self::Retry => "maxRetries",
        }
    }
}

/// A limit was reached (response flag UO, status 503; a retry that is not allowed leaves the answer as it is).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{cluster} has reached {} ({max})", limit.field())]
pub struct Overflow {
    /// What was asked for.
    pub cluster: String,
    /// Which limit.
    pub limit: Limit,
    /// Its value.
    pub max: u32,
}

/// Leave to have one more; gives it back when dropped.
#[derive(Debug)]
pub struct Permit {
    cluster: Arc<Cluster>,
    limit: Limit,
}

impl Permit {
    /// The first of its kind that is taken.
    pub(super) fn new(cluster: Arc<Cluster>, limit: Limit) -> Self {
        Self { cluster, limit }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.cluster.usage().counter(self.limit).fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a cluster has at the moment.
#[derive(Debug, Default)]
pub(super) struct Usage {
    connections: AtomicU32,
    pending: AtomicU32,
    requests: AtomicU32,
    retries: AtomicU32,
    recent: Recent,
    /// Refused so far.
    pub(super) overflows: AtomicU64,
}

impl Usage {
    pub(super) fn counter(&self, limit: Limit) -> &AtomicU32 {
        match limit {
            Limit::Connection => &self.connections,
            Limit::Pending => &self.pending,
            Limit::Request => &self.requests,
            Limit::Retry => &self.retries,
        }
    }

    pub(super) fn count(&self, limit: Limit) -> u32 {
        self.counter(limit).load(Ordering::Relaxed)
    }

    /// Takes one, or says what the limit is. `now` is in milliseconds.
    pub(super) fn take(&self, limit: Limit, limits: &Limits, now: u64) -> Result<(), u32> {
        let max = match limit {
            Limit::Connection => limits.connections,
            Limit::Pending => limits.pending,
            Limit::Request => limits.requests,
            Limit::Retry => match &limits.retry_budget {
                Some(budget) => Some(self.allowed_retries(budget, now)),
                None => limits.retries,
            },
        };
        let counter = self.counter(limit);
        let taken = match max {
            None => {
                counter.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
            // Never above the maximum, not even for a moment: another thread would be refused for nothing.
            Some(max) => {
                let more = |n| (n < max).then(|| n + 1);
                let taken = counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
                taken.map(|_| ()).map_err(|_full| max)
            }
        };
        match taken {
            Ok(()) if limit == Limit::Request => {
                if let Some(budget) = limits.retry_budget.filter(|budget| !budget.interval.is_zero()) {
                    self.recent.add(now, budget.interval);
                }
            }
            Ok(()) => {}
            Err(_) => {
                self.overflows.fetch_add(1, Ordering::Relaxed);
            }
        }
        taken
    }

    /// A part of the requests that are under way, wait, or began lately; at least the minimum (Envoy's retry budget).
    fn allowed_retries(&self, budget: &RetryBudget, now: u64) -> u32 {
        let active = u64::from(self.count(Limit::Request)) + u64::from(self.count(Limit::Pending));
        let recent = if budget.interval.is_zero() { 0 } else { self.recent.count(now, budget.interval) };
        let allowed = budget.percent / 100.0 * active.max(recent) as f64;
        (allowed as u32).max(budget.min_concurrency)
    }
}

/// How many requests began within an interval: those of the current one, and of the one before the part that is not over.
#[derive(Debug, Default)]
struct Recent {
    /// Number of the current interval.
    window: AtomicU64,
    current: AtomicU32,
    previous: AtomicU32,
}

impl Recent {
    fn add(&self, now: u64, interval: Duration) {
        self.roll(now, interval);
        self.current.fetch_add(1, Ordering::Relaxed);
    }

    fn count(&self, now: u64, interval: Duration) -> u64 {
        self.roll(now, interval);
        let length = interval_millis(interval);
        let left = (length - now % length) as f64 / length as f64;
        let previous = f64::from(self.previous.load(Ordering::Relaxed)) * left;
        u64::from(self.current.load(Ordering::Relaxed)) + previous as u64
    }

    /// Whoever first sees a new interval moves the counts; others may count into the old one meanwhile, which is close
    /// enough for a budget.
    fn roll(&self, now: u64, interval: Duration) {
        let window = now / interval_millis(interval);
        let seen = self.window.load(Ordering::Relaxed);
        if window > seen
            && self.window.compare_exchange(seen, window, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        {
            let ended = self.current.swap(0, Ordering::Relaxed);
            self.previous.store(if window == seen + 1 { ended } else { 0 }, Ordering::Relaxed);
        }
    }
}

fn interval_millis(interval: Duration) -> u64 {
    u64::try_from(interval.as_millis()).unwrap_or(u64::MAX).max(1)
}
