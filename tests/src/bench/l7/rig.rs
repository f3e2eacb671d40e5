//! The bench's testbed: one node, a server, and a pod for each proxy. The proxy that is measured has a CPU to itself.

use super::load::{self, Load, Served};
use super::peers::{PORT, PORT_HTTP2, Peer, Servers};
use super::routes::{self, GRPC_PORT, HEADER, MESH_VIP, SERVER_PORTS};
use crate::bed::mesh::MeshOptions;
use crate::bed::process::{self, Proc, Program};
use crate::bed::tokens::Tokens;
use crate::bed::{Testbed, Topology, wait};
use crate::bench::rig::{cpu_seconds, spinner};
use crate::scenarios::nginx_conf;
use anyhow::{Context, Result};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(30);
/// Loads and servers run here, the proxies on the other.
pub(super) const LOAD_CPU: usize = 0;
const PROXY_CPU: usize = 1;

/// What stands between client and server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Variant {
    /// Nothing.
    Direct,
    /// Our gateway, plain in and out.
    Ours,
    /// The same thing again.
    Again,
    /// Our gateway with everything on.
    Full,
    /// Our waypoint, HBONE in and out.
    Hbone,
    /// Somebody else's proxy.
    Peer(Peer),
    /// A bare relay on hyper.
    Relay,
}

/// A load on a variant.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Measured {
    pub(super) served: Served,
    /// CPU seconds of the proxy.
    pub(super) cpu: f64,
}

/// Everything that a run needs.
pub(super) struct Rig {
    pub(super) bed: Testbed,
    proxies: HashMap<Variant, Proc>,
    pub(super) tokens: Tokens,
    _helpers: Vec<Proc>,
}

/// Arguments of our gateways beside those of any waypoint.
pub(super) const GATEWAY: [&str; 2] = ["--role=gateway", "--workers=1"];

impl Rig {
    /// Builds and starts everything but the proxies.
    ///
    /// # Errors
    /// Something does not start.
    pub(super) fn build() -> Result<Self> {
        let mut bed = Testbed::build(&Topology::nodes(&["a"]), &routes::base())?;
        bed.start_mesh(&MeshOptions::default())?;
        bed.wait_enrolled(&["mesh/client", "mesh/server"])?;
        let tokens = Tokens::issue(&bed.dir)?;
        let mut helpers = Vec::new();
        for pod in ["bench/server", "mesh/server"] {
            helpers.push(server(&bed, pod)?);
        }
        for cpu in 0..2 {
            helpers.push(spinner(&bed, cpu)?);
        }
        let gateways: Vec<String> = ["gateway", "full"].iter().map(|name| routes::gateway(name)).collect();
        bed.apply("settings", routes::SETTINGS)?;
        bed.apply("gateways", &gateways.concat())?;
        bed.apply("routes", &routes::routes(&["gateway", "full"]))?;
        bed.apply("policies", &routes::policies("full", &tokens.keys))?;
        Ok(Self { bed, proxies: HashMap::new(), tokens, _helpers: helpers })
    }

    /// Starts our proxies and whatever of the others the machine has.
    ///
    /// # Errors
    /// One does not come to carry requests.
    pub(super) fn start_proxies(&mut self) -> Result<()> {
        self.start(Variant::Ours)?;
        self.start(Variant::Full)?;
        self.start(Variant::Relay)?;
        for peer in Peer::ALL.into_iter().filter(|peer| peer.program().is_some()) {
            self.start(Variant::Peer(peer))?;
        }
        self.bed.deploy_waypoint(&routes::waypoint())?;
        let pid = self.pid(Variant::Hbone)?.context("the waypoint does not run")?.to_string();
        let cpu = PROXY_CPU.to_string();
        crate::bed::netns::command("taskset", ["-a", "-c", "-p", &cpu, &pid])?;
        for variant in self.variants() {
            self.answers(variant)?;
        }
        Ok(())
    }

    fn start(&mut self, variant: Variant) -> Result<()> {
        let argv = self.command(variant)?;
        let program = Program { cpu: Some(PROXY_CPU), ..Program::from(argv) };
        let process = self.bed.pod(&pod_of(variant))?.spawn(program)?;
        self.proxies.insert(variant, process);
        Ok(())
    }

    /// What runs a proxy.
    ///
    /// # Errors
    /// It is not there.
    pub(super) fn command(&self, variant: Variant) -> Result<Vec<String>> {
        let server = self.bed.pod("bench/server")?;
        let [v1, v2] = SERVER_PORTS;
        match variant {
            Variant::Peer(peer) => {
                let program = peer.program().context(peer.missing())?;
                let http = [server.at(v1), server.at(v2)];
                peer.command(&program, &self.bed.dir, Servers { http, grpc: server.at(GRPC_PORT) })
            }
            Variant::Relay => {
                let argv = ["mesh-tests", "tool", "http-relay"].map(str::to_owned);
                let listen = format!("--listen=0.0.0.0:{PORT}");
                Ok(argv.into_iter().chain([listen, format!("--to={}", server.at(v1))]).collect())
            }
            _ => {
                let name = if variant == Variant::Full { "full" } else { "gateway" };
                let mut argv = self.gateway_command(name)?;
                argv.push(format!("--access-log={}", variant == Variant::Full));
                Ok(argv)
            }
        }
    }

    /// What runs a gateway of ours.
    ///
    /// # Errors
    /// The binary is missing.
    pub(super) fn gateway_command(&self, name: &str) -> Result<Vec<String>> {
        let mut argv = self.bed.waypoint_command("bench", name, "a")?;
        argv.extend(GATEWAY.map(str::to_owned));
        Ok(argv)
    }

    /// What there is to measure.
    #[must_use]
    pub(super) fn variants(&self) -> Vec<Variant> {
        let mut all = vec![Variant::Direct, Variant::Ours, Variant::Again, Variant::Full, Variant::Hbone];
        let others = [Variant::Relay].into_iter().chain(Peer::ALL.map(Variant::Peer));
        all.extend(others.filter(|variant| self.proxies.contains_key(variant)));
        all
    }

    /// Waits until a variant carries requests.
    fn answers(&self, variant: Variant) -> Result<()> {
        let url = format!("http://{}/item", self.target(variant, Load::Http1)?);
        let mut argv = vec!["curl".to_owned(), "-s".into(), "-o".into(), "/dev/null".into()];
        argv.extend(["-w".to_owned(), "%{http_code}".into(), "--max-time".into(), "5".into()]);
        for header in [vec![format!("{HEADER}: yes")], self.headers(variant)].concat() {
            argv.extend(["-H".to_owned(), header]);
        }
        argv.push(url);
        wait::until_true(&format!("answers through {variant:?}"), SOON, || {
            Ok(self.client(variant)?.run(argv.clone())?.out == "200")
        })
        .with_context(|| self.log(variant))
    }

    fn log(&self, variant: Variant) -> String {
        self.proxies.get(&variant).map(|proxy| process::gist(&proxy.log())).unwrap_or_default()
    }

    fn headers(&self, variant: Variant) -> Vec<String> {
        match variant {
            Variant::Full => vec![format!("authorization: Bearer {}", self.tokens.good)],
            _ => Vec::new(),
        }
    }

    fn client(&self, variant: Variant) -> Result<&crate::bed::Pod> {
        self.bed.pod(if variant == Variant::Hbone { "mesh/client" } else { "bench/client" })
    }

    /// Where a load on a variant goes.
    ///
    /// # Errors
    /// The rig has no such pod.
    pub(super) fn target(&self, variant: Variant, load: Load) -> Result<SocketAddr> {
        let two_ports = matches!(variant, Variant::Peer(Peer::Haproxy | Peer::Nginx));
        let port = if load == Load::Http2 && two_ports { PORT_HTTP2 } else { PORT };
        Ok(match variant {
            Variant::Direct => self.bed.pod("bench/server")?.at(SERVER_PORTS[0]),
            Variant::Hbone => (MESH_VIP.parse::<std::net::Ipv4Addr>().context("no address")?, 80).into(),
            _ => self.bed.pod(&pod_of(variant))?.at(port),
        })
    }

    /// Process id of a variant's proxy.
    ///
    /// # Errors
    /// It does not run.
    pub(super) fn pid(&self, variant: Variant) -> Result<Option<u32>> {
        Ok(match variant {
            Variant::Direct => None,
            Variant::Hbone => {
                let pod = self.bed.pod("mesh/wp")?;
                Some(pod.programs.first().context("the waypoint does not run")?.pid())
            }
            Variant::Again => self.proxies.get(&Variant::Ours).map(Proc::pid),
            _ => self.proxies.get(&variant).map(Proc::pid),
        })
    }

    /// Runs a load once.
    ///
    /// # Errors
    /// A request was not answered with success.
    pub(super) fn run(&self, variant: Variant, load: Load, seconds: f64) -> Result<Measured> {
        self.run_path(variant, load, "/item", seconds)
    }

    /// The same for a path.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub(super) fn run_path(
        &self,
        variant: Variant,
        load: Load,
        path: &str,
        seconds: f64,
    ) -> Result<Measured> {
        self.run_at(variant, self.target(variant, load)?, self.pid(variant)?, load, path, seconds)
    }

    /// The same against a proxy that is none of the variants.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub(super) fn run_at(
        &self,
        variant: Variant,
        to: SocketAddr,
        pid: Option<u32>,
        load: Load,
        path: &str,
        seconds: f64,
    ) -> Result<Measured> {
        let cpu = || pid.map_or(Ok(0.0), cpu_seconds);
        let times = self.bed.dir.join("times");
        let _ = std::fs::remove_file(&times);
        let times_path = times.display().to_string();
        let argv = load::command(load, to, path, seconds, &self.headers(variant), &times_path);
        let program = Program { cpu: Some(LOAD_CPU), ..Program::from(argv) };
        let before = cpu()?;
        let text = self.client(variant)?.output(program).with_context(|| format!("load on {variant:?}"))?;
        let cpu = cpu()? - before;
        let times = std::fs::read_to_string(&times).unwrap_or_default();
        let served = load::read(load, &text, &times).with_context(|| format!("{load:?} on {variant:?}"))?;
        Ok(Measured { served, cpu })
    }
}

/// The pod of a variant's proxy.
pub(super) fn pod_of(variant: Variant) -> String {
    match variant {
        Variant::Direct | Variant::Hbone => "bench/server".to_owned(),
        Variant::Ours | Variant::Again => "bench/gateway".to_owned(),
        Variant::Full => "bench/full".to_owned(),
        Variant::Peer(peer) => format!("bench/{}", peer.name()),
        Variant::Relay => "bench/relay".to_owned(),
    }
}

/// nginx in a pod, on the ports of both versions, with a body of 1 KiB.
fn server(bed: &Testbed, pod: &str) -> Result<Proc> {
    let dir = bed.dir.join(format!("nginx-{}", pod.replace('/', "-")));
    let body = "x".repeat(1024);
    let [v1, v2] = SERVER_PORTS;
    let servers = format!(
        "server {{ listen {v1}; listen {v2}; keepalive_requests 1000000000; keepalive_timeout 3600s;
          location / {{ return 200 '{body}'; }} }}"
    );
    let config = nginx_conf(&dir, &servers)?;
    let nginx = process::find("nginx").context("no nginx: run `cargo xtask setup`")?;
    let argv = [nginx.display().to_string(), "-c".into(), config.display().to_string()];
    let pod = bed.pod(pod)?;
    let server = pod.spawn(Program { cpu: Some(LOAD_CPU), ..Program::from(argv) })?;
    wait::until_true("nginx", SOON, || pod.listening(v2))?;
    Ok(server)
}
