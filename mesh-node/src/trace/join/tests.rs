use std::time::{Duration, SystemTime};

use mesh_core::error::Code;
use mesh_core::state::{MeshOptions, StateIndex};
use mesh_core::telemetry::{Failure, Reporter};
use mesh_core::xds::proto::workload as wire;

use super::*;
use crate::proxy::tests::bed::{address, workload};

const CART: u64 = 101;
const PAY: u64 = 102;
const OUTSIDE: u64 = 103;

fn ip(last: u8) -> IpAddr {
    [10, 0, 0, last].into()
}

fn at(last: u8, port: u16) -> SocketAddr {
    SocketAddr::new(ip(last), port)
}

struct Bed {
    mesh: Arc<MeshState>,
    pods: Pods,
    policies: Policies,
    joiner: Joiner,
}

impl Bed {
    /// `cart` and `pay` in the mesh on this node, `far` on another, `old` without a tunnel, and a pod outside.
    fn new() -> Self {
        let mut index = StateIndex::new(MeshOptions::default());
        let old = wire::Workload { tunnel_protocol: 0, ..workload("old", ip(4), "n2") };
        for w in
            [workload("cart", ip(1), "n1"), workload("pay", ip(2), "n1"), workload("far", ip(3), "n2"), old]
        {
            index.apply_address(&w.uid.clone(), &address(w)).unwrap();
        }
        let pod = |name: &str, captured| {
            Arc::new(LocalPod { namespace: "shop".into(), name: name.into(), captured })
        };
        let pods = [(CART, pod("cart", true)), (PAY, pod("pay", true)), (OUTSIDE, pod("job", false))];
        Self {
            mesh: index.snapshot(),
            pods: pods.into(),
            policies: vec!["shop/only-cart".into()],
            joiner: Joiner::default(),
        }
    }

    fn told(&mut self, event: Event) -> Told {
        let context =
            Context { mesh: &self.mesh, pods: &self.pods, policies: &self.policies, epoch_us: 1_000_000 };
        self.joiner.kernel(&event, &context).unwrap()
    }
}

fn event(kind: u32, netns: u64, cookie: u64, client: SocketAddr, server: SocketAddr) -> Event {
    let (from, to) = (Endpoint::from(client), Endpoint::from(server));
    Event {
        kind,
        netns,
        cookie,
        at_ns: 5_000_000,
        opened_ns: 2_000_000,
        count: 1,
        tuple: Tuple {
            client: from.address,
            server: to.address,
            client_port: from.port,
            server_port: to.port,
        },
        ..Event::default()
    }
}

/// `cart` connects to port 80 of a workload, captured.
fn captured(kind: u32, to: u8) -> Event {
    let asked = at(to, 80).into();
    Event { asked, decision: socket::RECORDED, ..event(kind, CART, 7, at(1, 4000), at(1, 61_005)) }
}

#[test]
fn a_captured_connection_shows_where_it_goes_and_not_where_it_was_rewritten_to() {
    let mut bed = Bed::new();
    let told = bed.told(captured(kind::CONNECT, 3));
    assert_eq!((told.kind, told.side, told.path), (Kind::Connect, Side::Client, Path::Tunnel));
    assert_eq!((told.client, told.server, told.asked), (Some(at(1, 4000)), Some(at(3, 80)), None));
    assert_eq!((&*told.ends.source.pod, &*told.ends.destination.pod), ("cart", "far"));
    assert_eq!(told.ends.destination.identity, "spiffe://cluster.local/ns/shop/sa/far");
    assert_eq!(told.ends.destination.node, "n2");
    assert_eq!(told.at_us, 1_000_000 + 5_000);
    assert_eq!(told.connection, ConnectionId::of(2_000_000, at(1, 4000)), "what the agent calls it, too");
    let established = bed.told(captured(kind::ESTABLISHED, 3));
    assert_eq!(established.numbers.latency_us, Some(3_000));
    assert_eq!(established.connection, told.connection);
    // Without a tunnel at the other end, and to nobody that is known, it leaves the node as it is.
    assert_eq!(bed.told(captured(kind::CONNECT, 4)).path, Path::Plain);
    assert_eq!(bed.told(captured(kind::CONNECT, 99)).path, Path::Plain);
}

#[test]
fn both_ends_of_the_fast_path_are_one_connection_that_a_policy_allowed() {
    let mut bed = Bed::new();
    let (client, server) = (at(1, 4000), at(2, 8080));
    let fast = Event {
        decision: socket::AUTHORISED,
        asked: server.into(),
        policy: 1,
        ..event(kind::CONNECT, CART, 7, client, server)
    };
    let opened = bed.told(fast);
    let accepted =
        Event { flags: flag::SERVER, opened_ns: 9, ..event(kind::ACCEPTED, PAY, 8, client, server) };
    let accepted = bed.told(accepted);
    for told in [&opened, &accepted] {
        assert_eq!((told.path, told.connection), (Path::Fast, opened.connection));
        assert_eq!(told.policy.as_deref(), Some("shop/only-cart"));
        assert_eq!((&*told.ends.source.pod, &*told.ends.destination.pod), ("cart", "pay"));
    }
    assert_eq!(accepted.side, Side::Server);
    assert_eq!(bed.joiner.live().count(), 2);
}

#[test]
fn what_the_agent_hands_to_an_application_came_through_the_tunnel() {
    let mut bed = Bed::new();
    let accepted = |from| Event {
        flags: flag::SERVER,
        ..event(kind::ACCEPTED, PAY, u64::from(from), at(from, 5000), at(2, 80))
    };
    assert_eq!(bed.told(accepted(3)).path, Path::Tunnel);
    assert_eq!(bed.told(accepted(4)).path, Path::Plain, "its peer speaks no tunnel");
    assert_eq!(bed.told(accepted(99)).path, Path::Plain);
}

#[test]
fn a_pod_outside_the_mesh_is_told_of_as_plain() {
    let mut bed = Bed::new();
    let told = bed.told(event(kind::CONNECT, OUTSIDE, 7, at(50, 4000), at(2, 80)));
    assert_eq!((told.path, &*told.ends.source.pod, &*told.ends.destination.pod), (Path::Plain, "job", "pay"));
}

#[test]
fn an_end_says_who_closed_with_what_and_counts_bytes_from_client_to_server() {
    let ended = |flags: u32, reason: i32| {
        let mut bed = Bed::new();
        let closed = Event {
            flags,
            reason: reason as u32,
            bytes_sent: 10,
            bytes_received: 20,
            srtt_us: 300,
            min_rtt_us: u32::MAX,
            retransmits: 2,
            unacked: 1,
            ..captured(kind::CLOSED, 3)
        };
        bed.told(closed)
    };
    let told = ended(flag::CLOSED_HERE, 0);
    assert_eq!((told.kind, told.closed), (Kind::Closed, Some((Side::Client, "fin"))));
    assert_eq!(told.numbers.bytes, Some([10, 20]));
    assert_eq!((told.numbers.rtt_us, told.numbers.segments), (Some([300, 0]), Some([2, 1])));
    assert_eq!(told.numbers.duration_us, Some(3_000));
    for (flags, reason, expected) in [
        (flag::CLOSED_THERE, 0, (Side::Server, "fin")),
        (flag::ABORTED, libc::ECONNRESET, (Side::Server, "rst")),
        (flag::ABORTED, 0, (Side::Client, "rst")),
        (flag::ABORTED, libc::ETIMEDOUT, (Side::Client, "timeout")),
        (flag::ABORTED | flag::CLOSED_HERE, libc::ECONNRESET, (Side::Client, "rst")),
        (flag::ABORTED | flag::CLOSED_THERE, libc::EPIPE, (Side::Server, "rst")),
    ] {
        assert_eq!(ended(flags, reason).closed, Some(expected), "{flags} {reason}");
    }
    // Seen at the server, sent and received are the other way round.
    let mut bed = Bed::new();
    let at_server = Event {
        flags: flag::SERVER | flag::CLOSED_THERE,
        bytes_sent: 10,
        bytes_received: 20,
        ..event(kind::CLOSED, PAY, 9, at(3, 5000), at(2, 80))
    };
    let told = bed.told(at_server);
    assert_eq!((told.side, told.numbers.bytes), (Side::Server, Some([20, 10])));
    assert_eq!(told.closed, Some((Side::Client, "fin")));
    assert_eq!(bed.joiner.live().count(), 0, "what ended is forgotten");
}

#[test]
fn a_connection_that_fails_says_why() {
    let mut bed = Bed::new();
    bed.told(captured(kind::CONNECT, 3));
    let failed = Event { reason: libc::ECONNREFUSED as u32, ..captured(kind::FAILED, 3) };
    let told = bed.told(failed);
    assert_eq!((told.kind, told.verdict), (Kind::Failed, Verdict::Failed));
    assert_eq!(told.reason, Reason::Errno(libc::ECONNREFUSED as u32));
    assert_eq!(told.closed, None);
    let refused = Event { decision: socket::REFUSED, ..captured(kind::CONNECT, 3) };
    assert_eq!(bed.told(refused).verdict, Verdict::Dropped);
}

#[test]
fn packets_belong_to_their_connection_in_either_direction() {
    let mut bed = Bed::new();
    let (client, server) = (at(50, 4000), at(2, 80));
    let opened = bed.told(event(kind::CONNECT, OUTSIDE, 7, client, server));
    // By cookie, by addresses, and by the addresses of an answer.
    let packets = [
        (event(kind::RETRANSMIT, OUTSIDE, 7, client, server), Kind::Retransmit, Side::Client),
        (event(kind::DROP, PAY, 0, client, server), Kind::Drop, Side::Server),
        (event(kind::DROP, 1, 0, server, client), Kind::Drop, Side::Node),
        (event(kind::RESET_SENT, PAY, 0, server, client), Kind::ResetSent, Side::Server),
    ];
    for (packet, kind, side) in packets {
        let told = bed.told(Event { flags: flag::PACKET, reason: 12, count: 3, ..packet });
        assert_eq!((told.kind, told.side, told.connection), (kind, side, opened.connection));
        assert_eq!((told.client, told.server), (Some(client), Some(server)), "{kind:?}");
        assert_eq!((&*told.ends.source.pod, told.count), ("job", 3));
    }
    // Of no connection that is known: its sender counts as the client.
    let stray = bed.told(Event { flags: flag::PACKET, ..event(kind::DROP, PAY, 0, at(3, 9), at(2, 81)) });
    assert!(stray.connection.is_none());
    assert_eq!((&*stray.ends.source.pod, &*stray.ends.destination.pod), ("far", "pay"));
    assert_eq!((stray.verdict, stray.path), (Verdict::Dropped, Path::Unknown));
}

#[test]
fn more_connections_than_fit_forget_the_oldest() {
    let mut bed = Bed::new();
    for number in 0..=MOST_LIVE as u64 {
        let client = at(50, 1024 + (number % 60_000) as u16);
        let server = at(2, 80 + (number / 60_000) as u16);
        bed.told(Event { opened_ns: number, ..event(kind::CONNECT, OUTSIDE, number + 1, client, server) });
    }
    let live = bed.joiner.live().count();
    assert!((MOST_LIVE / 2..=MOST_LIVE / 2 + 2).contains(&live), "{live}");
    assert!(bed.joiner.live().all(|live| live.opened_ns >= MOST_LIVE as u64 / 2));
}

#[test]
fn a_changed_mesh_gives_the_next_connection_new_ends() {
    let mut bed = Bed::new();
    assert_eq!(bed.told(captured(kind::CONNECT, 5)).ends.destination.pod, "");
    let mut index = StateIndex::new(MeshOptions::default());
    let new = workload("new", ip(5), "n2");
    index.apply_address(&new.uid.clone(), &address(new)).unwrap();
    bed.mesh = index.snapshot();
    assert_eq!(bed.told(captured(kind::CONNECT, 5)).ends.destination.pod, "new");
}

#[test]
fn the_agents_own_record_of_a_denial_names_the_policy() {
    let bed = Bed::new();
    let known = |name: &str| Peer::known(bed.mesh.workloads_by_name("shop", name).next());
    let failure = Failure {
        decided_by: Some("AuthorizationPolicy shop/only-cart".into()),
        ..Failure::new(Code::PolicyDenied, "connection closed due to policy rejection")
    };
    let record = AccessRecord {
        event: RecordEvent::Complete,
        id: ConnectionId(5),
        at: SystemTime::UNIX_EPOCH + Duration::from_secs(3),
        direction: Direction::Inbound,
        source: at(3, 5000),
        destination: at(2, 80),
        hbone_target: None,
        connection: Some(Connection {
            reporter: Reporter::Destination,
            source: known("far"),
            source_identity: None,
            destination: known("pay"),
            destination_identity: None,
            service: None,
            security: SecurityPolicy::MutualTls,
        }),
        received: 7,
        sent: 8,
        duration: Duration::from_millis(4),
        failure: Some(failure),
        fast_path: false,
        request: None,
    };
    let told = Joiner::default().record(&record).unwrap();
    assert_eq!((told.kind, told.verdict, told.side), (Kind::Proxied, Verdict::Denied, Side::Server));
    assert_eq!((told.path, told.connection, told.at_us), (Path::Tunnel, ConnectionId(5), 3_000_000));
    assert_eq!(told.policy.as_deref(), Some("AuthorizationPolicy shop/only-cart"));
    assert_eq!(told.reason, Reason::Word(Code::PolicyDenied.code()));
    assert_eq!(told.numbers.bytes, Some([7, 8]));
    assert_eq!((&*told.ends.source.pod, &*told.ends.destination.pod), ("far", "pay"));
    let fast = AccessRecord { fast_path: true, failure: None, ..record };
    let told = Joiner::default().record(&fast).unwrap();
    assert_eq!((told.path, told.verdict), (Path::Fast, Verdict::Forwarded));
}
