//! Which Telemetry counts for whom, and what lines say.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::HeaderMap;
use mesh_core::flows::ConnectionId;
use mesh_core::telemetry::{AccessRecord, Direction, Event, Flags, RequestLines as _, RequestRecord};
use mesh_core::xds::proto::l7::telemetry::{AccessLogging, Metric, Mode, Override, TagOverride, Tracing};
use mesh_core::xds::proto::l7::{self, LogLayout, Logger, Origin, Settings, Target, Telemetry, target};

use super::facts::{Ended, Kept};
use super::logs::{Left, Logs};
use super::metrics::Metrics;
use super::{Observation, Observed};
use crate::config::{Own, Resources, Role};
use crate::request::Addressed;

fn own(role: Role) -> Own {
    Own {
        namespace: "infra".into(),
        gateway: "wp".into(),
        class: role.class().into(),
        role,
        ..Own::default()
    }
}

fn tracer(name: &str) -> l7::Tracer {
    l7::Tracer {
        name: name.into(),
        kind: Some(l7::tracer::Kind::Otlp(Default::default())),
        ..Default::default()
    }
}

fn settings() -> Settings {
    let text = |format: &str| Some(LogLayout { json: false, format: format.into() });
    Settings {
        root_namespace: "root".into(),
        tracers: vec![tracer("a"), tracer("b")],
        loggers: vec![
            Logger { name: "short".into(), layout: text("short %RESPONSE_CODE%\n"), ..Logger::default() },
            Logger {
                name: "json".into(),
                layout: Some(LogLayout { json: true, format: r#"{"code": "%RESPONSE_CODE%"}"#.into() }),
                ..Logger::default()
            },
        ],
        ..Settings::default()
    }
}

fn telemetry(namespace: &str, name: &str, targets: Vec<Target>) -> Telemetry {
    let origin = Origin { namespace: namespace.into(), name: name.into(), ..Origin::default() };
    Telemetry { origin: Some(origin), targets, ..Telemetry::default() }
}

fn service(namespace: &str, name: &str) -> Target {
    Target {
        kind: target::Kind::Service.into(),
        namespace: namespace.into(),
        name: name.into(),
        hostnames: vec![format!("{name}.{namespace}.svc")],
    }
}

fn observe(settings: Settings, own: &Own, telemetries: Vec<Telemetry>) -> Observation {
    let named = telemetries.into_iter().enumerate().map(|(i, t)| (i.to_string(), Arc::new(t)));
    let resources =
        Resources { settings: Arc::new(settings), telemetries: named.collect(), ..Resources::default() };
    let observation = Observation::build(&resources, own);
    assert_eq!(observation.problems(), []);
    observation
}

fn of<'a>(observation: &'a Observation, service: &str) -> &'a Arc<Observed> {
    observation.of(&Addressed::Service { key: service.into(), port: 80 })
}

fn sampling(percent: f64) -> Tracing {
    Tracing { sampling: Some(percent), ..Tracing::default() }
}

fn providers(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn mesh_then_the_waypoints_namespace_then_the_services_then_targets_decide_field_by_field() {
    let mesh = Telemetry {
        tracing: vec![Tracing { providers: providers(&["a"]), ..sampling(1.5) }],
        ..telemetry("root", "mesh", vec![])
    };
    let waypoint = Telemetry { tracing: vec![sampling(2.0)], ..telemetry("infra", "ns", vec![]) };
    let namespace = Telemetry {
        tracing: vec![Tracing { disable_span_reporting: Some(true), ..Tracing::default() }],
        ..telemetry("shop", "ns", vec![])
    };
    let target = Telemetry {
        tracing: vec![Tracing { providers: providers(&["b"]), ..sampling(50.0) }],
        ..telemetry("shop", "web", vec![service("shop", "web")])
    };
    let all = observe(settings(), &own(Role::Waypoint), vec![target, namespace, waypoint, mesh]);
    let said = |service: &str| {
        let tracing = of(&all, service).tracing.as_ref().unwrap();
        (tracing.tracer.name.clone(), tracing.sampling, tracing.report)
    };
    assert_eq!(said("other/x.other.svc"), ("a".into(), 2.0, true));
    assert_eq!(said("shop/cart.shop.svc"), ("a".into(), 2.0, false));
    assert_eq!(said("shop/web.shop.svc"), ("b".into(), 50.0, false));
}

#[test]
fn of_several_for_one_namespace_the_oldest_counts_and_modes_are_those_of_the_proxy() {
    let dated = |name: &str, created, section| {
        let mut telemetry = Telemetry { tracing: vec![section], ..telemetry("root", name, vec![]) };
        telemetry.origin.as_mut().unwrap().created = created;
        telemetry
    };
    let mode = |mode: Mode, percent| Tracing { mode: mode.into(), ..sampling(percent) };
    let both = |role| {
        let mut settings = settings();
        settings.default_tracers = providers(&["unknown", "b"]);
        let old = dated("z", 1, mode(Mode::Client, 10.0));
        let mut old = old;
        old.tracing.push(mode(Mode::Server, 20.0));
        let all = observe(settings, &own(role), vec![dated("a", 2, sampling(99.0)), old]);
        let tracing = of(&all, "shop/web.shop.svc").tracing.clone().unwrap();
        (tracing.tracer.name.clone(), tracing.sampling)
    };
    assert_eq!(both(Role::Waypoint), ("b".into(), 20.0));
    assert_eq!(both(Role::Gateway), ("b".into(), 10.0));
}

#[test]
fn a_provider_that_is_not_there_takes_no_spans_and_nobody_asks_for_it_means_none() {
    let missing = Telemetry {
        tracing: vec![Tracing { providers: providers(&["none"]), ..sampling(100.0) }],
        ..telemetry("root", "mesh", vec![])
    };
    let mut with_default = settings();
    with_default.default_tracers = providers(&["a"]);
    let all = observe(with_default, &own(Role::Waypoint), vec![missing]);
    assert!(of(&all, "shop/web.shop.svc").tracing.is_none());
    let all = observe(settings(), &own(Role::Waypoint), vec![]);
    assert!(of(&all, "shop/web.shop.svc").tracing.is_none());
}

fn record() -> (AccessRecord, RequestRecord) {
    let address = |text: &str| text.parse::<SocketAddr>().unwrap();
    let record = AccessRecord {
        event: Event::Request,
        id: ConnectionId::default(),
        at: SystemTime::UNIX_EPOCH,
        direction: Direction::Inbound,
        source: address("10.0.0.1:1234"),
        destination: address("10.96.0.1:80"),
        hbone_target: None,
        connection: None,
        received: 3,
        sent: 12,
        duration: Duration::from_millis(7),
        failure: None,
        fast_path: false,
        request: None,
    };
    let request = RequestRecord {
        method: "GET".into(),
        authority: "web.shop".into(),
        path: "/a?b=c".into(),
        protocol: "HTTP/1.1",
        code: 503,
        flags: Flags::NO_HEALTHY_UPSTREAM,
        details: "no_healthy_upstream".into(),
        request_id: "id".into(),
        trace: Some(0xabc),
        ..RequestRecord::default()
    };
    (record, request)
}

fn lines(observed: &Observed, change: impl FnOnce(&mut RequestRecord)) -> String {
    let Logs::Lines(logs) = &observed.logs else { return "own".into() };
    let (record, mut request) = record();
    change(&mut request);
    let request_headers: HeaderMap =
        [("x-user".parse().unwrap(), "tester".parse().unwrap())].into_iter().collect();
    let kept = Kept {
        request: request_headers,
        cluster: "inbound-vip|80|http|web.shop.svc".into(),
        upstream: Some("10.0.0.9:8080".parse().unwrap()),
        attempts: 2,
        ..Kept::default()
    };
    let mut text = String::new();
    Left { logs: Arc::clone(logs), kept }.write(&record, &request, &mut text);
    text
}

fn logged(settings: Settings, telemetries: Vec<Telemetry>) -> String {
    let all = observe(settings, &own(Role::Waypoint), telemetries);
    lines(of(&all, "shop/web.shop.svc"), |_| {})
}

#[test]
fn the_mesh_settings_turn_lines_on_and_off_and_give_them_a_layout() {
    assert_eq!(logged(settings(), vec![]), "own");
    let with = |file: Option<&str>, layout: Option<LogLayout>| {
        let access_log_file = file.map(str::to_owned);
        logged(Settings { access_log_file, access_log_layout: layout, ..settings() }, vec![])
    };
    assert_eq!(with(Some(""), None), "");
    assert_eq!(
        with(Some("/dev/stdout"), None),
        "[1970-01-01T00:00:00.000Z] \"GET /a?b=c HTTP/1.1\" 503 UH no_healthy_upstream - \"-\" 3 12 7 - \"-\" \"-\" \"id\" \"web.shop\" \"10.0.0.9:8080\" inbound-vip|80|http|web.shop.svc - 10.96.0.1:80 10.0.0.1:1234 - default\n"
    );
    let layout = LogLayout {
        json: true,
        format: r#"{"u": "%REQ(x-user)%", "t": "%TRACE_ID%", "n": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%"}"#
            .into(),
    };
    let line: BTreeMap<String, serde_json::Value> = serde_json::from_str(&with(None, Some(layout))).unwrap();
    assert_eq!(line["u"], "tester");
    assert_eq!(line["t"], format!("{:032x}", 0xabc));
    assert_eq!(line["n"], 2);
}

#[test]
fn telemetry_chooses_providers_filters_requests_and_turns_lines_off() {
    let section = |names: &[&str], filter: &str| AccessLogging {
        providers: providers(names),
        filter: filter.into(),
        ..AccessLogging::default()
    };
    let mesh = |sections: Vec<AccessLogging>| Telemetry {
        access_logging: sections,
        ..telemetry("root", "mesh", vec![])
    };
    assert_eq!(logged(settings(), vec![mesh(vec![section(&["short"], "")])]), "short 503\n");
    let both = mesh(vec![section(&["short", "json"], "response.code >= 500")]);
    assert_eq!(logged(settings(), vec![both.clone()]), "{\"code\":503}\nshort 503\n");
    let all = observe(settings(), &own(Role::Waypoint), vec![both.clone()]);
    assert_eq!(lines(of(&all, "shop/web.shop.svc"), |request| request.code = 200), "");
    // A namespace of its own mind.
    let namespace = Telemetry {
        access_logging: vec![section(&["json"], "request.headers['x-user'] == 'tester'")],
        ..telemetry("shop", "ns", vec![])
    };
    assert_eq!(logged(settings(), vec![both.clone(), namespace]), "{\"code\":503}\n");
    let off = Telemetry {
        access_logging: vec![AccessLogging { disabled: Some(true), ..AccessLogging::default() }],
        ..telemetry("shop", "ns", vec![])
    };
    assert_eq!(logged(settings(), vec![both, off.clone()]), "");
    // Where defaults are used, too.
    let defaults = Settings { default_loggers: providers(&["short"]), ..settings() };
    assert_eq!(logged(defaults.clone(), vec![]), "short 503\n");
    assert_eq!(logged(defaults, vec![off]), "");
}

#[test]
fn the_provider_that_istio_always_has_writes_the_mesh_settings_layout() {
    let envoy = Telemetry {
        access_logging: vec![AccessLogging { providers: providers(&["envoy"]), ..AccessLogging::default() }],
        ..telemetry("root", "mesh", vec![])
    };
    let layout = Some(LogLayout { json: false, format: "%REQ(:METHOD)% %ROUTE_NAME%".into() });
    let settings = Settings { access_log_layout: layout, access_log_file: Some(String::new()), ..settings() };
    assert_eq!(logged(settings, vec![envoy]), "GET default\n");
}

fn overrides(namespace: &str, providers: &[&str], overrides: Vec<Override>) -> Telemetry {
    let providers = providers.iter().map(|name| (*name).to_owned()).collect();
    let metrics = vec![l7::telemetry::Metrics { providers, overrides }];
    Telemetry { metrics, ..telemetry(namespace, "metrics", vec![]) }
}

fn change(metric: Metric, disabled: Option<bool>, tags: &[(&str, Option<&str>)]) -> Override {
    let tag = |(name, value): &(&str, Option<&str>)| TagOverride {
        name: (*name).to_owned(),
        value: value.map(str::to_owned),
    };
    Override { metric: metric.into(), disabled, tags: tags.iter().map(tag).collect(), ..Override::default() }
}

/// Which metrics are counted, and the labels of the first; none: nothing is counted.
fn counted(settings: Settings, telemetries: Vec<Telemetry>) -> Option<([bool; 4], String)> {
    let all = observe(settings, &own(Role::Waypoint), telemetries);
    let observed = of(&all, "shop/web.shop.svc");
    if matches!(observed.metrics, Metrics::Off) {
        return None;
    }
    let (record, request) = record();
    let kept = Kept::default();
    let shape = observed.metrics.shape(Some(&Ended { record: &record, request: &request, kept: &kept }));
    let shape = shape.unwrap_or_default();
    let labels = shape.requests.labels.iter();
    let labels = labels.map(|(name, value)| format!("{name}={}", value.as_deref().unwrap_or("-")));
    let each = [&shape.requests, &shape.duration, &shape.request_bytes, &shape.response_bytes];
    Some((each.map(|metric| !metric.disabled), labels.collect::<Vec<_>>().join(" ")))
}

#[test]
fn overrides_of_metrics_add_up_from_the_mesh_to_the_service() {
    let all = [true; 4];
    assert_eq!(counted(settings(), vec![]), Some((all, String::new())));
    let mesh = overrides(
        "root",
        &[],
        vec![
            change(Metric::AllMetrics, None, &[("source_app", None), ("fixed", Some("'x'"))]),
            change(Metric::ResponseSize, Some(true), &[]),
        ],
    );
    assert_eq!(
        counted(settings(), vec![mesh.clone()]),
        Some(([true, true, true, false], "fixed=x source_app=-".into()))
    );
    let namespace = overrides(
        "shop",
        &[],
        vec![
            change(
                Metric::RequestCount,
                None,
                &[("fixed", Some("request.host")), ("missing", Some("request.headers['no']"))],
            ),
            change(Metric::ResponseSize, Some(false), &[]),
        ],
    );
    assert_eq!(
        counted(settings(), vec![mesh, namespace]),
        Some((all, "fixed=web.shop missing=unknown source_app=-".into()))
    );
}

#[test]
fn metrics_are_off_where_all_are_disabled_or_nobody_scrapes_and_on_again_further_down() {
    let off = || overrides("root", &["prometheus"], vec![change(Metric::AllMetrics, Some(true), &[])]);
    assert_eq!(counted(settings(), vec![off()]), None);
    let on = overrides("shop", &[], vec![change(Metric::RequestCount, Some(false), &[])]);
    assert_eq!(counted(settings(), vec![off(), on]), Some(([true; 4], String::new())));
    assert_eq!(counted(settings(), vec![overrides("root", &["stackdriver"], vec![])]), None);
    let elsewhere = Settings { default_metrics: providers(&["stackdriver"]), ..settings() };
    assert_eq!(counted(elsewhere.clone(), vec![]), None);
    let mine = Settings { scraped: providers(&["stackdriver"]), ..elsewhere };
    assert_eq!(counted(mine, vec![]), Some(([true; 4], String::new())));
    // What is said of clients is none of a waypoint's business.
    let mut clients = overrides("root", &[], vec![change(Metric::AllMetrics, Some(true), &[])]);
    clients.metrics[0].overrides[0].mode = Mode::Client.into();
    assert_eq!(counted(settings(), vec![clients]), Some(([true; 4], String::new())));
}
