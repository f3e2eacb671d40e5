//! Tunnels and HTTP connections to endpoints, of one worker: no lock, no other thread.
//!
//! A tunnel takes streams while it has room; of several the fullest is taken, so that the others run empty and end. One
//! dial per peer at a time, the others wait for its outcome. HTTP/1 connections are taken last in, first out; HTTP/2
//! connections are shared.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use mesh_core::hbone::{ClientConnection, ConnectRequest};
use mesh_core::identity::SpiffeId;
use mesh_core::route::{Protocol, Tunnel};
use tokio::io::AsyncWriteExt as _;
use tokio::sync::{Notify, oneshot};

use super::Shared;
use super::body::RequestBody;
use super::destination::{Destination, Key, Secure};
use super::dial::{self, DialError};
use super::http::LocalExec;
use super::io::{EndpointIo, Keeper, TunnelStream};
use super::secure;
use crate::routing::QuickMap;
use crate::upstream::{Cluster, Limit, Overflow, Permit, Policy};

/// A tunnel without streams is closed after this long.
const IDLE_TUNNEL: Duration = Duration::from_secs(300);
/// How often a request that waits for a connection looks whether there is one.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// Requests on one HTTP/2 connection until another is opened.
const STREAMS: u32 = 100;
/// Windows of HTTP/2 towards endpoints, bytes.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;

/// Why there is no connection for a request.
#[derive(Debug, Clone)]
pub enum NoConnection {
    /// The endpoint could not be connected to.
    Dial(DialError),
    /// A limit is reached.
    Overflow(String),
}

impl From<DialError> for NoConnection {
    fn from(error: DialError) -> Self {
        Self::Dial(error)
    }
}

/// A connection that takes a request.
pub enum Sender {
    /// One request at a time.
    Http1(Http1),
    /// Many.
    Http2(Http2),
}

/// An HTTP/1 connection.
pub struct Http1 {
    sender: http1::SendRequest<RequestBody>,
    /// The transport, after an upgrade.
    transport: oneshot::Receiver<http1::Parts<TokioIo<EndpointIo>>>,
    life: Rc<Life>,
    /// Whether it has carried a request before.
    reused: bool,
}

/// What both kinds of connections have.
struct Life {
    peer: Option<SpiffeId>,
    made: Instant,
    requests: Cell<u32>,
    /// Keeps what the key's address stands for, and says how long it may live.
    _cluster: Arc<Cluster>,
    _secure: Option<Secure>,
    policy: Arc<Policy>,
}

impl Life {
    /// Whether it may carry a further request.
    fn is_good(&self, now: Instant) -> bool {
        let connection = &self.policy.connection;
        let young = connection.max_duration.is_none_or(|most| now.duration_since(self.made) < most);
        young && connection.max_requests_per_connection.is_none_or(|most| self.requests.get() < most)
    }

    fn count(&self) {
        self.requests.set(self.requests.get().saturating_add(1));
    }

    fn is_recent(&self, since: Instant, now: Instant) -> bool {
        self.policy.connection.http_idle_timeout.is_none_or(|most| now.duration_since(since) < most)
    }
}

/// An HTTP/2 connection.
#[derive(Clone)]
pub struct Http2 {
    sender: http2::SendRequest<RequestBody>,
    life: Rc<Life>,
    /// Requests on it.
    active: Rc<Cell<u32>>,
    idle_since: Rc<Cell<Instant>>,
    reused: bool,
}

/// What came of handing a request over.
pub type Sent = Result<http::Response<hyper::body::Incoming>, Unanswered>;

/// A request that was not answered.
pub struct Unanswered {
    /// Why.
    pub error: hyper::Error,
    /// The request, if nothing of it was sent.
    pub unsent: Option<http::Request<RequestBody>>,
}

impl Sender {
    /// Hands a request over and waits for the head of its answer.
    pub async fn send(&mut self, request: http::Request<RequestBody>) -> Sent {
        let sent = match self {
            Self::Http1(connection) => {
                connection.life.count();
                connection.sender.try_send_request(request).await
            }
            Self::Http2(connection) => {
                connection.life.count();
                connection.sender.try_send_request(request).await
            }
        };
        sent.map_err(|mut error| {
            let unsent = error.take_message();
            Unanswered { error: error.into_error(), unsent }
        })
    }

    /// Whether it was idle before, so that the endpoint may just have closed it.
    #[must_use]
    pub const fn is_reused(&self) -> bool {
        match self {
            Self::Http1(connection) => connection.reused,
            Self::Http2(connection) => connection.reused,
        }
    }

    /// The transport of a connection that was upgraded, with what was read from it too far.
    pub async fn upgraded(self) -> Option<http1::Parts<TokioIo<EndpointIo>>> {
        match self {
            Self::Http1(connection) => connection.transport.await.ok(),
            Self::Http2(_) => None,
        }
    }
}

/// A connection that is in use for one request.
pub struct Lease {
    pool: Pool,
    key: Key,
    sender: Option<Sender>,
}

impl Lease {
    /// The connection.
    pub fn sender(&mut self) -> Option<&mut Sender> {
        self.sender.as_mut()
    }

    /// Takes the connection out of the pool for good.
    pub fn take(mut self) -> Option<Sender> {
        self.sender.take()
    }

    /// The request is over in both directions: the connection may take another one.
    pub fn give_back(mut self) {
        let now = Instant::now();
        if let Some(Sender::Http1(connection)) = self.sender.take_if(|s| matches!(s, Sender::Http1(_)))
            && !connection.sender.is_closed()
            && connection.life.is_good(now)
        {
            let connection = Http1 { reused: true, ..connection };
            let mut http = self.pool.0.http.borrow_mut();
            http.entry(self.key.clone()).or_default().idle.push((connection, now));
            drop(http);
            self.pool.0.given_back.notify_waiters();
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(Sender::Http2(connection)) = &self.sender {
            connection.active.set(connection.active.get() - 1);
            connection.idle_since.set(Instant::now());
            self.pool.0.given_back.notify_waiters();
        }
    }
}

#[derive(Default)]
struct Entry {
    idle: Vec<(Http1, Instant)>,
    shared: Vec<Http2>,
}

/// The outcome of a dial, shared by all that wait for it.
#[derive(Default)]
struct Dial {
    failure: RefCell<Option<DialError>>,
    done: Cell<bool>,
    wake: Notify,
}

struct Pooled {
    tunnel: dial::Opened,
    idle_since: Cell<Instant>,
}

struct Parts {
    keeper: Keeper,
    tunnels: RefCell<HashMap<SocketAddr, Vec<Pooled>>>,
    dials: RefCell<HashMap<SocketAddr, Rc<Dial>>>,
    http: RefCell<QuickMap<Key, Entry>>,
    given_back: Notify,
}

/// See the module. A clone is the same pool.
#[derive(Clone)]
pub struct Pool(Rc<Parts>);

impl Pool {
    /// An empty pool, whose streams `keeper` keeps at their end.
    #[must_use]
    pub fn new(keeper: Keeper) -> Self {
        Self(Rc::new(Parts {
            keeper,
            tunnels: RefCell::default(),
            dials: RefCell::default(),
            http: RefCell::default(),
            given_back: Notify::new(),
        }))
    }

    /// A connection that takes a request: an idle one, else a new one. While the cluster may have no more connections,
    /// the request waits for one, if as many may wait.
    ///
    /// # Errors
    /// The endpoint could not be connected to, or a limit is reached.
    pub async fn checkout(&self, shared: &Arc<Shared>, to: &Destination) -> Result<Lease, NoConnection> {
        let key = to.key();
        if let Some(sender) = self.idle(&key, to).await {
            return Ok(self.lease(key, sender));
        }
        let overflow = |overflow: Overflow| NoConnection::Overflow(overflow.to_string());
        let _pending = to.cluster.admit(Limit::Pending, Instant::now()).map_err(overflow)?;
        loop {
            match to.cluster.admit(Limit::Connection, Instant::now()) {
                Ok(permit) => {
                    // Rare, and large: it is kept out of the future of every request.
                    let sender = Box::pin(self.connect(shared, to, permit)).await?;
                    return Ok(self.lease(key, sender));
                }
                // Another worker's connection may become free, of which nobody here is told.
                Err(_) => {
                    let given_back = self.0.given_back.notified();
                    let _ = tokio::time::timeout(LOOK_AGAIN, given_back).await;
                }
            }
            if let Some(sender) = self.idle(&key, to).await {
                return Ok(self.lease(key, sender));
            }
        }
    }

    /// As [`Self::checkout`], always with a new connection.
    ///
    /// # Errors
    /// The endpoint could not be connected to, or a limit is reached.
    pub async fn fresh(&self, shared: &Arc<Shared>, to: &Destination) -> Result<Lease, NoConnection> {
        let permit = to.cluster.admit(Limit::Connection, Instant::now());
        let permit = permit.map_err(|overflow| NoConnection::Overflow(overflow.to_string()))?;
        let sender = Box::pin(self.connect(shared, to, permit)).await?;
        Ok(self.lease(to.key(), sender))
    }

    fn lease(&self, key: Key, sender: Sender) -> Lease {
        Lease { pool: self.clone(), key, sender: Some(sender) }
    }

    /// A connection that is there already.
    async fn idle(&self, key: &Key, to: &Destination) -> Option<Sender> {
        if to.http2 {
            return self.shared_connection(key, to).map(Sender::Http2);
        }
        while let Some(mut connection) = self.idle_connection(key, to) {
            // It was given back when its last request was over; what it still has to do for that is short.
            if connection.sender.ready().await.is_ok() {
                return Some(Sender::Http1(connection));
            }
        }
        None
    }

    fn idle_connection(&self, key: &Key, to: &Destination) -> Option<Http1> {
        let now = Instant::now();
        let mut http = self.0.http.borrow_mut();
        let idle = &mut http.get_mut(key)?.idle;
        while let Some((connection, _)) = idle.pop() {
            let life = &connection.life;
            if !connection.sender.is_closed() && life.is_good(now) && to.accepts(life.peer.as_ref()) {
                return Some(connection);
            }
        }
        None
    }

    fn shared_connection(&self, key: &Key, to: &Destination) -> Option<Http2> {
        let now = Instant::now();
        let mut http = self.0.http.borrow_mut();
        let shared = &mut http.get_mut(key)?.shared;
        shared.retain(|c| !c.sender.is_closed() && c.life.is_good(now));
        let most = to.policy.connection.max_concurrent_streams.map_or(STREAMS, |most| most.max(1));
        let usable = |c: &&Http2| c.active.get() < most && to.accepts(c.life.peer.as_ref());
        let connection = shared.iter().filter(usable).max_by_key(|c| c.active.get())?;
        connection.active.set(connection.active.get() + 1);
        Some(Http2 { reused: true, ..connection.clone() })
    }

    async fn connect(
        &self,
        shared: &Arc<Shared>,
        to: &Destination,
        permit: Permit,
    ) -> Result<Sender, DialError> {
        let (io, peer) = self.transport(shared, to).await?;
        let refused = |error: hyper::Error| DialError::Tunnel(error.to_string().into());
        let (cluster, policy) = (Arc::clone(&to.cluster), Arc::clone(&to.policy));
        let life = Rc::new(Life {
            peer,
            made: Instant::now(),
            requests: Cell::new(0),
            _cluster: cluster,
            _secure: to.secure.clone(),
            policy,
        });
        if !to.http2 {
            let (sender, connection) = http1::Builder::new()
                .max_buf_size(64 << 10)
                .handshake(TokioIo::new(io))
                .await
                .map_err(refused)?;
            let (hand_over, transport) = oneshot::channel();
            drop(tokio::task::spawn_local(drive_http1(connection, hand_over, permit)));
            return Ok(Sender::Http1(Http1 { sender, transport, life, reused: false }));
        }
        let mut builder = http2::Builder::new(LocalExec);
        builder
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_header_list_size(64 << 10);
        if let Some((interval, timeout)) = to.policy.connection.http2_keepalive {
            builder.keep_alive_interval(interval).keep_alive_timeout(timeout).keep_alive_while_idle(true);
        }
        let (sender, connection) = builder.handshake(TokioIo::new(io)).await.map_err(refused)?;
        drop(tokio::task::spawn_local(async move {
            let _permit = permit;
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection to an endpoint ended");
            }
        }));
        let idle_since = Rc::new(Cell::new(Instant::now()));
        let connection = Http2 { sender, life, active: Rc::new(Cell::new(1)), idle_since, reused: false };
        self.0.http.borrow_mut().entry(to.key()).or_default().shared.push(connection.clone());
        Ok(Sender::Http2(connection))
    }

    /// Opens a connection to the application, through the tunnel to its node where there is one.
    ///
    /// # Errors
    /// The endpoint could not be connected to.
    pub async fn transport(
        &self,
        shared: &Arc<Shared>,
        to: &Destination,
    ) -> Result<(EndpointIo, Option<SpiffeId>), DialError> {
        let (io, peer) = self.bare(shared, to).await?;
        let Some(Secure { tls, config, host }) = &to.secure else { return Ok((io, peer)) };
        let secured = secure::connect(Arc::clone(config), tls, host, io);
        let secured = tokio::time::timeout(to.policy.connection.connect_timeout, secured).await;
        Ok((secured.map_err(|_elapsed| DialError::Timeout)??, peer))
    }

    async fn bare(
        &self,
        shared: &Arc<Shared>,
        to: &Destination,
    ) -> Result<(EndpointIo, Option<SpiffeId>), DialError> {
        let timeout = to.policy.connection.connect_timeout;
        let (tunnel, outer) = match &to.route.protocol {
            Protocol::Tcp => {
                let stream = dial::plain(to.dial, timeout).await?;
                return Ok((EndpointIo::Plain(stream), None));
            }
            Protocol::Hbone(tunnel) => (tunnel, None),
            Protocol::DoubleHbone { outer, inner } => (inner, Some(outer)),
        };
        let opened = async {
            let (connection, peer) = match outer {
                None => self.tunnel(shared, to.dial, tunnel, timeout).await?,
                Some(outer) => self.through_gateway(shared, to.dial, outer, tunnel, timeout).await?,
            };
            let mut connect = ConnectRequest::to(tunnel.authority.clone());
            if outer.is_some() {
                connect.network = Some(shared.config.own.network.as_str().into());
            }
            let stream = self.open(&connection, &connect).await?;
            Ok((EndpointIo::Tunnel(stream), Some(peer)))
        };
        tokio::time::timeout(timeout, opened).await.map_err(|_elapsed| DialError::Timeout)?
    }

    async fn open(
        &self,
        connection: &ClientConnection,
        connect: &ConnectRequest,
    ) -> Result<TunnelStream, DialError> {
        let opened = connection.open(connect).await;
        let opened = opened.map_err(|error| DialError::Tunnel(error.to_string().into()))?;
        Ok(TunnelStream::new(opened.stream.into_io(), self.0.keeper.clone()))
    }

    /// A tunnel to an endpoint of another network, within one to that network's gateway. The inner one is used once.
    async fn through_gateway(
        &self,
        shared: &Arc<Shared>,
        gateway: SocketAddr,
        outer: &Tunnel,
        inner: &Tunnel,
        timeout: Duration,
    ) -> Result<(ClientConnection, SpiffeId), DialError> {
        let (connection, _) = self.tunnel(shared, gateway, outer, timeout).await?;
        let stream = self.open(&connection, &ConnectRequest::to(outer.authority.clone())).await?;
        let opened = dial::secure(shared, stream, &inner.expected).await?;
        Ok((opened.connection, opened.peer))
    }

    async fn tunnel(
        &self,
        shared: &Arc<Shared>,
        node: SocketAddr,
        to: &Tunnel,
        timeout: Duration,
    ) -> Result<(ClientConnection, SpiffeId), DialError> {
        loop {
            if let Some(found) = self.usable_tunnel(node, to) {
                return Ok(found);
            }
            let waiting = {
                let mut dials = self.0.dials.borrow_mut();
                Rc::clone(dials.entry(node).or_insert_with(|| {
                    let outcome = Rc::new(Dial::default());
                    let dialled = dial::tunnel(Arc::clone(shared), node, to.expected.clone(), timeout);
                    // A task of its own, so that a client that gives up does not take the tunnel from those who wait.
                    let run = run_dial(self.clone(), node, Rc::clone(&outcome), dialled);
                    drop(tokio::task::spawn_local(run));
                    outcome
                }))
            };
            if !waiting.done.get() {
                waiting.wake.notified().await;
            }
            if let Some(error) = &*waiting.failure.borrow() {
                return Err(error.clone());
            }
        }
    }

    fn usable_tunnel(&self, node: SocketAddr, to: &Tunnel) -> Option<(ClientConnection, SpiffeId)> {
        let mut tunnels = self.0.tunnels.borrow_mut();
        let tunnels = tunnels.get_mut(&node)?;
        let now = SystemTime::now();
        tunnels.retain(|t| !t.tunnel.connection.is_closed() && now < t.tunnel.until);
        let usable = |t: &&Pooled| t.tunnel.connection.has_room() && to.expected.contains(&t.tunnel.peer);
        let found = tunnels.iter().filter(usable).max_by_key(|t| t.tunnel.connection.active_streams())?;
        found.idle_since.set(Instant::now());
        Some((found.tunnel.connection.clone(), found.tunnel.peer.clone()))
    }

    /// Lets go of what is closed or was idle for long.
    pub fn release(&self, now: Instant) {
        let recent = |since: Instant| now.duration_since(since) < IDLE_TUNNEL;
        let mut http = self.0.http.borrow_mut();
        for entry in http.values_mut() {
            entry.idle.retain(|(connection, since)| {
                let life = &connection.life;
                !connection.sender.is_closed() && life.is_good(now) && life.is_recent(*since, now)
            });
            entry.shared.retain(|c| {
                let used = c.active.get() > 0;
                let kept = c.life.is_good(now) && (used || c.life.is_recent(c.idle_since.get(), now));
                !c.sender.is_closed() && kept
            });
        }
        http.retain(|_, entry| !entry.idle.is_empty() || !entry.shared.is_empty());
        let mut tunnels = self.0.tunnels.borrow_mut();
        for tunnels in tunnels.values_mut() {
            tunnels.retain(|t| {
                if t.tunnel.connection.active_streams() > 0 {
                    t.idle_since.set(now);
                }
                !t.tunnel.connection.is_closed() && recent(t.idle_since.get())
            });
        }
        tunnels.retain(|_, tunnels| !tunnels.is_empty());
    }
}

async fn run_dial(
    pool: Pool,
    node: SocketAddr,
    outcome: Rc<Dial>,
    dialled: impl Future<Output = Result<dial::Opened, DialError>>,
) {
    let result = dialled.await;
    pool.0.dials.borrow_mut().remove(&node);
    match result {
        Ok(tunnel) => {
            let pooled = Pooled { tunnel, idle_since: Cell::new(Instant::now()) };
            pool.0.tunnels.borrow_mut().entry(node).or_default().push(pooled);
        }
        Err(error) => *outcome.failure.borrow_mut() = Some(error),
    }
    outcome.done.set(true);
    outcome.wake.notify_waiters();
}

/// Moves the bytes of an HTTP/1 connection until it ends, and hands its transport over if it was upgraded.
async fn drive_http1(
    mut connection: http1::Connection<TokioIo<EndpointIo>, RequestBody>,
    hand_over: oneshot::Sender<http1::Parts<TokioIo<EndpointIo>>>,
    _permit: Permit,
) {
    match poll_fn(|cx| connection.poll_without_shutdown(cx)).await {
        Ok(()) => {
            if let Err(parts) = hand_over.send(connection.into_parts()) {
                // Nobody waits for it: it has just ended. The endpoint may have closed its side first.
                let _ = parts.io.into_inner().shutdown().await;
            }
        }
        Err(error) => tracing::debug!(%error, "a connection to an endpoint ended"),
    }
}
