//! Which certificate is fetched when: a plain struct fed with time, so that every rule is tested without a network.
//!
//! Rules (Istio's node proxy): renew at half of the lifetime; at most eight fetches at once; a connection that waits
//! goes before a pod that was just announced, which goes before a renewal; a failed fetch is tried again after 1 s,
//! doubling with ±20 % up to 150 s, but never later than the expiry of the certificate that it replaces.
//!
//! Clocks are set back, too: certificates that hold only later by the new time are fetched again at once, and again
//! every 150 s for as long as an authority whose clock is ahead signs no other.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use mesh_core::identity::SpiffeId;

/// Fetches at once, at most.
pub const CONCURRENT_FETCHES: usize = 8;
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(150);
/// A clock that loses less is being corrected in small steps, which harms nothing.
const SET_BACK: Duration = Duration::from_secs(10);

/// Who waits for the certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// Nobody yet: a renewal.
    Background,
    /// A pod of this node was announced.
    Warmup,
    /// A connection.
    RealTime,
}

/// The time in which a certificate holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// First moment.
    pub not_before: SystemTime,
    /// Last moment.
    pub not_after: SystemTime,
}

impl Validity {
    fn half_life(self) -> SystemTime {
        let lifetime = self.not_after.duration_since(self.not_before).unwrap_or_default();
        self.not_before + lifetime / 2
    }
}

#[derive(Debug)]
struct Entry {
    priority: Priority,
    due: SystemTime,
    fetching: bool,
    failures: u32,
    validity: Option<Validity>,
}

/// The wanted identities and what is due for each.
#[derive(Debug, Default)]
pub struct Schedule {
    entries: BTreeMap<SpiffeId, Entry>,
    in_flight: usize,
    /// The time when it was asked last.
    seen: Option<SystemTime>,
}

impl Schedule {
    /// Wants `id` from now on; raises the priority of a fetch that has not started.
    /// A connection's wish also cuts short a backoff that is longer than the first one.
    pub fn want(&mut self, id: &SpiffeId, priority: Priority, now: SystemTime) {
        let entry = self.entries.entry(id.clone()).or_insert(Entry {
            priority,
            due: now,
            fetching: false,
            failures: 0,
            validity: None,
        });
        let missing = entry.validity.is_none_or(|v| v.not_after <= now);
        if missing {
            entry.priority = entry.priority.max(priority);
            if priority == Priority::RealTime {
                entry.due = entry.due.min(now + FIRST_RETRY);
            }
        }
    }

    /// No longer wants `id`. A fetch under way ends without effect.
    pub fn forget(&mut self, id: &SpiffeId) {
        if self.entries.remove(id).is_some_and(|e| e.fetching) {
            self.in_flight -= 1;
        }
    }

    /// Whether `id` is wanted.
    #[must_use]
    pub fn wants(&self, id: &SpiffeId) -> bool {
        self.entries.contains_key(id)
    }

    /// The wanted identities.
    pub fn wanted(&self) -> impl Iterator<Item = &SpiffeId> {
        self.entries.keys()
    }

    /// Takes the identity to fetch now, if one is due and a fetch is free.
    pub fn next(&mut self, now: SystemTime) -> Option<SpiffeId> {
        if self.seen.replace(now).is_some_and(|seen| now + SET_BACK < seen) {
            self.clock_was_set_back(now);
        }
        if self.in_flight >= CONCURRENT_FETCHES {
            return None;
        }
        let (id, entry) = self
            .entries
            .iter_mut()
            .filter(|(_, e)| !e.fetching && e.due <= now)
            .max_by_key(|(_, e)| (e.priority, std::cmp::Reverse(e.due)))?;
        entry.fetching = true;
        self.in_flight += 1;
        Some(id.clone())
    }

    /// What is due was reckoned by another clock: what cannot be used now is due now.
    fn clock_was_set_back(&mut self, now: SystemTime) {
        for entry in self.entries.values_mut() {
            let holds = entry.validity.is_some_and(|v| v.not_before <= now);
            if !holds || entry.failures > 0 {
                entry.due = now;
            }
        }
    }

    /// When [`Schedule::next`] can have something again; `None` while a fetch must end first or nothing is wanted.
    #[must_use]
    pub fn wake_at(&self) -> Option<SystemTime> {
        if self.in_flight >= CONCURRENT_FETCHES {
            return None;
        }
        self.entries.values().filter(|e| !e.fetching).map(|e| e.due).min()
    }

    /// A fetch brought a certificate: the next one is due at half of its life, or soon if it holds only later.
    pub fn succeeded(&mut self, id: &SpiffeId, validity: Validity, now: SystemTime) {
        let Some(entry) = self.entries.get_mut(id).filter(|e| e.fetching) else { return };
        entry.fetching = false;
        entry.failures = 0;
        entry.priority = Priority::Background;
        entry.validity = Some(validity);
        // An authority with a fast clock or a tiny lifetime must not be asked in a loop.
        let holds = validity.not_before <= now;
        entry.due = if holds { validity.half_life().max(now + FIRST_RETRY) } else { now + LAST_RETRY };
        self.in_flight -= 1;
    }

    /// A fetch failed. `jitter` is in `0.0..1.0`. Returns when it is tried again.
    pub fn failed(&mut self, id: &SpiffeId, now: SystemTime, jitter: f64) -> Option<SystemTime> {
        let entry = self.entries.get_mut(id).filter(|e| e.fetching)?;
        entry.fetching = false;
        self.in_flight -= 1;
        let doubled = FIRST_RETRY.saturating_mul(1 << entry.failures.min(10)).min(LAST_RETRY);
        entry.failures = entry.failures.saturating_add(1);
        let retry = now + doubled.mul_f64(0.8 + 0.4 * jitter.clamp(0.0, 1.0));
        // A moment before expiry is better than one after it, but an expired one must not be asked for in a loop.
        let expiry = entry.validity.map(|v| v.not_after).filter(|at| *at > now + FIRST_RETRY);
        entry.due = expiry.map_or(retry, |at| retry.min(at));
        Some(entry.due)
    }
}

#[cfg(test)]
mod tests;
