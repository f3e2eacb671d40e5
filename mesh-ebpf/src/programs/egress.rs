//! Enforcement: a TCP SYN of an enrolled pod that the connect hook neither captured, authorised nor left alone does
//! not leave. It catches what has no connect call (raw sockets) and what could not be recorded.
//!
//! A connect call that came before the pod was captured is not a mistake: for a few seconds from then on, sockets that
//! the hook has not seen may send their SYN, also again when it was lost.
//!
//! This is a safety net against mistakes, not a security boundary: packets made below the IP layer (AF_PACKET) and
//! nested network namespaces do not pass here. Inbound policy is the boundary.

use super::maps::{PODS, agent_alive, count, left_to_kernel, logging, setting, socket_storage};
use aya_ebpf::EbpfContext;
use aya_ebpf::Global;
use aya_ebpf::bindings::{__sk_buff, bpf_sock};
use aya_ebpf::helpers::{bpf_get_netns_cookie, bpf_sk_fullsock};
use aya_ebpf::programs::SkBuffContext;
use aya_log_ebpf::info;
use mesh_ebpf::{Address, Endpoint, Reason, config, pod_flag, socket};

const PASS: i32 = 1;
const DROP: i32 = 0;
const TCP: u8 = 6;
/// SOCK_STREAM.
const STREAM: u32 = 1;
const SYN: u8 = 2;
const ACK: u8 = 16;

/// Set at load: whether this kernel tells a packet's network namespace here (6.15). Without it, only sockets that
/// the connect hook has seen are judged.
#[unsafe(no_mangle)]
static SKB_HAS_NETNS_COOKIE: Global<u8> = Global::new(1);

#[inline(always)]
pub(crate) fn packet(ctx: &SkBuffContext) -> i32 {
    match first_packet(ctx) {
        Some(to) => judge(ctx, &to),
        None => PASS,
    }
}

/// Whether an IPv4 or IPv6 packet without options is surely no SYN: what nearly all packets are, told by direct
/// reads without a call.
#[inline(always)]
fn is_surely_no_syn(ctx: &SkBuffContext) -> bool {
    let skb: *mut __sk_buff = ctx.as_ptr().cast();
    // SAFETY: the pointer is the program's context; the verifier knows these two as packet bounds.
    let (start, end) = unsafe { ((*skb).data as usize, (*skb).data_end as usize) };
    // SAFETY: every offset is checked against the bounds before it is read.
    let byte = |offset: usize| unsafe { core::ptr::read((start + offset) as *const u8) };
    if start + 40 > end {
        return false;
    }
    let flags = match byte(0) {
        0x45 if byte(9) == TCP => byte(20 + 13),
        0x45 => return true,
        first if first >> 4 == 6 && byte(6) == TCP && start + 60 <= end => byte(40 + 13),
        _ => return false,
    };
    flags & (SYN | ACK) != SYN
}

/// Where a TCP SYN goes; nothing for any other packet.
#[inline(always)]
fn first_packet(ctx: &SkBuffContext) -> Option<Endpoint> {
    if is_surely_no_syn(ctx) {
        return None;
    }
    let version: u8 = ctx.load(0).ok()?;
    match version >> 4 {
        4 => {
            if ctx.load::<u8>(9).ok()? != TCP {
                return None;
            }
            let header = ((version & 15) as usize) * 4;
            syn(ctx, header)?;
            Some(Endpoint::new(Address::v4(ctx.load(16).ok()?), port(ctx, header)?))
        }
        6 => {
            let header = after_extensions(ctx)?;
            syn(ctx, header)?;
            Some(Endpoint::new(Address(ctx.load(24).ok()?), port(ctx, header)?))
        }
        _ => None,
    }
}

/// Offset of the TCP header behind IPv6 extension headers.
#[inline(always)]
fn after_extensions(ctx: &SkBuffContext) -> Option<usize> {
    let mut next: u8 = ctx.load(6).ok()?;
    let mut offset = 40_usize;
    for _ in 0..6 {
        match next {
            TCP => return Some(offset),
            // Hop-by-hop, routing, destination options.
            0 | 43 | 60 => {
                let header: [u8; 2] = ctx.load(offset).ok()?;
                next = header[0];
                offset += (header[1] as usize + 1) * 8;
            }
            // Fragment.
            44 => {
                next = ctx.load(offset).ok()?;
                offset += 8;
            }
            _ => return None,
        }
    }
    None
}

#[inline(always)]
fn syn(ctx: &SkBuffContext, header: usize) -> Option<()> {
    let flags: u8 = ctx.load(header + 13).ok()?;
    (flags & (SYN | ACK) == SYN).then_some(())
}

#[inline(always)]
fn port(ctx: &SkBuffContext, header: usize) -> Option<u16> {
    ctx.load::<u16>(header + 2).ok().map(u16::from_be)
}

#[inline(always)]
fn judge(ctx: &SkBuffContext, to: &Endpoint) -> i32 {
    let socket = full_socket(ctx);
    let known = if socket.is_null() { None } else { socket_storage(socket, false) };
    match known.map_or(socket::NONE, |known| known.state) {
        socket::RECORDED | socket::AUTHORISED | socket::EXEMPT | socket::PROBE => return PASS,
        socket::NONE => {}
        _ => return drop(ctx, to),
    }
    if SKB_HAS_NETNS_COOKIE.load() == 0 {
        return PASS;
    }
    let skb: *mut __sk_buff = ctx.as_ptr().cast();
    // SAFETY: the helper takes the program's context.
    let netns = unsafe { bpf_get_netns_cookie(skb.cast()) };
    // SAFETY: the entry is plain data that user space replaces whole.
    let Some(pod) = (unsafe { PODS.get(&netns) }) else { return PASS };
    if left_to_kernel(pod, to).is_some() || (setting(config::FAIL_OPEN) != 0 && !agent_alive()) {
        return PASS;
    }
    if pod.flags & pod_flag::JOINING != 0 && is_tcp(socket) {
        return PASS;
    }
    drop(ctx, to)
}

/// Whether the packet comes from a socket that has a connect call: a raw socket of the same protocol has none.
#[inline(always)]
fn is_tcp(socket: *mut bpf_sock) -> bool {
    if socket.is_null() {
        return false;
    }
    // SAFETY: a full socket, checked not to be null.
    let (kind, protocol) = unsafe { ((*socket).type_, (*socket).protocol) };
    kind == STREAM && protocol == u32::from(TCP)
}

#[inline(always)]
fn drop(ctx: &SkBuffContext, to: &Endpoint) -> i32 {
    count(Reason::DroppedUncaptured);
    if logging() {
        info!(ctx, "SYN to port {} dropped: not captured", to.port);
    }
    DROP
}

/// The packet's socket, or null.
#[inline(always)]
fn full_socket(ctx: &SkBuffContext) -> *mut bpf_sock {
    let skb: *mut __sk_buff = ctx.as_ptr().cast();
    // SAFETY: the pointer is the program's context; the verifier checks the offset and the size.
    let common: *mut bpf_sock = unsafe { core::ptr::read_volatile(&raw const (*skb).__bindgen_anon_2.sk) };
    if common.is_null() {
        return core::ptr::null_mut();
    }
    // SAFETY: the socket comes from the context and is not null.
    unsafe { bpf_sk_fullsock(common) }
}
