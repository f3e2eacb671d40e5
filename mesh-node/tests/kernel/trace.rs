//! What the kernel tells of connections and packets, against what really happened to them.

use crate::support::*;
use mesh_core::admin::Fitness;
use mesh_core::flows::ConnectionId;
use mesh_ebpf::{Tuple, socket};
use mesh_node::capture::Capture;
use mesh_node::capture::trace::{Event, Traced, Tracing, flag, kind};
use mesh_node::sys::Netns;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Events of some namespaces, as they come.
struct Told {
    tracing: Tracing,
    events: Vec<Event>,
}

impl Told {
    fn of(capture: &Capture, hosts: &[(&Netns, usize)]) -> Self {
        let tracing = capture.trace(&config()).unwrap();
        let traced = Traced {
            namespaces: hosts.iter().map(|(netns, _)| netns.cookie().unwrap()).collect(),
            addresses: hosts.iter().flat_map(|(_, host)| [v4(*host), v6(*host)]).collect(),
        };
        tracing.watched().follow(&traced).unwrap();
        Self { tracing, events: Vec::new() }
    }

    fn read(&mut self) {
        self.tracing.read(20, |event| self.events.push(*event)).unwrap();
        let now = mesh_node::sys::monotonic_ns();
        self.tracing.gather(now, |event| self.events.push(*event)).unwrap();
    }

    /// The first event for which `is` holds.
    fn wait(&mut self, what: &str, is: impl Fn(&Event) -> bool) -> Event {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(found) = self.events.iter().find(|event| is(event)) {
                return *found;
            }
            assert!(Instant::now() < deadline, "never told: {what}; but: {:#?}", self.events);
            self.read();
        }
    }

    fn kind(&mut self, kind: u32, client: SocketAddr) -> Event {
        self.wait(&format!("kind {kind}"), |event| event.kind == kind && client_of(&event.tuple) == client)
    }

    /// Waits until so many dropped packets were told, or may have been among what was missed: an interrupt in the middle of
    /// what a hook does finds it busy.
    fn drops(&mut self, dropped: u64) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            self.read();
            let drops = self.events.iter().filter(|event| event.kind == kind::DROP);
            let drops = drops.map(|event| u64::from(event.count)).sum::<u64>();
            let told = self.tracing.told().unwrap();
            assert!(drops <= dropped, "{drops} of {dropped}: {:#?}", self.events);
            if drops + told.missed >= dropped {
                return;
            }
            assert!(Instant::now() < deadline, "{drops} of {dropped}, {told:?}: {:#?}", self.events);
        }
    }

    fn reason(&self, reason: u32) -> String {
        self.tracing.reasons().0.get(&reason).cloned().unwrap_or_default()
    }
}

fn client_of(tuple: &Tuple) -> SocketAddr {
    at(tuple.client.to_ip(), tuple.client_port)
}

fn server_of(tuple: &Tuple) -> SocketAddr {
    at(tuple.server.to_ip(), tuple.server_port)
}

/// Two hosts outside of the mesh.
fn plain() -> (Net, Capture) {
    (Net::new(2), Capture::load(config()).unwrap())
}

fn both(net: &Net) -> [(&Netns, usize); 2] {
    [(&net.hosts[0], 0), (&net.hosts[1], 1)]
}

#[test]
fn every_hook_attaches_on_this_kernel() {
    let (net, capture) = plain();
    let told = Told::of(&capture, &both(&net));
    for probe in told.tracing.hooks() {
        assert_eq!(probe.state, Fitness::Ok, "{probe:?}");
    }
    assert_eq!(told.tracing.hooks().len(), 6);
}

#[test]
fn a_connection_is_told_at_both_ends_from_its_syn_to_its_last_byte() {
    for ip in [v4(1), v6(1)] {
        let (net, capture) = plain();
        let mut told = Told::of(&capture, &both(&net));
        let server = serve(&net.hosts[1], 80);
        let mut client = connect(&net.hosts[0], at(ip, 80)).unwrap();
        let (mut accepted, peer) = accept(&server);
        client.write_all(&[1; 3000]).unwrap();
        accepted.read_exact(&mut [0; 3000]).unwrap();
        accepted.write_all(&[2; 500]).unwrap();
        client.read_exact(&mut [0; 500]).unwrap();
        // The client closes first, the server then.
        drop(client);
        assert_eq!(accepted.read(&mut [0; 1]).unwrap(), 0);
        drop(accepted);
        let connect = told.kind(kind::CONNECT, peer);
        assert_eq!(connect.netns, net.hosts[0].cookie().unwrap());
        assert_eq!(connect.pid, std::process::id());
        assert!(connect.cgroup != 0 && connect.comm[0] != 0);
        assert_eq!(told.kind(kind::ESTABLISHED, peer).cookie, connect.cookie);
        let accepted = told.kind(kind::ACCEPTED, peer);
        assert_eq!(accepted.netns, net.hosts[1].cookie().unwrap());
        assert_eq!(accepted.pid, std::process::id(), "who listens is known");
        assert_eq!(server_of(&accepted.tuple), at(ip, 80));
        let closed = |server: bool| {
            move |event: &Event| {
                event.kind == kind::CLOSED
                    && client_of(&event.tuple) == peer
                    && (event.flags & flag::SERVER != 0) == server
            }
        };
        let at_client = told.wait("the client's end", closed(false));
        assert_eq!((at_client.bytes_sent, at_client.bytes_received), (3000, 500));
        assert_eq!(at_client.flags & (flag::CLOSED_HERE | flag::CLOSED_THERE), flag::CLOSED_HERE);
        assert!(at_client.srtt_us > 0 && at_client.opened_ns == connect.opened_ns);
        let at_server = told.wait("the server's end", closed(true));
        assert_eq!((at_server.bytes_sent, at_server.bytes_received), (500, 3000));
        assert_eq!(at_server.flags & (flag::CLOSED_HERE | flag::CLOSED_THERE), flag::CLOSED_THERE);
        for event in [at_client, at_server] {
            assert_eq!((event.flags & flag::ABORTED, event.reason, event.unacked), (0, 0, 0));
        }
    }
}

#[test]
fn a_refused_connection_is_told_with_its_error_and_the_reset_that_refused_it() {
    for ip in [v4(1), v6(1)] {
        let (net, capture) = plain();
        let mut told = Told::of(&capture, &both(&net));
        assert_eq!(connect(&net.hosts[0], at(ip, 81)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        let failed = told.wait("failed", |event| event.kind == kind::FAILED);
        assert_eq!(failed.reason as i32, libc::ECONNREFUSED);
        assert_eq!(server_of(&failed.tuple), at(ip, 81));
        let sent = told.wait("reset sent", |event| event.kind == kind::RESET_SENT);
        let ends = [client_of(&sent.tuple), server_of(&sent.tuple)];
        assert!(ends.contains(&at(ip, 81)) && ends.contains(&client_of(&failed.tuple)), "{sent:?}");
        let reason = told.tracing.reasons().1.get(&sent.reason).cloned();
        assert_eq!(reason.as_deref(), Some("NO_SOCKET"));
        told.wait("reset received", |event| event.kind == kind::RESET_RECEIVED);
    }
}

#[test]
fn a_packet_that_is_dropped_is_told_with_the_kernels_reason_and_so_are_its_retransmissions() {
    for ip in [v4(1), v6(1)] {
        let (net, capture) = plain();
        let mut told = Told::of(&capture, &both(&net));
        let _server = serve(&net.hosts[1], 80);
        let rules = "table inet um {\n chain c { type filter hook input priority 0;\n tcp dport 80 counter drop\n }\n}\n";
        nft(&net, 1, rules);
        let name = format!("{}-0", net.prefix);
        sh("ip", &["netns exec", &name, "sysctl -qw net.ipv4.tcp_syn_retries=1"]);
        assert!(connect(&net.hosts[0], at(ip, 80)).is_err());
        let failed = told.wait("failed", |event| event.kind == kind::FAILED);
        assert_eq!(failed.reason as i32, libc::ETIMEDOUT, "{failed:?}");
        let client = client_of(&failed.tuple);
        let drop = told.kind(kind::DROP, client);
        assert_eq!(told.reason(drop.reason), "NETFILTER_DROP");
        assert_eq!((server_of(&drop.tuple), drop.netns), (at(ip, 80), net.hosts[1].cookie().unwrap()));
        let again = told.kind(kind::RETRANSMIT, client);
        assert_eq!((again.cookie, again.netns), (failed.cookie, net.hosts[0].cookie().unwrap()));
        // As often as nftables counted.
        told.drops(dropped(&net, 1));
    }
}

#[test]
fn drops_are_told_or_counted_as_lost_while_every_cpu_frees_packets() {
    const CONNECTIONS: usize = 100;
    let (net, capture) = plain();
    let mut told = Told::of(&capture, &both(&net));
    let rules =
        "table inet um {\n chain c { type filter hook input priority 0;\n tcp dport 80 counter drop\n }\n}\n";
    nft(&net, 1, rules);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().unwrap().get() {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let (from, _unread) = UnixDatagram::pair().unwrap();
                    from.set_nonblocking(true).unwrap();
                    while from.send(&[0]).is_ok() {}
                }
            });
        }
        let connects: Vec<_> = (0..CONNECTIONS)
            .map(|_| {
                let stream = net.hosts[0].socket(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
                stream.set_nonblocking(true).unwrap();
                assert!(stream.connect(&at(v4(1), 80).into()).is_err());
                told.read();
                stream
            })
            .collect();
        eventually("every SYN was sent again", || dropped(&net, 1) >= 2 * CONNECTIONS as u64);
        drop(connects);
        stop.store(true, Ordering::Relaxed);
    });
    told.drops(dropped(&net, 1));
}

#[test]
fn an_abort_is_told_at_both_ends_and_says_who_sent_the_reset() {
    let (net, capture) = plain();
    let mut told = Told::of(&capture, &both(&net));
    let server = serve(&net.hosts[1], 80);
    let mut client = connect(&net.hosts[0], at(v4(1), 80)).unwrap();
    let (accepted, peer) = accept(&server);
    // Closed with bytes that nobody read: the kernel resets.
    client.write_all(b"unread").unwrap();
    eventually("the bytes are there", || accepted.peek(&mut [0; 6]).is_ok_and(|n| n == 6));
    drop(accepted);
    assert_eq!(client.read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    drop(client);
    let ends = |server: bool| {
        move |event: &Event| {
            event.kind == kind::CLOSED
                && client_of(&event.tuple) == peer
                && (event.flags & flag::SERVER != 0) == server
        }
    };
    let at_server = told.wait("the server's end", ends(true));
    let at_client = told.wait("the client's end", ends(false));
    assert!(at_server.flags & flag::ABORTED != 0 && at_client.flags & flag::ABORTED != 0);
    assert_eq!((at_server.reason, at_client.reason as i32), (0, libc::ECONNRESET));
    let sent = told.wait("reset sent", |event| event.kind == kind::RESET_SENT);
    assert_eq!(client_of(&sent.tuple), at(v4(1), 80), "the server sent it");
    let received = told.wait("reset received", |event| event.kind == kind::RESET_RECEIVED);
    assert_eq!(received.cookie, at_client.cookie);
}

#[test]
fn what_capture_made_of_a_connection_is_told_and_the_agent_knows_it_by_the_same_name() {
    let mesh = Mesh::new();
    let pods = [(mesh.host(0), 0), (mesh.host(1), 1)];
    let mut told = Told::of(&mesh.capture, &pods);
    let away: IpAddr = v4(2);
    let _captured = connect(mesh.host(0), at(away, 80)).unwrap();
    let (stream, peer) = accept(&mesh.pods[0].outbound);
    let local = canonical(stream.local_addr().unwrap());
    let (destination, id) = mesh.capture.take_original(local, peer).unwrap();
    assert_eq!(destination, at(away, 80));
    let connect_event = told.kind(kind::CONNECT, peer);
    assert_eq!(connect_event.decision, socket::RECORDED);
    assert_eq!(connect_event.asked.to_socket(), at(away, 80));
    assert_eq!(ConnectionId::of(connect_event.opened_ns, peer), id);
    // The fast path: one connection at both ends, and the verdict's policy.
    allow(&mesh, v4(0), v4(1), mesh.capture.generation().unwrap());
    let application = serve(mesh.host(1), 8080);
    let _client = connect(mesh.host(0), at(v4(1), 8080)).unwrap();
    let (_stream, peer) = accept(&application);
    let fast = told.kind(kind::CONNECT, peer);
    assert_eq!((fast.decision, fast.policy), (socket::AUTHORISED, 7));
    let flows = mesh.capture.fastpath_flows().unwrap();
    let flow = flows.iter().find(|flow| flow.client == peer).unwrap();
    assert_eq!((flow.opened_ns, flow.id), (fast.opened_ns, fast.cookie));
    told.kind(kind::ACCEPTED, peer);
}

#[test]
fn nothing_is_told_of_namespaces_that_are_not_traced_and_sampling_agrees_at_both_ends() {
    let (net, capture) = plain();
    let mut told = Told::of(&capture, &[(&net.hosts[1], 1)]);
    let server = serve(&net.hosts[1], 80);
    let _client = connect(&net.hosts[0], at(v4(1), 80)).unwrap();
    let (_stream, peer) = accept(&server);
    told.kind(kind::ACCEPTED, peer);
    assert!(told.events.iter().all(|event| event.kind != kind::CONNECT), "{:#?}", told.events);
    drop(told);
    // One loaded object is traced once.
    assert!(capture.trace(&config()).is_err());
    let (net, capture) = plain();
    let mut told = Told::of(&capture, &both(&net));
    told.tracing.sample(1).unwrap();
    let server = serve(&net.hosts[1], 80);
    const CONNECTIONS: u64 = 64;
    for _ in 0..CONNECTIONS {
        let _client = connect(&net.hosts[0], at(v4(1), 80)).unwrap();
        accept(&server);
    }
    let count = |told: &Told, kind| told.events.iter().filter(|event| event.kind == kind).count() as u64;
    eventually("all that are told are", || {
        told.read();
        let left_out = told.tracing.told().unwrap().unsampled;
        count(&told, kind::CONNECT) + left_out / 2 == CONNECTIONS
            && count(&told, kind::ACCEPTED) == count(&told, kind::CONNECT)
    });
    let connects = count(&told, kind::CONNECT);
    assert!((10..=54).contains(&connects), "{connects} of {CONNECTIONS}");
    let client_ports = |kind| {
        let events = told.events.iter().filter(move |event| event.kind == kind);
        let mut ports: Vec<u16> = events.map(|event| event.tuple.client_port).collect();
        ports.sort_unstable();
        ports
    };
    assert_eq!(client_ports(kind::CONNECT), client_ports(kind::ACCEPTED));
}
