//! The server's side of HTTP/1, in turns: while requests come, hyper serves the connection; once it has been quiet for a
//! moment, hyper gives the transport back and only that is kept until the client says something. hyper's buffers are
//! 16 KiB, and most of a gateway's connections are idle.

use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::time::Sleep;

use super::forward;
use super::http::{Downstream, HEAD, HEADERS, Upgraded};
use super::io::{ClientIo, Prefixed};

/// The head of a request may take this long from its first byte on.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
/// A connection rests after being quiet for this long to twice as long.
const QUIET: Duration = Duration::from_secs(1);
/// How often it is looked at while a request takes its time.
const LONGEST_QUIET: Duration = Duration::from_secs(16);
/// A connection without a request is closed after this long (as Envoy).
const IDLE: Duration = Duration::from_secs(3600);

/// How a turn went.
enum Turn {
    /// The client has said nothing for a while, and nothing is owed to it.
    Rests(ClientIo),
    /// No further request comes: the client or the agreement of both has ended HTTP here.
    Ended(ClientIo),
}

/// Serves a connection to its end.
pub(super) async fn serve(downstream: &Rc<Downstream>, mut io: ClientIo) -> hyper::Result<()> {
    loop {
        match Box::pin(turn(downstream, io)).await? {
            Turn::Ended(io) => {
                end(downstream, io).await;
                return Ok(());
            }
            Turn::Rests(resting) => match rest(downstream, resting).await {
                Some(woken) => io = woken,
                None => return Ok(()),
            },
        }
    }
}

/// What is left when HTTP has ended.
async fn end(downstream: &Rc<Downstream>, mut io: ClientIo) {
    let upgraded = downstream.upgraded.borrow_mut().take();
    match upgraded {
        Some(upgraded) => Box::pin(carry_on(io, upgraded)).await,
        // The client may have left already.
        None => drop(io.shutdown().await),
    }
}

/// Waits for the client to say something; nothing when it leaves, or has nothing to say, or is asked to go elsewhere.
async fn rest(downstream: &Rc<Downstream>, mut io: ClientIo) -> Option<ClientIo> {
    let _counted = downstream.worker.shared.count_resting();
    let said = tokio::select! {
        said = io.next_bytes() => said.ok().filter(|bytes| !bytes.is_empty()),
        () = downstream.worker.shared.drain.cancelled() => None,
        () = tokio::time::sleep(IDLE) => None,
    };
    match said {
        Some(bytes) => Some(io.after(bytes)),
        None => {
            // The client may have left already.
            drop(io.shutdown().await);
            None
        }
    }
}

async fn turn(downstream: &Rc<Downstream>, io: ClientIo) -> hyper::Result<Turn> {
    let blocked = Rc::new(Cell::new(false));
    downstream.latest.take();
    // The server can give its transport back only while it need not pin the future.
    let service = service_fn(|request| {
        Box::pin(forward::handle(Rc::clone(downstream), request)) as Pin<Box<dyn Future<Output = _>>>
    });
    let mut connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD)
        .max_headers(HEADERS)
        .serve_connection(TokioIo::new(Watched { io, blocked: Rc::clone(&blocked) }), service);
    let mut quiet = Quiet::new();
    let rests = tokio::select! {
        rests = poll_fn(|cx| {
            if let Poll::Ready(ended) = connection.poll_without_shutdown(cx) {
                return Poll::Ready(ended.map(|()| false));
            }
            quiet.poll(downstream, blocked.get(), cx).map(|()| Ok(true))
        }) => Some(rests),
        () = downstream.worker.shared.drain.cancelled() => None,
    };
    let rests = match rests {
        // What cannot be read has been answered: the answer is to arrive, and not to be overtaken by a reset.
        Some(Err(error)) if error.is_parse() => {
            tracing::debug!(client = %downstream.source.address, %error, "a client's request cannot be read");
            Some(false)
        }
        Some(rests) => Some(rests?),
        None => None,
    };
    if rests.is_none() {
        Pin::new(&mut connection).graceful_shutdown();
        poll_fn(|cx| connection.poll_without_shutdown(cx)).await?;
    }
    let http1::Parts { io, read_buf, .. } = connection.into_parts();
    let io = io.into_inner().io.after(read_buf);
    Ok(if rests == Some(true) { Turn::Rests(io) } else { Turn::Ended(io) })
}

/// Notices that a connection has nothing to do. It looks once in a while, so that busy ones do not pay for it.
struct Quiet {
    timer: Option<Pin<Box<Sleep>>>,
    period: Duration,
    /// Requests when the timer was started.
    seen: u64,
}

impl Quiet {
    const fn new() -> Self {
        Self { timer: None, period: QUIET, seen: 0 }
    }

    fn poll(&mut self, downstream: &Downstream, blocked: bool, cx: &mut Context<'_>) -> Poll<()> {
        if downstream.latest.borrow().is_none() {
            // The first head of a turn has its own time limit.
            return Poll::Pending;
        }
        loop {
            let served = downstream.served.get();
            let timer = self.timer.get_or_insert_with(|| {
                self.seen = served;
                Box::pin(tokio::time::sleep(self.period))
            });
            ready!(timer.as_mut().poll(cx));
            self.timer = None;
            if self.seen != served {
                self.period = QUIET;
            } else if is_at_rest(downstream) && !blocked {
                return Poll::Ready(());
            } else {
                // A request that takes its time.
                self.period = (self.period * 2).min(LONGEST_QUIET);
            }
        }
    }
}

/// Whether this turn has had a request, and the latest one is over: all of it was read, and its answer handed on. Only
/// then do bytes that come next begin another request.
fn is_at_rest(downstream: &Downstream) -> bool {
    let latest = downstream.latest.borrow();
    latest.as_ref().is_some_and(|progress| progress.ended.get() && Rc::strong_count(progress) == 1)
}

/// A transport that tells when the client does not take what it is sent.
struct Watched {
    io: ClientIo,
    blocked: Rc<Cell<bool>>,
}

impl AsyncRead for Watched {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_read(cx, to)
    }
}

impl AsyncWrite for Watched {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.io).poll_write(cx, data);
        this.blocked.set(written.is_pending());
        written
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.io).poll_write_vectored(cx, pieces);
        this.blocked.set(written.is_pending());
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}

/// Copies what both sides say after they have switched protocols.
pub(super) async fn carry_on(mut client: impl AsyncRead + AsyncWrite + Unpin, upgraded: Upgraded) {
    let Upgraded { endpoint, mut exchange } = upgraded;
    let mut endpoint = Prefixed::new(endpoint.read_buf, endpoint.io.into_inner());
    match tokio::io::copy_bidirectional(&mut client, &mut endpoint).await {
        Ok((received, sent)) => {
            exchange.progress.received.set(received);
            exchange.sent = sent;
            exchange.complete();
        }
        Err(error) => exchange.upstream_ended(&error.to_string()),
    }
}
