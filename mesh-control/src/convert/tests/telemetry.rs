use mesh_core::xds::proto::l7 as wire;
use mesh_core::xds::proto::l7::telemetry::{Metric, Mode, tag};
use mesh_core::xds::proto::l7::tracer::Kind;

use super::virtual_services::{WAYPOINT, problems, service};
use crate::convert::Resources;
use crate::testing::{load, resources};

fn telemetry(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: telemetry.istio.io/v1\nkind: Telemetry\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec:\n{spec}"
    )
}

fn mesh_config(text: &str) -> String {
    let lines: String = text.lines().map(|line| format!("    {line}\n")).collect();
    format!(
        "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\ndata:\n  mesh: |\n{lines}"
    )
}

const PROVIDERS: &str = "extensionProviders:
- name: otel
  opentelemetry: {service: infra/collector.infra.svc.cluster.local, port: 4318, maxTagLength: 64, http: {path: /v1/traces, timeout: 3s, headers: [{name: x-key, value: k}, {name: x-env, envName: E}]}}
- name: grpc
  opentelemetry: {service: collector.infra.svc.cluster.local, port: 4317}
- name: zip
  zipkin: {service: zipkin.infra.svc.cluster.local, port: 9411, traceContextOption: USE_B3_WITH_W3C_PROPAGATION, path: /spans}
- name: lines
  envoyFileAccessLog: {path: /dev/stderr, logFormat: {text: \"%RESPONSE_CODE%\"}}
- name: objects
  envoyFileAccessLog: {path: /var/log/x, logFormat: {labels: {code: \"%RESPONSE_CODE%\"}}}
- name: prom
  prometheus: {}
- name: dog
  datadog: {service: x, port: 1}
defaultProviders: {tracing: [otel], metrics: [prom], accessLogging: [lines]}
enableTracing: true
accessLogFile: /dev/stdout
accessLogEncoding: JSON
accessLogFormat: '{\"code\": \"%RESPONSE_CODE%\"}'
defaultConfig:
  tracing: {sampling: 12.5, maxPathTagLength: 128, zipkin: {address: 'zipkin.infra:9411'}, customTags: {env: {literal: {value: test}}}, tlsSettings: {}}
";

fn with(text: &str) -> Resources {
    resources(&format!("{WAYPOINT}{}{}{text}", service("web"), mesh_config(PROVIDERS)))
}

#[test]
fn providers_of_the_mesh_settings_say_where_spans_and_lines_go() {
    let resources = with("");
    let told = &resources.l7.settings["mesh"];
    let names: Vec<&str> = told.tracers.iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["otel", "grpc", "zip", "defaultConfig.tracing"]);
    let Some(Kind::Otlp(http)) = &told.tracers[0].kind else { panic!("{:?}", told.tracers[0]) };
    assert_eq!((http.http_path.as_str(), http.timeout.unwrap().seconds), ("/v1/traces", 3));
    assert_eq!(http.headers, [wire::Header { name: "x-key".into(), value: "k".into() }]);
    let to = told.tracers[0].service.clone().unwrap();
    assert_eq!(
        (to.namespace.as_str(), to.hostname.as_str(), to.port),
        ("infra", "collector.infra.svc.cluster.local", 4318)
    );
    assert_eq!(told.tracers[0].longest_tag, 64);
    let Some(Kind::Otlp(grpc)) = &told.tracers[1].kind else { panic!("{:?}", told.tracers[1]) };
    assert!(grpc.http_path.is_empty());
    assert_eq!(
        told.tracers[2].kind,
        Some(Kind::Zipkin(wire::tracer::Zipkin { path: "/spans".into(), w3c: true }))
    );
    let legacy = &told.tracers[3];
    assert_eq!((legacy.service.as_ref().unwrap().port, legacy.longest_tag), (9411, 128));
    assert_eq!(told.default_tracers, ["otel", "defaultConfig.tracing"]);
    assert_eq!((told.default_sampling, told.default_tags.len()), (Some(12.5), 1));
    assert_eq!(
        (&told.scraped[..], &told.default_metrics[..]),
        (&["prom".to_owned()][..], &["prom".to_owned()][..])
    );
    assert_eq!(told.default_loggers, ["lines"]);
    let layouts: Vec<(bool, &str)> = told
        .loggers
        .iter()
        .map(|l| l.layout.as_ref().unwrap())
        .map(|l| (l.json, l.format.as_str()))
        .collect();
    assert_eq!(layouts, [(false, "%RESPONSE_CODE%"), (true, r#"{"code":"%RESPONSE_CODE%"}"#)]);
    assert_eq!(told.access_log_file.as_deref(), Some("/dev/stdout"));
    assert!(told.access_log_layout.as_ref().unwrap().json);
    let messages: Vec<&str> = resources.conditions.iter().map(|c| c.message.as_str()).collect();
    for part in [
        "extensionProviders[6] (datadog)",
        "extensionProviders[0].opentelemetry.http.headers[1].envName",
        "extensionProviders[4].envoyFileAccessLog.path (/var/log/x: lines go to /dev/stdout)",
        "defaultConfig.tracing.tlsSettings",
    ] {
        assert!(messages.iter().any(|m| m.contains(part)), "{part}: {messages:?}");
    }
}

#[test]
fn settings_that_cannot_be_used_name_their_field() {
    let wrong = |from: &str, to: &str| {
        assert!(PROVIDERS.contains(from), "{from}");
        let found = problems(&mesh_config(&PROVIDERS.replace(from, to)));
        assert_eq!(found.len(), 1, "{found:?}");
        found[0].clone()
    };
    assert_eq!(
        wrong("sampling: 12.5", "sampling: 101"),
        "data.mesh.defaultConfig.tracing.sampling: 101 is no percentage; write 0 to 100"
    );
    let unknown = wrong("{text: \"%RESPONSE_CODE%\"}", "{text: \"%RESPONSE%\"}");
    let field = "data.mesh.extensionProviders[3].envoyFileAccessLog.logFormat: ";
    assert!(unknown.starts_with(field) && unknown.contains("no command operator"), "{unknown}");
    let layout = wrong("'{\"code\": \"%RESPONSE_CODE%\"}'", "'%RESPONSE_CODE%'");
    assert!(layout.starts_with("data.mesh.accessLogFormat: is no JSON object"), "{layout}");
    assert!(wrong("accessLogEncoding: JSON", "accessLogEncoding: XML").contains("write TEXT or JSON"));
    assert!(
        wrong("prometheus: {}", "prometheus: {}\n  zipkin: {service: a, port: 1}")
            .contains("a provider is one thing")
    );
    assert!(wrong("path: /v1/traces", "path: v1").contains("opentelemetry.http.path: \"v1\" is no path"));
    assert!(wrong("port: 4317", "port: 0").contains("extensionProviders[1].opentelemetry.port"));
    assert!(wrong("zipkin.infra:9411", "zipkin.infra").contains("defaultConfig.tracing.zipkin.address"));
}

const ALL: &str = "  targetRefs: [{kind: Service, group: '', name: web}]
  tracing:
  - match: {mode: SERVER}
    providers: [{name: otel}]
    randomSamplingPercentage: 50
    disableSpanReporting: true
    useRequestIdForTraceSampling: false
    enableIstioTags: false
    disableContextPropagation: true
    customTags: {a: {literal: {value: b}}, f: {header: {name: X-F, defaultValue: g}}, h: {formatter: {value: '%PROTOCOL%'}}}
  metrics:
  - providers: [{name: prom}]
    overrides:
    - match: {metric: REQUEST_COUNT, mode: CLIENT}
      tagOverrides: {request_host: {value: request.host}, source_app: {operation: REMOVE}, of_node: {value: \"node.metadata['x']\"}}
    - match: {mode: SERVER}
      disabled: true
    - match: {metric: TCP_SENT_BYTES}
      disabled: true
    - match: {customMetric: mine}
  accessLogging:
  - providers: [{name: lines}, {name: envoy}]
    filter: {expression: 'response.code >= 400'}
  - disabled: true
    match: {mode: CLIENT}
  - filter: {expression: 'metadata.x == 1'}
";

#[test]
fn every_section_of_a_telemetry_is_told_and_what_has_no_effect_is_in_its_condition() {
    let resources = with(&telemetry("shop", "t", ALL));
    let told = &resources.l7.telemetries["Telemetry/shop/t"];
    assert_eq!(told.targets[0].hostnames, ["web.shop.svc.cluster.local"]);
    let tracing = &told.tracing[0];
    assert_eq!((tracing.mode(), tracing.sampling), (Mode::Server, Some(50.0)));
    assert_eq!(
        (tracing.disable_span_reporting, tracing.istio_tags, tracing.disable_context_propagation),
        (Some(true), Some(false), Some(true))
    );
    assert_eq!(tracing.tags.len(), 3);
    assert_eq!(tracing.tags[2].value, Some(tag::Value::Format("%PROTOCOL%".into())));
    let overrides = &told.metrics[0].overrides;
    assert_eq!(overrides.len(), 2);
    assert_eq!((overrides[0].metric(), overrides[0].mode()), (Metric::RequestCount, Mode::Client));
    let tags: Vec<(&str, Option<&str>)> =
        overrides[0].tags.iter().map(|t| (t.name.as_str(), t.value.as_deref())).collect();
    assert_eq!(tags, [("request_host", Some("request.host")), ("source_app", None)]);
    assert_eq!((overrides[1].metric(), overrides[1].disabled), (Metric::AllMetrics, Some(true)));
    let filters: Vec<&str> = told.access_logging.iter().map(|l| l.filter.as_str()).collect();
    assert_eq!(filters, ["response.code >= 400", "", ""]);
    assert_eq!(told.access_logging[1].disabled, Some(true));
    let condition = resources.condition("Telemetry shop/t", "WaypointAccepted");
    assert_eq!((condition.status, condition.reason.as_str()), (true, "UnsupportedValue"));
    for part in [
        "bound to shop/wp",
        "spec.metrics[0].overrides[0].tagOverrides.of_node.value (reads node, which waypoints do not know",
        "spec.metrics[0].overrides[2] (TCP_SENT_BYTES: of requests only)",
        "spec.metrics[0].overrides[3].match.customMetric",
        "spec.accessLogging[2].filter.expression (reads metadata",
    ] {
        assert!(condition.message.contains(part), "{part}: {}", condition.message);
    }
    assert!(resources.conditions.iter().all(|c| c.reason != "ProviderNotFound"));
}

#[test]
fn what_is_wrong_in_a_telemetry_is_named() {
    let wrong = |from: &str, to: &str| {
        assert!(ALL.contains(from), "{from}");
        let found = problems(&telemetry("shop", "t", &ALL.replace(from, to)));
        assert_eq!(found.len(), 1, "{found:?}");
        found[0].clone()
    };
    assert_eq!(
        wrong("randomSamplingPercentage: 50", "randomSamplingPercentage: -1"),
        "spec.tracing[0].randomSamplingPercentage: -1 is no percentage; write 0 to 100"
    );
    assert!(wrong("{literal: {value: b}}", "{}").starts_with("spec.tracing[0].customTags.a: needs literal"));
    assert!(wrong("'%PROTOCOL%'", "'%PROTOKOLL%'").contains("no command operator"));
    assert!(
        wrong("response.code >= 400", "response.code >=")
            .starts_with("spec.accessLogging[0].filter.expression: is no expression in CEL")
    );
    assert!(
        wrong("{operation: REMOVE}", "{operation: REMOVE, value: x}")
            .contains("may not stand beside operation REMOVE")
    );
    assert!(wrong("request_host:", "request-host:").contains("is no name of a label"));
    assert!(
        wrong("{customMetric: mine}", "{customMetric: mine, metric: REQUEST_COUNT}")
            .contains("keep one of the two")
    );
    assert!(wrong("{name: prom}", "{name: ''}").starts_with("spec.metrics[0].providers[0].name: missing"));
    assert!(wrong("mode: SERVER}\n    providers", "mode: SERVR}\n    providers").contains("SERVR"));
}

#[test]
fn one_without_targets_is_its_namespaces_and_the_oldest_counts() {
    let one = telemetry("shop", "b", "  tracing: [{randomSamplingPercentage: 1}]\n")
        .replace("namespace: shop}", "namespace: shop, creationTimestamp: '2026-01-01T00:00:00Z'}");
    let other = telemetry("shop", "a", "  tracing: [{randomSamplingPercentage: 2}]\n")
        .replace("namespace: shop}", "namespace: shop, creationTimestamp: '2026-01-02T00:00:00Z'}");
    let mesh = telemetry("istio-system", "m", "  tracing: [{providers: [{name: nobody}]}]\n");
    let selector = telemetry("shop", "s", "  selector: {matchLabels: {app: x}}\n");
    let resources = with(&format!("{one}{other}{mesh}{selector}"));
    let names: Vec<&String> = resources.l7.telemetries.keys().collect();
    assert_eq!(names, ["Telemetry/istio-system/m", "Telemetry/shop/b"]);
    let conflicted = resources.condition("Telemetry shop/a", "WaypointAccepted");
    assert_eq!((conflicted.status, conflicted.reason.as_str()), (false, "Conflicted"));
    assert!(resources.condition("Telemetry istio-system/m", "WaypointAccepted").message.contains("the mesh"));
    let missing = resources.condition("Telemetry istio-system/m", "ResolvedRefs");
    assert_eq!((missing.status, missing.reason.as_str()), (false, "ProviderNotFound"));
    assert!(missing.message.contains("no such extensionProviders entry \"nobody\""), "{}", missing.message);
    let never = resources.condition("Telemetry shop/s", "WaypointAccepted");
    assert!(!never.status && never.message.contains("never means a waypoint"));
}

#[test]
fn an_unknown_field_of_a_telemetry_is_an_error_with_a_suggestion() {
    let state = load(&telemetry("shop", "t", "  tracings: []\n"));
    let found: Vec<String> = state.problems.iter().map(ToString::to_string).collect();
    assert!(found.iter().any(|p| p.contains("tracings") && p.contains("did you mean")), "{found:?}");
}
