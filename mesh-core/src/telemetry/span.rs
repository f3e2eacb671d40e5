//! Finished spans, as every exporter gets them, and what they are on the wire: OTLP's message, Zipkin's JSON.

use std::net::SocketAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use crate::xds::proto::otlp::{self as wire, any_value, span, status};

/// A span's place in its trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The trace; not 0.
    pub trace: u128,
    /// The span; not 0.
    pub span: u64,
    /// The span above it.
    pub parent: Option<u64>,
    /// B3's debug flag.
    pub debug: bool,
}

/// Something that began and ended.
#[derive(Debug, Clone)]
pub struct Span {
    /// Its place in the trace.
    pub place: Place,
    /// `tracestate` of the client.
    pub state: String,
    /// What it was.
    pub name: String,
    /// When it began.
    pub start: SystemTime,
    /// When it ended.
    pub end: SystemTime,
    /// The side that asks, rather than the one that is asked.
    pub client: bool,
    /// It failed.
    pub error: bool,
    /// Who asked, or who was asked.
    pub peer: SocketAddr,
    /// Tags in their order.
    pub tags: Vec<(String, String)>,
}

impl Span {
    /// Cuts tags that are longer than `longest` bytes, at a character's end.
    pub fn cut_tags(&mut self, longest: usize) {
        for (_, value) in &mut self.tags {
            if value.len() > longest {
                let end = (0..=longest).rev().find(|at| value.is_char_boundary(*at)).unwrap_or(0);
                value.truncate(end);
            }
        }
    }

    /// As OTLP has it.
    #[must_use]
    pub fn otlp(&self) -> wire::Span {
        let code = if self.error { status::Code::Error } else { status::Code::Unset };
        let kind = if self.client { span::Kind::Client } else { span::Kind::Server };
        let place = &self.place;
        wire::Span {
            trace_id: place.trace.to_be_bytes().to_vec(),
            span_id: place.span.to_be_bytes().to_vec(),
            trace_state: self.state.clone(),
            parent_span_id: place.parent.map(|parent| parent.to_be_bytes().to_vec()).unwrap_or_default(),
            name: self.name.clone(),
            kind: kind.into(),
            start_time_unix_nano: nanos(self.start),
            end_time_unix_nano: nanos(self.end),
            attributes: pairs(&self.tags),
            status: Some(wire::Status { message: String::new(), code: code.into() }),
        }
    }

    /// As Zipkin's JSON has it, version 2.
    #[must_use]
    pub fn zipkin(&self, service: &str) -> Value {
        let micros = |at: SystemTime| nanos(at) / 1000;
        let (start, end) = (micros(self.start), micros(self.end));
        let tags: Map<String, Value> =
            self.tags.iter().map(|(key, value)| (key.clone(), value.as_str().into())).collect();
        let address = self.peer.ip();
        let ip = if address.is_ipv4() { "ipv4" } else { "ipv6" };
        let mut value = json!({
            "traceId": format!("{:032x}", self.place.trace),
            "id": format!("{:016x}", self.place.span),
            "kind": if self.client { "CLIENT" } else { "SERVER" },
            "name": self.name,
            "timestamp": start,
            // Zero would be none.
            "duration": end.saturating_sub(start).max(1),
            "localEndpoint": {"serviceName": service},
            "remoteEndpoint": {ip: address.to_string(), "port": self.peer.port()},
            "tags": tags,
        });
        if let Some(parent) = self.place.parent {
            value["parentId"] = format!("{parent:016x}").into();
        }
        if self.place.debug {
            value["debug"] = true.into();
        }
        value
    }
}

/// Who spans are of.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct SpanService {
    /// `name.namespace`.
    pub name: String,
    /// Of the pod.
    pub instance: String,
    /// Its namespace.
    pub namespace: String,
}

impl SpanService {
    /// As attributes of OTLP's resource.
    #[must_use]
    pub fn resource(&self) -> Vec<wire::KeyValue> {
        pairs(&[
            ("service.name".to_owned(), self.name.clone()),
            ("service.namespace".to_owned(), self.namespace.clone()),
            ("service.instance.id".to_owned(), self.instance.clone()),
        ])
    }

    /// Spans of it, as OTLP carries them.
    #[must_use]
    pub fn spans(&self, spans: impl IntoIterator<Item = wire::Span>) -> wire::ResourceSpans {
        let spans = spans.into_iter().collect();
        wire::ResourceSpans {
            resource: Some(wire::Resource { attributes: self.resource() }),
            scope_spans: vec![wire::ScopeSpans { scope: Some(span_scope()), spans }],
        }
    }
}

/// Who writes spans and lines.
#[must_use]
pub fn span_scope() -> wire::Scope {
    wire::Scope { name: "undermesh".into(), version: env!("CARGO_PKG_VERSION").into() }
}

/// A moment as OTLP has it.
#[must_use]
pub fn nanos(at: SystemTime) -> u64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// A text as OTLP has it.
#[must_use]
pub fn otlp_text(value: &str) -> wire::AnyValue {
    wire::AnyValue { value: Some(any_value::Value::StringValue(value.to_owned())) }
}

/// Texts by name as OTLP has them.
#[must_use]
pub fn pairs(of: &[(String, String)]) -> Vec<wire::KeyValue> {
    let pair =
        |(key, value): &(String, String)| wire::KeyValue { key: key.clone(), value: Some(otlp_text(value)) };
    of.iter().map(pair).collect()
}

/// The body of a request of OTLP over HTTP that carries spans.
#[must_use]
pub fn otlp_body(resource_spans: Vec<wire::ResourceSpans>) -> Vec<u8> {
    prost::Message::encode_to_vec(&wire::ExportTraceServiceRequest { resource_spans })
}
