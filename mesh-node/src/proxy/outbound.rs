//! Connections of the pod's application: original destination, route, tunnel or plain socket, bytes.
//!
//! Until a peer has answered, nothing of the application's bytes is delivered, so that another endpoint can be tried when
//! one does not take the connection, or does not answer; the exception is [`Early`]. A connection that cannot be made is
//! reset, never closed as if it had ended.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use mesh_core::error::{Code, Side};
use mesh_core::flows::ConnectionId;
use mesh_core::hbone::{
    Authority, BaggageHeader, ConnectRequest, Error as TunnelError, Forwarded, HboneStream, TraceParent,
};
use mesh_core::identity::SpiffeId;
use mesh_core::route::{self, Dial, Protocol, Route, RouteKind, Tunnel};
use mesh_core::state::{MeshState, Str, Workload};
use mesh_core::telemetry::{self, Connection, Direction, OnDemandDnsLabels, Peer, Reporter, SecurityPolicy};
use tokio::net::TcpStream;

use super::dial::{self, Purpose, TunnelHandle};
use super::early::Early;
use super::failed::Failed;
use super::limits::Permit;
use super::pool::{Key, Lease};
use super::session::{Session, report_early};
use super::suspects::Fault;
use super::worker::PodProxy;
use super::{OWN_PORTS, canonical};
use crate::config::SameNode;
use crate::fastpath::Candidate;

/// Endpoints that are tried for one connection.
const ATTEMPTS: usize = 8;
/// An endpoint that has not taken the connection by then may still do so, but another is tried beside it.
const ANOTHER_AFTER: Duration = Duration::from_secs(1);
/// Tunnels to one endpoint that are tried for one connection.
const TUNNELS: usize = 3;
/// A tunnel on which a CONNECT is unanswered for this long is asked whether it lives: the peer answers a ping whatever
/// its application does.
const OPEN_PATIENCE: Duration = Duration::from_millis(500);
/// How long that answer may take. A tunnel that is only slow is not harmed: it takes new streams again once it answers.
const PONG_PATIENCE: Duration = Duration::from_secs(1);

/// What carries the application's bytes.
enum Upstream {
    Plain(TcpStream),
    Tunnel(Box<Opened>),
}

struct Opened {
    stream: HboneStream,
    /// Counts the stream in the pool while it is open.
    _lease: Lease<TunnelHandle>,
    peer: SpiffeId,
    baggage: Option<BaggageHeader>,
    /// How many of the application's first bytes it has.
    sent: usize,
}

/// A connection that was made: what is needed while its bytes flow, and nothing more. In particular not its route and
/// the mesh of the moment it began in.
pub(super) struct Made {
    session: Session,
    client: TcpStream,
    upstream: Upstream,
    /// First bytes that went to the peer already.
    early: usize,
    _permit: Permit,
}

/// Takes a connection to its end.
pub(super) async fn carry(mut made: Box<Made>) {
    made.session.count_sent(made.early);
    match made.upstream {
        // Boxed: what two sockets need is three times what a stream needs.
        Upstream::Plain(server) => Box::pin(made.session.relay_sockets(made.client, server, None)).await,
        Upstream::Tunnel(opened) => made.session.relay_tunnel(made.client, opened.stream, None).await,
    }
}

/// Makes the connection that the application asked for with one that was accepted; one that cannot be made is reset and
/// reported.
pub(super) async fn make(proxy: Rc<PodProxy>, client: TcpStream, peer: SocketAddr) -> Option<Box<Made>> {
    let started = Instant::now();
    let (proxy, peer) = (&proxy, canonical(peer));
    let refuse = |destination: Option<SocketAddr>, failed: &Failed| {
        dial::reset_on_close(&client);
        report_early(proxy, Direction::Outbound, peer, destination, failed);
    };
    let destination =
        client.local_addr().ok().and_then(|l| proxy.pod.net.original_destination(canonical(l), peer));
    let Some((destination, id)) = destination.map(|(to, id)| (canonical(to), id)) else {
        let text = "no record of the original destination of the connection";
        refuse(None, &Failed::new(Code::NoOriginalDestination, text));
        return None;
    };
    let refused = |failed: &Failed| refuse(Some(destination), failed);
    let permit = proxy.admit().map_err(|failed| refused(&failed)).ok()?;
    let patience = proxy.shared().config.proxy.workload_wait;
    let (state, source) =
        proxy.pod.workload(proxy.shared(), patience).await.map_err(|failed| refused(&failed)).ok()?;
    let early = Early::new(&client, proxy.shared().config.proxy.early_data);
    let asked = Asked { proxy, source: &source, early, id, peer, destination };
    match asked.establish(&state).await {
        Ok((route, mut upstream)) => {
            asked.offer_fast_path(&route);
            let session = asked.session(&route, Some(&upstream), started);
            match asked.finish_early(&mut upstream).await {
                Ok(early) => Some(Box::new(Made { session, client, upstream, early, _permit: permit })),
                Err(failed) => {
                    dial::reset_on_close(&client);
                    session.fail(&failed);
                    None
                }
            }
        }
        Err((Some(route), failed)) => {
            dial::reset_on_close(&client);
            asked.session(&route, None, started).fail(&failed);
            None
        }
        Err((None, failed)) => {
            refused(&failed);
            None
        }
    }
}

/// A connection that the application asked for.
struct Asked<'a> {
    proxy: &'a Rc<PodProxy>,
    source: &'a Arc<Workload>,
    early: Early<'a>,
    id: ConnectionId,
    peer: SocketAddr,
    destination: SocketAddr,
}

type NotEstablished = (Option<Route>, Failed);

impl Asked<'_> {
    /// Tries endpoints until one takes the connection: those first that did not fail lately.
    async fn establish(&self, state: &MeshState) -> Result<(Route, Upstream), NotEstablished> {
        let mut avoided = self.proxy.worker.suspects.avoided(self.destination, Instant::now());
        let first = self.route(state, &[], &mut avoided).map_err(|failed| (None, failed))?;
        if first.has_alternatives() {
            return self.race(state, first, avoided).await;
        }
        let (route, outcome) = self.attempt(first).await;
        outcome.map(|upstream| (route.clone(), upstream)).map_err(|failed| (Some(route), failed))
    }

    /// Sends what was read from the application before the connection was made.
    async fn finish_early(&self, upstream: &mut Upstream) -> Result<usize, Failed> {
        match upstream {
            Upstream::Tunnel(opened) => Ok(self.early.finish(&mut opened.stream, opened.sent).await?),
            Upstream::Plain(server) => self.early.finish_plain(server).await.map_err(|error| {
                Failed::new(Code::DialFailed, format!("connection failed: {}: {error}", self.destination))
            }),
        }
    }

    /// The next endpoint is tried when one has failed, and beside one that does not answer; the first that takes the
    /// connection has it.
    async fn race(
        &self,
        state: &MeshState,
        first: Route,
        mut avoided: Vec<Str>,
    ) -> Result<(Route, Upstream), NotEstablished> {
        let suspects = &self.proxy.worker.suspects;
        let mut tried: Vec<Str> = Vec::new();
        let mut waiting = first.chosen().cloned();
        let mut attempts = FuturesUnordered::from_iter([self.attempt(first)]);
        let mut impatient = std::pin::pin!(tokio::time::sleep(ANOTHER_AFTER));
        let mut left = ATTEMPTS - 1;
        loop {
            let failure = tokio::select! {
                biased;
                Some((route, outcome)) = attempts.next() => match outcome {
                    Ok(upstream) => {
                        if let Some(uid) = route.chosen() {
                            suspects.took(self.destination, uid);
                        }
                        return Ok((route, upstream));
                    }
                    Err(failed) => {
                        if let Some(uid) = route.chosen() {
                            if failed.code.side() == Side::Server {
                                suspects.failed(self.destination, uid, fault(failed.code), Instant::now());
                            }
                            tried.push(uid.clone());
                        }
                        if !moves_on(failed.code) || self.early.is_out() {
                            return Err((Some(route), failed));
                        }
                        Some((Some(route), failed))
                    }
                },
                () = &mut impatient, if left > 0 && !self.early.is_out() => {
                    if self.early.is_out() {
                        continue;
                    }
                    self.early.stop();
                    if let Some(uid) = waiting.take() {
                        suspects.failed(self.destination, &uid, Fault::Silent, Instant::now());
                        tried.push(uid);
                    }
                    None
                }
            };
            match self.route(state, &tried, &mut avoided) {
                Ok(route) if left > 0 => {
                    left -= 1;
                    waiting = route.chosen().cloned();
                    attempts.push(self.attempt(route));
                    impatient.as_mut().reset(tokio::time::Instant::now() + ANOTHER_AFTER);
                }
                // That no other is left says less than what those that were tried said.
                _ => {
                    left = 0;
                    if let Some(failure) = failure
                        && attempts.is_empty()
                    {
                        return Err(failure);
                    }
                }
            }
        }
    }

    /// The way to an endpoint that was not `tried`; to one that is `avoided` only when there is no other, and then none
    /// is avoided any more.
    fn route(&self, state: &MeshState, tried: &[Str], avoided: &mut Vec<Str>) -> Result<Route, Failed> {
        let among = |excluded: &[Str]| {
            let request = route::Outbound {
                source: self.source,
                client: self.peer.ip(),
                destination: self.destination,
                excluded,
                illegal_ports: &OWN_PORTS,
            };
            route::outbound(state, &request, &mut fastrand::Rng::new())
        };
        let found = if avoided.is_empty() {
            among(tried)
        } else {
            among(&[tried, avoided].concat()).or_else(|_| {
                avoided.clear();
                among(tried)
            })
        };
        found.map_err(|error| Failed::new(error.code(), error.to_string()))
    }

    /// One endpoint, with the route as it was dialled.
    async fn attempt(&self, route: Route) -> (Route, Result<Upstream, Failed>) {
        let named = route.clone();
        match self.resolve(route).await {
            Ok(route) => {
                let connected = self.connect(&route).await;
                (route, connected)
            }
            Err(failed) => (named, Err(failed)),
        }
    }

    /// The route with an address to dial; names of workloads outside the cluster are resolved on the node.
    async fn resolve(&self, route: Route) -> Result<Route, Failed> {
        let Dial::Hostname { hostname, port, .. } = &route.dial else { return Ok(route) };
        let labels = OnDemandDnsLabels::new(self.source, hostname);
        self.proxy.shared().metrics.on_demand_dns.get_or_create(&labels).inc();
        let found = tokio::net::lookup_host((&**hostname, *port)).await.map_err(|e| {
            let text = format!("no ip addresses were resolved for workload: {hostname}: {e}");
            Failed::new(Code::NoEndpoint, text)
        })?;
        let addresses: Vec<_> = found.map(|a| a.ip().to_canonical()).collect();
        route
            .resolved(&addresses, &mut fastrand::Rng::new())
            .map_err(|e| Failed::new(e.code(), e.to_string()))
    }

    async fn connect(&self, route: &Route) -> Result<Upstream, Failed> {
        let Dial::Address(address) = route.dial else {
            return Err(Failed::new(Code::NoEndpoint, "a name was not resolved"));
        };
        match &route.protocol {
            Protocol::Tcp => {
                let socket = self.proxy.pod.net.outbound_socket(address);
                let timeout = self.proxy.shared().config.proxy.connect_timeout;
                dial::connect(socket, address, Purpose::Plain, timeout).await.map(Upstream::Plain)
            }
            Protocol::Hbone(tunnel) => {
                let request = self.request(route, tunnel);
                let open = async |tunnel: &TunnelHandle| self.early.open(tunnel, &request).await;
                let (lease, (opened, sent)) = self.open(address, tunnel, open).await?;
                let peer = lease.tunnel().peer.clone();
                let (stream, baggage) = (opened.stream, opened.baggage);
                Ok(Upstream::Tunnel(Box::new(Opened { stream, _lease: lease, peer, baggage, sent })))
            }
            Protocol::DoubleHbone { outer, inner } => {
                // Rare and large: no other connection's task has to have room for it.
                Box::pin(self.through_gateway(address, route, outer, inner)).await
            }
        }
    }

    fn key(&self, destination: SocketAddr, tunnel: &Tunnel) -> Key {
        Key {
            source: self.source.identity.clone(),
            expected: tunnel.expected.clone(),
            destination,
            source_ip: Some(self.peer.ip()),
        }
    }

    fn request(&self, route: &Route, tunnel: &Tunnel) -> ConnectRequest {
        ConnectRequest {
            baggage: self.proxy.baggage(self.source),
            forwarded: Some(Forwarded {
                client: Some(self.peer),
                host: route.service.as_ref().map(|s| s.host.hostname().into()),
            }),
            traceparent: Some(TraceParent::of(self.id)),
            ..ConnectRequest::to(tunnel.authority.clone())
        }
    }

    /// A stream on a pooled tunnel. A tunnel that began to drain between checkout and use is replaced, and so is one that
    /// turns out to be broken or does not answer, unless it may have delivered something.
    async fn open<T>(
        &self,
        address: SocketAddr,
        tunnel: &Tunnel,
        open: impl AsyncFn(&TunnelHandle) -> Result<T, TunnelError>,
    ) -> Result<(Lease<TunnelHandle>, T), Failed> {
        let key = self.key(address, tunnel);
        let mut tries = TUNNELS;
        loop {
            let dial = || dial::tunnel(Rc::clone(self.proxy), key.clone());
            let lease = self.proxy.pool.checkout(&key, dial).await?;
            tries -= 1;
            let opening = open(lease.tunnel());
            let answer = if tries > 0 {
                answered(lease.tunnel(), opening, &self.early).await
            } else {
                Some(opening.await)
            };
            match answer {
                Some(Ok(opened)) => return Ok((lease, opened)),
                Some(Err(error))
                    if (error.unprocessed() || error.broke()) && tries > 0 && !self.early.is_out() => {}
                Some(Err(error)) => return Err(error.into()),
                None => {}
            }
        }
    }

    async fn through_gateway(
        &self,
        gateway: SocketAddr,
        route: &Route,
        outer: &Tunnel,
        inner: &Tunnel,
    ) -> Result<Upstream, Failed> {
        let request = self.request(route, outer);
        let open = async |tunnel: &TunnelHandle| tunnel.connection.open(&request).await;
        let (lease, outer_stream) = self.open(gateway, outer, open).await?;
        // Never pooled: all streams of a client would stick to the endpoint behind it.
        let key = self.key(gateway, inner);
        let tunnel = dial::secure(self.proxy, outer_stream.stream.into_io(), &key).await?;
        let network = Some(self.proxy.shared().config.node.network.as_str().into());
        let request = ConnectRequest { network, ..self.request(route, inner) };
        let opened = tunnel.connection.open(&request).await?;
        let peer = tunnel.peer;
        let (stream, baggage) = (opened.stream, opened.baggage);
        Ok(Upstream::Tunnel(Box::new(Opened { stream, _lease: lease, peer, baggage, sent: 0 })))
    }

    fn session(&self, route: &Route, upstream: Option<&Upstream>, started: Instant) -> Session {
        let hbone = match &route.protocol {
            Protocol::Tcp => None,
            Protocol::Hbone(tunnel) | Protocol::DoubleHbone { inner: tunnel, .. } => Some(&tunnel.authority),
        };
        let dialled = match &route.dial {
            Dial::Address(address) => *address,
            Dial::Hostname { .. } => self.destination,
        };
        // Beyond a gateway, the far side is who it proves and says to be.
        let beyond = match upstream {
            Some(Upstream::Tunnel(opened)) if route.kind == RouteKind::Gateway => Some(opened),
            _ => None,
        };
        let said = beyond.and_then(|o| o.baggage.as_ref()).map(|b| Peer::Derived(Arc::new(b.parse())));
        let connection = Connection {
            reporter: Reporter::Source,
            source: Peer::Workload(Arc::clone(self.source)),
            source_identity: hbone.map(|_| self.source.identity.clone()),
            destination: said.unwrap_or_else(|| Peer::known(route.upstream.as_ref())),
            destination_identity: beyond.map(|o| o.peer.clone()),
            service: route.service.clone(),
            security: hbone.map_or(SecurityPolicy::Unknown, |_| SecurityPolicy::MutualTls),
        };
        let opened = telemetry::Opened {
            id: self.id,
            connection,
            started,
            source: self.peer,
            destination: dialled,
            hbone_target: hbone.cloned(),
            fast_path: false,
        };
        Session::open(self.proxy, opened, self.destination)
    }

    /// Says that two pods of this node talked through the tunnel and were allowed to.
    fn offer_fast_path(&self, route: &Route) {
        let shared = self.proxy.shared();
        let Some(upstream) = &route.upstream else { return };
        let pod_addressed = route.kind == RouteKind::Direct && route.service.is_none();
        let Protocol::Hbone(Tunnel { authority: Authority::Socket(target), .. }) = &route.protocol else {
            return;
        };
        if pod_addressed
            && shared.config.proxy.same_node == SameNode::Fast
            && *upstream.node == *shared.config.node.name
            && *target == self.destination
        {
            // When the controller is behind, the next connection offers the pair again.
            let _ = shared.candidates.try_send(Candidate {
                pod: self.proxy.pod.uid.clone(),
                source: self.peer.ip(),
                destination: self.destination,
            });
        }
    }
}

/// The answer to a CONNECT, or `None` when the peer answers nothing any more, not even a ping, and has nothing of the
/// application's bytes.
async fn answered<T>(
    tunnel: &TunnelHandle,
    opening: impl Future<Output = Result<T, TunnelError>>,
    early: &Early<'_>,
) -> Option<Result<T, TunnelError>> {
    let mut opening = std::pin::pin!(opening);
    loop {
        if let Ok(answer) = tokio::time::timeout(OPEN_PATIENCE, &mut opening).await {
            return Some(answer);
        }
        tunnel.doubt();
        if let Ok(answer) = tokio::time::timeout(PONG_PATIENCE, &mut opening).await {
            return Some(answer);
        }
        if tunnel.is_doubted() && !early.is_out() {
            return None;
        }
    }
}

/// Whether another endpoint may take a connection that one did not take so: whatever broke before the endpoint said yes
/// has delivered nothing. A refusal by policy is an answer, though.
const fn moves_on(code: Code) -> bool {
    use Code::{PeerBadRequest, PeerStatus, TunnelLost, TunnelReset, TunnelSilent};
    code.retry() || matches!(code, PeerBadRequest | PeerStatus | TunnelLost | TunnelReset | TunnelSilent)
}

const fn fault(code: Code) -> Fault {
    match code {
        Code::DialTimeout | Code::TunnelTimeout | Code::TlsTimeout | Code::TunnelSilent => Fault::Silent,
        _ => Fault::Refused,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_moves_on_from_whatever_broke_and_not_from_a_denial() {
        for code in [
            Code::DialFailed,
            Code::TunnelLost,
            Code::TunnelReset,
            Code::PeerUnavailable,
            Code::PeerBadRequest,
        ] {
            assert!(moves_on(code), "{code}");
        }
        for code in [Code::PeerDenied, Code::PolicyDenied, Code::OwnPort] {
            assert!(!moves_on(code), "{code}");
        }
    }
}
