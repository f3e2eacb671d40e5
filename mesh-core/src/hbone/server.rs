//! The side that accepts tunnels.

use std::future::poll_fn;
use std::task::{Context, Poll};

use bytes::Bytes;
use h2::server::{Connection, SendResponse};
use h2::{Reason, RecvStream};
use http::{Request, Response, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite};

use super::baggage::BaggageHeader;
use super::error::Error;
use super::keepalive::Keepalive;
use super::request::{self, ConnectRequest, RequestError};
use super::settings::Settings;
use super::stream::HboneStream;

/// One accepted tunnel connection. It moves only while [`ServerConnection::accept`] is polled.
pub struct ServerConnection<IO> {
    connection: Connection<IO, Bytes>,
    keepalive: Keepalive,
    silent: bool,
}

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
    respond: SendResponse<Bytes>,
    body: RecvStream,
}

impl<IO: AsyncRead + AsyncWrite + Unpin> ServerConnection<IO> {
    /// Waits for the peer's HTTP/2 preface on a connection whose TLS is done.
    ///
    /// # Errors
    /// The peer does not speak HTTP/2, not in time, or the transport fails.
    pub async fn handshake(io: IO, settings: &Settings) -> Result<Self, Error> {
        let mut builder = h2::server::Builder::new();
        builder
            .initial_window_size(settings.stream_window)
            .initial_connection_window_size(settings.connection_window)
            .max_frame_size(settings.frame_size)
            .max_header_list_size(settings.header_list)
            .max_send_buffer_size(settings.send_buffer)
            .max_concurrent_streams(settings.streams);
        let mut connection = tokio::time::timeout(settings.handshake_timeout, builder.handshake(io))
            .await
            .map_err(|_elapsed| Error::HandshakeTimeout)?
            .map_err(|e| match Error::from(e) {
                Error::Violation(reason) => Error::NotHttp2(reason),
                other => other,
            })?;
        let keepalive = Keepalive::new(connection.ping_pong(), settings);
        Ok(Self { connection, keepalive, silent: false })
    }

    /// The next CONNECT, or `None` once the connection is over. Cancel-safe; keep calling it, also while draining:
    /// it is what moves the bytes of the open streams.
    pub async fn accept(&mut self) -> Option<Result<Incoming, Error>> {
        poll_fn(|cx| self.poll_accept(cx)).await
    }

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Incoming, Error>>> {
        if let Poll::Ready(next) = self.connection.poll_accept(cx) {
            return Poll::Ready(match next {
                Some(Ok((request, respond))) => Some(Ok(incoming(request, respond))),
                Some(Err(e)) => Some(Err(e.into())),
                None if self.silent => Some(Err(Error::Silent)),
                None => None,
            });
        }
        if !self.silent && self.keepalive.poll_silent(cx).is_ready() {
            // What other node proxies do: say goodbye and leave. A peer that is really gone will not take the
            // GOAWAY, so that nothing is waited for.
            self.silent = true;
            self.connection.abrupt_shutdown(Reason::NO_ERROR);
            let _ = self.connection.poll_closed(cx);
            return Poll::Ready(Some(Err(Error::Silent)));
        }
        Poll::Pending
    }

    /// Takes no new streams: GOAWAY now, the end once the open ones are done. Idempotent.
    pub fn drain(&mut self) {
        self.connection.graceful_shutdown();
    }

    /// Aborts every stream and closes, as soon as [`ServerConnection::accept`] is polled.
    pub fn abort(&mut self, reason: Reason) {
        self.connection.abrupt_shutdown(reason);
    }
}

fn incoming(request: Request<RecvStream>, mut respond: SendResponse<Bytes>) -> Incoming {
    match ConnectRequest::parse(&request) {
        Ok(connect) => {
            Incoming::Connect(IncomingConnect { request: connect, respond, body: request.into_body() })
        }
        Err(error) => {
            answer(&mut respond, error.status());
            Incoming::Malformed(error)
        }
    }
}

/// Sends a status and the end of the stream. If the stream is gone by now nobody waits for the answer.
fn answer(respond: &mut SendResponse<Bytes>, status: StatusCode) {
    let mut response = Response::new(());
    *response.status_mut() = status;
    let _ = respond.send_response(response, true);
}

impl IncomingConnect {
    /// Answers 200 and opens the stream. `baggage` describes the workload that was reached.
    ///
    /// # Errors
    /// The peer gave up, or the connection ended.
    pub fn accept(mut self, baggage: Option<&BaggageHeader>) -> Result<HboneStream, Error> {
        let mut response = Response::new(());
        if let Some(baggage) = baggage {
            request::insert_baggage(response.headers_mut(), baggage);
        }
        let send = self.respond.send_response(response, false)?;
        Ok(HboneStream::new(send, self.body, None))
    }

    /// Answers with a status that is not 200, and ends the stream.
    pub fn refuse(mut self, status: StatusCode) {
        answer(&mut self.respond, status);
    }

    /// Resolves when the peer gives up before it got an answer.
    pub async fn abandoned(&mut self) -> Error {
        poll_fn(|cx| self.respond.poll_reset(cx)).await.map_or_else(Error::from, Error::Reset)
    }
}
