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
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::Sleep;

use super::error::Error;
use super::http2::Reason;
use super::http2::streams::Sink;
use super::stream::HboneStream;
use tunnel::{Application, Sending};

/// For how long an application may go on talking to nobody after it was told everything, as to a server that lingers when
/// it closes. Its next word after that is answered by a reset, which would overtake data still on its way to it.
const LINGER: Duration = Duration::from_secs(2);

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
pub fn socket_and_tunnel<C: Future<Output = ()>, M: Meter + 'static>(
    socket: TcpStream,
    stream: HboneStream,
    meter: Rc<M>,
    cancel: C,
) -> impl Future<Output = Ended> {
    // Not inside the future: one that is dropped before its first poll resets its socket, too.
    let mut copy = Copy::new(socket, stream, meter);
    async move {
        let ended = {
            let mut cancel = pin!(cancel);
            poll_fn(|cx| {
                if cancel.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(Ended::Cancelled);
                }
                copy.poll(cx)
            })
            .await
        };
        copy.finish(&ended);
        ended
    }
}

/// Both directions between an application and a stream.
struct Copy<M: Meter + 'static> {
    application: Rc<Application<M>>,
    stream: HboneStream,
    sending: Sending,
    received: bool,
    /// Nobody listens to the application any more, as when a server has closed its socket. What that has said before
    /// still goes to the application; what the application says is read and dropped.
    unheard: bool,
    /// How long an application that has been told everything may take to leave.
    leaves: Option<Pin<Box<Sleep>>>,
    /// Waits for the socket to break while no direction would see it.
    broken: Option<Pin<Box<dyn Future<Output = io::Error>>>>,
    finished: bool,
}

impl<M: Meter + 'static> Copy<M> {
    fn new(socket: TcpStream, stream: HboneStream, meter: Rc<M>) -> Self {
        let application = Rc::new(Application { socket, meter });
        stream.recv.attach(Rc::clone(&application) as Rc<dyn Sink>);
        Self {
            application,
            stream,
            sending: Sending::new(),
            received: false,
            unheard: false,
            leaves: None,
            broken: None,
            finished: false,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        match self.advance(cx) {
            Ok(true) => Poll::Ready(Ended::Finished),
            Ok(false) => Poll::Pending,
            Err(ended) => Poll::Ready(ended),
        }
    }

    /// Whether both directions have finished.
    fn advance(&mut self, cx: &mut Context<'_>) -> Result<bool, Ended> {
        if !self.received
            && let Poll::Ready(result) = tunnel::poll_receive(&self.stream.recv, &self.application, cx)
        {
            result?;
            self.received = true;
        }
        if !self.sending.done
            && !self.unheard
            && let Poll::Ready(Err(ended)) = self.sending.poll(&self.application, &mut self.stream.send, cx)
        {
            self.goes_unheard(ended)?;
        }
        if self.received
            && !self.sending.done
            && !self.unheard
            && let Poll::Ready(error) = self.stream.send.poll_aborted(cx)
        {
            // The peer may abort although its direction has ended, or listen no more, or be gone.
            self.goes_unheard(Ended::Tunnel(error))?;
        }
        if self.unheard && !self.sending.done {
            return self.hear_out(cx);
        }
        if self.sending.done && self.received {
            return Ok(true);
        }
        if self.sending.watches_socket && !self.sending.done {
            self.broken = None;
            return Ok(false);
        }
        let broken = self.broken.get_or_insert_with(|| {
            let application = Rc::clone(&self.application);
            Box::pin(async move { socket::broken(&application.socket).await })
        });
        match broken.as_mut().poll(cx) {
            Poll::Ready(error) => Err(Ended::FirstReset(error)),
            Poll::Pending => Ok(false),
        }
    }

    /// What ends the direction to the tunnel leaves the other one alone if all that the peer has said is here.
    fn goes_unheard(&mut self, ended: Ended) -> Result<(), Ended> {
        if !matches!(ended, Ended::Tunnel(_)) || !self.stream.recv.is_complete() {
            return Err(ended);
        }
        self.unheard = true;
        Ok(())
    }

    /// Drops what the application says until it leaves. One that has been told everything is given [`LINGER`] for it.
    fn hear_out(&mut self, cx: &mut Context<'_>) -> Result<bool, Ended> {
        if let Poll::Ready(result) = tunnel::poll_discard(&self.application, cx) {
            result?;
            self.sending.done = true;
            return Ok(self.received);
        }
        if !self.received {
            return Ok(false);
        }
        let leaves = self.leaves.get_or_insert_with(|| Box::pin(tokio::time::sleep(LINGER)));
        Ok(leaves.as_mut().poll(cx).is_ready())
    }

    fn finish(&mut self, ended: &Ended) {
        match ended {
            Ended::Finished => self.finished = true,
            // RFC 9113 §8.5: an error of the TCP connection.
            Ended::FirstReset(_) => self.stream.reset(Reason::CONNECT_ERROR),
            _ => self.stream.reset(Reason::CANCEL),
        }
    }
}

impl<M: Meter + 'static> Drop for Copy<M> {
    fn drop(&mut self) {
        if !self.finished {
            // It fails only on a socket that is closed already, which needs no RST.
            let _ = self.application.socket.set_zero_linger();
        }
        // The socket closes with its last owner, which is to be here.
        self.broken = None;
        self.stream.recv.detach();
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
            let mut cancel = pin!(cancel);
            let ends = [Ended::FirstReset as fn(io::Error) -> Ended, Ended::SecondReset];
            let mut forward = pin!(socket::copy(&first, &second, |n| meter.forward(n), ends));
            let mut backward = pin!(socket::copy(&second, &first, |n| meter.backward(n), [ends[1], ends[0]]));
            let mut first_broken = pin!(socket::broken(&first));
            let mut second_broken = pin!(socket::broken(&second));
            let mut done = [false; 2];
            poll_fn(|cx| {
                if cancel.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(Ended::Cancelled);
                }
                if let Poll::Ready(ended) = poll_both([forward.as_mut(), backward.as_mut()], &mut done, cx) {
                    return Poll::Ready(ended);
                }
                if let Poll::Ready(ended) = first_broken.as_mut().poll(cx).map(Ended::FirstReset) {
                    return Poll::Ready(ended);
                }
                second_broken.as_mut().poll(cx).map(Ended::SecondReset)
            })
            .await
        };
        if matches!(ended, Ended::Finished) {
            first.finish();
            second.finish();
        }
        ended
    }
}

type Direction<'a> = Pin<&'a mut dyn Future<Output = Result<(), Ended>>>;

/// Polls both directions. Ready when both are done, or one fails.
fn poll_both(directions: [Direction<'_>; 2], done: &mut [bool; 2], cx: &mut Context<'_>) -> Poll<Ended> {
    for (direction, done) in directions.into_iter().zip(done.iter_mut()) {
        if *done {
            continue;
        }
        match direction.poll(cx) {
            Poll::Ready(Ok(())) => *done = true,
            Poll::Ready(Err(ended)) => return Poll::Ready(ended),
            Poll::Pending => {}
        }
    }
    if done.iter().all(|d| *d) { Poll::Ready(Ended::Finished) } else { Poll::Pending }
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
