//! `envoy.service.auth.v3.Authorization/Check`.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, Request, StatusCode, Version, header};
use mesh_core::xds::proto::ext_authz as wire;
use mesh_core::xds::proto::l7;
use prost::Message;
use wire::attribute_context::{HttpRequest, Peer, Request as WireRequest};
use wire::header_value_option::AppendAction;

use super::{Allowed, Answer, Asked, Denied, HeaderChange, PARTIAL_BODY, Reply, header_of, name_of};

/// Before each message: whether it is compressed, and its length.
const PREFIX: usize = 5;

pub(super) fn request(
    service: &l7::ServiceRef,
    asked: &Asked<'_>,
    timeout: Duration,
) -> Result<Request<Bytes>, http::Error> {
    let message = wire::CheckRequest { attributes: Some(attributes(asked)) };
    let length = message.encoded_len();
    let mut body = BytesMut::with_capacity(PREFIX + length);
    body.put_u8(0);
    // A question is limited by what a request may have in headers and the provider wants of its body.
    body.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    message.encode_raw(&mut body);
    Request::post(format!(
        "http://{}:{}/envoy.service.auth.v3.Authorization/Check",
        service.hostname, service.port
    ))
    .version(Version::HTTP_2)
    .header(header::CONTENT_TYPE, "application/grpc")
    .header(header::TE, "trailers")
    .header(header::USER_AGENT, concat!("undermesh/", env!("CARGO_PKG_VERSION")))
    .header("grpc-timeout", format!("{}m", timeout.as_millis().min(99_999_999)))
    .body(body.freeze())
}

fn attributes(asked: &Asked<'_>) -> wire::AttributeContext {
    let head = asked.head;
    let principal = head.source.identity.as_ref().map(ToString::to_string).unwrap_or_default();
    wire::AttributeContext {
        source: Some(Peer { address: Some(address(head.source.address)), principal, ..Peer::default() }),
        destination: Some(Peer { address: Some(address(head.destination)), ..Peer::default() }),
        request: Some(WireRequest { time: Some(asked.time.into()), http: Some(http_request(asked)) }),
        context_extensions: Default::default(),
    }
}

fn address(address: SocketAddr) -> wire::Address {
    wire::Address {
        socket_address: Some(wire::SocketAddress {
            address: address.ip().to_canonical().to_string(),
            port_value: u32::from(address.port()),
        }),
    }
}

fn http_request(asked: &Asked<'_>) -> HttpRequest {
    let head = asked.head;
    let path = match head.query {
        Some(query) => format!("{}?{query}", head.path),
        None => head.path.to_owned(),
    };
    let text = |name: &str| {
        let value = head.headers.get(name).map(http::HeaderValue::as_bytes);
        String::from_utf8_lossy(value.unwrap_or_default()).into_owned()
    };
    let mut request = HttpRequest {
        id: text("x-request-id"),
        method: head.method.as_str().to_owned(),
        headers: Default::default(),
        host: head.authority.to_owned(),
        scheme: head.scheme.to_owned(),
        size: text("content-length").parse().unwrap_or(-1),
        protocol: asked.protocol.to_owned(),
        path,
        ..HttpRequest::default()
    };
    let pseudo = [
        (":authority", &request.host),
        (":method", &request.method),
        (":path", &request.path),
        (":scheme", &request.scheme),
    ];
    request.headers = pseudo.into_iter().map(|(name, value)| (name.to_owned(), value.clone())).collect();
    for name in head.headers.keys() {
        let lines: Vec<&[u8]> = head.headers.get_all(name).iter().map(http::HeaderValue::as_bytes).collect();
        let joined = String::from_utf8_lossy(&lines.join(&b',')).into_owned();
        request.headers.insert(name.as_str().to_owned(), joined);
    }
    if let Some(body) = asked.body {
        request.headers.insert(PARTIAL_BODY.as_str().to_owned(), body.partial.to_string());
        match std::str::from_utf8(&body.bytes) {
            Ok(text) => request.body = text.to_owned(),
            Err(_) => request.raw_body = body.bytes.to_vec(),
        }
    }
    request
}

pub(super) fn answer(_: &l7::Provider, reply: &Reply) -> Result<Answer, String> {
    if reply.status != StatusCode::OK {
        return Err(format!("answered {} instead of gRPC", reply.status));
    }
    let status = grpc_status(&reply.trailers).or_else(|| grpc_status(&reply.headers));
    match status.as_deref() {
        Some("0") => {}
        Some(status) => return Err(format!("answered with gRPC status {status}")),
        None => return Err("ended without a gRPC status".to_owned()),
    }
    let (prefix, rest) = reply.body.split_at_checked(PREFIX).ok_or("answered without a message")?;
    let [compressed, length @ ..] = prefix else { return Err("answered without a message".to_owned()) };
    if *compressed != 0 {
        return Err("answered with a compressed message, which was not asked for".to_owned());
    }
    let length = length.iter().fold(0, |length, b| length << 8 | usize::from(*b));
    if length != rest.len() {
        return Err(format!("answered with {} bytes instead of one message of {length}", rest.len()));
    }
    let message = wire::CheckResponse::decode(rest).map_err(|error| error.to_string())?;
    let code = message.status.as_ref().map_or(0, |status| status.code);
    match (code, message.http_response) {
        (0, Some(wire::check_response::HttpResponse::OkResponse(ok))) => Ok(Answer::Allow(allowed(&ok)?)),
        (0, None) => Ok(Answer::Allow(Allowed::default())),
        (0, Some(wire::check_response::HttpResponse::DeniedResponse(_))) => {
            Err("answered OK with a denial".to_owned())
        }
        (_, Some(wire::check_response::HttpResponse::DeniedResponse(denial))) => {
            Ok(Answer::Deny(denied(&denial)?))
        }
        (_, _) => Ok(Answer::Deny(denied(&wire::DeniedHttpResponse::default())?)),
    }
}

fn grpc_status(headers: &HeaderMap) -> Option<String> {
    headers.get("grpc-status").map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
}

fn allowed(ok: &wire::OkHttpResponse) -> Result<Allowed, String> {
    let mut headers: Vec<HeaderChange> = Vec::new();
    for name in &ok.headers_to_remove {
        headers.extend(name_of(name)?.map(HeaderChange::Remove));
    }
    for option in &ok.headers {
        headers.extend(change(option, HeaderChange::Set)?);
    }
    let mut response_headers = Vec::new();
    for option in &ok.response_headers_to_add {
        response_headers.extend(change(option, HeaderChange::Set)?);
    }
    let removed = ok.query_parameters_to_remove.iter().map(|name| (name.clone(), None));
    let set = ok.query_parameters_to_set.iter().map(|pair| (pair.key.clone(), Some(pair.value.clone())));
    Ok(Allowed { headers, query: removed.chain(set).collect(), response_headers })
}

/// The old `append` counts where it is given; without either the header is set, although the enumeration's zero says
/// otherwise (Envoy's documentation of these messages).
fn change(
    option: &wire::HeaderValueOption,
    default: fn(http::HeaderName, http::HeaderValue) -> HeaderChange,
) -> Result<Option<HeaderChange>, String> {
    let Some((name, value)) = value_of(option)? else { return Ok(None) };
    let action = AppendAction::try_from(option.append_action)
        .map_err(|error| format!("header {name}: append_action: {error}"))?;
    Ok(Some(match (option.append, action) {
        (Some(true), _) => HeaderChange::Append(name, value),
        (_, AppendAction::AddIfAbsent) => HeaderChange::AddIfAbsent(name, value),
        (_, AppendAction::OverwriteIfExists) => HeaderChange::OverwriteIfExists(name, value),
        (_, AppendAction::OverwriteIfExistsOrAdd) => HeaderChange::Set(name, value),
        (_, AppendAction::AppendIfExistsOrAdd) => default(name, value),
    }))
}

fn value_of(
    option: &wire::HeaderValueOption,
) -> Result<Option<(http::HeaderName, http::HeaderValue)>, String> {
    let Some(header) = &option.header else { return Ok(None) };
    let value = if header.raw_value.is_empty() { header.value.as_bytes() } else { &header.raw_value };
    header_of(&header.key, value)
}

fn denied(denial: &wire::DeniedHttpResponse) -> Result<Denied, String> {
    let code = denial.status.map_or(0, |status| status.code);
    let status = u16::try_from(code).ok().filter(|code| *code >= 200);
    let mut headers = Vec::new();
    for option in &denial.headers {
        headers.extend(value_of(option)?);
    }
    Ok(Denied {
        status: status.and_then(|code| StatusCode::from_u16(code).ok()).unwrap_or(StatusCode::FORBIDDEN),
        headers,
        body: Bytes::copy_from_slice(denial.body.as_bytes()),
        details: "ext_authz_denied",
    })
}
