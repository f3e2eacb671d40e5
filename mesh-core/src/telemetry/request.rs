//! `istio_requests_total` and its histograms: what a waypoint says of each request.
//!
//! Names, labels, buckets and flags are those of Istio's waypoint. Labels are built when a combination is seen for the
//! first time by a worker; after that a request costs one lookup in the worker's own cache.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, LabelSetEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::exemplar::HistogramWithExemplars;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::access_log::AccessRecord;
use super::connection::{HANDLES_KEPT, Key};
use super::labels::{Connection, ConnectionLabels, Put, encode};
use crate::recent::Recent;

/// Buckets of every histogram, milliseconds and bytes alike (Envoy's defaults).
const BUCKETS: [f64; 19] = [
    0.5, 1.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1e3, 2.5e3, 5e3, 1e4, 3e4, 6e4, 3e5, 6e5, 1.8e6,
    3.6e6,
];
/// Combinations that a worker keeps handles for, of those that it used lately and of those before.
const CACHED_HANDLES: usize = 2048;

/// Why a request ended as it did: Envoy's response flags, any number of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Flags(u32);

macro_rules! flags {
    ($($bit:literal $name:ident $text:literal $what:literal;)*) => {
        impl Flags {
            $(#[doc = $what] pub const $name: Self = Self(1 << $bit);)*
            const ALL: &[(Self, &'static str)] = &[$((Self::$name, $text)),*];
        }
    };
}

// In the order in which Envoy writes them.
flags! {
    0 NO_HEALTHY_UPSTREAM "UH" "No endpoint can take the request.";
    1 UPSTREAM_TIMEOUT "UT" "The upstream did not answer in time.";
    2 LOCAL_RESET "LR" "The stream was reset here.";
    3 UPSTREAM_REMOTE_RESET "UR" "The upstream reset the stream.";
    4 UPSTREAM_CONNECTION_FAILURE "UF" "No connection to the upstream.";
    5 UPSTREAM_CONNECTION_TERMINATION "UC" "The connection to the upstream ended.";
    6 UPSTREAM_OVERFLOW "UO" "A limit of the cluster was reached.";
    7 NO_ROUTE "NR" "No rule matches.";
    8 DELAY_INJECTED "DI" "A fault delayed the request.";
    9 FAULT_INJECTED "FI" "A fault ended the request.";
    10 RATE_LIMITED "RL" "A rate limit refused the request.";
    11 UNAUTHORIZED_EXTERNAL "UAEX" "External authorization refused the request.";
    12 DOWNSTREAM_CONNECTION_TERMINATION "DC" "The client left.";
    13 UPSTREAM_RETRY_LIMIT_EXCEEDED "URX" "No try is left.";
    14 DOWNSTREAM_PROTOCOL_ERROR "DPE" "The client broke the protocol.";
    15 UPSTREAM_PROTOCOL_ERROR "UPE" "The upstream broke the protocol.";
    16 NO_CLUSTER "NC" "The rule names a destination that there is not.";
    17 STREAM_IDLE_TIMEOUT "SI" "Nothing moved for too long.";
    18 MAX_DURATION "DT" "The connection lasted as long as it may.";
}

impl Flags {
    /// Those of both.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` are there.
    #[must_use]
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The flag of an abbreviation, such as `UH`.
    #[must_use]
    pub fn named(text: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, name)| *name == text).map(|(flag, _)| *flag)
    }
}

/// Comma-separated abbreviations; `-` for none.
impl fmt::Display for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("-");
        }
        let set = Self::ALL.iter().filter(|(flag, _)| self.has(*flag));
        for (i, (_, name)) in set.enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            f.write_str(name)?;
        }
        Ok(())
    }
}

/// What a request spoke.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RequestProtocol {
    /// HTTP.
    Http,
    /// gRPC, by its content type.
    Grpc,
}

impl RequestProtocol {
    /// The label value.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Grpc => "grpc",
        }
    }
}

/// How a request ended, as far as labels show it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Outcome {
    /// What was spoken.
    pub protocol: RequestProtocol,
    /// Status of the answer; 0 when there was none.
    pub code: u16,
    /// gRPC status; absent where none was sent.
    pub grpc_status: Option<u16>,
    /// Why.
    pub flags: Flags,
}

/// Labels that differ from Istio's own: by name, in its order, their value, or none for those that are taken away.
pub type LabelEdits = Arc<[(Arc<str>, Option<Arc<str>>)]>;

/// How one metric differs from Istio's own.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct MetricShape {
    /// Nothing is counted.
    pub disabled: bool,
    /// Its labels.
    pub labels: LabelEdits,
}

/// How the metrics of a request differ from Istio's own.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Shape {
    /// `istio_requests_total`.
    pub requests: MetricShape,
    /// `istio_request_duration_milliseconds`.
    pub duration: MetricShape,
    /// `istio_request_bytes`.
    pub request_bytes: MetricShape,
    /// `istio_response_bytes`.
    pub response_bytes: MetricShape,
}

/// The label set.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RequestLabels {
    connection: ConnectionLabels,
    outcome: Outcome,
    edits: LabelEdits,
}

impl RequestLabels {
    /// Istio's own labels.
    fn own(&self, put: Put<'_>) -> fmt::Result {
        let outcome = &self.outcome;
        self.connection.peers(put)?;
        put("request_protocol", outcome.protocol.as_str())?;
        put("response_code", &outcome.code.to_string())?;
        if let Some(status) = outcome.grpc_status {
            put("grpc_response_status", &status.to_string())?;
        }
        put("response_flags", &outcome.flags.to_string())?;
        put("connection_security_policy", self.connection.security().as_str())
    }
}

impl Outcome {
    /// As labels have it: servers choose what they answer, and each value is a series that stays. A gRPC status that gRPC
    /// does not know is UNKNOWN to its clients, too.
    pub(super) const fn bounded(self) -> Self {
        let grpc_status = match self.grpc_status {
            Some(17..) => Some(2),
            known => known,
        };
        Self { code: if self.code < 600 { self.code } else { 0 }, grpc_status, ..self }
    }
}

impl EncodeLabelSet for RequestLabels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        let edits = &*self.edits;
        if edits.is_empty() {
            return self.own(&mut |name, value| encode(encoder, name, value));
        }
        let mut written = vec![false; edits.len()];
        self.own(&mut |name, value| match edits.binary_search_by(|(edited, _)| (**edited).cmp(name)) {
            Err(_) => encode(encoder, name, value),
            Ok(at) => {
                written[at] = true;
                edits[at].1.as_ref().map_or(Ok(()), |value| encode(encoder, name, value))
            }
        })?;
        let further = edits.iter().zip(written).filter(|(_, written)| !written);
        further.map(|(edit, _)| edit).try_for_each(|(name, value)| match value {
            Some(value) => encode(encoder, name, value),
            None => Ok(()),
        })
    }
}

type Histograms = Family<RequestLabels, Histogram, fn() -> Histogram>;

/// What an exemplar says: the trace of one request of a bucket.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct TraceLabel(u128);

impl EncodeLabelSet for TraceLabel {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        encode(encoder, EXEMPLAR, &format!("{:032x}", self.0))
    }
}

/// The label of exemplars that Prometheus and Grafana know.
pub(super) const EXEMPLAR: &str = "trace_id";

type Timed = HistogramWithExemplars<TraceLabel>;
type Times = Family<RequestLabels, Timed, fn() -> Timed>;

fn timed() -> Timed {
    Timed::new(BUCKETS.into_iter())
}

fn histogram() -> Histogram {
    Histogram::new(BUCKETS)
}

/// The families. Cheap to clone.
#[derive(Debug, Clone)]
pub struct RequestMetrics {
    requests: Family<RequestLabels, Counter>,
    duration: Times,
    request_bytes: Histograms,
    response_bytes: Histograms,
}

impl RequestMetrics {
    /// Creates the families and registers them.
    #[must_use]
    pub fn register(registry: &mut Registry) -> Self {
        let histograms = || Family::new_with_constructor(histogram as fn() -> Histogram);
        let metrics = Self {
            requests: Family::default(),
            duration: Family::new_with_constructor(timed as fn() -> Timed),
            request_bytes: histograms(),
            response_bytes: histograms(),
        };
        registry.register("istio_requests", "Requests", metrics.requests.clone());
        registry.register(
            "istio_request_duration_milliseconds",
            "From the request's head to the end of the answer",
            metrics.duration.clone(),
        );
        registry.register("istio_request_bytes", "Bytes of request bodies", metrics.request_bytes.clone());
        registry.register("istio_response_bytes", "Bytes of response bodies", metrics.response_bytes.clone());
        metrics
    }

    /// Counts a request that has ended; `shape` says how its metrics differ from Istio's own. `trace`: that of its spans,
    /// where there are some.
    pub fn record(
        &self,
        cache: &mut RequestCache,
        connection: &Connection,
        outcome: Outcome,
        duration: Duration,
        [received, sent]: [u64; 2],
        (shape, trace): (Option<&Arc<Shape>>, Option<u128>),
    ) {
        let observed = (duration, received, sent, trace);
        let outcome = outcome.bounded();
        let Some(key) = Key::new(connection) else {
            return self.handle(connection, outcome, shape).observe(observed);
        };
        let key = (key, outcome, shape.cloned());
        if let Some(handle) = cache.handles.get(&key) {
            return handle.observe(observed);
        }
        let handle = Arc::new(self.handle(connection, outcome, shape));
        handle.observe(observed);
        cache.handles.insert(key, handle);
    }

    fn handle(&self, connection: &Connection, outcome: Outcome, shape: Option<&Arc<Shape>>) -> RequestHandle {
        let own = Shape::default();
        let shape = shape.map_or(&own, |shape| shape);
        let connection_labels = ConnectionLabels::new(connection);
        let labels = |metric: &MetricShape| {
            let (connection, edits) = (connection_labels.clone(), Arc::clone(&metric.labels));
            (!metric.disabled).then_some(RequestLabels { connection, outcome, edits })
        };
        let histogram =
            |family: &Histograms, metric| labels(metric).map(|labels| family.get_or_create_owned(&labels));
        RequestHandle {
            requests: labels(&shape.requests).map(|labels| self.requests.get_or_create_owned(&labels)),
            duration: labels(&shape.duration).map(|labels| self.duration.get_or_create_owned(&labels)),
            request_bytes: histogram(&self.request_bytes, &shape.request_bytes),
            response_bytes: histogram(&self.response_bytes, &shape.response_bytes),
            _held: Arc::new(connection.clone()),
        }
    }
}

/// Handles of one worker, by who talked to whom and how it ended.
#[derive(Debug)]
pub struct RequestCache {
    handles: Recent<RequestKey, Arc<RequestHandle>>,
}

/// Who talked to whom, how it ended, and how its metrics differ.
type RequestKey = (Key, Outcome, Option<Arc<Shape>>);

impl Default for RequestCache {
    fn default() -> Self {
        Self { handles: Recent::new(CACHED_HANDLES, HANDLES_KEPT) }
    }
}

#[derive(Debug)]
struct RequestHandle {
    requests: Option<Counter>,
    duration: Option<Timed>,
    request_bytes: Option<Histogram>,
    response_bytes: Option<Histogram>,
    /// Keeps what the key's addresses stand for.
    _held: Arc<Connection>,
}

impl RequestHandle {
    #[allow(clippy::cast_precision_loss, reason = "a sum of bytes beyond 2^53 may be off by a few")]
    fn observe(&self, (duration, received, sent, trace): (Duration, u64, u64, Option<u128>)) {
        if let Some(requests) = &self.requests {
            requests.inc();
        }
        if let Some(histogram) = &self.duration {
            histogram.observe(duration.as_secs_f64() * 1e3, trace.map(TraceLabel), None);
        }
        for (histogram, value) in
            [(&self.request_bytes, received as f64), (&self.response_bytes, sent as f64)]
        {
            if let Some(histogram) = histogram {
                histogram.observe(value);
            }
        }
    }
}

/// What the access log says of a request, beside what it says of a connection.
#[derive(Debug, Clone, Default)]
pub struct RequestRecord {
    /// Method.
    pub method: String,
    /// Host, as the client wrote it.
    pub authority: String,
    /// Path and query, as the client wrote them.
    pub path: String,
    /// `HTTP/1.1` or `HTTP/2`.
    pub protocol: &'static str,
    /// Status; 0 when there was none.
    pub code: u16,
    /// gRPC status.
    pub grpc_status: Option<u16>,
    /// Why.
    pub flags: Flags,
    /// Envoy's words for who decided the answer, such as `via_upstream`.
    pub details: String,
    /// Why the upstream could not be used.
    pub upstream_failure: String,
    /// Name of the rule.
    pub route: String,
    /// Tries beyond the first.
    pub retries: u32,
    /// `x-request-id`.
    pub request_id: String,
    /// `user-agent`.
    pub user_agent: String,
    /// `x-forwarded-for`.
    pub forwarded_for: String,
    /// The trace that it belongs to.
    pub trace: Option<u128>,
    /// Writes its lines, where they are not in our own layout.
    pub lines: Option<Arc<dyn RequestLines>>,
}

/// Lines about a request in layouts that the mesh's settings choose: any number, also none.
pub trait RequestLines: fmt::Debug + Send + Sync {
    /// Appends the lines, each with its end. On the log's own thread.
    fn write(&self, record: &AccessRecord, request: &RequestRecord, lines: &mut String);
}
