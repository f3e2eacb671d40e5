//! Inbound steering.

use crate::support::*;
use mesh_node::capture::{FailMode, ListenerKind, MeshSettings};
use mesh_node::sys;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;

#[test]
fn connections_from_outside_reach_the_listeners_with_their_true_addresses() {
    let mesh = Mesh::new();
    let _application = serve(mesh.host(0), 8080);
    for (ip, client_ip) in [(v4(0), v4(2)), (v6(0), v6(2))] {
        let client = connect(mesh.host(2), at(ip, 8080)).unwrap();
        let (server, peer) = accept(&mesh.pods[0].inbound);
        assert_eq!(canonical(server.local_addr().unwrap()), at(ip, 8080));
        assert_eq!(peer, client.local_addr().unwrap());
        assert_eq!(peer.ip(), client_ip);
        let _client = connect(mesh.host(2), at(ip, 15008)).unwrap();
        let (server, _) = accept(&mesh.pods[0].hbone);
        assert_eq!(canonical(server.local_addr().unwrap()), at(ip, 15008));
    }
}

#[test]
fn a_capture_port_dialled_from_outside_is_refused() {
    let mesh = Mesh::new();
    for ip in [v4(0), v6(0)] {
        for port in [61000, 61511] {
            let error = connect(mesh.host(2), at(ip, port)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        }
    }
    assert!(is_idle(&mesh.pods[0].outbound) && is_idle(&mesh.pods[0].inbound));
    assert!(mesh.count("dropped_capture_port") >= 4);
}

#[test]
fn without_a_listener_callers_are_refused_or_pass_as_the_mesh_fails() {
    let mut mesh = Mesh::new();
    let application = serve(mesh.host(0), 8080);
    // The process of the listener ends: the socket leaves the map with it.
    let (port, replaced) = {
        let listener = sys::listener(mesh.host(0), 0, 16).unwrap();
        (listener.local_addr().unwrap().port(), std::mem::replace(&mut mesh.pods[0].inbound, listener))
    };
    assert_ne!(port, replaced.local_addr().unwrap().port());
    drop(replaced);
    for ip in [v4(0), v6(0)] {
        assert_eq!(connect(mesh.host(2), at(ip, 8080)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    }
    assert!(mesh.count("dropped_no_listener") >= 2);
    let open = MeshSettings { fail: FailMode::Open, ..MeshSettings::default() };
    mesh.capture.set_config(&open).unwrap();
    let _client = connect(mesh.host(2), at(v4(0), 8080)).unwrap();
    accept(&application);
    // A new agent registers its listener: one write, and it is served again.
    mesh.capture.set_listener(&mesh.pods[0].pod, ListenerKind::Inbound, &mesh.pods[0].inbound).unwrap();
    let _client = connect(mesh.host(2), at(v4(0), 8080)).unwrap();
    accept(&mesh.pods[0].inbound);
}

#[test]
fn listeners_of_one_reuse_port_group_share_the_connections() {
    let mesh = Mesh::new();
    let first = &mesh.pods[0].inbound;
    let second = sys::listener(mesh.host(0), first.local_addr().unwrap().port(), 4096).unwrap();
    let clients: Vec<TcpStream> = (0..64).map(|_| connect(mesh.host(2), at(v4(0), 80)).unwrap()).collect();
    let served = |listener: &std::net::TcpListener| std::iter::from_fn(|| listener.accept().ok()).count();
    let counts = (served(first), served(&second));
    assert_eq!(counts.0 + counts.1, clients.len());
    assert!(counts.0 > 0 && counts.1 > 0, "{counts:?}");
}

#[test]
fn the_application_sees_the_clients_address() {
    let mesh = Mesh::new();
    let application = serve(mesh.host(0), 8080);
    let strangers = ["203.0.113.9".parse().unwrap(), "2001:db8::9".parse().unwrap(), v4(2), v6(2)];
    for (pod, client) in [v4(0), v6(0), v4(0), v6(0)].into_iter().zip(strangers) {
        let socket = sys::application_socket(&mesh.pods[0].pod.netns, at(pod, 8080), Some(client)).unwrap();
        socket.set_nonblocking(false).unwrap();
        socket
            .connect_timeout(&at(pod, 8080).into(), std::time::Duration::from_secs(5))
            .unwrap_or_else(|error| panic!("from {client}: {error}"));
        let mut agent = TcpStream::from(socket);
        let (mut server, peer) = accept(&application);
        assert_eq!(peer.ip(), client);
        agent.write_all(b"hello").unwrap();
        let mut read = [0; 5];
        server.read_exact(&mut read).unwrap();
        server.write_all(&read).unwrap();
        agent.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"hello");
    }
    assert!(is_idle(&mesh.pods[0].inbound));
}

#[test]
fn an_address_added_or_removed_while_enrolled_is_followed() {
    let mesh = Mesh::new();
    let host = format!("-n {}-0", mesh.net.prefix);
    let outside = format!("-n {}-2", mesh.net.prefix);
    sh("ip", &[&outside, "route add 10.78.0.0/24 via 10.77.0.1"]);
    sh("ip", &[&host, "addr add 10.78.0.1/24 dev eth0"]);
    let new = "10.78.0.1".parse().unwrap();
    eventually("the new address is known", || mesh.pods[0].pod.addresses().contains(&new));
    let _client = connect(mesh.host(2), at(new, 80)).unwrap();
    accept(&mesh.pods[0].inbound);
    // The pod's call to its new address is a call to itself.
    let application = serve(mesh.host(0), 8080);
    let _client = connect(mesh.host(0), at(new, 8080)).unwrap();
    accept(&application);
    sh("ip", &[&host, "addr del 10.78.0.1/24 dev eth0"]);
    eventually("the old address is gone", || !mesh.pods[0].pod.addresses().contains(&new));
    // Elsewhere now: captured like any other.
    let _client = connect(mesh.host(0), at(new, 80)).unwrap();
    let (server, peer) = accept(&mesh.pods[0].outbound);
    assert_eq!(mesh.capture.take_original_dst(server.local_addr().unwrap(), peer), Some(at(new, 80)));
}

#[test]
fn an_address_that_two_pods_claim_is_refused() {
    let mesh = Mesh::new();
    let outside = format!("-n {}-2", mesh.net.prefix);
    for host in 0..2 {
        sh("ip", &[&format!("-n {}-{host}", mesh.net.prefix), "addr add 10.78.0.1/32 dev eth0"]);
    }
    let shared = "10.78.0.1".parse().unwrap();
    eventually("both are known", || (0..2).all(|pod| mesh.pods[pod].pod.addresses().contains(&shared)));
    sh("ip", &[&outside, "route add 10.78.0.1/32 via 10.77.0.1"]);
    assert_eq!(connect(mesh.host(2), at(shared, 80)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert!(mesh.count("dropped_unknown_address") >= 1);
}
