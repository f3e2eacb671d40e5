//! Which nameservers a pod has not asked for longest. Each that it asks over UDP takes one of its few ports
//! ([`mesh_ebpf::DNS_PORTS`]); when most are taken, the ones that were not used for longest are given to others.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mesh_ebpf::{DNS_PORTS, DNS_PORTS_START};

/// From so many taken ports on, some are freed: the kernel finds a free one surely only while enough are.
const CROWDED: usize = DNS_PORTS as usize * 3 / 4;
/// As many stay taken. Never is one freed that was used within [`IN_USE`] while fewer than [`CROWDED`] stay.
const KEPT: usize = DNS_PORTS as usize / 2;
/// An answer may still be on its way to a port that was used within this time.
const IN_USE: Duration = Duration::from_secs(10);

/// When each port was last asked at, in milliseconds after `began`; 0: not since then.
pub(super) struct Recent {
    began: Instant,
    ports: [AtomicU64; DNS_PORTS as usize],
}

impl Default for Recent {
    fn default() -> Self {
        // Before any question, so that no moment of one is 0.
        let began = Instant::now().checked_sub(Duration::from_millis(1)).unwrap_or_else(Instant::now);
        Self { began, ports: std::array::from_fn(|_| AtomicU64::new(0)) }
    }
}

impl Recent {
    /// A query came in at `port`.
    pub(super) fn asked(&self, port: u16) {
        self.asked_at(port, Instant::now());
    }

    /// What is to be freed of the ports that are taken: enough of those that were not used for longest.
    pub(super) fn oldest(&self, taken: &[u16]) -> Vec<u16> {
        self.oldest_at(taken, Instant::now())
    }

    fn asked_at(&self, port: u16, now: Instant) {
        if let Some(last) = self.last(port) {
            last.store(self.millis(now), Ordering::Relaxed);
        }
    }

    fn oldest_at(&self, taken: &[u16], now: Instant) -> Vec<u16> {
        if taken.len() < CROWDED {
            return Vec::new();
        }
        let used = |port: u16| self.last(port).map_or(0, |last| last.load(Ordering::Relaxed));
        let mut by_age: Vec<(u64, u16)> = taken.iter().map(|port| (used(*port), *port)).collect();
        by_age.sort_unstable();
        by_age.truncate(taken.len() - KEPT);
        let must = taken.len() - CROWDED + 1;
        let idle = self.millis(now).saturating_sub(u64::try_from(IN_USE.as_millis()).unwrap_or(u64::MAX));
        let frees = by_age.iter().enumerate().filter(|(n, (used, _))| *n < must || *used < idle);
        frees.map(|(_, (_, port))| *port).collect()
    }

    fn last(&self, port: u16) -> Option<&AtomicU64> {
        self.ports.get(usize::from(port.checked_sub(DNS_PORTS_START)?))
    }

    fn millis(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.began).as_millis()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(count: usize) -> Vec<u16> {
        (DNS_PORTS_START..).take(count).collect()
    }

    /// Ports asked at one second after the other.
    fn asked(count: usize) -> (Recent, Instant) {
        let recent = Recent::default();
        let mut now = Instant::now();
        for port in ports(count) {
            now += Duration::from_secs(1);
            recent.asked_at(port, now);
        }
        (recent, now)
    }

    #[test]
    fn while_enough_ports_are_free_none_is_taken_away() {
        let (recent, now) = asked(CROWDED - 1);
        assert!(recent.oldest_at(&ports(CROWDED - 1), now + Duration::from_secs(3600)).is_empty());
    }

    #[test]
    fn when_most_are_taken_those_that_were_not_used_for_longest_are_freed() {
        let (recent, now) = asked(64);
        // The oldest is used again.
        recent.asked_at(DNS_PORTS_START, now);
        assert_eq!(recent.oldest_at(&ports(64), now), ports(33)[1..]);
    }

    #[test]
    fn ports_in_use_are_freed_only_as_far_as_room_needs_it() {
        let recent = Recent::default();
        let now = Instant::now();
        ports(64).into_iter().for_each(|port| recent.asked_at(port, now));
        assert_eq!(recent.oldest_at(&ports(64), now).len(), 64 - CROWDED + 1);
    }

    #[test]
    fn a_port_that_nobody_asked_at_goes_first() {
        let (recent, now) = asked(CROWDED);
        let unused = DNS_PORTS_START + 63;
        let mut taken = ports(CROWDED - 1);
        taken.push(unused);
        assert_eq!(recent.oldest_at(&taken, now)[0], unused);
    }
}
