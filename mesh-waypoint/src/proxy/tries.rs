//! A request's tries: which backend, within which limits, at which endpoint, for how long, and whether once more.

use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::header::HeaderValue;
use http::{Request, Response};
use hyper::body::Incoming;
use mesh_core::route::{Dial, Route};
use mesh_core::state::{AppProtocol, MeshState, Str};
use mesh_core::telemetry::Flags;
use tokio::time::Sleep;

use super::body::{Progress, Replay, RequestBody};
use super::destination::{Destination, Secure};
use super::dial::DialError;
use super::headers;
use super::http::Downstream;
use super::message::Message;
use super::pool::{Lease, NoConnection};
use super::refused::Refused;
use super::secure::Inside;
use super::spoken::Spoken;
use super::worker::Local;
use crate::config::Snapshot;
use crate::request::Addressed;
use crate::routing::Backend;
use crate::telemetry::Exchange;
use crate::trace::request::Told;
use crate::upstream::{
    Cluster, ClusterKey, Limit, Outcome, Permit, PickContext, Picked, Policy, RetryPolicy, Target, TryEnd,
};

/// What a request holds of its backend until its answer is over.
pub struct Held {
    _picked: Picked,
    _permits: Vec<Permit>,
}

/// What the client sends.
pub(super) enum Body {
    /// Nothing.
    None,
    /// Once.
    Stream(Option<RequestBody>),
    /// As often as it takes.
    Replay(Replay),
}

impl Body {
    fn send(&mut self) -> Option<RequestBody> {
        match self {
            Self::None => Some(RequestBody::empty()),
            Self::Stream(body) => body.take(),
            Self::Replay(replay) => Some(replay.send()),
        }
    }

    fn can_be_sent_again(&self) -> bool {
        match self {
            Self::None => true,
            Self::Stream(body) => body.is_some(),
            Self::Replay(replay) => replay.is_whole(),
        }
    }
}

/// What a rule says of its requests' tries.
pub(super) struct Terms {
    pub(super) retry: Rc<RetryPolicy>,
    pub(super) timeout: Option<Duration>,
    /// Of consistent hashing.
    pub(super) hash: Option<u64>,
    /// The endpoint of a session.
    pub(super) sticky: Option<u64>,
}

/// An endpoint's answer.
pub(super) struct Answered {
    pub(super) response: Response<Incoming>,
    pub(super) lease: Lease,
    pub(super) held: Held,
    /// Which endpoint, as sessions name it.
    pub(super) sticky: u64,
    /// When the whole must be over.
    pub(super) deadline: Option<Pin<Box<Sleep>>>,
    /// How long the endpoint took.
    pub(super) spent: Duration,
}

/// How a try failed.
struct Failure {
    kind: Kind,
    refused: Box<Refused>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Connect,
    Reset { request_started: bool },
    RefusedStream,
    Timeout,
    Overflow,
}

impl Kind {
    const fn end(self) -> TryEnd<'static> {
        match self {
            Self::Connect => TryEnd::ConnectFailure,
            Self::Reset { request_started } => TryEnd::Reset { request_started },
            Self::RefusedStream => TryEnd::RefusedStream,
            Self::Timeout => TryEnd::PerTryTimeout,
            Self::Overflow => TryEnd::Overflow,
        }
    }

    const fn outcome(self) -> Option<Outcome> {
        match self {
            Self::Connect | Self::Reset { .. } | Self::RefusedStream => Some(Outcome::ConnectionFailed),
            Self::Timeout => Some(Outcome::TimedOut),
            Self::Overflow => None,
        }
    }
}

/// One request's tries.
pub(super) struct Tries<'a> {
    pub(super) downstream: &'a Rc<Downstream>,
    pub(super) snapshot: &'a Snapshot,
    pub(super) cluster: &'a Arc<Cluster>,
    pub(super) message: &'a Message,
    pub(super) terms: Terms,
}

impl Tries<'_> {
    /// Sends the request until it is answered, no try is left, or its time is over.
    ///
    /// # Errors
    /// The answer to give instead.
    pub(super) async fn run(
        &self,
        exchange: &mut Exchange,
        body: &mut Body,
    ) -> Result<Answered, Box<Refused>> {
        let overflow = |overflow: crate::upstream::Overflow| Refused::overflow(overflow.to_string());
        let request = self.cluster.admit(Limit::Request, Instant::now()).map_err(overflow)?;
        let Some(timeout) = self.terms.timeout else { return self.tries(exchange, body, request).await };
        let progress = Rc::clone(&exchange.progress);
        let mut deadline = Box::pin(tokio::time::sleep(timeout));
        let tries = std::pin::pin!(self.tries(exchange, body, request));
        // The clock runs from the end of the request (Envoy's route timeout).
        let expired = async {
            if !progress.ended.get() {
                ended(&progress).await;
                deadline.as_mut().reset(tokio::time::Instant::now() + timeout);
            }
            deadline.as_mut().await;
        };
        tokio::select! {
            biased;
            answered = tries => answered.map(|answered| Answered {
                deadline: progress.ended.get().then_some(deadline),
                ..answered
            }),
            () = expired => Err(Refused::timed_out("response_timeout")),
        }
    }

    async fn tries(
        &self,
        exchange: &mut Exchange,
        body: &mut Body,
        request: Permit,
    ) -> Result<Answered, Box<Refused>> {
        let retry = &self.terms.retry;
        let mut permits = vec![request];
        let mut tried = Vec::new();
        let mut number = 1;
        loop {
            let picked = self.pick(&tried, number)?;
            let to = self.destination(&picked).await;
            let began = Instant::now();
            let result = match &to {
                Ok(to) => {
                    exchange.to_endpoint(picked.endpoint().workload.as_ref(), to.address());
                    let told = exchange.attempt(self.cluster.key(), to.address());
                    self.timed(to, number, body, told).await
                }
                Err(error) => Err(Failure::of_dial(error)),
            };
            if result.is_err() && exchange.progress.failed.get() {
                // The client broke its request off or wrote what cannot be read: no word against the endpoint.
                exchange.attempted(None, true);
                return Err(Refused::bad_request("request_body_broken"));
            }
            self.report(&picked, &result);
            let again = self.wants_more(&result, number) && body.can_be_sent_again();
            let more = if again { self.admit_retry(exchange) } else { None };
            let code = result.as_ref().ok().map(|(response, _)| response.status().as_u16());
            exchange.attempted(code, more.is_some() || code.is_none());
            match (result, more) {
                (_, Some(permit)) => {
                    tried.push(picked.tried());
                    drop(picked);
                    permits.truncate(1);
                    permits.push(permit);
                    exchange.log(|line| line.retries = number);
                    tokio::time::sleep(retry.backoff(number, fastrand::u64(..))).await;
                    number += 1;
                }
                (Ok((response, lease)), None) => {
                    self.note_exhaustion(exchange, response.status().is_server_error(), number);
                    let sticky = picked.endpoint().sticky();
                    let held = Held { _picked: picked, _permits: permits };
                    let spent = began.elapsed();
                    return Ok(Answered { response, lease, held, sticky, deadline: None, spent });
                }
                (Err(failure), None) => {
                    self.note_exhaustion(exchange, true, number);
                    return Err(failure.refused);
                }
            }
        }
    }

    fn pick(&self, tried: &[crate::upstream::Tried], number: u32) -> Result<Picked, Box<Refused>> {
        let retry = &self.terms.retry;
        let context = PickContext {
            hash: self.terms.hash,
            sticky: self.terms.sticky,
            tried: if retry.avoid_tried { tried } else { &[] },
            original: Some(self.downstream.destination),
            leave_localities: retry.leave_localities(number - 1),
            ..PickContext::new(Instant::now())
        };
        let picked = self.cluster.pick(&context, &mut self.downstream.worker.rng.borrow_mut());
        picked.map_err(|none| Refused::no_healthy_upstream(none.to_string()))
    }

    async fn destination(&self, picked: &Picked) -> Result<Destination, DialError> {
        let policy = self.cluster.policy();
        let declared = declared(&self.snapshot.mesh, self.downstream.protocol, self.cluster.key());
        let spoken = Spoken::new(self.downstream.http2, &self.message.head.headers);
        let role = self.downstream.worker.shared.config.own.role;
        let http2 =
            self.message.switch.is_none() && spoken.goes_on_in_http2(&policy.connection, declared, role);
        destination(&self.downstream.worker, picked, policy, Inside::of_http(http2)).await
    }

    /// One try, within its time.
    async fn timed(
        &self,
        to: &Destination,
        number: u32,
        body: &mut Body,
        told: Option<Told>,
    ) -> Result<(Response<Incoming>, Lease), Failure> {
        let Some(body) = body.send() else {
            let refused = Refused::terminated("the body has been sent already");
            return Err(Failure { kind: Kind::Overflow, refused });
        };
        let mut request = self.message.outgoing(to.http2, number, body);
        if let Some(told) = told {
            told.inject(request.headers_mut());
        }
        let per_try = self.terms.retry.per_try_timeout;
        if let Some(expected) = per_try.into_iter().chain(self.terms.timeout).min() {
            let millis = u64::try_from(expected.as_millis()).unwrap_or(u64::MAX);
            request.headers_mut().insert(headers::X_EXPECTED_TIMEOUT, HeaderValue::from(millis));
        }
        let attempt = attempt(&self.downstream.worker, to, request);
        match per_try {
            None => attempt.await,
            Some(limit) => tokio::time::timeout(limit, attempt).await.unwrap_or_else(|_elapsed| {
                let refused = Refused::timed_out("upstream_per_try_timeout");
                Err(Failure { kind: Kind::Timeout, refused })
            }),
        }
    }

    fn report(&self, picked: &Picked, result: &Result<(Response<Incoming>, Lease), Failure>) {
        let outcome = match result {
            Ok((response, _)) => Some(match headers::grpc_status(response.headers()) {
                Some(status) => Outcome::grpc(status.into()),
                None => Outcome::Status(response.status().as_u16()),
            }),
            Err(failure) => failure.kind.outcome(),
        };
        if let Some(outcome) = outcome {
            picked.report(outcome, Instant::now());
        }
    }

    fn wants_more(&self, result: &Result<(Response<Incoming>, Lease), Failure>, number: u32) -> bool {
        if self.message.switch.is_some() {
            return false;
        }
        match result {
            Ok((response, _)) => {
                let end = TryEnd::Response {
                    status: response.status().as_u16(),
                    headers: response.headers(),
                    request: &self.message.head.headers,
                };
                self.terms.retry.should_retry(&end, number)
            }
            Err(failure) => self.terms.retry.should_retry(&failure.kind.end(), number),
        }
    }

    /// Leave to try again; without it, the answer stays as it is.
    fn admit_retry(&self, exchange: &mut Exchange) -> Option<Permit> {
        let permit = self.cluster.admit(Limit::Retry, Instant::now());
        if permit.is_err() {
            exchange.flag(Flags::UPSTREAM_OVERFLOW);
        }
        permit.ok()
    }

    fn note_exhaustion(&self, exchange: &mut Exchange, failed: bool, number: u32) {
        let attempts = self.terms.retry.attempts;
        if failed && attempts > 0 && number > attempts {
            exchange.flag(Flags::UPSTREAM_RETRY_LIMIT_EXCEEDED);
        }
    }
}

impl Failure {
    fn of_dial(error: &DialError) -> Self {
        Self { kind: Kind::Connect, refused: Refused::unconnected(error) }
    }

    fn of_connection(error: &NoConnection) -> Self {
        match error {
            NoConnection::Dial(error) => Self::of_dial(error),
            NoConnection::Overflow(text) => {
                Self { kind: Kind::Overflow, refused: Refused::overflow(text.clone()) }
            }
        }
    }
}

/// Resolves when the client has sent all of its request.
async fn ended(progress: &Progress) {
    loop {
        let told = progress.end.notified();
        if progress.ended.get() {
            return;
        }
        told.await;
    }
}

/// Sends a request to an endpoint and waits for the head of the answer.
async fn attempt(
    local: &Local,
    to: &Destination,
    request: Request<RequestBody>,
) -> Result<(Response<Incoming>, Lease), Failure> {
    let pool = &local.pool;
    let mut lease = pool.checkout(&local.shared, to).await.map_err(|e| Failure::of_connection(&e))?;
    let mut request = Some(request);
    loop {
        let (Some(sender), Some(sent)) = (lease.sender(), request.take()) else {
            let refused = Refused::terminated("the connection was taken away");
            return Err(Failure { kind: Kind::Reset { request_started: false }, refused });
        };
        let reused = sender.is_reused();
        match sender.send(sent).await {
            Ok(response) => return Ok((response, lease)),
            // An idle connection that the endpoint closed just now: nothing of the request was sent.
            Err(unanswered) if reused && unanswered.unsent.is_some() => {
                request = unanswered.unsent;
                lease = pool.fresh(&local.shared, to).await.map_err(|e| Failure::of_connection(&e))?;
            }
            Err(unanswered) => {
                let kind = if is_refused_stream(&unanswered.error) {
                    Kind::RefusedStream
                } else {
                    Kind::Reset { request_started: unanswered.unsent.is_none() }
                };
                let refused = Refused::terminated(unanswered.error.to_string());
                return Err(Failure { kind, refused });
            }
        }
    }
}

fn is_refused_stream(error: &hyper::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(error) = cause.downcast_ref::<h2::Error>() {
            return error.reason() == Some(h2::Reason::REFUSED_STREAM);
        }
        source = cause.source();
    }
    false
}

/// The backend that a rule names, or without one what the connection was opened to.
///
/// # Errors
/// There is no such thing.
pub(super) fn cluster(
    downstream: &Downstream,
    snapshot: &Snapshot,
    backend: Option<&Backend>,
) -> Result<Arc<Cluster>, Box<Refused>> {
    let key = match (backend, &downstream.addressed) {
        (Some(backend), addressed) => {
            return of_backend(&downstream.worker, snapshot, backend, addressed.port());
        }
        (None, Addressed::Service { key, port }) => ClusterKey::service(key, *port, ""),
        (None, Addressed::Workload { workload, port }) => ClusterKey::workload(&workload.uid, *port),
        (None, Addressed::Gateway { .. }) => return Err(Refused::no_route()),
    };
    let found = downstream.worker.shared.clusters.cluster(&key, Instant::now());
    found.map_err(|unknown| Refused::no_cluster(unknown.to_string()))
}

/// A named backend; `addressed` is its port where it says none.
fn of_backend(
    local: &Local,
    snapshot: &Snapshot,
    backend: &Backend,
    addressed: u16,
) -> Result<Arc<Cluster>, Box<Refused>> {
    if let Some(reason) = &backend.invalid {
        return Err(Refused::misconfigured(&**reason));
    }
    let Some(found) = backend.service(&snapshot.mesh, &snapshot.own) else {
        return Err(Refused::no_cluster(format!("service {} is not known", backend.hostname)));
    };
    let port = backend.port(&found.service, addressed);
    let subset = backend.subset.as_deref().unwrap_or_default();
    let key = ClusterKey::service(found.service.host.key(), port, subset);
    let found = local.shared.clusters.cluster(&key, Instant::now());
    found.map_err(|unknown| Refused::no_cluster(unknown.to_string()))
}

/// What a backend's port is declared to speak; `addressed`: the port of a workload that the client named.
fn declared(mesh: &MeshState, addressed: AppProtocol, key: &ClusterKey) -> AppProtocol {
    match &key.target {
        Target::Workload(_) => addressed,
        Target::Service(service) => {
            let port = mesh.service(service).and_then(|found| found.service.ports.get(&key.port));
            port.map_or(AppProtocol::Unknown, |port| port.protocol)
        }
    }
}

/// Where an endpoint is, with its name resolved.
///
/// # Errors
/// The name has no address, or what is wanted of the connection cannot be done.
pub(super) async fn destination(
    local: &Local,
    picked: &Picked,
    policy: Arc<Policy>,
    inside: Inside,
) -> Result<Destination, DialError> {
    let endpoint = picked.endpoint();
    if policy.proxy_protocol.is_some() {
        return Err(DialError::Tunnel("the PROXY protocol is not sent by waypoints yet".into()));
    }
    let cluster = Arc::clone(picked.cluster());
    let route = match &endpoint.route.dial {
        Dial::Address(_) => Arc::clone(&endpoint.route),
        Dial::Hostname { hostname, port, .. } => {
            // Rare, and large: it is kept out of the future of every request.
            let addresses = Box::pin(resolve(local, hostname, *port)).await?;
            let route = Route::clone(&endpoint.route);
            let resolved = route.resolved(&addresses, &mut local.rng.borrow_mut());
            Arc::new(resolved.map_err(|error| DialError::Connect(error.to_string().into()))?)
        }
    };
    let dial = address(&route).ok_or_else(|| DialError::Connect("the endpoint has no address".into()))?;
    let secure = match &endpoint.tls {
        None => None,
        Some(tls) => {
            let config = local.tls_config(tls, inside).map_err(|error| DialError::Tls(error.into()))?;
            let host = route.service.as_ref().map_or("", |service| service.host.hostname()).into();
            Some(Secure { tls: Arc::clone(tls), config, host })
        }
    };
    let http2 = inside == Inside::Http2;
    Ok(Destination { cluster, policy, route, dial, http2, secure })
}

const fn address(route: &Route) -> Option<SocketAddr> {
    match &route.dial {
        Dial::Address(address) => Some(*address),
        Dial::Hostname { .. } => None,
    }
}

/// Names are asked for again after this long.
const NAME_LIFE: Duration = Duration::from_secs(30);
/// Names that a worker keeps.
const NAMES: usize = 1024;

/// The addresses of a name, from lately or from the system's resolver.
async fn resolve(local: &Local, hostname: &Str, port: u16) -> Result<Vec<IpAddr>, DialError> {
    if let Some((addresses, at)) = local.names.borrow().get(hostname)
        && at.elapsed() < NAME_LIFE
    {
        return Ok(addresses.clone());
    }
    let found = tokio::net::lookup_host((&**hostname, port)).await;
    let found = found.map_err(|error| DialError::Connect(format!("{hostname}: {error}").into()))?;
    let addresses: Vec<IpAddr> = found.map(|address| address.ip()).collect();
    let mut names = local.names.borrow_mut();
    if names.len() >= NAMES {
        names.clear();
    }
    names.insert(hostname.clone(), (addresses.clone(), Instant::now()));
    Ok(addresses)
}

/// What a request of ours is spoken in.
#[derive(Debug, Clone, Copy)]
pub(super) enum Speak {
    /// HTTP/2, or HTTP/1.1.
    Http2(bool),
    /// What the port is declared to speak, else what follows from how a client's request came.
    AsDeclared(Spoken),
}

/// Sends one request of ours to a backend, without retries: to an authorizer or a collector, or a copy. `addressed` is the
/// port of a backend that names none; `make` is told whether HTTP/2 is spoken.
///
/// # Errors
/// Why there is no answer.
pub(super) async fn once(
    local: &Local,
    snapshot: &Snapshot,
    backend: &Backend,
    addressed: u16,
    speak: Speak,
    make: impl FnOnce(bool) -> Request<RequestBody>,
) -> Result<(Response<Incoming>, Lease), Box<Refused>> {
    let cluster = of_backend(local, snapshot, backend, addressed)?;
    let picked = cluster.pick(&PickContext::new(Instant::now()), &mut local.rng.borrow_mut());
    let picked = picked.map_err(|none| Refused::no_healthy_upstream(none.to_string()))?;
    let policy = cluster.policy();
    let declared = declared(&snapshot.mesh, AppProtocol::Unknown, cluster.key());
    let http2 = match speak {
        Speak::Http2(http2) => http2,
        Speak::AsDeclared(spoken) => {
            spoken.goes_on_in_http2(&policy.connection, declared, local.shared.config.own.role)
        }
    };
    let to = destination(local, &picked, policy, Inside::of_http(http2)).await;
    let to = to.map_err(|error| Refused::unconnected(&error))?;
    attempt(local, &to, make(http2)).await.map_err(|failure| failure.refused)
}
