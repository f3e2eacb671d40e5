//! Map layouts that the kernel programs (`bin mesh`) and mesh-node share.
//!
//! Why a crate of its own: both sides compile the same `repr(C)` types, so a layout cannot drift. Everything
//! here is plain data without padding (a hash map key with padding would carry uninitialised bytes).
//!
//! Addresses are 16 bytes in the kernel, IPv4 as v4-mapped IPv6, so that IPv4, IPv6 and v4-mapped sockets share
//! one code path and one map. Ports are host order in maps.
#![no_std]
#![forbid(unsafe_op_in_unsafe_fn)]

pub mod trace;

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Version of every layout and constant below: part of the pin directory's name. Bump it with any change that an
/// older agent or an older program would misread. [`Flow`] alone keeps its size and its fields up to `policy` in every
/// version: by them an agent ends connections that programs of another version let go.
pub const LAYOUT_VERSION: u32 = 1;

/// First port of the capture range. It starts above the default `ip_local_port_range` (32768..60999), so that no
/// application gets one of these as its source port or by binding to port 0.
pub const CAPTURE_PORTS_START: u16 = 61000;
/// Number of capture ports. A captured connection's own port is chosen by hash of its original destination, so
/// that source ports and TIME_WAIT run out no sooner than without the mesh.
pub const CAPTURE_PORTS: u16 = 512;
/// First port of the UDP DNS range: a nameserver asked by a pod gets one of these, and answers come from it.
pub const DNS_PORTS_START: u16 = 61512;
/// Nameservers that one pod can ask over UDP at the same time.
pub const DNS_PORTS: u16 = 64;
/// The port on which peers dial HBONE (Istio ambient).
pub const HBONE_PORT: u16 = 15008;
/// The mark of the agent's connections to the application (Istio's PACKET_MARK).
pub const AGENT_MARK: u32 = 0x539;
/// Entries of the listener map per pod: index = slot * LISTENERS_PER_POD + kind.
pub const LISTENERS_PER_POD: u32 = 8;
/// The heartbeat is stale after this long: the agent writes it six times as often.
pub const HEARTBEAT_STALE_NS: u64 = 3_000_000_000;

/// Kinds of listener: the second half of an index into the listener map.
pub mod listener {
    /// Outbound TCP that the connect hook captured.
    pub const OUTBOUND: u32 = 0;
    /// Inbound TCP from outside, any port but HBONE's.
    pub const INBOUND: u32 = 1;
    /// Inbound TCP from outside to 15008.
    pub const HBONE: u32 = 2;
    /// Outbound TCP to port 53.
    pub const DNS_TCP: u32 = 3;
    /// Outbound UDP to port 53.
    pub const DNS_UDP: u32 = 4;
}

/// Indices of the CONFIG array (u64 values; each is written by one writer, alone).
pub mod config {
    /// CLOCK_MONOTONIC ns of the agent's last sign of life.
    pub const HEARTBEAT: u32 = 0;
    /// Generation of the fast path's verdicts.
    pub const GENERATION: u32 = 1;
    /// 1: without a living agent connections go on uncaptured; 0: they are refused.
    pub const FAIL_OPEN: u32 = 2;
    /// 1: the programs log through aya-log.
    pub const LOG: u32 = 3;
    /// 1: port 53 goes to the DNS listener.
    pub const DNS: u32 = 4;
    /// 1: destinations that no prefix of DESTINATIONS covers are left to the kernel.
    pub const LEAVE_UNLISTED: u32 = 5;
    /// 1: the fast path may be used.
    pub const FAST_PATH: u32 = 6;
    /// Hash of the object whose programs are attached (user space only).
    pub const OBJECT_HASH: u32 = 7;
    /// Number of entries.
    pub const LEN: u32 = 8;
}

/// What to do with a destination that a prefix of DESTINATIONS covers.
pub mod destination {
    /// Leave it to the kernel.
    pub const LEAVE: u32 = 0;
    /// Capture it.
    pub const CAPTURE: u32 = 1;
}

/// Bits of [`Pod::flags`].
pub mod pod_flag {
    /// The pod has more than one IPv4 address: the source of an unbound socket is not known at connect.
    pub const SEVERAL_V4: u32 = 1;
    /// The same for IPv6 (link-local addresses do not count).
    pub const SEVERAL_V6: u32 = 2;
    /// Port 53 is like any other: the pod's DNS queries are not answered by the node.
    pub const LEAVE_DNS: u32 = 4;
    /// The pod was captured just now: connections that its connect hook never saw may still be on their way out.
    pub const JOINING: u32 = 8;
}

/// An address, IPv4 as v4-mapped; words in network byte order as the kernel's contexts have them.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct Address(pub [u32; 4]);

impl Address {
    /// No address.
    pub const NONE: Self = Self([0; 4]);

    /// The v4-mapped form of an IPv4 address in network byte order.
    #[inline(always)]
    pub const fn v4(word: u32) -> Self {
        Self([0, 0, 0xffff_u32.to_be(), word])
    }

    /// Whether this is an IPv4 address in v4-mapped form.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == 0xffff_u32.to_be()
    }

    /// Whether this is no address (also `::`).
    #[inline(always)]
    pub const fn is_none(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == 0 && self.0[3] == 0
    }

    /// The sixteen bytes in network order.
    pub const fn octets(&self) -> [u8; 16] {
        let (a, b, c, d) = (
            self.0[0].to_ne_bytes(),
            self.0[1].to_ne_bytes(),
            self.0[2].to_ne_bytes(),
            self.0[3].to_ne_bytes(),
        );
        [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]]
    }

    /// The address as people write it: v4-mapped becomes IPv4.
    pub const fn to_ip(&self) -> IpAddr {
        Ipv6Addr::from_octets(self.octets()).to_canonical()
    }
}

impl From<IpAddr> for Address {
    fn from(ip: IpAddr) -> Self {
        let octets = match ip {
            IpAddr::V4(v4) => Ipv4Addr::to_ipv6_mapped(&v4).octets(),
            IpAddr::V6(v6) => v6.octets(),
        };
        let word = |i: usize| u32::from_ne_bytes([octets[i], octets[i + 1], octets[i + 2], octets[i + 3]]);
        Self([word(0), word(4), word(8), word(12)])
    }
}

/// An address and a port.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct Endpoint {
    pub address: Address,
    /// Host order.
    pub port: u16,
    pub zero: u16,
}

impl Endpoint {
    #[inline(always)]
    pub const fn new(address: Address, port: u16) -> Self {
        Self { address, port, zero: 0 }
    }

    /// The socket address as people write it.
    pub const fn to_socket(&self) -> SocketAddr {
        SocketAddr::new(self.address.to_ip(), self.port)
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(socket: SocketAddr) -> Self {
        Self::new(socket.ip().into(), socket.port())
    }
}

/// A connection: its client (who sent the SYN) and its server, as packets carry them.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct Tuple {
    pub client: Address,
    pub server: Address,
    pub client_port: u16,
    pub server_port: u16,
}

/// An enrolled pod; key: its netns cookie.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Pod {
    /// First half of an index into the listener map.
    pub slot: u32,
    /// See [`pod_flag`].
    pub flags: u32,
    /// The IPv4 address that captured IPv4 connections are rewritten to; none: the pod has no IPv4.
    pub v4: Address,
    /// The same for IPv6.
    pub v6: Address,
}

/// Who owns a local address; key: the [`Address`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Owner {
    /// The pod's slot, or [`Owner::AMBIGUOUS`].
    pub slot: u32,
}

impl Owner {
    /// Several pods of this node claim the address: nobody gets its connections.
    pub const AMBIGUOUS: u32 = u32::MAX;
}

/// Where a captured connection wanted to go; key: the [`Tuple`] that the listener sees.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Original {
    pub destination: Endpoint,
    /// See [`listener`].
    pub listener: u32,
    /// CLOCK_MONOTONIC: user space sweeps what nobody accepted.
    pub created_ns: u64,
}

/// Why a tuple may pass `sk_lookup` to the application.
pub mod authorised {
    /// The fast path: holds for a generation of verdicts.
    pub const FAST_PATH: u32 = 1;
    /// The kubelet probes a declared port.
    pub const PROBE: u32 = 2;
    /// The pod calls itself on a port of the capture range.
    pub const SELF: u32 = 3;
}

/// An authorised connection; key: its [`Tuple`].
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Authorised {
    /// Netns cookie of the client.
    pub netns: u64,
    /// CLOCK_MONOTONIC: user space sweeps what was never established.
    pub created_ns: u64,
    pub generation: u32,
    /// See [`authorised`].
    pub kind: u32,
}

/// Key of a fast path verdict.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct VerdictKey {
    /// Netns cookie of the client.
    pub netns: u64,
    pub source: Address,
    pub destination: Address,
    pub port: u16,
    pub zero: [u16; 3],
}

/// Verdict of L4 policy on a pair of pods of this node.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Verdict {
    /// The verdict holds in this generation and in older ones.
    pub generation: u32,
    /// 1: allowed.
    pub allow: u32,
    /// The agent's number for the deciding policy.
    pub policy: u32,
    /// The agent's own bits (dry-run results).
    pub flags: u32,
}

/// Live figures of a fast path connection; key: the client's socket cookie.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Flow {
    pub tuple: Tuple,
    /// See [`flow`].
    pub state: u32,
    /// Netns cookie of the client.
    pub netns: u64,
    pub opened_ns: u64,
    pub updated_ns: u64,
    /// Bytes that the client sent and the server acknowledged.
    pub bytes_sent: u64,
    pub bytes_received: u64,
    pub srtt_us: u32,
    pub retransmits: u32,
    pub generation: u32,
    pub policy: u32,
    pub verdict_flags: u32,
    /// 1: the client is connected, but nobody accepted this tuple: its source was changed on the way.
    pub astray: u32,
}

/// Values of [`Flow::state`].
pub mod flow {
    /// The SYN is on its way.
    pub const OPENING: u32 = 0;
    pub const ESTABLISHED: u32 = 1;
    /// Closed after it was established: the figures are final.
    pub const CLOSED: u32 = 2;
    /// Never established: refused, timed out or aborted.
    pub const FAILED: u32 = 3;
    /// The connect call is on its way: nothing has left, and the tuple has no source port yet.
    pub const RESERVED: u32 = 4;
}

/// Key of a nameserver that a pod asks over UDP; the port is `DNS_PORTS_START + index`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct NameserverKey {
    pub slot: u32,
    pub index: u32,
}

/// What the hooks know of a socket; sk_storage.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Socket {
    /// Where the application wanted to go.
    pub destination: Endpoint,
    /// See [`socket`].
    pub state: u32,
    pub generation: u32,
    pub policy: u32,
    pub verdict_flags: u32,
    /// The capture port that the destination was rewritten to, 0 without capture.
    pub port: u16,
    /// See [`fin`].
    pub fins: u16,
    /// When the flow's figures were last written.
    pub flushed_ns: u64,
    /// Bytes received when the client's FIN was acknowledged.
    pub half_closed_at: u64,
}

/// Bits of [`Socket::fins`]: the kernel's byte counts include a FIN.
pub mod fin {
    /// Ours was acknowledged.
    pub const SENT: u16 = 1;
    /// The peer's arrived.
    pub const RECEIVED: u16 = 2;
}

/// Values of [`Socket::state`].
pub mod socket {
    /// Nothing known: the enforcement drops its SYN.
    pub const NONE: u32 = 0;
    /// Rewritten to the outbound listener, not yet recorded.
    pub const CAPTURED: u32 = 1;
    /// Rewritten to the DNS listener, not yet recorded.
    pub const CAPTURED_DNS: u32 = 2;
    /// Recorded: its SYN may leave.
    pub const RECORDED: u32 = 3;
    /// Allowed by a verdict, tuple not yet authorised.
    pub const FAST_PATH: u32 = 4;
    /// Its tuple is authorised: its SYN may leave.
    pub const AUTHORISED: u32 = 5;
    /// Left to the kernel.
    pub const EXEMPT: u32 = 6;
    /// A probe of the kubelet, tuple not yet authorised.
    pub const PROBE: u32 = 7;
    /// The pod calls itself on a port of the capture range, tuple not yet authorised.
    pub const SELF: u32 = 8;
    /// A map was full: its SYN may not leave.
    pub const REFUSED: u32 = 9;
}

/// Indices of the COUNTERS map, in the order of [`REASONS`].
macro_rules! reasons {
    ($($name:ident = $code:literal: $text:literal;)*) => {
        /// Stable reason codes of the kernel side, with what they mean; the position is the index.
        pub const REASONS: &[(&str, &str)] = &[$(($code, $text)),*];
        /// Indices into the counters, by name.
        #[allow(non_camel_case_types, clippy::upper_case_acronyms, reason = "one list makes names and texts")]
        #[repr(u32)]
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum Reason { $($name),* }
    };
}

reasons! {
    Captured = "captured": "outbound connection sent to the outbound listener";
    CapturedDns = "captured_dns": "DNS over TCP sent to the DNS listener";
    DnsDatagram = "dns_datagram": "DNS over UDP sent to the DNS listener";
    Left = "left_excluded": "left to the kernel: an excluded port or destination";
    LeftSelf = "left_self": "left to the kernel: loopback or the pod's own address";
    LeftFailOpen = "left_fail_open": "left to the kernel: no living agent and the mesh fails open";
    FastPath = "fast_path": "allowed by a verdict: went straight to the application";
    FastPathDenied = "fast_path_denied": "dropped: the current generation denies an authorised connection";
    Probe = "probe": "kubelet probe of a declared port";
    RefusedStale = "refused_no_agent": "connect refused: no living agent and the mesh fails closed";
    RefusedFull = "refused_map_full": "connect refused: a map of the mesh is full";
    LeftNoAddress = "left_no_address": "left to the kernel: the pod has no address of that family";
    RefusedNameservers = "refused_nameservers": "DNS refused: the pod asks too many nameservers";
    DroppedUncaptured = "dropped_uncaptured": "SYN dropped: the connect hook never saw this connection";
    DroppedNoListener = "dropped_no_listener": "inbound refused: no listener and the mesh fails closed";
    DroppedUnknownAddress = "dropped_unknown_address": "inbound refused: nobody or several pods own the address";
    DroppedCapturePort = "dropped_capture_port": "refused: a port of the mesh dialled from outside or without a record";
    PassedFailOpen = "passed_fail_open": "inbound passed to the application: the mesh fails open";
    SteeredInbound = "steered_inbound": "inbound connection sent to the plaintext listener";
    SteeredHbone = "steered_hbone": "inbound connection sent to the HBONE listener";
    FastPathFull = "fast_path_full": "went through the tunnel: no room for another fast path connection";
}

/// Length of the COUNTERS map.
pub const COUNTERS: u32 = REASONS.len() as u32;

#[cfg(feature = "user")]
mod user {
    use super::*;
    macro_rules! pod {
        ($($ty:ty),*) => { $(
            // SAFETY: repr(C), only integers, no padding (checked by the assertions below).
            unsafe impl aya::Pod for $ty {}
        )* };
    }
    pod!(
        Address,
        Endpoint,
        Tuple,
        Pod,
        Owner,
        Original,
        Authorised,
        VerdictKey,
        Verdict,
        Flow,
        NameserverKey,
        Socket,
        trace::Event,
        trace::RepeatKey,
        trace::Repeat
    );
}

// No padding: the size is the sum of the fields.
const _: () = assert!(size_of::<Endpoint>() == 20 && size_of::<Tuple>() == 36 && size_of::<Pod>() == 40);
const _: () = assert!(size_of::<Original>() == 32 && size_of::<Authorised>() == 24);
const _: () = assert!(size_of::<VerdictKey>() == 48 && size_of::<Verdict>() == 16);
const _: () =
    assert!(size_of::<Flow>() == 36 + 4 + 5 * 8 + 6 * 4 && size_of::<Socket>() == 20 + 4 * 4 + 4 + 16);
