//! Asking an external authorizer, as Envoy's ext_authz does it over gRPC and HTTP; no I/O.
//!
//! [`question`] makes the request to the authorizer, [`answer`] reads what came back; [`ask`] does both for all that a
//! request's policies want, with a [`Transport`] of the proxy in between.

mod grpc;
mod http1;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use mesh_core::xds::proto::l7;

use super::authz::Ask;
use crate::request::Head;

/// Istio's default for a question.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(600);
/// Says to the authorizer whether the body it got is cut.
const PARTIAL_BODY: HeaderName = HeaderName::from_static("x-envoy-auth-partial-body");

/// What is asked about.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// The request.
    pub head: &'a Head<'a>,
    /// `HTTP/1.1` or `HTTP/2`.
    pub protocol: &'a str,
    /// When it came.
    pub time: SystemTime,
    /// The beginning of its body, as much as the one that wants most of it wants ([`body_limit`]).
    pub body: Option<&'a Body>,
}

/// The beginning of a request's body.
#[derive(Debug, Clone, Default)]
pub struct Body {
    /// At most as much as the provider wants.
    pub bytes: Bytes,
    /// Whether there is more.
    pub partial: bool,
}

impl Body {
    /// As much as one provider wants.
    fn cut_to(&self, limit: BodyLimit) -> Result<Self, String> {
        let partial = self.partial || self.bytes.len() > limit.bytes;
        if partial && !limit.cut {
            return Err(format!("the body is larger than {} bytes (maxRequestBytes)", limit.bytes));
        }
        Ok(Self { bytes: self.bytes.slice(..self.bytes.len().min(limit.bytes)), partial })
    }
}

/// How much of a body is to be collected for a provider.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BodyLimit {
    /// At most so many bytes.
    pub bytes: usize,
    /// Whether a larger body is cut; else the request is refused with 413.
    pub cut: bool,
}

/// A request to an authorizer.
#[derive(Debug)]
pub struct Question {
    /// Where it goes.
    pub service: l7::ServiceRef,
    /// Over HTTP/2.
    pub grpc: bool,
    /// With the authority that it has to be sent with.
    pub request: http::Request<Bytes>,
    /// Of the whole exchange.
    pub timeout: Duration,
}

/// What an authorizer sent back.
#[derive(Debug, Default)]
pub struct Reply {
    /// Status.
    pub status: StatusCode,
    /// Headers.
    pub headers: HeaderMap,
    /// The whole body; the transport refuses to collect more than a reasonable one.
    pub body: Bytes,
    /// Trailers, if there were any.
    pub trailers: HeaderMap,
}

/// Carries questions.
pub trait Transport {
    /// Sends a question and collects the whole reply; the error is for logs.
    fn send(&self, question: Question) -> impl Future<Output = Result<Reply, String>>;
}

/// The outcome of a question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Goes on, changed.
    Allow(Allowed),
    /// Is answered with this.
    Deny(Denied),
}

/// How a request goes on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Allowed {
    /// Of the request.
    pub headers: Vec<HeaderChange>,
    /// Of the request's query: a value to set, or none to remove the parameter.
    pub query: Vec<(String, Option<String>)>,
    /// To be added to the response.
    pub response_headers: Vec<HeaderChange>,
}

/// One change of headers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeaderChange {
    /// Replaces all values.
    Set(HeaderName, HeaderValue),
    /// One more value.
    Append(HeaderName, HeaderValue),
    /// Only where there is none.
    AddIfAbsent(HeaderName, HeaderValue),
    /// Only where there is one.
    OverwriteIfExists(HeaderName, HeaderValue),
    /// All values go.
    Remove(HeaderName),
}

impl HeaderChange {
    /// Makes the change.
    pub fn apply(&self, headers: &mut HeaderMap) {
        match self {
            Self::Set(name, value) => drop(headers.insert(name, value.clone())),
            Self::Append(name, value) => drop(headers.append(name, value.clone())),
            Self::AddIfAbsent(name, value) => drop(headers.entry(name).or_insert_with(|| value.clone())),
            Self::OverwriteIfExists(name, value) => {
                if headers.contains_key(name) {
                    headers.insert(name, value.clone());
                }
            }
            Self::Remove(name) => drop(headers.remove(name)),
        }
    }
}

/// The answer that the client gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Denied {
    /// Status.
    pub status: StatusCode,
    /// Headers of the authorizer.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// Body.
    pub body: Bytes,
    /// Envoy's response code details; the response flag is `UAEX`.
    pub details: &'static str,
}

/// How much of the body a provider wants; none for nothing.
#[must_use]
pub fn body_limit(provider: &l7::Provider) -> Option<BodyLimit> {
    let bytes = usize::try_from(provider.max_request_bytes).ok().filter(|bytes| *bytes > 0)?;
    Some(BodyLimit { bytes, cut: provider.allow_partial_message })
}

/// What to send to the provider.
///
/// # Errors
/// The request cannot be put into a question, for example because of its host; to be passed to [`answer`].
pub fn question(provider: &l7::Provider, asked: &Asked<'_>) -> Result<Question, String> {
    let service = provider.service.clone().unwrap_or_default();
    let timeout = provider.timeout.and_then(|timeout| Duration::try_from(timeout).ok());
    let timeout = timeout.filter(|timeout| !timeout.is_zero()).unwrap_or(DEFAULT_TIMEOUT);
    let body = asked.body.zip(body_limit(provider)).map(|(body, limit)| body.cut_to(limit)).transpose()?;
    let asked = &Asked { body: body.as_ref(), ..*asked };
    let request =
        if provider.grpc { grpc::request(&service, asked, timeout) } else { http1::request(provider, asked) };
    Ok(Question {
        service,
        grpc: provider.grpc,
        request: request.map_err(|error| error.to_string())?,
        timeout,
    })
}

/// What the reply, or the lack of one, means.
#[must_use]
pub fn answer(provider: &l7::Provider, reply: Result<Reply, String>) -> Answer {
    let read = if provider.grpc { grpc::answer } else { http1::answer };
    match reply.and_then(|reply| read(provider, &reply)) {
        Ok(answer) => answer,
        Err(error) => {
            let name = &provider.name;
            if provider.fail_open {
                tracing::warn!("extension provider {name}: {error}; the request passes (failOpen)");
                return Answer::Allow(Allowed::default());
            }
            tracing::warn!("extension provider {name}: {error}; the request is refused");
            let status =
                u16::try_from(provider.status_on_error).ok().and_then(|code| StatusCode::from_u16(code).ok());
            Answer::Deny(Denied {
                status: status.unwrap_or(StatusCode::FORBIDDEN),
                headers: Vec::new(),
                body: Bytes::new(),
                details: "ext_authz_error",
            })
        }
    }
}

/// Asks all that the policies want, one after the other: each has to allow.
pub async fn ask(asks: &[Ask], asked: &Asked<'_>, transport: &impl Transport) -> Answer {
    let mut allowed = Allowed::default();
    for ask in asks {
        let reply = match question(&ask.provider, asked) {
            Ok(question) => transport.send(question).await,
            Err(error) => Err(error),
        };
        match answer(&ask.provider, reply) {
            Answer::Allow(more) => {
                allowed.headers.extend(more.headers);
                allowed.query.extend(more.query);
                allowed.response_headers.extend(more.response_headers);
            }
            denied @ Answer::Deny(_) => return denied,
        }
    }
    Answer::Allow(allowed)
}

impl Allowed {
    /// The query with the changes; none if it stays as it is.
    #[must_use]
    pub fn changed_query(&self, query: Option<&str>) -> Option<String> {
        if self.query.is_empty() {
            return None;
        }
        let name = |pair: &str| pair.split('=').next().unwrap_or("").to_owned();
        let kept = query
            .unwrap_or("")
            .split('&')
            .filter(|pair| !pair.is_empty() && !self.query.iter().any(|(changed, _)| *changed == name(pair)));
        let mut pairs: Vec<String> = kept.map(str::to_owned).collect();
        pairs.extend(self.query.iter().filter_map(|(name, value)| {
            value.as_ref().map(|value| format!("{}={}", escaped(name), escaped(value)))
        }));
        Some(pairs.join("&"))
    }
}

/// Percent-encoded for a query.
fn escaped(text: &str) -> String {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    let mut escaped = String::with_capacity(text.len());
    for b in text.bytes() {
        if b.is_ascii_alphanumeric() || b"-._~".contains(&b) {
            escaped.push(char::from(b));
        } else {
            escaped.extend(['%', char::from(HEX[usize::from(b >> 4)]), char::from(HEX[usize::from(b & 15)])]);
        }
    }
    escaped
}

/// A name and value of an authorizer; none for what belongs to the connection, framing or routing, which stays ours.
fn header_of(name: &str, value: &[u8]) -> Result<Option<(HeaderName, HeaderValue)>, String> {
    let Some(name) = name_of(name)? else { return Ok(None) };
    let value = HeaderValue::from_bytes(value).map_err(|error| format!("the value of {name}: {error}"))?;
    Ok(Some((name, value)))
}

fn name_of(name: &str) -> Result<Option<HeaderName>, String> {
    if name.starts_with(':') {
        return Ok(None);
    }
    let name = HeaderName::try_from(name).map_err(|error| format!("header {name:?}: {error}"))?;
    Ok((!is_ours(&name)).then_some(name))
}

fn is_ours(name: &HeaderName) -> bool {
    [
        header::HOST,
        header::CONNECTION,
        header::CONTENT_LENGTH,
        header::TRANSFER_ENCODING,
        header::TE,
        header::TRAILER,
        header::UPGRADE,
    ]
    .contains(name)
        || matches!(name.as_str(), "keep-alive" | "proxy-connection")
}
