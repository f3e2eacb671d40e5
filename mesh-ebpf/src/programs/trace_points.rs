//! Tells what goes wrong with packets: retransmissions, resets and drops, from the kernel's own tracepoints.
//!
//! Raw tracepoints: the kernel keeps each of their programs from interrupting itself, and counts what it skips so. Programs
//! of the other kind it keeps from interrupting one another, and a map's system call on the same CPU. Where a field is in
//! the kernel's structures is what user space read from the running kernel; without it the event says less, or is not told.
//! What repeats on one connection is told once a second.

use super::maps::now;
use super::trace::{count, given, is_traced, offset, read, tell};
use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{BPF_ANY, BPF_F_NO_PREALLOC};
use aya_ebpf::helpers::bpf_probe_read_kernel;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LruHashMap};
use aya_ebpf::programs::RawTracePointContext;
use mesh_ebpf::trace::{Event, REASONS, REPEAT_NS, Repeat, RepeatKey, counter, flag, kind, setting};
use mesh_ebpf::{Address, Tuple};

const AF_INET: u16 = 2;
const TCP: u8 = 6;
const UDP: u8 = 17;
const GO_ON: i32 = 0;

/// Addresses of pods that are traced.
#[map]
static TRACE_ADDRESSES: HashMap<Address, u32> = HashMap::with_max_entries(32_768, BPF_F_NO_PREALLOC);
/// Drop reason -> 1: what the kernel does in the normal course of things is not told.
#[map]
static TRACE_REASONS: Array<u32> = Array::with_max_entries(REASONS, 0);
/// What was told lately.
#[map]
static TRACE_REPEATS: LruHashMap<RepeatKey, Repeat> = LruHashMap::with_max_entries(4096, 0);

/// An argument of a tracepoint that not every kernel has.
#[inline(always)]
fn argument<T>(ctx: &RawTracePointContext, index: u32) -> Option<T> {
    let offset = offset(index)?;
    // SAFETY: the helper checks the address and fails instead of faulting.
    unsafe { bpf_probe_read_kernel(ctx.as_ptr().cast::<u8>().wrapping_add(offset as usize).cast::<T>()) }.ok()
}

/// The socket's namespace and its cookie, as far as they are known.
#[inline(always)]
fn owner(socket: u64) -> (u64, u64) {
    let net = read::<u64>(socket, setting::SOCK_NET).unwrap_or(0);
    let netns = read::<u64>(net, setting::NET_COOKIE).unwrap_or(0);
    (netns, read::<u64>(socket, setting::SOCK_COOKIE).unwrap_or(0))
}

/// The namespace of the device that a packet came in by or leaves by.
#[inline(always)]
fn arrived_in(packet: u64) -> u64 {
    let device = read::<u64>(packet, setting::SKB_DEV).unwrap_or(0);
    let net = read::<u64>(device, setting::DEV_NET).unwrap_or(0);
    read::<u64>(net, setting::NET_COOKIE).unwrap_or(0)
}

#[inline(always)]
fn is_of_pod(address: &Address) -> bool {
    // SAFETY: the value is not read.
    unsafe { TRACE_ADDRESSES.get(address) }.is_some()
}

/// Whether something that happened in this namespace, to these addresses, is told. What happens to a pod's packets in
/// the node's own namespace counts, too.
#[inline(always)]
fn concerns(netns: u64, tuple: &Tuple) -> bool {
    if is_traced(netns) {
        return true;
    }
    (netns == 0 || netns == given(setting::HOME)) && (is_of_pod(&tuple.client) || is_of_pod(&tuple.server))
}

/// A socket's own address and port, and its peer's.
#[inline(always)]
fn ends(socket: u64) -> Option<Tuple> {
    let (client, server) = if read::<u16>(socket, setting::SOCK_FAMILY)? == AF_INET {
        let client = Address::v4(read(socket, setting::SOCK_OWN)?);
        (client, Address::v4(read(socket, setting::SOCK_PEER)?))
    } else {
        (Address(read(socket, setting::SOCK_OWN_V6)?), Address(read(socket, setting::SOCK_PEER_V6)?))
    };
    Some(Tuple {
        client,
        server,
        client_port: u16::from_be(read(socket, setting::SOCK_OWN_PORT)?),
        server_port: u16::from_be(read(socket, setting::SOCK_PEER_PORT)?),
    })
}

/// Source, destination and protocol of a packet.
#[inline(always)]
fn packet_ends(packet: u64) -> Option<(Tuple, u8)> {
    let head = read::<u64>(packet, setting::SKB_HEAD)?;
    header(head + u64::from(read::<u16>(packet, setting::SKB_NETWORK)?))
}

/// Tells it, or adds it to what was told less than a second ago.
#[inline(always)]
fn tell_repeated(mut event: Event) {
    let key = RepeatKey { tuple: event.tuple, kind: event.kind, reason: event.reason };
    event.at_ns = now();
    if let Some(known) = TRACE_REPEATS.get_ptr_mut(&key) {
        // SAFETY: the entry stays readable; two CPUs that count at once lose a count of a sample.
        unsafe {
            if event.at_ns.wrapping_sub((*known).told_ns) < REPEAT_NS {
                (*known).count += 1;
                count(counter::REPEATED);
                return;
            }
            event.count += (*known).count;
            (*known).count = 0;
            (*known).told_ns = event.at_ns;
        }
    } else {
        let (netns, cookie, flags) = (event.netns, event.cookie, event.flags);
        let known = Repeat { told_ns: event.at_ns, netns, cookie, count: 0, flags };
        let _ = TRACE_REPEATS.insert(&key, &known, BPF_ANY as u64);
    }
    tell(event);
}

/// Something that a socket did, or a port without one; `answered` is the packet that it was an answer to.
#[inline(always)]
fn of_socket(socket: u64, answered: u64, kind: u32, reason: u32) -> Option<()> {
    let (mut netns, cookie) = owner(socket);
    if netns == 0 {
        netns = arrived_in(answered);
    }
    // Most sockets of a node are of no concern: told before the addresses are read.
    if netns != 0 && netns != given(setting::HOME) && !is_traced(netns) {
        return None;
    }
    let tuple = match packet_ends(answered) {
        Some((packet, _)) => Tuple {
            client: packet.server,
            server: packet.client,
            client_port: packet.server_port,
            server_port: packet.client_port,
        },
        None => ends(socket)?,
    };
    if !concerns(netns, &tuple) {
        return None;
    }
    tell_repeated(Event {
        netns,
        cookie,
        tuple,
        kind,
        flags: flag::PACKET,
        reason,
        count: 1,
        state: u32::from(read::<u8>(socket, setting::SOCK_STATE).unwrap_or(0)),
        ..Event::default()
    });
    Some(())
}

/// `tcp_retransmit_skb(sk, skb, …)`.
#[inline(always)]
pub(crate) fn retransmit(ctx: &RawTracePointContext) -> i32 {
    let _ = of_socket(ctx.arg(0), 0, kind::RETRANSMIT, 0);
    GO_ON
}

/// `tcp_send_reset(sk, skb, reason)`: either may be missing, the reason before Linux 6.10.
#[inline(always)]
pub(crate) fn reset_sent(ctx: &RawTracePointContext) -> i32 {
    let reason = argument::<u32>(ctx, setting::RESET_REASON).unwrap_or(0);
    let _ = of_socket(ctx.arg(0), ctx.arg(1), kind::RESET_SENT, reason);
    GO_ON
}

/// `tcp_receive_reset(sk)`.
#[inline(always)]
pub(crate) fn reset_received(ctx: &RawTracePointContext) -> i32 {
    let _ = of_socket(ctx.arg(0), 0, kind::RESET_RECEIVED, 0);
    GO_ON
}

/// `kfree_skb(skb, location, reason, rx_sk)`: the last since Linux 6.11.
#[inline(always)]
pub(crate) fn dropped(ctx: &RawTracePointContext) -> i32 {
    let _ = drop_of(ctx);
    GO_ON
}

#[inline(always)]
fn drop_of(ctx: &RawTracePointContext) -> Option<()> {
    let reason = argument::<u32>(ctx, setting::DROP_REASON)?;
    if TRACE_REASONS.get(reason).is_some_and(|ignored| *ignored != 0) {
        return None;
    }
    let packet = ctx.arg(0);
    let (tuple, protocol) = packet_ends(packet)?;
    if !is_of_pod(&tuple.client) && !is_of_pod(&tuple.server) {
        return None;
    }
    let receiver = argument::<u64>(ctx, setting::DROP_SOCK).unwrap_or(0);
    let socket = if receiver == 0 { read::<u64>(packet, setting::SKB_SOCK).unwrap_or(0) } else { receiver };
    let (mut netns, cookie) = owner(socket);
    if netns == 0 {
        netns = arrived_in(packet);
    }
    if !concerns(netns, &tuple) {
        return None;
    }
    let udp = if protocol == UDP { flag::UDP } else { 0 };
    let flags = flag::PACKET | udp;
    tell_repeated(Event {
        netns,
        cookie,
        tuple,
        kind: kind::DROP,
        flags,
        reason,
        count: 1,
        ..Event::default()
    });
    Some(())
}

/// Bytes at an address of the kernel.
#[inline(always)]
fn peek<T>(at: u64) -> Option<T> {
    // SAFETY: the helper checks the address and fails instead of faulting.
    unsafe { bpf_probe_read_kernel(at as *const T) }.ok()
}

/// Source, destination and protocol of a TCP or UDP packet whose IP header is at an address. Extension headers of IPv6
/// are not followed.
#[inline(always)]
fn header(at: u64) -> Option<(Tuple, u8)> {
    let first: u8 = peek(at)?;
    let (client, server, protocol, length) = match first >> 4 {
        4 => {
            let client = Address::v4(peek(at + 12)?);
            (client, Address::v4(peek(at + 16)?), peek::<u8>(at + 9)?, u64::from(first & 15) * 4)
        }
        6 => (Address(peek(at + 8)?), Address(peek(at + 24)?), peek::<u8>(at + 6)?, 40),
        _ => return None,
    };
    if protocol != TCP && protocol != UDP {
        return None;
    }
    let ports: [u16; 2] = peek(at + length)?;
    let tuple =
        Tuple { client, server, client_port: u16::from_be(ports[0]), server_port: u16::from_be(ports[1]) };
    Some((tuple, protocol))
}
