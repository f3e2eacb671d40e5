//! Mesh settings: what the ConfigMap sets reaches the kernel programs of every node, and changes while they run.

use super::shop::{self, SHOP, open, open_with, talks};
use super::{Scenario, scenario};
use crate::bed::mesh::MeshOptions;
use crate::bed::{Testbed, Topology, net, wait};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("an excluded address block is left to the kernel, by mesh setting or by flag", 90, excluded),
    scenario("with failOpen in the mesh settings, traffic goes on without agents", 120, fail_open),
    scenario("with captureOutside off, only what the mesh knows is captured", 90, outside),
    scenario("a pod that opts out of DNS capture asks its own nameserver", 90, dns),
];

const SOON: Duration = Duration::from_secs(15);

/// The ConfigMap with these lines of the mesh's own section.
fn settings(lines: &str) -> String {
    format!(
        "
apiVersion: v1
kind: ConfigMap
metadata: {{name: istio, namespace: istio-system}}
data:
  undermesh: |
    {lines}
"
    )
}

/// Whether a connection from frontend leads straight to `to`: a captured one leads into its own pod.
fn is_left_alone(bed: &Testbed, to: SocketAddr) -> Result<bool> {
    let frontend = bed.pod("shop/frontend")?;
    let to_text = to.to_string();
    let argv = ["mesh-tests", "tool", "call", "--to", &to_text, "--hold-ms", "10000"];
    let mut held = frontend.spawn(argv)?;
    let left = wait::until("open connection", Duration::from_secs(10), || {
        let captured = || -> Result<bool> {
            Ok(net::established(&frontend.netns)?.iter().any(|(own, remote)| own.ip() == remote.ip()))
        };
        if captured()? {
            return Ok(Some(false));
        }
        // The agent dials the same address for a captured connection, after it has accepted that one: look again.
        let dialled = net::established(&frontend.netns)?.iter().any(|(_, remote)| *remote == to);
        Ok(if dialled { Some(!captured()?) } else { None })
    });
    held.kill();
    wait::until_true("end of the connection", Duration::from_secs(10), || {
        let open = net::established(&frontend.netns)?;
        Ok(open.iter().all(|(own, remote)| *remote != to && own.ip() != remote.ip()))
    })?;
    left
}

fn becomes(bed: &Testbed, to: SocketAddr, left: bool) -> Result<()> {
    let what = if left { "connection that is left alone" } else { "captured connection" };
    wait::until_true(what, SOON, || Ok(is_left_alone(bed, to)? == left)).with_context(|| to.to_string())
}

fn status(bed: &Testbed, node: &str) -> Result<Value> {
    serde_json::from_str(&bed.admin(node, "/status")?).context("/status is no JSON")
}

fn excluded() -> Result<()> {
    let mut bed = open()?;
    let backend = bed.pod("shop/backend")?;
    let (v4, v6) = (backend.at(8080), backend.at6(8080));
    ensure!(!is_left_alone(&bed, v4)? && !is_left_alone(&bed, v6)?, "nothing is excluded yet");
    bed.apply("settings", &settings(&format!("excludedCIDRs: [{}/32, {}/128]", v4.ip(), v6.ip())))?;
    becomes(&bed, v4, true)?;
    becomes(&bed, v6, true)?;
    talks(&bed, "shop/frontend", &v4.to_string())?;
    let shown = status(&bed, "a")?;
    ensure!(shown["capture"]["excludedCidrs"][0] == format!("{}/32", v4.ip()), "{}", shown["capture"]);
    bed.apply("settings", &settings("excludedPorts: [8081]"))?;
    becomes(&bed, v4, false)?;
    becomes(&bed, bed.pod("shop/backend")?.at(8081), true)?;
    bed.apply("settings", &settings("failOpen: false"))?;
    becomes(&bed, bed.pod("shop/backend")?.at(8081), false)?;
    drop(bed);
    // What the operator gives for the node wins over the mesh.
    let options = MeshOptions::agent(&["--exclude-port", "8081"]);
    let mut bed = open_with(&Topology::nodes(&["a", "b"]), &options)?;
    bed.apply("settings", &settings("excludedPorts: [8080]"))?;
    let backend = bed.pod("shop/backend")?;
    becomes(&bed, backend.at(8081), true)?;
    becomes(&bed, backend.at(8080), false)
}

fn fail_open() -> Result<()> {
    let mut bed = open()?;
    let to = bed.pod("shop/backend")?.at(8080).to_string();
    bed.apply("settings", &settings("failOpen: true"))?;
    for node in ["a", "b"] {
        wait::until_true("fail mode open", SOON, || Ok(status(&bed, node)?["fail"] == "open"))?;
    }
    bed.kill_agent("a")?;
    bed.kill_agent("b")?;
    wait::until("traffic without agents", SOON, || talks(&bed, "shop/frontend", &to).map(Some))?;
    // An agent that starts while the control plane is away finds the setting in the kernel and keeps to it.
    if let Some(control) = &mut bed.control {
        control.kill();
    }
    bed.start_agent("a", &MeshOptions::default())?;
    wait::until_true("new agent", SOON, || Ok(bed.admin("a", "/status").is_ok()))?;
    // It knows nothing of the mesh and cannot serve: what went on without an agent goes on, in the clear.
    let until = Instant::now() + Duration::from_secs(5);
    while Instant::now() < until {
        talks(&bed, "shop/frontend", &to).context("an agent runs that knows nothing of the mesh yet")?;
    }
    let address = bed.pod("shop/backend")?.at(8080);
    ensure!(is_left_alone(&bed, address)?, "an agent that knows nothing of the mesh captured a connection");
    bed.kill_agent("a")?;
    wait::until("traffic without agents", SOON, || talks(&bed, "shop/frontend", &to).map(Some))?;
    bed.start_control(&MeshOptions::default())?;
    for node in ["a", "b"] {
        bed.start_agent(node, &MeshOptions::default())?;
        bed.wait_agent_ready(node)?;
    }
    becomes(&bed, address, false)?;
    bed.apply("settings", &settings("failOpen: false"))?;
    wait::until_true("fail mode closed", SOON, || Ok(status(&bed, "a")?["fail"] == "closed"))?;
    bed.kill_agent("a")?;
    wait::until("refusal without an agent", SOON, || {
        Ok(talks(&bed, "shop/frontend", &to).is_err().then_some(()))
    })
}

fn outside() -> Result<()> {
    let mut bed = open()?;
    // The control plane announces every pod that it reads: an address that it does not know is the node's.
    let known = bed.pod("shop/backend")?.at(8080);
    let unknown = SocketAddr::new(net::underlay_v4(net::CONTROL).into(), 15_012);
    ensure!(!is_left_alone(&bed, unknown)?, "destinations outside the mesh are captured by default");
    bed.apply("settings", &settings("captureOutside: false"))?;
    becomes(&bed, unknown, true)?;
    becomes(&bed, known, false)?;
    talks(&bed, "shop/frontend", &known.to_string())?;
    let shown = status(&bed, "a")?;
    ensure!(shown["capture"]["captureOutside"] == false, "{}", shown["capture"]);
    bed.apply("settings", &settings("captureOutside: true"))?;
    becomes(&bed, unknown, false)
}

/// How many queries the kernel programs of frontend's node took.
fn dns_seen(bed: &Testbed) -> Result<u64> {
    let counters: Value =
        serde_json::from_str(&bed.admin("a", "/capture")?).context("/capture is no JSON")?;
    let all = counters.as_array().context("/capture is no list")?;
    let taken = all.iter().find(|c| c["reason"] == "dns_datagram").context("no such counter")?;
    taken["count"].as_u64().context("the counter is no number")
}

fn dns() -> Result<()> {
    let mut bed = open()?;
    // Nobody listens there; what counts is whether the query was taken.
    let asked = bed.pod("shop/backend")?.at(0).ip().to_string();
    let ask = |bed: &Testbed| -> Result<bool> {
        let before = dns_seen(bed)?;
        let script = format!("echo x > /dev/udp/{asked}/53");
        bed.pod("shop/frontend")?.spawn(["bash", "-c", &script])?.wait(Duration::from_secs(5))?;
        Ok(dns_seen(bed)? > before)
    };
    ensure!(ask(&bed)?, "a query is taken by default");
    let off = SHOP.replace(
        "{name: frontend, namespace: shop, labels: {app: frontend}}",
        "{name: frontend, namespace: shop, labels: {app: frontend}, \
         annotations: {ambient.istio.io/dns-capture: 'false'}}",
    );
    ensure!(off != SHOP, "the shop has another frontend");
    bed.apply("objects", &off)?;
    wait::until_true("query that is left alone", SOON, || Ok(!ask(&bed)?))?;
    bed.apply("objects", SHOP)?;
    wait::until_true("query that is taken", SOON, || ask(&bed))?;
    bed.apply("settings", &settings("dnsCapture: false"))?;
    wait::until_true("query that is left alone", SOON, || Ok(!ask(&bed)?))?;
    shop::talks(&bed, "shop/frontend", &bed.pod("shop/backend")?.at(8080).to_string())
}
