//! A bare relay of HTTP/1.1 on hyper: one thread, connections to the server kept, no routes, no metrics, no policy.
//!
//! What a proxy on hyper costs beyond it is its own.

use anyhow::{Context, Result};
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use std::cell::RefCell;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context as Task, Poll};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::LocalOptions;

/// From where to where.
#[derive(clap::Args)]
pub struct Args {
    /// Address to listen on
    #[arg(long)]
    listen: SocketAddr,
    /// The server
    #[arg(long)]
    to: SocketAddr,
}

/// Connections without a request.
type Idle = Rc<RefCell<Vec<SendRequest<Incoming>>>>;

/// Relays without end.
///
/// # Errors
/// The port is taken.
pub fn run(args: &Args) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .event_interval(16)
        .build_local(LocalOptions::default())
        .context("cannot make an event loop")?;
    runtime.block_on(serve(args))
}

async fn serve(args: &Args) -> Result<()> {
    let listener = TcpListener::bind(args.listen).await.context("cannot listen")?;
    let idle = Idle::default();
    let to = args.to;
    loop {
        let (stream, _) = listener.accept().await.context("cannot accept")?;
        stream.set_nodelay(true).context("cannot set nodelay")?;
        let idle = Rc::clone(&idle);
        drop(tokio::task::spawn_local(async move {
            let service = service_fn(|request| relay(Rc::clone(&idle), to, request));
            let server = hyper::server::conn::http1::Builder::new();
            // A client that leaves ends it.
            let _ = server.serve_connection(TokioIo::new(stream), service).await;
        }));
    }
}

async fn relay(idle: Idle, to: SocketAddr, request: Request<Incoming>) -> Result<Response<Relayed>> {
    let mut sender = loop {
        let kept = idle.borrow_mut().pop();
        match kept {
            Some(mut sender) => {
                if sender.ready().await.is_ok() {
                    break sender;
                }
            }
            None => break connect(to).await?,
        }
    };
    let response = sender.send_request(request).await?;
    Ok(response.map(|body| Relayed { body, sender: Some(sender), idle }))
}

async fn connect(to: SocketAddr) -> Result<SendRequest<Incoming>> {
    let stream = TcpStream::connect(to).await.context("cannot connect")?;
    stream.set_nodelay(true).context("cannot set nodelay")?;
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    drop(tokio::task::spawn_local(connection));
    Ok(sender)
}

/// An answer's body; its connection is kept when it is over.
struct Relayed {
    body: Incoming,
    sender: Option<SendRequest<Incoming>>,
    idle: Idle,
}

impl Body for Relayed {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Task<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Relayed {
    fn drop(&mut self) {
        if self.body.is_end_stream() {
            self.idle.borrow_mut().extend(self.sender.take());
        }
    }
}
