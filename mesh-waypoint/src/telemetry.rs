//! One record per request, whatever its end: metrics and a line in the access log.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use http::{HeaderMap, Request, StatusCode};
use mesh_core::flows::ConnectionId;
use mesh_core::state::{Service, Workload};
use mesh_core::tap::Tapped;
use mesh_core::telemetry::{
    AccessLog, AccessRecord, Connection, Direction, Event, Flags, Outcome, Peer, Reporter, RequestMetrics,
    RequestProtocol, RequestRecord, SecurityPolicy, TcpMetrics,
};
use prometheus_client::metrics::gauge::Gauge;

use crate::config::{Role, Snapshot};
use crate::observe::Observed;
use crate::observe::facts::{Ended, Kept};
use crate::observe::logs::{Left, Log, Logs};
use crate::observe::metrics::Metrics;
use crate::proxy::body::Progress;
use crate::proxy::headers;
use crate::proxy::http::Downstream;
use crate::routing::Rule;
use crate::tap::Interest;
use crate::trace::export::Counts;
use crate::trace::request::{Told, Trace};
use crate::upstream::{ClusterKey, Target};

/// Where requests and connections are recorded.
#[derive(Debug, Clone)]
pub struct Telemetry {
    /// Of HTTP.
    pub requests: RequestMetrics,
    /// Of everything else.
    pub tcp: TcpMetrics,
    /// The log.
    pub access_log: AccessLog,
    /// Whether each request has a line.
    pub log_requests: bool,
    /// What became of spans.
    pub spans: Counts,
    /// Streams of tunnels that are open.
    pub streams: Gauge,
}

/// A request from its head to the end of its answer. Dropped before that, the client has left.
pub struct Exchange {
    downstream: Rc<Downstream>,
    started: Instant,
    outcome: Outcome,
    service: Option<Arc<Service>>,
    endpoint: Option<(Option<Arc<Workload>>, SocketAddr)>,
    /// Bytes to the client.
    pub sent: u64,
    /// Bytes from the client.
    pub progress: Rc<Progress>,
    /// What the log and spans say beside that; none when they say nothing.
    line: Option<Box<RequestRecord>>,
    observed: Arc<Observed>,
    trace: Option<Box<Trace>>,
    /// The trace that has spans of it.
    spanned: Option<u128>,
    /// For layouts of others and for spans.
    kept: Option<Box<Kept>>,
    /// The rule that it fell under.
    rule: Option<Arc<Rule>>,
    tapped: Interest,
    complete: bool,
}

impl Exchange {
    /// A request has come.
    #[must_use]
    pub fn begin<B>(downstream: &Rc<Downstream>, snapshot: &Snapshot, request: &Request<B>) -> Self {
        let grpc = headers::is_grpc(request.headers());
        let protocol = if grpc { RequestProtocol::Grpc } else { RequestProtocol::Http };
        let telemetry = &downstream.worker.shared.telemetry;
        let observed = Arc::clone(snapshot.observation.of(&downstream.addressed));
        let trace = observed.tracing.as_ref().map(|tracing| {
            let chance = downstream.worker.rng.borrow_mut().f64();
            Box::new(Trace::begin(tracing, request.headers(), chance))
        });
        let spanned = trace.as_ref().filter(|trace| trace.records()).map(|trace| trace.id());
        let records = spanned.is_some();
        let tapped = downstream.worker.shared.tap.interest();
        let (logs, others) = match &observed.logs {
            Logs::Own => (telemetry.log_requests, false),
            Logs::Lines(lines) => (!lines.is_empty(), !lines.is_empty()),
        };
        let computed = observed.metrics.is_computed();
        let line = (logs || records || computed || tapped >= Interest::Lines).then(|| {
            let trace = trace.as_ref().map(|trace| trace.id());
            Box::new(RequestRecord { trace, ..line(request) })
        });
        let kept = (records || others || computed || tapped >= Interest::Headers)
            .then(|| Box::new(kept(downstream, request)));
        Self {
            downstream: Rc::clone(downstream),
            started: Instant::now(),
            outcome: Outcome { protocol, code: 0, grpc_status: None, flags: Flags::default() },
            service: None,
            endpoint: None,
            sent: 0,
            progress: Rc::default(),
            line,
            observed,
            trace,
            spanned,
            kept,
            rule: None,
            tapped,
            complete: false,
        }
    }

    /// Whether the request is gRPC.
    #[must_use]
    pub fn is_grpc(&self) -> bool {
        self.outcome.protocol == RequestProtocol::Grpc
    }

    /// When it came.
    #[must_use]
    pub const fn started(&self) -> Instant {
        self.started
    }

    /// Changes what the log says, if it says something.
    pub fn log(&mut self, change: impl FnOnce(&mut RequestRecord)) {
        if let Some(line) = &mut self.line {
            change(line);
        }
    }

    /// The rule that it falls under.
    pub fn to_rule(&mut self, rule: &Arc<Rule>) {
        rule.hits.fetch_add(1, Ordering::Relaxed);
        self.log(|line| line.route = rule.name.to_string());
        if self.tapped > Interest::None {
            self.rule = Some(Arc::clone(rule));
        }
    }

    /// The service that is meant.
    pub fn to_service(&mut self, service: Option<&Arc<Service>>) {
        self.service = service.cloned();
    }

    /// The endpoint that was chosen.
    pub fn to_endpoint(&mut self, workload: Option<&Arc<Workload>>, address: SocketAddr) {
        self.endpoint = Some((workload.cloned(), address));
    }

    /// A try at an endpoint of a backend begins: what the endpoint is told of the trace.
    pub fn attempt(&mut self, cluster: &ClusterKey, address: SocketAddr) -> Option<Told> {
        if let Some(kept) = &mut self.kept {
            kept.cluster = cluster_name(cluster, self.downstream.worker.shared.config.own.role);
            kept.upstream = Some(address);
            kept.attempts += 1;
        }
        self.trace.as_mut()?.attempt(address)
    }

    /// The head of the try's answer came, or none will; `over`: nothing more of it is waited for.
    pub fn attempted(&mut self, code: Option<u16>, over: bool) {
        if let Some(trace) = &mut self.trace {
            trace.attempted(code, over);
        }
    }

    /// Something happened that the flags tell of.
    pub fn flag(&mut self, flags: Flags) {
        self.outcome.flags = self.outcome.flags.with(flags);
    }

    /// The head of the answer.
    pub fn answered(&mut self, status: StatusCode, headers: &HeaderMap) {
        self.outcome.code = status.as_u16();
        if self.is_grpc() {
            self.outcome.grpc_status = headers::grpc_status(headers);
        }
        if let Some(kept) = &mut self.kept {
            kept.response = headers.clone();
        }
    }

    /// Its trailers.
    pub fn trailers(&mut self, trailers: &HeaderMap) {
        if self.is_grpc() {
            self.outcome.grpc_status = headers::grpc_status(trailers).or(self.outcome.grpc_status);
        }
        if let Some(kept) = &mut self.kept {
            kept.trailers = trailers.clone();
        }
    }

    /// The client got everything.
    pub fn complete(&mut self) {
        self.complete = true;
    }

    /// The endpoint broke its answer off.
    pub fn upstream_ended(&mut self, reason: &str) {
        self.flag(Flags::UPSTREAM_CONNECTION_TERMINATION);
        self.log(|line| {
            line.details = "upstream_reset_after_response_started".to_owned();
            reason.clone_into(&mut line.upstream_failure);
        });
        self.complete = true;
    }

    /// The answer took longer than it may.
    pub fn timed_out(&mut self) {
        self.flag(Flags::UPSTREAM_TIMEOUT);
        self.log(|line| line.details = "response_timeout".to_owned());
        self.complete = true;
    }

    fn connection(&self) -> Connection {
        let endpoint = self.endpoint.as_ref().and_then(|(workload, _)| workload.as_ref());
        connection(&self.downstream, endpoint, self.service.clone())
    }

    /// Metrics.
    fn count(&mut self, record: &AccessRecord) {
        let local = Rc::clone(&self.downstream.worker);
        if let Some(kept) = &mut self.kept {
            let endpoint = self.endpoint.as_ref().and_then(|(workload, _)| workload.as_ref());
            let snapshot = local.shared.snapshot.load();
            let labels = endpoint.and_then(|endpoint| snapshot.labels.get(&endpoint.uid).cloned());
            kept.labels = [self.downstream.source.labels.clone(), labels];
        }
        let Some(connection) = &record.connection else { return };
        let metrics = &self.observed.metrics;
        if matches!(metrics, Metrics::Off) {
            return;
        }
        let ended = self.line.as_ref().zip(self.kept.as_ref());
        let ended = ended.map(|(request, kept)| Ended { record, request, kept });
        let shape = metrics.shape(ended.as_ref());
        local.shared.telemetry.requests.record(
            &mut local.requests.borrow_mut(),
            connection,
            self.outcome,
            record.duration,
            [record.received, record.sent],
            (shape.as_ref(), self.spanned),
        );
    }

    /// Tells who listens.
    fn tell(&self, record: &AccessRecord) {
        let Some(line) = self.line.as_ref().filter(|_| self.tapped > Interest::None) else { return };
        let (source, local) = (&self.downstream.source, &self.downstream.worker);
        let own = &local.shared.config.own;
        let name = |workload: &Arc<Workload>| format!("{}/{}", workload.namespace, workload.name);
        let (endpoint, address) = match &self.endpoint {
            Some((workload, address)) => (workload.as_ref().map(name), address.to_string()),
            None => (None, String::new()),
        };
        let route = self.rule.as_ref().map(|rule| format!("{} {}", rule.resource, rule.name));
        let headers = |kept: &HeaderMap| {
            let text = |value: &http::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
            kept.iter().map(|(name, value)| (name.to_string(), text(value))).collect()
        };
        let [request_headers, response_headers] = match &self.kept {
            Some(kept) if self.tapped >= Interest::Headers => [&kept.request, &kept.response].map(headers),
            _ => Default::default(),
        };
        let micros = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        local.shared.tap.tell(&Tapped {
            at_us: record.at.duration_since(SystemTime::UNIX_EPOCH).map(micros).unwrap_or_default(),
            waypoint: format!("{}/{}", own.namespace, own.gateway),
            method: line.method.clone(),
            host: line.authority.clone(),
            path: line.path.clone(),
            protocol: line.protocol.to_owned(),
            source: source.workload.as_ref().map(name).unwrap_or_default(),
            source_address: source.address.to_string(),
            identity: source.identity.as_ref().map(ToString::to_string).unwrap_or_default(),
            service: self.service.as_ref().map(|s| s.host.hostname().to_owned()).unwrap_or_default(),
            status: line.code,
            grpc_status: line.grpc_status,
            flags: line.flags.to_string(),
            details: line.details.clone(),
            duration_us: micros(record.duration),
            received: record.received,
            sent: record.sent,
            route: route.unwrap_or_default().trim_end().to_owned(),
            endpoint: endpoint.unwrap_or_default(),
            endpoint_address: address,
            retries: line.retries,
            request_id: line.request_id.clone(),
            request_headers,
            response_headers,
        });
    }

    /// Hands spans and the line over.
    fn write(&mut self, mut line: Box<RequestRecord>, mut record: AccessRecord) {
        let downstream = Rc::clone(&self.downstream);
        let shared = &downstream.worker.shared;
        if let (Some(trace), Some(kept)) = (self.trace.take(), &self.kept) {
            let ended = Ended { record: &record, request: &line, kept };
            trace.finish(&ended, &self.name(&line), &shared.spans.proxy, &downstream.worker.spans);
        }
        match &self.observed.logs {
            Logs::Own if !shared.telemetry.log_requests => return,
            Logs::Own => {}
            Logs::Lines(lines) if lines.is_empty() => return,
            Logs::Lines(logs) => {
                if let Some(kept) = &self.kept {
                    let ended = Ended { record: &record, request: &line, kept };
                    logs.iter().for_each(|log| log.send(&ended, &downstream.worker.spans));
                }
                if logs.iter().all(Log::is_sent) {
                    return;
                }
                let kept = self.kept.take().map(|kept| *kept).unwrap_or_default();
                line.lines = Some(Arc::new(Left { logs: Arc::clone(logs), kept }));
            }
        }
        record.request = Some(line);
        shared.telemetry.access_log.write(record);
    }

    /// What spans are called: by Istio's rule, the host that was meant and its port.
    fn name(&self, line: &RequestRecord) -> String {
        let port = self.downstream.addressed.port();
        match &self.service {
            Some(service) => format!("{}:{port}/*", service.host.hostname()),
            None => format!("{}/*", line.authority),
        }
    }

    fn record(&self, duration: Duration) -> AccessRecord {
        let downstream = &self.downstream;
        AccessRecord {
            event: Event::Request,
            id: ConnectionId::default(),
            at: SystemTime::now(),
            direction: Direction::Inbound,
            source: downstream.source.address,
            destination: downstream.destination,
            hbone_target: self.endpoint.as_ref().map(|(_, address)| (*address).into()),
            connection: Some(self.connection()),
            received: self.progress.received.get(),
            sent: self.sent,
            duration,
            failure: None,
            fast_path: false,
            request: None,
        }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if !self.complete {
            self.flag(Flags::DOWNSTREAM_CONNECTION_TERMINATION);
            self.log(|line| line.details = "downstream_remote_disconnect".to_owned());
        }
        let record = self.record(self.started.elapsed());
        if let Some(line) = &mut self.line {
            line.code = self.outcome.code;
            line.grpc_status = self.outcome.grpc_status;
            line.flags = self.outcome.flags;
        }
        self.count(&record);
        self.tell(&record);
        if let Some(line) = self.line.take() {
            self.write(line, record);
        }
    }
}

/// Who talks to an endpoint. A gateway is the source of what it sends on, and what it says is said at the source.
pub(crate) fn connection(
    downstream: &Downstream,
    endpoint: Option<&Arc<Workload>>,
    service: Option<Arc<Service>>,
) -> Connection {
    let (source, shared) = (&downstream.source, &downstream.worker.shared);
    let (reporter, security, workload, source_identity) = match shared.config.own.role {
        Role::Waypoint => {
            let identity = source.identity.clone();
            (Reporter::Waypoint, SecurityPolicy::MutualTls, source.workload.as_ref(), identity)
        }
        Role::Gateway => {
            let identity = Some(shared.config.identity.clone());
            (Reporter::Source, SecurityPolicy::Unknown, downstream.reported.as_ref(), identity)
        }
    };
    let (source, destination) = (Peer::known(workload), Peer::known(endpoint));
    let destination_identity = None;
    Connection { reporter, source, source_identity, destination, destination_identity, service, security }
}

/// What layouts and spans may ask for.
fn kept<B>(downstream: &Downstream, request: &Request<B>) -> Kept {
    let scheme = downstream.scheme(request.uri());
    Kept { started: SystemTime::now(), scheme, request: request.headers().clone(), ..Kept::default() }
}

/// A backend as Envoy names its clusters: a waypoint's are those of what is behind it.
fn cluster_name(key: &ClusterKey, role: Role) -> String {
    let ClusterKey { target, port, subset } = key;
    let host = match target {
        Target::Service(key) => key.split_once('/').map_or(&**key, |(_, host)| host),
        Target::Workload(_) => return "inbound-vip|direct-http".to_owned(),
    };
    let slash = if subset.is_empty() { "" } else { "/" };
    match role {
        Role::Waypoint => format!("inbound-vip|{port}{slash}{subset}|http|{host}"),
        Role::Gateway => format!("outbound|{port}|{subset}|{host}"),
    }
}

fn line<B>(request: &Request<B>) -> RequestRecord {
    let text = |name: &http::HeaderName| {
        let value = request.headers().get(name).map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned());
        value.unwrap_or_default()
    };
    let authority = match request.uri().authority() {
        Some(authority) => authority.as_str().to_owned(),
        None => text(&http::header::HOST),
    };
    RequestRecord {
        method: request.method().to_string(),
        authority,
        path: request.uri().path_and_query().map(ToString::to_string).unwrap_or_default(),
        protocol: match request.version() {
            http::Version::HTTP_10 => "HTTP/1.0",
            http::Version::HTTP_2 => "HTTP/2",
            _ => "HTTP/1.1",
        },
        request_id: text(&headers::X_REQUEST_ID),
        user_agent: text(&http::header::USER_AGENT),
        forwarded_for: text(&headers::X_FORWARDED_FOR),
        ..RequestRecord::default()
    }
}
