//! Connections from outside the pod that come without a tunnel.
//!
//! The peer has no proven identity; whether it may connect is policy (STRICT is a policy that wants a principal). What
//! is allowed goes to the application byte for byte, with the client's address.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Instant;

use mesh_core::error::Code;
use mesh_core::policy::Conn;
use mesh_core::telemetry::{Connection, Direction, Opened, Peer, Reporter, SecurityPolicy, infer_service};
use tokio::net::TcpStream;

use super::dial;
use super::failed::Failed;
use super::inbound::decide;
use super::limits::admit;
use super::session::{Session, report_early};
use super::worker::PodProxy;
use super::{OWN_PORTS, canonical};

/// Takes an accepted plaintext connection to its end.
pub(super) async fn handle(proxy: &Rc<PodProxy>, client: TcpStream, peer: SocketAddr) {
    let started = Instant::now();
    let peer = canonical(peer);
    // A client that is gone already has no address any more.
    let Ok(destination) = client.local_addr().map(canonical) else { return };
    let refuse = |failed: &Failed| {
        dial::reset_on_close(&client);
        report_early(proxy, Direction::Inbound, peer, Some(destination), failed);
    };
    if OWN_PORTS.contains(&destination.port()) {
        return refuse(&Failed::new(Code::OwnPort, "attempted recursive call to ourselves"));
    }
    let _permit = match admit(&proxy.shared().gauge, &proxy.pod.gauge) {
        Ok(permit) => permit,
        Err(overload) => return refuse(&Failed::new(Code::Overloaded, overload.as_str())),
    };
    let patience = proxy.shared().config.proxy.workload_wait;
    let (state, local) = match proxy.pod.workload(proxy.shared(), patience).await {
        Ok(found) => found,
        Err(failed) => return refuse(&failed),
    };
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
    let opened =
        Opened { connection, started, source: peer, destination, hbone_target: None, fast_path: false };
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
        Ok(application) => session.relay_sockets(application, client, Some(&registered)).await,
        Err(failed) => {
            dial::reset_on_close(&client);
            session.fail(&failed);
        }
    }
}
