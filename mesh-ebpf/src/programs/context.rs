//! Fields of the kernel's contexts, in host terms. Every access is one volatile load or store of exactly one field:
//! the verifier refuses the wider ones that the compiler would otherwise make of neighbours.

use aya_ebpf::bindings::{bpf_sk_lookup, bpf_sock, bpf_sock_addr, bpf_sock_ops};
use aya_ebpf::helpers::bpf_get_netns_cookie;
use aya_ebpf::programs::{SkLookupContext, SockAddrContext, SockOpsContext};
use mesh_ebpf::{Address, Endpoint, Tuple};

pub(crate) const AF_INET: u32 = 2;
pub(crate) const TCP: u32 = 6;
pub(crate) const UDP: u32 = 17;
const MPTCP: u32 = 262;

/// Reads one field of a context.
macro_rules! read {
    ($place:expr) => {
        // SAFETY: the pointer is the program's context; the verifier checks the offset and the size.
        unsafe { core::ptr::read_volatile(&raw const $place) }
    };
}

/// Writes one field of a context.
macro_rules! write {
    ($place:expr, $value:expr) => {
        // SAFETY: the pointer is the program's context; the verifier checks the offset and the size.
        unsafe { core::ptr::write_volatile(&raw mut $place, $value) }
    };
}

/// Reads four words of an address.
macro_rules! read4 {
    ($place:expr) => {
        Address([read!($place[0]), read!($place[1]), read!($place[2]), read!($place[3])])
    };
}

/// Picks the address of the socket's family. Both were read before: a load in each branch would be merged into one
/// with a computed offset, which the verifier refuses.
#[inline(always)]
fn by_family(family: u32, v4: u32, v6: Address) -> Address {
    if family == AF_INET { Address::v4(v4) } else { v6 }
}

/// The context of connect, sendmsg, recvmsg and getpeername hooks.
pub(crate) struct SockAddr(pub(crate) *mut bpf_sock_addr);

impl SockAddr {
    #[inline(always)]
    pub(crate) fn of(ctx: &SockAddrContext) -> Self {
        Self(ctx.sock_addr)
    }

    #[inline(always)]
    pub(crate) fn netns(&self) -> u64 {
        // SAFETY: the helper takes the program's context.
        unsafe { bpf_get_netns_cookie(self.0.cast()) }
    }

    /// The address and port that the hook is about.
    #[inline(always)]
    pub(crate) fn endpoint<const V6: bool>(&self) -> Endpoint {
        let address = if V6 { read4!((*self.0).user_ip6) } else { Address::v4(read!((*self.0).user_ip4)) };
        Endpoint::new(address, self.port())
    }

    #[inline(always)]
    pub(crate) fn port(&self) -> u16 {
        u16::from_be(read!((*self.0).user_port) as u16)
    }

    #[inline(always)]
    pub(crate) fn set<const V6: bool>(&self, to: &Endpoint) {
        if V6 {
            write!((*self.0).user_ip6[0], to.address.0[0]);
            write!((*self.0).user_ip6[1], to.address.0[1]);
            write!((*self.0).user_ip6[2], to.address.0[2]);
            write!((*self.0).user_ip6[3], to.address.0[3]);
        } else {
            write!((*self.0).user_ip4, to.address.0[3]);
        }
        write!((*self.0).user_port, to.port.to_be() as u32);
    }

    #[inline(always)]
    pub(crate) fn is_tcp(&self) -> bool {
        // Kernels differ in what they show for MPTCP sockets.
        matches!(read!((*self.0).protocol), TCP | MPTCP)
    }

    #[inline(always)]
    pub(crate) fn is_udp(&self) -> bool {
        read!((*self.0).protocol) == UDP
    }

    #[inline(always)]
    pub(crate) fn socket(&self) -> *mut bpf_sock {
        read!((*self.0).__bindgen_anon_1.sk)
    }

    /// The address that the socket is bound to, if it is.
    #[inline(always)]
    pub(crate) fn bound<const V6: bool>(&self) -> Address {
        let socket = self.socket();
        if socket.is_null() {
            return Address::NONE;
        }
        let v4: u32 = read!((*socket).src_ip4);
        if !V6 {
            return if v4 == 0 { Address::NONE } else { Address::v4(v4) };
        }
        read4!((*socket).src_ip6)
    }
}

/// The context of sock_ops.
pub(crate) struct SockOps(pub(crate) *mut bpf_sock_ops);

impl SockOps {
    #[inline(always)]
    pub(crate) fn of(ctx: &SockOpsContext) -> Self {
        Self(ctx.ops)
    }

    #[inline(always)]
    pub(crate) fn op(&self) -> u32 {
        read!((*self.0).op)
    }

    #[inline(always)]
    pub(crate) fn arg0(&self) -> u32 {
        read!((*self.0).__bindgen_anon_1.args[0])
    }

    #[inline(always)]
    pub(crate) fn arg1(&self) -> u32 {
        read!((*self.0).__bindgen_anon_1.args[1])
    }

    /// The full socket, null in callbacks about requests.
    #[inline(always)]
    pub(crate) fn socket(&self) -> *mut bpf_sock {
        read!((*self.0).__bindgen_anon_2.sk)
    }

    #[inline(always)]
    pub(crate) fn local(&self) -> Endpoint {
        let address =
            by_family(read!((*self.0).family), read!((*self.0).local_ip4), read4!((*self.0).local_ip6));
        Endpoint::new(address, read!((*self.0).local_port) as u16)
    }

    #[inline(always)]
    pub(crate) fn remote(&self) -> Endpoint {
        let address =
            by_family(read!((*self.0).family), read!((*self.0).remote_ip4), read4!((*self.0).remote_ip6));
        Endpoint::new(address, u32::from_be(read!((*self.0).remote_port)) as u16)
    }

    #[inline(always)]
    pub(crate) fn bytes_received(&self) -> u64 {
        read!((*self.0).bytes_received)
    }

    #[inline(always)]
    pub(crate) fn bytes_acked(&self) -> u64 {
        read!((*self.0).bytes_acked)
    }

    /// Smoothed round trip time in microseconds (the kernel keeps eighths).
    #[inline(always)]
    pub(crate) fn srtt_us(&self) -> u32 {
        read!((*self.0).srtt_us) >> 3
    }

    /// Smallest round trip time of the last minutes in microseconds.
    #[inline(always)]
    pub(crate) fn min_rtt_us(&self) -> u32 {
        read!((*self.0).rtt_min)
    }

    #[inline(always)]
    pub(crate) fn retransmits(&self) -> u32 {
        read!((*self.0).total_retrans)
    }

    /// Segments that are sent and not acknowledged.
    #[inline(always)]
    pub(crate) fn unacked(&self) -> u32 {
        read!((*self.0).packets_out)
    }

    /// What the socket's hooks are called for.
    #[inline(always)]
    pub(crate) fn asked_for(&self) -> u32 {
        read!((*self.0).bpf_sock_ops_cb_flags)
    }
}

/// The context of sk_lookup.
pub(crate) struct Lookup(pub(crate) *mut bpf_sk_lookup);

impl Lookup {
    #[inline(always)]
    pub(crate) fn of(ctx: &SkLookupContext) -> Self {
        Self(ctx.lookup)
    }

    #[inline(always)]
    pub(crate) fn protocol(&self) -> u32 {
        read!((*self.0).protocol)
    }

    #[inline(always)]
    pub(crate) fn ingress(&self) -> u32 {
        read!((*self.0).ingress_ifindex)
    }

    #[inline(always)]
    pub(crate) fn local_port(&self) -> u16 {
        read!((*self.0).local_port) as u16
    }

    /// The connection that the packet starts.
    #[inline(always)]
    pub(crate) fn tuple(&self) -> Tuple {
        let family = read!((*self.0).family);
        let client = by_family(family, read!((*self.0).remote_ip4), read4!((*self.0).remote_ip6));
        let server = by_family(family, read!((*self.0).local_ip4), read4!((*self.0).local_ip6));
        Tuple {
            client,
            server,
            client_port: u16::from_be(read!((*self.0).remote_port)),
            server_port: self.local_port(),
        }
    }
}
