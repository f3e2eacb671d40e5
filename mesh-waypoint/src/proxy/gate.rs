//! Tokens, policies and external authorizers: whether a request may go on, and what they change of it.

use std::rc::Rc;
use std::sync::Arc;
use std::time::SystemTime;

use http::StatusCode;
use http::header;
use http_body_util::BodyExt as _;
use mesh_core::telemetry::Flags;
use serde_json::{Map, Value};

use super::ask;
use super::body::Replay;
use super::http::Downstream;
use super::message::Message;
use super::refused::Refused;
use crate::config::Snapshot;
use crate::security::authz::{Custom, Decision, Report, Stream, Verdict};
use crate::security::ext_authz::{
    self, Answer, Asked, Body, BodyLimit, HeaderChange, Question, Reply, Transport,
};

/// What tokens and authorizers say of a request that may go on.
#[derive(Debug, Default)]
pub(super) struct Passed {
    /// The payload of the token.
    pub(super) claims: Option<Arc<Map<String, Value>>>,
    /// For the answer.
    pub(super) response_headers: Vec<HeaderChange>,
}

/// Decides on a request, and changes its head as tokens and authorizers want it. `body` is the client's, where it can be
/// read before it is sent on.
///
/// # Errors
/// The answer.
pub(super) async fn pass(
    downstream: &Rc<Downstream>,
    snapshot: &Snapshot,
    message: &mut Message,
    body: Option<&Replay>,
) -> Result<Passed, Box<Refused>> {
    let policies = Arc::clone(snapshot.policies.for_service(&downstream.addressed));
    let mut passed = Passed::default();
    if policies.is_empty() {
        return Ok(passed);
    }
    let custom = policies.ask(&message.as_head(downstream, None));
    log(downstream, &custom.reports);
    if let Some(denial) = &custom.denied {
        return Err(Refused::denied(denial.details()));
    }
    if !custom.asks.is_empty() {
        // Large, and for few requests.
        passed.response_headers = Box::pin(ask(downstream, snapshot, message, body, &custom)).await?;
    }
    if policies.has_token_rules() {
        let now = SystemTime::now();
        let found = policies.authenticate(&message.as_head(downstream, None), now).await;
        let found = found.map_err(|refusal| {
            let mut own = Refused::new(refusal.status(), refusal.body(), Flags::default(), refusal.details());
            own.headers.insert(header::WWW_AUTHENTICATE, refusal.www_authenticate());
            own
        })?;
        found.edits.apply(&mut message.head.headers);
        if let Some(query) = found.edits.query() {
            let path = message.path().to_owned();
            message.set_target(&path, Some(query))?;
        }
        passed.claims = found.claims;
    }
    let Decision { verdict, reports } =
        policies.check(&message.as_head(downstream, passed.claims.as_deref()));
    log(downstream, &reports);
    match verdict {
        Verdict::Allow => Ok(passed),
        Verdict::Deny(denial) => Err(Refused::denied(denial.details())),
    }
}

/// Decides on a stream that is no HTTP.
///
/// # Errors
/// The denial.
pub(super) fn pass_stream(downstream: &Downstream, snapshot: &Snapshot) -> Result<(), Box<Refused>> {
    let policies = snapshot.policies.for_service(&downstream.addressed);
    if policies.is_empty() {
        return Ok(());
    }
    let stream = Stream {
        source: &downstream.source,
        destination: downstream.destination,
        addressed: &downstream.addressed,
        sni: "",
    };
    let Decision { verdict, reports } = policies.check_stream(&stream);
    log(downstream, &reports);
    match verdict {
        Verdict::Allow => Ok(()),
        Verdict::Deny(denial) => Err(Refused::denied(denial.details())),
    }
}

/// Policies without effect are heard of in the log.
fn log(downstream: &Downstream, reports: &[Report]) {
    for report in reports {
        let policy = report.policy.as_deref().unwrap_or("none");
        let client = downstream.source.address;
        tracing::info!(%client, policy, rule = report.rule, effect = ?report.effect, "a policy without effect");
    }
}

/// Asks the external authorizers.
async fn ask(
    downstream: &Rc<Downstream>,
    snapshot: &Snapshot,
    message: &mut Message,
    body: Option<&Replay>,
    custom: &Custom,
) -> Result<Vec<HeaderChange>, Box<Refused>> {
    let limits = custom.asks.iter().filter_map(|ask| ext_authz::body_limit(&ask.provider));
    let limit = limits.reduce(|a, b| BodyLimit { bytes: a.bytes.max(b.bytes), cut: a.cut && b.cut });
    let read = match (limit, body) {
        (Some(limit), Some(body)) => Some(beginning(body, limit).await?),
        (Some(_), None) => Some(Body::default()),
        (None, _) => None,
    };
    let answer = {
        let head = message.as_head(downstream, None);
        let protocol = if downstream.http2 { "HTTP/2" } else { "HTTP/1.1" };
        let asked = Asked { head: &head, protocol, time: SystemTime::now(), body: read.as_ref() };
        ext_authz::ask(&custom.asks, &asked, &Carrier { downstream, snapshot }).await
    };
    match answer {
        Answer::Allow(allowed) => {
            if let Some(query) = allowed.changed_query(message.query()) {
                let path = message.path().to_owned();
                message.set_target(&path, Some(&query))?;
            }
            allowed.headers.iter().for_each(|change| change.apply(&mut message.head.headers));
            Ok(allowed.response_headers)
        }
        Answer::Deny(denied) => {
            let flags = Flags::UNAUTHORIZED_EXTERNAL;
            let mut own = Refused::new(denied.status, denied.body, flags, denied.details);
            for (name, value) in denied.headers {
                own.headers.append(name, value);
            }
            Err(own)
        }
    }
}

/// Reads the beginning of a client's body, which stays there to be sent on.
async fn beginning(body: &Replay, limit: BodyLimit) -> Result<Body, Box<Refused>> {
    let mut reading = body.send();
    let mut bytes = Vec::new();
    while bytes.len() <= limit.bytes {
        match reading.frame().await {
            Some(Ok(frame)) => bytes.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data)),
            Some(Err(error)) => {
                return Err(Refused::bad_request("request_body_broken").because(error.to_string()));
            }
            None => break,
        }
    }
    let partial = bytes.len() > limit.bytes;
    if partial && !limit.cut || !body.is_whole() {
        let status = StatusCode::PAYLOAD_TOO_LARGE;
        return Err(Refused::new(status, "Payload Too Large", Flags::default(), "request_payload_too_large"));
    }
    bytes.truncate(limit.bytes);
    Ok(Body { bytes: bytes.into(), partial })
}

/// Carries questions to authorizers, which are services of the mesh.
struct Carrier<'a> {
    downstream: &'a Rc<Downstream>,
    snapshot: &'a Snapshot,
}

impl Transport for Carrier<'_> {
    async fn send(&self, question: Question) -> Result<Reply, String> {
        let Question { service, grpc, request, timeout } = question;
        let addressed = self.downstream.addressed.port();
        let asked = ask::whole(&self.downstream.worker, self.snapshot, &service, addressed, grpc, request);
        let exchanged = tokio::time::timeout(timeout, asked).await;
        exchanged.unwrap_or_else(|_elapsed| Err(format!("no answer within {timeout:?}")))
    }
}
