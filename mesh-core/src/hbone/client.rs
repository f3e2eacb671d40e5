//! The side that opens tunnels.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use h2::client::{Connection, SendRequest};
use http::StatusCode;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::baggage::BaggageHeader;
use super::error::Error;
use super::keepalive::Keepalive;
use super::request::{self, ConnectRequest};
use super::settings::Settings;
use super::stream::{Active, HboneStream};

/// A handle on one tunnel connection. Clones share the connection; it closes, once idle, when the last is dropped.
#[derive(Clone)]
pub struct ClientConnection {
    requests: SendRequest<Bytes>,
    state: Arc<State>,
}

struct State {
    active: Arc<AtomicUsize>,
    closed: AtomicBool,
    streams: usize,
    tls: OnceLock<rustls::Error>,
}

impl State {
    /// The error, with its cause where the connection below knows one.
    fn explain(&self, error: impl Into<Error>) -> Error {
        match (error.into(), self.tls.get()) {
            (Error::Io(_) | Error::PeerClosed(_) | Error::Closed, Some(cause)) => {
                Error::Tls(cause.clone().into())
            }
            (error, _) => error,
        }
    }
}

/// Notes what TLS says when a read fails. h2 keeps only the text of an I/O error; but in TLS 1.3 a server's refusal of
/// our certificate arrives here, after the handshake, and has to be told from a broken connection.
struct Noting<IO> {
    io: IO,
    state: Arc<State>,
}

/// The future that moves the connection's bytes. Spawn it; it resolves when the connection is over.
#[must_use = "a connection moves only while its driver is polled"]
pub struct Driver<IO> {
    connection: Connection<Noting<IO>, Bytes>,
    keepalive: Keepalive,
    state: Arc<State>,
}

/// An open stream and what the peer said with its 200.
#[derive(Debug)]
pub struct Opened {
    /// The bytes.
    pub stream: HboneStream,
    /// The destination workload, as its node describes it.
    pub baggage: Option<BaggageHeader>,
}

impl ClientConnection {
    /// Starts HTTP/2 on a connection whose TLS is done. The peer's settings are not waited for.
    ///
    /// # Errors
    /// The transport fails at once.
    pub async fn handshake<IO>(io: IO, settings: &Settings) -> Result<(Self, Driver<IO>), Error>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let state = Arc::new(State {
            active: Arc::default(),
            closed: AtomicBool::new(false),
            streams: settings.streams as usize,
            tls: OnceLock::new(),
        });
        let io = Noting { io, state: Arc::clone(&state) };
        let (requests, mut connection) = h2::client::Builder::new()
            .enable_push(false)
            .initial_window_size(settings.stream_window)
            .initial_connection_window_size(settings.connection_window)
            .max_frame_size(settings.frame_size)
            .max_header_list_size(settings.header_list)
            .max_send_buffer_size(settings.send_buffer)
            .initial_max_send_streams(settings.streams as usize)
            .handshake(io)
            .await
            .map_err(|e| state.explain(e))?;
        let keepalive = Keepalive::new(connection.ping_pong(), settings);
        let driver = Driver { connection, keepalive, state: Arc::clone(&state) };
        Ok((Self { requests, state }, driver))
    }

    /// Opens a stream: sends CONNECT and waits for the answer. Dropping the future aborts the stream.
    ///
    /// # Errors
    /// [`Error::Status`] for an answer other than 200; else the stream or the connection ended first.
    pub async fn open(&self, connect: &ConnectRequest) -> Result<Opened, Error> {
        let request = connect.encode()?;
        let active = Active::new(&self.state.active);
        let explain = |e| self.state.explain(e);
        let mut requests = self.requests.clone().ready().await.map_err(explain)?;
        let (response, send) = requests.send_request(request, false).map_err(explain)?;
        let response = response.await.map_err(explain)?;
        if response.status() != StatusCode::OK {
            return Err(Error::Status(response.status()));
        }
        let baggage = request::baggage(response.headers());
        Ok(Opened { stream: HboneStream::new(send, response.into_body(), Some(active)), baggage })
    }

    /// Streams that are open or being opened.
    #[must_use]
    pub fn active_streams(&self) -> usize {
        self.state.active.load(Ordering::Relaxed)
    }

    /// How many streams the connection may carry: our own limit or the peer's, whichever is less.
    #[must_use]
    pub fn max_streams(&self) -> usize {
        self.requests.current_max_send_streams().min(self.state.streams)
    }

    /// Whether the connection may be offered for another stream and stay in the pool. It is false one stream before
    /// the limit, as other node proxies do it: the last slot absorbs the race between pool and peer.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.active_streams() + 1 < self.max_streams()
    }

    /// Whether no stream can be opened any more: the connection ended, or the peer sent GOAWAY.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        if self.state.closed.load(Ordering::Acquire) {
            return true;
        }
        // A fresh clone has no stream waiting for a slot, so it is ready unless the connection takes no more.
        let mut requests = self.requests.clone();
        matches!(requests.poll_ready(&mut Context::from_waker(Waker::noop())), Poll::Ready(Err(_)))
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
        let this = self.get_mut();
        let ended = match Pin::new(&mut this.connection).poll(cx) {
            Poll::Ready(result) => result.map_err(|e| this.state.explain(e)),
            // Dropping the connection, as the caller does with a driver that is done, ends every stream.
            Poll::Pending => match this.keepalive.poll_silent(cx) {
                Poll::Ready(()) => Err(Error::Silent),
                Poll::Pending => return Poll::Pending,
            },
        };
        this.state.closed.store(true, Ordering::Release);
        Poll::Ready(ended)
    }
}

impl<IO> Drop for Driver<IO> {
    fn drop(&mut self) {
        self.state.closed.store(true, Ordering::Release);
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Noting<IO> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let read = Pin::new(&mut this.io).poll_read(cx, to);
        if let Poll::Ready(Err(error)) = &read
            && let Some(cause) = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>())
        {
            // Only the first counts; what follows is the echo of it.
            let _ = this.state.tls.set(cause.clone());
        }
        read
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Noting<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
