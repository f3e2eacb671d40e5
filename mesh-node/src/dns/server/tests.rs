//! The thread on real sockets on loopback, with a small name server of our own as the one that was asked.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use std::{io, thread};

use arc_swap::ArcSwap;
use hickory_proto::op::{Edns, Message, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use mesh_core::telemetry::NodeMetrics;
use prometheus_client::registry::Registry;

use super::*;
use crate::dns::samples::{mesh, pod as sample_pod, service};
use crate::dns::{ClusterDomain, Transport};
use crate::sys::udp::Datagram;

mod upstream;
use upstream::Upstream;

/// Waits no longer than this for anything.
const PATIENCE: Duration = Duration::from_secs(20);

/// Loopback as a pod's network: everything was meant for one server.
struct Loopback {
    udp: UdpSocket,
    asked: Mutex<Option<SocketAddr>>,
    /// Sockets that were made to ask other servers.
    made: AtomicUsize,
}

impl PodNetwork for Loopback {
    fn udp(&self, _server: SocketAddr) -> io::Result<UdpSocket> {
        self.made.fetch_add(1, Ordering::Relaxed);
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    }

    fn tcp(&self, _server: SocketAddr) -> io::Result<TcpStream> {
        self.made.fetch_add(1, Ordering::Relaxed);
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        Ok(socket.into())
    }

    fn receive(&self, _socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Datagram> {
        let (length, peer) = self.udp.recv_from(buffer)?;
        Ok(Datagram { length, peer, local: self.udp.local_addr()? })
    }

    fn reply(&self, answer: &[u8], _from: SocketAddr, to: SocketAddr) -> io::Result<()> {
        self.udp.send_to(answer, to).map(|_| ())
    }

    fn asked(&self, _transport: Transport, _local: SocketAddr, _peer: SocketAddr) -> Option<SocketAddr> {
        *self.asked.lock().unwrap()
    }
}

/// A running proxy with one pod, and the name server behind it.
struct Bench {
    server: Option<Server>,
    handle: Option<PodHandle>,
    network: Arc<Loopback>,
    upstream: Upstream,
    udp: SocketAddr,
    tcp: SocketAddr,
    state: Arc<ArcSwap<MeshState>>,
    registry: Registry,
}

fn bench() -> Bench {
    bench_with(Limits::default(), Vec::new())
}

fn bench_with(limits: Limits, fallback: Vec<SocketAddr>) -> Bench {
    let headless = "shop/db.shop.svc.cluster.local";
    let endpoints = (1..=100).map(|i| sample_pod(&format!("db-{i}"), &[&format!("10.1.0.{i}")], &[headless]));
    let services = vec![
        service("shop", "cart.shop.svc.cluster.local", &["10.96.0.1", "fd00::1"]),
        service("shop", "api.example.com", &["240.240.0.1"]),
        service("shop", "db.shop.svc.cluster.local", &[]),
    ];
    let state = Arc::new(ArcSwap::new(mesh(services, endpoints.collect())));
    let domain = ClusterDomain::new("cluster.local");
    let search = domain.default_search("shop");
    let mut registry = Registry::default();
    let node = NodeMetrics::register(&mut registry);
    let metrics = Metrics::register(&node, &mut registry);
    let settings = Settings { rules: Rules { domain, preferred_namespace: None }, fallback, limits };
    let snapshots = state.clone();
    let server = Server::start(settings, Arc::new(move || snapshots.load_full()), metrics).unwrap();

    let upstream = Upstream::start();
    let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    udp.set_nonblocking(true).unwrap();
    let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    tcp.set_nonblocking(true).unwrap();
    let (udp_address, tcp_address) = (udp.local_addr().unwrap(), tcp.local_addr().unwrap());
    let network = Arc::new(Loopback {
        udp: udp.try_clone().unwrap(),
        asked: Mutex::new(Some(upstream.address)),
        made: AtomicUsize::new(0),
    });
    let local = LocalWorkload::new("shop", "client", "client", "n1");
    let handle = server.serve(Pod { local, search, udp, tcp, network: network.clone() }).unwrap();
    Bench {
        server: Some(server),
        handle: Some(handle),
        network,
        upstream,
        udp: udp_address,
        tcp: tcp_address,
        state,
        registry,
    }
}

fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

fn with_edns(mut query: Message, payload: u16) -> Message {
    let mut edns = Edns::new();
    edns.set_max_payload(payload);
    query.set_edns(edns);
    query
}

fn client(server: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    socket.connect(server).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn receive(socket: &UdpSocket) -> Message {
    let mut buffer = vec![0; 65_535];
    let length = socket.recv(&mut buffer).unwrap();
    Message::from_vec(&buffer[..length]).unwrap()
}

impl Bench {
    fn udp(&self, query: &Message) -> Message {
        let socket = client(self.udp);
        socket.send(&query.to_vec().unwrap()).unwrap();
        let reply = receive(&socket);
        assert_eq!(reply.metadata.id, query.metadata.id);
        reply
    }

    fn tcp(&self, query: &Message) -> Message {
        let reply = exchange(&mut self.connect(), &query.to_vec().unwrap()).unwrap();
        let reply = Message::from_vec(&reply).unwrap();
        assert_eq!(reply.metadata.id, query.metadata.id);
        reply
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.tcp).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn metrics(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        text
    }

    /// The value of the first sample whose name and labels contain all of `parts`.
    fn metric(&self, parts: &[&str]) -> Option<String> {
        let text = self.metrics();
        let line =
            text.lines().find(|line| !line.starts_with('#') && parts.iter().all(|p| line.contains(p)))?;
        line.rsplit(' ').next().map(str::to_owned)
    }

    fn ask_upstream(&self, answer: Option<SocketAddr>) {
        *self.network.asked.lock().unwrap() = answer;
    }
}

fn exchange(stream: &mut TcpStream, query: &[u8]) -> io::Result<Vec<u8>> {
    upstream::write(stream, query)?;
    upstream::read(stream)
}

fn addresses(message: &Message) -> Vec<String> {
    let mut all: Vec<_> = message.answers.iter().map(|record| record.data.to_string()).collect();
    all.sort();
    all
}

fn eventually(what: &str, holds: impl Fn() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < until, "never: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_name_of_the_mesh_is_answered_over_udp_and_tcp_without_asking_anybody() {
    let bench = bench();
    let query = query("cart.shop.svc.cluster.local.", RecordType::A);
    for reply in [bench.udp(&query), bench.tcp(&query)] {
        assert_eq!(addresses(&reply), ["10.96.0.1"]);
        assert!(reply.metadata.authoritative);
    }
    assert_eq!(bench.network.made.load(Ordering::Relaxed), 0);
    for protocol in ["udp", "tcp"] {
        let labels = [
            "istio_dns_requests_total",
            "request_query_type=\"A\"",
            &format!("request_protocol=\"{protocol}\""),
            "source_canonical_service=\"client\"",
            "source_canonical_revision=\"v1\"",
        ];
        assert_eq!(bench.metric(&labels).as_deref(), Some("1"), "{}", bench.metrics());
    }
}

#[test]
fn another_name_is_answered_by_the_server_that_was_asked() {
    let bench = bench();
    let query = query("somewhere.example.", RecordType::A);
    for reply in [bench.udp(&query), bench.tcp(&query)] {
        assert_eq!(addresses(&reply), ["192.0.2.7"]);
        assert!(!reply.metadata.authoritative, "what the server says is passed on as it is");
    }
    assert_eq!(
        bench.upstream.queries(),
        [("somewhere.example.".to_owned(), "udp"), ("somewhere.example.".to_owned(), "tcp")]
    );
    for family in ["istio_dns_upstream_requests_total", "istio_dns_upstream_request_duration_seconds_count"] {
        assert_eq!(
            bench.metric(&[family, "request_protocol=\"udp\""]).as_deref(),
            Some("1"),
            "{}",
            bench.metrics()
        );
    }
    assert_eq!(bench.metric(&["istio_dns_upstream_failures_total"]), None);
}

#[test]
fn other_types_of_known_names_are_forwarded() {
    let bench = bench();
    let reply = bench.udp(&query("cart.shop.svc.cluster.local.", RecordType::TXT));
    assert_eq!(addresses(&reply), ["from upstream"]);
}

#[test]
fn the_codes_of_the_server_are_passed_on() {
    let bench = bench();
    for (name, code) in [
        ("nxdomain.example.", ResponseCode::NXDomain),
        ("refused.example.", ResponseCode::Refused),
        ("servfail.example.", ResponseCode::ServFail),
    ] {
        assert_eq!(bench.udp(&query(name, RecordType::A)).metadata.response_code, code);
        assert_eq!(bench.tcp(&query(name, RecordType::A)).metadata.response_code, code);
    }
}

#[test]
fn an_answer_that_a_datagram_cannot_hold_is_truncated_and_whole_over_tcp() {
    let bench = bench();
    let query = query("db.shop.svc.cluster.local.", RecordType::A);
    let short = bench.udp(&query);
    assert!(short.metadata.truncation && !short.answers.is_empty() && short.answers.len() < 100);
    let whole = bench.tcp(&query);
    assert!(!whole.metadata.truncation);
    assert_eq!(whole.answers.len(), 100);
    let large = bench.udp(&with_edns(query, 4096));
    assert!(!large.metadata.truncation && large.answers.len() == 100);
}

#[test]
fn a_truncated_answer_of_the_server_is_fetched_whole_if_the_client_can_take_it() {
    let bench = bench();
    let large = query("large.example.", RecordType::A);
    let reply = bench.udp(&with_edns(large.clone(), 4096));
    assert!(!reply.metadata.truncation);
    assert_eq!(reply.answers.len(), 60);
    let reply = bench.udp(&large);
    assert!(reply.metadata.truncation, "512 bytes do not hold it: the client asks over TCP itself");
    assert_eq!(bench.tcp(&large).answers.len(), 60);
}

#[test]
fn guesses_of_others_are_not_taken_for_the_answer() {
    let bench = bench();
    let reply = bench.udp(&query("spoofed.example.", RecordType::A));
    assert_eq!(addresses(&reply), ["192.0.2.7"]);
}

#[test]
fn a_server_that_is_silent_once_is_asked_again() {
    let bench = bench();
    assert_eq!(addresses(&bench.udp(&query("lossy.example.", RecordType::A))), ["192.0.2.7"]);
    assert_eq!(bench.upstream.queries().len(), 2);
}

#[test]
fn a_server_that_never_answers_or_refuses_is_a_server_failure() {
    let bench = bench();
    let reply = bench.udp(&query("silent.example.", RecordType::A));
    assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(reply.queries.len(), 1);

    let nobody = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
    bench.ask_upstream(Some(nobody));
    for reply in
        [bench.udp(&query("a.example.", RecordType::A)), bench.tcp(&query("a.example.", RecordType::A))]
    {
        assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
    }
    assert_eq!(
        bench.metric(&["istio_dns_upstream_failures_total", "request_protocol=\"udp\""]).as_deref(),
        Some("2"),
        "{}",
        bench.metrics()
    );
}

#[test]
fn without_a_record_of_who_was_asked_the_agents_own_servers_are() {
    let own = Upstream::start();
    let bench = bench_with(Limits::default(), vec![own.address]);
    bench.ask_upstream(None);
    assert_eq!(addresses(&bench.udp(&query("a.example.", RecordType::A))), ["192.0.2.7"]);
    assert_eq!((own.queries().len(), bench.upstream.queries().len()), (1, 0));

    let bench = self::bench();
    bench.ask_upstream(None);
    let reply = bench.udp(&query("a.example.", RecordType::A));
    assert_eq!(reply.metadata.response_code, ResponseCode::ServFail, "there are none");
}

#[test]
fn a_pod_that_the_mesh_does_not_know_yet_gets_server_failures() {
    let bench = bench();
    let known = bench.state.swap(Arc::default());
    let query = query("cart.shop.svc.cluster.local.", RecordType::A);
    assert_eq!(bench.udp(&query).metadata.response_code, ResponseCode::ServFail);
    assert_eq!(bench.metric(&["source_canonical_service=\"unknown\""]).as_deref(), Some("1"));
    bench.state.store(known);
    assert_eq!(bench.udp(&query).metadata.response_code, ResponseCode::NoError);
}

#[test]
fn broken_queries_are_counted_and_answered_or_dropped_and_the_next_one_is_served() {
    let bench = bench();
    let good = query("cart.shop.svc.cluster.local.", RecordType::A).to_vec().unwrap();
    let socket = client(bench.udp);
    let mut response = good.clone();
    response[2] |= 0x80;
    for dropped in [&b""[..], b"short", &response] {
        socket.send(dropped).unwrap();
    }
    let mut questions = good.clone();
    questions[5] = 2;
    let mut looping = good[..12].to_vec();
    looping.extend([0xc0, 12, 0, 1, 0, 1]);
    for broken in [&questions, &looping] {
        socket.send(broken).unwrap();
        assert_eq!(receive(&socket).metadata.response_code, ResponseCode::FormErr);
    }
    socket.send(&vec![0; 60_000]).unwrap();
    assert_eq!(receive(&socket).metadata.response_code, ResponseCode::FormErr);
    socket.send(&good).unwrap();
    assert_eq!(addresses(&receive(&socket)), ["10.96.0.1"], "the dropped ones had no answer");
    for (reason, count) in [("short", "2"), ("response", "1"), ("question_count", "2"), ("malformed", "1")] {
        let labels = ["undermesh_dns_refused_total", &format!("reason=\"{reason}\"")];
        assert_eq!(bench.metric(&labels).as_deref(), Some(count), "{reason}: {}", bench.metrics());
    }
}

#[test]
fn a_connection_serves_many_queries_in_order() {
    let bench = bench();
    let mut stream = bench.connect();
    let names = ["cart.", "somewhere.example.", "api.example.com.shop.svc.cluster.local."];
    let queries = names.map(|name| query(name, RecordType::A));
    for query in &queries {
        upstream::write(&mut stream, &query.to_vec().unwrap()).unwrap();
    }
    for query in &queries {
        let reply = Message::from_vec(&upstream::read(&mut stream).unwrap()).unwrap();
        assert_eq!(reply.metadata.id, query.metadata.id);
        assert!(!reply.answers.is_empty());
    }
}

#[test]
fn broken_bytes_on_a_connection_end_only_that_connection() {
    use std::io::{Read as _, Write as _};
    let bench = bench();
    let mut stream = bench.connect();
    stream.write_all(&[0, 0]).unwrap();
    assert_eq!(stream.read(&mut [0; 16]).unwrap(), 0, "an empty message is no query");
    let mut stream = bench.connect();
    stream.write_all(&[0, 20, 1, 2, 3]).unwrap();
    drop(stream);
    assert_eq!(bench.tcp(&query("cart.", RecordType::A)).answers.len(), 1);
}

#[test]
fn a_connection_that_says_nothing_is_closed() {
    use std::io::Read as _;
    let bench = bench();
    let started = Instant::now();
    let mut stream = bench.connect();
    assert_eq!(stream.read(&mut [0; 16]).unwrap(), 0);
    assert!(started.elapsed() >= Duration::from_secs(4), "after the time that a request has");
}

#[test]
fn a_zone_transfer_is_passed_on_to_its_end() {
    let bench = bench();
    let mut stream = bench.connect();
    upstream::write(&mut stream, &query("zone.example.", RecordType::AXFR).to_vec().unwrap()).unwrap();
    let mut messages = 0;
    while upstream::read(&mut stream).is_ok() {
        messages += 1;
    }
    assert_eq!(messages, 3);
}

#[test]
fn a_flood_of_queries_is_bounded_and_names_of_the_mesh_are_still_answered() {
    let limits = Limits { waiting_per_pod: 20, sockets_per_pod: 4, ..Limits::default() };
    let bench = bench_with(limits, Vec::new());
    let socket = client(bench.udp);
    for _ in 0..100 {
        socket.send(&query("silent.example.", RecordType::A).to_vec().unwrap()).unwrap();
    }
    for _ in 0..80 {
        assert_eq!(receive(&socket).metadata.response_code, ResponseCode::ServFail);
    }
    assert_eq!(addresses(&bench.udp(&query("cart.", RecordType::A))), ["10.96.0.1"], "while 20 still wait");
    assert!(bench.network.made.load(Ordering::Relaxed) <= 4, "sockets at once");
    assert_eq!(bench.metric(&["undermesh_dns_refused_total", "reason=\"limit\""]).as_deref(), Some("80"));
}

#[test]
fn connections_beyond_the_limit_are_reset() {
    use std::io::Read as _;
    let bench = bench_with(Limits { connections_per_pod: 1, ..Limits::default() }, Vec::new());
    let mut first = bench.connect();
    let cart = query("cart.", RecordType::A).to_vec().unwrap();
    assert!(exchange(&mut first, &cart).is_ok());
    let error = bench.connect().read(&mut [0; 16]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    drop(first);
    eventually("the place is free again", || exchange(&mut bench.connect(), &cart).is_ok());
}

#[test]
fn a_pod_that_leaves_is_answered_what_it_has_asked_and_then_no_more() {
    let mut bench = bench();
    let socket = client(bench.udp);
    socket.send(&query("slow.example.", RecordType::A).to_vec().unwrap()).unwrap();
    eventually("it is forwarded", || !bench.upstream.queries().is_empty());
    drop(bench.handle.take());
    assert_eq!(addresses(&receive(&socket)), ["192.0.2.7"]);
    eventually("the listener is closed", || TcpStream::connect(bench.tcp).is_err());
    drop(bench.server.take());
}

#[test]
fn dig_sees_what_the_applications_see() {
    let bench = bench();
    let dig = |arguments: &[&str]| {
        let server = format!("@{}", bench.udp.ip());
        let port = if arguments.contains(&"+tcp") { bench.tcp.port() } else { bench.udp.port() };
        let output = std::process::Command::new("dig")
            .args([
                &server,
                "-p",
                &port.to_string(),
                "+noall",
                "+comments",
                "+answer",
                "+tries=1",
                "+time=10",
            ])
            .args(arguments)
            .output()
            .expect("dig is installed (Debian: bind9-dnsutils)");
        let text = String::from_utf8(output.stdout).unwrap();
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    let out = dig(&["cart.shop.svc.cluster.local", "AAAA"]);
    assert!(
        out.contains("status: NOERROR") && out.contains("flags: qr aa rd ra") && out.contains("fd00::1"),
        "{out}"
    );
    let out = dig(&["api.example.com.shop.svc.cluster.local"]);
    assert!(out.contains("30 IN CNAME api.example.com.") && out.contains("30 IN A 240.240.0.1"), "{out}");
    let out = dig(&["+ignore", "+noedns", "db.shop.svc.cluster.local"]);
    assert!(out.contains("flags: qr aa tc rd ra"), "{out}");
    let out = dig(&["+tcp", "db.shop.svc.cluster.local"]);
    assert!(out.contains("ANSWER: 100") && !out.contains(" tc "), "{out}");
    let out = dig(&["nxdomain.example"]);
    assert!(out.contains("status: NXDOMAIN"), "{out}");
    let out = dig(&["+edns=1", "+noednsneg", "cart.shop.svc.cluster.local"]);
    assert!(out.contains("status: BADVERS"), "{out}");
}
