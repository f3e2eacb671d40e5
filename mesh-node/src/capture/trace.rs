//! Kernel-level tracing: the programs that tell what becomes of connections and packets, while this agent lives.
//!
//! Nothing is pinned: the hooks end with [`Tracing`], and capture neither needs them nor notices. A hook that this kernel
//! does not offer is reported ([`Tracing::hooks`]) and the others go on.

mod btf;

use super::maps::{descriptor, sync};
use super::{Capture, CaptureConfig, CaptureError, loader};
use crate::sys::Netns;
use crate::sys::bpf::{self, AttachType, PerCpuCounters, Table};
use crate::sys::poll::Poll;
use aya::maps::{MapData, RingBuf};
use aya::programs::Program;
use aya::programs::raw_trace_point::RawTracePointLink;
use aya::{Ebpf, Pod as Plain};
use btf::Btf;
use mesh_core::admin::{Fitness, Probe};
use mesh_ebpf::trace::{ABSENT, REASONS, REPEAT_NS, Repeat, RepeatKey, counter, setting};
use mesh_ebpf::{Address, socket};
use serde::Serialize;
use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

pub use mesh_ebpf::trace::{Event, flag, kind};

const BTF: &str = "/sys/kernel/btf/vmlinux";
/// The tracepoints: program, category, name, what is not seen without it.
const POINTS: [(&str, &str, &str, &str); 4] = [
    ("trace_retransmit", "tcp", "tcp_retransmit_skb", "no event for each retransmission"),
    ("trace_reset_sent", "tcp", "tcp_send_reset", "resets that are sent are not seen"),
    ("trace_reset_received", "tcp", "tcp_receive_reset", "resets that arrive are not told from aborts"),
    ("trace_drop", "skb", "kfree_skb", "dropped packets are not seen"),
];
/// Arguments that came to tracepoints over time: tracepoint, place among the arguments, where the program looks it up.
const ARGUMENTS: [(&str, usize, u32); 3] = [
    ("tcp_send_reset", 2, setting::RESET_REASON),
    ("kfree_skb", 2, setting::DROP_REASON),
    ("kfree_skb", 3, setting::DROP_SOCK),
];
/// The enumerations of reasons, and what their members' names begin with.
const DROP_REASONS: (&str, &str) = ("skb_drop_reason", "SKB_DROP_REASON_");
const RESET_REASONS: (&str, &str) = ("sk_rst_reason", "SK_RST_REASON_");
/// Structures of the kernel that the programs look into.
const STRUCTURES: [(u32, &str, &[&str]); 23] = [
    (setting::SOCK_NET, "sock", &["__sk_common", "skc_net"]),
    (setting::SOCK_COOKIE, "sock", &["__sk_common", "skc_cookie"]),
    (setting::SOCK_ERR, "sock", &["sk_err"]),
    (setting::SOCK_FAMILY, "sock", &["__sk_common", "skc_family"]),
    (setting::SOCK_STATE, "sock", &["__sk_common", "skc_state"]),
    (setting::SOCK_OWN_PORT, "inet_sock", &["inet_sport"]),
    (setting::SOCK_PEER_PORT, "sock", &["__sk_common", "skc_dport"]),
    (setting::SOCK_OWN, "sock", &["__sk_common", "skc_rcv_saddr"]),
    (setting::SOCK_PEER, "sock", &["__sk_common", "skc_daddr"]),
    (setting::SOCK_OWN_V6, "sock", &["__sk_common", "skc_v6_rcv_saddr"]),
    (setting::SOCK_PEER_V6, "sock", &["__sk_common", "skc_v6_daddr"]),
    (setting::NET_COOKIE, "net", &["net_cookie"]),
    (setting::SKB_HEAD, "sk_buff", &["head"]),
    (setting::SKB_NETWORK, "sk_buff", &["network_header"]),
    (setting::SKB_DEV, "sk_buff", &["dev"]),
    (setting::SKB_SOCK, "sk_buff", &["sk"]),
    (setting::DEV_NET, "net_device", &["nd_net"]),
    (setting::TASK_PROCESS, "task_struct", &["tgid"]),
    (setting::TASK_COMM, "task_struct", &["comm"]),
    (setting::TASK_CGROUPS, "task_struct", &["cgroups"]),
    (setting::SET_CGROUP, "css_set", &["dfl_cgrp"]),
    (setting::CGROUP_NODE, "cgroup", &["kn"]),
    (setting::NODE_ID, "kernfs_node", &["id"]),
];
/// Reasons for freeing a packet that are no loss: what was delivered already, is not for us, or ended with its socket.
const NO_LOSS: [&str; 9] = [
    "NOT_SPECIFIED",
    "SOCKET_CLOSE",
    "QUEUE_PURGE",
    "TCP_RESET",
    "TCP_OLD_DATA",
    "TCP_OLD_ACK",
    "TCP_OFOMERGE",
    "OTHERHOST",
    "PACKET_SOCK_ERROR",
];

/// What is looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Traced {
    /// Netns cookies of pods.
    pub namespaces: Vec<u64>,
    /// Their addresses: packets of theirs are recognised on the node by them.
    pub addresses: Vec<IpAddr>,
}

/// What the programs counted so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Told {
    /// Events that were handed over.
    pub told: u64,
    /// Events that found the ring full.
    pub lost: u64,
    /// Events that were added to an earlier one.
    pub repeated: u64,
    /// Connections that sampling left out.
    pub unsampled: u64,
    /// Packets of any namespace whose hook the kernel did not run, because the CPU was running it already: at most as many
    /// retransmissions, resets and drops were not told.
    pub missed: u64,
}

/// What capture made of a connection, in the words of flow events; empty for what it left alone.
#[must_use]
pub fn decision(state: u32) -> &'static str {
    match state {
        socket::RECORDED | socket::CAPTURED | socket::CAPTURED_DNS => "captured",
        socket::AUTHORISED | socket::FAST_PATH => "fast_path",
        socket::REFUSED => "refused_map_full",
        socket::PROBE => "probe",
        _ => "",
    }
}

/// The kernel's list of the pods that are traced.
#[derive(Debug)]
pub struct Watched {
    netns: Table<u64, u32>,
    addresses: Table<Address, u32>,
}

impl Watched {
    /// Looks at exactly these pods from now on.
    ///
    /// # Errors
    /// More namespaces or addresses than the maps hold.
    pub fn follow(&self, traced: &Traced) -> Result<(), CaptureError> {
        let addresses = traced.addresses.iter().map(|ip| (Address::from(*ip), 1)).collect();
        sync(&self.addresses, "TRACE_ADDRESSES", addresses)?;
        sync(&self.netns, "TRACE_NETNS", traced.namespaces.iter().map(|cookie| (*cookie, 1)).collect())
    }
}

/// The attached hooks and what they write to; they end when this is dropped.
pub struct Tracing {
    ring: RingBuf<MapData>,
    poll: Poll,
    counters: PerCpuCounters,
    watched: Arc<Watched>,
    repeats: Table<RepeatKey, Repeat>,
    settings: Table<u32, u64>,
    /// What the kernel tells of its structures.
    structures: Probe,
    hooks: Vec<Probe>,
    drop_reasons: HashMap<u32, String>,
    reset_reasons: HashMap<u32, String>,
    /// As counted when repeated events were last gathered.
    gathered: u64,
    points: Vec<Point>,
    /// What the kernel did not run hooks for that are detached.
    missed: u64,
    /// The same of all hooks, as of the last time that repeated events were gathered.
    missed_by_all: u64,
    sockets: Option<OwnedFd>,
}

/// A tracepoint's program while it is attached.
struct Point {
    program: OwnedFd,
    _link: RawTracePointLink,
}

impl Point {
    /// How often the kernel did not run the program, because the CPU was running it already.
    fn missed(&self) -> u64 {
        let of = format!("/proc/self/fdinfo/{}", self.program.as_raw_fd());
        let text = fs::read_to_string(of).unwrap_or_default();
        let missed = text.lines().find_map(|line| line.strip_prefix("recursion_misses:"));
        missed.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
    }
}

impl std::fmt::Debug for Tracing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tracing").field("hooks", &self.hooks).finish_non_exhaustive()
    }
}

fn table<K: Plain, V: Plain>(ebpf: &Ebpf, name: &'static str) -> Result<Table<K, V>, CaptureError> {
    Table::new(descriptor(ebpf, name)?).map_err(|source| CaptureError::Map { map: name, source })
}

fn lacking(name: &str, detail: impl Into<String>, cost: &str, fix: &str) -> Probe {
    Probe {
        name: name.into(),
        state: Fitness::Degraded,
        detail: detail.into(),
        cost: cost.into(),
        fix: fix.into(),
    }
}

fn working(name: &str, detail: impl Into<String>) -> Probe {
    Probe { name: name.into(), state: Fitness::Ok, detail: detail.into(), ..Probe::default() }
}

/// What the kernel says of itself.
struct Kernel {
    structures: Probe,
    drop_reasons: HashMap<u32, String>,
    reset_reasons: HashMap<u32, String>,
}

/// Tells the programs where things are in this kernel; says what it does not tell.
fn describe(settings: &Table<u32, u64>, config: &CaptureConfig) -> io::Result<Kernel> {
    const NAME: &str = "trace: structures";
    const COST: &str =
        "events say neither process nor error, and drops, resets and retransmissions are not seen";
    for index in 0..setting::LEN {
        settings.set(&index, &ABSENT, bpf::Write::Any)?;
    }
    settings.set(&setting::SAMPLE_MASK, &0, bpf::Write::Any)?;
    let home = config.node_netns.as_deref().map_or_else(Netns::home, Netns::open);
    let home = home.and_then(|home| home.cookie()).unwrap_or(ABSENT);
    settings.set(&setting::HOME, &home, bpf::Write::Any)?;
    let without = |structures| {
        Ok(Kernel { structures, drop_reasons: HashMap::default(), reset_reasons: HashMap::default() })
    };
    let Ok(bytes) = fs::read(BTF) else {
        let fix = "a kernel with CONFIG_DEBUG_INFO_BTF=y";
        return without(lacking(NAME, "the kernel has no BTF", COST, fix));
    };
    let Some(types) = Btf::parse(&bytes) else {
        let detail = format!("{BTF} cannot be read");
        return without(lacking(NAME, detail, COST, "report this kernel's version"));
    };
    let mut missing = Vec::new();
    for (index, structure, path) in STRUCTURES {
        match types.offset(structure, path) {
            Some(offset) => settings.set(&index, &u64::from(offset), bpf::Write::Any)?,
            None => missing.push(format!("{structure}.{}", path.join("."))),
        }
    }
    for (tracepoint, place, index) in ARGUMENTS {
        if types.arguments(tracepoint).is_some_and(|count| place < count) {
            // Each takes eight bytes, whatever its type.
            settings.set(&index, &(place as u64 * 8), bpf::Write::Any)?;
        }
    }
    let structures = if missing.is_empty() {
        working(NAME, "all that are needed are in BTF")
    } else {
        lacking(NAME, format!("without {}", missing.join(", ")), COST, "report this kernel's version")
    };
    let names = |(enumeration, prefix): (&str, &str)| {
        let named = types.enumerators(enumeration).into_iter();
        named.filter_map(|(number, name)| Some((number, name.strip_prefix(prefix)?.to_owned()))).collect()
    };
    Ok(Kernel { structures, drop_reasons: names(DROP_REASONS), reset_reasons: names(RESET_REASONS) })
}

/// Loads one tracepoint program and attaches it.
fn attach_point(ebpf: &mut Ebpf, program: &'static str, name: &str) -> Result<Point, String> {
    let Some(Program::RawTracePoint(point)) = ebpf.program_mut(program) else {
        return Err("the kernel programs have no such hook".to_owned());
    };
    if point.fd().is_err() {
        point.load().map_err(|error| error.to_string())?;
    }
    let link = point.attach(name).map_err(|error| error.to_string())?;
    let _link = point.take_link(link).map_err(|error| error.to_string())?;
    let program = point.fd().map_err(|error| error.to_string())?.as_fd().try_clone_to_owned();
    Ok(Point { program: program.map_err(|error| error.to_string())?, _link })
}

fn attach_sockets(ebpf: &mut Ebpf, config: &CaptureConfig) -> Result<OwnedFd, CaptureError> {
    let program = loader::load_program(ebpf, "trace_sockets")?;
    let path = loader::cgroup(config.host_cgroup.as_deref())?;
    let directory = loader::open_cgroup(&path)?;
    bpf::attach(program.as_fd(), directory.as_fd(), AttachType::CgroupSockOps).map_err(|source| {
        let target = format!("cgroup {}", path.display());
        CaptureError::Attach { name: "trace_sockets", target, source }
    })
}

impl Capture {
    /// Attaches the tracing programs and gives what reads them. Works once per loaded object: the ring is taken out.
    /// Nothing is traced before [`Watched::follow`]. `config` is what capture was loaded with.
    ///
    /// # Errors
    /// The object has no tracing, or the kernel refuses its maps. A hook that cannot be attached is no error: see
    /// [`Tracing::hooks`].
    pub fn trace(&self, config: &CaptureConfig) -> Result<Tracing, CaptureError> {
        const RING: &str = "TRACE_EVENTS";
        let mut ebpf = self.programs.ebpf();
        let settings = table(&ebpf, "TRACE_SETTINGS")?;
        let failed = |source| CaptureError::Map { map: "TRACE_SETTINGS", source };
        let Kernel { structures, drop_reasons, reset_reasons } =
            describe(&settings, config).map_err(failed)?;
        ignore(&table(&ebpf, "TRACE_REASONS")?, &drop_reasons)?;
        let poll_failed = |source| CaptureError::Map { map: RING, source };
        let ring = ebpf.take_map(RING).ok_or(CaptureError::NoMap(RING))?;
        let ring = RingBuf::try_from(ring).map_err(|_not_a_ring| CaptureError::NoMap(RING))?;
        let poll = Poll::new().map_err(poll_failed)?;
        poll.add(&ring, 0).map_err(poll_failed)?;
        let counters = PerCpuCounters::new(descriptor(&ebpf, "TRACE_COUNTERS")?)
            .map_err(|source| CaptureError::Map { map: "TRACE_COUNTERS", source })?;
        let mut tracing = Tracing {
            ring,
            poll,
            counters,
            watched: Arc::new(Watched {
                netns: table(&ebpf, "TRACE_NETNS")?,
                addresses: table(&ebpf, "TRACE_ADDRESSES")?,
            }),
            repeats: table(&ebpf, "TRACE_REPEATS")?,
            settings,
            structures,
            hooks: Vec::new(),
            drop_reasons,
            reset_reasons,
            gathered: 0,
            points: Vec::new(),
            missed: 0,
            missed_by_all: 0,
            sockets: None,
        };
        drop(ebpf);
        tracing.attach(self, config);
        Ok(tracing)
    }
}

/// Leaves out the reasons that are no loss.
fn ignore(table: &Table<u32, u32>, names: &HashMap<u32, String>) -> Result<(), CaptureError> {
    for (number, name) in names.iter().filter(|(number, _)| **number < REASONS) {
        let ignored = u32::from(NO_LOSS.contains(&name.as_str()));
        table
            .set(number, &ignored, bpf::Write::Any)
            .map_err(|source| CaptureError::Map { map: "TRACE_REASONS", source })?;
    }
    Ok(())
}

impl Tracing {
    /// Attaches every hook that this kernel offers, unless they are attached. `config` is what capture was loaded with.
    pub fn attach(&mut self, capture: &Capture, config: &CaptureConfig) {
        if self.is_attached() {
            return;
        }
        let mut ebpf = capture.programs.ebpf();
        let mut hooks = vec![self.structures.clone()];
        for (program, category, name, cost) in POINTS {
            let label = format!("trace: {category}:{name}");
            match attach_point(&mut ebpf, program, name) {
                Ok(point) => {
                    self.missed = self.missed.wrapping_sub(point.missed());
                    self.points.push(point);
                    hooks.push(working(&label, "attached"));
                }
                Err(problem) => {
                    hooks.push(lacking(&label, problem, cost, "run as root on Linux 5.17 or newer"));
                }
            }
        }
        const SOCKETS: &str = "trace: sockets";
        match attach_sockets(&mut ebpf, config) {
            Ok(link) => {
                self.sockets = Some(link);
                hooks.push(working(SOCKETS, "attached"));
            }
            Err(error) => {
                let cost = "connections are not seen, only what goes wrong with packets";
                hooks.push(lacking(SOCKETS, error.to_string(), cost, "see the detail"));
            }
        }
        self.hooks = hooks;
    }

    /// Detaches every hook: nothing is traced, and nothing costs anything.
    pub fn detach(&mut self) {
        self.missed = self.missed();
        self.points.clear();
        self.sockets = None;
    }

    /// What the kernel did not run hooks for so far. A program keeps its count when it is attached again.
    fn missed(&self) -> u64 {
        self.points.iter().fold(self.missed, |sum, point| sum.wrapping_add(point.missed()))
    }

    /// Whether any hook is attached.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        self.sockets.is_some() || !self.points.is_empty()
    }

    /// What is attached and what this kernel lacks.
    #[must_use]
    pub fn hooks(&self) -> &[Probe] {
        &self.hooks
    }

    /// What says which pods are looked at, for whoever knows the pods.
    #[must_use]
    pub fn watched(&self) -> Arc<Watched> {
        Arc::clone(&self.watched)
    }

    /// Follows one of two to the power of `halvings` connections, chosen by tuple so that both ends agree.
    ///
    /// # Errors
    /// Only if the kernel refuses the map write.
    pub fn sample(&self, halvings: u8) -> Result<(), CaptureError> {
        let mask = (1_u64 << halvings.min(31)) - 1;
        self.settings
            .set(&setting::SAMPLE_MASK, &mask, bpf::Write::Any)
            .map_err(|source| CaptureError::Map { map: "TRACE_SETTINGS", source })
    }

    /// Waits for at most `milliseconds`, then hands over every event that is there.
    ///
    /// # Errors
    /// Only if the kernel refuses to wait.
    pub fn read(&mut self, milliseconds: i32, mut take: impl FnMut(&Event)) -> io::Result<()> {
        self.poll.wait(milliseconds)?;
        while let Some(item) = self.ring.next() {
            if let Some(event) = bpf::plain(&item) {
                take(&event);
            }
        }
        Ok(())
    }

    /// Hands over what was counted as a repetition and has not been told since: call it every few seconds.
    ///
    /// # Errors
    /// Only if the kernel refuses the map read.
    pub fn gather(&mut self, now_ns: u64, mut take: impl FnMut(&Event)) -> io::Result<()> {
        // It is a file for each hook: not to be read as often as events are.
        self.missed_by_all = self.missed();
        let repeated = self.counters.sum(counter::REPEATED)?;
        if std::mem::replace(&mut self.gathered, repeated) == repeated {
            return Ok(());
        }
        for (key, known) in self.repeats.entries()? {
            if known.count == 0 || now_ns.saturating_sub(known.told_ns) < REPEAT_NS {
                // Too early: they are looked at again.
                self.gathered = self.gathered.wrapping_sub(u64::from(known.count > 0));
                continue;
            }
            // What was told since it was read is not told again.
            let Some(known) = self.repeats.take(&key)?.filter(|known| known.count > 0) else { continue };
            take(&Event {
                at_ns: now_ns,
                netns: known.netns,
                cookie: known.cookie,
                tuple: key.tuple,
                kind: key.kind,
                flags: known.flags,
                reason: key.reason,
                count: known.count,
                ..Event::default()
            });
        }
        Ok(())
    }

    /// What the programs counted so far.
    ///
    /// # Errors
    /// Only if the kernel refuses the map read.
    pub fn told(&self) -> io::Result<Told> {
        Ok(Told {
            told: self.counters.sum(counter::TOLD)?,
            lost: self.counters.sum(counter::LOST)?,
            repeated: self.counters.sum(counter::REPEATED)?,
            unsampled: self.counters.sum(counter::UNSAMPLED)?,
            missed: self.missed_by_all,
        })
    }

    /// The running kernel's names for reasons of drops, and of resets.
    #[must_use]
    pub fn reasons(&self) -> (HashMap<u32, String>, HashMap<u32, String>) {
        (self.drop_reasons.clone(), self.reset_reasons.clone())
    }
}
