//! The annotation `ambient.istio.io/redirection: enabled` of pods that are under capture, for others who look for it: the
//! node agent has no rights at the API server, so it is written here from what the agents report.
//!
//! Beside it stands a mark of ours, so that what we wrote is never taken for the word of another mesh's node agent. The
//! replica that an agent is connected to writes for its node, leader or not: no other knows what that agent says.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use kube::Client;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use tracing::{debug, warn};

use super::MANAGER;
use crate::convert::{MARK, REDIRECTION, pod_uid};
use crate::enrol::Enrolments;
use crate::hub::{Hub, Published};
use crate::model::{Key, Objects, Pod};
use crate::source::kube::resource;

/// Pause between two writes: 50 in a second.
const SPACING: Duration = Duration::from_millis(20);
/// Pause between two looks at everything.
const QUIET: Duration = Duration::from_millis(200);
/// What was written, or could not be, is not written again to a pod within this.
const AGAIN: Duration = Duration::from_secs(5);

/// What the writer works with.
pub struct Redirection {
    /// Connection to the API server.
    pub client: Client,
    /// Pods.
    pub hub: Arc<Hub>,
    /// What agents say.
    pub enrolments: Arc<Enrolments>,
}

impl std::fmt::Debug for Redirection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Redirection").finish_non_exhaustive()
    }
}

impl Redirection {
    /// Writes as long as the process runs.
    pub async fn run(self) {
        let (mut conversions, mut reports) = (self.hub.conversions(), self.enrolments.changes());
        let mut written: HashMap<Key, Instant> = HashMap::new();
        loop {
            conversions.mark_unchanged();
            reports.mark_unchanged();
            let changes = self.changes(&self.hub.published());
            written.retain(|_, at| at.elapsed() < AGAIN);
            for (key, on) in changes {
                let Entry::Vacant(entry) = written.entry(key) else { continue };
                self.write(entry.key(), on).await;
                entry.insert(Instant::now());
                sleep(SPACING).await;
            }
            tokio::select! {
                changed = conversions.changed() => if changed.is_err() { return },
                changed = reports.changed() => if changed.is_err() { return },
                () = sleep(AGAIN) => {}
            }
            sleep(QUIET).await;
        }
    }

    fn changes(&self, published: &Published) -> Vec<(Key, bool)> {
        if !published.source.synced {
            return Vec::new();
        }
        changes(published.objects(), &published.mesh.cluster_id, &self.enrolments.connected())
    }

    async fn write(&self, key: &Key, on: bool) {
        let pods: Api<DynamicObject> =
            Api::namespaced_with(self.client.clone(), &key.namespace, &resource("", "v1", "Pod"));
        let body = patch(key, on);
        match pods.patch_status(&key.name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&body)).await {
            Ok(_) => debug!(pod = %key, on, "annotation of a captured pod"),
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => warn!(pod = %key, %error, "the annotation of a captured pod cannot be written"),
        }
    }
}

/// Pods whose annotation has to be written (true) or taken away, of the nodes in `connected`: their captured uids.
fn changes(
    objects: &Objects,
    cluster: &str,
    connected: &BTreeMap<String, BTreeSet<String>>,
) -> Vec<(Key, bool)> {
    let of = |pod: &Pod| {
        let captured = connected.get(&pod.node)?;
        let wanted = captured.contains(&pod_uid(cluster, &pod.meta)) && !pod.terminal;
        let ours = pod.meta.annotation(MARK).is_some();
        let right = match wanted {
            true => ours && pod.meta.annotation(REDIRECTION) == Some("enabled"),
            // One that somebody else wrote is his.
            false => !ours,
        };
        (!right && !pod.meta.deleting).then(|| (pod.meta.key(), wanted))
    };
    objects.pods.values().filter_map(|pod| of(pod)).collect()
}

/// What is applied: annotations that are left out are taken away, those of others stay.
fn patch(key: &Key, on: bool) -> Value {
    let annotations = if on { json!({ REDIRECTION: "enabled", MARK: "enabled" }) } else { json!({}) };
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": key.name, "namespace": key.namespace, "annotations": annotations},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, annotations: &str) -> String {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, annotations: {{{annotations}}}}}\nspec: {{nodeName: n1, containers: []}}\nstatus: {{podIP: 10.0.0.1}}\n"
        )
    }

    #[test]
    fn pods_say_what_their_own_agent_says_and_nothing_is_written_twice() {
        let ours = "ambient.istio.io/redirection: enabled, undermesh.io/redirection: enabled";
        let theirs = "ambient.istio.io/redirection: enabled";
        let text = [
            pod("new", ""),
            pod("known", ours),
            pod("left", ours),
            pod("foreign", theirs),
            pod("outside", ""),
            pod("taken", theirs),
        ]
        .concat();
        let objects = crate::testing::objects(&text);
        let captured = ["new", "known", "taken"].map(|name| format!("Kubernetes//Pod/shop/{name}"));
        let connected = BTreeMap::from([("n1".to_owned(), BTreeSet::from(captured))]);
        let found = changes(&objects, "Kubernetes", &connected);
        let key = |name| Key::new("shop", name);
        assert_eq!(found, [(key("left"), false), (key("new"), true), (key("taken"), true)]);
        assert!(changes(&objects, "Kubernetes", &BTreeMap::new()).is_empty(), "nobody says anything");
    }
}
