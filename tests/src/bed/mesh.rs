//! Running the product on a testbed: one control plane, one agent per node.

use super::process::{Place, Proc, Program};
use super::testbed::Testbed;
use super::{http, leftovers, net, netns, run, wait};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// `UM_NO_MESH=1` leaves the mesh away: what then still passes tests nothing of it.
pub fn without_mesh() -> bool {
    std::env::var_os("UM_NO_MESH").is_some_and(|value| value == "1")
}

/// How long the mesh may take to get somewhere on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Options of a mesh, beyond the defaults of the product.
#[derive(Debug, Clone, Default)]
pub struct MeshOptions {
    /// More arguments of every `mesh-node run`.
    pub agent: Vec<String>,
    /// What to run in place of the `mesh-node` binary: another one, or a program that runs it.
    pub agent_command: Option<Vec<String>>,
    /// More arguments of `mesh-control run`.
    pub control: Vec<String>,
    /// Environment of all of them.
    pub env: Vec<(String, String)>,
    /// Where the control plane serves TLS if something stands before it on 15012.
    pub control_port: Option<u16>,
}

impl MeshOptions {
    /// More arguments of every agent.
    pub fn agent(args: &[&str]) -> Self {
        Self { agent: args.iter().map(|&arg| arg.to_owned()).collect(), ..Self::default() }
    }
}

impl Testbed {
    /// Starts control plane and agents and waits until every agent is ready.
    ///
    /// # Errors
    /// A binary is missing, ends, or does not become ready; the message has the end of its log.
    pub fn start_mesh(&mut self, options: &MeshOptions) -> Result<()> {
        if without_mesh() {
            return Ok(());
        }
        self.start_control(options)?;
        let nodes: Vec<String> = self.nodes.keys().cloned().collect();
        for node in &nodes {
            self.start_agent(node, options)?;
        }
        nodes.iter().try_for_each(|node| self.wait_agent_ready(node))
    }

    /// The control plane's state: its CA and keys.
    pub fn state_dir(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// Starts (or starts again) the control plane and waits until it is ready.
    ///
    /// # Errors
    /// As [`Testbed::start_mesh`].
    pub fn start_control(&mut self, options: &MeshOptions) -> Result<()> {
        let program = run::binary("mesh-control")?;
        let mut argv = vec![
            program.to_string_lossy().into_owned(),
            "run".to_owned(),
            format!("--source=dir:{}", self.live.display()),
            format!("--state-dir={}", self.state_dir().display()),
            "--listen-plain=127.0.0.1:15010".to_owned(),
            format!("--listen-tls=[::]:{}", options.control_port.unwrap_or(15_012)),
            "--listen-debug=127.0.0.1:15014".to_owned(),
        ];
        argv.extend(options.control.iter().cloned());
        let program = Program { env: options.env.clone(), ..Program::from(argv) };
        self.control = Some(Proc::spawn(&self.control_place, program, &self.dir.join("control.log"))?);
        wait::until_true("ready control plane", PATIENCE, || {
            if let Some(control) = &mut self.control
                && !control.running()?
            {
                return Err(wait::hopeless(format!(
                    "mesh-control ended: {}",
                    super::process::gist(&control.log())
                )));
            }
            self.control_get("/ready").map(|_| true)
        })
    }

    /// GET on the control plane's debug port.
    ///
    /// # Errors
    /// No answer.
    pub fn control_get(&self, path: &str) -> Result<String> {
        self.control_netns.within(|| http::get_tcp(([127, 0, 0, 1], 15014).into(), path))?
    }

    /// A bearer token for a node.
    ///
    /// # Errors
    /// `mesh-control token` failed.
    pub fn token(&self, node: &str) -> Result<String> {
        self.issue_token(&["--node", node])
    }

    /// A bearer token of a service account, for a pod on a node.
    ///
    /// # Errors
    /// `mesh-control token` failed.
    pub fn service_account_token(&self, node: &str, namespace: &str, account: &str) -> Result<String> {
        self.issue_token(&["--node", node, "--namespace", namespace, "--service-account", account])
    }

    fn issue_token(&self, args: &[&str]) -> Result<String> {
        let out = Command::new(run::binary("mesh-control")?)
            .arg("token")
            .args(args)
            .arg("--state-dir")
            .arg(self.state_dir())
            .output()
            .context("cannot run mesh-control")?;
        if !out.status.success() {
            bail!("mesh-control token: {}", String::from_utf8_lossy(&out.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned())
    }

    /// Starts an agent on a node, beside any that is already there, and does not wait.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_agent(&mut self, node: &str, options: &MeshOptions) -> Result<()> {
        let token = self.token(node)?;
        let root = self.state_dir().join("root-cert.pem");
        let pins = Path::new(leftovers::PINS).join(format!("{}-{node}", self.name));
        let mut argv = match &options.agent_command {
            Some(command) => command.clone(),
            None => vec![run::binary("mesh-node")?.to_string_lossy().into_owned()],
        };
        let node = self.node_mut(node)?;
        let token_file = node.dir.join("token");
        std::fs::write(&token_file, token).context("cannot write the token")?;
        let number = node.agents.len();
        let control = net::underlay_v4(net::CONTROL);
        argv.extend([
            "run".to_owned(),
            format!("--node={}", node.name),
            format!("--xds=https://{control}:15012"),
            "--xds-hostname=istiod.istio-system.svc".to_owned(),
            format!("--token={}", token_file.display()),
            format!("--root-cert={}", root.display()),
            format!("--pods-dir={}", node.dir.join("pods").display()),
            format!("--host-cgroup={}", node.cgroup.display()),
            format!("--pods-cgroup={}", node.cgroup.join("pods").display()),
            format!("--pin-dir={}", pins.display()),
            format!("--run-dir={}", node.dir.join("run").display()),
        ]);
        argv.extend(options.agent.iter().cloned());
        let program = Program { env: options.env.clone(), ..Program::from(argv) };
        let log = node.dir.join(format!("logs/agent-{number}.log"));
        let agent = Proc::spawn(&node.agent_place, program, &log)?;
        node.agents.push(agent);
        Ok(())
    }

    /// Waits until the newest agent of a node says that it is ready.
    ///
    /// # Errors
    /// It ends or does not become ready.
    pub fn wait_agent_ready(&mut self, node: &str) -> Result<()> {
        wait::until_true(&format!("ready agent on {node}"), PATIENCE, || {
            let node = self.node_mut(node)?;
            if let Some(agent) = node.agents.last_mut()
                && !agent.running()?
            {
                return Err(wait::hopeless(format!(
                    "mesh-node ended: {}",
                    super::process::gist(&agent.log())
                )));
            }
            // During an upgrade the readiness port may still be the old agent's: the status says whose it is.
            let status = http::get_unix(&node.dir.join("run/admin.sock"), "/status")?;
            let status: Value = serde_json::from_str(&status).context("/status is no JSON")?;
            if Some(status["pid"].as_u64().unwrap_or(0)) != node.agents.last().map(|agent| agent.pid().into())
            {
                return Ok(false);
            }
            let ready = || http::get_tcp(([127, 0, 0, 1], 15021).into(), "/healthz/ready");
            node.netns.within(ready)?.with_context(|| format!("pending: {}", status["pending"]))?;
            Ok(status["pending"].as_array().is_some_and(Vec::is_empty))
        })
    }

    /// GET on a node's admin socket.
    ///
    /// # Errors
    /// No answer.
    pub fn admin(&self, node: &str, path: &str) -> Result<String> {
        http::get_unix(&self.node(node)?.dir.join("run/admin.sock"), path)
    }

    /// GET of a node's metrics, as Prometheus would scrape them, by curl.
    ///
    /// # Errors
    /// No answer.
    pub fn metrics(&self, node: &str) -> Result<String> {
        let netns = self.node(node)?.netns.path();
        let enter = format!("--net={}", netns.display());
        netns::command("nsenter", [enter.as_str(), "curl", "-sfS", "http://127.0.0.1:15020/metrics"])
    }

    /// Waits until every agent sees a workload with a protocol: `HBONE` (in the mesh) or `TCP`.
    ///
    /// # Errors
    /// It does not happen.
    pub fn wait_protocol(&self, key: &str, protocol: &str) -> Result<()> {
        let (namespace, name) = key.split_once('/').context("a pod is namespace/name")?;
        for node in self.nodes.values().filter(|node| !node.agents.is_empty()) {
            wait::until_true(&format!("{key} as {protocol} workload on {}", node.name), PATIENCE, || {
                let dump: Value = serde_json::from_str(&self.admin(&node.name, "/config_dump")?)
                    .context("/config_dump is no JSON")?;
                let workloads = dump["workloads"].as_array().context("/config_dump has no workloads")?;
                let found = workloads.iter().find(|w| w["name"] == name && w["namespace"] == namespace);
                Ok(found.is_some_and(|w| w["protocol"] == protocol))
            })?;
        }
        Ok(())
    }

    /// Waits until these pods are in the mesh, on every node's view.
    ///
    /// # Errors
    /// It does not happen.
    pub fn wait_enrolled(&self, keys: &[&str]) -> Result<()> {
        if without_mesh() {
            return Ok(());
        }
        keys.iter().try_for_each(|key| self.wait_protocol(key, "HBONE"))
    }

    /// Kills the newest agent of a node, as a crash would.
    ///
    /// # Errors
    /// There is none.
    pub fn kill_agent(&mut self, node: &str) -> Result<()> {
        self.node_mut(node)?.agents.pop().context("no agent runs there")?.kill();
        Ok(())
    }

    /// `meshctl` against a node's admin socket (and the control plane), its standard output.
    ///
    /// # Errors
    /// It failed.
    pub fn meshctl(&self, node: &str, args: &[&str]) -> Result<String> {
        let done = self.run_meshctl(node, args)?;
        Ok(done.ok().with_context(|| format!("meshctl {}", args.join(" ")))?.to_owned())
    }

    /// As [`Testbed::meshctl`], whatever its exit code: a denial is an answer, too.
    ///
    /// # Errors
    /// It said nothing.
    pub fn meshctl_any(&self, node: &str, args: &[&str]) -> Result<String> {
        let done = self.run_meshctl(node, args)?;
        if done.out.trim().is_empty() {
            bail!("meshctl {}: {}", args.join(" "), done.err.trim());
        }
        Ok(done.out)
    }

    /// `meshctl` in some place, asking whom its arguments name.
    ///
    /// # Errors
    /// It cannot be run.
    pub fn meshctl_in(&self, place: &Place, args: &[&str]) -> Result<super::Finished> {
        let mut argv = vec![run::binary("meshctl")?.to_string_lossy().into_owned()];
        argv.extend(args.iter().map(|&arg| arg.to_owned()));
        super::process::finish(place, argv, PATIENCE)
    }

    fn run_meshctl(&self, node: &str, args: &[&str]) -> Result<super::Finished> {
        let socket = self.node(node)?.dir.join("run/admin.sock");
        let program = run::binary("meshctl")?;
        let mut argv = vec![program.to_string_lossy().into_owned()];
        argv.extend(args.iter().map(|&arg| arg.to_owned()));
        argv.extend(["--node".to_owned(), format!("unix:{}", socket.display())]);
        // From the control plane's namespace, where its debug port is; the agent's socket is a file.
        super::process::finish(&self.control_place, argv, PATIENCE)
    }
}
