//! The shop: the objects that most scenarios use, and what they ask of them.

use crate::bed::mesh::MeshOptions;
use crate::bed::{Testbed, Topology, net};
use anyhow::{Context, Result, bail, ensure};

/// Nodes `a` and `b`; namespace `shop` in the mesh, `outside` not.
///
/// | pod | node | what |
/// |---|---|---|
/// | shop/frontend | a | client (service account frontend) |
/// | shop/other | a | client (service account other) |
/// | shop/backend | b | echo 8080, greeting 8081, sink 8082, source 8083 |
/// | shop/local | b | client beside backend (service account frontend) |
/// | outside/visitor | a | client outside the mesh |
/// | outside/site | b | greeting 8081, echo 8080, outside the mesh |
pub(crate) const SHOP: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Namespace
metadata: {name: outside}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: frontend, namespace: shop}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: backend, namespace: shop}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: other, namespace: shop}
---
apiVersion: v1
kind: Service
metadata: {name: backend, namespace: shop}
spec:
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10, 'fd96::10']
  ipFamilies: [IPv4, IPv6]
  selector: {app: backend}
  ports:
  - {name: tcp-echo, port: 80, targetPort: 8080}
  - {name: tcp-greet, port: 81, targetPort: greet}
---
apiVersion: v1
kind: Service
metadata: {name: backend-headless, namespace: shop}
spec:
  clusterIP: None
  clusterIPs: [None]
  selector: {app: backend}
  ports:
  - {name: tcp-greet, port: 8081, targetPort: 8081}
---
apiVersion: v1
kind: Pod
metadata: {name: backend, namespace: shop, labels: {app: backend}}
spec:
  nodeName: b
  serviceAccountName: backend
  containers:
  - name: main
    image: none
    command: [mesh-tests, tool, serve, --log]
    args: [--echo, '8080', --greet, '8081', --sink, '8082', --source, '8083']
    ports:
    - {name: echo, containerPort: 8080}
    - {name: greet, containerPort: 8081}
    - {name: sink, containerPort: 8082}
    - {name: source, containerPort: 8083}
---
apiVersion: v1
kind: Pod
metadata: {name: frontend, namespace: shop, labels: {app: frontend}}
spec: {nodeName: a, serviceAccountName: frontend, containers: [{name: main, image: none}]}
---
apiVersion: v1
kind: Pod
metadata: {name: other, namespace: shop, labels: {app: other}}
spec: {nodeName: a, serviceAccountName: other, containers: [{name: main, image: none}]}
---
apiVersion: v1
kind: Pod
metadata: {name: local, namespace: shop, labels: {app: frontend}}
spec: {nodeName: b, serviceAccountName: frontend, containers: [{name: main, image: none}]}
---
apiVersion: v1
kind: Pod
metadata: {name: visitor, namespace: outside}
spec: {nodeName: a, containers: [{name: main, image: none}]}
---
apiVersion: v1
kind: Pod
metadata: {name: site, namespace: outside, labels: {app: site}}
spec:
  nodeName: b
  containers:
  - name: main
    image: none
    command: [mesh-tests, tool, serve, --echo, '8080', --greet, '8081']
    ports: [{containerPort: 8080}, {containerPort: 8081}]
";

/// Every pod of the shop that is in the mesh.
pub(crate) const ENROLLED: &[&str] = &["shop/frontend", "shop/other", "shop/backend", "shop/local"];

/// \"Only frontend may call backend.\"
pub(crate) const ONLY_FRONTEND: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: only-frontend, namespace: shop}
spec:
  selector: {matchLabels: {app: backend}}
  action: ALLOW
  rules:
  - from:
    - source: {principals: [cluster.local/ns/shop/sa/frontend]}
";

/// A `PeerAuthentication` for the namespace.
pub(crate) fn peer_authentication(mode: &str) -> String {
    format!(
        "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {{name: default, namespace: shop}}
spec: {{mtls: {{mode: {mode}}}}}
"
    )
}

/// The shop with the mesh running and its pods enrolled.
pub(crate) fn open() -> Result<Testbed> {
    open_with(&Topology::nodes(&["a", "b"]), &MeshOptions::default())
}

/// As [`open`], with other options.
pub(crate) fn open_with(topology: &Topology, options: &MeshOptions) -> Result<Testbed> {
    let mut bed = Testbed::build(topology, SHOP)?;
    bed.start_mesh(options)?;
    enrolled(&bed, ENROLLED)?;
    Ok(bed)
}

/// Waits for enrolment; failing, shows the mesh's own logs.
pub(crate) fn enrolled(bed: &Testbed, keys: &[&str]) -> Result<()> {
    bed.wait_enrolled(keys).context("not enrolled")
}

/// The exchange of a short text works.
pub(crate) fn talks(bed: &Testbed, from: &str, to: &str) -> Result<()> {
    let outcome = bed.pod(from)?.call(to, &["--send", "hello", "--half-close"])?;
    ensure!(
        outcome.ok && outcome.received == "hello",
        "{from} -> {to}: {} got {:?}",
        outcome.problem(),
        outcome.received
    );
    Ok(())
}

/// The exchange of a short text is refused: no byte comes back, and it is over at once rather than by a timeout.
pub(crate) fn refused(bed: &Testbed, from: &str, to: &str) -> Result<()> {
    let outcome = bed.pod(from)?.call(to, &["--send", "hello\n", "--lines", "1", "--timeout-ms", "8000"])?;
    ensure!(!outcome.ok, "{from} -> {to} was answered with {:?}", outcome.received);
    ensure!(outcome.received.is_empty(), "{from} -> {to} got {:?}", outcome.received);
    if !matches!(
        outcome.kind.as_str(),
        "ConnectionReset" | "ConnectionRefused" | "UnexpectedEof" | "BrokenPipe"
    ) {
        bail!("{from} -> {to} was not refused but {}", outcome.problem());
    }
    Ok(())
}

/// Between nodes, frontend reaches backend over a tunnel right now: the server's kernel has one from its node.
pub(crate) fn tunnelled(bed: &Testbed) -> Result<()> {
    let client = bed.pod("shop/frontend")?;
    let own = [client.at(0).ip(), client.at6(0).ip()];
    let open = net::established(&bed.pod("shop/backend")?.netns)?;
    let tunnel = open.iter().any(|(local, remote)| local.port() == 15_008 && own.contains(&remote.ip()));
    ensure!(tunnel, "the server's pod has no tunnel from the client: {open:?}");
    Ok(())
}

/// The sum of a metric's series that have these labels, in Prometheus' text format.
pub(crate) fn metric(text: &str, name: &str, labels: &[(&str, &str)]) -> f64 {
    text.lines()
        .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])))
        .filter(|line| labels.iter().all(|(key, value)| line.contains(&format!("{key}=\"{value}\""))))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}
