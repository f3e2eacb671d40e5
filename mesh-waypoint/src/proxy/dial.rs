//! Opening tunnels and connections to endpoints.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_core::hbone::{ClientConnection, Settings};
use mesh_core::identity::SpiffeId;
use mesh_core::tls::{self, WorkloadCertificate};
use rustls_pki_types::CertificateDer;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use super::Shared;
use super::worker::KEEPALIVE;

/// Why an endpoint could not be connected to.
#[derive(Debug, Clone, thiserror::Error)]
pub enum DialError {
    /// The kernel says why.
    #[error("delayed connect error: {0}")]
    Connect(Arc<str>),
    /// No answer.
    #[error("connection timeout")]
    Timeout,
    /// TLS failed: an identity that is not expected, an expired certificate.
    #[error("TLS error: {0}")]
    Tls(Arc<str>),
    /// The peer's proxy refused, or its connection ended.
    #[error("{0}")]
    Tunnel(Arc<str>),
}

impl DialError {
    /// Of the kernel.
    pub(super) fn connect(error: &io::Error) -> Self {
        Self::Connect(error.to_string().into())
    }
}

/// An open tunnel.
pub(super) struct Opened {
    /// For opening streams.
    pub(super) connection: ClientConnection,
    /// Who the peer proved to be.
    pub(super) peer: SpiffeId,
    /// The certificates of both sides hold until then.
    pub(super) until: SystemTime,
}

/// Connects to a socket.
pub(super) async fn plain(to: SocketAddr, timeout: Duration) -> Result<TcpStream, DialError> {
    let connected = tokio::time::timeout(timeout, TcpStream::connect(to)).await;
    let stream = connected.map_err(|_elapsed| DialError::Timeout)?.map_err(|e| DialError::connect(&e))?;
    let prepare = || {
        stream.set_nodelay(true)?;
        SockRef::from(&stream).set_tcp_keepalive(&KEEPALIVE)
    };
    prepare().map_err(|e| DialError::connect(&e))?;
    Ok(stream)
}

/// Opens a tunnel to a peer that must prove to be one of `expected`. Its driver runs until the connection ends.
pub(super) async fn tunnel(
    shared: Arc<Shared>,
    to: SocketAddr,
    expected: Vec<SpiffeId>,
    timeout: Duration,
) -> Result<Opened, DialError> {
    let opened = async {
        let tcp = plain(to, timeout).await?;
        secure(&shared, tcp, &expected).await
    };
    tokio::time::timeout(timeout, opened).await.map_err(|_elapsed| DialError::Timeout)?
}

/// TLS and HTTP/2 over a connection that is open: a socket, or a stream of an outer tunnel.
pub(super) async fn secure<IO>(shared: &Shared, io: IO, expected: &[SpiffeId]) -> Result<Opened, DialError>
where
    IO: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let tls_error = |text: String| DialError::Tls(text.into());
    let certificate = shared.certificate.load_full();
    let certificate = certificate.ok_or_else(|| tls_error("the waypoint has no certificate".to_owned()))?;
    let config = certificate.client_config(expected).map_err(|e| tls_error(e.to_string()))?;
    let (channel, peer) = tls::connect(config, io).await.map_err(|e| tls_error(e.to_string()))?;
    let (connection, driver) = ClientConnection::handshake(channel, &Settings::client());
    let identity = peer.identity.clone();
    drop(tokio::task::spawn_local(async move {
        if let Err(error) = driver.await {
            tracing::debug!(peer = %identity, %error, code = error.code().code(), "a tunnel ended");
        }
    }));
    let until = valid_until(&certificate, &peer.chain);
    Ok(Opened { connection, peer: peer.identity, until })
}

/// Until when the certificates of a tunnel hold.
pub(super) fn valid_until(own: &WorkloadCertificate, peer: &[CertificateDer<'_>]) -> SystemTime {
    tls::expiry(peer).map_or(own.not_after(), |theirs| theirs.min(own.not_after()))
}

/// Resolves at that time; a clock that was set forward is noticed within a minute.
pub(super) async fn passed(until: SystemTime) {
    while let Ok(left) = until.duration_since(SystemTime::now()) {
        tokio::time::sleep(left.min(Duration::from_secs(60))).await;
    }
}
