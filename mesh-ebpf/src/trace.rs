//! What the tracing programs tell: events of fixed size in a ring buffer, and the maps that say what to look at.
//!
//! Nothing here is pinned. The programs are attached while an agent lives and go with it, so no layout here outlives the
//! object that it came with.

use crate::{Endpoint, Tuple};

/// Kinds of [`Event`].
pub mod kind {
    /// A SYN is about to leave.
    pub const CONNECT: u32 = 1;
    /// The client is connected.
    pub const ESTABLISHED: u32 = 2;
    /// The server's kernel has the connection.
    pub const ACCEPTED: u32 = 3;
    /// An established connection ended.
    pub const CLOSED: u32 = 4;
    /// A connection was never established; `reason` is the error number, 0 when the caller gave up.
    pub const FAILED: u32 = 5;
    /// A segment was sent again.
    pub const RETRANSMIT: u32 = 6;
    /// A reset was sent; `reason` is the kernel's.
    pub const RESET_SENT: u32 = 7;
    /// A reset arrived.
    pub const RESET_RECEIVED: u32 = 8;
    /// A packet was dropped; `reason` is the kernel's.
    pub const DROP: u32 = 9;
}

/// Bits of [`Event::flags`].
pub mod flag {
    /// The socket is the server's side of the connection.
    pub const SERVER: u32 = 1;
    /// This side sent its FIN first.
    pub const CLOSED_HERE: u32 = 2;
    /// The peer's FIN came first.
    pub const CLOSED_THERE: u32 = 4;
    /// It ended without both FINs.
    pub const ABORTED: u32 = 8;
    /// The peer's reset ended it.
    pub const RESET_RECEIVED: u32 = 16;
    /// The tuple is as a packet carried it: its client is whoever sent that packet.
    pub const PACKET: u32 = 32;
    /// An IPv4 or IPv6 packet of UDP, not TCP.
    pub const UDP: u32 = 64;
    /// The socket listens, or was accepted from one that does.
    pub const LISTENER: u32 = 128;
    /// The socket is an agent's.
    pub const AGENT: u32 = 256;
    /// Our FIN was acknowledged: the kernel's byte counts include it.
    pub const FIN_SENT: u32 = 512;
    /// The peer's FIN arrived.
    pub const FIN_RECEIVED: u32 = 1024;
}

/// One event. Times are CLOCK_MONOTONIC nanoseconds; what is not known is 0.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Event {
    pub at_ns: u64,
    /// Netns cookie of the socket.
    pub netns: u64,
    /// Socket cookie.
    pub cookie: u64,
    /// When the connection began on this node.
    pub opened_ns: u64,
    /// Cgroup of the process that connected or listened.
    pub cgroup: u64,
    /// Bytes that the peer acknowledged.
    pub bytes_sent: u64,
    pub bytes_received: u64,
    pub tuple: Tuple,
    /// Where the application wanted to go, where that was rewritten.
    pub asked: Endpoint,
    /// See [`kind`].
    pub kind: u32,
    /// See [`flag`].
    pub flags: u32,
    /// By kind.
    pub reason: u32,
    /// How many times it happened since it was last told.
    pub count: u32,
    pub srtt_us: u32,
    pub min_rtt_us: u32,
    pub retransmits: u32,
    /// Segments that nobody has acknowledged.
    pub unacked: u32,
    /// What capture made of it, see [`crate::socket`].
    pub decision: u32,
    /// The agent's number for the policy that let it go straight.
    pub policy: u32,
    pub pid: u32,
    /// TCP state that it happened in.
    pub state: u32,
    pub comm: [u8; 16],
}

/// What is kept with a traced socket; sk_storage that accepted sockets inherit from their listener.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Traced {
    /// 0: not traced.
    pub opened_ns: u64,
    pub cgroup: u64,
    /// Bytes received when this side's FIN was acknowledged.
    pub half_closed_at: u64,
    pub asked: Endpoint,
    pub pid: u32,
    pub flags: u32,
    pub decision: u32,
    pub policy: u32,
    pub zero: u32,
    pub comm: [u8; 16],
}

/// What happens again and again is told once in a while; key.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct RepeatKey {
    pub tuple: Tuple,
    pub kind: u32,
    pub reason: u32,
}

/// See [`RepeatKey`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Repeat {
    /// When it was last told.
    pub told_ns: u64,
    pub netns: u64,
    pub cookie: u64,
    /// How often it happened since.
    pub count: u32,
    pub flags: u32,
}

/// The same thing on the same connection is told this often.
pub const REPEAT_NS: u64 = 1_000_000_000;

/// Indices of the TRACE_COUNTERS map.
pub mod counter {
    /// Events that were handed over.
    pub const TOLD: u32 = 0;
    /// Events that found the ring full.
    pub const LOST: u32 = 1;
    /// Events that were added to an earlier one of the same kind.
    pub const REPEATED: u32 = 2;
    /// Connections that were left out by sampling.
    pub const UNSAMPLED: u32 = 3;
    /// Number of entries.
    pub const LEN: u32 = 4;
}

/// Indices of the TRACE_SETTINGS map. Offsets are what the running kernel says; [`ABSENT`] where it says nothing.
pub mod setting {
    /// Connections whose tuple's hash has a bit of this mask are left out.
    pub const SAMPLE_MASK: u32 = 0;
    /// Netns cookie of the node itself.
    pub const HOME: u32 = 1;
    /// `sock.__sk_common.skc_net`.
    pub const SOCK_NET: u32 = 2;
    /// `sock.__sk_common.skc_cookie`.
    pub const SOCK_COOKIE: u32 = 3;
    /// `sock.sk_err`.
    pub const SOCK_ERR: u32 = 4;
    /// `net.net_cookie`.
    pub const NET_COOKIE: u32 = 5;
    /// `sk_buff.head`.
    pub const SKB_HEAD: u32 = 6;
    /// `sk_buff.network_header`.
    pub const SKB_NETWORK: u32 = 7;
    /// `sk_buff.dev`.
    pub const SKB_DEV: u32 = 8;
    /// `sk_buff.sk`.
    pub const SKB_SOCK: u32 = 9;
    /// `net_device.nd_net`.
    pub const DEV_NET: u32 = 10;
    /// `task_struct.tgid`.
    pub const TASK_PROCESS: u32 = 11;
    /// `task_struct.comm`.
    pub const TASK_COMM: u32 = 12;
    /// `task_struct.cgroups`.
    pub const TASK_CGROUPS: u32 = 13;
    /// `css_set.dfl_cgrp`.
    pub const SET_CGROUP: u32 = 14;
    /// `cgroup.kn`.
    pub const CGROUP_NODE: u32 = 15;
    /// `kernfs_node.id`.
    pub const NODE_ID: u32 = 16;
    /// `sock.__sk_common.skc_family`.
    pub const SOCK_FAMILY: u32 = 17;
    /// `sock.__sk_common.skc_state`.
    pub const SOCK_STATE: u32 = 18;
    /// `inet_sock.inet_sport`, in the network's byte order.
    pub const SOCK_OWN_PORT: u32 = 19;
    /// `sock.__sk_common.skc_dport`, in the network's byte order.
    pub const SOCK_PEER_PORT: u32 = 20;
    /// `sock.__sk_common.skc_rcv_saddr`.
    pub const SOCK_OWN: u32 = 21;
    /// `sock.__sk_common.skc_daddr`.
    pub const SOCK_PEER: u32 = 22;
    /// `sock.__sk_common.skc_v6_rcv_saddr`.
    pub const SOCK_OWN_V6: u32 = 23;
    /// `sock.__sk_common.skc_v6_daddr`.
    pub const SOCK_PEER_V6: u32 = 24;
    /// Argument `reason` of `tcp_send_reset`.
    pub const RESET_REASON: u32 = 25;
    /// Argument `reason` of `kfree_skb`.
    pub const DROP_REASON: u32 = 26;
    /// Argument `rx_sk` of `kfree_skb`.
    pub const DROP_SOCK: u32 = 27;
    /// Number of entries.
    pub const LEN: u32 = 28;
}

/// A field that the running kernel does not have.
pub const ABSENT: u64 = u64::MAX;

/// Drop reasons that the TRACE_REASONS map has room for; others are told.
pub const REASONS: u32 = 512;

const _: () =
    assert!(size_of::<Event>() == 7 * 8 + 36 + 20 + 12 * 4 + 16 && size_of::<Event>().is_multiple_of(8));
const _: () =
    assert!(size_of::<Traced>() == 3 * 8 + 20 + 5 * 4 + 16 && size_of::<Traced>().is_multiple_of(8));
const _: () = assert!(size_of::<RepeatKey>() == 44 && size_of::<Repeat>() == 32);
