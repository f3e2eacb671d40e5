//! The last real failures, for `meshctl why`: what was refused, with the code and the object that decided.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

pub use mesh_core::admin::Failure;

/// Failures that are kept.
const KEPT: usize = 512;

/// The ring. Written on failures only, so that a lock costs the data path nothing.
#[derive(Debug, Default)]
pub struct Failures(Mutex<VecDeque<Failure>>);

impl Failures {
    /// Remembers `failure`, forgetting the oldest one when full.
    pub fn push(&self, failure: Failure) {
        let mut ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if ring.len() == KEPT {
            ring.pop_front();
        }
        ring.push_back(failure);
    }

    /// The kept failures, newest first.
    #[must_use]
    pub fn newest(&self) -> Vec<Failure> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().rev().cloned().collect()
    }
}

/// Milliseconds since the epoch.
#[must_use]
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_failures_are_kept_newest_first() {
        let failures = Failures::default();
        for n in 0..KEPT as u64 + 3 {
            failures.push(Failure { at_ms: n, ..Failure::default() });
        }
        let kept = failures.newest();
        assert_eq!((kept.len(), kept[0].at_ms, kept[KEPT - 1].at_ms), (KEPT, KEPT as u64 + 2, 3));
    }
}
