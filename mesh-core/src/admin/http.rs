//! A small HTTP/1.1 server for people and scrapers: one handler per port, on the control runtime. A connection carries
//! one request; how many there are at once and how long each lasts is bounded ([`super::slots`]).

use std::net::SocketAddr;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use crate::admin::slots::{CONNECTION_TIMEOUT, HEAD_TIMEOUT, Slot, Slots};
use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio_util::sync::CancellationToken;

/// What a handler gives back.
pub type Reply = Response<Full<Bytes>>;

/// Names the node whose agent gave an answer that the control plane passes on.
pub const NODE_HEADER: &str = "undermesh-node";

/// Method, path, query and the `Accept` header of a request; bodies are not read.
#[derive(Debug)]
pub struct Ask {
    /// Method.
    pub method: Method,
    /// Path, as it came.
    pub path: String,
    query: String,
    /// `Accept` header; empty when there is none.
    pub accept: String,
}

impl Ask {
    fn new(request: &Request<Incoming>) -> Self {
        let accept = request.headers().get(header::ACCEPT).and_then(|v| v.to_str().ok());
        Self {
            method: request.method().clone(),
            path: request.uri().path().to_owned(),
            query: request.uri().query().unwrap_or_default().to_owned(),
            accept: accept.unwrap_or_default().to_owned(),
        }
    }

    /// A GET of path and query, as somebody passed it on.
    #[must_use]
    pub fn get(target: &str) -> Self {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        Self { method: Method::GET, path: path.to_owned(), query: query.to_owned(), accept: String::new() }
    }

    /// The decoded value of a query parameter.
    #[must_use]
    pub fn parameter(&self, name: &str) -> Option<String> {
        parameter(&self.query, name)
    }
}

/// The decoded value of a parameter of a query.
#[must_use]
pub fn parameter(query: &str, name: &str) -> Option<String> {
    query.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (key == name).then(|| percent_decode(value))
    })
}

fn percent_decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let hex = |b: &u8| char::from(*b).to_digit(16).and_then(|d| u8::try_from(d).ok());
        match (first, tail) {
            (b'%', [a, b, after @ ..]) if hex(a).is_some() && hex(b).is_some() => {
                bytes.push(hex(a).unwrap_or_default() << 4 | hex(b).unwrap_or_default());
                rest = after;
            }
            (b'+', _) => {
                bytes.push(b' ');
                rest = tail;
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A JSON document.
#[must_use]
pub fn json(value: &impl serde::Serialize) -> Reply {
    match serde_json::to_vec_pretty(value) {
        Ok(body) => reply(StatusCode::OK, "application/json", body),
        Err(e) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("cannot write the answer as JSON: {e}\n")),
    }
}

/// A line for people.
#[must_use]
pub fn text(status: StatusCode, body: impl Into<Vec<u8>>) -> Reply {
    reply(status, "text/plain; charset=utf-8", body)
}

/// Any document.
#[must_use]
pub fn reply(status: StatusCode, content_type: &'static str, body: impl Into<Vec<u8>>) -> Reply {
    let mut reply = Response::new(Full::new(Bytes::from(body.into())));
    *reply.status_mut() = status;
    reply.headers_mut().insert(header::CONTENT_TYPE, http::HeaderValue::from_static(content_type));
    reply
}

/// What answers the requests of one port.
pub type Handler = Rc<dyn Fn(Ask) -> LocalBoxFuture<'static, Reply>>;

/// Binds a TCP port that an older and a newer agent can hold at once.
///
/// # Errors
/// The address cannot be bound.
pub fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = crate::listen::bound(address, |socket| {
        socket.set_reuse_port(true)?;
        socket.set_reuse_address(true)
    })?;
    socket.listen(128)?;
    TcpListener::from_std(socket.into())
}

/// Binds a unix socket, replacing what a dead process left at `path`; only root may connect.
///
/// # Errors
/// The path cannot be bound.
pub fn bind_unix(path: &Path) -> std::io::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt as _;
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Answers on `listener` until `stop`.
pub async fn serve_tcp(listener: TcpListener, handler: Handler, stop: CancellationToken) {
    let slots = Slots::default();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return,
        };
        match accepted {
            Ok((stream, peer)) => start(stream, slots.take(Some(peer.ip())), &handler),
            Err(error) => pause(&error).await,
        }
    }
}

/// As [`serve_tcp`].
pub async fn serve_unix(listener: UnixListener, handler: Handler, stop: CancellationToken) {
    let slots = Slots::default();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return,
        };
        match accepted {
            Ok((stream, _)) => start(stream, slots.take(None), &handler),
            Err(error) => pause(&error).await,
        }
    }
}

async fn pause(error: &std::io::Error) {
    tracing::warn!(%error, "cannot accept an admin connection");
    tokio::time::sleep(Duration::from_millis(200)).await;
}

/// Answers on a task of its own; a connection without a slot is closed.
fn start(stream: impl AsyncRead + AsyncWrite + Unpin + 'static, slot: Option<Slot>, handler: &Handler) {
    let Some(slot) = slot else {
        tracing::debug!("an admin connection is closed: too many are open");
        return;
    };
    let handler = Rc::clone(handler);
    drop(tokio::task::spawn_local(async move {
        let _slot = slot;
        if tokio::time::timeout(CONNECTION_TIMEOUT, connection(stream, handler)).await.is_err() {
            tracing::debug!("an admin connection is closed: it took too long");
        }
    }));
}

async fn connection(stream: impl AsyncRead + AsyncWrite + Unpin + 'static, handler: Handler) {
    let service = service_fn(|request: Request<Incoming>| {
        let answer = handler(Ask::new(&request));
        async move { Ok::<_, std::convert::Infallible>(answer.await) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "an admin connection ended early");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::slots::CONNECTIONS;
    use futures_util::FutureExt as _;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
    use tokio::task::LocalSet;

    /// A port that answers with `body`. In memory: a paused clock runs ahead of what a kernel still delivers.
    struct Port {
        slots: Slots,
        handler: Handler,
    }

    impl Port {
        fn new(body: &'static [u8]) -> Self {
            let handler: Handler =
                Rc::new(move |_| std::future::ready(text(StatusCode::OK, body)).boxed_local());
            Self { slots: Slots::default(), handler }
        }

        fn connect(&self) -> DuplexStream {
            let (client, server) = duplex(64 << 10);
            start(server, self.slots.take(None), &self.handler);
            client
        }
    }

    async fn answer(stream: &mut DuplexStream) -> std::io::Result<String> {
        stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer)
    }

    #[tokio::test(start_paused = true)]
    async fn connections_beyond_the_bound_are_closed_and_silent_ones_make_room() {
        let test = async {
            let port = Port::new(b"here");
            let silent: Vec<_> = (0..CONNECTIONS).map(|_| port.connect()).collect();
            let refused = answer(&mut port.connect()).await;
            assert!(refused.as_ref().map_or(true, String::is_empty), "it was answered: {refused:?}");
            let began = tokio::time::Instant::now();
            for mut stream in silent {
                assert_eq!(stream.read(&mut [0]).await.unwrap_or(0), 0, "a silent connection is closed");
            }
            assert!(began.elapsed() <= HEAD_TIMEOUT * 2, "it took {:?}", began.elapsed());
            assert!(answer(&mut port.connect()).await.unwrap().ends_with("here"));
        };
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_is_not_read_does_not_hold_its_connection() {
        // More than the buffers of both sides take.
        let large: &[u8] = vec![b'x'; 4 << 20].leak();
        let test = async {
            let mut stream = Port::new(large).connect();
            stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
            stream.read_exact(&mut [0]).await.unwrap();
            tokio::time::sleep(CONNECTION_TIMEOUT * 2).await;
            let mut rest = Vec::new();
            // Cut off: an end or an error, but not the whole.
            let _ = stream.read_to_end(&mut rest).await;
            assert!(rest.len() < large.len(), "all {} bytes came", rest.len());
        };
        LocalSet::new().run_until(test).await;
    }

    #[test]
    fn query_values_are_decoded() {
        let query = "src=shop%2Fcart&dst=10.0.0.1:80&flag&plus=a+b&bad=%zz%2";
        assert_eq!(parameter(query, "src").as_deref(), Some("shop/cart"));
        assert_eq!(parameter(query, "dst").as_deref(), Some("10.0.0.1:80"));
        assert_eq!(parameter(query, "flag").as_deref(), Some(""));
        assert_eq!(parameter(query, "plus").as_deref(), Some("a b"));
        assert_eq!(parameter(query, "bad").as_deref(), Some("%zz%2"));
        assert_eq!(parameter(query, "none"), None);
    }
}
