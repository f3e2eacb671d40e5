//! Who sent a request and whether they may.

/// Policies of all targets.
#[derive(Debug, Default)]
pub struct Policies;
