//! The test bed: pods with loopback addresses of their own, two agents, an application.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;
use mesh_core::flows::ConnectionId;
use mesh_core::hbone::{ClientConnection, Settings};
use mesh_core::state::{LocalWorkload, MeshOptions, MeshState, StateIndex};
use mesh_core::telemetry::{AccessLog, LogFormat, NodeMetrics, TcpMetrics, Telemetry};
use mesh_core::tls::testing::{Leaf, TestCa};
use mesh_core::tls::{KeyAndCsr, Revocations, WorkloadCertificate};
use mesh_core::xds::proto::security::Authorization;
use mesh_core::xds::proto::workload as wire;
use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::certs::{Authority, Certificates};
use crate::config::Config;
use crate::proxy::limits::{Gauge, Limits};
use crate::proxy::net::PodNet;
use crate::proxy::worker::{Command, Kind, Listeners, Worker};
use crate::proxy::{Pod, Shared};

/// A pod address of its own for each test: 127.64.0.0/10.
pub(crate) fn fresh_ip() -> IpAddr {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let base = (std::process::id() & 0x3FFF) << 8;
    let n = base.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) & 0x3F_FFFF;
    Ipv4Addr::from(0x7F40_0000 | n).into()
}

/// The kernel's part: sources are bound, original destinations are what the test says.
pub(crate) struct Loopback {
    ip: IpAddr,
    original: Arc<Mutex<Option<SocketAddr>>>,
}

fn bound(source: IpAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SocketAddr::new(source, 0).into())?;
    Ok(socket)
}

impl PodNet for Loopback {
    fn original_destination(&self, _: SocketAddr, _: SocketAddr) -> Option<(SocketAddr, ConnectionId)> {
        Some(((*self.original.lock().unwrap())?, ConnectionId(7)))
    }

    fn outbound_socket(&self, _: SocketAddr) -> io::Result<Socket> {
        bound(self.ip)
    }

    fn application_socket(&self, source: IpAddr, _: SocketAddr) -> io::Result<Socket> {
        bound(source)
    }

    // Nothing steers here: clients of these tests dial the listeners.
    fn dialled_listener(&self, _: SocketAddr, _: SocketAddr) -> bool {
        false
    }
}

/// Signs for everybody.
pub(crate) struct Signer {
    pub(crate) ca: Arc<TestCa>,
    /// Revocation lists that certificates are made with.
    pub(crate) revocations: Revocations,
    /// What leaves are to say, where it is not the usual.
    pub(crate) leaf: fn(&mesh_core::identity::SpiffeId) -> Leaf,
}

impl Authority for Signer {
    fn fetch(
        &self,
        identity: &mesh_core::identity::SpiffeId,
    ) -> futures_util::future::LocalBoxFuture<'_, Result<WorkloadCertificate, String>> {
        let key = KeyAndCsr::generate(identity).unwrap();
        let chain = self.ca.sign(key.csr_pem(), &(self.leaf)(identity));
        let made = WorkloadCertificate::new(key, &chain, &self.revocations);
        Box::pin(async move { made.map_err(|e| e.to_string()) })
    }
}

/// One pod with its agent.
pub(crate) struct Node {
    pub(crate) ip: IpAddr,
    pub(crate) shared: Arc<Shared>,
    pub(crate) pod: Arc<Pod>,
    pub(crate) worker: Worker,
    original: Arc<Mutex<Option<SocketAddr>>>,
    outbound: SocketAddr,
    plaintext: SocketAddr,
    pub(crate) candidates: mpsc::Receiver<crate::fastpath::Candidate>,
}

/// What both nodes know: pod `shop/a` on `n1`, `shop/b` on `n2`.
pub(crate) fn mesh(a: IpAddr, b: IpAddr, change: impl FnOnce(&mut StateIndex)) -> MeshState {
    let mut index = StateIndex::new(MeshOptions::default());
    for (name, ip, node) in [("a", a, "n1"), ("b", b, "n2")] {
        let workload = workload(name, ip, node);
        index.apply_address(&workload.uid.clone(), &address(workload)).unwrap();
    }
    change(&mut index);
    MeshState::clone(&index.snapshot())
}

pub(crate) fn workload(name: &str, ip: IpAddr, node: &str) -> wire::Workload {
    let IpAddr::V4(v4) = ip else { unreachable!("the bed is IPv4") };
    wire::Workload {
        uid: format!("Kubernetes//Pod/shop/{name}"),
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        addresses: vec![v4.octets().to_vec()],
        tunnel_protocol: wire::TunnelProtocol::Hbone as i32,
        service_account: name.to_owned(),
        canonical_name: name.to_owned(),
        workload_name: name.to_owned(),
        node: node.to_owned(),
        ..Default::default()
    }
}

pub(crate) fn address(workload: wire::Workload) -> wire::Address {
    wire::Address { r#type: Some(wire::address::Type::Workload(workload)) }
}

/// A policy in `shop` for everybody there.
pub(crate) fn policy(
    name: &str,
    action: i32,
    rules: Vec<mesh_core::xds::proto::security::Rule>,
) -> Authorization {
    Authorization {
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        scope: mesh_core::xds::proto::security::Scope::Namespace as i32,
        action,
        rules,
        ..Default::default()
    }
}

/// A pod without listeners.
pub(crate) fn pod(name: &str, ip: IpAddr, node: &str) -> Arc<Pod> {
    pod_with(name, node, Loopback { ip, original: Arc::default() }, &Gauge::new(Limits::default()))
}

fn pod_with(name: &str, node: &str, net: Loopback, of: &Arc<Gauge>) -> Arc<Pod> {
    Arc::new(Pod {
        uid: name.to_owned(),
        local: LocalWorkload::new("shop", name, name, node),
        label: format!("shop/{name}"),
        net: Box::new(net),
        gauge: of.pod(&format!("shop/{name}")),
        gone: CancellationToken::new(),
        left: CancellationToken::new(),
        leaving: tokio::sync::Notify::new(),
    })
}

fn listen(ip: IpAddr, port: u16) -> std::net::TcpListener {
    let listener = std::net::TcpListener::bind((ip, port)).unwrap();
    listener.set_nonblocking(true).unwrap();
    listener
}

impl Node {
    /// Starts an agent for one pod.
    pub(crate) fn start(
        name: &str,
        node: &str,
        ip: IpAddr,
        state: MeshState,
        signer: Signer,
        config: Config,
    ) -> Self {
        let certificates = certificates(signer, &format!("spiffe://cluster.local/ns/shop/sa/{name}"));
        let (offered, candidates) = mpsc::channel(16);
        let mut config = config;
        node.clone_into(&mut config.node.name);
        let mut registry = prometheus_client::registry::Registry::default();
        let metrics = NodeMetrics::register(&mut registry);
        let dropped = metrics.access_log_dropped.clone();
        let access_log = AccessLog::start(LogFormat::Text, Box::new(io::sink()), dropped).unwrap();
        let shared = Arc::new(Shared {
            state: ArcSwap::from_pointee(state),
            published: watch::channel(0).0,
            certificates,
            telemetry: Telemetry { tcp: TcpMetrics::register(&mut registry), access_log },
            metrics,
            gauge: Gauge::new(Limits {
                node: config.proxy.max_connections,
                per_pod: config.proxy.max_connections_per_pod,
                fair_share: config.proxy.fair_share,
                ..Limits::default()
            }),
            failures: Default::default(),
            candidates: offered,
            fast_path_policies: ArcSwap::default(),
            named: None,
            again: Default::default(),
            drain: CancellationToken::new(),
            config,
        });
        let original = Arc::<Mutex<Option<SocketAddr>>>::default();
        let net = Loopback { ip, original: Arc::clone(&original) };
        let pod = pod_with(name, node, net, &shared.gauge);
        let (outbound, plaintext, hbone) = (listen(ip, 0), listen(ip, 0), listen(ip, 15_008));
        let addresses = (outbound.local_addr().unwrap(), plaintext.local_addr().unwrap());
        let worker = Worker::start(0, Arc::clone(&shared)).unwrap();
        let sockets = vec![(Kind::Outbound, outbound), (Kind::Plaintext, plaintext), (Kind::Hbone, hbone)];
        worker.tell(Command::Add(Arc::clone(&pod), Listeners { sockets }));
        Self { ip, shared, pod, worker, original, outbound: addresses.0, plaintext: addresses.1, candidates }
    }

    /// The application of this pod connects to `to`, captured.
    pub(crate) async fn connect(&self, to: SocketAddr) -> TcpStream {
        self.try_connect(to).await.unwrap()
    }

    /// As [`Node::connect`], for a connection that may be reset before `connect` has returned.
    pub(crate) async fn try_connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        *self.original.lock().unwrap() = Some(to);
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::new(self.ip, 0)).unwrap();
        socket.connect(self.outbound).await
    }

    /// A tunnel from this pod to a peer, made by hand, for requests that our own proxy never sends.
    pub(crate) async fn tunnel(&self, peer: IpAddr, expected: &str) -> ClientConnection {
        let id = format!("spiffe://cluster.local/ns/shop/sa/{}", self.pod.uid).parse().unwrap();
        let certificate =
            self.shared.certificates.wait(&id, std::time::Duration::from_secs(5)).await.unwrap();
        let config = certificate.client_config(&[expected.parse().unwrap()]).unwrap();
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::new(self.ip, 0)).unwrap();
        let tcp = socket.connect(SocketAddr::new(peer, 15_008)).await.unwrap();
        let (tls, _) = mesh_core::tls::connect(config, tcp).await.unwrap();
        let (connection, driver) = ClientConnection::handshake(tls, &Settings::client());
        tokio::task::spawn_local(driver);
        connection
    }

    /// Somebody outside the mesh connects to this pod's plaintext listener.
    pub(crate) async fn plaintext(&self) -> io::Result<TcpStream> {
        TcpStream::connect(self.plaintext).await
    }

    /// The pod leaves the mesh and lives on.
    pub(crate) fn leave(&self) {
        self.pod.left.cancel();
        self.worker.tell(Command::Remove(Arc::clone(&self.pod)));
    }

    /// Whether the listener of captured connections is there: a connection to see would be one more to wait for.
    pub(crate) fn listens(&self) -> bool {
        let IpAddr::V4(ip) = self.ip else { unreachable!("the bed's pods have IPv4") };
        let local =
            format!("{:08X}:{:04X} 00000000:0000 0A", u32::from_ne_bytes(ip.octets()), self.outbound.port());
        std::fs::read_to_string("/proc/net/tcp").unwrap().contains(&local)
    }

    /// Codes of the failures so far, newest first.
    pub(crate) fn codes(&self) -> Vec<String> {
        self.shared.failures.newest().into_iter().map(|f| f.code).collect()
    }

    /// Makes a new snapshot the current one and lets live connections be evaluated again.
    pub(crate) fn publish(&self, state: MeshState) {
        self.shared.publish(Arc::new(state));
        self.worker.tell(Command::Reevaluate);
    }
}

/// A certificate store on a thread of its own, as in the agent.
fn certificates(signer: Signer, identity: &str) -> Certificates {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (certificates, task) = crate::certs::store(signer);
        sender.send(certificates).unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, task);
    });
    let certificates = receiver.recv().unwrap();
    certificates.need(std::collections::BTreeSet::from([identity.parse().unwrap()]));
    certificates
}

/// Two nodes that know each other, and a running echo server in pod `b`.
pub(crate) struct Bed {
    pub(crate) a: Node,
    pub(crate) b: Node,
    pub(crate) echo: SocketAddr,
    pub(crate) ca: Arc<TestCa>,
    /// In force on the side of `b`.
    pub(crate) revocations: Revocations,
}

impl Bed {
    pub(crate) async fn new() -> Self {
        Self::with(Config::default(), |_| ()).await
    }

    pub(crate) async fn with(config: Config, change: impl FnOnce(&mut StateIndex)) -> Self {
        let ca = Arc::new(TestCa::new());
        Self::signed_by(Arc::clone(&ca), ca, Leaf::of, config, change).await
    }

    pub(crate) async fn signed_by(
        ca_a: Arc<TestCa>,
        ca_b: Arc<TestCa>,
        leaf_b: fn(&mesh_core::identity::SpiffeId) -> Leaf,
        config: Config,
        change: impl FnOnce(&mut StateIndex),
    ) -> Self {
        let (ip_a, ip_b) = (fresh_ip(), fresh_ip());
        let state = mesh(ip_a, ip_b, change);
        let revocations = Revocations::default();
        let ca = Arc::clone(&ca_a);
        let signer_a = Signer { ca: ca_a, leaf: Leaf::of, revocations: Revocations::default() };
        let signer_b = Signer { ca: ca_b, leaf: leaf_b, revocations: revocations.clone() };
        let a = Node::start("a", "n1", ip_a, state.clone(), signer_a, config.clone());
        let b = Node::start("b", "n2", ip_b, state, signer_b, config);
        let echo = echo_server(ip_b).await;
        Self { a, b, echo, ca, revocations }
    }
}

/// Echoes what it gets and ends when the client ends; the first bytes are the client's address as it sees it.
pub(crate) async fn echo_server(ip: IpAddr) -> SocketAddr {
    let listener = TcpListener::bind((ip, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, peer)) = listener.accept().await {
            tokio::spawn(async move {
                stream.write_all(format!("{}\n", peer.ip()).as_bytes()).await.ok();
                let (mut read, mut write) = stream.split();
                tokio::io::copy(&mut read, &mut write).await.ok();
                write.shutdown().await.ok();
            });
        }
    });
    address
}

/// Sends `data`, ends the sending side, and returns what came back: the address line and the echo.
pub(crate) async fn exchange(mut stream: TcpStream, data: &[u8]) -> io::Result<(String, Vec<u8>)> {
    let (mut read, mut write) = stream.split();
    let send = async {
        write.write_all(data).await?;
        write.shutdown().await
    };
    let mut received = Vec::new();
    let (sent, _) = tokio::join!(send, read.read_to_end(&mut received));
    sent?;
    let line = received.iter().position(|b| *b == b'\n').unwrap_or(received.len());
    let echo = received.split_off(line);
    Ok((String::from_utf8_lossy(&received).into_owned(), echo.get(1..).unwrap_or_default().to_vec()))
}

/// Waits until `done` holds.
pub(crate) async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while !done() {
        assert!(std::time::Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}
