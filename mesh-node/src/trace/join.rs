//! From what the kernel and the agent tell to events of the mesh. Pure: fed with events, a snapshot of the mesh and the
//! pods of the node; sockets are elsewhere, and clocks but for the age of what is remembered.
//!
//! A connection is known from its first event to its last by its socket's cookie, and by its addresses for what the
//! kernel tells of packets. Both ends of a fast path connection are one connection.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use mesh_core::flows::{ConnectionId, Kind, Party, Path, Side, Verdict};
use mesh_core::hbone::Authority;
use mesh_core::recent::Recent;
use mesh_core::state::{MeshState, Str, Workload};
use mesh_core::telemetry::{
    AccessRecord, Connection, Direction, Event as RecordEvent, Peer, SecurityPolicy, infer_service,
};
use mesh_ebpf::{Endpoint, HBONE_PORT, Tuple, socket};

use super::told::{Caller, Ends, Numbers, Reason, Told};
use crate::capture::trace::{Event, flag, kind};

/// Connections that are known at the same time. Beyond, the oldest half is forgotten: what is told of them later is
/// joined by address alone.
const MOST_LIVE: usize = 65_536;
/// Pairs of ends that are kept for the next connection between them.
const MOST_ENDS: usize = 16_384;

/// How long those that the agent told of are kept at least while none of their connections ends.
const RECORDS_KEPT: Duration = Duration::from_secs(60);
/// Names that wait for their connection.
const MOST_NAMED: usize = 16_384;

/// A pod of this node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LocalPod {
    /// Kubernetes namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Whether the mesh captures it.
    pub captured: bool,
}

/// Pods by the cookie of their network namespace.
pub type Pods = HashMap<u64, Arc<LocalPod>>;

/// Policies by the number that the kernel has for them, less one; number 0 is none.
pub type Policies = Vec<Str>;

/// What the moment knows.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// The mesh.
    pub mesh: &'a MeshState,
    /// Pods of this node.
    pub pods: &'a Pods,
    /// Policies of the fast path.
    pub policies: &'a Policies,
    /// Microseconds since 1970 at which CLOCK_MONOTONIC was zero.
    pub epoch_us: u64,
}

/// A connection that is open, or opening.
#[derive(Debug, Clone)]
pub struct Live {
    /// Its id.
    pub connection: ConnectionId,
    /// Netns cookie of its socket.
    pub netns: u64,
    /// Which end the socket is.
    pub side: Side,
    /// What carries it.
    pub path: Path,
    /// Who talks to whom.
    pub ends: Arc<Ends>,
    /// Address of the client.
    pub client: SocketAddr,
    /// Address of the server, as the socket has it.
    pub server: SocketAddr,
    /// What was asked for, where it is another.
    pub asked: Option<SocketAddr>,
    /// Who called.
    pub caller: Caller,
    /// CLOCK_MONOTONIC.
    pub opened_ns: u64,
    /// Whether it is established.
    pub established: bool,
    /// Policy of the fast path.
    pub policy: Option<Str>,
}

/// A connection that the agent made to an application.
#[derive(Debug, Clone, Copy)]
pub struct Named {
    /// Address that the application sees.
    pub client: SocketAddr,
    /// Address of the application.
    pub server: SocketAddr,
    /// What the client's node calls the connection.
    pub connection: ConnectionId,
    /// Whether it came through a tunnel.
    pub tunnel: bool,
}

/// What two sockets have in common with the next ones between the same ends.
#[derive(PartialEq, Eq, Hash)]
struct EndsKey {
    netns: u64,
    client: IpAddr,
    server: SocketAddr,
    is_server: bool,
}

/// Ends of connections that the agent told of, by the addresses of what it knows of them.
struct Records(Recent<[usize; 3], Arc<(Connection, Arc<Ends>)>>);

impl Default for Records {
    fn default() -> Self {
        Self(Recent::new(MOST_ENDS / 2, RECORDS_KEPT))
    }
}

/// See the module.
#[derive(Default)]
pub struct Joiner {
    live: HashMap<u64, Live>,
    /// Cookie of the client's socket, else of the server's, by addresses.
    by_tuple: HashMap<Tuple, u64>,
    ends: HashMap<EndsKey, (Arc<Ends>, Path)>,
    /// Names that the agent gave to connections to applications, before the kernel tells of them.
    named: HashMap<(SocketAddr, SocketAddr), Named>,
    /// With what keeps the addresses in memory from coming to mean others.
    records: Records,
    /// The mesh and the pods that `ends` come from.
    version: (u64, usize, usize),
}

fn client_of(tuple: &Tuple) -> SocketAddr {
    SocketAddr::new(tuple.client.to_ip(), tuple.client_port)
}

fn server_of(tuple: &Tuple) -> SocketAddr {
    SocketAddr::new(tuple.server.to_ip(), tuple.server_port)
}

const fn reversed(tuple: &Tuple) -> Tuple {
    Tuple {
        client: tuple.server,
        server: tuple.client,
        client_port: tuple.server_port,
        server_port: tuple.client_port,
    }
}

/// What the mesh knows of a workload.
pub(super) fn party(workload: &Workload) -> Party {
    Party {
        address: None,
        namespace: workload.namespace.to_string(),
        pod: workload.name.to_string(),
        workload: workload.workload_name.to_string(),
        identity: workload.identity.to_string(),
        node: workload.node.to_string(),
    }
}

fn local_party(pod: &LocalPod, context: &Context<'_>) -> Party {
    let known = context.mesh.workloads_by_name(&pod.namespace, &pod.name).next();
    known.map_or_else(
        || Party { namespace: pod.namespace.clone(), pod: pod.name.clone(), ..Party::default() },
        |workload| party(workload),
    )
}

fn peer_party(peer: &Peer) -> Party {
    match peer {
        Peer::Unknown => Party::default(),
        Peer::Workload(workload) => party(workload),
        Peer::Derived(said) => Party {
            namespace: said.namespace.clone(),
            workload: said.workload_name.clone(),
            ..Party::default()
        },
    }
}

impl Joiner {
    /// Open connections.
    pub fn live(&self) -> impl Iterator<Item = &Live> {
        self.live.values()
    }

    /// The agent makes a connection to an application on behalf of one that has a name.
    pub fn name(&mut self, named: Named) {
        // What the kernel never told of (it was sampled out) must not stay.
        if self.named.len() >= MOST_NAMED {
            self.named.clear();
        }
        self.named.insert((named.client, named.server), named);
    }

    /// What an event of the kernel means; nothing for one that concerns nobody here.
    pub fn kernel(&mut self, event: &Event, context: &Context<'_>) -> Option<Told> {
        self.refresh(context);
        match event.kind {
            kind::CONNECT => Some(self.connect(event, context)),
            kind::ACCEPTED => Some(self.accepted(event, context)),
            kind::ESTABLISHED => self.established(event, context),
            kind::CLOSED | kind::FAILED => Some(self.ended(event, context)),
            kind::RETRANSMIT | kind::RESET_SENT | kind::RESET_RECEIVED | kind::DROP => {
                Some(self.packet(event, context))
            }
            _ => None,
        }
    }

    /// Forgets what was derived from an older mesh.
    fn refresh(&mut self, context: &Context<'_>) {
        let mesh = std::ptr::from_ref(context.mesh).addr();
        let version = (context.mesh.version(), mesh, std::ptr::from_ref(context.pods).addr());
        if std::mem::replace(&mut self.version, version) != version || self.ends.len() >= MOST_ENDS {
            self.ends.clear();
        }
    }

    fn remember(&mut self, event: &Event, live: Live) {
        if self.live.len() >= MOST_LIVE {
            let mut opened: Vec<u64> = self.live.values().map(|live| live.opened_ns).collect();
            let middle = opened.len() / 2;
            let (_, median, _) = opened.select_nth_unstable(middle);
            let median = *median;
            self.live.retain(|_, live| live.opened_ns >= median);
            let live = &self.live;
            self.by_tuple.retain(|_, cookie| live.contains_key(cookie));
        }
        if live.side == Side::Client {
            self.by_tuple.insert(event.tuple, event.cookie);
        } else {
            self.by_tuple.entry(event.tuple).or_insert(event.cookie);
        }
        self.live.insert(event.cookie, live);
    }

    /// Who talks to whom and over what, seen from a socket of a pod.
    fn ends(&mut self, event: &Event, server: SocketAddr, context: &Context<'_>) -> (Arc<Ends>, Path) {
        let is_server = event.flags & flag::SERVER != 0;
        let key = EndsKey { netns: event.netns, client: event.tuple.client.to_ip(), server, is_server };
        if let Some((ends, path)) = self.ends.get(&key) {
            return (Arc::clone(ends), *path);
        }
        let (ends, path) = describe(&key, context);
        let ends = Arc::new(ends);
        self.ends.insert(key, (Arc::clone(&ends), path));
        (ends, path)
    }

    fn connect(&mut self, event: &Event, context: &Context<'_>) -> Told {
        let live = self.opened(event, context);
        let mut told = told_of(&live, event, Kind::Connect, context);
        if event.decision == socket::REFUSED {
            (told.verdict, told.reason) = (Verdict::Dropped, Reason::Word("refused_map_full"));
        }
        self.remember(event, live);
        told
    }

    /// A client's connection at its start.
    fn opened(&mut self, event: &Event, context: &Context<'_>) -> Live {
        let server = server_of(&event.tuple);
        let asked = (event.asked != Endpoint::default()).then(|| event.asked.to_socket());
        let (ends, path) = self.ends(event, asked.unwrap_or(server), context);
        let captured = context.pods.get(&event.netns).is_some_and(|pod| pod.captured);
        let path = match event.decision {
            socket::AUTHORISED if asked == Some(server) => Path::Fast,
            socket::RECORDED => path,
            _ if captured || path != Path::Unknown => Path::Plain,
            _ => path,
        };
        let number = usize::try_from(event.policy).unwrap_or(0);
        let policy = number.checked_sub(1).filter(|_| path == Path::Fast);
        Live {
            connection: ConnectionId::of(event.opened_ns, client_of(&event.tuple)),
            netns: event.netns,
            side: Side::Client,
            path,
            ends,
            client: client_of(&event.tuple),
            server: if event.decision == socket::RECORDED { asked.unwrap_or(server) } else { server },
            asked: asked.filter(|asked| *asked != server && event.decision != socket::RECORDED),
            caller: Caller { pid: event.pid, comm: event.comm, cgroup: event.cgroup },
            opened_ns: event.opened_ns,
            established: false,
            policy: policy.and_then(|at| context.policies.get(at)).cloned(),
        }
    }

    fn accepted(&mut self, event: &Event, context: &Context<'_>) -> Told {
        let (ends, path) = self.ends(event, server_of(&event.tuple), context);
        // The same addresses at both ends: nothing is between them.
        let client = self.by_tuple.get(&event.tuple).and_then(|cookie| self.live.get(cookie));
        let client = client.filter(|live| live.side == Side::Client && live.netns != event.netns);
        let straight = client.map(|live| (live.connection, live.path, live.policy.clone()));
        let address = client_of(&event.tuple);
        let named = self.named.remove(&(address, server_of(&event.tuple)));
        let named = named
            .map(|named| (named.connection, if named.tunnel { Path::Tunnel } else { Path::Plain }, None));
        let (connection, path, policy) =
            straight.or(named).unwrap_or_else(|| (ConnectionId::of(event.opened_ns, address), path, None));
        let live = Live {
            connection,
            netns: event.netns,
            side: Side::Server,
            path,
            ends,
            client: address,
            server: server_of(&event.tuple),
            asked: None,
            caller: Caller { pid: event.pid, comm: event.comm, cgroup: event.cgroup },
            opened_ns: event.opened_ns,
            established: true,
            policy,
        };
        let told = told_of(&live, event, Kind::Accepted, context);
        self.remember(event, live);
        told
    }

    fn established(&mut self, event: &Event, context: &Context<'_>) -> Option<Told> {
        if !self.live.contains_key(&event.cookie) {
            let live = self.opened(event, context);
            self.remember(event, live);
        }
        let live = self.live.get_mut(&event.cookie)?;
        live.established = true;
        let mut told = told_of(live, event, Kind::Established, context);
        told.numbers.latency_us = Some(event.at_ns.saturating_sub(event.opened_ns) / 1000);
        told.numbers.rtt_us = rtt(event);
        Some(told)
    }

    fn ended(&mut self, event: &Event, context: &Context<'_>) -> Told {
        let is_server = event.flags & flag::SERVER != 0;
        let live = match self.live.remove(&event.cookie) {
            Some(live) => live,
            None if is_server => {
                // Its beginning was lost, or came before this agent.
                let _ = self.accepted(event, context);
                self.live.remove(&event.cookie).unwrap_or_else(|| self.opened(event, context))
            }
            None => self.opened(event, context),
        };
        if self.by_tuple.get(&event.tuple) == Some(&event.cookie) {
            self.by_tuple.remove(&event.tuple);
        }
        let failed = event.kind == kind::FAILED;
        let mut told = told_of(&live, event, if failed { Kind::Failed } else { Kind::Closed }, context);
        told.numbers.duration_us = Some(event.at_ns.saturating_sub(event.opened_ns) / 1000);
        told.numbers.segments = Some([event.retransmits, event.unacked]);
        if failed {
            told.verdict = Verdict::Failed;
            told.reason = Reason::Errno(event.reason);
            return told;
        }
        let bytes = [event.bytes_sent, event.bytes_received];
        told.numbers.bytes = Some(if is_server { [bytes[1], bytes[0]] } else { bytes });
        told.numbers.rtt_us = rtt(event);
        told.closed = Some(closed(event));
        if event.reason != 0 {
            told.reason = Reason::Errno(event.reason);
        }
        told
    }

    /// Something that happened to a packet, or to a socket with these addresses.
    fn packet(&self, event: &Event, context: &Context<'_>) -> Told {
        let by_addresses = |tuple: &Tuple| self.by_tuple.get(tuple).and_then(|cookie| self.live.get(cookie));
        let backwards = reversed(&event.tuple);
        let known = self.live.get(&event.cookie).filter(|_| event.cookie != 0);
        let known =
            known.or_else(|| by_addresses(&event.tuple)).or_else(|| by_addresses(&backwards)).cloned();
        let kind = match event.kind {
            kind::RETRANSMIT => Kind::Retransmit,
            kind::RESET_SENT => Kind::ResetSent,
            kind::RESET_RECEIVED => Kind::ResetReceived,
            _ => Kind::Drop,
        };
        let live = known.unwrap_or_else(|| stranger(event, context));
        let mut told = told_of(&live, event, kind, context);
        if event.netns == 0 || !context.pods.contains_key(&event.netns) {
            told.side = Side::Node;
        } else if event.netns != live.netns {
            told.side = if live.side == Side::Client { Side::Server } else { Side::Client };
        }
        told.count = event.count;
        (told.verdict, told.reason) = match kind {
            Kind::Drop => (Verdict::Dropped, Reason::Drop(event.reason)),
            Kind::ResetSent => (Verdict::Forwarded, Reason::Reset(event.reason)),
            _ => (Verdict::Forwarded, Reason::None),
        };
        if event.flags & flag::UDP != 0 {
            told.protocol = "udp";
        }
        told
    }

    /// Who is at both ends of a connection that the agent told of.
    fn ends_of(&mut self, connection: &Connection) -> Arc<Ends> {
        let ends = || {
            Arc::new(Ends {
                source: peer_party(&connection.source),
                destination: peer_party(&connection.destination),
                service: connection.service.as_ref().map_or(String::new(), |s| s.host.hostname().to_owned()),
            })
        };
        let address = |peer: &Peer| match peer {
            Peer::Unknown => Some(0),
            Peer::Workload(workload) => Some(Arc::as_ptr(workload).addr()),
            // Comes with every connection anew.
            Peer::Derived(_) => None,
        };
        let (Some(source), Some(destination)) =
            (address(&connection.source), address(&connection.destination))
        else {
            return ends();
        };
        let service = connection.service.as_ref().map_or(0, |service| Arc::as_ptr(service).addr());
        let make = || Arc::new((connection.clone(), ends()));
        Arc::clone(&self.records.0.get_or_insert_with([source, destination, service], make).1)
    }

    /// What a record of the agent means.
    pub fn record(&mut self, record: &AccessRecord) -> Option<Told> {
        if record.event == RecordEvent::Request {
            return None;
        }
        let connection = record.connection.as_ref();
        let denied = record.failure.as_ref().is_some_and(|failure| failure.flag.as_str() == "DENY");
        let at = record.at.duration_since(UNIX_EPOCH).unwrap_or_default();
        let opened = record.event == RecordEvent::Opened;
        Some(Told {
            at_us: u64::try_from(at.as_micros()).unwrap_or(u64::MAX),
            connection: record.id,
            kind: Kind::Proxied,
            side: if record.direction == Direction::Outbound { Side::Client } else { Side::Server },
            verdict: match (denied, &record.failure) {
                (true, _) => Verdict::Denied,
                (false, Some(_)) => Verdict::Failed,
                (false, None) => Verdict::Forwarded,
            },
            path: connection.map_or(Path::Unknown, |connection| carried(record, connection)),
            protocol: "tcp",
            ends: connection.map_or_else(Arc::default, |connection| self.ends_of(connection)),
            client: Some(record.source),
            server: Some(match &record.hbone_target {
                Some(Authority::Socket(target)) => *target,
                _ => record.destination,
            }),
            asked: None,
            caller: Caller::default(),
            reason: record
                .failure
                .as_ref()
                .and_then(|failure| failure.code)
                .map_or(Reason::None, |code| Reason::Word(code.code())),
            detail: record.failure.as_ref().map(|failure| Arc::clone(&failure.text)),
            policy: record.failure.as_ref().and_then(|failure| failure.decided_by.as_deref().map(Str::from)),
            numbers: Numbers {
                duration_us: (!opened)
                    .then(|| u64::try_from(record.duration.as_micros()).unwrap_or(u64::MAX)),
                bytes: (!opened).then_some([record.received, record.sent]),
                ..Numbers::default()
            },
            closed: None,
            count: 1,
            dns: None,
        })
    }
}

/// What carried a connection, by the agent's own account.
fn carried(record: &AccessRecord, connection: &Connection) -> Path {
    if record.fast_path {
        return Path::Fast;
    }
    if connection.security != SecurityPolicy::MutualTls {
        return Path::Plain;
    }
    // Towards a waypoint the workload that is reached is none of the service's own.
    let to_waypoint = record.direction == Direction::Outbound
        && connection.service.as_ref().is_some_and(|service| service.waypoint.is_some());
    if to_waypoint { Path::Waypoint } else { Path::Tunnel }
}

fn told_of(live: &Live, event: &Event, kind: Kind, context: &Context<'_>) -> Told {
    Told { at_us: context.epoch_us + event.at_ns / 1000, kind, ..Told::of_live(live) }
}

fn rtt(event: &Event) -> Option<[u32; 2]> {
    let least = if event.min_rtt_us == u32::MAX { 0 } else { event.min_rtt_us };
    (event.srtt_us != 0).then_some([event.srtt_us, least])
}

/// Which end ended a connection, and with what.
fn closed(event: &Event) -> (Side, &'static str) {
    const BY_PEER: [i32; 2] = [libc::ECONNRESET, libc::EPIPE];
    let (here, there) = if event.flags & flag::SERVER != 0 {
        (Side::Server, Side::Client)
    } else {
        (Side::Client, Side::Server)
    };
    let aborted = event.flags & flag::ABORTED != 0;
    let error = i32::try_from(event.reason).unwrap_or(0);
    let with = match (aborted, error) {
        (false, _) => "fin",
        (true, libc::ETIMEDOUT) => "timeout",
        (true, _) => "rst",
    };
    let by = if event.flags & flag::CLOSED_HERE != 0 {
        here
    } else if event.flags & flag::CLOSED_THERE != 0 || (aborted && BY_PEER.contains(&error)) {
        there
    } else {
        here
    };
    (by, with)
}

/// Who is at both ends, and what carries a captured connection between them.
fn describe(key: &EndsKey, context: &Context<'_>) -> (Ends, Path) {
    let network = &context.mesh.options().network;
    let pod = context.pods.get(&key.netns);
    let local = pod.map_or_else(Party::default, |pod| local_party(pod, context));
    if key.is_server {
        let client = context.mesh.workload_by_ip(network, key.client);
        let path = match (client, pod) {
            (Some(client), Some(pod)) if pod.captured && client.is_hbone() => Path::Tunnel,
            (None, None) => Path::Unknown,
            _ => Path::Plain,
        };
        let source = client.map_or_else(Party::default, |client| party(client));
        let own = context.mesh.workload_by_ip(network, key.server.ip());
        let service = own.and_then(|own| infer_service(context.mesh, own, key.server.port(), None));
        let service = service.map_or(String::new(), |service| service.host.hostname().to_owned());
        return (Ends { source, destination: local, service }, path);
    }
    let namespace = pod.map(|pod| pod.namespace.as_str());
    if let Some(server) = context.mesh.workload_by_ip(network, key.server.ip()) {
        let service = infer_service(context.mesh, server, key.server.port(), None);
        let path = match (server.waypoint.is_some(), server.is_hbone()) {
            (true, _) => Path::Waypoint,
            (false, true) => Path::Tunnel,
            (false, false) => Path::Plain,
        };
        let service = service.map_or(String::new(), |service| service.host.hostname().to_owned());
        return (Ends { source: local, destination: party(server), service }, path);
    }
    let service = context.mesh.service_by_ip(network, key.server.ip(), namespace);
    let path = match service {
        Some(service) if service.service.waypoint.is_some() => Path::Waypoint,
        Some(_) => Path::Tunnel,
        None => Path::Plain,
    };
    let ends = Ends {
        source: local,
        destination: service.map_or_else(Party::default, |service| Party {
            namespace: service.service.host.namespace().to_owned(),
            ..Party::default()
        }),
        service: service.map_or(String::new(), |service| service.service.host.hostname().to_owned()),
    };
    (ends, path)
}

/// A packet of no connection that is known: its sender counts as the client, unless it speaks as a server does.
fn stranger(event: &Event, context: &Context<'_>) -> Live {
    let (from, to) = (client_of(&event.tuple), server_of(&event.tuple));
    let tunnel = [from, to].iter().any(|address| address.port() == HBONE_PORT);
    // Without a socket a reset answers a packet for a port that nobody listens on.
    let answers = from.port() == HBONE_PORT || (event.kind == kind::RESET_SENT && event.cookie == 0);
    let (client, server) = if answers { (to, from) } else { (from, to) };
    let network = &context.mesh.options().network;
    let of_address =
        |ip| context.mesh.workload_by_ip(network, ip).map_or_else(Party::default, |workload| party(workload));
    let ends = Ends {
        source: of_address(client.ip()),
        destination: of_address(server.ip()),
        service: String::new(),
    };
    let pod = context.pods.get(&event.netns);
    let local = pod.map(|pod| local_party(pod, context));
    // What a socket tells of itself begins with its own address.
    let ends = match local {
        Some(local) if event.kind != kind::DROP && answers => Ends { destination: local, ..ends },
        Some(local) if event.kind != kind::DROP => Ends { source: local, ..ends },
        _ => ends,
    };
    Live {
        connection: ConnectionId::default(),
        netns: event.netns,
        side: if answers { Side::Server } else { Side::Client },
        path: if tunnel { Path::Tunnel } else { Path::Unknown },
        ends: Arc::new(ends),
        client,
        server,
        asked: None,
        caller: Caller::default(),
        opened_ns: 0,
        established: false,
        policy: None,
    }
}
