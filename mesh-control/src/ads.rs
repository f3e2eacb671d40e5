//! The delta ADS server: one task per stream, which compares what its client holds with the newest snapshot.
//!
//! A stream sends only while its bounded queue has room, and then whatever is newest: a slow client skips
//! intermediate snapshots and delays nobody.

pub mod convergence;
pub mod service;
pub mod snapshot;
pub mod subscription;

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use mesh_core::xds::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node};
use prost_types::value::Kind;
use serde::Serialize;
use tokio::sync::mpsc;
use tonic::{Request, Status, Streaming};
use tracing::{debug, info, warn};

use crate::auth::{Access, Caller};
use crate::hub::{CLOSED, Hub};
use crate::metrics::Metrics;
use crate::model::Key;
use service::Push;
use snapshot::ResourceType;
use subscription::{Reply, Subscription};

/// Responses that may wait for a client.
const QUEUE: usize = 2;
/// Types that are not served and wait for their empty answer.
const MOST_UNKNOWN: usize = 32;
/// A stream ends after this long and up to half as long again, so that clients spread over several replicas; it
/// ends cleanly, so that the client comes back at once.
const STREAM_AGE: Duration = Duration::from_secs(30 * 60);

/// The service.
#[derive(Debug, Clone)]
pub struct AdsServer {
    hub: Arc<Hub>,
    clients: Arc<Clients>,
    access: Access,
    metrics: Arc<Metrics>,
}

impl AdsServer {
    /// A server of the hub's snapshots; `access` says who may subscribe.
    #[must_use]
    pub fn new(hub: Arc<Hub>, clients: Arc<Clients>, access: Access, metrics: Arc<Metrics>) -> Self {
        Self { hub, clients, access, metrics }
    }
}

/// Connected clients, for people.
#[derive(Debug, Default)]
pub struct Clients {
    next: AtomicU64,
    connected: Mutex<BTreeMap<u64, Arc<Mutex<ClientStatus>>>>,
}

/// One connected client.
#[derive(Debug, Clone, Serialize)]
pub struct ClientStatus {
    /// `Node.id`.
    pub id: String,
    /// Id of its cluster.
    pub cluster: String,
    /// Node name.
    pub node: String,
    /// Peer address.
    pub peer: String,
    /// Seconds since 1970.
    pub connected_at: u64,
    /// The newest snapshot of which it was sent everything that it wants.
    pub checked: u64,
    /// By short type name.
    pub types: BTreeMap<&'static str, TypeStatus>,
}

/// One type of one client.
#[derive(Debug, Clone, Default, Serialize)]
pub struct TypeStatus {
    /// Nonce of the last response.
    pub sent: String,
    /// Nonce of the last acknowledgement.
    pub acked: String,
    /// Snapshot that the last response brought it to.
    pub snapshot: u64,
    /// Resources that it holds.
    pub resources: usize,
    /// Rejections so far.
    pub rejects: u64,
    /// The last rejection.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub last_reject: String,
    /// When the last response was sent.
    #[serde(skip)]
    pub sent_at: Option<SystemTime>,
    /// Type URL.
    #[serde(skip)]
    pub url: &'static str,
}

impl ClientStatus {
    /// The newest snapshot of which it acknowledged everything that it wants.
    #[must_use]
    pub fn reached(&self) -> u64 {
        let unanswered =
            self.types.values().filter(|t| t.sent != t.acked).map(|t| t.snapshot.saturating_sub(1));
        unanswered.fold(self.checked, u64::min)
    }
}

/// How many clients have a snapshot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Programmed {
    /// Clients that have acknowledged everything up to it.
    pub current: usize,
    /// How many have not.
    pub waiting: usize,
    /// Ids of the first [`NAMED`] of those.
    pub names: Vec<String>,
    /// What one of those said when it rejected something.
    pub rejected: Option<String>,
}

/// So many clients that wait are named.
const NAMED: usize = 3;

impl Programmed {
    /// Counts those of another replica as well.
    pub fn join(&mut self, other: &Self) {
        self.current += other.current;
        self.waiting += other.waiting;
        let room = NAMED.saturating_sub(self.names.len());
        self.names.extend(other.names.iter().take(room).cloned());
        self.rejected = self.rejected.take().or_else(|| other.rejected.clone());
    }

    /// A client that has not.
    fn wait(&mut self, id: String) {
        self.waiting += 1;
        if self.names.len() < NAMED {
            self.names.push(id);
        }
    }

    /// Nobody has it.
    #[must_use]
    pub fn nobody(clients: &Clients) -> Self {
        let mut out = Self::default();
        clients.list().into_iter().for_each(|client| out.wait(client.id));
        out
    }
}

impl Clients {
    /// Which of the connected clients have acknowledged everything up to a snapshot.
    #[must_use]
    pub fn programmed(&self, snapshot: u64) -> Programmed {
        let mut out = Programmed::default();
        for client in self.list() {
            let late = client.types.values().find(|t| t.sent != t.acked);
            if late.is_none() && client.checked >= snapshot {
                out.current += 1;
                continue;
            }
            let rejection = late.map(|t| t.last_reject.clone()).filter(|r| !r.is_empty());
            out.rejected = out.rejected.or(rejection);
            out.wait(client.id);
        }
        out
    }

    /// The newest snapshot that every connected client has acknowledged (none: nobody is connected), and how many do not
    /// have `newest`.
    #[must_use]
    pub fn reached(&self, newest: u64) -> (Option<u64>, usize) {
        let connected = self.connected.lock().unwrap_or_else(PoisonError::into_inner);
        let all = connected.values().map(|c| c.lock().unwrap_or_else(PoisonError::into_inner).reached());
        all.fold((None, 0), |(least, behind), reached| {
            (
                Some(least.map_or(reached, |least: u64| least.min(reached))),
                behind + usize::from(reached < newest),
            )
        })
    }

    /// All connected clients.
    #[must_use]
    pub fn list(&self) -> Vec<ClientStatus> {
        let connected = self.connected.lock().unwrap_or_else(PoisonError::into_inner);
        connected.values().map(|c| c.lock().unwrap_or_else(PoisonError::into_inner).clone()).collect()
    }

    fn add(&self, status: ClientStatus) -> (u64, Arc<Mutex<ClientStatus>>) {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let status = Arc::new(Mutex::new(status));
        self.connected.lock().unwrap_or_else(PoisonError::into_inner).insert(id, status.clone());
        (id, status)
    }

    /// A client that has everything up to a snapshot.
    #[cfg(test)]
    pub(crate) fn having(&self, id: &str, checked: u64) {
        let (cluster, node, peer) = (String::new(), String::new(), String::new());
        let (connected_at, types) = (0, BTreeMap::new());
        self.add(ClientStatus { id: id.to_owned(), cluster, node, peer, connected_at, checked, types });
    }

    fn remove(&self, id: u64) {
        self.connected.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }
}

type Outgoing = mpsc::Sender<Result<Push, Status>>;

impl AdsServer {
    /// Starts to answer a stream.
    ///
    /// # Errors
    /// The caller may not subscribe.
    async fn open(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<mpsc::Receiver<Result<Push, Status>>, Status> {
        let caller = self.access.caller(request.metadata()).await.inspect_err(|_| {
            self.metrics.authentication_failure();
        })?;
        let peer = crate::server::peer_of(&request);
        let (out, stream) = mpsc::channel(QUEUE);
        let server = self.clone();
        let inbound = request.into_inner();
        tokio::spawn(async move {
            if let Err(status) = server.serve(inbound, &out, caller, peer).await {
                debug!(%status, "xDS stream refused");
                // The client may be gone, which is as good.
                let _ = out.send(Err(status)).await;
            }
        });
        Ok(stream)
    }
}

/// One stream.
struct Stream<'a> {
    server: &'a AdsServer,
    subscriptions: [Subscription; ResourceType::ALL.len()],
    status: Arc<Mutex<ClientStatus>>,
    node: String,
    /// Types that this server does not have and the client asked for: a client that is newer is told that there is
    /// nothing, so that it does not wait for them.
    unknown: VecDeque<String>,
    /// Something may have to be sent.
    dirty: bool,
    /// When it began, and the newest snapshot that it has acknowledged.
    began: Instant,
    reached: u64,
}

impl AdsServer {
    async fn serve(
        &self,
        mut inbound: Streaming<DeltaDiscoveryRequest>,
        out: &Outgoing,
        caller: Option<Caller>,
        peer: Option<SocketAddr>,
    ) -> Result<(), Status> {
        let Some(first) = inbound.message().await? else { return Ok(()) };
        let (id, node) = identify(first.node.as_ref(), caller.as_ref())?;
        let account = caller.as_ref().map(|c| Key::new(&c.namespace, &c.service_account));
        let (number, status) = self.clients.add(ClientStatus {
            id: id.clone(),
            cluster: metadata(first.node.as_ref(), "CLUSTER_ID").unwrap_or_default(),
            node: node.clone(),
            peer: peer.map(|p| p.to_string()).unwrap_or_default(),
            connected_at: seconds(SystemTime::now()),
            checked: 0,
            types: BTreeMap::new(),
        });
        self.metrics.clients.inc();
        let kind = proxy_kind(&id);
        self.metrics.proxies(kind).inc();
        info!(client = id, node, "xDS client connected");
        let stream = Stream {
            server: self,
            subscriptions: ResourceType::ALL.map(|kind| Subscription::of(kind, account.clone())),
            status,
            node: node.clone(),
            unknown: VecDeque::new(),
            dirty: false,
            began: Instant::now(),
            reached: 0,
        };
        let result = stream.run(first, inbound, out).await;
        self.clients.remove(number);
        self.metrics.clients.dec();
        self.metrics.proxies(kind).dec();
        info!(client = id, node, "xDS client gone");
        result
    }
}

impl Stream<'_> {
    async fn run(
        mut self,
        first: DeltaDiscoveryRequest,
        mut inbound: Streaming<DeltaDiscoveryRequest>,
        out: &Outgoing,
    ) -> Result<(), Status> {
        let mut changes = self.server.hub.snapshots();
        self.request(&first)?;
        let age =
            tokio::time::sleep(STREAM_AGE + Duration::from_secs(fastrand::u64(..STREAM_AGE.as_secs() / 2)));
        tokio::pin!(age);
        loop {
            tokio::select! {
                () = &mut age => return Ok(()),
                message = inbound.message() => match message {
                    Ok(Some(request)) => self.request(&request)?,
                    Ok(None) => return Ok(()),
                    // A connection that broke is no failure of ours; the client comes back.
                    Err(status) => {
                        debug!(%status, "xDS stream ended");
                        return Ok(());
                    }
                },
                changed = changes.changed() => match changed {
                    Ok(()) if *changes.borrow_and_update() != CLOSED => self.dirty = true,
                    _ => return Err(Status::unavailable("the control plane is stopping")),
                },
                permit = out.reserve(), if self.dirty => match permit {
                    Ok(permit) => match self.next_response() {
                        Some(response) => permit.send(Ok(response)),
                        None => self.dirty = false,
                    },
                    Err(_) => return Ok(()),
                },
            }
        }
    }

    fn request(&mut self, request: &DeltaDiscoveryRequest) -> Result<(), Status> {
        let Some(kind) = ResourceType::from_url(&request.type_url) else {
            return self.unknown_type(request);
        };
        let reply = self.subscriptions[kind as usize].request(request, &self.node);
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        let status = status.types.entry(kind.short()).or_default();
        let metrics = &self.server.metrics;
        match reply {
            Reply::None => {}
            Reply::Ack(nonce) => status.acked = nonce,
            Reply::Nack(message) => {
                warn!(node = self.node, kind = kind.short(), message, "a node rejected resources");
                metrics.rejects(kind.short()).inc();
                status.rejects += 1;
                status.last_reject = message;
            }
            Reply::Stale => {
                metrics.expired_nonces(kind.short()).inc();
            }
        }
        self.dirty = true;
        Ok(())
    }

    /// Measures how long the newest snapshot took to this client, once it has acknowledged it.
    fn converged(&mut self) {
        let (reached, sent) = {
            let status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
            let reached = status.reached();
            (reached, status.types.values().any(|status| status.snapshot == reached))
        };
        let snapshot = self.server.hub.snapshot();
        if reached > self.reached && reached == snapshot.number {
            self.reached = reached;
            // What it was not concerned with was no push; what was there before it came did not take so long.
            if let Some(changed_at) = snapshot.changed_at.filter(|_| sent) {
                let took = changed_at.max(self.began).elapsed();
                self.server.metrics.convergence.observe(took.as_secs_f64());
            }
        }
    }

    /// A client may be newer than this server, and ask for what only its successor has.
    fn unknown_type(&mut self, request: &DeltaDiscoveryRequest) -> Result<(), Status> {
        if request.type_url.is_empty() || self.unknown.len() >= MOST_UNKNOWN {
            return Err(Status::invalid_argument(format!(
                "type {:?} is not served; this server has {}",
                request.type_url,
                ResourceType::ALL.map(ResourceType::url).join(", ")
            )));
        }
        // What it says of the empty answer needs no answer.
        if request.response_nonce.is_empty() {
            info!(node = self.node, kind = request.type_url, "a type that this version does not have");
            self.unknown.push_back(request.type_url.clone());
            self.dirty = true;
        }
        Ok(())
    }

    fn next_response(&mut self) -> Option<Push> {
        let snapshot = self.server.hub.snapshot();
        if snapshot.number == 0 {
            // The source has not been read: an empty answer would make a node forget what it knows.
            return None;
        }
        if let Some(type_url) = self.unknown.pop_front() {
            let (system_version_info, nonce) = (snapshot.number.to_string(), "none".to_owned());
            let own = DeltaDiscoveryResponse { system_version_info, type_url, nonce, ..Default::default() };
            return Some(Push { own, shared: Bytes::new() });
        }
        for kind in ResourceType::ALL {
            let started = Instant::now();
            let subscription = &mut self.subscriptions[kind as usize];
            let Some(response) = subscription.respond(&snapshot) else { continue };
            let metrics = &self.server.metrics;
            metrics.pushes(kind.short()).inc();
            metrics.push_time.observe(started.elapsed().as_secs_f64());
            metrics.observe_size(kind.short(), response.encoded_len());
            let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
            let status = status.types.entry(kind.short()).or_default();
            status.sent.clone_from(&response.own.nonce);
            status.sent_at = Some(SystemTime::now());
            status.url = kind.url();
            status.snapshot = snapshot.number;
            status.resources = subscription.held();
            return Some(response);
        }
        self.status.lock().unwrap_or_else(PoisonError::into_inner).checked = snapshot.number;
        self.converged();
        None
    }
}

/// Of an id `<type>~...` that was checked.
fn proxy_kind(id: &str) -> &'static str {
    match id.split('~').next() {
        Some("waypoint") => "waypoint",
        Some("agent") => "agent",
        _ => "ztunnel",
    }
}

/// A text of the node's metadata.
fn metadata(node: Option<&Node>, key: &str) -> Option<String> {
    match &node?.metadata.as_ref()?.fields.get(key)?.kind {
        Some(Kind::StringValue(text)) => Some(text.clone()),
        _ => None,
    }
}

/// Id and node name of a client, checked against its token.
fn identify(node: Option<&Node>, caller: Option<&Caller>) -> Result<(String, String), Status> {
    let Some(node) = node else {
        return Err(Status::invalid_argument("the first request of a stream carries the node"));
    };
    let parts: Vec<&str> = node.id.split('~').collect();
    if parts.len() != 4 || !["ztunnel", "waypoint", "agent"].contains(&parts[0]) {
        return Err(Status::invalid_argument(format!(
            "node id {:?} is not <type>~<ip>~<pod>.<namespace>~<domain> with type ztunnel, waypoint or agent",
            node.id
        )));
    }
    let metadata = |key: &str| metadata(Some(node), key);
    let claimed = metadata("NODE_NAME");
    let Some(caller) = caller else { return Ok((node.id.clone(), claimed.unwrap_or_default())) };
    let mismatch = |what: &str, claimed: &str, real: &str| {
        warn!(client = node.id, what, claimed, real, "xDS client claims what its token does not say");
        Err(Status::permission_denied("the node's metadata does not fit its token"))
    };
    match &claimed {
        Some(name) if !name.is_empty() && *name != caller.node => {
            return mismatch("NODE_NAME", name, &caller.node);
        }
        _ => {}
    }
    if let Some(namespace) = metadata("NAMESPACE").filter(|n| *n != caller.namespace) {
        return mismatch("NAMESPACE", &namespace, &caller.namespace);
    }
    if let Some(account) = metadata("SERVICE_ACCOUNT").filter(|a| *a != caller.service_account) {
        return mismatch("SERVICE_ACCOUNT", &account, &caller.service_account);
    }
    Ok((node.id.clone(), caller.node.clone()))
}

/// Seconds since 1970.
pub(crate) fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map(|d| d.as_secs()).unwrap_or_default()
}

#[cfg(test)]
mod tests;
