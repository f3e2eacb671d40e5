//! Who talks to whom, for the map: figures by client, server, service and path, of every ten seconds of the last hour.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use mesh_core::flows::{Flow, Kind, Party, Path, Side, Verdict};
use serde::Serialize;

/// Figures are of so many seconds.
const SPAN: u64 = 10;
/// Spans that are kept: an hour.
const SPANS: u64 = 360;
/// Figures of all spans; what is new beyond is not counted.
const MOST: usize = 100_000;
/// Powers of two of microseconds: up to half a minute.
const BUCKETS: usize = 25;

/// A client and a server, as far as they are known.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct End {
    /// Namespace; empty outside of the cluster.
    pub namespace: String,
    /// Workload, else pod; `outside` where it is neither.
    pub name: String,
}

impl End {
    fn of(party: &Party) -> Self {
        let name = [&party.workload, &party.pod].into_iter().find(|name| !name.is_empty());
        Self {
            namespace: party.namespace.clone(),
            name: name.cloned().unwrap_or_else(|| "outside".to_owned()),
        }
    }

    /// A service whose endpoint is not known.
    fn of_service(service: &str) -> Self {
        let mut labels = service.split('.').map(str::to_owned);
        let name = labels.next().unwrap_or_default();
        Self { namespace: labels.next().unwrap_or_default(), name }
    }
}

/// What figures are of.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Edge {
    /// The client.
    pub source: End,
    /// The server.
    pub destination: End,
    /// What carried the bytes.
    pub path: &'static str,
}

impl Edge {
    fn of(flow: &Flow) -> Self {
        let mut destination = End::of(&flow.destination);
        if destination.name == "outside" && !flow.service.is_empty() {
            destination = End::of_service(&flow.service);
        }
        let path = if flow.path == Path::Unknown { Path::Plain } else { flow.path };
        Self { source: End::of(&flow.source), destination, path: path.as_str() }
    }
}

/// What the client's and the server's side have told; the larger one counts, as one of the two may not tell.
type Sides = [u64; 2];

#[derive(Debug, Clone, Default)]
struct Figures {
    opened: Sides,
    to_server: Sides,
    to_client: Sides,
    denied: Sides,
    failed: u64,
    dropped: u64,
    retransmits: u64,
    resets: u64,
    latency: [u32; BUCKETS],
    /// The service that was asked for last; one of the two ends may not know it.
    service: Option<Arc<str>>,
    /// The last thing that went wrong.
    trouble: Option<Arc<str>>,
}

/// Whether an event is one of those that figures are made of.
fn counts(flow: &Flow) -> bool {
    match flow.kind {
        Kind::Established | Kind::Accepted | Kind::Closed | Kind::Failed | Kind::Drop | Kind::Retransmit => {
            true
        }
        Kind::Proxied => flow.verdict == Verdict::Denied,
        Kind::Connect | Kind::ResetSent | Kind::ResetReceived | Kind::Dns => false,
    }
}

const fn side(flow: &Flow) -> usize {
    match flow.side {
        Side::Server => 1,
        Side::Client | Side::Node => 0,
    }
}

/// More than can be counted is as much as can be.
const fn add(to: &mut u64, more: u64) {
    *to = to.saturating_add(more);
}

impl Figures {
    fn add(&mut self, flow: &Flow) {
        let (side, times) = (side(flow), u64::from(flow.count.max(1)));
        match flow.kind {
            Kind::Established | Kind::Accepted => self.opened[side] += 1,
            Kind::Closed => {
                // What a node says may be anything.
                add(&mut self.to_server[side], flow.bytes_to_server.unwrap_or(0));
                add(&mut self.to_client[side], flow.bytes_to_client.unwrap_or(0));
                self.resets += u64::from(flow.closed_with == "rst" && side == 0);
            }
            Kind::Failed => self.failed += times,
            Kind::Drop => self.dropped += times,
            Kind::Retransmit => self.retransmits += times,
            Kind::Proxied => self.denied[side] += 1,
            _ => {}
        }
        if !flow.service.is_empty() && self.service.as_deref() != Some(flow.service.as_str()) {
            self.service = Some(flow.service.as_str().into());
        }
        if let Some(latency) = flow.latency_us.filter(|_| flow.kind == Kind::Established) {
            let bucket = latency.max(1).ilog2() as usize;
            self.latency[bucket.min(BUCKETS - 1)] += 1;
        }
        if flow.verdict != Verdict::Forwarded {
            let words = [&flow.reason, &flow.policy].map(String::as_str);
            let text = words.into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(", ");
            self.trouble = Some(format!("{}: {text}", flow.verdict.as_str()).into());
        }
    }

    fn merge(&mut self, other: &Self) {
        for (mine, others) in [
            (&mut self.opened, &other.opened),
            (&mut self.to_server, &other.to_server),
            (&mut self.to_client, &other.to_client),
            (&mut self.denied, &other.denied),
        ] {
            mine.iter_mut().zip(others).for_each(|(mine, other)| add(mine, *other));
        }
        self.failed += other.failed;
        self.dropped += other.dropped;
        self.retransmits += other.retransmits;
        self.resets += other.resets;
        self.latency.iter_mut().zip(&other.latency).for_each(|(mine, other)| *mine += other);
        if other.service.is_some() {
            self.service.clone_from(&other.service);
        }
        if other.trouble.is_some() {
            self.trouble.clone_from(&other.trouble);
        }
    }

    /// The middle of the bucket that a share of the connections does not exceed.
    fn quantile(&self, share: f64) -> Option<u64> {
        let all: u32 = self.latency.iter().sum();
        let wanted = f64::from(all) * share;
        let mut seen = 0;
        let bucket = self.latency.iter().position(|count| {
            seen += count;
            *count > 0 && f64::from(seen) >= wanted
        })?;
        Some((1_u64 << bucket) + (1_u64 << bucket) / 2)
    }
}

/// Figures of a stretch of time.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Shown {
    /// Of whom.
    #[serde(flatten)]
    pub edge: Edge,
    /// Hostname of the service that was asked for last, where one was.
    pub service: Option<String>,
    /// Connections that were established.
    pub opened: u64,
    /// Bytes from client to server.
    pub to_server: u64,
    /// Bytes from server to client.
    pub to_client: u64,
    /// Connections that policy refused.
    pub denied: u64,
    /// Connections that were never established.
    pub failed: u64,
    /// Packets that the kernel dropped.
    pub dropped: u64,
    /// Segments that were sent again.
    pub retransmits: u64,
    /// Connections that a reset ended.
    pub resets: u64,
    /// Time to connect that half of the connections did not exceed, microseconds; coarse.
    pub p50_us: Option<u64>,
    /// The same of 99 in a hundred.
    pub p99_us: Option<u64>,
    /// The last thing that went wrong.
    pub trouble: Option<String>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Graph {
    spans: BTreeMap<u64, HashMap<Arc<Edge>, Figures>>,
    known: HashSet<Arc<Edge>>,
    entries: usize,
}

impl Graph {
    /// Counts an event; `now` is in seconds since 1970.
    pub fn add(&mut self, flow: &Flow, now: u64) {
        if !counts(flow) {
            return;
        }
        let newest = now / SPAN;
        // A clock that is wrong must not make an event of the future.
        let span = (flow.at_us / 1_000_000 / SPAN).min(newest);
        self.forget(newest);
        if span + SPANS <= newest {
            return;
        }
        let edge = Edge::of(flow);
        let edge = match self.known.get(&edge) {
            Some(known) => known.clone(),
            None if self.entries >= MOST => return,
            None => {
                let edge = Arc::new(edge);
                self.known.insert(edge.clone());
                edge
            }
        };
        let figures = self.spans.entry(span).or_default();
        if !figures.contains_key(&edge) {
            if self.entries >= MOST {
                return;
            }
            self.entries += 1;
        }
        figures.entry(edge).or_default().add(flow);
    }

    fn forget(&mut self, newest: u64) {
        let mut forgotten = false;
        while let Some(oldest) = self.spans.first_entry().filter(|oldest| oldest.key() + SPANS <= newest) {
            self.entries -= oldest.remove().len();
            forgotten = true;
        }
        if forgotten {
            self.known.retain(|edge| Arc::strong_count(edge) > 1);
        }
    }

    /// Figures of the `seconds` that end at a moment (seconds since 1970), by edge.
    #[must_use]
    pub fn between(&self, until: u64, seconds: u64) -> Vec<Shown> {
        let (first, last) = (until.saturating_sub(seconds) / SPAN, until / SPAN);
        let mut all: BTreeMap<&Arc<Edge>, Figures> = BTreeMap::new();
        for (edge, figures) in self.spans.range(first..=last).flat_map(|(_, figures)| figures) {
            all.entry(edge).or_default().merge(figures);
        }
        let larger = |sides: Sides| sides[0].max(sides[1]);
        let shown = all.into_iter().map(|(edge, figures)| Shown {
            edge: Edge::clone(edge),
            service: figures.service.as_deref().map(str::to_owned),
            opened: larger(figures.opened),
            to_server: larger(figures.to_server),
            to_client: larger(figures.to_client),
            denied: larger(figures.denied),
            failed: figures.failed,
            dropped: figures.dropped,
            retransmits: figures.retransmits,
            resets: figures.resets,
            p50_us: figures.quantile(0.5),
            p99_us: figures.quantile(0.99),
            trouble: figures.trouble.as_deref().map(str::to_owned),
        });
        shown.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(at: u64, kind: Kind, side: Side) -> Flow {
        let party =
            |name: &str| Party { namespace: "shop".into(), workload: name.into(), ..Party::default() };
        Flow {
            at_us: at * 1_000_000,
            kind,
            side,
            path: Path::Tunnel,
            source: party("cart"),
            destination: party("pay"),
            ..Flow::default()
        }
    }

    #[test]
    fn a_connection_that_both_ends_tell_of_counts_once_and_only_in_its_time() {
        let mut graph = Graph::default();
        let latency_us = Some(3_000);
        graph.add(&Flow { latency_us, ..flow(1_000, Kind::Established, Side::Client) }, 1_000);
        graph.add(&flow(1_000, Kind::Accepted, Side::Server), 1_000);
        let closed = Flow { bytes_to_server: Some(7), ..flow(1_001, Kind::Closed, Side::Client) };
        graph.add(&closed, 1_001);
        graph.add(&Flow { side: Side::Server, ..closed }, 1_001);
        let seen = graph.between(1_005, 10);
        assert_eq!(seen.len(), 1);
        assert_eq!((seen[0].opened, seen[0].to_server, seen[0].p99_us), (1, 7, Some(3_072)));
        assert_eq!((seen[0].edge.source.name.as_str(), seen[0].edge.path), ("cart", "tunnel"));
        assert!(graph.between(2_000, 60).is_empty());
        graph.add(&flow(9_999_999, Kind::Established, Side::Client), 1_010);
        assert_eq!(graph.between(1_010, 0)[0].opened, 1, "an event of the future is one of now");
    }

    #[test]
    fn trouble_is_counted_with_its_reason_and_an_hour_is_kept() {
        let mut graph = Graph::default();
        let denied = Flow {
            verdict: Verdict::Denied,
            policy: "shop/p".into(),
            ..flow(1_000, Kind::Proxied, Side::Server)
        };
        graph.add(&denied, 1_000);
        graph.add(
            &Flow { verdict: Verdict::Dropped, count: 3, ..flow(1_000, Kind::Drop, Side::Server) },
            1_000,
        );
        let seen = &graph.between(1_000, 0)[0];
        assert_eq!((seen.denied, seen.dropped, seen.opened), (1, 3, 0));
        graph.add(&flow(4_700, Kind::Failed, Side::Client), 4_700);
        assert_eq!((graph.between(1_000, 0).len(), graph.entries, graph.known.len()), (0, 1, 1));
        graph.add(&denied, 4_700);
        assert_eq!(graph.entries, 1, "what is older is not taken");
    }

    #[test]
    fn bytes_beyond_what_can_be_counted_are_as_many_as_can_be() {
        let mut graph = Graph::default();
        let lie = Flow { bytes_to_server: Some(u64::MAX), ..flow(1_000, Kind::Closed, Side::Client) };
        graph.add(&lie, 1_000);
        graph.add(&lie, 1_000);
        graph.add(&Flow { at_us: 1_010_000_000, ..lie }, 1_010);
        assert_eq!(graph.between(1_010, 60)[0].to_server, u64::MAX);
    }

    #[test]
    fn ends_that_are_not_known_are_the_service_or_outside() {
        let service = "pay.shop.svc.cluster.local".to_owned();
        let edge = Edge::of(&Flow { service, ..Flow::default() });
        assert_eq!(edge.destination, End { namespace: "shop".into(), name: "pay".into() });
        assert_eq!((edge.source.name.as_str(), edge.path), ("outside", "plain"));
    }
}
