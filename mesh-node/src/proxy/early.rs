//! The application's first bytes, sent with the CONNECT instead of after its answer: a round trip between the nodes less
//! for every connection.
//!
//! What was sent so is kept until a peer has taken the connection. A peer that says no has delivered nothing: the bytes
//! go to the next tunnel or endpoint. A peer that says nothing may have delivered them, so that such a connection stays
//! where it is, as one that is established would. To put few connections into that position, bytes are sent early only
//! on a tunnel whose peer was heard a moment ago, and not while two endpoints are tried at once.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io::{self, Read as _};
use std::task::{Context, Poll};
use std::time::Duration;

use mesh_core::hbone::{ConnectRequest, Error, HboneStream, Opened, Opening};
use socket2::SockRef;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

use super::dial::TunnelHandle;

/// The most bytes that are sent early.
const MOST: usize = 4096;
/// How long ago the peer may have been heard. A node that vanishes takes connections with it that it was given in the
/// last so many milliseconds, as it does with those that were established.
const FRESH: Duration = Duration::from_millis(20);

thread_local! {
    /// Where first bytes are read into. One for all connections: none keeps it while it waits.
    static FIRST: RefCell<Box<[u8]>> = RefCell::new(vec![0; MOST].into());
}

/// The first bytes of one connection, and who has them.
pub(super) struct Early<'a> {
    client: &'a TcpStream,
    /// Read from the application: only we have them now.
    bytes: RefCell<Vec<u8>>,
    /// A peer that has not answered may have delivered them.
    is_out: Cell<bool>,
    /// Nothing may be sent early any more.
    is_over: Cell<bool>,
}

impl<'a> Early<'a> {
    pub(super) fn new(client: &'a TcpStream, allowed: bool) -> Self {
        let is_over = Cell::new(!allowed);
        Self { client, bytes: RefCell::default(), is_out: Cell::new(false), is_over }
    }

    /// Whether a peer that has not answered may have delivered something: no other may be tried.
    pub(super) const fn is_out(&self) -> bool {
        self.is_out.get()
    }

    /// From now on nothing is sent early: several endpoints are tried at once.
    pub(super) fn stop(&self) {
        self.is_over.set(true);
    }

    /// Opens a stream, with what the application has said by then. Says how many of the first bytes it has.
    ///
    /// # Errors
    /// The peer does not take the connection; [`Self::is_out`] tells whether it may have delivered something.
    pub(super) async fn open(
        &self,
        tunnel: &TunnelHandle,
        request: &ConnectRequest,
    ) -> Result<(Opened, usize), Error> {
        let mut opening = tunnel.connection.begin(request).await?;
        let is_early = !self.is_over.get() && tunnel.connection.heard_within(FRESH);
        let mut sent = if is_early { self.send(&mut opening, read_at_once)? } else { 0 };
        let answer = poll_fn(|cx| {
            if let Poll::Ready(answer) = opening.poll_answer(cx) {
                return Poll::Ready(answer);
            }
            if is_early && sent == 0 && self.is_readable(cx) {
                sent = self.send(&mut opening, TcpStream::try_read)?;
            }
            Poll::Pending
        });
        match answer.await {
            Ok(baggage) => Ok((opening.into_opened(baggage), sent)),
            Err(error) => {
                // A tunnel that is closed may have been so after the bytes had arrived.
                let says_no = matches!(error, Error::Status(_))
                    || error.unprocessed() && !matches!(error, Error::Closed);
                if sent > 0 && says_no {
                    self.is_out.set(false);
                }
                Err(error)
            }
        }
    }

    fn is_readable(&self, cx: &mut Context<'_>) -> bool {
        !self.is_over.get() && self.client.poll_read_ready(cx).is_ready()
    }

    /// Reads the first bytes, unless that was done before, and sends them.
    fn send(
        &self,
        opening: &mut Opening,
        read: fn(&TcpStream, &mut [u8]) -> io::Result<usize>,
    ) -> Result<usize, Error> {
        let bytes = &mut *self.bytes.borrow_mut();
        if bytes.is_empty() {
            FIRST.with_borrow_mut(|first| {
                // An end or an error stays for whoever relays.
                if let Ok(n) = read(self.client, first) {
                    bytes.extend_from_slice(&first[..n]);
                }
            });
            if bytes.is_empty() {
                return Ok(0);
            }
        }
        let sent = opening.send_early(bytes)?;
        if sent > 0 {
            self.is_out.set(true);
        }
        Ok(sent)
    }

    /// Sends the peer that has taken the connection what it has not got. Says how many first bytes there were.
    ///
    /// # Errors
    /// The stream or its connection has ended.
    pub(super) async fn finish(&self, stream: &mut HboneStream, sent: usize) -> Result<usize, Error> {
        let bytes = self.bytes.take();
        let mut rest = &bytes[sent..];
        while !rest.is_empty() {
            let room = poll_fn(|cx| stream.send.poll_room(cx, rest.len())).await?;
            stream.send.send(&rest[..room])?;
            rest = &rest[room..];
        }
        Ok(bytes.len())
    }

    /// The same for a peer without a tunnel.
    ///
    /// # Errors
    /// The socket broke.
    pub(super) async fn finish_plain(&self, server: &mut TcpStream) -> io::Result<usize> {
        let bytes = self.bytes.take();
        server.write_all(&bytes).await?;
        Ok(bytes.len())
    }
}

/// The event loop has not seen the socket yet, and would say that nothing is there.
fn read_at_once(client: &TcpStream, to: &mut [u8]) -> io::Result<usize> {
    (&*SockRef::from(client)).read(to)
}
