//! Figures of connections that the kernel carries, told as the tunnel's are: the same metrics by both reporters, the same
//! log lines (marked `path=fast`), principals from the kernel's attestation, and never `mutual_tls`. What dry-run policies
//! would have done is told once a connection is seen to be established.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_core::error::Code;
use mesh_core::flows::ConnectionId;
use mesh_core::state::Workload;
use mesh_core::telemetry::{
    Connection, DryRunCounters, Failure, HandleCache, Opened, Peer, Recorder, Reporter, SecurityPolicy,
    Telemetry, infer_service,
};

use super::judge::Judge;
use super::pair_of;
use crate::capture::{FlowFigures, FlowState};

/// One connection: a recorder per reporter, and what they have been told.
struct Tracked {
    recorders: [Recorder; 2],
    sent: u64,
    received: u64,
}

/// The connections that are being told about.
pub struct Flows {
    tracked: HashMap<u64, Tracked>,
    handles: HandleCache,
    dry_run: DryRunCounters,
    /// Connections that an earlier agent has told about: their bytes up to the first look are not counted again.
    looked: bool,
}

impl Flows {
    /// None yet; results of dry-run policies are counted by `dry_run`.
    #[must_use]
    pub fn new(dry_run: DryRunCounters) -> Self {
        Self { tracked: HashMap::new(), handles: HandleCache::default(), dry_run, looked: false }
    }

    /// Takes the figures of this moment (CLOCK_MONOTONIC `now_ns`): opens, adds, closes.
    pub fn update(&mut self, flows: &[FlowFigures], now_ns: u64, telemetry: &Telemetry, judge: &Judge<'_>) {
        let inherited = !std::mem::replace(&mut self.looked, true);
        let mut present = HashSet::with_capacity(flows.len());
        for flow in flows {
            present.insert(flow.id);
            if matches!(flow.state, FlowState::Opening | FlowState::Failed) {
                continue;
            }
            if !self.tracked.contains_key(&flow.id)
                && let Some((source, destination)) = judge.ends(&pair_of(flow))
            {
                let opened = opened(flow, now_ns, judge, source, destination);
                let recorders = opened.map(|opened| telemetry.open(&mut self.handles, opened));
                if !inherited {
                    self.would(flow, judge);
                }
                let (sent, received) =
                    if inherited { (flow.bytes_sent, flow.bytes_received) } else { (0, 0) };
                self.tracked.insert(flow.id, Tracked { recorders, sent, received });
            }
            if let Some(tracked) = self.tracked.get_mut(&flow.id) {
                tracked.add(flow);
            }
            if flow.state == FlowState::Closed {
                self.finish(flow.id, None);
            }
        }
        let gone: Vec<u64> = self.tracked.keys().filter(|id| !present.contains(id)).copied().collect();
        gone.into_iter().for_each(|id| self.finish(id, None));
    }

    fn would(&mut self, flow: &FlowFigures, judge: &Judge<'_>) {
        for would in judge.dry_run(&pair_of(flow)) {
            self.dry_run.count(&would);
            tracing::info!(src = %flow.client, dst = %flow.server, path = "fast", "{would}");
        }
    }

    /// Whether there is nothing to tell about.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.looked && self.tracked.is_empty()
    }

    /// A connection was destroyed because policy no longer allows it.
    pub fn denied(&mut self, flow: &FlowFigures) {
        let failure = Failure::new(Code::PolicyChanged, "connection closed due to policy change");
        self.finish(flow.id, Some(&failure));
    }

    /// The connections go on; from now on a successor tells about them.
    pub fn hand_over(&mut self) {
        let ids: Vec<u64> = self.tracked.keys().copied().collect();
        ids.into_iter().for_each(|id| self.finish(id, None));
    }

    fn finish(&mut self, id: u64, failure: Option<&Failure>) {
        if let Some(tracked) = self.tracked.remove(&id) {
            tracked.recorders.into_iter().for_each(|recorder| recorder.finish(failure.cloned()));
        }
    }
}

impl Tracked {
    fn add(&mut self, flow: &FlowFigures) {
        let (sent, received) =
            (flow.bytes_sent.saturating_sub(self.sent), flow.bytes_received.saturating_sub(self.received));
        for recorder in &self.recorders {
            recorder.add_received(sent);
            recorder.add_sent(received);
        }
        (self.sent, self.received) = (self.sent + sent, self.received + received);
    }
}

fn opened(
    flow: &FlowFigures,
    now_ns: u64,
    judge: &Judge<'_>,
    source: &Arc<Workload>,
    destination: &Arc<Workload>,
) -> [Opened; 2] {
    let age = Duration::from_nanos(now_ns.saturating_sub(flow.opened_ns));
    let started = Instant::now().checked_sub(age).unwrap_or_else(Instant::now);
    let inferred = infer_service(judge.state, destination, flow.server.port(), None);
    [Reporter::Source, Reporter::Destination].map(|reporter| Opened {
        id: ConnectionId::of(flow.opened_ns, flow.client),
        connection: Connection {
            reporter,
            source: Peer::Workload(Arc::clone(source)),
            source_identity: Some(source.identity.clone()),
            destination: Peer::Workload(Arc::clone(destination)),
            destination_identity: None,
            // The source reporter says what was addressed, which is the pod.
            service: inferred.clone().filter(|_| reporter == Reporter::Destination),
            security: SecurityPolicy::Unknown,
        },
        started,
        source: flow.client,
        destination: flow.server,
        hbone_target: None,
        fast_path: true,
    })
}
