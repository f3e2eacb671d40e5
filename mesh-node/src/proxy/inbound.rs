//! Tunnels from peers: mutual TLS, HTTP/2, and for each CONNECT validation, policy, the application.
//!
//! Order and answers are those of Istio's node proxy (HBONE reference §7.1): 400 for a destination that is not this
//! pod, 401 for a denial, 503 for what cannot be reached. The 200 is sent only once the application took the
//! connection.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use http::StatusCode;
use mesh_core::error::Code;
use mesh_core::hbone::{Authority, HboneStream, Incoming, IncomingConnect, ServerConnection, Settings};
use mesh_core::identity::SpiffeId;
use mesh_core::policy::{Conn, Verdict, evaluate};
use mesh_core::route::{self, InboundTarget};
use mesh_core::state::{MeshState, Workload};
use mesh_core::telemetry::{
    Connection, Direction, Opened, Peer, Reporter, ReporterLabels, SecurityPolicy, infer_service,
};
use mesh_core::tls::{self, WorkloadCertificate};
use rustls::pki_types::CertificateDer;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

use super::dial::{self, tls_failed};
use super::expiry::Expiry;
use super::failed::Failed;
use super::limits::Permit;
use super::live::Registered;
use super::session::{Session, report_early};
use super::worker::{PodProxy, until};
use super::{OWN_PORTS, canonical, proxy_header};

/// What HTTP/2 runs over.
type Tunnel = tls::Channel<TcpStream>;

/// Who is at the other end of a tunnel.
pub(super) struct Remote {
    socket: SocketAddr,
    identity: SpiffeId,
    /// As the peer presented it, for later revocations.
    chain: Arc<[CertificateDer<'static>]>,
    /// What we served with, which knows the revocation lists.
    certificate: Arc<WorkloadCertificate>,
    /// The pod's address that the peer connected to.
    local: SocketAddr,
}

/// Takes an accepted connection on the tunnel port to its end.
pub(super) async fn handle(proxy: &Rc<PodProxy>, socket: TcpStream, from: SocketAddr) {
    let from = canonical(from);
    // A peer that is gone already has no address any more.
    let Ok(local) = socket.local_addr().map(canonical) else { return };
    let refuse = |failed: &Failed| report_early(proxy, Direction::Inbound, from, Some(local), failed);
    let _permit = match proxy.admit() {
        Ok(permit) => permit,
        Err(failed) => {
            dial::reset_on_close(&socket);
            return refuse(&failed);
        }
    };
    let (tls, peer, certificate) = match accept_tls(proxy, socket).await {
        Ok(accepted) => accepted,
        Err(failed) => return refuse(&failed),
    };
    let connection = match ServerConnection::handshake(tls, &Settings::server()).await {
        Ok(connection) => connection,
        Err(error) => {
            let text = format!("http2 handshake failed: {error}");
            return refuse(&Failed::new(error.code(), text));
        }
    };
    let remote = Remote { socket: from, identity: peer.identity, chain: peer.chain, certificate, local };
    streams(proxy, connection, &Rc::new(remote)).await;
}

async fn accept_tls(
    proxy: &PodProxy,
    socket: TcpStream,
) -> Result<(Tunnel, tls::handshake::Peer, Arc<WorkloadCertificate>), Failed> {
    let shared = proxy.shared();
    let patience = shared.config.proxy.workload_wait;
    let (_, workload) = proxy.pod.workload(shared, patience).await?;
    let certificate = shared.certificates.wait(&workload.identity, patience).await?;
    let accepted = tls::accept(certificate.server_config(), socket).await;
    let (tls, peer) = accepted.map_err(|e| {
        if e.code() == Code::PeerRevoked {
            count_revoked(proxy);
        }
        tls_failed(&e)
    })?;
    Ok((tls, peer, certificate))
}

/// Resolves when a tunnel is to take no new streams: the agent drains, the pod stops being an endpoint, or the
/// certificates have expired.
async fn farewell(proxy: &PodProxy, peer: &Remote) {
    tokio::select! {
        () = proxy.shared().drain.cancelled() => {}
        () = proxy.pod.leaving.notified() => {}
        () = Expiry::of(&peer.certificate, &peer.chain).passed() => {}
    }
}

/// Serves the CONNECTs of one tunnel until it ends. While draining, it takes no new ones and lets the others end.
