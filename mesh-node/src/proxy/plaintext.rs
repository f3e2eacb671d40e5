//! Connections from outside the pod that come without a tunnel.
//!
//! The peer has no proven identity; whether it may connect is policy (STRICT is a policy that wants a principal). What
//! is allowed goes to the application byte for byte, with the client's address.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Instant;

use mesh_core::error::Code;
use mesh_core::flows::ConnectionId;
use mesh_core::policy::Conn;
use mesh_core::telemetry::{Connection, Direction, Opened, Peer, Reporter, SecurityPolicy, infer_service};
use tokio::net::TcpStream;

use super::dial;
use super::failed::Failed;
use super::inbound::decide;
use super::limits::Permit;
use super::live::Registered;
use super::session::{Session, report_early};
use super::worker::PodProxy;
use super::{OWN_PORTS, canonical};

/// A connection to the application that was made: what is needed while its bytes flow, and nothing more.
pub(super) struct Made {
    session: Session,
    registered: Registered,
    application: TcpStream,
    client: TcpStream,
    _permit: Permit,
}

/// Takes a connection to its end.
pub(super) async fn carry(mut made: Box<Made>) {
    made.session.relay_sockets(made.application, made.client, Some(&made.registered)).await;
}

/// Makes the connection to the application for one that was accepted; one that cannot be made is reset and reported.
pub(super) async fn make(proxy: Rc<PodProxy>, client: TcpStream, peer: SocketAddr) -> Option<Box<Made>> {
    let started = Instant::now();
    let (proxy, peer) = (&proxy, canonical(peer));
    // A client that is gone already has no address any more.
    let destination = client.local_addr().map(canonical).ok()?;
    let refuse = |failed: &Failed| {
        dial::reset_on_close(&client);
        report_early(proxy, Direction::Inbound, peer, Some(destination), failed);
    };
    if OWN_PORTS.contains(&destination.port()) {
        refuse(&Failed::new(Code::OwnPort, "attempted recursive call to ourselves"));
        return None;
    }
    let permit = proxy.admit().map_err(|failed| refuse(&failed)).ok()?;
    let patience = proxy.shared().config.proxy.workload_wait;
    let (state, local) =
        proxy.pod.workload(proxy.shared(), patience).await.map_err(|failed| refuse(&failed)).ok()?;
    let source = state.workload_by_ip(&state.options().network, peer.ip());
    let conn = Conn { src: peer, identity: None, dst: destination };
    let registered = proxy.worker.live.register(&proxy.pod, conn);
    let connection = Connection {
        reporter: Reporter::Destination,
        source: Peer::known(source),
        source_identity: None,
        service: infer_service(&state, &local, destination.port(), None),
        destination: Peer::Workload(local),
        destination_identity: None,
        security: SecurityPolicy::Unknown,
    };
    let opened = Opened {
        id: ConnectionId::default(),
        connection,
        started,
        source: peer,
        destination,
        hbone_target: None,
        fast_path: false,
    };
    let session = Session::open(proxy, opened, destination);
    let connected = match decide(proxy, &registered).await {
        Ok(()) => {
            let socket = || proxy.pod.net.application_socket(peer.ip(), destination);
            let timeout = proxy.shared().config.proxy.connect_timeout;
            dial::application(socket, destination, timeout).await
        }
        Err(failed) => Err(failed),
    };
    match connected {
        Ok(application) => Some(Box::new(Made { session, registered, application, client, _permit: permit })),
        Err(failed) => {
            dial::reset_on_close(&client);
            session.fail(&failed);
            None
        }
    }
}
