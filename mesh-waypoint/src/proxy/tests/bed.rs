//! A waypoint, applications behind it and a client before it, on loopback addresses of their own.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use clap::Parser as _;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use mesh_core::hbone::stream::TunnelIo;
use mesh_core::hbone::{self, Authority, ClientConnection, ConnectRequest, ServerConnection, Settings};
use mesh_core::identity::SpiffeId;
use mesh_core::state::StateIndex;
use mesh_core::telemetry::{AccessLog, LogFormat, RequestMetrics, TcpMetrics, scrape};
use mesh_core::tls;
use mesh_core::tls::testing::TestCa;
use mesh_core::xds::proto::l7;
use mesh_core::xds::proto::workload as wire;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::LocalSet;

use crate::cli::RunArgs;
use crate::config::{Changed, Own, Resources, Snapshot};
use crate::proxy::http::LocalExec;
use crate::proxy::worker::Local;
use crate::proxy::{Shared, inbound, spans};
use crate::security::jwks::{KeyStore, Roots};
use crate::telemetry::Telemetry;

pub(super) const PATIENCE: Duration = Duration::from_secs(20);
/// Of the service `web.shop`.
pub(super) const VIP: &str = "240.0.0.1:80";
pub(super) const WEB: &str = "web.shop.svc.cluster.local";

/// Runs a test on a worker's kind of runtime, within a time.
pub(super) fn run(test: impl Future<Output = ()>) {
    run_for(PATIENCE, test);
}

/// As [`run`], for tests that put the clock forward.
pub(super) fn run_for(limit: Duration, test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let timed = async { tokio::time::timeout(limit, test).await.expect("the test takes too long") };
    LocalSet::new().block_on(&runtime, timed);
}

/// A loopback address that no other test uses.
pub(super) fn own_ip() -> Ipv4Addr {
    Ipv4Addr::new(127, fastrand::u8(1..250), fastrand::u8(1..250), fastrand::u8(1..250))
}

/// An application behind the waypoint.
#[derive(Clone)]
pub(super) struct App {
    pub(super) name: String,
    pub(super) address: SocketAddr,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) tunnel: bool,
}

/// Serves HTTP on a new address; `answer` gets the request with its whole body.
pub(super) async fn app<F>(name: &str, answer: impl Fn(Request<Bytes>) -> F + Clone + 'static) -> App
where
    F: Future<Output = Response<Full<Bytes>>> + 'static,
{
    let listener = TcpListener::bind((own_ip(), 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(tokio::task::spawn_local(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let answer = answer.clone();
            let service = service_fn(move |request: Request<Incoming>| {
                let answer = answer.clone();
                async move {
                    let (head, body) = request.into_parts();
                    let body = body.collect().await?.to_bytes();
                    Ok::<_, hyper::Error>(answer(Request::from_parts(head, body)).await)
                }
            });
            drop(tokio::task::spawn_local(async move {
                let auto = hyper_util::server::conn::auto::Builder::new(LocalExec);
                let _ = auto.serve_connection(TokioIo::new(stream), service).await;
            }));
        }
    }));
    App { name: name.into(), address, labels: BTreeMap::new(), tunnel: false }
}

/// An application that answers every request with its name.
pub(super) async fn named(name: &'static str) -> App {
    app(name, move |_| std::future::ready(text(200, name))).await
}

/// Takes connections and gives each to `serve`.
pub(super) async fn raw<F>(name: &str, serve: impl Fn(TcpStream) -> F + 'static) -> App
where
    F: Future<Output = ()> + 'static,
{
    let listener = TcpListener::bind((own_ip(), 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(tokio::task::spawn_local(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            drop(tokio::task::spawn_local(serve(stream)));
        }
    }));
    App { name: name.into(), address, labels: BTreeMap::new(), tunnel: false }
}

pub(super) fn text(status: u16, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    Response::builder().status(status).body(Full::new(body.into())).unwrap()
}

/// What a waypoint is told.
pub(super) struct Bed {
    pub(super) ca: TestCa,
    pub(super) resources: Resources,
    /// What they say of `web.shop`.
    route: Option<l7::Route>,
    apps: Vec<App>,
    /// Further services `<name>.shop`, of one application each.
    beside: Vec<(App, wire::AppProtocol)>,
    protocol: wire::AppProtocol,
    waypoint: &'static str,
}

/// A running waypoint.
pub(super) struct Waypoint {
    ca: TestCa,
    address: SocketAddr,
    registry: Registry,
    pub(super) shared: Arc<Shared>,
}

fn identity(name: &str) -> SpiffeId {
    SpiffeId::new("cluster.local", "shop", name)
}

impl Bed {
    /// A service `web.shop` with these endpoints, whose port speaks HTTP/1.1.
    pub(super) fn new(apps: &[App]) -> Self {
        Self {
            ca: TestCa::new(),
            resources: Resources::default(),
            route: None,
            apps: apps.to_vec(),
            beside: Vec::new(),
            protocol: wire::AppProtocol::Http11,
            waypoint: "wp.shop.svc.cluster.local",
        }
    }

    pub(super) fn speaks(mut self, protocol: wire::AppProtocol) -> Self {
        self.protocol = protocol;
        self
    }

    /// Another service, `<its name>.shop` on port 80, of this application.
    pub(super) fn beside(mut self, app: App, protocol: wire::AppProtocol) -> Self {
        self.beside.push((app, protocol));
        self
    }

    /// The service belongs to another waypoint.
    pub(super) fn bound_to(mut self, waypoint: &'static str) -> Self {
        self.waypoint = waypoint;
        self
    }

    /// A rule for `web.shop`; earlier ones go first.
    pub(super) fn rule(mut self, rule: l7::HttpRule) -> Self {
        let origin = l7::Origin {
            kind: "VirtualService".into(),
            namespace: "shop".into(),
            name: "web".into(),
            created: 1,
        };
        let parent = l7::ServiceRef { namespace: "shop".into(), hostname: WEB.into(), port: 0 };
        let route = self.route.get_or_insert_with(|| l7::Route {
            origin: Some(origin),
            parents: vec![parent],
            ..l7::Route::default()
        });
        route.http.push(rule);
        self.resources.routes.insert("VirtualService/shop/web".into(), route.clone().into());
        self
    }

    /// What a DestinationRule says of `web.shop`.
    pub(super) fn destination(mut self, destination: l7::Destination) -> Self {
        let origin = l7::Origin {
            kind: "DestinationRule".into(),
            namespace: "shop".into(),
            name: "web".into(),
            created: 1,
        };
        let destination = l7::Destination {
            origin: Some(origin),
            hostname: WEB.into(),
            exported_to: vec!["*".into()],
            ..destination
        };
        self.resources.destinations.insert("DestinationRule/shop/web".into(), Arc::new(destination));
        self
    }

    fn mesh(&mut self) -> Arc<mesh_core::state::MeshState> {
        let mut index = StateIndex::default();
        let mut add = |kind| {
            index.apply_address("", &wire::Address { r#type: Some(kind) }).unwrap();
        };
        let named = |hostname: &str| {
            use wire::gateway_address::Destination;
            let name = wire::NamespacedHostname { namespace: "shop".into(), hostname: hostname.into() };
            wire::GatewayAddress { destination: Some(Destination::Hostname(name)), hbone_mtls_port: 15008 }
        };
        let vip: SocketAddr = VIP.parse().unwrap();
        let service = wire::Service {
            name: "web".into(),
            namespace: "shop".into(),
            hostname: WEB.into(),
            addresses: vec![wire::NetworkAddress { address: bytes(vip.ip()), ..Default::default() }],
            ports: vec![wire::Port {
                service_port: 80,
                app_protocol: self.protocol as i32,
                ..Default::default()
            }],
            waypoint: Some(named(self.waypoint)),
            ..wire::Service::default()
        };
        add(wire::address::Type::Service(service));
        for (app, protocol) in &self.beside {
            add(wire::address::Type::Service(wire::Service {
                name: app.name.clone(),
                namespace: "shop".into(),
                hostname: format!("{}.shop.svc.cluster.local", app.name),
                ports: vec![wire::Port {
                    service_port: 80,
                    app_protocol: *protocol as i32,
                    ..Default::default()
                }],
                ..wire::Service::default()
            }));
        }
        let of_web = self.apps.iter().map(|app| (app, WEB.to_owned()));
        let others = self.beside.iter().map(|(app, _)| (app, format!("{}.shop.svc.cluster.local", app.name)));
        let all: Vec<(App, String)> = of_web.chain(others).map(|(app, host)| (app.clone(), host)).collect();
        for (app, host) in &all {
            let ports = wire::PortList {
                ports: vec![wire::Port {
                    service_port: 80,
                    target_port: app.address.port().into(),
                    ..Default::default()
                }],
            };
            let uid = format!("Kubernetes//Pod/shop/{}", app.name);
            let tunnel = if app.tunnel { wire::TunnelProtocol::Hbone } else { wire::TunnelProtocol::None };
            add(wire::address::Type::Workload(wire::Workload {
                uid: uid.clone(),
                name: app.name.clone(),
                namespace: "shop".into(),
                service_account: app.name.clone(),
                workload_name: app.name.clone(),
                canonical_name: app.name.clone(),
                addresses: vec![bytes(app.address.ip())],
                tunnel_protocol: tunnel as i32,
                services: [(format!("shop/{host}"), ports)].into(),
                ..wire::Workload::default()
            }));
            let labels = Arc::new(app.labels.clone());
            Arc::make_mut(&mut self.resources.labels).insert(uid.as_str().into(), labels);
        }
        index.snapshot()
    }

    /// Starts the waypoint, and tunnels to the applications that have one.
    pub(super) async fn start(mut self) -> Waypoint {
        let line = ["x", "--gateway=wp", "--namespace=shop", "--xds=http://127.0.0.1:1"];
        let config = Line::parse_from(line).args.complete().unwrap();
        let own = Arc::new(Own { ..config.own.clone() });
        let mesh = self.mesh();
        let (keys, _) = KeyStore::new(Roots::Given(Vec::new()));
        let snapshot = Snapshot::compile(&own, mesh, &self.resources, Changed::ALL, None, &keys);
        let mut registry = Registry::default();
        let telemetry = Telemetry {
            requests: RequestMetrics::register(&mut registry),
            tcp: TcpMetrics::register(&mut registry),
            access_log: AccessLog::start(LogFormat::Text, Box::new(std::io::sink()), Counter::default())
                .unwrap(),
            log_requests: true,
            spans: Default::default(),
            streams: Default::default(),
        };
        let certificate = Arc::new(ArcSwapOption::from_pointee(self.ca.issue(&identity("wp"))));
        let shared = Arc::new(Shared::new(config, Arc::new(snapshot), certificate, telemetry));
        let local = Local::new(Arc::clone(&shared));
        for app in self.apps.iter().filter(|app| app.tunnel) {
            node_of(&self.ca, app).await;
        }
        let listener = TcpListener::bind((own_ip(), 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let exporting = Rc::clone(&local);
        drop(tokio::task::spawn_local(async move { spans::serve(&exporting).await }));
        let serving = Rc::clone(&local);
        drop(tokio::task::spawn_local(async move {
            loop {
                let (stream, peer) = listener.accept().await.unwrap();
                let local = Rc::clone(&serving);
                drop(tokio::task::spawn_local(async move { inbound::handle(&local, stream, peer).await }));
            }
        }));
        Waypoint { ca: self.ca, address, registry, shared }
    }
}

#[derive(clap::Parser)]
struct Line {
    #[command(flatten)]
    args: RunArgs,
}

fn bytes(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// The node proxy of an application: takes tunnels of the waypoint, and only of it, and connects to the application.
async fn node_of(ca: &TestCa, app: &App) {
    let certificate = ca.issue(&identity(&app.name));
    let listener = TcpListener::bind((app.address.ip(), hbone::PORT)).await.unwrap();
    let to = app.address;
    drop(tokio::task::spawn_local(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let config = certificate.server_config();
            drop(tokio::task::spawn_local(async move {
                let (channel, peer) = tls::accept(config, stream).await.unwrap();
                assert_eq!(peer.identity, identity("wp"), "the waypoint shows its own identity");
                let mut connection = ServerConnection::handshake(channel, &Settings::server()).await.unwrap();
                while let Some(Ok(incoming)) = connection.accept().await {
                    let hbone::Incoming::Connect(connect) = incoming else { continue };
                    assert_eq!(connect.request.authority, Authority::Socket(to));
                    drop(tokio::task::spawn_local(async move {
                        let mut app = TcpStream::connect(to).await.unwrap();
                        let mut stream = connect.accept(None).unwrap().into_io();
                        let _ = tokio::io::copy_bidirectional(&mut stream, &mut app).await;
                    }));
                }
            }));
        }
    }));
}

impl Waypoint {
    /// A tunnel of pod `name`.
    pub(super) async fn tunnel(&self, name: &str) -> ClientConnection {
        let certificate = self.ca.issue(&identity(name));
        let config = certificate.client_config(&[identity("wp")]).unwrap();
        let tcp = TcpStream::connect(self.address).await.unwrap();
        let (channel, _) = tls::connect(config, tcp).await.unwrap();
        let (connection, driver) = ClientConnection::handshake(channel, &Settings::client());
        drop(tokio::task::spawn_local(driver));
        connection
    }

    /// A stream of pod `client` to an authority.
    pub(super) async fn connect(&self, to: &str) -> Result<TunnelIo, hbone::Error> {
        let authority: Authority = to.parse().unwrap();
        let tunnel = self.tunnel("client").await;
        Ok(tunnel.open(&ConnectRequest::to(authority)).await?.stream.into_io())
    }

    /// One HTTP/1.1 request on a stream of its own to `web.shop`.
    pub(super) async fn ask(&self, request: Request<Full<Bytes>>) -> Response<Bytes> {
        let mut connection = self.http1().await;
        connection.ask(request).await
    }

    /// GET of a path.
    pub(super) async fn get(&self, path: &str) -> Response<Bytes> {
        self.ask(get(path)).await
    }

    pub(super) async fn http1(&self) -> Http1 {
        let io = self.connect(VIP).await.unwrap();
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(io)).await.unwrap();
        drop(tokio::task::spawn_local(connection));
        Http1(sender)
    }

    /// The value of a sample of metrics that has all of `with`.
    pub(super) fn metric(&self, name: &str, with: &[&str]) -> Option<f64> {
        let text = scrape(&self.registry, None).unwrap().1;
        let found = text.lines().find(|line| {
            line.starts_with(&format!("{name}{{")) && with.iter().all(|part| line.contains(part))
        });
        found.and_then(|line| line.rsplit(' ').next()?.parse().ok())
    }

    /// Waits for a sample to have a value.
    pub(super) async fn expect_metric(&self, name: &str, with: &[&str], value: f64) {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while self.metric(name, with) != Some(value) {
            let late = tokio::time::Instant::now() > deadline;
            assert!(!late, "{name} {with:?}\n{}", scrape(&self.registry, None).unwrap().1);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// A client's HTTP/1.1 connection.
pub(super) struct Http1(hyper::client::conn::http1::SendRequest<Full<Bytes>>);

impl Http1 {
    pub(super) async fn ask(&mut self, request: Request<Full<Bytes>>) -> Response<Bytes> {
        self.0.ready().await.unwrap();
        let response = self.0.send_request(request).await.unwrap();
        let (head, body) = response.into_parts();
        Response::from_parts(head, body.collect().await.unwrap().to_bytes())
    }
}

pub(super) fn get(path: &str) -> Request<Full<Bytes>> {
    Request::builder().uri(path).header("host", "web.shop").body(Full::default()).unwrap()
}

pub(super) fn post(path: &str, body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    let request = Request::post(path).header("host", "web.shop");
    request.body(Full::new(body.into())).unwrap()
}

pub(super) fn said(response: &Response<Bytes>) -> (u16, &str) {
    (response.status().as_u16(), std::str::from_utf8(response.body()).unwrap())
}

/// A rule that forwards to `web.shop`, or subsets of it, by weight.
pub(super) fn forward(subsets: &[(&str, u32)]) -> l7::HttpRule {
    let backends = subsets.iter().map(|(subset, weight)| l7::WeightedBackend {
        backend: Some(l7::Backend {
            service: Some(l7::ServiceRef { namespace: "shop".into(), hostname: WEB.into(), port: 80 }),
            subset: (*subset).into(),
            invalid: String::new(),
        }),
        weight: *weight,
        ..l7::WeightedBackend::default()
    });
    let forward = l7::Forward { backends: backends.collect() };
    l7::HttpRule {
        name: "rule".into(),
        action: Some(l7::http_rule::Action::Forward(forward)),
        ..l7::HttpRule::default()
    }
}
