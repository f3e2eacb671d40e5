//! Which nameservers a pod has not asked for longest. Each that it asks over UDP takes one of its few ports
//! ([`mesh_ebpf::DNS_PORTS`]); when most are taken, the ones that were not used for longest are given to others.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mesh_ebpf::{DNS_PORTS, DNS_PORTS_START};

/// The kernel programs try so many neighbouring ports for a nameserver (TRIES in `mesh-ebpf/src/programs/datagram.rs`).
const TRIED: usize = 16;
/// From so many taken ports on, some are freed: with more, the kernel often finds none among those that it tries.
const CROWDED: usize = DNS_PORTS as usize / 2;
/// As many stay taken. Never is one freed that was used within [`IN_USE`] while fewer than [`CROWDED`] stay, and the
/// kernel finds a free one wherever it looks.
const KEPT: usize = DNS_PORTS as usize / 4;
/// An answer may still be on its way to a port that was used within this time.
const IN_USE: Duration = Duration::from_secs(6);

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

    /// What is to be freed of the ports that are taken: enough of those that were not used for longest, so that the kernel
    /// finds a free one wherever it looks.
    pub(super) fn oldest(&self, taken: &[u16]) -> Vec<u16> {
        self.oldest_at(taken, Instant::now())
    }

    fn asked_at(&self, port: u16, now: Instant) {
        if let Some(last) = self.last(port) {
            last.store(self.millis(now), Ordering::Relaxed);
        }
    }

    fn oldest_at(&self, taken: &[u16], now: Instant) -> Vec<u16> {
        let used = |port: u16| self.last(port).map_or(0, |last| last.load(Ordering::Relaxed));
        let mut freed = Vec::new();
        if taken.len() >= CROWDED {
            let mut by_age: Vec<(u64, u16)> = taken.iter().map(|port| (used(*port), *port)).collect();
            by_age.sort_unstable();
            by_age.truncate(taken.len() - KEPT);
            let must = taken.len() - CROWDED + 1;
            let idle = self.millis(now).saturating_sub(u64::try_from(IN_USE.as_millis()).unwrap_or(u64::MAX));
            let frees = by_age.iter().enumerate().filter(|(n, (used, _))| *n < must || *used < idle);
            freed.extend(frees.map(|(_, (_, port))| *port));
        }
        let is_taken = |port: u16, freed: &[u16]| taken.contains(&port) && !freed.contains(&port);
        for start in 0..DNS_PORTS {
            let tried: Vec<u16> =
                (0..TRIED as u16).map(|n| DNS_PORTS_START + (start + n) % DNS_PORTS).collect();
            if tried.iter().all(|port| is_taken(*port, &freed)) {
                freed.extend(tried.into_iter().min_by_key(|port| used(*port)));
            }
        }
        freed
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

    /// Every second port: the kernel finds a free one everywhere.
    fn spread(count: usize) -> Vec<u16> {
        (0..DNS_PORTS)
            .step_by(2)
            .chain((1..DNS_PORTS).step_by(2))
            .map(|n| DNS_PORTS_START + n)
            .take(count)
            .collect()
    }

    #[test]
    fn while_enough_ports_are_free_none_is_taken_away() {
        let (recent, now) = asked(64);
        assert!(recent.oldest_at(&spread(CROWDED - 1), now + Duration::from_secs(3600)).is_empty());
    }

    #[test]
    fn when_many_are_taken_those_that_were_not_used_for_longest_are_freed() {
        let (recent, now) = asked(64);
        // The oldest is used again.
        recent.asked_at(DNS_PORTS_START, now);
        // Down to a quarter, and one more: those that stay and the first one stand side by side.
        assert_eq!(recent.oldest_at(&ports(64), now), ports(50)[1..]);
    }

    #[test]
    fn ports_in_use_are_freed_only_as_far_as_room_needs_it() {
        let recent = Recent::default();
        let now = Instant::now();
        ports(64).into_iter().for_each(|port| recent.asked_at(port, now));
        assert_eq!(recent.oldest_at(&spread(CROWDED), now).len(), 1);
    }

    #[test]
    fn a_port_that_nobody_asked_at_goes_first() {
        let (recent, now) = asked(63);
        let unused = DNS_PORTS_START + 63;
        let mut taken = spread(CROWDED);
        taken.push(unused);
        assert_eq!(recent.oldest_at(&taken, now)[0], unused);
    }

    #[test]
    fn wherever_the_kernel_looks_it_finds_a_free_port() {
        let (recent, now) = asked(64);
        // Few are taken, but all that the kernel tries for some nameserver.
        let taken: Vec<u16> = (56..72).map(|n| DNS_PORTS_START + n % 64).collect();
        assert_eq!(recent.oldest_at(&taken, now), [DNS_PORTS_START], "the range is a circle");
        assert!(recent.oldest_at(&taken[1..], now).is_empty());
    }
}
