//! Outbound: decides at connect what becomes of a connection of an enrolled pod.
//!
//! The destination is rewritten to the pod's own address, so that `getsockname` stays true, and to a port of a range
//! by hash of the original destination, so that source ports and TIME_WAIT run out no sooner than without the mesh.

use super::context::SockAddr;
use super::datagram;
use super::maps::{
    FLOWS, Leave, PODS, agent_alive, allowed, answers_dns, called_by_agent, count, flow, is_capture_port,
    left_to_kernel, logging, setting, socket_storage, spread,
};
use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::BPF_ANY;
use aya_ebpf::helpers::bpf_get_socket_cookie;
use aya_ebpf::programs::SockAddrContext;
use aya_log_ebpf::info;
use mesh_ebpf::{
    Address, CAPTURE_PORTS, CAPTURE_PORTS_START, Endpoint, Pod, Reason, Socket, Tuple, VerdictKey, config,
    flow as state, pod_flag, socket,
};

/// The hook lets the system call go on.
pub(crate) const GO_ON: i32 = 1;
/// The hook makes the system call fail with EPERM.
pub(crate) const REFUSE: i32 = 0;
const DNS: u16 = 53;

#[inline(always)]
pub(crate) fn connect<const V6: bool>(ctx: &SockAddrContext) -> i32 {
    let call = SockAddr::of(ctx);
    let netns = call.netns();
    // SAFETY: the entry is plain data that user space replaces whole.
    let Some(pod) = (unsafe { PODS.get(&netns) }) else { return GO_ON };
    if call.is_udp() {
        return datagram::redirect::<V6>(&call, pod);
    }
    if !call.is_tcp() {
        return GO_ON;
    }
    let to = call.endpoint::<V6>();
    let stream = Stream { ctx, call, netns, pod, to };
    stream.decide::<V6>()
}

/// One TCP connect of an enrolled pod.
struct Stream<'a> {
    ctx: &'a SockAddrContext,
    call: SockAddr,
    netns: u64,
    pod: &'a Pod,
    to: Endpoint,
}

impl Stream<'_> {
    #[inline(always)]
    fn decide<const V6: bool>(&self) -> i32 {
        if called_by_agent() {
            return self.note(socket::EXEMPT, GO_ON);
        }
        let leave = left_to_kernel(self.pod, &self.to);
        if leave == Some(Leave::Own) && is_capture_port(self.to.port) {
            return self.own_capture_port();
        }
        let dns = self.to.port == DNS && answers_dns(self.pod);
        match leave {
            Some(Leave::Own | Leave::Local) => return self.leave(Reason::LeftSelf),
            Some(Leave::Excluded) => return self.leave(Reason::Left),
            Some(Leave::Unlisted) if !dns => return self.leave(Reason::Left),
            _ => {}
        }
        if !agent_alive() {
            if setting(config::FAIL_OPEN) != 0 {
                count(Reason::LeftFailOpen);
                return self.note(socket::EXEMPT, GO_ON);
            }
            count(Reason::RefusedStale);
            return REFUSE;
        }
        if dns {
            return self.capture::<V6>(socket::CAPTURED_DNS);
        }
        if setting(config::FAST_PATH) != 0 && self.fast_path::<V6>() {
            return GO_ON;
        }
        self.capture::<V6>(socket::CAPTURED)
    }

    /// Nothing is stored for what is left alone: the enforcement comes to the same result from the packet. A socket
    /// that was captured before and connects again must not keep what is known of it.
    #[inline(always)]
    fn leave(&self, reason: Reason) -> i32 {
        count(reason);
        if let Some(known) = socket_storage(self.call.socket(), false) {
            known.state = socket::EXEMPT;
            known.port = 0;
        }
        GO_ON
    }

    /// Remembers a state for the later hooks.
    #[inline(always)]
    fn note(&self, state: u32, then: i32) -> i32 {
        let Some(known) = socket_storage(self.call.socket(), true) else {
            count(Reason::RefusedFull);
            return REFUSE;
        };
        known.state = state;
        known.port = 0;
        then
    }

    /// A connect to the pod's own address and a capture port: either the second generation of this hook looks at
    /// what the first made of it, or the pod calls itself there.
    #[inline(always)]
    fn own_capture_port(&self) -> i32 {
        if let Some(known) = socket_storage(self.call.socket(), false) {
            if known.port == self.to.port && matches!(known.state, socket::CAPTURED | socket::CAPTURED_DNS) {
                return GO_ON;
            }
        }
        count(Reason::LeftSelf);
        self.note(socket::SELF, GO_ON)
    }

    /// Whether a verdict lets the connection go straight to the application.
    #[inline(always)]
    fn fast_path<const V6: bool>(&self) -> bool {
        let Some(source) = self.source::<V6>() else { return false };
        let key = VerdictKey {
            netns: self.netns,
            source,
            destination: self.to.address,
            port: self.to.port,
            zero: [0; 3],
        };
        let Some(verdict) = allowed(&key) else { return false };
        let Some(known) = socket_storage(self.call.socket(), true) else { return false };
        known.state = socket::FAST_PATH;
        known.destination = self.to;
        known.port = 0;
        known.generation = verdict.generation;
        known.policy = verdict.policy;
        known.verdict_flags = verdict.flags;
        known.fins = 0;
        known.half_closed_at = 0;
        known.flushed_ns = 0;
        if !self.reserve(source, known) {
            count(Reason::FastPathFull);
            return false;
        }
        count(Reason::FastPath);
        true
    }

    /// Takes the place of the connection's figures while there still is another way than the fast path: a connection
    /// without figures could not be ended when policy changes.
    #[inline(always)]
    fn reserve(&self, source: Address, known: &Socket) -> bool {
        let tuple =
            Tuple { client: source, server: self.to.address, client_port: 0, server_port: self.to.port };
        let reserved = flow(self.netns, tuple, state::RESERVED, known);
        // SAFETY: the helper takes the program's context.
        let cookie = unsafe { bpf_get_socket_cookie(self.ctx.as_ptr()) };
        FLOWS.insert(&cookie, &reserved, BPF_ANY as u64).is_ok()
    }

    /// The source that the connection will have, if that is already certain.
    #[inline(always)]
    fn source<const V6: bool>(&self) -> Option<Address> {
        let bound = self.call.bound::<V6>();
        if !bound.is_none() {
            return Some(bound);
        }
        let v4 = self.to.address.is_v4();
        let several = if v4 { pod_flag::SEVERAL_V4 } else { pod_flag::SEVERAL_V6 };
        let own = if v4 { self.pod.v4 } else { self.pod.v6 };
        (self.pod.flags & several == 0 && !own.is_none()).then_some(own)
    }

    #[inline(always)]
    fn capture<const V6: bool>(&self, state: u32) -> i32 {
        let own = if self.to.address.is_v4() { self.pod.v4 } else { self.pod.v6 };
        if own.is_none() {
            // The kernel answers as it would without the mesh: there is no source address.
            return self.leave(Reason::LeftNoAddress);
        }
        let port = CAPTURE_PORTS_START + (spread(&self.to) % CAPTURE_PORTS as u32) as u16;
        let Some(known) = socket_storage(self.call.socket(), true) else {
            count(Reason::RefusedFull);
            return REFUSE;
        };
        known.state = state;
        known.destination = self.to;
        known.port = port;
        self.call.set::<V6>(&Endpoint::new(own, port));
        count(if state == socket::CAPTURED { Reason::Captured } else { Reason::CapturedDns });
        if logging() {
            info!(
                self.ctx,
                "slot {}: connect to port {} captured through port {}", self.pod.slot, self.to.port, port
            );
        }
        GO_ON
    }
}
