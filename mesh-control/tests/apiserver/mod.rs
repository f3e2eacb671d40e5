//! A real API server (etcd, kube-apiserver) on loopback, and a control plane beside it: what is asserted is read back
//! with kubectl and with a client of its own.
//!
//! The programs are looked for in `UM_KUBERNETES`, else below `UM_CACHE/kubernetes` (by default in
//! `~/.cache/undermesh`); etcd in `PATH`.

#![allow(dead_code, reason = "each test binary uses its part")]

pub(crate) mod pki;

use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use pki::Pki;

/// The rights that the control plane has in a cluster.
pub(crate) const RBAC: &str = include_str!("rbac.yaml");
/// Everything is waited for at most this long; the machine may be busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A process that ends with its handle.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The running cluster.
pub(crate) struct ApiServer {
    pub(crate) dir: tempfile::TempDir,
    programs: PathBuf,
    port: u16,
    etcd_port: u16,
    etcd: Option<Process>,
    api: Option<Process>,
}

/// Where the Kubernetes programs are, or why this test cannot run.
fn programs() -> Result<PathBuf, String> {
    let has = |dir: &Path| dir.join("kube-apiserver").is_file() && dir.join("kubectl").is_file();
    if let Some(dir) = std::env::var_os("UM_KUBERNETES").map(PathBuf::from) {
        return if has(&dir) { Ok(dir) } else { Err(format!("no kube-apiserver in {}", dir.display())) };
    }
    let cache = std::env::var_os("UM_CACHE")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/undermesh")));
    let root = cache.ok_or("neither UM_CACHE nor HOME is set")?.join("kubernetes");
    let mut found: Vec<PathBuf> = std::fs::read_dir(&root)
        .map(|entries| entries.flatten().map(|e| e.path()).filter(|dir| has(dir)).collect())
        .unwrap_or_default();
    found.sort();
    found.pop().ok_or_else(|| format!("no kube-apiserver below {}", root.display()))
}

/// A port that nobody listens on just now.
pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).map(|a| a.port()).expect("a free port")
}

impl ApiServer {
    /// Starts one; none, with the reason printed, where the programs are not there.
    pub(crate) fn start() -> Option<Self> {
        let programs = match programs() {
            Ok(programs) => programs,
            Err(why) => {
                println!("skipped: {why}; `cargo xtask cluster` builds it");
                return None;
            }
        };
        if Command::new("etcd").arg("--version").stdout(Stdio::null()).status().is_err() {
            println!("skipped: no etcd; apt-get install etcd-server");
            return None;
        }
        let dir = tempfile::tempdir().expect("a directory");
        Pki::make(dir.path());
        let mut server =
            Self { dir, programs, port: free_port(), etcd_port: free_port(), etcd: None, api: None };
        server.start_etcd();
        server.start_api();
        Some(server)
    }

    fn spawn(&self, program: &Path, name: &str, args: &[String]) -> Process {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.dir.path().join(name));
        let log = log.expect("a log");
        let errors = log.try_clone().expect("a log");
        let child = Command::new(program).args(args).stdin(Stdio::null()).stdout(log).stderr(errors).spawn();
        Process(child.unwrap_or_else(|e| panic!("{}: {e}", program.display())))
    }

    pub(crate) fn start_etcd(&mut self) {
        let client = format!("http://127.0.0.1:{}", self.etcd_port);
        let peer = format!("http://127.0.0.1:{}", free_port());
        let args = [
            format!("--data-dir={}", self.dir.path().join("etcd").display()),
            format!("--listen-client-urls={client}"),
            format!("--advertise-client-urls={client}"),
            format!("--listen-peer-urls={peer}"),
            format!("--initial-advertise-peer-urls={peer}"),
            format!("--initial-cluster=default={peer}"),
            "--unsafe-no-fsync".to_owned(),
        ];
        self.etcd = Some(self.spawn(Path::new("etcd"), "etcd.log", &args));
    }

    pub(crate) fn stop_etcd(&mut self) {
        self.etcd = None;
    }

    /// Has etcd forget everything but what is there now.
    pub(crate) fn compact(&self) {
        let ask = |path: &str, body: &str| {
            let url = format!("http://127.0.0.1:{}/v3/kv/{path}", self.etcd_port);
            let output =
                Command::new("curl").args(["-sS", "--fail", "-d", body, &url]).output().expect("curl runs");
            assert!(output.status.success(), "{path}: {}", String::from_utf8_lossy(&output.stderr));
            serde_json::from_slice::<serde_json::Value>(&output.stdout).expect("JSON")
        };
        // The first key, whatever it is: the answer's head has the revision.
        let now = ask("range", r#"{"key": "AA==", "range_end": "AA==", "limit": "1"}"#);
        let revision = now["header"]["revision"].as_str().expect("a revision");
        ask("compaction", &format!("{{\"revision\": \"{revision}\"}}"));
    }

    /// Starts the API server and waits until it is ready.
    pub(crate) fn start_api(&mut self) {
        let file = |name: &str| self.dir.path().join(name).display().to_string();
        let args = [
            format!("--etcd-servers=http://127.0.0.1:{}", self.etcd_port),
            "--bind-address=127.0.0.1".to_owned(),
            "--advertise-address=127.0.0.1".to_owned(),
            "--endpoint-reconciler-type=none".to_owned(),
            format!("--secure-port={}", self.port),
            "--service-cluster-ip-range=10.125.0.0/16".to_owned(),
            format!("--client-ca-file={}", file("ca.crt")),
            format!("--tls-cert-file={}", file("apiserver.crt")),
            format!("--tls-private-key-file={}", file("apiserver.key")),
            format!("--cert-dir={}", file("apiserver-certs")),
            format!("--service-account-key-file={}", file("sa.pub")),
            format!("--service-account-signing-key-file={}", file("sa.key")),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            "--authorization-mode=RBAC".to_owned(),
            // No controller makes default accounts here.
            "--disable-admission-plugins=ServiceAccount".to_owned(),
            "--allow-privileged=true".to_owned(),
        ];
        self.api = Some(self.spawn(&self.programs.join("kube-apiserver"), "apiserver.log", &args));
        self.write_kubeconfig("admin", "client-certificate: admin.crt, client-key: admin.key");
        let ready = Instant::now() + PATIENCE;
        while !self.kubectl(&["get", "--raw", "/readyz"]).status.success() {
            let ended = self.api.as_mut().and_then(|api| api.0.try_wait().ok().flatten());
            if ended.is_some() || Instant::now() > ready {
                let log = std::fs::read_to_string(self.dir.path().join("apiserver.log")).unwrap_or_default();
                panic!("the API server is not ready ({ended:?}):\n{log}");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    pub(crate) fn stop_api(&mut self) {
        self.api = None;
    }

    /// Writes `<name>.kubeconfig` and returns its path.
    fn write_kubeconfig(&self, name: &str, user: &str) -> PathBuf {
        let path = self.dir.path().join(format!("{name}.kubeconfig"));
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: test\n\
             clusters: [{{name: test, cluster: {{server: \"https://127.0.0.1:{}\", certificate-authority: ca.crt}}}}]\n\
             contexts: [{{name: test, context: {{cluster: test, user: test}}}}]\n\
             users: [{{name: test, user: {{{user}}}}}]\n",
            self.port
        );
        std::fs::write(&path, text).expect("the kubeconfig is written");
        path
    }

    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.dir.path().join("admin.kubeconfig")
    }

    /// The kubeconfig of a service account, with exactly its rights.
    pub(crate) fn kubeconfig_of(&self, namespace: &str, account: &str) -> PathBuf {
        let token = self.text(&["create", "token", account, "-n", namespace, "--duration=24h"]);
        self.write_kubeconfig(account, &format!("token: {}", token.trim()))
    }

    pub(crate) fn kubectl(&self, args: &[&str]) -> Output {
        let mut command = Command::new(self.programs.join("kubectl"));
        command.arg("--kubeconfig").arg(self.kubeconfig()).args(args).env("HOME", self.dir.path());
        command.output().expect("kubectl runs")
    }

    /// Standard output of a kubectl that succeeds.
    pub(crate) fn text(&self, args: &[&str]) -> String {
        let output = self.kubectl(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    }

    /// The JSON of an object, null when it is not there.
    pub(crate) fn get(&self, args: &[&str]) -> serde_json::Value {
        let mut all = vec!["get", "-o", "json", "--ignore-not-found"];
        all.extend(args);
        let text = self.text(&all);
        if text.trim().is_empty() {
            serde_json::Value::Null
        } else {
            serde_json::from_str(&text).expect("JSON")
        }
    }

    /// Applies YAML, as somebody else than the control plane.
    pub(crate) fn apply(&self, yaml: &str) {
        let done = self.try_apply(yaml);
        assert!(done.status.success(), "{}\n{yaml}", String::from_utf8_lossy(&done.stderr));
    }

    pub(crate) fn try_apply(&self, yaml: &str) -> Output {
        let mut command = Command::new(self.programs.join("kubectl"));
        command.arg("--kubeconfig").arg(self.kubeconfig()).env("HOME", self.dir.path());
        command.args(["apply", "--server-side", "--force-conflicts", "--field-manager=test", "-f", "-"]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("kubectl starts");
        child.stdin.take().expect("stdin").write_all(yaml.as_bytes()).expect("kubectl reads");
        child.wait_with_output().expect("kubectl ends")
    }

    /// Sets a part of an object's status, as a kubelet or controller would.
    pub(crate) fn set_status(&self, kind: &str, namespace: &str, name: &str, status: &str) {
        let patch = format!("{{\"status\":{status}}}");
        self.text(&[
            "patch",
            kind,
            name,
            "-n",
            namespace,
            "--subresource=status",
            "--type=merge",
            "-p",
            &patch,
        ]);
    }

    /// Installs the published definitions; false, with the reason printed, where they cannot be had.
    pub(crate) fn install_crds(&self, modules: &[(&str, &[&str])]) -> bool {
        for (module, files) in modules {
            let Some(dir) = module_dir(module) else {
                println!("skipped: `go mod download {module}` does not work here");
                return false;
            };
            for file in *files {
                let path = dir.join(file).display().to_string();
                self.text(&["apply", "--server-side", "-f", &path]);
            }
        }
        true
    }
}

/// Istio's definitions, as published.
pub(crate) const ISTIO: (&str, &[&str]) =
    ("istio.io/api@v1.31.4", &["kubernetes/customresourcedefinitions.gen.yaml"]);
/// The Gateway API's.
pub(crate) const GATEWAY_API: (&str, &[&str]) = ("sigs.k8s.io/gateway-api@v1.6.3", &["config/crd/standard"]);

fn module_dir(module: &str) -> Option<PathBuf> {
    let output =
        Command::new("go").args(["mod", "download", "-json", module]).current_dir("/").output().ok()?;
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
    found["Dir"].as_str().map(PathBuf::from)
}

/// Waits for a condition with a deadline.
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "in {} s it did not become true that {what}", PATIENCE.as_secs());
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// `mesh-control run --source kubernetes`, as a process.
pub(crate) struct Control {
    process: Process,
    pub(crate) debug: u16,
    pub(crate) tls: u16,
    pub(crate) log: PathBuf,
    pub(crate) state: PathBuf,
}

impl Control {
    /// Starts one with the rights of a kubeconfig.
    pub(crate) fn start(server: &ApiServer, name: &str, kubeconfig: &Path, more: &[&str]) -> Self {
        let (debug, tls) = (free_port(), free_port());
        let state = server.dir.path().join(format!("state-{name}"));
        let log = server.dir.path().join(format!("{name}.log"));
        let out = std::fs::OpenOptions::new().create(true).append(true).open(&log).expect("a log");
        let child = Command::new(env!("CARGO_BIN_EXE_mesh-control"))
            .args(["run", "--source", "kubernetes", "--listen-plain", "off", "--replica", name])
            .arg(format!("--listen-tls=127.0.0.1:{tls}"))
            .arg(format!("--listen-debug=127.0.0.1:{debug}"))
            .arg("--state-dir")
            .arg(&state)
            .args(more)
            .env("KUBECONFIG", kubeconfig)
            .env("RUST_LOG", "info,mesh_control=debug")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(out)
            .spawn()
            .expect("mesh-control starts");
        Self { process: Process(child), debug, tls, log, state }
    }

    /// GET on the debug port: status and body; none while nobody answers.
    pub(crate) fn get(&self, path: &str) -> Option<(u16, String)> {
        use std::io::Read;
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", self.debug)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
        write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        let status = text.split(' ').nth(1)?.parse().ok()?;
        Some((status, text.split_once("\r\n\r\n")?.1.to_owned()))
    }

    pub(crate) fn json(&self, path: &str) -> serde_json::Value {
        let (_, body) = self.get(path).unwrap_or_else(|| panic!("no answer to {path}: {}", self.logged()));
        serde_json::from_str(&body).unwrap_or_else(|e| panic!("{path}: {e}: {body}"))
    }

    pub(crate) fn wait_ready(&self) {
        let deadline = Instant::now() + PATIENCE;
        while self.get("/ready").is_none_or(|(status, _)| status != 200) {
            assert!(Instant::now() < deadline, "not ready:\n{}", self.logged());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub(crate) fn logged(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// SIGTERM, and the end.
    pub(crate) fn stop(mut self) {
        self.signal("TERM");
        let _ = self.process.0.wait();
    }

    /// Sends a signal, as `STOP`.
    pub(crate) fn signal(&self, name: &str) {
        let pid = self.process.0.id().to_string();
        let sent = Command::new("kill").args([&format!("-{name}"), &pid]).status();
        assert!(sent.is_ok_and(|s| s.success()), "SIG{name}");
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.0.id()
    }
}
