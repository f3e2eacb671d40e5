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
use std::time::{Duration, Instant};

use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use mesh_core::hbone::{ClientConnection, ConnectRequest};
use mesh_core::identity::SpiffeId;
use mesh_core::state::{Service, Workload};
use tokio::io::AsyncWriteExt as _;
use tokio::sync::{Notify, oneshot};

use super::Shared;
use super::body::RequestBody;
use super::dial::{self, DialError, Tunnel};
use super::http::LocalExec;
use super::io::EndpointIo;

/// A tunnel without streams, or an HTTP connection without requests, is closed after this long.
const IDLE: Duration = Duration::from_secs(300);
/// Requests on one HTTP/2 connection until another is opened.
const STREAMS: usize = 100;
/// Windows of HTTP/2 towards endpoints, bytes.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;

/// Where a request goes, and how it is carried there.
#[derive(Debug, Clone)]
pub struct Destination {
    /// The endpoint.
    pub workload: Arc<Workload>,
    /// The service that it was chosen for, whose further identities may answer.
    pub service: Option<Arc<Service>>,
    /// The application's address.
    pub address: SocketAddr,
    /// Where its tunnel ends; none for plain TCP.
    pub tunnel: Option<SocketAddr>,
    /// Whether the application speaks HTTP/2.
    pub http2: bool,
    /// How long connecting may take.
    pub connect_timeout: Duration,
}

impl Destination {
    const fn key(&self) -> Key {
        Key { address: self.address, tunnel: self.tunnel.is_some(), http2: self.http2 }
    }

    fn expected(&self) -> Vec<SpiffeId> {
        let further = self.service.iter().flat_map(|service| service.subject_alt_names.iter().cloned());
        std::iter::once(self.workload.identity.clone()).chain(further).collect()
    }

    /// Whether who proved to be `peer` may answer. Without a tunnel nobody proves anything.
    fn accepts(&self, peer: Option<&SpiffeId>) -> bool {
        let Some(peer) = peer else { return self.tunnel.is_none() };
        *peer == self.workload.identity
            || self.service.as_ref().is_some_and(|service| service.subject_alt_names.contains(peer))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    address: SocketAddr,
    tunnel: bool,
    http2: bool,
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
    peer: Option<SpiffeId>,
    /// Whether it has carried a request before.
    pub(super) reused: bool,
}

/// An HTTP/2 connection.
#[derive(Clone)]
pub struct Http2 {
    sender: http2::SendRequest<RequestBody>,
    peer: Option<SpiffeId>,
    /// Requests on it.
    active: Rc<Cell<usize>>,
    idle_since: Rc<Cell<Instant>>,
    pub(super) reused: bool,
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
            Self::Http1(connection) => connection.sender.try_send_request(request).await,
            Self::Http2(connection) => connection.sender.try_send_request(request).await,
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
        if let Some(Sender::Http1(mut connection)) = self.sender.take()
            && !connection.sender.is_closed()
        {
            connection.reused = true;
            let mut http = self.pool.0.http.borrow_mut();
            http.entry(self.key).or_default().idle.push((connection, Instant::now()));
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(Sender::Http2(connection)) = &self.sender {
            connection.active.set(connection.active.get() - 1);
            connection.idle_since.set(Instant::now());
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
    tunnel: Tunnel,
    idle_since: Cell<Instant>,
}

#[derive(Default)]
struct Parts {
    tunnels: RefCell<HashMap<SocketAddr, Vec<Pooled>>>,
    dials: RefCell<HashMap<SocketAddr, Rc<Dial>>>,
    http: RefCell<HashMap<Key, Entry>>,
}

/// See the module. A clone is the same pool.
#[derive(Clone, Default)]
pub struct Pool(Rc<Parts>);

impl Pool {
    /// A connection that takes a request: an idle one, else a new one.
    ///
    /// # Errors
    /// The endpoint could not be connected to.
    pub async fn checkout(&self, shared: &Arc<Shared>, to: &Destination) -> Result<Lease, DialError> {
        let key = to.key();
        let lease = |sender| Lease { pool: self.clone(), key, sender: Some(sender) };
        if to.http2 {
            if let Some(connection) = self.shared_connection(key, to) {
                return Ok(lease(Sender::Http2(connection)));
            }
        } else {
            while let Some(mut connection) = self.idle_connection(key, to) {
                // It was given back when its last request was over; what it still has to do for that is short.
                if connection.sender.ready().await.is_ok() {
                    return Ok(lease(Sender::Http1(connection)));
                }
            }
        }
        self.connect(shared, to).await.map(lease)
    }

    /// As [`Self::checkout`], always with a new connection.
    ///
    /// # Errors
    /// The endpoint could not be connected to.
    pub async fn fresh(&self, shared: &Arc<Shared>, to: &Destination) -> Result<Lease, DialError> {
        let sender = self.connect(shared, to).await?;
        Ok(Lease { pool: self.clone(), key: to.key(), sender: Some(sender) })
    }

    fn idle_connection(&self, key: Key, to: &Destination) -> Option<Http1> {
        let mut http = self.0.http.borrow_mut();
        let idle = &mut http.get_mut(&key)?.idle;
        while let Some((connection, _)) = idle.pop() {
            if !connection.sender.is_closed() && to.accepts(connection.peer.as_ref()) {
                return Some(connection);
            }
        }
        None
    }

    fn shared_connection(&self, key: Key, to: &Destination) -> Option<Http2> {
        let mut http = self.0.http.borrow_mut();
        let shared = &mut http.get_mut(&key)?.shared;
        shared.retain(|c| !c.sender.is_closed());
        let usable = |c: &&Http2| c.active.get() < STREAMS && to.accepts(c.peer.as_ref());
        let connection = shared.iter().filter(usable).max_by_key(|c| c.active.get())?;
        connection.active.set(connection.active.get() + 1);
        Some(Http2 { reused: true, ..connection.clone() })
    }

    async fn connect(&self, shared: &Arc<Shared>, to: &Destination) -> Result<Sender, DialError> {
        let (io, peer) = self.transport(shared, to).await?;
        let refused = |error: hyper::Error| DialError::Tunnel(error.to_string().into());
        if !to.http2 {
            let (sender, connection) = http1::Builder::new()
                .max_buf_size(64 << 10)
                .handshake(TokioIo::new(io))
                .await
                .map_err(refused)?;
            let (hand_over, transport) = oneshot::channel();
            drop(tokio::task::spawn_local(drive_http1(connection, hand_over)));
            return Ok(Sender::Http1(Http1 { sender, transport, peer, reused: false }));
        }
        let (sender, connection) = http2::Builder::new(LocalExec)
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_header_list_size(64 << 10)
            .handshake(TokioIo::new(io))
            .await
            .map_err(refused)?;
        drop(tokio::task::spawn_local(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection to an endpoint ended");
            }
        }));
        let idle_since = Rc::new(Cell::new(Instant::now()));
        let connection = Http2 { sender, peer, active: Rc::new(Cell::new(1)), idle_since, reused: false };
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
        let Some(node) = to.tunnel else {
            let stream = dial::plain(to.address, to.connect_timeout).await?;
            return Ok((EndpointIo::Plain(stream), None));
        };
        let (connection, peer) = self.tunnel(shared, node, to).await?;
        let connect = ConnectRequest::to(to.address);
        let opened = tokio::time::timeout(to.connect_timeout, connection.open(&connect)).await;
        let opened = opened.map_err(|_elapsed| DialError::Timeout)?;
        let opened = opened.map_err(|error| DialError::Tunnel(error.to_string().into()))?;
        Ok((EndpointIo::Tunnel(opened.stream.into_io()), Some(peer)))
    }

    async fn tunnel(
        &self,
        shared: &Arc<Shared>,
        node: SocketAddr,
        to: &Destination,
    ) -> Result<(ClientConnection, SpiffeId), DialError> {
        loop {
            if let Some(found) = self.usable_tunnel(node, to) {
                return Ok(found);
            }
            let waiting = {
                let mut dials = self.0.dials.borrow_mut();
                Rc::clone(dials.entry(node).or_insert_with(|| {
                    let outcome = Rc::new(Dial::default());
                    let dialled = dial::tunnel(Arc::clone(shared), node, to.expected(), to.connect_timeout);
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

    fn usable_tunnel(&self, node: SocketAddr, to: &Destination) -> Option<(ClientConnection, SpiffeId)> {
        let mut tunnels = self.0.tunnels.borrow_mut();
        let tunnels = tunnels.get_mut(&node)?;
        tunnels.retain(|t| !t.tunnel.connection.is_closed());
        let usable = |t: &&Pooled| t.tunnel.connection.has_room() && to.accepts(Some(&t.tunnel.peer));
        let found = tunnels.iter().filter(usable).max_by_key(|t| t.tunnel.connection.active_streams())?;
        found.idle_since.set(Instant::now());
        Some((found.tunnel.connection.clone(), found.tunnel.peer.clone()))
    }

    /// Lets go of what is closed or was idle for long.
    pub fn release(&self, now: Instant) {
        let recent = |since: Instant| now.duration_since(since) < IDLE;
        let mut http = self.0.http.borrow_mut();
        for entry in http.values_mut() {
            entry.idle.retain(|(connection, since)| !connection.sender.is_closed() && recent(*since));
            entry
                .shared
                .retain(|c| !c.sender.is_closed() && (c.active.get() > 0 || recent(c.idle_since.get())));
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

    /// Tunnels, and HTTP connections, that are held.
    #[must_use]
    pub fn size(&self) -> (usize, usize) {
        let tunnels = self.0.tunnels.borrow().values().map(Vec::len).sum();
        let http = self.0.http.borrow().values().map(|e| e.idle.len() + e.shared.len()).sum();
        (tunnels, http)
    }
}

async fn run_dial(
    pool: Pool,
    node: SocketAddr,
    outcome: Rc<Dial>,
    dialled: impl Future<Output = Result<Tunnel, DialError>>,
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
