//! The part of MeshConfig that says where spans, lines of the access log and metrics go.
//!
//! Field meaning: `istio.io/api` mesh/v1alpha1 MeshConfig, ProxyConfig.

use std::collections::BTreeMap;

use mesh_core::xds::proto::l7;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;

use super::Check;

/// Name of the tracer of `defaultConfig.tracing`, which has none of its own.
const PROXY_CONFIG: &str = "defaultConfig.tracing";
/// What Istio's own MeshConfig has without being asked.
const STANDARD_OUTPUT: &str = "/dev/stdout";

/// A header of requests that carry spans.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct SentHeader {
    name: String,
    value: Option<String>,
    env_name: Option<IgnoredAny>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct OtlpHttp {
    path: String,
    timeout: Option<String>,
    headers: Vec<SentHeader>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct OtlpGrpc {
    timeout: Option<String>,
    initial_metadata: Vec<SentHeader>,
}

/// `opentelemetry`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct OtlpText {
    service: String,
    port: i64,
    max_tag_length: Option<i64>,
    http: Option<OtlpHttp>,
    grpc: Option<OtlpGrpc>,
    resource_detectors: Option<IgnoredAny>,
    dynatrace_sampler: Option<IgnoredAny>,
}

#[derive(Debug, Default, PartialEq, Eq, Clone, Copy, Deserialize)]
enum ContextOption {
    #[default]
    #[serde(rename = "USE_B3")]
    B3,
    #[serde(rename = "USE_B3_WITH_W3C_PROPAGATION")]
    B3AndW3c,
}

/// `zipkin`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct ZipkinText {
    service: String,
    port: i64,
    max_tag_length: Option<i64>,
    #[serde(rename = "enable64bitTraceId")]
    short_ids: bool,
    path: String,
    trace_context_option: ContextOption,
    timeout: Option<String>,
    headers: Option<IgnoredAny>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct LayoutText {
    text: Option<String>,
    labels: Option<Value>,
}

/// `envoyFileAccessLog`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct FileLogText {
    path: String,
    log_format: Option<LayoutText>,
    omit_empty_values: Option<bool>,
}

/// `envoyOtelAls`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct OtlpLogText {
    service: String,
    port: i64,
    log_name: String,
    log_format: Option<LayoutText>,
}

/// `customTags` of spans, also those of Telemetry.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct TagText {
    literal: Option<LiteralText>,
    environment: Option<NamedText>,
    header: Option<NamedText>,
    formatter: Option<LiteralText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct LiteralText {
    value: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct NamedText {
    name: String,
    default_value: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct AddressText {
    address: String,
}

/// `defaultConfig.tracing`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct TracingText {
    zipkin: Option<AddressText>,
    lightstep: Option<IgnoredAny>,
    datadog: Option<IgnoredAny>,
    stackdriver: Option<IgnoredAny>,
    open_census_agent: Option<IgnoredAny>,
    custom_tags: BTreeMap<String, TagText>,
    max_path_tag_length: Option<i64>,
    sampling: Option<f64>,
    tls_settings: Option<IgnoredAny>,
    enable_istio_tags: Option<IgnoredAny>,
}

/// `defaultProviders`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct DefaultsText {
    tracing: Vec<String>,
    metrics: Vec<String>,
    access_logging: Vec<String>,
}

/// Takes what is used where no Telemetry names anything.
pub(super) fn defaults(text: DefaultsText, settings: &mut l7::Settings) {
    // Before what `enableTracing` may have put there: a named provider is meant more.
    settings.default_tracers.splice(..0, text.tracing);
    settings.default_metrics = text.metrics;
    settings.default_loggers = text.access_logging;
}

/// `enableTracing` uses the tracer of `defaultConfig.tracing`.
pub(super) fn enable(settings: &mut l7::Settings) {
    settings.default_tracers.push(PROXY_CONFIG.to_owned());
}

/// Reads `defaultConfig.tracing`.
pub(super) fn tracing(
    text: TracingText,
    settings: &mut l7::Settings,
    check: &mut Check<'_>,
    unsupported: &mut Vec<String>,
) {
    let at = |name: &str| format!("{PROXY_CONFIG}.{name}");
    for (name, set) in [
        ("lightstep", text.lightstep.is_some()),
        ("datadog", text.datadog.is_some()),
        ("stackdriver", text.stackdriver.is_some()),
        ("openCensusAgent", text.open_census_agent.is_some()),
        ("tlsSettings", text.tls_settings.is_some()),
        ("enableIstioTags", text.enable_istio_tags.is_some()),
    ] {
        if set {
            unsupported.push(at(name));
        }
    }
    settings.default_sampling = check.sampling(&at("sampling"), text.sampling);
    settings.default_tags = tags(text.custom_tags, &at("customTags"), check);
    let longest_tag = longest(text.max_path_tag_length, &at("maxPathTagLength"), check);
    if let Some(zipkin) = text.zipkin {
        let field = at("zipkin.address");
        let (host, port) = zipkin.address.rsplit_once(':').unwrap_or((&zipkin.address, ""));
        let port = check.port_text(&field, port).into();
        let service = Some(l7::ServiceRef { hostname: host.to_owned(), port, ..l7::ServiceRef::default() });
        let kind = Some(l7::tracer::Kind::Zipkin(l7::tracer::Zipkin::default()));
        settings.tracers.push(l7::Tracer { name: PROXY_CONFIG.to_owned(), service, longest_tag, kind });
    }
}

fn longest(given: Option<i64>, field: &str, check: &mut Check<'_>) -> u32 {
    given.map_or(0, |length| check.count(field, length))
}

/// `[namespace/]hostname` and port of a collector.
fn collector(service: &str, port: i64, field: &str, check: &mut Check<'_>) -> l7::ServiceRef {
    if service.is_empty() {
        check.error(format!("{field}.service"), "missing; write the host of a service, or namespace/host");
    }
    let (namespace, hostname) = service.split_once('/').unwrap_or(("", service));
    let port = check.port(&format!("{field}.port"), port).into();
    l7::ServiceRef { namespace: namespace.to_owned(), hostname: hostname.to_owned(), port }
}

fn sent_headers(
    given: Vec<SentHeader>,
    field: &str,
    check: &mut Check<'_>,
    unsupported: &mut Vec<String>,
) -> Vec<l7::Header> {
    let mut out = Vec::new();
    for (i, header) in given.into_iter().enumerate() {
        let place = format!("{field}[{i}]");
        match (header.value, header.env_name) {
            (Some(value), None) => out.extend(check.headers(&place, [(header.name, value)])),
            // A waypoint's environment is not the operator's to set.
            (None, Some(_)) => unsupported.push(format!("{place}.envName")),
            _ => check.error(&place, "needs value or envName, one of the two"),
        }
    }
    out
}

/// Reads the provider `opentelemetry` at `field`.
pub(super) fn otlp(
    text: OtlpText,
    name: &str,
    field: &str,
    check: &mut Check<'_>,
    unsupported: &mut Vec<String>,
) -> l7::Tracer {
    let at = |inner: &str| format!("{field}.{inner}");
    let service = Some(collector(&text.service, text.port, field, check));
    for (inner, set) in [
        ("resourceDetectors", text.resource_detectors.is_some()),
        ("dynatraceSampler", text.dynatrace_sampler.is_some()),
    ] {
        if set {
            unsupported.push(at(inner));
        }
    }
    let otlp = match (text.http, text.grpc) {
        (Some(_), Some(_)) => {
            check.error(field, "has http and grpc; keep one");
            l7::tracer::Otlp::default()
        }
        (Some(http), None) => {
            if !http.path.starts_with('/') {
                check.error(
                    at("http.path"),
                    format!("{:?} is no path; write one such as /v1/traces", http.path),
                );
            }
            l7::tracer::Otlp {
                headers: sent_headers(http.headers, &at("http.headers"), check, unsupported),
                timeout: check.timeout(&at("http.timeout"), http.timeout.as_deref()),
                http_path: http.path,
            }
        }
        (None, grpc) => {
            let grpc = grpc.unwrap_or_default();
            l7::tracer::Otlp {
                http_path: String::new(),
                headers: sent_headers(grpc.initial_metadata, &at("grpc.initialMetadata"), check, unsupported),
                timeout: check.timeout(&at("grpc.timeout"), grpc.timeout.as_deref()),
            }
        }
    };
    let longest_tag = longest(text.max_tag_length, &at("maxTagLength"), check);
    l7::Tracer { name: name.to_owned(), service, longest_tag, kind: Some(l7::tracer::Kind::Otlp(otlp)) }
}

/// Reads the provider `zipkin` at `field`.
pub(super) fn zipkin(
    text: ZipkinText,
    name: &str,
    field: &str,
    check: &mut Check<'_>,
    unsupported: &mut Vec<String>,
) -> l7::Tracer {
    let at = |inner: &str| format!("{field}.{inner}");
    let service = Some(collector(&text.service, text.port, field, check));
    for (inner, set) in [
        ("enable64bitTraceId", text.short_ids),
        ("timeout", text.timeout.is_some()),
        ("headers", text.headers.is_some()),
    ] {
        if set {
            unsupported.push(at(inner));
        }
    }
    if !text.path.is_empty() && !text.path.starts_with('/') {
        check.error(at("path"), format!("{:?} is no path; write one such as /api/v2/spans", text.path));
    }
    let w3c = text.trace_context_option == ContextOption::B3AndW3c;
    let kind = l7::tracer::Kind::Zipkin(l7::tracer::Zipkin { path: text.path, w3c });
    let longest_tag = longest(text.max_tag_length, &at("maxTagLength"), check);
    l7::Tracer { name: name.to_owned(), service, longest_tag, kind: Some(kind) }
}

/// Reads the provider `envoyFileAccessLog` at `field`.
pub(super) fn file_log(
    text: FileLogText,
    name: &str,
    field: &str,
    check: &mut Check<'_>,
    unsupported: &mut Vec<String>,
) -> l7::Logger {
    if text.omit_empty_values.is_some() {
        unsupported.push(format!("{field}.omitEmptyValues"));
    }
    let at = format!("{field}.logFormat");
    let layout = text.log_format.and_then(|layout| match (layout.text, layout.labels) {
        (Some(_), Some(_)) => {
            check.error(&at, "has text and labels; keep one");
            None
        }
        (Some(format), None) => Some(l7::LogLayout { json: false, format }),
        (None, Some(Value::Object(labels))) => {
            Some(l7::LogLayout { json: true, format: Value::Object(labels).to_string() })
        }
        (None, Some(_)) => {
            check.error(format!("{at}.labels"), "is no mapping; write names with command operators");
            None
        }
        (None, None) => None,
    });
    if let Some(layout) = &layout {
        check.layout(&at, layout);
    }
    log_file(&text.path, &format!("{field}.path"), unsupported);
    l7::Logger { name: name.to_owned(), path: text.path, layout, ..l7::Logger::default() }
}

/// Reads the provider `envoyOtelAls` at `field`: the text is a record's body, the labels are its attributes.
pub(super) fn otlp_log(text: OtlpLogText, name: &str, field: &str, check: &mut Check<'_>) -> l7::Logger {
    let service = Some(collector(&text.service, text.port, field, check));
    let at = format!("{field}.logFormat");
    let given = text.log_format.unwrap_or_default();
    let layout = given.text.map(|format| l7::LogLayout { json: false, format });
    let attributes = match given.labels {
        None => None,
        Some(Value::Object(labels)) => {
            Some(l7::LogLayout { json: true, format: Value::Object(labels).to_string() })
        }
        Some(_) => {
            check.error(format!("{at}.labels"), "is no mapping; write names with command operators");
            None
        }
    };
    for (part, layout) in [("text", &layout), ("labels", &attributes)] {
        if let Some(layout) = layout {
            check.layout(&format!("{at}.{part}"), layout);
        }
    }
    let kind = Some(l7::tracer::Kind::Otlp(l7::tracer::Otlp::default()));
    let collector = l7::Tracer { name: name.to_owned(), service, longest_tag: 0, kind };
    l7::Logger {
        name: name.to_owned(),
        layout,
        collector: Some(collector),
        attributes,
        log_name: text.log_name,
        ..l7::Logger::default()
    }
}

/// A waypoint writes to its own outputs: any other file is none that somebody would rotate.
pub(super) fn log_file(path: &str, field: &str, unsupported: &mut Vec<String>) {
    if !matches!(path, "" | STANDARD_OUTPUT | "/dev/stderr") {
        unsupported.push(format!("{field} ({path}: lines go to {STANDARD_OUTPUT})"));
    }
}

/// Reads custom tags at `field`, each of which has one source.
pub(super) fn tags(
    given: BTreeMap<String, TagText>,
    field: &str,
    check: &mut Check<'_>,
) -> Vec<l7::telemetry::Tag> {
    use l7::telemetry::tag::Value;
    let mut out = Vec::new();
    for (name, text) in given {
        let place = format!("{field}.{name}");
        let named = |n: NamedText| l7::telemetry::Named { name: n.name, default_value: n.default_value };
        let mut values = Vec::new();
        values.extend(text.literal.map(|l| Value::Literal(l.value)));
        values.extend(text.environment.map(|n| Value::Environment(named(n))));
        values.extend(text.header.map(|n| Value::Header(named(n))));
        values.extend(text.formatter.map(|f| Value::Format(f.value)));
        let [value] = &values[..] else {
            check.error(&place, "needs literal, environment, header or formatter, one of them");
            continue;
        };
        match value {
            Value::Environment(named) if named.name.is_empty() => {
                check.error(format!("{place}.environment.name"), "missing; name a variable");
            }
            Value::Header(named) => drop(check.header_name(&format!("{place}.header.name"), &named.name)),
            Value::Format(format) => {
                let layout = l7::LogLayout { json: false, format: format.clone() };
                check.layout(&format!("{place}.formatter.value"), &layout);
            }
            _ => {}
        }
        out.push(l7::telemetry::Tag { name, value: Some(value.clone()) });
    }
    out
}

impl Check<'_> {
    /// A percentage of requests that begin a trace.
    pub(super) fn sampling(&mut self, field: &str, given: Option<f64>) -> Option<f64> {
        if let Some(percent) = given
            && !(0.0..=100.0).contains(&percent)
        {
            self.error(field, format!("{percent} is no percentage; write 0 to 100"));
            return None;
        }
        given
    }

    /// A layout of lines that waypoints can read.
    pub(super) fn layout(&mut self, field: &str, layout: &l7::LogLayout) {
        if let Err(error) = mesh_core::telemetry::Layout::read(layout) {
            self.error(field, error.to_string());
        }
    }
}
