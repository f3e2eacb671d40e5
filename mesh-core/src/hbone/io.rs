//! Fewer, larger reads under TLS.
//!
//! rustls asks its transport for a few kilobytes at a time, so that a busy tunnel would make a dozen reads for every
//! write. [`ReadAhead`] reads what the socket has, up to 256 KiB, and serves TLS from that; the buffer goes back to the
//! thread as soon as it is empty.

use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

use super::buffers;

/// A transport that reads ahead. Writes go straight through.
#[derive(Debug)]
pub struct ReadAhead<IO> {
    inner: IO,
    ahead: Option<BytesMut>,
}

impl<IO> ReadAhead<IO> {
    /// Wraps a transport; nothing is allocated until it has bytes.
    pub const fn new(inner: IO) -> Self {
        Self { inner, ahead: None }
    }

    /// The transport below.
    pub const fn get_ref(&self) -> &IO {
        &self.inner
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for ReadAhead<IO> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let mut ahead = match this.ahead.take() {
            Some(ahead) => ahead,
            None if to.remaining() >= buffers::SIZE => return Pin::new(&mut this.inner).poll_read(cx, to),
            None => {
                let mut buffer = buffers::take();
                let read = pin!(this.inner.read_buf(&mut buffer)).poll(cx);
                if !matches!(read, Poll::Ready(Ok(1..))) {
                    buffers::give(buffer);
                    // 0 bytes: the end of the stream, which is what an untouched `to` says.
                    return read.map_ok(|_| ());
                }
                buffer
            }
        };
        let n = ahead.len().min(to.remaining());
        to.put_slice(&ahead[..n]);
        if n == ahead.len() {
            buffers::give(ahead);
        } else {
            ahead.advance(n);
            this.ahead = Some(ahead);
        }
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for ReadAhead<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.inner).poll_shutdown(cx))?;
        Poll::Ready(Ok(()))
    }
}
