//! The bytes of one CONNECT.

use std::fmt;
use std::io::{self, IoSliceMut};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::baggage::BaggageHeader;
use super::error::Error;
use super::http2::Reason;
use super::http2::engine::Shared;
use super::http2::operations::PassOn;
use super::http2::streams::{Answer, Sink};

/// An open tunnel stream: two directions that end independently.
///
/// Dropping a stream that has not ended in both directions resets it (CANCEL): the peer sees an abort, never an end
/// that looks complete. One task at a time waits for it.
#[derive(Debug)]
pub struct HboneStream {
    /// Towards the peer.
    pub send: SendHalf,
    /// From the peer.
    pub recv: RecvHalf,
}

/// The direction towards the peer.
#[derive(Debug)]
pub struct SendHalf(Rc<Handle>);

/// The direction from the peer.
#[derive(Debug)]
pub struct RecvHalf(Rc<Handle>);

/// The right to use a stream; its connection counts it as held until it is dropped.
pub(super) struct Handle {
    shared: Rc<Shared>,
    key: u32,
}

impl Handle {
    /// Takes over one unit of the connection's count.
    pub(super) const fn new(shared: Rc<Shared>, key: u32) -> Self {
        Self { shared, key }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.held.set(self.shared.held.get() - 1);
        self.shared.core.borrow_mut().let_go(self.key);
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stream {}", self.key)
    }
}

impl HboneStream {
    pub(super) fn new(handle: Rc<Handle>) -> Self {
        Self { send: SendHalf(Rc::clone(&handle)), recv: RecvHalf(handle) }
    }

    pub(super) fn poll_answer(&self, cx: &Context<'_>) -> Poll<Result<Answer, Error>> {
        let Handle { shared, key } = &*self.send.0;
        shared.core.borrow_mut().poll_answer(cx, *key)
    }

    pub(super) fn answer(
        &self,
        status: u16,
        baggage: Option<&BaggageHeader>,
        end: bool,
    ) -> Result<(), Error> {
        let Handle { shared, key } = &*self.send.0;
        shared.core.borrow_mut().answer(*key, status, baggage, end)
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
    /// Waits for room to send. Room comes from the peer's windows and from what the connection may queue. `Ok(n)` is
    /// at least 1 and at most `wanted`.
    ///
    /// # Errors
    /// The stream or the connection has ended.
    pub fn poll_room(&mut self, cx: &mut Context<'_>, wanted: usize) -> Poll<Result<usize, Error>> {
        self.0.shared.core.borrow_mut().poll_room(cx, self.0.key).map_ok(|room| room.min(wanted))
    }

    /// How much there is room for now, without waiting for more.
    pub(super) fn room(&self) -> usize {
        self.0.shared.core.borrow_mut().room(self.0.key)
    }

    /// Queues bytes. What exceeds the room is queued too: ask for room first.
    ///
    /// # Errors
    /// The stream or the connection has ended.
    pub fn send(&mut self, data: &[u8]) -> Result<(), Error> {
        self.0.shared.core.borrow_mut().send(self.0.key, data)
    }

    /// Reads from `source` straight into what is sent next: how much, and how much it could have been.
    pub(super) fn send_from(
        &self,
        pieces: usize,
        source: impl FnOnce(&mut [IoSliceMut<'_>]) -> io::Result<usize>,
    ) -> io::Result<(usize, usize)> {
        self.0.shared.core.borrow_mut().send_from(self.0.key, pieces, source)
    }

    /// Ends this direction: END_STREAM, the peer's end of file.
    ///
    /// # Errors
    /// The stream or the connection has ended.
    pub fn finish(&mut self) -> Result<(), Error> {
        self.0.shared.core.borrow_mut().finish(self.0.key)
    }

    /// Aborts the stream, in both directions.
    pub fn reset(&mut self, reason: Reason) {
        self.0.shared.core.borrow_mut().reset(self.0.key, reason);
    }

    /// Ready when the peer aborts the stream or the connection ends.
    pub fn poll_aborted(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        self.0.shared.core.borrow_mut().poll_trouble(cx, self.0.key)
    }
}

impl RecvHalf {
    /// The next bytes, never empty; `None` at the peer's end of file. They count against the peer's window until
    /// [`RecvHalf::passed_on`].
    pub fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Error>>> {
        self.0.shared.core.borrow_mut().poll_data(cx, self.0.key)
    }

    /// Lets the peer send `n` more bytes, once as many are written onward.
    pub fn passed_on(&mut self, n: usize) {
        self.0.shared.core.borrow_mut().credit(self.0.key, n);
    }

    /// Whether all that the peer has said is here: it can be passed on whatever becomes of stream and connection.
    pub(super) fn is_complete(&self) -> bool {
        self.0.shared.core.borrow_mut().is_complete(self.0.key)
    }

    /// From now on the connection writes what comes to `sink`, and [`Self::pass_on`] what that did not take.
    pub(super) fn attach(&self, sink: Rc<dyn Sink>) {
        self.0.shared.core.borrow_mut().attach(self.0.key, sink);
    }

    /// Lets the sink go.
    pub(super) fn detach(&self) {
        self.0.shared.core.borrow_mut().detach(self.0.key);
    }

    /// `Ok(true)` when everything is passed on and the peer has ended its direction.
    pub(super) fn pass_on(&self, cx: &Context<'_>) -> Result<bool, PassOn> {
        self.0.shared.core.borrow_mut().pass_on(cx, self.0.key)
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
        let n = ready!(self.stream.send.poll_room(cx, data.len())).map_err(to_io)?;
        self.stream.send.send(&data[..n]).map_err(to_io)?;
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
