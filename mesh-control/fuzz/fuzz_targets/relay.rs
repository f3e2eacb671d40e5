//! What a node tells of connections. The first byte says how the rest is taken: as it is, or cut into reports at zero bytes;
//! and whether as many events were lost as there are numbers.
//!
//! A report is taken whole or not at all; what is kept stays within its limits; what was taken can be drawn and read again.
#![no_main]

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use mesh_control::metrics::Metrics;
use mesh_control::relay::{Limits, Relay};
use mesh_core::flows::Flow;

const NODE: &str = "node-a";
/// Small, so that it is reached.
const BYTES: usize = 4 << 10;
/// An hour, the most that the map shows.
const SPAN: u64 = 3600;

static METRICS: LazyLock<Arc<Metrics>> = LazyLock::new(|| Arc::new(Metrics::new()));

fuzz_target!(|data: &[u8]| {
    let Some((kind, rest)) = data.split_first() else { return };
    let limits = Limits { bytes: BYTES, age: Duration::from_secs(SPAN), per_node: 1 };
    let relay = Relay::new(limits, METRICS.clone());
    let reports: Vec<&[u8]> =
        if kind % 2 == 0 { vec![rest] } else { rest.split(|byte| *byte == 0).collect() };
    for report in reports {
        let before = relay.newest();
        let lines = report.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).count() as u64;
        let lost = if kind & 2 == 0 { 1 } else { u64::MAX };
        match relay.take(NODE, report, lost, lost) {
            Ok(()) => assert_eq!(relay.newest(), before + lines, "a line is missing"),
            Err(error) => {
                assert_eq!(relay.newest(), before, "a part was taken");
                assert!(error.to_string().starts_with("events: line "), "{error}");
            }
        }
    }
    let (kept, mark) = relay.since(0, usize::MAX);
    assert_eq!(mark.next, relay.newest());
    let size: usize = kept.iter().map(|(_, line)| line.len()).sum();
    assert!(size <= BYTES, "{size} bytes are kept");
    for (_, line) in &kept {
        let flow: Flow = serde_json::from_slice(line).expect("what was taken is an event");
        assert_eq!(flow.node, NODE);
    }
    let (newest, _) = relay.until(None, 1);
    assert_eq!(newest.last().map(|(n, _)| *n), kept.last().map(|(n, _)| *n));
    for edge in relay.graph(u64::MAX, SPAN).into_iter().chain(relay.graph(0, u64::MAX)) {
        assert!(edge.p50_us <= edge.p99_us, "{edge:?}");
    }
});
