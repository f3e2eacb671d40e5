//! What becomes of open connections when a pod leaves the mesh and lives on.

use super::fast::{is_direct, warm};
use super::programs::{counted, moved, need};
use super::shop::{enrolled, open, talks};
use super::{Scenario, scenario};
use crate::bed::process::Proc;
use crate::bed::{Load, Testbed, net, run, wait};
use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario(
        "a pod that leaves the mesh keeps its connections, and only its new ones are direct",
        180,
        keeps_connections,
    ),
    scenario("a pod that has left the mesh and is deleted takes its connections with it", 90, deleted),
];

const SOON: Duration = Duration::from_secs(30);
const MODE: &str = "istio.io/dataplane-mode";
/// Who has connections to the pod that leaves: through the tunnel, on the fast path, from outside the mesh.
const CLIENTS: [&str; 3] = ["shop/frontend", "shop/local", "outside/visitor"];
/// Where the pod that leaves has connections to.
const SERVERS: [&str; 2] = ["shop/frontend", "outside/visitor"];
/// How long connections are watched after the pod has left.
const AFTER: Duration = Duration::from_secs(16);

/// What the agent of the pod's node says of it.
fn state(bed: &Testbed, name: &str) -> Result<Option<String>> {
    let pods: serde_json::Value = serde_json::from_str(&bed.admin("b", "/pods")?).context("no JSON")?;
    let pod = pods.as_array().into_iter().flatten().find(|pod| pod["name"] == name);
    Ok(pod.and_then(|pod| Some(pod["state"].as_str()?.to_owned())))
}

fn has_left(bed: &Testbed, name: &str) -> Result<()> {
    wait::until_true("leaving", SOON, || Ok(state(bed, name)?.as_deref() == Some("left")))
}

/// Programs that talk to the backend, and that the backend talks to, all the time.
struct Long {
    sessions: Vec<Proc>,
    streams: Vec<Proc>,
    idle: Vec<Load>,
    _servers: Vec<Proc>,
}

impl Long {
    fn start(bed: &Testbed) -> Result<Self> {
        let backend = bed.pod("shop/backend")?;
        let redis =
            ["redis-server", "--port", "6379", "--bind", "0.0.0.0", "--save", "", "--protected-mode", "no"];
        let mut servers = vec![backend.spawn(redis)?];
        wait::until_true("redis", SOON, || backend.listening(6379))?;
        // The pair is judged by port.
        warm(bed, "shop/local", backend.at(6379))?;
        let host = backend.v4.to_string();
        let (mut sessions, mut streams, mut idle) = (Vec::new(), Vec::new(), Vec::new());
        for from in CLIENTS {
            let client = bed.pod(from)?;
            sessions.push(client.spawn([
                "redis-cli",
                "-h",
                &host,
                "-r",
                "-1",
                "-i",
                "0.01",
                "INCR",
                from,
            ])?);
            let mut held =
                Load::start(client, &backend.at(8080).to_string(), &["--shape", "hold", "--conns", "50"])?;
            held.wait_holding(50, SOON)?;
            idle.push(held);
        }
        ensure!(is_direct(bed, "shop/local", backend.at(6379))?, "the local client is not on the fast path");
        for to in SERVERS {
            let server = bed.pod(to)?;
            servers.push(server.spawn(["iperf3", "-s", "-p", "5201"])?);
            wait::until_true("iperf3", SOON, || server.listening(5201))?;
            let host = server.v4.to_string();
            streams
                .push(backend.spawn(["iperf3", "-J", "-c", &host, "-p", "5201", "-t", "45", "-b", "40M"])?);
        }
        Ok(Self { sessions, streams, idle, _servers: servers })
    }

    /// Nothing was lost so far; says how many answers there were.
    fn goes_on(&mut self) -> Result<Vec<usize>> {
        for stream in &mut self.streams {
            ensure!(stream.running()?, "iperf3 ended: {}", stream.log());
        }
        let of = |(session, from): (&mut Proc, &str)| counted(session).with_context(|| from.to_owned());
        self.sessions.iter_mut().zip(CLIENTS).map(of).collect()
    }

    /// Ends everything; nothing was lost.
    fn end(mut self) -> Result<()> {
        for (stream, to) in self.streams.iter_mut().zip(SERVERS) {
            stream.wait(SOON * 2)?;
            moved(stream).with_context(|| format!("to {to}"))?;
        }
        for (held, from) in self.idle.into_iter().zip(CLIENTS) {
            let figures = held.stop()?;
            ensure!(
                figures.errors == 0 && figures.alive == 50,
                "{from}: {} of 50 idle connections are alive: {}",
                figures.alive,
                figures.first_error
            );
        }
        for session in &mut self.sessions {
            counted(session)?;
            session.signal(Signal::TERM)?;
            session.wait(SOON)?;
        }
        Ok(())
    }
}

fn keeps_connections() -> Result<()> {
    for program in ["iperf3", "redis-server", "redis-cli"] {
        need(program)?;
    }
    let mut bed = open()?;
    let mut long = Long::start(&bed)?;
    let to = bed.pod("shop/backend")?.at(8080);
    bed.label("Pod", "backend", MODE, Some("none"))?;
    bed.wait_protocol("shop/backend", "TCP")?;
    has_left(&bed, "backend")?;
    let at_first = long.goes_on().context("the pod has just left")?;
    // What is new goes in the clear, both ways.
    let capture = bed.capture("a")?;
    talks(&bed, "shop/frontend", &to.to_string())?;
    talks(&bed, "outside/visitor", &to.to_string())?;
    let site = bed.pod("outside/site")?.at(8080);
    let argv = ["mesh-tests", "tool", "call", "--to", &site.to_string(), "--send", "x", "--hold-ms", "10000"];
    let held = bed.pod("shop/backend")?.spawn(argv)?;
    wait::until_true("direct connection of the pod", SOON, || is_direct(&bed, "shop/backend", site))?;
    drop(held);
    let segments = capture.stop()?;
    ensure!(segments.iter().any(|s| s.syn && s.to == to), "a new connection to the pod is not direct");
    let listeners = net::listening_ports(&bed.pod("shop/backend")?.netns)?;
    run::pause(AFTER)?;
    let after = long.goes_on().context("the pod has left for a while")?;
    for ((from, before), after) in CLIENTS.iter().zip(&at_first).zip(&after) {
        ensure!(after - before > 200, "{from}: {} answers in {AFTER:?}", after - before);
    }
    let left = net::listening_ports(&bed.pod("shop/backend")?.netns)?;
    ensure!(left.len() < listeners.len(), "the mesh still listens in the pod: {left:?} of {listeners:?}");
    // It comes back while they go on: new ones are in the mesh, and old ones still notice nothing.
    bed.label("Pod", "backend", MODE, None)?;
    enrolled(&bed, &["shop/backend"])?;
    let capture = bed.capture("a")?;
    talks(&bed, "shop/frontend", &to.to_string())?;
    let segments = capture.stop()?;
    ensure!(!segments.iter().any(|s| s.syn && s.to == to), "a new connection of the pod goes in the clear");
    long.goes_on().context("the pod is back")?;
    long.end()
}

fn deleted() -> Result<()> {
    let mut bed = open()?;
    let late = "
apiVersion: v1
kind: Pod
metadata: {name: late, namespace: shop, labels: {app: late}}
spec:
  nodeName: b
  containers: [{name: main, image: none, command: [mesh-tests, tool, serve, --echo, '8080'], ports: [{containerPort: 8080}]}]
";
    bed.apply("late", late)?;
    enrolled(&bed, &["shop/late"])?;
    let to = bed.pod("shop/late")?.at(8080).to_string();
    let pp = ["--shape", "pp", "--conns", "2", "--pause-ms", "5"];
    let mut load = Load::start(bed.pod("shop/frontend")?, &to, &pp)?;
    wait::until_true("tunnelled connections", SOON, || {
        Ok(net::established(&bed.pod("shop/late")?.netns)?.iter().any(|(local, _)| local.port() == 15_008))
    })?;
    bed.label("Pod", "late", MODE, Some("none"))?;
    has_left(&bed, "late")?;
    ensure!(load.running()?, "the load ended when the pod left");
    bed.remove("late")?;
    wait::until_true("end of the connections", SOON, || Ok(!load.running()?))?;
    wait::until_true("the agent forgets the pod", SOON, || Ok(state(&bed, "late")?.is_none()))
}
