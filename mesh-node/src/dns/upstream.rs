//! Asking another server: one socket per question, made inside the pod's network namespace, so that the server and
//! every NetworkPolicy see the pod ask, and the kernel picks an unguessable source port.
//!
//! The query goes out as it came in, id included, and the answer goes back as it is.

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream, UdpSocket};
use tokio::time::timeout;

use super::message;
use super::pod::PodNetwork;

/// After how long a datagram is sent again.
const RESEND: Duration = Duration::from_secs(2);
/// How long fetching the whole of a truncated answer may take: the truncated one is there already.
const WHOLE: Duration = Duration::from_secs(1);

/// A query to pass on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Question<'a> {
    /// The whole message.
    pub(super) bytes: &'a [u8],
    /// Where its question is.
    pub(super) question: &'a Range<usize>,
}

/// Asks over UDP. An answer that the server truncated is fetched over TCP; if the client cannot take that much, it
/// gets the truncated one and asks over TCP itself. `scratch` holds 64 KiB.
///
/// # Errors
/// The server refuses, or the namespace is gone. Silence is not noticed here: the caller has the deadline.
pub(super) async fn udp(
    network: &dyn PodNetwork,
    server: SocketAddr,
    query: Question<'_>,
    limit: usize,
    scratch: &RefCell<Vec<u8>>,
) -> io::Result<Vec<u8>> {
    let socket = UdpSocket::from_std(network.udp(server)?)?;
    socket.connect(server).await?;
    let reply = loop {
        socket.send(query.bytes).await?;
        if let Ok(reply) = timeout(RESEND, receive(&socket, query, scratch)).await {
            break reply?;
        }
    };
    if message::is_truncated(&reply)
        && let Ok(Ok(whole)) = timeout(WHOLE, tcp(network, server, query)).await
        && whole.len() <= limit
    {
        return Ok(whole);
    }
    Ok(if reply.len() > limit { message::cut(&reply, query.question) } else { reply })
}

/// The first datagram that answers the query; others are somebody's guesses.
async fn receive(socket: &UdpSocket, query: Question<'_>, scratch: &RefCell<Vec<u8>>) -> io::Result<Vec<u8>> {
    loop {
        socket.readable().await?;
        let mut buffer = scratch.borrow_mut();
        match socket.try_recv(&mut buffer) {
            Ok(length) => {
                if message::is_answer(&buffer[..length], query.bytes, query.question) {
                    return Ok(buffer[..length].to_vec());
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// Asks over a TCP connection of its own.
///
/// # Errors
/// The server refuses, ends early, or answers something else.
pub(super) async fn tcp(
    network: &dyn PodNetwork,
    server: SocketAddr,
    query: Question<'_>,
) -> io::Result<Vec<u8>> {
    let mut stream = connect(network, server).await?;
    write(&mut stream, query.bytes).await?;
    let Some(reply) = read(&mut stream).await? else {
        return Err(io::ErrorKind::UnexpectedEof.into());
    };
    if message::is_answer(&reply, query.bytes, query.question) {
        Ok(reply)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidData, "the server answered another question"))
    }
}

/// A connection to a server from inside the pod's namespace.
///
/// # Errors
/// The server refuses, or the namespace is gone.
pub(super) async fn connect(network: &dyn PodNetwork, server: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpSocket::from_std_stream(network.tcp(server)?).connect(server).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Writes a message with its length (RFC 1035, 4.2.2) in one piece.
///
/// # Errors
/// The connection failed, or the message is longer than the length field can say.
pub(super) async fn write(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length =
        u16::try_from(message.len()).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    let mut framed = Vec::with_capacity(2 + message.len());
    framed.extend_from_slice(&length.to_be_bytes());
    framed.extend_from_slice(message);
    stream.write_all(&framed).await
}

/// Reads a message with its length; nothing if the peer ended before one began.
///
/// # Errors
/// The connection failed or ended within a message.
pub(super) async fn read(stream: &mut TcpStream) -> io::Result<Option<Vec<u8>>> {
    let length = match stream.read_u16().await {
        Ok(length) => length,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut message = vec![0; usize::from(length)];
    stream.read_exact(&mut message).await?;
    Ok(Some(message))
}
