//! Traces: which requests have spans, what endpoints are told, and what collectors get.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, Request};
use mesh_core::xds::proto::l7::{self, tracer};
use mesh_core::xds::proto::otlp;
use mesh_core::xds::proto::workload::AppProtocol;
use prost::Message as _;

use super::bed::*;

const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// A collector that keeps what it is sent, and an application that keeps the headers it gets.
struct Seen {
    exports: Rc<RefCell<Vec<Request<Bytes>>>>,
    headers: Rc<RefCell<Vec<HeaderMap>>>,
}

impl Seen {
    fn spans(&self) -> Vec<otlp::Span> {
        let exports = self.exports.borrow();
        let messages = exports.iter().map(|e| otlp::ExportTraceServiceRequest::decode(e.body().clone()));
        let resources = messages.flat_map(|message| message.unwrap().resource_spans);
        resources.flat_map(|resource| resource.scope_spans).flat_map(|scope| scope.spans).collect()
    }
}

fn tag<'a>(span: &'a otlp::Span, key: &str) -> Option<&'a str> {
    let found = span.attributes.iter().find(|pair| pair.key == key)?;
    match found.value.as_ref()?.value.as_ref()? {
        otlp::any_value::Value::StringValue(text) => Some(text),
        _ => None,
    }
}

fn provider(kind: tracer::Kind) -> l7::Tracer {
    let service = l7::ServiceRef {
        hostname: "collector.shop.svc.cluster.local".into(),
        port: 80,
        ..Default::default()
    };
    l7::Tracer { name: "collector".into(), service: Some(service), longest_tag: 0, kind: Some(kind) }
}

fn over_http() -> tracer::Kind {
    tracer::Kind::Otlp(tracer::Otlp { http_path: "/v1/traces".into(), ..Default::default() })
}

fn settings(sampling: f64, kind: tracer::Kind) -> l7::Settings {
    l7::Settings {
        tracers: vec![provider(kind)],
        default_tracers: vec!["collector".into()],
        default_sampling: Some(sampling),
        ..l7::Settings::default()
    }
}

async fn traced(settings: l7::Settings, change: impl FnOnce(Bed) -> Bed) -> (Waypoint, Seen) {
    let seen = Seen { exports: Rc::default(), headers: Rc::default() };
    let exports = Rc::clone(&seen.exports);
    let collector = app("collector", move |request| {
        exports.borrow_mut().push(request);
        std::future::ready(text(200, ""))
    });
    let headers = Rc::clone(&seen.headers);
    let web = app("web", move |request: Request<Bytes>| {
        let status = if request.uri().path() == "/fail" { 503 } else { 200 };
        headers.borrow_mut().push(request.headers().clone());
        std::future::ready(text(status, "web"))
    });
    let mut bed = Bed::new(&[web.await]).beside(collector.await, AppProtocol::Http11);
    bed.resources.settings = Arc::new(settings);
    (change(bed).start().await, seen)
}

async fn until(holds: impl Fn() -> bool) {
    while !holds() {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

#[test]
fn a_sampled_request_has_a_span_of_its_own_and_one_for_its_try_in_the_clients_trace() {
    run(async {
        let (waypoint, seen) = traced(settings(0.0, over_http()), |bed| bed).await;
        let mut request = get("/a?b=c");
        request.headers_mut().insert("traceparent", PARENT.parse().unwrap());
        request.headers_mut().insert("tracestate", "vendor=1".parse().unwrap());
        request.headers_mut().insert("user-agent", "tester".parse().unwrap());
        assert_eq!(said(&waypoint.ask(request).await), (200, "web"));
        until(|| seen.spans().len() == 2).await;
        let spans = seen.spans();
        let server = spans.iter().find(|span| span.kind() == otlp::span::Kind::Server).unwrap();
        let client = spans.iter().find(|span| span.kind() == otlp::span::Kind::Client).unwrap();
        let trace = 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c_u128.to_be_bytes();
        assert_eq!((&server.trace_id[..], &client.trace_id[..]), (&trace[..], &trace[..]));
        assert_eq!(server.parent_span_id, 0xb7ad_6b71_6920_3331_u64.to_be_bytes());
        assert_eq!(client.parent_span_id, server.span_id);
        assert_eq!(
            (server.name.as_str(), server.trace_state.as_str()),
            ("web.shop.svc.cluster.local:80/*", "vendor=1")
        );
        assert_eq!(client.name, "router inbound-vip|80|http|web.shop.svc.cluster.local egress");
        assert!(server.start_time_unix_nano <= client.start_time_unix_nano);
        assert!(client.end_time_unix_nano <= server.end_time_unix_nano);
        for (key, value) in [
            ("component", "proxy"),
            ("node_id", "waypoint~1.1.1.1~wp.shop~shop.svc.cluster.local"),
            ("http.method", "GET"),
            ("http.url", "http://web.shop/a?b=c"),
            ("http.protocol", "HTTP/1.1"),
            ("http.status_code", "200"),
            ("user_agent", "tester"),
            ("response_flags", "-"),
            ("response_size", "3"),
            ("upstream_cluster.name", "inbound-vip|80|http|web.shop.svc.cluster.local"),
            ("istio.mesh_id", "cluster.local"),
            ("istio.destination_workload", "web"),
            ("istio.destination_namespace", "shop"),
        ] {
            assert_eq!(tag(server, key), Some(value), "{key}");
        }
        {
            let export = &seen.exports.borrow()[0];
            assert_eq!((export.uri().to_string().as_str(), export.method().as_str()), ("/v1/traces", "POST"));
            assert_eq!(export.headers()["host"], "collector.shop.svc.cluster.local:80");
        }
        // The application continues from the try's span.
        let told = seen.headers.borrow()[0]["traceparent"].to_str().unwrap().to_owned();
        let span = client.span_id.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        assert_eq!(told, format!("00-0af7651916cd43dd8448eb211c80319c-{span}-01"));
        assert_eq!(seen.headers.borrow()[0]["tracestate"], "vendor=1");
        until(|| waypoint.shared.telemetry.spans.sent.get() == 2).await;
        assert_eq!(waypoint.shared.telemetry.spans.lost.get(), 0);
    });
}

#[test]
fn a_client_that_decided_not_to_sample_is_obeyed_and_the_context_goes_on() {
    run(async {
        let (waypoint, seen) = traced(settings(100.0, over_http()), |bed| bed).await;
        let mut request = get("/");
        request.headers_mut().insert("traceparent", PARENT.replace("-01", "-00").parse().unwrap());
        waypoint.ask(request).await;
        let mut request = get("/");
        request.headers_mut().insert("b3", "0".parse().unwrap());
        waypoint.ask(request).await;
        // This one is ours to decide on.
        waypoint.get("/own").await;
        until(|| seen.spans().len() >= 2).await;
        let urls: Vec<String> =
            seen.spans().iter().map(|span| tag(span, "http.url").unwrap_or_default().to_owned()).collect();
        assert_eq!(urls, ["http://web.shop/own", "http://web.shop/own"]);
        let headers = seen.headers.borrow();
        let first = headers[0]["traceparent"].to_str().unwrap();
        assert!(
            first.starts_with("00-0af7651916cd43dd8448eb211c80319c-") && first.ends_with("-00"),
            "{first}"
        );
        assert!(!first.contains("b7ad6b7169203331"), "a span of its own: {first}");
        // What came in B3 goes on in B3, beside what the provider wants.
        assert!(headers[1]["b3"].to_str().unwrap().contains("-0"), "{:?}", headers[1]);
        assert!(headers[1]["traceparent"].to_str().unwrap().ends_with("-00"));
    });
}

#[test]
fn each_try_has_a_span_and_a_failed_request_says_so() {
    run(async {
        let retry = l7::Retry { attempts: 2, on: vec!["5xx".into()], ..l7::Retry::default() };
        let rule = l7::HttpRule { retry: Some(retry), ..forward(&[("", 1)]) };
        let (waypoint, seen) = traced(settings(100.0, over_http()), |bed| bed.rule(rule)).await;
        assert_eq!(waypoint.get("/fail").await.status(), 503);
        until(|| seen.spans().len() == 4).await;
        let spans = seen.spans();
        let tries: Vec<_> = spans.iter().filter(|span| span.kind() == otlp::span::Kind::Client).collect();
        assert_eq!(tries.len(), 3);
        let told: Vec<String> = seen
            .headers
            .borrow()
            .iter()
            .map(|h| h["traceparent"].to_str().unwrap()[36..52].to_owned())
            .collect();
        for (span, told) in tries.iter().zip(told) {
            assert_eq!(span.span_id.iter().map(|byte| format!("{byte:02x}")).collect::<String>(), told);
            assert_eq!(tag(span, "http.status_code"), Some("503"));
            assert_eq!(span.status.as_ref().unwrap().code(), otlp::status::Code::Error);
        }
        let server = spans.iter().find(|span| span.kind() == otlp::span::Kind::Server).unwrap();
        assert_eq!((tag(server, "error"), tag(server, "response_flags")), (Some("true"), Some("URX")));
    });
}

#[test]
fn zipkin_is_told_in_json_and_endpoints_in_b3() {
    run(async {
        let kind = tracer::Kind::Zipkin(tracer::Zipkin::default());
        let (waypoint, seen) = traced(settings(100.0, kind), |bed| bed).await;
        waypoint.get("/").await;
        until(|| !seen.exports.borrow().is_empty()).await;
        let exports = seen.exports.borrow();
        assert_eq!(exports[0].uri().path(), "/api/v2/spans");
        let spans: serde_json::Value = serde_json::from_slice(exports[0].body()).unwrap();
        let kinds: Vec<&str> = spans.as_array().unwrap().iter().filter_map(|s| s["kind"].as_str()).collect();
        assert_eq!(kinds, ["CLIENT", "SERVER"]);
        assert_eq!(spans[1]["localEndpoint"]["serviceName"], "wp.shop");
        let headers = &seen.headers.borrow()[0];
        assert_eq!(headers["x-b3-traceid"].to_str().unwrap(), spans[0]["traceId"]);
        assert_eq!(headers["x-b3-spanid"].to_str().unwrap(), spans[0]["id"]);
        assert_eq!(headers["x-b3-sampled"], "1");
        assert!(!headers.contains_key("traceparent"));
    });
}

#[test]
fn a_share_of_requests_begins_a_trace_and_telemetry_may_change_it() {
    run(async {
        let origin = l7::Origin { namespace: "shop".into(), ..Default::default() };
        let section = l7::telemetry::Tracing {
            sampling: Some(25.0),
            tags: vec![
                l7::telemetry::Tag {
                    name: "tenant".into(),
                    value: Some(l7::telemetry::tag::Value::Header(l7::telemetry::Named {
                        name: "x-tenant".into(),
                        default_value: "none".into(),
                    })),
                },
                l7::telemetry::Tag {
                    name: "asked".into(),
                    value: Some(l7::telemetry::tag::Value::Format("%REQ(:METHOD)%".into())),
                },
            ],
            istio_tags: Some(false),
            ..Default::default()
        };
        let telemetry =
            l7::Telemetry { origin: Some(origin), tracing: vec![section], ..l7::Telemetry::default() };
        let (waypoint, seen) = traced(settings(0.0, over_http()), |mut bed| {
            bed.resources.telemetries.insert("Telemetry/shop/t".into(), Arc::new(telemetry));
            bed
        })
        .await;
        let mut connection = waypoint.http1().await;
        for _ in 0..400 {
            let mut request = get("/");
            request.headers_mut().insert("x-tenant", "acme".parse().unwrap());
            connection.ask(request).await;
        }
        let sampled =
            seen.headers.borrow().iter().filter(|h| h["traceparent"].as_bytes().ends_with(b"-01")).count();
        // Six standard deviations around a hundred.
        assert!((48..=152).contains(&sampled), "{sampled}");
        until(|| seen.spans().len() == 2 * sampled).await;
        let spans = seen.spans();
        let server = spans.iter().find(|span| span.kind() == otlp::span::Kind::Server).unwrap();
        assert_eq!((tag(server, "tenant"), tag(server, "asked")), (Some("acme"), Some("GET")));
        assert_eq!(tag(server, "istio.mesh_id"), None);
    });
}

#[test]
fn spans_that_no_collector_takes_are_counted_and_requests_do_not_wait() {
    run(async {
        let mut settings = settings(100.0, over_http());
        settings.tracers[0].service.as_mut().unwrap().hostname = "nobody.shop.svc.cluster.local".into();
        let (waypoint, _seen) = traced(settings, |bed| bed).await;
        assert_eq!(said(&waypoint.get("/").await), (200, "web"));
        until(|| waypoint.shared.telemetry.spans.lost.get() == 2).await;
        assert_eq!(waypoint.shared.telemetry.spans.sent.get(), 0);
    });
}

#[test]
fn without_a_provider_contexts_go_by_untouched() {
    run(async {
        let (waypoint, seen) = traced(l7::Settings::default(), |bed| bed).await;
        let mut request = get("/");
        request.headers_mut().insert("traceparent", PARENT.parse().unwrap());
        waypoint.ask(request).await;
        waypoint.get("/").await;
        let headers = seen.headers.borrow();
        assert_eq!(headers[0]["traceparent"], PARENT);
        assert!(!headers[1].contains_key("traceparent"));
    });
}
