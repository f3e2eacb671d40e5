//! Streams and sockets as transports of HTTP.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use mesh_core::hbone::copy::Meter;
use mesh_core::hbone::stream::TunnelIo;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::client::TlsStream;
use tokio_rustls::server::TlsStream as ServerTls;

/// A transport of which some bytes were read already.
#[derive(Debug)]
pub struct Prefixed<IO> {
    prefix: Bytes,
    io: IO,
}

/// The client's side.
pub type ClientIo = Prefixed<ClientStream>;

/// What a client's requests come on.
#[derive(Debug)]
pub enum ClientStream {
    /// A stream of its tunnel.
    Tunnel(TunnelStream),
    /// A socket, at a gateway.
    Plain(TcpStream),
    /// TLS that ends at a gateway.
    Tls(Box<ServerTls<Prefixed<TcpStream>>>),
}

/// How long a stream that we have ended may wait for the other side's end.
const LINGER: Duration = Duration::from_secs(60);

/// A stream of a tunnel whose last bytes arrive: a stream that is dropped is reset, and what waits in it for its peer to
/// read is lost, so one that we have ended is kept until the peer ends it, too.
#[derive(Debug)]
pub struct TunnelStream {
    io: Option<TunnelIo>,
    finished: bool,
    ended: bool,
    keeper: Keeper,
}

/// Keeps streams that only wait for their peer's end.
#[derive(Debug, Clone)]
pub struct Keeper(mpsc::UnboundedSender<TunnelIo>);

impl Keeper {
    /// Starts to keep streams on this thread.
    #[must_use]
    pub fn start() -> Self {
        let (keeper, mut kept) = mpsc::unbounded_channel();
        drop(tokio::task::spawn_local(async move {
            while let Some(io) = kept.recv().await {
                drop(tokio::task::spawn_local(tokio::time::timeout(LINGER, until_end(io))));
            }
        }));
        Self(keeper)
    }
}

async fn until_end(mut io: TunnelIo) {
    let mut rest = [0; 512];
    while io.read(&mut rest).await.is_ok_and(|n| n > 0) {}
}

impl TunnelStream {
    /// A stream, with who keeps it at its end.
    #[must_use]
    pub const fn new(io: TunnelIo, keeper: Keeper) -> Self {
        Self { io: Some(io), finished: false, ended: false, keeper }
    }

    fn io(&mut self) -> io::Result<&mut TunnelIo> {
        self.io.as_mut().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl AsyncRead for TunnelStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let (before, room) = (to.filled().len(), to.remaining());
        let read = Pin::new(this.io()?).poll_read(cx, to);
        if let Poll::Ready(Ok(())) = read {
            this.ended |= room > 0 && to.filled().len() == before;
        }
        read
    }
}

impl AsyncWrite for TunnelStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(self.get_mut().io()?).poll_write(cx, data)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.get_mut().io()?).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let ended = Pin::new(this.io()?).poll_shutdown(cx);
        this.finished |= matches!(ended, Poll::Ready(Ok(())));
        ended
    }
}

impl Drop for TunnelStream {
    fn drop(&mut self) {
        if let Some(io) = self.io.take()
            && self.finished
            && !self.ended
        {
            // Without its keeper the thread is ending.
            let _ = self.keeper.0.send(io);
        }
    }
}

impl<IO> Prefixed<IO> {
    /// `io` after `prefix`.
    pub const fn new(prefix: Bytes, io: IO) -> Self {
        Self { prefix, io }
    }

    /// The same with `earlier` before it.
    #[must_use]
    pub fn after(self, earlier: Bytes) -> Self {
        if earlier.is_empty() {
            return self;
        }
        let prefix = if self.prefix.is_empty() { earlier } else { [earlier, self.prefix].concat().into() };
        Self { prefix, io: self.io }
    }
}

impl<IO: AsyncRead + Unpin> Prefixed<IO> {
    /// What comes next, once it comes; nothing at the end. No buffer is held while it waits.
    ///
    /// # Errors
    /// The transport's.
    pub async fn next_bytes(&mut self) -> io::Result<Bytes> {
        const MOST: usize = 2048;
        poll_fn(|cx| {
            let mut room = [0; MOST];
            let mut read = ReadBuf::new(&mut room);
            ready!(Pin::new(&mut *self).poll_read(cx, &mut read))?;
            Poll::Ready(Ok(Bytes::copy_from_slice(read.filled())))
        })
        .await
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Prefixed<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        to: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.prefix.is_empty() {
            return Pin::new(&mut self.io).poll_read(cx, to);
        }
        let n = self.prefix.len().min(to.remaining());
        to.put_slice(&self.prefix[..n]);
        self.prefix.advance(n);
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Prefixed<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, pieces)
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

/// The endpoint's side.
#[derive(Debug)]
pub enum EndpointIo {
    /// A stream of a tunnel to it.
    Tunnel(TunnelStream),
    /// A socket.
    Plain(TcpStream),
    /// TLS of the application over one of them.
    Tls(Box<TlsStream<Box<Self>>>),
}

/// Reads and writes of whichever transport it is; only sockets take several pieces at once.
macro_rules! transport_of {
    ($name:ident: $($kind:ident),*) => {
        impl AsyncRead for $name {
            fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
                match self.get_mut() { $(Self::$kind(io) => Pin::new(io).poll_read(cx, to),)* }
            }
        }

        impl AsyncWrite for $name {
            fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
                match self.get_mut() { $(Self::$kind(io) => Pin::new(io).poll_write(cx, data),)* }
            }

            fn poll_write_vectored(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                pieces: &[io::IoSlice<'_>],
            ) -> Poll<io::Result<usize>> {
                match self.get_mut() { $(Self::$kind(io) => Pin::new(io).poll_write_vectored(cx, pieces),)* }
            }

            fn is_write_vectored(&self) -> bool {
                matches!(self, Self::Plain(_))
            }

            fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                match self.get_mut() { $(Self::$kind(io) => Pin::new(io).poll_flush(cx),)* }
            }

            fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                match self.get_mut() { $(Self::$kind(io) => Pin::new(io).poll_shutdown(cx),)* }
            }
        }
    };
}

transport_of!(ClientStream: Tunnel, Plain, Tls);
transport_of!(EndpointIo: Tunnel, Plain, Tls);

/// The client's side, with its bytes counted while they flow.
pub struct Metered<IO, M> {
    io: IO,
    meter: Rc<M>,
}

impl<IO, M: Meter> Metered<IO, M> {
    /// Counts what is read as from the client, and what is written as to it.
    pub const fn new(io: IO, meter: Rc<M>) -> Self {
        Self { io, meter }
    }
}

impl<IO: AsyncRead + Unpin, M: Meter> AsyncRead for Metered<IO, M> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = to.filled().len();
        let read = Pin::new(&mut this.io).poll_read(cx, to);
        this.meter.forward((to.filled().len() - before) as u64);
        read
    }
}

impl<IO: AsyncWrite + Unpin, M: Meter> AsyncWrite for Metered<IO, M> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.io).poll_write(cx, data);
        if let Poll::Ready(Ok(n)) = written {
            this.meter.backward(n as u64);
        }
        written
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}
