//! A small network: namespaces on one bridge, each with an IPv4 and an IPv6 address.

use mesh_node::capture::{Capture, CaptureConfig, Decision, EnrolledPod, ListenerKind, ObjectSource, Pair};
use mesh_node::pods::PodInfo;
use mesh_node::sys::{self, Netns};
use std::io::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Longer than anything here takes on a busy machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// The kernel programs under test.
pub(crate) fn object() -> ObjectSource {
    match std::env::var_os("UM_BPF_OBJECT") {
        Some(path) => ObjectSource::File(path.into()),
        None => panic!("UM_BPF_OBJECT names no kernel programs: run `cargo xtask test kernel`"),
    }
}

/// The cgroup that the tests run in.
pub(crate) fn own_cgroup() -> PathBuf {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mount = mounts.lines().find(|line| line.contains(" - cgroup2 ")).expect("cgroup2 is mounted");
    let mount = mount.split(' ').nth(4).unwrap();
    let cgroups = std::fs::read_to_string("/proc/self/cgroup").unwrap();
    let path = cgroups.lines().find_map(|line| line.strip_prefix("0::")).unwrap();
    PathBuf::from(mount).join(path.trim_start_matches('/'))
}

/// A configuration for tests: this process plays pods and agent at once.
pub(crate) fn config() -> CaptureConfig {
    CaptureConfig { host_cgroup: Some(own_cgroup()), exempt_self: false, ..CaptureConfig::new(object()) }
}

/// Runs lines of `ip`.
pub(crate) fn ip(lines: &str) {
    let mut child = Command::new("ip").args(["-batch", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "ip failed on:\n{lines}");
}

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Namespaces on one bridge; removed when dropped. Host `i` has 10.77.0.(i+1) and fd77::(i+1).
pub(crate) struct Net {
    pub(crate) prefix: String,
    pub(crate) hosts: Vec<Netns>,
}

impl Net {
    pub(crate) fn new(hosts: usize) -> Self {
        let prefix = format!("um-k{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let mut lines = format!("netns add {prefix}-br\n");
        for i in 0..hosts {
            lines += &format!("netns add {prefix}-{i}\n");
        }
        ip(&lines);
        let bridge = format!("-n {prefix}-br");
        sh("ip", &[&bridge, "link add br0 type bridge"]);
        sh("ip", &[&bridge, "link set br0 up"]);
        for i in 0..hosts {
            let host = format!("-n {prefix}-{i}");
            sh("ip", &[&bridge, &format!("link add v{i} type veth peer name eth0 netns {prefix}-{i}")]);
            sh("ip", &[&bridge, &format!("link set v{i} master br0 up")]);
            sh("ip", &[&host, "link set lo up"]);
            sh("ip", &[&host, &format!("addr add 10.77.0.{}/24 dev eth0", i + 1)]);
            sh("ip", &[&host, &format!("addr add fd77::{:x}/64 dev eth0 nodad", i + 1)]);
            sh("ip", &[&host, "link set eth0 up"]);
        }
        let open = |i| Netns::open(&format!("/var/run/netns/{prefix}-{i}").into_path()).unwrap();
        Self { hosts: (0..hosts).map(open).collect(), prefix }
    }

    pub(crate) fn info(&self, host: usize) -> PodInfo {
        PodInfo {
            uid: format!("{}-{host}", self.prefix),
            name: format!("pod-{host}"),
            namespace: "test".into(),
            service_account: "default".into(),
            netns: format!("/var/run/netns/{}-{host}", self.prefix).into(),
            cgroup: own_cgroup(),
            labels: Default::default(),
            probe_ports: Vec::new(),
            dns_search: None,
            host_network: false,
        }
    }
}

trait IntoPath {
    fn into_path(self) -> PathBuf;
}

impl IntoPath for String {
    fn into_path(self) -> PathBuf {
        self.into()
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for i in 0..self.hosts.len() {
            let _ = Command::new("ip").args(["netns", "del", &format!("{}-{i}", self.prefix)]).status();
        }
        let _ = Command::new("ip").args(["netns", "del", &format!("{}-br", self.prefix)]).status();
    }
}

/// Runs a program with arguments given as words.
pub(crate) fn sh(program: &str, words: &[&str]) {
    let words: Vec<&str> = words.iter().flat_map(|part| part.split(' ')).collect();
    let status = Command::new(program).args(&words).status().unwrap();
    assert!(status.success(), "{program} {words:?}");
}

/// Runs lines of `ip` in a host's namespace.
pub(crate) fn ip_in(net: &Net, host: usize, lines: &str) {
    let name = format!("{}-{host}", net.prefix);
    let mut command = Command::new("ip");
    let mut child = command.args(["-n", &name, "-batch", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "ip failed on:\n{lines}");
}

/// Gives rules to nftables in a host's namespace.
pub(crate) fn nft(net: &Net, host: usize, rules: &str) {
    let name = format!("{}-{host}", net.prefix);
    let mut command = Command::new("ip");
    command.args(["netns", "exec", &name, "nft", "-f", "-"]).stdin(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(rules.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "nft failed on:\n{rules}");
}

/// Packets that a host's nftables have counted.
pub(crate) fn dropped(net: &Net, host: usize) -> u64 {
    let name = format!("{}-{host}", net.prefix);
    let listed =
        Command::new("ip").args(["netns", "exec", &name, "nft", "list", "ruleset"]).output().unwrap();
    let text = String::from_utf8(listed.stdout).unwrap();
    text.split("counter packets ")
        .skip(1)
        .filter_map(|rest| rest.split(' ').next()?.parse::<u64>().ok())
        .sum()
}

pub(crate) fn v4(host: usize) -> IpAddr {
    Ipv4Addr::new(10, 77, 0, host as u8 + 1).into()
}

pub(crate) fn v6(host: usize) -> IpAddr {
    Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, host as u16 + 1).into()
}

pub(crate) fn at(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip, port)
}

/// An enrolled, captured pod with its listeners.
pub(crate) struct Pod {
    pub(crate) pod: Arc<EnrolledPod>,
    pub(crate) outbound: TcpListener,
    pub(crate) inbound: TcpListener,
    pub(crate) hbone: TcpListener,
    pub(crate) dns: TcpListener,
}

impl Pod {
    pub(crate) fn enrol(capture: &Capture, info: &PodInfo) -> Self {
        let pod = capture.enrol(info).unwrap();
        let make = || sys::listener(&pod.netns, 0, 4096).unwrap();
        let this = Self { outbound: make(), inbound: make(), hbone: make(), dns: make(), pod };
        this.register(capture);
        capture.activate(&this.pod).unwrap();
        this
    }

    pub(crate) fn register(&self, capture: &Capture) {
        for (kind, listener) in [
            (ListenerKind::Outbound, &self.outbound),
            (ListenerKind::Inbound, &self.inbound),
            (ListenerKind::Hbone, &self.hbone),
            (ListenerKind::DnsTcp, &self.dns),
        ] {
            capture.set_listener(&self.pod, kind, listener).unwrap();
        }
    }
}

/// A captured pod 0, a captured pod 1, and host 2 outside of the mesh.
pub(crate) struct Mesh {
    pub(crate) capture: Capture,
    pub(crate) pods: Vec<Pod>,
    pub(crate) net: Net,
}

impl Mesh {
    pub(crate) fn new() -> Self {
        Self::with(config())
    }

    pub(crate) fn with(config: CaptureConfig) -> Self {
        let net = Net::new(3);
        let capture = Capture::load(config).unwrap();
        let pods = (0..2).map(|i| Pod::enrol(&capture, &net.info(i))).collect();
        Self { capture, pods, net }
    }

    pub(crate) fn host(&self, host: usize) -> &Netns {
        &self.net.hosts[host]
    }

    pub(crate) fn count(&self, reason: &str) -> u64 {
        self.capture.counter(reason).unwrap()
    }
}

/// Writes a verdict that lets pod 0 talk to port 8080 of a destination without the agent.
pub(crate) fn allow(mesh: &Mesh, source: IpAddr, destination: IpAddr, generation: u32) -> Pair {
    let pair = Pair { netns: mesh.pods[0].pod.cookie, source, destination, port: 8080 };
    let decision = Decision { allow: true, policy: 7, flags: 0 };
    mesh.capture.set_verdict(&pair, decision, generation).unwrap();
    pair
}

/// Accepts one connection of a non-blocking listener.
pub(crate) fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    let deadline = Instant::now() + DEADLINE;
    loop {
        match listener.accept() {
            Ok((stream, peer)) => {
                stream.set_nonblocking(false).unwrap();
                return (stream, canonical(peer));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => panic!("accept: {error}"),
        }
        assert!(Instant::now() < deadline, "nobody connected");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Whether a non-blocking listener has no connection waiting.
pub(crate) fn is_idle(listener: &TcpListener) -> bool {
    listener.accept().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}

pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Connects from a namespace with a time limit.
pub(crate) fn connect(from: &Netns, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = from.socket(socket2::Domain::for_address(to), socket2::Type::STREAM, None)?;
    socket.connect_timeout(&to.into(), Duration::from_secs(5))?;
    Ok(socket.into())
}

/// A server of the application in a namespace, on every address.
pub(crate) fn serve(netns: &Netns, port: u16) -> TcpListener {
    let socket = netns.socket(socket2::Domain::IPV6, socket2::Type::STREAM, None).unwrap();
    socket.set_only_v6(false).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into()).unwrap();
    socket.listen(4096).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket.into()
}

/// Waits until `done` holds.
pub(crate) fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !done() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A pin directory of a test; removed when dropped.
pub(crate) struct Pins {
    path: PathBuf,
}

impl Pins {
    pub(crate) fn new(name: &str) -> Self {
        Self { path: PathBuf::from("/sys/fs/bpf").join(name) }
    }

    pub(crate) fn config(&self) -> CaptureConfig {
        CaptureConfig { pins: Some(self.path.clone()), ..config() }
    }

    /// A pin of this layout.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path.join(format!("v{}", mesh_node::capture::LAYOUT_VERSION)).join(name)
    }

    /// Makes what is pinned look like another layout's, and says where it is.
    pub(crate) fn rename_layout(&self, name: &str) -> PathBuf {
        let here = self.path.join(format!("v{}", mesh_node::capture::LAYOUT_VERSION));
        let there = self.path.join(name);
        std::fs::rename(here, &there).unwrap();
        there
    }

    /// Attaches every program of the object once more, on the pinned maps: what it looks like while one generation
    /// of programs replaces another.
    pub(crate) fn attach_again(&self, net: &Net) -> aya::Ebpf {
        use aya::programs::{CgroupAttachMode, Program};
        let ObjectSource::File(object) = object() else { unreachable!() };
        let directory = self.path.join(format!("v{}", mesh_node::capture::LAYOUT_VERSION));
        let names: Vec<String> = std::fs::read_dir(&directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.chars().all(|c| c.is_ascii_uppercase() || c == '_'))
            .collect();
        let mut loader = aya::EbpfLoader::new();
        for name in &names {
            loader.map_pin_path(name, directory.join(name));
        }
        let mut ebpf = loader.load(&std::fs::read(object).unwrap()).unwrap();
        let cgroup = std::fs::File::open(own_cgroup()).unwrap();
        for (_, program) in ebpf.programs_mut() {
            match program {
                Program::CgroupSockAddr(program) => {
                    program.load().unwrap();
                    program.attach(&cgroup, CgroupAttachMode::Single).unwrap();
                }
                Program::SockOps(program) => {
                    program.load().unwrap();
                    program.attach(&cgroup, CgroupAttachMode::Single).unwrap();
                }
                Program::CgroupSkb(program) => {
                    program.load().unwrap();
                    let kind = aya::programs::CgroupSkbAttachType::Egress;
                    program.attach(&cgroup, kind, CgroupAttachMode::Single).unwrap();
                }
                Program::SkLookup(program) => {
                    program.load().unwrap();
                    for host in &net.hosts[..2] {
                        program.attach(host).unwrap();
                    }
                }
                // Tracing is not there twice.
                Program::RawTracePoint(_) => {}
                _ => panic!("an unknown kind of program"),
            }
        }
        ebpf
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}
