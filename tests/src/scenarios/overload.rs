//! More than fits: what is admitted stays as fast as it was, the rest is refused at once with a reason, nobody's pods take
//! everything, and afterwards all is as before.

use super::shop::{self, metric, open_with};
use super::{Scenario, scenario};
use crate::bed::mesh::MeshOptions;
use crate::bed::process::Proc;
use crate::bed::{Load, Testbed, Topology, net, run, wait};
use crate::tools::load::Figures;
use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use std::fmt;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario(
        "ten times the connections that fit: the admitted keep their latency, the rest are refused at once",
        150,
        ten_times,
    ),
    scenario("a pod that takes all it can get leaves room, memory and time for the others", 120, greedy),
    scenario("above its memory limit the agent refuses the pods that fill it, and recovers", 150, memory),
    scenario("bulk streams of one pod do not hold up the round trips of another", 120, bulk),
];

/// The greedy pod, beside the client on node a.
const GREEDY: &str = "shop/other";
const CLIENT: &str = "shop/frontend";
const SERVER: &str = "shop/backend";

/// Opens connections as fast as it can, waits for an echo on each, says what came of them, and keeps those that it got
/// until it is told to end.
const FLOOD: &str = r"
import json, select, socket, sys, time
host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
poll = select.epoll()
waiting, held, slowest = {}, [], 0.0
admitted = refused = silent = 0
next_one = 0
while next_one < count or waiting:
    while next_one < count and len(waiting) < 200:
        s = socket.socket()
        s.setblocking(False)
        begun = time.monotonic()
        next_one += 1
        error = s.connect_ex((host, port))
        if error not in (0, 115):
            refused += 1
            continue
        waiting[s.fileno()] = [s, begun, False]
        poll.register(s, select.EPOLLOUT)
    for fd, event in poll.poll(0.05):
        if fd not in waiting: continue
        s, begun, sent = waiting[fd]
        try:
            if not sent:
                error = s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if error: raise OSError(error)
                s.send(b'x')
                waiting[fd][2] = True
                poll.modify(fd, select.EPOLLIN)
                continue
            if not s.recv(1): raise OSError('end')
            admitted += 1
            held.append(s)
        except OSError:
            refused += 1
            slowest = max(slowest, time.monotonic() - begun)
            s.close()
            del waiting[fd]
            continue
        poll.unregister(fd)
        del waiting[fd]
    now = time.monotonic()
    for fd in [fd for fd, w in waiting.items() if now - w[1] > 20]:
        silent += 1
        waiting.pop(fd)[0].close()
print(json.dumps({'admitted': admitted, 'refused': refused, 'silent': silent, 'slowest_refusal_s': slowest}), flush=True)
time.sleep(600)
";

#[derive(Debug, Deserialize)]
struct Flooded {
    admitted: u64,
    refused: u64,
    /// Neither answered nor refused.
    silent: u64,
    slowest_refusal_s: f64,
}

/// Starts a flood and waits until each of its connections has its answer.
fn flood(bed: &Testbed, from: &str, to: SocketAddr, count: u64) -> Result<(Proc, Flooded)> {
    let argv = ["python3", "-c", FLOOD, &to.ip().to_string(), &to.port().to_string(), &count.to_string()]
        .map(str::to_owned);
    let mut flood = bed.pod(from)?.spawn(argv)?;
    let said = wait::until("end of the flood", Duration::from_secs(90), || {
        if let Some(line) = flood.log().lines().find(|line| line.starts_with('{')) {
            return Ok(Some(line.to_owned()));
        }
        if flood.running()? { Ok(None) } else { Err(wait::hopeless(flood.log())) }
    })?;
    let flooded: Flooded = serde_json::from_str(&said).with_context(|| said.clone())?;
    eprintln!("  {count} connections of {from}: {flooded:?}");
    ensure!(flooded.admitted + flooded.refused + flooded.silent == count, "some are missing: {flooded:?}");
    Ok((flood, flooded))
}

fn shed(bed: &Testbed, node: &str, limit: &str) -> Result<f64> {
    Ok(metric(&bed.metrics(node)?, "undermesh_connections_shed_total", &[("limit", limit)]))
}

fn of_pod(bed: &Testbed, name: &str, pod: &str) -> Result<f64> {
    let (namespace, pod) = pod.split_once('/').context("a pod is namespace/name")?;
    Ok(metric(&bed.metrics("a")?, name, &[("namespace", namespace), ("pod", pod)]))
}

/// Resident MiB of the agent on a node.
fn resident(bed: &Testbed, node: &str) -> Result<u64> {
    Ok(bed.node(node)?.agent(0)?.memory()?.0 >> 20)
}

/// Round trips on one connection of the client pod, while another pair of pods does the same beside the mesh: whatever
/// else the machine does slows both.
struct RoundTrips {
    mesh: Figures,
    plain: Figures,
}

impl RoundTrips {
    fn measure(bed: &Testbed, to: SocketAddr) -> Result<Self> {
        let shape = ["--shape", "pp", "--pause-ms", "1"];
        let site = bed.pod("outside/site")?.at(8080).to_string();
        let plain = Load::start(bed.pod("outside/visitor")?, &site, &shape)?;
        let mesh = Load::start(bed.pod(CLIENT)?, &to.to_string(), &shape)?;
        run::pause(Duration::from_secs(3))?;
        let (mesh, plain) = (mesh.stop()?, plain.stop()?);
        ensure!(mesh.errors == 0, "{} round trips failed: {}", mesh.errors, mesh.first_error);
        ensure!(mesh.ops > 10 && plain.ops > 10, "few round trips: {mesh:?}, {plain:?}");
        Ok(Self { mesh, plain })
    }

    /// How much slower the mesh is than no mesh at this moment.
    fn ratio(&self) -> f64 {
        self.mesh.p50_us / self.plain.p50_us
    }
}

impl fmt::Display for RoundTrips {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mesh, plain } = self;
        let ms = |us: f64| us / 1e3;
        write!(f, "p50 {:.2} ms, p99 {:.2} ms ", ms(mesh.p50_us), ms(mesh.p99_us))?;
        write!(f, "(without mesh {:.2} and {:.2})", ms(plain.p50_us), ms(plain.p99_us))
    }
}

fn open(agent: &[&str]) -> Result<Testbed> {
    let bed = open_with(&Topology::nodes(&["a", "b"]), &MeshOptions::agent(agent))?;
    let to = bed.pod(SERVER)?.at(8080).to_string();
    for from in [CLIENT, GREEDY] {
        shop::talks(&bed, from, &to)?;
    }
    Ok(bed)
}

/// What the kernel of the server's pod shows of a client's connections to the application.
fn at_server(bed: &Testbed, client: &str) -> Result<u64> {
    let own = bed.pod(client)?.at(0).ip();
    let open = net::established(&bed.pod(SERVER)?.netns)?;
    Ok(open.iter().filter(|(local, remote)| local.port() == 8080 && remote.ip() == own).count() as u64)
}

fn ten_times() -> Result<()> {
    const FITS: u64 = 300;
    let mut bed = open(&["--max-connections", &FITS.to_string()])?;
    let to = bed.pod(SERVER)?.at(8080);
    let admitted = Load::start(
        bed.pod(CLIENT)?,
        &to.to_string(),
        &["--shape", "pp", "--conns", "50", "--pause-ms", "0"],
    )?;
    wait::until_true("admitted connections", Duration::from_secs(20), || Ok(at_server(&bed, CLIENT)? == 50))?;
    let before = [resident(&bed, "a")?, resident(&bed, "b")?];
    let (flood, flooded) = flood(&bed, GREEDY, to, 10 * FITS)?;
    ensure!(flooded.silent == 0, "some were neither admitted nor refused: {flooded:?}");
    ensure!(flooded.admitted <= FITS && flooded.refused >= 9 * FITS, "{flooded:?} with room for {FITS}");
    ensure!(flooded.admitted == at_server(&bed, GREEDY)?, "the server sees another number than {flooded:?}");
    ensure!(flooded.slowest_refusal_s < 2.0, "a refusal took long: {flooded:?}");
    // The reason: in a metric, and in the log with its code. What node a let through, node b refuses: a connection each, or a
    // tunnel with all that waited for it.
    #[expect(clippy::cast_precision_loss, reason = "a few thousand")]
    let refused = flooded.refused as f64;
    wait::until_true("a reason for every refusal", Duration::from_secs(5), || {
        let text = bed.metrics("a")?;
        let failed = metric(&text, "istio_tcp_connections_failed_total", &[("reporter", "source")]);
        let shed = |limit| metric(&text, "undermesh_connections_shed_total", &[("limit", limit)]);
        Ok(shed("node") + shed("share") + failed >= refused)
    })?;
    ensure!(bed.node("a")?.agent(0)?.log().contains("M0313"), "no line of the log has the code");
    // Those that were admitted before never noticed.
    let admitted = admitted.stop()?;
    ensure!(
        admitted.errors == 0 && admitted.alive == 50,
        "{} of 50 live: {}",
        admitted.alive,
        admitted.first_error
    );
    let full = RoundTrips::measure(&bed, to)?;
    for (node, before) in ["a", "b"].into_iter().zip(before) {
        let now = resident(&bed, node)?;
        ensure!(now < before + 60, "the agent on {node} holds {now} MiB, {before} before");
    }
    // Recovery: the next connection after the flood has gone works.
    drop(flood);
    let start = Instant::now();
    wait::until_true("end of the flood's connections", Duration::from_secs(10), || {
        Ok(at_server(&bed, GREEDY)? == 0)
    })?;
    let gone = start.elapsed();
    shop::talks(&bed, GREEDY, &to.to_string())?;
    eprintln!("  the flood's connections were gone after {gone:?}");
    let free = RoundTrips::measure(&bed, to)?;
    eprintln!("  round trips when full: {full}; after: {free}");
    ensure!(
        full.ratio() < 2.0 * free.ratio(),
        "those who are admitted are slow: {full}, after the flood {free}"
    );
    super::hostile::unhurt(&mut bed)
}

/// The shop with an agent on b that has room for what the one on a is short of.
fn open_small_a(agent: &[&str]) -> Result<Testbed> {
    let mut bed = Testbed::build(&Topology::nodes(&["a", "b"]), shop::SHOP)?;
    bed.start_control(&MeshOptions::default())?;
    for (node, args) in [("a", agent), ("b", &[])] {
        bed.start_agent(node, &MeshOptions::agent(args))?;
        bed.wait_agent_ready(node)?;
    }
    shop::enrolled(&bed, shop::ENROLLED)?;
    Ok(bed)
}

fn greedy() -> Result<()> {
    let bed = open_small_a(&["--max-connections", "400"])?;
    let to = bed.pod(SERVER)?.at(8080);
    let (_flood, flooded) = flood(&bed, GREEDY, to, 1_000)?;
    ensure!(flooded.admitted > 100, "a pod gets little of an idle node: {flooded:?}");
    ensure!(
        of_pod(&bed, "undermesh_pod_connections_open", GREEDY)? >= 100.0,
        "the metric shows no greedy pod"
    );
    // Another pod of the node gets what it needs, at once and every time.
    let client = bed.pod(CLIENT)?;
    let mut held = Load::start(client, &to.to_string(), &["--shape", "hold", "--conns", "30"])?;
    held.wait_holding(30, Duration::from_secs(20))?;
    ensure!(at_server(&bed, CLIENT)? == 30, "the server does not see them");
    let open = of_pod(&bed, "undermesh_pod_connections_open", CLIENT)?;
    ensure!(open >= 30.0, "the metric shows {open} connections of the other pod");
    for pod in [CLIENT, GREEDY] {
        ensure!(of_pod(&bed, "undermesh_pod_worker_seconds_total", pod)? > 0.0, "no time was spent on {pod}");
    }
    let held = held.stop()?;
    ensure!(held.alive == 30, "only {} of 30 live: {}", held.alive, held.first_error);
    Ok(())
}

/// Opens connections whose server does not read, one after the other, and fills each with all that it takes.
const HOARD: &str = r"
import socket, sys, time
host, held, refused = sys.argv[1], [], 0
while True:
    s = socket.socket()
    s.settimeout(2)
    try:
        s.connect((host, 9002))
        s.setblocking(False)
        stuck = 0
        while stuck < 3:
            try:
                s.send(b'x' * 65536)
                stuck = 0
            except BlockingIOError:
                stuck += 1
                time.sleep(0.005)
        held.append(s)
    except OSError:
        refused += 1
        time.sleep(0.02)
    print('holding', len(held), 'refused', refused, flush=True)
";

/// Accepts and never reads.
const DEAF: &str = "
import socket
s = socket.create_server(('', 9002), backlog=1000)
held = []
while True:
    held.append(s.accept())
";

fn memory() -> Result<()> {
    let bed = open(&["--fair-share", "false"])?;
    let idle = [resident(&bed, "a")?, resident(&bed, "b")?];
    drop(bed);
    let limit = idle[0].max(idle[1]) + 80;
    let mut bed = open(&["--fair-share", "false", "--max-memory", &limit.to_string()])?;
    let to = bed.pod(SERVER)?.at(8080);
    let deaf = bed.pod(SERVER)?.spawn(["python3", "-c", DEAF])?;
    wait::until_true("deaf server", Duration::from_secs(10), || bed.pod(SERVER)?.listening(9002))?;
    let beside = bed.pod("shop/local")?.at(8080);
    let _beside = bed.pod("shop/local")?.spawn(["mesh-tests", "tool", "serve", "--echo", "8080"])?;
    wait::until_true("echo server", Duration::from_secs(10), || bed.pod("shop/local")?.listening(8080))?;
    shop::talks(&bed, CLIENT, &beside.to_string())?;
    let hoarder = bed.pod(GREEDY)?.spawn(["python3", "-c", HOARD, &to.ip().to_string()])?;
    let mut most = [0, 0];
    let mut look = |bed: &Testbed| -> Result<f64> {
        for (most, node) in most.iter_mut().zip(["a", "b"]) {
            *most = (*most).max(resident(bed, node)?);
        }
        Ok(shed(bed, "a", "memory")? + shed(bed, "b", "memory")?)
    };
    wait::until_true("refusals for memory", Duration::from_secs(60), || Ok(look(&bed)? > 5.0))
        .with_context(|| hoarder.log())?;
    // It goes on for a while: memory stays where it is, and other pods on both nodes are served.
    for _ in 0..20 {
        run::pause(Duration::from_millis(100))?;
        look(&bed)?;
        shop::talks(&bed, CLIENT, &beside.to_string())?;
    }
    eprintln!(
        "  idle {idle:?} MiB, limit {limit} MiB, most {most:?} MiB; {}",
        hoarder.log().lines().last().unwrap_or_default()
    );
    ensure!(
        most.iter().all(|most| *most < limit + limit / 4),
        "the agents held {most:?} MiB, the limit is {limit}"
    );
    // The server's end, too: it could still want to read what the client wrote before it went.
    drop((hoarder, deaf));
    let start = Instant::now();
    wait::until_true("a connection of the greedy pod", Duration::from_secs(10), || {
        Ok(shop::talks(&bed, GREEDY, &to.to_string()).is_ok())
    })
    .with_context(|| format!("the agents hold {:?} MiB", ["a", "b"].map(|node| resident(&bed, node).ok())))?;
    eprintln!("  recovered after {:?}", start.elapsed());
    super::hostile::unhurt(&mut bed)
}

fn bulk() -> Result<()> {
    // One worker: both pods share it.
    let bed = open(&["--workers", "1"])?;
    let (echo, sink) = (bed.pod(SERVER)?.at(8080), bed.pod(SERVER)?.at(8082));
    let alone = RoundTrips::measure(&bed, echo)?;
    let spent = |pod: &str| of_pod(&bed, "undermesh_pod_worker_seconds_total", pod);
    let before = [spent(CLIENT)?, spent(GREEDY)?];
    let bulk = Load::start(bed.pod(GREEDY)?, &sink.to_string(), &["--shape", "bulk", "--conns", "16"])?;
    run::pause(Duration::from_millis(500))?;
    let beside = RoundTrips::measure(&bed, echo)?;
    let bulk = bulk.stop()?;
    let used = [spent(CLIENT)? - before[0], spent(GREEDY)? - before[1]];
    eprintln!("  alone {alone}; beside {:.1} Gb/s {beside}; worker seconds {used:.2?}", bulk.gbits());
    ensure!(bulk.errors == 0 && bulk.bytes > 0, "the bulk streams broke: {}", bulk.first_error);
    ensure!(beside.mesh.p50_us < 25_000.0, "round trips beside bulk streams: {beside}");
    ensure!(used[1] > 2.0 * used[0], "the metric does not show who uses the workers: {used:?} seconds");
    Ok(())
}
