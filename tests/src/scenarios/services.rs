//! Which endpoint of a service takes a connection, on real traffic: readiness, zones, named ports, refusals, entries.

use super::shop::{enrolled, refused, talks};
use super::{Scenario, scenario};
use crate::bed::mesh::MeshOptions;
use crate::bed::process::Proc;
use crate::bed::{Testbed, Topology, capture, net, wait};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("an unready endpoint gets no connection, unless its service publishes it", 60, unready),
    scenario(
        "traffic stays in the client's zone while an endpoint is there, and leaves when none is",
        90,
        zone,
    ),
    scenario("a service of its node only never leads to another node", 60, node_only),
    scenario("a named port leads to each endpoint's own number, through tunnels", 60, named_ports),
    scenario("an endpoint that refuses is passed over without a byte lost", 60, refusing),
    scenario("a ServiceEntry leads to a server outside the mesh, by address and by name", 90, entry),
    scenario("a ServiceEntry whose server has only a name is resolved on the client's node", 60, by_name),
    scenario("a WorkloadEntry is an endpoint of the service that selects it", 60, workload_entry),
];

const SOON: Duration = Duration::from_secs(15);

/// Clients `shop/client` (in the mesh) and `outside/client` (not) on node a.
pub(super) const CLIENTS: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Namespace
metadata: {name: outside}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop}
spec: {nodeName: a, containers: [{name: main, image: none}]}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: outside}
spec: {nodeName: a, containers: [{name: main, image: none}]}
";

/// A pod with label `app: web` that echoes on 8080 and greets on `greet`.
pub(super) fn server(key: &str, node: &str, greet: u16) -> String {
    let (namespace, name) = key.split_once('/').unwrap_or(("shop", key));
    format!(
        "---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}, labels: {{app: web}}}}
spec:
  nodeName: {node}
  serviceAccountName: {name}
  containers:
  - name: main
    image: none
    command: [mesh-tests, tool, serve, --log, --echo, '8080', --greet, '{greet}']
    ports: [{{name: echo, containerPort: 8080}}, {{name: greet, containerPort: {greet}}}]
"
    )
}

/// A pod with the same label where nobody listens.
fn deaf(key: &str, node: &str) -> String {
    let (namespace, name) = key.split_once('/').unwrap_or(("shop", key));
    format!(
        "---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}, labels: {{app: web}}}}
spec: {{nodeName: {node}, containers: [{{name: main, image: none}}]}}
"
    )
}

/// Service `web` of the pods with that label: 80 leads to the echo, 81 to the greeting.
pub(super) fn service(name: &str, namespace: &str, ip: &str, more: &str) -> String {
    format!(
        "---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  clusterIP: {ip}
  clusterIPs: [{ip}]
  selector: {{app: web}}
  ports: [{{name: tcp-echo, port: 80, targetPort: 8080}}, {{name: tcp-greet, port: 81, targetPort: 8081}}]
{more}"
    )
}

pub(super) const WEB: &str = "10.96.1.1";

pub(super) fn open(topology: &Topology, yaml: &str, keys: &[&str]) -> Result<Testbed> {
    let mut bed = Testbed::build(topology, &format!("{CLIENTS}{yaml}"))?;
    bed.start_mesh(&MeshOptions::default())?;
    enrolled(&bed, keys)?;
    Ok(bed)
}

/// Who greets in `times` connections of the client.
pub(super) fn greeters(bed: &Testbed, to: &str, times: usize) -> Result<BTreeSet<SocketAddr>> {
    let client = bed.pod("shop/client")?;
    (0..times).map(|_| Ok(client.greeted(to)?.1.local)).collect()
}

/// Waits until these pods, and no others, greet on their port 8081.
pub(super) fn served_by(bed: &Testbed, to: &str, pods: &[&str]) -> Result<()> {
    let expected: BTreeSet<SocketAddr> =
        pods.iter().map(|pod| Ok(bed.pod(pod)?.at(8081))).collect::<Result<_>>()?;
    let mut last = BTreeSet::new();
    wait::until_true(&format!("connections to {to} at {pods:?} only"), SOON, || {
        // Of two equally good endpoints, sixteen picks miss one in one of 32,768 rounds.
        last = greeters(bed, to, 16)?;
        Ok(last == expected)
    })
    .with_context(|| format!("{last:?} greeted last"))
}

fn set_ready(bed: &mut Testbed, pod: &str, ready: bool) -> Result<()> {
    let word = if ready { "true" } else { "false" };
    bed.edit("Pod", pod, |doc| doc["metadata"]["annotations"]["undermesh.test/ready"] = json!(word))
}

fn unready() -> Result<()> {
    let published = "  publishNotReadyAddresses: true\n";
    let yaml = [
        server("shop/one", "b", 8081),
        server("shop/two", "b", 8081),
        service("web", "shop", WEB, ""),
        service("published", "shop", "10.96.1.2", published),
    ];
    let keys = ["shop/client", "shop/one", "shop/two"];
    let mut bed = open(&Topology::nodes(&["a", "b"]), &yaml.concat(), &keys)?;
    served_by(&bed, "10.96.1.1:81", &["shop/one", "shop/two"])?;
    set_ready(&mut bed, "two", false)?;
    served_by(&bed, "10.96.1.1:81", &["shop/one"])?;
    served_by(&bed, "10.96.1.2:81", &["shop/one", "shop/two"])?;
    // By its own address it stays reachable.
    talks(&bed, "shop/client", &bed.pod("shop/two")?.at(8080).to_string())?;
    set_ready(&mut bed, "one", false)?;
    wait::until("refusal without a ready endpoint", SOON, || {
        refused(&bed, "shop/client", "10.96.1.1:80").map(Some)
    })?;
    set_ready(&mut bed, "two", true)?;
    served_by(&bed, "10.96.1.1:81", &["shop/two"])
}

/// Nodes a and b in one zone, c in another.
fn zones() -> Topology {
    let label = |node: &str, zone: &str| {
        let region = (node.to_owned(), "topology.kubernetes.io/region".to_owned(), "north".to_owned());
        [region, (node.to_owned(), "topology.kubernetes.io/zone".to_owned(), zone.to_owned())]
    };
    let labels = [label("a", "one"), label("b", "one"), label("c", "two")].concat();
    Topology { labels, ..Topology::nodes(&["a", "b", "c"]) }
}

fn zone() -> Result<()> {
    let prefer = |how: &str| format!("  trafficDistribution: {how}\n");
    let yaml = [
        server("shop/own", "a", 8081),
        server("shop/near", "b", 8081),
        server("shop/far", "c", 8081),
        service("web", "shop", WEB, ""),
        service("zone", "shop", "10.96.1.2", &prefer("PreferSameZone")),
        service("close", "shop", "10.96.1.3", &prefer("PreferClose")),
        service("node", "shop", "10.96.1.4", &prefer("PreferSameNode")),
    ];
    let keys = ["shop/client", "shop/own", "shop/near", "shop/far"];
    let mut bed = open(&zones(), &yaml.concat(), &keys)?;
    served_by(&bed, "10.96.1.1:81", &["shop/own", "shop/near", "shop/far"])?;
    served_by(&bed, "10.96.1.2:81", &["shop/own", "shop/near"])?;
    served_by(&bed, "10.96.1.3:81", &["shop/own", "shop/near"])?;
    served_by(&bed, "10.96.1.4:81", &["shop/own"])?;
    set_ready(&mut bed, "own", false)?;
    served_by(&bed, "10.96.1.4:81", &["shop/near"])?;
    served_by(&bed, "10.96.1.2:81", &["shop/near"])?;
    set_ready(&mut bed, "near", false)?;
    for to in ["10.96.1.2:81", "10.96.1.3:81", "10.96.1.4:81"] {
        served_by(&bed, to, &["shop/far"])?;
    }
    set_ready(&mut bed, "near", true)?;
    served_by(&bed, "10.96.1.2:81", &["shop/near"])
}

fn node_only() -> Result<()> {
    let local = "  internalTrafficPolicy: Local\n";
    let yaml = [
        server("shop/own", "a", 8081),
        server("shop/near", "b", 8081),
        service("web", "shop", WEB, ""),
        service("local", "shop", "10.96.1.2", local),
    ];
    let keys = ["shop/client", "shop/own", "shop/near"];
    let mut bed = open(&Topology::nodes(&["a", "b"]), &yaml.concat(), &keys)?;
    served_by(&bed, "10.96.1.1:81", &["shop/own", "shop/near"])?;
    served_by(&bed, "10.96.1.2:81", &["shop/own"])?;
    set_ready(&mut bed, "own", false)?;
    served_by(&bed, "10.96.1.1:81", &["shop/near"])?;
    for _ in 0..5 {
        refused(&bed, "shop/client", "10.96.1.2:80")?;
    }
    Ok(())
}

fn named_ports() -> Result<()> {
    let named = service("web", "shop", WEB, "").replace("targetPort: 8081", "targetPort: greet");
    let yaml = [server("shop/one", "b", 8081), server("shop/two", "b", 9081), named];
    let keys = ["shop/client", "shop/one", "shop/two"];
    let bed = open(&Topology::nodes(&["a", "b"]), &yaml.concat(), &keys)?;
    let expected = BTreeSet::from([bed.pod("shop/one")?.at(8081), bed.pod("shop/two")?.at(9081)]);
    let capture = bed.capture("a")?;
    wait::until_true("both endpoints, each at its own number", SOON, || {
        Ok(greeters(&bed, "10.96.1.1:81", 16)? == expected)
    })?;
    let segments = capture.stop()?;
    ensure!(segments.iter().any(|s| s.to.port() == 15_008), "no tunnel on the wire");
    let bare = segments.iter().find(|s| [8081, 9081].contains(&s.to.port()));
    ensure!(bare.is_none(), "a connection went past the tunnel: {bare:?}");
    Ok(())
}

/// Connections to `to` at each of two endpoints, of which only `alive` takes any; `times` in all.
fn all_land_on(bed: &Testbed, to: &str, alive: &str, times: usize) -> Result<()> {
    let own = format!("\"peer\":\"{}:", bed.pod("shop/client")?.v4);
    let seen = || -> Result<usize> { Ok(bed.pod(alive)?.log().matches(&own).count()) };
    let before = seen()?;
    for n in 0..times {
        talks(bed, "shop/client", to).with_context(|| format!("connection {n}"))?;
    }
    ensure!(seen()? == before + times, "{alive} saw {} connections of {times}", seen()? - before);
    Ok(())
}

fn refusing() -> Result<()> {
    let plain = service("web", "outside", "10.96.1.2", "");
    let yaml = [
        server("shop/alive", "b", 8081),
        deaf("shop/deaf", "b"),
        service("web", "shop", WEB, ""),
        server("outside/alive", "b", 8081),
        deaf("outside/deaf", "b"),
        plain,
    ];
    let keys = ["shop/client", "shop/alive", "shop/deaf"];
    let mut bed = open(&Topology::nodes(&["a", "b"]), &yaml.concat(), &keys)?;
    // Refused by the far agent, and by the far kernel.
    all_land_on(&bed, "10.96.1.1:80", "shop/alive", 30)?;
    let refusals = bed.node("b")?.agent(0)?.log().matches("code=\"M0301\"").count();
    ensure!(refusals > 0, "the deaf endpoint was never tried");
    let capture = bed.capture("a")?;
    all_land_on(&bed, "10.96.1.2:80", "outside/alive", 30)?;
    let deaf = bed.pod("outside/deaf")?.at(8080);
    ensure!(capture.stop()?.iter().any(|s| s.syn && s.to == deaf), "the deaf endpoint was never tried");
    // With nobody left, the client hears it at once.
    set_ready(&mut bed, "alive", false)?;
    wait::until("refusal by the last endpoint", SOON, || {
        refused(&bed, "shop/client", "10.96.1.1:80").map(Some)
    })?;
    refused(&bed, "shop/client", "10.96.1.2:80")
}

fn entry() -> Result<()> {
    let site = server("outside/site", "b", 8081);
    let mut bed = open(&Topology::nodes(&["a", "b"]), &site, &["shop/client"])?;
    let site = bed.pod("outside/site")?.at(8081);
    let text = format!(
        "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: site, namespace: shop}}
spec:
  hosts: [site.example]
  addresses: [240.240.7.7]
  ports: [{{number: 81, name: tcp-greet, protocol: TCP, targetPort: 8081}}]
  resolution: STATIC
  location: MESH_EXTERNAL
  endpoints: [{{address: {}}}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: given, namespace: shop}}
spec:
  hosts: [given.example]
  ports: [{{number: 82, name: tcp-greet, protocol: TCP, targetPort: 8081}}]
  resolution: STATIC
  location: MESH_EXTERNAL
  endpoints: [{{address: {}}}]
",
        site.ip(),
        site.ip()
    );
    bed.apply("entries", &text)?;
    let client = bed.pod("shop/client")?;
    let capture = bed.capture("a")?;
    for (to, port) in [("240.240.7.7:81", 81), ("site.example:81", 81), ("given.example:82", 82)] {
        wait::until_true(&format!("answer from {to}"), SOON, || {
            Ok(client.call(to, &["--lines", "1", "--timeout-ms", "500"])?.ok)
        })?;
        let (outcome, greeting) = client.greeted(to)?;
        ensure!(greeting.local == site, "{to} led to {}", greeting.local);
        ensure!(greeting.peer.ip() == client.at(0).ip(), "the server saw {}", greeting.peer);
        let dialled = outcome.peer.context("no peer address")?;
        ensure!(dialled.port() == port && dialled != site, "the client sees {dialled} as its peer");
    }
    let segments = capture.stop()?;
    ensure!(capture::carries(&segments, b"\"peer\""), "the greeting is not on the wire in the clear");
    ensure!(segments.iter().all(|s| s.to.port() != 15_008), "a tunnel to outside the mesh");
    bed.remove("entries")?;
    let client = bed.pod("shop/client")?;
    wait::until("end of the entry", SOON, || {
        Ok(client
            .call("240.240.7.7:81", &["--lines", "1", "--timeout-ms", "500"])
            .is_ok_and(|o| !o.ok)
            .then_some(()))
    })
}

fn by_name() -> Result<()> {
    let yaml = format!("{CLIENTS}{}", server("outside/site", "b", 8081));
    let mut bed = Testbed::build(&Topology::nodes(&["a", "b"]), &yaml)?;
    let site = bed.pod("outside/site")?.at(8081);
    let record = format!("database.example={}", site.ip());
    let argv = ["mesh-tests", "tool", "dns", "--record", &record];
    let log = bed.dir.join("dns.log");
    bed.others.push(Proc::spawn(&bed.control_place, argv, &log)?);
    wait::until_true("DNS server", SOON, || net::listening(&bed.control_netns, 53))?;
    let resolv = bed.dir.join("node.resolv.conf");
    std::fs::write(&resolv, format!("nameserver {}\n", net::underlay_v4(net::CONTROL)))
        .context("cannot write resolv.conf")?;
    bed.node_mut("a")?.agent_place.resolv = Some(resolv);
    bed.start_mesh(&MeshOptions::default())?;
    enrolled(&bed, &["shop/client"])?;
    let entry = |name: &str, port: u16, server: &str| {
        format!(
            "---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: {name}, namespace: shop}}
spec:
  hosts: [{name}.example]
  ports: [{{number: {port}, name: tcp-greet, protocol: TCP, targetPort: 8081}}]
  resolution: DNS
  location: MESH_EXTERNAL
  endpoints: [{{address: {server}}}]
"
        )
    };
    let entries = [entry("db", 83, "database.example"), entry("lost", 84, "nowhere.example")];
    bed.apply("entries", &entries.concat())?;
    let client = bed.pod("shop/client")?;
    wait::until_true("answer from db.example", SOON, || {
        Ok(client.call("db.example:83", &["--lines", "1", "--timeout-ms", "500"])?.ok)
    })?;
    let (_, greeting) = client.greeted("db.example:83")?;
    ensure!(greeting.local == site, "it led to {}", greeting.local);
    ensure!(greeting.peer.ip() == client.at(0).ip(), "the server saw {}", greeting.peer);
    let asked = std::fs::read_to_string(&log).unwrap_or_default();
    ensure!(asked.contains("database.example"), "the node did not ask for the name: {asked}");
    refused(&bed, "shop/client", "lost.example:84")
}

fn workload_entry() -> Result<()> {
    let yaml = [
        server("shop/pod", "b", 8081),
        server("outside/machine", "b", 8081),
        service("web", "shop", WEB, ""),
    ];
    let mut bed = open(&Topology::nodes(&["a", "b"]), &yaml.concat(), &["shop/client", "shop/pod"])?;
    served_by(&bed, "10.96.1.1:81", &["shop/pod"])?;
    let machine = bed.pod("outside/machine")?.v4;
    let text = format!(
        "
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{name: machine, namespace: shop}}
spec: {{address: {machine}, labels: {{app: web}}, serviceAccount: machine}}
"
    );
    // The address belongs to a pod as well: what is asked is where the service leads.
    bed.apply("machine", &text)?;
    served_by(&bed, "10.96.1.1:81", &["shop/pod", "outside/machine"])?;
    // The pod through a tunnel, the machine, which has none, in the clear.
    let open = net::established(&bed.pod("shop/pod")?.netns)?;
    ensure!(open.iter().any(|(local, _)| local.port() == 15_008), "no tunnel to the pod");
    bed.remove("machine")?;
    served_by(&bed, "10.96.1.1:81", &["shop/pod"])
}
