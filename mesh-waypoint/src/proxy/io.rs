//! Streams and sockets as transports of HTTP.

use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::{Buf as _, Bytes};
use mesh_core::hbone::copy::Meter;
use mesh_core::hbone::stream::TunnelIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// A transport of which some bytes were read already.
#[derive(Debug)]
pub struct Prefixed<IO> {
    prefix: Bytes,
    io: IO,
}

/// The client's side: a stream of its tunnel.
pub type ClientIo = Prefixed<TunnelIo>;

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
    Tunnel(TunnelIo),
    /// A socket.
    Plain(TcpStream),
}

impl AsyncRead for EndpointIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tunnel(io) => Pin::new(io).poll_read(cx, to),
            Self::Plain(io) => Pin::new(io).poll_read(cx, to),
        }
    }
}

impl AsyncWrite for EndpointIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tunnel(io) => Pin::new(io).poll_write(cx, data),
            Self::Plain(io) => Pin::new(io).poll_write(cx, data),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tunnel(io) => Pin::new(io).poll_write_vectored(cx, pieces),
            Self::Plain(io) => Pin::new(io).poll_write_vectored(cx, pieces),
        }
    }

    fn is_write_vectored(&self) -> bool {
        matches!(self, Self::Plain(_))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tunnel(io) => Pin::new(io).poll_flush(cx),
            Self::Plain(io) => Pin::new(io).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tunnel(io) => Pin::new(io).poll_shutdown(cx),
            Self::Plain(io) => Pin::new(io).poll_shutdown(cx),
        }
    }
}

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
