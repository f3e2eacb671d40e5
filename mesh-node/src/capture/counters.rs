//! Counters of the kernel side, by stable reason code.

use super::{Capture, CaptureError};
use mesh_ebpf::REASONS;
use serde::Serialize;

/// One counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Counter {
    /// Stable code.
    pub reason: &'static str,
    /// What it means.
    pub meaning: &'static str,
    /// Times since the maps were made.
    pub count: u64,
}

impl Capture {
    /// All counters of the kernel side.
    ///
    /// # Errors
    /// Only if the kernel refuses the map read.
    pub fn counters(&self) -> Result<Vec<Counter>, CaptureError> {
        let mut counters = Vec::with_capacity(REASONS.len());
        for (index, (reason, meaning)) in (0_u32..).zip(REASONS) {
            let count = self
                .maps
                .counters
                .sum(index)
                .map_err(|source| CaptureError::Map { map: "COUNTERS", source })?;
            counters.push(Counter { reason, meaning, count });
        }
        Ok(counters)
    }

    /// One counter by its reason code; 0 for a code that does not exist.
    ///
    /// # Errors
    /// As for [`Capture::counters`].
    pub fn counter(&self, reason: &str) -> Result<u64, CaptureError> {
        Ok(self
            .counters()?
            .iter()
            .find(|counter| counter.reason == reason)
            .map_or(0, |counter| counter.count))
    }
}
