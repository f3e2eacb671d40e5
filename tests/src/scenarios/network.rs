//! Networks and peers at their worst: delay, loss, reordering, tiny segments, black holes, slow readers, resets.
//!
//! The same traffic goes through the mesh (`shop`) and beside it (`outside`) over the same bad way between the nodes, in
//! the same run: what the network costs anyway is no fault of the mesh. Bytes are compared by what the server's side
//! hashed; that the network did what it was told to is read from the program that carries the frames.

use super::shop::{self, open};
use super::{Scenario, scenario};
use crate::bed::load;
use crate::bed::process::{self, Proc};
use crate::bed::wan::Wan;
use crate::bed::{Load, Testbed, net, run, wait};
use crate::tools::load::Figures;
use crate::tools::transfer::Seen;
use anyhow::{Context, Result, ensure};
use std::cell::Cell;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("over 200 ms of delay, the mesh takes as long as the network does", 180, delayed),
    scenario("with 5 % loss, every byte arrives in order and no connection breaks", 240, lossy),
    scenario("reordered and doubled packets arrive as they were sent", 120, reordered),
    scenario(
        "a way that swallows large packets without a word is passed as without the mesh",
        180,
        black_hole,
    ),
    scenario("segments of one byte carry tunnels and applications", 120, crumbs),
    scenario("both orders of half-close deliver every byte over a slow and lossy way", 120, half_closed),
    scenario("peers that read slowly or not at all keep their bytes and nobody else's", 150, slow_readers),
    scenario("a storm of resets leaves other connections and the agents as they were", 150, resets),
];

const CLIENT: &str = "shop/frontend";
const SERVER: &str = "shop/backend";
/// The same outside of the mesh.
const PLAIN: [&str; 2] = ["outside/visitor", "outside/site"];
const PORT: u16 = 9000;
/// Its server reads slowly into a small buffer.
const SLOW_PORT: u16 = 9001;

/// Pods with servers, in the mesh and outside, with a way between the nodes that can be made bad.
struct Far {
    wan: Wan,
    servers: Vec<(&'static str, Proc)>,
    seeds: Cell<u64>,
    bed: Testbed,
}

impl Far {
    fn open() -> Result<Self> {
        let bed = open()?;
        let mut servers = Vec::new();
        for key in [SERVER, PLAIN[1]] {
            let pod = bed.pod(key)?;
            let serve = |port: u16, options: &[&str]| {
                let argv =
                    ["mesh-tests", "tool", "transfer", "--serve", &port.to_string()].map(str::to_owned);
                pod.spawn(argv.into_iter().chain(options.iter().map(|&option| option.to_owned())))
            };
            servers.push((key, serve(PORT, &[])?));
            // 2 KiB in a 4 KiB buffer 200 times a second: a small window that is often shut.
            let slow = ["--receive-buffer", "4096", "--piece", "2048", "--pause-us", "5000"];
            servers.push((key, serve(SLOW_PORT, &slow)?));
            wait::until_true("servers", Duration::from_secs(20), || {
                Ok(pod.listening(PORT)? && pod.listening(SLOW_PORT)?)
            })?;
        }
        let mut wan = Wan::before(&bed, "b")?;
        wan.change(&[])?;
        let far = Self { wan, servers, seeds: Cell::new(1), bed };
        // Tunnels of every worker are there before the network turns bad: a tunnel's handshake is not what is measured.
        for _ in 0..12 {
            shop::talks(&far.bed, CLIENT, &far.bed.pod(SERVER)?.at(8080).to_string())?;
        }
        Ok(far)
    }

    fn target(&self, mesh: bool, port: u16) -> Result<SocketAddr> {
        Ok(self.bed.pod(if mesh { SERVER } else { PLAIN[1] })?.at(port))
    }

    /// A transfer between pods in the mesh, or outside: both sides saw the same bytes, and no error. Returns the seconds
    /// until both had everything: what a client wrote is not yet delivered.
    fn carry(&self, mesh: bool, port: u16, options: &[&str]) -> Result<f64> {
        let seed = self.seeds.replace(self.seeds.get() + 1);
        let to = self.target(mesh, port)?;
        let client = self.bed.pod(if mesh { CLIENT } else { PLAIN[0] })?;
        let argv = ["mesh-tests", "tool", "transfer", "--to", &to.to_string(), "--seed", &seed.to_string()]
            .map(str::to_owned);
        let argv = argv.into_iter().chain(options.iter().map(|&option| option.to_owned()));
        let done = process::finish(&client.place, argv, Duration::from_secs(120))?;
        let seen: Seen = serde_json::from_str(done.ok()?.trim()).context("the client said nothing")?;
        let way = if mesh { "through the mesh" } else { "outside the mesh" };
        ensure!(seen.error.is_empty(), "{way}, {options:?}: the client saw {seen:?}");
        let server = self.server_saw(to, seed)?;
        ensure!(server.error.is_empty(), "{way}, {options:?}: the server saw {server:?}");
        ensure!(
            (server.received, &server.received_hash) == (seen.sent, &seen.sent_hash),
            "{way}: the server received {server:?} of {seen:?}"
        );
        ensure!(
            (seen.received, &seen.received_hash) == (server.sent, &server.sent_hash),
            "{way}: the client received {seen:?} of {server:?}"
        );
        Ok(seen.seconds.max(server.seconds))
    }

    /// The line that the server wrote about a connection.
    fn server_saw(&self, to: SocketAddr, seed: u64) -> Result<Seen> {
        wait::until(&format!("connection {seed} in the log of {to}"), Duration::from_secs(20), || {
            let logs = self.servers.iter().map(|(_, server)| server.log());
            let seen = |log: String| {
                log.lines().filter_map(|l| serde_json::from_str::<Seen>(l).ok()).find(|s| s.seed == seed)
            };
            Ok(logs.filter_map(seen).next())
        })
    }

    /// Seconds of a transfer through the mesh, over the same beside it: of several pairs the mean ratio, since what a
    /// lost or late packet costs one connection is chance.
    fn compare(&self, what: &str, pairs: usize, options: &[&str]) -> Result<f64> {
        let mut ratios = Vec::new();
        for _ in 0..pairs {
            let plain = self.carry(false, PORT, options)?;
            let mesh = self.carry(true, PORT, options)?;
            eprintln!("  {what}: {mesh:.2} s through the mesh, {plain:.2} s beside it");
            ratios.push(mesh / plain);
        }
        #[expect(clippy::cast_precision_loss, reason = "a handful")]
        Ok(ratios.iter().product::<f64>().powf(1.0 / pairs as f64))
    }

    /// A load of one shape on the echo servers, through the mesh or beside it.
    fn load(&self, mesh: bool, shape: &[&str], seconds: f64) -> Result<Figures> {
        let client = self.bed.pod(if mesh { CLIENT } else { PLAIN[0] })?;
        let to = self.target(mesh, 8080)?.to_string();
        let argv: Vec<String> =
            ["--to", &to].into_iter().chain(shape.iter().copied()).map(str::to_owned).collect();
        let figures = load::measure(client, None, &argv, seconds)?;
        ensure!(figures.errors == 0, "{} failed: {}", figures.errors, figures.first_error);
        ensure!(figures.ops > 0, "nothing was done in {seconds} s");
        Ok(figures)
    }

    /// The median time of a load's operation through the mesh, over the same beside it.
    fn slower(&self, what: &str, shape: &[&str], seconds: f64) -> Result<f64> {
        let plain = self.load(false, shape, seconds)?;
        let mesh = self.load(true, shape, seconds)?;
        eprintln!(
            "  {what}: p50 {:.1} ms, p99 {:.1} ms through the mesh; {:.1} and {:.1} beside it",
            mesh.p50_us / 1e3,
            mesh.p99_us / 1e3,
            plain.p50_us / 1e3,
            plain.p99_us / 1e3
        );
        Ok(mesh.p50_us / plain.p50_us)
    }

    /// The network did this to some frames, and every tunnel of before is still the tunnel.
    fn really(&mut self, what: &str) -> Result<()> {
        shop::tunnelled(&self.bed)?;
        let did = self.wan.stop()?;
        ensure!(did[what].as_u64() > Some(0), "the network never did {what:?}: {did}");
        ensure!(did["full"] == 0, "the forwarder lost frames by itself: {did}");
        Ok(())
    }
}

fn delayed() -> Result<()> {
    let mut far = Far::open()?;
    far.wan.change(&["--delay-ms", "100"])?;
    let ratio = far.slower("round trips", &["--shape", "pp"], 3.0)?;
    ensure!(ratio < 1.1, "a round trip takes {ratio:.2} times what the network takes");
    // Both have to ask the server once before bytes may flow: by SYN, or by CONNECT on the warm tunnel.
    let ratio = far.slower("new connections", &["--shape", "crr"], 4.0)?;
    ensure!(ratio < 1.15, "a new connection takes {ratio:.2} times what the network takes");
    for way in ["--up", "--down"] {
        let ratio = far.compare(&format!("8 MB {way}"), 1, &[way, "8000000"])?;
        // A fresh connection is in slow start all the way; the tunnel is older and may long have left it.
        ensure!(ratio < 8.0, "a transfer {way} takes {ratio:.2} times as long as without the mesh");
    }
    shop::tunnelled(&far.bed)
}

fn lossy() -> Result<()> {
    let mut far = Far::open()?;
    far.wan.change(&["--loss", "5", "--delay-ms", "2"])?;
    for way in ["--up", "--down"] {
        // One transfer takes three times as long as another by chance alone: of a dozen the mean says something.
        let ratio = far.compare(&format!("1 MB {way}"), 12, &[way, "1000000"])?;
        ensure!(ratio < 2.5, "transfers {way} take {ratio:.2} times as long as without the mesh");
    }
    let ratio = far.slower("round trips", &["--shape", "pp"], 4.0)?;
    ensure!(ratio < 1.5, "a round trip takes {ratio:.2} times what the network takes");
    far.load(true, &["--shape", "crr", "--conns", "8"], 3.0)?;
    far.really("lost")
}

fn reordered() -> Result<()> {
    let mut far = Far::open()?;
    let options = ["--delay-ms", "3", "--reorder", "10", "--reorder-ms", "2", "--duplicate", "2"];
    far.wan.change(&options)?;
    for way in ["--up", "--down"] {
        // What TCP takes for loss halves the window of the one tunnel again and again; a fresh connection is done
        // before that matters to it.
        let ratio = far.compare(&format!("10 MB {way}"), 3, &[way, "10000000"])?;
        ensure!(ratio < 16.0, "a transfer {way} takes {ratio:.2} times as long as without the mesh");
    }
    let ratio = far.slower("round trips", &["--shape", "pp"], 2.0)?;
    ensure!(ratio < 1.3, "a round trip takes {ratio:.2} times what the network takes");
    far.really("duplicated")?;
    far.wan.change(&options)?;
    far.carry(true, PORT, &["--up", "500000", "--down", "500000"])?;
    far.really("reordered")
}

/// The kernel finds the largest packet by itself where it is told to probe (RFC 4821): without the mesh, too.
fn black_hole() -> Result<()> {
    let mut far = Far::open()?;
    for key in [CLIENT, SERVER, PLAIN[0], PLAIN[1]] {
        far.bed.pod(key)?.netns.sysctl(&[("ipv4/tcp_mtu_probing", "1")])?;
    }
    far.wan.change(&["--mtu", "1200", "--delay-ms", "1"])?;
    for way in ["--up", "--down"] {
        let plain = far.carry(false, PORT, &[way, "2000000"])?;
        let mesh = far.carry(true, PORT, &[way, "2000000"])?;
        eprintln!("  2 MB {way}: {mesh:.2} s through the mesh, {plain:.2} s beside it");
        // Timeouts until the kernel gives large packets up: seconds, and no fewer without the mesh.
        ensure!(mesh < plain + 5.0, "{mesh:.1} s through the mesh, {plain:.1} s beside it");
    }
    far.really("too_large")
}

fn crumbs() -> Result<()> {
    let mut far = Far::open()?;
    // What the application writes byte by byte.
    far.carry(true, PORT, &["--up", "20000", "--down", "20000", "--piece", "1"])?;
    far.wan.change(&["--cut", "1"])?;
    far.carry(true, PORT, &["--up", "4000", "--down", "4000"])?;
    shop::talks(&far.bed, CLIENT, &far.bed.pod(SERVER)?.at(8080).to_string())?;
    // Handshakes of new tunnels, too: those of before are cut off.
    far.bed.pod(SERVER)?.output(["ss", "-K", "-H", "state", "established", "sport", "=", ":15008"])?;
    for _ in 0..4 {
        shop::talks(&far.bed, CLIENT, &far.bed.pod(SERVER)?.at(8080).to_string())?;
    }
    far.wan.change(&["--cut", "77"])?;
    let ratio = far.compare("400 kB in pieces of 77 bytes", 1, &["--up", "400000", "--down", "400000"])?;
    ensure!(ratio < 3.0, "the transfer takes {ratio:.2} times as long as without the mesh");
    far.really("cut")
}

fn half_closed() -> Result<()> {
    let mut far = Far::open()?;
    far.wan.change(&["--delay-ms", "5", "--loss", "1", "--reorder", "5"])?;
    for order in ["client-first", "server-first", "both"] {
        for sizes in [["1", "500000"], ["500000", "1"], ["300000", "300000"], ["0", "1000"], ["1000", "0"]] {
            far.carry(true, PORT, &["--order", order, "--up", sizes[0], "--down", sizes[1]])
                .with_context(|| format!("{order}, {sizes:?}"))?;
        }
    }
    // Nothing is left of them at the server.
    let client = far.bed.pod(CLIENT)?.at(0).ip();
    wait::until_true("end of the connections", Duration::from_secs(20), || {
        let open = net::established(&far.bed.pod(SERVER)?.netns)?;
        Ok(!open.iter().any(|(local, remote)| local.port() == PORT && remote.ip() == client))
    })?;
    far.really("lost")
}

/// Resident bytes of the agent on a node.
fn resident(bed: &Testbed, node: &str) -> Result<u64> {
    Ok(bed.node(node)?.agent(0)?.memory()?.0)
}

fn slow_readers() -> Result<()> {
    let far = Far::open()?;
    let slow = ["--up", "400000"];
    far.carry(true, SLOW_PORT, &slow)?;
    // A client with a tiny window that takes its time.
    let tiny = ["--down", "400000", "--receive-buffer", "4096", "--piece", "2048", "--pause-us", "5000"];
    far.carry(true, PORT, &tiny)?;
    // Sixty connections whose server does not read at all, on the tunnels that everybody uses.
    let deaf = far.bed.pod(SERVER)?.spawn(["python3", "-c", DEAF])?;
    wait::until_true("deaf server", Duration::from_secs(10), || far.bed.pod(SERVER)?.listening(9002))?;
    let before = [resident(&far.bed, "a")?, resident(&far.bed, "b")?];
    let quiet = far.load(true, &["--shape", "pp"], 2.0)?;
    let talkers = far.bed.pod(CLIENT)?.spawn([
        "python3",
        "-c",
        TALK_TO_THE_DEAF,
        &far.target(true, 9002)?.ip().to_string(),
    ])?;
    wait::until_true("sixty stuck connections", Duration::from_secs(30), || {
        Ok(talkers.log().contains("stuck"))
    })
    .with_context(|| talkers.log())?;
    let cpu = || -> Result<f64> {
        Ok(far.bed.node("a")?.agent(0)?.cpu_seconds()? + far.bed.node("b")?.agent(0)?.cpu_seconds()?)
    };
    // What was on its way when the last connection stuck is carried first.
    let mut used = f64::INFINITY;
    wait::until_true("rest of the agents", Duration::from_secs(20), || {
        let begin = cpu()?;
        crate::bed::run::pause(Duration::from_secs(2))?;
        used = cpu()? - begin;
        Ok(used < 0.2)
    })
    .with_context(|| format!("they use {used:.2} s of CPU in 2 s with nothing but stuck connections"))?;
    let beside = far.load(true, &["--shape", "pp"], 2.0)?;
    eprintln!("  round trips: p50 {:.0} us alone, {:.0} us beside stuck ones", quiet.p50_us, beside.p50_us);
    ensure!(
        beside.p50_us < 3.0 * quiet.p50_us.max(500.0),
        "stuck connections slow others down: {:.0} us, {:.0} before",
        beside.p50_us,
        quiet.p50_us
    );
    let bulk = far.carry(true, PORT, &["--up", "10000000", "--down", "10000000"])?;
    ensure!(bulk < 10.0, "20 MB beside stuck connections take {bulk:.1} s");
    for (node, before) in ["a", "b"].into_iter().zip(before) {
        let more = resident(&far.bed, node)?.saturating_sub(before) >> 20;
        eprintln!("  the agent on {node} holds {more} MiB more");
        ensure!(more < 200, "sixty stuck connections cost the agent on {node} {more} MiB");
    }
    drop((talkers, deaf));
    far.carry(true, SLOW_PORT, &slow)?;
    shop::tunnelled(&far.bed)
}

/// Accepts and never reads.
const DEAF: &str = "
import socket, time
s = socket.create_server(('', 9002), backlog=200)
held = []
while True:
    held.append(s.accept())
";

/// Writes on sixty connections until nothing more is taken from any of them.
const TALK_TO_THE_DEAF: &str = "
import socket, sys, time
held = []
for _ in range(60):
    s = socket.create_connection((sys.argv[1], 9002))
    s.setblocking(False)
    held.append(s)
last = time.monotonic()
while time.monotonic() - last < 1:
    for s in held:
        try:
            while s.send(b'x' * 65536): last = time.monotonic()
        except BlockingIOError:
            pass
    time.sleep(0.01)
print('stuck', flush=True)
time.sleep(600)
";

/// Opens connections and ends them by reset: at once, after a byte, and in the middle of a transfer.
const STORM: &str = "
import socket, struct, sys, time
host, seconds = sys.argv[1], float(sys.argv[2])
end, n = time.monotonic() + seconds, 0
while time.monotonic() < end:
    batch = []
    for i in range(32):
        s = socket.socket()
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        s.settimeout(5)
        try:
            s.connect((host, 8080))
            if i % 3 == 1: s.send(b'x')
            if i % 3 == 2: s.send(b'y' * 200000)
        except OSError:
            pass
        batch.append(s)
    for s in batch: s.close()
    n += len(batch)
print('reset', n, flush=True)
";

fn resets() -> Result<()> {
    let mut bed = open()?;
    let to = bed.pod(SERVER)?.at(8080);
    shop::talks(&bed, CLIENT, &to.to_string())?;
    let descriptors = |bed: &Testbed, node: &str| -> Result<usize> {
        let pid = bed.node(node)?.agent(0)?.pid();
        Ok(std::fs::read_dir(format!("/proc/{pid}/fd"))?.count())
    };
    // Others of the same pod, on the same tunnels, and of another pod.
    let steady = Load::start(
        bed.pod(CLIENT)?,
        &to.to_string(),
        &["--shape", "pp", "--conns", "8", "--pause-ms", "2"],
    )?;
    let other = Load::start(
        bed.pod("shop/other")?,
        &to.to_string(),
        &["--shape", "pp", "--conns", "2", "--pause-ms", "2"],
    )?;
    let client = bed.pod(CLIENT)?.at(0).ip();
    wait::until_true("steady connections", Duration::from_secs(15), || {
        let open = net::established(&bed.pod(SERVER)?.netns)?;
        Ok(open.iter().filter(|(local, remote)| local.port() == 8080 && remote.ip() == client).count() >= 8)
    })?;
    let before = [descriptors(&bed, "a")?, descriptors(&bed, "b")?];
    let start = Instant::now();
    let done = process::finish(
        &bed.pod(CLIENT)?.place,
        ["python3", "-c", STORM, &to.ip().to_string(), "8"],
        Duration::from_secs(60),
    )?;
    let count: u64 = done.ok()?.trim().rsplit(' ').next().unwrap_or_default().parse().context("no count")?;
    eprintln!("  {count} resets in {:.1} s", start.elapsed().as_secs_f64());
    ensure!(count > 500, "only {count} resets");
    run::pause(Duration::from_millis(500))?;
    for (name, load, conns) in [("the same pod", steady, 8), ("another pod", other, 2)] {
        let figures = load.stop()?;
        ensure!(
            figures.errors == 0 && figures.alive == conns,
            "{} of {conns} connections of {name} live, {}",
            figures.alive,
            figures.first_error
        );
    }
    wait::until_true("agents without the connections", Duration::from_secs(20), || {
        let open = net::established(&bed.pod(SERVER)?.netns)?;
        let left =
            open.iter().filter(|(local, remote)| local.port() == 8080 && remote.ip() == client).count();
        // Tunnels that the storm needed stay for a while; everything else of it is gone.
        let tunnels = net::established(&bed.pod(CLIENT)?.netns)?;
        let tunnels = tunnels.iter().filter(|(_, remote)| remote.port() == 15_008).count();
        let now = [descriptors(&bed, "a")?, descriptors(&bed, "b")?];
        ensure!(left == 0, "the server still has {left} connections");
        ensure!(
            now.iter().zip(before).all(|(now, before)| *now <= before + tunnels),
            "the agents have {now:?} descriptors with {tunnels} tunnels, {before:?} before"
        );
        Ok(true)
    })?;
    super::hostile::unhurt(&mut bed)
}
