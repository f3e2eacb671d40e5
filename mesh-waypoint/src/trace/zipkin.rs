//! Spans as Zipkin's JSON, version 2.

use bytes::Bytes;
use http::{Request, header};
use mesh_core::xds::proto::l7;
use serde_json::Value;

use super::export::Reply;
use super::span::{Service, Span};

/// Where Zipkin takes spans, unless the provider says otherwise.
const PATH: &str = "/api/v2/spans";

/// The request that exports spans.
///
/// # Errors
/// The provider's path cannot be written.
pub(super) fn request(
    host: &str,
    zipkin: &l7::tracer::Zipkin,
    service: &Service,
    spans: &[Span],
) -> Result<Request<Bytes>, http::Error> {
    let spans: Vec<Value> = spans.iter().map(|span| span.zipkin(&service.name)).collect();
    let body = Bytes::from(Value::from(spans).to_string());
    let path = if zipkin.path.is_empty() { PATH } else { &zipkin.path };
    Request::post(format!("http://{host}{path}"))
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::CONTENT_LENGTH, body.len())
        .header(header::USER_AGENT, concat!("undermesh/", env!("CARGO_PKG_VERSION")))
        .body(body)
}

/// Whether the collector took them.
///
/// # Errors
/// Why not.
pub(super) fn check(reply: &Reply) -> Result<(), String> {
    if reply.status.is_success() { Ok(()) } else { Err(format!("answered {}", reply.status)) }
}
