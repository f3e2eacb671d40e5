//! How long a change takes until every proxy that is connected has acknowledged what came of it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Clients;
use crate::hub::{CLOSED, Hub};
use crate::metrics::Metrics;

/// How often it is looked, while a snapshot is under way.
const LOOK: Duration = Duration::from_millis(20);
/// A proxy that takes longer than this, or that rejects what it gets, is not waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// Snapshots that are under way.
#[derive(Debug, Default)]
struct Pending(VecDeque<(u64, Instant)>);

impl Pending {
    fn add(&mut self, snapshot: u64, changed_at: Instant) {
        self.0.push_back((snapshot, changed_at));
    }

    /// How long those took that everybody has now.
    fn arrived(&mut self, everybody_has: u64, now: Instant) -> Vec<Duration> {
        let mut took = Vec::new();
        while let Some((snapshot, changed_at)) = self.0.front() {
            if *snapshot > everybody_has {
                break;
            }
            took.push(now.duration_since(*changed_at));
            self.0.pop_front();
        }
        took
    }

    /// How many are given up.
    fn give_up(&mut self, now: Instant) -> u64 {
        let before = self.0.len();
        self.0.retain(|(_, changed_at)| now.duration_since(*changed_at) < PATIENCE);
        (before - self.0.len()) as u64
    }
}

/// Measures until the hub closes.
pub async fn measure(hub: Arc<Hub>, clients: Arc<Clients>, metrics: Arc<Metrics>) {
    let mut snapshots = hub.snapshots();
    let mut pending = Pending::default();
    loop {
        let waiting = !pending.0.is_empty();
        tokio::select! {
            changed = snapshots.changed() => {
                if changed.is_err() || *snapshots.borrow_and_update() == CLOSED {
                    return;
                }
                let snapshot = hub.snapshot();
                if let Some(changed_at) = snapshot.changed_at {
                    pending.add(snapshot.number, changed_at);
                }
            }
            () = tokio::time::sleep(LOOK), if waiting => {}
        }
        let (reached, behind) = clients.reached(hub.snapshot().number);
        metrics.behind.set(i64::try_from(behind).unwrap_or(i64::MAX));
        let Some(reached) = reached else {
            // Nobody is there to tell.
            pending.0.clear();
            continue;
        };
        let now = Instant::now();
        for took in pending.arrived(reached, now) {
            metrics.mesh_convergence.observe(took.as_secs_f64());
        }
        metrics.unfinished.inc_by(pending.give_up(now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_has_arrived_when_the_last_proxy_has_it_and_is_given_up_after_a_minute() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut pending = Pending::default();
        for (snapshot, ms) in [(4, 0), (5, 100), (7, 200)] {
            pending.add(snapshot, at(ms));
        }
        assert!(pending.arrived(3, at(300)).is_empty());
        let took = pending.arrived(6, at(300));
        assert_eq!(
            took,
            [300, 200].map(Duration::from_millis),
            "one that skipped a snapshot has it all the same"
        );
        assert_eq!((pending.give_up(at(60_199)), pending.give_up(at(60_200))), (0, 1));
    }
}
