//! The fast path where packets are lost, sources change on the way, or maps are full.

use crate::support::*;
use mesh_node::capture::{CaptureConfig, FlowFigures, FlowState, Limits};
use std::io::{Read, Write};
use std::net::SocketAddr;

fn flow_of(mesh: &Mesh, client: SocketAddr) -> Option<FlowFigures> {
    mesh.capture.fastpath_flows().unwrap().into_iter().find(|flow| flow.client == client)
}

/// A mesh with room for so many connections of the fast path, and both families of pod 0 to pod 1 allowed.
fn mesh(flows: u32) -> Mesh {
    let limits = Limits { flows, ..Limits::default() };
    let mesh = Mesh::with(CaptureConfig { limits, ..config() });
    let generation = mesh.capture.generation().unwrap();
    for (source, destination) in [(v4(0), v4(1)), (v6(0), v6(1))] {
        allow(&mesh, source, destination, generation);
    }
    mesh
}

/// Drops, in a host's namespace and hook, the first packet of each connection that matches.
fn drop_first(mesh: &Mesh, host: usize, hook: &str, packets: &str, peer_port: &str) {
    let script = ["ip saddr", "ip daddr"][usize::from(hook == "output")];
    let rules = format!(
        "table ip um {{\n set seen4 {{ type ipv4_addr . inet_service; flags dynamic; size 1024; }}\n \
         chain c {{ type filter hook {hook} priority 0;\n \
         {packets} {script} . tcp {peer_port} @seen4 accept\n \
         {packets} add @seen4 {{ {script} . tcp {peer_port} }} counter drop\n }}\n}}\n"
    );
    nft(&mesh.net, host, &rules);
}

/// Connects over the fast path, and sends and receives a byte.
fn talks(mesh: &Mesh, application: &std::net::TcpListener) -> SocketAddr {
    let mut client = connect(mesh.host(0), at(v4(1), 8080)).unwrap();
    let (mut server, peer) = accept(application);
    assert_eq!(peer, client.local_addr().unwrap());
    client.write_all(b"x").unwrap();
    let mut byte = [0];
    server.read_exact(&mut byte).unwrap();
    assert_eq!(flow_of(mesh, peer).unwrap().state, FlowState::Established);
    peer
}

#[test]
fn a_lost_first_syn_is_sent_again_and_passes() {
    let mesh = mesh(64);
    let application = serve(mesh.host(1), 8080);
    drop_first(&mesh, 1, "input", "tcp dport 8080 tcp flags & (syn|ack) == syn", "sport");
    talks(&mesh, &application);
    assert!(dropped(&mesh.net, 1) == 1, "the first SYN was not lost");
    assert!(is_idle(&mesh.pods[1].inbound) && is_idle(&mesh.pods[0].outbound));
}

#[test]
fn a_lost_syn_ack_does_not_lose_the_authorisation() {
    let mesh = mesh(64);
    let application = serve(mesh.host(1), 8080);
    for cookies in ["1", "2"] {
        let set = || std::fs::write("/proc/sys/net/ipv4/tcp_syncookies", cookies).unwrap();
        mesh.host(1).run(set).unwrap();
        drop_first(&mesh, 1, "output", "tcp sport 8080 tcp flags & (syn|ack) == (syn|ack)", "dport");
        talks(&mesh, &application);
        assert!(dropped(&mesh.net, 1) == 1, "the first SYN-ACK was not lost");
        nft(&mesh.net, 1, "delete table ip um\n");
    }
    assert!(is_idle(&mesh.pods[1].inbound) && is_idle(&mesh.pods[0].outbound));
}

#[test]
fn a_source_that_is_changed_on_the_way_is_told_and_one_that_is_not_is_not() {
    let mesh = mesh(64);
    let application = serve(mesh.host(1), 8080);
    let straight = talks(&mesh, &application);
    eventually("its figures are final", || {
        flow_of(&mesh, straight).is_some_and(|flow| flow.state == FlowState::Closed && !flow.astray)
    });
    // As a node that masquerades; here the server's namespace itself does it before its own lookup.
    let rewrite = format!(
        "table ip um {{\n chain c {{ type nat hook input priority 100;\n \
         tcp dport 8080 ip saddr {} snat to {}\n }}\n}}\n",
        v4(0),
        v4(2)
    );
    nft(&mesh.net, 1, &rewrite);
    // The plaintext listener gets it, under the address that the node shows.
    let mut client = connect(mesh.host(0), at(v4(1), 8080)).unwrap();
    let (mut server, peer) = accept(&mesh.pods[1].inbound);
    assert_eq!(peer.ip(), v4(2));
    let client_address = client.local_addr().unwrap();
    assert!(!flow_of(&mesh, client_address).unwrap().astray, "nothing is known yet");
    std::thread::scope(|scope| {
        scope.spawn(|| std::io::copy(&mut server, &mut std::io::sink()));
        eventually("a live connection is told", || {
            client.write_all(b"x").unwrap();
            flow_of(&mesh, client_address).is_some_and(|flow| flow.astray)
        });
        drop(client);
    });
    // One that its listener resets at once is told by its end.
    let client = connect(mesh.host(0), at(v4(1), 8080)).unwrap();
    let (server, _) = accept(&mesh.pods[1].inbound);
    socket2::SockRef::from(&server).set_linger(Some(std::time::Duration::ZERO)).unwrap();
    drop(server);
    let client_address = client.local_addr().unwrap();
    eventually("a reset connection is told", || {
        flow_of(&mesh, client_address).is_some_and(|flow| flow.astray)
    });
}

#[test]
fn without_room_for_its_figures_a_connection_takes_the_tunnel_and_the_direct_ones_can_all_be_ended() {
    let mesh = mesh(2);
    let application = serve(mesh.host(1), 8080);
    let direct = [v4(1), v6(1)].map(|ip| {
        let client = connect(mesh.host(0), at(ip, 8080)).unwrap();
        (client, accept(&application))
    });
    let _tunnelled = connect(mesh.host(0), at(v4(1), 8080)).unwrap();
    accept(&mesh.pods[0].outbound);
    assert!(is_idle(&application));
    assert_eq!((mesh.count("fast_path_full"), mesh.count("refused_map_full")), (1, 0));
    let flows = mesh.capture.fastpath_flows().unwrap();
    assert_eq!(flows.len(), 2);
    for flow in &flows {
        assert!(mesh.capture.destroy(flow).unwrap());
    }
    for (mut client, _server) in direct {
        assert_eq!(client.read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::ConnectionAborted);
    }
    // What has ended gives its place back.
    assert_eq!(mesh.capture.fastpath_flows().unwrap().len(), 2);
    let _client = connect(mesh.host(0), at(v4(1), 8080)).unwrap();
    accept(&application);
}

#[test]
fn a_connect_that_fails_before_its_syn_gives_its_place_back() {
    let mesh = mesh(2);
    let application = serve(mesh.host(1), 8080);
    let bound = || {
        let socket = mesh.host(0).socket(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.set_reuse_address(true).unwrap();
        socket.set_reuse_port(true).unwrap();
        socket.bind(&at(v4(0), 45000).into()).unwrap();
        socket
    };
    let (first, second) = (bound(), bound());
    first.connect(&at(v4(1), 8080).into()).unwrap();
    let error = second.connect(&at(v4(1), 8080).into()).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EADDRNOTAVAIL));
    assert_eq!(mesh.capture.fastpath_flows().unwrap().len(), 1, "it is no connection");
    let _tunnelled = connect(mesh.host(0), at(v4(1), 8080)).unwrap();
    accept(&mesh.pods[0].outbound);
    accept(&application);
    eventually("its place is free", || {
        mesh.capture.fastpath_flows().unwrap();
        let _client = connect(mesh.host(0), at(v4(1), 8080)).unwrap();
        application.accept().is_ok()
    });
}
