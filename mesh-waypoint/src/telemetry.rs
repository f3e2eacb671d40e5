//! One record per request, whatever its end: metrics and a line in the access log.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use http::{HeaderMap, Request, StatusCode};
use mesh_core::state::{Service, Workload};
use mesh_core::telemetry::{
    AccessLog, AccessRecord, Connection, Direction, Event, Flags, Outcome, Peer, Reporter, RequestMetrics,
    RequestProtocol, RequestRecord, SecurityPolicy, TcpMetrics,
};
use prometheus_client::metrics::gauge::Gauge;

use crate::proxy::body::Progress;
use crate::proxy::headers;
use crate::proxy::http::Downstream;

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
    /// What the log says beside that; none when it says nothing.
    line: Option<Box<RequestRecord>>,
    complete: bool,
}

impl Exchange {
    /// A request has come.
    #[must_use]
    pub fn begin<B>(downstream: &Rc<Downstream>, request: &Request<B>) -> Self {
        let grpc = headers::is_grpc(request.headers());
        let protocol = if grpc { RequestProtocol::Grpc } else { RequestProtocol::Http };
        let telemetry = &downstream.worker.shared.telemetry;
        Self {
            downstream: Rc::clone(downstream),
            started: Instant::now(),
            outcome: Outcome { protocol, code: 0, grpc_status: None, flags: Flags::default() },
            service: None,
            endpoint: None,
            sent: 0,
            progress: Rc::default(),
            line: telemetry.log_requests.then(|| line(request)),
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

    /// The service that is meant.
    pub fn to_service(&mut self, service: Option<&Arc<Service>>) {
        self.service = service.cloned();
    }

    /// The endpoint that was chosen.
    pub fn to_endpoint(&mut self, workload: Option<&Arc<Workload>>, address: SocketAddr) {
        self.endpoint = Some((workload.cloned(), address));
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
    }

    /// Its trailers.
    pub fn trailers(&mut self, trailers: &HeaderMap) {
        if self.is_grpc() {
            self.outcome.grpc_status = headers::grpc_status(trailers).or(self.outcome.grpc_status);
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
        let source = &self.downstream.source;
        Connection {
            reporter: Reporter::Waypoint,
            source: Peer::known(source.workload.as_ref()),
            source_identity: source.identity.clone(),
            destination: Peer::known(self.endpoint.as_ref().and_then(|(workload, _)| workload.as_ref())),
            destination_identity: None,
            service: self.service.clone(),
            security: SecurityPolicy::MutualTls,
        }
    }

    fn write(&self, line: Box<RequestRecord>, connection: Connection, duration: Duration) {
        let downstream = &self.downstream;
        downstream.worker.shared.telemetry.access_log.write(AccessRecord {
            event: Event::Request,
            at: SystemTime::now(),
            direction: Direction::Inbound,
            source: downstream.source.address,
            destination: downstream.destination,
            hbone_target: self.endpoint.as_ref().map(|(_, address)| (*address).into()),
            connection: Some(connection),
            received: self.progress.received.get(),
            sent: self.sent,
            duration,
            failure: None,
            fast_path: false,
            request: Some(line),
        });
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if !self.complete {
            self.flag(Flags::DOWNSTREAM_CONNECTION_TERMINATION);
            self.log(|line| line.details = "downstream_remote_disconnect".to_owned());
        }
        let duration = self.started.elapsed();
        let connection = self.connection();
        let local = &self.downstream.worker;
        local.shared.telemetry.requests.record(
            &mut local.requests.borrow_mut(),
            &connection,
            self.outcome,
            duration,
            [self.progress.received.get(), self.sent],
        );
        if let Some(mut line) = self.line.take() {
            line.code = self.outcome.code;
            line.grpc_status = self.outcome.grpc_status;
            line.flags = self.outcome.flags;
            self.write(line, connection, duration);
        }
    }
}

fn line<B>(request: &Request<B>) -> Box<RequestRecord> {
    let text = |name: &http::HeaderName| {
        let value = request.headers().get(name).map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned());
        value.unwrap_or_default()
    };
    let authority = match request.uri().authority() {
        Some(authority) => authority.as_str().to_owned(),
        None => text(&http::header::HOST),
    };
    Box::new(RequestRecord {
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
    })
}
