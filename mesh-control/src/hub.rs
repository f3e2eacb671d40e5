//! Where the parts meet: the newest objects and the newest snapshot, and the task that makes the second from
//! the first.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tracing::info;

use crate::ads::snapshot::Snapshot;
use crate::convert::{Assignments, Attachments, Converter, Mesh};
use crate::enrol::Enrolments;
use crate::metrics::Metrics;
use crate::model::{Condition, Objects};
use crate::replicas::Replicas;
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
    /// What there is to say of listeners of gateways and of parents of routes.
    pub attachments: Attachments,
    /// Number of the snapshot that clients hold once they have this.
    pub snapshot: u64,
}

impl Published {
    /// Objects in force.
    #[must_use]
    pub fn objects(&self) -> &Objects {
        &self.source.objects
    }

    /// Whether there is something to say about the objects. Before that, only what they are is known.
    #[must_use]
    pub const fn is_converted(&self) -> bool {
        self.snapshot > 0
    }
}

/// Readers never wait: both values are swapped whole.
#[derive(Debug)]
pub struct Hub {
    published: ArcSwap<Published>,
    snapshot: ArcSwap<Snapshot>,
    changes: watch::Sender<u64>,
    assignments: watch::Sender<Arc<Assignments>>,
    conversions: watch::Sender<u64>,
    /// Whether there is what it takes to serve, or all that is missing is what clients have to say.
    reachable: AtomicBool,
}

/// Number on the change channel that says that no snapshot follows.
pub(crate) const CLOSED: u64 = u64::MAX;

/// How long changes are collected before they are pushed. They are not while pushing costs little: a pod that joins must
/// not wait for others that do not come.
#[derive(Debug, Clone, Copy)]
pub struct Debounce {
    /// Push after this long without a change.
    pub quiet: Duration,
    /// Push after this long in any case.
    pub max: Duration,
}

/// Changes are pushed at once while the pushes of the last so many quiet times took less than one together: a tenth of
/// the time at most.
const SHARE: u32 = 10;

impl Default for Debounce {
    fn default() -> Self {
        Self { quiet: Duration::from_millis(100), max: Duration::from_secs(1) }
    }
}

/// What the latest pushes cost, so that a storm of changes is collected while a single one is not.
#[derive(Debug, Default)]
struct Pace(VecDeque<(Instant, Duration)>);

impl Pace {
    /// Whether a change of this moment is pushed at once.
    fn at_once(&mut self, now: Instant, debounce: Debounce) -> bool {
        let past = debounce.quiet * SHARE;
        while self.0.front().is_some_and(|(at, _)| now.duration_since(*at) >= past) {
            self.0.pop_front();
        }
        self.0.iter().map(|(_, took)| *took).sum::<Duration>() < debounce.quiet
    }

    fn pushed(&mut self, at: Instant, took: Duration) {
        self.0.push_back((at, took));
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
            assignments: watch::Sender::new(Arc::default()),
            conversions: watch::Sender::new(0),
            reachable: AtomicBool::new(false),
        }
    }

    /// What each node is told of its own pods; wakes when that changed for any.
    pub fn assignments(&self) -> watch::Receiver<Arc<Assignments>> {
        self.assignments.subscribe()
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

    /// Wakes whenever objects were converted, whether a resource changed or only what there is to say about them.
    pub fn conversions(&self) -> watch::Receiver<u64> {
        self.conversions.subscribe()
    }

    /// Ends all streams: the process stops.
    pub fn close(&self) {
        self.changes.send_replace(CLOSED);
    }

    /// True once clients may come: the source was read. What they are told may have to wait for what others of them say.
    pub fn reachable(&self) -> bool {
        self.reachable.load(Ordering::Acquire)
    }

    /// True once there is something to tell clients.
    pub fn ready(&self) -> bool {
        self.snapshot.load().number > 0
    }

    /// Converts and, when a resource changed, publishes a new snapshot.
    fn rebuild(
        &self,
        converter: &mut Converter,
        defaults: &Mesh,
        state: &Arc<State>,
        enrolments: &Enrolments,
        metrics: &Metrics,
        changed_at: Instant,
    ) {
        let started = Instant::now();
        let mesh = defaults.with_settings(&state.objects);
        let resources = converter.convert(&state.objects, &mesh, &enrolments.captured());
        let previous = self.snapshot.load_full();
        let mut snapshot = Snapshot::build(&resources, &previous);
        snapshot.changed_at = Some(changed_at.into_std());
        metrics.conversion.observe(started.elapsed().as_secs_f64());
        metrics.observe_source(state, &resources);
        metrics.observe_snapshot(&snapshot);
        let same = previous.number > 0 && snapshot.same_content(&previous);
        let number = if same { previous.number } else { snapshot.number };
        let source = state.clone();
        let assignments = Arc::new(resources.assignments);
        let (conditions, attachments) = (resources.conditions, resources.attachments);
        let published = Published { source, mesh, conditions, attachments, snapshot: number };
        self.published.store(Arc::new(published));
        // Afterwards: a node that is told of a pod asks for its certificate at once.
        self.assignments.send_if_modified(|known| {
            let changed = *known != assignments;
            *known = assignments;
            changed
        });
        if !same {
            self.snapshot.store(Arc::new(snapshot));
            self.changes.send_replace(number);
        }
        self.conversions.send_modify(|n| *n += 1);
        if same {
            return;
        }
        info!(
            snapshot = number,
            addresses = resources.addresses.len(),
            policies = resources.authorizations.len(),
            routes = resources.l7.routes.len(),
            destinations = resources.l7.destinations.len(),
            took_ms = started.elapsed().as_millis() as u64,
            "published"
        );
    }

    /// Before the first snapshot: what other replicas know, and then what agents say.
    async fn prepare(&self, defaults: &Mesh, source: &watch::Receiver<Arc<State>>, replicas: &Replicas) {
        let state = || Arc::clone(&source.borrow());
        replicas.ask_first(&state().objects).await;
        // Who agents are, and which certificates they may have, is decided by the objects.
        let source = state();
        let mesh = defaults.with_settings(&source.objects);
        self.published.store(Arc::new(Published { source, mesh, ..Published::default() }));
        // Agents find only those that are ready.
        self.reachable.store(true, Ordering::Release);
        replicas.agents_first(&state().objects).await;
    }

    /// Rebuilds whenever source or enrolment changed, at once while that costs little, else debounced, until both are
    /// gone.
    pub async fn run(
        &self,
        mut source: watch::Receiver<Arc<State>>,
        replicas: Replicas,
        debounce: Debounce,
        metrics: Arc<Metrics>,
    ) {
        let enrolments = replicas.enrolments();
        let defaults = self.published.load().mesh.clone();
        let mut reports = enrolments.changes();
        let mut pace = Pace::default();
        let mut converter = Converter::default();
        loop {
            let trigger = tokio::select! {
                changed = source.changed() => if changed.is_ok() { "config" } else { return },
                changed = reports.changed() => if changed.is_ok() { "enrolment" } else { return },
            };
            metrics.triggers(trigger).inc();
            let started = Instant::now();
            // Nodes wait for the first snapshot; later ones collect changes.
            if self.ready() && !pace.at_once(started, debounce) {
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
            if !self.reachable() && source.borrow().synced {
                self.prepare(&defaults, &source, &replicas).await;
            }
            let state = source.borrow_and_update().clone();
            reports.mark_unchanged();
            if state.synced {
                let began = Instant::now();
                self.rebuild(&mut converter, &defaults, &state, enrolments, &metrics, started);
                pace.pushed(began, began.elapsed());
            } else {
                // Nobody is told anything yet; who asks whether we are ready hears why not.
                let mesh = defaults.clone();
                self.published.store(Arc::new(Published { source: state, mesh, ..Published::default() }));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_pushed_at_once_until_that_takes_a_tenth_of_the_time() {
        let debounce = Debounce { quiet: Duration::from_millis(100), max: Duration::from_secs(1) };
        let start = Instant::now();
        let mut pace = Pace::default();
        let mut push = |ms: u64, took: u64| {
            let at = start + Duration::from_millis(ms);
            let at_once = pace.at_once(at, debounce);
            pace.pushed(at, Duration::from_millis(took));
            at_once
        };
        let quick: Vec<bool> = (0..20).map(|i| push(i * 50, 2)).collect();
        assert!(quick.iter().all(|at_once| *at_once), "a small mesh");
        assert!(push(1000, 90), "one large push");
        assert_eq!([push(1050, 90), push(1150, 90)], [false; 2], "a storm in a large mesh");
        assert!(push(2200, 90), "that is over");
    }
}
