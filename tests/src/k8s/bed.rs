//! The cluster that scenarios run on, and a namespace of their own in it.

use crate::bed::capture::{Capture, Segment};
use crate::bed::{cgroup, netns, run as this_run, wait};
use crate::cluster::kubectl::{self, Kubectl};
use crate::cluster::layout::{Families, Layout, State};
use crate::cluster::life;
use crate::scenarios::skip;
use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// A cluster with at least two nodes.
#[derive(Debug)]
pub struct Bed {
    /// An administrator's client.
    pub kubectl: Kubectl,
    /// Its nodes that are ready, in the order of their names.
    pub nodes: Vec<String>,
    /// How long the API server and the control plane are away, in the scenario that has them away.
    pub away: Duration,
    local: Option<Layout>,
    owned: bool,
    spaces: AtomicU32,
    /// What came of installing the mesh, once that was tried.
    mesh: Mutex<Option<std::result::Result<(), String>>>,
}

/// Namespace of the installation.
pub const SYSTEM: &str = "istio-system";

impl Bed {
    /// The cluster of this machine: the one that is up, or one that ends with this run.
    ///
    /// # Errors
    /// It does not start, or there is nothing to start it from.
    pub fn local(binaries: Option<PathBuf>, images: Option<PathBuf>) -> Result<Self> {
        let layout = Layout::named()?;
        let mut owned = false;
        if !life::healthy(&layout) {
            let (Some(binaries), Some(images)) = (binaries, images) else {
                bail!(
                    "no cluster `{}` is up, and UM_KUBERNETES and UM_IMAGES do not say what to start one from: run \
                     `cargo xtask test k8s`, or `cargo xtask cluster up` first",
                    layout.name()
                );
            };
            let owner = Some(std::process::id());
            life::up(&layout, &life::UpArgs { binaries, images, families: Families::Both, nodes: 2, owner })?;
            owned = true;
        } else if let Some(images) = images {
            crate::cluster::images::load(&layout, &images)?;
        }
        Self::of(life::kubectl(&layout)?, Some(layout), owned)
    }

    /// A second cluster of this machine, of the same programs and images, which ends with what is returned.
    ///
    /// # Errors
    /// It is somebody else's cluster (skipped), or the second one does not start.
    pub fn another(&self, name: &str, families: Families) -> Result<Self> {
        let State { binaries, images, .. } = self.layout()?.state()?;
        let layout = Layout::of(name)?;
        life::down(&layout).context("cannot remove what is left of an earlier cluster")?;
        let owner = Some(std::process::id());
        life::up(&layout, &life::UpArgs { binaries, images, families, nodes: 2, owner })?;
        Self::of(life::kubectl(&layout)?, Some(layout), true)
    }

    /// The cluster that KUBECONFIG names.
    ///
    /// # Errors
    /// It names none, or that has fewer than two nodes.
    pub fn external(binaries: Option<&Path>) -> Result<Self> {
        let kubeconfig = std::env::var_os("KUBECONFIG").filter(|path| !path.is_empty());
        let kubeconfig =
            kubeconfig.context("--external runs on the cluster that KUBECONFIG names: set it")?;
        let program = binaries.map(|dir| dir.join("kubectl")).filter(|path| path.is_file());
        let program = program.unwrap_or_else(|| "kubectl".into());
        Self::of(Kubectl { program, kubeconfig: kubeconfig.into() }, None, false)
    }

    fn of(kubectl: Kubectl, local: Option<Layout>, owned: bool) -> Result<Self> {
        let mut nodes = kubectl.ready_nodes()?;
        nodes.sort();
        let bed = Self {
            kubectl,
            nodes,
            away: Duration::ZERO,
            local,
            owned,
            spaces: AtomicU32::new(0),
            mesh: Mutex::default(),
        };
        if bed.nodes.len() < 2 {
            bail!("the scenarios need two nodes that are ready, and these are: {}", bed.nodes.join(", "));
        }
        Ok(bed)
    }

    /// The cluster of this machine, for scenarios that look at its nodes from outside.
    ///
    /// # Errors
    /// It is somebody else's cluster: the scenario is skipped.
    pub fn layout(&self) -> Result<&Layout> {
        self.local
            .as_ref()
            .ok_or_else(|| skip("only the cluster of this machine can be looked at from outside"))
    }

    /// What curl gets of an address for a host and a path, and the status, as a client outside the cluster.
    ///
    /// # Errors
    /// It is somebody else's cluster (skipped), or there is no answer.
    pub fn ask_from_outside(&self, address: &str, host: &str, path: &str) -> Result<String> {
        let outside = format!("--net={}", Path::new(netns::DIR).join(self.layout()?.prefix()).display());
        let (host, url) = (format!("host: {host}"), format!("http://{address}{path}"));
        let argv = ["curl", "--silent", "--max-time", "5", "-w", " %{http_code}", "-H", &host, &url];
        netns::command("nsenter", [outside.as_str()].into_iter().chain(argv))
    }

    /// The operator's command, for this cluster.
    ///
    /// # Errors
    /// It is not built.
    pub fn meshctl(&self) -> Result<Kubectl> {
        let program = this_run::binary("meshctl")?;
        Ok(Kubectl { program, kubeconfig: self.kubectl.kubeconfig.clone() })
    }

    /// Installs the mesh as an operator does, the first time that a scenario asks for it; the images are those that
    /// the nodes have.
    ///
    /// # Errors
    /// It does not come up.
    pub fn mesh(&self) -> Result<()> {
        let mut tried = self.mesh.lock().unwrap_or_else(PoisonError::into_inner);
        let result = tried.get_or_insert_with(|| {
            let installed = self.definitions().and_then(|()| self.install());
            installed.map_err(|error| format!("{error:#}\n{}", self.mesh_report()))
        });
        result.clone().map_err(|error| anyhow!("the mesh is not installed: {error}"))
    }

    /// Gives the cluster the kinds that policies and gateways are written in, as they are published, unless it has them.
    fn definitions(&self) -> Result<()> {
        let have = |name: &str| self.kubectl.run(&["get", "crd", name]).is_ok();
        if have("peerauthentications.security.istio.io") && have("gateways.gateway.networking.k8s.io") {
            return Ok(());
        }
        let Some(dir) = std::env::var_os("UM_DEFINITIONS").filter(|dir| !dir.is_empty()) else {
            bail!(
                "the cluster has no definitions of Istio's and the Gateway API's kinds: run `cargo xtask test k8s`, or \
                 set UM_DEFINITIONS to a directory of them"
            );
        };
        let dir = dir.to_string_lossy();
        self.kubectl.run(&["apply", "--server-side", "--recursive", "-f", &dir])?;
        self.kubectl.run(&["wait", "--for=condition=Established", "--timeout=30s", "crd", "--all"]).map(drop)
    }

    /// Installs it, or brings it up to date.
    ///
    /// # Errors
    /// It does not come up.
    pub fn install(&self) -> Result<()> {
        let there = self.kubectl.run(&["--namespace", SYSTEM, "get", "daemonset", "undermesh-node"]).is_ok();
        if there {
            // Another build may be behind the same tag.
            let parts = ["daemonset/undermesh-node", "deployment/istiod"];
            for part in parts {
                self.kubectl.run(&["--namespace", SYSTEM, "rollout", "restart", part])?;
            }
        }
        let verb = if there { "upgrade" } else { "install" };
        let settings = ["--set", "image.tag=dev", "--set", "node.drainSeconds=5", "--wait-timeout", "120s"];
        self.meshctl()?.run(&[&[verb][..], &settings].concat())?;
        Ok(())
    }

    /// What the mesh's own pods are and say, for a report.
    pub fn mesh_report(&self) -> String {
        let say = |args: &[&str]| {
            let args: Vec<&str> = ["--namespace", SYSTEM].iter().chain(args).copied().collect();
            self.kubectl.run(&args).unwrap_or_else(|error| format!("{error:#}"))
        };
        let mut text = say(&["get", "pods", "-o", "wide"]);
        for app in ["istiod", "undermesh-node"] {
            let label = format!("app={app}");
            let logs = say(&["logs", "--selector", &label, "--tail=12", "--prefix", "--all-containers"]);
            text += &format!("--- {app}\n{logs}\n");
        }
        text
    }

    /// A capture of all that goes in and out of a node, on the bridge between nodes.
    ///
    /// # Errors
    /// It is somebody else's cluster (skipped), or tcpdump does not start.
    pub fn capture(&self, node: &str) -> Result<Watched> {
        let layout = self.layout()?;
        let netns = Path::new(netns::DIR).join(layout.prefix());
        let n = self.spaces.fetch_add(1, Ordering::Relaxed);
        let name = format!("um-{}-{n}", std::process::id());
        let cgroup = cgroup::Tree::create(&name)?;
        let place = cgroup.child("capture")?;
        let dir = this_run::dir_of(&name);
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let capture = Capture::start(&netns, &place, node, &dir)?;
        Ok(Watched { capture: Some(capture), dir, _cgroup: cgroup })
    }

    /// A namespace of one's own, with labels.
    ///
    /// # Errors
    /// The API server refuses it.
    pub fn space(&self, labels: &[(&str, &str)]) -> Result<Space<'_>> {
        let n = self.spaces.fetch_add(1, Ordering::Relaxed);
        let name = format!("um-{}-{n}", std::process::id());
        let labels: serde_json::Map<String, Value> =
            labels.iter().map(|(key, value)| ((*key).to_owned(), Value::from(*value))).collect();
        let object = serde_json::json!({
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": name, "labels": labels},
        });
        self.kubectl.apply(&object.to_string())?;
        Ok(Space { bed: self, name })
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if let (true, Some(layout)) = (self.owned, &self.local)
            && let Err(error) = life::down(layout)
        {
            eprintln!("warning: the cluster is not gone: {error:#}");
        }
    }
}

/// A running capture with what it needs.
#[derive(Debug)]
pub struct Watched {
    capture: Option<Capture>,
    dir: PathBuf,
    _cgroup: cgroup::Tree,
}

impl Watched {
    /// Ends it; what it saw.
    ///
    /// # Errors
    /// tcpdump wrote no readable file.
    pub fn stop(mut self) -> Result<Vec<Segment>> {
        self.capture.take().context("the capture has ended")?.stop()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.capture = None;
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// A namespace of a scenario; deleted on drop, and what was in it is remembered for a report.
#[derive(Debug)]
pub struct Space<'a> {
    bed: &'a Bed,
    name: String,
}

impl Space<'_> {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Makes objects of this namespace.
    ///
    /// # Errors
    /// One is refused.
    pub fn apply(&self, yaml: &str) -> Result<()> {
        let args = ["apply", "--server-side", "--force-conflicts", "--namespace", &self.name, "-f", "-"];
        self.bed.kubectl.feed(&args, yaml).map(drop)
    }

    /// kubectl in this namespace; its output.
    ///
    /// # Errors
    /// It failed.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        let args: Vec<&str> = ["--namespace", &self.name].into_iter().chain(args.iter().copied()).collect();
        self.bed.kubectl.run(&args)
    }

    /// An object of this namespace.
    ///
    /// # Errors
    /// It is not there.
    pub fn get(&self, kind: &str, name: &str) -> Result<Value> {
        self.bed.kubectl.json(&["--namespace", &self.name, "get", kind, name])
    }

    /// Waits until every pod of a list is ready.
    ///
    /// # Errors
    /// One is not in time.
    pub fn wait_ready(&self, pods: &[&str]) -> Result<()> {
        wait::until_true(&format!("ready pods {}", pods.join(", ")), Duration::from_secs(60), || {
            let list = self.bed.kubectl.json(&["--namespace", &self.name, "get", "pods"])?;
            let items = list["items"].as_array().cloned().unwrap_or_default();
            Ok(pods.iter().all(|pod| {
                items.iter().any(|item| kubectl::name(item) == *pod && kubectl::has_condition(item, "Ready"))
            }))
        })
    }

    /// The address of a pod.
    ///
    /// # Errors
    /// It has none yet.
    pub fn address(&self, pod: &str) -> Result<IpAddr> {
        let object = self.get("pod", pod)?;
        let address = object["status"]["podIP"].as_str().and_then(|text| text.parse().ok());
        address.with_context(|| format!("pod {pod} has no address"))
    }

    /// The address of a pod and its server's port, [`super::pods::PORT`].
    ///
    /// # Errors
    /// It has none yet.
    pub fn server(&self, pod: &str) -> Result<SocketAddr> {
        let port = super::pods::PORT.parse().context("no port")?;
        Ok(SocketAddr::new(self.address(pod)?, port))
    }

    /// Runs a program in a pod; its output.
    ///
    /// # Errors
    /// It failed, with what it said.
    pub fn exec(&self, pod: &str, argv: &[&str]) -> Result<String> {
        let args: Vec<&str> = ["exec", pod, "--"].into_iter().chain(argv.iter().copied()).collect();
        self.kubectl(&args)
    }

    /// A GET from a pod; the body of an answer below 400.
    ///
    /// # Errors
    /// No answer within five seconds, or one that says no.
    pub fn curl(&self, pod: &str, url: &str) -> Result<String> {
        self.exec(pod, &["curl", "--silent", "--show-error", "--fail", "--max-time", "5", url])
    }

    /// Sets or, with `None`, removes a label of the namespace.
    ///
    /// # Errors
    /// The API server refuses it.
    pub fn label(&self, key: &str, value: Option<&str>) -> Result<()> {
        let change = value.map_or_else(|| format!("{key}-"), |value| format!("{key}={value}"));
        self.bed.kubectl.run(&["label", "--overwrite", "namespace", &self.name, &change]).map(drop)
    }

    /// Waits until the kernel has listeners of the agent in every pod of a list, or in none: beside the pod's own, on
    /// [`super::pods::PORT`], there is nobody who listens in a pod of these scenarios.
    ///
    /// # Errors
    /// It is not so in time.
    pub fn wait_captured(&self, pods: &[&str], captured: bool) -> Result<()> {
        let what = if captured { "captured" } else { "released" };
        wait::until_true(&format!("{what} pods {}", pods.join(", ")), Duration::from_secs(30), || {
            for pod in pods {
                let listeners = self.exec(pod, &["ss", "-Hltn", "not", "sport", "=", super::pods::PORT])?;
                if listeners.trim().is_empty() == captured {
                    return Ok(false);
                }
            }
            Ok(true)
        })
    }

    fn report(&self) -> String {
        let pods = self.kubectl(&["get", "pods", "-o", "wide"]).unwrap_or_default();
        let pods = crate::bed::process::tail(&pods, 12);
        let events = self.kubectl(&["get", "events", "--sort-by=.lastTimestamp"]).unwrap_or_default();
        let mesh = self.bed.mesh.lock().is_ok_and(|tried| tried.is_some());
        let mesh = if mesh { self.bed.mesh_report() } else { String::new() };
        format!("{pods}\n{}\n{mesh}", crate::bed::process::tail(&events, 20))
    }
}

impl Drop for Space<'_> {
    fn drop(&mut self) {
        this_run::remember_logs(self.report());
        let _ = self.bed.kubectl.run(&["delete", "namespace", &self.name, "--wait=false"]);
    }
}
