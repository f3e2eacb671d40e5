//! Tells what becomes of connections: sockets by `sock_ops` of the node's whole cgroup hierarchy.
//!
//! Only namespaces that user space names are looked at, and the agent's own sockets are left out: it tells itself what it
//! does for a connection, and its listeners' sockets are known by what they inherit. A program that cannot hand an event
//! over counts it and goes on; nothing here decides anything.

use super::context::SockOps;
use super::maps::{AGENT_CGROUPS, AGENTS, now, socket_storage};
use super::sockets::ask_for;
use aya_ebpf::bindings::{
    BPF_F_CLONE, BPF_F_NO_PREALLOC, BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP,
    BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB,
    BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_SOCK_OPS_TCP_LISTEN_CB, bpf_map_type,
    bpf_sock,
};
use aya_ebpf::helpers::generated::{bpf_get_current_task, bpf_sk_storage_get, bpf_skc_to_tcp_sock};
use aya_ebpf::helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_probe_read_kernel};
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::{Array, HashMap, PerCpuArray, RingBuf};
use aya_ebpf::programs::SockOpsContext;
use mesh_ebpf::trace::{ABSENT, Event, Traced, counter, flag, kind, setting};
use mesh_ebpf::{Address, Endpoint, HEARTBEAT_STALE_NS, Socket, Tuple, socket};

/// Room for a few hundred events; user space makes it larger where it traces.
const RING_BYTES: u32 = 1 << 16;
/// With this much unread, the reader is woken at once instead of at its next look.
const WAKE_BYTES: u64 = 1 << 17;
/// No structure of the kernel that is looked into is larger.
const MOST_OFFSET: u64 = u16::MAX as u64;
const TCP_ESTABLISHED: u32 = 1;
const TCP_SYN_SENT: u32 = 2;
const TCP_FIN_WAIT1: u32 = 4;
const TCP_FIN_WAIT2: u32 = 5;
const TCP_CLOSE: u32 = 7;
const TCP_CLOSE_WAIT: u32 = 8;
const TCP_LAST_ACK: u32 = 9;
const TCP_CLOSING: u32 = 11;
const HANDLED: u32 = 1;

#[map]
static TRACE_EVENTS: RingBuf = RingBuf::with_byte_size(RING_BYTES, 0);
#[map]
static TRACE_SETTINGS: Array<u64> = Array::with_max_entries(setting::LEN, 0);
#[map]
static TRACE_COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(counter::LEN, 0);
/// Netns cookie of a pod that is traced.
#[map]
static TRACE_NETNS: HashMap<u64, u32> = HashMap::with_max_entries(8192, BPF_F_NO_PREALLOC);
/// What is kept with a traced socket.
#[btf_map]
static TRACE_SOCKETS: ClonedStorage = ClonedStorage::new();

/// sk_storage whose values accepted sockets inherit from their listener: aya's own type has no room for that flag.
#[repr(C)]
struct ClonedStorage {
    r#type: *const [i32; bpf_map_type::BPF_MAP_TYPE_SK_STORAGE as usize],
    key: *const i32,
    value: *const Traced,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; (BPF_F_NO_PREALLOC | BPF_F_CLONE) as usize],
}

// SAFETY: placeholders for the loader, never dereferenced.
unsafe impl Sync for ClonedStorage {}

impl ClonedStorage {
    const fn new() -> Self {
        Self {
            r#type: core::ptr::null(),
            key: core::ptr::null(),
            value: core::ptr::null(),
            max_entries: core::ptr::null(),
            map_flags: core::ptr::null(),
        }
    }
}

/// What is kept with a socket; with `create`, something always is unless the kernel is out of memory.
#[inline(always)]
fn traced<'a>(socket: *mut bpf_sock, create: bool) -> Option<&'a mut Traced> {
    if socket.is_null() {
        return None;
    }
    let map = core::ptr::from_ref(&TRACE_SOCKETS).cast_mut().cast();
    // SAFETY: the socket is of the program's context; the value lives until the program ends.
    unsafe {
        bpf_sk_storage_get(map, socket.cast(), core::ptr::null_mut(), u64::from(create))
            .cast::<Traced>()
            .as_mut()
    }
}

/// A setting or an offset; [`ABSENT`] for an index that does not exist.
#[inline(always)]
pub(crate) fn given(index: u32) -> u64 {
    // SAFETY: array entries live as long as the map; user space writes them whole.
    TRACE_SETTINGS.get_ptr(index).map_or(ABSENT, |value| unsafe { value.read_volatile() })
}

/// Where a field is; nothing where the kernel has none. The verifier wants to see that it is no number at all.
#[inline(always)]
pub(crate) fn offset(index: u32) -> Option<u64> {
    let offset = given(index);
    (offset <= MOST_OFFSET).then_some(offset)
}

#[inline(always)]
pub(crate) fn count(index: u32) {
    if let Some(value) = TRACE_COUNTERS.get_ptr_mut(index) {
        // SAFETY: per-CPU entries are only touched by this CPU; a count that an interrupt loses is a sample.
        unsafe { *value += 1 }
    }
}

/// Whether a namespace is looked at.
#[inline(always)]
pub(crate) fn is_traced(netns: u64) -> bool {
    // SAFETY: the value is not read.
    unsafe { TRACE_NETNS.get(&netns) }.is_some()
}

/// A field of a kernel structure; nothing where the structure or the offset is unknown.
#[inline(always)]
pub(crate) fn read<T>(base: u64, at: u32) -> Option<T> {
    let offset = offset(at)?;
    if base == 0 {
        return None;
    }
    // SAFETY: the helper checks the address and fails instead of faulting.
    unsafe { bpf_probe_read_kernel(base.wrapping_add(offset) as *const T) }.ok()
}

/// Hands an event over, or counts it as lost.
#[inline(always)]
pub(crate) fn tell(event: Event) {
    let Some(mut entry) = TRACE_EVENTS.reserve::<Event>(0) else {
        count(counter::LOST);
        return;
    };
    entry.write(event);
    // The reader looks by itself every so often: waking it for each event would cost more than the event.
    let full = TRACE_EVENTS.query(BPF_RB_AVAIL_DATA as u64) > WAKE_BYTES;
    entry.submit(if full { BPF_RB_FORCE_WAKEUP } else { BPF_RB_NO_WAKEUP } as u64);
    count(counter::TOLD);
}

#[inline(always)]
fn netns(ops: &SockOps) -> u64 {
    // SAFETY: the helper takes the program's context.
    unsafe { bpf_get_netns_cookie(ops.0.cast()) }
}

#[inline(always)]
fn cookie(ops: &SockOps) -> u64 {
    // SAFETY: the helper takes the program's context.
    unsafe { bpf_get_socket_cookie(ops.0.cast()) }
}

/// Writes down which process calls, and whether it is an agent.
#[inline(always)]
fn note_process(known: &mut Traced) {
    // SAFETY: the helper takes nothing.
    let task = unsafe { bpf_get_current_task() };
    known.pid = read::<u32>(task, setting::TASK_PROCESS).unwrap_or(0);
    known.comm = read::<[u8; 16]>(task, setting::TASK_COMM).unwrap_or([0; 16]);
    let set = read::<u64>(task, setting::TASK_CGROUPS).unwrap_or(0);
    let group = read::<u64>(set, setting::SET_CGROUP).unwrap_or(0);
    let node = read::<u64>(group, setting::CGROUP_NODE).unwrap_or(0);
    known.cgroup = read::<u64>(node, setting::NODE_ID).unwrap_or(0);
    // SAFETY: the entry is plain data; user space only overwrites it with a newer time.
    let seen = unsafe { AGENTS.get(&known.pid) };
    let is_alive = seen.is_some_and(|seen| now().wrapping_sub(*seen) < HEARTBEAT_STALE_NS);
    // One whose process has another id where it runs is known by its cgroup.
    // SAFETY: the value is not read.
    let is_agent = is_alive || unsafe { AGENT_CGROUPS.get(&known.cgroup) }.is_some();
    known.flags = if is_agent { flag::AGENT } else { 0 };
}

#[inline(always)]
pub(crate) fn event(ctx: &SockOpsContext) -> u32 {
    let ops = SockOps::of(ctx);
    match ops.op() {
        BPF_SOCK_OPS_TCP_LISTEN_CB => listening(&ops),
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(&ops),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => established(&ops),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => accepted(&ops),
        BPF_SOCK_OPS_STATE_CB => changed(&ops),
        _ => {}
    }
    HANDLED
}

/// Who listens is who has the connections that are accepted.
#[inline(always)]
fn listening(ops: &SockOps) {
    if !is_traced(netns(ops)) {
        return;
    }
    let Some(known) = traced(ops.socket(), true) else { return };
    note_process(known);
    known.flags |= flag::LISTENER;
}

#[inline(always)]
fn connecting(ops: &SockOps) {
    let netns = netns(ops);
    if !is_traced(netns) {
        return;
    }
    let tuple = tuple(ops, false);
    if is_left_out(&tuple) {
        return;
    }
    let Some(known) = traced(ops.socket(), true) else { return };
    note_process(known);
    if known.flags & flag::AGENT != 0 {
        known.opened_ns = 0;
        return;
    }
    known.opened_ns = now();
    known.half_closed_at = 0;
    known.asked = Endpoint::new(Address::NONE, 0);
    known.decision = socket::NONE;
    known.policy = 0;
    // Capture's own hook ran before this one, because it is attached below or was attached earlier.
    if let Some(captured) = captured(ops) {
        known.decision = captured.state;
        if matches!(captured.state, socket::RECORDED | socket::AUTHORISED | socket::REFUSED) {
            known.asked = captured.destination;
            known.policy = captured.policy;
            // By this moment the agent knows the connection, too.
            if captured.flushed_ns != 0 && captured.state != socket::REFUSED {
                known.opened_ns = captured.flushed_ns;
            }
        }
    }
    ask_for(ops, BPF_SOCK_OPS_STATE_CB_FLAG);
    tell(about(ops, known, netns, tuple, kind::CONNECT));
}

/// What capture knows of a socket.
#[inline(always)]
fn captured<'a>(ops: &SockOps) -> Option<&'a mut Socket> {
    let socket = ops.socket();
    if socket.is_null() { None } else { socket_storage(socket, false) }
}

#[inline(always)]
fn established(ops: &SockOps) {
    let Some(known) = followed(ops) else { return };
    tell(about(ops, known, netns(ops), tuple(ops, false), kind::ESTABLISHED));
}

#[inline(always)]
fn accepted(ops: &SockOps) {
    let netns = netns(ops);
    if !is_traced(netns) {
        return;
    }
    let tuple = tuple(ops, true);
    if is_left_out(&tuple) {
        return;
    }
    let Some(known) = traced(ops.socket(), true) else { return };
    if known.flags & flag::AGENT != 0 {
        return;
    }
    known.opened_ns = now();
    known.flags = flag::SERVER;
    ask_for(ops, BPF_SOCK_OPS_STATE_CB_FLAG);
    tell(about(ops, known, netns, tuple, kind::ACCEPTED));
}

#[inline(always)]
fn changed(ops: &SockOps) {
    let (old, new) = (ops.arg0(), ops.arg1());
    let Some(known) = followed(ops) else { return };
    match (old, new) {
        (TCP_ESTABLISHED, TCP_FIN_WAIT1) => known.flags |= flag::CLOSED_HERE,
        (TCP_ESTABLISHED, TCP_CLOSE_WAIT) => known.flags |= flag::CLOSED_THERE | flag::FIN_RECEIVED,
        (_, TCP_CLOSING) => known.flags |= flag::FIN_RECEIVED,
        (_, TCP_FIN_WAIT2) => {
            known.flags |= flag::FIN_SENT;
            known.half_closed_at = ops.bytes_received();
        }
        (_, TCP_CLOSE) => closed(ops, known, old),
        _ => {}
    }
}

#[inline(always)]
fn closed(ops: &SockOps, known: &mut Traced, old: u32) {
    match old {
        TCP_FIN_WAIT2 if ops.bytes_received() > known.half_closed_at => known.flags |= flag::FIN_RECEIVED,
        TCP_LAST_ACK | TCP_CLOSING => known.flags |= flag::FIN_SENT,
        // A socket that was closed waits for the peer's FIN in another form.
        TCP_FIN_WAIT2 => {}
        _ => known.flags |= flag::ABORTED,
    }
    let is_server = known.flags & flag::SERVER != 0;
    let what = if old == TCP_SYN_SENT { kind::FAILED } else { kind::CLOSED };
    let mut event = about(ops, known, netns(ops), tuple(ops, is_server), what);
    event.state = old;
    event.reason = error(ops);
    tell(event);
    // The socket may connect again.
    known.opened_ns = 0;
}

/// The error that the application will hear of.
#[inline(always)]
fn error(ops: &SockOps) -> u32 {
    let socket = ops.socket();
    if socket.is_null() {
        return 0;
    }
    // SAFETY: the socket is of the program's context; the helper answers null for another kind.
    let socket = unsafe { bpf_skc_to_tcp_sock(socket.cast()) };
    if socket.is_null() {
        return 0;
    }
    let Some(offset) = offset(setting::SOCK_ERR) else { return 0 };
    // SAFETY: the helper checks the address and fails instead of faulting.
    unsafe { bpf_probe_read_kernel(socket.cast::<u8>().wrapping_add(offset as usize).cast::<u32>()) }
        .unwrap_or(0)
}

/// What is kept with a socket that is followed from its beginning.
#[inline(always)]
fn followed<'a>(ops: &SockOps) -> Option<&'a mut Traced> {
    let known = traced(ops.socket(), false)?;
    if known.opened_ns == 0 { None } else { Some(known) }
}

#[inline(always)]
fn tuple(ops: &SockOps, is_server: bool) -> Tuple {
    let (local, remote) = (ops.local(), ops.remote());
    let (client, server) = if is_server { (remote, local) } else { (local, remote) };
    Tuple {
        client: client.address,
        server: server.address,
        client_port: client.port,
        server_port: server.port,
    }
}

/// Whether sampling leaves a connection out. Both ends come to the same answer.
#[inline(always)]
fn is_left_out(tuple: &Tuple) -> bool {
    let mask = given(setting::SAMPLE_MASK);
    if mask == 0 || mask == ABSENT {
        return false;
    }
    let mut hash = (tuple.client_port as u32) << 16 | tuple.server_port as u32;
    hash = (hash ^ tuple.client.0[3]).wrapping_mul(0x9e37_79b1);
    hash = (hash ^ tuple.server.0[3] ^ (hash >> 15)).wrapping_mul(0x85eb_ca6b);
    hash ^= hash >> 13;
    if u64::from(hash) & mask == 0 {
        return false;
    }
    count(counter::UNSAMPLED);
    true
}

#[inline(always)]
fn about(ops: &SockOps, known: &Traced, netns: u64, tuple: Tuple, kind: u32) -> Event {
    // The kernel counts SYN and FIN as a byte each, but not the SYN of who was called.
    let signals = u64::from(known.flags & flag::SERVER == 0) + u64::from(known.flags & flag::FIN_SENT != 0);
    let received = u64::from(known.flags & flag::FIN_RECEIVED != 0);
    Event {
        at_ns: now(),
        netns,
        cookie: cookie(ops),
        opened_ns: known.opened_ns,
        cgroup: known.cgroup,
        bytes_sent: ops.bytes_acked().saturating_sub(signals),
        bytes_received: ops.bytes_received().saturating_sub(received),
        tuple,
        asked: known.asked,
        kind,
        flags: known.flags,
        reason: 0,
        count: 1,
        srtt_us: ops.srtt_us(),
        min_rtt_us: ops.min_rtt_us(),
        retransmits: ops.retransmits(),
        unacked: ops.unacked(),
        decision: known.decision,
        policy: known.policy,
        pid: known.pid,
        state: 0,
        comm: known.comm,
    }
}
