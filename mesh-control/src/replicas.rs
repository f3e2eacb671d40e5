//! Other replicas of the control plane. An agent is connected to one of them, but what it has captured matters to the proxies
//! of all: a replica that did not know would announce its pods as plain text. So each replica follows every other and
//! takes over what agents tell there, and a question to an agent goes through the replica that the agent is connected to.
//!
//! A replica that starts asks the others first. Where there is none, it waits for the agents of nodes that had captured pods
//! before it tells anybody anything.

mod client;
mod progress;
mod server;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use crate::convert::MARK;
use crate::enrol::Enrolments;
use crate::model::{EndpointSlice, Objects};
use crate::relay::Relay;
use crate::relay::questions::Agents;
use crate::source::State;

pub use client::Remote;
pub use progress::{Elsewhere, Proxies, programmed};
pub use server::ReplicaServer;

/// Where a cluster keeps the token that replicas show each other.
pub const TOKEN: &str = "/var/run/secrets/tokens/istio-token";
/// The Service of the control plane, and the name of its port for TLS.
const SERVICE: &str = "istiod";
const PORT: &str = "https-dns";
/// What a replica tells first, the reports of all nodes, and the versions that it is asked about, are within this.
pub const LARGEST_MESSAGE: usize = 64 << 20;
/// Other replicas answer within this, or they are not waited for.
const FIRST: Duration = Duration::from_secs(3);
/// Agents that have lost their control plane try it again within 5 s, and report at once when they reach it. They keep what
/// they were told meanwhile, so that a longer wait costs little.
const AGENTS: Duration = Duration::from_secs(10);

/// How replicas find and trust each other.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Name of this replica: of its pod.
    pub replica: String,
    /// Namespace of the control plane.
    pub namespace: String,
    /// Token for the others.
    pub token: PathBuf,
    /// Roots that their certificates chain to.
    pub roots: PathBuf,
}

/// What is taken over.
#[derive(Debug, Clone)]
pub struct Told {
    /// What nodes have captured.
    pub enrolments: Arc<Enrolments>,
    /// What they tell of connections.
    pub relay: Arc<Relay>,
    /// Who answers questions.
    pub agents: Arc<Agents>,
}

/// This replica's view of the others.
#[derive(Debug, Clone)]
pub struct Replicas {
    /// None: there are no others, or no token to show them.
    settings: Option<Settings>,
    told: Told,
}

impl Replicas {
    /// Without settings, this replica is alone.
    #[must_use]
    pub fn new(settings: Option<Settings>, told: Told) -> Self {
        let settings = settings.filter(|settings| {
            let there = settings.token.exists();
            if !there {
                let path = settings.token.display();
                info!("no token at {path}: this replica neither follows others nor asks through them");
            }
            there
        });
        Self { settings, told }
    }

    /// What agents have captured, as far as this replica knows.
    #[must_use]
    pub const fn enrolments(&self) -> &Arc<Enrolments> {
        &self.told.enrolments
    }

    /// Learns what others know, before anybody is told anything; bounded in time.
    pub async fn ask_first(&self, objects: &Objects) {
        let Some(settings) = &self.settings else { return };
        let mut asked = JoinSet::new();
        for (name, address) in others(objects, settings, true) {
            let client = client::Client::new(settings, &name, address, self.told.clone());
            asked.spawn(async move {
                match timeout(FIRST, client.first()).await {
                    Ok(Ok(reports)) => info!(replica = name, reports, "took over what another replica knows"),
                    Ok(Err(error)) => warn!(replica = name, %error, "another replica does not tell"),
                    Err(_) => warn!(replica = name, "another replica does not answer"),
                }
            });
        }
        while asked.join_next().await.is_some() {}
    }

    /// Waits for the reports of nodes that had captured pods when they were last heard of; bounded in time. Their proxies
    /// keep what they were told before.
    pub async fn agents_first(&self, objects: &Objects) {
        let mut changes = self.told.enrolments.changes();
        let waited = timeout(AGENTS, async {
            while !silent(objects, &self.told.enrolments).is_empty() {
                if changes.changed().await.is_err() {
                    return;
                }
            }
        });
        if waited.await.is_err() {
            let nodes = Vec::from_iter(silent(objects, &self.told.enrolments)).join(", ");
            warn!(
                nodes,
                "agents do not say what they have captured: their pods are announced as plain text until they do"
            );
        }
    }

    /// Follows the others for as long as the source lives.
    pub async fn follow(self, mut states: watch::Receiver<Arc<State>>) {
        let Some(settings) = &self.settings else { return };
        let mut followed: BTreeMap<(String, SocketAddr), Followed> = BTreeMap::new();
        loop {
            let objects = Arc::clone(&states.borrow_and_update().objects);
            let wanted = others(&objects, settings, false);
            followed.retain(|(name, address), _| wanted.get(name) == Some(address));
            for (name, address) in wanted {
                followed.entry((name.clone(), address)).or_insert_with(|| {
                    let client = client::Client::new(settings, &name, address, self.told.clone());
                    Followed { name, agents: self.told.agents.clone(), task: tokio::spawn(client.run()) }
                });
            }
            // Pods change all the time; replicas do not.
            sleep(Duration::from_millis(100)).await;
            if states.changed().await.is_err() {
                return;
            }
        }
    }
}

/// A replica that is followed while this lives.
struct Followed {
    name: String,
    agents: Arc<Agents>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.task.abort();
        self.agents.forget(&self.name);
    }
}

/// Name and address of the other replicas, by the endpoints of the control plane's Service.
fn others(objects: &Objects, settings: &Settings, only_ready: bool) -> BTreeMap<String, SocketAddr> {
    let mut found = BTreeMap::new();
    let of_service = |slice: &&Arc<EndpointSlice>| {
        slice.meta.namespace == settings.namespace && slice.service() == Some(SERVICE)
    };
    for slice in objects.endpoint_slices.values().filter(of_service) {
        let Some(port) = slice.ports.iter().find(|port| port.name == PORT) else { continue };
        for endpoint in slice.endpoints.iter().filter(|endpoint| endpoint.ready || !only_ready) {
            let (Some(pod), Some(ip)) = (&endpoint.pod, endpoint.addresses.first()) else { continue };
            if *pod != settings.replica {
                // One of two families is enough.
                found.entry(pod.clone()).or_insert(SocketAddr::new(*ip, port.port));
            }
        }
    }
    found
}

/// Nodes with pods that carry our mark, whose agents have not said anything yet.
fn silent(objects: &Objects, enrolments: &Enrolments) -> BTreeSet<String> {
    let marked = objects.pods.values().filter(|pod| pod.meta.annotation(MARK).is_some() && !pod.terminal);
    let reported = enrolments.captured();
    marked.filter(|pod| !reported.contains_key(&pod.node)).map(|pod| pod.node.clone()).collect()
}

#[cfg(test)]
mod tests;
