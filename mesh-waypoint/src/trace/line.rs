//! A line of an access log on its way to a collector.

use std::sync::Arc;
use std::time::SystemTime;

/// One request, as its provider wants to be told of it.
#[derive(Debug, Clone)]
pub struct Line {
    /// Envoy's `log_name`.
    pub log: Arc<str>,
    /// When the request came.
    pub at: SystemTime,
    /// The text.
    pub body: String,
    /// What there is beside it.
    pub attributes: Vec<(String, String)>,
    /// The trace that it belongs to.
    pub trace: Option<u128>,
}
