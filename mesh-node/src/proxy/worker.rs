//! The data workers: one OS thread each, which owns a connection from accept to close.
//!
//! The control runtime talks to a worker by [`Command`]s only. Each pod has three listeners per worker, in one
//! reuse-port group per kind, so that the kernel spreads new connections over the workers.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mesh_core::error::Code;
use mesh_core::flows::ConnectionId;
use mesh_core::hbone::BaggageHeader;
use mesh_core::state::Workload;
use mesh_core::telemetry::{DryRunCounters, HandleCache, LimitLabels};
use serde::Serialize;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::LocalOptions;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::dial::TunnelHandle;
use super::failed::Failed;
use super::limits::Permit;
use super::live::Registry;
use super::once::Once;
use super::pool::Pool;
use super::suspects::Suspects;
use super::{Pod, Shared, busy, canonical, inbound, outbound, plaintext};
use crate::trace::join::Named;

/// A draining listener is closed once no connection came for this long: a handshake that began before the successor's
/// listener took over ends within it, retransmissions of the SYN-ACK included.
const QUIET: Duration = Duration::from_secs(3);
/// However busy it is, a draining listener is closed after this long.
const LONGEST_QUIET: Duration = Duration::from_secs(30);
/// Turns of tasks after which a worker asks the kernel what else is ready: a round trip must not wait for every bulk
/// stream that has more to move.
const TURNS: u32 = 8;
/// How often tunnels are looked through for idle ones.
const RELEASE_EVERY: Duration = Duration::from_secs(2);
/// A worker that is out of files waits this long before it accepts again.
const OUT_OF_FILES_PAUSE: Duration = Duration::from_millis(50);

/// Which of a pod's listeners.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Captured connections of the pod's application.
    Outbound,
    /// Plaintext connections from outside the pod.
    Plaintext,
    /// Tunnels.
    Hbone,
}

/// One worker's listeners of one pod.
pub struct Listeners {
    /// Kind and socket, non-blocking.
    pub sockets: Vec<(Kind, std::net::TcpListener)>,
}

/// What a worker is told.
pub enum Command {
    /// Serve a pod.
    Add(Arc<Pod>, Listeners),
    /// Serve it no more. Its connections end through [`Pod::gone`]; after [`Pod::left`] they go on, and its listeners
    /// accept what is under way to them.
    Remove(Arc<Pod>),
    /// Policies changed.
    Reevaluate,
    /// Revocation lists changed.
    RecheckPeers,
    /// Describe the connections.
    Describe(oneshot::Sender<Vec<Described>>),
}

/// One pod's share of a worker, for the admin endpoint.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Described {
    /// Index of the worker.
    pub worker: usize,
    /// `namespace/name` of the pod.
    pub pod: String,
    /// Tunnels to peers.
    pub tunnels: usize,
    /// Streams on them.
    pub streams: usize,
    /// Inbound connections, each with the client's address, identity and destination.
    pub inbound: Vec<InboundConnection>,
}

/// An open inbound connection.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct InboundConnection {
    /// TCP peer.
    pub src: SocketAddr,
    /// From the client's certificate.
    pub identity: Option<String>,
    /// The pod's address and the application's port.
    pub dst: SocketAddr,
}

/// A running worker.
pub struct Worker {
    commands: mpsc::UnboundedSender<Command>,
    exit: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread of worker `index`.
    ///
    /// # Errors
    /// The thread or its event loop cannot be made.
    pub fn start(index: usize, shared: Arc<Shared>) -> io::Result<Self> {
        let (commands, received) = mpsc::unbounded_channel();
        let exit = CancellationToken::new();
        let until = exit.clone();
        let (started, result) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new().name(format!("um-data-{index}")).spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .event_interval(TURNS)
                .build_local(LocalOptions::default());
            let runtime = match runtime {
                Ok(runtime) => runtime,
                // Who started us waits for this.
                Err(error) => return drop(started.send(Err(error))),
            };
            let _ = started.send(Ok(()));
            let local = Local::new(index, shared);
            runtime.block_on(async {
                tokio::select! {
                    () = serve(&local, received) => {}
                    () = until.cancelled() => {}
                }
            });
            // Connections that are still open end here, each with its line in the log.
            drop(runtime);
        })?;
        result.recv().unwrap_or_else(|_| Err(io::Error::other("the thread of a data worker ended")))?;
        Ok(Self { commands, exit, thread: Some(thread) })
    }

    /// Tells the worker something. A worker that has ended is told nothing.
    pub fn tell(&self, command: Command) {
        let _ = self.commands.send(command);
    }

    /// What the worker is doing.
    pub async fn describe(&self) -> Vec<Described> {
        let (answer, described) = oneshot::channel();
        self.tell(Command::Describe(answer));
        described.await.unwrap_or_default()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.exit.cancel();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a data worker panicked");
        }
    }
}

/// What one worker thread owns.
pub(super) struct Local {
    index: usize,
    pub(super) shared: Arc<Shared>,
    pub(super) live: Registry,
    /// Metrics by pair of peers.
    pub(super) handles: RefCell<HandleCache>,
    /// What dry-run policies would have done.
    pub(super) dry_run: RefCell<DryRunCounters>,
    /// Wakes every tunnel when revocation lists changed.
    pub(super) recheck: Notify,
    /// Endpoints that lately did not take a connection.
    pub(super) suspects: Suspects,
    pods: RefCell<HashMap<String, Rc<PodProxy>>>,
}

/// One pod on one worker.
pub(super) struct PodProxy {
    pub(super) worker: Rc<Local>,
    pub(super) pod: Arc<Pod>,
    pub(super) pool: Pool<TunnelHandle, Failed>,
    baggage: RefCell<Option<(Arc<Workload>, Option<BaggageHeader>)>>,
    stop: CancellationToken,
    /// [`Pod::gone`], for the tasks of this worker.
    gone: Rc<Once>,
}

impl PodProxy {
    /// The shared part.
    pub(super) fn shared(&self) -> &Shared {
        &self.worker.shared
    }

    /// The right to one more connection; a refusal is counted.
    ///
    /// # Errors
    /// [`Code::Overloaded`], naming the limit.
    pub(super) fn admit(&self) -> Result<Permit, Failed> {
        self.pod.gauge.admit().map_err(|overload| {
            let shed = &self.shared().metrics.connections_shed;
            shed.get_or_create(&LimitLabels(overload.label())).inc();
            Failed::new(Code::Overloaded, overload.as_str())
        })
    }

    /// Says for whom a connection to the application was made, so that tracing tells of one connection. When nobody reads
    /// it in time, the kernel's account of it has a name of its own.
    pub(super) fn name(&self, application: &TcpStream, server: SocketAddr, connection: ConnectionId) {
        let Some(named) = &self.shared().named else { return };
        if let Ok(client) = application.local_addr() {
            let _ = named.try_send(Named { client: canonical(client), server, connection, tunnel: true });
        }
    }

    /// How `workload`, which is this pod's, describes itself to peers; made once per version of the workload.
    pub(super) fn baggage(&self, workload: &Arc<Workload>) -> Option<BaggageHeader> {
        let mut cached = self.baggage.borrow_mut();
        if let Some((of, header)) = &*cached
            && Arc::ptr_eq(of, workload)
        {
            return header.clone();
        }
        let header = super::session::baggage(workload);
        *cached = Some((Arc::clone(workload), header.clone()));
        header
    }
}

impl Local {
    fn new(index: usize, shared: Arc<Shared>) -> Rc<Self> {
        Rc::new(Self {
            index,
            dry_run: RefCell::new(DryRunCounters::new(&shared.metrics)),
            shared,
            live: Registry::default(),
            handles: RefCell::default(),
            recheck: Notify::new(),
            suspects: Suspects::default(),
            pods: RefCell::default(),
        })
    }

    fn describe(&self) -> Vec<Described> {
        let mut by_pod: HashMap<String, Vec<InboundConnection>> = HashMap::new();
        self.live.for_each(|pod, conn| {
            by_pod.entry(pod.uid.clone()).or_default().push(InboundConnection {
                src: conn.src,
                identity: conn.identity.as_ref().map(ToString::to_string),
                dst: conn.dst,
            });
        });
        let describe = |(uid, proxy): (&String, &Rc<PodProxy>)| {
            let (tunnels, streams) = proxy.pool.size();
            let inbound = by_pod.remove(uid).unwrap_or_default();
            Described { worker: self.index, pod: proxy.pod.label.clone(), tunnels, streams, inbound }
        };
        self.pods.borrow().iter().map(describe).collect()
    }
}

async fn serve(local: &Rc<Local>, mut commands: mpsc::UnboundedReceiver<Command>) {
    let mut release = tokio::time::interval(RELEASE_EVERY);
    loop {
        let command = tokio::select! {
            command = commands.recv() => command,
            _ = release.tick() => {
                let idle = local.shared.config.proxy.pool_unused_release;
                local.pods.borrow().values().for_each(|p| p.pool.release(Instant::now(), idle));
                local.suspects.forget(Instant::now());
                mesh_core::tls::buffers::release();
                continue;
            }
        };
        match command {
            None => return,
            Some(Command::Add(pod, listeners)) => add(local, pod, listeners),
            Some(Command::Remove(pod)) => remove(local, &pod),
            Some(Command::Reevaluate) => {
                let ended = local.live.reevaluate(&local.shared.state.load());
                if ended > 0 {
                    tracing::info!(worker = local.index, ended, "connections ended by a policy change");
                }
            }
            Some(Command::RecheckPeers) => local.recheck.notify_waiters(),
            // Who asked may have left.
            Some(Command::Describe(answer)) => drop(answer.send(local.describe())),
        }
    }
}

fn add(local: &Rc<Local>, pod: Arc<Pod>, listeners: Listeners) {
    let proxy = Rc::new(PodProxy {
        worker: Rc::clone(local),
        pool: Pool::new(local.shared.config.proxy.pool_max_streams),
        baggage: RefCell::default(),
        stop: CancellationToken::new(),
        gone: Rc::default(),
        pod,
    });
    // It holds no more of the pod than it waits for: whoever holds a pod that has left is one of its connections.
    let (told, gone) = (proxy.pod.gone.clone(), Rc::clone(&proxy.gone));
    drop(tokio::task::spawn_local(async move {
        told.cancelled().await;
        gone.happen();
    }));
    for (kind, socket) in listeners.sockets {
        match TcpListener::from_std(socket) {
            Ok(listener) => drop(tokio::task::spawn_local(accept(Rc::clone(&proxy), kind, listener))),
            Err(error) => tracing::error!(pod = %proxy.pod.label, ?kind, %error, "cannot serve a listener"),
        }
    }
    let replaced = local.pods.borrow_mut().insert(proxy.pod.uid.clone(), proxy);
    if let Some(replaced) = replaced {
        replaced.stop.cancel();
    }
}

fn remove(local: &Rc<Local>, pod: &Arc<Pod>) {
    let mut pods = local.pods.borrow_mut();
    // The uid may already stand for a newer enrolment of the pod.
    if pods.get(&pod.uid).is_some_and(|p| Arc::ptr_eq(&p.pod, pod))
        && let Some(proxy) = pods.remove(&pod.uid)
    {
        if !pod.left.is_cancelled() {
            proxy.stop.cancel();
        }
        proxy.pool.clear();
    }
}

async fn accept(proxy: Rc<PodProxy>, kind: Kind, listener: TcpListener) {
    let last = Cell::new(Instant::now());
    let own = listener.local_addr().ok();
    let serve = async {
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => {
                    last.set(Instant::now());
                    // Without this, a pod that connects to the plaintext listener's own port would have the agent
                    // connect to itself without end.
                    let local = stream.local_addr().ok();
                    if let (Some(local), Some(own)) = (local, own)
                        && proxy.pod.net.dialled_listener(local, own)
                    {
                        super::dial::reset_on_close(&stream);
                        tracing::debug!(pod = %proxy.pod.label, %peer, %local, "a listener of the mesh was dialled");
                        continue;
                    }
                    spawn(&proxy, kind, stream, peer);
                }
                Err(error) => on_accept_error(&proxy, &error).await,
            }
        }
    };
    let drain = async {
        tokio::select! {
            () = proxy.shared().drain.cancelled() => {}
            () = proxy.pod.left.cancelled() => {}
        }
        let began = Instant::now();
        while last.get().max(began).elapsed() < QUIET && began.elapsed() < LONGEST_QUIET {
            tokio::time::sleep(QUIET / 10).await;
        }
    };
    tokio::select! {
        () = serve => {}
        () = proxy.stop.cancelled() => {}
        () = proxy.pod.gone.cancelled() => {}
        () = drain => {}
    }
    if proxy.pod.left.is_cancelled() {
        // Nobody looks for unused tunnels of a pod that is served no more.
        proxy.pool.clear();
    }
}

async fn on_accept_error(proxy: &PodProxy, error: &io::Error) {
    match error.raw_os_error() {
        // The client left before it was accepted.
        Some(libc::ECONNABORTED) => {}
        Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => {
            tracing::error!(pod = %proxy.pod.label, %error, "cannot accept: out of resources");
            tokio::time::sleep(OUT_OF_FILES_PAUSE).await;
        }
        _ => {
            tracing::warn!(pod = %proxy.pod.label, %error, "cannot accept");
            tokio::time::sleep(OUT_OF_FILES_PAUSE).await;
        }
    }
}

/// Starts the task of a connection. Each kind has its own type of task: an idle connection must not hold the room that
/// another kind needs.
fn spawn(proxy: &Rc<PodProxy>, kind: Kind, stream: TcpStream, peer: SocketAddr) {
    let own = Rc::clone(proxy);
    match kind {
        Kind::Outbound => until(proxy, outbound::make(own, stream, peer), outbound::carry),
        Kind::Plaintext => until(proxy, plaintext::make(own, stream, peer), plaintext::carry),
        Kind::Hbone => until(proxy, inbound::accept(own, stream, peer), inbound::streams),
    }
}

/// Starts a task of a pod, which ends with it and whose time counts as the pod's: `make` opens something, `carry` takes it
/// to its end.
pub(super) fn until<M: 'static, C: Future<Output = ()> + 'static>(
    proxy: &Rc<PodProxy>,
    make: impl Future<Output = Option<M>> + 'static,
    carry: fn(M) -> C,
) {
    // Boxed, so that the room for opening is free again while bytes flow.
    drop(tokio::task::spawn_local(guarded(Rc::clone(proxy), Box::pin(make), carry)));
}

/// The task of [`until`]. Ten thousand idle connections are ten thousand of it: a future is pinned where it is made and
/// never handed over, since it would have room in both places.
pub(super) async fn guarded<M, C: Future<Output = ()>>(
    proxy: Rc<PodProxy>,
    make: Pin<Box<impl Future<Output = Option<M>>>>,
    carry: fn(M) -> C,
) {
    let guarded = pin!(async {
        tokio::select! {
            biased;
            () = proxy.gone.wait() => {}
            () = async {
                if let Some(made) = make.await {
                    carry(made).await;
                }
            } => {}
        }
    });
    busy::counted(&proxy.pod.gauge, guarded).await;
}
