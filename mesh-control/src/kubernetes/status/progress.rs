//! How many proxies have what an object says: counted from the snapshot that its version came into force with, and settled
//! for that version once every connected proxy has acknowledged it. A proxy that comes later gets everything at once, and
//! changes nothing that is written.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::render::Said;
use crate::ads::{Clients, Programmed};
use crate::model::{Kind, ObjectRef};
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
    /// Another look at all objects begins.
    pub(super) fn begin(&mut self, all: &BTreeMap<ObjectRef, Arc<Stored>>) {
        self.versions.retain(|object, _| all.contains_key(object));
        self.counted.clear();
    }

    /// What there is to say, or after which time there will be something.
    pub(super) fn of(
        &mut self,
        object: &ObjectRef,
        stored: &Stored,
        snapshot: u64,
        clients: &Clients,
        now: Instant,
    ) -> Result<Said, Duration> {
        let new = || Version::new(&stored.uid, stored.generation, snapshot, now);
        let version = self.versions.entry(object.clone()).or_insert_with(new);
        if (version.generation, &version.uid) != (stored.generation, &stored.uid) {
            *version = new();
        }
        if let Some(said) = &version.settled {
            return Ok(said.clone());
        }
        let counted =
            self.counted.entry(version.snapshot).or_insert_with(|| clients.programmed(version.snapshot));
        let (said, settled) = say(counted);
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
fn say(found: &Programmed) -> (Said, bool) {
    let connected = found.current + found.waiting.len();
    let so_far = format!("acknowledged by {} of {connected} proxies", found.current);
    if connected == 0 {
        let message = "no proxy is connected to the control plane that writes this".to_owned();
        return (Said { status: false, reason: "NoProxies".into(), message }, false);
    }
    if found.waiting.is_empty() {
        return (Said { status: true, reason: "Programmed".into(), message: so_far }, true);
    }
    let names: Vec<&str> = found.waiting.iter().take(3).map(String::as_str).collect();
    let more = if found.waiting.len() > names.len() { ", …" } else { "" };
    let waiting = format!("{so_far}; waiting for {}{more}", names.join(", "));
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
            waiting: waiting.iter().map(|w| (*w).to_owned()).collect(),
            rejected: None,
        };
        let (all, settled) = say(&found(3, &[]));
        assert_eq!(
            (all.status, all.message.as_str(), settled),
            (true, "acknowledged by 3 of 3 proxies", true)
        );
        let (some, settled) = say(&found(1, &["a", "b", "c", "d"]));
        assert_eq!(some.message, "acknowledged by 1 of 5 proxies; waiting for a, b, c, …");
        assert!(!some.status && !settled);
        let refused = Programmed { rejected: Some("bad ip".into()), ..found(1, &["a"]) };
        assert_eq!(say(&refused).0.reason, "Rejected");
        assert_eq!(say(&found(0, &[])).0.reason, "NoProxies");
    }
}
