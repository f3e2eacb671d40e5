//! The demo's shop: its objects, its customers, and what can be seen of their traffic.

use crate::bed::capture::Segment;
use crate::bed::{Load, Testbed, net, run, wait};
use anyhow::Result;
use std::net::SocketAddr;
use std::time::Duration;

pub(super) const PICTURE: &str = "
      node a                                   node b
      customer ──▶ frontend ──────────────────▶ backend ──▶ stock
                       └──────────────────────▶ catalog (nginx)
      intruder                                 outside the mesh: visitor, site (a), far (b)
";

/// Every pod of the shop.
pub(super) const ENROLLED: &[&str] =
    &["shop/customer", "shop/frontend", "shop/intruder", "shop/backend", "shop/stock", "shop/catalog"];

/// The policy of the story.
pub(super) const ONLY_FRONTEND: &str = "
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

// Pods call each other by address, as a cluster's service proxy would have chosen: addresses follow from the order.
pub(super) const SHOP: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {}}
---
apiVersion: v1
kind: Namespace
metadata: {name: outside}
---
apiVersion: v1
kind: Service
metadata: {name: backend, namespace: shop}
spec:
  clusterIP: 10.96.0.10
  selector: {app: backend}
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: v1
kind: Pod
metadata: {name: backend, namespace: shop, labels: {app: backend}}
spec:
  nodeName: b
  serviceAccountName: backend
  containers:
  - {name: web, image: none, command: [mesh-tests, tool, web, --name, backend, --port, '8080', --ask, '10.30.2.2:8080'], ports: [{containerPort: 8080}]}
---
apiVersion: v1
kind: Pod
metadata: {name: stock, namespace: shop, labels: {app: stock}}
spec:
  nodeName: b
  serviceAccountName: stock
  containers:
  - {name: web, image: none, command: [mesh-tests, tool, web, --name, stock, --port, '8080'], ports: [{containerPort: 8080}]}
  - {name: tcp, image: none, command: [mesh-tests, tool, serve, --echo, '8081', --sink, '8082'], ports: [{containerPort: 8081}, {containerPort: 8082}]}
---
apiVersion: v1
kind: Pod
metadata: {name: catalog, namespace: shop, labels: {app: catalog}}
spec:
  nodeName: b
  serviceAccountName: catalog
  containers:
  - name: nginx
    image: none
    command:
    - sh
    - -c
    - |
      cat > $UM_DIR/nginx.conf <<END
      daemon off; user root; pid $UM_DIR/nginx.pid; events { worker_connections 512; }
      http {
        access_log off;
        client_body_temp_path $UM_DIR/t1; proxy_temp_path $UM_DIR/t2; fastcgi_temp_path $UM_DIR/t3;
        uwsgi_temp_path $UM_DIR/t4; scgi_temp_path $UM_DIR/t5;
        server { listen 8080; listen [::]:8080; return 200 '{\"service\": \"catalog (nginx)\"}'; }
      }
      END
      exec nginx -e stderr -c $UM_DIR/nginx.conf
    ports: [{containerPort: 8080}]
---
apiVersion: v1
kind: Pod
metadata: {name: frontend, namespace: shop, labels: {app: frontend}}
spec:
  nodeName: a
  serviceAccountName: frontend
  containers:
  - {name: web, image: none, command: [mesh-tests, tool, web, --name, frontend, --port, '8080', --ask, '10.30.2.1:8080', --ask, '10.30.2.3:8080'], ports: [{containerPort: 8080}]}
---
apiVersion: v1
kind: Pod
metadata: {name: customer, namespace: shop}
spec: {nodeName: a, serviceAccountName: customer, containers: [{name: main, image: none}]}
---
apiVersion: v1
kind: Pod
metadata: {name: intruder, namespace: shop}
spec: {nodeName: a, serviceAccountName: intruder, containers: [{name: main, image: none}]}
---
apiVersion: v1
kind: Pod
metadata: {name: visitor, namespace: outside}
spec: {nodeName: a, containers: [{name: main, image: none}]}
---
apiVersion: v1
kind: Pod
metadata: {name: site, namespace: outside}
spec:
  nodeName: a
  containers:
  - {name: tcp, image: none, command: [mesh-tests, tool, serve, --echo, '8081', --sink, '8082'], ports: [{containerPort: 8081}, {containerPort: 8082}]}
---
apiVersion: v1
kind: Pod
metadata: {name: far, namespace: outside}
spec:
  nodeName: b
  containers:
  - {name: tcp, image: none, command: [mesh-tests, tool, serve, --echo, '8081', --sink, '8082'], ports: [{containerPort: 8081}, {containerPort: 8082}]}
";

/// Connections that stay open during an upgrade.
pub(super) const HELD: u64 = 20;

/// Customers who each make one request on a new connection, until stopped.
pub(super) fn customers(bed: &Testbed) -> Result<Load> {
    let to = bed.pod("shop/frontend")?.at(8080).to_string();
    Load::start(bed.pod("shop/customer")?, &to, &["--shape", "http", "--pause-ms", "5"])
}

/// Connections from node a to node b that stay, with a round trip every few milliseconds.
pub(super) fn held(bed: &Testbed) -> Result<Load> {
    let to = bed.pod("shop/stock")?.at(8081).to_string();
    let load = Load::start(
        bed.pod("shop/frontend")?,
        &to,
        &["--shape", "pp", "--conns", &HELD.to_string(), "--pause-ms", "1"],
    )?;
    let server = &bed.pod("shop/stock")?.netns;
    wait::until_true("held connections", Duration::from_secs(10), || {
        let open = net::established(server)?;
        Ok(open.iter().filter(|(local, _)| local.port() == 8081).count() as u64 >= HELD)
    })?;
    Ok(load)
}

/// Everything on the wire between the nodes for one second.
pub(super) fn watch(bed: &Testbed) -> Result<Vec<Segment>> {
    let capture = bed.capture("a")?;
    run::pause(Duration::from_secs(1))?;
    capture.stop()
}

/// The first line of an HTTP request or answer, if these bytes are one.
pub(super) fn http_line(payload: &[u8]) -> Option<String> {
    let line = payload.split(|byte| *byte == b'\r').next()?;
    let line = std::str::from_utf8(line).ok()?;
    (line.starts_with("GET /") || line.starts_with("HTTP/1.1 ")).then(|| line.to_owned())
}

/// The client's address in the answer of a web service.
pub(super) fn client_of(answer: &str) -> String {
    serde_json::from_str::<serde_json::Value>(answer)
        .ok()
        .and_then(|answer| Some(answer.get("client")?.as_str()?.to_owned()))
        .unwrap_or_default()
}

/// Connects until the pair is on the fast path, where it applies.
pub(super) fn warm(bed: &Testbed, from: &str, to: SocketAddr) -> Result<()> {
    wait::until_true(&format!("fast path {from} -> {to}"), Duration::from_secs(10), || {
        let pod = bed.pod(from)?;
        let mut held = pod.spawn([
            "mesh-tests",
            "tool",
            "call",
            "--to",
            &to.to_string(),
            "--send",
            "x",
            "--hold-ms",
            "5000",
        ])?;
        let direct = wait::until("open connection", Duration::from_secs(5), || {
            let open = net::established(&pod.netns)?;
            let direct = open.iter().any(|(_, remote)| *remote == to);
            let captured = open.iter().any(|(own, remote)| own.ip() == remote.ip());
            Ok((direct || captured).then_some(direct))
        });
        held.kill();
        direct
    })
}
