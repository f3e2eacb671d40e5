//! What this machine lacks for the mesh, what that costs, and the fix; found by doing the thing wherever that is
//! cheap. The last probe captures a real connection in a network namespace of its own.

use super::routes::PodNetlink;
use super::{Capture, CaptureConfig, ListenerKind, ObjectSource, loader};
use crate::pods::{PodInfo, PodSource};
use crate::sys::{self, Netns};
use mesh_core::admin::{Fitness, Probe};
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Kernels that the tests ran on.
const TESTED: &str = "6.18";
/// A namespace's own address in the last probes (documentation prefixes, on its `lo`; nothing leaves).
const OWN_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
const OWN_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1));
const AWAY_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1));
const AWAY_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 0, 0, 0, 1));
const PATIENCE: Duration = Duration::from_secs(5);

fn ok(name: &str, detail: impl Into<String>) -> Probe {
    Probe { name: name.into(), state: Fitness::Ok, detail: detail.into(), ..Probe::default() }
}

fn lack(name: &str, state: Fitness, detail: impl Into<String>, cost: &str, fix: &str) -> Probe {
    Probe { name: name.into(), state, detail: detail.into(), cost: cost.into(), fix: fix.into() }
}

/// Probes this machine and how its pods are connected. Takes about a second; makes one network namespace and removes it.
#[must_use]
pub fn examine(object: &ObjectSource, pods: &dyn PodSource) -> Vec<Probe> {
    let mut probes = vec![kernel(), cgroup2(), bpffs(), capabilities(), open_files(), btf(), mptcp()];
    probes.extend(programs(object));
    probes.push(fast_path(pods));
    probes
}

/// Which case this node is for the fast path: pods behind routed veths of their own, or on a shared segment.
fn fast_path(pods: &dyn PodSource) -> Probe {
    const NAME: &str = "fast path";
    let pods = match pods.snapshot() {
        Ok(snapshot) => snapshot.pods,
        Err(error) => return ok(NAME, format!("not known, because this node's pods are not: {error}")),
    };
    let (mut routed, mut shared) = (0, Vec::new());
    for pod in pods.iter().filter(|pod| !pod.host_network) {
        match is_on_segment(pod) {
            Some(true) => shared.push(pod.to_string()),
            Some(false) => routed += 1,
            // On its way in or out.
            None => {}
        }
    }
    if shared.is_empty() {
        return match routed {
            0 => ok(NAME, "not known: this node has no pods"),
            _ => ok(NAME, format!("routed: each of {routed} pods has a host address on a link of its own")),
        };
    }
    let more = if shared.len() > 3 { ", …" } else { "" };
    let detail = format!(
        "shared segment: {} of {} pods have an address in a subnet on their link ({}{more})",
        shared.len(),
        shared.len() + routed,
        shared.iter().take(3).cloned().collect::<Vec<_>>().join(", ")
    );
    let cost = "a neighbour with raw sockets could take an address there, so that connections of these pods use the \
                tunnel on the same node, too";
    let fix = "a CNI that gives every pod a routed link of its own with a host prefix (/32, /128)";
    lack(NAME, Fitness::Degraded, detail, cost, fix)
}

/// Whether a pod has an address that neighbours on its link could claim; nothing if its namespace is gone.
fn is_on_segment(pod: &PodInfo) -> Option<bool> {
    let netlink = PodNetlink::open(&Netns::open(&pod.netns).ok()?).ok()?;
    Some(netlink.addresses().ok()?.iter().any(|address| address.on_segment))
}

/// The findings for a person: one line each, and cost and fix below what is not well.
#[must_use]
pub fn text(probes: &[Probe]) -> String {
    use std::fmt::Write as _;
    let width = probes.iter().map(|probe| probe.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for probe in probes {
        let state = match probe.state {
            Fitness::Ok => "ok",
            Fitness::Degraded => "degraded",
            Fitness::Missing => "missing",
        };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{state:<8}  {:<width$}  {}", probe.name, probe.detail);
        for (label, value) in [("cost", &probe.cost), ("fix", &probe.fix)] {
            if !value.is_empty() {
                let _ = writeln!(text, "{:<8}  {:<width$}  {label}: {value}", "", "");
            }
        }
    }
    text
}

fn kernel() -> Probe {
    const NAME: &str = "kernel";
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    if !loader::kernel_at_least(5, 17) {
        let cost = "original destinations are taken in one call since 5.14, netns cookies since 5.14 and 5.15, and \
                    the ingress device of sk_lookup since 5.17: without them nothing is captured";
        return lack(NAME, Fitness::Missing, release, cost, "run Linux 5.17 or newer");
    }
    if !loader::kernel_at_least(6, 15) {
        let cost = "packets do not tell their network namespace to cgroup programs before 6.15: SYNs of raw sockets \
                    are not dropped";
        return lack(NAME, Fitness::Degraded, release, cost, "run Linux 6.15 or newer");
    }
    let tested = if release.starts_with(TESTED) { "" } else { " (no test ran on this version)" };
    ok(NAME, format!("{release}{tested}"))
}

fn cgroup2() -> Probe {
    const NAME: &str = "cgroup2";
    loader::cgroup2_mount().map_or_else(
        || {
            let fix = "mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified";
            lack(NAME, Fitness::Missing, "not mounted", "nothing is captured outbound", fix)
        },
        |path| ok(NAME, path.display().to_string()),
    )
}

/// Whether a file system of this kind is mounted at a place (`statfs`).
fn is_mounted(path: &str, magic: i64) -> bool {
    #[allow(clippy::useless_conversion, reason = "the field's type differs between architectures")]
    rustix::fs::statfs(path).is_ok_and(|found| i64::from(found.f_type) == magic)
}

fn bpffs() -> Probe {
    const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
    if is_mounted("/sys/fs/bpf", BPF_FS_MAGIC) {
        return ok("bpffs", "/sys/fs/bpf");
    }
    let cost =
        "nothing outlives the agent: pods are uncaptured while it restarts, and it does not start with pins";
    lack("bpffs", Fitness::Missing, "not mounted at /sys/fs/bpf", cost, "mount -t bpf bpf /sys/fs/bpf")
}

fn btf() -> Probe {
    if Path::new("/sys/kernel/btf/vmlinux").exists() {
        return ok("btf", "/sys/kernel/btf/vmlinux");
    }
    let cost = "socket storage may not load (needs BTF), and drop reasons have no names";
    lack("btf", Fitness::Degraded, "the kernel has none", cost, "a kernel with CONFIG_DEBUG_INFO_BTF=y")
}

fn mptcp() -> Probe {
    match fs::read_to_string("/proc/sys/net/mptcp/enabled") {
        Ok(text) if text.trim() == "1" => ok("mptcp", "on; captured like TCP"),
        _ => ok("mptcp", "off in this kernel"),
    }
}

fn capabilities() -> Probe {
    const NAME: &str = "capabilities";
    const NEEDED: [(&str, u32, Fitness); 6] = [
        ("CAP_NET_ADMIN", 12, Fitness::Missing),
        ("CAP_NET_RAW", 13, Fitness::Missing),
        ("CAP_SYS_ADMIN", 21, Fitness::Missing),
        ("CAP_SYS_RESOURCE", 24, Fitness::Degraded),
        ("CAP_PERFMON", 38, Fitness::Missing),
        ("CAP_BPF", 39, Fitness::Missing),
    ];
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()).unwrap_or(0);
    let lacking: Vec<_> = NEEDED.iter().filter(|(_, bit, _)| effective >> bit & 1 == 0).collect();
    if lacking.is_empty() {
        return ok(NAME, "all that are needed");
    }
    let names: Vec<&str> = lacking.iter().map(|(name, ..)| *name).collect();
    let hard = lacking.iter().any(|(.., state)| *state == Fitness::Missing);
    let (state, cost) = if hard {
        (Fitness::Missing, "programs do not load or namespaces cannot be entered")
    } else {
        (Fitness::Degraded, "the limit of open files cannot be raised: fewer pods fit")
    };
    lack(NAME, state, format!("without {}", names.join(", ")), cost, "run as root, or grant them")
}

fn open_files() -> Probe {
    const NAME: &str = "open files";
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let hard = limit.maximum.unwrap_or(u64::MAX);
    let pods = super::enrol::pods_that_fit(hard);
    let detail = format!("limit {hard}: room for {pods} pods");
    if pods >= 250 {
        return ok(NAME, detail);
    }
    let cost = "further pods are refused with an error";
    lack(NAME, Fitness::Degraded, detail, cost, "raise the hard limit (LimitNOFILE=1048576)")
}

/// Loads every program, attaches them where they let everything go, and captures real connections.
fn programs(object: &ObjectSource) -> Vec<Probe> {
    const NAME: &str = "kernel programs";
    // This process plays pod and agent, in its own cgroup; other processes there are in no enrolled namespace.
    let config = CaptureConfig {
        host_cgroup: loader::cgroup2_mount().map(|mount| own_cgroup(&mount)),
        exempt_self: false,
        ..CaptureConfig::new(object.clone())
    };
    let capture = match Capture::load(config.clone()) {
        Ok(capture) => capture,
        Err(error) => {
            let fix = "see the detail; the kernel's verifier names what it lacks";
            return vec![lack(NAME, Fitness::Missing, error.to_string(), "nothing is captured", fix)];
        }
    };
    let mut probes = vec![ok(NAME, "all load and attach")];
    probes.extend(tracing(&capture, &config));
    match Scratch::new(&capture) {
        Ok(scratch) => {
            probes.push(scratch.captures("capture IPv4", AWAY_V4, OWN_V4));
            probes.push(scratch.captures("capture IPv6", AWAY_V6, OWN_V6));
            probes.push(scratch.destroys());
        }
        Err(problem) => probes.push(lack(
            "network namespaces",
            Fitness::Missing,
            problem,
            "pods cannot be enrolled",
            "run as root in the host's pid namespace (hostPID: true), with /proc/sys writable",
        )),
    }
    probes
}

/// Attaches each hook of flow tracing, one finding for all that is well and one for each that is not.
fn tracing(capture: &Capture, config: &CaptureConfig) -> Vec<Probe> {
    const NAME: &str = "flow tracing";
    let cost = "`meshctl flows` is empty; capture and policy do not need it";
    match capture.trace(config) {
        Ok(tracing) => {
            let hooks = tracing.hooks();
            let lacking: Vec<Probe> =
                hooks.iter().filter(|probe| probe.state != Fitness::Ok).cloned().collect();
            let well = hooks.len() - lacking.len();
            let state = ok(NAME, format!("{well} of {} hooks attach", hooks.len()));
            [state].into_iter().chain(lacking).collect()
        }
        Err(error) => vec![lack(NAME, Fitness::Degraded, error.to_string(), cost, "see the detail")],
    }
}

fn own_cgroup(mount: &Path) -> PathBuf {
    let text = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let path = text.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
    mount.join(path.trim_start_matches('/'))
}

/// Waits until packets to an address that was given to `lo` arrive: for IPv6 the kernel makes that route later, on a
/// worker. The probes say what follows if it never does.
fn wait_for_route(netns: &Netns, ip: IpAddr) {
    let to = SocketAddr::new(ip, 9);
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        // Without IPv6 there is no socket.
        let Ok(socket) = netns.socket(socket2::Domain::for_address(to), socket2::Type::STREAM, None) else {
            return;
        };
        match socket.connect(&to.into()) {
            Err(error) if error.kind() != std::io::ErrorKind::ConnectionRefused => {
                std::thread::sleep(Duration::from_millis(5));
            }
            _ => return,
        }
    }
}

/// An enrolled network namespace with nothing in it but `lo`.
struct Scratch<'a> {
    capture: &'a Capture,
    pod: Arc<super::EnrolledPod>,
    listener: TcpListener,
}

impl<'a> Scratch<'a> {
    fn new(capture: &'a Capture) -> Result<Self, String> {
        let netns = Netns::create().map_err(|error| format!("cannot make a network namespace: {error}"))?;
        let netlink = PodNetlink::open(&netns).map_err(|error| format!("netlink: {error}"))?;
        netlink.prepare(&netns).map_err(|error| format!("cannot prepare it: {error}"))?;
        for ip in [OWN_V4, OWN_V6] {
            // Without IPv6 the probe of IPv6 says so.
            if let Err(error) = netlink.add_to_loopback(ip)
                && ip.is_ipv4()
            {
                return Err(format!("cannot give lo an address: {error}"));
            }
        }
        wait_for_route(&netns, OWN_V6);
        let info = PodInfo {
            uid: "doctor".into(),
            name: "doctor".into(),
            namespace: "undermesh".into(),
            service_account: "doctor".into(),
            netns: format!("/proc/self/fd/{}", netns.as_fd().as_raw_fd()).into(),
            cgroup: PathBuf::new(),
            labels: std::collections::BTreeMap::new(),
            probe_ports: Vec::new(),
            host_network: false,
            dns_search: None,
        };
        let pod = capture.enrol(&info).map_err(|error| error.to_string())?;
        let listener = sys::listener(&pod.netns, 0, 16).map_err(|error| format!("cannot listen: {error}"))?;
        capture
            .set_listener(&pod, ListenerKind::Outbound, &listener)
            .and_then(|()| capture.activate(&pod))
            .map_err(|error| error.to_string())?;
        Ok(Self { capture, pod, listener })
    }

    /// A connection of the namespace to `away`, its captured other end, and the destination that was recorded.
    fn connection(&self, away: IpAddr) -> Result<(TcpStream, TcpStream, Option<SocketAddr>), String> {
        let to = SocketAddr::new(away, 80);
        let socket = self
            .pod
            .netns
            .socket(socket2::Domain::for_address(to), socket2::Type::STREAM, None)
            .map_err(|error| format!("socket: {error}"))?;
        socket.connect_timeout(&to.into(), PATIENCE).map_err(|error| format!("connect: {error}"))?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.listener.accept() {
                Ok((stream, peer)) => {
                    let local = stream.local_addr().map_err(|error| error.to_string())?;
                    return Ok((socket.into(), stream, self.capture.take_original_dst(local, peer)));
                }
                Err(error) if Instant::now() > deadline => return Err(format!("not captured: {error}")),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    fn captures(&self, name: &str, away: IpAddr, own: IpAddr) -> Probe {
        let failed = |detail: String| {
            let cost = "connections of enrolled pods in this family are not carried by the mesh";
            let state = if away.is_ipv4() { Fitness::Missing } else { Fitness::Degraded };
            lack(name, state, detail, cost, "see the detail; without IPv6 in the kernel nothing is lost")
        };
        match self.connection(away) {
            Err(problem) => failed(problem),
            Ok((client, _, original)) => {
                let names =
                    (original, client.peer_addr().ok(), client.local_addr().ok().map(|local| local.ip()));
                let to = Some(SocketAddr::new(away, 80));
                if names == (to, to, Some(own)) {
                    ok(name, "a real connection was captured, with true names")
                } else {
                    failed(format!("captured, but with wrong names: {names:?}"))
                }
            }
        }
    }

    fn destroys(&self) -> Probe {
        const NAME: &str = "SOCK_DESTROY";
        let outcome = self.connection(AWAY_V4).and_then(|(client, _, _)| {
            let local = client.local_addr().map_err(|error| error.to_string())?;
            let peer = self.listener_side(&client)?;
            sys::sock_destroy(&self.pod.netns, local, peer).map_err(|error| error.to_string())
        });
        match outcome {
            Ok(true) => ok(NAME, "a real connection was ended"),
            other => lack(
                NAME,
                Fitness::Degraded,
                format!("{other:?}"),
                "a policy that changes does not end connections of the fast path that it now denies",
                "a kernel with CONFIG_INET_DIAG_DESTROY=y, or `sameNode: tunnel`",
            ),
        }
    }

    /// The address that a captured client is really connected to; `getpeername` answers what it asked for.
    fn listener_side(&self, client: &TcpStream) -> Result<SocketAddr, String> {
        let local = client.local_addr().map_err(|error| error.to_string())?;
        let table = self
            .pod
            .netns
            .run(|| fs::read_to_string("/proc/thread-self/net/tcp"))
            .and_then(|text| text)
            .map_err(|error| error.to_string())?;
        let port = format!(":{:04X}", local.port());
        let entry = table.lines().filter_map(|line| {
            let mut fields = line.split_whitespace().skip(1);
            let (from, to) = (fields.next()?, fields.next()?);
            from.ends_with(&port).then(|| to.rsplit(':').next().map(str::to_owned))?
        });
        let remote = entry.filter_map(|text| u16::from_str_radix(&text, 16).ok()).find(|port| *port != 0);
        remote
            .map(|port| SocketAddr::new(local.ip(), port))
            .ok_or_else(|| "the connection is not in /proc/net/tcp".to_owned())
    }
}
