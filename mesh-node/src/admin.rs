//! What the agent says about itself.

pub(crate) mod http;
pub mod readiness;
