//! The running process: listeners, tasks, and their end.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use mesh_core::xds::proto::ca::istio_certificate_service_server::IstioCertificateServiceServer;
use mesh_core::xds::proto::node::node_service_server::NodeServiceServer;
use mesh_core::xds::proto::node::replica_service_server::ReplicaServiceServer;
use rustls::server::danger::ClientCertVerifier;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::transport::server::{Router, TcpConnectInfo, TlsConnectInfo};
use tracing::{debug, error, info, warn};

use crate::ads::service::AdsService;
use crate::ads::{AdsServer, Clients, convergence, seconds};
use crate::auth::{Access, TokenError, TokenKey};
use crate::ca::CaServer;
use crate::ca::store::{CaError, CaStore};
use crate::convert::Mesh;
use crate::debug::Debug;
use crate::enrol::{Enrolments, NodeServer};
use crate::hub::{Debounce, Hub};
use crate::kubernetes::secret::SecretError;
use crate::kubernetes::webhook::Webhook;
use crate::kubernetes::{self, Cluster, Shared};
use crate::metrics::Metrics;
use crate::relay::facts::{Facts, Links};
use crate::relay::gate::Gate;
use crate::relay::questions::Agents;
use crate::relay::web::{WAITING, Web};
use crate::relay::{Limits, Relay, listen};
use crate::replicas::{self, Proxies, ReplicaServer, Replicas, Told};
use crate::source::dir::DirectorySource;
use crate::source::{Source, SourceError, State};

/// Largest message that is read: a client sends back the version of everything it holds.
const MAX_MESSAGE: usize = 200 << 20;
/// A TLS handshake takes no longer.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Handshakes at once; more wait in the kernel's queue.
const HANDSHAKES: usize = 256;
/// The CA's files are looked at again this often.
const CA_REFRESH: Duration = Duration::from_secs(5);
/// Lifetime of the listener's own certificate; it is made anew at half of it.
const SERVER_TTL: Duration = Duration::from_secs(24 * 3600);
/// Streams get this long to end when the process stops.
const GRACE: Duration = Duration::from_secs(2);

/// What `mesh-control run` is told.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where objects come from.
    pub source: SourceOption,
    /// Keys, certificates, reports.
    pub state_dir: PathBuf,
    /// Plugged-in CA.
    pub ca_dir: Option<PathBuf>,
    /// Plaintext xDS; none turns it off.
    pub listen_plain: Option<SocketAddr>,
    /// xDS and CA.
    pub listen_tls: SocketAddr,
    /// Metrics and debug.
    pub listen_debug: SocketAddr,
    /// Events of all nodes, over TLS; none leaves them to those on this machine.
    pub listen_relay: Option<SocketAddr>,
    /// Whose client certificates may ask there; needed without a cluster, which decides by token.
    pub relay_client_ca: Option<PathBuf>,
    /// How many events nodes are asked for, and how many are kept.
    pub relay: Limits,
    /// Where traces are shown, for the map's links.
    pub links: Links,
    /// Further names of the TLS listener's certificate.
    pub names: Vec<String>,
    /// Mesh defaults.
    pub mesh: Mesh,
    /// How changes are collected.
    pub debounce: Debounce,
}

/// Where objects come from, and with them everything else that a cluster does differently from a directory.
#[derive(Debug, Clone)]
pub enum SourceOption {
    /// A directory of YAML; tokens and the CA are ours.
    Directory(PathBuf),
    /// A cluster's API server, which also checks tokens and keeps the CA.
    Kubernetes(kubernetes::Options),
}

/// Why the process cannot run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A listener's address cannot be bound.
    #[error(
        "cannot listen on {address} ({flag}): {cause}; is another mesh-control running, or is the address not this machine's?"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The flag that set it.
        flag: &'static str,
        /// The operating system's reason.
        cause: io::Error,
    },
    /// The CA.
    #[error("certificate authority: {0}")]
    Ca(#[from] CaError),
    /// The token key.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The source.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The CA of a cluster.
    #[error("certificate authority: {0}")]
    Secret(#[from] SecretError),
    /// The listener's own certificate or TLS settings.
    #[error("TLS listener: {0}")]
    Tls(String),
    /// Who may ask the relay.
    #[error("{0}")]
    Relay(String),
}

/// Peer address of a request on either listener.
pub(crate) fn peer_of<T>(request: &tonic::Request<T>) -> Option<SocketAddr> {
    let extensions = request.extensions();
    extensions
        .get::<TcpConnectInfo>()
        .or_else(|| extensions.get::<TlsConnectInfo<TcpConnectInfo>>().map(TlsConnectInfo::get_ref))
        .and_then(TcpConnectInfo::remote_addr)
}

/// Everything that the listeners share.
struct Parts {
    hub: Arc<Hub>,
    clients: Arc<Clients>,
    enrolments: Arc<Enrolments>,
    store: Arc<CaStore>,
    relay: Arc<Relay>,
    agents: Arc<Agents>,
    metrics: Arc<Metrics>,
}

impl Parts {
    /// What the debug port shows.
    fn debug(&self, web: Web) -> Debug {
        Debug {
            hub: self.hub.clone(),
            clients: self.clients.clone(),
            enrolments: self.enrolments.clone(),
            metrics: self.metrics.clone(),
            web,
        }
    }

    /// What the map says beside traffic.
    fn facts(&self, links: &Links) -> Facts {
        Facts {
            hub: self.hub.clone(),
            clients: self.clients.clone(),
            enrolments: self.enrolments.clone(),
            store: self.store.clone(),
            links: links.clone(),
            seen: Arc::default(),
        }
    }

    /// What replicas tell each other.
    fn told(&self) -> Told {
        Told { enrolments: self.enrolments.clone(), relay: self.relay.clone(), agents: self.agents.clone() }
    }

    /// What writers to the cluster need.
    fn shared(&self) -> Shared {
        Shared {
            hub: self.hub.clone(),
            clients: self.clients.clone(),
            enrolments: self.enrolments.clone(),
            agents: self.agents.clone(),
            store: self.store.clone(),
        }
    }
}

/// The addresses that a running process listens on.
#[derive(Debug, Clone, Copy)]
pub struct Bound {
    /// Plaintext xDS.
    pub plain: Option<SocketAddr>,
    /// xDS and CA.
    pub tls: SocketAddr,
    /// Metrics and debug.
    pub debug: SocketAddr,
    /// Validation of objects.
    pub webhook: Option<SocketAddr>,
    /// Events of all nodes.
    pub relay: Option<SocketAddr>,
}

/// Runs until `stop` is true; tells on `bound` where it listens.
///
/// # Errors
/// What is wrong with addresses, state directory, CA or source.
pub async fn run(
    options: Options,
    bound: impl FnOnce(Bound) + Send,
    mut stop: watch::Receiver<bool>,
) -> Result<(), RunError> {
    let cluster = match &options.source {
        SourceOption::Directory(_) => None,
        SourceOption::Kubernetes(cluster) => Some(Cluster::connect(cluster, &options.mesh).await?),
    };
    let store = match &cluster {
        None => CaStore::open(&options.state_dir, options.ca_dir.as_deref(), SystemTime::now())?,
        Some(cluster) => match cluster.secret().wait(&mut stop).await? {
            Some(authority) => CaStore::holding(&options.state_dir, authority)?,
            None => return Ok(()),
        },
    };
    let store = Arc::new(store);
    let metrics = Arc::new(Metrics::new());
    let parts = Parts {
        hub: Arc::new(Hub::new(options.mesh.clone())),
        clients: Arc::new(Clients::default()),
        enrolments: Arc::new(Enrolments::open(Some(options.state_dir.join("enrolment.json")))),
        store: store.clone(),
        relay: Arc::new(Relay::new(options.relay, metrics.clone())),
        agents: Arc::default(),
        metrics: metrics.clone(),
    };
    let access = match &cluster {
        None => Access::Token(Arc::new(TokenKey::open(&options.state_dir)?)),
        Some(cluster) => Access::Review(Arc::new(cluster.reviewer(parts.hub.clone()))),
    };
    let replicas = Replicas::new(cluster.as_ref().map(|c| c.replicas(&options.state_dir)), parts.told());
    let viewers = relay_clients(&options)?;
    let tls = Arc::new(Settings::new(&store, &options.names, viewers)?);
    let (listeners, addresses) = Listeners::open(&options)?;
    bound(addresses);

    let (state, states) = watch::channel(Arc::default());
    let gate = cluster.as_ref().map_or(Gate::Alone, |cluster| Gate::Cluster(Arc::new(cluster.viewers())));
    let web = Web {
        relay: parts.relay.clone(),
        agents: parts.agents.clone(),
        facts: Some(parts.facts(&options.links)),
        gate,
        waiting: Arc::new(Semaphore::new(WAITING)),
    };
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(parts.debug(web.clone()).serve(listeners.debug, stop.clone()));
    tasks.spawn(refresh_ca(store.clone(), tls.clone(), metrics.clone()));
    if let Some(listener) = listeners.relay {
        tasks.spawn(listen::serve(web, listener, tls.relay.clone(), stop.clone()));
    }
    if let Some(listener) = listeners.plain {
        let router = router(&parts, Access::Open, false);
        let (out, incoming) = mpsc::channel::<io::Result<TcpStream>>(16);
        tasks.spawn(accept_plain(listener, out));
        tasks.spawn(serve(router, incoming, stop.clone(), "plain"));
    }
    if let Some(listener) = listeners.webhook {
        let webhook = Webhook { mesh: options.mesh.clone(), tls: tls.main.clone() };
        tasks.spawn(webhook.serve(listener, stop.clone()));
    }
    let secured = secured(&parts, access, &options);
    tasks.spawn(replicas.clone().follow(states.clone()));
    let (out, incoming) = mpsc::channel::<io::Result<TlsStream<TcpStream>>>(16);
    tasks.spawn(accept_tls(listeners.tls, tls.main.clone(), out));
    tasks.spawn(serve(secured, incoming, stop.clone(), "tls"));
    if let Some(cluster) = &cluster {
        cluster.spawn(&mut tasks, &parts.shared(), &states, &stop);
    }
    {
        let (hub, metrics) = (parts.hub.clone(), metrics.clone());
        tasks.spawn(async move { hub.run(states, replicas, options.debounce, metrics).await });
    }
    tasks.spawn(convergence::measure(parts.hub.clone(), parts.clients.clone(), metrics));
    let mut stopped = stop.clone();
    tokio::select! {
        result = follow_source(&options, cluster, state) => result?,
        _ = stopped.wait_for(|s| *s) => info!("stopping"),
    }
    drain(&parts).await;
    tasks.shutdown().await;
    info!("stopped");
    Ok(())
}

/// Runs the source until nobody listens to it.
async fn follow_source(
    options: &Options,
    cluster: Option<Cluster>,
    state: watch::Sender<Arc<State>>,
) -> Result<(), SourceError> {
    match (&options.source, cluster) {
        (SourceOption::Directory(path), _) => {
            let source = DirectorySource {
                path: path.clone(),
                root_namespace: options.mesh.root_namespace.clone(),
                memory: Some(options.state_dir.join("last-good.json")),
            };
            source.run(state).await
        }
        (SourceOption::Kubernetes(_), Some(cluster)) => cluster.source().run(state).await,
        (SourceOption::Kubernetes(_), None) => Ok(()),
    }
}

/// Streams end, so that clients go elsewhere at once; what hangs is cut.
async fn drain(parts: &Parts) {
    parts.hub.close();
    let drained = timeout(GRACE, async {
        while !parts.clients.list().is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    if drained.await.is_err() {
        debug!("clients were cut");
    }
}

/// The sockets, all bound before any is served.
struct Listeners {
    plain: Option<TcpListener>,
    tls: TcpListener,
    debug: TcpListener,
    webhook: Option<TcpListener>,
    relay: Option<TcpListener>,
}

impl Listeners {
    fn open(options: &Options) -> Result<(Self, Bound), RunError> {
        let optional =
            |address: Option<SocketAddr>, flag| address.map(|address| listen(address, flag)).transpose();
        let plain = optional(options.listen_plain, "--listen-plain")?;
        let webhook = match &options.source {
            SourceOption::Kubernetes(cluster) => cluster.listen_webhook,
            SourceOption::Directory(_) => None,
        };
        let webhook = optional(webhook, "--listen-webhook")?;
        let relay = optional(options.listen_relay, "--listen-relay")?;
        let tls = listen(options.listen_tls, "--listen-tls")?;
        let debug = listen(options.listen_debug, "--listen-debug")?;
        let local = |l: &TcpListener, fallback| l.local_addr().unwrap_or(fallback);
        let addresses = Bound {
            plain: plain.as_ref().and_then(|l| l.local_addr().ok()),
            webhook: webhook.as_ref().and_then(|l| l.local_addr().ok()),
            relay: relay.as_ref().and_then(|l| l.local_addr().ok()),
            tls: local(&tls, options.listen_tls),
            debug: local(&debug, options.listen_debug),
        };
        if let Some(address) = addresses.plain.filter(|a| !a.ip().is_loopback()) {
            warn!(%address, "the plaintext xDS listener is not on loopback: anyone who reaches it reads the mesh's configuration");
        }
        info!(plain = ?addresses.plain, tls = %addresses.tls, debug = %addresses.debug, webhook = ?addresses.webhook, relay = ?addresses.relay, "listening");
        Ok((Self { plain, tls, debug, webhook, relay }, addresses))
    }
}

/// As many as the standard library lets wait.
const BACKLOG: i32 = 1024;

fn listen(address: SocketAddr, flag: &'static str) -> Result<TcpListener, RunError> {
    let bound = || {
        // Or what a control plane that was killed has in TIME_WAIT keeps the next one out.
        let socket = mesh_core::listen::bound(address, |socket| socket.set_reuse_address(true))?;
        socket.listen(BACKLOG)?;
        TcpListener::from_std(socket.into())
    };
    bound().map_err(|cause| RunError::Listen { address, flag, cause })
}

fn router(parts: &Parts, access: Access, with_token_services: bool) -> Router {
    let Parts { hub, clients, enrolments, store, relay, agents, metrics } = parts;
    let ads = AdsServer::new(hub.clone(), clients.clone(), access.clone(), metrics.clone());
    // Who could report for a node could have its pods' traffic sent in the clear.
    let nodes = with_token_services.then(|| {
        let nodes = NodeServer::new(
            hub.clone(),
            enrolments.clone(),
            relay.clone(),
            agents.clone(),
            access.clone(),
            metrics.clone(),
        );
        NodeServiceServer::new(nodes).max_decoding_message_size(MAX_MESSAGE)
    });
    let ca = with_token_services.then(|| {
        IstioCertificateServiceServer::new(CaServer::new(hub.clone(), store.clone(), access, metrics.clone()))
    });
    Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20)
        .add_service(AdsService::new(ads, MAX_MESSAGE))
        .add_optional_service(nodes)
        .add_optional_service(ca)
}

/// The services for who shows a token.
fn secured(parts: &Parts, access: Access, options: &Options) -> Router {
    let router = router(parts, access.clone(), true);
    let SourceOption::Kubernetes(cluster) = &options.source else { return router };
    let server = ReplicaServer {
        told: parts.told(),
        proxies: Arc::new(Proxies::new(parts.hub.clone(), parts.clients.clone())),
        access,
        account: cluster.replica_account.clone(),
    };
    let server = ReplicaServiceServer::new(server);
    router.add_service(server.max_decoding_message_size(replicas::LARGEST_MESSAGE))
}

async fn serve<S>(
    router: Router,
    incoming: mpsc::Receiver<io::Result<S>>,
    mut stop: watch::Receiver<bool>,
    name: &'static str,
) where
    S: tonic::transport::server::Connected
        + tokio::io::AsyncRead
        + tokio::io::AsyncWrite
        + Send
        + Unpin
        + 'static,
{
    let stopping = async move {
        // An error means that the stopper is gone, which stops as well.
        let _ = stop.wait_for(|s| *s).await;
    };
    if let Err(error) = router.serve_with_incoming_shutdown(ReceiverStream::new(incoming), stopping).await {
        error!(%error, listener = name, "listener failed");
    }
}

/// Accepts until the receiver is gone. Failures (no file descriptors) pass.
async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // Small responses must not wait for acknowledgements; a failure costs latency only.
                let _ = stream.set_nodelay(true);
                return stream;
            }
            Err(cause) => {
                warn!(%cause, "cannot accept");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn accept_plain(listener: TcpListener, out: mpsc::Sender<io::Result<TcpStream>>) {
    loop {
        if out.send(Ok(accept(&listener).await)).await.is_err() {
            return;
        }
    }
}

async fn accept_tls(
    listener: TcpListener,
    config: Arc<ArcSwap<rustls::ServerConfig>>,
    out: mpsc::Sender<io::Result<TlsStream<TcpStream>>>,
) {
    let slots = Arc::new(Semaphore::new(HANDSHAKES));
    while !out.is_closed() {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        let stream = accept(&listener).await;
        let acceptor = TlsAcceptor::from(config.load_full());
        let out = out.clone();
        tokio::spawn(async move {
            let peer = stream.peer_addr().ok();
            match timeout(HANDSHAKE, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => {
                    drop(slot);
                    // Closed while stopping.
                    let _ = out.send(Ok(stream)).await;
                }
                Ok(Err(cause)) => debug!(?peer, %cause, "TLS handshake"),
                Err(_) => debug!(?peer, "TLS handshake takes too long"),
            }
        });
    }
}

/// Settings of the TLS listeners, made anew together.
struct Settings {
    names: Vec<String>,
    clients: Option<Arc<dyn ClientCertVerifier>>,
    /// xDS, CA and webhook: HTTP/2, no client certificate.
    main: Arc<ArcSwap<rustls::ServerConfig>>,
    /// The relay: HTTP/1.1, with a client certificate where the operator named a CA for them.
    relay: Arc<ArcSwap<rustls::ServerConfig>>,
}

impl Settings {
    fn new(
        store: &CaStore,
        names: &[String],
        clients: Option<Arc<dyn ClientCertVerifier>>,
    ) -> Result<Self, RunError> {
        let config = |clients, protocol| server_config(store, names, clients, protocol);
        let main = Arc::new(ArcSwap::new(config(None, b"h2")?));
        let relay = Arc::new(ArcSwap::new(config(clients.clone(), b"http/1.1")?));
        Ok(Self { names: names.to_vec(), clients, main, relay })
    }

    fn renew(&self, store: &CaStore) -> Result<(), RunError> {
        let new = Self::new(store, &self.names, self.clients.clone())?;
        self.main.store(new.main.load_full());
        self.relay.store(new.relay.load_full());
        Ok(())
    }
}

/// Who may ask the relay by certificate; none where tokens decide.
fn relay_clients(options: &Options) -> Result<Option<Arc<dyn ClientCertVerifier>>, RunError> {
    match (&options.relay_client_ca, &options.source) {
        (Some(path), SourceOption::Directory(_)) => {
            listen::client_verifier(path).map(Some).map_err(RunError::Relay)
        }
        (Some(_), SourceOption::Kubernetes(_)) => Err(RunError::Relay(
            "--relay-client-ca has no meaning with --source kubernetes: there the API server says who may see what".into(),
        )),
        (None, SourceOption::Directory(_)) if options.listen_relay.is_some() => Err(RunError::Relay(
            "--listen-relay without a cluster needs --relay-client-ca FILE: whose client certificates may ask".into(),
        )),
        (None, _) => Ok(None),
    }
}

/// TLS 1.3 only, one protocol.
fn server_config(
    store: &CaStore,
    names: &[String],
    clients: Option<Arc<dyn ClientCertVerifier>>,
    protocol: &[u8],
) -> Result<Arc<rustls::ServerConfig>, RunError> {
    let authority = store.authority();
    let (chain, key) = authority
        .server_certificate(names, SERVER_TTL, SystemTime::now())
        .map_err(|e| RunError::Tls(format!("{e} (check --name)")))?;
    let builder = rustls::ServerConfig::builder_with_provider(mesh_core::tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| RunError::Tls(e.to_string()))?;
    let builder = match clients {
        Some(clients) => builder.with_client_cert_verifier(clients),
        None => builder.with_no_client_auth(),
    };
    let mut config = builder
        .with_single_cert(chain, PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key)))
        .map_err(|e| RunError::Tls(e.to_string()))?;
    config.alpn_protocols = vec![protocol.to_vec()];
    Ok(Arc::new(config))
}

/// Follows the CA's files, and renews the listeners' certificate when they change or half its life is over.
async fn refresh_ca(store: Arc<CaStore>, tls: Arc<Settings>, metrics: Arc<Metrics>) {
    let mut made = SystemTime::now();
    loop {
        let before = store.authority();
        let expiry = |time| i64::try_from(seconds(time)).unwrap_or(i64::MAX);
        metrics.expiry.root.set(expiry(before.root_not_after()));
        metrics.expiry.chain.set(expiry(before.not_after()));
        tokio::time::sleep(CA_REFRESH).await;
        store.refresh(SystemTime::now());
        let after = store.authority();
        let changed = before.roots() != after.roots() || before.not_after() != after.not_after();
        let old = made.elapsed().unwrap_or(SERVER_TTL) > SERVER_TTL / 2;
        if changed || old {
            match tls.renew(&store) {
                Ok(()) => made = SystemTime::now(),
                Err(error) => warn!(%error, "the listeners keep their certificate"),
            }
        }
    }
}
