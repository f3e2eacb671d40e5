//! Opening tunnels and connections to endpoints.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_core::hbone::{ClientConnection, Settings};
use mesh_core::identity::SpiffeId;
use mesh_core::tls;
use socket2::SockRef;
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
    let tls_error = |text: String| DialError::Tls(text.into());
    let certificate = shared.certificate.load_full();
    let certificate = certificate.ok_or_else(|| tls_error("the waypoint has no certificate".to_owned()))?;
    let config = certificate.client_config(&expected).map_err(|e| tls_error(e.to_string()))?;
    let opened = async {
        let tcp = plain(to, timeout).await?;
        tls::connect(config, tcp).await.map_err(|e| tls_error(e.to_string()))
    };
    let opened = tokio::time::timeout(timeout, opened).await.map_err(|_elapsed| DialError::Timeout)?;
    let (channel, peer) = opened?;
    let (connection, driver) = ClientConnection::handshake(channel, &Settings::client());
    drop(tokio::task::spawn_local(async move {
        if let Err(error) = driver.await {
            tracing::debug!(%to, %error, code = error.code().code(), "a tunnel ended");
        }
    }));
    Ok(Opened { connection, peer: peer.identity })
}
