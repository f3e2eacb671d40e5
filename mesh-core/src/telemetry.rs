//! Metrics, access logs and logging, with the names, labels and line layout that tools of the Istio ecosystem read.
//!
//! The data path asks [`TcpMetrics::handle`] once per connection (one lookup in a cache of its own) and then only adds
//! to plain atomics; labels are built when a pair of peers is seen for the first time, log lines are formatted on a
//! thread of their own ([`AccessLog`]).
//!
//! | module | for |
//! |---|---|
//! | `labels` | what is known of a connection, and the label set that it becomes |
//! | `connection` | `istio_tcp_*`: families, cached handles, one recorder per connection |
//! | `access_log` | the access log: records, layout, writer thread |
//! | `denials` | denials that found the access log's queue full |
//! | `layout` | layouts of access logs in Envoy's command operators |
//! | `logging` | log lines of the programs themselves; level changes at run time |
//! | `log_queue` | the thread that writes them |
//! | `node` | every other metric of the node agent |
//! | `exposition` | the text of a scrape |
//! | `request` | `istio_requests_total` and histograms: what a waypoint says of each request |
//! | `span` | finished spans, as OTLP and Zipkin have them |
//! | `process` | `process_*` from `/proc/self` |

mod access_log;
mod connection;
mod denials;
mod exposition;
mod labels;
mod layout;
mod log_queue;
mod logging;
mod node;
mod process;
mod request;
mod span;
#[cfg(test)]
mod tests;

pub use access_log::{AccessLog, AccessRecord, Direction, Event, Failure, Listener};
pub use connection::{ConnectionMetrics, HandleCache, Opened, Recorder, TcpMetrics, Telemetry};
pub use exposition::{OPENMETRICS_TYPE, TEXT_TYPE, scrape};
pub use labels::{Connection, ConnectionLabels, Peer, Reporter, SecurityPolicy, infer_service};
pub use layout::{Fact, Facts, Field, Layout, LayoutError, Part, Template};
pub use logging::{InvalidLogSettings, LogFormat, LogSettings, Logging};
pub use node::{
    BuildLabels, DnsLabels, DryRunCounters, DryRunLabels, LimitLabels, NodeMetrics, OnDemandDnsLabels,
    ReporterLabels, TerminationReason, UrlLabels, register_build,
};
pub use process::ProcessCollector;
pub use request::{
    Flags, LabelEdits, MetricShape, Outcome, RequestCache, RequestLabels, RequestLines, RequestMetrics,
    RequestProtocol, RequestRecord, Shape,
};
pub use span::{Place, Span, SpanService, nanos, otlp_body, otlp_text, pairs, span_scope};

/// What a label says when nothing is known.
pub const UNKNOWN: &str = "unknown";
