//! What a proxy takes from a message and adds to it.

use std::fmt::Write as _;
use std::net::IpAddr;

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{StatusCode, Uri, Version};

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
/// Who generated it: whoever came first.
pub(crate) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The client's scheme.
pub(super) const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// Addresses before ours.
pub(crate) const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
/// The client's certificate.
pub(super) const X_FORWARDED_CLIENT_CERT: HeaderName = HeaderName::from_static("x-forwarded-client-cert");
/// Which try this is, from 1.
pub(super) const X_ATTEMPT_COUNT: HeaderName = HeaderName::from_static("x-envoy-attempt-count");
/// Milliseconds until the endpoint answered.
pub(super) const X_UPSTREAM_SERVICE_TIME: HeaderName =
    HeaderName::from_static("x-envoy-upstream-service-time");
/// Milliseconds that a try may take.
pub(super) const X_EXPECTED_TIMEOUT: HeaderName = HeaderName::from_static("x-envoy-expected-rq-timeout-ms");
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// Takes away what is meant for this hop alone (RFC 9110 §7.6.1). An upgrade that is asked for is gone with it; whoever
/// carries it on puts it back.
pub(super) fn strip_hop_by_hop(headers: &mut HeaderMap) {
    if !headers.keys().any(is_hop_by_hop) {
        return;
    }
    if headers.contains_key(header::CONNECTION) {
        let named: Vec<HeaderName> = headers
            .get_all(header::CONNECTION)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|text| text.split(',').map(str::trim))
            // What connections themselves are told names no header worth a look.
            .filter(|name| !name.eq_ignore_ascii_case("keep-alive") && !name.eq_ignore_ascii_case("close"))
            .filter_map(|name| HeaderName::try_from(name).ok())
            // Nobody may have the message's own address or length taken away.
            .filter(|name| *name != header::HOST && *name != header::CONTENT_LENGTH)
            .collect();
        for name in named {
            if name != header::TE {
                headers.remove(name);
            }
        }
        headers.remove(header::CONNECTION);
    }
    for name in [&KEEP_ALIVE, &PROXY_CONNECTION, &HTTP2_SETTINGS] {
        headers.remove(name);
    }
    headers.remove(header::TRANSFER_ENCODING);
    headers.remove(header::UPGRADE);
    // `TE: trailers` goes on: gRPC asks for it, and we pass trailers on.
    if let Some(te) = headers.remove(header::TE)
        && te.to_str().is_ok_and(|te| te.split(',').any(|t| t.trim().eq_ignore_ascii_case("trailers")))
    {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
    }
}

/// Whether a header says something to this hop alone.
fn is_hop_by_hop(name: &HeaderName) -> bool {
    *name == header::CONNECTION
        || *name == header::TRANSFER_ENCODING
        || *name == header::UPGRADE
        || *name == header::TE
        || *name == KEEP_ALIVE
        || *name == PROXY_CONNECTION
        || *name == HTTP2_SETTINGS
}

/// Adds the client's address to those that the request says it has come by.
pub(super) fn append_forwarded_for(headers: &mut HeaderMap, client: IpAddr) {
    let mut text = String::with_capacity(40);
    let earlier = headers.get_all(X_FORWARDED_FOR).iter().filter_map(|value| value.to_str().ok());
    for value in earlier.filter(|value| !value.is_empty()) {
        text.push_str(value);
        text.push_str(", ");
    }
    let _ = write!(text, "{client}");
    if let Ok(value) = HeaderValue::try_from(text) {
        headers.insert(X_FORWARDED_FOR, value);
    }
}

/// The protocol that a request asks to switch to.
pub(super) fn upgrade_wanted(headers: &HeaderMap, version: Version) -> Option<HeaderValue> {
    if version != Version::HTTP_11 {
        return None;
    }
    let mut connection = headers.get_all(header::CONNECTION).iter().filter_map(|v| v.to_str().ok());
    let asked = connection.any(|v| v.split(',').any(|t| t.trim().eq_ignore_ascii_case("upgrade")));
    let to = headers.get(header::UPGRADE).filter(|_| asked)?;
    // To HTTP/2 nobody upgrades any more (RFC 9113 §3.1); the request goes on as it is.
    (!to.to_str().is_ok_and(|to| to.eq_ignore_ascii_case("h2c"))).then(|| to.clone())
}

/// Whether a request is gRPC, by its content type.
pub(crate) fn is_grpc(headers: &HeaderMap) -> bool {
    let value = headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    let rest = value.strip_prefix(b"application/grpc");
    rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
}

/// The gRPC status of an answer or its trailers.
pub(crate) fn grpc_status(headers: &HeaderMap) -> Option<u16> {
    headers.get(GRPC_STATUS)?.to_str().ok()?.parse().ok()
}

/// How gRPC says an HTTP status (gRPC's `http-grpc-status-mapping`, as Envoy answers).
pub(super) const fn grpc_of(status: StatusCode) -> u16 {
    match status.as_u16() {
        200 => 0,
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502 | 503 | 504 => 14,
        _ => 2,
    }
}

/// Writes an answer of our own as gRPC.
pub(super) fn put_grpc(headers: &mut HeaderMap, status: u16, message: &str) {
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(GRPC_STATUS, HeaderValue::from(status));
    // Percent-encoded, as gRPC's specification wants it.
    let mut encoded = String::with_capacity(message.len());
    for byte in message.bytes() {
        if (b' '..=b'~').contains(&byte) && byte != b'%' {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    if let Ok(value) = HeaderValue::from_str(&encoded)
        && !encoded.is_empty()
    {
        headers.insert(GRPC_MESSAGE, value);
    }
}

/// A random UUID (version 4), in text.
pub(super) fn request_id() -> HeaderValue {
    let bits = fastrand::u128(..);
    let bits = bits & !(0xf << 76) & !(0x3 << 62) | (0x4 << 76) | (0x2 << 62);
    let mut text = [b'-'; 36];
    let places = (0..text.len()).filter(|at| !matches!(at, 8 | 13 | 18 | 23));
    for (nth, at) in places.enumerate() {
        text[at] = b"0123456789abcdef"[(bits >> (124 - 4 * nth)) as usize & 0xf];
    }
    HeaderValue::from_bytes(&text).unwrap_or(HeaderValue::from_static("0"))
}

/// The request's target as a connection of HTTP/1 (origin form) or HTTP/2 (with scheme and authority) wants it.
pub(super) fn target(path: PathAndQuery, authority: Option<Authority>, http2: bool) -> Uri {
    let mut parts = http::uri::Parts::default();
    if http2 && let Some(authority) = authority {
        parts.scheme = Some(Scheme::HTTP);
        parts.authority = Some(authority);
    }
    parts.path_and_query = Some(path);
    Uri::from_parts(parts).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        let pair = |(name, value): &(&str, &str)| {
            (HeaderName::try_from(*name).unwrap(), HeaderValue::from_str(value).unwrap())
        };
        pairs.iter().map(pair).collect()
    }

    #[test]
    fn what_is_for_one_hop_goes_no_further() {
        let mut got = headers(&[
            ("connection", "close, X-Mine"),
            ("connection", "keep-alive"),
            ("x-mine", "1"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "keep-alive"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("te", "gzip, trailers"),
            ("trailer", "x-sum"),
            ("x-theirs", "2"),
        ]);
        strip_hop_by_hop(&mut got);
        assert_eq!(got, headers(&[("te", "trailers"), ("trailer", "x-sum"), ("x-theirs", "2")]));
    }

    #[test]
    fn a_connection_header_cannot_take_host_or_length_away() {
        let mut got =
            headers(&[("connection", "host, content-length"), ("host", "a"), ("content-length", "3")]);
        strip_hop_by_hop(&mut got);
        assert_eq!(got, headers(&[("host", "a"), ("content-length", "3")]));
        let mut got = headers(&[("te", "gzip")]);
        strip_hop_by_hop(&mut got);
        assert!(got.is_empty());
    }

    #[test]
    fn a_clients_address_follows_those_that_were_there() {
        let mut got = headers(&[("x-forwarded-for", "10.0.0.1"), ("x-forwarded-for", "10.0.0.2")]);
        append_forwarded_for(&mut got, "192.0.2.9".parse().unwrap());
        assert_eq!(got, headers(&[("x-forwarded-for", "10.0.0.1, 10.0.0.2, 192.0.2.9")]));
        let mut none = HeaderMap::new();
        append_forwarded_for(&mut none, "2001:db8::1".parse().unwrap());
        assert_eq!(none, headers(&[("x-forwarded-for", "2001:db8::1")]));
    }

    #[test]
    fn an_upgrade_needs_both_headers_and_http_1_1() {
        let asked = headers(&[("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")]);
        assert_eq!(upgrade_wanted(&asked, Version::HTTP_11).unwrap(), "websocket");
        assert_eq!(upgrade_wanted(&asked, Version::HTTP_10), None);
        assert_eq!(upgrade_wanted(&headers(&[("upgrade", "websocket")]), Version::HTTP_11), None);
        let h2c = headers(&[("connection", "upgrade"), ("upgrade", "h2c")]);
        assert_eq!(upgrade_wanted(&h2c, Version::HTTP_11), None);
    }

    #[test]
    fn grpc_is_known_by_its_type_and_spoken_in_its_words() {
        for (value, is) in [
            ("application/grpc", true),
            ("application/grpc+proto", true),
            ("application/grpc;x", true),
            ("application/grpc-web", false),
            ("text/plain", false),
        ] {
            assert_eq!(is_grpc(&headers(&[("content-type", value)])), is, "{value}");
        }
        let mut answer = HeaderMap::new();
        put_grpc(&mut answer, grpc_of(StatusCode::SERVICE_UNAVAILABLE), "no\n%");
        assert_eq!(grpc_status(&answer), Some(14));
        assert_eq!(answer["grpc-message"], "no%0A%25");
    }

    #[test]
    fn request_ids_are_random_uuids() {
        let (one, other) = (request_id(), request_id());
        assert_ne!(one, other);
        let text = one.to_str().unwrap();
        assert_eq!(text.len(), 36);
        assert_eq!(&text[14..15], "4");
        assert!("89ab".contains(&text[19..20]), "{text}");
    }
}
