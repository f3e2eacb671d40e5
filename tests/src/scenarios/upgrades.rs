//! What becomes of connections while agents are replaced, restarted, killed and stopped: each under a load of new
//! connections, of idle ones and of streams.

use super::fast::{is_direct, warm};
use super::programs::{counted, moved, need};
use super::shop::{open, open_with, talks};
use super::{Scenario, scenario};
use crate::bed::mesh::MeshOptions;
use crate::bed::relay::Mode;
use crate::bed::{Load, Testbed, Topology, net, run, wait};
use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("ten upgrades of every agent under load lose nothing", 400, ten_upgrades),
    scenario("iperf3, redis and wrk notice nothing of upgrades", 150, programs),
    scenario("agents that take over while certificates are slow to come cut nothing", 120, slow_certificates),
    scenario("agents that are restarted, the old one stopped first, lose nothing", 200, restart),
    scenario(
        "once a killed agent is back new connections work within a second of readiness, and the fast path notices nothing",
        200,
        killed,
    ),
    scenario(
        "an agent that crashes in a loop disturbs no fast-path connection and lets nothing past it",
        200,
        crash_loop,
    ),
    scenario("an agent that is stopped lets tunnelled connections go on until the drain limit", 200, stopped),
    scenario(
        "draining agents that hold more than --drain-memory lose the oldest one's connections only",
        200,
        drain_memory,
    ),
    scenario("a tunnel takes no new connection once its certificates have expired", 120, expired_tunnel),
];

const SOON: Duration = Duration::from_secs(30);
/// Through the tunnel, and on one node.
const CLIENTS: [&str; 2] = ["shop/frontend", "shop/local"];
const IDLE: usize = 1000;

fn echo(bed: &Testbed) -> Result<String> {
    Ok(bed.pod("shop/backend")?.at(8080).to_string())
}

/// Loads of all kinds, with what makes each whole.
#[derive(Default)]
struct Loads(Vec<(String, Load, Whole)>);

#[derive(Clone, Copy)]
enum Whole {
    /// So many connections are alive at the end.
    Alive(u64),
    /// Many connections were made.
    Made,
    /// Bytes moved to the end.
    Moved,
}

impl Loads {
    /// Connections that are there already: idle ones, some in use, streams in both directions.
    fn open(&mut self, bed: &Testbed, from: &str) -> Result<()> {
        self.idle(bed, from, IDLE)?;
        let to = echo(bed)?;
        self.add(bed, from, &to, &["--shape", "pp", "--conns", "4", "--pause-ms", "5"], Whole::Alive(4))?;
        for (shape, port) in [("bulk", 8082), ("bulkr", 8083)] {
            let to = bed.pod("shop/backend")?.at(port).to_string();
            self.add(bed, from, &to, &["--shape", shape, "--conns", "2", "--pause-ms", "20"], Whole::Moved)?;
        }
        Ok(())
    }

    /// New connections all the time.
    fn fresh(&mut self, bed: &Testbed, from: &str) -> Result<()> {
        self.add(bed, from, &echo(bed)?, &["--shape", "crr", "--pause-ms", "3"], Whole::Made)
    }

    fn idle(&mut self, bed: &Testbed, from: &str, conns: usize) -> Result<()> {
        let count = conns.to_string();
        let options = ["--shape", "hold", "--conns", &count];
        self.add(bed, from, &echo(bed)?, &options, Whole::Alive(conns as u64))?;
        let Some((_, load, _)) = self.0.last_mut() else { return Ok(()) };
        load.wait_holding(conns, Duration::from_secs(60))
    }

    fn add(&mut self, bed: &Testbed, from: &str, to: &str, options: &[&str], whole: Whole) -> Result<()> {
        let name = format!("{from} {}", options[1]);
        self.0.push((name, Load::start(bed.pod(from)?, to, options)?, whole));
        Ok(())
    }

    /// Stops them; nothing failed.
    fn unharmed(self) -> Result<()> {
        for (name, load, whole) in self.0 {
            let figures = load.stop().with_context(|| name.clone())?;
            ensure!(figures.errors == 0, "{name}: {} failed: {}", figures.errors, figures.first_error);
            match whole {
                Whole::Alive(count) => {
                    ensure!(figures.alive == count, "{name}: {} of {count} are alive", figures.alive);
                }
                Whole::Made => ensure!(figures.ops > 100, "{name}: only {} connections", figures.ops),
                Whole::Moved => ensure!(figures.bytes > 1 << 20, "{name}: only {} bytes", figures.bytes),
            }
        }
        Ok(())
    }
}

/// The shop with the local client on the fast path.
fn ready(options: &MeshOptions) -> Result<Testbed> {
    let bed = open_with(&Topology::nodes(&["a", "b"]), options)?;
    warm(&bed, "shop/local", bed.pod("shop/backend")?.at(8080))?;
    for port in [8082, 8083] {
        // The pair is judged by port; the streams of the local client are to be direct, too.
        let to = bed.pod("shop/backend")?.at(port);
        wait::until_true("fast path of the streams", SOON, || {
            let load = Load::start(
                bed.pod("shop/local")?,
                &to.to_string(),
                &["--shape", "bulkr", "--pause-ms", "50"],
            )?;
            let direct =
                wait::until_true("open stream", Duration::from_secs(2), || is_direct(&bed, "shop/local", to));
            load.stop()?;
            Ok(direct.is_ok())
        })?;
    }
    Ok(bed)
}

/// Tunnels that a pod has open to backend.
fn tunnels(bed: &Testbed, from: &str) -> Result<BTreeSet<SocketAddr>> {
    let hbone = bed.pod("shop/backend")?.at(15_008);
    let open = net::established(&bed.pod(from)?.netns)?;
    Ok(open.into_iter().filter(|(_, remote)| *remote == hbone).map(|(own, _)| own).collect())
}

/// Waits for the ends of all agents but the newest.
fn old_ones_leave(bed: &mut Testbed) -> Result<()> {
    for node in ["a", "b"] {
        for n in 0..bed.node(node)?.agents.len() - 1 {
            bed.node_mut(node)?.agent_mut(n)?.wait(SOON).with_context(|| format!("agent {n} on {node}"))?;
        }
    }
    Ok(())
}

fn ten_upgrades() -> Result<()> {
    let mut bed = ready(&MeshOptions::default())?;
    let mut loads = Loads::default();
    for from in CLIENTS {
        loads.open(&bed, from)?;
        loads.fresh(&bed, from)?;
    }
    for round in 0..10 {
        for node in ["a", "b"] {
            bed.start_agent(node, &MeshOptions::default())?;
            bed.wait_agent_ready(node).with_context(|| format!("upgrade {round} on {node}"))?;
            bed.node(node)?.agent(round)?.signal(Signal::TERM)?;
        }
        // Every generation has something to keep.
        loads.idle(&bed, "shop/frontend", 20)?;
    }
    for node in ["a", "b"] {
        let mut running = 0;
        for n in 0..10 {
            running += usize::from(bed.node_mut(node)?.agent_mut(n)?.running()?);
        }
        // On which of two the idle ones landed that were made in the moment of an upgrade is theirs to choose.
        ensure!(running >= 5, "only {running} agents that drain are left on {node}");
    }
    loads.unharmed()?;
    old_ones_leave(&mut bed)?;
    talks(&bed, "shop/frontend", &echo(&bed)?)
}

/// Programs of a pod, each a load of its kind.
fn programs() -> Result<()> {
    for program in ["iperf3", "redis-server", "redis-cli", "wrk"] {
        need(program)?;
    }
    let mut bed = open()?;
    let backend = bed.pod("shop/backend")?;
    let host = backend.v4.to_string();
    let redis =
        ["redis-server", "--port", "6379", "--bind", "0.0.0.0", "--save", "", "--protected-mode", "no"];
    // iperf3 serves one client at a time.
    let _servers = [
        backend.spawn(["iperf3", "-s", "-p", "5201"])?,
        backend.spawn(["iperf3", "-s", "-p", "5202"])?,
        backend.spawn(redis)?,
        backend.spawn(["mesh-tests", "tool", "web", "--name", "web", "--port", "8084"])?,
    ];
    for port in [5201, 5202, 6379, 8084] {
        wait::until_true("servers", SOON, || backend.listening(port))?;
    }
    let url = format!("http://{host}:8084/");
    let (mut streams, mut sessions, mut requests) = (Vec::new(), Vec::new(), Vec::new());
    for (from, port) in CLIENTS.into_iter().zip(["5201", "5202"]) {
        let client = bed.pod(from)?;
        let stream = ["iperf3", "-J", "-c", &host, "-p", port, "-t", "20", "-b", "40M"];
        streams.push(client.spawn(stream)?);
        sessions.push(client.spawn(["redis-cli", "-h", &host, "-r", "-1", "-i", "0.01", "INCR", from])?);
        requests.push(client.spawn(["wrk", "-t1", "-c4", "-d20s", &url])?);
    }
    for round in 0..2 {
        for node in ["a", "b"] {
            bed.start_agent(node, &MeshOptions::default())?;
            bed.wait_agent_ready(node).with_context(|| format!("upgrade {round} on {node}"))?;
            bed.node(node)?.agent(round)?.signal(Signal::TERM)?;
        }
    }
    for mut stream in streams {
        stream.wait(SOON * 2)?;
        moved(&stream)?;
    }
    for mut load in requests {
        load.wait(SOON * 2)?;
        let log = load.log();
        ensure!(log.contains("Requests/sec") && !log.contains("Socket errors"), "wrk: {log}");
    }
    for mut session in sessions {
        let answers = counted(&mut session)?;
        ensure!(answers > 100, "redis-cli: only {answers} answers");
    }
    Ok(())
}

/// Until an agent has its certificates it serves no pod; that must not look like pods that left the mesh.
fn slow_certificates() -> Result<()> {
    let (mut bed, _pki, relay) = super::control::open()?;
    let to = bed.pod("shop/backend")?.at(8080);
    warm(&bed, "shop/local", to)?;
    let mut loads = Loads::default();
    for from in CLIENTS {
        loads.add(
            &bed,
            from,
            &to.to_string(),
            &["--shape", "pp", "--conns", "4", "--pause-ms", "5"],
            Whole::Alive(4),
        )?;
        loads.fresh(&bed, from)?;
    }
    wait::until_true("fast-path connections", SOON, || is_direct(&bed, "shop/local", to))?;
    relay.order(Mode::SlowCa)?;
    let capture = bed.capture("a")?;
    for round in 0..2 {
        for node in ["a", "b"] {
            bed.start_agent(node, &MeshOptions::default())?;
            bed.wait_agent_ready(node).with_context(|| format!("upgrade {round} on {node}"))?;
            bed.node(node)?.agent(round)?.signal(Signal::TERM)?;
        }
    }
    ensure!(relay.late_certificates() >= 8, "{} certificates were late", relay.late_certificates());
    let clear = capture.stop()?.into_iter().find(|s| s.to == to);
    ensure!(clear.is_none(), "a connection went out in the clear: {clear:?}");
    loads.unharmed()
}

fn restart() -> Result<()> {
    let mut bed = ready(&MeshOptions::default())?;
    let mut loads = Loads::default();
    for from in CLIENTS {
        loads.open(&bed, from)?;
        loads.fresh(&bed, from)?;
    }
    for round in 0..3 {
        for node in ["a", "b"] {
            bed.node(node)?.agent(round)?.signal(Signal::TERM)?;
            bed.start_agent(node, &MeshOptions::default())?;
            bed.wait_agent_ready(node).with_context(|| format!("restart {round} on {node}"))?;
        }
    }
    // New agents that cannot take over for longer than the kernel believes in one that is gone.
    bed.control.take().context("no control plane runs")?.kill();
    for node in ["a", "b"] {
        bed.node(node)?.agent(3)?.signal(Signal::TERM)?;
        bed.start_agent(node, &MeshOptions::default())?;
    }
    run::pause(Duration::from_secs(6))?;
    bed.start_control(&MeshOptions::default())?;
    for node in ["a", "b"] {
        bed.wait_agent_ready(node).context("restart while the control plane was away")?;
    }
    loads.unharmed()?;
    old_ones_leave(&mut bed)
}

/// Connections that an agent's end must not touch: those of the fast path.
fn fast_loads(bed: &Testbed) -> Result<Loads> {
    let mut loads = Loads::default();
    loads.open(bed, "shop/local")?;
    Ok(loads)
}

/// A new agent; how long after it was ready a connection worked.
fn comes_back(bed: &mut Testbed, node: &str) -> Result<Duration> {
    bed.start_agent(node, &MeshOptions::default())?;
    let to = echo(bed)?;
    bed.wait_agent_ready(node)?;
    let ready = Instant::now();
    wait::until("a connection after the restart", SOON, || talks(bed, "shop/frontend", &to).map(Some))?;
    Ok(ready.elapsed())
}

/// Connects while an agent is away: refused at once, by the kernel's hook (EPERM) or a reset, and no byte in the clear.
fn closed(bed: &Testbed) -> Result<()> {
    let to = bed.pod("shop/backend")?.at(8080);
    let capture = bed.capture("a")?;
    let options = ["--send", "hello\n", "--lines", "1", "--timeout-ms", "8000"];
    let outcome = bed.pod("shop/frontend")?.call(&to.to_string(), &options)?;
    let refusals =
        ["PermissionDenied", "ConnectionRefused", "ConnectionReset", "UnexpectedEof", "BrokenPipe"];
    ensure!(
        !outcome.ok && refusals.contains(&outcome.kind.as_str()),
        "not refused but {}",
        outcome.problem()
    );
    ensure!(capture.stop()?.iter().all(|s| s.to != to), "it went out in the clear while no agent was alive");
    Ok(())
}

fn killed() -> Result<()> {
    let mut bed = ready(&MeshOptions::default())?;
    let loads = fast_loads(&bed)?;
    for node in ["a", "b"] {
        bed.kill_agent(node)?;
        closed(&bed).with_context(|| format!("no agent on {node}"))?;
        let took = comes_back(&mut bed, node)?;
        ensure!(took < Duration::from_secs(1), "node {node}: the first connection worked after {took:?}");
    }
    loads.unharmed()
}

fn crash_loop() -> Result<()> {
    let mut bed = ready(&MeshOptions::default())?;
    let loads = fast_loads(&bed)?;
    let pins = |bed: &Testbed| -> Result<usize> {
        let dir = std::path::Path::new(crate::bed::leftovers::PINS).join(format!("{}-b", bed.name));
        Ok(walk(&dir)?.len())
    };
    let before = pins(&bed)?;
    bed.kill_agent("b")?;
    // At once, in the middle of its start, about when it serves, and after.
    for lives in [0, 50, 200, 500, 1000, 100, 3000] {
        bed.start_agent("b", &MeshOptions::default())?;
        run::pause(Duration::from_millis(lives))?;
        bed.kill_agent("b")?;
        closed(&bed).with_context(|| format!("after an agent that lived for {lives} ms"))?;
    }
    let took = comes_back(&mut bed, "b")?;
    ensure!(took < Duration::from_secs(1), "the first connection worked after {took:?}");
    let after = pins(&bed)?;
    ensure!(after <= before, "{after} pinned objects are left, {before} before");
    loads.unharmed()
}

fn walk(dir: &std::path::Path) -> Result<Vec<std::path::PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(walk(&path)?);
        } else {
            found.push(path);
        }
    }
    Ok(found)
}

fn stopped() -> Result<()> {
    const LIMIT: Duration = Duration::from_secs(20);
    let mut bed = ready(&MeshOptions::agent(&["--drain-limit", "20s"]))?;
    let fast = fast_loads(&bed)?;
    let mut tunnelled = Loads::default();
    tunnelled.open(&bed, "shop/frontend")?;
    let to = echo(&bed)?;
    let mut last =
        Load::start(bed.pod("shop/frontend")?, &to, &["--shape", "pp", "--conns", "3", "--pause-ms", "5"])?;
    wait::until_true("tunnel", SOON, || Ok(!tunnels(&bed, "shop/frontend")?.is_empty()))?;
    let told = Instant::now();
    for node in ["a", "b"] {
        bed.node(node)?.agent(0)?.signal(Signal::TERM)?;
    }
    // They drain: closed for what is new.
    wait::until("refusal of new connections", Duration::from_secs(10), || closed(&bed).map(Some))?;
    for node in ["a", "b"] {
        ensure!(bed.node_mut(node)?.agent_mut(0)?.running()?, "the agent on {node} left at once");
    }
    run::pause(LIMIT.saturating_sub(told.elapsed() + Duration::from_secs(8)))?;
    tunnelled.unharmed().context("before the limit")?;
    ensure!(last.running()?, "a connection ended before the limit");
    bed.node_mut("a")?.agent_mut(0)?.wait(SOON)?;
    let lived = told.elapsed();
    ensure!(lived >= LIMIT, "it left after {lived:?}");
    wait::until_true("end of what was left at the limit", SOON, || Ok(!last.running()?))?;
    let figures = last.figures()?;
    ensure!(figures.errors == 3, "{figures:?}");
    run::pause(Duration::from_secs(1))?;
    fast.unharmed()
}

/// Bytes of an agent that are its own, as the kernel counts them.
fn own_memory(bed: &Testbed, n: usize) -> Result<u64> {
    Ok(bed.node("a")?.agent(n)?.memory()?.1)
}

fn drain_memory() -> Result<()> {
    let mut bed = open()?;
    let to = echo(&bed)?;
    let hold = |bed: &Testbed| -> Result<Load> {
        let mut load = Load::start(bed.pod("shop/frontend")?, &to, &["--shape", "hold", "--conns", "200"])?;
        load.wait_holding(200, SOON)?;
        Ok(load)
    };
    let replace = |bed: &mut Testbed, options: &MeshOptions| -> Result<()> {
        let old = bed.node("a")?.agents.len() - 1;
        bed.start_agent("a", options)?;
        bed.wait_agent_ready("a")?;
        bed.node("a")?.agent(old)?.signal(Signal::TERM)
    };
    // Room for one agent with its connections, not for two. What a start needed is given back after a while.
    let probe = hold(&bed)?;
    run::pause(Duration::from_secs(10))?;
    let mib = own_memory(&bed, 0)?.div_ceil(1 << 20);
    let limit = (mib + mib / 2).to_string();
    let options = MeshOptions::agent(&["--drain-memory", &limit]);
    replace(&mut bed, &options)?;
    probe.stop()?;
    bed.node_mut("a")?.agent_mut(0)?.wait(SOON)?;
    let oldest = hold(&bed)?;
    replace(&mut bed, &options)?;
    let younger = hold(&bed)?;
    run::pause(Duration::from_secs(5))?;
    ensure!(bed.node_mut("a")?.agent_mut(1)?.running()?, "the only one that drains has room, and left");
    replace(&mut bed, &options)?;
    let newest = hold(&bed)?;
    bed.node_mut("a")?.agent_mut(1)?.wait(SOON).context("the oldest of two that hold too much")?;
    run::pause(Duration::from_secs(3))?;
    ensure!(bed.node_mut("a")?.agent_mut(2)?.running()?, "the younger one left, too");
    let figures = oldest.stop()?;
    ensure!(figures.errors == 200, "connections of the oldest: {figures:?}");
    for (name, load) in [("younger", younger), ("newest", newest)] {
        let figures = load.stop()?;
        ensure!(figures.errors == 0 && figures.alive == 200, "connections of the {name} one: {figures:?}");
    }
    Ok(())
}

fn expired_tunnel() -> Result<()> {
    const LIFE: Duration = Duration::from_secs(12);
    let options = MeshOptions::agent(&["--secret-ttl", "12s", "--workers", "1"]);
    let bed = open_with(&Topology::nodes(&["a", "b"]), &options)?;
    let to = echo(&bed)?;
    let mut open =
        Load::start(bed.pod("shop/frontend")?, &to, &["--shape", "pp", "--conns", "2", "--pause-ms", "5"])?;
    wait::until_true("tunnel", SOON, || Ok(!tunnels(&bed, "shop/frontend")?.is_empty()))?;
    let made = Instant::now();
    let first = tunnels(&bed, "shop/frontend")?;
    talks(&bed, "shop/frontend", &to)?;
    ensure!(tunnels(&bed, "shop/frontend")? == first, "while it was young, the tunnel was not shared");
    // It was made with certificates that were there: this long after, neither holds.
    run::pause(LIFE.saturating_sub(made.elapsed()) + Duration::from_secs(2))?;
    talks(&bed, "shop/frontend", &to)?;
    let now = tunnels(&bed, "shop/frontend")?;
    ensure!(now.difference(&first).count() == 1, "a new connection rode on {first:?}; now there are {now:?}");
    ensure!(now.is_superset(&first), "the tunnel was cut with what it carried");
    ensure!(open.running()?, "an open connection ended: {:?}", open.figures()?);
    let figures = open.stop()?;
    ensure!(figures.errors == 0 && figures.alive == 2, "open connections were hurt: {figures:?}");
    Ok(())
}
