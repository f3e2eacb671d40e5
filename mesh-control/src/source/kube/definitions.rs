//! The kinds that a cluster may lack: each is watched while it is defined and served.

use std::collections::{BTreeMap, BTreeSet};

use kube::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use tokio::sync::mpsc::Sender;
use tokio::task::JoinHandle;
use tokio_stream::StreamExt;
use tracing::{info, warn};

use super::item::{Item, resource};
use super::store::Change;
use super::watch::{Pauses, Trouble};
use super::{KubernetesSource, RENEW, is_built_in, watch};
use crate::model::Kind;
use crate::model::read::{KindInfo, kinds};
use crate::tree::{Node, Value};

const NAME: &str = "CustomResourceDefinition";

/// The watch of one kind that is there.
struct Running {
    version: String,
    task: JoinHandle<()>,
}

struct Definitions {
    source: KubernetesSource,
    out: Sender<Change>,
    running: BTreeMap<Kind, Running>,
}

impl Drop for Definitions {
    fn drop(&mut self) {
        self.running.values().for_each(|r| r.task.abort());
    }
}

/// Follows definitions until the queue is gone.
pub(super) async fn follow(source: KubernetesSource, out: Sender<Change>) {
    let api: Api<Item> = Api::all_with(source.client.clone(), &resource("apiextensions.k8s.io", "v1", NAME));
    // A definition is large: a few at a time.
    let config = watcher::Config::default().timeout(RENEW).page_size(50);
    let mut events = std::pin::pin!(watcher(api, config).backoff(Pauses::default()));
    let mut definitions = Definitions { source, out, running: BTreeMap::new() };
    let mut trouble = Trouble::none(NAME.to_owned());
    let mut seen = BTreeSet::new();
    while let Some(event) = events.next().await {
        if let Some(told) = trouble.of(&event) {
            // The queue's end is noticed below.
            let _ = definitions.out.send(told).await;
        }
        match event {
            Ok(Event::Init) => seen.clear(),
            Ok(Event::Apply(item) | Event::InitApply(item)) => {
                if let Some((info, version)) = served(&item.tree) {
                    seen.insert(info.kind);
                    definitions.start(info, version).await;
                } else if let Some(info) = kind_of(&item.tree) {
                    definitions.stop(info).await;
                }
            }
            Ok(Event::Delete(item)) => {
                if let Some(info) = kind_of(&item.tree) {
                    definitions.stop(info).await;
                }
            }
            Ok(Event::InitDone) => {
                for info in kinds().filter(|k| !is_built_in(k) && !seen.contains(&k.kind)) {
                    definitions.stop(info).await;
                }
            }
            Err(_) => {}
        }
        if definitions.out.is_closed() {
            return;
        }
    }
}

impl Definitions {
    async fn start(&mut self, info: KindInfo, version: String) {
        match self.running.remove(&info.kind) {
            Some(running) if running.version == version => {
                self.running.insert(info.kind, running);
                return;
            }
            Some(running) => end(running).await,
            None => info!(kind = %info.kind, group = info.group, version, "the cluster has this kind"),
        }
        let task = tokio::spawn(watch::kind(self.source.clone(), info, version.clone(), self.out.clone()));
        self.running.insert(info.kind, Running { version, task });
    }

    async fn stop(&mut self, info: KindInfo) {
        if let Some(running) = self.running.remove(&info.kind) {
            warn!(kind = %info.kind, group = info.group, "the cluster has this kind no longer");
            end(running).await;
        }
        self.source.observed.of(info.kind, "").forget();
        // The queue's end is noticed by the caller.
        let _ = self.out.send(Change::Absent(info.kind)).await;
    }
}

/// Ends a watch; once this returns it sends nothing more.
async fn end(running: Running) {
    running.task.abort();
    // It ends by being aborted, which is what was wanted.
    let _ = running.task.await;
}

/// The kind that a definition defines, if it is read.
fn kind_of(definition: &Node) -> Option<KindInfo> {
    let spec = definition.get("spec")?;
    let (group, kind) = (spec.text("group")?, spec.get("names")?.text("kind")?);
    kinds().find(|k| !is_built_in(k) && k.group == group && k.kind.name() == kind)
}

/// The version to watch, once the API server serves one that is read.
fn served(definition: &Node) -> Option<(KindInfo, String)> {
    let info = kind_of(definition)?;
    let is_true = |node: &Node, key: &str| matches!(node.get(key).map(|n| &n.value), Some(Value::Bool(true)));
    let list = |node: Option<&Node>| match node.map(|n| &n.value) {
        Some(Value::List(items)) => items.clone(),
        _ => Vec::new(),
    };
    let established = list(definition.get("status").and_then(|s| s.get("conditions")))
        .iter()
        .any(|c| c.text("type") == Some("Established") && c.text("status") == Some("True"));
    let versions = list(definition.get("spec").and_then(|s| s.get("versions")));
    let version = info
        .versions
        .iter()
        .find(|wanted| versions.iter().any(|v| v.text("name") == Some(**wanted) && is_true(v, "served")))?;
    established.then(|| (info, (*version).to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::documents;

    fn definition(versions: &str, established: &str) -> Node {
        let text = format!(
            "spec:\n  group: gateway.networking.k8s.io\n  names: {{kind: GRPCRoute}}\n  versions: {versions}\n\
             status:\n  conditions: [{{type: Established, status: \"{established}\"}}]\n"
        );
        documents(&text).pop().unwrap().unwrap()
    }

    #[test]
    fn the_newest_served_version_that_is_read_is_watched_once_it_is_established() {
        let both = "[{name: v1alpha2, served: true}, {name: v1, served: true}]";
        assert_eq!(served(&definition(both, "True")).unwrap().1, "v1");
        assert!(served(&definition(both, "False")).is_none());
        let old = "[{name: v1alpha2, served: true}, {name: v1, served: false}]";
        assert_eq!(served(&definition(old, "True")).unwrap().1, "v1alpha2");
        assert!(served(&definition("[{name: v9, served: true}]", "True")).is_none());
        assert_eq!(kind_of(&definition(both, "False")).unwrap().kind, Kind::GRPCRoute);
    }
}
