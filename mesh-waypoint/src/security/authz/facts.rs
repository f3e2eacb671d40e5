//! What authorization knows of a request or stream.

use std::borrow::Cow;
use std::cell::OnceCell;
use std::net::{IpAddr, SocketAddr};

use http::HeaderMap;
use serde_json::{Map, Value};

use super::Stream;
use crate::request::{Addressed, Head, Source};
use crate::security::path::with_equal_escapes;

/// What is known, with derived values made at most once and only if a rule needs them.
pub(super) struct Facts<'a> {
    pub(super) source: &'a Source,
    pub(super) destination: SocketAddr,
    /// Service port, or the port of the workload that is addressed.
    pub(super) port: u16,
    pub(super) sni: &'a str,
    /// None for streams.
    pub(super) http: Option<&'a Head<'a>>,
    pub(super) claims: Claims<'a>,
    trusted_hops: usize,
    principal: OnceCell<String>,
    remote: OnceCell<Option<IpAddr>>,
    request_principal: OnceCell<Option<String>>,
    path: OnceCell<Cow<'a, str>>,
}

/// What the request's token says.
#[derive(Debug, Clone, Copy)]
pub(super) enum Claims<'a> {
    /// Not verified yet, or not a request.
    Unknown,
    /// There was no token.
    None,
    Known(&'a Map<String, Value>),
}

impl<'a> Facts<'a> {
    pub(super) fn of_request(head: &'a Head<'a>, trusted_hops: usize) -> Self {
        let claims = head.claims.map_or(Claims::None, Claims::Known);
        // TLS of the application would hide the request, so a request has no server name.
        Self::new(head.source, head.destination, head.addressed, "", Some(head), claims, trusted_hops)
    }

    pub(super) fn before_tokens(head: &'a Head<'a>, trusted_hops: usize) -> Self {
        Self { claims: Claims::Unknown, ..Self::of_request(head, trusted_hops) }
    }

    pub(super) fn of_stream(stream: &'a Stream<'a>) -> Self {
        Self::new(stream.source, stream.destination, stream.addressed, stream.sni, None, Claims::Unknown, 0)
    }

    fn new(
        source: &'a Source,
        destination: SocketAddr,
        addressed: &'a Addressed,
        sni: &'a str,
        http: Option<&'a Head<'a>>,
        claims: Claims<'a>,
        trusted_hops: usize,
    ) -> Self {
        Self {
            source,
            destination,
            port: addressed.port(),
            sni,
            http,
            claims,
            trusted_hops,
            principal: OnceCell::new(),
            remote: OnceCell::new(),
            request_principal: OnceCell::new(),
            path: OnceCell::new(),
        }
    }

    /// The identity of the certificate without `spiffe://`.
    pub(super) fn principal(&self) -> Option<&str> {
        let identity = self.source.identity.as_ref()?;
        Some(self.principal.get_or_init(|| identity.principal()))
    }

    /// `iss/sub` of the token; absent without either.
    pub(super) fn request_principal(&self) -> Option<&str> {
        let Claims::Known(claims) = self.claims else { return None };
        let principal = || {
            let text = |name| claims.get(name).and_then(Value::as_str).filter(|text| !text.is_empty());
            Some(format!("{}/{}", text("iss")?, text("sub")?))
        };
        self.request_principal.get_or_init(principal).as_deref()
    }

    /// The path as it is compared.
    pub(super) fn path(&self, head: &Head<'a>) -> &str {
        self.path.get_or_init(|| with_equal_escapes(head.path))
    }

    /// The address of the client in front of trusted proxies; none when it cannot be read.
    pub(super) fn remote_ip(&self) -> Option<IpAddr> {
        let peer = self.source.address.ip().to_canonical();
        let Some(head) = self.http else { return Some(peer) };
        *self.remote.get_or_init(|| forwarded_for(head.headers, self.trusted_hops, peer))
    }
}

/// Envoy without `use_remote_address`: the address at the given place from the right of `X-Forwarded-For`; the peer where
/// there are fewer. Where Envoy takes the peer for an address that cannot be read, this says so, as a client may write
/// what it likes there.
fn forwarded_for(headers: &HeaderMap, trusted_hops: usize, peer: IpAddr) -> Option<IpAddr> {
    let mut lines: Vec<&[u8]> =
        headers.get_all("x-forwarded-for").iter().map(http::HeaderValue::as_bytes).collect();
    lines.reverse();
    let mut addresses = lines.iter().flat_map(|line| line.rsplit(|b| *b == b','));
    match addresses.nth(trusted_hops) {
        None => Some(peer),
        Some(text) => {
            let address: IpAddr = std::str::from_utf8(text).ok()?.trim().parse().ok()?;
            Some(address.to_canonical())
        }
    }
}
