//! The part of MeshConfig that waypoints honour.

use std::collections::BTreeMap;

use mesh_core::xds::proto::l7;
use mesh_core::xds::proto::l7::settings::PathNormalization;
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};

use super::Check;
use super::balancing::{LocalityText, locality};
use super::traffic::{OutlierText, PoolText, RetriesText, connection_pool, outlier_detection, retries};
use crate::tree::{Node, Value, typed};

/// Fields that are read here.
pub(super) const FIELDS: &[&str] = &[
    "connectTimeout",
    "defaultConfig",
    "defaultHttpRetryPolicy",
    "defaultTrafficPolicy",
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
    zipkin: Option<IgnoredAny>,
    lightstep: Option<IgnoredAny>,
    datadog: Option<IgnoredAny>,
    stackdriver: Option<IgnoredAny>,
    opencensus: Option<IgnoredAny>,
    skywalking: Option<IgnoredAny>,
    opentelemetry: Option<IgnoredAny>,
    prometheus: Option<IgnoredAny>,
    envoy_file_access_log: Option<IgnoredAny>,
    envoy_http_als: Option<IgnoredAny>,
    envoy_tcp_als: Option<IgnoredAny>,
    envoy_otel_als: Option<IgnoredAny>,
    sds: Option<IgnoredAny>,
}

impl ProviderText {
    /// What else the provider is, beside external authorization.
    fn others(&self) -> Vec<&'static str> {
        let set = [
            ("zipkin", &self.zipkin),
            ("lightstep", &self.lightstep),
            ("datadog", &self.datadog),
            ("stackdriver", &self.stackdriver),
            ("opencensus", &self.opencensus),
            ("skywalking", &self.skywalking),
            ("opentelemetry", &self.opentelemetry),
            ("prometheus", &self.prometheus),
            ("envoyFileAccessLog", &self.envoy_file_access_log),
            ("envoyHttpAls", &self.envoy_http_als),
            ("envoyTcpAls", &self.envoy_tcp_als),
            ("envoyOtelAls", &self.envoy_otel_als),
            ("sds", &self.sds),
        ];
        set.iter().filter(|(_, set)| set.is_some()).map(|(name, _)| *name).collect()
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
                let provider = provider(text, &format!("{name}[{i}]"), &mut check, unsupported);
                settings.providers.extend(provider);
            }
        }
    }
    errors.extend(check.errors.into_iter().map(|e| (e.field, e.message)));
}

/// Of ProxyConfig only the number of trusted proxies in front of the mesh is ours.
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
        if entry.key != "gatewayTopology" {
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

fn provider(
    text: ProviderText,
    field: &str,
    check: &mut Check<'_>,
    unsupported: &mut Vec<String>,
) -> Option<l7::Provider> {
    if text.name.is_empty() {
        check.error(format!("{field}.name"), "missing; policies name providers");
    }
    let others = text.others();
    let (grpc, kind, given) = match (text.envoy_ext_authz_grpc, text.envoy_ext_authz_http) {
        (Some(given), None) => (true, "envoyExtAuthzGrpc", given),
        (None, Some(given)) => (false, "envoyExtAuthzHttp", given),
        (Some(_), Some(_)) => {
            check.error(field, "has envoyExtAuthzGrpc and envoyExtAuthzHttp; keep one");
            return None;
        }
        (None, None) => {
            unsupported.push(format!("{field} ({})", others.join(", ")));
            return None;
        }
    };
    let at = |name: &str| format!("{field}.{kind}.{name}");
    for name in others {
        check.error(format!("{field}.{name}"), format!("stands beside {kind}; a provider is one thing"));
    }
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
    Some(l7::Provider {
        name: text.name,
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
    })
}
