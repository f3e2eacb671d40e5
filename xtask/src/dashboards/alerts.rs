//! Alert rules, each with figures under which it has to fire: `promtool test rules` plays them.

use serde_json::Value;

struct Alert {
    name: &'static str,
    /// For how long it has to hold.
    held: &'static str,
    severity: &'static str,
    query: &'static str,
    summary: &'static str,
    /// What to do.
    fix: &'static str,
    /// Series, and values a minute apart in promtool's notation, under which it fires after half an hour.
    fires: &'static [(&'static str, &'static str)],
}

const ALERTS: &[Alert] = &[
    Alert {
        name: "UndermeshNoControlPlane",
        held: "5m",
        severity: "critical",
        query: r#"absent(istio_build{component="pilot"})"#,
        summary: "No control plane answers.",
        fix: "Pods in the mesh go on with what their nodes know; new ones and new certificates wait. See its log.",
        fires: &[(r#"up{instance="x"}"#, "1x40")],
    },
    Alert {
        name: "UndermeshProxiesBehind",
        held: "5m",
        severity: "warning",
        query: "sum(undermesh_proxies_behind) > 0",
        summary: "{{ $value }} proxies have not acknowledged the newest configuration.",
        fix: "meshctl status names them, and what they rejected.",
        fires: &[("undermesh_proxies_behind", "1x40")],
    },
    Alert {
        name: "UndermeshConfigurationRejected",
        held: "0m",
        severity: "warning",
        query: "sum by (type) (increase(pilot_total_xds_rejects[10m])) > 0",
        summary: "Proxies rejected configuration of type {{ $labels.type }}.",
        fix: "meshctl status shows the rejection; a proxy keeps what it had before.",
        fires: &[(r#"pilot_total_xds_rejects{type="wds"}"#, "0x25 3x15")],
    },
    Alert {
        name: "UndermeshSlowConvergence",
        held: "10m",
        severity: "warning",
        query: "histogram_quantile(0.99, sum by (le) (rate(undermesh_convergence_seconds_bucket[10m]))) > 5",
        summary: "Changes take {{ $value | humanizeDuration }} until the last proxy has them.",
        fix: "Look at CPU of the control plane and of the proxies that meshctl status shows as late.",
        fires: &[
            (r#"undermesh_convergence_seconds_bucket{le="5"}"#, "0x40"),
            (r#"undermesh_convergence_seconds_bucket{le="10"}"#, "0+1x40"),
            (r#"undermesh_convergence_seconds_bucket{le="+Inf"}"#, "0+1x40"),
        ],
    },
    Alert {
        name: "UndermeshObjectsInvalid",
        held: "15m",
        severity: "warning",
        query: "max(galley_validation_failed) > 0",
        summary: "{{ $value }} things are wrong in the configuration; the last good version of each is in force.",
        fix: "meshctl status lists them with field and fix.",
        fires: &[("galley_validation_failed", "2x40")],
    },
    Alert {
        name: "UndermeshRootExpires",
        held: "1h",
        severity: "warning",
        query: "min(citadel_server_root_cert_expiry_seconds) < 30 * 86400",
        summary: "A root certificate ends in {{ $value | humanizeDuration }}.",
        fix: "Rotate it: mesh-control ca rotate, or the CA that is plugged in.",
        fires: &[("citadel_server_root_cert_expiry_seconds", "86400-60x100")],
    },
    Alert {
        name: "UndermeshSigningChainExpires",
        held: "10m",
        severity: "critical",
        query: "min(citadel_server_cert_chain_expiry_seconds) < 2 * 86400",
        summary: "The certificate that signs ends in {{ $value | humanizeDuration }}: then no pod gets one any more.",
        fix: "Replace the CA that is plugged in; the mesh's own is renewed by itself, so see the control plane's log.",
        fires: &[("citadel_server_cert_chain_expiry_seconds", "3600-60x40")],
    },
    Alert {
        name: "UndermeshPodsNotCaptured",
        held: "5m",
        severity: "warning",
        query: "sum by (instance) (workload_manager_pending_proxy_count) > 0",
        summary: "{{ $value }} pods of node agent {{ $labels.instance }} should be in the mesh and are not.",
        fix: "meshctl status --pods says why.",
        fires: &[(r#"workload_manager_pending_proxy_count{instance="x"}"#, "2x40")],
    },
    Alert {
        name: "UndermeshAgentNearLimit",
        held: "5m",
        severity: "warning",
        query: "undermesh_connections_open / undermesh_connections_limit > 0.9",
        summary: "Agent {{ $labels.instance }} holds {{ $value | humanizePercentage }} of the connections that it may.",
        fix: "Raise the limit of open files or --max-connections; the node dashboard shows which pods hold most.",
        fires: &[
            (r#"undermesh_connections_open{instance="x"}"#, "95x40"),
            (r#"undermesh_connections_limit{instance="x"}"#, "100x40"),
        ],
    },
    Alert {
        name: "UndermeshConnectionsShed",
        held: "0m",
        severity: "warning",
        query: "sum by (instance, limit) (increase(undermesh_connections_shed_total[5m])) > 0",
        summary: "Agent {{ $labels.instance }} refused connections for lack of room ({{ $labels.limit }}).",
        fix: "docs/metrics.md explains the limits; meshctl flows --verdict denied shows whose connections they were.",
        fires: &[(r#"undermesh_connections_shed_total{instance="x",limit="pod"}"#, "0+9x40")],
    },
    Alert {
        name: "UndermeshKernelRefuses",
        held: "0m",
        severity: "critical",
        query: r#"sum by (instance, reason) (increase(undermesh_kernel_events_total{reason=~"refused_no_agent|refused_map_full|dropped_no_listener|dropped_uncaptured"}[5m])) > 0"#,
        summary: "The kernel programs on {{ $labels.instance }} refuse connections: {{ $labels.reason }}.",
        fix: "docs/metrics.md explains the reasons; mesh-node doctor looks at the node.",
        fires: &[(r#"undermesh_kernel_events_total{instance="x",reason="refused_map_full"}"#, "0+1x40")],
    },
    Alert {
        name: "UndermeshTlsFailures",
        held: "5m",
        severity: "critical",
        query: r#"sum by (reporter, source_workload, destination_workload) (rate(istio_tcp_connections_failed_total{response_flags=~"TLS_FAILURE|IDENTITY_ERROR|CERT_REVOKED"}[5m])) > 0"#,
        summary: "Connections from {{ $labels.source_workload }} to {{ $labels.destination_workload }} fail for certificates.",
        fix: "meshctl why and meshctl certs say whose, and why.",
        fires: &[(
            r#"istio_tcp_connections_failed_total{reporter="source",source_workload="a",destination_workload="b",response_flags="TLS_FAILURE"}"#,
            "0+1x40",
        )],
    },
    Alert {
        name: "UndermeshManyRequestsFail",
        held: "5m",
        severity: "warning",
        query: r#"sum by (destination_service) (rate(istio_requests_total{reporter=~"source|waypoint",response_code=~"5.."}[5m])) / sum by (destination_service) (rate(istio_requests_total{reporter=~"source|waypoint"}[5m])) > 0.05"#,
        summary: "{{ $value | humanizePercentage }} of the requests to {{ $labels.destination_service }} are answered with 5xx.",
        fix: "The service dashboard shows which workload and client; response_flags say whether the waypoint answered itself.",
        fires: &[
            (
                r#"istio_requests_total{reporter="waypoint",destination_service="s",response_code="503"}"#,
                "0+10x40",
            ),
            (
                r#"istio_requests_total{reporter="waypoint",destination_service="s",response_code="200"}"#,
                "0+90x40",
            ),
        ],
    },
    Alert {
        name: "UndermeshEventsLost",
        held: "10m",
        severity: "info",
        query: r#"sum by (instance) (rate(undermesh_trace_events_total{outcome="lost"}[5m])) > 10"#,
        summary: "Agent {{ $labels.instance }} loses {{ $value | humanize }} events of connections in a second.",
        fix: "Sample with --trace-sample: figures by pair of workloads are too low.",
        fires: &[(r#"undermesh_trace_events_total{instance="x",outcome="lost"}"#, "0+6000x40")],
    },
];

/// A string of YAML, which takes JSON's.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

/// The rules as Prometheus reads them.
pub(super) fn rules() -> String {
    let mut text =
        "# Written by `cargo xtask dashboards`.\ngroups:\n- name: undermesh\n  rules:\n".to_owned();
    for alert in ALERTS {
        text += &format!(
            "  - alert: {}\n    expr: {}\n    for: {}\n    labels: {{severity: {}}}\n    annotations:\n      summary: {}\n      description: {}\n",
            alert.name,
            quoted(alert.query),
            alert.held,
            alert.severity,
            quoted(alert.summary),
            quoted(alert.fix)
        );
    }
    text
}

/// What `promtool test rules` plays: each alert fires under its figures.
pub(super) fn tests() -> String {
    let mut text = "# Written by `cargo xtask dashboards`.\nrule_files: [undermesh.yaml]\nevaluation_interval: 1m\ntests:\n"
        .to_owned();
    for alert in ALERTS {
        let at = if alert.held == "1h" { "90m" } else { "30m" };
        text += &format!("- name: {}\n  interval: 1m\n  input_series:\n", alert.name);
        for (series, values) in alert.fires {
            text += &format!("  - {{series: {}, values: {}}}\n", quoted(series), quoted(values));
        }
        text += &format!(
            "  promql_expr_test:\n  - expr: {}\n    eval_time: {at}\n    exp_samples: [{{labels: '{{}}', value: 1}}]\n",
            quoted(&format!(r#"count(ALERTS{{alertname="{}",alertstate="firing"}})"#, alert.name))
        );
    }
    text
}
