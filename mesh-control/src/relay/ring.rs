//! The last events of all nodes, in the order in which they came. Kept as the lines that nodes wrote, since most are never
//! read; bounded by their bytes and by an hour.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use mesh_core::flows::{Flow, Mark};
use mesh_core::xds::proto::node::FlowReport;
use serde::Serialize;
use tokio::sync::{Notify, broadcast};
use tokio::time::Instant;

use super::graph::{Graph, Shown};
use crate::ads::seconds;
use crate::metrics::Metrics;

/// A line that is longer is none of a node of ours.
const LONGEST_LINE: usize = 16 << 10;
/// What an event costs besides its line.
const OVERHEAD: usize = 64;

/// How much is asked for and kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of events.
    pub bytes: usize,
    /// Events that are older are forgotten.
    pub age: Duration,
    /// Events that a node sends in a second at most; 0 turns the relay off.
    pub per_node: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes: 32 << 20, age: Duration::from_secs(3600), per_node: 500 }
    }
}

/// One event as it came.
#[derive(Debug, Clone)]
struct Kept {
    came: Instant,
    line: Arc<[u8]>,
}

/// What a node has sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Sent {
    /// Events that were taken.
    pub events: u64,
    /// Events that it did not send, as it had more than it is asked for.
    pub held_back: u64,
    /// Events that its kernel had no room for.
    pub lost: u64,
    /// Its streams that are open: two while an agent takes over from another.
    pub streams: u32,
}

/// An open stream of a node.
#[derive(Debug)]
pub struct Here<'a> {
    relay: &'a Relay,
    node: String,
}

impl Drop for Here<'_> {
    fn drop(&mut self) {
        self.relay.streams(&self.node, |streams| streams.saturating_sub(1));
    }
}

#[derive(Debug, Default)]
struct Ring {
    entries: VecDeque<Kept>,
    bytes: usize,
    /// Number of the newest event; the first has number 1.
    newest: u64,
    nodes: BTreeMap<String, Sent>,
}

impl Ring {
    fn first(&self) -> u64 {
        self.newest + 1 - self.entries.len() as u64
    }

    fn forget(&mut self, limits: Limits, now: Instant) {
        while let Some(oldest) = self.entries.front() {
            if self.bytes <= limits.bytes && now.duration_since(oldest.came) < limits.age {
                return;
            }
            self.bytes -= oldest.line.len() + OVERHEAD;
            self.entries.pop_front();
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Relay {
    ring: Mutex<Ring>,
    graph: Mutex<Graph>,
    grown: Notify,
    /// What nodes tell here, for other replicas.
    told: broadcast::Sender<FlowReport>,
    limits: Limits,
    metrics: Arc<Metrics>,
}

/// Reports that a replica may be behind; it misses the older ones.
const BEHIND: usize = 256;

/// Why a node's report is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReportError {
    /// A line is no event.
    #[error("events: line {line}: {problem}; write events as `GET /flows` of the node does")]
    Line {
        /// Which, from 1.
        line: usize,
        /// What is wrong.
        problem: String,
    },
    /// An event of another node.
    #[error("events: line {line}: node {claimed:?} is not the sender, {node:?}; a node tells of itself only")]
    Node {
        /// Which line, from 1.
        line: usize,
        /// What it says.
        claimed: String,
        /// Who sent it.
        node: String,
    },
}

/// Events with their numbers.
pub type Lines = Vec<(u64, Arc<[u8]>)>;

impl Relay {
    /// A relay that has nothing yet.
    #[must_use]
    pub fn new(limits: Limits, metrics: Arc<Metrics>) -> Self {
        let told = broadcast::Sender::new(BEHIND);
        Self { ring: Mutex::default(), graph: Mutex::default(), grown: Notify::new(), told, limits, metrics }
    }

    /// What nodes tell here from now on.
    pub fn told(&self) -> broadcast::Receiver<FlowReport> {
        self.told.subscribe()
    }

    /// Has other replicas know what a node has told here.
    pub fn tell(&self, report: FlowReport) {
        // Mostly there is none.
        let _ = self.told.send(report);
    }

    /// How much is asked for and kept.
    #[must_use]
    pub const fn limits(&self) -> Limits {
        self.limits
    }

    /// A panic elsewhere while it was locked leaves it usable: nothing changes it halfway.
    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a node's report: all its events, or none.
    ///
    /// # Errors
    /// Which line is no event of that node.
    pub fn take(&self, node: &str, events: &[u8], held_back: u64, lost: u64) -> Result<(), ReportError> {
        let (flows, lost) = self.put(node, events, held_back, lost)?;
        for flow in &flows {
            self.metrics.relay_event(flow.verdict.as_str());
        }
        self.metrics.relay_lost(held_back, lost);
        Ok(())
    }

    /// The same of a report that another replica took, and counted.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub fn take_over(&self, node: &str, events: &[u8], held_back: u64, lost: u64) -> Result<(), ReportError> {
        self.put(node, events, held_back, lost).map(drop)
    }

    /// The events, and how many more than before the kernel had no room for.
    fn put(
        &self,
        node: &str,
        events: &[u8],
        held_back: u64,
        lost: u64,
    ) -> Result<(Vec<Flow>, u64), ReportError> {
        let now = Instant::now();
        let (mut lines, mut flows) = (Vec::new(), Vec::new());
        for (line, text) in (1..).zip(events.split(|byte| *byte == b'\n').filter(|line| !line.is_empty())) {
            let problem = |problem: String| ReportError::Line { line, problem };
            if text.len() > LONGEST_LINE {
                return Err(problem(format!("{} bytes; {LONGEST_LINE} is the most", text.len())));
            }
            let flow: Flow = serde_json::from_slice(text).map_err(|error| problem(error.to_string()))?;
            if flow.node != node {
                return Err(ReportError::Node { line, claimed: flow.node, node: node.to_owned() });
            }
            lines.push(Kept { came: now, line: text.into() });
            flows.push(flow);
        }
        self.draw(&flows);
        let mut ring = self.ring();
        let sent = ring.nodes.entry(node.to_owned()).or_default();
        sent.events += lines.len() as u64;
        sent.held_back = sent.held_back.saturating_add(held_back);
        // Of an agent that has started anew, the figure starts anew, too.
        let newly_lost = lost.saturating_sub(sent.lost);
        sent.lost = lost;
        ring.newest += lines.len() as u64;
        ring.bytes += lines.iter().map(|kept| kept.line.len() + OVERHEAD).sum::<usize>();
        ring.entries.extend(lines);
        ring.forget(self.limits, now);
        drop(ring);
        self.grown.notify_waiters();
        Ok((flows, newly_lost))
    }

    fn draw(&self, flows: &[Flow]) {
        let now = seconds(SystemTime::now());
        let mut graph = self.graph.lock().unwrap_or_else(PoisonError::into_inner);
        for flow in flows {
            graph.add(flow, now);
        }
    }

    /// Who talked to whom in the `seconds` that end at a moment (seconds since 1970).
    #[must_use]
    pub fn graph(&self, until: u64, seconds: u64) -> Vec<Shown> {
        self.graph.lock().unwrap_or_else(PoisonError::into_inner).between(until, seconds)
    }

    /// Notes that a node's stream is open, for as long as the answer lives.
    pub fn here(&self, node: &str) -> Here<'_> {
        self.streams(node, |streams| streams + 1);
        Here { relay: self, node: node.to_owned() }
    }

    fn streams(&self, node: &str, change: impl Fn(u32) -> u32) {
        let mut ring = self.ring();
        let sent = ring.nodes.entry(node.to_owned()).or_default();
        sent.streams = change(sent.streams);
        let open = ring.nodes.values().filter(|node| node.streams > 0).count();
        self.metrics.relay_nodes.set(i64::try_from(open).unwrap_or(i64::MAX));
    }

    /// What each node has sent.
    #[must_use]
    pub fn nodes(&self) -> BTreeMap<String, Sent> {
        self.ring().nodes.clone()
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

    /// The events after one, the oldest `most` of them, and where to go on.
    #[must_use]
    pub fn since(&self, since: u64, most: usize) -> (Lines, Mark) {
        let mut ring = self.ring();
        ring.forget(self.limits, Instant::now());
        // Of another process, which had seen more than this one has.
        let since = if since > ring.newest { 0 } else { since };
        let first = ring.first();
        let from = (since + 1).max(first);
        let skip = usize::try_from(from - first).unwrap_or(usize::MAX);
        let lines: Lines = (from..)
            .zip(ring.entries.iter().skip(skip).take(most))
            .map(|(n, k)| (n, k.line.clone()))
            .collect();
        let next = lines.last().map_or(ring.newest, |(seq, _)| *seq);
        // Who asks for everything has missed nothing.
        let forgotten = if since == 0 { 0 } else { first.saturating_sub(since + 1) };
        self.metrics.relay_forgotten(forgotten);
        (lines, Mark { next, forgotten, ..total(&ring) })
    }

    /// The events up to one (none: all), the newest `most` of them, oldest first, and where to go on after the newest.
    #[must_use]
    pub fn until(&self, until: Option<u64>, most: usize) -> (Lines, Mark) {
        let mut ring = self.ring();
        ring.forget(self.limits, Instant::now());
        let first = ring.first();
        let until = until.unwrap_or(ring.newest).min(ring.newest);
        let end = usize::try_from((until + 1).saturating_sub(first)).unwrap_or(usize::MAX);
        let start = end.saturating_sub(most);
        let range = ring.entries.range(start..end);
        let lines = (first + start as u64..).zip(range).map(|(seq, kept)| (seq, kept.line.clone())).collect();
        (lines, Mark { next: ring.newest, ..total(&ring) })
    }
}

/// What the nodes together could not tell.
fn total(ring: &Ring) -> Mark {
    let sum = |of: fn(&Sent) -> u64| ring.nodes.values().map(of).fold(0, u64::saturating_add);
    Mark { lost: sum(|sent| sent.lost), held_back: sum(|sent| sent.held_back), ..Mark::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn relay(bytes: usize) -> Relay {
        let limits = Limits { bytes, age: Duration::from_secs(3600), per_node: 10 };
        Relay::new(limits, Arc::new(Metrics::new()))
    }

    fn line(node: &str, seq: u64) -> Vec<u8> {
        mesh_core::flows::lines([&Flow { seq, node: node.into(), ..Flow::default() }])
    }

    fn numbers(lines: &Lines) -> Vec<u64> {
        lines.iter().map(|(seq, _)| *seq).collect()
    }

    #[test]
    fn events_of_all_nodes_come_in_one_stream_and_a_slow_reader_hears_what_it_missed() {
        let size = line("a", 1).len() - 1 + OVERHEAD;
        let relay = relay(size * 3);
        assert_eq!(relay.since(0, 10), (vec![], Mark::default()));
        relay.take("a", &line("a", 7), 2, 5).unwrap();
        relay.take("b", &line("b", 7), 1, 0).unwrap();
        let (lines, mark) = relay.since(0, 10);
        assert_eq!(numbers(&lines), [1, 2]);
        assert_eq!(mark, Mark { next: 2, forgotten: 0, lost: 5, held_back: 3 });
        for seq in 7..=9 {
            relay.take("a", &line("a", seq), 0, 5).unwrap();
        }
        let (lines, mark) = relay.since(1, 2);
        assert_eq!((numbers(&lines), mark.next, mark.forgotten), (vec![3, 4], 4, 1));
        assert_eq!(numbers(&relay.since(4, 2).0), [5]);
        assert_eq!(numbers(&relay.since(99, 9).0), [3, 4, 5], "a reader of an earlier process starts anew");
        assert_eq!(numbers(&relay.until(None, 2).0), [4, 5]);
        assert_eq!(numbers(&relay.until(Some(3), 9).0), [3]);
        assert_eq!(numbers(&relay.until(Some(2), 9).0), [] as [u64; 0]);
    }

    #[test]
    fn what_is_older_than_its_time_is_forgotten() {
        let limits = Limits { age: Duration::from_millis(300), ..Limits::default() };
        let relay = Relay::new(limits, Arc::new(Metrics::new()));
        relay.take("a", &line("a", 1), 0, 0).unwrap();
        std::thread::sleep(Duration::from_millis(200));
        relay.take("a", &line("a", 2), 0, 0).unwrap();
        std::thread::sleep(Duration::from_millis(310));
        let (lines, mark) = relay.since(1, 10);
        assert_eq!((numbers(&lines), mark.next, mark.forgotten), (vec![], 2, 1));
        assert_eq!(relay.since(0, 10).1.forgotten, 0, "who asks for everything has missed nothing");
        assert_eq!(relay.ring().bytes, 0);
    }

    #[test]
    fn a_report_that_is_wrong_is_refused_whole_and_the_line_is_named() {
        let relay = relay(1 << 20);
        let both = [line("a", 1), line("b", 2)].concat();
        let error = relay.take("a", &both, 0, 0).unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains("\"b\"") && error.contains("\"a\""), "{error}");
        for wrong in [&b"{\"kind\":\"no such\",\"node\":\"a\"}"[..], b"<html>", &[b' '; LONGEST_LINE + 1]] {
            let error = relay.take("a", wrong, 0, 0).unwrap_err().to_string();
            assert!(error.starts_with("events: line 1: "), "{error}");
        }
        assert_eq!(relay.newest(), 0);
    }
}
