//! Figures that are read at the moment of a scrape: what the kernel programs counted, and open connections.

use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::capture::{Capture, CaptureError, Counter};
use crate::proxy::limits::{Gauge, Share};

type Counters = Box<dyn Fn() -> Result<Vec<Counter>, CaptureError> + Send + Sync>;

/// Registered once.
pub struct Figures {
    /// What the kernel programs counted so far.
    counters: Counters,
    gauge: Arc<Gauge>,
}

impl std::fmt::Debug for Figures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Figures").field("gauge", &self.gauge).finish_non_exhaustive()
    }
}

impl Figures {
    /// Of the kernel programs behind `capture`, and of the connections that `gauge` counts.
    #[must_use]
    pub fn new(capture: Arc<Capture>, gauge: Arc<Gauge>) -> Self {
        Self { counters: Box::new(move || capture.counters()), gauge }
    }

    fn kernel(&self, encoder: &mut DescriptorEncoder<'_>) -> std::fmt::Result {
        // Counters that cannot be read are absent, not zero.
        let Ok(counters) = (self.counters)() else { return Ok(()) };
        let help = "What the kernel programs did with connections and queries of pods, by reason";
        let mut family =
            encoder.encode_descriptor("undermesh_kernel_events", help, None, MetricType::Counter)?;
        for Counter { reason, count, .. } in counters {
            ConstCounter::new(count).encode(family.encode_family(&[("reason", reason)])?)?;
        }
        Ok(())
    }

    fn connections(&self, encoder: &mut DescriptorEncoder<'_>) -> std::fmt::Result {
        let shown = |count: usize| ConstGauge::new(i64::try_from(count).unwrap_or(i64::MAX));
        let gauge = MetricType::Gauge;
        let help = "Connections and tunnels that the agent holds open for all pods of the node";
        let open = encoder.encode_descriptor("undermesh_connections_open", help, None, gauge)?;
        shown(self.gauge.open()).encode(open)?;
        if self.gauge.limit() != usize::MAX {
            let help = "As many as undermesh_connections_open may become";
            let limit = encoder.encode_descriptor("undermesh_connections_limit", help, None, gauge)?;
            shown(self.gauge.limit()).encode(limit)?;
        }
        if self.gauge.memory_limit() != usize::MAX {
            let help =
                "Resident bytes above which the agent takes no more connections of pods that have many";
            let limit = encoder.encode_descriptor("undermesh_memory_limit_bytes", help, None, gauge)?;
            shown(self.gauge.memory_limit()).encode(limit)?;
        }
        let pods = self.gauge.by_pod();
        let help = "Connections and tunnels that the agent holds open for one pod";
        let mut family = encoder.encode_descriptor("undermesh_pod_connections_open", help, None, gauge)?;
        for share in &pods {
            shown(share.open).encode(family.encode_family(&labels(share))?)?;
        }
        let help = "Time that data workers spent on connections and tunnels of one pod";
        let name = "undermesh_pod_worker_seconds";
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for share in &pods {
            let seconds = ConstCounter::new(share.busy.as_secs_f64());
            seconds.encode(family.encode_family(&labels(share))?)?;
        }
        Ok(())
    }
}

fn labels(share: &Share) -> [(&str, &str); 2] {
    let (namespace, pod) = share.label.split_once('/').unwrap_or(("", &share.label));
    [("namespace", namespace), ("pod", pod)]
}

impl Collector for Figures {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        self.kernel(&mut encoder)?;
        self.connections(&mut encoder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::limits::Limits;
    use mesh_core::telemetry::scrape;
    use prometheus_client::registry::Registry;

    fn text(counters: Counters, gauge: &Arc<Gauge>) -> String {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Figures { counters, gauge: Arc::clone(gauge) }));
        scrape(&registry, None).unwrap().1
    }

    #[test]
    fn a_scrape_shows_kernel_counters_by_reason_and_open_connections_by_pod() {
        let gauge = Gauge::new(Limits { node: 100, memory: 1 << 20, ..Limits::default() });
        let pod = gauge.pod("shop/cart");
        let _held = [pod.admit().unwrap(), pod.admit().unwrap()];
        let counted = |reason, count| Counter { reason, meaning: "", count };
        let counters = move || Ok(vec![counted("captured", 7), counted("refused_no_agent", 0)]);
        let text = text(Box::new(counters), &gauge);
        for line in [
            "# TYPE undermesh_kernel_events_total counter",
            r#"undermesh_kernel_events_total{reason="captured"} 7"#,
            r#"undermesh_kernel_events_total{reason="refused_no_agent"} 0"#,
            "undermesh_connections_open 2",
            "undermesh_connections_limit 100",
            "undermesh_memory_limit_bytes 1048576",
            r#"undermesh_pod_connections_open{namespace="shop",pod="cart"} 2"#,
            r#"undermesh_pod_worker_seconds_total{namespace="shop",pod="cart"} 0.0"#,
        ] {
            assert!(text.lines().any(|l| l == line), "no {line} in\n{text}");
        }
    }

    #[test]
    fn every_reason_of_the_kernel_is_documented() {
        let documented = include_str!("../../../docs/metrics.md");
        for (reason, meaning) in mesh_ebpf::REASONS {
            assert!(documented.contains(&format!("| `{reason}` | {meaning} |")), "docs/metrics.md: {reason}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_absent_and_the_rest_is_shown() {
        let counters = || Err(CaptureError::NoMap("COUNTERS"));
        let text = text(Box::new(counters), &Gauge::new(Limits::default()));
        assert!(!text.contains("kernel_events"), "{text}");
        assert!(!text.contains("undermesh_connections_limit"), "there is no limit: {text}");
        assert!(text.contains("undermesh_connections_open 0\n"), "{text}");
    }
}
