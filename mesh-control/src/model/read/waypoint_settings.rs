//! The part of MeshConfig that waypoints honour.

use std::collections::BTreeMap;

use mesh_core::xds::proto::l7;
use mesh_core::xds::proto::l7::settings::PathNormalization;
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};

use super::Check;
use super::balancing::{LocalityText, locality};
use super::observing::{self, DefaultsText, FileLogText, OtlpLogText, OtlpText, TracingText, ZipkinText};
use super::traffic::{OutlierText, PoolText, RetriesText, connection_pool, outlier_detection, retries};
use crate::tree::{Node, Value, typed};

/// Fields that are read here.
pub(super) const FIELDS: &[&str] = &[
    "accessLogEncoding",
    "accessLogFile",
    "accessLogFormat",
    "connectTimeout",
    "defaultConfig",
    "defaultHttpRetryPolicy",
    "defaultProviders",
    "defaultTrafficPolicy",
    "enableTracing",
    "extensionProviders",
    "localityLbSetting",
    "pathNormalization",
    "protocolDetectionTimeout",
];

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct NormalizationText {
    normalization: LevelText,
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum LevelText {
    #[default]
    Default,
    None,
    Base,
    MergeSlashes,
    DecodeAndMergeSlashes,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct TopologyText {
    num_trusted_proxies: i64,
    forward_client_cert_details: Option<IgnoredAny>,
    proxy_protocol: Option<IgnoredAny>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct DefaultPolicyText {
    connection_pool: Option<PoolText>,
    outlier_detection: Option<OutlierText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ProviderText {
    name: String,
    envoy_ext_authz_http: Option<AuthzText>,
    envoy_ext_authz_grpc: Option<AuthzText>,
    zipkin: Option<ZipkinText>,
    lightstep: Option<IgnoredAny>,
    datadog: Option<IgnoredAny>,
    stackdriver: Option<IgnoredAny>,
    opencensus: Option<IgnoredAny>,
    skywalking: Option<IgnoredAny>,
    opentelemetry: Option<OtlpText>,
    prometheus: Option<IgnoredAny>,
    envoy_file_access_log: Option<FileLogText>,
    envoy_http_als: Option<IgnoredAny>,
    envoy_tcp_als: Option<IgnoredAny>,
    envoy_otel_als: Option<OtlpLogText>,
    sds: Option<IgnoredAny>,
}

impl ProviderText {
    /// What the provider is; one thing if it is right.
    fn kinds(&self) -> Vec<&'static str> {
        let set = [
            ("envoyExtAuthzGrpc", self.envoy_ext_authz_grpc.is_some()),
            ("envoyExtAuthzHttp", self.envoy_ext_authz_http.is_some()),
            ("zipkin", self.zipkin.is_some()),
            ("lightstep", self.lightstep.is_some()),
            ("datadog", self.datadog.is_some()),
            ("stackdriver", self.stackdriver.is_some()),
            ("opencensus", self.opencensus.is_some()),
            ("skywalking", self.skywalking.is_some()),
            ("opentelemetry", self.opentelemetry.is_some()),
            ("prometheus", self.prometheus.is_some()),
            ("envoyFileAccessLog", self.envoy_file_access_log.is_some()),
            ("envoyHttpAls", self.envoy_http_als.is_some()),
            ("envoyTcpAls", self.envoy_tcp_als.is_some()),
            ("envoyOtelAls", self.envoy_otel_als.is_some()),
            ("sds", self.sds.is_some()),
        ];
        set.iter().filter(|(_, set)| *set).map(|(name, _)| *name).collect()
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct AuthzText {
    service: String,
    port: i64,
    timeout: Option<String>,
    fail_open: bool,
    status_on_error: Option<String>,
    path_prefix: String,
    include_request_headers_in_check: Vec<String>,
    include_headers_in_check: Vec<String>,
    include_additional_headers_in_check: BTreeMap<String, String>,
    include_request_body_in_check: Option<BodyText>,
    headers_to_upstream_on_allow: Vec<String>,
    headers_to_downstream_on_deny: Vec<String>,
    headers_to_downstream_on_allow: Vec<String>,
    clear_route_cache: Option<IgnoredAny>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct BodyText {
    max_request_bytes: i64,
    allow_partial_message: bool,
    pack_as_bytes: bool,
}

/// Reads one of [`FIELDS`]. Errors are paths inside MeshConfig, with what is wrong.
pub(super) fn field(
    name: &str,
    node: &Node,
    settings: &mut l7::Settings,
    unsupported: &mut Vec<String>,
    errors: &mut Vec<(String, String)>,
) {
    let mut check = Check::of(node);
    match name {
        "accessLogEncoding" | "accessLogFile" | "accessLogFormat" => {
            let Some(text) = value::<String>(name, node, errors) else { return };
            access_log(name, text, settings, &mut check, unsupported);
        }
        "defaultProviders" => {
            let Some(text) = value::<DefaultsText>(name, node, errors) else { return };
            observing::defaults(text, settings);
        }
        "enableTracing" => {
            if value::<bool>(name, node, errors) == Some(true) {
                observing::enable(settings);
            }
        }
        "connectTimeout" | "protocolDetectionTimeout" => {
            let Some(text) = value::<String>(name, node, errors) else { return };
            let duration = check.timeout(name, Some(&text));
            if name == "connectTimeout" {
                settings.connect_timeout = duration;
            } else {
                settings.protocol_detection_timeout = duration;
            }
        }
        "defaultConfig" => proxies(node, settings, &mut check, unsupported, errors),
        "defaultHttpRetryPolicy" => {
            let Some(text) = value::<RetriesText>(name, node, errors) else { return };
            settings.default_retry = Some(retries(text, name, &mut check));
        }
        "defaultTrafficPolicy" => {
            let Some(text) = value::<DefaultPolicyText>(name, node, errors) else { return };
            let pool = text.connection_pool;
            settings.default_connection_pool =
                pool.map(|p| connection_pool(p, &format!("{name}.connectionPool"), &mut check));
            let outlier = text.outlier_detection;
            settings.default_outlier_detection = outlier
                .map(|o| outlier_detection(o, &format!("{name}.outlierDetection"), &mut check, unsupported));
        }
        "localityLbSetting" => {
            let Some(text) = value::<LocalityText>(name, node, errors) else { return };
            settings.locality = Some(locality(text, name, &mut check));
        }
        "pathNormalization" => {
            let Some(text) = value::<NormalizationText>(name, node, errors) else { return };
            settings.path_normalization = match text.normalization {
                LevelText::Default | LevelText::Base => PathNormalization::Base,
                LevelText::None => PathNormalization::None,
                LevelText::MergeSlashes => PathNormalization::MergeSlashes,
                LevelText::DecodeAndMergeSlashes => PathNormalization::DecodeAndMergeSlashes,
            }
            .into();
        }
        _ => {
            let Some(given) = value::<Vec<ProviderText>>(name, node, errors) else { return };
            for (i, text) in given.into_iter().enumerate() {
                provider(text, &format!("{name}[{i}]"), settings, &mut check, unsupported);
            }
        }
    }
    errors.extend(check.errors.into_iter().map(|e| (e.field, e.message)));
}

/// What lines of the access log look like, and whether there are some. Format and encoding may come in any order: the
/// layout is checked once both are read.
fn access_log(
    name: &str,
    text: String,
    settings: &mut l7::Settings,
    check: &mut Check<'_>,
    unsupported: &mut Vec<String>,
) {
    match name {
        "accessLogFile" => {
            observing::log_file(&text, name, unsupported);
            settings.access_log_file = Some(text);
        }
        "accessLogFormat" => settings.access_log_layout.get_or_insert_default().format = text,
        _ => match text.as_str() {
            "TEXT" => {}
            "JSON" => settings.access_log_layout.get_or_insert_default().json = true,
            other => check.error(name, format!("{other:?} is no encoding; write TEXT or JSON")),
        },
    }
}

/// Of ProxyConfig only traces and the number of trusted proxies in front of the mesh are ours.
fn proxies(
    node: &Node,
    settings: &mut l7::Settings,
    check: &mut Check<'_>,
    unsupported: &mut Vec<String>,
    errors: &mut Vec<(String, String)>,
) {
    const TOPOLOGY: &str = "defaultConfig.gatewayTopology";
    let Value::Map(entries) = &node.value else {
        errors.push(("defaultConfig".into(), "expected a mapping such as `gatewayTopology: {}`".into()));
        return;
    };
    for entry in entries {
        if entry.key == "tracing" {
            if let Some(text) = value::<TracingText>("defaultConfig.tracing", &entry.value, errors) {
                observing::tracing(text, settings, check, unsupported);
            }
        } else if entry.key != "gatewayTopology" {
            unsupported.push(format!("defaultConfig.{}", entry.key));
        } else if let Some(text) = value::<TopologyText>(TOPOLOGY, &entry.value, errors) {
            let field = format!("{TOPOLOGY}.numTrustedProxies");
            settings.trusted_proxies = check.count(&field, text.num_trusted_proxies);
            for (name, set) in [
                ("forwardClientCertDetails", text.forward_client_cert_details.is_some()),
                ("proxyProtocol", text.proxy_protocol.is_some()),
            ] {
                if set {
                    unsupported.push(format!("{TOPOLOGY}.{name}"));
                }
            }
        }
    }
}

fn value<T: DeserializeOwned>(name: &str, node: &Node, errors: &mut Vec<(String, String)>) -> Option<T> {
    let place = |field: &str| match field {
        "" => name.to_owned(),
        field if field.starts_with('[') => format!("{name}{field}"),
        field => format!("{name}.{field}"),
    };
    typed(node).map_err(|shape| errors.extend(shape.into_iter().map(|e| (place(&e.field), e.message)))).ok()
}

/// Reads one of `extensionProviders`.
fn provider(
    text: ProviderText,
    field: &str,
    settings: &mut l7::Settings,
    check: &mut Check<'_>,
    unsupported: &mut Vec<String>,
) {
    if text.name.is_empty() {
        check.error(format!("{field}.name"), "missing; policies and Telemetry name providers");
    }
    let kinds = text.kinds();
    if kinds.len() > 1 {
        check.error(field, format!("has {}; a provider is one thing", kinds.join(", ")));
        return;
    }
    let at = |kind: &str| format!("{field}.{kind}");
    let name = text.name;
    if let Some(given) = text.envoy_ext_authz_grpc {
        settings.providers.push(authorizer(given, name, true, &at("envoyExtAuthzGrpc"), check, unsupported));
    } else if let Some(given) = text.envoy_ext_authz_http {
        settings.providers.push(authorizer(given, name, false, &at("envoyExtAuthzHttp"), check, unsupported));
    } else if let Some(given) = text.opentelemetry {
        settings.tracers.push(observing::otlp(given, &name, &at("opentelemetry"), check, unsupported));
    } else if let Some(given) = text.zipkin {
        settings.tracers.push(observing::zipkin(given, &name, &at("zipkin"), check, unsupported));
    } else if let Some(given) = text.envoy_file_access_log {
        let field = at("envoyFileAccessLog");
        settings.loggers.push(observing::file_log(given, &name, &field, check, unsupported));
    } else if let Some(given) = text.envoy_otel_als {
        settings.loggers.push(observing::otlp_log(given, &name, &at("envoyOtelAls"), check));
    } else if text.prometheus.is_some() {
        settings.scraped.push(name);
    } else {
        unsupported.push(format!("{field} ({})", kinds.join(", ")));
    }
}

/// Reads a provider for CUSTOM authorization at `field`.
fn authorizer(
    given: AuthzText,
    name: String,
    grpc: bool,
    field: &str,
    check: &mut Check<'_>,
    unsupported: &mut Vec<String>,
) -> l7::Provider {
    let at = |name: &str| format!("{field}.{name}");
    if given.service.is_empty() {
        check.error(at("service"), "missing; write the host of a service, or namespace/host");
    }
    if given.clear_route_cache.is_some() {
        unsupported.push(at("clearRouteCache"));
    }
    let body = given.include_request_body_in_check.unwrap_or_default();
    if body.pack_as_bytes {
        unsupported.push(at("includeRequestBodyInCheck.packAsBytes"));
    }
    let (namespace, hostname) = given.service.split_once('/').unwrap_or(("", &given.service));
    let port = check.port(&at("port"), given.port).into();
    let status = given.status_on_error.map_or(Some(0), |s| s.parse().ok());
    let status = status.filter(|s| *s == 0 || (200..=599).contains(s)).unwrap_or_else(|| {
        check.error(at("statusOnError"), "is no status; write one such as \"503\", in quotes");
        0
    });
    let headers = given.include_additional_headers_in_check;
    l7::Provider {
        name,
        grpc,
        service: Some(l7::ServiceRef {
            namespace: namespace.to_owned(),
            hostname: hostname.to_owned(),
            port,
        }),
        timeout: check.timeout(&at("timeout"), given.timeout.as_deref()),
        fail_open: given.fail_open,
        status_on_error: status,
        path_prefix: given.path_prefix,
        include_request_headers: [given.include_headers_in_check, given.include_request_headers_in_check]
            .concat(),
        additional_headers: check.headers(&at("includeAdditionalHeadersInCheck"), headers),
        headers_to_upstream_on_allow: given.headers_to_upstream_on_allow,
        headers_to_downstream_on_deny: given.headers_to_downstream_on_deny,
        headers_to_downstream_on_allow: given.headers_to_downstream_on_allow,
        max_request_bytes: check
            .count(&at("includeRequestBodyInCheck.maxRequestBytes"), body.max_request_bytes),
        allow_partial_message: body.allow_partial_message,
    }
}
