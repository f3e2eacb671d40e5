//! Local rate limits: token buckets, one for all or one for each client identity.
//!
//! A bucket is one number: the time at which it would be full again (generic cell rate algorithm), so that taking a token
//! is one compare-and-swap.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mesh_core::state::Str;
use mesh_core::xds::proto::l7;

use super::hash;
use super::policy::duration;
use super::registry::Registry;

/// Identities with a bucket of their own, per limit: so many sets of so many places.
const SETS: u64 = 1024;
const WAYS: usize = 4;
/// The period when none is said.
const DEFAULT_PERIOD: Duration = Duration::from_secs(1);

/// The limits of all rules; shared by all workers.
#[derive(Debug, Default)]
pub struct RateLimiters {
    limiters: Registry<Key, RateLimiter>,
}

/// A limit that changes begins with full buckets.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    name: Str,
    tokens: u32,
    burst: u32,
    per: Duration,
    per_identity: bool,
}

impl RateLimiters {
    /// The limiter of a rule by the rule's name. Rules that are read again keep theirs as long as the limit is the same.
    pub fn get(&self, name: &Str, limit: &l7::RateLimit, now: Instant) -> Arc<RateLimiter> {
        let key = Key::new(name, limit);
        self.limiters
            .get(&key)
            .unwrap_or_else(|| self.limiters.get_or_insert(&key, &Arc::new(RateLimiter::new(limit, now))))
    }

    /// Forgets all but the limits of these rules: those of rules that are gone, and those that rules no longer have.
    pub fn retain<'a>(&self, rules: impl Iterator<Item = (&'a Str, &'a l7::RateLimit)>) {
        let kept: HashSet<Key> = rules.map(|(name, limit)| Key::new(name, limit)).collect();
        self.limiters.retain(|key, _| kept.contains(key));
    }
}

impl Key {
    fn new(name: &Str, limit: &l7::RateLimit) -> Self {
        Self {
            name: name.clone(),
            tokens: limit.tokens,
            burst: limit.burst,
            per: period(limit),
            per_identity: limit.per_identity,
        }
    }
}

/// One limit.
#[derive(Debug)]
pub struct RateLimiter {
    epoch: Instant,
    /// Nanoseconds in which a token comes.
    interval: u64,
    /// How far a bucket may be from full, in nanoseconds, for there to be a token in it.
    tolerance: u64,
    shared: Bucket,
    by_identity: Box<[Set]>,
}

/// The bucket has no token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("rate limit reached; the next request is allowed in {retry_after:?}")]
pub struct Limited {
    /// Until there is one.
    pub retry_after: Duration,
}

/// The time at which it is full again, in nanoseconds.
#[derive(Debug, Default)]
struct Bucket(AtomicU64);

#[derive(Debug, Default)]
struct Set {
    slots: [Slot; WAYS],
    /// Held by who gives an identity a place. Two that did so at once would give it two.
    claim: Mutex<()>,
}

#[derive(Debug, Default)]
struct Slot {
    /// Hash of an identity; 0: nobody's yet.
    owner: AtomicU64,
    bucket: Bucket,
}

impl RateLimiter {
    /// Full buckets. A limit of no tokens lets nothing through; without a burst, as many as come in a period may come at
    /// once.
    #[must_use]
    pub fn new(limit: &l7::RateLimit, now: Instant) -> Self {
        let burst = if limit.burst == 0 { limit.tokens } else { limit.burst };
        let interval = nanos(period(limit)).checked_div(u64::from(limit.tokens)).unwrap_or(u64::MAX).max(1);
        let by_identity = if limit.per_identity { SETS as usize } else { 0 };
        Self {
            epoch: now,
            interval,
            tolerance: interval.saturating_mul(u64::from(burst.saturating_sub(1))),
            shared: Bucket::default(),
            by_identity: (0..by_identity).map(|_| Default::default()).collect(),
        }
    }

    /// Takes a token for a request of a client. Clients without an identity share one bucket.
    ///
    /// # Errors
    /// There is none.
    pub fn check(&self, identity: Option<&str>, now: Instant) -> Result<(), Limited> {
        if self.interval == u64::MAX {
            return Err(Limited { retry_after: Duration::MAX });
        }
        let now = nanos(now.saturating_duration_since(self.epoch));
        let bucket = match identity {
            Some(identity) if !self.by_identity.is_empty() => self.bucket_of(identity, now),
            _ => &self.shared,
        };
        bucket.take(now, self.interval, self.tolerance)
    }

    /// The bucket of an identity. A place changes its owner only while its bucket is full, so nobody gains or loses a
    /// token by that; when all places of a set are in use, two identities share one.
    fn bucket_of(&self, identity: &str, now: u64) -> &Bucket {
        let hash = hash::bytes(identity.as_bytes()).max(1);
        let Set { slots, claim } = &self.by_identity[(hash % SETS) as usize];
        let own = || slots.iter().find(|slot| slot.owner.load(Ordering::Relaxed) == hash);
        if let Some(own) = own() {
            return &own.bucket;
        }
        let _claim = claim.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = own() {
            return &own.bucket;
        }
        let Some(free) = slots.iter().find(|slot| slot.bucket.0.load(Ordering::Relaxed) <= now) else {
            return &slots[(hash / SETS) as usize % WAYS].bucket;
        };
        free.owner.store(hash, Ordering::Relaxed);
        &free.bucket
    }
}

impl Bucket {
    fn take(&self, now: u64, interval: u64, tolerance: u64) -> Result<(), Limited> {
        let taken = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |full_at| {
            let missing = full_at.saturating_sub(now);
            (missing <= tolerance).then(|| now + missing + interval)
        });
        match taken {
            Ok(_) => Ok(()),
            Err(full_at) => {
                let wait = full_at.saturating_sub(now).saturating_sub(tolerance);
                Err(Limited { retry_after: Duration::from_nanos(wait) })
            }
        }
    }
}

fn period(limit: &l7::RateLimit) -> Duration {
    duration(limit.per.as_ref()).filter(|per| !per.is_zero()).unwrap_or(DEFAULT_PERIOD)
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
