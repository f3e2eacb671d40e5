//! The running process, spoken to by real gRPC clients over real sockets.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use mesh_core::identity::SpiffeId;
use mesh_core::tls::certificate::WorkloadCertificate;
use mesh_core::tls::crl::Revocations;
use mesh_core::tls::key::KeyAndCsr;
use mesh_core::xds::ca::CaClient;
use mesh_core::xds::channel::ControlPlane;
use mesh_core::xds::proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use mesh_core::xds::proto::discovery::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Status as Detail,
};
use mesh_core::xds::proto::node::node_service_client::NodeServiceClient;
use mesh_core::xds::proto::node::{EnrolledPod, EnrolmentReport};
use mesh_core::xds::proto::workload::{Address, TunnelProtocol, address};
use mesh_core::xds::{ADDRESS_TYPE, AUTHORIZATION_TYPE, l7};
use prost::Message;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Request, Streaming};

use crate::auth::{Caller, TokenKey};
use crate::convert::Mesh;
use crate::hub::Debounce;
use crate::server::{Bound, Options, SourceOption, run};

const MESH: &str = "---
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Pod
metadata: {name: a, namespace: shop}
spec: {nodeName: n1, serviceAccountName: front, containers: []}
status: {podIP: 10.1.0.1, conditions: [{type: Ready, status: \"True\"}]}
";
const POLICY: &str = "---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec: {rules: [{from: [{source: {namespaces: [shop]}}]}]}
";
const UID: &str = "Kubernetes//Pod/shop/a";
const PATIENCE: Duration = Duration::from_secs(20);

/// A control plane in this process.
struct Running {
    dir: tempfile::TempDir,
    bound: Bound,
    stop: watch::Sender<bool>,
    task: tokio::task::JoinHandle<Result<(), crate::server::RunError>>,
}

impl Running {
    async fn start(objects: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("objects")).unwrap();
        std::fs::write(dir.path().join("objects/mesh.yaml"), objects).unwrap();
        let any: SocketAddr = (Ipv4Addr::LOCALHOST, 0).into();
        let options = Options {
            source: SourceOption::Directory(dir.path().join("objects")),
            state_dir: dir.path().join("state"),
            ca_dir: None,
            listen_plain: Some(any),
            listen_tls: any,
            listen_debug: any,
            listen_relay: None,
            relay_client_ca: None,
            relay: crate::relay::Limits::default(),
            links: crate::relay::facts::Links::default(),
            names: vec!["istiod.istio-system.svc".into()],
            mesh: Mesh::default(),
            debounce: Debounce { quiet: Duration::from_millis(20), max: Duration::from_secs(1) },
        };
        let (stop, stopped) = watch::channel(false);
        let (tell, told) = tokio::sync::oneshot::channel();
        let task = tokio::spawn(run(options, move |bound| tell.send(bound).unwrap(), stopped));
        Self { dir, bound: told.await.unwrap(), stop, task }
    }

    fn write(&self, objects: &str) {
        let path = self.dir.path().join("objects/mesh.yaml");
        let new = self.dir.path().join("new");
        std::fs::write(&new, objects).unwrap();
        std::fs::rename(new, path).unwrap();
    }

    /// A client's settings for the TLS listener, with a token for `node`.
    fn secured(&self, node: &str) -> ControlPlane {
        let state = self.dir.path().join("state");
        let caller = Caller {
            node: node.into(),
            namespace: "istio-system".into(),
            service_account: "mesh-node".into(),
            agent: true,
        };
        let token = TokenKey::open(&state).unwrap();
        let token = token.issue(&caller, Duration::from_secs(60), std::time::SystemTime::now()).unwrap();
        let file: PathBuf = self.dir.path().join(format!("token-{node}"));
        std::fs::write(&file, token).unwrap();
        ControlPlane {
            address: format!("https://{}", self.bound.tls),
            root_cert: Some(state.join("root-cert.pem")),
            server_name: Some("istiod.istio-system.svc".into()),
            token: Some(file),
            cluster_id: "Kubernetes".into(),
            headers: Vec::new(),
            again: Default::default(),
        }
    }

    async fn plain(&self) -> Channel {
        let address = format!("http://{}", self.bound.plain.unwrap());
        Channel::from_shared(address).unwrap().connect().await.unwrap()
    }

    async fn get(&self, path: &str) -> String {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = tokio::net::TcpStream::connect(self.bound.debug).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    async fn end(self) {
        self.stop.send_replace(true);
        timeout(PATIENCE, self.task).await.unwrap().unwrap().unwrap();
    }
}

/// One delta stream.
struct Client {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

fn node(name: &str) -> Node {
    use mesh_core::xds::client::NodeDescription;
    NodeDescription {
        ip: "10.0.0.1".into(),
        name: "agent".into(),
        namespace: "istio-system".into(),
        node: name.into(),
        ..Default::default()
    }
    .to_node()
}

impl Client {
    async fn open(
        channel: Channel,
        authority: Option<&ControlPlane>,
        node: Node,
    ) -> Result<Self, tonic::Status> {
        let (requests, stream) = mpsc::channel(8);
        let first = |kind: &str| DeltaDiscoveryRequest {
            node: Some(node.clone()),
            type_url: kind.into(),
            ..DeltaDiscoveryRequest::default()
        };
        requests.send(first(ADDRESS_TYPE)).await.unwrap();
        requests.send(first(AUTHORIZATION_TYPE)).await.unwrap();
        let mut request = Request::new(ReceiverStream::new(stream));
        if let Some(server) = authority {
            server.authorize(request.metadata_mut()).unwrap();
        }
        let responses = AggregatedDiscoveryServiceClient::new(channel)
            .delta_aggregated_resources(request)
            .await?
            .into_inner();
        Ok(Self { requests, responses })
    }

    async fn next(&mut self) -> Result<DeltaDiscoveryResponse, tonic::Status> {
        timeout(PATIENCE, self.responses.message())
            .await
            .expect("a response")
            .map(|m| m.expect("an open stream"))
    }

    async fn answer(&self, response: &DeltaDiscoveryResponse, error: Option<&str>) {
        let request = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            error_detail: error.map(|m| Detail { code: 3, message: m.into(), details: vec![] }),
            ..DeltaDiscoveryRequest::default()
        };
        self.requests.send(request).await.unwrap();
    }
}

fn tunnel(response: &DeltaDiscoveryResponse) -> TunnelProtocol {
    let any = response.resources[0].resource.as_ref().unwrap();
    match Address::decode(any.value.as_slice()).unwrap().r#type.unwrap() {
        address::Type::Workload(w) => w.tunnel_protocol(),
        address::Type::Service(s) => panic!("{s:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_is_newer_is_told_that_there_is_nothing_of_a_type_that_is_not_known_here() {
    let control = Running::start(MESH).await;
    let mut client = Client::open(control.plain().await, None, node("n1")).await.unwrap();
    let newer = "type.googleapis.com/undermesh.l7.v9.Later";
    let request = DeltaDiscoveryRequest { type_url: newer.into(), ..DeltaDiscoveryRequest::default() };
    client.requests.send(request).await.unwrap();
    let mut seen = Vec::new();
    while seen.len() < 3 {
        let response = client.next().await.unwrap();
        client.answer(&response, None).await;
        seen.push((response.type_url, response.resources.len()));
    }
    seen.sort();
    assert_eq!(
        seen,
        [(AUTHORIZATION_TYPE.to_owned(), 0), (ADDRESS_TYPE.to_owned(), 1), (newer.to_owned(), 0)]
    );
    // The stream goes on.
    control.write(&format!("{MESH}{POLICY}"));
    assert_eq!(client.next().await.unwrap().resources[0].name, "shop/p");
    control.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_get_everything_then_changes_and_their_answers_are_remembered() {
    let control = Running::start(MESH).await;
    let mut client = Client::open(control.plain().await, None, node("n1")).await.unwrap();
    let first = client.next().await.unwrap();
    assert_eq!((first.type_url.as_str(), first.resources.len()), (ADDRESS_TYPE, 1));
    assert_eq!(first.resources[0].name, UID);
    let second = client.next().await.unwrap();
    assert_eq!(
        (second.type_url.as_str(), second.resources.len()),
        (AUTHORIZATION_TYPE, 0),
        "answered though empty"
    );
    client.answer(&first, Some("Kubernetes//Pod/shop/a: no")).await;
    client.answer(&second, None).await;

    control.write(&format!("{MESH}{POLICY}"));
    let third = client.next().await.unwrap();
    assert_eq!(third.type_url, AUTHORIZATION_TYPE, "addresses did not change");
    assert_eq!((third.resources[0].name.as_str(), third.removed_resources.len()), ("shop/p", 0));
    control.write(MESH);
    let fourth = client.next().await.unwrap();
    assert_eq!((fourth.resources.len(), fourth.removed_resources), (0, vec!["shop/p".to_owned()]));

    let status = control.get("/debug/syncz").await;
    assert!(status.contains("Kubernetes//Pod/shop/a: no") && status.contains("\"rejects\": 1"), "{status}");
    let listed: serde_json::Value = serde_json::from_str(status.split_once("\r\n\r\n").unwrap().1).unwrap();
    let of_client = &listed.as_array().expect("tools of Istio read a list")[0];
    assert_eq!(
        (of_client["proxy"].as_str(), of_client["proxy_type"].as_str()),
        (Some("agent.istio-system"), Some("ztunnel"))
    );
    let addresses = &of_client["resources"][ADDRESS_TYPE];
    assert_eq!(addresses["lastError"], "Kubernetes//Pod/shop/a: no");
    assert_eq!(
        (addresses["sent"].as_str(), addresses["acked"].as_str()),
        (Some("wds-1"), Some("")),
        "{status}"
    );
    assert!(humantime::parse_rfc3339(addresses["sentTime"].as_str().unwrap()).is_ok());
    let metrics = control.get("/metrics").await;
    assert!(metrics.contains("pilot_total_xds_rejects{type=\"wds\"} 1"), "{metrics}");
    assert!(metrics.contains("pilot_xds_pushes{type=\"wads\"} 3"), "{metrics}");
    control.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_who_asks_for_what_waypoints_are_told_gets_it() {
    let route = |host: &str| {
        format!(
            "{MESH}---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: v, namespace: shop}}\nspec: {{hosts: [web], http: [{{route: [{{destination: {{host: {host}}}}}]}}]}}\n"
        )
    };
    let control = Running::start(&route("web")).await;
    let mut agent = Client::open(control.plain().await, None, node("n1")).await.unwrap();
    let mut waypoint = Client::open(control.plain().await, None, node("n1")).await.unwrap();
    for kind in l7::TYPES {
        let request = DeltaDiscoveryRequest { type_url: kind.into(), ..DeltaDiscoveryRequest::default() };
        waypoint.requests.send(request).await.unwrap();
    }
    let mut told = BTreeMap::new();
    while told.len() < 2 + l7::TYPES.len() {
        let response = waypoint.next().await.unwrap();
        let names: Vec<String> = response.resources.iter().map(|r| r.name.clone()).collect();
        told.insert(response.type_url, names);
    }
    assert_eq!(told[l7::ROUTE_TYPE], ["VirtualService/shop/v"]);
    assert_eq!(told[l7::SETTINGS_TYPE], ["mesh"]);
    assert_eq!(told[l7::DESTINATION_TYPE], Vec::<String>::new(), "answered though empty");
    for expected in [ADDRESS_TYPE, AUTHORIZATION_TYPE] {
        assert_eq!(agent.next().await.unwrap().type_url, expected);
    }
    control.write(&route("api"));
    let changed = waypoint.next().await.unwrap();
    assert_eq!((changed.type_url.as_str(), changed.resources.len()), (l7::ROUTE_TYPE, 1));
    control.write(&format!("{}{POLICY}", route("api")));
    let policy = agent.next().await.unwrap();
    assert_eq!(policy.type_url, AUTHORIZATION_TYPE, "the changed route was nothing for a node");
    let metrics = control.get("/metrics").await;
    assert!(metrics.contains("pilot_xds_pushes{type=\"um-route\"} 2"), "{metrics}");
    let dump = control.get("/debug/config_dump").await;
    let dump: serde_json::Value = serde_json::from_str(dump.split_once("\r\n\r\n").unwrap().1).unwrap();
    assert!(dump["forWaypoints"]["um-route"]["VirtualService/shop/v"].is_string(), "{dump}");
    let objects = control.get("/debug/objects").await;
    assert!(objects.contains("\"VirtualService\": [\n    \"shop/v\""), "{objects}");
    control.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_debug_port_takes_a_bounded_number_of_connections() {
    use mesh_core::admin::slots::CONNECTIONS;
    let control = Running::start(MESH).await;
    // Loopback has all slots of the port.
    let mut silent = Vec::new();
    for _ in 0..CONNECTIONS {
        silent.push(tokio::net::TcpStream::connect(control.bound.debug).await.unwrap());
    }
    let ask = async || {
        let mut stream = tokio::net::TcpStream::connect(control.bound.debug).await?;
        let request = b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n";
        tokio::io::AsyncWriteExt::write_all(&mut stream, request).await?;
        let mut text = String::new();
        tokio::io::AsyncReadExt::read_to_string(&mut stream, &mut text).await.map(|_| text)
    };
    let beyond = timeout(PATIENCE, ask()).await.expect("it is kept open");
    assert!(beyond.as_ref().map_or(true, String::is_empty), "it was answered: {beyond:?}");
    drop(silent);
    let answered = async {
        loop {
            if let Ok(text) = ask().await
                && !text.is_empty()
            {
                return text;
            }
        }
    };
    assert!(timeout(PATIENCE, answered).await.unwrap().starts_with("HTTP/1.1 200"));
    control.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_report_of_the_node_makes_its_pod_reachable_also_after_both_are_gone() {
    let control = Running::start(MESH).await;
    let mut client = Client::open(control.plain().await, None, node("n2")).await.unwrap();
    assert_eq!(tunnel(&client.next().await.unwrap()), TunnelProtocol::None);
    client.next().await.unwrap();
    {
        let (reports, stream) = mpsc::channel(1);
        let pod = EnrolledPod { workload_uid: UID.into(), problem: String::new() };
        reports.send(EnrolmentReport { node: "n1".into(), pods: vec![pod] }).await.unwrap();
        let mut open = NodeServiceClient::new(control.plain().await);
        let (_never, nothing) = mpsc::channel::<EnrolmentReport>(1);
        let refused = open.report_enrolment(ReceiverStream::new(nothing)).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unimplemented, "a report needs a token");
        let server = control.secured("n1");
        let mut node = NodeServiceClient::new(server.connect().await.unwrap());
        let mut request = tonic::Request::new(ReceiverStream::new(stream));
        server.authorize(request.metadata_mut()).unwrap();
        let mut acks = node.report_enrolment(request).await.unwrap().into_inner();
        acks.message().await.unwrap().unwrap();
    }
    assert_eq!(tunnel(&client.next().await.unwrap()), TunnelProtocol::Hbone);
    let file = control.dir.path().join("state/enrolment.json");
    let kept = crate::enrol::Enrolments::open(Some(file));
    assert!(kept.captured()["n1"].contains(UID), "a new process starts from it");
    control.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_is_told_of_its_own_pods_when_it_connects_and_when_they_change() {
    let with_uid = MESH.replace("name: a,", "name: a, uid: u1,");
    let control = Running::start(&with_uid).await;
    let tell = async |node: &str| {
        let server = control.secured(node);
        let mut client = NodeServiceClient::new(server.connect().await.unwrap());
        let (reports, stream) = mpsc::channel::<EnrolmentReport>(1);
        let mut request = tonic::Request::new(ReceiverStream::new(stream));
        server.authorize(request.metadata_mut()).unwrap();
        (client.report_enrolment(request).await.unwrap().into_inner(), reports)
    };
    let (mut here, _reports) = tell("n1").await;
    let told = timeout(PATIENCE, here.message()).await.unwrap().unwrap().unwrap();
    assert!(told.assigns && told.namespaces == ["shop"]);
    assert_eq!((told.pods[0].uid.as_str(), told.pods[0].service_account.as_str()), ("u1", "front"));
    assert!(told.pods[0].enrol);
    let (mut elsewhere, _reports) = tell("n2").await;
    let told = timeout(PATIENCE, elsewhere.message()).await.unwrap().unwrap().unwrap();
    assert!(told.assigns && told.pods.is_empty(), "another node's pods are not its business");
    // Without an address no workload changes; the node is told all the same.
    let starting = with_uid.replace("name: a, uid: u1,", "name: b, uid: u2,");
    let (_, starting) = starting.split_once("---\napiVersion: v1\nkind: Pod").unwrap();
    let starting = starting.split("status:").next().unwrap();
    control.write(&format!("{with_uid}---\napiVersion: v1\nkind: Pod{starting}"));
    let told = timeout(PATIENCE, here.message()).await.unwrap().unwrap().unwrap();
    assert_eq!(told.pods.iter().map(|p| p.uid.as_str()).collect::<Vec<_>>(), ["u1", "u2"]);
    control.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_tls_listener_serves_holders_of_a_token_that_fits_their_node() {
    let control = Running::start(MESH).await;
    let server = control.secured("n1");
    let channel = server.connect().await.unwrap();
    let mut client = Client::open(channel.clone(), Some(&server), node("n1")).await.unwrap();
    assert_eq!(client.next().await.unwrap().resources.len(), 1);
    let refused = Client::open(channel.clone(), None, node("n1")).await.err().unwrap();
    assert_eq!(refused.code(), Code::Unauthenticated);
    let mut other = Client::open(channel.clone(), Some(&server), node("n2")).await.unwrap();
    assert_eq!(other.next().await.unwrap_err().code(), Code::PermissionDenied);
    let mut wrong = node("n1");
    wrong.id = "sidecar~1".into();
    let mut wrong = Client::open(channel, Some(&server), wrong).await.unwrap();
    assert_eq!(wrong.next().await.unwrap_err().code(), Code::InvalidArgument);
    let wrong_name = ControlPlane { server_name: Some("other.svc".into()), ..server };
    assert!(wrong_name.connect().await.is_err());
    control.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_gets_certificates_for_its_own_pods_only() {
    let control = Running::start(MESH).await;
    let ask = async |node: &str, identity: &SpiffeId| {
        let key = KeyAndCsr::generate(identity).unwrap();
        let chain = CaClient::new(control.secured(node))
            .sign(key.csr_pem(), identity, Duration::from_secs(3600))
            .await?;
        Ok::<_, mesh_core::xds::ca::CaError>(
            WorkloadCertificate::new(key, &chain, &Revocations::default()).unwrap(),
        )
    };
    let front = SpiffeId::new("cluster.local", "shop", "front");
    while !control.get("/ready").await.contains("200 OK") {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(ask("n1", &front).await.unwrap().identity(), &front);
    assert!(ask("n2", &front).await.unwrap_err().is_refusal(), "scheduled elsewhere");
    assert!(ask("n1", &SpiffeId::new("cluster.local", "shop", "back")).await.is_err());
    assert!(ask("n1", &SpiffeId::new("other.domain", "shop", "front")).await.is_err());
    let metrics = control.get("/metrics").await;
    assert!(metrics.contains("citadel_server_success_cert_issuance_count 1"), "{metrics}");
    assert!(metrics.contains("citadel_server_authentication_failure_count 3"), "{metrics}");
    control.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_never_reads_delays_nobody() {
    let control = Running::start(MESH).await;
    let _stuck = Client::open(control.plain().await, None, node("n1")).await.unwrap();
    let mut client = Client::open(control.plain().await, None, node("n1")).await.unwrap();
    client.next().await.unwrap();
    client.next().await.unwrap();
    for round in 0..6 {
        let pods: String = (0..400)
            .map(|i| {
                MESH.replace("name: a,", &format!("name: p{i}-{round},"))
                    .replace("10.1.0.1", &format!("10.{round}.{}.{}", i / 200, i % 200 + 1))
                    .split_once("---\napiVersion: v1\nkind: Pod")
                    .map(|(_, pod)| format!("---\napiVersion: v1\nkind: Pod{pod}"))
                    .unwrap()
            })
            .collect();
        control.write(&pods);
        let changed = client.next().await.unwrap();
        assert!(changed.resources.len() == 400, "{}", changed.resources.len());
    }
    control.end().await;
}
