//! How many proxies have what objects say, wherever they are connected: only one replica writes it, and it asks the others.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mesh_core::xds::proto::node::{ObjectProgress, ObjectVersion};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::Code;
use tracing::debug;

use crate::ads::{Clients, Programmed};
use crate::hub::Hub;
use crate::model::read::kinds;
use crate::model::{Key, ObjectRef};
use crate::relay::questions::Agents;

/// A replica that has not answered within this is silent.
const PATIENCE: Duration = Duration::from_secs(1);

/// The proxies that are connected to this replica.
#[derive(Debug)]
pub struct Proxies {
    hub: Arc<Hub>,
    clients: Arc<Clients>,
    /// The snapshot that each version was first seen with, of those that were asked about last.
    since: Mutex<HashMap<ObjectVersion, u64>>,
}

impl Proxies {
    /// Those of `clients`, which are told what `hub` has.
    #[must_use]
    pub fn new(hub: Arc<Hub>, clients: Arc<Clients>) -> Self {
        Self { hub, clients, since: Mutex::default() }
    }

    /// How many of them have each version. One that this replica has not read yet, or no longer has, nobody has.
    pub(super) fn have(&self, asked: &[ObjectVersion]) -> Vec<ObjectProgress> {
        let published = self.hub.published();
        let nobody = Programmed::nobody(&self.clients);
        let mut counted: HashMap<u64, Programmed> = HashMap::new();
        let mut since = self.since.lock().unwrap_or_else(PoisonError::into_inner);
        let known = std::mem::take(&mut *since);
        let mut count = |version: &ObjectVersion| {
            let object = object(version)?;
            let meta = published.objects().meta(&object).filter(|_| published.is_converted())?;
            if (meta.generation, &meta.uid) != (version.generation, &version.uid) {
                return None;
            }
            let snapshot = known.get(version).copied().unwrap_or(published.snapshot);
            since.insert(version.clone(), snapshot);
            Some(counted.entry(snapshot).or_insert_with(|| self.clients.programmed(snapshot)).clone())
        };
        asked.iter().map(|version| told(count(version).unwrap_or_else(|| nobody.clone()))).collect()
    }
}

fn object(version: &ObjectVersion) -> Option<ObjectRef> {
    let kind = kinds().map(|info| info.kind).find(|kind| kind.to_string() == version.kind)?;
    Some(ObjectRef { kind, key: Key::new(&version.namespace, &version.name) })
}

fn told(found: Programmed) -> ObjectProgress {
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    ObjectProgress {
        current: count(found.current),
        waiting: count(found.waiting),
        names: found.names,
        rejected: found.rejected.unwrap_or_default(),
    }
}

fn learnt(said: ObjectProgress) -> Programmed {
    Programmed {
        current: said.current as usize,
        waiting: said.waiting as usize,
        names: said.names,
        rejected: Some(said.rejected).filter(|why| !why.is_empty()),
    }
}

/// What the other replicas say of their proxies.
#[derive(Debug, Default)]
pub struct Elsewhere {
    /// Of all of them together, by object.
    pub said: HashMap<ObjectRef, Programmed>,
    /// Those that did not answer.
    pub silent: Vec<String>,
}

/// Asks every other replica how many of its proxies have versions of objects.
pub async fn programmed(agents: &Agents, versions: Vec<ObjectVersion>) -> Elsewhere {
    let mut out = Elsewhere::default();
    if versions.is_empty() {
        return out;
    }
    let mut asked = JoinSet::new();
    for (name, remote) in agents.replicas() {
        let versions = versions.clone();
        asked.spawn(async move { (name, timeout(PATIENCE, remote.progress(versions)).await) });
    }
    while let Some(Ok((name, answer))) = asked.join_next().await {
        match answer {
            Ok(Ok(said)) => {
                for (version, said) in versions.iter().zip(said) {
                    let Some(object) = object(version) else { continue };
                    out.said.entry(object).or_default().join(&learnt(said));
                }
            }
            // One of an earlier version cannot be asked this.
            Ok(Err(status)) if status.code() == Code::Unimplemented => {}
            Ok(Err(status)) => {
                debug!(replica = name, %status, "does not say what its proxies have");
                out.silent.push(name);
            }
            Err(_) => out.silent.push(name),
        }
    }
    out.silent.sort();
    out
}
