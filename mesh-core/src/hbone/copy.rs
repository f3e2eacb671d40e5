//! The loop between an application's socket and a tunnel, or between two sockets.
//!
//! Both directions run in one task and end independently (half-close). Nothing is allocated while a connection is idle:
//! a direction waits until its source is readable and only then takes a buffer from the thread, for as long as the bytes
//! are in its hands. An abrupt end on one side is an abrupt end on the other: RST for RST_STREAM and the reverse, also
//! when the future is dropped. Only a connection that both sides finished ends with FIN and END_STREAM.

mod socket;
mod tunnel;

use std::future::poll_fn;
use std::io;
use std::ops::Deref;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;

use h2::Reason;
use tokio::net::TcpStream;

use super::error::Error;
use super::stream::HboneStream;

/// Counts bytes while they flow. Called once per write, from the worker that owns the connection.
pub trait Meter {
    /// Bytes that went from the first endpoint to the second.
    fn forward(&self, bytes: u64);
    /// Bytes that went from the second endpoint to the first.
    fn backward(&self, bytes: u64);
}

/// The plainest [`Meter`].
#[derive(Debug, Default)]
pub struct Transferred {
    /// From the first endpoint to the second.
    pub forward: AtomicU64,
    /// From the second endpoint to the first.
    pub backward: AtomicU64,
}

impl Meter for Transferred {
    fn forward(&self, bytes: u64) {
        self.forward.fetch_add(bytes, Ordering::Relaxed);
    }

    fn backward(&self, bytes: u64) {
        self.backward.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// How a connection ended. Resets are the peers' business and no failure of the mesh.
#[derive(Debug)]
pub enum Ended {
    /// Both directions finished.
    Finished,
    /// The first socket was reset or failed.
    FirstReset(io::Error),
    /// The second socket was reset or failed.
    SecondReset(io::Error),
    /// The tunnel stream was reset, or its connection ended; see the error's code.
    Tunnel(Error),
    /// The caller's cancel future resolved.
    Cancelled,
}

/// Copies between the application's socket (first) and a tunnel stream (second), until both directions have ended, one
/// of them fails, or `cancel` resolves.
pub fn socket_and_tunnel<C: Future<Output = ()>>(
    socket: TcpStream,
    stream: HboneStream,
    meter: &impl Meter,
    cancel: C,
) -> impl Future<Output = Ended> {
    // Not inside the future: one that is dropped before its first poll resets its socket, too.
    let mut socket = Abortable::new(socket);
    async move {
        // Dropped before both directions ended, the halves reset the stream.
        let HboneStream { mut send, mut recv } = stream;
        let ended = {
            let to_tunnel = tunnel::send(&socket, &mut send, meter);
            let from_tunnel = tunnel::receive(&mut recv, &socket, meter);
            until_ended(to_tunnel, from_tunnel, cancel).await
        };
        match &ended {
            Ended::Finished => socket.finish(),
            // RFC 9113 §8.5: an error of the TCP connection.
            Ended::FirstReset(_) => send.reset(Reason::CONNECT_ERROR),
            _ => send.reset(Reason::CANCEL),
        }
        ended
    }
}

/// Copies between two sockets. See [`socket_and_tunnel`].
pub fn sockets<C: Future<Output = ()>>(
    first: TcpStream,
    second: TcpStream,
    meter: &impl Meter,
    cancel: C,
) -> impl Future<Output = Ended> {
    let (mut first, mut second) = (Abortable::new(first), Abortable::new(second));
    async move {
        let ended = {
            let forward = socket::copy(&first, &second, |n| meter.forward(n));
            let backward = socket::copy(&second, &first, |n| meter.backward(n));
            let forward =
                async { forward.await.map_err(|e| e.into_ended(Ended::FirstReset, Ended::SecondReset)) };
            let backward =
                async { backward.await.map_err(|e| e.into_ended(Ended::SecondReset, Ended::FirstReset)) };
            until_ended(forward, backward, cancel).await
        };
        if matches!(ended, Ended::Finished) {
            first.finish();
            second.finish();
        }
        ended
    }
}

/// Polls both directions until both are done, or anything ends the whole.
async fn until_ended(
    forward: impl Future<Output = Result<(), Ended>>,
    backward: impl Future<Output = Result<(), Ended>>,
    cancel: impl Future<Output = ()>,
) -> Ended {
    let (mut forward, mut backward, mut cancel) = (pin!(forward), pin!(backward), pin!(cancel));
    let (mut forward_done, mut backward_done) = (false, false);
    poll_fn(|cx| {
        if cancel.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ended::Cancelled);
        }
        for (direction, done) in [
            (forward.as_mut() as Pin<&mut dyn Future<Output = Result<(), Ended>>>, &mut forward_done),
            (backward.as_mut(), &mut backward_done),
        ] {
            if *done {
                continue;
            }
            match direction.poll(cx) {
                Poll::Ready(Ok(())) => *done = true,
                Poll::Ready(Err(ended)) => return Poll::Ready(ended),
                Poll::Pending => {}
            }
        }
        if forward_done && backward_done { Poll::Ready(Ended::Finished) } else { Poll::Pending }
    })
    .await
}

/// A socket that is reset (RST) when dropped, unless it was finished.
struct Abortable {
    socket: TcpStream,
    finished: bool,
}

impl Abortable {
    const fn new(socket: TcpStream) -> Self {
        Self { socket, finished: false }
    }

    /// A method, not an assignment: an `async move` block would capture the field alone, as a copy.
    const fn finish(&mut self) {
        self.finished = true;
    }
}

impl Deref for Abortable {
    type Target = TcpStream;

    fn deref(&self) -> &TcpStream {
        &self.socket
    }
}

impl Drop for Abortable {
    fn drop(&mut self) {
        if !self.finished {
            // It fails only on a socket that is closed already, which needs no RST.
            let _ = self.socket.set_zero_linger();
        }
    }
}
