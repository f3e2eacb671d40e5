//! Connecting: sockets, then TLS and HTTP/2 for a tunnel.
//!
//! Socket options cost a system call each. Listeners carry them for what they accept (Linux copies them), tunnels are
//! few, and a connection to the application never leaves the machine: it gets TCP_NODELAY only, since a dead peer on
//! the same kernel is noticed without keepalive.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use mesh_core::error::Code;
use mesh_core::hbone::{ClientConnection, Settings};
use mesh_core::identity::SpiffeId;
use mesh_core::telemetry::{Reporter, ReporterLabels};
use mesh_core::tls::{self, TlsError, WorkloadCertificate};
use socket2::{SockRef, Socket, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpSocket, TcpStream};

use super::busy;
use super::expiry::Expiry;
use super::failed::Failed;
use super::pool::{Key, Tunnel};
use super::worker::PodProxy;

/// HBONE reference §3: 180 s, 180 s, 9 probes.
const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(180))
    .with_interval(Duration::from_secs(180))
    .with_retries(9);

/// An open tunnel as the pool holds it.
#[derive(Clone)]
pub(super) struct TunnelHandle {
    /// For opening streams.
    pub(super) connection: ClientConnection,
    /// Who the peer proved to be.
    pub(super) peer: SpiffeId,
    expiry: Expiry,
    /// How many pings were answered when the peer was last asked whether it is there.
    doubted: Rc<Cell<Option<u64>>>,
}

impl TunnelHandle {
    /// Asks the peer whether it is there. No new stream is to use the tunnel until it answers; those that are open stay,
    /// and whether they are lost is for the keepalive to say.
    pub(super) fn doubt(&self) {
        self.doubted.set(Some(self.connection.pongs()));
        self.connection.ping();
    }

    /// Whether it was asked and has not answered.
    pub(super) fn is_doubted(&self) -> bool {
        self.doubted.get().is_some_and(|then| then == self.connection.pongs())
    }
}

impl Tunnel for TunnelHandle {
    fn max_streams(&self) -> usize {
        self.connection.max_streams()
    }

    fn is_open(&self) -> bool {
        !self.connection.is_closed() && !self.expiry.has_passed() && !self.is_doubted()
    }
}

/// What a dial is for; it decides what a timeout most likely means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A peer's tunnel port.
    Tunnel,
    /// A peer without a tunnel.
    Plain,
    /// The pod's own application.
    Application,
}

/// Sets the options that sockets accepted from `listener` inherit.
///
/// # Errors
/// The kernel refuses an option.
pub fn prepare_listener(listener: &std::net::TcpListener) -> io::Result<()> {
    let socket = SockRef::from(listener);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&KEEPALIVE)
}

/// Connects a socket that [`super::net::PodNet`] made.
pub(super) async fn connect(
    socket: io::Result<Socket>,
    to: SocketAddr,
    purpose: Purpose,
    timeout: Duration,
) -> Result<TcpStream, Failed> {
    try_connect(socket, to, purpose, timeout).await?.map_err(|e| failed_dial(to, purpose, &e))
}

/// Connects to the pod's own application with sockets that `make` gives. We choose their source ports (see
/// [`crate::sys::application_socket`]), so one may be taken for this very pair of addresses: then another is tried.
pub(super) async fn application(
    make: impl Fn() -> io::Result<Socket>,
    to: SocketAddr,
    timeout: Duration,
) -> Result<TcpStream, Failed> {
    let mut tries = 16;
    loop {
        tries -= 1;
        match try_connect(make(), to, Purpose::Application, timeout).await? {
            Err(e) if e.kind() == io::ErrorKind::AddrNotAvailable && tries > 0 => {}
            connected => return connected.map_err(|e| failed_dial(to, Purpose::Application, &e)),
        }
    }
}

/// One connect: the inner error is the kernel's.
async fn try_connect(
    socket: io::Result<Socket>,
    to: SocketAddr,
    purpose: Purpose,
    timeout: Duration,
) -> Result<io::Result<TcpStream>, Failed> {
    let prepare = |socket: Socket| {
        socket.set_tcp_nodelay(true)?;
        if purpose != Purpose::Application {
            socket.set_tcp_keepalive(&KEEPALIVE)?;
        }
        Ok::<_, io::Error>(TcpSocket::from_std_stream(socket.into()))
    };
    let socket = socket.and_then(prepare).map_err(|e| failed_dial(to, purpose, &e))?;
    match tokio::time::timeout(timeout, socket.connect(to)).await {
        Ok(connected) => Ok(connected),
        Err(_) if purpose == Purpose::Tunnel => Err(Failed::new(
            Code::TunnelTimeout,
            format!(
                "connection timed out, maybe a NetworkPolicy is blocking HBONE port {}: {to} did not answer within {timeout:?}",
                to.port()
            ),
        )),
        Err(_) => Err(Failed::new(
            Code::DialTimeout,
            format!("connection timed out: {to} did not answer within {timeout:?}"),
        )),
    }
}

fn failed_dial(to: SocketAddr, purpose: Purpose, error: &io::Error) -> Failed {
    let code = match error.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE) => Code::Overloaded,
        Some(libc::ENOENT | libc::ENODEV) => Code::PodGone,
        Some(libc::ETIMEDOUT) => Code::DialTimeout,
        _ if purpose == Purpose::Tunnel => Code::TunnelRefused,
        _ => Code::DialFailed,
    };
    Failed::new(code, format!("connection failed: {to}: {error}"))
}

/// Opens a tunnel for `key`. Its driver runs until the connection ends or the pod is gone.
pub(super) async fn tunnel(proxy: Rc<PodProxy>, key: Key) -> Result<TunnelHandle, Failed> {
    let shared = proxy.shared();
    let socket = proxy.pod.net.outbound_socket(key.destination);
    let timeout = shared.config.proxy.connect_timeout;
    let tcp = connect(socket, key.destination, Purpose::Tunnel, timeout).await?;
    secure(&proxy, tcp, &key).await
}

/// TLS and HTTP/2 as `key` says, over a connection that is open: a socket, or a stream of an outer tunnel.
pub(super) async fn secure<IO>(proxy: &Rc<PodProxy>, io: IO, key: &Key) -> Result<TunnelHandle, Failed>
where
    IO: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let shared = proxy.shared();
    let certificate = shared.certificates.wait(&key.source, shared.config.proxy.workload_wait).await?;
    let config = certificate
        .client_config(&key.expected)
        .map_err(|e| Failed::new(e.code(), format!("identity error: {e}")))?;
    let (tls, peer) = tls::connect(config, io).await.map_err(|e| tls_failed(&e))?;
    let settings = Settings { streams: streams(shared.config.proxy.pool_max_streams), ..Settings::client() };
    let (connection, driver) = ClientConnection::handshake(tls, &settings);
    let identity = peer.identity.clone();
    let expiry = Expiry::of(&certificate, &peer.chain);
    let pod = Arc::clone(&proxy.pod);
    let driven = drive(Rc::clone(proxy), driver, certificate, peer);
    tokio::task::spawn_local(async move { busy::counted(&pod.gauge, pin!(driven)).await });
    Ok(TunnelHandle { connection, peer: identity, expiry, doubted: Rc::default() })
}

/// Moves a tunnel's bytes until it ends, the pod is gone, or the peer's certificate is revoked.
async fn drive(
    proxy: Rc<PodProxy>,
    driver: impl Future<Output = Result<(), mesh_core::hbone::Error>>,
    certificate: Arc<WorkloadCertificate>,
    peer: tls::handshake::Peer,
) {
    let mut driver = std::pin::pin!(driver);
    loop {
        tokio::select! {
            ended = &mut driver => {
                if let Err(error) = ended {
                    tracing::debug!(peer = %peer.identity, %error, code = error.code().code(), "a tunnel ended");
                }
                return;
            }
            () = proxy.pod.gone.cancelled() => return,
            () = proxy.worker.recheck.notified() => {
                if certificate.recheck_peer(&peer.chain).is_err() {
                    let labels = ReporterLabels(Reporter::Source);
                    proxy.shared().metrics.crl_rejections.get_or_create(&labels).inc();
                    tracing::warn!(peer = %peer.identity, "a tunnel was closed: peer certificate revoked by CRL");
                    return;
                }
            }
        }
    }
}

fn streams(limit: usize) -> u32 {
    u32::try_from(limit).unwrap_or(u32::MAX)
}

/// A failed handshake in the words of Istio's node proxy.
pub(super) fn tls_failed(error: &TlsError) -> Failed {
    Failed::new(error.code(), format!("tls error: {error}"))
}

/// Makes dropping `stream` send RST: the client must not take a failure for the end of the data.
pub(super) fn reset_on_close(stream: &TcpStream) {
    // A socket that is already gone needs no RST.
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}
