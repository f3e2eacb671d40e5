//! One request, from its head to the end of its answer.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::uri::{Authority, PathAndQuery};
use http::{Method, Request, Response, StatusCode, Version};
use http_body::Body as _;
use hyper::body::Incoming;
use mesh_core::route::{self, Resolution};
use mesh_core::state::{AppProtocol, IpFamilies, Service, Workload};
use mesh_core::telemetry::Flags;

use super::body::{RequestBody, ResponseBody};
use super::dial::{self, DialError};
use super::headers;
use super::http::{Downstream, Upgraded};
use super::io::EndpointIo;
use super::pool::{Destination, Lease};
use crate::config::Snapshot;
use crate::request::Addressed;
use crate::telemetry::Exchange;

/// An endpoint for a request or a stream.
pub struct Chosen {
    /// Where it is.
    pub to: Destination,
}

/// An answer of our own, with what metrics and log say of it.
#[derive(Debug, Clone)]
pub struct Refused {
    /// Status.
    pub status: StatusCode,
    /// Body.
    pub body: String,
    /// Flags.
    pub flags: Flags,
    /// Envoy's words for who decided.
    pub details: &'static str,
    /// Why the endpoint could not be used.
    pub cause: String,
}

impl Refused {
    /// An answer with a body.
    #[must_use]
    pub fn new(status: StatusCode, body: impl Into<String>, flags: Flags, details: &'static str) -> Self {
        Self { status, body: body.into(), flags, details, cause: String::new() }
    }

    /// No endpoint can take it.
    #[must_use]
    pub fn no_healthy_upstream(cause: impl Into<String>) -> Self {
        let status = StatusCode::SERVICE_UNAVAILABLE;
        let own = Self::new(status, "no healthy upstream", Flags::NO_HEALTHY_UPSTREAM, "no_healthy_upstream");
        Self { cause: cause.into(), ..own }
    }

    /// The endpoint could not be connected to.
    #[must_use]
    pub fn unconnected(error: &DialError) -> Self {
        let cause = error.to_string();
        let (reason, tail) = match error {
            DialError::Timeout => ("connection timeout", String::new()),
            _ => ("remote connection failure", format!(", transport failure reason: {cause}")),
        };
        let text = format!(
            "upstream connect error or disconnect/reset before headers. reset reason: {reason}{tail}"
        );
        let details = "upstream_reset_before_response_started";
        let own =
            Self::new(StatusCode::SERVICE_UNAVAILABLE, text, Flags::UPSTREAM_CONNECTION_FAILURE, details);
        Self { cause, ..own }
    }

    /// The endpoint ended the connection before it answered.
    #[must_use]
    pub fn terminated(cause: String) -> Self {
        let text =
            "upstream connect error or disconnect/reset before headers. reset reason: connection termination";
        let flags = Flags::UPSTREAM_CONNECTION_TERMINATION;
        let details = "upstream_reset_before_response_started";
        Self { cause, ..Self::new(StatusCode::SERVICE_UNAVAILABLE, text, flags, details) }
    }

    /// For the log of a stream.
    #[must_use]
    pub fn text(&self) -> String {
        if self.cause.is_empty() { self.body.clone() } else { self.cause.clone() }
    }
}

/// Answers a request.
///
/// # Errors
/// None: whatever fails is an answer.
pub async fn handle(
    downstream: Rc<Downstream>,
    request: Request<Incoming>,
) -> Result<Response<ResponseBody>, Infallible> {
    let mut exchange = Exchange::begin(&downstream, &request);
    let version = request.version();
    let mut answer = match Box::pin(forward(&downstream, &mut exchange, request)).await {
        Ok(Forwarded::Answer(head, body, lease)) => {
            exchange.answered(head.status, &head.headers);
            Response::from_parts(head, ResponseBody::upstream(body, exchange, *lease, None))
        }
        Ok(Forwarded::Switched(head, endpoint)) => {
            exchange.answered(head.status, &head.headers);
            // The record goes on with the connection; the answer itself has no body.
            let own = ResponseBody::empty();
            *downstream.upgraded.borrow_mut() = Some(Upgraded { endpoint, exchange });
            Response::from_parts(head, own)
        }
        Err(refused) => own_answer(exchange, refused),
    };
    *answer.version_mut() = if version == Version::HTTP_2 { version } else { Version::HTTP_11 };
    Ok(answer)
}

/// What an endpoint answered.
enum Forwarded {
    Answer(http::response::Parts, Incoming, Box<Lease>),
    Switched(http::response::Parts, hyper::client::conn::http1::Parts<hyper_util::rt::TokioIo<EndpointIo>>),
}

/// An answer of our own, as gRPC if the request is.
fn own_answer(mut exchange: Exchange, refused: Refused) -> Response<ResponseBody> {
    let Refused { status, body, flags, details, cause } = refused;
    exchange.flag(flags);
    exchange.log(|line| {
        line.details = details;
        line.upstream_failure = cause;
    });
    let grpc = exchange.is_grpc();
    let mut head = Response::new(());
    if grpc {
        headers::put_grpc(head.headers_mut(), headers::grpc_of(status), &body);
    } else {
        *head.status_mut() = status;
        if !body.is_empty() {
            head.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        }
    }
    exchange.answered(head.status(), head.headers());
    let body = if grpc { Bytes::new() } else { Bytes::from(body) };
    head.map(|()| ResponseBody::own(body, exchange))
}

async fn forward(
    downstream: &Rc<Downstream>,
    exchange: &mut Exchange,
    request: Request<Incoming>,
) -> Result<Forwarded, Refused> {
    let snapshot = downstream.worker.shared.snapshot.load_full();
    let (mut head, body) = request.into_parts();
    let authority = authority(&head)?;
    exchange.to_service(service(&snapshot, &downstream.addressed).as_ref());
    let upgrade = headers::upgrade_wanted(&head.headers, head.version);
    prepare(&mut head, exchange);
    let chosen = choose(downstream, &snapshot, downstream.http2)?;
    exchange.to_endpoint(&chosen.to.workload, chosen.to.address);
    let body = if body.is_end_stream() {
        exchange.progress.ended.set(true);
        RequestBody::empty()
    } else {
        RequestBody::stream(body, Rc::clone(&exchange.progress))
    };
    let to = if upgrade.is_some() { Destination { http2: false, ..chosen.to } } else { chosen.to };
    let request = outgoing(&head, &authority, upgrade.as_ref(), to.http2, 1, body);
    attempt(downstream, exchange, &to, request).await
}

/// Sends a request to an endpoint and waits for the head of the answer.
async fn attempt(
    downstream: &Rc<Downstream>,
    exchange: &mut Exchange,
    to: &Destination,
    request: Request<RequestBody>,
) -> Result<Forwarded, Refused> {
    let local = &downstream.worker;
    let mut lease = local.pool.checkout(&local.shared, to).await.map_err(|e| Refused::unconnected(&e))?;
    let began = Instant::now();
    let mut request = Some(request);
    loop {
        let (Some(sender), Some(sent)) = (lease.sender(), request.take()) else {
            return Err(Refused::terminated("the connection was taken away".to_owned()));
        };
        let reused = sender.is_reused();
        match sender.send(sent).await {
            Ok(response) => return answered(exchange, response, lease, began).await,
            // An idle connection that the endpoint closed just now: nothing of the request was sent.
            Err(unanswered) if reused && unanswered.unsent.is_some() => {
                request = unanswered.unsent;
                lease = local.pool.fresh(&local.shared, to).await.map_err(|e| Refused::unconnected(&e))?;
            }
            Err(unanswered) => return Err(Refused::terminated(unanswered.error.to_string())),
        }
    }
}

async fn answered(
    exchange: &mut Exchange,
    response: Response<Incoming>,
    lease: Lease,
    began: Instant,
) -> Result<Forwarded, Refused> {
    let (mut head, body) = response.into_parts();
    exchange.log(|line| line.details = "via_upstream");
    let switched = head.status == StatusCode::SWITCHING_PROTOCOLS;
    let upgrade = head.headers.get(header::UPGRADE).cloned().filter(|_| switched);
    headers::strip_hop_by_hop(&mut head.headers);
    let spent = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    head.headers.insert(headers::X_UPSTREAM_SERVICE_TIME, HeaderValue::from(spent));
    if !switched {
        return Ok(Forwarded::Answer(head, body, Box::new(lease)));
    }
    if let Some(upgrade) = upgrade {
        head.headers.insert(header::UPGRADE, upgrade);
        head.headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    }
    let sender = lease.take();
    let transport = match sender {
        Some(sender) => sender.upgraded().await,
        None => None,
    };
    let transport =
        transport.ok_or_else(|| Refused::terminated("the connection ended while it switched".to_owned()))?;
    Ok(Forwarded::Switched(head, transport))
}

/// The host that a request names; HTTP/1.1 must name one, and only one (RFC 9112 §3.2).
fn authority(head: &http::request::Parts) -> Result<HeaderValue, Refused> {
    let bad = |details| Refused::new(StatusCode::BAD_REQUEST, "", Flags::DOWNSTREAM_PROTOCOL_ERROR, details);
    let mut hosts = head.headers.get_all(header::HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(bad("duplicate_host"));
    }
    let named = head.uri.authority().map(|authority| HeaderValue::from_str(authority.as_str()));
    match (named, host) {
        (Some(Ok(authority)), _) => Ok(authority),
        (Some(Err(_)), _) => Err(bad("invalid_authority")),
        (None, Some(host))
            if host.is_empty() || host.to_str().is_ok_and(|h| h.parse::<Authority>().is_ok()) =>
        {
            Ok(host.clone())
        }
        (None, Some(_)) => Err(bad("invalid_authority")),
        (None, None) if head.version == Version::HTTP_11 => Err(bad("missing_host_header")),
        (None, None) => Ok(HeaderValue::from_static("")),
    }
}

/// What a proxy does to every request: hop-by-hop headers go, what identifies the request is there.
fn prepare(head: &mut http::request::Parts, exchange: &mut Exchange) {
    headers::strip_hop_by_hop(&mut head.headers);
    if !head.headers.contains_key(headers::X_FORWARDED_PROTO) {
        let scheme = if head.uri.scheme_str() == Some("https") { "https" } else { "http" };
        head.headers.insert(headers::X_FORWARDED_PROTO, HeaderValue::from_static(scheme));
    }
    if !head.headers.contains_key(headers::X_REQUEST_ID) {
        let id = headers::request_id();
        exchange.log(|line| line.request_id = id.to_str().unwrap_or_default().to_owned());
        head.headers.insert(headers::X_REQUEST_ID, id);
    }
}

/// The request as the endpoint gets it, on try number `attempt`.
fn outgoing(
    head: &http::request::Parts,
    authority: &HeaderValue,
    upgrade: Option<&HeaderValue>,
    http2: bool,
    attempt: u32,
    body: RequestBody,
) -> Request<RequestBody> {
    let mut request = Request::new(body);
    *request.method_mut() = head.method.clone();
    *request.headers_mut() = head.headers.clone();
    let path = head.uri.path_and_query().cloned();
    let path = path.unwrap_or_else(|| PathAndQuery::from_static("/"));
    let named = authority.to_str().ok().and_then(|text| text.parse::<Authority>().ok());
    let headers = request.headers_mut();
    headers.insert(headers::X_ATTEMPT_COUNT, HeaderValue::from(attempt));
    if http2 {
        headers.remove(header::HOST);
    } else {
        headers.insert(header::HOST, authority.clone());
    }
    if let Some(to) = upgrade {
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(header::UPGRADE, to.clone());
    }
    *request.uri_mut() =
        if head.method == Method::CONNECT { head.uri.clone() } else { headers::target(path, named, http2) };
    *request.version_mut() = if http2 { Version::HTTP_2 } else { Version::HTTP_11 };
    request
}

/// The service that a connection was opened to.
#[must_use]
pub fn addressed_service(downstream: &Downstream) -> Option<Arc<Service>> {
    service(&downstream.worker.shared.snapshot.load(), &downstream.addressed)
}

fn service(snapshot: &Snapshot, addressed: &Addressed) -> Option<Arc<Service>> {
    match addressed {
        Addressed::Service { key, .. } => snapshot.mesh.service(key).map(|s| Arc::clone(&s.service)),
        Addressed::Workload { .. } => None,
    }
}

/// Connects a stream to an endpoint.
///
/// # Errors
/// Why there is none.
pub async fn connect(downstream: &Rc<Downstream>) -> Result<(Chosen, EndpointIo), Refused> {
    let local = &downstream.worker;
    let snapshot = local.shared.snapshot.load_full();
    let chosen = choose(downstream, &snapshot, false)?;
    let opened = local.pool.transport(&local.shared, &chosen.to).await;
    let (io, _) = opened.map_err(|error| Refused::unconnected(&error))?;
    Ok((chosen, io))
}

/// Picks an endpoint of what the connection was opened to.
fn choose(downstream: &Downstream, snapshot: &Snapshot, http2: bool) -> Result<Chosen, Refused> {
    let shared = &downstream.worker.shared;
    let (workload, service, port, declared) = match &downstream.addressed {
        Addressed::Workload { workload, port } => {
            // The newest version of it; one that is gone is as good as any.
            let workload = snapshot.mesh.workload(&workload.uid).unwrap_or(workload);
            (Arc::clone(workload), None, *port, downstream.protocol)
        }
        Addressed::Service { key, port } => {
            let found = snapshot.mesh.service(key);
            let found = found.ok_or_else(|| Refused::no_healthy_upstream("the service is gone"))?;
            let mut rng = fastrand::Rng::new();
            let picked = route::select(found, &shared.source, *port, Resolution::Standard, &[], &mut rng);
            let picked = picked.map_err(|why| Refused::no_healthy_upstream(why.to_string()))?;
            let declared = found.service.ports.get(port).map_or(AppProtocol::Unknown, |p| p.protocol);
            let workload = Arc::clone(&picked.endpoint.workload);
            (workload, Some(Arc::clone(&found.service)), picked.port, declared)
        }
    };
    let families = service.as_ref().map_or(IpFamilies::Automatic, |service| service.ip_families);
    let address = address(&workload, families, downstream.destination);
    let ip = address.ok_or_else(|| Refused::no_healthy_upstream("the endpoint has no address"))?;
    let http2 = match declared {
        AppProtocol::Http2 | AppProtocol::Grpc => true,
        AppProtocol::Http11 => false,
        // Undeclared: the endpoint is spoken to as the client speaks.
        _ => http2,
    };
    let tunnel = workload.is_hbone().then(|| SocketAddr::new(ip.ip(), route::HBONE_PORT));
    let to = Destination {
        address: SocketAddr::new(ip.ip(), port),
        workload,
        service,
        tunnel,
        http2,
        connect_timeout: dial::CONNECT_TIMEOUT,
    };
    Ok(Chosen { to })
}

/// An address of the workload, of the family that the client asked for if it has one.
fn address(workload: &Workload, families: IpFamilies, asked: SocketAddr) -> Option<SocketAddr> {
    let mut allowed = workload.addresses.iter().filter(|ip| families.allow(**ip));
    let first = allowed.clone().next();
    let ip = allowed.find(|ip| ip.is_ipv4() == asked.is_ipv4()).or(first)?;
    Some(SocketAddr::new(*ip, 0))
}
