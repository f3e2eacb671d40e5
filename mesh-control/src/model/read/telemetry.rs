//! Reader of Telemetry.
//!
//! Field meaning: `istio.io/api` telemetry/v1.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_core::expression::{Expression, ExpressionError};
use mesh_core::xds::proto::l7::telemetry as wire;
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::super::Object;
use super::super::l7::Telemetry;
use super::authentication::{TargetText, binding};
use super::istio::{Resource, SelectorText};
use super::observing::{self, TagText};
use super::{Check, Document, FieldError, meta, shape};

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    selector: Option<SelectorText>,
    target_ref: Option<TargetText>,
    target_refs: Vec<TargetText>,
    tracing: Vec<TracingText>,
    metrics: Vec<MetricsText>,
    access_logging: Vec<LoggingText>,
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum ModeText {
    #[default]
    ClientAndServer,
    Client,
    Server,
}

impl From<ModeText> for wire::Mode {
    fn from(mode: ModeText) -> Self {
        match mode {
            ModeText::ClientAndServer => Self::ClientAndServer,
            ModeText::Client => Self::Client,
            ModeText::Server => Self::Server,
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct MatchText {
    mode: ModeText,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ProviderText {
    name: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct TracingText {
    #[serde(rename = "match")]
    of: MatchText,
    providers: Vec<ProviderText>,
    random_sampling_percentage: Option<f64>,
    disable_span_reporting: Option<bool>,
    custom_tags: BTreeMap<String, TagText>,
    use_request_id_for_trace_sampling: Option<bool>,
    enable_istio_tags: Option<bool>,
    disable_context_propagation: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct MetricsText {
    providers: Vec<ProviderText>,
    overrides: Vec<OverrideText>,
    reporting_interval: Option<IgnoredAny>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct OverrideText {
    #[serde(rename = "match")]
    of: SelectorOfMetric,
    disabled: Option<bool>,
    tag_overrides: BTreeMap<String, TagOverrideText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct SelectorOfMetric {
    mode: ModeText,
    metric: Option<MetricText>,
    custom_metric: String,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum MetricText {
    AllMetrics,
    RequestCount,
    RequestDuration,
    RequestSize,
    ResponseSize,
    TcpOpenedConnections,
    TcpClosedConnections,
    TcpSentBytes,
    TcpReceivedBytes,
    GrpcRequestMessages,
    GrpcResponseMessages,
}

impl From<MetricText> for wire::Metric {
    fn from(metric: MetricText) -> Self {
        match metric {
            MetricText::AllMetrics => Self::AllMetrics,
            MetricText::RequestCount => Self::RequestCount,
            MetricText::RequestDuration => Self::RequestDuration,
            MetricText::RequestSize => Self::RequestSize,
            MetricText::ResponseSize => Self::ResponseSize,
            MetricText::TcpOpenedConnections => Self::TcpOpenedConnections,
            MetricText::TcpClosedConnections => Self::TcpClosedConnections,
            MetricText::TcpSentBytes => Self::TcpSentBytes,
            MetricText::TcpReceivedBytes => Self::TcpReceivedBytes,
            MetricText::GrpcRequestMessages => Self::GrpcRequestMessages,
            MetricText::GrpcResponseMessages => Self::GrpcResponseMessages,
        }
    }
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum OperationText {
    #[default]
    Upsert,
    Remove,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct TagOverrideText {
    operation: OperationText,
    value: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct LoggingText {
    #[serde(rename = "match")]
    of: MatchText,
    providers: Vec<ProviderText>,
    disabled: Option<bool>,
    filter: Option<FilterText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct FilterText {
    expression: String,
}

pub(super) fn telemetry(doc: &Document<'_>) -> Result<Object, Vec<FieldError>> {
    let object: Resource<Spec> = shape(doc)?;
    let mut check = Check::new(doc);
    let meta = meta(doc, object.metadata, &mut check);
    let spec = object.spec.unwrap_or_default();
    let (selector, targets) =
        binding(spec.selector, spec.target_ref, spec.target_refs, &meta.namespace, &mut check);
    let mut unsupported = Vec::new();
    let mut read = Reader { check: &mut check, unsupported: &mut unsupported };
    let each = |name: &str, i: usize| format!("spec.{name}[{i}]");
    let tracing = spec.tracing.into_iter().enumerate();
    let tracing = tracing.map(|(i, text)| read.tracing(text, &each("tracing", i))).collect();
    let metrics = spec.metrics.into_iter().enumerate();
    let metrics = metrics.map(|(i, text)| read.metrics(text, &each("metrics", i))).collect();
    let logging = spec.access_logging.into_iter().enumerate();
    let access_logging = logging.map(|(i, text)| read.logging(text, &each("accessLogging", i))).collect();
    let object = Telemetry { meta, selector, targets, tracing, metrics, access_logging, unsupported };
    check.finish(Object::Telemetry(Arc::new(object)))
}

struct Reader<'c, 'n> {
    check: &'c mut Check<'n>,
    unsupported: &'c mut Vec<String>,
}

impl Reader<'_, '_> {
    fn providers(&mut self, given: Vec<ProviderText>, field: &str) -> Vec<String> {
        for (i, provider) in given.iter().enumerate() {
            if provider.name.is_empty() {
                let place = format!("{field}.providers[{i}].name");
                self.check.error(place, "missing; name one of MeshConfig's extensionProviders");
            }
        }
        given.into_iter().map(|provider| provider.name).collect()
    }

    fn tracing(&mut self, text: TracingText, field: &str) -> wire::Tracing {
        let at = |name: &str| format!("{field}.{name}");
        if text.use_request_id_for_trace_sampling == Some(true) {
            self.unsupported.push(at("useRequestIdForTraceSampling"));
        }
        wire::Tracing {
            mode: wire::Mode::from(text.of.mode).into(),
            providers: self.providers(text.providers, field),
            sampling: self.check.sampling(&at("randomSamplingPercentage"), text.random_sampling_percentage),
            disable_span_reporting: text.disable_span_reporting,
            tags: observing::tags(text.custom_tags, &at("customTags"), self.check),
            istio_tags: text.enable_istio_tags,
            disable_context_propagation: text.disable_context_propagation,
        }
    }

    fn metrics(&mut self, text: MetricsText, field: &str) -> wire::Metrics {
        if text.reporting_interval.is_some() {
            self.unsupported.push(format!("{field}.reportingInterval"));
        }
        let providers = self.providers(text.providers, field);
        let given = text.overrides.into_iter().enumerate();
        let overrides = given.filter_map(|(i, o)| self.one_override(o, &format!("{field}.overrides[{i}]")));
        wire::Metrics { providers, overrides: overrides.collect() }
    }

    fn one_override(&mut self, text: OverrideText, field: &str) -> Option<wire::Override> {
        let of = text.of;
        if !of.custom_metric.is_empty() {
            let place = format!("{field}.match.customMetric");
            if of.metric.is_some() {
                self.check.error(place, "may not stand beside metric; keep one of the two");
            } else {
                self.unsupported.push(place);
            }
            return None;
        }
        let metric = of.metric.map_or(wire::Metric::AllMetrics, wire::Metric::from);
        if matches!(metric, wire::Metric::GrpcRequestMessages | wire::Metric::GrpcResponseMessages) {
            self.unsupported.push(format!("{field} ({}: not counted)", metric.as_str_name()));
            return None;
        }
        let streams = [
            wire::Metric::TcpOpenedConnections,
            wire::Metric::TcpClosedConnections,
            wire::Metric::TcpSentBytes,
            wire::Metric::TcpReceivedBytes,
        ];
        if streams.contains(&metric) {
            self.unsupported.push(format!("{field} ({}: of requests only)", metric.as_str_name()));
            return None;
        }
        let mut tags = Vec::new();
        for (name, tag) in text.tag_overrides {
            let place = format!("{field}.tagOverrides.{name}");
            if !is_label(&name) {
                self.check.error(&place, "is no name of a label; write letters, digits and _");
            }
            match (tag.operation, tag.value) {
                (OperationText::Remove, value) if value.is_empty() => {
                    tags.push(wire::TagOverride { name, value: None });
                }
                (OperationText::Remove, _) => {
                    self.check.error(format!("{place}.value"), "may not stand beside operation REMOVE");
                }
                (OperationText::Upsert, value) if value.is_empty() => self.check.error(
                    format!("{place}.value"),
                    "missing; write an expression in CEL, such as request.host or \"'text'\"",
                ),
                (OperationText::Upsert, value) => {
                    if self.expression(&value, &format!("{place}.value"), "the tag stays as it is") {
                        tags.push(wire::TagOverride { name, value: Some(value) });
                    }
                }
            }
        }
        Some(wire::Override {
            mode: wire::Mode::from(of.mode).into(),
            metric: metric.into(),
            disabled: text.disabled,
            tags,
        })
    }

    fn logging(&mut self, text: LoggingText, field: &str) -> wire::AccessLogging {
        let mut filter = text.filter.unwrap_or_default().expression;
        let place = format!("{field}.filter.expression");
        if !filter.is_empty() && !self.expression(&filter, &place, "every request is logged") {
            filter.clear();
        }
        wire::AccessLogging {
            mode: wire::Mode::from(text.of.mode).into(),
            providers: self.providers(text.providers, field),
            disabled: text.disabled,
            filter,
        }
    }

    /// Whether an expression can be evaluated; `instead` is what happens if not.
    fn expression(&mut self, text: &str, field: &str, instead: &str) -> bool {
        match Expression::read(text) {
            Ok(_) => true,
            Err(error @ ExpressionError::Syntax(_)) => {
                self.check.error(field, error.to_string());
                false
            }
            Err(ExpressionError::Unknown(what)) => {
                self.unsupported
                    .push(format!("{field} (reads {what}, which waypoints do not know: {instead})"));
                false
            }
        }
    }
}

/// Prometheus' names of labels.
fn is_label(name: &str) -> bool {
    let mut chars = name.chars();
    chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
        && chars.all(|c| c.is_ascii_alphanumeric() || c == '_')
        && !name.starts_with("__")
}
