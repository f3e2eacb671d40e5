//! `process_*` as Prometheus clients of other languages export it, read from `/proc/self` at each scrape.

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

/// Linux reports CPU time in these units per second to user space (USER_HZ), on every architecture we run on.
const TICKS_PER_SECOND: f64 = 100.0;
const PAGE: u64 = 4096;

/// Reads CPU time, memory and open files of this process.
#[derive(Debug, Default)]
pub struct ProcessCollector;

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        if let Some(stat) =
            std::fs::read_to_string("/proc/self/stat").ok().and_then(|stat| Stat::parse(&stat))
        {
            let cpu = ConstCounter::new(stat.cpu_seconds);
            let help = "User and system CPU time in seconds";
            cpu.encode(encoder.encode_descriptor("process_cpu_seconds", help, None, cpu.metric_type())?)?;
            let memory = ConstGauge::new(i64::try_from(stat.resident_bytes).unwrap_or(i64::MAX));
            let help = "Resident memory";
            let name = "process_resident_memory_bytes";
            memory.encode(encoder.encode_descriptor(name, help, None, memory.metric_type())?)?;
        }
        if let Ok(files) = std::fs::read_dir("/proc/self/fd") {
            // One of them is the directory itself.
            let count = files.count().saturating_sub(1);
            let files = ConstGauge::new(i64::try_from(count).unwrap_or(i64::MAX));
            let help = "Open files";
            files.encode(encoder.encode_descriptor(
                "process_open_fds",
                help,
                None,
                files.metric_type(),
            )?)?;
        }
        Ok(())
    }
}

struct Stat {
    cpu_seconds: f64,
    resident_bytes: u64,
}

impl Stat {
    /// Fields of proc(5): 14 utime, 15 stime, 24 rss. The name in parentheses may contain anything.
    fn parse(stat: &str) -> Option<Self> {
        let (_, rest) = stat.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        #[allow(clippy::cast_precision_loss, reason = "CPU time is far below 2^52 ticks")]
        let ticks = (field(14)? + field(15)?) as f64;
        Some(Self { cpu_seconds: ticks / TICKS_PER_SECOND, resident_bytes: field(24)? * PAGE })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_and_spaces_does_not_shift_the_fields() {
        let stat = "1 (a) b (c) S 0 0 0 0 0 0 0 0 0 0 150 50 0 0 20 0 1 0 9 1000 7 0";
        let parsed = Stat::parse(stat).unwrap();
        assert_eq!(parsed.resident_bytes, 7 * 4096);
        assert!((parsed.cpu_seconds - 2.0).abs() < f64::EPSILON);
    }
}
