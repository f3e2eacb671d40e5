//! What this replica takes over from another one.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_core::xds::channel::{ChannelError, ControlPlane};
use mesh_core::xds::proto::node::replica_service_client::ReplicaServiceClient;
use mesh_core::xds::proto::node::{
    ObjectProgress, ObjectVersion, ReplicaHello, ReplicaNews, ReplicaObjects, ReplicaQuestion,
};
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};
use tracing::{debug, info, warn};

use super::{LARGEST_MESSAGE, Settings, Told};
use crate::enrol::Report;
use crate::relay::questions::{Answer, LARGEST};

/// From one attempt to the next, up to [`LONGEST`].
const FIRST: Duration = Duration::from_millis(200);
const LONGEST: Duration = Duration::from_secs(5);

/// Why a replica cannot be followed.
#[derive(Debug, thiserror::Error)]
pub(super) enum FollowError {
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("{0}")]
    Status(Box<Status>),
    #[error("it ended the stream")]
    Ended,
}

impl From<Status> for FollowError {
    fn from(status: Status) -> Self {
        Self::Status(Box::new(status))
    }
}

/// One other replica.
#[derive(Debug)]
pub(super) struct Client {
    name: String,
    server: ControlPlane,
    told: Told,
}

/// A replica that can be asked.
#[derive(Debug, Clone)]
pub struct Remote {
    server: ControlPlane,
    channel: Channel,
}

impl Remote {
    /// What an agent answers that is connected there.
    pub async fn ask(&self, node: &str, target: &str) -> Option<Answer> {
        let mut request = Request::new(ReplicaQuestion { node: node.to_owned(), target: target.to_owned() });
        self.server.authorize(request.metadata_mut()).ok()?;
        let answered = ReplicaServiceClient::new(self.channel.clone()).ask(request).await;
        let answered = answered.inspect_err(|status| debug!(node, %status, "another replica cannot ask"));
        let mut pieces = answered.ok()?.into_inner();
        let mut body = Vec::new();
        while let Ok(Some(piece)) = pieces.message().await {
            body.extend_from_slice(&piece.body);
            if body.len() > LARGEST {
                return None;
            }
            if !piece.more {
                let status = u16::try_from(piece.status).unwrap_or(502);
                return Some(Answer { status, content_type: piece.content_type, body });
            }
        }
        None
    }
}

impl Remote {
    /// How many of its proxies have versions of objects, in their order.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn progress(&self, objects: Vec<ObjectVersion>) -> Result<Vec<ObjectProgress>, Status> {
        let mut request = Request::new(ReplicaObjects { objects });
        let unable = |error: ChannelError| Status::unauthenticated(error.to_string());
        self.server.authorize(request.metadata_mut()).map_err(unable)?;
        let client = ReplicaServiceClient::new(self.channel.clone());
        let answer = client.max_decoding_message_size(LARGEST_MESSAGE).progress(request).await?;
        Ok(answer.into_inner().objects)
    }
}

impl Client {
    pub(super) fn new(settings: &Settings, name: &str, address: SocketAddr, told: Told) -> Self {
        let server = ControlPlane {
            address: format!("https://{address}"),
            root_cert: Some(settings.roots.clone()),
            server_name: Some(format!("istiod.{}.svc", settings.namespace)),
            token: Some(settings.token.clone()),
            ..ControlPlane::default()
        };
        Self { name: name.to_owned(), server, told }
    }

    #[cfg(test)]
    pub(super) fn of(name: &str, server: ControlPlane, told: Told) -> Self {
        Self { name: name.to_owned(), server, told }
    }

    /// Takes over what it knows now: how many reports there were.
    pub(super) async fn first(&self) -> Result<usize, FollowError> {
        let (mut news, _) = self.open().await?;
        let first = news.message().await?.ok_or(FollowError::Ended)?;
        let reports = first.reports.len();
        self.reports(first);
        Ok(reports)
    }

    /// Follows it until this is aborted.
    pub(super) async fn run(self) {
        let mut failures = 0_u32;
        loop {
            match self.follow(&mut failures).await {
                Ok(()) | Err(FollowError::Ended) => {}
                // A replica that starts, or ends, is not there; that is no news.
                // One of an earlier version does not tell.
                Err(FollowError::Status(status)) if status.code() == Code::Unimplemented => {}
                Err(error) if failures < 3 => debug!(replica = self.name, %error, "another replica"),
                Err(error) => warn!(replica = self.name, %error, "another replica cannot be followed"),
            }
            self.told.agents.forget(&self.name);
            let wait = (FIRST * (1 << failures.min(6))).min(LONGEST);
            failures = failures.saturating_add(1);
            tokio::time::sleep(wait.mul_f64(0.8 + 0.4 * fastrand::f64())).await;
        }
    }

    async fn open(&self) -> Result<(Streaming<ReplicaNews>, Remote), FollowError> {
        let channel = self.server.connect().await?;
        let mut request = Request::new(ReplicaHello {});
        self.server.authorize(request.metadata_mut())?;
        let client = ReplicaServiceClient::new(channel.clone());
        let news = client.max_decoding_message_size(LARGEST_MESSAGE).follow(request).await?;
        Ok((news.into_inner(), Remote { server: self.server.clone(), channel }))
    }

    async fn follow(&self, failures: &mut u32) -> Result<(), FollowError> {
        let (mut news, remote) = self.open().await?;
        *failures = 0;
        info!(replica = self.name, "follows another replica");
        while let Some(mut one) = news.message().await? {
            if let Some(answering) = one.answering.take() {
                self.told.agents.elsewhere(&self.name, answering.nodes, remote.clone());
            }
            if let Some(flows) = one.flows.take()
                && let Err(error) =
                    self.told.relay.take_over(&flows.node, &flows.events, flows.held_back, flows.lost)
            {
                debug!(replica = self.name, %error, "events of another replica");
            }
            self.reports(one);
        }
        Ok(())
    }

    fn reports(&self, news: ReplicaNews) {
        for one in news.reports {
            if let Some(report) = one.report {
                let learnt = Report { at_us: one.at_us, ..Report::of(report.pods) };
                self.told.enrolments.learn(report.node, learnt);
            }
        }
    }
}
