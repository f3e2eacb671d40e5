//! What happens to sockets of pods after connect: the original destination is recorded and the tuple authorised
//! where the source port is known and the SYN has not left (TCP_CONNECT_CB); tuples go when they are no longer
//! needed; figures of fast path connections are kept.
//!
//! An authorised tuple stays until the accepting side is established or the client's socket closes: the ACK of a SYN
//! cookie looks up the listener again after the client is already established.

use super::context::SockOps;
use super::maps::{
    AUTHORISED, FLOWS, ORIGINALS, PODS, allowed, count, flow as new_flow, now, socket_storage,
};
use aya_ebpf::bindings::{
    BPF_ANY, BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_RTT_CB,
    BPF_SOCK_OPS_RTT_CB_FLAG, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB,
};
use aya_ebpf::helpers::{
    bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_setsockopt, bpf_sock_ops_cb_flags_set,
};
use aya_ebpf::programs::SockOpsContext;
use mesh_ebpf::{
    Authorised, Original, Reason, Socket, Tuple, VerdictKey, authorised, fin, flow, listener, socket,
};

const TCP_SYN_SENT: u32 = 2;
const TCP_FIN_WAIT2: u32 = 5;
const TCP_CLOSE: u32 = 7;
const TCP_CLOSE_WAIT: u32 = 8;
const TCP_LAST_ACK: u32 = 9;
const TCP_CLOSING: u32 = 11;
const HANDLED: u32 = 1;
/// Figures of a busy connection are written this often.
const FLUSH_NS: u64 = 1_000_000_000;

#[inline(always)]
pub(crate) fn event(ctx: &SockOpsContext) -> u32 {
    let ops = SockOps::of(ctx);
    match ops.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(&ops),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => accepted(&ops),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => established(&ops),
        BPF_SOCK_OPS_RTT_CB => measured(&ops),
        BPF_SOCK_OPS_STATE_CB => changed(&ops),
        _ => {}
    }
    HANDLED
}

/// The connection as its client has it.
#[inline(always)]
fn as_client(ops: &SockOps) -> Tuple {
    let (local, remote) = (ops.local(), ops.remote());
    Tuple { client: local.address, server: remote.address, client_port: local.port, server_port: remote.port }
}

#[inline(always)]
fn known<'a>(ops: &SockOps) -> Option<&'a mut Socket> {
    let socket = ops.socket();
    if socket.is_null() { None } else { socket_storage(socket, false) }
}

/// Asks to be called for more; what other programs asked for stays.
#[inline(always)]
pub(crate) fn ask_for(ops: &SockOps, flags: u32) {
    let flags = flags | ops.asked_for();
    // SAFETY: the helper takes the program's context.
    unsafe { bpf_sock_ops_cb_flags_set(ops.0, flags as i32) };
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

/// A map is full: the SYN does not leave (the enforcement drops it), and the caller hears of it after seconds, not
/// minutes.
#[inline(always)]
fn refuse(ops: &SockOps, known: &mut Socket) {
    const SOL_TCP: i32 = 6;
    const TCP_SYNCNT: i32 = 7;
    known.state = socket::REFUSED;
    count(Reason::RefusedFull);
    let mut retries = 1_i32;
    // SAFETY: the option's value is four bytes on this stack.
    unsafe { bpf_setsockopt(ops.0.cast(), SOL_TCP, TCP_SYNCNT, (&raw mut retries).cast(), 4) };
}

#[inline(always)]
fn connecting(ops: &SockOps) {
    let Some(known) = known(ops) else { return };
    match known.state {
        socket::CAPTURED | socket::CAPTURED_DNS => record(ops, known),
        socket::FAST_PATH => fast_path(ops, known),
        socket::SELF => {
            if authorise(ops, authorised::SELF, 0) {
                known.state = socket::AUTHORISED;
                ask_for(ops, BPF_SOCK_OPS_STATE_CB_FLAG);
            } else {
                refuse(ops, known);
            }
        }
        _ => {}
    }
}

#[inline(always)]
fn record(ops: &SockOps, known: &mut Socket) {
    let listener = if known.state == socket::CAPTURED { listener::OUTBOUND } else { listener::DNS_TCP };
    let original = Original { destination: known.destination, listener, created_ns: now() };
    if ORIGINALS.insert(&as_client(ops), &original, BPF_ANY as u64).is_ok() {
        known.state = socket::RECORDED;
        // Tracing tells of the connection by the moment that the agent finds in the record.
        known.flushed_ns = original.created_ns;
        ask_for(ops, BPF_SOCK_OPS_STATE_CB_FLAG);
    } else {
        refuse(ops, known);
    }
}

/// Authorises the connection's tuple.
#[inline(always)]
pub(crate) fn authorise(ops: &SockOps, kind: u32, generation: u32) -> bool {
    let entry = Authorised { netns: netns(ops), created_ns: now(), generation, kind };
    AUTHORISED.insert(&as_client(ops), &entry, BPF_ANY as u64).is_ok()
}

#[inline(always)]
fn fast_path(ops: &SockOps, known: &mut Socket) {
    let tuple = as_client(ops);
    // The source is final only now: the verdict must hold for it.
    let key = VerdictKey {
        netns: netns(ops),
        source: tuple.client,
        destination: tuple.server,
        port: tuple.server_port,
        zero: [0; 3],
    };
    // Before the SYN can leave: who reads the figures after a flip sees every connection that an older verdict let go.
    let flow = new_flow(key.netns, tuple, flow::OPENING, known);
    let listed = FLOWS.insert(&cookie(ops), &flow, BPF_ANY as u64).is_ok();
    if !listed || allowed(&key).is_none() || !authorise(ops, authorised::FAST_PATH, known.generation) {
        let _ = FLOWS.remove(&cookie(ops));
        refuse(ops, known);
        return;
    }
    known.state = socket::AUTHORISED;
    known.flushed_ns = flow.opened_ns;
    ask_for(ops, BPF_SOCK_OPS_STATE_CB_FLAG | BPF_SOCK_OPS_RTT_CB_FLAG);
}

/// The accepting side is established: the tuple has done its work. Other network namespaces of the machine may know the
/// same addresses, and have no say here.
#[inline(always)]
fn accepted(ops: &SockOps) {
    // SAFETY: the value is not read.
    if unsafe { PODS.get(&netns(ops)) }.is_none() {
        return;
    }
    let (local, remote) = (ops.local(), ops.remote());
    let tuple = Tuple {
        client: remote.address,
        server: local.address,
        client_port: remote.port,
        server_port: local.port,
    };
    let _ = AUTHORISED.remove(&tuple);
}

#[inline(always)]
fn established(ops: &SockOps) {
    let Some(known) = known(ops) else { return };
    if known.state == socket::AUTHORISED {
        flush(ops, known, flow::ESTABLISHED, false);
    }
}

#[inline(always)]
fn measured(ops: &SockOps) {
    let Some(known) = known(ops) else { return };
    let now = now();
    if now.wrapping_sub(known.flushed_ns) >= FLUSH_NS {
        known.flushed_ns = now;
        // Whoever acknowledges data is established, and its tuple gone, unless the tuple that it has is another.
        // SAFETY: the value is not read.
        let astray = unsafe { AUTHORISED.get(&as_client(ops)) }.is_some();
        flush(ops, known, flow::ESTABLISHED, astray);
    }
}

/// Writes the figures. `astray`: the tuple was not accepted so far, which counts once the client is established.
#[inline(always)]
fn flush(ops: &SockOps, known: &Socket, state: u32, astray: bool) {
    let Some(flow) = FLOWS.get_ptr_mut(&cookie(ops)) else { return };
    // The kernel counts SYN and FIN as a byte each.
    let signals = 1 + u64::from(known.fins & fin::SENT != 0);
    let received = u64::from(known.fins & fin::RECEIVED != 0);
    // SAFETY: only callbacks of this one socket write the entry, and they are serialised by its lock; user space
    // reads it as a sample.
    unsafe {
        (*flow).updated_ns = now();
        (*flow).bytes_sent = ops.bytes_acked().saturating_sub(signals);
        (*flow).bytes_received = ops.bytes_received().saturating_sub(received);
        (*flow).srtt_us = ops.srtt_us();
        (*flow).retransmits = ops.retransmits();
        if astray && (*flow).state == flow::ESTABLISHED {
            (*flow).astray = 1;
        }
        (*flow).state =
            if state == flow::CLOSED && (*flow).state == flow::OPENING { flow::FAILED } else { state };
    }
}

#[inline(always)]
fn changed(ops: &SockOps) {
    let (old, new) = (ops.arg0(), ops.arg1());
    let Some(known) = known(ops) else { return };
    match known.state {
        // The listener may still have to accept an established connection that its client has already closed.
        socket::RECORDED if old == TCP_SYN_SENT && new == TCP_CLOSE => {
            let _ = ORIGINALS.remove(&as_client(ops));
        }
        socket::AUTHORISED => {
            note_fins(ops, known, old, new);
            if new == TCP_CLOSE {
                let astray = AUTHORISED.remove(&as_client(ops)).is_ok();
                flush(ops, known, flow::CLOSED, astray);
            }
        }
        _ => {}
    }
}

/// Learns from a change of state which FINs the byte counts include.
#[inline(always)]
fn note_fins(ops: &SockOps, known: &mut Socket, old: u32, new: u32) {
    match (old, new) {
        (_, TCP_CLOSE_WAIT | TCP_CLOSING) => known.fins |= fin::RECEIVED,
        (_, TCP_FIN_WAIT2) => {
            known.fins |= fin::SENT;
            known.half_closed_at = ops.bytes_received();
        }
        (TCP_LAST_ACK | TCP_CLOSING, TCP_CLOSE) => known.fins |= fin::SENT,
        // Whatever arrives last in this state is the peer's FIN.
        (TCP_FIN_WAIT2, TCP_CLOSE) if ops.bytes_received() > known.half_closed_at => {
            known.fins |= fin::RECEIVED
        }
        _ => {}
    }
}
