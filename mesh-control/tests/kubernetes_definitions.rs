//! The definitions of Istio's kinds that the chart brings, on a real API server: what they refuse, and what they let pass.

mod apiserver;

use apiserver::{ApiServer, until};

/// What is refused: kind and version, spec, part of the message.
const REFUSED: &[(&str, &str, &str)] = &[
    ("security.istio.io/v1 PeerAuthentication", "{mtls: {mode: strict}}", "spec.mtls.mode"),
    (
        "security.istio.io/v1 PeerAuthentication",
        "{portLevelMtls: {'8080': {mode: DISABLE}}}",
        "portLevelMtls needs a selector",
    ),
    (
        "security.istio.io/v1 PeerAuthentication",
        "{selector: {matchLabels: {app: a}}, portLevelMtls: {http: {mode: DISABLE}}}",
        "port numbers, 1 to 65535",
    ),
    ("security.istio.io/v1 AuthorizationPolicy", "{action: PERMIT}", "spec.action"),
    ("security.istio.io/v1 AuthorizationPolicy", "{action: CUSTOM}", "provider goes with action CUSTOM"),
    ("security.istio.io/v1 AuthorizationPolicy", "{provider: {name: p}}", "provider goes with action CUSTOM"),
    (
        "security.istio.io/v1beta1 AuthorizationPolicy",
        "{selector: {matchLabels: {app: a}}, targetRefs: [{group: '', kind: Service, name: a}]}",
        "write one of selector, targetRef and targetRefs",
    ),
    ("security.istio.io/v1 RequestAuthentication", "{jwtRules: [{jwks: '{}'}]}", "issuer"),
    (
        "security.istio.io/v1 RequestAuthentication",
        "{jwtRules: [{issuer: i, jwks: '{}', jwksUri: 'https://keys.example/'}]}",
        "write jwks or jwksUri",
    ),
    (
        "security.istio.io/v1 RequestAuthentication",
        "{jwtRules: [{issuer: i, jwksUri: 'ftp://keys.example/'}]}",
        "jwksUri is an http or https URL",
    ),
    (
        "telemetry.istio.io/v1 Telemetry",
        "{selector: {matchLabels: {app: a}}, targetRef: {group: '', kind: Service, name: a}}",
        "write one of selector",
    ),
    ("networking.istio.io/v1 ServiceEntry", "{ports: []}", "spec.hosts"),
    ("networking.istio.io/v1 ServiceEntry", "{hosts: [a.example], resolution: dns}", "spec.resolution"),
    (
        "networking.istio.io/v1 ServiceEntry",
        "{hosts: [a.example], workloadSelector: {labels: {app: a}}, endpoints: [{address: 10.0.0.1}], resolution: STATIC}",
        "write workloadSelector or endpoints",
    ),
    (
        "networking.istio.io/v1 ServiceEntry",
        "{hosts: [a.example], ports: [{number: 80, name: a}, {number: 80, name: b}]}",
        "each port number stands once",
    ),
    (
        "networking.istio.io/v1alpha3 ServiceEntry",
        "{hosts: [a.example], ports: [{number: 80, name: a}, {number: 81, name: a}]}",
        "duplicate entries for key",
    ),
    ("networking.istio.io/v1 WorkloadEntry", "{weight: 1}", "write address, or network"),
    ("networking.istio.io/v1 VirtualService", "{hosts: [a]}", "write http, tls or tcp"),
    (
        "networking.istio.io/v1 VirtualService",
        "{hosts: [a], http: [{route: [{destination: {host: a}}], redirect: {uri: /}}]}",
        "write one of route, redirect",
    ),
    ("networking.istio.io/v1 DestinationRule", "{trafficPolicy: {}}", "spec.host"),
    (
        "networking.istio.io/v1 DestinationRule",
        "{host: a, trafficPolicy: {tls: {mode: TLS}}}",
        "spec.trafficPolicy.tls.mode",
    ),
    (
        "networking.istio.io/v1 DestinationRule",
        "{host: a, subsets: [{name: v1, labels: {v: '1'}}, {name: v1, labels: {v: '2'}}]}",
        "duplicate entries for key",
    ),
];

/// What passes; fields that the definitions do not name stay as they are.
const ACCEPTED: &[(&str, &str, &str)] = &[
    (
        "security.istio.io/v1 PeerAuthentication",
        "{selector: {matchLabels: {app: a}}, mtls: {mode: STRICT}, portLevelMtls: {'8080': {mode: PERMISSIVE}}}",
        "{.spec.portLevelMtls.8080.mode}",
    ),
    (
        "security.istio.io/v1 AuthorizationPolicy",
        "{action: CUSTOM, provider: {name: p}, rules: [{to: [{operation: {paths: [/a]}}]}]}",
        "{.spec.rules[0].to[0].operation.paths[0]}",
    ),
    (
        "security.istio.io/v1 RequestAuthentication",
        "{jwtRules: [{issuer: i, jwksUri: 'https://keys.example/', audiences: [a]}]}",
        "{.spec.jwtRules[0].audiences[0]}",
    ),
    (
        "telemetry.istio.io/v1 Telemetry",
        "{tracing: [{randomSamplingPercentage: 5}]}",
        "{.spec.tracing[0].randomSamplingPercentage}",
    ),
    (
        "networking.istio.io/v1 ServiceEntry",
        "{hosts: [a.example], ports: [{number: 80, name: http, protocol: HTTP, targetPort: 8080}], resolution: DNS}",
        "{.spec.ports[0].targetPort}",
    ),
    ("networking.istio.io/v1 WorkloadEntry", "{address: 10.0.0.1, labels: {app: a}}", "{.spec.labels.app}"),
    (
        "networking.istio.io/v1 VirtualService",
        "{hosts: [a], http: [{match: [{uri: {prefix: /a}}], route: [{destination: {host: a}, weight: 100}], retries: {attempts: 3}}]}",
        "{.spec.http[0].retries.attempts}",
    ),
    (
        "networking.istio.io/v1beta1 DestinationRule",
        "{host: a, trafficPolicy: {outlierDetection: {consecutive5xxErrors: 5}}, subsets: [{name: v1, labels: {v: '1'}}]}",
        "{.spec.trafficPolicy.outlierDetection.consecutive5xxErrors}",
    ),
];

fn object(kind: &str, spec: &str, name: &str) -> String {
    let (version, kind) = kind.split_once(' ').expect("version and kind");
    format!(
        "apiVersion: {version}\nkind: {kind}\nmetadata: {{name: {name}, namespace: default}}\nspec: {spec}\n"
    )
}

#[test]
fn the_charts_definitions_refuse_what_can_be_told_without_us_and_let_everything_else_pass() {
    let Some(server) = ApiServer::start() else { return };
    let made =
        std::process::Command::new(env!("CARGO_BIN_EXE_mesh-control")).arg("definitions").output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    server.apply(&String::from_utf8(made.stdout).unwrap());
    let (kind, spec, _) = ACCEPTED[0];
    until("the definitions are established", || {
        server.try_apply(&object(kind, spec, "first")).status.success()
    });
    for (i, (kind, spec, path)) in ACCEPTED.iter().enumerate() {
        let name = format!("good-{i}");
        until(&format!("{kind} {spec} is taken"), || {
            server.try_apply(&object(kind, spec, &name)).status.success()
        });
        let resource = kind.split_once(' ').unwrap().1.to_lowercase();
        let resource = format!("{resource}.{}", kind.split_once('/').unwrap().0);
        let kept =
            server.text(&["get", "-n", "default", &resource, &name, "-o", &format!("jsonpath={path}")]);
        assert!(!kept.is_empty(), "{kind} {spec}: {path} was lost");
    }
    for (kind, spec, message) in REFUSED {
        let output = server.try_apply(&object(kind, spec, "bad"));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{kind} {spec} was taken");
        assert!(said.contains(message), "{kind} {spec}: no {message:?} in {said}");
    }
}
