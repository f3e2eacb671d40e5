//! The last events, and who waits for the next. Written by the threads that tell, read by the control runtime; no data
//! worker comes near.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh_core::flows::{Filter, Flow, Mark, Verdict};
use tokio::sync::Notify;

use super::told::{Names, Told};

/// Events that one answer holds at most.
pub const MOST_IN_ANSWER: usize = 10_000;

#[derive(Default)]
struct Ring {
    entries: VecDeque<Told>,
    /// Number of the newest event; the first has number 1.
    newest: u64,
}

/// Events that are sent on.
#[derive(Debug, Default)]
pub struct Taken {
    /// The events with their numbers.
    pub events: Vec<(u64, Told)>,
    /// Those that are not among them: forgotten before, or more than was asked for.
    pub held_back: u64,
    /// Where to go on.
    pub next: u64,
}

/// See the module.
pub struct Flows {
    ring: Mutex<Ring>,
    grown: Notify,
    kept: usize,
    node: String,
}

impl std::fmt::Debug for Flows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Flows").field("kept", &self.kept).finish_non_exhaustive()
    }
}

impl Flows {
    /// Keeps the last `kept` events of a node.
    #[must_use]
    pub fn new(node: &str, kept: usize) -> Arc<Self> {
        Arc::new(Self {
            ring: Mutex::default(),
            grown: Notify::new(),
            kept: kept.max(1),
            node: node.to_owned(),
        })
    }

    /// A panic elsewhere while it was locked leaves it usable: nothing changes it halfway.
    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds events; the oldest go.
    pub fn push(&self, events: impl IntoIterator<Item = Told>) {
        {
            let mut ring = self.ring();
            for event in events {
                if ring.entries.len() == self.kept {
                    ring.entries.pop_front();
                }
                ring.entries.push_back(event);
                ring.newest += 1;
            }
        }
        self.grown.notify_waiters();
    }

    /// Number of the newest event.
    #[must_use]
    pub fn newest(&self) -> u64 {
        self.ring().newest
    }

    /// Resolves when there are events after one. An event that comes between a look and the wait is not missed.
    pub async fn after(&self, seq: u64) {
        loop {
            let grown = self.grown.notified();
            if self.newest() > seq {
                return;
            }
            grown.await;
        }
    }

    /// The events after one that a filter wants, oldest first, and where to go on.
    #[must_use]
    pub fn read(&self, since: u64, filter: &Filter, names: &dyn Names) -> (Vec<Flow>, Mark) {
        let (events, from, forgotten, newest) = {
            let ring = self.ring();
            // Of another agent, which had told more than this one has.
            let since = if since > ring.newest { 0 } else { since };
            let first = ring.newest + 1 - ring.entries.len() as u64;
            let skip = usize::try_from((since + 1).saturating_sub(first)).unwrap_or(usize::MAX);
            // Copied, so that who tells need not wait for the texts to be written.
            let events: Vec<_> = ring.entries.iter().skip(skip).cloned().collect();
            (events, (since + 1).max(first), first.saturating_sub(since + 1), ring.newest)
        };
        let mut mark = Mark { next: newest, forgotten, ..Mark::default() };
        let mut wanted = Vec::new();
        for (seq, event) in (from..).zip(&events) {
            let flow = event.flow(seq, &self.node, names);
            if filter.wants(&flow) {
                wanted.push(flow);
                if wanted.len() == MOST_IN_ANSWER {
                    mark.next = seq;
                    break;
                }
            }
        }
        (wanted, mark)
    }

    /// The events after one that are sent on, `most` at most, oldest first. Where there are more, those that tell of
    /// trouble go first, then the newest.
    #[must_use]
    pub fn take(&self, since: u64, most: usize) -> Taken {
        let ring = self.ring();
        let since = if since > ring.newest { 0 } else { since };
        let first = ring.newest + 1 - ring.entries.len() as u64;
        let forgotten = first.saturating_sub(since + 1);
        let from = (since + 1).max(first);
        let skip = usize::try_from(from - first).unwrap_or(usize::MAX);
        let new = || (from..).zip(ring.entries.iter().skip(skip));
        let found = ring.entries.len().saturating_sub(skip);
        let is_trouble = |event: &Told| event.verdict != Verdict::Forwarded;
        let chosen: Vec<(u64, &Told)> = if found <= most {
            new().collect()
        } else {
            let trouble = new().filter(|(_, event)| is_trouble(event)).count().min(most);
            let (mut bad, mut good) = (trouble, most - trouble);
            let newest_first = (0_u64..).zip(ring.entries.iter().rev().take(found));
            let mut chosen: Vec<_> = newest_first
                .map(|(back, event)| (ring.newest - back, event))
                .filter(|(_, event)| {
                    let room = if is_trouble(event) { &mut bad } else { &mut good };
                    let fits = *room > 0;
                    *room -= usize::from(fits);
                    fits
                })
                .collect();
            chosen.reverse();
            chosen
        };
        Taken {
            held_back: forgotten + (found - chosen.len()) as u64,
            events: chosen.into_iter().map(|(seq, event)| (seq, event.clone())).collect(),
            next: ring.newest,
        }
    }

    /// Name of the node.
    #[must_use]
    pub fn node(&self) -> &str {
        &self.node
    }

    /// The newest events that a filter wants, oldest first, and where to go on.
    #[must_use]
    pub fn last(&self, count: usize, filter: &Filter, names: &dyn Names) -> (Vec<Flow>, Mark) {
        let (mut flows, mark) = (Vec::new(), Mark { next: self.newest(), ..Mark::default() });
        let events: Vec<Told> = self.ring().entries.iter().cloned().collect();
        for (back, event) in (0_u64..).zip(events.iter().rev()) {
            let flow = event.flow(mark.next - back, &self.node, names);
            if flows.len() == count.min(MOST_IN_ANSWER) {
                break;
            }
            if filter.wants(&flow) {
                flows.push(flow);
            }
        }
        flows.reverse();
        (flows, mark)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_core::flows::Kind;
    use std::time::Duration;

    struct Nobody;
    impl Names for Nobody {
        fn drop_reason(&self, reason: u32) -> String {
            reason.to_string()
        }
        fn reset_reason(&self, _: u32) -> Option<String> {
            None
        }
        fn container(&self, _: u64) -> String {
            String::new()
        }
    }

    fn event(verdict: Verdict) -> Told {
        Told { kind: Kind::Closed, verdict, ..Told::default() }
    }

    fn numbers(flows: &[Flow]) -> Vec<u64> {
        flows.iter().map(|flow| flow.seq).collect()
    }

    #[test]
    fn a_reader_gets_each_event_once_and_hears_how_many_it_missed() {
        let flows = Flows::new("a", 3);
        let all = Filter::default();
        assert_eq!(flows.read(0, &all, &Nobody), (vec![], Mark::default()));
        flows.push([event(Verdict::Forwarded), event(Verdict::Failed)]);
        let (seen, mark) = flows.read(0, &all, &Nobody);
        assert_eq!((numbers(&seen), mark), (vec![1, 2], Mark { next: 2, ..Mark::default() }));
        assert_eq!(seen[0].node, "a");
        assert_eq!(flows.read(2, &all, &Nobody), (vec![], mark));
        flows.push((0..4).map(|_| event(Verdict::Forwarded)));
        let (seen, mark) = flows.read(2, &all, &Nobody);
        assert_eq!(numbers(&seen), [4, 5, 6]);
        assert_eq!(mark, Mark { next: 6, forgotten: 1, ..Mark::default() });
    }

    #[test]
    fn a_filter_holds_for_what_is_new_and_for_the_last_ones() {
        let flows = Flows::new("a", 10);
        flows.push([Verdict::Failed, Verdict::Forwarded, Verdict::Failed, Verdict::Failed].map(event));
        let failed = Filter { verdict: Some(Verdict::Failed), ..Filter::default() };
        assert_eq!(numbers(&flows.read(1, &failed, &Nobody).0), [3, 4]);
        assert_eq!(numbers(&flows.last(2, &failed, &Nobody).0), [3, 4]);
        assert_eq!(numbers(&flows.last(9, &failed, &Nobody).0), [1, 3, 4]);
        assert_eq!(flows.last(0, &failed, &Nobody).1.next, 4);
    }

    #[test]
    fn where_more_happened_than_is_sent_on_trouble_goes_first_and_the_rest_is_counted() {
        let flows = Flows::new("a", 6);
        let sent = |since, most| {
            let taken = flows.take(since, most);
            (taken.events.iter().map(|(seq, _)| *seq).collect::<Vec<_>>(), taken.held_back, taken.next)
        };
        assert_eq!(sent(0, 5), (vec![], 0, 0));
        flows.push([Verdict::Forwarded, Verdict::Denied, Verdict::Forwarded, Verdict::Forwarded].map(event));
        assert_eq!(sent(0, 4), (vec![1, 2, 3, 4], 0, 4));
        assert_eq!(sent(0, 2), (vec![2, 4], 2, 4));
        assert_eq!(sent(0, 0), (vec![], 4, 4));
        assert_eq!(sent(3, 9), (vec![4], 0, 4));
        assert_eq!(sent(99, 9).0, [1, 2, 3, 4], "of another agent, which had told more");
        flows.push([Verdict::Failed; 4].map(event));
        assert_eq!(sent(0, 3), (vec![6, 7, 8], 5, 8), "two forgotten, three of six too many");
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_is_woken_by_the_next_event() {
        let flows = Flows::new("a", 10);
        let patience = Duration::from_secs(1);
        assert!(tokio::time::timeout(patience, flows.after(0)).await.is_err());
        let pusher = Arc::clone(&flows);
        let push = async {
            tokio::time::sleep(Duration::from_millis(10)).await;
            pusher.push([event(Verdict::Forwarded)]);
        };
        let (woken, ()) = tokio::join!(tokio::time::timeout(patience, flows.after(0)), push);
        assert!(woken.is_ok());
        flows.after(0).await;
    }
}
