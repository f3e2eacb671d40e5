//! DNS over UDP of one pod.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::rc::Rc;
use std::time::Duration;

use tokio::io::Interest;
use tokio::net::UdpSocket;

use super::Transport;
use super::pod::{Served, Step};
use crate::sys::udp::Datagram;

/// Datagrams that are worked on before other pods get their turn.
const BATCH: usize = 32;
/// How long to rest after an error that may come again at once.
const REST: Duration = Duration::from_millis(100);

/// Serves until the pod's token says stop; what is queued then is still answered.
pub(super) async fn serve(pod: Rc<Served>, socket: UdpSocket) {
    loop {
        let stopping = tokio::select! {
            ready = socket.readable() => match ready {
                Ok(()) => false,
                Err(error) => return tracing::warn!(pod = %pod.local, "DNS over UDP ends: {error}"),
            },
            () = pod.stop.cancelled() => true,
        };
        match (batch(&pod, &socket, stopping), stopping) {
            (Batch::More, _) => tokio::task::yield_now().await,
            (Batch::Empty | Batch::Failed, true) => return,
            (Batch::Empty, false) => {}
            (Batch::Failed, false) => tokio::time::sleep(REST).await,
        }
    }
}

#[derive(PartialEq, Eq)]
enum Batch {
    /// Nothing is left.
    Empty,
    /// There may be more.
    More,
    /// The socket fails.
    Failed,
}

/// Works on some of what is queued, without waiting.
fn batch(pod: &Rc<Served>, socket: &UdpSocket, stopping: bool) -> Batch {
    for _ in 0..BATCH {
        let (step, datagram) = match receive(pod, socket, stopping) {
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Batch::Empty,
            Err(error) => {
                tracing::debug!(target: "dns", pod = %pod.local, "receiving failed: {error}");
                return Batch::Failed;
            }
        };
        let Datagram { peer, local, .. } = datagram;
        match step {
            Step::Drop => {}
            Step::Reply(reply) => send(pod, &reply, local, peer),
            Step::Forward(pending) => {
                let pod = Rc::clone(pod);
                let tasks = pod.node.tasks.clone();
                tasks.spawn_local(async move {
                    let asked = pod.network.asked(Transport::Udp, local, peer);
                    let reply = pod.forward(&pending, Transport::Udp, asked).await;
                    send(&pod, &reply, local, peer);
                });
            }
        }
    }
    Batch::More
}

/// Takes one datagram and decides about it.
fn receive(pod: &Served, socket: &UdpSocket, stopping: bool) -> io::Result<(Step, Datagram)> {
    let mut buffer = pod.node.scratch.borrow_mut();
    let mut receive = || pod.network.receive(socket.as_fd(), &mut buffer);
    // At the end the queue itself is looked at, not what the poller last said about it.
    let datagram = if stopping { receive()? } else { socket.try_io(Interest::READABLE, receive)? };
    let bytes = buffer.get(..datagram.length).unwrap_or_default();
    Ok((pod.step(bytes, Transport::Udp), datagram))
}

/// UDP may lose answers: a full queue loses this one.
fn send(pod: &Served, reply: &[u8], from: SocketAddr, to: SocketAddr) {
    if let Err(error) = pod.network.reply(reply, from, to) {
        tracing::debug!(target: "dns", pod = %pod.local, %from, %to, "an answer is lost: {error}");
    }
}
