//! The bench's testbed: pods, servers, relays, spinners, and how a load reaches each variant.

use super::zpeer::{self, Peer};
use crate::bed::mesh::MeshOptions;
use crate::bed::net;
use crate::bed::process::{Place, Proc, Program};
use crate::bed::{Testbed, Topology, wait};
use crate::tools::load::Figures;
use anyhow::{Context, Result, bail};
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

/// Ports of every server pod.
pub(super) const ECHO: u16 = 9000;
/// More echo ports for new connections: on one port, a client's source ports in TIME_WAIT run out within seconds, with
/// and without a mesh, and the bench would measure that.
const ECHO_MANY: std::ops::Range<u16> = 9100..9132;
const SINK: u16 = 9001;
const SOURCE: u16 = 9002;
/// Client programs run here, servers on the other; proxies run where the scheduler puts them.
const CLIENT_CPU: usize = 0;
const SERVER_CPU: usize = 1;

/// What stands between client and server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Variant {
    /// Same node, no mesh.
    PlainLocal,
    /// The same thing again: the noise of the group.
    PlainLocalAgain,
    /// Same node, both enrolled: the fast path.
    Fast,
    /// Two nodes, no mesh.
    Plain,
    /// Two nodes, our agents.
    Tunnel,
    /// The same thing again.
    TunnelAgain,
    /// Two nodes, two bare relays in the place of agents.
    Relay,
    /// Two nodes, stock ztunnel.
    Ztunnel,
}

/// A load on one variant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    /// In row names.
    pub(super) name: &'static str,
    /// As `tool load --shape` calls it.
    pub(super) load: &'static str,
    /// Connections.
    pub(super) connections: usize,
}

/// What one run gave.
#[derive(Debug, Clone, Default)]
pub(super) struct Measured {
    /// The client's figures.
    pub(super) figures: Figures,
    /// CPU seconds of both proxies during the run.
    pub(super) cpu: f64,
}

/// Everything that a run needs.
pub(super) struct Rig {
    /// The testbed.
    pub(super) bed: Testbed,
    /// The stock peer's two nodes, if a binary was given.
    pub(super) peer: Option<Peer>,
    relays: Vec<Proc>,
    _servers: Vec<Proc>,
    _spinners: Vec<Proc>,
}

fn pod(namespace: &str, name: &str, node: &str, extra: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}{extra}}}\n\
         spec: {{nodeName: {node}, containers: [{{name: main, image: none}}]}}\n---\n"
    )
}

fn objects(peer: bool) -> String {
    let mut yaml = String::from(
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: mesh, labels: {istio.io/dataplane-mode: ambient}}\n---\n\
         apiVersion: v1\nkind: Namespace\nmetadata: {name: plain}\n---\n",
    );
    for namespace in ["mesh", "plain"] {
        yaml += &pod(namespace, "client", "a", "");
        yaml += &pod(namespace, "server", "b", "");
        yaml += &pod(namespace, "near", "a", "");
    }
    if peer {
        let captured = ", annotations: {ambient.istio.io/redirection: enabled}";
        yaml += "apiVersion: v1\nkind: Namespace\nmetadata: {name: peer}\n---\n";
        yaml += &pod("peer", "client", zpeer::NODES[0], captured);
        yaml += &pod("peer", "server", zpeer::NODES[1], captured);
    }
    yaml
}

/// The agents take what the memory bench opens: ten thousand connections of one pod.
pub(super) fn options() -> MeshOptions {
    MeshOptions::agent(&["--max-connections", "15000", "--fair-share", "false"])
}

impl Rig {
    /// Builds and starts everything, and waits until every variant carries traffic.
    ///
    /// # Errors
    /// Something does not start.
    pub(super) fn build(ztunnel: Option<&Path>) -> Result<Self> {
        let nodes: &[&str] = if ztunnel.is_some() { &["a", "b", "c", "d"] } else { &["a", "b"] };
        let mut bed = Testbed::build(&Topology::nodes(nodes), &objects(ztunnel.is_some()))?;
        // One pod holds thousands of connections here.
        let options = options();
        bed.start_control(&options)?;
        for node in ["a", "b"] {
            bed.start_agent(node, &options)?;
        }
        for node in ["a", "b"] {
            bed.wait_agent_ready(node)?;
        }
        bed.wait_enrolled(&["mesh/client", "mesh/server", "mesh/near"])?;
        let peer = ztunnel.map(|binary| Peer::start(&bed, binary)).transpose()?;
        let servers = ["mesh/server", "mesh/near", "plain/server", "plain/near", "peer/server"];
        let servers = servers
            .iter()
            .filter(|key| bed.pods.contains_key(**key))
            .map(|key| serve(&bed, key))
            .collect::<Result<_>>()?;
        let relays = relays(&bed)?;
        let spinners = (0..2).map(|cpu| spinner(&bed, cpu)).collect::<Result<_>>()?;
        let rig = Self { bed, peer, relays, _servers: servers, _spinners: spinners };
        rig.warm_up()?;
        Ok(rig)
    }

    fn warm_up(&self) -> Result<()> {
        for variant in self.variants() {
            wait::until_true(&format!("traffic over {variant:?}"), Duration::from_secs(30), || {
                let one = Shape { name: "warm", load: "crr", connections: 1 };
                let measured = self.run(variant, one, 0.1)?;
                Ok(measured.figures.errors == 0 && measured.figures.ops > 0)
            })?;
        }
        Ok(())
    }

    /// What this rig can run.
    #[must_use]
    pub(super) fn variants(&self) -> Vec<Variant> {
        use Variant::*;
        let mut all = vec![PlainLocal, PlainLocalAgain, Fast, Plain, Tunnel, TunnelAgain, Relay];
        if self.peer.is_some() {
            all.push(Ztunnel);
        }
        all
    }

    /// Runs a load once.
    ///
    /// # Errors
    /// The client fails as a whole.
    pub(super) fn run(&self, variant: Variant, shape: Shape, seconds: f64) -> Result<Measured> {
        let before = self.cpu(variant)?;
        let figures = self.load(variant, shape, seconds)?;
        Ok(Measured { figures, cpu: self.cpu(variant)? - before })
    }

    fn load(&self, variant: Variant, shape: Shape, seconds: f64) -> Result<Figures> {
        let client = self.bed.pod(client_of(variant))?;
        let ports: Vec<u16> = match shape.load {
            "bulk" => vec![SINK],
            "bulkr" => vec![SOURCE],
            "crr" => ECHO_MANY.collect(),
            _ => vec![ECHO],
        };
        let mut argv: Vec<String> = ["mesh-tests", "tool", "load"].map(str::to_owned).to_vec();
        for port in ports {
            argv.extend(["--to".to_owned(), self.target(variant, port)?.to_string()]);
        }
        argv.extend(["--shape".to_owned(), shape.load.to_owned()]);
        argv.extend(["--conns".to_owned(), shape.connections.to_string()]);
        argv.extend(["--seconds".to_owned(), seconds.to_string()]);
        let program = Program { cpu: Some(CLIENT_CPU), ..Program::from(argv) };
        let text = client.output(program).with_context(|| format!("{} over {variant:?}", shape.name))?;
        // A load that holds connections says so first.
        let last = text.lines().last().unwrap_or_default();
        let figures: Figures =
            serde_json::from_str(last).with_context(|| format!("the load said {text:?}"))?;
        if figures.ops == 0 && figures.bytes == 0 {
            bail!("{} over {variant:?} moved nothing: {}", shape.name, figures.first_error);
        }
        Ok(figures)
    }

    /// Where a client of the variant connects.
    ///
    /// # Errors
    /// The rig has no such pod.
    pub(super) fn target(&self, variant: Variant, port: u16) -> Result<SocketAddr> {
        Ok(match variant {
            Variant::PlainLocal | Variant::PlainLocalAgain => self.bed.pod("plain/near")?.at(port),
            Variant::Fast => self.bed.pod("mesh/near")?.at(port),
            Variant::Plain => self.bed.pod("plain/server")?.at(port),
            Variant::Tunnel | Variant::TunnelAgain => self.bed.pod("mesh/server")?.at(port),
            Variant::Ztunnel => self.bed.pod("peer/server")?.at(port),
            Variant::Relay => (net::underlay_v4(net::node_place(self.bed.node("a")?.index)), port).into(),
        })
    }

    fn proxies(&self, variant: Variant) -> Result<Vec<u32>> {
        let agents = |names: &[&str]| -> Result<Vec<u32>> {
            names
                .iter()
                .map(|n| Ok(self.bed.node(n)?.agents.last().context("no agent runs")?.pid()))
                .collect()
        };
        match variant {
            Variant::PlainLocal | Variant::PlainLocalAgain | Variant::Plain => Ok(Vec::new()),
            Variant::Fast => agents(&["a"]),
            Variant::Tunnel | Variant::TunnelAgain => agents(&["a", "b"]),
            Variant::Relay => Ok(self.relays.iter().map(Proc::pid).collect()),
            Variant::Ztunnel => Ok(self.peer.as_ref().map(Peer::pids).unwrap_or_default()),
        }
    }

    /// CPU seconds of both agents so far.
    ///
    /// # Errors
    /// One has ended.
    pub(super) fn agents_cpu(&self) -> Result<f64> {
        self.cpu(Variant::Tunnel)
    }

    fn cpu(&self, variant: Variant) -> Result<f64> {
        self.proxies(variant)?.into_iter().map(cpu_seconds).sum()
    }
}

/// The pod whose program is the client of a variant.
pub(super) fn client_of(variant: Variant) -> &'static str {
    match variant {
        Variant::Fast | Variant::Tunnel | Variant::TunnelAgain => "mesh/client",
        Variant::Ztunnel => "peer/client",
        _ => "plain/client",
    }
}

/// CPU time of every thread of a process, to the nanosecond (clock ticks are 10 ms: too coarse for a short run).
pub(super) fn cpu_seconds(pid: u32) -> Result<f64> {
    let tasks =
        std::fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("process {pid} has ended"))?;
    let mut nanos = 0_u64;
    for task in tasks.flatten() {
        let text = std::fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
        nanos += text.split_whitespace().next().and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(Duration::from_nanos(nanos).as_secs_f64())
}

fn serve(bed: &Testbed, key: &str) -> Result<Proc> {
    let pod = bed.pod(key)?;
    let many = ECHO_MANY.map(|port| ("--echo", port));
    let ports = many.chain([("--echo", ECHO), ("--sink", SINK), ("--source", SOURCE)]);
    let mut argv: Vec<String> = ["mesh-tests", "tool", "serve"].map(str::to_owned).to_vec();
    argv.extend(ports.flat_map(|(flag, port)| [flag.to_owned(), port.to_string()]));
    let server = pod.spawn(Program { cpu: Some(SERVER_CPU), ..Program::from(argv) })?;
    wait::until_true(&format!("server in {key}"), Duration::from_secs(10), || pod.listening(SOURCE))?;
    Ok(server)
}

/// A bare relay on each node in the place of an agent.
fn relays(bed: &Testbed) -> Result<Vec<Proc>> {
    let server = bed.pod("plain/server")?;
    let far = net::underlay_v4(net::node_place(bed.node("b")?.index));
    let routes = |to: &dyn Fn(u16) -> SocketAddr| -> Vec<String> {
        ECHO_MANY
            .chain([ECHO, SINK, SOURCE])
            .flat_map(|port| ["--route".to_owned(), format!("{port}={}", to(port))])
            .collect()
    };
    let start = |name: &str, routes: Vec<String>| -> Result<Proc> {
        let node = bed.node(name)?;
        let mut argv: Vec<String> = ["mesh-tests", "tool", "relay"].map(str::to_owned).to_vec();
        argv.extend(routes);
        let relay = Proc::spawn(&node.agent_place, argv, &node.dir.join("logs/relay.log"))?;
        wait::until_true(&format!("relay on {name}"), Duration::from_secs(10), || {
            net::listening(&node.netns, SOURCE)
        })?;
        Ok(relay)
    };
    Ok(vec![start("a", routes(&|port| (far, port).into()))?, start("b", routes(&|port| server.at(port)))?])
}

/// Keeps a virtual CPU from halting: a halt costs more than what is measured.
pub(super) fn spinner(bed: &Testbed, cpu: usize) -> Result<Proc> {
    let own = std::env::current_exe().context("cannot find the own path")?;
    let argv = ["chrt", "--idle", "0", &own.to_string_lossy(), "tool", "spin"].map(str::to_owned);
    let place = Place { resolv: None, ..bed.underlay_place.clone() };
    Proc::spawn(&place, Program { cpu: Some(cpu), ..Program::from(argv) }, &bed.dir.join("spin.log"))
}
