//! A cluster's start and end, and what it says of itself in between.

use super::kubectl::{self, Kubectl};
use super::layout::{self, Families, Layout, State};
use super::{cgroups, config, control, images, network, node, pki};
use crate::bed::wait;
use anyhow::{Context, Result, bail};
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What to start.
#[derive(Debug, Clone, clap::Args)]
pub struct UpArgs {
    /// Directory of kube-apiserver, kube-controller-manager, kube-scheduler, kubelet, kube-proxy and kubectl
    #[arg(long, env = "UM_KUBERNETES")]
    pub binaries: PathBuf,
    /// Directory of image archives that every node gets
    #[arg(long, env = "UM_IMAGES")]
    pub images: PathBuf,
    /// Families of the addresses of nodes, pods and services
    #[arg(long, value_enum, default_value = "both")]
    pub families: Families,
    /// How many nodes
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=i64::from(layout::MOST_NODES)))]
    pub nodes: u8,
    /// End the cluster when this process is gone
    #[arg(skip)]
    pub owner: Option<u32>,
}

/// A kubectl for a cluster that was started.
///
/// # Errors
/// None was.
pub fn kubectl(layout: &Layout) -> Result<Kubectl> {
    let state = layout.state()?;
    Ok(Kubectl { program: state.binaries.join("kubectl"), kubeconfig: layout.kubeconfig() })
}

/// Starts a cluster and waits until its nodes are ready; one that runs well is left as it is and gets the images.
///
/// # Errors
/// Something is missing or does not start; nothing is left of it then, but its logs are shown.
pub fn up(layout: &Layout, args: &UpArgs) -> Result<()> {
    if healthy(layout) {
        eprintln!("cluster `{}` is up", layout.name());
        return images::load(layout, &args.images);
    }
    needs(args)?;
    down(layout).context("cannot remove what is left of an earlier cluster")?;
    let result = start(layout, args);
    if result.is_err() {
        let logs = endings(layout);
        down(layout).unwrap_or_else(|error| eprintln!("warning: {error:#}"));
        return result.with_context(|| format!("the cluster did not start\n{logs}"));
    }
    result
}

/// Starts etcd and an API server, and nothing else; they end with this process.
///
/// # Errors
/// One of them does not start; nothing is left of it then.
pub fn up_api(layout: &Layout, binaries: PathBuf) -> Result<()> {
    down(layout).context("cannot remove what is left of an earlier one")?;
    let state = State {
        nodes: Vec::new(),
        families: Families::Both,
        binaries,
        images: PathBuf::new(),
        host: Ipv4Addr::UNSPECIFIED,
        owner: Some(std::process::id()),
    };
    let started = prepare(layout, state).and_then(|state| {
        control::start_api(layout, &state)?;
        wait_api(layout)
    });
    started.map_err(|error| {
        let logs = endings(layout);
        down(layout).unwrap_or_else(|error| eprintln!("warning: {error:#}"));
        error.context(format!("the API server did not start\n{logs}"))
    })
}

/// Makes what the processes of a cluster start on: directories, networks, certificates.
fn prepare(layout: &Layout, mut state: State) -> Result<State> {
    // First of all, so that whatever fails below is found by `down`.
    layout.note(&state)?;
    for dir in ["logs", "etcd", "nodes"] {
        let dir = layout.path(dir);
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    state.host = network::create(layout, &state)?;
    layout.note(&state)?;
    pki::create(layout, &state)?;
    Ok(state)
}

fn start(layout: &Layout, args: &UpArgs) -> Result<()> {
    let begin = Instant::now();
    let say = |what: &str| eprintln!("{:6.1} s  {what}", begin.elapsed().as_secs_f64());
    let nodes: Vec<String> = (1..=args.nodes).map(layout::node_name).collect();
    let state = State {
        nodes: nodes.clone(),
        families: args.families,
        binaries: fs::canonicalize(&args.binaries).context("cannot find the binaries")?,
        images: fs::canonicalize(&args.images).context("cannot find the images")?,
        host: Ipv4Addr::UNSPECIFIED,
        owner: args.owner,
    };
    let state = prepare(layout, state)?;
    let resolv = layout.path("resolv.conf");
    fs::write(&resolv, "").with_context(|| format!("cannot write {}", resolv.display()))?;
    node::mount_points()?;
    say("network and certificates");
    control::start_api(layout, &state)?;
    let archives = &images::archives(&args.images)?;
    std::thread::scope(|scope| {
        let threads: Vec<_> = nodes
            .iter()
            .map(|name| {
                scope.spawn(move || {
                    node::start(layout, name)?;
                    node::wait_containerd(layout, name)?;
                    images::import(layout, name, archives).with_context(|| format!("images on {name}"))
                })
            })
            .collect();
        let ready = wait_api(layout);
        if ready.is_ok() {
            say("API server ready");
        }
        for thread in threads {
            let Ok(imported) = thread.join() else { bail!("starting a node panicked") };
            imported?;
        }
        ready
    })?;
    say("containerd has the images");
    let mark = layout.path("api-ready");
    fs::write(&mark, "").with_context(|| format!("cannot write {}", mark.display()))?;
    control::start_controllers(layout, &state)?;
    let kubectl = self::kubectl(layout)?;
    kubectl.apply(&config::bootstrap(args.families)).context("cannot set up the cluster's DNS")?;
    wait_nodes(layout, &nodes)?;
    say(&format!("nodes ready: {}", nodes.join(", ")));
    wait::until_true("DNS of the cluster that is ready", Duration::from_secs(60), || {
        let dns = kubectl.json(&["get", "deployment", "coredns", "--namespace", "kube-system"])?;
        Ok(kubectl::has_condition(&dns, "Available"))
    })?;
    say("DNS ready");
    eprintln!(
        "\nexport KUBECONFIG={} PATH={}:$PATH\nkubectl get pods -A",
        layout.kubeconfig().display(),
        state.binaries.display()
    );
    Ok(())
}

/// Waits until every node of a list is ready.
///
/// # Errors
/// One is not in time.
pub fn wait_nodes(layout: &Layout, nodes: &[String]) -> Result<()> {
    let kubectl = kubectl(layout)?;
    wait::until_true(&format!("ready nodes {}", nodes.join(", ")), Duration::from_secs(90), || {
        let ready = kubectl.ready_nodes()?;
        Ok(nodes.iter().all(|node| ready.contains(node)))
    })
}

fn wait_api(layout: &Layout) -> Result<()> {
    let kubectl = kubectl(layout)?;
    wait::until_true("API server that is ready", Duration::from_secs(90), || {
        for name in ["etcd", "kube-apiserver"] {
            if !control::running(layout, name)? {
                return Err(wait::hopeless(format!("{name} ended")));
            }
        }
        Ok(kubectl.api_ready())
    })
}

/// Says what is missing before anything fails for its lack.
fn needs(args: &UpArgs) -> Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let have = |name: &str| std::env::split_paths(&path).any(|dir| dir.join(name).is_file());
    let programs = [
        ("etcd", "etcd-server"),
        ("containerd", "containerd"),
        ("ctr", "containerd"),
        ("runc", "runc"),
        ("iptables", "iptables"),
        ("ip", "iproute2"),
        ("openssl", "openssl"),
        ("unshare", "util-linux"),
        ("nsenter", "util-linux"),
        ("setsid", "util-linux"),
    ];
    let mut missing: Vec<&str> =
        programs.iter().filter(|(name, _)| !have(name)).map(|(_, package)| *package).collect();
    if !Path::new("/usr/lib/cni/ptp").is_file() {
        missing.push("containernetworking-plugins");
    }
    missing.dedup();
    if !missing.is_empty() {
        bail!("missing packages: apt-get install --no-install-recommends {}", missing.join(" "));
    }
    for name in
        ["kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl"]
    {
        let path = args.binaries.join(name);
        if !path.is_file() {
            bail!("{} is not there: `cargo xtask cluster up` builds it", path.display());
        }
    }
    if !images::archives(&args.images)?.iter().any(|path| path.ends_with("pause.tar")) {
        bail!(
            "{} has no pause.tar ({}), which every pod needs: `cargo xtask cluster up` builds it",
            args.images.display(),
            config::PAUSE
        );
    }
    Ok(())
}

/// Whether every process of a cluster runs and its API server answers.
pub fn healthy(layout: &Layout) -> bool {
    let Ok(state) = layout.state() else { return false };
    let runs = |result: Result<bool>| result.unwrap_or(false);
    control::PROCESSES.iter().all(|name| runs(control::running(layout, name)))
        && state.nodes.iter().all(|name| runs(node::running(layout, name)))
        && kubectl(layout).is_ok_and(|kubectl| kubectl.api_ready())
}

/// Ends every process of a cluster and removes what it made; of nothing, nothing.
///
/// # Errors
/// Something cannot be removed.
pub fn down(layout: &Layout) -> Result<()> {
    cgroups::remove(&layout.prefix())?;
    network::remove(layout)?;
    // Mounts of a node go a moment after its last process, whether or not this run was asked to stop.
    let end = Instant::now() + Duration::from_secs(20);
    while let Err(error) = remove_dir(layout) {
        if Instant::now() > end {
            return Err(error);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    node::remove_mount_points()
}

/// Removes a cluster's directory: its state last, by which an end that was cut short is found again.
fn remove_dir(layout: &Layout) -> Result<()> {
    let dir = layout.path("");
    let Ok(entries) = fs::read_dir(&dir) else { return Ok(()) };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        let removed = match path.is_dir() {
            true => fs::remove_dir_all(&path),
            false if path.ends_with(layout::STATE) => Ok(()),
            false => fs::remove_file(&path),
        };
        removed.with_context(|| format!("cannot remove {}", path.display()))?;
    }
    fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))
}

/// Ends clusters whose owner is gone; returns how many.
///
/// # Errors
/// One of them cannot be removed.
pub fn remove_dead() -> Result<usize> {
    let Ok(entries) = fs::read_dir(layout::CLUSTERS) else { return Ok(0) };
    let mut removed = 0;
    for entry in entries.flatten() {
        let Ok(layout) = Layout::of(&entry.file_name().to_string_lossy()) else { continue };
        let owner = layout.state().ok().and_then(|state| state.owner);
        if owner.is_some_and(|owner| !Path::new(&format!("/proc/{owner}")).exists()) {
            down(&layout)?;
            removed += 1;
        }
    }
    Ok(removed)
}

/// Ends the API server, does something, and starts it again, whatever came of it.
///
/// # Errors
/// What was done failed, or the API server does not come back.
pub fn without_api(layout: &Layout, during: impl FnOnce() -> Result<()>) -> Result<()> {
    let state = layout.state()?;
    control::end(layout, "kube-apiserver")?;
    let outcome = during();
    control::start_apiserver(layout, &state)?;
    wait_api(layout)?;
    wait_nodes(layout, &state.nodes)?;
    outcome
}

/// Prints what runs; whether all of it does.
///
/// # Errors
/// No cluster was started.
pub fn status(layout: &Layout) -> Result<bool> {
    let state = layout.state()?;
    let mut well = true;
    println!("cluster {}", layout.name());
    for (name, runs) in control::PROCESSES
        .iter()
        .map(|name| (*name, control::running(layout, name)))
        .chain(state.nodes.iter().map(|name| (name.as_str(), node::running(layout, name))))
    {
        let runs = runs?;
        well &= runs;
        println!("  {name:<24} {}", if runs { "runs" } else { "does not run" });
    }
    println!("  kubeconfig {}", layout.kubeconfig().display());
    println!("  kubectl    {}", state.binaries.join("kubectl").display());
    if well {
        let kubectl = kubectl(layout)?;
        println!("\n{}", kubectl.run(&["get", "nodes", "-o", "wide"])?);
        println!("{}", kubectl.run(&["get", "pods", "--all-namespaces", "-o", "wide"])?);
    } else {
        println!("\nsome of it does not run: `cargo xtask cluster up` starts it anew, `down` removes it");
    }
    Ok(well)
}

/// Prints the end of a log, or the logs' names.
///
/// # Errors
/// No such log.
pub fn logs(layout: &Layout, name: Option<&str>, lines: usize) -> Result<()> {
    layout.state()?;
    let Some(name) = name else {
        for (name, path) in log_files(layout) {
            println!("{name:<24} {}", path.display());
        }
        return Ok(());
    };
    let path = layout.log(name);
    let text = fs::read(&path).with_context(|| {
        let names: Vec<String> = log_files(layout).into_iter().map(|(name, _)| name).collect();
        format!("no log `{name}`; there are: {}", names.join(", "))
    })?;
    println!("{}", crate::bed::process::tail(&String::from_utf8_lossy(&text), lines));
    Ok(())
}

fn log_files(layout: &Layout) -> Vec<(String, PathBuf)> {
    let Ok(entries) = fs::read_dir(layout.path("logs")) else { return Vec::new() };
    let mut found: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter_map(|path| Some((path.file_stem()?.to_str()?.to_owned(), path)))
        .collect();
    found.sort();
    found
}

/// The last lines of every log, for a report of what failed.
fn endings(layout: &Layout) -> String {
    let mut text = String::new();
    for (name, path) in log_files(layout) {
        let log = fs::read(&path).unwrap_or_default();
        text += &format!("--- {name}\n{}\n", crate::bed::process::tail(&String::from_utf8_lossy(&log), 6));
    }
    text
}
