//! Which rule a request falls under, and what the rule does to it.

/// Rules of all services, compiled.
#[derive(Debug, Default)]
pub struct Routes;
