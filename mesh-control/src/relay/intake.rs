//! A node's stream of events: asked for so much in a second, taken as fast as it comes.

use std::sync::Arc;

use mesh_core::xds::proto::node::{FlowDemand, FlowReport};
use tokio::sync::mpsc;
use tonic::{Status, Streaming};
use tracing::{debug, info, warn};

use super::ring::Relay;

/// Takes what one node tells until it goes, or tells of another. `node` is what its token says.
pub async fn follow(
    relay: Arc<Relay>,
    node: String,
    mut reports: Streaming<FlowReport>,
    out: mpsc::Sender<Result<FlowDemand, Status>>,
) {
    let demand = FlowDemand { per_second: relay.limits().per_node };
    if out.send(Ok(demand)).await.is_err() {
        return;
    }
    info!(node, "sends events");
    let here = relay.here(&node);
    let ended = loop {
        let report = match reports.message().await {
            Ok(Some(report)) => report,
            Ok(None) => break None,
            Err(status) => {
                debug!(%status, "a stream of events ended");
                break None;
            }
        };
        if let Err(status) = take(&relay, &node, &report) {
            break Some(status);
        }
        relay.tell(report);
    };
    drop(here);
    info!(node, "sends no events any more");
    if let Some(status) = ended {
        warn!(node, %status, "events refused");
        // The node may be gone, which is as good.
        let _ = out.send(Err(status)).await;
    }
}

fn take(relay: &Relay, node: &str, report: &FlowReport) -> Result<(), Status> {
    if report.node != node {
        return Err(Status::permission_denied(format!(
            "node: {:?} is not the sender, {node:?}; a node tells of itself only",
            report.node
        )));
    }
    relay
        .take(node, &report.events, report.held_back, report.lost)
        .map_err(|error| Status::invalid_argument(error.to_string()))
}
