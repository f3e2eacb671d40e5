//! Inbound: `sk_lookup` of every enrolled network namespace decides which socket gets a SYN.
//!
//! "From inside" is told by the source being one of the namespace's own addresses, or by the ingress device being
//! `lo` (the agent's connection to the application). The device alone does not tell: a connection to an own address
//! shows the interface that owns it.

use super::context::{Lookup, TCP, UDP};
use super::maps::{
    AUTHORISED, LISTENERS, ORIGINALS, allowed, count, is_capture_port, is_dns_port, logging, owner, setting,
};
use aya_ebpf::programs::SkLookupContext;
use aya_log_ebpf::info;
use mesh_ebpf::{
    Authorised, HBONE_PORT, LISTENERS_PER_POD, Owner, Reason, Tuple, VerdictKey, authorised, config, listener,
};

/// The kernel's own lookup goes on, unless a socket was assigned.
const PASS: u32 = 1;
/// No socket: the caller is refused.
const DROP: u32 = 0;
/// Device index of `lo` in every network namespace.
const LOOPBACK: u32 = 1;
/// Takes exactly the socket in the map, not another of its reuse-port group.
const NO_REUSEPORT: u64 = 2;

#[inline(always)]
pub(crate) fn steer(ctx: &SkLookupContext) -> u32 {
    let lookup = Lookup::of(ctx);
    match lookup.protocol() {
        TCP => stream(ctx, &lookup),
        UDP => datagram(ctx, &lookup),
        _ => PASS,
    }
}

#[inline(always)]
fn stream(ctx: &SkLookupContext, lookup: &Lookup) -> u32 {
    let tuple = lookup.tuple();
    let inside = lookup.ingress() == LOOPBACK;
    let port = tuple.server_port;
    if is_capture_port(port) {
        // SAFETY: the record is copied field by field; it never changes once written.
        if let Some(original) = unsafe { ORIGINALS.get(&tuple) } {
            let Some(slot) = owner(&tuple.server) else {
                return refuse(ctx, port, Reason::DroppedUnknownAddress);
            };
            return give(ctx, slot, original.listener, 0);
        }
    }
    if inside {
        return PASS;
    }
    // SAFETY: the entry is copied; it never changes once written.
    if let Some(entry) = unsafe { AUTHORISED.get(&tuple) } {
        return authorised(ctx, &tuple, entry);
    }
    if is_capture_port(port) {
        return refuse(ctx, port, Reason::DroppedCapturePort);
    }
    let slot = match owner(&tuple.server) {
        Some(slot) if slot != Owner::AMBIGUOUS => slot,
        _ => return fail(ctx, port, Reason::DroppedUnknownAddress),
    };
    if owner(&tuple.client) == Some(slot) {
        return PASS;
    }
    if port == HBONE_PORT {
        return give(ctx, slot, listener::HBONE, 0);
    }
    give(ctx, slot, listener::INBOUND, 0)
}

/// A tuple of an older generation is checked again, never dropped for its age.
#[inline(always)]
fn authorised(ctx: &SkLookupContext, tuple: &Tuple, entry: &Authorised) -> u32 {
    if entry.kind != authorised::FAST_PATH || entry.generation == setting(config::GENERATION) as u32 {
        return PASS;
    }
    let key = VerdictKey {
        netns: entry.netns,
        source: tuple.client,
        destination: tuple.server,
        port: tuple.server_port,
        zero: [0; 3],
    };
    if allowed(&key).is_some() {
        return PASS;
    }
    refuse(ctx, tuple.server_port, Reason::FastPathDenied)
}

/// DNS over UDP from inside goes to the DNS listener; from outside nobody reaches those ports.
#[inline(always)]
fn datagram(ctx: &SkLookupContext, lookup: &Lookup) -> u32 {
    let port = lookup.local_port();
    if !is_dns_port(port) {
        return PASS;
    }
    let tuple = lookup.tuple();
    match owner(&tuple.server) {
        Some(slot) if owner(&tuple.client) == Some(slot) => give(ctx, slot, listener::DNS_UDP, NO_REUSEPORT),
        _ => refuse(ctx, port, Reason::DroppedCapturePort),
    }
}

/// Hands the packet to a listener of the pod.
#[inline(always)]
fn give(ctx: &SkLookupContext, slot: u32, kind: u32, flags: u64) -> u32 {
    let index = slot.wrapping_mul(LISTENERS_PER_POD).wrapping_add(kind);
    if LISTENERS.redirect_sk_lookup(ctx, index, flags).is_err() {
        return fail(ctx, kind as u16, Reason::DroppedNoListener);
    }
    match kind {
        listener::INBOUND => count(Reason::SteeredInbound),
        listener::HBONE => count(Reason::SteeredHbone),
        _ => {}
    }
    PASS
}

/// The mesh cannot do its work: refuse, or pass if it fails open.
#[inline(always)]
fn fail(ctx: &SkLookupContext, detail: u16, reason: Reason) -> u32 {
    if setting(config::FAIL_OPEN) != 0 {
        count(Reason::PassedFailOpen);
        return PASS;
    }
    refuse(ctx, detail, reason)
}

#[inline(always)]
fn refuse(ctx: &SkLookupContext, detail: u16, reason: Reason) -> u32 {
    count(reason);
    if logging() {
        info!(ctx, "refused, reason {} detail {}", reason as u32, detail);
    }
    DROP
}
