//! Sends the control plane what tracing tells, so that who asks it sees the whole mesh.
//!
//! The control plane says how much it wants. What it does not take in time is counted and forgotten: this task reads the
//! same ring as the admin endpoint, and nobody waits for it. A control plane without the service (Istio's) is asked again
//! now and then.

use std::sync::Arc;
use std::time::Duration;

use mesh_core::flows;
use mesh_core::xds::channel::ControlPlane;
use mesh_core::xds::proto::node::node_service_client::NodeServiceClient;
use mesh_core::xds::proto::node::{FlowDemand, FlowReport};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use tonic::{Request, Streaming};

use super::attempts::{Attempts, Ended};
use crate::trace::Tracer;

/// Events that come this close after the first go with it.
const TOGETHER: Duration = Duration::from_millis(200);
/// Nobody is owed more than this of what was not used.
const SAVED: Duration = Duration::from_secs(1);

/// How many events may go now: what was not used is saved for a second, and no longer.
#[derive(Debug)]
struct Budget {
    per_second: u32,
    saved: f64,
    at: Instant,
}

impl Budget {
    fn new(per_second: u32, now: Instant) -> Self {
        Self { per_second, saved: f64::from(per_second), at: now }
    }

    /// What may go at a moment.
    fn now(&mut self, now: Instant) -> usize {
        let earned = now.duration_since(self.at).as_secs_f64() * f64::from(self.per_second);
        let most = f64::from(self.per_second) * SAVED.as_secs_f64();
        self.saved = (self.saved + earned).min(most);
        self.at = now;
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and a u32")]
        let whole = self.saved as usize;
        whole
    }

    fn spend(&mut self, events: usize) {
        self.saved -= events as f64;
    }
}

/// Sends for as long as the agent traces.
pub async fn run(server: &ControlPlane, tracer: Arc<Tracer>) {
    // What was told before the control plane was there is told once it is.
    let mut since = 0;
    let mut attempts = Attempts::default();
    loop {
        let ended = stream(server, &tracer, &mut since).await;
        server.again.sleep(attempts.after("taking events of connections", &ended)).await;
    }
}

async fn stream(server: &ControlPlane, tracer: &Tracer, since: &mut u64) -> Result<(), Ended> {
    let channel = server.connect().await?;
    // One report waits at most: a control plane that does not read costs events, not memory.
    let (sender, mut queue) = mpsc::channel(1);
    let mut request = Request::new(futures_util::stream::poll_fn(move |cx| queue.poll_recv(cx)));
    server.authorize(request.metadata_mut())?;
    let answer = NodeServiceClient::new(channel).report_flows(request).await?;
    let mut demands: Streaming<FlowDemand> = answer.into_inner();
    let mut budget = Budget::new(0, Instant::now());
    let mut first = true;
    loop {
        let wanted = budget.per_second > 0;
        tokio::select! {
            demand = demands.message() => match demand? {
                Some(demand) => {
                    budget = Budget::new(demand.per_second, Instant::now());
                    if std::mem::take(&mut first) {
                        server.again.now();
                    }
                }
                None => return Ok(()),
            },
            () = tracer.flows().after(*since), if wanted => {
                sleep(TOGETHER).await;
                let most = budget.now(Instant::now());
                let (events, taken) = tracer.take(*since, most);
                *since = taken.next;
                budget.spend(events.len());
                let report = FlowReport {
                    node: tracer.flows().node().to_owned(),
                    events: flows::lines(&events),
                    held_back: taken.held_back,
                    lost: tracer.counted().lost,
                };
                if sender.send(report).await.is_err() {
                    return Ok(());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_sends_what_was_asked_for_in_a_second_and_saves_no_more_than_that() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut budget = Budget::new(100, start);
        assert_eq!(budget.now(start), 100);
        budget.spend(100);
        assert_eq!(budget.now(start), 0);
        assert_eq!(budget.now(at(200)), 20);
        budget.spend(20);
        assert_eq!(budget.now(at(60_000)), 100, "a quiet minute is no leave for a flood");
        assert_eq!(Budget::new(0, start).now(at(9_000)), 0);
    }
}
