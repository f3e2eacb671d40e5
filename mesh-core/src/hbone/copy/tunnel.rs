//! The two directions between a socket and a tunnel stream.

use std::io::{self, IoSlice, IoSliceMut};
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::net::TcpStream;

use super::super::http2::operations::PassOn;
use super::super::http2::streams::Sink;
use super::super::stream::{RecvHalf, SendHalf};
use super::socket::{read, shutdown};
use super::{Ended, Meter};
use crate::tls::buffers::Buffer;

/// Pieces of a record each that are read at once while a connection is busy.
const BUSY: usize = 16;

/// The application's end, which the tunnel's connection writes to by itself.
pub(super) struct Application<M> {
    pub(super) socket: TcpStream,
    pub(super) meter: Rc<M>,
}

impl<M: Meter> Sink for Application<M> {
    fn write(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        let written = match pieces {
            [one] => self.socket.try_write(one),
            several => self.socket.try_write_vectored(several),
        }?;
        self.meter.backward(written as u64);
        Ok(written)
    }
}

/// Socket to tunnel.
pub(super) struct Sending {
    /// Pieces that the next read is for: few while little comes, since each costs the kernel a look.
    pieces: usize,
    pub(super) done: bool,
    /// The last poll waited for bytes, so that the socket's end would be seen.
    pub(super) watches_socket: bool,
}

impl Sending {
    pub(super) const fn new() -> Self {
        Self { pieces: 1, done: false, watches_socket: true }
    }

    /// Reads while there is something to read and room for it.
    pub(super) fn poll<M: Meter>(
        &mut self,
        from: &Application<M>,
        to: &mut SendHalf,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), Ended>> {
        loop {
            self.watches_socket = true;
            if from.socket.poll_read_ready(cx).map_err(Ended::FirstReset)?.is_pending() {
                return Poll::Pending;
            }
            self.watches_socket = false;
            ready!(to.poll_room(cx, usize::MAX)).map_err(Ended::Tunnel)?;
            match to.send_from(self.pieces, |slices| read(&from.socket, slices)) {
                Ok((0, 0)) => {}
                Ok((0, _)) => {
                    self.done = true;
                    return Poll::Ready(to.finish().map_err(Ended::Tunnel));
                }
                Ok((n, offered)) => {
                    self.pieces = if n == offered { BUSY } else { (self.pieces / 2).max(1) };
                    from.meter.forward(n as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(Ended::FirstReset(error))),
            }
        }
    }
}

/// Reads what nobody listens to any more, until the application has said all. A socket that is closed with something
/// unread is reset, and the kernel forgets what it had still to send.
pub(super) fn poll_discard<M>(from: &Application<M>, cx: &mut Context<'_>) -> Poll<Result<(), Ended>> {
    loop {
        ready!(from.socket.poll_read_ready(cx)).map_err(Ended::FirstReset)?;
        let mut buffer = Buffer::take();
        match read(&from.socket, &mut [IoSliceMut::new(&mut buffer)]) {
            Ok(0) => return Poll::Ready(Ok(())),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Poll::Ready(Err(Ended::FirstReset(error))),
        }
    }
}

/// Tunnel to socket: what the connection could not write at once.
pub(super) fn poll_receive<M: Meter>(
    from: &RecvHalf,
    to: &Application<M>,
    cx: &mut Context<'_>,
) -> Poll<Result<(), Ended>> {
    loop {
        match from.pass_on(cx) {
            Ok(true) => return Poll::Ready(shutdown(&to.socket).map_err(Ended::FirstReset)),
            Ok(false) => return Poll::Pending,
            Err(PassOn::Sink(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                ready!(to.socket.poll_write_ready(cx)).map_err(Ended::FirstReset)?;
            }
            Err(PassOn::Sink(error)) => return Poll::Ready(Err(Ended::FirstReset(error))),
            Err(PassOn::Tunnel(error)) => return Poll::Ready(Err(Ended::Tunnel(error))),
        }
    }
}
