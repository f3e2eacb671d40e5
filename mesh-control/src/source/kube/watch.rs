//! One kind's watch: lists, watches, types; never ends by itself.

use std::time::Duration;

use kube::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, Event, watcher};
use tokio::sync::mpsc::Sender;
use tokio_stream::StreamExt;
use tracing::{info, warn};

use super::item::{Item, resource_of};
use super::store::Change;
use super::{KubernetesSource, RENEW};
use crate::model::Kind;
use crate::model::read::{KindInfo, read_stored};

/// First pause after a failure; each further one is twice as long.
const FIRST: Duration = Duration::from_millis(500);
/// Longest pause: after an outage the mesh follows the API server again within this.
const LONGEST: Duration = Duration::from_secs(15);

/// Pauses between attempts, each up to half as long again so that a cluster's watches do not come back in step.
#[derive(Debug, Default)]
pub(crate) struct Pauses {
    failures: u32,
}

impl Iterator for Pauses {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let pause = FIRST.saturating_mul(1 << self.failures.min(10)).min(LONGEST);
        self.failures += 1;
        Some(pause.mul_f64(1.0 + fastrand::f64() / 2.0))
    }
}

impl Backoff for Pauses {
    fn reset(&mut self) {
        self.failures = 0;
    }
}

/// Says once that a watch fails, and once that it works again: in the log, and to the store.
#[derive(Debug)]
pub(super) struct Trouble {
    what: String,
    /// Why it fails, as far as that was said.
    why: Option<String>,
}

impl Trouble {
    /// None yet, with what is watched.
    pub(super) const fn none(what: String) -> Self {
        Self { what, why: None }
    }

    /// What there is to tell of an event.
    pub(super) fn of<T>(&mut self, event: &Result<Event<T>, watcher::Error>) -> Option<Change> {
        match event {
            Ok(Event::Apply(_) | Event::InitApply(_) | Event::InitDone) => self.works(),
            // A watch begins, before anything has been asked; or ends with something that was there.
            Ok(Event::Init | Event::Delete(_)) => None,
            Err(error) => self.failed(error),
        }
    }

    fn failed(&mut self, error: &watcher::Error) -> Option<Change> {
        let mut cause: &dyn std::error::Error = error;
        while let Some(deeper) = cause.source() {
            cause = deeper;
        }
        let why = cause.to_string();
        if self.why.is_none() {
            warn!(what = self.what, %error, %cause, "the API server cannot be watched; what is known stays in force");
        }
        let news = self.why.replace(why.clone()).is_none_or(|before| before != why);
        news.then(|| Change::Trouble(self.what.clone(), Some(why)))
    }

    fn works(&mut self) -> Option<Change> {
        self.why.take()?;
        info!(what = self.what, "the API server is watched again");
        Some(Change::Trouble(self.what.clone(), None))
    }
}

fn api(source: &KubernetesSource, info: &KindInfo, version: &str) -> (Api<Item>, watcher::Config) {
    let resource = resource_of(info, version);
    let config = watcher::Config::default().timeout(RENEW);
    if info.kind == Kind::ConfigMap {
        // Of all ConfigMaps only one is read.
        let api = Api::namespaced_with(source.client.clone(), &source.root_namespace, &resource);
        return (api, config.fields("metadata.name=istio"));
    }
    (Api::all_with(source.client.clone(), &resource), config)
}

/// Follows a kind until the queue is gone.
pub(super) async fn kind(source: KubernetesSource, info: KindInfo, version: String, out: Sender<Change>) {
    let (api, config) = api(&source, &info, &version);
    let api_version = resource_of(&info, &version).api_version;
    let name = info.kind.name();
    let mut trouble = Trouble::none(name.clone());
    let mut events = std::pin::pin!(watcher(api, config).backoff(Pauses::default()));
    let mut observed = source.observed.of(info.kind, &api_version);
    while let Some(event) = events.next().await {
        if let Some(told) = trouble.of(&event)
            && out.send(told).await.is_err()
        {
            return;
        }
        let change = match event {
            Ok(Event::Apply(item) | Event::InitApply(item)) => {
                let key = item.key();
                let tree = item.named(&api_version, &name);
                observed.saw(&key, &tree);
                Change::apply(info.kind, key, read_stored(&tree, &source.root_namespace))
            }
            Ok(Event::Delete(item)) => {
                observed.lost(&item.key());
                Change::Delete(info.kind, item.key())
            }
            Ok(Event::Init) => {
                observed.begin();
                Change::Begin(info.kind)
            }
            Ok(Event::InitDone) => {
                observed.end();
                Change::End(info.kind)
            }
            Err(_) => continue,
        };
        if out.send(change).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trouble_is_told_once_with_its_reason_and_once_when_it_is_over() {
        let refused = |message: &str| -> Result<Event<()>, watcher::Error> {
            let status = kube::core::Status::failure(message, "Forbidden").with_code(403);
            Err(watcher::Error::InitialListFailed(kube::Error::Api(status.boxed())))
        };
        let mut trouble = Trouble::none("Pod".to_owned());
        let mut told =
            |event: Result<Event<()>, watcher::Error>| trouble.of(&event).map(|c| format!("{c:?}"));
        assert_eq!(told(Ok(Event::Init)), None);
        let first = told(refused("pods is forbidden")).unwrap();
        assert!(first.contains("Pod") && first.contains("pods is forbidden"), "{first}");
        assert_eq!(told(refused("pods is forbidden")), None, "the same again");
        assert_eq!(told(Ok(Event::Init)), None, "another try is no success");
        assert!(told(refused("no route to host")).unwrap().contains("no route to host"));
        assert!(told(Ok(Event::InitDone)).unwrap().contains("None"));
        assert_eq!(told(Ok(Event::InitDone)), None);
    }

    #[test]
    fn pauses_grow_to_a_bound_and_start_over_after_a_success() {
        let mut pauses = Pauses::default();
        let many: Vec<Duration> = pauses.by_ref().take(50).collect();
        assert!(many[0] >= FIRST && many[0] <= FIRST * 3 / 2, "{many:?}");
        assert!(many[49] >= LONGEST && many[49] <= LONGEST * 3 / 2, "{many:?}");
        pauses.reset();
        assert!(pauses.next().unwrap() <= FIRST * 3 / 2);
    }
}
