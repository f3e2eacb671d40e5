//! What users of the mesh look at: the whole of it, a service, a workload.

use super::{Choice, Dashboard, Row, figure, lines};

/// All of the mesh.
pub(super) const MESH: Dashboard = Dashboard {
    name: "mesh",
    title: "Undermesh / Mesh",
    choices: &[],
    rows: &[
        Row {
            title: "At a glance",
            panels: &[
                figure(
                    "Requests",
                    "reqps",
                    "Requests that waypoints and gateways carried, per second.",
                    &[(
                        r#"sum(rate(istio_requests_total{reporter=~"source|waypoint"}[$__rate_interval]))"#,
                        "",
                    )],
                ),
                figure(
                    "Success",
                    "percentunit",
                    "Share of requests that were not answered with 5xx.",
                    &[(
                        r#"sum(rate(istio_requests_total{reporter=~"source|waypoint",response_code!~"5.."}[$__rate_interval])) / sum(rate(istio_requests_total{reporter=~"source|waypoint"}[$__rate_interval]))"#,
                        "",
                    )],
                ),
                figure(
                    "Connections",
                    "cps",
                    "Connections that clients' nodes opened, per second.",
                    &[(
                        r#"sum(rate(istio_tcp_connections_opened_total{reporter="source"}[$__rate_interval]))"#,
                        "",
                    )],
                ),
                figure(
                    "Mutual TLS",
                    "percentunit",
                    "Share of the connections that arrived at pods of the mesh which came over mutual TLS.",
                    &[(
                        r#"sum(rate(istio_tcp_connections_opened_total{reporter="destination",connection_security_policy="mutual_tls"}[$__rate_interval])) / sum(rate(istio_tcp_connections_opened_total{reporter="destination"}[$__rate_interval]))"#,
                        "",
                    )],
                ),
                figure(
                    "Refused and failed",
                    "cps",
                    "Connections that policy refused or that did not come about, per second.",
                    &[("sum(rate(istio_tcp_connections_failed_total[$__rate_interval]))", "")],
                ),
                figure(
                    "Pods",
                    "none",
                    "Pods in the mesh.",
                    &[("sum(workload_manager_active_proxy_count)", "")],
                ),
            ],
        },
        Row {
            title: "Requests (through waypoints and gateways)",
            panels: &[
                lines(
                    "Requests by service",
                    "reqps",
                    "Requests per second by the service that was asked for.",
                    &[(
                        r#"sum by (destination_service) (rate(istio_requests_total{reporter=~"source|waypoint"}[$__rate_interval]))"#,
                        "{{destination_service}}",
                    )],
                ),
                lines(
                    "Answers by code",
                    "reqps",
                    "Requests per second by HTTP status; 0: the client left before there was one.",
                    &[(
                        r#"sum by (response_code) (rate(istio_requests_total{reporter=~"source|waypoint"}[$__rate_interval]))"#,
                        "{{response_code}}",
                    )],
                ),
                lines(
                    "Slowest services, p99",
                    "ms",
                    "Time to answer that one request of a hundred exceeds.",
                    &[(
                        r#"topk(10, histogram_quantile(0.99, sum by (le, destination_service) (rate(istio_request_duration_milliseconds_bucket{reporter=~"source|waypoint"}[$__rate_interval]))))"#,
                        "{{destination_service}}",
                    )],
                ),
                lines(
                    "Time to answer",
                    "ms",
                    "Half of the requests were answered within the first figure, 99 of 100 within the last.",
                    &[
                        (
                            r#"histogram_quantile(0.5, sum by (le) (rate(istio_request_duration_milliseconds_bucket{reporter=~"source|waypoint"}[$__rate_interval])))"#,
                            "p50",
                        ),
                        (
                            r#"histogram_quantile(0.9, sum by (le) (rate(istio_request_duration_milliseconds_bucket{reporter=~"source|waypoint"}[$__rate_interval])))"#,
                            "p90",
                        ),
                        (
                            r#"histogram_quantile(0.99, sum by (le) (rate(istio_request_duration_milliseconds_bucket{reporter=~"source|waypoint"}[$__rate_interval])))"#,
                            "p99",
                        ),
                    ],
                ),
            ],
        },
        Row {
            title: "Connections",
            panels: &[
                lines(
                    "Bytes",
                    "Bps",
                    "Payload, as the clients' nodes counted it.",
                    &[
                        (
                            r#"sum(rate(istio_tcp_received_bytes_total{reporter="source"}[$__rate_interval]))"#,
                            "to servers",
                        ),
                        (
                            r#"sum(rate(istio_tcp_sent_bytes_total{reporter="source"}[$__rate_interval]))"#,
                            "to clients",
                        ),
                    ],
                ),
                lines(
                    "Refused and failed, by flag",
                    "cps",
                    "DENY: policy; CONNECT: no connection to the server; TLS_FAILURE: handshake; see docs/observability.md.",
                    &[(
                        "sum by (reporter, response_flags) (rate(istio_tcp_connections_failed_total[$__rate_interval]))",
                        "{{reporter}} {{response_flags}}",
                    )],
                ),
                lines(
                    "Busiest pairs",
                    "cps",
                    "Connections per second by client and server.",
                    &[(
                        r#"topk(10, sum by (source_workload, source_workload_namespace, destination_workload, destination_workload_namespace) (rate(istio_tcp_connections_opened_total[$__rate_interval])))"#,
                        "{{source_workload_namespace}}/{{source_workload}} to {{destination_workload_namespace}}/{{destination_workload}}",
                    )],
                ),
                lines(
                    "Packets dropped",
                    "pps",
                    "Packets of pods that the kernel dropped, by its own reason.",
                    &[(
                        "sum by (reason) (rate(undermesh_packets_dropped_total[$__rate_interval]))",
                        "{{reason}}",
                    )],
                ),
            ],
        },
        Row {
            title: "Versions",
            panels: &[lines(
                "Versions that run",
                "none",
                "Processes by component and version; two of one component during an upgrade only.",
                &[("sum by (component, tag) (istio_build)", "{{component}} {{tag}}")],
            )],
        },
    ],
};

/// One service.
pub(super) const SERVICE: Dashboard = Dashboard {
    name: "service",
    title: "Undermesh / Service",
    choices: &[Choice {
        name: "service",
        title: "Service",
        query: r#"label_values({__name__=~"istio_requests_total|istio_tcp_connections_opened_total"}, destination_service)"#,
    }],
    rows: &[
        Row {
            title: "Requests (through its waypoint)",
            panels: &[
                lines(
                    "Requests by client",
                    "reqps",
                    "Requests per second by the workload that sent them.",
                    &[(
                        r#"sum by (source_workload_namespace, source_workload) (rate(istio_requests_total{reporter=~"source|waypoint",destination_service=~"$service"}[$__rate_interval]))"#,
                        "{{source_workload_namespace}}/{{source_workload}}",
                    )],
                ),
                lines(
                    "Requests by server and code",
                    "reqps",
                    "Requests per second by the workload that answered, and its status.",
                    &[(
                        r#"sum by (destination_workload, destination_version, response_code) (rate(istio_requests_total{reporter=~"source|waypoint",destination_service=~"$service"}[$__rate_interval]))"#,
                        "{{destination_workload}} {{destination_version}} {{response_code}}",
                    )],
                ),
                lines(
                    "Success",
                    "percentunit",
                    "Share of requests that were not answered with 5xx.",
                    &[(
                        r#"sum by (destination_service) (rate(istio_requests_total{reporter=~"source|waypoint",destination_service=~"$service",response_code!~"5.."}[$__rate_interval])) / sum by (destination_service) (rate(istio_requests_total{reporter=~"source|waypoint",destination_service=~"$service"}[$__rate_interval]))"#,
                        "{{destination_service}}",
                    )],
                ),
                lines(
                    "Time to answer",
                    "ms",
                    "Half of the requests were answered within the first figure, 99 of 100 within the last.",
                    &[
                        (
                            r#"histogram_quantile(0.5, sum by (le, destination_service) (rate(istio_request_duration_milliseconds_bucket{reporter=~"source|waypoint",destination_service=~"$service"}[$__rate_interval])))"#,
                            "{{destination_service}} p50",
                        ),
                        (
                            r#"histogram_quantile(0.99, sum by (le, destination_service) (rate(istio_request_duration_milliseconds_bucket{reporter=~"source|waypoint",destination_service=~"$service"}[$__rate_interval])))"#,
                            "{{destination_service}} p99",
                        ),
                    ],
                ),
                lines(
                    "Request size",
                    "bytes",
                    "Bytes of a request's body: the mean, and what one of twenty exceeds.",
                    &[
                        (
                            r#"sum(rate(istio_request_bytes_sum{reporter=~"source|waypoint",destination_service=~"$service"}[$__rate_interval])) / sum(rate(istio_request_bytes_count{reporter=~"source|waypoint",destination_service=~"$service"}[$__rate_interval]))"#,
                            "mean",
                        ),
                        (
                            r#"histogram_quantile(0.95, sum by (le) (rate(istio_request_bytes_bucket{reporter=~"source|waypoint",destination_service=~"$service"}[$__rate_interval])))"#,
                            "p95",
                        ),
                    ],
                ),
                lines(
                    "Response size",
                    "bytes",
                    "Bytes of an answer's body: the mean, and what one of twenty exceeds.",
                    &[
                        (
                            r#"sum(rate(istio_response_bytes_sum{reporter=~"source|waypoint",destination_service=~"$service"}[$__rate_interval])) / sum(rate(istio_response_bytes_count{reporter=~"source|waypoint",destination_service=~"$service"}[$__rate_interval]))"#,
                            "mean",
                        ),
                        (
                            r#"histogram_quantile(0.95, sum by (le) (rate(istio_response_bytes_bucket{reporter=~"source|waypoint",destination_service=~"$service"}[$__rate_interval])))"#,
                            "p95",
                        ),
                    ],
                ),
            ],
        },
        Row {
            title: "Connections",
            panels: &[
                lines(
                    "Connections by client",
                    "cps",
                    "Connections per second by the workload that opened them, and whether over mutual TLS.",
                    &[(
                        r#"sum by (source_workload_namespace, source_workload, connection_security_policy) (rate(istio_tcp_connections_opened_total{destination_service=~"$service",reporter="destination"}[$__rate_interval]))"#,
                        "{{source_workload_namespace}}/{{source_workload}} {{connection_security_policy}}",
                    )],
                ),
                lines(
                    "Refused and failed",
                    "cps",
                    "By client and flag.",
                    &[(
                        r#"sum by (source_workload, response_flags) (rate(istio_tcp_connections_failed_total{destination_service=~"$service"}[$__rate_interval]))"#,
                        "{{source_workload}} {{response_flags}}",
                    )],
                ),
                lines(
                    "Bytes",
                    "Bps",
                    "Payload, as the servers' nodes counted it.",
                    &[
                        (
                            r#"sum(rate(istio_tcp_received_bytes_total{destination_service=~"$service",reporter="destination"}[$__rate_interval]))"#,
                            "to servers",
                        ),
                        (
                            r#"sum(rate(istio_tcp_sent_bytes_total{destination_service=~"$service",reporter="destination"}[$__rate_interval]))"#,
                            "to clients",
                        ),
                    ],
                ),
            ],
        },
    ],
};

/// One workload.
pub(super) const WORKLOAD: Dashboard = Dashboard {
    name: "workload",
    title: "Undermesh / Workload",
    choices: &[
        Choice {
            name: "namespace",
            title: "Namespace",
            query: "label_values(istio_tcp_connections_opened_total, destination_workload_namespace)",
        },
        Choice {
            name: "workload",
            title: "Workload",
            query: r#"label_values(istio_tcp_connections_opened_total{destination_workload_namespace=~"$namespace"}, destination_workload)"#,
        },
    ],
    rows: &[
        Row {
            title: "What it is asked",
            panels: &[
                lines(
                    "Requests",
                    "reqps",
                    "Requests per second that reached it through a waypoint, by client and status.",
                    &[(
                        r#"sum by (source_workload, response_code) (rate(istio_requests_total{reporter=~"destination|waypoint",destination_workload_namespace=~"$namespace",destination_workload=~"$workload"}[$__rate_interval]))"#,
                        "{{source_workload}} {{response_code}}",
                    )],
                ),
                lines(
                    "Time to answer",
                    "ms",
                    "Half of the requests were answered within the first figure, 99 of 100 within the last.",
                    &[
                        (
                            r#"histogram_quantile(0.5, sum by (le) (rate(istio_request_duration_milliseconds_bucket{reporter=~"destination|waypoint",destination_workload_namespace=~"$namespace",destination_workload=~"$workload"}[$__rate_interval])))"#,
                            "p50",
                        ),
                        (
                            r#"histogram_quantile(0.99, sum by (le) (rate(istio_request_duration_milliseconds_bucket{reporter=~"destination|waypoint",destination_workload_namespace=~"$namespace",destination_workload=~"$workload"}[$__rate_interval])))"#,
                            "p99",
                        ),
                    ],
                ),
                lines(
                    "Connections in",
                    "cps",
                    "Connections per second by client, and whether over mutual TLS.",
                    &[(
                        r#"sum by (source_workload_namespace, source_workload, connection_security_policy) (rate(istio_tcp_connections_opened_total{reporter="destination",destination_workload_namespace=~"$namespace",destination_workload=~"$workload"}[$__rate_interval]))"#,
                        "{{source_workload_namespace}}/{{source_workload}} {{connection_security_policy}}",
                    )],
                ),
                lines(
                    "Bytes in connections to it",
                    "Bps",
                    "Payload, as its node counted it.",
                    &[
                        (
                            r#"sum(rate(istio_tcp_received_bytes_total{reporter="destination",destination_workload_namespace=~"$namespace",destination_workload=~"$workload"}[$__rate_interval]))"#,
                            "received",
                        ),
                        (
                            r#"sum(rate(istio_tcp_sent_bytes_total{reporter="destination",destination_workload_namespace=~"$namespace",destination_workload=~"$workload"}[$__rate_interval]))"#,
                            "sent",
                        ),
                    ],
                ),
            ],
        },
        Row {
            title: "What it asks of others",
            panels: &[
                lines(
                    "Connections out",
                    "cps",
                    "Connections per second by service or server.",
                    &[(
                        r#"sum by (destination_service, destination_workload) (rate(istio_tcp_connections_opened_total{reporter="source",source_workload_namespace=~"$namespace",source_workload=~"$workload"}[$__rate_interval]))"#,
                        "{{destination_service}} {{destination_workload}}",
                    )],
                ),
                lines(
                    "Refused and failed",
                    "cps",
                    "Its connections that policy refused or that did not come about, by flag.",
                    &[(
                        r#"sum by (destination_service, response_flags) (rate(istio_tcp_connections_failed_total{source_workload_namespace=~"$namespace",source_workload=~"$workload"}[$__rate_interval]))"#,
                        "{{destination_service}} {{response_flags}}",
                    )],
                ),
            ],
        },
        Row {
            title: "The network under it",
            panels: &[
                lines(
                    "Round trip time",
                    "s",
                    "Smoothed by the kernel, of connections that closed: half of them were below the first figure.",
                    &[
                        (
                            r#"histogram_quantile(0.5, sum by (le) (rate(undermesh_tcp_rtt_seconds_bucket{destination_workload_namespace=~"$namespace",destination_workload=~"$workload"}[$__rate_interval])))"#,
                            "p50",
                        ),
                        (
                            r#"histogram_quantile(0.99, sum by (le) (rate(undermesh_tcp_rtt_seconds_bucket{destination_workload_namespace=~"$namespace",destination_workload=~"$workload"}[$__rate_interval])))"#,
                            "p99",
                        ),
                    ],
                ),
                lines(
                    "Sent again, dropped, failed",
                    "cps",
                    "Segments that were sent again, packets that the kernel dropped, connections that were never established.",
                    &[
                        (
                            r#"sum by (source_workload) (rate(undermesh_tcp_retransmits_total{destination_workload_namespace=~"$namespace",destination_workload=~"$workload"}[$__rate_interval]))"#,
                            "sent again from {{source_workload}}",
                        ),
                        (
                            r#"sum by (source_workload, reason) (rate(undermesh_packets_dropped_total{destination_workload_namespace=~"$namespace",destination_workload=~"$workload"}[$__rate_interval]))"#,
                            "dropped from {{source_workload}}: {{reason}}",
                        ),
                        (
                            r#"sum by (source_workload, reason) (rate(undermesh_tcp_connect_failures_total{destination_workload_namespace=~"$namespace",destination_workload=~"$workload"}[$__rate_interval]))"#,
                            "failed from {{source_workload}}: {{reason}}",
                        ),
                    ],
                ),
            ],
        },
    ],
};
