//! Secrets with the certificates of gateways. Each that a gateway names has a watch of its own, by its name: what is in any
//! other never leaves the API server.

use std::collections::BTreeMap;

use kube::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use tokio::sync::mpsc::Sender;
use tokio::sync::watch::Receiver;
use tokio::task::JoinHandle;
use tokio_stream::StreamExt;
use tracing::warn;

use super::item::{Item, resource};
use super::store::{Change, Named, Naming};
use super::watch::{Pauses, Trouble};
use super::{KubernetesSource, RENEW};
use crate::model::credential::SecretTypes;
use crate::model::read::read_stored;
use crate::model::{Key, Kind};

const NAME: &str = "Secret";

/// A watch that runs, for one naming of its Secret.
struct Running {
    naming: Naming,
    task: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Watches the Secrets that are `named` until the queue is gone.
pub(super) async fn follow(source: KubernetesSource, mut named: Receiver<Named>, out: Sender<Change>) {
    let mut running: BTreeMap<Key, Running> = BTreeMap::new();
    loop {
        let now = named.borrow_and_update().clone();
        running.retain(|key, watch| now.get(key) == Some(&watch.naming));
        for (key, naming) in now {
            let start = || tokio::spawn(secret(source.clone(), key.clone(), naming.types, out.clone()));
            running.entry(key.clone()).or_insert_with(|| Running { naming, task: start() });
        }
        tokio::select! {
            changed = named.changed() => if changed.is_err() { return },
            () = out.closed() => return,
        }
    }
}

/// Follows one Secret.
async fn secret(source: KubernetesSource, key: Key, types: SecretTypes, out: Sender<Change>) {
    let api: Api<Item> =
        Api::namespaced_with(source.client.clone(), &key.namespace, &resource("", "v1", NAME));
    let fields = match types {
        SecretTypes::Tls => format!("metadata.name={},type=kubernetes.io/tls", key.name),
        SecretTypes::Any => format!("metadata.name={}", key.name),
    };
    let config = watcher::Config::default().timeout(RENEW).fields(&fields);
    let mut events = std::pin::pin!(watcher(api, config).backoff(Pauses::default()));
    let (mut trouble, mut seen) = (Trouble::none(format!("{NAME} {key}")), false);
    while let Some(event) = events.next().await {
        let forbidden = event.as_ref().is_err_and(is_forbidden);
        if let Some(told) = (!forbidden).then(|| trouble.of(&event)).flatten()
            && out.send(told).await.is_err()
        {
            return;
        }
        let changes = match event {
            Ok(Event::Init) => {
                seen = false;
                continue;
            }
            Ok(Event::Apply(item) | Event::InitApply(item)) => {
                seen = true;
                let tree = item.named("v1", NAME);
                vec![Change::apply(Kind::Secret, key.clone(), read_stored(&tree, &source.root_namespace))]
            }
            Ok(Event::Delete(_)) => vec![Change::Delete(Kind::Secret, key.clone())],
            Ok(Event::InitDone) => {
                let gone = (!seen).then(|| Change::Delete(Kind::Secret, key.clone()));
                gone.into_iter().chain([Change::Looked(key.clone())]).collect()
            }
            Err(error) if forbidden => {
                warn!(secret = %key, %error, "may not be read; give get, list and watch of it to the control plane");
                vec![Change::Looked(key.clone())]
            }
            Err(_) => continue,
        };
        for change in changes {
            if out.send(change).await.is_err() {
                return;
            }
        }
    }
}

/// Whether waiting does not help: nothing else must wait for this Secret then.
fn is_forbidden(error: &watcher::Error) -> bool {
    matches!(
        error,
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) if status.code == 403
    )
}
