//! The head of a request while it is decided on, and what an endpoint gets of it.

use std::net::IpAddr;

use base64::Engine as _;
use http::header::{self, HeaderValue};
use http::request::Parts;
use http::uri::{Authority, PathAndQuery};
use http::{Method, Request, Uri, Version};
use hyper::ext::Protocol;
use serde_json::{Map, Value};

use super::body::RequestBody;
use super::headers;
use super::http::Downstream;
use super::refused::Refused;
use crate::request::Head;
use crate::telemetry::Exchange;

/// A protocol that both sides may switch to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Switch {
    /// An upgrade.
    Upgrade(HeaderValue),
    /// A tunnel.
    Connect,
}

/// Who has sent a request to a gateway.
#[derive(Debug, Clone, Copy)]
pub(super) struct Outside<'a> {
    pub(super) client: IpAddr,
    /// Whether clients are proxies that may be trusted in what they say of theirs.
    pub(super) is_proxy: bool,
    /// What there is to tell of its certificate.
    pub(super) certificate: Option<&'a HeaderValue>,
}

/// A request's head.
#[derive(Debug)]
pub(super) struct Message {
    /// As it goes on; hop-by-hop headers are gone.
    pub(super) head: Parts,
    /// The host, as the client wrote it.
    pub(super) authority: HeaderValue,
    /// What the client wants to switch to.
    pub(super) switch: Option<Switch>,
    scheme: &'static str,
}

impl Message {
    /// Takes the head of a client's request. A gateway adds the address of its client, and knows what that spoke:
    /// `scheme`.
    ///
    /// # Errors
    /// It does not name one host (RFC 9112 §3.2).
    pub(super) fn new(
        mut head: Parts,
        scheme: &'static str,
        outside: Option<Outside<'_>>,
        exchange: &mut Exchange,
    ) -> Result<Self, Box<Refused>> {
        let authority = authority(&head)?;
        let switch = if head.method == Method::CONNECT {
            Some(Switch::Connect)
        } else {
            headers::upgrade_wanted(&head.headers, head.version).map(Switch::Upgrade)
        };
        let switch = extended_connect(&mut head).or(switch);
        headers::strip_hop_by_hop(&mut head.headers);
        let told = outside.is_none_or(|outside| outside.is_proxy);
        if !(told && head.headers.contains_key(headers::X_FORWARDED_PROTO)) {
            head.headers.insert(headers::X_FORWARDED_PROTO, HeaderValue::from_static(scheme));
        }
        if let Some(outside) = outside {
            headers::append_forwarded_for(&mut head.headers, outside.client);
            // Whatever a client says of certificates itself, nobody has checked (Envoy: SANITIZE_SET).
            head.headers.remove(headers::X_FORWARDED_CLIENT_CERT);
            if let Some(certificate) = outside.certificate {
                head.headers.insert(headers::X_FORWARDED_CLIENT_CERT, certificate.clone());
            }
        }
        if !head.headers.contains_key(headers::X_REQUEST_ID) {
            let id = headers::request_id();
            exchange.log(|line| line.request_id = id.to_str().unwrap_or_default().to_owned());
            head.headers.insert(headers::X_REQUEST_ID, id);
        }
        Ok(Self { head, authority, switch, scheme })
    }

    /// The path, without query.
    pub(super) fn path(&self) -> &str {
        if self.head.method == Method::CONNECT { "" } else { self.head.uri.path() }
    }

    /// The query, without `?`.
    pub(super) fn query(&self) -> Option<&str> {
        self.head.uri.query()
    }

    /// Gives it another path and query.
    ///
    /// # Errors
    /// They do not make a target.
    pub(super) fn set_target(&mut self, path: &str, query: Option<&str>) -> Result<(), Box<Refused>> {
        let text = match query.filter(|query| !query.is_empty()) {
            Some(query) => format!("{path}?{query}"),
            None => path.to_owned(),
        };
        let target = PathAndQuery::try_from(text);
        let target =
            target.map_err(|error| Refused::bad_request("invalid_path").because(error.to_string()))?;
        self.put_target(target);
        Ok(())
    }

    /// As [`Self::set_target`].
    pub(super) fn put_target(&mut self, target: PathAndQuery) {
        let mut parts = std::mem::take(&mut self.head.uri).into_parts();
        parts.path_and_query = Some(target);
        self.head.uri = Uri::from_parts(parts).unwrap_or_default();
    }

    /// What rules and policies look at.
    pub(super) fn as_head<'a>(
        &'a self,
        downstream: &'a Downstream,
        claims: Option<&'a Map<String, Value>>,
    ) -> Head<'a> {
        Head {
            source: &downstream.source,
            destination: downstream.destination,
            addressed: &downstream.addressed,
            method: &self.head.method,
            scheme: self.scheme,
            authority: self.authority.to_str().unwrap_or_default(),
            path: self.path(),
            query: self.query(),
            headers: &self.head.headers,
            claims,
        }
    }

    /// The request as an endpoint gets it, on try number `attempt`.
    pub(super) fn outgoing(&self, http2: bool, attempt: u32, body: RequestBody) -> Request<RequestBody> {
        let mut request = Request::new(body);
        *request.method_mut() = self.head.method.clone();
        *request.headers_mut() = self.head.headers.clone();
        let headers = request.headers_mut();
        let count = if attempt == 1 { HeaderValue::from_static("1") } else { HeaderValue::from(attempt) };
        headers.insert(headers::X_ATTEMPT_COUNT, count);
        if http2 {
            headers.remove(header::HOST);
        } else {
            headers.insert(header::HOST, self.authority.clone());
        }
        if let Some(Switch::Upgrade(to)) = &self.switch {
            headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
            headers.insert(header::UPGRADE, to.clone());
        }
        let path = self.head.uri.path_and_query().cloned();
        let path = path.unwrap_or_else(|| PathAndQuery::from_static("/"));
        *request.uri_mut() = if self.head.method == Method::CONNECT {
            self.head.uri.clone()
        } else {
            let named = || self.authority.to_str().ok()?.parse::<Authority>().ok();
            headers::target(path, if http2 { named() } else { None }, http2)
        };
        *request.version_mut() = if http2 { Version::HTTP_2 } else { Version::HTTP_11 };
        request
    }
}

/// Sends a request for somebody else, over HTTP/1 or HTTP/2.
pub(super) fn readdress(request: &mut Request<RequestBody>, authority: &HeaderValue, http2: bool) {
    let path = request.uri().path_and_query().cloned();
    let path = path.unwrap_or_else(|| PathAndQuery::from_static("/"));
    let named = authority.to_str().ok().and_then(|text| text.parse::<Authority>().ok());
    *request.uri_mut() = headers::target(path, named, http2);
    *request.version_mut() = if http2 { Version::HTTP_2 } else { Version::HTTP_11 };
    let headers = request.headers_mut();
    // Whoever copies does not switch protocols.
    headers.remove(header::CONNECTION);
    headers.remove(header::UPGRADE);
    if http2 {
        headers.remove(header::HOST);
    } else {
        headers.insert(header::HOST, authority.clone());
    }
}

/// A CONNECT of HTTP/2 that names a protocol (RFC 8441) means what an upgrade of HTTP/1.1 means, and goes on as one: what
/// rules and policies see is a GET.
fn extended_connect(head: &mut Parts) -> Option<Switch> {
    let protocol = head.extensions.get::<Protocol>().filter(|_| head.method == Method::CONNECT)?;
    let to = HeaderValue::from_str(protocol.as_str()).ok()?;
    head.method = Method::GET;
    if to == "websocket" {
        // HTTP/2 has none; an endpoint of HTTP/1.1 demands it (RFC 6455, section 4.1).
        let key = base64::engine::general_purpose::STANDARD.encode(fastrand::u128(..).to_be_bytes());
        head.headers.insert(header::SEC_WEBSOCKET_KEY, HeaderValue::try_from(key).ok()?);
    }
    Some(Switch::Upgrade(to))
}

/// The host that a request names; HTTP/1.1 must name one, and only one.
fn authority(head: &Parts) -> Result<HeaderValue, Box<Refused>> {
    let mut hosts = head.headers.get_all(header::HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(Refused::bad_request("duplicate_host"));
    }
    let named = head.uri.authority().map(|authority| HeaderValue::from_str(authority.as_str()));
    let is_host = |host: &HeaderValue| host.to_str().is_ok_and(|text| text.parse::<Authority>().is_ok());
    match (named, host) {
        (Some(Ok(authority)), _) => Ok(authority),
        (Some(Err(_)), _) => Err(Refused::bad_request("invalid_authority")),
        (None, Some(host)) if host.is_empty() || is_host(host) => Ok(host.clone()),
        (None, Some(_)) => Err(Refused::bad_request("invalid_authority")),
        (None, None) if head.version == Version::HTTP_11 => Err(Refused::bad_request("missing_host_header")),
        (None, None) => Ok(HeaderValue::from_static("")),
    }
}
