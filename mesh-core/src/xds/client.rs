//! The configuration client: keeps a delta ADS stream open and hands what comes to a [`Handler`].
//!
//! A control plane that vanishes, refuses or talks nonsense costs nothing but news: what was received stays in force
//! for as long as it takes.

mod backoff;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::SystemTime;

use prost_types::value::Kind;
use prost_types::{Struct, Value};
use tokio::sync::{mpsc, watch};
use tonic::{Request, Streaming};

use self::backoff::{Backoff, End};
use super::channel::{ChannelError, ControlPlane, causes};
use super::delta::{DeltaState, Handler, Received};
use super::proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use super::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node};
use super::proto::security::Authorization;
use super::proto::workload::Address;
use crate::state::{MeshState, StateIndex};
use crate::telemetry::{NodeMetrics, TerminationReason, UrlLabels};

/// A full state of a large mesh must fit into one message.
const MAX_MESSAGE: usize = 200 << 20;
/// Rejections that the status keeps.
const REMEMBERED: usize = 20;

/// A [`Handler`] that keeps a [`StateIndex`] and hands out a snapshot after every response.
#[derive(Debug)]
pub struct Feed<F> {
    /// The model.
    pub index: StateIndex,
    /// Takes the snapshot, and whether every type has been answered once.
    pub publish: F,
}

impl<F: FnMut(Arc<MeshState>, bool)> Handler for Feed<F> {
    fn address(&mut self, name: &str, address: &Address) -> Result<(), String> {
        self.index.apply_address(name, address).map_err(|error| error.to_string())
    }

    fn remove_address(&mut self, name: &str) {
        self.index.remove_address(name);
    }

    fn policy(&mut self, _name: &str, policy: &Authorization) -> Result<(), String> {
        self.index.apply_policy(policy).map_err(|error| error.to_string())
    }

    fn remove_policy(&mut self, name: &str) {
        self.index.remove_policy(name);
    }

    fn commit(&mut self, synced: bool) {
        (self.publish)(self.index.snapshot(), synced);
    }
}

/// What asks; the first part of its id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NodeKind {
    /// An agent of a node. It says `ztunnel`: that is the kind of node that the workload API is served to.
    #[default]
    Agent,
    /// A waypoint.
    Waypoint,
}

impl NodeKind {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Agent => "ztunnel",
            Self::Waypoint => "waypoint",
        }
    }
}

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeDescription {
    /// What it is.
    pub kind: NodeKind,
    /// Address of the node or of the agent's pod; Istio's control plane wants a valid one.
    pub ip: String,
    /// Name of the agent's pod, or of the node where the agent runs as a plain process.
    pub name: String,
    /// Namespace of the agent.
    pub namespace: String,
    /// Name of the node.
    pub node: String,
    /// Further metadata, such as `CLUSTER_ID` and `NETWORK`.
    pub metadata: BTreeMap<String, String>,
}

impl NodeDescription {
    /// The wire form.
    #[must_use]
    pub fn to_node(&self) -> Node {
        let Self { kind, ip, name, namespace, node, metadata } = self;
        let ip = if ip.is_empty() { "1.1.1.1" } else { ip };
        let own = [("NAME", name), ("NAMESPACE", namespace), ("NODE_NAME", node)];
        let mut fields: BTreeMap<String, Value> =
            metadata.iter().map(|(key, value)| (key.clone(), string(value))).collect();
        fields.extend(own.into_iter().map(|(key, value)| (key.to_owned(), string(value))));
        fields.insert("INSTANCE_IPS".to_owned(), string(ip));
        Node {
            id: format!("{}~{ip}~{name}.{namespace}~{namespace}.svc.cluster.local", kind.as_str()),
            cluster: String::new(),
            metadata: Some(Struct { fields }),
        }
    }
}

fn string(text: &str) -> Value {
    Value { kind: Some(Kind::StringValue(text.to_owned())) }
}

/// How the client is doing; for readiness and status.
#[derive(Debug, Clone, Default)]
pub struct Status {
    /// A stream is open and has been answered.
    pub connected: bool,
    /// Every type has been answered once: there is a state to serve.
    pub synced: bool,
    /// When the last response came.
    pub last_response: Option<SystemTime>,
    /// Why the last stream failed; empty while one is open.
    pub last_error: String,
    /// The latest rejections that still hold, oldest first: neither accepted, removed nor left away since.
    pub rejected: Vec<Rejection>,
    /// How many resources are held.
    pub held: usize,
}

/// A resource that could not be taken; its last good version stays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// Type URL of the resource.
    pub type_url: String,
    /// Name of the resource.
    pub name: String,
    /// What is wrong with it.
    pub reason: String,
}

/// Runs for ever: connects, subscribes, hands over, reconnects. Drop the future to stop.
pub async fn run(
    server: &ControlPlane,
    node: &NodeDescription,
    mut handler: impl Handler,
    status: &watch::Sender<Status>,
    metrics: Option<&NodeMetrics>,
) -> Infallible {
    let mut state = DeltaState::with_further(node.to_node(), handler.further_types());
    let mut backoff = Backoff::default();
    let mut got = Got::default();
    loop {
        got.answered = false;
        let ended = stream(server, &mut state, &mut handler, status, metrics, &mut got).await;
        let answered = got.answered;
        if answered {
            backoff.reset();
            got.opened = false;
        }
        if let Some(metrics) = metrics {
            metrics.xds_terminations.get_or_create(&ended.reason()).inc();
        }
        let wait = backoff.after(&ended, answered);
        let text = ended.to_string();
        match ended {
            End::Complete | End::Reconnect(_) if answered => {
                tracing::debug!("xds: {text}; again in {wait:?}")
            }
            _ => tracing::warn!("xds: {text}; again in {wait:?}, serving what is known"),
        }
        status.send_modify(|status| {
            status.connected = false;
            status.last_error = text;
        });
        server.again.sleep(wait).await;
    }
}

/// How far streams have got.
#[derive(Debug, Default)]
struct Got {
    /// The present one was answered.
    answered: bool,
    /// One was opened since the last that was answered.
    opened: bool,
}

/// One stream, from connecting to its end.
async fn stream(
    server: &ControlPlane,
    state: &mut DeltaState,
    handler: &mut impl Handler,
    status: &watch::Sender<Status>,
    metrics: Option<&NodeMetrics>,
    got: &mut Got,
) -> End {
    let (requests, mut responses) = match open(server, state).await {
        Ok(opened) => opened,
        Err(end) => return end,
    };
    // Its answer may wait for what others of this process have to say.
    if !std::mem::replace(&mut got.opened, true) {
        server.again.now();
    }
    let mut seen = BTreeSet::new();
    loop {
        let response = match responses.message().await {
            Ok(Some(response)) => response,
            Ok(None) => return End::Complete,
            Err(status) => return End::of_status(&status),
        };
        let bytes = prost::Message::encoded_len(&response);
        let first = seen.insert(response.type_url.clone());
        let overtaken = overtaken(&status.borrow().rejected, &response, first);
        let received = state.receive(response, handler);
        if !std::mem::replace(&mut got.answered, true) {
            server.again.now();
        }
        if let (Some(metrics), Some(url)) = (metrics, received.type_url) {
            metrics.xds_messages.get_or_create(&UrlLabels(url)).inc();
            metrics.xds_message_bytes.get_or_create(&UrlLabels(url)).inc_by(bytes as u64);
        }
        report(state, &received, &overtaken, status);
        if requests.send(received.answer).await.is_err() {
            return End::Complete;
        }
    }
}

async fn open(
    server: &ControlPlane,
    state: &DeltaState,
) -> Result<(mpsc::Sender<DeltaDiscoveryRequest>, Streaming<DeltaDiscoveryResponse>), End> {
    let channel = server.connect().await.map_err(End::of_channel)?;
    // The initial requests, and one answer per response: the server waits for answers no more than we do.
    let initial = state.initial_requests();
    let (requests, mut queue) = mpsc::channel(initial.len() + 6);
    for request in initial {
        if requests.send(request).await.is_err() {
            return Err(End::Complete);
        }
    }
    let outgoing = futures_util::stream::poll_fn(move |cx| queue.poll_recv(cx));
    let mut request = Request::new(outgoing);
    server.authorize(request.metadata_mut()).map_err(End::of_channel)?;
    let mut client = AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
    let response = client.delta_aggregated_resources(request).await.map_err(|s| End::of_status(&s))?;
    Ok((requests, response.into_inner()))
}

/// Which remembered rejections a response overtakes: of the resources that it carries or removes, and with the `first`
/// response of a type on a stream of all of that type, since what is still wrong is not held and is sent again.
fn overtaken(known: &[Rejection], response: &DeltaDiscoveryResponse, first: bool) -> Vec<Rejection> {
    let named = |name: &str| {
        response.resources.iter().any(|resource| resource.name == name)
            || response.removed_resources.iter().any(|removed| removed == name)
    };
    let over = |r: &&Rejection| r.type_url == response.type_url && (first || named(&r.name));
    known.iter().filter(over).cloned().collect()
}

fn report(state: &DeltaState, received: &Received, overtaken: &[Rejection], status: &watch::Sender<Status>) {
    for (name, reason) in received.rejected.iter().take(REMEMBERED) {
        tracing::warn!("xds: rejected {name}: {reason}");
    }
    let Received { type_url, applied, removed, .. } = received;
    tracing::debug!("xds: {}: {applied} updated, {removed} removed", type_url.unwrap_or("unknown type"));
    status.send_modify(|status| {
        status.connected = true;
        status.synced = state.is_synced();
        status.last_response = Some(SystemTime::now());
        status.last_error.clear();
        status.held = state.held();
        status.rejected.retain(|rejection| !overtaken.contains(rejection));
        let type_url = &received.answer.type_url;
        status.rejected.extend(received.rejected.iter().take(REMEMBERED).map(|(name, reason)| Rejection {
            type_url: type_url.clone(),
            name: name.clone(),
            reason: reason.clone(),
        }));
        let surplus = status.rejected.len().saturating_sub(REMEMBERED);
        status.rejected.drain(..surplus);
    });
}

impl End {
    fn of_channel(error: ChannelError) -> Self {
        Self::Unreachable(error.to_string())
    }

    fn of_status(status: &tonic::Status) -> Self {
        use tonic::Code;
        let text = format!("{:?}: {}", status.code(), describe(status));
        let closing = text.contains("transport is closing") || text.to_ascii_lowercase().contains("goaway");
        match status.code() {
            Code::Unknown | Code::Cancelled | Code::DeadlineExceeded => Self::Reconnect(text),
            Code::Unavailable if closing => Self::Reconnect(text),
            _ => Self::Failed(text),
        }
    }

    fn reason(&self) -> TerminationReason {
        match self {
            Self::Complete => TerminationReason::Complete,
            Self::Reconnect(_) => TerminationReason::Reconnect,
            Self::Failed(_) => TerminationReason::Error,
            Self::Unreachable(_) => TerminationReason::ConnectionError,
        }
    }
}

fn describe(status: &tonic::Status) -> String {
    match std::error::Error::source(status) {
        Some(source) => format!("{}: {}", status.message(), causes(source)),
        None => status.message().to_owned(),
    }
}
