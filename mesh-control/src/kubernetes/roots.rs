//! The trusted roots, handed to every namespace: ConfigMap `istio-ca-root-cert`, key `root-cert.pem`, label
//! `istio.io/config: "true"`. Pods mount it to know the control plane. The leader keeps it right: a missing, changed or
//! deleted one is written again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::Client;
use kube::api::{Api, Patch, PatchParams, ResourceExt};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::sleep;
use tokio_stream::StreamExt;
use tracing::{debug, info, warn};

use super::MANAGER;
use crate::ca::store::CaStore;
use crate::model::Objects;
use crate::source::State;
use crate::source::kube::Pauses;

const NAME: &str = "istio-ca-root-cert";
const KEY: &str = "root-cert.pem";
const LABEL: &str = "istio.io/config";
/// Namespaces whose pods never need it.
const WITHOUT: &[&str] = &["kube-public", "kube-node-lease"];
/// Pause between two writes.
const SPACING: Duration = Duration::from_millis(20);
/// Namespaces and the CA are looked at this often, besides when something changed.
const PERIOD: Duration = Duration::from_secs(5);
/// A namespace that could not be written is tried again after this.
const RETRY: Duration = Duration::from_secs(2);

/// What the ConfigMaps of all namespaces hold: whether label and roots are there, and the roots.
type Present = BTreeMap<String, Option<String>>;

/// Keeps the ConfigMaps right while `leads`.
pub async fn distribute(
    client: Client,
    store: Arc<CaStore>,
    mut states: watch::Receiver<Arc<State>>,
    mut leads: watch::Receiver<bool>,
) {
    while leads.wait_for(|l| *l).await.is_ok() {
        tokio::select! {
            () = lead(&client, &store, &mut states) => return,
            _ = leads.wait_for(|l| !*l) => {}
        }
    }
}

async fn lead(client: &Client, store: &CaStore, states: &mut watch::Receiver<Arc<State>>) {
    let config = watcher::Config::default().fields(&format!("metadata.name={NAME}"));
    let events = watcher(Api::<ConfigMap>::all(client.clone()), config).backoff(Pauses::default());
    let mut events = std::pin::pin!(events);
    let mut present = Present::new();
    let mut listing = None;
    loop {
        let mut pause = PERIOD;
        if listing.is_none() && states.borrow().synced {
            let objects = states.borrow_and_update().objects.clone();
            let authority = store.authority();
            for namespace in missing(&objects, &present, authority.roots()) {
                match write(client, &namespace, authority.roots()).await {
                    Ok(()) => {
                        debug!(namespace, "roots written");
                        // The watch tells it as well; until then it is not written again.
                        present.insert(namespace, Some(authority.roots().to_owned()));
                    }
                    Err(error) => {
                        warn!(namespace, %error, "the roots cannot be written to this namespace");
                        pause = RETRY;
                    }
                }
                sleep(SPACING).await;
            }
        }
        tokio::select! {
            event = events.next() => match event {
                Some(Ok(event)) => take(event, &mut present, &mut listing),
                Some(Err(error)) => info!(%error, "watch of root ConfigMaps"),
                None => return,
            },
            changed = states.changed() => if changed.is_err() { return },
            () = sleep(pause) => {}
        }
    }
}

/// Follows the watch; a listing replaces everything at once when it is complete.
fn take(event: Event<ConfigMap>, present: &mut Present, listing: &mut Option<Present>) {
    let held = |map: &ConfigMap| {
        let right = map.labels().get(LABEL).is_some_and(|v| v == "true");
        map.data.as_ref().and_then(|d| d.get(KEY)).filter(|_| right).cloned()
    };
    match event {
        Event::Init => *listing = Some(Present::new()),
        Event::InitApply(map) => {
            let entry = (map.namespace().unwrap_or_default(), held(&map));
            listing.get_or_insert_default().extend([entry]);
        }
        Event::InitDone => *present = listing.take().unwrap_or_default(),
        Event::Apply(map) => drop(present.insert(map.namespace().unwrap_or_default(), held(&map))),
        Event::Delete(map) => drop(present.remove(&map.namespace().unwrap_or_default())),
    }
}

/// Namespaces whose ConfigMap is not there or not right.
fn missing(objects: &Objects, present: &Present, roots: &str) -> Vec<String> {
    let wanted = objects.namespaces.values().filter(|n| !n.meta.deleting).map(|n| &n.meta.name);
    wanted
        .filter(|name| !WITHOUT.contains(&name.as_str()))
        .filter(|name| !matches!(present.get(*name), Some(Some(held)) if held == roots))
        .cloned()
        .collect()
}

async fn write(client: &Client, namespace: &str, roots: &str) -> Result<(), kube::Error> {
    let map = json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": { "name": NAME, "labels": { LABEL: "true" } },
        "data": { KEY: roots },
    });
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    match api.patch(NAME, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&map)).await {
        Ok(_) => Ok(()),
        // The namespace is on its way out, or gone already.
        Err(kube::Error::Api(status))
            if status.code == 404 || status.code == 403 && is_ending(&status.message) =>
        {
            Ok(())
        }
        Err(error) => Err(error),
    }
}

fn is_ending(message: &str) -> bool {
    message.contains("because it is being terminated")
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMESPACES: &str = "
{apiVersion: v1, kind: Namespace, metadata: {name: shop}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: kube-system}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: kube-public}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: ending, deletionTimestamp: 2026-01-01T00:00:00Z}}
";

    fn map(namespace: &str, label: &str, roots: &str) -> ConfigMap {
        serde_json::from_value(json!({
            "metadata": {"name": NAME, "namespace": namespace, "labels": {LABEL: label}}, "data": {KEY: roots},
        }))
        .unwrap()
    }

    #[test]
    fn every_namespace_that_lives_gets_the_roots_and_a_changed_one_gets_them_again() {
        let objects = crate::testing::objects(NAMESPACES);
        let (mut present, mut listing) = (Present::new(), None);
        assert_eq!(missing(&objects, &present, "new"), ["kube-system", "shop"]);
        for event in [
            Event::Init,
            Event::InitApply(map("shop", "true", "new")),
            Event::InitApply(map("kube-system", "true", "old")),
        ] {
            take(event, &mut present, &mut listing);
        }
        assert!(present.is_empty(), "half a listing says nothing");
        take(Event::InitDone, &mut present, &mut listing);
        assert_eq!(missing(&objects, &present, "new"), ["kube-system"]);
        take(Event::Apply(map("kube-system", "true", "new")), &mut present, &mut listing);
        take(Event::Apply(map("shop", "false", "new")), &mut present, &mut listing);
        assert_eq!(missing(&objects, &present, "new"), ["shop"], "its label was taken away");
        take(Event::Delete(map("kube-system", "true", "new")), &mut present, &mut listing);
        assert_eq!(missing(&objects, &present, "new"), ["kube-system", "shop"]);
    }
}
