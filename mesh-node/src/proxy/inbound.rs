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

/// An open tunnel.
pub(super) struct Accepted {
    proxy: Rc<PodProxy>,
    connection: ServerConnection<TcpStream>,
    peer: Rc<Remote>,
    _permit: Permit,
}

/// Opens the tunnel of an accepted connection on the tunnel port.
pub(super) async fn accept(
    proxy: Rc<PodProxy>,
    socket: TcpStream,
    from: SocketAddr,
) -> Option<Box<Accepted>> {
    let from = canonical(from);
    // A peer that is gone already has no address any more.
    let local = socket.local_addr().map(canonical).ok()?;
    let refuse = |failed: &Failed| report_early(&proxy, Direction::Inbound, from, Some(local), failed);
    let permit = match proxy.admit() {
        Ok(permit) => permit,
        Err(failed) => {
            dial::reset_on_close(&socket);
            refuse(&failed);
            return None;
        }
    };
    let accepted = accept_tls(&proxy, socket).await;
    let (tls, peer, certificate) = accepted.map_err(|failed| refuse(&failed)).ok()?;
    let connection = match ServerConnection::handshake(tls, &Settings::server()).await {
        Ok(connection) => connection,
        Err(error) => {
            let text = format!("http2 handshake failed: {error}");
            refuse(&Failed::new(error.code(), text));
            return None;
        }
    };
    let peer = Remote { socket: from, identity: peer.identity, chain: peer.chain, certificate, local };
    Some(Box::new(Accepted { proxy, connection, peer: Rc::new(peer), _permit: permit }))
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

/// Resolves when a tunnel is to take no new streams: the agent drains, the pod has left the mesh or stops being an
/// endpoint, or the certificates have expired.
async fn farewell(proxy: &PodProxy, peer: &Remote) {
    tokio::select! {
        () = proxy.shared().drain.cancelled() => {}
        () = proxy.pod.left.cancelled() => {}
        () = proxy.pod.leaving.notified() => {}
        () = Expiry::of(&peer.certificate, &peer.chain).passed() => {}
    }
}

/// Serves the CONNECTs of one tunnel until it ends. While draining, it takes no new ones and lets the others end.
pub(super) async fn streams(mut tunnel: Box<Accepted>) {
    let Accepted { proxy, connection, peer, _permit } = &mut *tunnel;
    let mut farewell = std::pin::pin!(farewell(proxy, peer).fuse());
    let mut draining = false;
    loop {
        let incoming = tokio::select! {
            incoming = connection.accept() => incoming,
            () = &mut farewell, if !draining => {
                draining = true;
                connection.drain();
                continue;
            }
            () = proxy.worker.recheck.notified() => {
                if let Err(error) = peer.certificate.recheck_peer(&peer.chain) {
                    count_revoked(proxy);
                    let failed = Failed::new(error.code(), "connection closed: peer certificate revoked by CRL");
                    report_early(proxy, Direction::Inbound, peer.socket, Some(peer.local), &failed);
                    return;
                }
                continue;
            }
        };
        match incoming {
            Some(Ok(Incoming::Connect(connect))) => {
                until(proxy, make(Rc::clone(proxy), connect, Rc::clone(peer)), carry);
            }
            Some(Ok(Incoming::Malformed(error))) => {
                let failed = Failed::new(error.code(), error.to_string());
                report_early(proxy, Direction::Inbound, peer.socket, Some(peer.local), &failed);
            }
            Some(Err(error)) => {
                // Only the connection as a whole fails here; asked again, it would fail again at once.
                tracing::debug!(peer = %peer.socket, %error, code = error.code().code(), "a tunnel ended");
                return;
            }
            None => return,
        }
    }
}

fn count_revoked(proxy: &PodProxy) {
    proxy.shared().metrics.crl_rejections.get_or_create(&ReporterLabels(Reporter::Destination)).inc();
}

/// What a CONNECT leads to.
struct Admitted {
    target: InboundTarget,
    local: Arc<Workload>,
    state: Arc<MeshState>,
    permit: Permit,
}

/// A connection to the application that was made: what is needed while its bytes flow, and nothing more.
pub(super) struct Made {
    session: Session,
    registered: Registered,
    application: TcpStream,
    stream: HboneStream,
    _permit: Permit,
}

/// Takes the connection of a CONNECT to its end.
pub(super) async fn carry(mut made: Box<Made>) {
    made.session.relay_tunnel(made.application, made.stream, Some(&made.registered)).await;
}

/// Makes the connection that a CONNECT asks for, and answers it.
pub(super) async fn make(
    proxy: Rc<PodProxy>,
    connect: IncomingConnect,
    peer: Rc<Remote>,
) -> Option<Box<Made>> {
    let started = Instant::now();
    let (proxy, peer) = (&proxy, &*peer);
    let admitted = match validate(proxy, &connect, peer).await {
        Ok(admitted) => admitted,
        Err((status, failed)) => {
            let asked = match &connect.request.authority {
                Authority::Socket(address) => *address,
                Authority::Host { .. } => peer.local,
            };
            report_early(proxy, Direction::Inbound, peer.socket, Some(asked), &failed);
            connect.refuse(status);
            return None;
        }
    };
    let target = admitted.target.address;
    let conn = Conn { src: peer.socket, identity: Some(peer.identity.clone()), dst: target };
    let registered = proxy.worker.live.register(&proxy.pod, conn);
    let session = Session::open(proxy, opened(proxy, &connect, peer, &admitted, started), target);
    if let Err(failed) = decide(proxy, &registered).await {
        session.fail(&failed);
        connect.refuse(StatusCode::UNAUTHORIZED);
        return None;
    }
    let application = match application(proxy, &connect.request.authority, peer, &admitted).await {
        Ok(application) => application,
        Err(failed) => {
            session.fail(&failed);
            connect.refuse(StatusCode::SERVICE_UNAVAILABLE);
            return None;
        }
    };
    if let Some(parent) = &connect.request.traceparent {
        proxy.name(&application, target, parent.connection());
    }
    let wants = proxy.shared().config.proxy.response_baggage;
    let baggage = if wants { proxy.baggage(&admitted.local) } else { None };
    match connect.accept(baggage.as_ref()) {
        Ok(stream) => {
            let _permit = admitted.permit;
            Some(Box::new(Made { session, registered, application, stream, _permit }))
        }
        Err(error) => {
            dial::reset_on_close(&application);
            session.fail(&error.into());
            None
        }
    }
}

/// Everything that is checked before a connection is registered.
async fn validate(
    proxy: &PodProxy,
    connect: &IncomingConnect,
    peer: &Remote,
) -> Result<Admitted, (StatusCode, Failed)> {
    let shared = proxy.shared();
    let unavailable = |failed: Failed| (StatusCode::SERVICE_UNAVAILABLE, failed);
    let permit = proxy.admit().map_err(unavailable)?;
    let patience = shared.config.proxy.workload_wait;
    let (state, local) = proxy.pod.workload(shared, patience).await.map_err(unavailable)?;
    let target = route::inbound(&state, &local, peer.local.ip(), &connect.request.authority, &OWN_PORTS)
        .map_err(|error| {
            let status = StatusCode::from_u16(error.status()).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
            (status, Failed::new(error.code(), error.to_string()))
        })?;
    Ok(Admitted { target, local, state, permit })
}

/// Whether policy allows the connection. A policy that is announced and has not arrived yet is waited for.
///
/// # Errors
/// The denial, naming the policy.
pub(super) async fn decide(proxy: &PodProxy, registered: &Registered) -> Result<(), Failed> {
    let shared = proxy.shared();
    let deadline = Instant::now() + shared.config.proxy.workload_wait;
    let mut published = shared.published.subscribe();
    loop {
        let state = shared.state.load_full();
        let Some(local) = state.local_workload(&proxy.pod.local) else {
            return Err(Failed::new(
                Code::PolicyDenied,
                "connection closed due to policy rejection: workload not found",
            ));
        };
        let policies = state.policies_for(local);
        let decision = evaluate(&policies, registered.conn());
        for would in &decision.dry_run {
            let Conn { src, dst, .. } = registered.conn();
            proxy.worker.dry_run.borrow_mut().count(would);
            tracing::info!(pod = %proxy.pod.label, %src, %dst, "{would}");
        }
        match decision.verdict {
            Verdict::Allow(_) => return Ok(()),
            Verdict::Deny(reason) if reason.is_pending() => {
                let left = deadline.saturating_duration_since(Instant::now());
                if !arrived(&mut published, left).await {
                    return Err(Failed::denied(&reason, &policies));
                }
            }
            Verdict::Deny(reason) => return Err(Failed::denied(&reason, &policies)),
        }
    }
}

async fn arrived(published: &mut tokio::sync::watch::Receiver<u64>, left: Duration) -> bool {
    matches!(tokio::time::timeout(left, published.changed()).await, Ok(Ok(())))
}

/// Connects to the application, from the peer's address, and writes the PROXY header where one is wanted.
async fn application(
    proxy: &PodProxy,
    authority: &Authority,
    peer: &Remote,
    admitted: &Admitted,
) -> Result<TcpStream, Failed> {
    let timeout = proxy.shared().config.proxy.connect_timeout;
    let target = admitted.target.address;
    if !admitted.target.proxy_protocol {
        let socket = || proxy.pod.net.application_socket(peer.socket.ip(), target);
        return dial::application(socket, target, timeout).await;
    }
    // The header says who the peer is; the listener may be on loopback only.
    let loopback: std::net::IpAddr = match target {
        SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
        SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
    };
    let to = SocketAddr::new(loopback, target.port());
    let socket = || proxy.pod.net.application_socket(loopback, to);
    let mut application = dial::application(socket, to, timeout).await?;
    let destination = proxied_destination(authority, peer, admitted);
    let header = proxy_header::encode(peer.socket, destination, Some(&peer.identity));
    application
        .write_all(&header)
        .await
        .map_err(|e| Failed::new(Code::DialFailed, format!("connection failed: {to}: {e}")))?;
    Ok(application)
}

/// The destination that the PROXY header names: the authority's address; for a name the service's, IPv4 first.
fn proxied_destination(authority: &Authority, peer: &Remote, admitted: &Admitted) -> SocketAddr {
    let port = match authority {
        Authority::Socket(address) => return *address,
        Authority::Host { port, .. } => *port,
    };
    let network = &admitted.state.options().network;
    let vips = admitted.target.service.iter().flat_map(|s| &s.vips);
    let vip = vips.filter(|v| v.network == *network).map(|v| v.ip).min_by_key(std::net::IpAddr::is_ipv6);
    SocketAddr::new(vip.unwrap_or(peer.local.ip()), port)
}

/// What metrics and logs say of the connection. A request that a gateway brought from another network says nothing by
/// its address; the client's description counts then, as it does for an address that nobody here knows.
fn opened(
    proxy: &PodProxy,
    connect: &IncomingConnect,
    peer: &Remote,
    admitted: &Admitted,
    started: Instant,
) -> Opened {
    let Admitted { target, local, state, .. } = admitted;
    let request = &connect.request;
    let own = &proxy.shared().config.node.network;
    let from_gateway = request.network.as_ref().is_some_and(|n| !n.eq_ignore_ascii_case(own));
    let by_address = || state.workload_by_ip(&state.options().network, peer.socket.ip());
    let source = match (if from_gateway { None } else { by_address() }, &request.baggage) {
        (Some(workload), _) => Peer::Workload(Arc::clone(workload)),
        (None, Some(said)) => Peer::Derived(Arc::new(said.parse())),
        (None, None) => Peer::Unknown,
    };
    let hint = request.forwarded.as_ref().and_then(|f| f.host.as_deref());
    let service = infer_service(state, local, target.address.port(), hint);
    let connection = Connection {
        reporter: Reporter::Destination,
        source,
        source_identity: Some(peer.identity.clone()),
        destination: Peer::Workload(Arc::clone(local)),
        destination_identity: None,
        service: service.or_else(|| target.service.clone()),
        security: SecurityPolicy::MutualTls,
    };
    Opened {
        // What the client's node calls it, so that both nodes tell of one connection.
        id: request.traceparent.map(|parent| parent.connection()).unwrap_or_default(),
        connection,
        started,
        source: peer.socket,
        destination: peer.local,
        hbone_target: Some(target.address.into()),
        fast_path: false,
    }
}
