//! Endpoints that go away, with and without a word: what a client notices of it.

use super::services::{WEB, greeters, open, served_by, server, service};
use super::shop::{enrolled, talks};
use super::{Scenario, scenario, skip};
use crate::bed::{Load, Pod, Testbed, Topology, net, run, wait};
use crate::tools::load::Figures;
use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario(
        "a node that loses power costs a new connection a second at most, and few of them",
        120,
        power_cut,
    ),
    scenario(
        "a pulled cable ends no connection that outlives it, and the node is used again after",
        120,
        cable,
    ),
    scenario("a tunnel to a node that came back silently is replaced within seconds", 120, silent_tunnel),
    scenario("a rolling restart under 500 requests a second fails none", 180, rolling_restart),
    scenario("an endpoint that crashes fails only what it was serving", 90, crashing),
    scenario("a terminating endpoint sends its peers away and finishes what is open", 90, terminating),
];

const SOON: Duration = Duration::from_secs(15);
const CLIENT: &str = "shop/client";
/// The service outside the mesh.
const PLAIN: &str = "10.96.1.2";

/// Endpoints `one` on node b and `two` on node c, in the mesh and outside of it.
fn two_nodes() -> Result<Testbed> {
    let yaml = [
        server("shop/one", "b", 8081),
        server("shop/two", "c", 8081),
        service("web", "shop", WEB, ""),
        server("outside/one", "b", 8081),
        server("outside/two", "c", 8081),
        service("web", "outside", PLAIN, ""),
    ];
    let bed = open(&Topology::nodes(&["a", "b", "c"]), &yaml.concat(), &[CLIENT, "shop/one", "shop/two"])?;
    // Both workers of the client's agent have tunnels to both.
    for (to, namespace) in [(WEB, "shop"), (PLAIN, "outside")] {
        let both = [format!("{namespace}/one"), format!("{namespace}/two")];
        served_by(&bed, &format!("{to}:81"), &both.each_ref().map(String::as_str))?;
        greeters(&bed, &format!("{to}:81"), 20)?;
    }
    Ok(bed)
}

/// Pulls or plugs the cable of a node.
fn link(bed: &Testbed, node: &str, state: &str) -> Result<()> {
    let port = net::node_place(bed.node(node)?.index);
    bed.underlay.batch(&[format!("link set n{port} {state}")])
}

/// Ends a node so that nobody hears of it.
fn cut_power(bed: &mut Testbed, node: &str) -> Result<()> {
    link(bed, node, "down")?;
    bed.kill_agent(node)?;
    for pod in bed.pods.values_mut().filter(|pod| pod.spec.node == node) {
        pod.programs.iter_mut().for_each(crate::bed::Proc::kill);
    }
    Ok(())
}

/// New connections one after the other.
fn connect(bed: &Testbed, to: &str, pause: &str) -> Result<Load> {
    Load::start(bed.pod(CLIENT)?, to, &["--shape", "crr", "--pause-ms", pause])
}

/// No connection failed, none took longer than a second and some, and few took that long.
fn patient(figures: &Figures, what: &str) -> Result<()> {
    ensure!(figures.errors == 0, "{what}: {} failed: {}", figures.errors, figures.first_error);
    ensure!(figures.max_us < 2.5e6, "{what}: a connection took {:.0} ms", figures.max_us / 1e3);
    // One after the other, of which half would go to the lost node: waiting for each of those, two a second.
    ensure!(figures.rate() > 20.0, "{what}: only {:.0} connections a second", figures.rate());
    Ok(())
}

/// Connections of the client to a pod that are in use, as the pod has seen.
fn in_use(bed: &Testbed, to: &str, conns: usize) -> Result<Load> {
    let pod = bed.pod(to)?;
    let seen = || pod.log().lines().count();
    let (before, count) = (seen(), conns.to_string());
    let options = ["--shape", "pp", "--conns", &count, "--pause-ms", "5"];
    let load = Load::start(bed.pod(CLIENT)?, &pod.at(8080).to_string(), &options)?;
    wait::until_true(&format!("connections at {to}"), SOON, || Ok(seen() >= before + conns))?;
    // They have begun; the load's own count tells whether any went round.
    run::pause(Duration::from_millis(300))?;
    Ok(load)
}

/// Tunnels that a pod's kernel has open to another pod, by the client's socket.
fn tunnels(bed: &Testbed, from: &str, to: &str) -> Result<BTreeSet<SocketAddr>> {
    let hbone = bed.pod(to)?.at(15_008);
    let open = net::established(&bed.pod(from)?.netns)?;
    Ok(open.into_iter().filter(|(_, remote)| *remote == hbone).map(|(own, _)| own).collect())
}

fn power_cut() -> Result<()> {
    let mut bed = two_nodes()?;
    let mut open = in_use(&bed, "shop/one", 2)?;
    cut_power(&mut bed, "b")?;
    let loads = [WEB, PLAIN].map(|to| connect(&bed, &format!("{to}:80"), "5"));
    run::pause(Duration::from_secs(10))?;
    for (what, load) in ["in the mesh", "outside"].into_iter().zip(loads) {
        patient(&load?.stop()?, what)?;
    }
    // What was open is found dead, not kept for ever.
    wait::until_true("end of the open connections", Duration::from_secs(35), || Ok(!open.running()?))?;
    let figures = open.figures()?;
    ensure!(figures.ops > 0 && figures.errors == 2, "connections to the lost node: {figures:?}");
    let left = tunnels(&bed, CLIENT, "shop/one")?;
    ensure!(left.is_empty(), "tunnels to the lost node: {left:?}");
    Ok(())
}

fn cable() -> Result<()> {
    let bed = two_nodes()?;
    let mut open = in_use(&bed, "shop/one", 2)?;
    link(&bed, "b", "down")?;
    let load = connect(&bed, &format!("{WEB}:80"), "5")?;
    run::pause(Duration::from_secs(5))?;
    link(&bed, "b", "up")?;
    patient(&load.stop()?, "while the cable was out")?;
    let before = bed.pod("shop/one")?.log().lines().count();
    wait::until_true("connections to the node that is back", Duration::from_secs(60), || {
        // The very service whose connections went past it. Some that were given up when the cable was out arrive late.
        talks(&bed, CLIENT, &format!("{WEB}:80"))?;
        Ok(bed.pod("shop/one")?.log().lines().count() > before + 10)
    })?;
    ensure!(open.running()?, "connections did not outlive the outage: {:?}", open.figures()?);
    run::pause(Duration::from_secs(5))?;
    let figures = open.stop()?;
    ensure!(figures.errors == 0 && figures.alive == 2, "connections did not outlive the outage: {figures:?}");
    Ok(())
}

/// As after a reboot whose resets were lost: the far end is there and knows nothing of the tunnel.
fn silent_tunnel() -> Result<()> {
    let bed = two_nodes()?;
    let one = bed.pod("shop/one")?.at(8080);
    talks(&bed, CLIENT, &one.to_string())?;
    let dead = tunnels(&bed, CLIENT, "shop/one")?;
    ensure!(!dead.is_empty(), "no tunnel to lose");
    let ports: Vec<String> = dead.iter().map(|own| own.port().to_string()).collect();
    bed.node("b")?.netns.nft(&format!(
        "table ip um {{\n chain lost {{\n type filter hook forward priority filter;\n \
         ip saddr {} tcp sport {{ {} }} drop\n }}\n}}\n",
        bed.pod(CLIENT)?.v4,
        ports.join(", ")
    ))?;
    // No node comes back within milliseconds of its last word. A peer that spoke just now is sent a connection's first bytes
    // along with it, and then keeps the connection, whatever becomes of it (`--early-data`).
    run::pause(Duration::from_millis(200))?;
    // The endpoint is asked for by its own address: there is no other to turn to.
    let load = connect(&bed, &one.to_string(), "20")?;
    run::pause(Duration::from_secs(6))?;
    let figures = load.stop()?;
    ensure!(figures.errors == 0 && figures.ops > 50, "{figures:?}");
    ensure!(figures.max_us < 4e6, "a connection took {:.0} ms", figures.max_us / 1e3);
    ensure!(figures.p50_us < 5e5, "half of the connections took {:.0} ms", figures.p50_us / 1e3);
    let now = tunnels(&bed, CLIENT, "shop/one")?;
    ensure!(now.difference(&dead).next().is_some(), "no other tunnel was made");
    Ok(())
}

/// A pod of the deployment: an HTTP server that SIGTERM ends at once.
fn web(name: &str, node: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: shop, labels: {{app: web}}}}
spec:
  nodeName: {node}
  serviceAccountName: web
  containers:
  - name: main
    image: none
    command: [mesh-tests, tool, web, --name, {name}, --port, '8080']
    ports: [{{containerPort: 8080}}]
"
    )
}

/// What the agent of a node says of a pod: `Healthy`, `Unhealthy`, or nothing once it is gone.
fn status(bed: &Testbed, node: &str, pod: &str) -> Result<Option<String>> {
    let dump: Value = serde_json::from_str(&bed.admin(node, "/config_dump")?).context("no JSON")?;
    let workloads = dump["workloads"].as_array().context("/config_dump has no workloads")?;
    let found = workloads.iter().find(|w| w["name"] == pod);
    Ok(found.and_then(|w| w["status"].as_str()).map(str::to_owned))
}

/// Marks a pod as terminating, as the API server does when it is deleted.
fn mark_terminating(bed: &mut Testbed, pod: &str) -> Result<()> {
    bed.edit("Pod", pod, |doc| doc["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z"))
}

/// Requests at more than 500 a second, each on its own connection.
fn requests(bed: &Testbed) -> Result<Vec<Load>> {
    let to = format!("{WEB}:80");
    (0..12).map(|_| Load::start(bed.pod(CLIENT)?, &to, &["--shape", "http", "--pause-ms", "12"])).collect()
}

fn deployment() -> Result<Testbed> {
    let yaml = service("web", "shop", WEB, "");
    let mut bed = open(&Topology::nodes(&["a", "b", "c"]), &yaml, &[CLIENT])?;
    for (name, node) in [("web-0", "b"), ("web-1", "c")] {
        bed.apply(name, &web(name, node))?;
        enrolled(&bed, &[&format!("shop/{name}")])?;
    }
    Ok(bed)
}

/// Waits until a pod's application has had no connection for some looks in a row: none under way is cut by its end, which
/// no mesh could mend.
fn unused(pod: &Pod) -> Result<()> {
    let mut quiet = 0;
    wait::until_true("an application without connections", SOON, || {
        let busy = net::established(&pod.netns)?.iter().any(|(local, _)| local.port() == 8080);
        quiet = if busy { 0 } else { quiet + 1 };
        Ok(quiet >= 5)
    })
}

fn rolling_restart() -> Result<()> {
    let mut bed = deployment()?;
    let loads = requests(&bed)?;
    let begin = std::time::Instant::now();
    run::pause(Duration::from_secs(1))?;
    for n in 0..6 {
        let (old, new) = (format!("web-{n}"), format!("web-{}", n + 2));
        let node = if n % 2 == 0 { "b" } else { "c" };
        bed.apply(&new, &web(&new, node))?;
        enrolled(&bed, &[&format!("shop/{new}")])?;
        mark_terminating(&mut bed, &old)?;
        wait::until_true(&format!("{old} terminating, as the client's node sees it"), SOON, || {
            Ok(status(&bed, "a", &old)?.as_deref() == Some("Unhealthy"))
        })?;
        let pod = bed.pod(&format!("shop/{old}"))?;
        unused(pod)?;
        pod.programs[0].signal(Signal::TERM)?;
        bed.remove(&old)?;
    }
    run::pause(Duration::from_secs(1))?;
    let seconds = begin.elapsed().as_secs_f64();
    let figures = loads.into_iter().map(Load::stop).collect::<Result<Vec<_>>>()?;
    let made: u64 = figures.iter().map(|f| f.ops).sum();
    for figures in &figures {
        ensure!(figures.errors == 0, "{} of {made} failed: {}", figures.errors, figures.first_error);
    }
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    let rate = made as f64 / seconds;
    ensure!(rate >= 200.0, "only {rate:.0} requests a second were made");
    if rate < 500.0 {
        return Err(skip(format!("no request failed, but this machine made only {rate:.0} a second")));
    }
    Ok(())
}

fn crashing() -> Result<()> {
    let mut bed = deployment()?;
    let loads = requests(&bed)?;
    let flying = loads.len() as u64;
    run::pause(Duration::from_secs(1))?;
    for (name, node) in [("web-0", "b"), ("web-1", "c")] {
        // Nobody was told: for the mesh it stays an endpoint.
        bed.pods.get_mut(&format!("shop/{name}")).context("no pod")?.programs[0].kill();
        run::pause(Duration::from_secs(3))?;
        let new = format!("{name}-again");
        bed.apply(&new, &web(&new, node))?;
        enrolled(&bed, &[&format!("shop/{new}")])?;
        run::pause(Duration::from_secs(1))?;
    }
    let figures = loads.into_iter().map(Load::stop).collect::<Result<Vec<_>>>()?;
    let (made, failed) = figures.iter().fold((0, 0), |(m, e), f| (m + f.ops, e + f.errors));
    let error = figures.iter().map(|f| f.first_error.as_str()).find(|e| !e.is_empty()).unwrap_or_default();
    // Each load has one request under way.
    ensure!(failed <= 2 * flying, "{failed} of {made} failed: {error}");
    ensure!(made > 1000, "only {made} requests were made");
    let slowest = figures.iter().map(|f| f.max_us).fold(0.0, f64::max);
    ensure!(slowest < 2.5e6, "a request took {:.0} ms", slowest / 1e3);
    Ok(())
}

fn terminating() -> Result<()> {
    let other = "---
apiVersion: v1
kind: Pod
metadata: {name: other, namespace: shop}
spec: {nodeName: a, serviceAccountName: other, containers: [{name: main, image: none}]}
";
    let yaml = [server("shop/one", "b", 8081), service("web", "shop", WEB, ""), other.to_owned()];
    let keys = [CLIENT, "shop/other", "shop/one"];
    let mut bed = open(&Topology::nodes(&["a", "b"]), &yaml.concat(), &keys)?;
    let to = bed.pod("shop/one")?.at(8080).to_string();
    let mut open = in_use(&bed, "shop/one", 1)?;
    talks(&bed, "shop/other", &to)?;
    wait::until_true("tunnels of both clients", SOON, || {
        Ok(!tunnels(&bed, CLIENT, "shop/one")?.is_empty()
            && !tunnels(&bed, "shop/other", "shop/one")?.is_empty())
    })?;
    let busy = tunnels(&bed, CLIENT, "shop/one")?;
    mark_terminating(&mut bed, "one")?;
    // Told to go, a client closes what it does not use.
    wait::until_true("end of the unused tunnel", SOON, || {
        Ok(tunnels(&bed, "shop/other", "shop/one")?.is_empty())
    })?;
    ensure!(tunnels(&bed, CLIENT, "shop/one")? == busy, "the tunnel in use was cut");
    // Until it is gone it serves who insists, and finishes what it has.
    talks(&bed, "shop/other", &to)?;
    talks(&bed, CLIENT, &to)?;
    ensure!(tunnels(&bed, CLIENT, "shop/one")?.is_superset(&busy), "the tunnel in use was cut");
    let fresh = tunnels(&bed, CLIENT, "shop/one")?.difference(&busy).count();
    ensure!(fresh == 1, "the new connection made {fresh} tunnels");
    ensure!(open.running()?, "the open connection was cut: {:?}", open.figures()?);
    let figures = open.stop()?;
    ensure!(figures.errors == 0 && figures.alive == 1, "the open connection was cut: {figures:?}");
    wait::until_true("end of the tunnel once it is unused", SOON, || {
        Ok(tunnels(&bed, CLIENT, "shop/one")?.is_disjoint(&busy))
    })
}
