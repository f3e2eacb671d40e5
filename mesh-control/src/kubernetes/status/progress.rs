//! How many proxies have what an object says: counted from the snapshot that its version came into force with, and settled
//! for that version once every connected proxy has acknowledged it. A proxy that comes later gets everything at once, and
//! changes nothing that is written.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use mesh_core::xds::proto::node::ObjectVersion;
use tokio::time::Instant;

use super::render::Said;
use crate::ads::{Clients, Programmed};
use crate::hub::Published;
use crate::model::{Kind, ObjectRef};
use crate::replicas::Elsewhere;
use crate::source::kube::observed::Stored;

/// Proxies that have not acknowledged within this are named.
const PATIENCE: Duration = Duration::from_secs(2);
/// While some have not, who they are is written this often.
const NEWS: Duration = Duration::from_secs(15);
/// While some have not, they are asked about this often.
pub(super) const LOOK: Duration = Duration::from_millis(500);

/// Kinds whose content proxies are told of. Of Services and workloads there are too many, and they change too often.
pub(super) fn has(kind: Kind) -> bool {
    !matches!(kind, Kind::Service | Kind::WorkloadEntry | Kind::Gateway)
}

#[derive(Debug)]
struct Version {
    uid: String,
    generation: i64,
    snapshot: u64,
    since: Instant,
    settled: Option<Said>,
    /// What was said while it was not, and when.
    shown: Option<(Said, Instant)>,
}

impl Version {
    fn new(uid: &str, generation: i64, snapshot: u64, since: Instant) -> Self {
        Self { uid: uid.to_owned(), generation, snapshot, since, settled: None, shown: None }
    }
}

/// What is known of each object.
#[derive(Debug, Default)]
pub(super) struct Progress {
    versions: HashMap<ObjectRef, Version>,
    /// Proxies were counted once for all objects of a snapshot.
    counted: HashMap<u64, Programmed>,
}

impl Progress {
    /// Another look at all objects begins: which versions of those that there is something to say about are not settled.
    pub(super) fn look(
        &mut self,
        published: &Published,
        all: &BTreeMap<ObjectRef, Arc<Stored>>,
        now: Instant,
    ) -> Vec<ObjectVersion> {
        self.versions.retain(|object, _| all.contains_key(object));
        self.counted.clear();
        // Of routes to other gateways, say, there may be thousands that are none of ours.
        let said = published.conditions.iter().map(|condition| &condition.object);
        let wrong = published.source.problems.iter().filter_map(|problem| problem.object.as_ref());
        let ours: HashSet<&ObjectRef> = said.chain(wrong).collect();
        for (object, stored) in all.iter().filter(|(object, _)| has(object.kind) && ours.contains(object)) {
            let is_in_force =
                published.objects().meta(object).is_some_and(|meta| meta.generation == stored.generation);
            let known = self.versions.get(object);
            let is_known = known.is_some_and(|v| (v.generation, &v.uid) == (stored.generation, &stored.uid));
            if is_in_force && !is_known {
                let version = Version::new(&stored.uid, stored.generation, published.snapshot, now);
                self.versions.insert(object.clone(), version);
            }
        }
        let open = self.versions.iter().filter(|(_, version)| version.settled.is_none());
        open.map(|(object, version)| ObjectVersion {
            kind: object.kind.to_string(),
            namespace: object.key.namespace.clone(),
            name: object.key.name.clone(),
            uid: version.uid.clone(),
            generation: version.generation,
        })
        .collect()
    }

    /// What there is to say of an object that is in force, or after which time there will be something.
    pub(super) fn of(
        &mut self,
        object: &ObjectRef,
        clients: &Clients,
        elsewhere: &Elsewhere,
        now: Instant,
    ) -> Result<Said, Duration> {
        let Some(version) = self.versions.get_mut(object) else { return Err(LOOK) };
        if let Some(said) = &version.settled {
            return Ok(said.clone());
        }
        let counted =
            self.counted.entry(version.snapshot).or_insert_with(|| clients.programmed(version.snapshot));
        let mut counted = counted.clone();
        if let Some(others) = elsewhere.said.get(object) {
            counted.join(others);
        }
        let (said, settled) = say(&counted, &elsewhere.silent);
        if settled {
            version.settled = Some(said.clone());
            return Ok(said);
        }
        match PATIENCE.checked_sub(now.duration_since(version.since)) {
            Some(rest) if !rest.is_zero() => return Err(rest.min(LOOK)),
            _ => {}
        }
        // Numbers that change all the time are not written all the time.
        match &version.shown {
            Some((shown, at)) if shown.reason == said.reason && now.duration_since(*at) < NEWS => {
                Ok(shown.clone())
            }
            _ => {
                version.shown = Some((said.clone(), now));
                Ok(said)
            }
        }
    }

    /// One whose patience with an object is over.
    #[cfg(test)]
    pub(super) fn patient(object: &ObjectRef, generation: i64) -> Self {
        let version = Version::new("", generation, 0, Instant::now() - PATIENCE);
        Self { versions: HashMap::from([(object.clone(), version)]), ..Self::default() }
    }
}

/// The condition, and whether it stays as it is for this version.
fn say(found: &Programmed, silent: &[String]) -> (Said, bool) {
    let connected = found.current + found.waiting;
    let so_far = format!("acknowledged by {} of {connected} proxies", found.current);
    if found.waiting == 0 && !silent.is_empty() {
        let message = format!("{so_far}; waiting for what {} says of its own", silent.join(", "));
        return (Said { status: false, reason: "Pending".into(), message }, false);
    }
    if connected == 0 {
        let message = "no proxy is connected to the control plane".to_owned();
        return (Said { status: false, reason: "NoProxies".into(), message }, false);
    }
    if found.waiting == 0 {
        return (Said { status: true, reason: "Programmed".into(), message: so_far }, true);
    }
    let more = if found.waiting > found.names.len() { ", …" } else { "" };
    let waiting = format!("{so_far}; waiting for {}{more}", found.names.join(", "));
    match &found.rejected {
        None => (Said { status: false, reason: "Pending".into(), message: waiting }, false),
        Some(why) => {
            let message = format!("{waiting}; rejected: {why}");
            (Said { status: false, reason: "Rejected".into(), message }, false)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_how_many_have_it_and_which_have_not() {
        let found = |current, waiting: &[&str]| Programmed {
            current,
            waiting: waiting.len(),
            names: waiting.iter().take(3).map(|w| (*w).to_owned()).collect(),
            rejected: None,
        };
        let (all, settled) = say(&found(3, &[]), &[]);
        assert_eq!(
            (all.status, all.message.as_str(), settled),
            (true, "acknowledged by 3 of 3 proxies", true)
        );
        let mut both = found(1, &["a", "b"]);
        both.join(&found(0, &["c", "d"]));
        let (some, settled) = say(&both, &[]);
        assert_eq!(some.message, "acknowledged by 1 of 5 proxies; waiting for a, b, c, …");
        assert!(!some.status && !settled);
        let refused = Programmed { rejected: Some("bad ip".into()), ..found(1, &["a"]) };
        assert_eq!(say(&refused, &[]).0.reason, "Rejected");
        assert_eq!(say(&found(0, &[]), &[]).0.reason, "NoProxies");
        let (unknown, settled) = say(&found(3, &[]), &["istiod-b".to_owned()]);
        assert_eq!(
            (unknown.reason.as_str(), settled),
            ("Pending", false),
            "another replica has not answered"
        );
    }
}
