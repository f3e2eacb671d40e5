//! Denials that found the access log's queue full: counted by what they have in common instead of waiting for the writer.
//!
//! The first of each kind keeps its whole record, the others a count: nothing is lost but the details of equal lines,
//! and what is kept is bounded by [`MOST_KINDS`], however many connections are denied while nobody reads the log.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use super::access_log::{AccessRecord, Direction};
use crate::hbone::Authority;

/// Kinds that are told apart; denials of further kinds are only counted. A few hundred bytes each.
const MOST_KINDS: usize = 4096;

/// What equal denials have in common: who (by address), where to, and the reason, which names the policy.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Kind {
    direction: Direction,
    source: IpAddr,
    destination: SocketAddr,
    target: Option<Authority>,
    reason: Option<Arc<str>>,
}

impl Kind {
    fn of(record: &AccessRecord) -> Self {
        Self {
            direction: record.direction,
            source: record.source.ip(),
            destination: record.destination,
            target: record.hbone_target.clone(),
            reason: record.failure.as_ref().map(|failure| failure.text.clone()),
        }
    }
}

/// Denials of one kind.
#[derive(Debug)]
pub(super) struct Repeated {
    /// The first one.
    pub(super) first: AccessRecord,
    /// How many came after it.
    pub(super) more: u64,
    /// When the last one came.
    pub(super) last: SystemTime,
}

/// What has piled up since the writer came by.
#[derive(Debug, Default)]
pub(super) struct Pile {
    /// In the order in which their first denials came.
    pub(super) kinds: Vec<Repeated>,
    places: HashMap<Kind, usize>,
    /// How many denials were of yet other kinds, and when the last one came.
    pub(super) others: Option<(u64, SystemTime)>,
}

/// The denials that wait. The lock is held for one look-up, never while anything is written.
#[derive(Debug, Default)]
pub(super) struct Denials(Mutex<Pile>);

impl Denials {
    pub(super) fn add(&self, record: AccessRecord) {
        let mut pile = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Pile { kinds, places, others } = &mut *pile;
        let kind = Kind::of(&record);
        if let Some(known) = places.get(&kind).and_then(|at| kinds.get_mut(*at)) {
            known.more += 1;
            known.last = record.at;
        } else if kinds.len() < MOST_KINDS {
            places.insert(kind, kinds.len());
            kinds.push(Repeated { more: 0, last: record.at, first: record });
        } else {
            let (count, last) = others.get_or_insert((0, record.at));
            *count += 1;
            *last = record.at;
        }
    }

    pub(super) fn take(&self) -> Pile {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
