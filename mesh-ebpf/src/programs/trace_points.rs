//! Tells what goes wrong with packets: retransmissions, resets and drops, from the kernel's own tracepoints.
//!
//! Where a field is in a tracepoint's record and in the kernel's structures is what user space read from the running
//! kernel; without it the event says less, or is not told. What repeats on one connection is told once a second.

use super::maps::now;
use super::trace::{count, given, is_traced, offset, read, tell};
use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{BPF_ANY, BPF_F_NO_PREALLOC};
use aya_ebpf::helpers::bpf_probe_read_kernel;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LruHashMap};
use aya_ebpf::programs::TracePointContext;
use mesh_ebpf::trace::{Event, REASONS, REPEAT_NS, Repeat, RepeatKey, counter, field, flag, kind, setting};
use mesh_ebpf::{Address, Tuple};

const AF_INET: u16 = 2;
const TCP: u8 = 6;
const UDP: u8 = 17;
const GO_ON: u32 = 0;

/// Addresses of pods that are traced.
#[map]
static TRACE_ADDRESSES: HashMap<Address, u32> = HashMap::with_max_entries(32_768, BPF_F_NO_PREALLOC);
/// Drop reason -> 1: what the kernel does in the normal course of things is not told.
#[map]
static TRACE_REASONS: Array<u32> = Array::with_max_entries(REASONS, 0);
/// What was told lately.
#[map]
static TRACE_REPEATS: LruHashMap<RepeatKey, Repeat> = LruHashMap::with_max_entries(4096, 0);

/// A field of a tracepoint's record.
#[inline(always)]
fn record<T>(ctx: &TracePointContext, index: u32) -> Option<T> {
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

/// Source, destination and their ports from a record whose fields begin at `base`: the kernels' older and newer way.
#[inline(always)]
fn addresses(ctx: &TracePointContext, base: u32) -> Option<Tuple> {
    let Some(family) = record::<u16>(ctx, base + field::FAMILY) else {
        return socket_addresses(ctx, base);
    };
    let (client, server) = if family == AF_INET {
        let client = Address::v4(record(ctx, base + field::SADDR)?);
        (client, Address::v4(record(ctx, base + field::DADDR)?))
    } else {
        (Address(record(ctx, base + field::SADDR_V6)?), Address(record(ctx, base + field::DADDR_V6)?))
    };
    Some(Tuple {
        client,
        server,
        client_port: record(ctx, base + field::SPORT)?,
        server_port: record(ctx, base + field::DPORT)?,
    })
}

/// Records that carry `struct sockaddr_in6`, or `sockaddr_in` in its place.
#[inline(always)]
fn socket_addresses(ctx: &TracePointContext, base: u32) -> Option<Tuple> {
    let from: [u8; 28] = record(ctx, base + field::SADDR)?;
    let to: [u8; 28] = record(ctx, base + field::DADDR)?;
    Some(Tuple {
        client: socket_address(&from),
        server: socket_address(&to),
        client_port: u16::from_be_bytes([from[2], from[3]]),
        server_port: u16::from_be_bytes([to[2], to[3]]),
    })
}

#[inline(always)]
fn word(bytes: &[u8; 28], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[inline(always)]
fn socket_address(bytes: &[u8; 28]) -> Address {
    if u16::from_ne_bytes([bytes[0], bytes[1]]) == AF_INET {
        return Address::v4(word(bytes, 4));
    }
    Address([word(bytes, 8), word(bytes, 12), word(bytes, 16), word(bytes, 20)])
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

/// Something that a socket did.
#[inline(always)]
fn of_socket(ctx: &TracePointContext, base: u32, kind: u32) -> Option<()> {
    let socket = record::<u64>(ctx, base + field::SOCK).unwrap_or(0);
    let (mut netns, cookie) = owner(socket);
    if netns == 0 {
        // A port without a socket answers with a reset, too.
        netns = arrived_in(record::<u64>(ctx, base + field::SKB).unwrap_or(0));
    }
    // Most sockets of a node are of no concern: told before the addresses are read.
    if netns != 0 && netns != given(setting::HOME) && !is_traced(netns) {
        return None;
    }
    let tuple = addresses(ctx, base)?;
    if !concerns(netns, &tuple) {
        return None;
    }
    tell_repeated(Event {
        netns,
        cookie,
        tuple,
        kind,
        flags: flag::PACKET,
        reason: record::<u32>(ctx, base + field::REASON).unwrap_or(0),
        count: 1,
        state: record::<u32>(ctx, base + field::STATE).unwrap_or(0),
        ..Event::default()
    });
    Some(())
}

#[inline(always)]
pub(crate) fn retransmit(ctx: &TracePointContext) -> u32 {
    let _ = of_socket(ctx, setting::RETRANSMIT, kind::RETRANSMIT);
    GO_ON
}

#[inline(always)]
pub(crate) fn reset_sent(ctx: &TracePointContext) -> u32 {
    let _ = of_socket(ctx, setting::RESET_SENT, kind::RESET_SENT);
    GO_ON
}

#[inline(always)]
pub(crate) fn reset_received(ctx: &TracePointContext) -> u32 {
    let _ = of_socket(ctx, setting::RESET_RECEIVED, kind::RESET_RECEIVED);
    GO_ON
}

#[inline(always)]
pub(crate) fn dropped(ctx: &TracePointContext) -> u32 {
    let _ = drop_of(ctx);
    GO_ON
}

#[inline(always)]
fn drop_of(ctx: &TracePointContext) -> Option<()> {
    let reason = record::<u32>(ctx, setting::DROP + field::REASON)?;
    if TRACE_REASONS.get(reason).is_some_and(|ignored| *ignored != 0) {
        return None;
    }
    let packet = record::<u64>(ctx, setting::DROP + field::SKB)?;
    let head = read::<u64>(packet, setting::SKB_HEAD)?;
    let at = head + u64::from(read::<u16>(packet, setting::SKB_NETWORK)?);
    let (tuple, protocol) = header(at)?;
    if !is_of_pod(&tuple.client) && !is_of_pod(&tuple.server) {
        return None;
    }
    let receiver = record::<u64>(ctx, setting::DROP + field::SOCK).unwrap_or(0);
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
