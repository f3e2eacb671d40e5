//! The side that opens tunnels.

use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::StatusCode;
use tokio::io::{AsyncRead, AsyncWrite};

use super::baggage::BaggageHeader;
use super::error::Error;
use super::http2::Reason;
use super::http2::core::Role;
use super::http2::engine::{Engine, Shared};
use super::request::ConnectRequest;
use super::settings::Settings;
use super::stream::{Handle, HboneStream};
use crate::tls::Channel;

/// A handle on one tunnel connection. Clones share the connection; it closes, once idle, when the last is dropped.
#[derive(Clone)]
pub struct ClientConnection(Rc<Owner>);

struct Owner {
    shared: Rc<Shared>,
    streams: usize,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shared.core.borrow_mut().close_when_idle();
    }
}

/// The future that moves the connection's bytes. Spawn it; it resolves when the connection is over.
#[must_use = "a connection moves only while its driver is polled"]
pub struct Driver<IO>(Engine<IO>);

/// An open stream and what the peer said with its 200.
#[derive(Debug)]
pub struct Opened {
    /// The bytes.
    pub stream: HboneStream,
    /// The destination workload, as its node describes it.
    pub baggage: Option<BaggageHeader>,
}

/// A CONNECT that was sent and is not answered yet. Dropping it aborts the stream.
#[derive(Debug)]
pub struct Opening(HboneStream);

impl Opening {
    /// Sends data that the peer gets with the request or right after it, as far as there is room now; says how much.
    /// A peer that does not take the connection drops it.
    ///
    /// # Errors
    /// The stream or the connection has ended.
    pub fn send_early(&mut self, data: &[u8]) -> Result<usize, Error> {
        let room = self.0.send.room().min(data.len());
        if room > 0 {
            self.0.send.send(&data[..room])?;
        }
        Ok(room)
    }

    /// The answer, which is yes: how the peer describes the destination.
    ///
    /// # Errors
    /// [`Error::Status`] for an answer other than 200; else the stream or the connection ended first.
    pub fn poll_answer(&mut self, cx: &Context<'_>) -> Poll<Result<Option<BaggageHeader>, Error>> {
        let answer = ready!(self.0.poll_answer(cx))?;
        Poll::Ready(match StatusCode::from_u16(answer.status) {
            Ok(StatusCode::OK) => Ok(answer.baggage),
            Ok(status) => Err(Error::Status(status)),
            Err(_) => Err(Error::Violation(Reason::PROTOCOL_ERROR)),
        })
    }

    /// The open stream, once the answer is there.
    #[must_use]
    pub fn into_opened(self, baggage: Option<BaggageHeader>) -> Opened {
        Opened { stream: self.0, baggage }
    }
}

impl ClientConnection {
    /// Starts HTTP/2 on a connection whose TLS is done. The peer's settings are not waited for.
    pub fn handshake<IO>(channel: Channel<IO>, settings: &Settings) -> (Self, Driver<IO>)
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let engine = Engine::new(Role::Client, channel, settings);
        let owner = Owner { shared: Rc::clone(&engine.shared), streams: settings.streams as usize };
        (Self(Rc::new(owner)), Driver(engine))
    }

    /// Opens a stream: sends CONNECT and waits for the answer. Dropping the future aborts the stream.
    ///
    /// # Errors
    /// [`Error::Status`] for an answer other than 200; else the stream or the connection ended first.
    pub async fn open(&self, connect: &ConnectRequest) -> Result<Opened, Error> {
        let mut opening = self.begin(connect).await?;
        let answer = poll_fn(|cx| opening.poll_answer(cx)).await;
        answer.map(|baggage| opening.into_opened(baggage))
    }

    /// Sends CONNECT once the connection has room for another stream.
    ///
    /// # Errors
    /// The request cannot be sent, or the connection has ended.
    pub async fn begin(&self, connect: &ConnectRequest) -> Result<Opening, Error> {
        connect.check()?;
        let shared = &self.0.shared;
        // Counted from here, so that the pool sees who waits for a slot.
        let counted = Counted::new(shared);
        let key = poll_fn(|cx| shared.core.borrow_mut().poll_open(cx, connect)).await?;
        std::mem::forget(counted);
        Ok(Opening(HboneStream::new(Rc::new(Handle::new(Rc::clone(shared), key)))))
    }

    /// Whether the peer was heard within this time.
    #[must_use]
    pub fn heard_within(&self, time: Duration) -> bool {
        self.0.shared.core.borrow().heard_at().is_some_and(|at| at.elapsed() < time)
    }

    /// Streams that are open or being opened.
    #[must_use]
    pub fn active_streams(&self) -> usize {
        self.0.shared.held.get()
    }

    /// How many streams the connection may carry: our own limit or the peer's, whichever is less.
    #[must_use]
    pub fn max_streams(&self) -> usize {
        self.0.shared.core.borrow().peer_streams().min(self.0.streams)
    }

    /// Whether the connection may be offered for another stream and stay in the pool. It is false one stream before
    /// the limit, as other node proxies do it: the last slot absorbs the race between pool and peer.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.active_streams() + 1 < self.max_streams()
    }

    /// Has the peer pinged now rather than when it was quiet for long; the answer shows in
    /// [`ClientConnection::pongs`]. One that does not come in the usual time ends the connection.
    pub fn ping(&self) {
        self.0.shared.core.borrow_mut().ask_for_ping();
    }

    /// How many pings the peer has answered.
    #[must_use]
    pub fn pongs(&self) -> u64 {
        self.0.shared.core.borrow().pongs()
    }

    /// Whether no stream can be opened any more: the connection ended, or the peer sent GOAWAY.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.0.shared.core.borrow().is_closed()
    }
}

#[cfg(test)]
impl ClientConnection {
    /// Makes the key that we send with one that has protected enough.
    pub(super) fn wear_key(&self) {
        self.0.shared.core.borrow_mut().sending.wear();
    }

    pub(super) fn has_worn_key(&self) -> bool {
        self.0.shared.core.borrow().sending.is_worn()
    }
}

/// One unit in the count of streams, until a handle takes it over.
struct Counted<'a>(&'a Shared);

impl<'a> Counted<'a> {
    fn new(shared: &'a Shared) -> Self {
        shared.held.set(shared.held.get() + 1);
        Self(shared)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.held.set(self.0.held.get() - 1);
    }
}

impl std::fmt::Debug for ClientConnection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClientConnection")
            .field("active", &self.active_streams())
            .field("closed", &self.is_closed())
            .finish_non_exhaustive()
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Future for Driver<IO> {
    type Output = Result<(), Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.get_mut().0.poll(cx).map(|result| result.map_err(|ended| ended.error()))
    }
}
