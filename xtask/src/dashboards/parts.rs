//! What operators of the mesh look at: node agents, waypoints, the control plane, flows.

use super::{Choice, Dashboard, Row, figure, lines};

const INSTANCE: &str = "instance";

/// Node agents.
pub(super) const NODE: Dashboard = Dashboard {
    name: "node",
    title: "Undermesh / Node agents",
    choices: &[Choice {
        name: INSTANCE,
        title: "Agent",
        query: r#"label_values(istio_build{component="ztunnel"}, instance)"#,
    }],
    rows: &[
        Row {
            title: "At a glance",
            panels: &[
                figure(
                    "Agents",
                    "none",
                    "Agents that answer.",
                    &[(r#"sum(istio_build{component="ztunnel"})"#, "")],
                ),
                figure(
                    "Pods",
                    "none",
                    "Pods in the mesh.",
                    &[(r#"sum(workload_manager_active_proxy_count{instance=~"$instance"})"#, "")],
                ),
                figure(
                    "Pods that wait",
                    "none",
                    "Pods that should be in the mesh and could not be taken yet.",
                    &[(r#"sum(workload_manager_pending_proxy_count{instance=~"$instance"})"#, "")],
                ),
                figure(
                    "Connections",
                    "none",
                    "Connections and tunnels that agents hold.",
                    &[(r#"sum(undermesh_connections_open{instance=~"$instance"})"#, "")],
                ),
            ],
        },
        Row {
            title: "Traffic",
            panels: &[
                lines(
                    "Connections held, of how many",
                    "percentunit",
                    "Share of the connections that an agent may hold.",
                    &[(
                        r#"undermesh_connections_open{instance=~"$instance"} / undermesh_connections_limit{instance=~"$instance"}"#,
                        "{{instance}}",
                    )],
                ),
                lines(
                    "Refused for lack of room",
                    "cps",
                    "Connections that a limit of agent, pod, fair share or memory refused; 0 where there were none.",
                    &[(
                        r#"sum by (instance, limit) (rate(undermesh_connections_shed_total{instance=~"$instance"}[$__rate_interval]))"#,
                        "{{instance}} {{limit}}",
                    )],
                ),
                lines(
                    "Bytes",
                    "Bps",
                    "Payload that agents carried, both ends of each connection counted.",
                    &[
                        (
                            r#"sum by (instance) (rate(istio_tcp_received_bytes_total{instance=~"$instance"}[$__rate_interval]))"#,
                            "{{instance}} to servers",
                        ),
                        (
                            r#"sum by (instance) (rate(istio_tcp_sent_bytes_total{instance=~"$instance"}[$__rate_interval]))"#,
                            "{{instance}} to clients",
                        ),
                    ],
                ),
                lines(
                    "What the kernel programs did",
                    "cps",
                    "Connections and DNS queries by what became of them; docs/metrics.md explains the reasons.",
                    &[(
                        r#"sum by (reason) (rate(undermesh_kernel_events_total{instance=~"$instance"}[$__rate_interval]))"#,
                        "{{reason}}",
                    )],
                ),
                lines(
                    "Most expensive pods",
                    "percentunit",
                    "Share of a worker that connections of a pod used.",
                    &[(
                        r#"topk(10, sum by (namespace, pod) (rate(undermesh_pod_worker_seconds_total{instance=~"$instance"}[$__rate_interval])))"#,
                        "{{namespace}}/{{pod}}",
                    )],
                ),
                lines(
                    "Pods with most connections",
                    "none",
                    "Connections that are open now.",
                    &[(
                        r#"topk(10, sum by (namespace, pod) (undermesh_pod_connections_open{instance=~"$instance"}))"#,
                        "{{namespace}}/{{pod}}",
                    )],
                ),
            ],
        },
        Row {
            title: "The process",
            panels: &[
                lines(
                    "CPU",
                    "percentunit",
                    "Cores that the agent uses.",
                    &[(
                        r#"rate(process_cpu_seconds_total{instance=~"$instance"}[$__rate_interval]) and on (instance) istio_build{component="ztunnel"}"#,
                        "{{instance}}",
                    )],
                ),
                lines(
                    "Memory",
                    "bytes",
                    "Resident memory.",
                    &[(
                        r#"process_resident_memory_bytes{instance=~"$instance"} and on (instance) istio_build{component="ztunnel"}"#,
                        "{{instance}}",
                    )],
                ),
                lines(
                    "Open files",
                    "none",
                    "Open files and sockets.",
                    &[(
                        r#"process_open_fds{instance=~"$instance"} and on (instance) istio_build{component="ztunnel"}"#,
                        "{{instance}}",
                    )],
                ),
                lines(
                    "Lines of the access log that were lost",
                    "cps",
                    "Nobody read the log fast enough.",
                    &[(
                        r#"sum by (instance) (rate(undermesh_access_log_dropped_total{instance=~"$instance"}[$__rate_interval]))"#,
                        "{{instance}}",
                    )],
                ),
            ],
        },
        Row {
            title: "Names and configuration",
            panels: &[
                lines(
                    "DNS queries",
                    "reqps",
                    "Queries that pods asked, and those that went on to a resolver.",
                    &[
                        (
                            r#"sum by (request_query_type) (rate(istio_dns_requests_total{instance=~"$instance"}[$__rate_interval]))"#,
                            "{{request_query_type}}",
                        ),
                        (
                            r#"sum(rate(istio_dns_upstream_requests_total{instance=~"$instance"}[$__rate_interval]))"#,
                            "to a resolver",
                        ),
                    ],
                ),
                lines(
                    "Configuration received",
                    "cps",
                    "Messages of the control plane, by type.",
                    &[(
                        r#"sum by (url) (rate(istio_xds_message_total{instance=~"$instance"}[$__rate_interval]))"#,
                        "{{url}}",
                    )],
                ),
            ],
        },
    ],
};

/// Waypoints and gateways.
pub(super) const WAYPOINT: Dashboard = Dashboard {
    name: "waypoint",
    title: "Undermesh / Waypoints and gateways",
    choices: &[Choice {
        name: INSTANCE,
        title: "Waypoint",
        query: r#"label_values(istio_build{component="proxy"}, instance)"#,
    }],
    rows: &[
        Row {
            title: "Requests",
            panels: &[
                lines(
                    "Requests",
                    "reqps",
                    "Requests per second by waypoint.",
                    &[(
                        r#"sum by (instance) (rate(istio_requests_total{instance=~"$instance"}[$__rate_interval]))"#,
                        "{{instance}}",
                    )],
                ),
                lines(
                    "Answers",
                    "reqps",
                    "Requests per second by status and why the waypoint answered itself (Envoy's flags; -: it did not).",
                    &[(
                        r#"sum by (response_code, response_flags) (rate(istio_requests_total{instance=~"$instance"}[$__rate_interval]))"#,
                        "{{response_code}} {{response_flags}}",
                    )],
                ),
                lines(
                    "Time to answer",
                    "ms",
                    "Half of the requests were answered within the first figure, 99 of 100 within the last.",
                    &[
                        (
                            r#"histogram_quantile(0.5, sum by (le, instance) (rate(istio_request_duration_milliseconds_bucket{instance=~"$instance"}[$__rate_interval])))"#,
                            "{{instance}} p50",
                        ),
                        (
                            r#"histogram_quantile(0.99, sum by (le, instance) (rate(istio_request_duration_milliseconds_bucket{instance=~"$instance"}[$__rate_interval])))"#,
                            "{{instance}} p99",
                        ),
                    ],
                ),
                lines(
                    "Bytes",
                    "Bps",
                    "Bodies of requests and answers.",
                    &[
                        (
                            r#"sum by (instance) (rate(istio_request_bytes_sum{instance=~"$instance"}[$__rate_interval]))"#,
                            "{{instance}} requests",
                        ),
                        (
                            r#"sum by (instance) (rate(istio_response_bytes_sum{instance=~"$instance"}[$__rate_interval]))"#,
                            "{{instance}} answers",
                        ),
                    ],
                ),
            ],
        },
        Row {
            title: "The process",
            panels: &[
                lines(
                    "Streams open",
                    "none",
                    "Connections of clients in tunnels that are open now.",
                    &[(r#"undermesh_waypoint_streams_open{instance=~"$instance"}"#, "{{instance}}")],
                ),
                lines(
                    "CPU",
                    "percentunit",
                    "Cores that the waypoint uses.",
                    &[(
                        r#"rate(process_cpu_seconds_total{instance=~"$instance"}[$__rate_interval]) and on (instance) istio_build{component="proxy"}"#,
                        "{{instance}}",
                    )],
                ),
                lines(
                    "Memory",
                    "bytes",
                    "Resident memory.",
                    &[(
                        r#"process_resident_memory_bytes{instance=~"$instance"} and on (instance) istio_build{component="proxy"}"#,
                        "{{instance}}",
                    )],
                ),
            ],
        },
    ],
};

/// The control plane.
pub(super) const CONTROL: Dashboard = Dashboard {
    name: "control",
    title: "Undermesh / Control plane",
    choices: &[],
    rows: &[
        Row {
            title: "At a glance",
            panels: &[
                figure("Proxies", "none", "Connected node agents and waypoints.", &[("sum(pilot_xds)", "")]),
                figure(
                    "Behind",
                    "none",
                    "Connected proxies that have not acknowledged the newest configuration.",
                    &[("sum(undermesh_proxies_behind)", "")],
                ),
                figure(
                    "Rejections",
                    "none",
                    "What proxies rejected in the last hour; 0 where there was none.",
                    &[("sum(increase(pilot_total_xds_rejects[1h]))", "")],
                ),
                figure(
                    "Wrong in the source",
                    "none",
                    "Objects, or files, that cannot be read as they are: meshctl status says which.",
                    &[("max(galley_validation_failed)", "")],
                ),
                figure(
                    "Root ends in",
                    "s",
                    "Until the first root certificate ends.",
                    &[("min(citadel_server_root_cert_expiry_seconds)", "")],
                ),
                figure(
                    "Chain ends in",
                    "s",
                    "Until the certificate that signs, or one above it, ends.",
                    &[("min(citadel_server_cert_chain_expiry_seconds)", "")],
                ),
            ],
        },
        Row {
            title: "From a change to the last proxy",
            panels: &[
                lines(
                    "Until all proxies have it",
                    "s",
                    "From a change to the last connected proxy's acknowledgement.",
                    &[
                        (
                            "histogram_quantile(0.5, sum by (le) (rate(undermesh_convergence_seconds_bucket[$__rate_interval])))",
                            "p50",
                        ),
                        (
                            "histogram_quantile(0.99, sum by (le) (rate(undermesh_convergence_seconds_bucket[$__rate_interval])))",
                            "p99",
                        ),
                    ],
                ),
                lines(
                    "Until a proxy has it",
                    "s",
                    "The same for each proxy by itself.",
                    &[
                        (
                            "histogram_quantile(0.5, sum by (le) (rate(pilot_proxy_convergence_time_bucket[$__rate_interval])))",
                            "p50",
                        ),
                        (
                            "histogram_quantile(0.99, sum by (le) (rate(pilot_proxy_convergence_time_bucket[$__rate_interval])))",
                            "p99",
                        ),
                    ],
                ),
                lines(
                    "What led to pushes",
                    "cps",
                    "Changes of configuration, and reports of nodes.",
                    &[("sum by (type) (rate(pilot_push_triggers[$__rate_interval]))", "{{type}}")],
                ),
                lines(
                    "Pushes",
                    "cps",
                    "Responses sent, by type.",
                    &[("sum by (type) (rate(pilot_xds_pushes[$__rate_interval]))", "{{type}}")],
                ),
                lines(
                    "Time spent",
                    "percentunit",
                    "Share of a core for reading objects into resources, and for making responses.",
                    &[
                        ("sum(rate(pilot_pushcontext_init_seconds_sum[$__rate_interval]))", "resources"),
                        ("sum(rate(pilot_xds_push_time_sum[$__rate_interval]))", "responses"),
                    ],
                ),
                lines(
                    "Not acknowledged",
                    "cps",
                    "Changes that a proxy did not acknowledge within a minute, and rejections.",
                    &[
                        (
                            "sum(rate(undermesh_convergence_unfinished_total[$__rate_interval]))",
                            "not within a minute",
                        ),
                        (
                            "sum by (type) (rate(pilot_total_xds_rejects[$__rate_interval]))",
                            "rejected {{type}}",
                        ),
                    ],
                ),
            ],
        },
        Row {
            title: "What there is",
            panels: &[
                lines(
                    "Proxies",
                    "none",
                    "Connected proxies by type.",
                    &[("sum by (type) (undermesh_proxies)", "{{type}}")],
                ),
                lines(
                    "Objects",
                    "none",
                    "Objects in force, by kind.",
                    &[("max by (kind) (undermesh_model_objects) > 0", "{{kind}}")],
                ),
                lines(
                    "Resources",
                    "none",
                    "What is served to proxies, by type.",
                    &[("max by (type) (undermesh_model_resources)", "{{type}}")],
                ),
                lines(
                    "Size of resources",
                    "bytes",
                    "What a proxy that takes everything gets, by type.",
                    &[("max by (type) (undermesh_model_bytes)", "{{type}}")],
                ),
            ],
        },
        Row {
            title: "Certificates, events, the process",
            panels: &[
                lines(
                    "Certificates",
                    "cps",
                    "Asked for, and issued.",
                    &[
                        ("sum(rate(citadel_server_csr_count[$__rate_interval]))", "asked for"),
                        ("sum(rate(citadel_server_success_cert_issuance_count[$__rate_interval]))", "issued"),
                        (
                            "sum(rate(citadel_server_authentication_failure_count[$__rate_interval]))",
                            "callers refused",
                        ),
                    ],
                ),
                lines(
                    "Nodes at the relay",
                    "none",
                    "Nodes that send events of connections.",
                    &[("sum(undermesh_relay_nodes)", "nodes")],
                ),
                lines(
                    "CPU",
                    "percentunit",
                    "Cores that the control plane uses.",
                    &[(
                        r#"rate(process_cpu_seconds_total[$__rate_interval]) and on (instance) istio_build{component="pilot"}"#,
                        "{{instance}}",
                    )],
                ),
                lines(
                    "Memory",
                    "bytes",
                    "Resident memory.",
                    &[(
                        r#"process_resident_memory_bytes and on (instance) istio_build{component="pilot"}"#,
                        "{{instance}}",
                    )],
                ),
            ],
        },
    ],
};

/// What the kernel tells of connections.
pub(super) const FLOWS: Dashboard = Dashboard {
    name: "flows",
    title: "Undermesh / Flows",
    choices: &[
        Choice {
            name: "source",
            title: "Client's namespace",
            query: "label_values(undermesh_tcp_rtt_seconds_count, source_workload_namespace)",
        },
        Choice {
            name: "destination",
            title: "Server's namespace",
            query: "label_values(undermesh_tcp_rtt_seconds_count, destination_workload_namespace)",
        },
    ],
    rows: &[
        Row {
            title: "Trouble, by client and server",
            panels: &[
                lines(
                    "Packets dropped",
                    "pps",
                    "By the kernel's reason: NETFILTER_DROP is a firewall rule or NetworkPolicy, NO_SOCKET nobody who listens.",
                    &[(
                        r#"sum by (source_workload, destination_workload, reason) (rate(undermesh_packets_dropped_total{source_workload_namespace=~"$source",destination_workload_namespace=~"$destination"}[$__rate_interval]))"#,
                        "{{source_workload}} to {{destination_workload}}: {{reason}}",
                    )],
                ),
                lines(
                    "Connections never established",
                    "cps",
                    "ECONNREFUSED: nobody listens; ETIMEDOUT: no answer; ABORTED: the application gave up.",
                    &[(
                        r#"sum by (source_workload, destination_workload, reason) (rate(undermesh_tcp_connect_failures_total{source_workload_namespace=~"$source",destination_workload_namespace=~"$destination"}[$__rate_interval]))"#,
                        "{{source_workload}} to {{destination_workload}}: {{reason}}",
                    )],
                ),
                lines(
                    "Segments sent again",
                    "pps",
                    "Of connections that have closed.",
                    &[(
                        r#"sum by (source_workload, destination_workload) (rate(undermesh_tcp_retransmits_total{source_workload_namespace=~"$source",destination_workload_namespace=~"$destination"}[$__rate_interval]))"#,
                        "{{source_workload}} to {{destination_workload}}",
                    )],
                ),
                lines(
                    "Refused by policy",
                    "cps",
                    "Connections that policy refused, at the server's node.",
                    &[(
                        r#"sum by (source_workload, destination_workload) (rate(istio_tcp_connections_failed_total{response_flags="DENY",source_workload_namespace=~"$source",destination_workload_namespace=~"$destination"}[$__rate_interval]))"#,
                        "{{source_workload}} to {{destination_workload}}",
                    )],
                ),
            ],
        },
        Row {
            title: "Speed",
            panels: &[
                lines(
                    "Round trip time, p50",
                    "s",
                    "Smoothed by the kernel, of connections that closed.",
                    &[(
                        r#"histogram_quantile(0.5, sum by (le, source_workload, destination_workload) (rate(undermesh_tcp_rtt_seconds_bucket{source_workload_namespace=~"$source",destination_workload_namespace=~"$destination"}[$__rate_interval])))"#,
                        "{{source_workload}} to {{destination_workload}}",
                    )],
                ),
                lines(
                    "Round trip time, p99",
                    "s",
                    "Smoothed by the kernel, of connections that closed.",
                    &[(
                        r#"histogram_quantile(0.99, sum by (le, source_workload, destination_workload) (rate(undermesh_tcp_rtt_seconds_bucket{source_workload_namespace=~"$source",destination_workload_namespace=~"$destination"}[$__rate_interval])))"#,
                        "{{source_workload}} to {{destination_workload}}",
                    )],
                ),
            ],
        },
        Row {
            title: "Tracing itself",
            panels: &[
                lines(
                    "Events",
                    "cps",
                    "What became of the kernel's events: told, lost (no room), repeated (added to another), unsampled; and packets that a busy hook missed.",
                    &[(
                        "sum by (outcome) (rate(undermesh_trace_events_total[$__rate_interval]))",
                        "{{outcome}}",
                    )],
                ),
                lines(
                    "Events at the relay",
                    "cps",
                    "Events of all nodes, by verdict.",
                    &[(
                        "sum by (verdict) (rate(undermesh_relay_events_total[$__rate_interval]))",
                        "{{verdict}}",
                    )],
                ),
                lines(
                    "Missed at the relay",
                    "cps",
                    "Held back by nodes (more than --relay-events), no room in their kernels, readers that were too slow.",
                    &[(
                        "sum by (reason) (rate(undermesh_relay_missed_events_total[$__rate_interval]))",
                        "{{reason}}",
                    )],
                ),
            ],
        },
    ],
};
