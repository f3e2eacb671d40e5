//! A connection whose handshake is done.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::receiving::Receiving;
use super::sending::{HEAD, Sending};

/// A transport and, unless it is bare, the TLS over it.
///
/// The tunnel takes it apart and works on the records themselves. As `AsyncRead + AsyncWrite` it is for what does not
/// need to be fast.
pub struct Channel<IO> {
    pub(crate) io: IO,
    pub(crate) receiving: Receiving,
    pub(crate) sending: Sending,
    facts: Facts,
    unread: std::ops::Range<usize>,
}

/// What was agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// The cipher suite; `None` without TLS.
    pub suite: Option<rustls::CipherSuite>,
    /// The key exchange.
    pub group: Option<rustls::NamedGroup>,
}

impl<IO> Channel<IO> {
    pub(super) const fn new(io: IO, receiving: Receiving, sending: Sending, facts: Facts) -> Self {
        Self { io, receiving, sending, facts, unread: 0..0 }
    }

    /// A transport as it is: for what protects itself, and for tests.
    #[must_use]
    pub const fn bare(io: IO) -> Self {
        let facts = Facts { suite: None, group: None };
        Self::new(io, Receiving::new(None, Vec::new(), Vec::new()), Sending::new(None), facts)
    }

    /// What was agreed on.
    #[must_use]
    pub const fn facts(&self) -> Facts {
        self.facts
    }
}

impl<IO> std::fmt::Debug for Channel<IO> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Channel").field("facts", &self.facts).finish_non_exhaustive()
    }
}

fn tls_error(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncRead for Channel<IO> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        // What was written must not wait for an answer to it.
        let _ = this.sending.poll_send(&mut this.io, cx)?;
        loop {
            if !this.unread.is_empty() {
                let n = this.unread.len().min(to.remaining());
                to.put_slice(&this.receiving.bytes()[this.unread.start..this.unread.start + n]);
                this.unread.start += n;
                return Poll::Ready(Ok(()));
            }
            match this.receiving.next().map_err(tls_error)? {
                Some(range) => this.unread = range,
                None => {
                    this.receiving.release();
                    if this.receiving.is_closed() {
                        return Poll::Ready(Ok(()));
                    }
                    if ready!(this.receiving.poll_fill(&mut this.io, cx))? == 0 {
                        // RFC 8446 §6.1: without close_notify, somebody may have cut the rest off.
                        return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
                    }
                }
            }
        }
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Channel<IO> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.sending.room() < data.len().min(4096) + HEAD {
            ready!(this.sending.poll_send(&mut this.io, cx))?;
        }
        let n = data.len().min(super::record::LONGEST).min(this.sending.room());
        this.sending.push(&[&data[..n]]);
        // What does not go at once goes with the next call.
        let _ = this.sending.poll_send(&mut this.io, cx)?;
        Poll::Ready(Ok(n))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.sending.poll_send(&mut this.io, cx))?;
        Pin::new(&mut this.io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.sending.push_close();
        ready!(this.sending.poll_send(&mut this.io, cx))?;
        Pin::new(&mut this.io).poll_shutdown(cx)
    }
}
