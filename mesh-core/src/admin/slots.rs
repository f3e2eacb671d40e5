//! How many connections an admin, metrics, readiness or debug port takes at once. Anybody in the cluster may reach
//! some of these ports: connections that are opened and left lying must cost neither memory nor descriptors without
//! end, and must not keep the kubelet's probe or a scrape out.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Connections of one port.
pub const CONNECTIONS: usize = 64;
/// Of these, connections of one address that is not the machine's own.
pub const CONNECTIONS_PER_PEER: usize = 16;
/// A request's head has to arrive within this time.
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection, which carries one request, ends within this time however slowly its answer is read.
pub const CONNECTION_TIMEOUT: Duration = Duration::from_secs(60);

/// The slots of one port.
#[derive(Debug, Clone, Default)]
pub struct Slots(Arc<Mutex<Taken>>);

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by_peer: HashMap<IpAddr, usize>,
}

/// A taken slot; free again when dropped.
#[derive(Debug)]
pub struct Slot {
    slots: Slots,
    peer: Option<IpAddr>,
}

impl Slots {
    /// A slot for a connection from `peer` (none: over a unix socket), if there is one. A connection without a slot is
    /// to be closed.
    #[must_use]
    pub fn take(&self, peer: Option<IpAddr>) -> Option<Slot> {
        let peer = peer.map(|ip| ip.to_canonical()).filter(|ip| !ip.is_loopback());
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.all >= CONNECTIONS {
            return None;
        }
        if let Some(peer) = peer {
            let of_peer = taken.by_peer.entry(peer).or_default();
            if *of_peer >= CONNECTIONS_PER_PEER {
                return None;
            }
            *of_peer += 1;
        }
        taken.all += 1;
        Some(Slot { slots: self.clone(), peer })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut taken = self.slots.0.lock().unwrap_or_else(PoisonError::into_inner);
        taken.all -= 1;
        let Some(peer) = self.peer else { return };
        if let Some(of_peer) = taken.by_peer.get_mut(&peer) {
            *of_peer -= 1;
            if *of_peer == 0 {
                taken.by_peer.remove(&peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(slots: &Slots, peer: Option<&str>) -> Vec<Slot> {
        let peer = peer.map(|ip| ip.parse().unwrap());
        std::iter::from_fn(|| slots.take(peer)).collect()
    }

    #[test]
    fn one_address_cannot_take_all_slots_of_a_port() {
        let slots = Slots::default();
        let greedy = fill(&slots, Some("10.0.0.9"));
        assert_eq!(greedy.len(), CONNECTIONS_PER_PEER);
        assert!(fill(&slots, Some("::ffff:10.0.0.9")).is_empty(), "the mapped address is the same one");
        assert!(slots.take(Some("10.0.0.1".parse().unwrap())).is_some());
        let own = fill(&slots, Some("127.0.0.1"));
        assert_eq!(
            own.len(),
            CONNECTIONS - CONNECTIONS_PER_PEER,
            "the machine itself has no share of its own"
        );
        assert!(fill(&slots, None).is_empty());
    }

    #[test]
    fn a_closed_connection_frees_its_slot_and_nothing_is_kept_of_its_address() {
        let slots = Slots::default();
        drop(fill(&slots, Some("fd00::1")));
        assert!(slots.0.lock().unwrap().by_peer.is_empty());
        assert_eq!(fill(&slots, Some("fd00::1")).len(), CONNECTIONS_PER_PEER);
        assert_eq!(fill(&slots, None).len(), CONNECTIONS);
    }
}
