//! Labels, counters and lines against the worked examples of the reference.

mod lines;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;

use super::*;
use crate::error::Code;
use crate::hbone::Baggage;
use crate::hbone::copy::Meter;
use crate::policy::DryRun;
use crate::state::samples::{Mesh, WorkloadExt, pod, service};
use crate::xds::proto::workload as wire;

/// A writer that tests read.
#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Sink {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

struct Bench {
    registry: Registry,
    telemetry: Telemetry,
    cache: HandleCache,
}

impl Bench {
    fn new() -> Self {
        let mut registry = Registry::default();
        let tcp = TcpMetrics::register(&mut registry);
        let access_log =
            AccessLog::start(LogFormat::Text, Box::new(Sink::default()), Counter::default()).unwrap();
        Self { registry, telemetry: Telemetry { tcp, access_log }, cache: HandleCache::default() }
    }

    fn open(&mut self, connection: Connection) -> Recorder {
        self.telemetry.open(&mut self.cache, opened(connection))
    }

    fn scrape(&self) -> String {
        scrape(&self.registry, None).unwrap().1
    }

    /// Value of the only sample of a metric, or of the one with this label text.
    fn value(&self, metric: &str, with: &str) -> String {
        let text = self.scrape();
        let mut lines = text.lines().filter(|l| l.starts_with(&format!("{metric}{{")) && l.contains(with));
        let line = lines.next().unwrap_or_else(|| panic!("no {metric} with {with} in\n{text}"));
        assert!(lines.next().is_none(), "several {metric} with {with} in\n{text}");
        line.rsplit(' ').next().unwrap().to_owned()
    }
}

fn opened(connection: Connection) -> Opened {
    let address = |text: &str| text.parse::<SocketAddr>().unwrap();
    Opened {
        id: crate::flows::ConnectionId::default(),
        connection,
        started: Instant::now(),
        source: address("10.0.0.1:40000"),
        destination: address("10.0.0.2:15008"),
        hbone_target: Some("10.0.0.2:8080".parse().unwrap()),
        fast_path: false,
    }
}

/// `cart-7d` of deployment `cart` in r1/a calls service `pay` with pod `pay-5c` in r1/b.
fn shop() -> Mesh {
    let place =
        |zone: &str| wire::Locality { region: "r1".into(), zone: zone.into(), subzone: String::new() };
    let cart = wire::Workload {
        workload_name: "cart".into(),
        canonical_name: "cart".into(),
        service_account: "cart".into(),
        locality: Some(place("a")),
        ..pod("cart-7d", &["10.0.0.1"])
    };
    let pay = wire::Workload {
        workload_name: "pay".into(),
        canonical_name: "pay".into(),
        canonical_revision: "latest".into(),
        service_account: "pay".into(),
        locality: Some(place("b")),
        ..pod("pay-5c", &["10.0.0.2"])
    };
    Mesh::default().with(cart).with(pay.serving("pay", &[])).with(service("pay", "10.1.0.1", &[(80, 8080)]))
}

fn cart_to_pay(mesh: &Mesh, reporter: Reporter) -> Connection {
    let (cart, pay) = (mesh.workload("cart-7d"), mesh.workload("pay-5c"));
    let key = "shop/pay.shop.svc.cluster.local";
    Connection {
        reporter,
        source_identity: Some(cart.identity.clone()),
        source: Peer::Workload(cart),
        destination: Peer::Workload(pay),
        destination_identity: None,
        service: mesh.index.state().service(key).map(|s| s.service.clone()),
        security: SecurityPolicy::MutualTls,
    }
}

#[test]
fn the_label_set_is_the_one_of_the_worked_example_in_its_order() {
    let mut bench = Bench::new();
    let recorder = bench.open(cart_to_pay(&shop(), Reporter::Source));
    recorder.forward(300);
    recorder.backward(1200);
    let text = bench.scrape();
    let labels = concat!(
        r#"{reporter="source",source_workload="cart",source_canonical_service="cart","#,
        r#"source_canonical_revision="v1",source_workload_namespace="shop","#,
        r#"source_principal="spiffe://cluster.local/ns/shop/sa/cart",source_app="cart",source_version="v1","#,
        r#"source_cluster="Kubernetes",destination_service="pay.shop.svc.cluster.local","#,
        r#"destination_service_namespace="shop",destination_service_name="pay",destination_workload="pay","#,
        r#"destination_canonical_service="pay",destination_canonical_revision="latest","#,
        r#"destination_workload_namespace="shop",destination_principal="spiffe://cluster.local/ns/shop/sa/pay","#,
        r#"destination_app="pay",destination_version="latest",destination_cluster="Kubernetes","#,
        r#"request_protocol="tcp",response_flags="-",connection_security_policy="mutual_tls","#,
        r#"source_region="r1",source_zone="a",destination_region="r1",destination_zone="b"}"#,
    );
    for (metric, value) in [
        ("istio_tcp_connections_opened_total", 1),
        ("istio_tcp_received_bytes_total", 300),
        ("istio_tcp_sent_bytes_total", 1200),
    ] {
        let wanted = format!("{metric}{labels} {value}");
        assert!(text.lines().any(|line| line == wanted), "no\n{wanted}\nin\n{text}");
    }
    assert_eq!(bench.value("istio_tcp_sockets_open", "source"), "1");
    recorder.finish(None);
    assert_eq!(bench.value("istio_tcp_sockets_open", "source"), "0");
    assert_eq!(bench.value("istio_tcp_connections_closed_total", r#"response_flags="-""#), "1");
}

#[test]
fn nothing_known_is_unknown_and_has_no_locality() {
    let mut bench = Bench::new();
    let nobody = Connection {
        reporter: Reporter::Destination,
        source: Peer::Unknown,
        source_identity: None,
        destination: Peer::Unknown,
        destination_identity: None,
        service: None,
        security: SecurityPolicy::Unknown,
    };
    drop(bench.open(nobody));
    let text = bench.scrape();
    let line = text.lines().find(|l| l.starts_with("istio_tcp_connections_opened_total{")).unwrap();
    assert!(!line.contains("region") && !line.contains("zone") && !line.contains("=\"\""), "{line}");
    assert_eq!(line.matches("=\"unknown\"").count(), 20, "{line}");
    assert_eq!(line.matches('=').count(), 23, "{line}");
}

#[test]
fn one_known_side_brings_all_four_locality_labels() {
    let mut bench = Bench::new();
    let mut connection = cart_to_pay(&shop(), Reporter::Source);
    connection.destination = Peer::Unknown;
    connection.service = None;
    drop(bench.open(connection));
    let text = bench.scrape();
    let wanted =
        r#"source_region="r1",source_zone="a",destination_region="unknown",destination_zone="unknown"} 1"#;
    assert!(text.lines().any(|l| l.ends_with(wanted)), "{text}");
    assert!(text.contains(r#"destination_principal="unknown""#));
}

#[test]
fn bytes_count_by_the_direction_of_the_request_for_both_reporters() {
    let mut bench = Bench::new();
    let recorder = bench.open(cart_to_pay(&shop(), Reporter::Destination));
    // Here the first endpoint is the server.
    recorder.forward(7);
    recorder.backward(5);
    assert_eq!((recorder.received(), recorder.sent()), (5, 7));
    assert_eq!(bench.value("istio_tcp_received_bytes_total", "destination"), "5", "live, before the end");
    assert_eq!(bench.value("istio_tcp_sent_bytes_total", "destination"), "7");
}

#[test]
fn a_failure_counts_as_closed_and_failed_under_its_flag() {
    let mut bench = Bench::new();
    let denied = Failure::new(Code::PolicyDenied, "connection closed due to policy rejection");
    bench.open(cart_to_pay(&shop(), Reporter::Destination)).finish(Some(denied));
    assert_eq!(bench.value("istio_tcp_connections_opened_total", r#"response_flags="-""#), "1");
    assert_eq!(bench.value("istio_tcp_connections_closed_total", r#"response_flags="DENY""#), "1");
    assert_eq!(bench.value("istio_tcp_connections_failed_total", r#"response_flags="DENY""#), "1");
}

#[test]
fn a_recorder_that_is_dropped_was_drained_and_has_not_failed() {
    let mut bench = Bench::new();
    drop(bench.open(cart_to_pay(&shop(), Reporter::Source)));
    assert_eq!(bench.value("istio_tcp_connections_closed_total", r#"response_flags="-""#), "1");
    assert!(!bench.scrape().contains("istio_tcp_connections_failed_total{"));
    assert_eq!(bench.value("istio_tcp_sockets_open", "source"), "0");
}

#[test]
fn handles_are_shared_by_equal_peers_and_not_by_different_ones() {
    let mut bench = Bench::new();
    let mesh = shop();
    let connection = cart_to_pay(&mesh, Reporter::Source);
    let metrics = bench.telemetry.tcp.clone();
    let first = metrics.handle(&mut bench.cache, &connection);
    // A handshake brings an equal identity that is another object.
    let again = Connection {
        source_identity: Some("spiffe://cluster.local/ns/shop/sa/cart".parse().unwrap()),
        ..connection.clone()
    };
    assert!(Arc::ptr_eq(&first, &metrics.handle(&mut bench.cache, &again)));
    let others = [
        Connection { reporter: Reporter::Destination, ..connection.clone() },
        Connection { security: SecurityPolicy::Unknown, ..connection.clone() },
        Connection { source_identity: None, ..connection.clone() },
        Connection { destination: Peer::Unknown, ..connection.clone() },
        Connection { service: None, ..connection.clone() },
        Connection { destination_identity: Some("spiffe://a/ns/b/sa/c".parse().unwrap()), ..connection },
    ];
    for other in others {
        assert!(!Arc::ptr_eq(&first, &metrics.handle(&mut bench.cache, &other)), "{other:?}");
    }
}

#[test]
fn the_cache_of_handles_is_bounded() {
    let mut bench = Bench::new();
    let mesh = shop();
    for _ in 0..5000 {
        // Each a workload of its own, as after many updates.
        let source = Arc::new((*mesh.workload("cart-7d")).clone());
        let connection =
            Connection { source: Peer::Workload(source), ..cart_to_pay(&mesh, Reporter::Source) };
        let _ = bench.telemetry.tcp.handle(&mut bench.cache, &connection);
    }
    assert!(bench.cache.len() <= 4096, "{}", bench.cache.len());
}

#[test]
fn a_derived_peer_says_what_it_said_of_itself() {
    let mut bench = Bench::new();
    let said = Baggage::parse(
        "k8s.cluster.name=c2,k8s.namespace.name=bank,k8s.pod.name=atm,service.name=teller,service.version=v3,cloud.region=r7",
    );
    let source = Peer::Derived(Arc::new(said));
    let connection = Connection { source, ..cart_to_pay(&shop(), Reporter::Destination) };
    drop(bench.open(connection));
    let text = bench.scrape();
    for wanted in [
        r#"source_workload="atm",source_canonical_service="teller",source_canonical_revision="v3""#,
        r#"source_workload_namespace="bank""#,
        r#"source_app="atm",source_version="v3",source_cluster="c2""#,
        r#"source_region="r7",source_zone="unknown""#,
    ] {
        assert!(text.contains(wanted), "{wanted} in\n{text}");
    }
}

#[test]
fn the_service_is_named_by_the_client_or_inferred_from_the_port() {
    let mut mesh = Mesh::default()
        .with(service("api", "10.1.0.1", &[(80, 8080)]))
        .with(service("named", "10.1.0.2", &[(443, 0)]))
        .with(service("other", "10.1.0.3", &[(80, 8080)]))
        .with(service("not-mine", "10.1.0.4", &[(80, 8080)]))
        .with(
            pod("a", &["10.0.0.2"])
                .serving("api", &[])
                .serving("named", &[(443, 8443)])
                .serving("other", &[]),
        );
    let state = mesh.state();
    let a = mesh.workload("a");
    let infer =
        |port, named: Option<&str>| infer_service(&state, &a, port, named).map(|s| s.name.to_string());
    assert_eq!(infer(8080, Some("other.shop.svc.cluster.local")).as_deref(), Some("other"));
    assert_eq!(infer(8080, None).as_deref(), Some("api"), "the first with that target port");
    assert_eq!(
        infer(8080, Some("not-mine.shop.svc.cluster.local")).as_deref(),
        Some("api"),
        "not its service"
    );
    assert_eq!(infer(8443, None).as_deref(), Some("named"), "the endpoint's own port");
    assert_eq!(infer(9999, None), None);
}

#[test]
fn every_metric_of_the_node_has_its_name() {
    let mut registry = Registry::default();
    let metrics = NodeMetrics::register(&mut registry);
    register_build(&mut registry, "ztunnel", "0.1.0");
    registry.register_collector(Box::new(ProcessCollector));
    let dns = DnsLabels {
        query_type: "A".into(),
        protocol: "udp",
        source_canonical_service: "cart".into(),
        source_canonical_revision: "v1".into(),
    };
    metrics.dns_requests.get_or_create(&dns).inc();
    metrics.dns_upstream_requests.get_or_create(&dns).inc();
    metrics.dns_upstream_failures.get_or_create(&dns).inc();
    metrics.dns_upstream_duration.get_or_create(&dns).observe(0.02);
    metrics.xds_terminations.get_or_create(&TerminationReason::ConnectionError).inc();
    metrics.xds_messages.get_or_create(&UrlLabels(crate::xds::ADDRESS_TYPE)).inc();
    metrics.xds_message_bytes.get_or_create(&UrlLabels(crate::xds::ADDRESS_TYPE)).inc_by(9);
    metrics.crl_rejections.get_or_create(&ReporterLabels(Reporter::Source)).inc();
    metrics.crl_untracked.get_or_create(&ReporterLabels(Reporter::Source)).inc();
    let mut mesh = shop();
    let labels = OnDemandDnsLabels::new(mesh.state().workloads().next().unwrap(), &"db.example.com".into());
    metrics.on_demand_dns.get_or_create(&labels).inc();
    let mut dry_run = DryRunCounters::new(&metrics);
    for result in [
        DryRun::WouldDeny("shop/no".into()),
        DryRun::WouldDeny("shop/no".into()),
        DryRun::WouldAllow("shop/yes".into()),
        DryRun::WouldDenyNoneAllowed,
    ] {
        dry_run.count(&result);
    }
    metrics.connections_shed.get_or_create(&LimitLabels("share")).inc();
    let (kind, text) = scrape(&registry, None).unwrap();
    assert_eq!(kind, TEXT_TYPE);
    let source = r#"source_canonical_service="cart",source_canonical_revision="v1""#;
    let dns = format!(r#"{{request_query_type="A",request_protocol="udp",{source}}}"#);
    for line in [
        r#"istio_build{component="ztunnel",tag="0.1.0"} 1"#.to_owned(),
        format!("istio_dns_requests_total{dns} 1"),
        format!("istio_dns_upstream_requests_total{dns} 1"),
        format!("istio_dns_upstream_failures_total{dns} 1"),
        r#"istio_xds_connection_terminations_total{reason="ConnectionError"} 1"#.to_owned(),
        format!(r#"istio_xds_message_total{{url="{}"}} 1"#, crate::xds::ADDRESS_TYPE),
        format!(r#"istio_xds_message_bytes_total{{url="{}"}} 9"#, crate::xds::ADDRESS_TYPE),
        r#"istio_crl_policy_rejections_total{reporter="source"} 1"#.to_owned(),
        r#"istio_crl_untracked_connections_total{reporter="source"} 1"#.to_owned(),
        r#"undermesh_policy_dry_run_total{policy="shop/no",would="deny"} 2"#.to_owned(),
        r#"undermesh_policy_dry_run_total{policy="shop/yes",would="allow"} 1"#.to_owned(),
        r#"undermesh_policy_dry_run_total{policy="none",would="deny"} 1"#.to_owned(),
        r#"undermesh_connections_shed_total{limit="share"} 1"#.to_owned(),
        "workload_manager_active_proxy_count 0".to_owned(),
        "workload_manager_pending_proxy_count 0".to_owned(),
        "workload_manager_proxies_started_total 0".to_owned(),
        "workload_manager_proxies_stopped_total 0".to_owned(),
    ] {
        assert!(text.lines().any(|l| l == line), "no {line} in\n{text}");
    }
    assert!(text.contains(r#"hostname="db.example.com"}"#));
    let duration = "istio_dns_upstream_request_duration_seconds_bucket{le=\"0.1\",";
    assert!(text.contains(duration) && text.contains("le=\"5.0\""), "{text}");
    for name in ["process_cpu_seconds_total ", "process_resident_memory_bytes ", "process_open_fds "] {
        assert!(text.lines().any(|l| l.starts_with(name)), "{name} in\n{text}");
    }
}

#[test]
fn a_scraper_gets_the_format_that_it_asks_for() {
    let mut bench = Bench::new();
    drop(bench.open(cart_to_pay(&shop(), Reporter::Source)));
    let accept = "application/openmetrics-text;version=1.0.0,text/plain;q=0.5";
    let (kind, open) = scrape(&bench.registry, Some(accept)).unwrap();
    assert_eq!(kind, OPENMETRICS_TYPE);
    assert!(open.ends_with("# EOF\n") && open.contains("# TYPE istio_tcp_sent_bytes counter\n"));
    let (kind, text) = scrape(&bench.registry, Some("*/*")).unwrap();
    assert_eq!(kind, TEXT_TYPE);
    assert!(!text.contains("# EOF"));
    assert!(text.contains("# HELP istio_tcp_sent_bytes_total Bytes from server to client.\n# TYPE istio_tcp_sent_bytes_total counter\n"), "{text}");
    assert!(text.contains("# TYPE istio_tcp_sockets_open gauge\n"));
}

#[test]
fn a_waypoint_counts_requests_with_istios_labels_and_buckets() {
    use std::time::Duration;
    let mut registry = Registry::default();
    let metrics = RequestMetrics::register(&mut registry);
    let mut cache = RequestCache::default();
    let mesh = shop();
    let connection = cart_to_pay(&mesh, Reporter::Waypoint);
    let ok =
        Outcome { protocol: RequestProtocol::Http, code: 200, grpc_status: None, flags: Flags::default() };
    for _ in 0..2 {
        metrics.record(
            &mut cache,
            &connection,
            ok,
            Duration::from_millis(7),
            [10, 2000],
            (None, Some(0xabc)),
        );
    }
    let flags = Flags::UPSTREAM_RETRY_LIMIT_EXCEEDED.with(Flags::UPSTREAM_CONNECTION_FAILURE);
    let failed = Outcome { protocol: RequestProtocol::Grpc, code: 503, grpc_status: Some(14), flags };
    metrics.record(&mut cache, &connection, failed, Duration::ZERO, [0, 0], (None, None));
    let text = scrape(&registry, None).unwrap().1;
    let line = |start: &str, with: &str| {
        let found = text.lines().find(|l| l.starts_with(start) && l.contains(with));
        found.unwrap_or_else(|| panic!("no {start} with {with} in\n{text}")).to_owned()
    };
    let total = line("istio_requests_total{", "response_code=\"200\"");
    assert!(total.ends_with("} 2"), "{total}");
    let names: Vec<&str> =
        total.split('{').nth(1).unwrap().split("\",").map(|l| l.split('=').next().unwrap()).collect();
    let names_of = |range: std::ops::Range<usize>| names[range].to_vec();
    assert_eq!(names_of(0..3), ["reporter", "source_workload", "source_canonical_service"]);
    assert_eq!(
        names_of(20..24),
        ["request_protocol", "response_code", "response_flags", "connection_security_policy"]
    );
    assert_eq!(names.len(), 24);
    assert!(total.contains("reporter=\"waypoint\"") && total.contains("source_workload=\"cart\""), "{total}");
    let refused = line("istio_requests_total{", "grpc_response_status=\"14\"");
    assert!(
        refused.contains("request_protocol=\"grpc\"") && refused.contains("response_flags=\"UF,URX\""),
        "{refused}"
    );
    assert!(line("istio_request_duration_milliseconds_bucket{le=\"5.0\"", "\"200\"").ends_with(" 0"));
    assert!(line("istio_request_duration_milliseconds_bucket{le=\"10.0\"", "\"200\"").ends_with(" 2"));
    assert!(line("istio_response_bytes_sum{", "\"200\"").ends_with(" 4000.0"));
    assert!(line("istio_request_bytes_count{", "\"200\"").ends_with(" 2"));
    // A trace is named where the format has a place for it.
    assert!(!text.contains("trace_id"));
    let open = scrape(&registry, Some("application/openmetrics-text")).unwrap().1;
    let traced: Vec<&str> = open.lines().filter(|line| line.contains("trace_id")).collect();
    let exemplar = format!(" 2 # {{trace_id=\"{:032x}\"}} 7.0", 0xabc);
    assert!(traced.len() == 1 && traced[0].ends_with(&exemplar), "{traced:?}");
    assert!(traced[0].starts_with("istio_request_duration_milliseconds_bucket{le=\"10.0\""), "{traced:?}");
}

#[test]
fn labels_of_one_metric_may_be_taken_away_changed_and_added_and_another_metric_be_off() {
    let mut registry = Registry::default();
    let metrics = RequestMetrics::register(&mut registry);
    let mut cache = RequestCache::default();
    let connection = cart_to_pay(&shop(), Reporter::Waypoint);
    let ok =
        Outcome { protocol: RequestProtocol::Http, code: 200, grpc_status: None, flags: Flags::default() };
    let edits = |host: &str| -> LabelEdits {
        [
            ("request_host", Some(host)),
            ("response_code", Some("2xx")),
            ("source_app", None),
            ("which_is_not_there", None),
        ]
        .map(|(name, value)| (name.into(), value.map(Into::into)))
        .into()
    };
    for host in ["a", "b", "a"] {
        let requests = MetricShape { disabled: false, labels: edits(host) };
        let off = MetricShape { disabled: true, ..MetricShape::default() };
        let shape = Arc::new(Shape { requests, response_bytes: off, ..Shape::default() });
        metrics.record(&mut cache, &connection, ok, std::time::Duration::ZERO, [0, 0], (Some(&shape), None));
    }
    let text = scrape(&registry, None).unwrap().1;
    let totals: Vec<&str> = text.lines().filter(|line| line.starts_with("istio_requests_total{")).collect();
    assert_eq!(totals.len(), 2, "{text}");
    let of_a = totals.iter().find(|line| line.contains("request_host=\"a\"")).unwrap();
    assert!(of_a.contains("response_code=\"2xx\"") && of_a.ends_with(" 2"), "{of_a}");
    assert!(!of_a.contains("source_app") && !of_a.contains("which_is_not_there"), "{of_a}");
    let timed =
        text.lines().find(|line| line.starts_with("istio_request_duration_milliseconds_count{")).unwrap();
    assert!(
        timed.contains("source_app=") && timed.contains("response_code=\"200\"") && timed.ends_with(" 3")
    );
    assert!(!text.contains("istio_response_bytes_count{"));
}

#[test]
fn flags_are_written_in_envoys_order_and_read_back_by_name() {
    let both = Flags::FAULT_INJECTED.with(Flags::DELAY_INJECTED);
    assert_eq!(both.to_string(), "DI,FI");
    assert_eq!(Flags::default().to_string(), "-");
    assert_eq!(Flags::named("UAEX"), Some(Flags::UNAUTHORIZED_EXTERNAL));
    assert_eq!(Flags::named("nonsense"), None);
    assert!(both.has(Flags::FAULT_INJECTED) && !both.has(Flags::NO_ROUTE));
}

#[test]
fn statuses_that_no_protocol_knows_are_one_series() {
    let bounded = |code, grpc_status| {
        let outcome = Outcome { protocol: RequestProtocol::Grpc, code, grpc_status, flags: Flags::default() };
        let outcome = outcome.bounded();
        (outcome.code, outcome.grpc_status)
    };
    assert_eq!(bounded(599, Some(16)), (599, Some(16)));
    assert_eq!(bounded(600, Some(17)), (0, Some(2)));
    assert_eq!(bounded(999, Some(u16::MAX)), (0, Some(2)));
    assert_eq!(bounded(200, None), (200, None));
}
