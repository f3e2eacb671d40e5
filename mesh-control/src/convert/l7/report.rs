//! What there is to say about one object, put into few conditions.

use std::collections::BTreeSet;

use super::services::{Service, Services};
use crate::model::{Condition, ObjectRef};

/// Collects what is found while an object is converted.
#[derive(Debug)]
pub(super) struct Report {
    object: ObjectRef,
    /// Fields that have no effect.
    unsupported: Vec<String>,
    /// What names something that is not there: reason, what.
    unresolved: Vec<(&'static str, String)>,
    /// Where it does not count although it is in order.
    overruled: Vec<String>,
    /// All of it.
    said: BTreeSet<String>,
}

impl Report {
    pub(super) fn new(object: ObjectRef, unsupported: &[String]) -> Self {
        let (unsupported, said) = (unsupported.to_vec(), BTreeSet::new());
        Self { object, unsupported, unresolved: Vec::new(), overruled: Vec::new(), said }
    }

    pub(super) fn unsupported(&mut self, what: impl Into<String>) {
        let what = what.into();
        if self.is_new(&what) {
            self.unsupported.push(what);
        }
    }

    pub(super) fn unresolved(&mut self, reason: &'static str, what: impl Into<String>) {
        let what = what.into();
        if self.is_new(&what) {
            self.unresolved.push((reason, what));
        }
    }

    pub(super) fn overruled(&mut self, what: impl Into<String>) {
        let what = what.into();
        if self.is_new(&what) {
            self.overruled.push(what);
        }
    }

    /// Rules that count in several places are looked at for each of them; what there is to say is said once.
    fn is_new(&mut self, what: &str) -> bool {
        self.said.insert(what.to_owned())
    }

    /// The object as a whole has no effect.
    pub(super) fn refuse(self, reason: &str, why: impl Into<String>, out: &mut Vec<Condition>) {
        out.push(Condition::new(self.object, "Accepted", false, reason, why));
    }

    /// `Accepted`, and `ResolvedRefs` where something is named. `somewhere`: it counts for at least one service.
    pub(super) fn finish(mut self, somewhere: bool, out: &mut Vec<Condition>) {
        self.unsupported.dedup();
        let mut parts = Vec::new();
        if !self.overruled.is_empty() {
            parts.push(self.overruled.join("; "));
        }
        if !self.unsupported.is_empty() {
            parts.push(format!("no effect: {}", self.unsupported.join(", ")));
        }
        let reason = match (self.overruled.is_empty(), self.unsupported.is_empty()) {
            (false, _) => "Conflicted",
            (true, false) => "UnsupportedValue",
            (true, true) => "Accepted",
        };
        if parts.is_empty() {
            parts.push("told to waypoints".to_owned());
        }
        out.push(Condition::new(self.object.clone(), "Accepted", somewhere, reason, parts.join("; ")));
        self.resolved(out);
    }

    /// `ResolvedRefs`.
    pub(super) fn resolved(&self, out: &mut Vec<Condition>) {
        let (ok, reason, message) = match self.unresolved.first() {
            None => (true, "ResolvedRefs", "everything that it names is there".to_owned()),
            Some((reason, _)) => {
                let all: Vec<&str> = self.unresolved.iter().map(|(_, what)| what.as_str()).collect();
                (false, *reason, all.join("; "))
            }
        };
        out.push(Condition::new(self.object.clone(), "ResolvedRefs", ok, reason, message));
    }
}

/// Whether what is said about these hosts reaches a waypoint: `ResolvedWaypoints`.
pub(super) fn waypoints(object: &ObjectRef, hosts: &[String], services: &Services, out: &mut Vec<Condition>) {
    let mut found: Vec<&Service> = hosts.iter().flat_map(|host| services.matching(host)).collect();
    found.sort_by_key(|s| (&s.namespace, &s.hostname));
    found.dedup_by_key(|s| (&s.namespace, &s.hostname));
    let names = |which: &dyn Fn(&Service) -> bool| {
        let of = found.iter().filter(|s| which(s)).map(|s| s.hostname.as_str());
        of.collect::<Vec<_>>().join(", ")
    };
    let (unlabelled, unbound) = (names(&|s| s.asked.is_none()), names(&|s| s.asked.is_some() && !s.bound));
    let (ok, reason, message) = if found.is_empty() {
        (false, "NoMatchingParent", format!("{} names no service", hosts.join(", ")))
    } else if !unlabelled.is_empty() {
        let why = "neither it nor its namespace has the label istio.io/use-waypoint, and only a waypoint does \
                   what this says";
        (false, "MissingUseWaypointLabel", format!("{unlabelled}: {why}"))
    } else if !unbound.is_empty() {
        let why = "is not bound to the waypoint that it asks for; see its condition istio.io/WaypointBound";
        (false, "WaypointNotBound", format!("{unbound} {why}"))
    } else {
        (true, "ResolvedWaypoints", "every service that this is for has a waypoint".to_owned())
    };
    out.push(Condition::new(object.clone(), "ResolvedWaypoints", ok, reason, message));
}
