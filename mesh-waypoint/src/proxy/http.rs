//! The server's side of HTTP, on one stream of a client's tunnel.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use ::http::{HeaderValue, Uri};
use hyper::client::conn::http1 as client;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use mesh_core::state::{AppProtocol, Str, Workload};

use super::body::Progress;
use super::io::{ClientIo, EndpointIo};
use super::worker::Local;
use super::{forward, http1};
use crate::request::{Addressed, Source};

/// Heads of requests, bytes (as Envoy).
pub(super) const HEAD: usize = 64 << 10;
/// Headers of a request (as Envoy).
pub(super) const HEADERS: usize = 100;
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
    /// What a TLS client of a gateway has come to.
    pub secured: Option<Secured>,
    /// What the port is declared to speak.
    pub protocol: AppProtocol,
    /// Whether the client speaks HTTP/2.
    pub http2: bool,
    /// At a gateway, its own workload: metrics have it as the source of what it sends on.
    pub reported: Option<Arc<Workload>>,
    /// The endpoint's side, once both have agreed to switch protocols.
    pub upgraded: RefCell<Option<Upgraded>>,
    /// The latest request, which is over when nobody else has it.
    pub latest: RefCell<Option<Rc<Progress>>>,
    /// Requests so far.
    pub served: Cell<u64>,
}

/// What a TLS client of a gateway has come to.
#[derive(Debug, Clone)]
pub struct Secured {
    /// The listener, or the listeners that share connections.
    pub server: Str,
    /// The name that it asked for; empty: none.
    pub name: Str,
    /// What endpoints are told of the certificate that it has shown.
    pub certificate: Option<HeaderValue>,
}

impl Downstream {
    /// `http` or `https`: a gateway knows what was spoken, else it is what the client says.
    pub(crate) fn scheme(&self, target: &Uri) -> &'static str {
        let secure = match self.addressed {
            Addressed::Gateway { .. } => self.secured.is_some(),
            _ => target.scheme_str() == Some("https"),
        };
        if secure { "https" } else { "http" }
    }

    /// Notes that a request has come.
    pub(super) fn begins(&self, progress: &Rc<Progress>) {
        self.served.set(self.served.get() + 1);
        if !self.http2 {
            self.latest.replace(Some(Rc::clone(progress)));
        }
    }
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
    let ended = if downstream.http2 {
        // Boxed: a quiet connection of HTTP/1 needs no room for it.
        Box::pin(http2(&downstream, io)).await
    } else {
        http1::serve(&downstream, io).await
    };
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
            .enable_connect_protocol()
            .max_header_list_size(u32::try_from(HEAD).unwrap_or(u32::MAX))
            .serve_connection(TokioIo::new(io), service)
    );
    tokio::select! {
        ended = connection.as_mut() => return ended,
        () = downstream.worker.shared.drain.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    connection.await
}
