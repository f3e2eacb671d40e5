//! Connections of the pod's application: original destination, route, tunnel or plain socket, bytes.
//!
//! Until the peer has answered, nothing of the application's bytes is sent, so that another endpoint can be tried when
//! one does not take the connection. A connection that cannot be made is reset, never closed as if it had ended.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use mesh_core::error::Code;
use mesh_core::hbone::{Authority, BaggageHeader, ConnectRequest, Forwarded, HboneStream, TraceParent};
use mesh_core::identity::SpiffeId;
use mesh_core::route::{self, Dial, Protocol, Route, RouteKind, Tunnel};
use mesh_core::state::{MeshState, Str, Workload};
use mesh_core::telemetry::{self, Connection, Direction, OnDemandDnsLabels, Peer, Reporter, SecurityPolicy};
use tokio::net::TcpStream;

use super::dial::{self, Purpose, TunnelHandle};
use super::failed::Failed;
use super::limits::Permit;
use super::pool::{Key, Lease};
use super::session::{Session, report_early};
use super::worker::PodProxy;
use super::{OWN_PORTS, canonical};
use crate::config::SameNode;
use crate::fastpath::Candidate;

/// Endpoints that are tried for one connection.
const ATTEMPTS: usize = 3;

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
}

/// A connection that was made: what is needed while its bytes flow, and nothing more. In particular not its route and
/// the mesh of the moment it began in.
struct Made {
    session: Session,
    upstream: Upstream,
    _permit: Permit,
}

/// Takes an accepted connection of the application to its end.
pub(super) async fn handle(proxy: &Rc<PodProxy>, client: TcpStream, peer: SocketAddr) {
    // Boxed, so that its room is free again while bytes flow.
    let Some(mut made) = Box::pin(make(proxy, &client, canonical(peer))).await else { return };
    match made.upstream {
        Upstream::Plain(server) => made.session.relay_sockets(client, server, None).await,
        Upstream::Tunnel(opened) => made.session.relay_tunnel(client, opened.stream, None).await,
    }
}

/// Makes the connection that the application asked for; one that cannot be made is reset and reported.
async fn make(proxy: &Rc<PodProxy>, client: &TcpStream, peer: SocketAddr) -> Option<Box<Made>> {
    let started = Instant::now();
    let refuse = |destination: Option<SocketAddr>, failed: &Failed| {
        dial::reset_on_close(client);
        report_early(proxy, Direction::Outbound, peer, destination, failed);
    };
    let destination =
        client.local_addr().ok().and_then(|l| proxy.pod.net.original_destination(canonical(l), peer));
    let Some(destination) = destination.map(canonical) else {
        let text = "no record of the original destination of the connection";
        refuse(None, &Failed::new(Code::NoOriginalDestination, text));
        return None;
    };
    let refused = |failed: &Failed| refuse(Some(destination), failed);
    let permit = proxy.admit().map_err(|failed| refused(&failed)).ok()?;
    let patience = proxy.shared().config.proxy.workload_wait;
    let (state, source) =
        proxy.pod.workload(proxy.shared(), patience).await.map_err(|failed| refused(&failed)).ok()?;
    let asked = Asked { proxy, source: &source, peer, destination };
    match asked.establish(&state).await {
        Ok((route, upstream)) => {
            asked.offer_fast_path(&route);
            let session = asked.session(&route, Some(&upstream), started);
            Some(Box::new(Made { session, upstream, _permit: permit }))
        }
        Err((Some(route), failed)) => {
            dial::reset_on_close(client);
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
    peer: SocketAddr,
    destination: SocketAddr,
}

type NotEstablished = (Option<Route>, Failed);

impl Asked<'_> {
    /// Tries endpoints until one takes the connection.
    async fn establish(&self, state: &MeshState) -> Result<(Route, Upstream), NotEstablished> {
        let mut excluded: Vec<Str> = Vec::new();
        let mut last: Option<NotEstablished> = None;
        for _ in 0..ATTEMPTS {
            let request = route::Outbound {
                source: self.source,
                client: self.peer.ip(),
                destination: self.destination,
                excluded: &excluded,
                illegal_ports: &OWN_PORTS,
            };
            let route = match route::outbound(state, &request, &mut fastrand::Rng::new()) {
                Ok(route) => route,
                // That the others did not take it says more than that no other is left.
                Err(error) => {
                    let none_left = || (None, Failed::new(error.code(), error.to_string()));
                    return Err(last.unwrap_or_else(none_left));
                }
            };
            let named = route.clone();
            let (route, connected) = match self.resolve(route).await {
                Ok(route) => {
                    let connected = self.connect(&route).await;
                    (route, connected)
                }
                Err(failed) => (named, Err(failed)),
            };
            match connected {
                Ok(upstream) => return Ok((route, upstream)),
                Err(failed) => {
                    let retry = failed.code.retry() && route.has_alternatives();
                    excluded.extend(route.chosen().cloned());
                    last = Some((Some(route), failed));
                    if !retry {
                        break;
                    }
                }
            }
        }
        Err(last.unwrap_or_else(|| (None, Failed::new(Code::NoEndpoint, "no endpoint was tried"))))
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
                let (lease, opened) = self.open(address, tunnel, &self.request(route, tunnel)).await?;
                let peer = lease.tunnel().peer.clone();
                let baggage = opened.baggage;
                Ok(Upstream::Tunnel(Box::new(Opened { stream: opened.stream, _lease: lease, peer, baggage })))
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
            traceparent: Some(TraceParent::random()),
            ..ConnectRequest::to(tunnel.authority.clone())
        }
    }

    /// A stream on a pooled tunnel. A tunnel that began to drain between checkout and use is replaced, and so is one that
    /// turns out to be broken: until the peer has answered, it has nothing of the application's bytes.
    async fn open(
        &self,
        address: SocketAddr,
        tunnel: &Tunnel,
        request: &ConnectRequest,
    ) -> Result<(Lease<TunnelHandle>, mesh_core::hbone::Opened), Failed> {
        let key = self.key(address, tunnel);
        let mut tries = ATTEMPTS;
        loop {
            let dial = || dial::tunnel(Rc::clone(self.proxy), key.clone());
            let lease = self.proxy.pool.checkout(&key, dial).await?;
            tries -= 1;
            match lease.tunnel().connection.open(request).await {
                Ok(opened) => return Ok((lease, opened)),
                Err(error) if (error.unprocessed() || error.broke()) && tries > 0 => {}
                Err(error) => return Err(error.into()),
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
        let (lease, outer_stream) = self.open(gateway, outer, &self.request(route, outer)).await?;
        // Never pooled: all streams of a client would stick to the endpoint behind it.
        let key = self.key(gateway, inner);
        let tunnel = dial::secure(self.proxy, outer_stream.stream.into_io(), &key).await?;
        let network = Some(self.proxy.shared().config.node.network.as_str().into());
        let request = ConnectRequest { network, ..self.request(route, inner) };
        let opened = tunnel.connection.open(&request).await?;
        let peer = tunnel.peer;
        let (stream, baggage) = (opened.stream, opened.baggage);
        Ok(Upstream::Tunnel(Box::new(Opened { stream, _lease: lease, peer, baggage })))
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
