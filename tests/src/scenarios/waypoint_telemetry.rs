//! What a waypoint says of requests: spans, as a Jaeger that we did not write has them, and lines of its log.

use super::programs::{need, nginx_conf};
use super::waypoint::{SOON, curl, in_force, open, url};
use super::{Scenario, scenario, skip};
use crate::bed::{Testbed, process, wait};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fmt::Write as _;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("a request's spans reach Jaeger over OTLP and Zipkin, in the client's own trace", 120, traces),
    scenario(
        "Telemetry and the mesh settings decide which requests have a line, and what it says",
        90,
        lines,
    ),
    scenario("Telemetry turns metrics off, takes labels away and adds those that it computes", 90, metrics),
];

pub(super) const WP: &str = "shop/wp";
pub(super) const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

/// Everything that collects, in one program: OTLP over gRPC and HTTP, Zipkin's JSON, and an API to ask.
const JAEGER: &str = "
service:
  extensions: [jaeger_storage, jaeger_query]
  pipelines: {traces: {receivers: [otlp, zipkin], exporters: [jaeger_storage_exporter]}}
  telemetry: {metrics: {level: none}}
extensions:
  jaeger_storage: {backends: {kept: {memory: {max_traces: 10000}}}}
  jaeger_query: {storage: {traces: kept}, http: {endpoint: '0.0.0.0:16686'}, grpc: {endpoint: '127.0.0.1:16685'}}
receivers:
  otlp: {protocols: {grpc: {endpoint: '0.0.0.0:4317'}, http: {endpoint: '0.0.0.0:4318'}}}
  zipkin: {endpoint: '0.0.0.0:9411'}
exporters:
  jaeger_storage_exporter: {trace_storage: kept}
";

/// nginx that says which trace it was told of.
pub(super) fn server(bed: &Testbed) -> Result<Vec<String>> {
    let servers = "server { listen 8080; location / { return 200 '$http_traceparent;$http_x_b3_traceid;$http_x_b3_spanid'; } \
                   location /fail { return 503; } }";
    nginx(bed, servers)
}

/// Pod `shop/v1` of Service `web`: nginx with these servers, one of them on port 8080.
pub(super) fn nginx(bed: &Testbed, servers: &str) -> Result<Vec<String>> {
    let config = nginx_conf(&bed.dir.join("nginx-v1"), servers)?;
    let nginx = need("nginx")?;
    Ok(vec![format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: v1, namespace: shop, labels: {{app: web, version: v1}}}}
spec:
  nodeName: a
  serviceAccountName: backend
  containers: [{{name: main, image: none, command: [{}, -c, {}], ports: [{{containerPort: 8080}}]}}]
---",
        nginx.display(),
        config.display()
    )])
}

/// The ConfigMap with these lines of MeshConfig.
pub(super) fn settings(lines: &str) -> String {
    let indented = lines.lines().fold(String::new(), |mut text, line| {
        let _ = writeln!(text, "    {line}");
        text
    });
    format!(
        "
apiVersion: v1
kind: ConfigMap
metadata: {{name: istio, namespace: istio-system}}
data:
  mesh: |
{indented}"
    )
}

pub(super) fn telemetry(spec: &str) -> String {
    format!(
        "
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {{name: of-shop, namespace: shop}}
spec:
{spec}"
    )
}

/// Something that collects, as pod and Service `shop/collector`; `command` and `ports` as in YAML.
pub(super) fn collector(bed: &mut Testbed, command: &str, ports: &str) -> Result<()> {
    let yaml = format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: collector, namespace: shop, labels: {{app: collector}}}}
spec:
  nodeName: b
  serviceAccountName: collector
  containers: [{{name: main, image: none, command: [{command}], ports: [{{containerPort: 4317}}]}}]
---
apiVersion: v1
kind: Service
metadata: {{name: collector, namespace: shop}}
spec:
  clusterIP: 10.96.0.30
  clusterIPs: [10.96.0.30]
  selector: {{app: collector}}
  ports: {ports}
"
    );
    bed.apply("collector", &yaml)
}

/// Jaeger as pod and Service `shop/collector`, and providers for each way to it.
fn jaeger(bed: &mut Testbed) -> Result<()> {
    let program = process::find("jaeger")
        .ok_or_else(|| skip("no Jaeger: `cargo xtask test testbed` builds it where there is Go"))?;
    let config = bed.dir.join("jaeger.yaml");
    std::fs::write(&config, JAEGER).context("cannot write a configuration")?;
    let ports = "[{name: grpc, port: 4317}, {name: http, port: 4318}, {name: http-zipkin, port: 9411}]";
    collector(bed, &format!("{}, --config, {}", program.display(), config.display()), ports)?;
    wait::until_true("Jaeger", SOON, || Ok(asked(bed, "/api/services").is_ok()))
}

/// The answer of Jaeger's own API.
fn asked(bed: &Testbed, path: &str) -> Result<Value> {
    let text =
        bed.pod("shop/collector")?.output(["curl", "-sfS", &format!("http://127.0.0.1:16686{path}")])?;
    serde_json::from_str(&text).context("Jaeger does not answer in JSON")
}

/// The spans of a trace by their kind, once both are there.
fn spans(bed: &Testbed, trace: &str) -> Result<(Value, Value)> {
    let mut found = None;
    wait::until_true("both spans of a request in Jaeger", SOON, || {
        let Ok(answer) = asked(bed, &format!("/api/traces/{trace}")) else { return Ok(false) };
        let spans = answer["data"][0]["spans"].as_array().cloned().unwrap_or_default();
        let of = |kind: &str| spans.iter().find(|span| tag(span, "span.kind") == kind).cloned();
        found = of("server").zip(of("client"));
        Ok(found.is_some())
    })?;
    found.context("no spans")
}

fn tag<'a>(span: &'a Value, key: &str) -> &'a str {
    let tags = span["tags"].as_array().map(Vec::as_slice).unwrap_or_default();
    let found = tags.iter().find(|tag| tag["key"] == key).and_then(|tag| tag["value"].as_str());
    found.unwrap_or_default()
}

fn parent(span: &Value) -> &str {
    span["references"][0]["spanID"].as_str().unwrap_or_default()
}

fn traces() -> Result<()> {
    let mut bed = open(server)?;
    jaeger(&mut bed)?;
    let host = "collector.shop.svc.cluster.local";
    let providers = format!(
        "extensionProviders:
- name: grpc
  opentelemetry: {{service: {host}, port: 4317}}
- name: http
  opentelemetry: {{service: {host}, port: 4318, http: {{path: /v1/traces}}}}
- name: zipkin
  zipkin: {{service: {host}, port: 9411}}
defaultProviders: {{tracing: [grpc]}}
defaultConfig: {{tracing: {{sampling: 0}}}}"
    );
    bed.apply("settings", &settings(&providers))?;
    in_force(&bed, &[], |told| told.starts_with("00-"))?;
    // Nobody asks for a trace, and none in a hundred begins one here.
    let told = curl(&bed, "shop/frontend", &[&url("/")])?;
    ensure!(told.split(';').next().is_some_and(|parent| parent.ends_with("-00")), "sampled: {told}");
    // The client's own trace is continued.
    let traceparent = format!("traceparent: 00-{TRACE}-b7ad6b7169203331-01");
    let told = curl(&bed, "shop/frontend", &["-H", &traceparent, &url("/page?x=y")])?;
    let (server, client) = spans(&bed, TRACE)?;
    let id = |span: &Value| span["spanID"].as_str().unwrap_or_default().to_owned();
    ensure!(parent(&server) == "b7ad6b7169203331" && parent(&client) == id(&server), "{server} {client}");
    ensure!(
        told.starts_with(&format!("00-{TRACE}-{}-01;", id(&client))),
        "nginx was told {told}, Jaeger has {client}"
    );
    ensure!(server["operationName"] == "web.shop.svc.cluster.local:80/*", "{server}");
    for (key, value) in [
        ("component", "proxy"),
        ("http.method", "GET"),
        ("http.url", "http://10.96.0.20/page?x=y"),
        ("http.status_code", "200"),
        ("istio.source_workload", "frontend"),
        ("istio.destination_workload", "v1"),
        ("istio.destination_namespace", "shop"),
        ("istio.mesh_id", "cluster.local"),
    ] {
        ensure!(tag(&server, key) == value, "{key} is {:?}: {server}", tag(&server, key));
    }
    let services = asked(&bed, "/api/services")?;
    ensure!(services["data"] == serde_json::json!(["wp.shop"]), "{services}");
    wait::until_true("trace id in the access log", SOON, || {
        let log = bed.pod(WP)?.log();
        Ok(log.contains(&format!("trace_id=\"{TRACE}\"")))
    })?;
    // By HTTP and in Zipkin's way, as Telemetry says.
    for (provider, digit) in [("http", '1'), ("zipkin", '2')] {
        let spec = format!(
            "  tracing: [{{providers: [{{name: {provider}}}], customTags: {{by: {{literal: {{value: {provider}}}}}}}}}]\n"
        );
        bed.apply("telemetry", &telemetry(&spec))?;
        let trace = TRACE.replace('c', &digit.to_string());
        let traceparent = format!("traceparent: 00-{trace}-b7ad6b7169203331-01");
        // Under the old rule a trace has no such tag, and another id is asked for each time.
        let mut number = 0;
        let mut last = String::new();
        wait::until_true(&format!("trace by provider {provider}"), SOON, || {
            number += 1;
            last = format!("{}{number:04}", &trace[..28]);
            let parent = traceparent.replace(&trace, &last);
            curl(&bed, "shop/frontend", &["-H", &parent, &url("/")])?;
            let (server, _) = spans(&bed, &last)?;
            Ok(tag(&server, "by") == provider)
        })?;
        let told = curl(&bed, "shop/frontend", &["-H", &traceparent, &url("/")])?;
        let mut told = told.split(';');
        ensure!(told.next().is_some_and(|parent| parent.contains(&trace)), "the W3C's header goes on");
        ensure!(told.next().is_some_and(|b3| (b3 == trace) == (provider == "zipkin")), "B3 with {provider}");
    }
    let lost = bed.at_waypoint(WP, 15_020, "/metrics")?;
    ensure!(lost.contains("undermesh_waypoint_spans_lost_total 0"), "spans were lost");
    // Without the collector requests go on, and what is lost is counted.
    bed.pods.get_mut("shop/collector").context("no collector")?.programs.iter_mut().for_each(|p| p.kill());
    let traceparent = format!("traceparent: 00-{TRACE}-b7ad6b7169203331-01");
    let code = ["-o", "/dev/null", "-w", "%{http_code}", "-H", &traceparent];
    ensure!(
        curl(&bed, "shop/frontend", &[&code[..], &[&url("/")]].concat())? == "200",
        "a request waits for Jaeger"
    );
    wait::until_true("lost spans in the metrics", SOON, || {
        let text = bed.at_waypoint(WP, 15_020, "/metrics")?;
        let count = text.lines().find_map(|line| line.strip_prefix("undermesh_waypoint_spans_lost_total "));
        // Those of the request before may have been on their way still.
        Ok(count.and_then(|count| count.parse::<u64>().ok()).is_some_and(|count| (2..=4).contains(&count)))
    })
}

/// Lines of the waypoint's log that begin with a mark.
fn marked(bed: &Testbed, mark: &str) -> Result<Vec<String>> {
    let log = bed.pod(WP)?.log();
    Ok(log.lines().filter(|line| line.starts_with(mark)).map(str::to_owned).collect())
}

fn lines() -> Result<()> {
    let mut bed = open(server)?;
    let text = "accessLogFile: /dev/stdout
accessLogFormat: 'mesh %REQ(:METHOD)% %REQ(:PATH)% %RESPONSE_CODE% %RESPONSE_FLAGS% %UPSTREAM_CLUSTER% %DOWNSTREAM_PEER_URI_SAN%'
extensionProviders:
- name: objects
  envoyFileAccessLog: {path: /dev/stdout, logFormat: {labels: {code: '%RESPONSE_CODE%', path: '%REQ(:PATH)%', agent: '%REQ(USER-AGENT)%'}}}";
    bed.apply("settings", &settings(text))?;
    let answered = "mesh GET / 200 - inbound-vip|80|http|web.shop.svc.cluster.local spiffe://cluster.local/ns/shop/sa/frontend";
    wait::until_true("line in the mesh's layout", SOON, || {
        curl(&bed, "shop/frontend", &[&url("/")])?;
        Ok(marked(&bed, "mesh ")?.iter().any(|line| line == answered))
    })?;
    // Only what failed, as JSON.
    let spec =
        "  accessLogging: [{providers: [{name: objects}], filter: {expression: 'response.code >= 500'}}]\n";
    bed.apply("telemetry", &telemetry(spec))?;
    wait::until_true("line of a failure as JSON", SOON, || {
        curl(&bed, "shop/frontend", &["-A", "first", &url("/fail/now")])?;
        Ok(marked(&bed, "{\"")?.iter().any(|line| line.contains("\"code\":503")))
    })?;
    let before = (marked(&bed, "mesh ")?.len(), marked(&bed, "{\"")?.len());
    curl(&bed, "shop/frontend", &[&url("/well/[1-20]")])?;
    curl(&bed, "shop/frontend", &["-A", "last", &url("/fail/last")])?;
    wait::until_true("line of the last request", SOON, || {
        Ok(marked(&bed, "{\"")?.iter().any(|line| line.contains("\"agent\":\"last\"")))
    })?;
    let after = marked(&bed, "{\"")?;
    ensure!(marked(&bed, "mesh ")?.len() == before.0, "the mesh's layout is still used");
    ensure!(after.len() == before.1 + 1, "requests that were well have lines: {:?}", &after[before.1..]);
    let line: Value = serde_json::from_str(&after[before.1]).context("a line is JSON")?;
    ensure!(line == serde_json::json!({"code": 503, "path": "/fail/last", "agent": "last"}), "{line}");
    Ok(())
}

fn metrics() -> Result<()> {
    let mut bed = open(server)?;
    let spec = "  metrics:
  - overrides:
    - match: {metric: REQUEST_COUNT}
      tagOverrides:
        asked: {value: request.method + ' ' + request.url_path}
        source_principal: {operation: REMOVE}
    - match: {metric: RESPONSE_SIZE}
      disabled: true
";
    bed.apply("telemetry", &telemetry(spec))?;
    let computed = ["asked=\"GET /this\"", "response_code=\"200\""];
    wait::until_true("label that Telemetry computes", SOON, || {
        curl(&bed, "shop/frontend", &[&url("/this")])?;
        Ok(bed.waypoint_metric(WP, "istio_requests_total", &computed)? >= 1.0)
    })?;
    let of = |name: &str, with: &[&str]| bed.waypoint_metric(WP, name, with);
    let (counted, sized) = (of("istio_requests_total", &[])?, of("istio_response_bytes_count", &[])?);
    let timed = of("istio_request_duration_milliseconds_count", &[])?;
    curl(&bed, "shop/frontend", &[&url("/that/[1-10]")])?;
    wait::until_true("ten more requests", SOON, || Ok(of("istio_requests_total", &[])? == counted + 10.0))?;
    ensure!(
        of("istio_requests_total", &["asked=\"GET /that/1\"", "source_principal="])? == 0.0,
        "the label is there"
    );
    ensure!(of("istio_requests_total", &["asked=\"GET /that/1\""])? == 1.0, "no computed label");
    ensure!(of("istio_response_bytes_count", &[])? == sized, "a metric that is off is counted");
    ensure!(
        of("istio_request_duration_milliseconds_count", &["source_principal="])? >= timed + 10.0,
        "others changed"
    );
    Ok(())
}
