//! What is sent and linked: lines of a waypoint's access log and nodes' connections at a real OpenTelemetry collector, and
//! traces as exemplars in a real Prometheus.

use super::dashboards::{encoded, get, prometheus};
use super::shop::{open_with, talks};
use super::waypoint::{SOON, curl, open, url};
use super::waypoint_telemetry::{TRACE, WP, server, settings, telemetry};
use super::{Scenario, scenario, skip, waypoint_telemetry};
use crate::bed::mesh::MeshOptions;
use crate::bed::process::Proc;
use crate::bed::{Testbed, Topology, net, process, wait};
use anyhow::{Context, Result, ensure};
use serde_json::Value;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario(
        "lines of the access log reach an OpenTelemetry collector, with attributes and trace",
        120,
        sent,
    ),
    scenario("a connection's spans of both nodes are one trace at a collector, with its id", 90, connections),
    scenario("Prometheus has the trace of a slow request as the exemplar of its bucket", 120, exemplars),
];

/// Takes what comes, and writes it to its log.
const COLLECTOR: &str = "
receivers: {otlp: {protocols: {grpc: {endpoint: '0.0.0.0:4317'}, http: {endpoint: '0.0.0.0:4318'}}}}
exporters: {debug: {verbosity: detailed}}
service:
  pipelines: {logs: {receivers: [otlp], exporters: [debug]}, traces: {receivers: [otlp], exporters: [debug]}}
  telemetry: {metrics: {level: none}}
";

/// The collector's program, and where its configuration is.
fn program(bed: &Testbed) -> Result<[String; 2]> {
    let program = process::find("otel-collector")
        .ok_or_else(|| skip("no collector: `cargo xtask test testbed` builds it where there is Go"))?;
    let config = bed.dir.join("collector.yaml");
    std::fs::write(&config, COLLECTOR).context("cannot write a configuration")?;
    Ok([program.display().to_string(), format!("--config=file:{}", config.display())])
}

fn connections() -> Result<()> {
    let collector = net::underlay_v4(net::CONTROL);
    let to = format!("--connection-spans=http://{collector}:4318");
    let options = MeshOptions::agent(&[&to]);
    let bed = open_with(&Topology::nodes(&["a", "b"]), &options)?;
    let running = Proc::spawn(&bed.control_place, program(&bed)?, &bed.dir.join("collector.log"))?;
    wait::until_true("collector", SOON, || Ok(running.log().contains("Everything is ready")))
        .with_context(|| running.log())?;
    let story = wait::until("both ends of a connection at the collector", SOON, || {
        talks(&bed, "shop/frontend", "10.96.0.10:80")?;
        let log = running.log();
        let spans: Vec<&str> = log.split("Span #").skip(1).collect();
        let server = spans.iter().find(|span| {
            field(span, "Kind") == "Server"
                && span.contains("istio.destination_workload: Str(backend)")
                && span.contains("istio.source_workload: Str(frontend)")
        });
        let client = server.and_then(|server| {
            let above = field(server, "Parent ID");
            spans.iter().find(|span| field(span, "ID") == above)
        });
        Ok(server.zip(client).map(|(server, client)| [(*server).to_owned(), (*client).to_owned()]))
    })
    .with_context(|| running.log())?;
    let [server, client] = &story;
    let trace = field(server, "Trace ID");
    ensure!(field(client, "Trace ID") == trace && field(client, "Kind") == "Client", "{story:#?}");
    let id = trace.strip_prefix(&"0".repeat(16)).context("no connection's id")?;
    for span in &story {
        for part in
            [&format!("connection.id: Str({id})"), "connection.path: Str(tunnel)", "bytes.to_server: Str(5)"]
        {
            ensure!(span.contains(part), "no {part}: {span}");
        }
    }
    ensure!(client.contains("node: Str(a)") && server.contains("node: Str(b)"), "{story:#?}");
    // The same id tells the connection's story.
    let told = bed.meshctl("a", &["trace", id])?;
    ensure!(told.contains("closed"), "{told}");
    Ok(())
}

/// A field of a span, as the collector writes it.
fn field<'a>(span: &'a str, name: &str) -> &'a str {
    let values =
        span.lines().filter_map(|line| line.trim_start().strip_prefix(name)?.trim_start().strip_prefix(':'));
    values.map(str::trim).next().unwrap_or_default()
}

/// The collector as pod and Service `shop/collector`.
fn collector(bed: &mut Testbed) -> Result<()> {
    let [program, config] = program(bed)?;
    let command = format!("'{program}', '{config}'");
    waypoint_telemetry::collector(bed, &command, "[{name: grpc, port: 4317}]")?;
    wait::until_true("collector", SOON, || {
        Ok(bed.pod("shop/collector")?.log().contains("Everything is ready"))
    })
    .with_context(|| bed.pod("shop/collector").map(|pod| pod.log()).unwrap_or_default())
}

/// Whether the collector has written of one record all of these.
fn taken(bed: &Testbed, parts: &[&str]) -> Result<bool> {
    let log = bed.pod("shop/collector")?.log();
    Ok(log.split("LogRecord #").any(|record| parts.iter().all(|part| record.contains(part))))
}

fn sent() -> Result<()> {
    let mut bed = open(server)?;
    collector(&mut bed)?;
    let text = "accessLogFile: ''
extensionProviders:
- name: otel
  envoyOtelAls:
    service: collector.shop.svc.cluster.local
    port: 4317
    logName: shop-lines
    logFormat: {text: '%REQ(:METHOD)% %REQ(:PATH)% %RESPONSE_CODE%', labels: {agent: '%REQ(USER-AGENT)%', code: '%RESPONSE_CODE%'}}
- name: spans
  opentelemetry: {service: collector.shop.svc.cluster.local, port: 4317}
defaultProviders: {tracing: [spans]}";
    bed.apply("settings", &settings(text))?;
    let spec =
        "  accessLogging: [{providers: [{name: otel}], filter: {expression: 'response.code >= 500'}}]\n";
    bed.apply("telemetry", &telemetry(spec))?;
    let traceparent = format!("traceparent: 00-{TRACE}-b7ad6b7169203331-01");
    let failing = ["-A", "first", "-H", &traceparent, &url("/fail/now")];
    wait::until_true("a failure's line at the collector", SOON, || {
        curl(&bed, "shop/frontend", &failing)?;
        let trace = format!("Trace ID: {TRACE}");
        taken(&bed, &["Body: Str(GET /fail/now 503)", "agent: Str(first)", "code: Str(503)", &trace])
    })
    .with_context(|| bed.pod("shop/collector").map(|pod| pod.log()).unwrap_or_default())?;
    curl(&bed, "shop/frontend", &[&url("/well/[1-20]")])?;
    curl(&bed, "shop/frontend", &["-A", "last", &url("/fail/last")])?;
    wait::until_true("the last line", SOON, || taken(&bed, &["agent: Str(last)"]))?;
    ensure!(!taken(&bed, &["Body: Str(GET /well/"])?, "requests that the filter leaves out were sent");
    let log = bed.pod("shop/collector")?.log();
    ensure!(log.contains("log_name: Str(shop-lines)"), "no name of the log: {log}");
    // They went there and nowhere else, and are counted.
    ensure!(!bed.pod(WP)?.log().contains("GET /fail/last 503"), "the line is on standard output, too");
    ensure!(counted(&bed, "undermesh_waypoint_log_lines_sent_total")? >= 2.0, "not counted");
    // Nobody waits for a collector that is away, and what it misses is counted.
    bed.pods.get_mut("shop/collector").context("no collector")?.programs.iter_mut().for_each(|p| p.kill());
    let before = counted(&bed, "undermesh_waypoint_log_lines_lost_total")?;
    curl(&bed, "shop/frontend", &[&url("/fail/lost")])?;
    wait::until_true("lost lines in the metrics", SOON, || {
        Ok(counted(&bed, "undermesh_waypoint_log_lines_lost_total")? > before)
    })
}

/// A counter of the waypoint.
fn counted(bed: &Testbed, name: &str) -> Result<f64> {
    let text = bed.at_waypoint(WP, 15_020, "/metrics")?;
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name} ")));
    line.and_then(|count| count.parse().ok()).with_context(|| format!("no {name}"))
}

fn exemplars() -> Result<()> {
    let mut bed = open(server)?;
    // Spans need not arrive for traces to be known.
    let text = "extensionProviders:
- name: spans
  opentelemetry: {service: nobody.shop.svc.cluster.local, port: 4317}
defaultProviders: {tracing: [spans]}";
    let jobs =
        format!("- job_name: waypoints\n  static_configs: [{{targets: ['{}:15020']}}]\n", bed.pod(WP)?.v4);
    let running = prometheus(&bed, &jobs, &["--enable-feature=exemplar-storage"])?;
    bed.apply("settings", &settings(text))?;
    let sampled = format!("traceparent: 00-{TRACE}-b7ad6b7169203331-01");
    let unsampled = "traceparent: 00-11111111111111111111111111111111-b7ad6b7169203331-00";
    let found = || -> Result<Vec<Value>> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs_f64();
        let query = encoded("istio_request_duration_milliseconds_bucket{reporter=\"waypoint\"}");
        let path = format!("/api/v1/query_exemplars?query={query}&start={}&end={}", now - 60.0, now + 5.0);
        let answer: Value = serde_json::from_str(&get(&bed, &path)?)?;
        let series = answer["data"].as_array().with_context(|| format!("{answer}"))?;
        Ok(series
            .iter()
            .flat_map(|series| series["exemplars"].as_array().cloned().unwrap_or_default())
            .collect())
    };
    let of = |trace: &str| {
        Ok::<_, anyhow::Error>(found()?.into_iter().find(|one| one["labels"]["trace_id"] == trace))
    };
    wait::until_true("the trace in Prometheus", SOON, || {
        curl(&bed, "shop/frontend", &["-H", unsampled, &url("/quiet")])?;
        curl(&bed, "shop/frontend", &["-H", &sampled, &url("/loud")])?;
        Ok(of(TRACE)?.is_some())
    })
    .with_context(|| running.log())?;
    let exemplar = of(TRACE)?.context("no exemplar")?;
    let took: f64 = exemplar["value"].as_str().unwrap_or_default().parse().context("no figure")?;
    ensure!(took > 0.0 && took < 30_000.0, "it took {took} ms");
    ensure!(of("11111111111111111111111111111111")?.is_none(), "a trace without spans is an exemplar");
    // A scraper of the older format gets figures without them.
    let older = bed.at_waypoint(WP, 15_020, "/metrics")?;
    ensure!(older.contains("istio_request_duration_milliseconds_bucket"), "no histogram");
    ensure!(!older.contains("trace_id"), "the older format has exemplars");
    Ok(())
}
