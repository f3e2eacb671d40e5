//! Tells the control plane which pods are under capture, so that it announces them as reachable by HBONE only then; and
//! hears from it which pods of this node are whose.
//!
//! Istio's control plane does not know this service and announces by annotation; then there is nobody to tell or to ask.

use std::sync::Arc;

use mesh_core::xds::channel::ControlPlane;
use mesh_core::xds::proto::node::EnrolmentReport;
use mesh_core::xds::proto::node::node_service_client::NodeServiceClient;
use tokio::sync::watch;
use tonic::Request;

use super::assign::{Assigned, Assignment};
use super::attempts::{Attempts, Ended};

/// The newest report; none until the agent has looked at its pods. An empty one would say that nothing is captured
/// any more, while an agent that was restarted has not taken its pods over yet.
pub type Newest = Option<EnrolmentReport>;

/// Sends the newest report on every connection and on every change, until the agent drains: then a successor reports.
/// What the control plane tells of this node's pods goes to `assigned`, and stays there while it is away.
pub async fn run(server: &ControlPlane, reports: watch::Receiver<Newest>, assigned: watch::Sender<Assigned>) {
    let mut attempts = Attempts::default();
    loop {
        let ended = stream(server, reports.clone(), &assigned).await;
        if reports.has_changed().is_err() {
            return;
        }
        if ended.as_ref().is_err_and(Ended::is_not_offered) {
            assigned.send_replace(Assigned::NotOffered);
        }
        server.again.sleep(attempts.after("enrolment reports", &ended)).await;
    }
}

async fn stream(
    server: &ControlPlane,
    mut reports: watch::Receiver<Newest>,
    assigned: &watch::Sender<Assigned>,
) -> Result<(), Ended> {
    let channel = server.connect().await?;
    let (sender, mut queue) = tokio::sync::mpsc::channel(1);
    let outgoing = futures_util::stream::poll_fn(move |cx| queue.poll_recv(cx));
    let mut request = Request::new(outgoing);
    server.authorize(request.metadata_mut())?;
    let first = reports.borrow_and_update().clone();
    let mut client = NodeServiceClient::new(channel);
    if let Some(first) = first {
        // The queue holds one and is empty.
        let _ = sender.try_send(first);
    }
    let mut acks = client.report_enrolment(request).await?.into_inner();
    server.again.now();
    loop {
        tokio::select! {
            ack = acks.message() => {
                let Some(ack) = ack? else { return Ok(()) };
                if let Some(assignment) = Assignment::read(ack) {
                    assigned.send_replace(Assigned::Known(Arc::new(assignment)));
                }
            }
            changed = reports.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                let newest = reports.borrow_and_update().clone();
                let Some(report) = newest else { continue };
                if sender.send(report).await.is_err() {
                    return Ok(());
                }
            }
        }
    }
}
