//! What a CONNECT request says, and the headers around it.
//!
//! RFC 9113 §8.5: only `:method` and `:authority`. The headers beside them are those of Istio ambient; nothing in them
//! is trusted for policy.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use bytes::Bytes;
use http::header::{FORWARDED, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, StatusCode, Uri};

use super::authority::{Authority, InvalidAuthority};
use super::baggage::BaggageHeader;
use crate::error::Code;

const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const X_FORWARDED_NETWORK: HeaderName = HeaderName::from_static("x-forwarded-network");

/// One CONNECT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectRequest {
    /// Where to.
    pub authority: Authority,
    /// What the sender says about its workload.
    pub baggage: Option<BaggageHeader>,
    /// Who connected to the sender, and to which service.
    pub forwarded: Option<Forwarded>,
    /// Joins the logs of both nodes.
    pub traceparent: Option<TraceParent>,
    /// The sender's network; only in the inner request across networks.
    pub network: Option<Box<str>>,
}

/// Why a request is no CONNECT that we serve. Every one is answered with [`RequestError::status`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// Some other HTTP method.
    #[error("the tunnel takes only CONNECT, not {0}")]
    Method(Method),
    /// No `:authority` at all.
    #[error("CONNECT without an authority; it must be address:port or host:port")]
    NoAuthority,
    /// An `:authority` that names no destination.
    #[error(transparent)]
    Authority(#[from] InvalidAuthority),
}

impl RequestError {
    /// The status that the peer gets: 400 for all of them.
    #[must_use]
    pub const fn status(&self) -> StatusCode {
        StatusCode::BAD_REQUEST
    }

    /// The stable code.
    #[must_use]
    pub const fn code(&self) -> Code {
        match self {
            Self::Method(_) => Code::ConnectMethod,
            Self::NoAuthority | Self::Authority(_) => Code::ConnectAuthority,
        }
    }
}

impl ConnectRequest {
    /// A request with nothing but its destination.
    #[must_use]
    pub fn to(authority: impl Into<Authority>) -> Self {
        Self { authority: authority.into(), baggage: None, forwarded: None, traceparent: None, network: None }
    }

    /// The request for the wire.
    ///
    /// # Errors
    /// The authority's host is not one that can stand in a URI.
    pub fn encode(&self) -> Result<Request<()>, RequestError> {
        let authority = self.authority.to_string();
        let bad = |_| InvalidAuthority::BadHost(authority.clone());
        let parsed = http::uri::Authority::from_maybe_shared(Bytes::from(authority.clone())).map_err(bad)?;
        let mut parts = http::uri::Parts::default();
        parts.authority = Some(parsed);
        let uri =
            Uri::from_parts(parts).map_err(|_not_a_uri| InvalidAuthority::BadHost(authority.clone()))?;
        let mut request = Request::new(());
        *request.method_mut() = Method::CONNECT;
        *request.uri_mut() = uri;
        let headers = request.headers_mut();
        if let Some(BaggageHeader(value)) = &self.baggage {
            headers.insert(BAGGAGE, value.clone());
        }
        insert(headers, FORWARDED, self.forwarded.as_ref());
        insert(headers, TRACEPARENT, self.traceparent.as_ref());
        insert(headers, X_FORWARDED_NETWORK, self.network.as_ref());
        Ok(request)
    }

    /// Reads a request as the peer sent it.
    ///
    /// # Errors
    /// The method is not CONNECT, or the authority is missing or malformed. Headers never fail: what cannot be read is
    /// treated as absent, for none of them decides anything.
    pub fn parse<B>(request: &Request<B>) -> Result<Self, RequestError> {
        if request.method() != Method::CONNECT {
            return Err(RequestError::Method(request.method().clone()));
        }
        let authority = request.uri().authority().ok_or(RequestError::NoAuthority)?;
        let headers = request.headers();
        Ok(Self {
            authority: authority.as_str().parse()?,
            baggage: baggage(headers),
            forwarded: text(headers, &FORWARDED).and_then(Forwarded::parse),
            traceparent: text(headers, &TRACEPARENT).and_then(|t| t.parse().ok()),
            network: text(headers, &X_FORWARDED_NETWORK).filter(|n| !n.is_empty()).map(Into::into),
        })
    }
}

/// The `baggage` of a request or of a response; several lines are one list.
#[must_use]
pub fn baggage(headers: &HeaderMap) -> Option<BaggageHeader> {
    let mut lines = headers.get_all(BAGGAGE).iter();
    let first = lines.next()?;
    let mut rest = lines.peekable();
    if rest.peek().is_none() {
        return Some(BaggageHeader(first.clone()));
    }
    let mut joined = first.as_bytes().to_vec();
    for line in rest {
        joined.push(b',');
        joined.extend_from_slice(line.as_bytes());
    }
    HeaderValue::from_maybe_shared(Bytes::from(joined)).ok().map(BaggageHeader)
}

/// Puts our workload's description into a response.
pub(super) fn insert_baggage(headers: &mut HeaderMap, baggage: &BaggageHeader) {
    headers.insert(BAGGAGE, baggage.0.clone());
}

fn insert(headers: &mut HeaderMap, name: HeaderName, value: Option<&impl fmt::Display>) {
    // A value that cannot stand in a header (a network name with control characters) is a hint that is lost.
    if let Some(value) = value.and_then(|v| HeaderValue::try_from(v.to_string()).ok()) {
        headers.insert(name, value);
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// `forwarded`, RFC 7239, with the two parameters that node proxies use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forwarded {
    /// The address of the application's connection; never used to decide anything.
    pub client: Option<SocketAddr>,
    /// The service that the application addressed.
    pub host: Option<Box<str>>,
}

impl Forwarded {
    /// Reads the first element; `None` when it has neither parameter.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut forwarded = Self { client: None, host: None };
        for pair in text.split(',').next()?.split(';') {
            let Some((key, value)) = pair.split_once('=') else { continue };
            let value = value.trim().trim_matches('"');
            if key.trim().eq_ignore_ascii_case("for") {
                forwarded.client = value.parse().ok();
            } else if key.trim().eq_ignore_ascii_case("host") && !value.is_empty() {
                forwarded.host = Some(value.into());
            }
        }
        (forwarded.client.is_some() || forwarded.host.is_some()).then_some(forwarded)
    }
}

impl fmt::Display for Forwarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        if let Some(client) = self.client {
            write!(f, "for=\"{client}\"")?;
            separator = ";";
        }
        if let Some(host) = &self.host {
            write!(f, "{separator}host={host}")?;
        }
        Ok(())
    }
}

/// `traceparent` of W3C Trace Context, version 00.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TraceParent {
    /// Never 0.
    pub trace: u128,
    /// Never 0.
    pub span: u64,
}

/// A `traceparent` that is not of the form `00-<32 hex>-<16 hex>-<2 hex>`, or has a zero id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a traceparent of version 00 with ids other than zero")]
pub struct InvalidTraceParent;

impl TraceParent {
    /// A new one, for a connection of an application.
    #[must_use]
    pub fn random() -> Self {
        Self { trace: fastrand::u128(1..), span: fastrand::u64(1..) }
    }
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-00", self.trace, self.span)
    }
}

impl fmt::Debug for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for TraceParent {
    type Err = InvalidTraceParent;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let hex =
            |s: &str, len: usize| s.len() == len && s.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let parts: Vec<&str> = text.splitn(5, '-').collect();
        let [version, trace, span, flags] = parts[..] else { return Err(InvalidTraceParent) };
        if version != "00" || !hex(trace, 32) || !hex(span, 16) || !hex(flags, 2) {
            return Err(InvalidTraceParent);
        }
        let trace = u128::from_str_radix(trace, 16).ok().filter(|t| *t != 0).ok_or(InvalidTraceParent)?;
        let span = u64::from_str_radix(span, 16).ok().filter(|s| *s != 0).ok_or(InvalidTraceParent)?;
        Ok(Self { trace, span })
    }
}
