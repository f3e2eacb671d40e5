//! `bench control`: the control plane alone, with a large mesh in its directory, and then in an API server, and simulated
//! nodes at its feed. A node here is a client of the feed and nothing else; what was sent to it is what the kernel counts on
//! the server's sockets.

mod cluster;
mod nodes;

use super::rows::{Bar, Report, Row};
use crate::bed::process::{Place, Proc, Program};
use crate::bed::{cgroup, http, netns, run, wait};
use anyhow::{Context, Result, ensure};
use cluster::Api;
use nodes::Nodes;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const MIB: f64 = 1024.0 * 1024.0;
const PATIENCE: Duration = Duration::from_secs(60);
/// Pods in one file.
const IN_A_FILE: usize = 100;
const NAMESPACES: usize = 20;
/// The number of the pod that changes.
const CHANGING: usize = 1_000_000;

/// Options of `bench control`.
#[derive(clap::Args)]
pub(super) struct Args {
    /// One JSON object on standard output instead of a table
    #[arg(long)]
    json: bool,
    /// Few short runs: shows that the bench works, its figures mean little
    #[arg(long)]
    quick: bool,
    /// Pods of the large mesh, with a tenth as many Services
    #[arg(long, default_value_t = 10_000)]
    pods: usize,
    /// Simulated nodes
    #[arg(long, default_value_t = 100)]
    nodes: usize,
}

impl Args {
    /// Whether the rows go out as JSON.
    pub(super) const fn json(&self) -> bool {
        self.json
    }
}

/// Runs the bench.
///
/// # Errors
/// The control plane does not start, or a node does not get what it should.
pub(super) fn run(args: &Args) -> Result<Report> {
    let (starts, changes) = if args.quick { (1, 10) } else { (5, 100) };
    let dir = run::dir_of(&run::next_name());
    std::fs::create_dir_all(&dir)?;
    let measured = measure(&dir, args, starts, changes)
        .and_then(|rows| Ok([rows, measure_cluster(&dir, args, starts, changes)?].concat()));
    std::fs::remove_dir_all(&dir)?;
    Ok(Report { machine: super::machine::describe(), rows: measured? })
}

/// The same with a real API server instead of a directory.
fn measure_cluster(dir: &Path, args: &Args, starts: usize, changes: usize) -> Result<Vec<Row>> {
    let bars = [("start", "s", 5.0), ("memory", "MiB", 150.0), ("ack", "ms", 300.0)];
    let Some(programs) = cluster::programs() else {
        let why = "no Kubernetes: `cargo xtask cluster up` builds it, and UM_KUBERNETES names it";
        let row =
            |(name, unit, bar)| Row::skipped(&format!("control.cluster.{name}"), unit, Bar::AtMost(bar), why);
        return Ok(bars.map(row).to_vec());
    };
    eprintln!("{} pods in an API server: they are made one by one", args.pods);
    let source = Origin::Cluster(Api::start(programs, args.pods)?);
    let (took, mut memory) = start(dir, &source, starts)?;
    let control = Control::start(dir, &source)?;
    let nodes = Nodes::start(control.feed, args.nodes)?;
    nodes.wait_synced(PATIENCE)?;
    eprintln!("{changes} changes");
    let changed = change(&source, &control, &nodes, changes)?;
    memory.push(control.resident()?);
    let figures = [took, memory, changed.ack_ms];
    let row = |((name, unit, bar), figures): ((&str, &'static str, f64), Vec<f64>)| {
        let (name, bar) = (format!("control.cluster.{name}"), Bar::AtMost(bar));
        if unit == "ms" {
            Row::p99(&name, unit, bar, figures)
        } else {
            Row::largest(&name, unit, bar, figures)
        }
    };
    Ok(bars.into_iter().zip(figures).map(row).collect())
}

/// Starts the control plane some times: seconds to ready, and MiB resident then.
fn start(dir: &Path, source: &Origin, times: usize) -> Result<(Vec<f64>, Vec<f64>)> {
    let (mut took, mut memory) = (Vec::new(), Vec::new());
    for _ in 0..times {
        let control = Control::start(dir, source)?;
        took.push(control.took.as_secs_f64());
        memory.push(control.resident()?);
    }
    Ok((took, memory))
}

fn measure(dir: &Path, args: &Args, starts: usize, changes: usize) -> Result<Vec<Row>> {
    let Args { pods, nodes: count, .. } = *args;
    let source = Origin::Directory(Source::write(dir.join("large"), pods)?);
    eprintln!("starting {starts} times with {pods} pods");
    let (took, mut memory) = start(dir, &source, starts)?;
    let control = Control::start(dir, &source)?;
    eprintln!("{count} nodes");
    let nodes = Nodes::start(control.feed, count)?;
    let synced = nodes.wait_synced(PATIENCE)?;
    eprintln!("{changes} changes");
    let changed = change(&source, &control, &nodes, changes)?;
    memory.push(control.resident()?);
    drop((nodes, control));
    let small = Origin::Directory(Source::write(dir.join("small"), 100)?);
    let control = Control::start(dir, &small)?;
    let nodes = Nodes::start(control.feed, count)?;
    nodes.wait_synced(PATIENCE)?;
    let few = change(&small, &control, &nodes, changes)?;
    Ok(vec![
        Row::largest("control.start", "s", Bar::AtMost(5.0), took),
        Row::largest("control.memory", "MiB", Bar::AtMost(150.0), memory),
        Row::of("control.nodes.synced", "s", Bar::None, vec![synced.as_secs_f64()]),
        Row::p99("control.ack", "ms", Bar::AtMost(300.0), changed.ack_ms),
        Row::p99("control.ack.100_pods", "ms", Bar::AtMost(300.0), few.ack_ms),
        Row::largest("control.change.resources", "per node", Bar::AtMost(1.0), changed.resources),
        Row::of("control.change.bytes", "per node", Bar::AtMost(1024.0), vec![changed.bytes]),
        Row::of("control.change.cpu", "ms", Bar::None, vec![changed.cpu_ms]),
    ])
}

/// What changes of one pod each cost.
struct Changed {
    /// From the file's rename, or the start of the client that writes, to the moment at which the last node has it.
    ack_ms: Vec<f64>,
    /// The most resources that a node got for one change.
    resources: Vec<f64>,
    /// Bytes that went to a node for one change.
    bytes: f64,
    /// CPU time of the control plane for one change.
    cpu_ms: f64,
}

#[expect(clippy::cast_precision_loss, reason = "thousands")]
fn change(source: &Origin, control: &Control, nodes: &Nodes, changes: usize) -> Result<Changed> {
    let (bytes, cpu) = (control.sent()?, control.process.cpu_seconds()?);
    let (mut ack_ms, mut resources) = (Vec::new(), Vec::new());
    for turn in 0..changes {
        let before = nodes.received();
        let began = Instant::now();
        source.change(turn)?;
        let last = nodes.wait_more(&before, PATIENCE)?;
        ack_ms.push(last.duration_since(began).as_secs_f64() * 1e3);
        // Whatever else comes for it counts, too.
        run::pause(Duration::from_millis(150))?;
        let after = nodes.received();
        let most = after.iter().zip(&before).map(|(after, before)| after - before).max();
        resources.push(most.unwrap_or_default() as f64);
    }
    let of_one = (changes * nodes.count()) as f64;
    Ok(Changed {
        ack_ms,
        resources,
        bytes: (control.sent()? - bytes) as f64 / of_one,
        cpu_ms: (control.process.cpu_seconds()? - cpu) * 1e3 / changes as f64,
    })
}

/// Where the mesh is.
enum Origin {
    Directory(Source),
    Cluster(Api),
}

impl Origin {
    fn change(&self, turn: usize) -> Result<()> {
        match self {
            Self::Directory(source) => source.change(turn),
            Self::Cluster(api) => api.change(turn),
        }
    }

    /// The control plane's option, and what it has in its environment.
    fn option(&self) -> (String, Vec<(String, String)>) {
        match self {
            Self::Directory(source) => (format!("--source=dir:{}", source.live.display()), Vec::new()),
            Self::Cluster(api) => {
                let kubeconfig = api.kubeconfig().display().to_string();
                ("--source=kubernetes".to_owned(), vec![("KUBECONFIG".to_owned(), kubeconfig)])
            }
        }
    }
}

/// A mesh in a directory.
struct Source {
    live: PathBuf,
}

impl Source {
    fn write(live: PathBuf, pods: usize) -> Result<Self> {
        std::fs::create_dir_all(&live)?;
        let source = Self { live };
        source.replace("namespaces", &namespaces())?;
        for first in (0..pods).step_by(IN_A_FILE) {
            let text: String = (first..pods.min(first + IN_A_FILE)).map(|n| pod(n, &address(n))).collect();
            source.replace(&format!("pods-{first}"), &text)?;
        }
        source.replace("services", &(0..pods / 10).map(service).collect::<String>())?;
        source.change(usize::MAX)?;
        Ok(source)
    }

    /// Puts one pod, which has a file of its own, at another address.
    fn change(&self, turn: usize) -> Result<()> {
        let host = turn.wrapping_add(1) % 200;
        self.replace("changing", &pod(CHANGING, &format!("10.250.0.{}", host + 1)))
    }

    fn replace(&self, name: &str, text: &str) -> Result<()> {
        let (draft, path) = (self.live.join(format!(".{name}")), self.live.join(format!("{name}.yaml")));
        std::fs::write(&draft, text)?;
        std::fs::rename(&draft, &path).with_context(|| format!("cannot put {} in place", path.display()))
    }
}

fn namespaces() -> String {
    let one = |n| {
        format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: ns-{n}, labels: {{istio.io/dataplane-mode: ambient}}}}\n---\n"
        )
    };
    (0..NAMESPACES).map(one).collect()
}

fn service(n: usize) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: app-{n}, namespace: ns-{}}}\n\
         spec: {{selector: {{app: app-{n}}}, clusterIP: 10.125.{}.{}, ports: [{{name: http, port: 80, targetPort: 8080}}]}}\n---\n",
        n % NAMESPACES,
        100 + n / 250,
        1 + n % 250,
    )
}

/// Where a pod is.
fn address(n: usize) -> String {
    format!("10.{}.{}.{}", 1 + n / 62_500, n / 250 % 250, 1 + n % 250)
}

fn pod(n: usize, address: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: pod-{n}, namespace: ns-{}, labels: {{app: app-{}, version: v1}}}}\n\
         spec: {{nodeName: node-{}, serviceAccountName: account-{}, containers: [{{name: app, image: none}}]}}\n\
         status: {{phase: Running, podIP: {address}, podIPs: [{{ip: {address}}}], conditions: [{{type: Ready, status: 'True'}}]}}\n---\n",
        n % NAMESPACES,
        n / 10,
        n % 100,
        n / 10,
    )
}

/// An address of loopback that nobody listens at.
fn free_port() -> Result<SocketAddr> {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).context("no free port")?;
    Ok(listener.local_addr()?)
}

/// A control plane on loopback.
struct Control {
    process: Proc,
    feed: SocketAddr,
    /// From its start to ready.
    took: Duration,
}

impl Control {
    fn start(dir: &Path, source: &Origin) -> Result<Self> {
        let (source, env) = source.option();
        let state = dir.join("state");
        let _ = std::fs::remove_dir_all(&state);
        let (feed, debug) = (free_port()?, free_port()?);
        let program = run::binary("mesh-control")?;
        let argv = vec![
            program.to_string_lossy().into_owned(),
            "run".to_owned(),
            source,
            format!("--state-dir={}", state.display()),
            format!("--listen-plain={feed}"),
            format!("--listen-tls={}", free_port()?),
            format!("--listen-debug={debug}"),
        ];
        let began = Instant::now();
        let place = Place { netns: "/proc/self/ns/net".into(), cgroup: cgroup::mount()?, resolv: None };
        let process =
            Proc::spawn(&place, Program { argv, env, ..Program::default() }, &dir.join("control.log"))?;
        let mut control = Self { process, feed, took: Duration::ZERO };
        wait::until_true("ready control plane", PATIENCE, || {
            ensure!(control.process.running()?, "mesh-control ended: {}", control.process.log());
            Ok(http::get_tcp(debug, "/ready").is_ok())
        })?;
        control.took = began.elapsed();
        Ok(control)
    }

    /// Resident memory, MiB.
    #[expect(clippy::cast_precision_loss, reason = "megabytes")]
    fn resident(&self) -> Result<f64> {
        Ok(self.process.memory()?.0 as f64 / MIB)
    }

    /// Bytes that the kernel counts as sent on the feed's connections.
    fn sent(&self) -> Result<u64> {
        let filter = format!("sport = :{}", self.feed.port());
        let listed = netns::command("ss", ["-tinH", "state", "established", &filter])?;
        let counts = listed.split_whitespace().filter_map(|word| word.strip_prefix("bytes_sent:"));
        Ok(counts.filter_map(|count| count.parse::<u64>().ok()).sum())
    }
}
