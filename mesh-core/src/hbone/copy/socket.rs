//! One direction between two sockets.

use std::future::poll_fn;
use std::io;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::super::buffers;
use super::Ended;

/// Copies until the end of file, then shuts the target's write side down. `ends` says what a failure of the source and
/// of the target mean.
pub(super) async fn copy(
    from: &TcpStream,
    to: &TcpStream,
    count: impl Fn(u64),
    ends: [fn(io::Error) -> Ended; 2],
) -> Result<(), Ended> {
    let [source, target] = ends;
    loop {
        let Some(mut buffer) = poll_fn(|cx| poll_read(from, cx, buffers::SIZE)).await.map_err(source)? else {
            return shutdown(to).map_err(target);
        };
        while buffer.has_remaining() {
            let n = poll_fn(|cx| poll_write(to, cx, &buffer)).await.map_err(target)?;
            count(n as u64);
            buffer.advance(n);
        }
        buffers::give(buffer);
    }
}

/// Reads at most `most` bytes into a buffer of the thread's, once there are any; `None` at the end of file.
pub(super) fn poll_read(
    from: &TcpStream,
    cx: &mut Context<'_>,
    most: usize,
) -> Poll<io::Result<Option<BytesMut>>> {
    loop {
        ready!(from.poll_read_ready(cx))?;
        if let Some(read) = try_read(from, most) {
            return Poll::Ready(read);
        }
    }
}

/// Reads what is there; `None` if nothing is.
pub(super) fn try_read(from: &TcpStream, most: usize) -> Option<io::Result<Option<BytesMut>>> {
    use bytes::BufMut as _;
    let mut buffer = buffers::take();
    let read = from.try_read_buf(&mut (&mut buffer).limit(most));
    if let Ok(1..) = read {
        return Some(Ok(Some(buffer)));
    }
    buffers::give(buffer);
    match read {
        Ok(_) => Some(Ok(None)),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => None,
        Err(e) => Some(Err(e)),
    }
}

fn poll_write(to: &TcpStream, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
    loop {
        match to.try_write(data) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => ready!(to.poll_write_ready(cx))?,
            result => return Poll::Ready(result),
        }
    }
}

/// Resolves when the socket breaks (RST, keepalive). A direction that waits for its other end does not look at its own;
/// without this, a connection whose client is gone would live as long as its server reads nothing.
pub(super) async fn broken(socket: &TcpStream) -> io::Error {
    loop {
        if let Err(e) = socket.ready(Interest::ERROR).await {
            return e;
        }
        match socket.take_error() {
            Ok(Some(e)) | Err(e) => return e,
            // Something else was flagged: wait for the next event.
            Ok(None) => _ = socket.try_io(Interest::ERROR, || Err::<(), _>(io::ErrorKind::WouldBlock.into())),
        }
    }
}

/// Sends FIN. A socket that is no longer connected has been reset meanwhile; the next read says so.
pub(super) fn shutdown(socket: &TcpStream) -> io::Result<()> {
    match SockRef::from(socket).shutdown(std::net::Shutdown::Write) {
        Err(e) if e.kind() == io::ErrorKind::NotConnected => Ok(()),
        result => result,
    }
}
