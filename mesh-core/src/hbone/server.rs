//! The side that accepts tunnels.

use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll};

use http::StatusCode;
use tokio::io::{AsyncRead, AsyncWrite};

use super::baggage::BaggageHeader;
use super::error::Error;
use super::http2::Reason;
use super::http2::core::{Ended, Role};
use super::http2::engine::Engine;
use super::request::{ConnectRequest, RequestError};
use super::settings::Settings;
use super::stream::{Handle, HboneStream};
use crate::tls::Channel;

/// One accepted tunnel connection. It moves only while [`ServerConnection::accept`] is polled.
pub struct ServerConnection<IO>(Engine<IO>);

/// What a peer asked for.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "the large one is the common one, and moves once")]
pub enum Incoming {
    /// A CONNECT that waits for an answer.
    Connect(IncomingConnect),
    /// A request that was no CONNECT to a destination; it has been answered. For the log.
    Malformed(RequestError),
}

/// A CONNECT that waits for an answer. Dropping it aborts the stream.
#[derive(Debug)]
pub struct IncomingConnect {
    /// What it says.
    pub request: ConnectRequest,
    stream: HboneStream,
}

impl<IO: AsyncRead + AsyncWrite + Unpin> ServerConnection<IO> {
    /// Waits for the peer's HTTP/2 preface on a connection whose TLS is done.
    ///
    /// # Errors
    /// The peer does not speak HTTP/2, not in time, or the transport fails.
    pub async fn handshake(channel: Channel<IO>, settings: &Settings) -> Result<Self, Error> {
        let mut engine = Engine::new(Role::Server, channel, settings);
        let begun = poll_fn(|cx| {
            let over = engine.poll(cx);
            if engine.shared.core.borrow().has_begun() {
                return Poll::Ready(Ok(()));
            }
            over.map(|over| Err(over.err().unwrap_or(Ended::Closed).error()))
        });
        tokio::time::timeout(settings.handshake_timeout, begun)
            .await
            .map_err(|_elapsed| Error::HandshakeTimeout)??;
        Ok(Self(engine))
    }

    /// The next CONNECT, or `None` once the connection is over. Cancel-safe; keep calling it, also while draining:
    /// it is what moves the bytes of the open streams.
    pub async fn accept(&mut self) -> Option<Result<Incoming, Error>> {
        poll_fn(|cx| self.poll_accept(cx)).await
    }

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Incoming, Error>>> {
        // First what came with the last read; it may be all that came before the end.
        if let Some(incoming) = self.next_request() {
            return Poll::Ready(Some(Ok(incoming)));
        }
        let over = self.0.poll(cx);
        match (self.next_request(), over) {
            (Some(incoming), Poll::Pending) => Poll::Ready(Some(Ok(incoming))),
            (_, Poll::Ready(Ok(()))) => Poll::Ready(None),
            (_, Poll::Ready(Err(ended))) => Poll::Ready(Some(Err(ended.error()))),
            (None, Poll::Pending) => Poll::Pending,
        }
    }

    fn next_request(&self) -> Option<Incoming> {
        let shared = &self.0.shared;
        let (key, request) = shared.core.borrow_mut().next_request()?;
        shared.held.set(shared.held.get() + 1);
        let stream = HboneStream::new(Rc::new(Handle::new(Rc::clone(shared), key)));
        Some(match request {
            Ok(request) => Incoming::Connect(IncomingConnect { request, stream }),
            Err(error) => {
                refuse(&stream, error.status());
                Incoming::Malformed(error)
            }
        })
    }

    /// Takes no new streams: GOAWAY now, the end once the open ones are done. Idempotent.
    pub fn drain(&mut self) {
        self.0.shared.core.borrow_mut().begin_drain();
    }

    /// Aborts every stream and closes, as soon as [`ServerConnection::accept`] is polled.
    pub fn abort(&mut self, reason: Reason) {
        self.0.abort(reason);
    }
}

/// Sends a status and the end of the stream. If the stream is gone by now nobody waits for the answer.
fn refuse(stream: &HboneStream, status: StatusCode) {
    let _ = stream.answer(status.as_u16(), None, true);
}

impl IncomingConnect {
    /// Answers 200 and opens the stream. `baggage` describes the workload that was reached.
    ///
    /// # Errors
    /// The peer gave up, or the connection ended.
    pub fn accept(self, baggage: Option<&BaggageHeader>) -> Result<HboneStream, Error> {
        self.stream.answer(StatusCode::OK.as_u16(), baggage, false)?;
        Ok(self.stream)
    }

    /// Answers with a status that is not 200, and ends the stream.
    pub fn refuse(self, status: StatusCode) {
        refuse(&self.stream, status);
    }

    /// Resolves when the peer gives up before it got an answer.
    pub async fn abandoned(&mut self) -> Error {
        poll_fn(|cx| self.stream.send.poll_aborted(cx)).await
    }
}
