//! DNS redirection.

use crate::support::*;
use mesh_node::capture::{Capture, ListenerKind, MeshSettings};
use mesh_node::sys::udp::{self, Responder};
use socket2::{Domain, Type};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::Duration;

/// The agent's side: echoes each query with the server that it was for.
struct Dns {
    socket: UdpSocket,
    responder: Responder,
}

impl Dns {
    fn start(mesh: &Mesh) -> Self {
        let pod = &mesh.pods[0].pod;
        let socket = udp::dns_socket(&pod.netns).unwrap();
        mesh.capture.set_listener(pod, ListenerKind::DnsUdp, &socket).unwrap();
        Self { socket, responder: Responder::new(pod.netns.clone()) }
    }

    fn answer(&self, capture: &Capture, mesh: &Mesh) -> SocketAddr {
        let mut buffer = [0; 512];
        let mut got = None;
        eventually("a query arrives", || {
            got = udp::receive(self.socket.as_fd(), &mut buffer).ok();
            got.is_some()
        });
        let datagram = got.unwrap();
        let server = capture.dns_original_server(&mesh.pods[0].pod, datagram.local.port()).unwrap();
        self.responder.send(&buffer[..datagram.length], datagram.local, datagram.peer).unwrap();
        server
    }
}

fn client(mesh: &Mesh, ip: IpAddr) -> UdpSocket {
    let domain = if ip.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    let socket: UdpSocket = mesh.host(0).socket(domain, Type::DGRAM, None).unwrap().into();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    socket
}

#[test]
fn a_query_from_an_unconnected_socket_is_answered_by_the_server_that_was_asked() {
    let mesh = Mesh::new();
    let dns = Dns::start(&mesh);
    for server in ["198.51.100.53:53", "[2001:db8::53]:53", "[::ffff:198.51.100.53]:53"] {
        let server: SocketAddr = server.parse().unwrap();
        let client = client(&mesh, server.ip());
        client.send_to(b"query", server).unwrap();
        assert_eq!(dns.answer(&mesh.capture, &mesh), canonical(server));
        let mut buffer = [0; 16];
        let (length, from) = client.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..length], from), (&b"query"[..], server));
    }
}

#[test]
fn a_query_from_a_connected_socket_is_answered_by_the_server_that_was_asked() {
    let mesh = Mesh::new();
    let dns = Dns::start(&mesh);
    for server in ["198.51.100.53:53", "[2001:db8::53]:53"] {
        let server: SocketAddr = server.parse().unwrap();
        let client = client(&mesh, server.ip());
        client.connect(server).unwrap();
        assert_eq!(client.peer_addr().unwrap(), server);
        let own = if server.is_ipv4() { v4(0) } else { v6(0) };
        assert_eq!(client.local_addr().unwrap().ip(), own);
        client.send(b"query").unwrap();
        assert_eq!(dns.answer(&mesh.capture, &mesh), server);
        let mut buffer = [0; 16];
        let (length, from) = client.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..length], from), (&b"query"[..], server));
    }
}

#[test]
fn two_servers_asked_from_one_socket_keep_apart() {
    let mesh = Mesh::new();
    let dns = Dns::start(&mesh);
    let servers: [SocketAddr; 2] = ["198.51.100.53:53".parse().unwrap(), "203.0.113.53:53".parse().unwrap()];
    let client = client(&mesh, servers[0].ip());
    for server in servers {
        client.send_to(server.to_string().as_bytes(), server).unwrap();
    }
    let answered = [dns.answer(&mesh.capture, &mesh), dns.answer(&mesh.capture, &mesh)];
    assert_eq!(answered, servers);
    for _ in servers {
        let mut buffer = [0; 64];
        let (length, from) = client.recv_from(&mut buffer).unwrap();
        assert_eq!(from.to_string().as_bytes(), &buffer[..length]);
    }
}

#[test]
fn dns_over_tcp_reaches_its_own_listener() {
    let mesh = Mesh::new();
    let server: SocketAddr = "198.51.100.53:53".parse().unwrap();
    let client = connect(mesh.host(0), server).unwrap();
    assert_eq!(client.peer_addr().unwrap(), server);
    let (stream, peer) = accept(&mesh.pods[0].dns);
    assert_eq!(mesh.capture.take_original_dst(stream.local_addr().unwrap(), peer), Some(server));
}

#[test]
fn a_new_agent_takes_over_queries_by_one_write() {
    let mesh = Mesh::new();
    let old = Dns::start(&mesh);
    let server: SocketAddr = "198.51.100.53:53".parse().unwrap();
    let client = client(&mesh, server.ip());
    client.connect(server).unwrap();
    client.send(b"one").unwrap();
    old.answer(&mesh.capture, &mesh);
    let new = Dns::start(&mesh);
    client.send(b"two").unwrap();
    new.answer(&mesh.capture, &mesh);
    let mut buffer = [0; 16];
    for text in [&b"one"[..], b"two"] {
        let length = client.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], text);
    }
}

#[test]
fn with_dns_off_and_for_other_ports_datagrams_are_left_alone() {
    let mesh = Mesh::new();
    mesh.capture.set_config(&MeshSettings { dns: false, ..MeshSettings::default() }).unwrap();
    let server = |port| -> UdpSocket {
        let socket = mesh.host(2).socket(Domain::IPV4, Type::DGRAM, None).unwrap();
        socket.bind(&at(v4(2), port).into()).unwrap();
        let socket: UdpSocket = socket.into();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        socket
    };
    let mut buffer = [0; 16];
    let (dns, other) = (server(53), server(5353));
    let client = client(&mesh, v4(2));
    client.send_to(b"q", at(v4(2), 53)).unwrap();
    assert_eq!(dns.recv_from(&mut buffer).unwrap().1.ip(), v4(0));
    mesh.capture.set_config(&MeshSettings::default()).unwrap();
    client.send_to(b"q", at(v4(2), 5353)).unwrap();
    assert_eq!(other.recv_from(&mut buffer).unwrap().1.ip(), v4(0));
}

#[test]
fn a_pod_that_opts_out_asks_its_own_nameserver_until_it_opts_in_again() {
    let mesh = Mesh::new();
    let dns = Dns::start(&mesh);
    let pod = &mesh.pods[0].pod;
    let server = mesh.host(2).socket(Domain::IPV4, Type::DGRAM, None).unwrap();
    server.bind(&at(v4(2), 53).into()).unwrap();
    let server: UdpSocket = server.into();
    server.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    mesh.capture.set_dns(pod, false).unwrap();
    let client = client(&mesh, v4(2));
    client.send_to(b"direct", at(v4(2), 53)).unwrap();
    let mut buffer = [0; 16];
    let (length, from) = server.recv_from(&mut buffer).unwrap();
    assert_eq!((length, from.ip()), (6, v4(0)));
    assert!(mesh.capture.is_intact(pod));
    mesh.capture.set_dns(pod, true).unwrap();
    client.send_to(b"taken", at(v4(2), 53)).unwrap();
    dns.answer(&mesh.capture, &mesh);
    assert_eq!(mesh.count("dns_datagram"), 1);
}

#[test]
fn nobody_outside_reaches_the_dns_ports() {
    let mesh = Mesh::new();
    let dns = Dns::start(&mesh);
    let outside: UdpSocket = mesh.host(2).socket(Domain::IPV4, Type::DGRAM, None).unwrap().into();
    outside.connect(at(v4(0), 61512)).unwrap();
    outside.send(b"query").unwrap();
    eventually("the datagram is dropped", || mesh.count("dropped_capture_port") == 1);
    assert!(udp::receive(dns.socket.as_fd(), &mut [0; 16]).is_err());
}
