//! Figures by pair of workloads, from the same events that people see: round trip times, retransmissions, drops by
//! reason, connections that failed. Bounded: beyond a number of pairs the rest counts as one, and a pair that is quiet
//! for long is forgotten with its series.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mesh_core::flows::Kind;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;

use super::told::{Ends, Names, Reason, Told};
use crate::capture::trace::Told as Counted;

/// Pairs with series of their own.
const MOST_PAIRS: usize = 1_000;
/// Reasons of one pair and kind.
const MOST_REASONS: usize = 16;
/// A pair that is quiet for this long is forgotten.
const QUIET: Duration = Duration::from_secs(900);
/// What is counted together beyond the bounds.
const OTHER: &str = "other";
/// Upper bounds of round trip times in seconds, from one machine to another continent.
const BUCKETS: [f64; 14] =
    [0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0];

/// Namespace and workload of both ends.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Pair {
    source_namespace: String,
    source: String,
    destination_namespace: String,
    destination: String,
}

impl Pair {
    fn of(ends: &Ends) -> Self {
        let name = |party: &mesh_core::flows::Party| match (party.workload.is_empty(), party.pod.is_empty()) {
            (false, _) => party.workload.clone(),
            (true, false) => party.pod.clone(),
            (true, true) => "unknown".to_owned(),
        };
        let namespace = |party: &mesh_core::flows::Party| {
            if party.namespace.is_empty() { "unknown".to_owned() } else { party.namespace.clone() }
        };
        Self {
            source_namespace: namespace(&ends.source),
            source: name(&ends.source),
            destination_namespace: namespace(&ends.destination),
            destination: name(&ends.destination),
        }
    }

    fn other() -> Self {
        let other = || OTHER.to_owned();
        Self {
            source_namespace: other(),
            source: other(),
            destination_namespace: other(),
            destination: other(),
        }
    }

    fn labels<'a>(&'a self, reason: Option<&'a str>) -> Vec<(&'static str, &'a str)> {
        let mut labels = vec![
            ("source_workload_namespace", self.source_namespace.as_str()),
            ("source_workload", self.source.as_str()),
            ("destination_workload_namespace", self.destination_namespace.as_str()),
            ("destination_workload", self.destination.as_str()),
        ];
        labels.extend(reason.map(|reason| ("reason", reason)));
        labels
    }
}

#[derive(Debug, Default)]
struct Figures {
    buckets: [u64; BUCKETS.len()],
    sum: f64,
    count: u64,
    retransmits: u64,
    drops: HashMap<String, u64>,
    failures: HashMap<String, u64>,
    seen: Option<Instant>,
}

impl Figures {
    fn observe(&mut self, seconds: f64) {
        if let Some(at) = BUCKETS.iter().position(|bound| seconds <= *bound) {
            self.buckets[at] += 1;
        }
        self.sum += seconds;
        self.count += 1;
    }
}

fn count(reasons: &mut HashMap<String, u64>, reason: String, times: u32) {
    let reason =
        if reasons.len() < MOST_REASONS || reasons.contains_key(&reason) { reason } else { OTHER.to_owned() };
    *reasons.entry(reason).or_default() += u64::from(times.max(1));
}

/// See the module.
#[derive(Debug, Default)]
pub struct Pairs(Mutex<HashMap<Pair, Figures>>);

impl Pairs {
    /// A panic elsewhere while it was locked leaves it usable: each figure stands alone.
    fn all(&self) -> MutexGuard<'_, HashMap<Pair, Figures>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts an event.
    pub fn count(&self, told: &Told, names: &dyn Names, now: Instant) {
        let counts = match told.kind {
            Kind::Closed => told.numbers.rtt_us.is_some() || told.numbers.segments.is_some_and(|s| s[0] > 0),
            Kind::Failed | Kind::Drop => true,
            _ => false,
        };
        if !counts {
            return;
        }
        let mut all = self.all();
        let pair = Pair::of(&told.ends);
        let pair = if all.len() < MOST_PAIRS || all.contains_key(&pair) { pair } else { Pair::other() };
        let figures = all.entry(pair).or_default();
        figures.seen = Some(now);
        match told.kind {
            Kind::Drop => count(&mut figures.drops, told.reason(names), told.count),
            Kind::Failed => count(&mut figures.failures, told.reason(names), told.count),
            _ => {
                if let Some([srtt, _]) = told.numbers.rtt_us {
                    figures.observe(f64::from(srtt) / 1e6);
                }
                // Each event of a retransmission is one of these; here they are complete.
                figures.retransmits += u64::from(told.numbers.segments.map_or(0, |segments| segments[0]));
            }
        }
        if told.kind == Kind::Failed && told.reason == Reason::None {
            figures.failures.entry("unknown".to_owned()).or_default();
        }
    }

    /// Forgets pairs that have been quiet for long.
    pub fn expire(&self, now: Instant) {
        self.all().retain(|_, figures| {
            figures.seen.is_some_and(|seen| now.saturating_duration_since(seen) < QUIET)
        });
    }
}

/// The series of [`Pairs`], and what the tracing programs counted.
pub struct PairMetrics {
    /// The figures.
    pub pairs: Arc<Pairs>,
    /// What the tracing programs counted.
    pub counted: Box<dyn Fn() -> Counted + Send + Sync>,
}

impl std::fmt::Debug for PairMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PairMetrics").field("pairs", &self.pairs).finish_non_exhaustive()
    }
}

impl Collector for PairMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        let counted = (self.counted)();
        let help = "Events of connections and packets from the kernel, by what became of them";
        let mut family =
            encoder.encode_descriptor("undermesh_trace_events", help, None, MetricType::Counter)?;
        for (outcome, count) in [
            ("told", counted.told),
            ("lost", counted.lost),
            ("repeated", counted.repeated),
            ("unsampled", counted.unsampled),
            ("missed", counted.missed),
        ] {
            ConstCounter::new(count).encode(family.encode_family(&[("outcome", outcome)])?)?;
        }
        let all = self.pairs.all();
        let mut sorted: Vec<_> = all.iter().collect();
        sorted.sort_by(|a, b| a.0.cmp(b.0));
        let help = "Smoothed round trip time of connections when they closed, as the kernel measured it";
        let mut family =
            encoder.encode_descriptor("undermesh_tcp_rtt_seconds", help, None, MetricType::Histogram)?;
        for (pair, figures) in sorted.iter().filter(|(_, figures)| figures.count > 0) {
            histogram(family.encode_family(&pair.labels(None))?, figures)?;
        }
        let help = "Segments that were sent again on connections that have closed";
        let mut family =
            encoder.encode_descriptor("undermesh_tcp_retransmits", help, None, MetricType::Counter)?;
        for (pair, figures) in sorted.iter().filter(|(_, figures)| figures.count + figures.retransmits > 0) {
            ConstCounter::new(figures.retransmits).encode(family.encode_family(&pair.labels(None))?)?;
        }
        let drops = "Packets of pods that the kernel dropped, by its reason";
        let failures = "Connections that were never established, by error";
        let of_drops: fn(&Figures) -> &HashMap<String, u64> = |figures| &figures.drops;
        let of_failures: fn(&Figures) -> &HashMap<String, u64> = |figures| &figures.failures;
        for (name, help, counts) in [
            ("undermesh_packets_dropped", drops, of_drops),
            ("undermesh_tcp_connect_failures", failures, of_failures),
        ] {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (pair, figures) in &sorted {
                let mut reasons: Vec<_> = counts(figures).iter().collect();
                reasons.sort();
                for (reason, times) in reasons {
                    let labels = pair.labels(Some(reason));
                    ConstCounter::new(*times).encode(family.encode_family(&labels)?)?;
                }
            }
        }
        Ok(())
    }
}

fn histogram(mut encoder: MetricEncoder<'_>, figures: &Figures) -> std::fmt::Result {
    let buckets: Vec<(f64, u64)> = BUCKETS
        .iter()
        .copied()
        .zip(figures.buckets)
        .chain([(f64::INFINITY, figures.count - figures.buckets.iter().sum::<u64>())])
        .collect();
    encoder.encode_histogram::<NoLabelSet>(figures.sum, figures.count, &buckets, None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::told::Numbers;
    use mesh_core::flows::Party;
    use mesh_core::telemetry::scrape;
    use prometheus_client::registry::Registry;

    struct Kernel;
    impl Names for Kernel {
        fn drop_reason(&self, reason: u32) -> String {
            format!("REASON_{reason}")
        }
        fn reset_reason(&self, _: u32) -> Option<String> {
            None
        }
        fn container(&self, _: u64) -> String {
            String::new()
        }
    }

    fn told(kind: Kind, destination: &str) -> Told {
        let party =
            |name: &str| Party { namespace: "shop".into(), workload: name.into(), ..Party::default() };
        let ends = Ends { source: party("cart"), destination: party(destination), service: String::new() };
        Told { kind, ends: Arc::new(ends), count: 1, ..Told::default() }
    }

    fn text(pairs: &Arc<Pairs>) -> String {
        let mut registry = Registry::default();
        let counted = || Counted { told: 5, lost: 1, ..Counted::default() };
        let metrics = PairMetrics { pairs: Arc::clone(pairs), counted: Box::new(counted) };
        registry.register_collector(Box::new(metrics));
        scrape(&registry, None).unwrap().1
    }

    #[test]
    fn a_scrape_shows_round_trips_retransmissions_drops_and_failures_by_pair() {
        let (pairs, now) = (Arc::new(Pairs::default()), Instant::now());
        let mut closed = told(Kind::Closed, "pay");
        closed.numbers = Numbers { rtt_us: Some([700, 100]), segments: Some([3, 0]), ..Numbers::default() };
        pairs.count(&closed, &Kernel, now);
        let dropped = Told { reason: Reason::Drop(9), count: 4, ..told(Kind::Drop, "pay") };
        pairs.count(&dropped, &Kernel, now);
        let failed = Told { reason: Reason::Errno(111), ..told(Kind::Failed, "pay") };
        pairs.count(&failed, &Kernel, now);
        pairs.count(&told(Kind::Connect, "elsewhere"), &Kernel, now);
        let text = text(&pairs);
        let labels = r#"source_workload_namespace="shop",source_workload="cart",destination_workload_namespace="shop",destination_workload="pay""#;
        for line in [
            format!(r#"undermesh_tcp_rtt_seconds_bucket{{le="0.0005",{labels}}} 0"#),
            format!(r#"undermesh_tcp_rtt_seconds_bucket{{le="0.001",{labels}}} 1"#),
            format!(r#"undermesh_tcp_rtt_seconds_bucket{{le="+Inf",{labels}}} 1"#),
            format!("undermesh_tcp_retransmits_total{{{labels}}} 3"),
            r#"undermesh_trace_events_total{outcome="lost"} 1"#.to_owned(),
            format!(r#"undermesh_packets_dropped_total{{{labels},reason="REASON_9"}} 4"#),
            format!(r#"undermesh_tcp_connect_failures_total{{{labels},reason="ECONNREFUSED"}} 1"#),
        ] {
            assert!(text.lines().any(|l| l == line), "no {line} in\n{text}");
        }
        assert!(!text.contains("elsewhere"), "an attempt has no series of its own: {text}");
    }

    #[test]
    fn pairs_and_reasons_are_bounded_and_quiet_pairs_go() {
        let (pairs, now) = (Arc::new(Pairs::default()), Instant::now());
        for number in 0..MOST_PAIRS + 10 {
            pairs.count(&told(Kind::Drop, &number.to_string()), &Kernel, now);
        }
        assert_eq!(pairs.all().len(), MOST_PAIRS + 1);
        assert_eq!(pairs.all()[&Pair::other()].drops.values().sum::<u64>(), 10);
        for reason in 0..100 {
            let dropped = Told { reason: Reason::Drop(reason), ..told(Kind::Drop, "0") };
            pairs.count(&dropped, &Kernel, now + QUIET);
        }
        let (reasons, all) = {
            let all = pairs.all();
            let drops = &all[&Pair::of(&told(Kind::Drop, "0").ends)].drops;
            (drops.len(), drops.values().sum::<u64>())
        };
        assert_eq!((reasons, all), (MOST_REASONS + 1, 101));
        pairs.expire(now + QUIET);
        assert_eq!(pairs.all().len(), 1, "only the pair that was seen lately is left");
    }
}
