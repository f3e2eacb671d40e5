//! The handshake of both sides, bounded in time.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use rustls::{ClientConfig, CommonState, ServerConfig};
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use super::ALPN;
use super::error::TlsError;
use super::verify::peer_identity;
use crate::identity::SpiffeId;

/// How long a peer may take. The connection limit of the dial is the same.
pub const TIMEOUT: Duration = Duration::from_secs(10);

/// Ciphertext that one write may carry: as much as one read takes, so that a bulk transfer makes one write per read.
/// It is allocated while bytes are under way only.
const WRITE_BUFFER: usize = 256 << 10;

/// Who is on the other side, proven.
#[derive(Clone, Debug)]
pub struct Peer {
    /// The first workload identity of its leaf.
    pub identity: SpiffeId,
    /// Its chain as presented, for a check against later revocations.
    pub chain: Arc<[CertificateDer<'static>]>,
}

/// Opens TLS as a client, with [`super::WorkloadCertificate::client_config`]. No name is sent.
///
/// The peer's refusal of *our* certificate shows only with the first read after this; the tunnel's client reports it as
/// [`crate::hbone::Error::Tls`].
///
/// # Errors
/// The peer is not accepted, is not TLS, or does not answer within [`TIMEOUT`].
pub async fn connect<IO>(config: Arc<ClientConfig>, io: IO) -> Result<(client::TlsStream<IO>, Peer), TlsError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    // Never sent: the configuration turns SNI off, and an address is no SNI anyway.
    let name = ServerName::IpAddress(IpAddr::V4(Ipv4Addr::UNSPECIFIED).into());
    let mut stream = tokio::time::timeout(TIMEOUT, TlsConnector::from(config).connect(name, io))
        .await
        .map_err(|_elapsed| TlsError::Timeout(TIMEOUT))??;
    stream.get_mut().1.set_buffer_limit(Some(WRITE_BUFFER));
    let peer = peer(stream.get_ref().1)?;
    Ok((stream, peer))
}

/// Accepts TLS as a server, with [`super::WorkloadCertificate::server_config`].
///
/// # Errors
/// The peer is not accepted, sends no certificate, is not TLS, or does not finish within [`TIMEOUT`].
pub async fn accept<IO>(config: Arc<ServerConfig>, io: IO) -> Result<(server::TlsStream<IO>, Peer), TlsError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let mut stream = tokio::time::timeout(TIMEOUT, TlsAcceptor::from(config).accept(io))
        .await
        .map_err(|_elapsed| TlsError::Timeout(TIMEOUT))??;
    stream.get_mut().1.set_buffer_limit(Some(WRITE_BUFFER));
    let peer = peer(stream.get_ref().1)?;
    Ok((stream, peer))
}

fn peer(state: &CommonState) -> Result<Peer, TlsError> {
    // A peer that offers no ALPN at all passes rustls; the tunnel demands h2.
    if state.alpn_protocol() != Some(ALPN) {
        return Err(TlsError::Parameters("the peer did not agree on ALPN h2".into()));
    }
    let chain: Arc<[_]> = state.peer_certificates().ok_or(TlsError::NoPeerCertificate)?.into();
    Ok(Peer { identity: peer_identity(&chain)?, chain })
}
