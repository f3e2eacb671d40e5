//! The first bytes of a connection, sent before the peer has taken it. The peers are `h2` servers that follow a script.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::{Response, StatusCode};
use mesh_core::state::StateIndex;
use mesh_core::tls::Revocations;
use mesh_core::tls::testing::{Leaf, TestCa};
use mesh_core::xds::proto::workload as wire;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Notify;

use super::bed::*;
use crate::config::Config;

/// What a peer does with a CONNECT whose data came before its answer. It takes every other one, and echoes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Script {
    Take,
    Refuse,
    Break,
    SayNothing,
}

/// What a peer was sent: before its answer, and after it.
#[derive(Default)]
struct Seen {
    early: Vec<Vec<u8>>,
    late: Vec<Vec<u8>>,
}

const SERVICE: SocketAddr = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::new(10, 96, 0, 7)), 80);

/// A node that follows a script.
fn peer(ca: &TestCa, name: &str, ip: IpAddr, script: Script) -> Arc<Mutex<Seen>> {
    let seen = Arc::<Mutex<Seen>>::default();
    let identity = format!("spiffe://cluster.local/ns/shop/sa/{name}").parse().unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(ca.issue(&identity).server_config());
    let listener = std::net::TcpListener::bind((ip, 15_008)).unwrap();
    listener.set_nonblocking(true).unwrap();
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    let log = Arc::clone(&seen);
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let (acceptor, log) = (acceptor.clone(), Arc::clone(&log));
            tokio::spawn(async move {
                let tls = acceptor.accept(tcp).await.unwrap();
                let mut server = h2::server::handshake(tls).await.unwrap();
                let broken = Arc::new(Notify::new());
                loop {
                    let next = tokio::select! {
                        next = server.accept() => next,
                        () = broken.notified() => return,
                    };
                    let Some(Ok((request, respond))) = next else { return };
                    let (log, broken) = (Arc::clone(&log), Arc::clone(&broken));
                    tokio::spawn(play(request.into_body(), respond, script, log, broken));
                }
            });
        }
    });
    seen
}

async fn play(
    mut body: RecvStream,
    mut respond: SendResponse<Bytes>,
    script: Script,
    log: Arc<Mutex<Seen>>,
    broken: Arc<Notify>,
) {
    let early = tokio::time::timeout(Duration::from_millis(200), body.data()).await;
    let early = early.ok().flatten().map(Result::unwrap);
    let mut answer = |status| {
        let end = status != StatusCode::OK;
        respond.send_response(Response::builder().status(status).body(()).unwrap(), end).unwrap()
    };
    if let Some(data) = &early {
        log.lock().unwrap().early.push(data.to_vec());
        match script {
            Script::Take => {}
            Script::Refuse => return drop(answer(StatusCode::SERVICE_UNAVAILABLE)),
            Script::Break => return broken.notify_one(),
            Script::SayNothing => return std::future::pending().await,
        }
    }
    let mut send = answer(StatusCode::OK);
    let mut next = early.clone();
    loop {
        let data = match next.take() {
            Some(data) => data,
            None => match body.data().await {
                Some(Ok(data)) => {
                    log.lock().unwrap().late.push(data.to_vec());
                    data
                }
                _ => break,
            },
        };
        let _ = body.flow_control().release_capacity(data.len());
        send.send_data(data, false).unwrap();
    }
    let _ = send.send_data(Bytes::new(), true);
}

/// Pod `a` with a real agent, and a service with scripted endpoints.
struct Stage {
    a: Node,
    seen: Vec<Arc<Mutex<Seen>>>,
    pod: SocketAddr,
}

impl Stage {
    fn new(scripts: &[Script], config: Config) -> Self {
        let ca = Arc::new(TestCa::new());
        let ip = fresh_ip();
        let peers: Vec<(String, IpAddr)> =
            (0..scripts.len()).map(|n| (format!("p{n}"), fresh_ip())).collect();
        let state = mesh(ip, fresh_ip(), |index| {
            add_service(index);
            for (name, ip) in &peers {
                add_endpoint(index, name, *ip);
            }
        });
        let seen = peers.iter().zip(scripts).map(|((name, ip), script)| peer(&ca, name, *ip, *script));
        let seen = seen.collect();
        let signer = Signer { ca, leaf: Leaf::of, revocations: Revocations::default() };
        let a = Node::start("a", "n1", ip, state, signer, config);
        Self { a, seen, pod: SocketAddr::new(peers[0].1, 80) }
    }

    /// Connects and speaks at once; what comes back.
    async fn say(&self, to: SocketAddr, what: &[u8]) -> std::io::Result<Vec<u8>> {
        let mut stream = self.a.connect(to).await;
        stream.write_all(what).await?;
        let mut echo = vec![0; what.len()];
        stream.read_exact(&mut echo).await?;
        Ok(echo)
    }

    /// Connects until bytes have come early to one of the peers: bytes are sent so only on a tunnel that is busy, and
    /// when the application is quick enough. What came back then, and after how long.
    async fn until_early(&self, to: SocketAddr) -> (Vec<u8>, std::io::Result<Vec<u8>>, Duration) {
        let deadline = Instant::now() + Duration::from_secs(20);
        for n in 0_u32.. {
            assert!(Instant::now() < deadline, "no bytes came early");
            let what = format!("request {n}").into_bytes();
            let began = Instant::now();
            let answer = tokio::time::timeout(Duration::from_secs(15), self.say(to, &what)).await;
            if self.early().contains(&what) {
                let silent = || Err(std::io::ErrorKind::TimedOut.into());
                return (what, answer.unwrap_or_else(|_| silent()), began.elapsed());
            }
            assert_eq!(answer.unwrap().unwrap(), what);
        }
        unreachable!("the loop ends before")
    }

    fn early(&self) -> Vec<Vec<u8>> {
        self.seen.iter().flat_map(|seen| seen.lock().unwrap().early.clone()).collect()
    }

    /// How many peers have got these bytes, early or late.
    fn deliveries(&self, what: &[u8]) -> usize {
        let count = |seen: &Arc<Mutex<Seen>>| {
            let seen = seen.lock().unwrap();
            seen.early.iter().chain(&seen.late).filter(|data| *data == what).count()
        };
        self.seen.iter().map(count).sum()
    }
}

fn add_service(index: &mut StateIndex) {
    let IpAddr::V4(vip) = SERVICE.ip() else { unreachable!("it is IPv4") };
    let service = wire::Service {
        name: "pay".to_owned(),
        namespace: "shop".to_owned(),
        hostname: "pay.shop.svc.cluster.local".to_owned(),
        addresses: vec![wire::NetworkAddress { address: vip.octets().to_vec(), ..Default::default() }],
        ports: vec![wire::Port { service_port: 80, target_port: 80, ..Default::default() }],
        ..Default::default()
    };
    let address = wire::Address { r#type: Some(wire::address::Type::Service(service)) };
    index.apply_address("shop/pay.shop.svc.cluster.local", &address).unwrap();
}

fn add_endpoint(index: &mut StateIndex, name: &str, ip: IpAddr) {
    let mut pod = workload(name, ip, "n2");
    let ports = vec![wire::Port { service_port: 80, target_port: 80, ..Default::default() }];
    pod.services.insert("shop/pay.shop.svc.cluster.local".to_owned(), wire::PortList { ports });
    index.apply_address(&pod.uid.clone(), &address(pod)).unwrap();
}

#[tokio::test(flavor = "local")]
async fn the_first_bytes_go_with_the_connect_and_arrive_once() {
    let stage = Stage::new(&[Script::Take], Config::default());
    let (what, answer, _) = stage.until_early(stage.pod).await;
    assert_eq!(answer.unwrap(), what);
    assert_eq!(stage.deliveries(&what), 1);
}

#[tokio::test(flavor = "local")]
async fn an_endpoint_that_refuses_has_not_delivered_them_so_that_they_go_to_another() {
    let stage = Stage::new(&[Script::Refuse, Script::Refuse, Script::Take], Config::default());
    for _ in 0..3 {
        let (what, answer, _) = stage.until_early(SERVICE).await;
        assert_eq!(answer.unwrap(), what, "another endpoint has answered");
    }
}

#[tokio::test(flavor = "local")]
async fn an_endpoint_that_breaks_may_have_delivered_them_so_that_they_go_nowhere_else() {
    let stage = Stage::new(&[Script::Break, Script::Break], Config::default());
    let (what, answer, _) = stage.until_early(SERVICE).await;
    assert_eq!(answer.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    assert_eq!(stage.deliveries(&what), 1);
}

#[tokio::test(flavor = "local")]
async fn an_endpoint_that_says_nothing_keeps_them() {
    let stage = Stage::new(&[Script::SayNothing, Script::SayNothing], Config::default());
    let (what, answer, _) = stage.until_early(SERVICE).await;
    assert_eq!(answer.unwrap_err().kind(), std::io::ErrorKind::TimedOut);
    assert_eq!(stage.deliveries(&what), 1);
}

#[tokio::test(flavor = "local")]
async fn nothing_is_sent_early_where_it_is_turned_off() {
    let mut config = Config::default();
    config.proxy.early_data = false;
    let stage = Stage::new(&[Script::Refuse], config);
    for n in 0..5 {
        let what = format!("request {n}").into_bytes();
        assert_eq!(stage.say(stage.pod, &what).await.unwrap(), what);
    }
    assert!(stage.early().is_empty());
}
