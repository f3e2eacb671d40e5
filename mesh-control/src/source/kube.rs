//! A cluster's API server, watched.
//!
//! One task per kind lists and watches, types and checks; what comes of it goes through one queue into the [`store`],
//! which holds what is in force. A change of one object touches that object only. Kinds that a cluster may lack (the
//! Gateway API's and Istio's) are watched while their definition is there ([`definitions`]). Of Secrets only those are
//! watched, each for itself, that a gateway names ([`secrets`]).
//!
//! Nothing is published until every kind has been listed once. After that nothing empties it: while the API server is
//! away, and while a watch that expired is listed anew, what is known stays.

mod definitions;
mod item;
pub mod observed;
mod secrets;
mod store;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tokio::sync::mpsc;
use tokio::sync::watch as channel;
use tokio::task::JoinSet;
use tokio::time::{Instant, interval_at, sleep_until};
use tracing::{info, warn};

use super::{Source, SourceError, State, report};
use crate::model::Kind;
use crate::model::read::{KindInfo, kinds};
pub(crate) use item::resource;
use observed::Observed;
use store::{Named, Store};
pub(crate) use watch::Pauses;

/// Changes that may wait between the watches and the store.
const QUEUE: usize = 1024;
/// Changes that are taken in before what came of them is published.
const BATCH: usize = 20_000;
/// Publishing takes at most one in so many parts of the time.
const SHARE: u32 = 10;
/// A connection to the API server is made within this.
const CONNECT: Duration = Duration::from_secs(5);
/// A watch is renewed this often, from where it was: a connection that died without a word is noticed by then.
const RENEW: u32 = 60;
/// An answer in which nothing comes for this long is given up.
const SILENCE: Duration = Duration::from_secs(75);
/// While the first reading is not complete, the log says this often what is missing.
const PATIENCE: Duration = Duration::from_secs(10);

/// The Kubernetes source.
#[derive(Clone)]
pub struct KubernetesSource {
    /// Connection to the API server.
    pub client: Client,
    /// Namespace of the mesh settings.
    pub root_namespace: String,
    /// What the API server holds of the objects that get a status.
    pub observed: Arc<Observed>,
}

impl std::fmt::Debug for KubernetesSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KubernetesSource")
            .field("root_namespace", &self.root_namespace)
            .finish_non_exhaustive()
    }
}

/// Connects to the cluster that this process runs in, or to the one that `KUBECONFIG` (or `~/.kube/config`) names.
///
/// # Errors
/// There is neither, the context is unknown, or its credentials cannot be used.
pub async fn connect(context: Option<&str>) -> Result<Client, SourceError> {
    let failed = |cause: &dyn std::error::Error| SourceError::NoCluster(cause.to_string());
    let mut config = match context {
        None => Config::infer().await.map_err(|e| failed(&e))?,
        Some(context) => {
            let options =
                KubeConfigOptions { context: Some(context.to_owned()), ..KubeConfigOptions::default() };
            let file = Kubeconfig::read().map_err(|e| failed(&e))?;
            Config::from_custom_kubeconfig(file, &options).await.map_err(|e| failed(&e))?
        }
    };
    config.connect_timeout = Some(CONNECT);
    config.read_timeout = Some(SILENCE);
    Client::try_from(config).map_err(|e| failed(&e))
}

/// Kinds that every cluster has.
fn is_built_in(info: &KindInfo) -> bool {
    matches!(info.group, "" | "discovery.k8s.io")
}

impl Source for KubernetesSource {
    async fn run(self, out: channel::Sender<Arc<State>>) -> Result<(), SourceError> {
        let (changes, mut inbox) = mpsc::channel(QUEUE);
        let mut tasks = JoinSet::new();
        let watched = |info: &KindInfo| is_built_in(info) && info.kind != Kind::Secret;
        for info in kinds().filter(watched) {
            tasks.spawn(watch::kind(self.clone(), info, info.versions[0].to_owned(), changes.clone()));
        }
        let named = channel::Sender::new(Named::new());
        tasks.spawn(secrets::follow(self.clone(), named.subscribe(), changes.clone()));
        tasks.spawn(definitions::follow(self.clone(), changes));
        let mut store = Store::new(kinds().map(|k| k.kind).filter(|kind| *kind != Kind::Secret));
        let mut reminder = interval_at(Instant::now() + PATIENCE, PATIENCE);
        let mut next = Instant::now();
        loop {
            let pending = store.is_dirty() && store.is_complete();
            tokio::select! {
                () = out.closed() => return Ok(()),
                _ = reminder.tick(), if !store.is_complete() => {
                    let missing = store.waiting();
                    warn!(missing = missing.join("; "), "the API server has not been read yet; nodes keep what they know");
                    wait_for(&out, missing);
                }
                Some(change) = inbox.recv() => {
                    store.take(change);
                    for _ in 0..BATCH {
                        let Ok(change) = inbox.try_recv() else { break };
                        store.take(change);
                    }
                    if !store.is_complete() && (store.is_troubled() || !out.borrow().waiting.is_empty()) {
                        wait_for(&out, store.waiting());
                    }
                    let now = store.named_secrets();
                    named.send_if_modified(|known| {
                        let changed = known != now;
                        if changed {
                            known.clone_from(now);
                        }
                        changed
                    });
                }
                () = sleep_until(next), if pending => {
                    let began = Instant::now();
                    let before = out.borrow().clone();
                    let state = store.state();
                    if !before.synced {
                        info!(objects = ?state.objects.counts(), "the API server has been read");
                    }
                    report(&before, &state);
                    drop(before);
                    out.send_replace(Arc::new(state));
                    next = Instant::now() + began.elapsed() * SHARE;
                }
            }
        }
    }
}

/// Says what the first reading waits for, until there was one.
fn wait_for(out: &channel::Sender<Arc<State>>, waiting: Vec<String>) {
    out.send_if_modified(|state| {
        let news = !state.synced && state.waiting != waiting;
        if news {
            *state = Arc::new(State { waiting, ..State::default() });
        }
        news
    });
}
