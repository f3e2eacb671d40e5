//! DNS over TCP of one pod.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use hickory_proto::rr::RecordType;
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::Transport;
use super::metrics::SHED;
use super::pod::{DEADLINE, Pending, Served, Step};
use super::upstream;

/// How long to rest after accept failed for want of descriptors.
const REST: Duration = Duration::from_millis(100);

/// Serves until the pod's token says stop; who is queued then is still served.
pub(super) async fn serve(pod: Rc<Served>, listener: TcpListener) {
    loop {
        let accepted = tokio::select! {
            biased;
            accepted = listener.accept() => accepted,
            () = pod.stop.cancelled() => return,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(pod = %pod.local, "DNS over TCP cannot accept: {error}");
                tokio::time::sleep(REST).await;
                continue;
            }
        };
        let Ok(permit) = Rc::clone(&pod).connections.clone().try_acquire_owned() else {
            pod.node.metrics.refused(SHED);
            reset(&stream);
            continue;
        };
        let pod = Rc::clone(&pod);
        let tasks = pod.node.tasks.clone();
        tasks.spawn_local(async move {
            let _permit = permit;
            if let Err(error) = connection(&pod, stream, peer).await {
                tracing::debug!(target: "dns", pod = %pod.local, "DNS over TCP: {error}");
            }
        });
    }
}

/// Closes with a reset, so that the client does not wait and the kernel keeps nothing.
fn reset(stream: &TcpStream) {
    if let Err(error) = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO)) {
        tracing::debug!(target: "dns", "closing without a reset: {error}");
    }
}

/// Answers the queries of one connection in their order, until the client ends it or says nothing for too long.
async fn connection(pod: &Served, mut stream: TcpStream, peer: SocketAddr) -> io::Result<()> {
    let local = stream.local_addr()?;
    // Known only now: the record is taken from capture by its first reader.
    let asked = pod.network.asked(Transport::Tcp, canonical(local), canonical(peer));
    stream.set_nodelay(true)?;
    loop {
        let Some(bytes) = timeout(DEADLINE, upstream::read(&mut stream)).await?? else { return Ok(()) };
        let reply = match pod.step(&bytes, Transport::Tcp) {
            Step::Drop => return Ok(()),
            Step::Reply(reply) => reply,
            Step::Forward(pending) if is_transfer(&pending) => {
                return transfer(pod, &mut stream, &pending, asked).await;
            }
            Step::Forward(pending) => pod.forward(&pending, Transport::Tcp, asked).await,
        };
        timeout(DEADLINE, upstream::write(&mut stream, &reply)).await??;
    }
}

/// v4-mapped addresses of a socket for both families are IPv4 addresses for everybody else.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn is_transfer(pending: &Pending) -> bool {
    let kind = pending.query.message.queries.first().map(|q| q.query_type());
    matches!(kind, Some(RecordType::AXFR | RecordType::IXFR))
}

/// A zone transfer has any number of answers: what the server sends is passed on until it ends or falls silent.
async fn transfer(
    pod: &Served,
    client: &mut TcpStream,
    pending: &Pending,
    asked: Option<SocketAddr>,
) -> io::Result<()> {
    let Some(server) = pod.servers(asked).next() else {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the server that was asked is not known"));
    };
    let mut upstream = timeout(DEADLINE, upstream::connect(&*pod.network, server)).await??;
    timeout(DEADLINE, upstream::write(&mut upstream, &pending.bytes)).await??;
    while let Some(message) = timeout(DEADLINE, upstream::read(&mut upstream)).await?? {
        timeout(DEADLINE, upstream::write(client, &message)).await??;
    }
    client.shutdown().await
}
