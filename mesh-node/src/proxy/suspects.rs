//! Endpoints that lately did not take a connection to a service, as one worker has seen it. New connections pass them
//! over while the service has others; now and then one of them tries again, and the rest need not wait for it.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_core::state::Str;

/// How an endpoint did not take a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// It refused: trying it costs a round trip.
    Refused,
    /// It did not answer: trying it costs somebody's patience.
    Silent,
}

impl Fault {
    const fn hold(self) -> Duration {
        match self {
            Self::Refused => Duration::from_secs(1),
            Self::Silent => Duration::from_secs(5),
        }
    }
}

/// However often it failed, an endpoint is tried again after this long.
const LONGEST: Duration = Duration::from_secs(60);
/// While one connection tries a suspect again, the others still pass it over.
const TRIAL: Duration = Duration::from_secs(2);
/// A suspect that nobody tried again for this long is forgotten.
const FORGET: Duration = Duration::from_secs(300);

struct Suspect {
    uid: Str,
    until: Instant,
    hold: Duration,
}

/// By the address that applications connect to: an endpoint may refuse one port and serve another.
#[derive(Default)]
pub(super) struct Suspects(RefCell<HashMap<SocketAddr, Vec<Suspect>>>);

impl Suspects {
    /// The endpoints that a new connection to `destination` should not try first.
    pub(super) fn avoided(&self, destination: SocketAddr, now: Instant) -> Vec<Str> {
        let mut known = self.0.borrow_mut();
        let Some(suspects) = known.get_mut(&destination) else { return Vec::new() };
        let mut avoided = Vec::with_capacity(suspects.len());
        for suspect in suspects {
            if now < suspect.until {
                avoided.push(suspect.uid.clone());
            } else {
                suspect.until = now + TRIAL;
            }
        }
        avoided
    }

    /// An endpoint did not take a connection to `destination`.
    pub(super) fn failed(&self, destination: SocketAddr, uid: &Str, fault: Fault, now: Instant) {
        let mut known = self.0.borrow_mut();
        let suspects = known.entry(destination).or_default();
        match suspects.iter_mut().find(|s| s.uid == *uid) {
            // Connections that were under way together are one failure.
            Some(suspect) if now + TRIAL < suspect.until => {}
            Some(suspect) => {
                suspect.hold = (suspect.hold * 2).clamp(fault.hold(), LONGEST);
                suspect.until = now + suspect.hold;
            }
            None => {
                let hold = fault.hold();
                suspects.push(Suspect { uid: uid.clone(), until: now + hold, hold });
            }
        }
    }

    /// An endpoint took a connection to `destination`.
    pub(super) fn took(&self, destination: SocketAddr, uid: &Str) {
        let mut known = self.0.borrow_mut();
        if let Some(suspects) = known.get_mut(&destination) {
            suspects.retain(|s| s.uid != *uid);
            if suspects.is_empty() {
                known.remove(&destination);
            }
        }
    }

    /// Forgets what is long past: endpoints that are gone are not tried again.
    pub(super) fn forget(&self, now: Instant) {
        self.0.borrow_mut().retain(|_, suspects| {
            suspects.retain(|s| now < s.until + FORGET);
            !suspects.is_empty()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVICE: SocketAddr =
        SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::new(10, 96, 0, 1)), 80);

    fn one(fault: Fault) -> (Suspects, Str, Instant) {
        let (suspects, uid, now) = (Suspects::default(), Str::from("one"), Instant::now());
        suspects.failed(SERVICE, &uid, fault, now);
        (suspects, uid, now)
    }

    #[test]
    fn an_endpoint_that_failed_is_avoided_for_its_service_only_and_for_a_while() {
        let (suspects, uid, now) = one(Fault::Silent);
        assert_eq!(suspects.avoided(SERVICE, now), [uid]);
        assert!(suspects.avoided(SocketAddr::new(SERVICE.ip(), 81), now).is_empty());
        assert!(suspects.avoided(SERVICE, now + Fault::Silent.hold()).is_empty());
    }

    #[test]
    fn one_connection_tries_it_again_and_the_others_pass_it_over_meanwhile() {
        let (suspects, uid, now) = one(Fault::Silent);
        let later = now + Fault::Silent.hold();
        assert!(suspects.avoided(SERVICE, later).is_empty(), "this one tries");
        assert_eq!(suspects.avoided(SERVICE, later + Duration::from_millis(1)), [uid]);
    }

    #[test]
    fn one_that_fails_again_is_avoided_for_twice_as_long_up_to_a_limit() {
        let (suspects, uid, mut now) = one(Fault::Refused);
        let mut holds = Vec::new();
        for _ in 0..8 {
            let until = suspects.0.borrow()[&SERVICE][0].until;
            holds.push((until - now).as_secs());
            now = until;
            assert!(suspects.avoided(SERVICE, now).is_empty());
            suspects.failed(SERVICE, &uid, Fault::Refused, now);
        }
        assert_eq!(holds, [1, 2, 4, 8, 16, 32, 60, 60]);
    }

    #[test]
    fn failures_of_connections_that_were_under_way_together_count_once() {
        let (suspects, uid, now) = one(Fault::Silent);
        for _ in 0..100 {
            suspects.failed(SERVICE, &uid, Fault::Silent, now + Duration::from_millis(10));
        }
        assert!(suspects.avoided(SERVICE, now + Fault::Silent.hold()).is_empty());
    }

    #[test]
    fn one_that_takes_a_connection_is_no_suspect_any_more() {
        let (suspects, uid, now) = one(Fault::Silent);
        suspects.took(SERVICE, &uid);
        assert!(suspects.avoided(SERVICE, now).is_empty() && suspects.0.borrow().is_empty());
    }

    #[test]
    fn what_is_long_past_is_forgotten() {
        let (suspects, _, now) = one(Fault::Refused);
        suspects.forget(now + FORGET);
        assert_eq!(suspects.0.borrow().len(), 1);
        suspects.forget(now + FORGET + Fault::Refused.hold());
        assert!(suspects.0.borrow().is_empty());
    }
}
