//! Parts of traffic policies that DestinationRules, VirtualServices and the mesh settings share.

use mesh_core::xds::proto::l7;
use mesh_core::xds::proto::l7::client_tls::Mode;
use mesh_core::xds::proto::l7::connection_pool::{Keepalive, UpgradePolicy};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::Check;

/// When a request is tried again, where nothing else is said (Istio's default).
const RETRY_ON: &str = "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes";
/// Statuses of that default.
const RETRIED_STATUS: u32 = 503;
/// Envoy's conditions for another try.
const CONDITIONS: &[&str] = &[
    "5xx",
    "gateway-error",
    "reset",
    "reset-before-request",
    "connect-failure",
    "envoy-ratelimited",
    "retriable-4xx",
    "refused-stream",
    "retriable-status-codes",
    "retriable-headers",
    "http3-post-connect-failure",
    "cancelled",
    "deadline-exceeded",
    "internal",
    "resource-exhausted",
    "unavailable",
];

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct RetriesText {
    attempts: i64,
    per_try_timeout: Option<String>,
    retry_on: String,
    retry_remote_localities: Option<bool>,
    retry_ignore_previous_hosts: Option<bool>,
    backoff: Option<String>,
}

pub(super) fn retries(text: RetriesText, field: &str, check: &mut Check<'_>) -> l7::Retry {
    let at = |name: &str| format!("{field}.{name}");
    let default = text.retry_on.is_empty();
    let written = if default { RETRY_ON } else { &text.retry_on };
    let mut retry = l7::Retry {
        attempts: check.count(&at("attempts"), text.attempts),
        per_try_timeout: check.timeout(&at("perTryTimeout"), text.per_try_timeout.as_deref()),
        backoff: check.timeout(&at("backoff"), text.backoff.as_deref()),
        remote_localities: text.retry_remote_localities.unwrap_or_default(),
        ignore_previous_hosts: text.retry_ignore_previous_hosts,
        ..l7::Retry::default()
    };
    for word in written.split(',').map(str::trim).filter(|w| !w.is_empty()) {
        match word.parse::<u32>() {
            Ok(status) if (100..=599).contains(&status) => retry.status_codes.push(status),
            _ if CONDITIONS.contains(&word) => retry.on.push(word.to_owned()),
            _ => {
                let known = CONDITIONS.join(", ");
                check.error(at("retryOn"), format!("{word:?} is unknown; write {known}, or a status"));
            }
        }
    }
    if default {
        retry.status_codes.push(RETRIED_STATUS);
    }
    let by_status = "retriable-status-codes";
    if !retry.status_codes.is_empty() && !retry.on.iter().any(|w| w == by_status) {
        retry.on.push(by_status.to_owned());
    }
    retry
}

/// What holds where neither route nor mesh says anything.
pub(crate) fn default_retry() -> l7::Retry {
    l7::Retry {
        attempts: 2,
        on: RETRY_ON.split(',').map(str::to_owned).collect(),
        status_codes: vec![RETRIED_STATUS],
        ..l7::Retry::default()
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct PoolText {
    tcp: TcpPoolText,
    http: HttpPoolText,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct TcpPoolText {
    max_connections: Option<i64>,
    connect_timeout: Option<String>,
    tcp_keepalive: Option<KeepaliveText>,
    max_connection_duration: Option<String>,
    idle_timeout: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct KeepaliveText {
    probes: i64,
    time: Option<String>,
    interval: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct HttpPoolText {
    http1_max_pending_requests: Option<i64>,
    http2_max_requests: Option<i64>,
    max_requests_per_connection: Option<i64>,
    max_retries: Option<i64>,
    idle_timeout: Option<String>,
    h2_upgrade_policy: UpgradeText,
    use_client_protocol: bool,
    max_concurrent_streams: Option<i64>,
    #[serde(rename = "http2KeepAlive", alias = "http2Keepalive")]
    http2_keep_alive: Option<HttpKeepaliveText>,
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum UpgradeText {
    #[default]
    Default,
    DoNotUpgrade,
    Upgrade,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct HttpKeepaliveText {
    interval: Option<String>,
    timeout: Option<String>,
}

pub(super) fn connection_pool(text: PoolText, field: &str, check: &mut Check<'_>) -> l7::ConnectionPool {
    let tcp = |name: &str| format!("{field}.tcp.{name}");
    let http = |name: &str| format!("{field}.http.{name}");
    let keepalive = text.tcp.tcp_keepalive.map(|k| Keepalive {
        probes: check.count(&tcp("tcpKeepalive.probes"), k.probes),
        time: check.duration(&tcp("tcpKeepalive.time"), k.time.as_deref()),
        interval: check.duration(&tcp("tcpKeepalive.interval"), k.interval.as_deref()),
    });
    let h2_upgrade = match text.http.h2_upgrade_policy {
        UpgradeText::Default => UpgradePolicy::Default,
        UpgradeText::DoNotUpgrade => UpgradePolicy::DoNotUpgrade,
        UpgradeText::Upgrade => UpgradePolicy::Upgrade,
    };
    let ping = text.http.http2_keep_alive.unwrap_or_default();
    let max_connection_duration =
        check.timeout(&tcp("maxConnectionDuration"), text.tcp.max_connection_duration.as_deref());
    let max_requests_per_connection =
        check.limit(&http("maxRequestsPerConnection"), text.http.max_requests_per_connection);
    l7::ConnectionPool {
        max_connections: check.limit(&tcp("maxConnections"), text.tcp.max_connections),
        connect_timeout: check.timeout(&tcp("connectTimeout"), text.tcp.connect_timeout.as_deref()),
        keepalive,
        max_connection_duration,
        tcp_idle_timeout: check.duration(&tcp("idleTimeout"), text.tcp.idle_timeout.as_deref()),
        http1_max_pending_requests: check
            .limit(&http("http1MaxPendingRequests"), text.http.http1_max_pending_requests),
        http2_max_requests: check.limit(&http("http2MaxRequests"), text.http.http2_max_requests),
        max_requests_per_connection,
        max_retries: check.limit(&http("maxRetries"), text.http.max_retries),
        http_idle_timeout: check.duration(&http("idleTimeout"), text.http.idle_timeout.as_deref()),
        h2_upgrade: h2_upgrade.into(),
        use_client_protocol: text.http.use_client_protocol,
        max_concurrent_streams: check.limit(&http("maxConcurrentStreams"), text.http.max_concurrent_streams),
        http2_keepalive_interval: check.timeout(&http("http2KeepAlive.interval"), ping.interval.as_deref()),
        http2_keepalive_timeout: check.timeout(&http("http2KeepAlive.timeout"), ping.timeout.as_deref()),
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct OutlierText {
    #[serde(rename = "consecutive5xxErrors")]
    consecutive_5xx: Option<i64>,
    #[serde(rename = "consecutiveGatewayErrors")]
    consecutive_gateway: Option<i64>,
    #[serde(rename = "splitExternalLocalOriginErrors")]
    split: bool,
    #[serde(rename = "consecutiveLocalOriginFailures")]
    consecutive_local: Option<i64>,
    #[serde(rename = "consecutiveErrors")]
    consecutive_errors: Option<IgnoredAny>,
    interval: Option<String>,
    #[serde(rename = "baseEjectionTime")]
    base_ejection_time: Option<String>,
    #[serde(rename = "maxEjectionPercent")]
    max_ejection_percent: Option<i64>,
    #[serde(rename = "minHealthPercent")]
    min_health_percent: Option<i64>,
    #[serde(rename = "outlierDetectionHttpErrorCodes")]
    codes: Option<IgnoredAny>,
}

pub(super) fn outlier_detection(
    text: OutlierText,
    field: &str,
    check: &mut Check<'_>,
    unsupported: &mut Vec<String>,
) -> l7::OutlierDetection {
    let at = |name: &str| format!("{field}.{name}");
    for (name, set) in [
        ("consecutiveErrors (write consecutive5xxErrors)", text.consecutive_errors.is_some()),
        ("outlierDetectionHttpErrorCodes", text.codes.is_some()),
    ] {
        if set {
            unsupported.push(at(name));
        }
    }
    let interval = check.timeout(&at("interval"), text.interval.as_deref());
    let base_ejection_time = check.timeout(&at("baseEjectionTime"), text.base_ejection_time.as_deref());
    let mut count = |name: &str, value: Option<i64>| value.map(|v| check.count(&at(name), v));
    let (five, gateway, local) = (
        count("consecutive5xxErrors", text.consecutive_5xx),
        count("consecutiveGatewayErrors", text.consecutive_gateway),
        count("consecutiveLocalOriginFailures", text.consecutive_local),
    );
    let mut percent = |name: &str, value: Option<i64>| {
        value.map(|v| {
            check.whole_percent(&at(name), v);
            u32::try_from(v.clamp(0, 100)).unwrap_or_default()
        })
    };
    l7::OutlierDetection {
        consecutive_5xx: five,
        consecutive_gateway_errors: gateway,
        split_local_errors: text.split,
        consecutive_local_failures: local,
        interval,
        base_ejection_time,
        max_ejection_percent: percent("maxEjectionPercent", text.max_ejection_percent),
        min_health_percent: percent("minHealthPercent", text.min_health_percent),
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct TlsText {
    mode: TlsModeText,
    client_certificate: String,
    private_key: String,
    ca_certificates: String,
    credential_name: String,
    subject_alt_names: Vec<String>,
    sni: String,
    insecure_skip_verify: Option<bool>,
    ca_crl: String,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum TlsModeText {
    #[default]
    Disable,
    Simple,
    Mutual,
    IstioMutual,
}

/// TLS to endpoints. Files and Secrets are not read by this control plane, so that settings which need one cannot be
/// used: connections fail and say why, instead of being made with less than was asked for.
pub(super) fn client_tls(
    text: TlsText,
    field: &str,
    check: &mut Check<'_>,
    unsupported: &mut Vec<String>,
) -> l7::ClientTls {
    let at = |name: &str| format!("{field}.{name}");
    let skip = text.insecure_skip_verify.unwrap_or_default();
    let mode = match text.mode {
        TlsModeText::Disable => Mode::Disable,
        TlsModeText::Simple => Mode::Simple,
        TlsModeText::Mutual => Mode::Mutual,
        TlsModeText::IstioMutual => Mode::IstioMutual,
    };
    if mode == Mode::IstioMutual {
        unsupported.push(at("mode (ISTIO_MUTUAL: workloads of the mesh are reached through HBONE)"));
    }
    let own = !text.client_certificate.is_empty() && !text.private_key.is_empty();
    if mode == Mode::Mutual && !own && text.credential_name.is_empty() {
        check.error(at("mode"), "MUTUAL needs clientCertificate and privateKey, or credentialName");
    }
    let files = [
        ("clientCertificate", &text.client_certificate),
        ("privateKey", &text.private_key),
        ("caCertificates", &text.ca_certificates),
        ("caCrl", &text.ca_crl),
    ];
    let files = files.iter().filter(|(name, value)| !value.is_empty() && (*name, value.as_str()) != SYSTEM);
    let named: Vec<&str> = files.map(|(name, _)| *name).collect();
    if !text.credential_name.is_empty() && !named.is_empty() {
        check.error(at("credentialName"), format!("may not stand beside {}", named.join(", ")));
    }
    let originates = matches!(mode, Mode::Simple | Mode::Mutual);
    let invalid = match (originates, text.credential_name.as_str()) {
        (true, name) if !name.is_empty() => {
            format!(
                "{field}.credentialName: Secret {name} cannot be had, this control plane reads no Secrets"
            )
        }
        (true, _) if !named.is_empty() => {
            format!("{field}: files cannot be had ({}), this control plane reads none", named.join(", "))
        }
        _ => String::new(),
    };
    if !invalid.is_empty() {
        unsupported.push(format!("{invalid}; connections that need them fail"));
    }
    l7::ClientTls {
        mode: mode.into(),
        subject_alt_names: text.subject_alt_names,
        sni: text.sni,
        insecure_skip_verify: skip,
        system_roots: originates && invalid.is_empty() && !skip,
        invalid,
        ..l7::ClientTls::default()
    }
}

/// The word for the system's roots.
const SYSTEM: (&str, &str) = ("caCertificates", "system");
