//! What there is to say about objects, in their status. The leader writes, by server-side apply, only what is not there
//! already and at most so many in a second.
//!
//! Somebody who keeps overwriting what we wrote gets it back once in a while, not at once: two controllers must not write
//! against each other in a loop.

mod progress;
pub(in crate::kubernetes) mod render;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use kube::Client;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tracing::{debug, warn};

use self::progress::Progress;
use super::MANAGER;
use crate::ads::Clients;
use crate::hub::{Hub, Published};
use crate::model::{Condition, Kind, ObjectRef};
use crate::relay::questions::Agents;
use crate::replicas::{self, Elsewhere};
use crate::source::kube::observed::{Observed, Stored};
use crate::source::kube::resource;

/// Pause between two writes: 50 in a second.
const SPACING: Duration = Duration::from_millis(20);
/// Pause between two looks at everything, so that a storm of changes is looked at once.
const QUIET: Duration = Duration::from_millis(200);
/// The very same is not written again to an object within this.
const AGAIN: Duration = Duration::from_secs(60);
/// A write that failed is tried again after this.
const RETRY: Duration = Duration::from_secs(5);

/// What the writer works with.
pub struct StatusWriter {
    /// Connection to the API server.
    pub client: Client,
    /// What there is to say.
    pub hub: Arc<Hub>,
    /// What is said already.
    pub observed: Arc<Observed>,
    /// Who has acknowledged what.
    pub clients: Arc<Clients>,
    /// Other replicas, whose proxies count as well.
    pub agents: Arc<Agents>,
}

impl std::fmt::Debug for StatusWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StatusWriter").finish_non_exhaustive()
    }
}

impl StatusWriter {
    /// Writes status while `leads`.
    pub async fn run(self, mut leads: watch::Receiver<bool>) {
        while leads.wait_for(|l| *l).await.is_ok() {
            tokio::select! {
                () = self.lead() => return,
                _ = leads.wait_for(|l| !*l) => {}
            }
        }
    }
}

/// What was written to an object last, and when.
#[derive(Debug)]
struct Written {
    uid: String,
    status: Value,
    at: Instant,
    failed: bool,
}

impl StatusWriter {
    async fn lead(&self) {
        let (mut conversions, mut stored) = (self.hub.conversions(), self.observed.changes());
        let mut written: HashMap<ObjectRef, Written> = HashMap::new();
        let mut progress = Progress::default();
        loop {
            conversions.mark_unchanged();
            stored.mark_unchanged();
            let published = self.hub.published();
            let mut again = AGAIN;
            if published.is_converted() {
                let all = self.observed.all();
                written.retain(|object, _| all.contains_key(object));
                let open = progress.look(&published, &all, Instant::now());
                let elsewhere = replicas::programmed(&self.agents, open).await;
                let (outdated, pause) = outdated(&published, &all, &mut progress, &self.clients, &elsewhere);
                again = again.min(pause);
                for (object, stored, status) in outdated {
                    let last = written.get(&object).filter(|w| w.uid == stored.uid);
                    if let Some(pause) = last.and_then(|w| rest(w, &status)) {
                        again = again.min(pause);
                        continue;
                    }
                    let failed = apply(&self.client, &object, &stored, &status).await.is_err();
                    let (uid, at) = (stored.uid.clone(), Instant::now());
                    written.insert(object, Written { uid, status, at, failed });
                    sleep(SPACING).await;
                }
            }
            tokio::select! {
                changed = conversions.changed() => if changed.is_err() { return },
                changed = stored.changed() => if changed.is_err() { return },
                () = sleep(again) => {}
            }
            sleep(QUIET).await;
        }
    }
}

/// How long to leave an object alone.
fn rest(written: &Written, status: &Value) -> Option<Duration> {
    let pause = match (written.failed, same_but_times(&written.status, status)) {
        (true, _) => RETRY,
        (false, true) => AGAIN,
        (false, false) => return None,
    };
    pause.checked_sub(written.at.elapsed()).filter(|p| !p.is_zero())
}

fn same_but_times(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len()
                && a.iter().all(|(key, value)| {
                    key == "lastTransitionTime"
                        || b.get(key).is_some_and(|other| same_but_times(value, other))
                })
        }
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same_but_times(a, b))
        }
        _ => a == b,
    }
}

/// An object, what is stored of it, and the status that it should have.
type Outdated = (ObjectRef, Arc<Stored>, Value);

/// Every object whose stored status is not what it should be, and when to look again.
fn outdated(
    published: &Published,
    all: &BTreeMap<ObjectRef, Arc<Stored>>,
    progress: &mut Progress,
    clients: &Clients,
    elsewhere: &Elsewhere,
) -> (Vec<Outdated>, Duration) {
    let now = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
    let problems: Vec<Condition> = published.source.problems.iter().filter_map(invalid).collect();
    let mut by_object: BTreeMap<&ObjectRef, Vec<&Condition>> = BTreeMap::new();
    for condition in published.conditions.iter().chain(&problems) {
        by_object.entry(&condition.object).or_default().push(condition);
    }
    let bad = |object: &ObjectRef| problems.iter().any(|p| p.object == *object);
    let mut out = Vec::new();
    let mut again = AGAIN;
    for (object, stored) in all {
        // What was said of an older version is not said of this one; the next conversion comes at once.
        let current = published.objects().meta(object).is_some_and(|m| m.generation == stored.generation);
        if !current && !bad(object) {
            continue;
        }
        let mut said = render::merge(by_object.get(object).into_iter().flatten().copied());
        // Of an object that is not in force there is nothing to be programmed.
        if !said.is_empty() && current && progress::has(object.kind) {
            match progress.of(object, clients, elsewhere, Instant::now()) {
                Ok(programmed) => drop(said.insert(render::PROGRAMMED.to_owned(), programmed)),
                // It is written once with what the proxies say.
                Err(pause) => {
                    again = again.min(pause);
                    continue;
                }
            }
            if !said[render::PROGRAMMED].status {
                again = again.min(progress::LOOK);
            }
        }
        // Of a version that cannot be read nobody knows which parents it has.
        let parents = published.attachments.parents.get(object).filter(|_| current && !bad(object));
        let parents = parents.map(Vec::as_slice);
        if let Some(status) = render::status(object, &said, parents, stored, &now) {
            out.push((object.clone(), Arc::clone(stored), status));
        }
    }
    (out, again)
}

/// An object that cannot be read says so itself.
fn invalid(problem: &crate::source::Problem) -> Option<Condition> {
    let object = problem.object.clone()?;
    let kind = if object.kind == Kind::AuthorizationPolicy { "ZtunnelAccepted" } else { "Accepted" };
    let message = format!("{}: {} ({})", problem.field, problem.message, problem.consequence);
    Some(Condition::new(object, kind, false, "Invalid", message))
}

async fn apply(
    client: &Client,
    object: &ObjectRef,
    stored: &Stored,
    status: &Value,
) -> Result<(), kube::Error> {
    let (group, version) = stored.api_version.split_once('/').unwrap_or(("", &stored.api_version));
    let resource = resource(group, version, &object.kind.name());
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), &object.key.namespace, &resource);
    let body = json!({
        "apiVersion": stored.api_version,
        "kind": resource.kind,
        "metadata": { "name": object.key.name, "namespace": object.key.namespace },
        "status": status,
    });
    let parameters = PatchParams::apply(MANAGER).force();
    match api.patch_status(&object.key.name, &parameters, &Patch::Apply(&body)).await {
        Ok(_) => {
            debug!(%object, "status written");
            Ok(())
        }
        // It is gone; the watch says so as well.
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(error) => {
            warn!(%object, %error, "the status cannot be written");
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Key;

    #[test]
    fn what_was_written_and_undone_by_somebody_waits_and_what_changed_does_not() {
        let status = |reason: &str, at: &str| json!({"conditions": [{"type": "A", "reason": reason, "lastTransitionTime": at}]});
        let written =
            |failed| Written { uid: "u".into(), status: status("x", "1"), at: Instant::now(), failed };
        assert!(rest(&written(false), &status("x", "2")).is_some_and(|p| p > AGAIN / 2));
        assert_eq!(rest(&written(false), &status("y", "1")), None);
        assert!(rest(&written(true), &status("y", "1")).is_some_and(|p| p <= RETRY));
    }

    #[test]
    fn nothing_is_said_of_a_version_that_was_not_converted_yet() {
        let text = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop, generation: 2}
spec: {rules: [{}]}
";
        let object = ObjectRef { kind: Kind::AuthorizationPolicy, key: Key::new("shop", "p") };
        let source = Arc::new(crate::testing::load(text));
        let conditions = crate::testing::resources(text).conditions;
        let published = Published { source, conditions, ..Published::default() };
        let stored = |generation| Stored {
            uid: String::new(),
            api_version: "security.istio.io/v1".into(),
            generation,
            status: Value::Null,
            parents: Value::Null,
        };
        let all = |generation| BTreeMap::from([(object.clone(), Arc::new(stored(generation)))]);
        let clients = Clients::default();
        let look = |generation| {
            let mut progress = Progress::patient(&object, generation);
            outdated(&published, &all(generation), &mut progress, &clients, &Elsewhere::default()).0
        };
        let now = look(2);
        assert_eq!(now.len(), 1);
        let kinds: Vec<&str> =
            now[0].2["conditions"].as_array().unwrap().iter().map(|c| c["type"].as_str().unwrap()).collect();
        assert_eq!(kinds, ["ZtunnelAccepted", render::PROGRAMMED]);
        assert!(look(3).is_empty());
    }
}
