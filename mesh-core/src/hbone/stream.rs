//! The bytes of one CONNECT.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::error::Error;

/// An open tunnel stream: two directions that end independently.
///
/// Dropping a stream that has not ended in both directions resets it (CANCEL): the peer sees an abort, never an end
/// that looks complete.
#[derive(Debug)]
pub struct HboneStream {
    /// Towards the peer.
    pub send: SendHalf,
    /// From the peer.
    pub recv: RecvHalf,
}

/// The direction towards the peer.
#[derive(Debug)]
pub struct SendHalf {
    stream: SendStream<Bytes>,
    // Counts the stream as active until both halves are gone.
    _active: Option<Arc<Active>>,
}

/// The direction from the peer.
#[derive(Debug)]
pub struct RecvHalf {
    stream: RecvStream,
    _active: Option<Arc<Active>>,
}

/// One unit in a connection's count of open streams.
#[derive(Debug)]
pub(super) struct Active(Arc<AtomicUsize>);

impl Active {
    pub(super) fn new(count: &Arc<AtomicUsize>) -> Arc<Self> {
        count.fetch_add(1, Ordering::Relaxed);
        Arc::new(Self(Arc::clone(count)))
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl HboneStream {
    pub(super) fn new(send: SendStream<Bytes>, recv: RecvStream, active: Option<Arc<Active>>) -> Self {
        Self {
            send: SendHalf { stream: send, _active: active.clone() },
            recv: RecvHalf { stream: recv, _active: active },
        }
    }

    /// Aborts both directions with a reason.
    pub fn reset(&mut self, reason: Reason) {
        self.send.reset(reason);
    }

    /// The stream as `AsyncRead + AsyncWrite`, for a protocol inside the tunnel (TLS, across networks).
    #[must_use]
    pub fn into_io(self) -> TunnelIo {
        TunnelIo { stream: self, unread: Bytes::new(), ended: false }
    }
}

impl SendHalf {
    /// Asks for room for `wanted` bytes and waits for some of it. Room comes from the peer's windows and from our send
    /// buffer. `Ok(n)` is at least 1 and may be less or more than wanted.
    ///
    /// # Errors
    /// The stream or the connection has ended.
    pub fn poll_room(&mut self, cx: &mut Context<'_>, wanted: usize) -> Poll<Result<usize, Error>> {
        self.stream.reserve_capacity(wanted);
        loop {
            let room = self.stream.capacity();
            if room > 0 {
                return Poll::Ready(Ok(room));
            }
            // `poll_capacity` tells of changes only, and may tell of one that leaves nothing.
            match ready!(self.stream.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(e)) => return Poll::Ready(Err(e.into())),
                None => return Poll::Ready(Err(Error::Closed)),
            }
        }
    }

    /// Gives back room that was asked for and not used, so that other streams of the connection can have it.
    pub fn give_back_room(&mut self) {
        self.stream.reserve_capacity(0);
    }

    /// Queues bytes. What exceeds the room is queued too: ask for room first.
    ///
    /// # Errors
    /// The stream or the connection has ended.
    pub fn send(&mut self, data: Bytes) -> Result<(), Error> {
        self.stream.send_data(data, false).map_err(Error::from)
    }

    /// Ends this direction: END_STREAM, the peer's end of file.
    ///
    /// # Errors
    /// The stream or the connection has ended.
    pub fn finish(&mut self) -> Result<(), Error> {
        self.stream.send_data(Bytes::new(), true).map_err(Error::from)
    }

    /// Aborts the stream, in both directions.
    pub fn reset(&mut self, reason: Reason) {
        self.stream.send_reset(reason);
    }

    /// Ready when the peer aborts the stream or the connection ends.
    pub fn poll_aborted(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        self.stream.poll_reset(cx).map(|reason| match reason {
            Ok(reason) => Error::Reset(reason),
            Err(e) => e.into(),
        })
    }
}

impl RecvHalf {
    /// The next bytes, never empty; `None` at the peer's end of file. They count against the peer's window until
    /// [`RecvHalf::passed_on`].
    pub fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Error>>> {
        loop {
            match ready!(self.stream.poll_data(cx)) {
                // An END_STREAM of its own comes as an empty frame.
                Some(Ok(data)) if data.is_empty() => {}
                data => return Poll::Ready(data.map(|d| d.map_err(Error::from))),
            }
        }
    }

    /// Lets the peer send `n` more bytes, once as many are written onward.
    pub fn passed_on(&mut self, n: usize) {
        // It fails only for more than was received, which the callers' bookkeeping rules out; and then for the
        // window's sake nothing must happen.
        let released = self.stream.flow_control().release_capacity(n);
        debug_assert!(released.is_ok(), "released more than was received");
    }
}

/// A stream as a transport. See [`HboneStream::into_io`].
#[derive(Debug)]
pub struct TunnelIo {
    stream: HboneStream,
    unread: Bytes,
    ended: bool,
}

impl AsyncRead for TunnelIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.unread.is_empty() && !this.ended {
            match ready!(this.stream.recv.poll_data(cx)) {
                Some(data) => this.unread = data.map_err(to_io)?,
                None => this.ended = true,
            }
        }
        let n = this.unread.len().min(to.remaining());
        to.put_slice(&this.unread.split_to(n));
        if n > 0 {
            this.stream.recv.passed_on(n);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TunnelIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let room = ready!(self.stream.send.poll_room(cx, data.len())).map_err(to_io)?;
        let n = room.min(data.len());
        self.stream.send.send(Bytes::copy_from_slice(&data[..n])).map_err(to_io)?;
        Poll::Ready(Ok(n))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The connection's driver writes what is queued.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.stream.send.finish().map_err(to_io))
    }
}

fn to_io(error: Error) -> io::Error {
    match error {
        Error::Reset(_) => io::Error::new(io::ErrorKind::ConnectionReset, error),
        Error::Closed => io::Error::new(io::ErrorKind::BrokenPipe, error),
        other => io::Error::other(other),
    }
}
