//! Outlier detection: endpoints that fail in a row take no requests for a while.
//!
//! The rules are Envoy's (consecutive 5xx, gateway errors, local-origin errors; success-rate ejection is off, as Istio has
//! it). Where Envoy looks at intervals whether an ejection is over, it is over here at its exact end; and the times that
//! an endpoint's ejections are multiplied by are counted down when the next one begins, by the intervals that it has held
//! out meanwhile.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::policy::OutlierPolicy;

/// No ejection takes longer than this, or than one base time (Envoy's default of `max_ejection_time`).
const MAX_EJECTION_MILLIS: u64 = 300_000;

/// What came of one try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// An answer with this status. Of a gRPC call: see [`Self::grpc`].
    Status(u16),
    /// A connection was made (where it is not clear yet what comes of the request).
    Connected,
    /// No connection could be made, or it broke, or the stream was reset before the answer.
    ConnectionFailed,
    /// No answer in time.
    TimedOut,
}

impl Outcome {
    /// Whether it counts as one: no connection, no answer in time, an error of the server.
    #[must_use]
    pub const fn is_failure(self) -> bool {
        match self {
            Self::Status(status) => status >= 500,
            Self::Connected => false,
            Self::ConnectionFailed | Self::TimedOut => true,
        }
    }

    /// What a gRPC status means, as an HTTP status (Envoy's mapping).
    #[must_use]
    pub fn grpc(status: u32) -> Self {
        Self::Status(match status {
            0 => 200,
            1 => 499,
            3 | 9 | 11 => 400,
            4 => 504,
            5 => 404,
            6 | 10 => 409,
            7 => 403,
            8 => 429,
            12 => 501,
            14 => 503,
            16 => 401,
            _ => 500,
        })
    }
}

/// What is known of one endpoint.
#[derive(Debug, Default)]
pub(super) struct Record {
    consecutive_5xx: AtomicU32,
    consecutive_gateway_errors: AtomicU32,
    consecutive_local_failures: AtomicU32,
    /// End of the last ejection, in milliseconds of the cluster's clock; 0: there was none.
    until: AtomicU64,
    /// By what the next ejection's time is multiplied, less one.
    times: AtomicU32,
}

/// Figures of an endpoint for people.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub(super) struct RecordFigures {
    pub(super) consecutive_5xx: u32,
    pub(super) consecutive_gateway_errors: u32,
    pub(super) consecutive_local_failures: u32,
    pub(super) ejected_for_ms: u64,
    pub(super) ejections: u32,
}

impl Record {
    /// Notes what came of a try; true when the endpoint should be ejected.
    pub(super) fn note(&self, outcome: Outcome, policy: &OutlierPolicy) -> bool {
        match (outcome, policy.consecutive_local_failures) {
            (Outcome::Status(status), _) => self.note_status(status, policy),
            (Outcome::Connected, None) => false,
            (Outcome::Connected, Some(_)) => {
                store(&self.consecutive_local_failures, 0);
                false
            }
            (Outcome::ConnectionFailed, None) => self.note_status(503, policy),
            (Outcome::TimedOut, None) => self.note_status(504, policy),
            (Outcome::ConnectionFailed | Outcome::TimedOut, Some(limit)) => {
                reaches(&self.consecutive_local_failures, limit)
            }
        }
    }

    fn note_status(&self, status: u16, policy: &OutlierPolicy) -> bool {
        if status < 500 {
            store(&self.consecutive_5xx, 0);
            store(&self.consecutive_gateway_errors, 0);
            return false;
        }
        let gateway_error = matches!(status, 502..=504);
        let by_gateway_errors = if gateway_error {
            reaches(&self.consecutive_gateway_errors, policy.consecutive_gateway_errors)
        } else {
            store(&self.consecutive_gateway_errors, 0);
            false
        };
        reaches(&self.consecutive_5xx, policy.consecutive_5xx) || by_gateway_errors
    }

    /// Whether it is ejected at this time.
    pub(super) fn is_ejected(&self, now: u64) -> bool {
        self.until() > now
    }

    /// End of the last ejection; 0 when there was none.
    pub(super) fn until(&self) -> u64 {
        self.until.load(Ordering::Relaxed)
    }

    /// Begins an ejection. Callers take turns.
    pub(super) fn eject(&self, now: u64, policy: &OutlierPolicy) {
        let millis = |duration: std::time::Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let (base, interval) = (millis(policy.base_ejection_time).max(1), millis(policy.interval).max(1));
        let longest = base.max(MAX_EJECTION_MILLIS);
        let mut times = u64::from(self.times.load(Ordering::Relaxed));
        let last = self.until();
        if last > 0 {
            times = times.saturating_sub(now.saturating_sub(last) / interval);
        }
        if times.saturating_mul(base) < longest + base {
            times += 1;
        }
        self.times.store(u32::try_from(times).unwrap_or(u32::MAX), Ordering::Relaxed);
        self.until.store(now.saturating_add(times.saturating_mul(base).min(longest)), Ordering::Relaxed);
    }

    /// Lets the next failures count from the start, whether the last ones led to an ejection or not.
    pub(super) fn restart(&self) {
        for counter in
            [&self.consecutive_5xx, &self.consecutive_gateway_errors, &self.consecutive_local_failures]
        {
            store(counter, 0);
        }
    }

    pub(super) fn figures(&self, now: u64) -> RecordFigures {
        RecordFigures {
            consecutive_5xx: self.consecutive_5xx.load(Ordering::Relaxed),
            consecutive_gateway_errors: self.consecutive_gateway_errors.load(Ordering::Relaxed),
            consecutive_local_failures: self.consecutive_local_failures.load(Ordering::Relaxed),
            ejected_for_ms: self.until().saturating_sub(now),
            ejections: self.times.load(Ordering::Relaxed),
        }
    }
}

/// Writes only what changes: most answers are successes, and their counters are at zero.
fn store(counter: &AtomicU32, value: u32) {
    if counter.load(Ordering::Relaxed) != value {
        counter.store(value, Ordering::Relaxed);
    }
}

/// Counts one more; true when that makes it exactly the limit, so that of many reporters one acts.
fn reaches(counter: &AtomicU32, limit: u32) -> bool {
    let count = counter.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
    limit > 0 && count == limit
}
