//! DNS over UDP. Each nameserver that a pod asks gets a port of its own below the pod's own address: the answer
//! comes from that port, so that `recvmsg` restores the right server even when one socket asks several (musl), and
//! so that connected sockets accept the answer. All other UDP is left alone.

use super::connect::{GO_ON, REFUSE};
use super::context::SockAddr;
use super::maps::{
    Leave, NAMESERVERS, PODS, agent_alive, answers_dns, called_by_agent, count, is_dns_port, left_to_kernel,
    owner, setting, spread,
};
use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::programs::SockAddrContext;
use mesh_ebpf::{DNS_PORTS, DNS_PORTS_START, Endpoint, NameserverKey, Pod, Reason, config};

const DNS: u16 = 53;
/// Places that are tried for a nameserver.
const TRIES: u32 = 16;

#[inline(always)]
pub(crate) fn send<const V6: bool>(ctx: &SockAddrContext) -> i32 {
    let call = SockAddr::of(ctx);
    if call.port() != DNS {
        return GO_ON;
    }
    // SAFETY: the entry is plain data that user space replaces whole.
    let Some(pod) = (unsafe { PODS.get(&call.netns()) }) else { return GO_ON };
    redirect::<V6>(&call, pod)
}

/// Points a connect or sendmsg to port 53 at the pod's DNS listener.
#[inline(always)]
pub(crate) fn redirect<const V6: bool>(call: &SockAddr, pod: &Pod) -> i32 {
    if call.port() != DNS || !answers_dns(pod) || called_by_agent() {
        return GO_ON;
    }
    let to = call.endpoint::<V6>();
    match left_to_kernel(pod, &to) {
        None | Some(Leave::Unlisted) => {}
        Some(_) => return GO_ON,
    }
    if !agent_alive() {
        if setting(config::FAIL_OPEN) != 0 {
            count(Reason::LeftFailOpen);
            return GO_ON;
        }
        count(Reason::RefusedStale);
        return REFUSE;
    }
    let own = if to.address.is_v4() { pod.v4 } else { pod.v6 };
    if own.is_none() {
        count(Reason::LeftNoAddress);
        return GO_ON;
    }
    let Some(port) = nameserver_port(pod.slot, &to) else {
        count(Reason::RefusedNameservers);
        return REFUSE;
    };
    call.set::<V6>(&Endpoint::new(own, port));
    count(Reason::DnsDatagram);
    GO_ON
}

/// The port that stands for a nameserver in this pod.
#[inline(always)]
fn nameserver_port(slot: u32, to: &Endpoint) -> Option<u16> {
    let start = spread(to);
    for step in 0..TRIES {
        let index = start.wrapping_add(step) % DNS_PORTS as u32;
        let key = NameserverKey { slot, index };
        let port = DNS_PORTS_START + index as u16;
        // SAFETY: entries never change once written, until the pod leaves.
        match unsafe { NAMESERVERS.get(&key) } {
            Some(known) if known == to => return Some(port),
            Some(_) => {}
            None => {
                if NAMESERVERS.insert(&key, to, BPF_NOEXIST as u64).is_ok() {
                    return Some(port);
                }
                // Another CPU took the place just now, perhaps for the same server.
                // SAFETY: as above.
                if unsafe { NAMESERVERS.get(&key) } == Some(to) {
                    return Some(port);
                }
            }
        }
    }
    None
}

/// The nameserver that an own address and DNS port stand for.
#[inline(always)]
pub(crate) fn nameserver<'a>(call: &SockAddr, from: &Endpoint) -> Option<&'a Endpoint> {
    if !is_dns_port(from.port) {
        return None;
    }
    // SAFETY: the entry is plain data that user space replaces whole.
    let pod = unsafe { PODS.get(&call.netns()) }?;
    if owner(&from.address) != Some(pod.slot) {
        return None;
    }
    let key = NameserverKey { slot: pod.slot, index: (from.port - DNS_PORTS_START) as u32 };
    // SAFETY: entries never change once written, until the pod leaves.
    unsafe { NAMESERVERS.get(&key) }
}

/// Restores the source of an answer.
#[inline(always)]
pub(crate) fn receive<const V6: bool>(ctx: &SockAddrContext) -> i32 {
    let call = SockAddr::of(ctx);
    if is_dns_port(call.port()) && !called_by_agent() {
        if let Some(server) = nameserver(&call, &call.endpoint::<V6>()) {
            call.set::<V6>(server);
        }
    }
    GO_ON
}
