//! The handshake of both sides, bounded in time.
//!
//! rustls says what to send and what it waits for; when it is done, its keys go to the record layer.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::UnbufferedClientConnection;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus};
use rustls::{ClientConfig, CommonState, ExtractedSecrets, ServerConfig};
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::ALPN;
use super::channel::{Channel, Facts};
use super::error::TlsError;
use super::receiving::{self, Keys, Protection, Receiving};
use super::record::{Opener, Sealer};
use super::sending::Sending;
use super::verify::peer_identity;
use crate::identity::SpiffeId;

/// How long a peer may take. The connection limit of the dial is the same.
pub const TIMEOUT: Duration = Duration::from_secs(10);
/// What is read at once. A handshake has a few kilobytes.
const READ: usize = 16 << 10;

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
pub async fn connect<IO>(config: Arc<ClientConfig>, io: IO) -> Result<(Channel<IO>, Peer), TlsError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    // Never sent: the configuration turns SNI off, and an address is no SNI anyway.
    let name = ServerName::IpAddress(IpAddr::V4(Ipv4Addr::UNSPECIFIED).into());
    let connection = Box::new(UnbufferedClientConnection::new(config, name)?);
    within_limit(run(connection, io)).await
}

/// Accepts TLS as a server, with [`super::WorkloadCertificate::server_config`].
///
/// # Errors
/// The peer is not accepted, sends no certificate, is not TLS, or does not finish within [`TIMEOUT`].
pub async fn accept<IO>(config: Arc<ServerConfig>, io: IO) -> Result<(Channel<IO>, Peer), TlsError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let connection = Box::new(UnbufferedServerConnection::new(config)?);
    within_limit(run(connection, io)).await
}

async fn within_limit<T>(handshake: impl Future<Output = Result<T, TlsError>>) -> Result<T, TlsError> {
    tokio::time::timeout(TIMEOUT, handshake).await.map_err(|_elapsed| TlsError::Timeout(TIMEOUT))?
}

/// The two roles of rustls, which have the same methods and no common type.
trait Role: Deref<Target: Deref<Target = CommonState>> {
    type Data;
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
    fn finish(self: Box<Self>) -> Result<(ExtractedSecrets, Keys), rustls::Error>;
}

impl Role for UnbufferedClientConnection {
    type Data = rustls::client::ClientConnectionData;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn finish(self: Box<Self>) -> Result<(ExtractedSecrets, Keys), rustls::Error> {
        self.dangerous_into_kernel_connection().map(|(secrets, keys)| (secrets, Keys::Client(keys)))
    }
}

impl Role for UnbufferedServerConnection {
    type Data = rustls::server::ServerConnectionData;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn finish(self: Box<Self>) -> Result<(ExtractedSecrets, Keys), rustls::Error> {
        self.dangerous_into_kernel_connection().map(|(secrets, keys)| (secrets, Keys::Server(keys)))
    }
}

/// What rustls wants next.
enum Step {
    Read,
    Write,
    Again,
    Done,
    Failed(rustls::Error),
}

/// Bytes on their way.
#[derive(Default)]
struct Flight {
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    /// Data that came with the peer's last message.
    early: Vec<u8>,
}

impl Flight {
    /// Lets rustls look at what has come.
    fn advance<R: Role>(&mut self, connection: &mut R) -> Step {
        let UnbufferedStatus { discard, state } = connection.process(&mut self.incoming);
        let step = match state {
            Ok(ConnectionState::EncodeTlsData(data)) => encode(data, &mut self.outgoing),
            Ok(ConnectionState::TransmitTlsData(data)) => {
                data.done();
                Step::Write
            }
            Ok(ConnectionState::ReadTraffic(mut traffic)) => loop {
                match traffic.next_record() {
                    Some(Ok(record)) => self.early.extend_from_slice(record.payload),
                    Some(Err(error)) => break Step::Failed(error),
                    None => break Step::Again,
                }
            },
            Ok(ConnectionState::WriteTraffic(_)) => Step::Done,
            Ok(ConnectionState::BlockedHandshake) => Step::Read,
            // No early data is offered, and nobody closes before the end.
            Ok(_) => Step::Failed(rustls::Error::HandshakeNotComplete),
            Err(error) => Step::Failed(error),
        };
        self.incoming.drain(..discard);
        step
    }
}

fn encode<D>(mut data: EncodeTlsData<'_, D>, outgoing: &mut Vec<u8>) -> Step {
    let before = outgoing.len();
    loop {
        let room = outgoing.len();
        match data.encode(&mut outgoing[before..]) {
            Ok(n) => {
                outgoing.truncate(before + n);
                return Step::Again;
            }
            Err(EncodeError::InsufficientSize(needed)) if room < before + needed.required_size => {
                outgoing.resize(before + needed.required_size, 0);
            }
            Err(_) => return Step::Failed(rustls::Error::EncryptError),
        }
    }
}

async fn run<R, IO>(mut connection: Box<R>, mut io: IO) -> Result<(Channel<IO>, Peer), TlsError>
where
    R: Role,
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let mut flight = Flight::default();
    loop {
        match flight.advance(&mut *connection) {
            Step::Again => {}
            Step::Write => send(&mut io, &mut flight.outgoing).await?,
            Step::Done if !connection.is_handshaking() => break,
            Step::Read | Step::Done => {
                flight.incoming.reserve(READ);
                if io.read_buf(&mut flight.incoming).await? == 0 {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "tls handshake eof").into());
                }
            }
            Step::Failed(error) => {
                // rustls has an alert for the peer, which may not take it any more. Asked twice, it would look at the
                // offending bytes again.
                let _ = flight.advance(&mut *connection);
                let _ = send(&mut io, &mut flight.outgoing).await;
                return Err(error.into());
            }
        }
    }
    let peer = peer(&connection)?;
    let facts = Facts {
        suite: connection.negotiated_cipher_suite().map(|s| s.suite()),
        group: connection.negotiated_key_exchange_group().map(|g| g.name()),
    };
    let (secrets, keys) = connection.finish()?;
    let opener = Opener::new(secrets.rx).map_err(receiving::error)?;
    let sealer = Sealer::new(secrets.tx).map_err(receiving::error)?;
    let protection = Box::new(Protection::new(opener, keys));
    let receiving = Receiving::new(Some(protection), flight.incoming, flight.early);
    let sending = Sending::new(Some(sealer));
    Ok((Channel::new(io, receiving, sending, facts), peer))
}

async fn send<IO: AsyncWrite + Unpin>(io: &mut IO, outgoing: &mut Vec<u8>) -> io::Result<()> {
    io.write_all(outgoing).await?;
    outgoing.clear();
    io.flush().await
}

fn peer(state: &CommonState) -> Result<Peer, TlsError> {
    // A peer that offers no ALPN at all passes rustls; the tunnel demands h2.
    if state.alpn_protocol() != Some(ALPN) {
        return Err(TlsError::Parameters("the peer did not agree on ALPN h2".into()));
    }
    let chain: Arc<[_]> = state.peer_certificates().ok_or(TlsError::NoPeerCertificate)?.into();
    Ok(Peer { identity: peer_identity(&chain)?, chain })
}
