//! The kernel programs. What they do together is told in `mesh-node::capture`; each module's head says why its
//! hooks exist.
//!
//! | program | hook | for |
//! |---|---|---|
//! | `connect4/6` | cgroup connect, pods | capture, exemptions, fast path decision, DNS |
//! | `sendmsg4/6`, `recvmsg4/6` | cgroup UDP, pods | DNS from unconnected sockets |
//! | `getpeername4/6` | cgroup getpeername, pods | the application keeps seeing where it wanted to go |
//! | `pod_sockets` | sock_ops, pods | records original destinations, authorises tuples, accounts flows |
//! | `pod_egress` | cgroup_skb, pods | drops SYNs that escaped the connect hook |
//! | `host_connect4/6`, `host_sockets` | cgroup connect and sock_ops, host | the kubelet's probes |
//! | `steer` | sk_lookup, each enrolled namespace | hands SYNs to listeners |
//! | `trace_sockets` | sock_ops, host | tells what becomes of connections |
//! | `trace_retransmit`, `trace_reset_sent`, `trace_reset_received`, `trace_drop` | raw tracepoints | tell what goes wrong with packets |
//!
//! Two generations of every program may be attached at once while an agent is replaced; each program gives the same
//! answer when it runs twice.
#![no_std]
#![no_main]
#![allow(unreachable_pub, reason = "the macros export the programs by symbol, not by path")]

mod programs;

use aya_ebpf::macros::{cgroup_skb, cgroup_sock_addr, raw_tracepoint, sk_lookup, sock_ops};
use aya_ebpf::programs::{
    RawTracePointContext, SkBuffContext, SkLookupContext, SockAddrContext, SockOpsContext,
};
use programs::{connect, datagram, egress, lookup, peer, probe, sockets, trace, trace_points};

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    connect::connect::<false>(&ctx)
}

#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    connect::connect::<true>(&ctx)
}

#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(ctx: SockAddrContext) -> i32 {
    datagram::send::<false>(&ctx)
}

#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(ctx: SockAddrContext) -> i32 {
    datagram::send::<true>(&ctx)
}

#[cgroup_sock_addr(recvmsg4)]
pub fn recvmsg4(ctx: SockAddrContext) -> i32 {
    datagram::receive::<false>(&ctx)
}

#[cgroup_sock_addr(recvmsg6)]
pub fn recvmsg6(ctx: SockAddrContext) -> i32 {
    datagram::receive::<true>(&ctx)
}

#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    peer::name::<false>(&ctx)
}

#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    peer::name::<true>(&ctx)
}

#[sock_ops]
pub fn pod_sockets(ctx: SockOpsContext) -> u32 {
    sockets::event(&ctx)
}

#[cgroup_skb(egress)]
pub fn pod_egress(ctx: SkBuffContext) -> i32 {
    egress::packet(&ctx)
}

#[cgroup_sock_addr(connect4)]
pub fn host_connect4(ctx: SockAddrContext) -> i32 {
    probe::connect::<false>(&ctx)
}

#[cgroup_sock_addr(connect6)]
pub fn host_connect6(ctx: SockAddrContext) -> i32 {
    probe::connect::<true>(&ctx)
}

#[sock_ops]
pub fn host_sockets(ctx: SockOpsContext) -> u32 {
    probe::event(&ctx)
}

#[sk_lookup]
pub fn steer(ctx: SkLookupContext) -> u32 {
    lookup::steer(&ctx)
}

#[sock_ops]
pub fn trace_sockets(ctx: SockOpsContext) -> u32 {
    trace::event(&ctx)
}

#[raw_tracepoint]
pub fn trace_retransmit(ctx: RawTracePointContext) -> i32 {
    trace_points::retransmit(&ctx)
}

#[raw_tracepoint]
pub fn trace_reset_sent(ctx: RawTracePointContext) -> i32 {
    trace_points::reset_sent(&ctx)
}

#[raw_tracepoint]
pub fn trace_reset_received(ctx: RawTracePointContext) -> i32 {
    trace_points::reset_received(&ctx)
}

#[raw_tracepoint]
pub fn trace_drop(ctx: RawTracePointContext) -> i32 {
    trace_points::dropped(&ctx)
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier proves that nothing gets here: no program keeps a path to a panic.
    loop {}
}

// The helpers that we call are for GPL-compatible programs; the crate is licensed GPL-2.0-only OR Apache-2.0.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
