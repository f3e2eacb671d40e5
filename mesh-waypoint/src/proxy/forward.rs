//! One request, from its head to the end of its answer.

use std::convert::Infallible;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode, Version};
use http_body::Body as _;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use mesh_core::state::{Service, Workload};
use mesh_core::telemetry::Flags;
use mesh_core::xds::proto::l7;

use super::body::{Replay, RequestBody, ResponseBody};
use super::destination::Destination;
use super::gate::{self, Passed};
use super::headers;
use super::http::{Downstream, Upgraded};
use super::http1;
use super::io::EndpointIo;
use super::message::{Message, Outside, Switch};
use super::mirror;
use super::refused::Refused;
use super::secure::Inside;
use super::tries::{self, Answered, Body, Terms, Tries};
use crate::config::Snapshot;
use crate::request::Addressed;
use crate::routing::{
    Abort, Action, Matched, RateLimit, RewriteError, Routed, Rule, WeightedBackend, split_port,
};
use crate::telemetry::Exchange;
use crate::upstream::{Hashed, Limit, Outcome, Permit, PickContext, Picked};

/// An endpoint for a stream, and what it holds of its backend.
pub struct Chosen {
    /// Where it is.
    pub to: Destination,
    picked: Picked,
    _permit: Permit,
}

impl Chosen {
    /// The endpoint's workload.
    #[must_use]
    pub fn workload(&self) -> Option<&Arc<Workload>> {
        self.picked.endpoint().workload.as_ref()
    }
}

/// Answers a request.
///
/// # Errors
/// None: whatever fails is an answer.
pub async fn handle(
    downstream: Rc<Downstream>,
    mut request: Request<Incoming>,
) -> Result<Response<ResponseBody>, Infallible> {
    // On HTTP/2 a stream may become a tunnel, beside the others of its connection.
    let tunnel = (request.version() == Version::HTTP_2 && request.method() == Method::CONNECT)
        .then(|| hyper::upgrade::on(&mut request));
    let snapshot = downstream.worker.shared.snapshot.load_full();
    let mut exchange = Exchange::begin(&downstream, &snapshot, &request);
    downstream.begins(&exchange.progress);
    let version = request.version();
    let mut answer = match Box::pin(forward(&downstream, &snapshot, &mut exchange, request)).await {
        Ok(Forwarded::Answer(answered)) => {
            let Answered { response, lease, held, deadline, .. } = *answered;
            let (mut head, body) = response.into_parts();
            if tunnel.is_some() && head.status.is_success() {
                // It would tell the client that there is a tunnel.
                head.status = StatusCode::BAD_GATEWAY;
                exchange.log(|line| line.details = "upgrade_failed".to_owned());
            }
            exchange.answered(head.status, &head.headers);
            Response::from_parts(head, ResponseBody::upstream(body, exchange, lease, held, deadline))
        }
        Ok(Forwarded::Switched(head, endpoint)) => {
            exchange.answered(head.status, &head.headers);
            // The record goes on with the connection; the answer itself has no body.
            let (mut head, upgraded) = (*head, Upgraded { endpoint, exchange });
            match tunnel {
                Some(tunnel) => {
                    in_tunnel(&mut head);
                    drop(tokio::task::spawn_local(async move {
                        // Otherwise the client has left.
                        if let Ok(client) = tunnel.await {
                            http1::carry_on(TokioIo::new(client), upgraded).await;
                        }
                    }));
                }
                None => *downstream.upgraded.borrow_mut() = Some(upgraded),
            }
            Response::from_parts(head, ResponseBody::empty())
        }
        Err(refused) => {
            let unclear = refused.flags.has(Flags::DOWNSTREAM_PROTOCOL_ERROR) && version != Version::HTTP_2;
            let mut answer = refused.answer(exchange);
            if unclear {
                // Who writes one request that cannot be read has no further ones read (as Envoy).
                answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            answer
        }
    };
    *answer.version_mut() = if version == Version::HTTP_2 { version } else { Version::HTTP_11 };
    Ok(answer)
}

/// An agreement to switch, as HTTP/2 has it (RFC 8441, section 5).
fn in_tunnel(head: &mut http::response::Parts) {
    head.status = StatusCode::OK;
    for name in [header::CONNECTION, header::UPGRADE, header::SEC_WEBSOCKET_ACCEPT] {
        head.headers.remove(name);
    }
}

/// What an endpoint answered.
enum Forwarded {
    Answer(Box<Answered>),
    Switched(Box<http::response::Parts>, hyper::client::conn::http1::Parts<TokioIo<EndpointIo>>),
}

/// What is done to the answer.
#[derive(Default)]
struct Edits<'a> {
    rule: Option<(&'a Rule, Option<&'a WeightedBackend>)>,
    /// An origin that may read it.
    origin: Option<HeaderValue>,
    cookies: Vec<HeaderValue>,
}

async fn forward(
    downstream: &Rc<Downstream>,
    snapshot: &Arc<Snapshot>,
    exchange: &mut Exchange,
    request: Request<Incoming>,
) -> Result<Forwarded, Box<Refused>> {
    exchange.to_service(service(snapshot, &downstream.addressed).as_ref());
    let (head, incoming) = request.into_parts();
    let at_gateway = matches!(downstream.addressed, Addressed::Gateway { .. });
    let outside = at_gateway.then(|| Outside {
        client: downstream.source.address.ip(),
        is_proxy: snapshot.settings.trusted_proxies > 0,
        certificate: downstream.secured.as_ref().and_then(|secured| secured.certificate.as_ref()),
    });
    let scheme = downstream.scheme(&head.uri);
    let mut message = Message::new(head, scheme, outside, exchange)?;
    belongs(downstream, snapshot, &message)?;
    normalize(snapshot, &mut message)?;
    let mut body = client_body(incoming, exchange);
    let Passed { claims, response_headers } = {
        let readable = if let Body::Replay(replay) = &body { Some(replay) } else { None };
        gate::pass(downstream, snapshot, &mut message, readable).await?
    };
    let rule;
    let mut edits = Edits::default();
    let mut backend = None;
    {
        let head = message.as_head(downstream, claims.as_deref());
        match snapshot.routes.http(&head) {
            Routed::NotFound => return Err(Refused::no_route()),
            Routed::Default => rule = None,
            Routed::Rule(matched) => {
                rule = Some(Arc::clone(matched.rule));
                exchange.to_rule(matched.rule);
                backend = Some((matched.path, pick_backend(&matched, &head)?));
            }
        }
    }
    if let Some(rule) = &rule {
        limit_rate(downstream, rule)?;
        edits.origin = cross_origin(rule, &message)?;
        inject(rule, exchange).await?;
        let matched = backend.as_ref().map(|(path, _)| *path);
        end_here(downstream, rule, &message, claims.as_deref(), matched)?;
    }
    let chosen = backend.as_ref().and_then(|(_, backend)| backend.as_ref().map(|at| at.of(rule.as_deref())));
    let chosen = chosen.flatten();
    if let (Some(rule), Some((path, _))) = (&rule, &backend) {
        rewrite(rule, chosen, &mut message, *path)?;
        edits.rule = Some((&**rule, chosen));
        let whole = if let Body::Replay(replay) = &body { Some(replay) } else { None };
        for mirror in mirror::of(rule, chosen) {
            mirror::send(downstream, snapshot, mirror, &message, whole, rule.timeout);
        }
    }
    let cluster = tries::cluster(downstream, snapshot, chosen.map(|chosen| &chosen.backend))?;
    let session = rule.as_ref().and_then(|rule| rule.session.as_deref());
    let sticky = session.and_then(|session| session_of(session, &message.head.headers));
    let hashed = match &cluster.policy().balancer.hash {
        Some(key) => key.hash(&message.as_head(downstream, claims.as_deref()), fastrand::u64(..)),
        None => Hashed::default(),
    };
    edits.cookies.extend(hashed.set_cookie);
    let terms = Terms {
        retry: downstream.worker.retry_policy(&snapshot.settings, rule.as_deref()),
        timeout: rule.as_ref().and_then(|rule| rule.timeout),
        hash: hashed.hash,
        sticky,
    };
    once_only(&mut body, exchange, &terms);
    let tries = Tries { downstream, snapshot, cluster: &cluster, message: &message, terms };
    let mut answered = tries.run(exchange, &mut body).await?;
    if let Some(session) = session
        && sticky != Some(answered.sticky)
    {
        name_session(session, answered.sticky, answered.response.headers_mut(), &mut edits.cookies);
    }
    exchange.log(|line| line.details = "via_upstream".to_owned());
    let switched = switched(answered.response.status(), message.switch.as_ref());
    edit_answer(&mut answered, &edits, switched);
    response_headers.iter().for_each(|change| change.apply(answered.response.headers_mut()));
    if switched { switch(answered).await } else { Ok(Forwarded::Answer(Box::new(answered))) }
}

/// Whether a request over TLS is for the listener that its connection is to: clients use a connection for every host that
/// its certificate is for.
fn belongs(downstream: &Downstream, snapshot: &Snapshot, message: &Message) -> Result<(), Box<Refused>> {
    let Some(secured) = &downstream.secured else { return Ok(()) };
    let (host, _) = split_port(message.authority.to_str().unwrap_or_default());
    let port = snapshot.ports.get(downstream.addressed.port());
    match port.and_then(|port| port.listener(Some(host))) {
        Some(listener) if listener.server == secured.server => Ok(()),
        Some(_) => Err(Refused::misdirected()),
        None => Err(Refused::no_route()),
    }
}

/// Paths are compared and sent on in their normal form.
fn normalize(snapshot: &Snapshot, message: &mut Message) -> Result<(), Box<Refused>> {
    let path = message.path();
    if path.is_empty() || path == "*" {
        return Ok(());
    }
    let normal = snapshot.policies.normalize(path);
    let normal = normal
        .map_err(|error| Refused::bad_request("path_normalization_failed").because(error.to_string()))?;
    if normal == path {
        return Ok(());
    }
    let (normal, query) = (normal.into_owned(), message.query().map(str::to_owned));
    message.set_target(&normal, query.as_deref())
}

fn client_body(incoming: Incoming, exchange: &Exchange) -> Body {
    if incoming.is_end_stream() {
        exchange.progress.end();
        return Body::None;
    }
    Body::Replay(Replay::new(incoming, Rc::clone(&exchange.progress)))
}

/// A body that nobody wants a second time is not kept.
fn once_only(body: &mut Body, exchange: &Exchange, terms: &Terms) {
    if terms.retry.attempts > 0 {
        return;
    }
    if let Body::Replay(replay) = &*body
        && let Some(incoming) = replay.take()
    {
        *body = Body::Stream(Some(RequestBody::stream(incoming, Rc::clone(&exchange.progress))));
    }
}

/// Which backend of a rule.
#[derive(Clone, Copy)]
struct BackendAt(usize);

impl BackendAt {
    fn of(self, rule: Option<&Rule>) -> Option<&WeightedBackend> {
        match &rule?.action {
            Action::Forward(forward) => forward.backends.get(self.0),
            _ => None,
        }
    }
}

/// Draws the backend of a rule that forwards, by weight.
fn pick_backend(
    matched: &Matched<'_>,
    head: &crate::request::Head<'_>,
) -> Result<Option<BackendAt>, Box<Refused>> {
    let Action::Forward(forward) = &matched.rule.action else { return Ok(None) };
    let Some(picked) = forward.pick_backend(fastrand::u64(..)) else {
        return Err(Refused::misconfigured(format!("{}: no backend has a weight", matched.rule.resource)));
    };
    if let Some(redirect) = &picked.redirect {
        return Err(redirected(redirect.status, redirect.location(head, matched.path)));
    }
    Ok(forward.backends.iter().position(|backend| std::ptr::eq(backend, picked)).map(BackendAt))
}

fn redirected(status: StatusCode, location: Result<HeaderValue, RewriteError>) -> Box<Refused> {
    match location {
        Ok(location) => {
            let mut own = Refused::new(status, "", Flags::default(), "direct_response");
            own.headers.insert(header::LOCATION, location);
            own
        }
        Err(error) => unwritable(error),
    }
}

fn unwritable(error: RewriteError) -> Box<Refused> {
    let status = match error {
        RewriteError::TooLong => StatusCode::URI_TOO_LONG,
        RewriteError::Authority => StatusCode::BAD_REQUEST,
    };
    Refused::new(status, "", Flags::default(), "invalid_target").because(error.to_string())
}

fn limit_rate(downstream: &Downstream, rule: &Rule) -> Result<(), Box<Refused>> {
    let Some(RateLimit { name, limit }) = &rule.rate_limit else { return Ok(()) };
    let now = Instant::now();
    let limiter = downstream.worker.shared.rates.get(name, limit, now);
    let identity = downstream.source.identity.as_ref().filter(|_| limit.per_identity);
    let identity = identity.map(ToString::to_string);
    limiter.check(identity.as_deref(), now).map_err(|limited| {
        let status = StatusCode::TOO_MANY_REQUESTS;
        let mut own = Refused::new(status, "local_rate_limited", Flags::RATE_LIMITED, "local_rate_limited");
        let seconds = limited.retry_after.as_secs().saturating_add(1);
        own.headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        own
    })
}

/// Answers a question for leave of another origin; else keeps the origin that may read the answer.
fn cross_origin(rule: &Rule, message: &Message) -> Result<Option<HeaderValue>, Box<Refused>> {
    let Some(cors) = &rule.cors else { return Ok(None) };
    let headers = &message.head.headers;
    if let Some(answer) = cors.preflight(&message.head.method, headers) {
        let mut own = Refused::new(StatusCode::OK, "", Flags::default(), "cors_response");
        own.headers = answer;
        return Err(own);
    }
    Ok(cors.allowed_origin(headers).cloned())
}

async fn inject(rule: &Rule, exchange: &mut Exchange) -> Result<(), Box<Refused>> {
    let Some(fault) = &rule.fault else { return Ok(()) };
    let injected = fault.decide(fastrand::u64(..), fastrand::u64(..));
    if let Some(delay) = injected.delay {
        exchange.flag(Flags::DELAY_INJECTED);
        tokio::time::sleep(delay).await;
    }
    let (status, grpc) = match injected.abort {
        None => return Ok(()),
        Some(Abort::Http(status)) => (status, None),
        Some(Abort::Grpc(status)) => (StatusCode::OK, Some(status.into())),
    };
    let mut own = Refused::new(status, "fault filter abort", Flags::FAULT_INJECTED, "fault_filter_abort");
    own.grpc = grpc;
    if let Some(grpc) = grpc
        && !exchange.is_grpc()
    {
        headers::put_grpc(&mut own.headers, grpc, "fault filter abort");
        own.body = bytes::Bytes::new();
    }
    Err(own)
}

/// Answers where the rule does not forward.
fn end_here(
    downstream: &Downstream,
    rule: &Rule,
    message: &Message,
    claims: Option<&serde_json::Map<String, serde_json::Value>>,
    matched: Option<crate::routing::MatchedPath>,
) -> Result<(), Box<Refused>> {
    let mut own = match (&rule.action, matched) {
        (Action::Forward(_), _) | (_, None) => return Ok(()),
        (Action::Redirect(redirect), Some(path)) => {
            redirected(redirect.status, redirect.location(&message.as_head(downstream, claims), path))
        }
        (Action::Respond(response), _) => {
            Refused::new(response.status, response.body.clone(), Flags::default(), "direct_response")
        }
        (Action::Invalid(reason), _) => Refused::misconfigured(format!("{}: {reason}", rule.resource)),
    };
    rule.edit_response(None, &mut own.headers);
    Err(own)
}

/// Changes path, host and headers as the rule says.
fn rewrite(
    rule: &Rule,
    backend: Option<&WeightedBackend>,
    message: &mut Message,
    matched: crate::routing::MatchedPath,
) -> Result<(), Box<Refused>> {
    if let Some(rewrite) = rule.rewrite_for(backend) {
        let target = rewrite.path(matched, message.path(), message.query()).map_err(unwritable)?;
        if let Some(target) = target {
            message.put_target(target);
        }
    }
    if let Some(authority) = rule.authority_for(backend)
        && let Ok(authority) = HeaderValue::from_str(authority.as_str())
    {
        message.authority = authority;
    }
    rule.edit_request(backend, &mut message.head.headers);
    Ok(())
}

const fn switched(status: StatusCode, wanted: Option<&Switch>) -> bool {
    match wanted {
        Some(Switch::Upgrade(_)) => status.as_u16() == 101,
        Some(Switch::Connect) => status.as_u16() / 100 == 2,
        None => false,
    }
}

fn edit_answer(answered: &mut Answered, edits: &Edits<'_>, switched: bool) {
    let spent = u64::try_from(answered.spent.as_millis()).unwrap_or(u64::MAX);
    let headers = answered.response.headers_mut();
    let upgrade = headers.get(header::UPGRADE).cloned().filter(|_| switched);
    headers::strip_hop_by_hop(headers);
    headers.insert(headers::X_UPSTREAM_SERVICE_TIME, HeaderValue::from(spent));
    for cookie in &edits.cookies {
        headers.append(header::SET_COOKIE, cookie.clone());
    }
    if let Some((rule, backend)) = edits.rule {
        rule.edit_response(backend, headers);
        if let (Some(cors), Some(origin)) = (&rule.cors, &edits.origin) {
            cors.edit_response(origin, headers);
        }
    }
    if let Some(upgrade) = upgrade {
        headers.insert(header::UPGRADE, upgrade);
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    }
}

/// Takes the endpoint's transport, which is carried on as it is.
async fn switch(answered: Answered) -> Result<Forwarded, Box<Refused>> {
    let Answered { response, lease, .. } = answered;
    let transport = match lease.take() {
        Some(sender) => sender.upgraded().await,
        None => None,
    };
    let transport = transport.ok_or_else(|| Refused::terminated("the connection ended while it switched"))?;
    Ok(Forwarded::Switched(Box::new(response.into_parts().0), transport))
}

/// The endpoint that a client's session names.
fn session_of(session: &l7::SessionPersistence, headers: &HeaderMap) -> Option<u64> {
    let value = if session.header {
        headers.get(session.name.as_str())?.to_str().ok()?
    } else {
        let lines = headers.get_all(header::COOKIE).iter().filter_map(|line| line.to_str().ok());
        lines.flat_map(|line| line.split(';')).find_map(|pair| {
            let (name, value) = pair.split_once('=')?;
            (name.trim() == session.name).then(|| value.trim().trim_matches('"'))
        })?
    };
    u64::from_str_radix(value, 16).ok()
}

/// Tells the client how to name its session.
fn name_session(
    session: &l7::SessionPersistence,
    sticky: u64,
    headers: &mut HeaderMap,
    cookies: &mut Vec<HeaderValue>,
) {
    let value = format!("{sticky:016x}");
    if session.header {
        let name = HeaderName::try_from(session.name.as_str());
        if let (Ok(name), Ok(value)) = (name, HeaderValue::from_str(&value)) {
            headers.insert(name, value);
        }
        return;
    }
    let mut text = format!("{}=\"{value}\"", session.name);
    if let Some(lifetime) = session.lifetime.and_then(|lifetime| std::time::Duration::try_from(lifetime).ok())
    {
        text.push_str(&format!("; Max-Age={}", lifetime.as_secs()));
    }
    let path = if session.path.is_empty() { "/" } else { &session.path };
    text.push_str(&format!("; Path={path}; HttpOnly"));
    cookies.extend(HeaderValue::from_str(&text).ok());
}

/// The service that a connection was opened to.
#[must_use]
pub fn addressed_service(downstream: &Downstream) -> Option<Arc<Service>> {
    service(&downstream.worker.shared.snapshot.load(), &downstream.addressed)
}

fn service(snapshot: &Snapshot, addressed: &Addressed) -> Option<Arc<Service>> {
    match addressed {
        Addressed::Service { key, .. } => snapshot.mesh.service(key).map(|s| Arc::clone(&s.service)),
        Addressed::Workload { .. } | Addressed::Gateway { .. } => None,
    }
}

/// Connects a stream that is no HTTP to an endpoint, if policy lets it.
///
/// # Errors
/// Why not.
pub async fn connect(downstream: &Rc<Downstream>) -> Result<(Chosen, EndpointIo), Box<Refused>> {
    let local = &downstream.worker;
    let snapshot = local.shared.snapshot.load_full();
    gate::pass_stream(downstream, &snapshot)?;
    let name = downstream.secured.as_ref().map_or("", |secured| &*secured.name);
    let address = downstream.destination.ip();
    let rule = snapshot.routes.tcp(&downstream.addressed, name, &downstream.source, address);
    let backend = match rule {
        None => None,
        Some(rule) => {
            rule.hits.fetch_add(1, Ordering::Relaxed);
            if let Some(reason) = &rule.invalid {
                return Err(Refused::misconfigured(format!("{}: {reason}", rule.resource)));
            }
            let picked = rule.forward.pick_backend(fastrand::u64(..));
            Some(picked.ok_or_else(|| Refused::misconfigured(format!("{}: no backend", rule.resource)))?)
        }
    };
    let cluster = tries::cluster(downstream, &snapshot, backend.map(|backend| &backend.backend))?;
    let permit = cluster.admit(Limit::Connection, Instant::now());
    let permit = permit.map_err(|overflow| Refused::overflow(overflow.to_string()))?;
    let context = PickContext { original: Some(downstream.destination), ..PickContext::new(Instant::now()) };
    let picked = cluster.pick(&context, &mut local.rng.borrow_mut());
    let picked = picked.map_err(|none| Refused::no_healthy_upstream(none.to_string()))?;
    let opened = async {
        let to = tries::destination(local, &picked, cluster.policy(), Inside::Other).await?;
        let (io, _) = local.pool.transport(&local.shared, &to).await?;
        Ok((to, io))
    };
    match opened.await {
        Ok((to, io)) => {
            picked.report(Outcome::Connected, Instant::now());
            Ok((Chosen { to, picked, _permit: permit }, io))
        }
        Err(error) => {
            picked.report(Outcome::ConnectionFailed, Instant::now());
            Err(Refused::unconnected(&error))
        }
    }
}
