//! Tunnels from peers: mutual TLS, HTTP/2, and for each CONNECT what it leads to.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

use ::http::StatusCode;
use bytes::Bytes;
use mesh_core::hbone::{Incoming, IncomingConnect, ServerConnection, Settings};
use mesh_core::identity::SpiffeId;
use mesh_core::state::AppProtocol;
use mesh_core::tls;
use tokio::net::TcpStream;

use super::detect::Spoken;
use super::dial;
use super::http::{self, Downstream};
use super::io::{ClientIo, ClientStream, Prefixed, TunnelStream};
use super::target::{self, Target};
use super::tcp::{self, First};
use super::worker::Local;
use crate::config::Snapshot;
use crate::request::Source;

/// A peer's TLS handshake may take this long.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Who is at the other end of a tunnel.
struct Remote {
    socket: SocketAddr,
    identity: SpiffeId,
}

/// Takes an accepted connection on the tunnel port to its end.
pub async fn handle(local: &Rc<Local>, socket: TcpStream, from: SocketAddr) {
    let from = SocketAddr::new(from.ip().to_canonical(), from.port());
    let Some(certificate) = local.shared.certificate.load_full() else { return };
    let _counted = local.shared.count_tunnel();
    let accepted = tokio::time::timeout(HANDSHAKE, tls::accept(certificate.server_config(), socket)).await;
    let (channel, peer) = match accepted {
        Ok(Ok(accepted)) => accepted,
        Ok(Err(error)) => return tracing::warn!(client = %from, %error, "a tunnel was refused"),
        Err(_) => return tracing::warn!(client = %from, "a tunnel was refused: no handshake in time"),
    };
    match ServerConnection::handshake(channel, &Settings::server()).await {
        Ok(connection) => {
            let until = dial::valid_until(&certificate, &peer.chain);
            let remote = Rc::new(Remote { socket: from, identity: peer.identity });
            streams(local, connection, &remote, until).await;
        }
        Err(error) => tracing::warn!(client = %from, %error, "a tunnel was refused"),
    }
}

/// Serves the CONNECTs of one tunnel until it ends. While draining, and when its certificates have expired, it takes no
/// new ones and lets the others end.
async fn streams(
    local: &Rc<Local>,
    mut connection: ServerConnection<TcpStream>,
    peer: &Rc<Remote>,
    until: SystemTime,
) {
    let farewell = async {
        tokio::select! {
            () = local.shared.drain.cancelled() => {}
            () = dial::passed(until) => {}
        }
    };
    let mut farewell = std::pin::pin!(farewell);
    let mut draining = false;
    loop {
        let incoming = tokio::select! {
            incoming = connection.accept() => incoming,
            () = &mut farewell, if !draining => {
                draining = true;
                connection.drain();
                continue;
            }
        };
        match incoming {
            Some(Ok(Incoming::Connect(connect))) => {
                let (local, peer) = (Rc::clone(local), Rc::clone(peer));
                drop(tokio::task::spawn_local(async move { serve(&local, connect, &peer).await }));
            }
            Some(Ok(Incoming::Malformed(error))) => {
                tracing::warn!(client = %peer.socket, %error, "a request on a tunnel was refused");
            }
            Some(Err(error)) => return tracing::debug!(client = %peer.socket, %error, "a tunnel ended"),
            None => return,
        }
    }
}

/// Takes one CONNECT to its end.
async fn serve(local: &Rc<Local>, connect: IncomingConnect, peer: &Remote) {
    let _counted = local.shared.count();
    let snapshot = local.shared.snapshot.load_full();
    let target = match target::resolve(&snapshot, &connect.request.authority, peer.identity.namespace()) {
        Ok(target) => target,
        Err(reason) => {
            tracing::warn!(client = %peer.socket, identity = %peer.identity, %reason, "a CONNECT was refused");
            return connect.refuse(StatusCode::NOT_FOUND);
        }
    };
    let source = Source::of(&snapshot, peer.socket, Some(&peer.identity));
    // The stream is worth something to the client only while it is open: who gave up needs no answer.
    let Ok(stream) = connect.accept(None) else { return };
    let limit = detection_limit(&snapshot);
    drop(snapshot);
    let stream = TunnelStream::new(stream.into_io(), local.keeper.clone());
    let io = Prefixed::new(Bytes::new(), ClientStream::Tunnel(stream));
    carry(local, source, target, io, limit).await;
}

/// Finds out what the stream speaks and serves it.
async fn carry(local: &Rc<Local>, source: Source, target: Target, io: ClientIo, limit: Option<Duration>) {
    let started = Instant::now();
    let declared = target.protocol;
    let Target { addressed, destination, protocol } = target;
    let downstream = move |source, http2| {
        Rc::new(Downstream {
            worker: Rc::clone(local),
            source,
            addressed: addressed.clone(),
            destination,
            secured: None,
            protocol,
            http2,
            reported: None,
            upgraded: RefCell::default(),
            latest: RefCell::default(),
            served: Cell::default(),
        })
    };
    match declared {
        AppProtocol::Tcp | AppProtocol::Tls => tcp::serve(&downstream(source, false), io).await,
        AppProtocol::Http11 | AppProtocol::Http2 | AppProtocol::Grpc => {
            // Which of the two the client says itself.
            let Some((spoken, io)) = tcp::version(io).await else { return };
            http::serve(downstream(source, spoken == Spoken::Http2), io).await;
        }
        AppProtocol::Unknown => {
            let undecided = downstream(source.clone(), false);
            match tcp::detect(&undecided, io, limit).await {
                First::Client(Spoken::Other, io) => tcp::serve(&undecided, io).await,
                First::Client(spoken, io) => {
                    http::serve(downstream(source, spoken == Spoken::Http2), io).await;
                }
                First::Endpoint(io, connected) => {
                    let (chosen, endpoint) = *connected;
                    tcp::copy(&undecided, io, chosen, endpoint, started).await;
                }
                First::Nobody => {}
            }
        }
    }
}

fn detection_limit(snapshot: &Snapshot) -> Option<Duration> {
    let limit = snapshot.settings.protocol_detection_timeout.as_ref()?;
    let limit = Duration::try_from(*limit).ok()?;
    // Istio: 0 is none.
    (!limit.is_zero()).then_some(limit)
}
