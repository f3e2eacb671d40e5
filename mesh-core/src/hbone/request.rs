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
use super::http2::hpack::Encoder;
use super::http2::streams::Answer;
use crate::error::Code;
use crate::flows::ConnectionId;

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

    /// Whether the request can be written.
    ///
    /// # Errors
    /// The authority's host is not one that can stand in a URI.
    pub(super) fn check(&self) -> Result<(), RequestError> {
        match &self.authority {
            Authority::Socket(_) => Ok(()),
            Authority::Host { .. } => self.encode().map(drop),
        }
    }

    /// Writes the request as a header block. What repeats on a tunnel is kept in the table of the connection.
    pub(super) fn encode_block(&self, encoder: &mut Encoder, block: &mut Vec<u8>) {
        encoder.repeating(block, ":method", b"CONNECT");
        encoder.repeating(block, ":authority", self.authority.to_string().as_bytes());
        if let Some(BaggageHeader(value)) = &self.baggage {
            encoder.repeating(block, "baggage", value.as_bytes());
        }
        changing(encoder, block, "forwarded", self.forwarded.as_ref());
        changing(encoder, block, "traceparent", self.traceparent.as_ref());
        changing(encoder, block, "x-forwarded-network", self.network.as_ref());
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

fn changing(encoder: &Encoder, block: &mut Vec<u8>, name: &str, value: Option<&impl fmt::Display>) {
    // A value that cannot stand in a header (a network name with control characters) is a hint that is lost.
    if let Some(value) = value.map(ToString::to_string).filter(|v| HeaderValue::from_str(v).is_ok()) {
        encoder.changing(block, name, value.as_bytes());
    }
}

/// The fields of a received header block, as far as they concern a tunnel.
pub(super) struct Fields {
    method: Option<Box<[u8]>>,
    authority: Option<Box<[u8]>>,
    status: Option<u16>,
    /// `:scheme`, `:path`.
    target: [bool; 2],
    baggage: Option<Vec<u8>>,
    forwarded: Option<Box<[u8]>>,
    traceparent: Option<Box<[u8]>>,
    network: Option<Box<[u8]>>,
    /// Other than pseudo-header fields have begun.
    regular: bool,
    malformed: bool,
    /// As RFC 9113 §6.5.2 counts.
    size: usize,
    most: usize,
}

impl Fields {
    /// `most`: see [`Self::is_too_large`].
    pub(super) const fn new(most: usize) -> Self {
        Self {
            method: None,
            authority: None,
            status: None,
            target: [false; 2],
            baggage: None,
            forwarded: None,
            traceparent: None,
            network: None,
            regular: false,
            malformed: false,
            size: 0,
            most,
        }
    }

    /// Takes one field in.
    pub(super) fn add(&mut self, name: &[u8], value: &[u8]) {
        self.size += name.len() + value.len() + 32;
        if self.is_too_large() || self.malformed {
            return;
        }
        if name.first() == Some(&b':') {
            let twice = match name {
                b":method" => self.method.replace(value.into()).is_some(),
                b":authority" => self.authority.replace(value.into()).is_some(),
                b":scheme" => std::mem::replace(&mut self.target[0], true),
                b":path" => std::mem::replace(&mut self.target[1], true),
                b":status" => {
                    let status = std::str::from_utf8(value).ok().and_then(|s| s.parse().ok());
                    self.status.replace(status.unwrap_or(0)).is_some()
                }
                _ => true,
            };
            // RFC 9113 §8.3: known ones, each once, before all others.
            self.malformed |= twice || self.regular;
            return;
        }
        self.regular = true;
        let token = |b: &u8| b.is_ascii_graphic() && !b.is_ascii_uppercase() && *b != b':';
        if name.is_empty() || !name.iter().all(token) || HeaderValue::from_bytes(value).is_err() {
            self.malformed = true;
            return;
        }
        let once = |field: &mut Option<Box<[u8]>>| _ = field.get_or_insert_with(|| value.into());
        match name {
            b"baggage" => match &mut self.baggage {
                Some(joined) => {
                    joined.push(b',');
                    joined.extend_from_slice(value);
                }
                none => *none = Some(value.to_vec()),
            },
            b"forwarded" => once(&mut self.forwarded),
            b"traceparent" => once(&mut self.traceparent),
            b"x-forwarded-network" => once(&mut self.network),
            // RFC 9113 §8.2.2.
            b"connection" | b"keep-alive" | b"proxy-connection" | b"transfer-encoding" | b"upgrade" => {
                self.malformed = true;
            }
            b"te" => self.malformed |= value != b"trailers",
            _ => {}
        }
    }

    /// Whether the fields together are more than we take.
    pub(super) const fn is_too_large(&self) -> bool {
        self.size > self.most
    }

    fn baggage(&mut self) -> Option<BaggageHeader> {
        let joined = self.baggage.take()?;
        HeaderValue::from_maybe_shared(Bytes::from(joined)).ok().map(BaggageHeader)
    }

    /// What a server is asked for; `None` for what is no request at all.
    pub(super) fn into_request(mut self) -> Option<Result<ConnectRequest, RequestError>> {
        let method = Method::from_bytes(&self.method.take()?).ok()?;
        if self.malformed || self.status.is_some() {
            return None;
        }
        // RFC 9113 §8.3.1 and §8.5.
        if self.target != [method != Method::CONNECT; 2] {
            return None;
        }
        let authority = match self.authority.take() {
            Some(text) => Some(http::uri::Authority::try_from(&*text).ok()?),
            None => None,
        };
        if method != Method::CONNECT {
            return Some(Err(RequestError::Method(method)));
        }
        let Some(authority) = authority else { return Some(Err(RequestError::NoAuthority)) };
        let authority = match authority.as_str().parse() {
            Ok(authority) => authority,
            Err(error) => return Some(Err(RequestError::Authority(error))),
        };
        let visible = |field: Option<&[u8]>| -> Option<String> {
            let bytes = field?;
            let shown = bytes.iter().all(|b| *b == b'\t' || (0x20..0x7f).contains(b));
            shown.then(|| String::from_utf8_lossy(bytes).into_owned())
        };
        Some(Ok(ConnectRequest {
            authority,
            baggage: self.baggage(),
            forwarded: visible(self.forwarded.as_deref()).and_then(|t| Forwarded::parse(&t)),
            traceparent: visible(self.traceparent.as_deref()).and_then(|t| t.parse().ok()),
            network: visible(self.network.as_deref()).filter(|n| !n.is_empty()).map(Into::into),
        }))
    }

    /// What a client is answered; `None` for what is no answer at all.
    pub(super) fn into_answer(mut self) -> Option<Answer> {
        let pseudo = self.method.is_some() || self.authority.is_some() || self.target != [false; 2];
        if self.malformed || pseudo || self.is_too_large() {
            return None;
        }
        let status = self.status.filter(|s| (100..600).contains(s))?;
        Some(Answer { status, baggage: self.baggage() })
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
            } else if key.trim().eq_ignore_ascii_case("host") && is_host(value) {
                forwarded.host = Some(value.into());
            }
        }
        (forwarded.client.is_some() || forwarded.host.is_some()).then_some(forwarded)
    }
}

/// Whether this can be a host with or without a port, RFC 3986 §3.2: what cannot is not passed on to others.
fn is_host(value: &str) -> bool {
    let is_of_host = |b: u8| b.is_ascii_alphanumeric() || b"-._~%!$&'()*+:[]".contains(&b);
    !value.is_empty() && value.bytes().all(is_of_host)
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

    /// A new one, for a connection of an application that has a name: the low half of its trace id.
    #[must_use]
    pub fn of(connection: ConnectionId) -> Self {
        if connection.is_none() {
            return Self::random();
        }
        let high = u128::from(fastrand::u64(1..)) << 64;
        Self { trace: high | u128::from(connection.0), span: fastrand::u64(1..) }
    }

    /// The name of the connection that the sender gave it.
    #[must_use]
    pub fn connection(&self) -> ConnectionId {
        #[allow(clippy::cast_possible_truncation, reason = "the low half")]
        ConnectionId(self.trace as u64)
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
