//! Simulated nodes: clients of the configuration feed that count what they are sent, and keep none of it.

use crate::bed::wait;
use anyhow::{Context, Result};
use mesh_core::xds::channel::ControlPlane;
use mesh_core::xds::client::{self, NodeDescription, Status};
use mesh_core::xds::delta::Handler;
use mesh_core::xds::proto::security::Authorization;
use mesh_core::xds::proto::workload::Address;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// What one node was sent.
#[derive(Debug, Clone, Copy)]
struct Seen {
    resources: usize,
    synced: bool,
    at: Instant,
}

/// Counts resources; each response is acknowledged once it has been counted.
struct Counting(Arc<Mutex<Seen>>);

impl Counting {
    fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Handler for Counting {
    fn address(&mut self, _name: &str, _address: &Address) -> Result<(), String> {
        self.seen().resources += 1;
        Ok(())
    }

    fn remove_address(&mut self, _name: &str) {
        self.seen().resources += 1;
    }

    fn policy(&mut self, _name: &str, _policy: &Authorization) -> Result<(), String> {
        self.seen().resources += 1;
        Ok(())
    }

    fn remove_policy(&mut self, _name: &str) {
        self.seen().resources += 1;
    }

    fn commit(&mut self, synced: bool) {
        let mut seen = self.seen();
        seen.synced = synced;
        seen.at = Instant::now();
    }
}

/// Nodes that are connected until this is dropped.
pub(super) struct Nodes {
    _runtime: tokio::runtime::Runtime,
    seen: Vec<Arc<Mutex<Seen>>>,
    started: Instant,
}

impl Nodes {
    /// Connects `count` nodes, named `node-0` and on.
    ///
    /// # Errors
    /// No runtime.
    pub(super) fn start(feed: SocketAddr, count: usize) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.context("no runtime for the nodes")?;
        let started = Instant::now();
        let nothing = Seen { resources: 0, synced: false, at: started };
        let seen: Vec<_> = (0..count).map(|_| Arc::new(Mutex::new(nothing))).collect();
        for (number, seen) in seen.iter().enumerate() {
            let server = ControlPlane { address: format!("http://{feed}"), ..ControlPlane::default() };
            let node = NodeDescription {
                name: format!("agent-{number}"),
                namespace: "istio-system".to_owned(),
                node: format!("node-{number}"),
                ..NodeDescription::default()
            };
            let handler = Counting(Arc::clone(seen));
            runtime.spawn(async move {
                let status = watch::Sender::new(Status::default());
                client::run(&server, &node, handler, &status, None).await
            });
        }
        Ok(Self { _runtime: runtime, seen, started })
    }

    fn all(&self) -> Vec<Seen> {
        self.seen.iter().map(|seen| *seen.lock().unwrap_or_else(PoisonError::into_inner)).collect()
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.seen.len()
    }

    /// How many resources each node was sent so far.
    pub(super) fn received(&self) -> Vec<usize> {
        self.all().iter().map(|seen| seen.resources).collect()
    }

    /// Waits until each has a whole state, and says how long that took the last.
    ///
    /// # Errors
    /// One has none in time.
    pub(super) fn wait_synced(&self, deadline: Duration) -> Result<Duration> {
        let last = wait::until("nodes that have everything", deadline, || {
            let all = self.all();
            Ok(all.iter().all(|seen| seen.synced).then(|| all.iter().map(|seen| seen.at).max()).flatten())
        })?;
        Ok(last.duration_since(self.started))
    }

    /// Waits until each was sent more than `before`, and says when the last was.
    ///
    /// # Errors
    /// One was not in time.
    pub(super) fn wait_more(&self, before: &[usize], deadline: Duration) -> Result<Instant> {
        wait::until("the change on every node", deadline, || {
            let all = self.all();
            let done = all.iter().zip(before).all(|(seen, before)| seen.resources > *before);
            Ok(done.then(|| all.iter().map(|seen| seen.at).max()).flatten())
        })
    }
}
