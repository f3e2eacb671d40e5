//! Building a testbed from YAML and a list of nodes, and changing it while it runs.

use super::cgroup::Tree;
use super::net::{self, Link};
use super::netns::Netns;
use super::objects::{self, PodSpec};
use super::pod::PATIENCE;
use super::process::{Place, Proc, Program};
use super::{Pod, leftovers, netns, run, wait};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// What to build.
#[derive(Debug, Clone, Default)]
pub struct Topology {
    /// Node names.
    pub nodes: Vec<String>,
    /// Labels of every Node object: (node, key, value).
    pub labels: Vec<(String, String, String)>,
    /// The underlay.
    pub link: Link,
}

impl Topology {
    /// Nodes by name, on a perfect link.
    pub fn nodes(names: &[&str]) -> Self {
        Self { nodes: names.iter().map(|&name| name.to_owned()).collect(), ..Self::default() }
    }
}

/// A node: a namespace that routes for its pods.
#[derive(Debug)]
pub struct Node {
    /// Name, as in Pods' `spec.nodeName`.
    pub name: String,
    /// Its agents, the newest last; older ones may be draining.
    pub agents: Vec<Proc>,
    /// Its number, from 1.
    pub index: u8,
    /// Pod directory, logs, the agent's run directory.
    pub dir: PathBuf,
    /// Where the agent runs.
    pub agent_place: Place,
    /// Where the kubelet's probes come from.
    pub kubelet_place: Place,
    /// Its cgroup, with everything of the node below.
    pub cgroup: PathBuf,
    /// Its network namespace.
    pub netns: Netns,
    next_pod: u16,
}

impl Node {
    /// Its `n`th agent, the oldest first.
    ///
    /// # Errors
    /// There is none.
    pub fn agent(&self, n: usize) -> Result<&Proc> {
        self.agents.get(n).with_context(|| format!("node {} has no agent {n}", self.name))
    }

    /// As [`Node::agent`], to change.
    ///
    /// # Errors
    /// There is none.
    pub fn agent_mut(&mut self, n: usize) -> Result<&mut Proc> {
        self.agents.get_mut(n).with_context(|| format!("node {} has no agent {n}", self.name))
    }
}

/// A testbed. Everything it made goes when it is dropped.
#[derive(Debug)]
pub struct Testbed {
    /// Leads every name of it.
    pub name: String,
    /// Logs and state.
    pub dir: PathBuf,
    /// What the control plane reads.
    pub live: PathBuf,
    /// Pods by `namespace/name`.
    pub pods: BTreeMap<String, Pod>,
    /// The control plane, once started.
    pub control: Option<Proc>,
    /// Other programs of the testbed (a DNS server).
    pub others: Vec<Proc>,
    /// Nodes by name.
    pub nodes: BTreeMap<String, Node>,
    /// Documents by file, as last applied.
    files: BTreeMap<String, Vec<Value>>,
    link: Link,
    /// Where the control plane runs.
    pub control_place: Place,
    /// Where captures run.
    pub underlay_place: Place,
    /// Killed and removed before the namespaces.
    cgroup: Tree,
    /// The control plane's namespace.
    pub control_netns: Netns,
    /// The bridge between nodes.
    pub underlay: Netns,
}

impl Testbed {
    /// Builds nodes and starts the pods of `yaml`; the mesh is started separately, see [`super::mesh`].
    ///
    /// # Errors
    /// Not root, a missing kernel feature, bad YAML, or a pod whose program does not start.
    pub fn build(topology: &Topology, yaml: &str) -> Result<Self> {
        let name = run::next_name();
        let dir = run::dir_of(&name);
        let live = dir.join("live");
        std::fs::create_dir_all(&live).with_context(|| format!("cannot make {}", live.display()))?;
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o700))
            .context("cannot restrict a directory")?;
        let cgroup = Tree::create(&name)?;
        let underlay = net::underlay(&format!("{name}-net"), topology.link)?;
        let control_netns = net::attach(
            &format!("{name}-ctl"),
            &underlay,
            net::CONTROL,
            Link { mtu: topology.link.mtu, ..Link::default() },
        )?;
        let place = |netns: &Netns, cgroup: PathBuf| Place { netns: netns.path(), cgroup, resolv: None };
        let mut bed = Self {
            control_place: place(&control_netns, cgroup.child("control")?),
            underlay_place: place(&underlay, cgroup.child("underlay")?),
            name,
            dir,
            live,
            pods: BTreeMap::new(),
            control: None,
            others: Vec::new(),
            nodes: BTreeMap::new(),
            files: BTreeMap::new(),
            link: topology.link,
            cgroup,
            control_netns,
            underlay,
        };
        let count = u8::try_from(topology.nodes.len()).context("at most 200 nodes")?;
        for (name, index) in topology.nodes.iter().zip(1..) {
            bed.add_node(name, index, count)?;
        }
        let control_routes: Vec<String> = (1..=count)
            .flat_map(|i| {
                let place = net::node_place(i);
                [
                    format!("route add 10.30.{i}.0/24 via {}", net::underlay_v4(place)),
                    format!("route add fd30:0:0:{i:x}::/64 via {}", net::underlay_v6(place)),
                ]
            })
            .collect();
        bed.control_netns.batch(&control_routes)?;
        bed.write_nodes(topology)?;
        bed.apply("objects", yaml)?;
        Ok(bed)
    }

    fn add_node(&mut self, name: &str, index: u8, count: u8) -> Result<()> {
        let full = format!("{}-{name}", self.name);
        let netns = net::attach(&full, &self.underlay, net::node_place(index), self.link)?;
        net::routes(&netns, index, count)?;
        let dir = self.dir.join(name);
        for (sub, mode) in [("", 0o700), ("pods", 0o700), ("run", 0o700), ("logs", 0o700)] {
            let path = dir.join(sub);
            std::fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode))
                .context("cannot restrict a directory")?;
        }
        let place = |cgroup| Place { netns: netns.path(), cgroup, resolv: None };
        let node = Node {
            agents: Vec::new(),
            index,
            dir,
            agent_place: place(self.cgroup.child(&format!("{name}/agent"))?),
            kubelet_place: place(self.cgroup.child(&format!("{name}/kubelet"))?),
            cgroup: self.cgroup.child(name)?,
            name: name.to_owned(),
            netns,
            next_pod: 1,
        };
        self.cgroup.child(&format!("{name}/pods"))?;
        self.nodes.insert(name.to_owned(), node);
        Ok(())
    }

    fn write_nodes(&self, topology: &Topology) -> Result<()> {
        let docs: Vec<Value> = self
            .nodes
            .values()
            .map(|node| {
                let place = net::node_place(node.index);
                let labels: Vec<(String, String)> = topology
                    .labels
                    .iter()
                    .filter(|(name, ..)| *name == node.name)
                    .map(|(_, key, value)| (key.clone(), value.clone()))
                    .collect();
                objects::node(
                    &node.name,
                    &[net::underlay_v4(place).into(), net::underlay_v6(place).into()],
                    &labels,
                )
            })
            .collect();
        self.write_live("00-nodes", &objects::write(&docs)?)
    }

    /// Puts objects into force: starts new pods, stops pods that are no longer in the file, and gives the rest to the
    /// control plane as file `name`.
    ///
    /// # Errors
    /// Bad YAML, or a pod that does not start.
    pub fn apply(&mut self, name: &str, yaml: &str) -> Result<()> {
        let docs = objects::documents(yaml)?;
        self.apply_documents(name, docs)
    }

    fn apply_documents(&mut self, name: &str, docs: Vec<Value>) -> Result<()> {
        let specs: Vec<PodSpec> =
            docs.iter().filter(|doc| objects::is_pod(doc)).map(objects::pod).collect::<Result<_>>()?;
        let before = self.files.get(name).map(Vec::as_slice).unwrap_or_default();
        let gone: Vec<String> = before
            .iter()
            .filter(|doc| objects::is_pod(doc))
            .filter_map(|doc| Some(objects::pod(doc).ok()?.key()))
            .filter(|key| !specs.iter().any(|spec| spec.key() == *key))
            .collect();
        for spec in &specs {
            match self.pods.get_mut(&spec.key()) {
                Some(pod) => pod.spec = spec.clone(),
                None => self.start_pod(spec)?,
            }
        }
        self.files.insert(name.to_owned(), docs);
        self.publish(name)?;
        for key in gone {
            self.stop_pod(&key)?;
        }
        Ok(())
    }

    /// Writes a file of the control plane's directory, pods with their status.
    fn publish(&self, name: &str) -> Result<()> {
        let docs = self.files.get(name).map(Vec::as_slice).unwrap_or_default();
        let mut shown = Vec::with_capacity(docs.len());
        for doc in docs {
            shown.push(if objects::is_pod(doc) {
                self.with_status(&objects::pod(doc)?)?
            } else {
                doc.clone()
            });
        }
        self.write_live(name, &objects::write(&shown)?)
    }

    fn with_status(&self, spec: &PodSpec) -> Result<Value> {
        let pod = self.pod(&spec.key())?;
        let node = self.node(&spec.node)?;
        let host = IpAddr::V4(net::underlay_v4(net::node_place(node.index)));
        let ready =
            spec.object.pointer("/metadata/annotations/undermesh.test~1ready") != Some(&json!("false"));
        Ok(spec.with_status(pod.v4, Some(pod.v6), host, ready))
    }

    /// Writes text as it is into the control plane's directory.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn write_live(&self, name: &str, text: &str) -> Result<()> {
        let temporary = self.dir.join(format!(".{name}.new"));
        let path = self.live.join(format!("{name}.yaml"));
        std::fs::write(&temporary, text).with_context(|| format!("cannot write {}", temporary.display()))?;
        std::fs::rename(&temporary, &path).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Takes a file back, with its pods.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn remove(&mut self, name: &str) -> Result<()> {
        let docs = self.files.remove(name).unwrap_or_default();
        let path = self.live.join(format!("{name}.yaml"));
        if path.exists() {
            std::fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
        for doc in docs.iter().filter(|doc| objects::is_pod(doc)) {
            self.stop_pod(&objects::pod(doc)?.key())?;
        }
        Ok(())
    }

    /// Changes every object of a kind and name by a closure, and publishes the files it is in.
    ///
    /// # Errors
    /// There is none.
    pub fn edit(&mut self, kind: &str, name: &str, change: impl Fn(&mut Value)) -> Result<()> {
        let mut files = Vec::new();
        for (file, docs) in &mut self.files {
            for doc in docs.iter_mut() {
                if doc["kind"] == kind && doc["metadata"]["name"] == name {
                    change(doc);
                    files.push(file.clone());
                }
            }
        }
        if files.is_empty() {
            bail!("no {kind} {name} was applied");
        }
        files.dedup();
        files.iter().try_for_each(|file| self.publish(file))
    }

    /// Sets a label of an object; `None` removes it.
    ///
    /// # Errors
    /// As [`Testbed::edit`].
    pub fn label(&mut self, kind: &str, name: &str, key: &str, value: Option<&str>) -> Result<()> {
        self.edit(kind, name, |doc| match value {
            Some(value) => doc["metadata"]["labels"][key] = json!(value),
            None => {
                if let Some(labels) = doc.pointer_mut("/metadata/labels").and_then(Value::as_object_mut) {
                    labels.remove(key);
                }
            }
        })
    }

    fn start_pod(&mut self, spec: &PodSpec) -> Result<()> {
        run::check()?;
        let node = self.nodes.get_mut(&spec.node).with_context(|| {
            format!("pod {}: spec.nodeName is {:?}, which the topology does not have", spec.key(), spec.node)
        })?;
        let n = node.next_pod;
        node.next_pod += 1;
        let name = format!("{}-{}-{n}", self.name, node.name);
        let netns = net::pod(&name, &node.netns, node.index, n, self.link.mtu)?;
        let uid = spec.uid();
        let cgroup = self.cgroup.child(&format!("{}/pods/{uid}", node.name))?;
        let dir = node.dir.join("logs");
        let resolv = dir.join(format!("{}.{}.resolv.conf", spec.namespace, spec.name));
        let search = format!("{}.svc.cluster.local svc.cluster.local cluster.local", spec.namespace);
        let text = format!(
            "nameserver {}\nsearch {search}\noptions ndots:5 timeout:2\n",
            net::underlay_v4(net::CONTROL)
        );
        std::fs::write(&resolv, text).with_context(|| format!("cannot write {}", resolv.display()))?;
        let mut pod = Pod {
            v4: net::pod_v4(node.index, n),
            v6: net::pod_v6(node.index, n),
            programs: Vec::new(),
            place: Place { netns: netns.path(), cgroup: cgroup.clone(), resolv: Some(resolv) },
            netns,
            dir,
            spawned: 0.into(),
            spec: spec.clone(),
        };
        for command in &spec.commands {
            let mut program = Program::from(command.iter().cloned());
            program.env.push(("UM_DIR".to_owned(), pod.dir.to_string_lossy().into_owned()));
            let program = pod.spawn(program)?;
            pod.programs.push(program);
        }
        write_pod_file(node, &pod, &cgroup)?;
        wait_started(&mut pod)?;
        self.pods.insert(spec.key(), pod);
        Ok(())
    }

    fn stop_pod(&mut self, key: &str) -> Result<()> {
        let Some(pod) = self.pods.remove(key) else { return Ok(()) };
        let file = self.node(&pod.spec.node)?.dir.join("pods").join(format!("{}.json", pod.spec.uid()));
        let _ = std::fs::remove_file(file);
        let cgroup = pod.place.cgroup.clone();
        drop(pod);
        super::cgroup::remove(&cgroup)
    }

    /// Deletes a pod's namespace and processes at once, as a crashed sandbox would, without telling anybody.
    ///
    /// # Errors
    /// No such pod.
    pub fn crash_pod(&mut self, key: &str) -> Result<()> {
        let pod = self.pods.remove(key).with_context(|| format!("no pod {key}"))?;
        super::cgroup::remove(&pod.place.cgroup)
    }

    /// A pod by `namespace/name`.
    ///
    /// # Errors
    /// There is none.
    pub fn pod(&self, key: &str) -> Result<&Pod> {
        self.pods.get(key).with_context(|| format!("the testbed has no pod {key}"))
    }

    /// A node by name.
    ///
    /// # Errors
    /// There is none.
    pub fn node(&self, name: &str) -> Result<&Node> {
        self.nodes.get(name).with_context(|| format!("the testbed has no node {name}"))
    }

    /// A node by name, to change.
    ///
    /// # Errors
    /// There is none.
    pub fn node_mut(&mut self, name: &str) -> Result<&mut Node> {
        self.nodes.get_mut(name).with_context(|| format!("the testbed has no node {name}"))
    }

    /// Starts a packet capture where `node` meets the underlay.
    ///
    /// # Errors
    /// tcpdump does not start.
    pub fn capture(&self, node: &str) -> Result<super::capture::Capture> {
        let port = format!("n{}", net::node_place(self.node(node)?.index));
        super::capture::Capture::start(&self.underlay.path(), &self.underlay_place.cgroup, &port, &self.dir)
    }

    /// The last lines of the mesh's own logs, for a person who wonders why something failed.
    pub fn explain(&self) -> String {
        let mut text = String::new();
        let mut add = |name: &str, log: &str| {
            text.push_str(&format!("--- {name}\n{}\n", super::process::tail(log, 25)));
        };
        if let Some(control) = &self.control {
            add("mesh-control", &control.log());
        }
        for node in self.nodes.values() {
            for agent in &node.agents {
                add(&format!("mesh-node on {}", node.name), &agent.log());
            }
            if let Ok(counters) = super::http::get_unix(&node.dir.join("run/admin.sock"), "/capture") {
                add(&format!("capture counters of {}", node.name), &nonzero(&counters));
            }
        }
        text
    }
}

impl Drop for Testbed {
    fn drop(&mut self) {
        run::remember_logs(self.explain());
        if let Some(keep) = std::env::var_os("UM_KEEP_LOGS") {
            let to = Path::new(&keep).join(&self.name);
            let _ = std::fs::create_dir_all(&keep);
            let _ = netns::command("cp", ["-r", &*self.dir.to_string_lossy(), &*to.to_string_lossy()]);
        }
        self.pods.clear();
        self.others.clear();
        self.control = None;
        for node in self.nodes.values_mut() {
            node.agents.clear();
            let _ = std::fs::remove_dir_all(
                Path::new(leftovers::PINS).join(format!("{}-{}", self.name, node.name)),
            );
        }
        // Fails while another testbed pins there.
        let _ = std::fs::remove_dir(leftovers::PINS);
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Counters that count, one a line.
fn nonzero(json: &str) -> String {
    let counters: Vec<Value> = serde_json::from_str(json).unwrap_or_default();
    let lines =
        counters.iter().filter(|c| c["count"] != 0).map(|c| format!("{} {}", c["count"], c["reason"]));
    lines.collect::<Vec<_>>().join("\n")
}

/// Tells the node's agent of a pod, as the container runtime would.
fn write_pod_file(node: &Node, pod: &Pod, cgroup: &Path) -> Result<()> {
    let labels = pod.spec.object.pointer("/metadata/labels").cloned().unwrap_or_else(|| json!({}));
    let text = json!({
        "uid": pod.spec.uid(),
        "name": pod.spec.name,
        "namespace": pod.spec.namespace,
        "service_account": pod.spec.service_account,
        "netns": pod.netns.path(),
        "cgroup": cgroup,
        "labels": labels,
        "probe_ports": pod.spec.probe_ports,
    })
    .to_string();
    let temporary = node.dir.join(".pod.new");
    std::fs::write(&temporary, text).with_context(|| format!("cannot write {}", temporary.display()))?;
    std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(0o600))
        .context("cannot restrict a file")?;
    let path = node.dir.join("pods").join(format!("{}.json", pod.spec.uid()));
    std::fs::rename(&temporary, &path).with_context(|| format!("cannot write {}", path.display()))
}

fn wait_started(pod: &mut Pod) -> Result<()> {
    let ports = pod.spec.ready_ports.clone();
    let key = pod.key();
    wait::until_true(&format!("pod {key} listening on {ports:?}"), PATIENCE, || {
        for program in &mut pod.programs {
            if !program.running()? {
                return Err(wait::hopeless(format!(
                    "its program ended: {}",
                    super::process::gist(&program.log())
                )));
            }
        }
        for port in &ports {
            if !net::listening(&pod.netns, *port)? {
                return Ok(false);
            }
        }
        Ok(true)
    })
}
