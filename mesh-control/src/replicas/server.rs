//! What this replica tells the others.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_core::xds::proto::node::replica_service_server::ReplicaService;
use mesh_core::xds::proto::node::{
    AnsweringNodes, EnrolmentReport, NodeAnswer, ReplicaHello, ReplicaNews, ReplicaObjects, ReplicaProgress,
    ReplicaQuestion, ReplicaReport,
};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use tracing::{info, warn};

use super::{Proxies, Told};
use crate::auth::Access;
use crate::model::Key;

/// Pieces of an answer that wait to be sent.
const QUEUE: usize = 4;
/// A piece of an answer.
const PIECE: usize = 64 << 10;

/// The service.
#[derive(Debug, Clone)]
pub struct ReplicaServer {
    /// What it tells.
    pub told: Told,
    /// What the proxies that are connected here have.
    pub proxies: Arc<Proxies>,
    /// Who asks.
    pub access: Access,
    /// The service account of all replicas.
    pub account: Key,
}

impl ReplicaServer {
    /// Refuses everybody but replicas.
    async fn replica<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let caller = self.access.caller(request.metadata()).await?;
        let account = caller.map(|caller| Key::new(&caller.namespace, &caller.service_account));
        match account {
            Some(account) if account == self.account => Ok(()),
            account => {
                let account = account.map(|account| account.to_string());
                warn!(account, "asks as a replica of the control plane and is none");
                Err(Status::permission_denied("only a replica of the control plane is told"))
            }
        }
    }
}

#[tonic::async_trait]
impl ReplicaService for ReplicaServer {
    type FollowStream = ReceiverStream<Result<ReplicaNews, Status>>;

    async fn follow(&self, request: Request<ReplicaHello>) -> Result<Response<Self::FollowStream>, Status> {
        self.replica(&request).await?;
        let (out, stream) = mpsc::channel(1);
        tokio::spawn(tell(self.told.clone(), out));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    type AskStream = ReceiverStream<Result<NodeAnswer, Status>>;

    async fn ask(&self, request: Request<ReplicaQuestion>) -> Result<Response<Self::AskStream>, Status> {
        self.replica(&request).await?;
        let ReplicaQuestion { node, target } = request.into_inner();
        let answer = self.told.agents.ask_here(&node, &target).await;
        let answer = answer.map_err(|error| Status::unavailable(error.to_string()))?;
        let (out, stream) = mpsc::channel(QUEUE);
        tokio::spawn(async move {
            let mut rest = answer.body.as_slice();
            loop {
                let (body, after) = rest.split_at(rest.len().min(PIECE));
                rest = after;
                let piece = NodeAnswer {
                    id: 0,
                    status: answer.status.into(),
                    content_type: answer.content_type.clone(),
                    body: body.to_vec(),
                    more: !rest.is_empty(),
                };
                if out.send(Ok(piece)).await.is_err() || rest.is_empty() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn progress(&self, request: Request<ReplicaObjects>) -> Result<Response<ReplicaProgress>, Status> {
        self.replica(&request).await?;
        let objects = self.proxies.have(&request.into_inner().objects);
        Ok(Response::new(ReplicaProgress { objects }))
    }
}

/// Tells one replica until it goes.
async fn tell(told: Told, out: mpsc::Sender<Result<ReplicaNews, Status>>) {
    let mut sent: BTreeMap<String, u64> = BTreeMap::new();
    let (mut reports, mut agents) = (told.enrolments.changes(), told.agents.changes());
    let mut flows = told.relay.told();
    let mut first = true;
    info!("another replica follows");
    loop {
        let changed = agents.has_changed().unwrap_or_default();
        agents.mark_unchanged();
        reports.mark_unchanged();
        let news = ReplicaNews {
            reports: newer(&told, &mut sent),
            answering: (first || changed).then(|| AnsweringNodes { nodes: told.agents.here() }),
            flows: None,
        };
        let anything = first || changed || !news.reports.is_empty();
        first = false;
        if anything && out.send(Ok(news)).await.is_err() {
            break;
        }
        tokio::select! {
            changed = reports.changed() => if changed.is_err() { break },
            changed = agents.changed() => {
                if changed.is_err() { break }
                agents.mark_changed();
            }
            report = flows.recv() => {
                let flows = match report {
                    Ok(report) => Some(report),
                    // It reads too slowly, and misses some.
                    Err(RecvError::Lagged(_)) => None,
                    Err(RecvError::Closed) => break,
                };
                let news = ReplicaNews { flows, ..ReplicaNews::default() };
                if news.flows.is_some() && out.send(Ok(news)).await.is_err() {
                    break;
                }
            }
            () = out.closed() => break,
        }
    }
    info!("another replica follows no longer");
}

/// Reports that have not been sent.
fn newer(told: &Told, sent: &mut BTreeMap<String, u64>) -> Vec<ReplicaReport> {
    let mut out = Vec::new();
    for (node, report) in told.enrolments.reports() {
        if sent.get(&node).is_none_or(|at| *at < report.at_us) {
            sent.insert(node.clone(), report.at_us);
            let (at_us, pods) = (report.at_us, report.pods());
            out.push(ReplicaReport { report: Some(EnrolmentReport { node, pods }), at_us });
        }
    }
    out
}
