//! Outbound capture.

use crate::support::*;
use mesh_node::capture::{Limits, MeshSettings};
use socket2::{Domain, Protocol, Socket, Type};
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// Accepts what was captured and returns the original destination.
fn captured(mesh: &Mesh) -> (TcpStream, SocketAddr) {
    let (stream, peer) = accept(&mesh.pods[0].outbound);
    let original = mesh.capture.take_original_dst(stream.local_addr().unwrap(), peer);
    (stream, original.expect("an original destination is recorded"))
}

fn expect_capture(mesh: &Mesh, from: SocketAddr, to: SocketAddr) {
    let client = connect(mesh.host(0), to).unwrap();
    let (_server, original) = captured(mesh);
    assert_eq!(original, SocketAddr::new(to.ip().to_canonical(), to.port()));
    assert_eq!(client.peer_addr().unwrap(), to, "getpeername answers what was asked for");
    assert_eq!(canonical(client.local_addr().unwrap()).ip(), from.ip(), "getsockname stays true");
}

#[test]
fn ipv4_is_captured_with_true_names() {
    let mesh = Mesh::new();
    expect_capture(&mesh, at(v4(0), 0), at(v4(2), 80));
    expect_capture(&mesh, at(v4(0), 0), "198.51.100.7:443".parse().unwrap());
}

#[test]
fn ipv6_is_captured_with_true_names() {
    let mesh = Mesh::new();
    expect_capture(&mesh, at(v6(0), 0), at(v6(2), 80));
    expect_capture(&mesh, at(v6(0), 0), "[2001:db8::7]:443".parse().unwrap());
}

#[test]
fn v4_mapped_counts_as_ipv4() {
    let mesh = Mesh::new();
    expect_capture(&mesh, at(v4(0), 0), "[::ffff:198.51.100.7]:443".parse().unwrap());
}

#[test]
fn an_original_destination_is_handed_out_once() {
    let mesh = Mesh::new();
    let _client = connect(mesh.host(0), at(v4(2), 80)).unwrap();
    let (server, peer) = accept(&mesh.pods[0].outbound);
    let local = server.local_addr().unwrap();
    assert_eq!(mesh.capture.take_original_dst(local, peer), Some(at(v4(2), 80)));
    assert_eq!(mesh.capture.take_original_dst(local, peer), None);
}

#[test]
fn a_pod_outside_the_mesh_is_not_touched() {
    let mesh = Mesh::new();
    let server = serve(mesh.host(2), 80);
    let net = Net::new(1);
    drop(net);
    // Host 2 itself is in no mesh: it calls itself and nobody interferes.
    let _client = connect(mesh.host(2), at(v4(2), 80)).unwrap();
    accept(&server);
    assert_eq!(mesh.count("captured"), 0);
}

#[test]
fn a_pod_that_calls_itself_is_not_touched() {
    let mesh = Mesh::new();
    let server = serve(mesh.host(0), 8080);
    for ip in [v4(0), v6(0), Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()] {
        let _client = connect(mesh.host(0), at(ip, 8080)).unwrap();
        assert_eq!(accept(&server).1.ip(), ip);
    }
    assert!(is_idle(&mesh.pods[0].outbound) && is_idle(&mesh.pods[0].inbound));
}

#[test]
fn a_pod_may_call_itself_on_a_capture_port() {
    let mesh = Mesh::new();
    let server = serve(mesh.host(0), 61005);
    for ip in [v4(0), v6(0)] {
        let _client = connect(mesh.host(0), at(ip, 61005)).unwrap();
        assert_eq!(accept(&server).1.ip(), ip);
    }
}

#[test]
fn excluded_ports_and_networks_are_left_alone() {
    let mesh = Mesh::new();
    let settings = MeshSettings {
        excluded: vec!["10.77.0.3/32".parse().unwrap(), "fd77::3/128".parse().unwrap()],
        excluded_ports: vec![9999],
        ..MeshSettings::default()
    };
    mesh.capture.set_config(&settings).unwrap();
    let server = serve(mesh.host(2), 80);
    for ip in [v4(2), v6(2)] {
        let _client = connect(mesh.host(0), at(ip, 80)).unwrap();
        assert_eq!(accept(&server).1.ip().is_ipv4(), ip.is_ipv4());
    }
    let inside = serve(mesh.host(1), 9999);
    mesh.capture.release(&mesh.pods[1].pod).unwrap();
    let _client = connect(mesh.host(0), at(v4(1), 9999)).unwrap();
    accept(&inside);
    // And taken back.
    mesh.capture.set_config(&MeshSettings::default()).unwrap();
    expect_capture(&mesh, at(v4(0), 0), at(v4(2), 80));
}

#[test]
fn with_included_networks_everything_else_is_left_alone() {
    let mesh = Mesh::new();
    let settings =
        MeshSettings { included: vec!["10.77.0.2/32".parse().unwrap()], ..MeshSettings::default() };
    mesh.capture.set_config(&settings).unwrap();
    let server = serve(mesh.host(2), 80);
    let _client = connect(mesh.host(0), at(v4(2), 80)).unwrap();
    accept(&server);
    expect_capture(&mesh, at(v4(0), 0), at(v4(1), 80));
}

/// A socket of the pod with options set before it connects.
fn socket(mesh: &Mesh, domain: Domain, protocol: Option<Protocol>) -> Socket {
    mesh.host(0).socket(domain, Type::STREAM, protocol).unwrap()
}

#[test]
fn a_socket_that_was_bound_first_keeps_its_port() {
    let mesh = Mesh::new();
    let client = socket(&mesh, Domain::IPV4, None);
    client.bind(&at(v4(0), 45678).into()).unwrap();
    client.connect(&at(v4(2), 80).into()).unwrap();
    let (server, original) = captured(&mesh);
    assert_eq!(original, at(v4(2), 80));
    assert_eq!(canonical(server.peer_addr().unwrap()), at(v4(0), 45678));
}

#[test]
fn one_bound_port_reaches_two_destinations() {
    let mesh = Mesh::new();
    let mut kept = Vec::new();
    for to in [at(v4(1), 80), at(v4(2), 80)] {
        let client = socket(&mesh, Domain::IPV4, None);
        client.set_reuse_address(true).unwrap();
        client.set_reuse_port(true).unwrap();
        client.bind(&at(v4(0), 45679).into()).unwrap();
        client.connect(&to.into()).unwrap();
        let (server, original) = captured(&mesh);
        assert_eq!(original, to);
        kept.push((client, server));
    }
}

#[test]
fn a_non_blocking_connect_is_captured() {
    let mesh = Mesh::new();
    let client = socket(&mesh, Domain::IPV6, None);
    client.set_nonblocking(true).unwrap();
    match client.connect(&at(v6(2), 80).into()) {
        Ok(()) => {}
        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EINPROGRESS)),
    }
    assert_eq!(captured(&mesh).1, at(v6(2), 80));
    eventually("the client is connected", || client.peer_addr().is_ok());
    assert_eq!(client.peer_addr().unwrap().as_socket(), Some(at(v6(2), 80)));
}

#[test]
fn mptcp_is_captured() {
    let mesh = Mesh::new();
    let client = socket(&mesh, Domain::IPV4, Some(Protocol::from(262)));
    client.connect(&at(v4(2), 80).into()).unwrap();
    assert_eq!(captured(&mesh).1, at(v4(2), 80));
}

#[test]
fn tcp_fast_open_is_captured_and_no_byte_is_lost() {
    let mesh = Mesh::new();
    mesh.host(0).run(|| std::fs::write("/proc/sys/net/ipv4/tcp_fastopen", "1027").unwrap()).unwrap();
    let client = socket(&mesh, Domain::IPV4, None);
    let to = socket2::SockAddr::from(at(v4(2), 80));
    let message = socket2::MsgHdr::new().with_addr(&to);
    let data = [std::io::IoSlice::new(b"early")];
    let sent = client.sendmsg(&message.with_buffers(&data), libc::MSG_FASTOPEN).unwrap();
    assert_eq!(sent, 5);
    let (mut server, original) = captured(&mesh);
    assert_eq!(original, to.as_socket().unwrap());
    let mut read = [0; 5];
    server.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"early");
}

#[test]
fn bytes_half_close_and_reset_pass_through_a_captured_socket() {
    let mesh = Mesh::new();
    let mut client = connect(mesh.host(0), at(v4(2), 80)).unwrap();
    let (mut server, _) = captured(&mesh);
    client.write_all(b"ping").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut text = String::new();
    server.read_to_string(&mut text).unwrap();
    assert_eq!(text, "ping");
    server.write_all(b"pong").unwrap();
    socket2::SockRef::from(&server).set_linger(Some(Duration::ZERO)).unwrap();
    drop(server);
    let mut rest = Vec::new();
    let outcome = client.read_to_end(&mut rest);
    assert!(rest == b"pong" || outcome.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset));
}

#[test]
fn a_client_that_closes_at_once_is_still_accepted_with_its_destination() {
    let mesh = Mesh::new();
    let mut client = connect(mesh.host(0), at(v4(2), 80)).unwrap();
    client.write_all(b"bye").unwrap();
    drop(client);
    std::thread::sleep(Duration::from_millis(50));
    let (mut server, original) = captured(&mesh);
    assert_eq!(original, at(v4(2), 80));
    let mut text = String::new();
    server.read_to_string(&mut text).unwrap();
    assert_eq!(text, "bye");
}

#[test]
fn a_raw_syn_does_not_leave_an_enrolled_pod() {
    let mesh = Mesh::new();
    let raw = mesh.host(0).socket(Domain::IPV4, Type::RAW, Some(Protocol::TCP)).unwrap();
    // Ports 40000 -> 80, a bare SYN; the checksum does not matter, it must not leave.
    let mut segment = [0_u8; 20];
    segment[0..2].copy_from_slice(&40000_u16.to_be_bytes());
    segment[2..4].copy_from_slice(&80_u16.to_be_bytes());
    segment[12] = 5 << 4;
    segment[13] = 2;
    let error = raw.send_to(&segment, &at(v4(2), 0).into()).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EPERM));
    assert_eq!(mesh.count("dropped_uncaptured"), 1);
    // A bare ACK is none of our business.
    segment[13] = 16;
    raw.send_to(&segment, &at(v4(2), 0).into()).unwrap();
    let raw = mesh.host(0).socket(Domain::IPV6, Type::RAW, Some(Protocol::TCP)).unwrap();
    segment[13] = 2;
    assert!(raw.send_to(&segment, &at(v6(2), 0).into()).is_err());
    assert_eq!(mesh.count("dropped_uncaptured"), 2);
}

#[test]
fn a_full_map_refuses_and_frees_itself() {
    let limits = Limits { pending: 4, ..Limits::default() };
    let mesh = Mesh::with(mesh_node::capture::CaptureConfig { limits, ..config() });
    let clients: Vec<_> = (0..4).map(|i| connect(mesh.host(0), at(v4(2), 80 + i)).unwrap()).collect();
    let start = Instant::now();
    let refused = connect(mesh.host(0), at(v4(2), 90));
    assert!(refused.is_err(), "a fifth connection found a place in a map of four");
    assert!(start.elapsed() < Duration::from_secs(20));
    assert_eq!(mesh.count("refused_map_full"), 1);
    for _ in &clients {
        captured(&mesh);
    }
    let _client = connect(mesh.host(0), at(v4(2), 90)).unwrap();
    assert_eq!(captured(&mesh).1, at(v4(2), 90));
}

#[test]
fn ports_last_for_many_closed_connections() {
    // A fixed capture port ran out after 28,268.
    const DESTINATIONS: u32 = 10;
    let wanted: u32 = std::env::var("UM_MANY").ok().and_then(|text| text.parse().ok()).unwrap_or(100_000);
    let mesh = Mesh::new();
    let listener = mesh.pods[0].outbound.try_clone().unwrap();
    listener.set_nonblocking(false).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for stream in listener.incoming().take(wanted as usize) {
                let stream = stream.unwrap();
                let (local, peer) = (stream.local_addr().unwrap(), stream.peer_addr().unwrap());
                assert!(mesh.capture.take_original_dst(local, peer).is_some());
            }
        });
        mesh.host(0)
            .run(|| {
                for i in 0..wanted {
                    let to = at(v4(2), 1000 + (i % DESTINATIONS) as u16);
                    let client = TcpStream::connect(to);
                    let client = client.unwrap_or_else(|error| panic!("after {i} connections: {error}"));
                    // The client closes first and keeps TIME_WAIT.
                    client.shutdown(Shutdown::Both).unwrap();
                }
            })
            .unwrap();
    });
    assert_eq!(mesh.count("captured"), u64::from(wanted));
}

#[test]
fn the_agents_own_connections_are_not_captured() {
    let mesh = Mesh::with(mesh_node::capture::CaptureConfig { exempt_self: true, ..config() });
    let server = serve(mesh.host(2), 80);
    let client = connect(mesh.host(0), at(v4(2), 80)).unwrap();
    assert_eq!(accept(&server).1, canonical(client.local_addr().unwrap()));
    assert_eq!(mesh.count("captured"), 0);
    assert_eq!(mesh.count("dropped_uncaptured"), 0);
}

/// What a connect through io_uring from host 0 came to, and the program that keeps its socket; nothing, with the reason
/// on standard error, where the kernel gives no ring.
fn connect_by_ring(mesh: &Mesh, to: SocketAddr) -> Option<(String, std::process::Child)> {
    use std::io::BufRead;
    use std::process::{Command, Stdio};
    let name = format!("{}-0", mesh.net.prefix);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/kernel/uring.py");
    let mut command = Command::new("ip");
    command.args(["netns", "exec", &name, "python3", script, &to.ip().to_string(), &to.port().to_string()]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    std::io::BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let line = line.trim().to_owned();
    if line.starts_with("io_uring_setup") {
        assert_eq!(child.wait().unwrap().code(), Some(77));
        // Past the test harness, which shows nothing of tests that pass.
        let mut shown = std::io::stderr();
        shown.write_all(format!("skipped: connects through io_uring: {line}\n").as_bytes()).unwrap();
        return None;
    }
    Some((line, child))
}

#[test]
fn a_connect_through_io_uring_is_captured() {
    let mesh = Mesh::new();
    let server = serve(mesh.host(2), 80);
    for to in [at(v4(2), 80), at(v6(2), 80)] {
        let Some((result, mut child)) = connect_by_ring(&mesh, to) else { return };
        assert_eq!(result, "0");
        assert_eq!(captured(&mesh).1, to);
        drop(child.stdin.take());
        assert!(child.wait().unwrap().success());
    }
    assert!(is_idle(&server));
}

#[test]
fn a_connect_through_io_uring_fails_closed_without_an_agent() {
    let mesh = Mesh::with(mesh_node::capture::CaptureConfig { heartbeat: false, ..config() });
    let server = serve(mesh.host(2), 80);
    let Some((result, mut child)) = connect_by_ring(&mesh, at(v4(2), 80)) else { return };
    assert_eq!(result, (-libc::EPERM).to_string());
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
    assert!(is_idle(&server));
}
