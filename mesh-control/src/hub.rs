//! Where the parts meet: the newest objects and the newest snapshot, and the task that makes the second from
//! the first.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tracing::info;

use crate::ads::snapshot::Snapshot;
use crate::convert::{Mesh, convert};
use crate::enrol::Enrolments;
use crate::metrics::Metrics;
use crate::model::{Condition, Objects};
use crate::source::State;

/// What is in force, for everyone who asks.
#[derive(Debug, Default)]
pub struct Published {
    /// The source's state.
    pub source: Arc<State>,
    /// Settings in force.
    pub mesh: Mesh,
    /// Status conditions.
    pub conditions: Vec<Condition>,
}

impl Published {
    /// Objects in force.
    #[must_use]
    pub fn objects(&self) -> &Objects {
        &self.source.objects
    }
}

/// Readers never wait: both values are swapped whole.
#[derive(Debug)]
pub struct Hub {
    published: ArcSwap<Published>,
    snapshot: ArcSwap<Snapshot>,
    changes: watch::Sender<u64>,
}

/// Number on the change channel that says that no snapshot follows.
pub(crate) const CLOSED: u64 = u64::MAX;

/// How long changes are collected before they are pushed.
#[derive(Debug, Clone, Copy)]
pub struct Debounce {
    /// Push after this long without a change.
    pub quiet: Duration,
    /// Push after this long in any case.
    pub max: Duration,
}

impl Default for Debounce {
    fn default() -> Self {
        Self { quiet: Duration::from_millis(100), max: Duration::from_secs(10) }
    }
}

impl Hub {
    /// A hub that has nothing yet. `mesh` holds the defaults that the mesh settings override.
    #[must_use]
    pub fn new(mesh: Mesh) -> Self {
        Self {
            published: ArcSwap::from_pointee(Published { mesh, ..Published::default() }),
            snapshot: ArcSwap::from_pointee(Snapshot::default()),
            changes: watch::Sender::new(0),
        }
    }

    /// The newest snapshot.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// What the newest snapshot was made from.
    pub fn published(&self) -> Arc<Published> {
        self.published.load_full()
    }

    /// Wakes whenever there is a new snapshot.
    pub fn snapshots(&self) -> watch::Receiver<u64> {
        let mut receiver = self.changes.subscribe();
        receiver.mark_unchanged();
        receiver
    }

    /// Ends all streams: the process stops.
    pub fn close(&self) {
        self.changes.send_replace(CLOSED);
    }

    /// True once the source was read.
    pub fn ready(&self) -> bool {
        self.snapshot.load().number > 0
    }

    /// Converts and, when a resource changed, publishes a new snapshot.
    fn rebuild(&self, defaults: &Mesh, state: &Arc<State>, enrolments: &Enrolments, metrics: &Metrics) {
        let started = Instant::now();
        let mesh = defaults.with_settings(&state.objects);
        let resources = convert(&state.objects, &mesh, &enrolments.captured());
        let previous = self.snapshot.load_full();
        let snapshot = Snapshot::build(&resources, &previous);
        metrics.convergence.observe(started.elapsed().as_secs_f64());
        metrics.observe_source(state, &resources);
        let source = state.clone();
        self.published.store(Arc::new(Published { source, mesh, conditions: resources.conditions }));
        if previous.number > 0 && snapshot.same_content(&previous) {
            return;
        }
        let number = snapshot.number;
        self.snapshot.store(Arc::new(snapshot));
        self.changes.send_replace(number);
        info!(
            snapshot = number,
            addresses = resources.addresses.len(),
            policies = resources.authorizations.len(),
            took_ms = started.elapsed().as_millis() as u64,
            "published"
        );
    }

    /// Rebuilds whenever source or enrolment changed, debounced, until both are gone.
    pub async fn run(
        &self,
        mut source: watch::Receiver<Arc<State>>,
        enrolments: Arc<Enrolments>,
        debounce: Debounce,
        metrics: Arc<Metrics>,
    ) {
        let defaults = self.published.load().mesh.clone();
        let mut reports = enrolments.changes();
        loop {
            let trigger = tokio::select! {
                changed = source.changed() => if changed.is_ok() { "config" } else { return },
                changed = reports.changed() => if changed.is_ok() { "enrolment" } else { return },
            };
            metrics.triggers(trigger).inc();
            let started = Instant::now();
            // Nodes wait for the first snapshot; later ones collect changes.
            if self.ready() {
                let latest = started + debounce.max;
                loop {
                    let deadline = (Instant::now() + debounce.quiet).min(latest);
                    tokio::select! {
                        () = sleep_until(deadline) => break,
                        changed = source.changed() => if changed.is_err() { break },
                        changed = reports.changed() => if changed.is_err() { break },
                    }
                }
            }
            metrics.debounce.observe(started.elapsed().as_secs_f64());
            let state = source.borrow_and_update().clone();
            reports.mark_unchanged();
            if state.synced {
                self.rebuild(&defaults, &state, &enrolments, &metrics);
            }
        }
    }
}
