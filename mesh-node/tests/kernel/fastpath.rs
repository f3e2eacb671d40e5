//! The fast path and probes.

use crate::support::*;
use mesh_node::capture::{Decision, FlowState, Pair};
use mesh_node::sys;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};

#[test]
fn an_allowed_pair_talks_without_the_agent() {
    let mesh = Mesh::new();
    let application = serve(mesh.host(1), 8080);
    let generation = mesh.capture.generation().unwrap();
    for (source, destination) in [(v4(0), v4(1)), (v6(0), v6(1))] {
        allow(&mesh, source, destination, generation);
        let mut client = connect(mesh.host(0), at(destination, 8080)).unwrap();
        let (mut server, peer) = accept(&application);
        assert_eq!(peer, client.local_addr().unwrap());
        client.write_all(b"hello").unwrap();
        let mut read = [0; 5];
        server.read_exact(&mut read).unwrap();
        server.write_all(b"you").unwrap();
        client.read_exact(&mut read[..3]).unwrap();
        let flows = mesh.capture.fastpath_flows().unwrap();
        let flow = flows.iter().find(|flow| flow.client == peer).unwrap();
        assert_eq!((flow.state, flow.policy), (FlowState::Established, 7));
        drop(server);
        drop(client);
        eventually("the figures are final", || {
            mesh.capture.fastpath_flows().unwrap().iter().any(|flow| {
                flow.client == peer
                    && flow.state == FlowState::Closed
                    && (flow.bytes_sent, flow.bytes_received) == (5, 3)
            })
        });
        assert!(mesh.capture.fastpath_flows().unwrap().is_empty());
    }
    assert!(is_idle(&mesh.pods[1].inbound));
    assert_eq!(mesh.count("fast_path"), 2);
}

#[test]
fn a_pair_without_a_verdict_or_with_a_denial_takes_the_tunnel() {
    let mesh = Mesh::new();
    let generation = mesh.capture.generation().unwrap();
    let pair = allow(&mesh, v4(0), v4(1), generation);
    mesh.capture.set_verdict(&pair, Decision { allow: false, policy: 0, flags: 0 }, generation).unwrap();
    for port in [8080, 8081] {
        let _client = connect(mesh.host(0), at(v4(1), port)).unwrap();
        accept(&mesh.pods[0].outbound);
    }
}

#[test]
fn a_new_generation_ends_old_verdicts_but_not_the_ones_written_for_it() {
    let mesh = Mesh::new();
    let application = serve(mesh.host(1), 8080);
    let generation = mesh.capture.generation().unwrap();
    allow(&mesh, v4(0), v4(1), generation);
    allow(&mesh, v6(0), v6(1), generation + 1);
    // Both hold before the flip.
    for ip in [v4(1), v6(1)] {
        let _client = connect(mesh.host(0), at(ip, 8080)).unwrap();
        accept(&application);
    }
    assert_eq!(mesh.capture.bump_generation().unwrap(), generation + 1);
    let _client = connect(mesh.host(0), at(v6(1), 8080)).unwrap();
    accept(&application);
    let _client = connect(mesh.host(0), at(v4(1), 8080)).unwrap();
    accept(&mesh.pods[0].outbound);
    assert_eq!(mesh.capture.verdicts().unwrap().len(), 1);
}

#[test]
fn thousands_of_verdicts_are_read_once_each_while_others_come_and_go() {
    let mesh = Mesh::new();
    let generation = mesh.capture.generation().unwrap();
    let decision = Decision { allow: true, policy: 0, flags: 0 };
    let pair = |port| Pair { netns: 1, source: v4(0), destination: v4(1), port };
    let ports = 1..=5000;
    for port in ports.clone() {
        mesh.capture.set_verdict(&pair(port), decision, generation).unwrap();
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for port in (6000..9000).cycle() {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                mesh.capture.set_verdict(&pair(port), decision, generation).unwrap();
                mesh.capture.remove_verdict(&pair(port)).unwrap();
            }
        });
        for _ in 0..20 {
            let verdicts = mesh.capture.verdicts().unwrap();
            let mut read: Vec<u16> =
                verdicts.iter().map(|(pair, ..)| pair.port).filter(|port| ports.contains(port)).collect();
            read.sort_unstable();
            assert!(read.into_iter().eq(ports.clone()));
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_connection_of_the_same_addresses_elsewhere_on_the_machine_takes_no_authorisation() {
    let mesh = Mesh::new();
    let elsewhere = Net::new(2);
    allow(&mesh, v4(0), v4(1), mesh.capture.generation().unwrap());
    let applications = [serve(mesh.host(1), 8080), serve(&elsewhere.hosts[1], 8080)];
    let from = |netns: &sys::Netns| {
        let socket = netns.socket(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.bind(&at(v4(0), 40_000).into()).unwrap();
        socket.set_nonblocking(true).unwrap();
        let error = socket.connect(&at(v4(1), 8080).into()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINPROGRESS));
        socket
    };
    // The first SYN is lost, so that the other connection is there before it.
    nft(
        &mesh.net,
        1,
        "table ip um {\n chain c {\n type filter hook input priority 0;\n tcp dport 8080 counter drop\n }\n}\n",
    );
    let _client = from(mesh.host(0));
    eventually("the first SYN is lost", || dropped(&mesh.net, 1) > 0);
    let _other = from(&elsewhere.hosts[0]);
    accept(&applications[1]);
    nft(&mesh.net, 1, "delete table ip um\n");
    assert_eq!(accept(&applications[0]).1, at(v4(0), 40_000));
    assert!(is_idle(&mesh.pods[1].inbound));
}

#[test]
fn a_full_accept_queue_and_syn_cookies_do_not_lose_the_authorisation() {
    let mesh = Mesh::new();
    mesh.host(1).run(|| std::fs::write("/proc/sys/net/ipv4/tcp_syncookies", "2").unwrap()).unwrap();
    let generation = mesh.capture.generation().unwrap();
    for (source, destination) in [(v4(0), v4(1)), (v6(0), v6(1))] {
        allow(&mesh, source, destination, generation);
    }
    let application = serve(mesh.host(1), 8080);
    for ip in [v4(1), v6(1)] {
        let client = connect(mesh.host(0), at(ip, 8080)).unwrap();
        assert_eq!(accept(&application).1, client.local_addr().unwrap());
    }
    drop(application);
    // A queue of one that nobody empties for a while: SYNs are sent again.
    mesh.host(1).run(|| std::fs::write("/proc/sys/net/ipv4/tcp_syncookies", "0").unwrap()).unwrap();
    let socket = mesh.host(1).socket(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind(&at(v4(1), 8080).into()).unwrap();
    socket.listen(0).unwrap();
    let application = std::net::TcpListener::from(socket);
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let from = mesh.host(0).clone();
            std::thread::spawn(move || {
                connect(&from, at(v4(1), 8080)).map(|stream| stream.local_addr().unwrap())
            })
        })
        .collect();
    std::thread::sleep(std::time::Duration::from_millis(1500));
    application.set_nonblocking(true).unwrap();
    let mut kept = Vec::new();
    for _ in 0..4 {
        kept.push(accept(&application));
    }
    for client in clients {
        client.join().unwrap().unwrap();
    }
    assert!(is_idle(&mesh.pods[1].inbound));
}

#[test]
fn two_generations_of_programs_answer_like_one() {
    let net = Net::new(3);
    let pins = Pins::new(&net.prefix);
    let first = mesh_node::capture::Capture::load(pins.config()).unwrap();
    let pods: Vec<Pod> = (0..2).map(|i| Pod::enrol(&first, &net.info(i))).collect();
    // The same programs once more on the same maps, attached beside the pinned ones.
    let _second = pins.attach_again(&net);
    let _client = connect(&net.hosts[0], at(v4(2), 80)).unwrap();
    let (server, peer) = accept(&pods[0].outbound);
    assert_eq!(first.take_original_dst(server.local_addr().unwrap(), peer), Some(at(v4(2), 80)));
    let application = serve(&net.hosts[1], 8080);
    let pair = Pair { netns: pods[0].pod.cookie, source: v4(0), destination: v4(1), port: 8080 };
    let generation = first.generation().unwrap();
    first.set_verdict(&pair, Decision { allow: true, policy: 0, flags: 0 }, generation).unwrap();
    let _client = connect(&net.hosts[0], at(v4(1), 8080)).unwrap();
    accept(&application);
    let _client = connect(&net.hosts[2], at(v4(1), 8080)).unwrap();
    accept(&pods[1].inbound);
    let error = connect(&net.hosts[2], at(v4(1), 61000)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn a_denied_connection_is_destroyed() {
    let mesh = Mesh::new();
    let application = serve(mesh.host(1), 8080);
    let generation = mesh.capture.generation().unwrap();
    for (source, destination) in [(v4(0), v4(1)), (v6(0), v6(1))] {
        allow(&mesh, source, destination, generation);
        let mut client = connect(mesh.host(0), at(destination, 8080)).unwrap();
        let (mut server, peer) = accept(&application);
        let flows = mesh.capture.fastpath_flows().unwrap();
        let flow = flows.iter().find(|flow| flow.client == peer).unwrap();
        assert!(mesh.capture.destroy(flow).unwrap());
        assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionAborted);
        assert_eq!(server.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert!(!mesh.capture.destroy(flow).unwrap(), "it is gone");
    }
    let missing = sys::sock_destroy(mesh.host(0), at(v4(0), 1), at(v4(1), 1)).unwrap();
    assert!(!missing);
}

#[test]
fn destroying_a_connection_that_is_gone_leaves_the_listeners_of_its_port_alive() {
    let mesh = Mesh::new();
    let application = serve(mesh.host(1), 8080);
    for ip in [v4(0), v6(0)] {
        let server = if ip.is_ipv4() { v4(1) } else { v6(1) };
        assert!(!sys::sock_destroy(mesh.host(1), at(server, 8080), at(ip, 1)).unwrap());
        let _client = connect(mesh.host(1), at(server, 8080)).unwrap();
        accept(&application);
        let _client = connect(mesh.host(2), at(server, 8080)).unwrap();
        accept(&mesh.pods[1].inbound);
    }
}

#[test]
fn a_kubelet_probe_of_a_declared_port_reaches_the_application() {
    let net = Net::new(3);
    let capture = mesh_node::capture::Capture::load(config()).unwrap();
    let mut info = net.info(0);
    info.probe_ports = vec![8080];
    let pod = Pod::enrol(&capture, &info);
    let application = serve(&net.hosts[0], 8080);
    let other = serve(&net.hosts[0], 8081);
    // Not the kubelet yet: a connection like any other.
    let _client = connect(&net.hosts[2], at(v4(0), 8080)).unwrap();
    accept(&pod.inbound);
    let cgroup = std::fs::metadata(own_cgroup()).unwrap().ino();
    capture.set_kubelet_cgroups(&[cgroup]).unwrap();
    for (ip, source) in [(v4(0), v4(2)), (v6(0), v6(2))] {
        let _client = connect(&net.hosts[2], at(ip, 8080)).unwrap();
        assert_eq!(accept(&application).1.ip(), source);
        let _client = connect(&net.hosts[2], at(ip, 8081)).unwrap();
        accept(&pod.inbound);
    }
    assert!(is_idle(&other));
    assert_eq!(capture.counter("probe").unwrap(), 2);
}
