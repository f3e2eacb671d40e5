//! The running process: listeners, tasks, and their end.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use mesh_core::xds::proto::ca::istio_certificate_service_server::IstioCertificateServiceServer;
use mesh_core::xds::proto::discovery::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer;
use mesh_core::xds::proto::node::node_service_server::NodeServiceServer;
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

use crate::ads::{AdsServer, Clients, seconds};
use crate::auth::{Access, TokenError, TokenKey};
use crate::ca::CaServer;
use crate::ca::store::{CaError, CaStore};
use crate::convert::Mesh;
use crate::debug::Debug;
use crate::enrol::{Enrolments, NodeServer};
use crate::hub::{Debounce, Hub};
use crate::metrics::Metrics;
use crate::source::dir::DirectorySource;
use crate::source::{Source, SourceError};

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
    /// Directory of objects.
    pub source: PathBuf,
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
    /// Further names of the TLS listener's certificate.
    pub names: Vec<String>,
    /// Mesh defaults.
    pub mesh: Mesh,
    /// How changes are collected.
    pub debounce: Debounce,
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
    /// The listener's own certificate or TLS settings.
    #[error("TLS listener: {0}")]
    Tls(String),
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
    tokens: Arc<TokenKey>,
    metrics: Arc<Metrics>,
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
}

/// Runs until `stop` is true; tells on `bound` where it listens.
///
/// # Errors
/// What is wrong with addresses, state directory, CA or source.
pub async fn run(
    options: Options,
    bound: impl FnOnce(Bound) + Send,
    stop: watch::Receiver<bool>,
) -> Result<(), RunError> {
    let metrics = Arc::new(Metrics::new());
    let store = Arc::new(CaStore::open(&options.state_dir, options.ca_dir.as_deref(), SystemTime::now())?);
    let parts = Parts {
        hub: Arc::new(Hub::new(options.mesh.clone())),
        clients: Arc::new(Clients::default()),
        enrolments: Arc::new(Enrolments::open(Some(options.state_dir.join("enrolment.json")))),
        store: store.clone(),
        tokens: Arc::new(TokenKey::open(&options.state_dir)?),
        metrics: metrics.clone(),
    };
    let tls = Arc::new(ArcSwap::new(server_config(&store, &options.names)?));
    let plain_listener = match options.listen_plain {
        Some(address) => Some(listen(address, "--listen-plain").await?),
        None => None,
    };
    let tls_listener = listen(options.listen_tls, "--listen-tls").await?;
    let debug_listener = listen(options.listen_debug, "--listen-debug").await?;
    let local = |l: &TcpListener, fallback| l.local_addr().unwrap_or(fallback);
    let addresses = Bound {
        plain: plain_listener.as_ref().and_then(|l| l.local_addr().ok()),
        tls: local(&tls_listener, options.listen_tls),
        debug: local(&debug_listener, options.listen_debug),
    };
    if let Some(address) = addresses.plain.filter(|a| !a.ip().is_loopback()) {
        warn!(%address, "the plaintext xDS listener is not on loopback: anyone who reaches it reads the mesh's configuration");
    }
    info!(plain = ?addresses.plain, tls = %addresses.tls, debug = %addresses.debug, "listening");
    bound(addresses);

    let (state, states) = watch::channel(Arc::default());
    let source = DirectorySource {
        path: options.source.clone(),
        root_namespace: options.mesh.root_namespace.clone(),
        memory: Some(options.state_dir.join("last-good.json")),
    };
    let debug = Debug {
        hub: parts.hub.clone(),
        clients: parts.clients.clone(),
        enrolments: parts.enrolments.clone(),
        metrics: metrics.clone(),
    };
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(debug.serve(debug_listener, stop.clone()));
    tasks.spawn(refresh_ca(store, tls.clone(), options.names.clone(), metrics.clone()));
    if let Some(listener) = plain_listener {
        let router = router(&parts, Access::Open, false);
        let (out, incoming) = mpsc::channel::<io::Result<TcpStream>>(16);
        tasks.spawn(accept_plain(listener, out));
        tasks.spawn(serve(router, incoming, stop.clone(), "plain"));
    }
    let secured = router(&parts, Access::Token(parts.tokens.clone()), true);
    let (out, incoming) = mpsc::channel::<io::Result<TlsStream<TcpStream>>>(16);
    tasks.spawn(accept_tls(tls_listener, tls, out));
    tasks.spawn(serve(secured, incoming, stop.clone(), "tls"));
    {
        let (hub, enrolments, metrics) = (parts.hub.clone(), parts.enrolments.clone(), metrics.clone());
        tasks.spawn(async move { hub.run(states, enrolments, options.debounce, metrics).await });
    }
    let mut stopped = stop.clone();
    tokio::select! {
        result = source.run(state) => result?,
        _ = stopped.wait_for(|s| *s) => info!("stopping"),
    }
    // Streams end, so that clients go elsewhere at once; what hangs is cut.
    parts.hub.close();
    let drained = timeout(GRACE, async {
        while !parts.clients.list().is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    if drained.await.is_err() {
        debug!("clients were cut");
    }
    tasks.shutdown().await;
    info!("stopped");
    Ok(())
}

async fn listen(address: SocketAddr, flag: &'static str) -> Result<TcpListener, RunError> {
    TcpListener::bind(address).await.map_err(|cause| RunError::Listen { address, flag, cause })
}

fn router(parts: &Parts, access: Access, with_token_services: bool) -> Router {
    let Parts { hub, clients, enrolments, store, metrics, .. } = parts;
    let ads = AdsServer::new(hub.clone(), clients.clone(), access.clone(), metrics.clone());
    // Who could report for a node could have its pods' traffic sent in the clear.
    let nodes = with_token_services.then(|| {
        let nodes = NodeServer::new(enrolments.clone(), access.clone(), metrics.clone());
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
        .add_service(
            AggregatedDiscoveryServiceServer::new(ads)
                .max_decoding_message_size(MAX_MESSAGE)
                .max_encoding_message_size(MAX_MESSAGE),
        )
        .add_optional_service(nodes)
        .add_optional_service(ca)
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

/// TLS 1.3 only, HTTP/2 only, no client certificate.
fn server_config(store: &CaStore, names: &[String]) -> Result<Arc<rustls::ServerConfig>, RunError> {
    let authority = store.authority();
    let (chain, key) = authority
        .server_certificate(names, SERVER_TTL, SystemTime::now())
        .map_err(|e| RunError::Tls(format!("{e} (check --name)")))?;
    let mut config = rustls::ServerConfig::builder_with_provider(mesh_core::tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| RunError::Tls(e.to_string()))?
        .with_no_client_auth()
        .with_single_cert(chain, PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key)))
        .map_err(|e| RunError::Tls(e.to_string()))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// Follows the CA's files, and renews the listener's certificate when they change or half its life is over.
async fn refresh_ca(
    store: Arc<CaStore>,
    tls: Arc<ArcSwap<rustls::ServerConfig>>,
    names: Vec<String>,
    metrics: Arc<Metrics>,
) {
    let mut made = SystemTime::now();
    loop {
        let before = store.authority();
        let expiry = |time| i64::try_from(seconds(time)).unwrap_or(i64::MAX);
        metrics.root_expiry.set(expiry(before.root_not_after()));
        metrics.chain_expiry.set(expiry(before.not_after()));
        tokio::time::sleep(CA_REFRESH).await;
        store.refresh(SystemTime::now());
        let after = store.authority();
        let changed = before.roots() != after.roots() || before.not_after() != after.not_after();
        let old = made.elapsed().unwrap_or(SERVER_TTL) > SERVER_TTL / 2;
        if changed || old {
            match server_config(&store, &names) {
                Ok(config) => {
                    tls.store(config);
                    made = SystemTime::now();
                }
                Err(error) => warn!(%error, "the listener keeps its certificate"),
            }
        }
    }
}
