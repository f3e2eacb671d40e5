//! A node: a first process with namespaces of its own, below which everything of the node lives and with which it ends.
//!
//! `up` starts `enter`, which joins the node's cgroups and network namespace and becomes `unshare`, which becomes
//! [`init`]: it mounts what a machine of its own would have, and keeps containerd, kubelet and kube-proxy running.

use super::config;
use super::layout::{self, Layout, State};
use super::{cgroups, control, network};
use crate::bed::{netns, wait};
use anyhow::{Context, Result, bail};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{Pid, WaitOptions};
use std::ffi::CString;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// Directories of the node's own, by where its daemons expect them.
const OWN: &[(&str, &str)] = &[
    ("kubelet", "/var/lib/kubelet"),
    ("containerd", "/var/lib/containerd"),
    ("cni-state", "/var/lib/cni"),
    ("cni-config", "/etc/cni/net.d"),
    ("cni-bin", config::CNI_BIN),
    ("pod-logs", "/var/log/pods"),
    ("container-logs", "/var/log/containers"),
];

/// Plugins that the pod network needs, from the distribution.
const CNI_PLUGINS: &[&str] = &["ptp", "bridge", "host-local", "loopback", "portmap"];

/// Lists the mount points that clusters made on this machine, parents first.
const MADE: &str = "/var/lib/undermesh-cluster/.mount-points";

/// Makes the mount points that a machine without Kubernetes has not, and notes them.
pub(super) fn mount_points() -> Result<()> {
    let mut made = fs::read_to_string(MADE).unwrap_or_default();
    for (_, at) in OWN {
        let missing: Vec<&Path> = Path::new(at).ancestors().take_while(|dir| !dir.exists()).collect();
        for dir in missing.into_iter().rev() {
            fs::create_dir(dir).with_context(|| format!("cannot make the mount point {}", dir.display()))?;
            made += &format!("{}\n", dir.display());
        }
    }
    fs::write(MADE, made).with_context(|| format!("cannot write {MADE}"))
}

/// Removes the mount points that clusters made, with the last cluster: removing one would take the mount of another.
pub(super) fn remove_mount_points() -> Result<()> {
    let Ok(entries) = fs::read_dir(layout::CLUSTERS) else { return Ok(()) };
    if entries.flatten().any(|entry| entry.path().is_dir()) {
        return Ok(());
    }
    for dir in fs::read_to_string(MADE).unwrap_or_default().lines().rev() {
        // Somebody may have put something there since.
        let _ = fs::remove_dir(dir);
    }
    fs::remove_dir_all(layout::CLUSTERS).with_context(|| format!("cannot remove {}", layout::CLUSTERS))
}

/// Starts a node whose namespace is there; its daemons wait for the API server.
pub(super) fn start(layout: &Layout, node: &str) -> Result<()> {
    for dir in OWN.iter().map(|(dir, _)| *dir).chain(["settings"]) {
        let path = layout.node_path(node, dir);
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
    }
    let bin = layout.node_path(node, "cni-bin");
    for plugin in CNI_PLUGINS {
        let from = Path::new("/usr/lib/cni").join(plugin);
        fs::copy(&from, bin.join(plugin)).with_context(|| {
            format!("cannot copy {}: is the package containernetworking-plugins installed?", from.display())
        })?;
    }
    cgroups::create(&below(layout, node))?;
    let mut command = control::detached(layout, node)?;
    command.args(["cluster", "enter", node]).env("UM_CLUSTER", layout.name());
    let outer = command.spawn().with_context(|| format!("cannot start node {node}"))?.id();
    let pid = layout.node_path(node, "pid");
    fs::write(&pid, outer.to_string()).with_context(|| format!("cannot write {}", pid.display()))
}

/// Ends a node at once, as a power cut would; its disk stays.
///
/// # Errors
/// Its processes do not end.
pub fn kill(layout: &Layout, node: &str) -> Result<()> {
    cgroups::remove(&below(layout, node))?;
    // Its network namespace would keep the pods' veths.
    network::remove_node(layout, node)
}

/// Starts a node again that was killed.
///
/// # Errors
/// It was not killed, or its namespace cannot be made.
pub fn boot(layout: &Layout, node: &str) -> Result<()> {
    let state = layout.state()?;
    network::add_node(layout, &state, node)?;
    start(layout, node)
}

fn below(layout: &Layout, node: &str) -> String {
    format!("{}/{node}", layout.prefix())
}

/// Whether any process of the node runs.
pub(super) fn running(layout: &Layout, node: &str) -> Result<bool> {
    cgroups::populated(&below(layout, node))
}

/// `cluster enter`: joins and becomes the node.
pub(super) fn enter(layout: &Layout, node: &str) -> Result<()> {
    let own = std::env::current_exe().context("cannot find the own path")?;
    cgroups::join(&below(layout, node))?;
    netns::enter(&Path::new(netns::DIR).join(layout.node_netns(node)))?;
    let error = Command::new("unshare")
        .args(["--mount", "--pid", "--uts", "--ipc", "--cgroup", "--fork", "--kill-child", "--mount-proc"])
        .args(["--propagation", "private"])
        .arg(own)
        .args(["cluster", "node", node])
        .exec();
    Err(error).context("cannot run unshare: is the package util-linux installed?")
}

/// `cluster exec`: becomes a program in all namespaces of a node.
pub(super) fn exec(layout: &Layout, node: &str, program: &[String]) -> Result<()> {
    let error = inside(layout, node)?.args(program).exec();
    Err(error).with_context(|| format!("cannot run {}", program[0]))
}

/// A command that runs what is appended to it in all namespaces of a node.
///
/// # Errors
/// The node does not run.
pub fn inside(layout: &Layout, node: &str) -> Result<Command> {
    let pid = first_process(layout, node)?;
    let mut command = Command::new("nsenter");
    command.args(["--all", "--target", &pid.to_string(), "--"]);
    Ok(command)
}

/// The process id, on this machine, of a node's first process.
///
/// # Errors
/// The node does not run.
pub fn first_process(layout: &Layout, node: &str) -> Result<u32> {
    let path = layout.node_path(node, "pid");
    let gone = || format!("node {node} of cluster `{}` does not run", layout.name());
    let outer: u32 = fs::read_to_string(path).with_context(gone)?.trim().parse().with_context(gone)?;
    let children = fs::read_to_string(format!("/proc/{outer}/task/{outer}/children")).with_context(gone)?;
    children.split_whitespace().next().and_then(|pid| pid.parse().ok()).with_context(gone)
}

/// Waits until containerd answers on a node.
pub(super) fn wait_containerd(layout: &Layout, node: &str) -> Result<()> {
    wait::until_true(&format!("containerd on {node}"), Duration::from_secs(60), || {
        let out = inside(layout, node)?
            .args(["ctr", "version"])
            .stdin(Stdio::null())
            .output()
            .context("cannot run nsenter: is the package util-linux installed?")?;
        Ok(out.status.success())
    })
}

/// A daemon that is started again when it ends, as a machine's service manager would.
struct Daemon {
    name: &'static str,
    program: PathBuf,
    arguments: Vec<String>,
    log: PathBuf,
    pid: Option<u32>,
}

impl Daemon {
    fn start(&mut self) -> Result<()> {
        let out = fs::File::options().create(true).append(true).open(&self.log);
        let out = out.with_context(|| format!("cannot write {}", self.log.display()))?;
        let err = out.try_clone().context("cannot share a log file")?;
        // The agent tells the kubelet from others by its cgroup, and on most machines it has one.
        let unit = format!("system.slice/{}.service", self.name);
        cgroups::create(&unit)?;
        // Not the own path: a build may have replaced what is there since this node was started.
        let child = Command::new("/proc/self/exe")
            .args(["in", "--netns", "/proc/self/ns/net", "--cgroup"])
            .arg(crate::bed::cgroup::mount()?.join(unit))
            .arg("--")
            .arg(&self.program)
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            .spawn()
            .with_context(|| format!("cannot start {}", self.name))?;
        self.pid = Some(child.id());
        Ok(())
    }
}

/// `cluster node`: the node's first process. Never returns while all is well.
pub(super) fn init(layout: &Layout, node: &str) -> Result<()> {
    if std::process::id() != 1 {
        bail!("`cluster node` is what `cluster up` starts as the first process of a node");
    }
    let Some(index) = layout::node_index(node) else { bail!("`{node}` is no node's name") };
    let state = layout.state()?;
    rustix::system::sethostname(node.as_bytes()).context("cannot set the host name")?;
    cgroup_mounts()?;
    // Version 2 gives controllers to children of a directory only if no process is in it.
    cgroups::create("init.scope")?;
    cgroups::join("init.scope")?;
    mounts(layout, node)?;
    let write = |path: PathBuf, text: String| {
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    write(layout.node_path(node, "containerd.toml"), config::containerd())?;
    write(layout.node_path(node, "kubelet.yaml"), config::kubelet(layout, state.families))?;
    write(layout.node_path(node, "proxy.yaml"), config::proxy(layout, state.families, node))?;
    // What chained itself in before a reboot is still there, as it would be on a disk.
    let conflist = PathBuf::from("/etc/cni/net.d/10-pods.conflist");
    if !conflist.exists() {
        write(conflist, config::cni(state.families, index))?;
    }
    supervise(layout, daemons(layout, &state, node, index))
}

fn daemons(layout: &Layout, state: &State, node: &str, index: u8) -> Vec<Daemon> {
    let file = |name: &str| layout.node_path(node, name).display().to_string();
    let node_ip = state.families.list(layout::node_address(index), layout::node_address6(index));
    let daemon = |name: &'static str, program: PathBuf, arguments: Vec<String>| Daemon {
        name,
        program,
        arguments,
        log: layout.log(&format!("{node}-{name}")),
        pid: None,
    };
    vec![
        daemon("containerd", "containerd".into(), vec![format!("--config={}", file("containerd.toml"))]),
        daemon(
            "kubelet",
            state.binaries.join("kubelet"),
            vec![
                format!("--config={}", file("kubelet.yaml")),
                format!("--kubeconfig={}", layout.path(&format!("{node}.kubeconfig")).display()),
                format!("--hostname-override={node}"),
                format!("--node-ip={node_ip}"),
                "--cert-dir=/var/lib/kubelet/pki".to_owned(),
                "--v=2".to_owned(),
            ],
        ),
        daemon(
            "kube-proxy",
            state.binaries.join("kube-proxy"),
            vec![format!("--config={}", file("proxy.yaml")), "--v=1".to_owned()],
        ),
    ]
}

/// Starts the daemons, the API server's clients once it is ready, and starts again whichever ends.
fn supervise(layout: &Layout, mut daemons: Vec<Daemon>) -> Result<()> {
    let mut waiting = daemons.split_off(1);
    daemons[0].start()?;
    let ready = layout.path("api-ready");
    // A kubelet that is refused at first tries again ever more slowly.
    while !ready.exists() {
        std::thread::sleep(Duration::from_millis(20));
    }
    for daemon in &mut waiting {
        daemon.start()?;
    }
    daemons.append(&mut waiting);
    loop {
        // Everything orphaned on this node becomes our child, and is reaped here.
        let ended = match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) => (pid, status),
            Ok(None) => continue,
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error).context("cannot wait for the node's processes"),
        };
        let of = |daemon: &&mut Daemon| {
            daemon.pid.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?)) == Some(ended.0)
        };
        let Some(daemon) = daemons.iter_mut().find(of) else { continue };
        eprintln!("{} ended ({:?}): starting it again", daemon.name, ended.1);
        std::thread::sleep(Duration::from_millis(500));
        daemon.start()?;
    }
}

/// Mounts every cgroup hierarchy again, from this cgroup namespace, so that the node's own directory is the root.
fn cgroup_mounts() -> Result<()> {
    let table = fs::read_to_string("/proc/self/mounts").context("cannot read /proc/self/mounts")?;
    let hierarchies = cgroups::mounted(&table);
    let top = Path::new("/sys/fs/cgroup");
    let links: Vec<(PathBuf, PathBuf)> = fs::read_dir(top)
        .context("cannot list /sys/fs/cgroup")?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter_map(|path| Some((path.clone(), fs::read_link(&path).ok()?)))
        .collect();
    for hierarchy in hierarchies.iter().rev() {
        rustix::mount::unmount(&hierarchy.at, UnmountFlags::DETACH)
            .with_context(|| format!("cannot unmount {}", hierarchy.at.display()))?;
    }
    let unified_only = hierarchies.iter().all(|hierarchy| hierarchy.kind == "cgroup2");
    if unified_only {
        return mount("cgroup2", top, "cgroup2", "");
    }
    for hierarchy in &hierarchies {
        // Container runtimes look for version 2 beside version 1 in this place only.
        let at = if hierarchy.kind == "cgroup2" { top.join("unified") } else { hierarchy.at.clone() };
        fs::create_dir_all(&at).with_context(|| format!("cannot make {}", at.display()))?;
        mount(&hierarchy.kind, &at, &hierarchy.kind, &hierarchy.options)?;
    }
    for (path, target) in links.iter().filter(|(path, _)| !path.exists()) {
        std::os::unix::fs::symlink(target, path)
            .with_context(|| format!("cannot link {}", path.display()))?;
    }
    Ok(())
}

fn mounts(layout: &Layout, node: &str) -> Result<()> {
    // Volumes with mount propagation need peer groups; these are the node's own, since it was made private before.
    rustix::mount::mount_change("/", MountPropagationFlags::SHARED | MountPropagationFlags::REC)
        .context("cannot make the node's mounts shared")?;
    mount("tmpfs", Path::new("/run"), "tmpfs", "mode=755")?;
    for dir in ["/run/netns", "/run/containerd", "/run/lock"] {
        fs::create_dir_all(dir).with_context(|| format!("cannot make {dir}"))?;
    }
    let _ = rustix::mount::unmount("/sys/fs/bpf", UnmountFlags::DETACH);
    mount("bpf", Path::new("/sys/fs/bpf"), "bpf", "mode=700")?;
    for (dir, at) in OWN {
        let from = layout.node_path(node, dir);
        rustix::mount::mount_bind(&from, *at)
            .with_context(|| format!("cannot bind {} to {at}", from.display()))?;
        shared(Path::new(at))?;
    }
    for (setting, value) in config::MACHINE_SETTINGS {
        let file = layout.node_path(node, "settings").join(setting.replace('/', "-"));
        fs::write(&file, format!("{value}\n")).with_context(|| format!("cannot write {}", file.display()))?;
        let at = Path::new("/proc/sys").join(setting);
        rustix::mount::mount_bind(&file, &at).with_context(|| format!("cannot cover {}", at.display()))?;
    }
    Ok(())
}

fn mount(source: &str, at: &Path, kind: &str, options: &str) -> Result<()> {
    let data = CString::new(options).context("an option with a zero byte")?;
    rustix::mount::mount(source, at, kind, MountFlags::empty(), Some(data.as_c_str()))
        .with_context(|| format!("cannot mount {kind} ({options}) at {}", at.display()))?;
    shared(at)
}

fn shared(at: &Path) -> Result<()> {
    rustix::mount::mount_change(at, MountPropagationFlags::SHARED)
        .with_context(|| format!("cannot make {} shared", at.display()))
}
