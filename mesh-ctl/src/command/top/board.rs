//! Events of a sliding window, by pair of workloads. Pure: fed with events, asked for rows.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use clap::ValueEnum;
use mesh_core::flows::{Flow, Kind, Party, Path, Side, Verdict};
use serde::Serialize;

/// Columns.
pub(super) const TITLES: [&str; 11] = [
    "SOURCE",
    "DESTINATION",
    "PATH",
    "CONN/S",
    "P50",
    "P99",
    "BYTES/S",
    "RETRANS",
    "DROPS",
    "FAILED",
    "DENIED",
];

/// What rows are sorted by, the largest first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Order {
    /// Connections per second
    #[default]
    Connections,
    /// Time to connect, 99th percentile
    Latency,
    /// Bytes per second
    Bytes,
    /// Retransmitted segments
    Retransmits,
    /// Drops, failures and denials together
    Trouble,
}

impl Order {
    /// The next one, for a key.
    pub(super) const fn next(self) -> Self {
        match self {
            Self::Connections => Self::Latency,
            Self::Latency => Self::Bytes,
            Self::Bytes => Self::Retransmits,
            Self::Retransmits => Self::Trouble,
            Self::Trouble => Self::Connections,
        }
    }

    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::Latency => "latency",
            Self::Bytes => "bytes",
            Self::Retransmits => "retransmits",
            Self::Trouble => "trouble",
        }
    }
}

/// What one event adds.
#[derive(Debug, Clone, Default)]
struct Part {
    at_us: u64,
    pair: (String, String),
    path: Path,
    connections: u64,
    latency_us: Option<u64>,
    bytes: u64,
    retransmits: u64,
    drops: u64,
    failed: u64,
    denied: u64,
}

/// Figures of one pair.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Row {
    source: String,
    destination: String,
    path: &'static str,
    connections_per_second: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    p50_us: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    p99_us: Option<u64>,
    bytes_per_second: f64,
    retransmits: u64,
    drops: u64,
    failed: u64,
    denied: u64,
}

impl Row {
    pub(super) const fn is_bad(&self) -> bool {
        self.drops + self.failed + self.denied > 0
    }

    pub(super) fn cells(&self) -> [String; 11] {
        let span = |us: Option<u64>| us.map(super::super::flows::span).unwrap_or_default();
        let count = |count: u64| if count == 0 { String::new() } else { count.to_string() };
        [
            self.source.clone(),
            self.destination.clone(),
            self.path.to_owned(),
            format!("{:.1}", self.connections_per_second),
            span(self.p50_us),
            span(self.p99_us),
            format!("{:.0}", self.bytes_per_second),
            count(self.retransmits),
            count(self.drops),
            count(self.failed),
            count(self.denied),
        ]
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Board {
    window: Duration,
    parts: VecDeque<Part>,
    newest_us: u64,
}

/// The owner of a pod, else the pod, else the address.
fn name(end: &Party) -> String {
    match (end.workload.is_empty(), end.namespace.is_empty()) {
        (false, false) => format!("{}/{}", end.namespace, end.workload),
        _ => end.label(),
    }
}

fn destination(flow: &Flow) -> String {
    if flow.destination.pod.is_empty() && !flow.service.is_empty() {
        let mut labels = flow.service.split('.');
        let (name, namespace) = (labels.next().unwrap_or_default(), labels.next().unwrap_or_default());
        return format!("{namespace}/{name}");
    }
    name(&flow.destination)
}

impl Board {
    pub(super) const fn new(window: Duration) -> Self {
        Self { window, parts: VecDeque::new(), newest_us: 0 }
    }

    /// Takes an event. What both ends see counts once: connections and their bytes where they begin.
    pub(super) fn add(&mut self, flow: &Flow) {
        let at_client = flow.side == Side::Client;
        let times = u64::from(flow.count.max(1));
        let mut part = Part { at_us: flow.at_us, path: flow.path, ..Part::default() };
        match flow.kind {
            Kind::Established if at_client => {
                part.connections = 1;
                part.latency_us = flow.latency_us;
            }
            Kind::Closed => {
                part.retransmits = u64::from(flow.retransmits.unwrap_or(0));
                if at_client {
                    part.bytes = flow.bytes_to_server.unwrap_or(0) + flow.bytes_to_client.unwrap_or(0);
                }
            }
            Kind::Drop => part.drops = times,
            Kind::Failed => part.failed = times,
            Kind::Proxied if flow.verdict == Verdict::Denied => part.denied = times,
            _ => return,
        }
        part.pair = (name(&flow.source), destination(flow));
        self.newest_us = self.newest_us.max(flow.at_us);
        self.parts.push_back(part);
        let window = u64::try_from(self.window.as_micros()).unwrap_or(u64::MAX);
        let oldest = self.newest_us.saturating_sub(window);
        while self.parts.front().is_some_and(|part| part.at_us < oldest) {
            self.parts.pop_front();
        }
    }

    /// The pairs, sorted.
    pub(super) fn rows(&self, order: Order) -> Vec<Row> {
        let mut pairs: BTreeMap<&(String, String), Vec<&Part>> = BTreeMap::new();
        for part in &self.parts {
            pairs.entry(&part.pair).or_default().push(part);
        }
        let mut rows: Vec<Row> = pairs.into_iter().map(|(pair, parts)| self.row(pair, &parts)).collect();
        let key = |row: &Row| match order {
            Order::Connections => row.connections_per_second,
            Order::Latency => as_f64(row.p99_us.unwrap_or(0)),
            Order::Bytes => row.bytes_per_second,
            Order::Retransmits => as_f64(row.retransmits),
            Order::Trouble => as_f64(row.drops + row.failed + row.denied),
        };
        rows.sort_by(|a, b| key(b).total_cmp(&key(a)));
        rows
    }

    fn row(&self, pair: &(String, String), parts: &[&Part]) -> Row {
        let seconds = self.window.as_secs_f64().max(0.001);
        let sum = |of: fn(&Part) -> u64| parts.iter().map(|part| of(part)).sum::<u64>();
        let mut latencies: Vec<u64> = parts.iter().filter_map(|part| part.latency_us).collect();
        latencies.sort_unstable();
        let percentile = |percent: usize| {
            latencies.get((latencies.len() * percent).div_ceil(100).saturating_sub(1)).copied()
        };
        let path = parts.iter().rev().map(|part| part.path).find(|path| *path != Path::Unknown);
        Row {
            source: pair.0.clone(),
            destination: pair.1.clone(),
            path: path.map_or("", Path::as_str),
            connections_per_second: as_f64(sum(|part| part.connections)) / seconds,
            p50_us: percentile(50),
            p99_us: percentile(99),
            bytes_per_second: as_f64(sum(|part| part.bytes)) / seconds,
            retransmits: sum(|part| part.retransmits),
            drops: sum(|part| part.drops),
            failed: sum(|part| part.failed),
            denied: sum(|part| part.denied),
        }
    }
}

#[allow(clippy::cast_precision_loss, reason = "for people")]
fn as_f64(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn flow(kind: Kind, to: &str, at_s: u64) -> Flow {
        let party = |workload: &str| Party {
            namespace: "shop".into(),
            pod: format!("{workload}-1"),
            workload: workload.into(),
            ..Party::default()
        };
        Flow {
            at_us: at_s * 1_000_000,
            kind,
            path: Path::Tunnel,
            source: party("cart"),
            destination: party(to),
            ..Flow::default()
        }
    }

    #[test]
    fn what_both_ends_see_counts_once_and_trouble_is_summed() {
        let mut board = Board::new(Duration::from_secs(10));
        for latency in 1..=4 {
            board.add(&Flow { latency_us: Some(latency * 100), ..flow(Kind::Established, "pay", 1) });
            board.add(&Flow { side: Side::Server, ..flow(Kind::Accepted, "pay", 1) });
        }
        let closed = Flow {
            bytes_to_server: Some(30),
            bytes_to_client: Some(70),
            retransmits: Some(1),
            ..flow(Kind::Closed, "pay", 2)
        };
        board.add(&closed);
        board.add(&Flow { side: Side::Server, ..closed });
        board.add(&Flow { count: 5, verdict: Verdict::Dropped, ..flow(Kind::Drop, "pay", 2) });
        board.add(&Flow { verdict: Verdict::Failed, ..flow(Kind::Failed, "pay", 2) });
        board.add(&Flow { verdict: Verdict::Denied, ..flow(Kind::Proxied, "pay", 2) });
        board.add(&flow(Kind::Proxied, "pay", 2));
        let rows = board.rows(Order::Connections);
        let expected = Row {
            source: "shop/cart".into(),
            destination: "shop/pay".into(),
            path: "tunnel",
            connections_per_second: 0.4,
            p50_us: Some(200),
            p99_us: Some(400),
            bytes_per_second: 10.0,
            retransmits: 2,
            drops: 5,
            failed: 1,
            denied: 1,
        };
        assert_eq!(rows, [expected]);
    }

    #[test]
    fn what_left_the_window_is_gone_and_each_order_has_its_own_first() {
        let mut board = Board::new(Duration::from_secs(10));
        board.add(&Flow { latency_us: Some(9), ..flow(Kind::Established, "old", 1) });
        for _ in 0..3 {
            board.add(&Flow { latency_us: Some(5), ..flow(Kind::Established, "busy", 20) });
        }
        board.add(&Flow { latency_us: Some(900), ..flow(Kind::Established, "slow", 20) });
        board.add(&Flow { bytes_to_server: Some(5), ..flow(Kind::Closed, "bulk", 20) });
        board.add(&Flow { retransmits: Some(2), ..flow(Kind::Closed, "lossy", 20) });
        board.add(&flow(Kind::Drop, "broken", 21));
        let first = |order| board.rows(order)[0].destination.clone();
        assert_eq!(board.rows(Order::Connections).len(), 5, "the old pair is gone");
        for (order, name) in [
            (Order::Connections, "busy"),
            (Order::Latency, "slow"),
            (Order::Bytes, "bulk"),
            (Order::Retransmits, "lossy"),
            (Order::Trouble, "broken"),
        ] {
            assert_eq!(first(order), format!("shop/{name}"));
        }
        let mut order = Order::default();
        for _ in 0..5 {
            order = order.next();
        }
        assert_eq!(order, Order::default(), "a key goes round");
    }
}
