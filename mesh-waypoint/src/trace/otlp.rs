//! Spans and lines as OTLP: the messages, and the requests that carry them over gRPC and HTTP.

use bytes::{BufMut as _, Bytes, BytesMut};
use http::{HeaderMap, Request, StatusCode, Version, header};
use mesh_core::telemetry::{nanos, otlp_text, pairs, span_scope};
use mesh_core::xds::proto::l7;
use mesh_core::xds::proto::otlp as wire;
use prost::Message as _;

use super::export::Reply;
use super::line::Line;
use super::span::{Service, Span};

const PATH: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
const LOGS_PATH: &str = "/opentelemetry.proto.collector.logs.v1.LogsService/Export";
/// Before a message of gRPC: whether it is compressed, and its length.
const PREFIX: usize = 5;

/// The request that exports spans.
///
/// # Errors
/// The provider's path or headers cannot be written.
pub(super) fn request(
    host: &str,
    otlp: &l7::tracer::Otlp,
    service: &Service,
    spans: &[Span],
) -> Result<Request<Bytes>, http::Error> {
    carry(host, otlp, PATH, &message(service, spans))
}

/// The request that exports lines of one log.
///
/// # Errors
/// The provider's path or headers cannot be written.
pub(super) fn log_request(
    host: &str,
    otlp: &l7::tracer::Otlp,
    service: &Service,
    lines: &[Line],
) -> Result<Request<Bytes>, http::Error> {
    carry(host, otlp, LOGS_PATH, &log_message(service, lines))
}

fn carry(
    host: &str,
    otlp: &l7::tracer::Otlp,
    method: &str,
    message: &impl prost::Message,
) -> Result<Request<Bytes>, http::Error> {
    let grpc = otlp.http_path.is_empty();
    let length = message.encoded_len();
    let mut body = BytesMut::with_capacity(PREFIX + length);
    if grpc {
        body.put_u8(0);
        body.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    }
    message.encode_raw(&mut body);
    let path = if grpc { method } else { &otlp.http_path };
    let kind = if grpc { "application/grpc" } else { "application/x-protobuf" };
    let mut request = Request::post(format!("http://{host}{path}"))
        .header(header::CONTENT_TYPE, kind)
        .header(header::USER_AGENT, concat!("undermesh/", env!("CARGO_PKG_VERSION")));
    request = if grpc {
        request.version(Version::HTTP_2).header(header::TE, "trailers")
    } else {
        request.header(header::CONTENT_LENGTH, body.len())
    };
    for header in &otlp.headers {
        request = request.header(&header.name, &header.value);
    }
    request.body(body.freeze())
}

/// Whether the collector took all spans.
///
/// # Errors
/// Why not.
pub(super) fn check(otlp: &l7::tracer::Otlp, reply: &Reply) -> Result<(), String> {
    let body = accepted(otlp, reply)?;
    let partial = wire::ExportTraceServiceResponse::decode(body).ok().and_then(|reply| reply.partial_success);
    match partial {
        Some(partial) if partial.rejected_spans > 0 => {
            Err(format!("refused {} spans: {}", partial.rejected_spans, partial.error_message))
        }
        _ => Ok(()),
    }
}

/// Whether the collector took all lines.
///
/// # Errors
/// Why not.
pub(super) fn check_log(otlp: &l7::tracer::Otlp, reply: &Reply) -> Result<(), String> {
    let body = accepted(otlp, reply)?;
    let partial = wire::ExportLogsServiceResponse::decode(body).ok().and_then(|reply| reply.partial_success);
    match partial {
        Some(partial) if partial.rejected_log_records > 0 => {
            Err(format!("refused {} lines: {}", partial.rejected_log_records, partial.error_message))
        }
        _ => Ok(()),
    }
}

/// The message of an answer that is not an error.
fn accepted<'a>(otlp: &l7::tracer::Otlp, reply: &'a Reply) -> Result<&'a [u8], String> {
    if reply.status != StatusCode::OK {
        return Err(format!("answered {}", reply.status));
    }
    if !otlp.http_path.is_empty() {
        return Ok(&reply.body);
    }
    let status = |headers: &HeaderMap| {
        let value = headers.get("grpc-status")?.to_str().ok()?.to_owned();
        let message = headers.get("grpc-message").and_then(|m| m.to_str().ok()).unwrap_or_default();
        Some((value, message.to_owned()))
    };
    match status(&reply.trailers).or_else(|| status(&reply.headers)) {
        Some((code, _)) if code == "0" => Ok(reply.body.get(PREFIX..).unwrap_or_default()),
        Some((code, message)) => Err(format!("answered with gRPC status {code} {message}")),
        None => Err("ended without a gRPC status".to_owned()),
    }
}

fn message(service: &Service, spans: &[Span]) -> wire::ExportTraceServiceRequest {
    wire::ExportTraceServiceRequest { resource_spans: vec![service.spans(spans.iter().map(Span::otlp))] }
}

/// The name of the log is an attribute of the resource, as Envoy has it.
fn log_message(service: &Service, lines: &[Line]) -> wire::ExportLogsServiceRequest {
    let mut attributes = service.resource();
    if let Some(line) = lines.first() {
        attributes.extend(pairs(&[("log_name".to_owned(), line.log.to_string())]));
    }
    let log_records = lines.iter().map(record).collect();
    wire::ExportLogsServiceRequest {
        resource_logs: vec![wire::ResourceLogs {
            resource: Some(wire::Resource { attributes }),
            scope_logs: vec![wire::ScopeLogs { scope: Some(span_scope()), log_records }],
        }],
    }
}

fn record(line: &Line) -> wire::LogRecord {
    wire::LogRecord {
        time_unix_nano: nanos(line.at),
        observed_time_unix_nano: nanos(std::time::SystemTime::now()),
        body: Some(otlp_text(&line.body)),
        attributes: pairs(&line.attributes),
        trace_id: line.trace.map(|trace| trace.to_be_bytes().to_vec()).unwrap_or_default(),
    }
}
