//! One direction between two sockets.

use std::future::poll_fn;
use std::io::{self, IoSliceMut};
use std::ops::Range;
use std::task::{Context, Poll, ready};

use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::Ended;
use crate::tls::buffers::Buffer;

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
        let read = poll_fn(|cx| poll_read(from, cx)).await.map_err(source)?;
        let Some((buffer, mut rest)) = read else {
            return shutdown(to).map_err(target);
        };
        while !rest.is_empty() {
            let n = poll_fn(|cx| poll_write(to, cx, &buffer[rest.clone()])).await.map_err(target)?;
            count(n as u64);
            rest.start += n;
        }
    }
}

/// A buffer and where in it bytes are.
type Filled = (Buffer, Range<usize>);

/// Reads what is there into a buffer of the thread's, once there is anything; `None` at the end of file.
fn poll_read(from: &TcpStream, cx: &mut Context<'_>) -> Poll<io::Result<Option<Filled>>> {
    loop {
        ready!(from.poll_read_ready(cx))?;
        let mut buffer = Buffer::take();
        match read(from, &mut [IoSliceMut::new(&mut buffer)]) {
            Ok(0) => return Poll::Ready(Ok(None)),
            Ok(n) => return Poll::Ready(Ok(Some((buffer, 0..n)))),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Poll::Ready(Err(e)),
        }
    }
}

/// Reads once. A read that could have been longer has emptied the socket: it counts as "would block", too, so that no
/// second read has to find that out.
pub(super) fn read(from: &TcpStream, slices: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
    let room: usize = slices.iter().map(|slice| slice.len()).sum();
    let mut short = None;
    let result = from.try_io(Interest::READABLE, || {
        let socket = SockRef::from(from);
        let n = match slices {
            [one] => io::Read::read(&mut &*socket, one)?,
            several => io::Read::read_vectored(&mut &*socket, several)?,
        };
        if n == 0 || n == room {
            return Ok(n);
        }
        short = Some(n);
        Err(io::ErrorKind::WouldBlock.into())
    });
    short.map_or(result, Ok)
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
