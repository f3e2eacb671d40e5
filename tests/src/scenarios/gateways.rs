//! What the control plane does not announce yet and other control planes do: applications that want a PROXY header, and
//! workloads behind the gateway of another network. A relay adds the fields to our control plane's feed; the gateway is
//! a stand-in that we did not write.

use super::programs::{need, nginx_conf};
use super::shop::{ENROLLED, ONLY_FRONTEND, SHOP, enrolled, refused, talks};
use super::{Scenario, scenario};
use crate::bed::hbone::{asked, server};
use crate::bed::pki::{Leaf, Pki};
use crate::bed::relay::{Relay, behind, wire};
use crate::bed::{Testbed, Topology, capture, wait};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::net::Ipv4Addr;
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("an application that wants a PROXY header gets the client's address and identity", 60, proxied),
    scenario(
        "a service of another network is reached by a tunnel in a tunnel through its gateway",
        90,
        beyond,
    ),
];

const SOON: Duration = Duration::from_secs(20);

/// The shop with a relay that adds `patches`, once `prepare` has put more into it.
fn open(
    patches: impl FnOnce(&Testbed) -> Vec<(&'static str, Vec<u8>)>,
    prepare: impl FnOnce(&mut Testbed, &Pki) -> Result<()>,
) -> Result<(Testbed, Relay)> {
    let mut bed = Testbed::build(&Topology::nodes(&["a", "b"]), SHOP)?;
    let pki = Pki::create(&bed.dir.join("pki"), "mesh test")?;
    prepare(&mut bed, &pki)?;
    let relay = Relay::start(&bed, &pki, &patches(&bed))?;
    bed.start_mesh(&behind(&pki))?;
    enrolled(&bed, ENROLLED)?;
    Ok((bed, relay))
}

/// `Address.workload.application_tunnel`: PROXY, to a port.
fn proxy_tunnel(port: u16) -> Vec<u8> {
    let tunnel = [wire::number(1, 1), wire::number(2, port.into())].concat();
    wire::bytes(1, &wire::bytes(23, &tunnel))
}

fn proxied() -> Result<()> {
    let nginx = need("nginx")?;
    let patches = |_: &Testbed| {
        vec![
            ("Kubernetes//Pod/shop/raw", proxy_tunnel(8090)),
            ("Kubernetes//Pod/shop/page", proxy_tunnel(8091)),
        ]
    };
    let (bed, _relay) = open(patches, |bed, _| {
        let script = bed.dir.join("proxied_server.py");
        std::fs::write(&script, include_str!("../foreign/proxied_server.py"))
            .context("cannot write a server")?;
        let config = nginx_conf(
            &bed.dir.join("nginx"),
            "server { listen 127.0.0.1:8091 proxy_protocol; location / { return 200 \
             '$proxy_protocol_addr $proxy_protocol_server_addr $proxy_protocol_server_port'; } }",
        )?;
        let raw = json!(["python3", script, "8090"]);
        let page = json!([nginx, "-e", "stderr", "-c", config]);
        bed.apply("proxied", &format!("{}{}", pod("raw", &raw, 8090), pod("page", &page, 8091)))
    })?;
    enrolled(&bed, &["shop/raw", "shop/page"])?;
    let raw = bed.pod("shop/raw")?;
    // Nobody listens on 8080: the tunnel's port is the application's. On one node, too.
    for from in ["shop/frontend", "shop/local", "shop/local", "shop/local"] {
        talks(&bed, from, &raw.at(8080).to_string())?;
        let log = raw.log();
        let said: Value = serde_json::from_str(log.lines().last().unwrap_or_default())
            .with_context(|| format!("the server printed {log:?}"))?;
        ensure!(said["command"] == 0x21 && said["peer"] == "127.0.0.1", "{said}");
        ensure!(said["source"][0] == bed.pod(from)?.v4.to_string(), "{from}: {said}");
        ensure!(said["destination"] == json!([raw.v4.to_string(), 8080]), "{from}: {said}");
        ensure!(said["fields"] == json!({"0xd0": "spiffe://cluster.local/ns/shop/sa/frontend"}), "{said}");
    }
    // nginx reads it as well.
    let page = bed.pod("shop/page")?;
    let url = format!("http://{}/", page.at(80));
    let seen = bed.pod("shop/frontend")?.output(["curl", "-sfS", &url])?;
    let expected = format!("{} {} 80", bed.pod("shop/frontend")?.v4, page.v4);
    ensure!(seen.trim() == expected, "nginx saw {seen:?} instead of {expected:?}");
    Ok(())
}

fn pod(name: &str, command: &Value, port: u16) -> String {
    format!(
        "---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: shop}}
spec:
  nodeName: b
  serviceAccountName: {name}
  containers: [{{name: main, image: none, command: {command}, ports: [{{containerPort: {port}}}]}}]
"
    )
}

/// Service `far` has one endpoint, in network `there`, whose gateway is a pod outside the mesh.
fn far(gateway: Ipv4Addr) -> String {
    format!(
        "
apiVersion: v1
kind: Service
metadata: {{name: far, namespace: shop}}
spec:
  clusterIP: 10.96.2.2
  clusterIPs: [10.96.2.2]
  selector: {{app: far}}
  ports: [{{name: tcp-echo, port: 80, targetPort: 8080}}]
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{name: far, namespace: shop}}
spec: {{network: there, labels: {{app: far}}}}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{name: gateway, namespace: shop}}
spec: {{network: there, address: {gateway}, serviceAccount: gateway}}
"
    )
}

/// What another control plane would say of them: the endpoint is behind the gateway, and who may answer for the service.
fn far_patches(bed: &Testbed) -> Vec<(&'static str, Vec<u8>)> {
    let gateway = bed.pods.get("outside/gateway").map_or(Ipv4Addr::UNSPECIFIED, |pod| pod.v4);
    let address = [wire::bytes(1, b"there"), wire::bytes(2, &gateway.octets())].concat();
    let via = [wire::bytes(2, &address), wire::number(3, 15_008)].concat();
    let endpoint = [wire::number(5, 1), wire::bytes(19, &via)].concat();
    let names = wire::bytes(6, b"spiffe://cluster.local/ns/shop/sa/backend");
    vec![
        ("Kubernetes/networking.istio.io/WorkloadEntry/shop/far", wire::bytes(1, &endpoint)),
        ("shop/far.shop.svc.cluster.local", wire::bytes(2, &names)),
    ]
}

fn beyond() -> Result<()> {
    let (mut bed, _relay) = open(far_patches, |bed, pki| {
        let certificate = pki.issue("gateway", Leaf::of("URI:spiffe://cluster.local/ns/shop/sa/gateway"))?;
        let target = ("far.shop.svc.cluster.local:80".to_owned(), bed.pod("shop/backend")?.at(15_008));
        let command = json!(server(&bed.dir, &pki.root(), &certificate, &[target])?);
        let gateway = pod("gateway", &command, 15_008).replace("namespace: shop", "namespace: outside");
        bed.apply("gateway", &gateway)?;
        let address = bed.pod("outside/gateway")?.v4;
        bed.apply("far", &far(address))
    })?;
    let gateway = bed.pod("outside/gateway")?.v4;
    let words = "from one network to another";
    let (wire_a, wire_b) = (bed.capture("a")?, bed.capture("b")?);
    let client = bed.pod("shop/frontend")?;
    for _ in 0..3 {
        let outcome = client.call("10.96.2.2:80", &["--send", words, "--half-close"])?;
        ensure!(outcome.ok && outcome.received == words, "{} got {:?}", outcome.problem(), outcome.received);
    }
    for segments in [wire_a.stop()?, wire_b.stop()?] {
        ensure!(!capture::carries(&segments, words.as_bytes()), "the words are on the wire");
    }
    let connects = asked(&bed.pod("outside/gateway")?.log());
    ensure!(connects.len() == 3, "the gateway was asked {connects:?}");
    for connect in &connects {
        ensure!(connect.headers[":authority"] == "far.shop.svc.cluster.local:80", "{connect:?}");
        ensure!(connect.identity == ["spiffe://cluster.local/ns/shop/sa/frontend"], "{connect:?}");
        ensure!(connect.from.ip() == client.v4, "{connect:?}");
        ensure!(!connect.headers.contains_key("x-forwarded-network"), "{connect:?}");
    }
    // The application sees the gateway; policy sees who is inside the inner tunnel.
    let seen = bed.pod("shop/backend")?.log().matches(&format!("\"peer\":\"{gateway}:")).count();
    ensure!(seen == 3, "the application saw {seen} connections of the gateway");
    talks(&bed, "shop/other", "10.96.2.2:80")?;
    bed.apply("policy", ONLY_FRONTEND)?;
    wait::until("policy in force", SOON, || refused(&bed, "shop/other", "10.96.2.2:80").map(Some))?;
    talks(&bed, "shop/frontend", "10.96.2.2:80")
}
