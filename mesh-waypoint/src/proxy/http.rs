//! The server's side of HTTP, on one stream of a client's tunnel.

use std::cell::RefCell;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use hyper::client::conn::http1 as client;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use mesh_core::state::AppProtocol;
use tokio::io::AsyncWriteExt as _;

use super::forward;
use super::io::{ClientIo, EndpointIo, Prefixed};
use super::worker::Local;
use crate::request::{Addressed, Source};

/// The head of a request, and the time until the next one on the same connection, may take this long.
const HEAD_TIMEOUT: Duration = Duration::from_secs(300);
/// Heads of requests, bytes (as Envoy).
const HEAD: usize = 64 << 10;
/// Headers of a request (as Envoy).
const HEADERS: usize = 100;
/// Requests that a client may have open at once on one connection.
const STREAMS: u32 = 1000;
/// Windows of HTTP/2, bytes.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;

/// Spawns on the worker's own thread.
#[derive(Debug, Clone, Copy)]
pub struct LocalExec;

impl<F: Future + 'static> hyper::rt::Executor<F> for LocalExec {
    fn execute(&self, future: F) {
        drop(tokio::task::spawn_local(future));
    }
}

/// A client's connection.
pub struct Downstream {
    /// Who serves it.
    pub worker: Rc<Local>,
    /// Who sends.
    pub source: Source,
    /// What it was opened to.
    pub addressed: Addressed,
    /// That as an address.
    pub destination: SocketAddr,
    /// What the port is declared to speak.
    pub protocol: AppProtocol,
    /// Whether the client speaks HTTP/2.
    pub http2: bool,
    /// The endpoint's side, once both have agreed to switch protocols.
    pub upgraded: RefCell<Option<Upgraded>>,
}

/// What is carried on after an upgrade.
pub struct Upgraded {
    /// The endpoint's connection.
    pub endpoint: client::Parts<TokioIo<EndpointIo>>,
    /// Ends with the connection.
    pub exchange: crate::telemetry::Exchange,
}

/// Serves a connection to its end.
pub async fn serve(downstream: Rc<Downstream>, io: ClientIo) {
    let ended = if downstream.http2 { http2(&downstream, io).await } else { http1(&downstream, io).await };
    if let Err(error) = ended {
        tracing::debug!(client = %downstream.source.address, %error, "a client's connection ended early");
    }
}

async fn http2(downstream: &Rc<Downstream>, io: ClientIo) -> hyper::Result<()> {
    let service = service_fn(|request| forward::handle(Rc::clone(downstream), request));
    let mut connection = std::pin::pin!(
        http2::Builder::new(LocalExec)
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_concurrent_streams(STREAMS)
            .max_header_list_size(u32::try_from(HEAD).unwrap_or(u32::MAX))
            .serve_connection(TokioIo::new(io), service)
    );
    tokio::select! {
        ended = connection.as_mut() => return ended,
        () = downstream.worker.shared.drain.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    connection.await
}

async fn http1(downstream: &Rc<Downstream>, io: ClientIo) -> hyper::Result<()> {
    // The server can give its transport back only while it need not pin the future.
    let service = service_fn(|request| {
        Box::pin(forward::handle(Rc::clone(downstream), request)) as Pin<Box<dyn Future<Output = _>>>
    });
    let mut connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD)
        .max_headers(HEADERS)
        .serve_connection(TokioIo::new(io), service);
    let drained = tokio::select! {
        ended = poll_fn(|cx| connection.poll_without_shutdown(cx)) => {
            ended?;
            false
        }
        () = downstream.worker.shared.drain.cancelled() => true,
    };
    if drained {
        Pin::new(&mut connection).graceful_shutdown();
        poll_fn(|cx| connection.poll_without_shutdown(cx)).await?;
    }
    let http1::Parts { io, read_buf, .. } = connection.into_parts();
    let mut io = io.into_inner().after(read_buf);
    let upgraded = downstream.upgraded.borrow_mut().take();
    match upgraded {
        Some(upgraded) => carry_on(io, upgraded).await,
        // The client may have left already.
        None => drop(io.shutdown().await),
    }
    Ok(())
}

/// Copies what both sides say after they have switched protocols.
async fn carry_on(mut client: ClientIo, upgraded: Upgraded) {
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
