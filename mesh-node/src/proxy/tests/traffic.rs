use std::sync::Arc;
use std::time::Duration;

use mesh_core::xds::proto::security;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::bed::*;
use crate::config::Config;

#[tokio::test]
async fn an_application_reaches_another_pod_through_the_tunnel_and_is_seen_with_its_own_address() {
    let bed = Bed::new().await;
    let (seen, echo) = exchange(bed.a.connect(bed.echo).await, b"hello").await.unwrap();
    assert_eq!(seen, bed.a.ip.to_string());
    assert_eq!(echo, b"hello");
    let described = bed.a.worker.describe().await;
    assert_eq!(described[0].tunnels, 1, "it went through a tunnel");
}

#[tokio::test]
async fn megabytes_arrive_as_they_were_sent() {
    let bed = Bed::new().await;
    let data: Vec<u8> = (0..8_000_000_u32).map(|n| (n ^ (n >> 8)) as u8).collect();
    let (_, echo) = exchange(bed.a.connect(bed.echo).await, &data).await.unwrap();
    assert!(echo == data, "{} of {} bytes", echo.len(), data.len());
}

#[tokio::test]
async fn many_connections_share_tunnels() {
    let bed = Bed::new().await;
    let mut open = Vec::new();
    for _ in 0..150 {
        let mut stream = bed.a.connect(bed.echo).await;
        stream.read_u8().await.unwrap();
        open.push(stream);
    }
    let described = &bed.a.worker.describe().await[0];
    assert_eq!((described.tunnels, described.streams), (2, 150));
}

#[tokio::test]
async fn a_workload_without_a_tunnel_is_reached_in_plaintext() {
    let bed = Bed::new().await;
    let outside = fresh_ip();
    let echo = echo_server(outside).await;
    let (seen, data) = exchange(bed.a.connect(echo).await, b"plain").await.unwrap();
    assert_eq!((seen, data.as_slice()), (bed.a.ip.to_string(), &b"plain"[..]));
    assert_eq!(bed.a.worker.describe().await[0].tunnels, 0);
}

#[tokio::test]
async fn a_waiting_connection_goes_on_when_its_workload_is_announced() {
    let bed = Bed::new().await;
    let full = mesh_core::state::MeshState::clone(&bed.a.shared.state.load());
    bed.a.publish(mesh_core::state::MeshState::clone(
        &mesh_core::state::StateIndex::new(Default::default()).snapshot(),
    ));
    let stream = bed.a.connect(bed.echo).await;
    let exchange = tokio::spawn(exchange(stream, b"late"));
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!exchange.is_finished());
    bed.a.publish(full);
    assert_eq!(exchange.await.unwrap().unwrap().1, b"late");
}

#[tokio::test]
async fn a_policy_change_ends_the_connections_that_it_no_longer_allows() {
    let bed = Bed::new().await;
    let mut stream = bed.a.connect(bed.echo).await;
    stream.read_u8().await.unwrap();
    bed.b.publish(mesh(bed.a.ip, bed.b.ip, |index| {
        let everything = security::Rule { clauses: vec![] };
        index.apply_policy(&policy("no", security::Action::Deny as i32, vec![everything])).unwrap();
    }));
    let mut rest = Vec::new();
    let ended = stream.read_to_end(&mut rest).await;
    assert!(ended.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset), "the client sees RST");
    until("the failure names the policy", || {
        let failures = bed.b.shared.failures.newest();
        failures
            .iter()
            .any(|f| f.code == "M0402" && f.decided_by.as_deref() == Some("AuthorizationPolicy shop/no"))
    })
    .await;
}

#[tokio::test]
async fn a_policy_change_leaves_the_connections_that_it_allows() {
    let bed = Bed::new().await;
    let mut stream = bed.a.connect(bed.echo).await;
    stream.read_u8().await.unwrap();
    bed.b.publish(mesh(bed.a.ip, bed.b.ip, |index| {
        let principals = vec![security::StringMatch {
            match_type: Some(security::string_match::MatchType::Exact(
                "cluster.local/ns/shop/sa/a".to_owned(),
            )),
        }];
        let matches = vec![security::Match { principals, ..Default::default() }];
        let rule = security::Rule { clauses: vec![security::Clause { matches }] };
        index.apply_policy(&policy("only-a", security::Action::Allow as i32, vec![rule])).unwrap();
    }));
    tokio::time::sleep(Duration::from_millis(200)).await;
    stream.write_all(b"still here").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).await.unwrap();
    assert!(rest.ends_with("still here"), "{rest}");
}

#[tokio::test]
async fn a_pod_that_leaves_the_mesh_keeps_its_open_connections_until_they_end() {
    let bed = Bed::new().await;
    let mut streams = Vec::new();
    for _ in 0..3 {
        let mut stream = bed.a.connect(bed.echo).await;
        stream.read_u8().await.unwrap();
        streams.push(stream);
    }
    let mut last = streams.pop().unwrap();
    for (side, node, stream) in [("client", &bed.a, streams.pop()), ("server", &bed.b, streams.pop())] {
        node.leave();
        // The listeners are closed once nothing can be under way to them, and what they accepted is not.
        until("the listeners' end", || !node.listens()).await;
        let mut stream = stream.unwrap();
        stream.write_all(b"still here").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).await.unwrap();
        assert!(rest.ends_with("still here"), "{side}: {rest}");
    }
    assert!(Arc::strong_count(&bed.a.pod) > 1 && Arc::strong_count(&bed.b.pod) > 1, "one is still open");
    last.write_all(b"bye").await.unwrap();
    drop(last);
    until("nobody holds the pods any more", || {
        Arc::strong_count(&bed.a.pod) == 1 && Arc::strong_count(&bed.b.pod) == 1
    })
    .await;
    assert_eq!(bed.a.codes(), Vec::<String>::new());
}

#[tokio::test]
async fn a_pod_that_has_left_and_ends_takes_its_connections_with_it() {
    let bed = Bed::new().await;
    let mut stream = bed.a.connect(bed.echo).await;
    stream.read_u8().await.unwrap();
    bed.a.leave();
    bed.a.pod.gone.cancel();
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest).await;
    until("the failure says why", || bed.a.codes() == ["M0315"]).await;
}

#[tokio::test]
async fn a_draining_agent_lets_open_connections_go_on() {
    let bed = Bed::new().await;
    let mut stream = bed.a.connect(bed.echo).await;
    stream.read_u8().await.unwrap();
    bed.b.shared.drain.cancel();
    bed.a.shared.drain.cancel();
    tokio::time::sleep(Duration::from_millis(100)).await;
    stream.write_all(b"bye").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).await.unwrap();
    assert!(rest.ends_with("bye"), "{rest}");
}

#[tokio::test]
async fn two_pods_of_one_node_are_offered_for_the_fast_path_once_the_tunnel_worked() {
    let ca = std::sync::Arc::new(mesh_core::tls::testing::TestCa::new());
    let leaf = mesh_core::tls::testing::Leaf::of;
    let (ip_a, ip_b) = (fresh_ip(), fresh_ip());
    let mut index = mesh_core::state::StateIndex::new(Default::default());
    for (name, ip) in [("a", ip_a), ("b", ip_b)] {
        let workload = workload(name, ip, "n1");
        index.apply_address(&workload.uid.clone(), &address(workload)).unwrap();
    }
    let state = mesh_core::state::MeshState::clone(&index.snapshot());
    let signer = || Signer { ca: std::sync::Arc::clone(&ca), leaf, revocations: Default::default() };
    let mut a = Node::start("a", "n1", ip_a, state.clone(), signer(), Config::default());
    let _b = Node::start("b", "n1", ip_b, state, signer(), Config::default());
    let echo = echo_server(ip_b).await;
    exchange(a.connect(echo).await, b"x").await.unwrap();
    let offered = a.candidates.recv().await.unwrap();
    assert_eq!((offered.source, offered.destination), (ip_a, echo));
}

#[tokio::test]
async fn a_drained_agent_lets_idle_tunnels_of_its_peers_go() {
    let bed = Bed::new().await;
    exchange(bed.a.connect(bed.echo).await, b"x").await.unwrap();
    assert_eq!(bed.b.pod.gauge.open(), 1, "the tunnel itself");
    bed.b.shared.drain.cancel();
    until("the tunnel is gone", || bed.b.pod.gauge.open() == 0).await;
}

/// `mesh` with a service at `vip:80` whose endpoints are `b` and, at `dead`, a workload where nobody listens.
fn with_service(bed: &Bed, vip: std::net::IpAddr, dead: std::net::IpAddr) -> mesh_core::state::MeshState {
    with_service_at(bed, vip, [("b", bed.b.ip), ("c", dead)])
}

fn with_service_at(
    bed: &Bed,
    vip: std::net::IpAddr,
    endpoints: [(&str, std::net::IpAddr); 2],
) -> mesh_core::state::MeshState {
    use mesh_core::xds::proto::workload as wire;
    let octets = |ip: std::net::IpAddr| match ip {
        std::net::IpAddr::V4(v4) => v4.octets().to_vec(),
        std::net::IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    let port = wire::Port { service_port: 80, target_port: bed.echo.port().into(), ..Default::default() };
    let service = wire::Service {
        name: "echo".to_owned(),
        namespace: "shop".to_owned(),
        hostname: "echo.shop.svc.cluster.local".to_owned(),
        addresses: vec![wire::NetworkAddress { address: octets(vip), ..Default::default() }],
        ports: vec![port],
        ..Default::default()
    };
    let key = "shop/echo.shop.svc.cluster.local".to_owned();
    mesh(bed.a.ip, bed.b.ip, |index| {
        let service = wire::Address { r#type: Some(wire::address::Type::Service(service)) };
        index.apply_address(&key, &service).unwrap();
        for (name, ip) in endpoints {
            let mut endpoint = workload(name, ip, "n2");
            endpoint.services.insert(key.clone(), wire::PortList { ports: vec![port] });
            index.apply_address(&endpoint.uid.clone(), &address(endpoint)).unwrap();
        }
    })
}

#[tokio::test]
async fn an_endpoint_that_does_not_take_the_connection_is_passed_over_for_another() {
    let bed = Bed::new().await;
    let (vip, dead) = (fresh_ip(), fresh_ip());
    bed.a.publish(with_service(&bed, vip, dead));
    for _ in 0..12 {
        let (_, echo) = exchange(bed.a.connect((vip, 80).into()).await, b"x").await.unwrap();
        assert_eq!(echo, b"x");
    }
    assert!(bed.a.codes().is_empty(), "no connection failed for want of the other endpoint");
}

#[tokio::test]
async fn an_endpoint_that_does_not_answer_costs_a_second_once_and_is_passed_over_then() {
    let bed = Bed::new().await;
    let (vip, mute) = (fresh_ip(), fresh_ip());
    // The kernel takes connections for it; nobody ever answers the handshake.
    let _mute = std::net::TcpListener::bind((mute, 15_008)).unwrap();
    bed.a.publish(with_service(&bed, vip, mute));
    let mut slow = 0;
    for _ in 0..20 {
        let begin = std::time::Instant::now();
        let (_, echo) = exchange(bed.a.connect((vip, 80).into()).await, b"x").await.unwrap();
        assert_eq!(echo, b"x");
        slow += usize::from(begin.elapsed() > Duration::from_millis(900));
        assert!(begin.elapsed() < Duration::from_secs(4), "it took {:?}", begin.elapsed());
    }
    assert!(slow <= 1, "{slow} connections waited for it");
    assert!(bed.a.codes().is_empty(), "no connection failed");
}

#[tokio::test]
async fn when_every_endpoint_failed_lately_they_are_tried_all_the_same() {
    let bed = Bed::new().await;
    let (vip, other) = (fresh_ip(), fresh_ip());
    bed.a.publish(with_service_at(&bed, vip, [("b", fresh_ip()), ("c", other)]));
    let read = async { bed.a.try_connect((vip, 80).into()).await?.read_u8().await };
    assert!(read.await.is_err(), "nobody is at either address");
    bed.a.publish(with_service(&bed, vip, other));
    let (_, echo) = exchange(bed.a.connect((vip, 80).into()).await, b"x").await.unwrap();
    assert_eq!(echo, b"x");
}

#[tokio::test]
async fn when_no_endpoint_takes_the_connection_the_failure_says_why_the_last_one_did_not() {
    let bed = Bed::new().await;
    let (vip, dead) = (fresh_ip(), fresh_ip());
    bed.a.publish(with_service(&bed, vip, dead));
    bed.b.pod.gone.cancel();
    until("b's listeners are gone", || std::net::TcpStream::connect((bed.b.ip, 15_008)).is_err()).await;
    let read = async { bed.a.try_connect((vip, 80).into()).await?.read_u8().await };
    assert_eq!(read.await.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    until("reported", || !bed.a.codes().is_empty()).await;
    assert_eq!(bed.a.codes(), ["M0316"]);
}
