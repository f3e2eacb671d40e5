//! The data workers: one OS thread each, which owns a connection from accept to close. All listen on the same port
//! (`SO_REUSEPORT`), so that the kernel spreads tunnels over them.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mesh_core::state::Str;
use mesh_core::telemetry::{HandleCache, RequestCache};
use mesh_core::xds::proto::l7;
use rustls::ClientConfig;
use socket2::TcpKeepalive;
use tokio::net::TcpListener;
use tokio::runtime::LocalOptions;
use tokio_util::sync::CancellationToken;

use super::io::Keeper;
use super::pool::Pool;
use super::secure::{self, Inside};
use super::{Shared, inbound, listeners, spans};
use crate::config::Role;
use crate::routing::Rule;
use crate::trace::export::Outbox;
use crate::upstream::RetryPolicy;

/// Turns of tasks after which a worker asks the kernel what else is ready.
const TURNS: u32 = 16;
/// Connections that the kernel completes before we accept them.
const BACKLOG: i32 = 1024;
/// How often idle connections are looked for.
const RELEASE_EVERY: Duration = Duration::from_secs(2);
/// A worker that is out of files waits this long before it accepts again.
const OUT_OF_FILES_PAUSE: Duration = Duration::from_millis(50);
/// HBONE reference §3: 180 s, 180 s, 9 probes.
pub(super) const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(180))
    .with_interval(Duration::from_secs(180))
    .with_retries(9);

/// A running worker.
pub struct Worker {
    exit: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread of worker `index` and its listener.
    ///
    /// # Errors
    /// The address cannot be bound, or the thread or its event loop cannot be made.
    pub fn start(index: usize, shared: Arc<Shared>) -> io::Result<Self> {
        let tunnels = shared.config.own.role == Role::Waypoint;
        let listener = if tunnels { Some(listen(shared.config.listen)?) } else { None };
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
            runtime.block_on(async {
                let local = Local::new(shared);
                tokio::select! {
                    () = serve(&local, listener) => {}
                    () = until.cancelled() => {}
                }
            });
            // What is still open ends here, each with its line in the log.
            drop(runtime);
        })?;
        result.recv().unwrap_or_else(|_| Err(io::Error::other("the thread of a data worker ended")))?;
        Ok(Self { exit, thread: Some(thread) })
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
pub struct Local {
    /// With the others.
    pub shared: Arc<Shared>,
    /// Tunnels and connections to endpoints.
    pub pool: Pool,
    /// Keeps clients' streams at their end.
    pub keeper: Keeper,
    /// Request metrics by who talks to whom and how it ended.
    pub requests: RefCell<RequestCache>,
    /// TCP metrics by pair of peers.
    pub connections: RefCell<HandleCache>,
    /// For chances.
    pub rng: RefCell<fastrand::Rng>,
    /// Spans that collectors have not got yet.
    pub spans: Outbox,
    /// Addresses of names, with when they were asked for.
    pub names: RefCell<HashMap<Str, (Vec<IpAddr>, Instant)>>,
    retries: RefCell<Retries>,
    /// TLS of applications, by address in memory of what it was made from, which it keeps.
    tls: RefCell<TlsConfigs>,
}

/// A configuration, or why there is none.
type TlsConfig = Result<Arc<ClientConfig>, String>;
type TlsConfigs = HashMap<(usize, Inside), (Arc<l7::ClientTls>, TlsConfig)>;

/// Retry policies of rules, ready to be used, under one version of the mesh's settings.
#[derive(Default)]
struct Retries {
    settings: Arc<l7::Settings>,
    default: Option<Rc<RetryPolicy>>,
    /// By address in memory of what they were made from, which they keep.
    by_rule: HashMap<usize, (Arc<l7::Retry>, Rc<RetryPolicy>)>,
}

/// Retry policies, and TLS configurations, that a worker keeps; beyond, it starts over.
const RETRY_POLICIES: usize = 4096;

impl Local {
    /// A worker without connections, on this thread's runtime.
    #[must_use]
    pub fn new(shared: Arc<Shared>) -> Rc<Self> {
        let keeper = Keeper::start();
        Rc::new(Self {
            spans: Outbox::new(shared.telemetry.spans.clone()),
            shared,
            pool: Pool::new(keeper.clone()),
            keeper,
            requests: RefCell::default(),
            connections: RefCell::default(),
            rng: RefCell::new(fastrand::Rng::new()),
            names: RefCell::default(),
            retries: RefCell::default(),
            tls: RefCell::default(),
        })
    }
}

impl Local {
    /// The TLS configuration of a destination.
    pub(super) fn tls_config(&self, tls: &Arc<l7::ClientTls>, inside: Inside) -> TlsConfig {
        let mut kept = self.tls.borrow_mut();
        if kept.len() >= RETRY_POLICIES {
            kept.clear();
        }
        let made = || (Arc::clone(tls), secure::config(tls, inside));
        kept.entry((Arc::as_ptr(tls).addr(), inside)).or_insert_with(made).1.clone()
    }

    /// The retry policy of a rule, or without one the mesh's.
    #[must_use]
    pub fn retry_policy(&self, settings: &Arc<l7::Settings>, rule: Option<&Rule>) -> Rc<RetryPolicy> {
        let mut kept = self.retries.borrow_mut();
        if !Arc::ptr_eq(&kept.settings, settings) || kept.by_rule.len() >= RETRY_POLICIES {
            *kept = Retries { settings: Arc::clone(settings), ..Retries::default() };
        }
        let Retries { settings, default, by_rule } = &mut *kept;
        match rule.and_then(|rule| rule.retry.as_ref()) {
            None => Rc::clone(default.get_or_insert_with(|| Rc::new(RetryPolicy::new(None, settings)))),
            Some(wire) => {
                let entry = by_rule.entry(Arc::as_ptr(wire).addr());
                let made = || (Arc::clone(wire), Rc::new(RetryPolicy::new(Some(wire), settings)));
                Rc::clone(&entry.or_insert_with(made).1)
            }
        }
    }
}

pub(super) fn listen(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = mesh_core::listen::bound(address, |socket| {
        socket.set_reuse_port(true)?;
        socket.set_reuse_address(true)?;
        // Accepted sockets inherit both.
        socket.set_tcp_nodelay(true)?;
        socket.set_tcp_keepalive(&KEEPALIVE)
    })?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

async fn serve(local: &Rc<Local>, listener: Option<std::net::TcpListener>) {
    let mut listener = match listener.map(TcpListener::from_std).transpose() {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%error, "cannot serve the tunnel port"),
    };
    if listener.is_none() {
        let local = Rc::clone(local);
        drop(tokio::task::spawn_local(async move { listeners::serve(&local).await }));
    }
    let exporting = Rc::clone(local);
    drop(tokio::task::spawn_local(async move { spans::serve(&exporting).await }));
    let mut release = tokio::time::interval(RELEASE_EVERY);
    loop {
        let accepted = async {
            match &listener {
                Some(listener) => listener.accept().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            accepted = accepted => match accepted {
                Ok((stream, peer)) => {
                    let local = Rc::clone(local);
                    drop(tokio::task::spawn_local(async move { inbound::handle(&local, stream, peer).await }));
                }
                Err(error) => on_accept_error(&error).await,
            },
            _ = release.tick() => {
                local.pool.release(Instant::now());
                mesh_core::tls::buffers::release();
            }
            // From here on the kernel refuses new tunnels, or gives them to a successor.
            () = local.shared.drain.cancelled(), if listener.is_some() => listener = None,
        }
    }
}

pub(super) async fn on_accept_error(error: &io::Error) {
    // A client that left before it was accepted is nobody's problem.
    if error.kind() != io::ErrorKind::ConnectionAborted {
        tracing::error!(%error, "cannot accept a connection");
        tokio::time::sleep(OUT_OF_FILES_PAUSE).await;
    }
}
