//! The bench's objects: pods, services, gateways and routes.

use crate::bed::Waypoint;
use std::fmt::Write as _;

use super::peers::PORT;

/// Header that routes ask for.
pub(super) const HEADER: &str = "x-bench";
/// Routes that no request matches, before the one that it does.
pub(super) const MISSES: usize = 9;
/// Ports of the server's two versions.
pub(super) const SERVER_PORTS: [u16; 2] = [8001, 8002];
/// Port of the server of gRPC.
pub(super) const GRPC_PORT: u16 = 8003;
/// Where the service of the mesh is.
pub(super) const MESH_VIP: &str = "10.96.7.1";

/// What stands before the servers.
pub(super) const PODS: [&str; 8] =
    ["client", "server", "gateway", "full", "envoy", "haproxy", "nginx", "relay"];

fn pod(namespace: &str, name: &str) -> String {
    let app = if name == "server" { ", labels: {app: web}" } else { "" };
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}{app}}}\n\
         spec: {{nodeName: a, serviceAccountName: {name}, containers: [{{name: main, image: none}}]}}\n---\n"
    )
}

fn service(namespace: &str, name: &str, ip: &str, target: u16, protocol: &str, labels: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}{labels}}}\n\
         spec: {{clusterIP: {ip}, clusterIPs: [{ip}], selector: {{app: web}}, \
         ports: [{{name: {protocol}, port: 80, targetPort: {target}}}]}}\n---\n"
    )
}

/// The rules of an HTTPRoute: those that miss, and the one that takes every request of the bench.
fn rules() -> String {
    let mut rules = String::new();
    for n in 0..MISSES {
        let _ = write!(
            rules,
            "
  - matches: [{{path: {{type: PathPrefix, value: /part{n}}}, headers: [{{name: {HEADER}, value: part{n}}}]}}]
    backendRefs: [{{name: web-v1, port: 80}}]"
        );
    }
    rules
        + &format!(
            "
  - matches: [{{path: {{type: PathPrefix, value: /}}, headers: [{{name: {HEADER}, value: 'yes'}}]}}]
    timeouts: {{request: 5s}}
    retry: {{attempts: 2, codes: [500, 502, 503, 504]}}
    backendRefs: [{{name: web-v1, port: 80, weight: 80}}, {{name: web-v2, port: 80, weight: 20}}]
"
        )
}

/// The pod of one more gateway.
pub(super) fn many_pod(name: &str) -> String {
    pod("bench", name)
}

/// Two namespaces: one that is no part of the mesh, where every proxy stands, and one that is.
pub(super) fn base() -> String {
    let mut yaml = String::from(
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: bench}\n---\n\
         apiVersion: v1\nkind: Namespace\nmetadata: {name: mesh, labels: {istio.io/dataplane-mode: ambient}}\n---\n",
    );
    PODS.iter().for_each(|name| yaml += &pod("bench", name));
    yaml += &pod("mesh", "client");
    yaml += &pod("mesh", "server");
    for (namespace, net) in [("bench", 6), ("mesh", 7)] {
        let [v1, v2] = SERVER_PORTS;
        yaml += &service(namespace, "web-v1", &format!("10.96.{net}.11"), v1, "http", "");
        yaml += &service(namespace, "web-v2", &format!("10.96.{net}.12"), v2, "http", "");
    }
    yaml += &service("bench", "grpc", "10.96.6.13", GRPC_PORT, "grpc", "");
    let bound = ", labels: {istio.io/use-waypoint: wp}";
    yaml += &service("mesh", "web", MESH_VIP, SERVER_PORTS[0], "http", bound);
    yaml
}

/// A Gateway with one plain listener.
pub(super) fn gateway(name: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{name: {name}, namespace: bench}}
spec:
  gatewayClassName: istio
  listeners: [{{name: http, port: {PORT}, protocol: HTTP}}]
---
"
    )
}

/// The routes of these gateways, and of the service that is behind the waypoint.
pub(super) fn routes(gateways: &[&str]) -> String {
    let parents: Vec<String> = gateways.iter().map(|name| format!("{{name: {name}}}")).collect();
    let parents = parents.join(", ");
    let rules = rules();
    format!(
        "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: routes, namespace: bench}}
spec:
  parentRefs: [{parents}]
  rules:{rules}---
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {{name: grpc, namespace: bench}}
spec:
  parentRefs: [{parents}]
  hostnames: [localhost]
  rules: [{{backendRefs: [{{name: grpc, port: 80}}]}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: routes, namespace: mesh}}
spec:
  parentRefs: [{{group: '', kind: Service, name: web, port: 80}}]
  rules:{rules}"
    )
}

/// Where spans go: a server that takes anything.
pub(super) const SETTINGS: &str = "apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data:
  mesh: |
    extensionProviders:
    - name: collector
      zipkin: {service: web-v1.bench.svc.cluster.local, port: 80}
";

/// Everything on, for one gateway: a token to verify, twenty rules of policy, spans of one request in a hundred.
pub(super) fn policies(gateway: &str, keys: &str) -> String {
    let mut rules = String::new();
    for n in 0..19 {
        let _ = write!(
            rules,
            "
  - to: [{{operation: {{methods: [POST], paths: ['/part{n}/*']}}}}]
    when: [{{key: 'request.auth.claims[role]', values: [part{n}]}}]"
        );
    }
    format!(
        "apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {{name: bench, namespace: bench}}
spec:
  targetRefs: [{{group: gateway.networking.k8s.io, kind: Gateway, name: {gateway}}}]
  jwtRules: [{{issuer: 'https://issuer.example', jwks: '{keys}', forwardOriginalToken: true}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: bench, namespace: bench}}
spec:
  targetRefs: [{{group: gateway.networking.k8s.io, kind: Gateway, name: {gateway}}}]
  action: ALLOW
  rules:{rules}
  - from: [{{source: {{requestPrincipals: ['https://issuer.example/alice']}}}}]
    to: [{{operation: {{methods: [GET], paths: ['/item', '/item/*']}}}}]
    when: [{{key: 'request.auth.claims[role]', values: [admin]}}]
---
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {{name: bench, namespace: bench}}
spec:
  targetRefs: [{{group: gateway.networking.k8s.io, kind: Gateway, name: {gateway}}}]
  tracing: [{{providers: [{{name: collector}}], randomSamplingPercentage: 1}}]
"
    )
}

/// The waypoint of the mesh's namespace.
pub(super) fn waypoint() -> Waypoint {
    Waypoint {
        namespace: "mesh".into(),
        name: "wp".into(),
        node: "a".into(),
        cluster_ip: [10, 96, 7, 77].into(),
        accepts: "all".into(),
        args: vec!["--workers=1".into(), "--access-log=false".into()],
    }
}

/// Hosts and addresses of one of many services outside of the mesh.
fn many_host(n: usize) -> String {
    format!("many{n}.example")
}

/// Services of one endpoint each, by number, and a route to each of them for the gateway. `endpoint` is where number
/// `last` is, which the bench asks for; the others lead nowhere.
pub(super) fn many(
    gateway: &str,
    range: std::ops::Range<usize>,
    last: usize,
    endpoint: std::net::SocketAddr,
) -> String {
    let mut yaml = String::new();
    for n in range.clone() {
        let host = many_host(n);
        let to = format!("192.0.{}.{}", n / 200 % 250, n % 200 + 1);
        let address = if n == last { endpoint.ip().to_string() } else { to };
        let _ = write!(
            yaml,
            "apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: many{n}, namespace: bench}}
spec:
  hosts: [{host}]
  addresses: [{}]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [{{number: 80, name: http, protocol: HTTP, targetPort: {}}}]
  endpoints: [{{address: {address}}}]
---
",
            format_args!("198.{}.{}.{}", 18 + n / 50_000, n / 200 % 250, n % 200 + 1),
            endpoint.port(),
        );
    }
    let all: Vec<usize> = range.collect();
    for (part, numbers) in all.chunks(16).enumerate() {
        let from = numbers.first().copied().unwrap_or_default();
        let _ = write!(
            yaml,
            "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: many{from}-{part}, namespace: bench}}
spec:
  parentRefs: [{{name: {gateway}}}]
  rules:"
        );
        for n in numbers {
            let _ = write!(
                yaml,
                "
  - matches: [{{path: {{type: PathPrefix, value: /many/{n}}}, headers: [{{name: {HEADER}, value: 'yes'}}]}}]
    timeouts: {{request: 5s}}
    backendRefs: [{{group: networking.istio.io, kind: Hostname, name: {}, port: 80}}]",
                many_host(*n)
            );
        }
        yaml.push_str("\n---\n");
    }
    yaml
}
