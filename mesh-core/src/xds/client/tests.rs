//! The client against a real server that behaves, misbehaves, and vanishes.

mod server;

use std::time::Duration;

use tokio::time::timeout;

use self::server::{Server, Stream};
use super::*;
use crate::state::samples::{ip, pod, service, uid};
use crate::xds::{ADDRESS_TYPE, AUTHORIZATION_TYPE};

const PATIENCE: Duration = Duration::from_secs(20);

/// A client that runs, with what it has published.
struct Client {
    states: watch::Receiver<(Arc<MeshState>, bool)>,
    status: watch::Receiver<Status>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Client {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Client {
    fn start(control_plane: ControlPlane) -> Self {
        let (publish, states) = watch::channel((Arc::default(), false));
        let (status_sender, status) = watch::channel(Status::default());
        let node = NodeDescription {
            kind: NodeKind::Agent,
            ip: "10.9.9.9".into(),
            name: "agent".into(),
            namespace: "mesh-system".into(),
            node: "n1".into(),
            metadata: [("CLUSTER_ID".to_owned(), "c1".to_owned())].into(),
        };
        let task = tokio::spawn(async move {
            let publish = move |state, synced| {
                publish.send_replace((state, synced));
            };
            let feed = Feed { index: StateIndex::default(), publish };
            match run(&control_plane, &node, feed, &status_sender, None).await {}
        });
        Self { states, status, task }
    }

    async fn state(&mut self, wanted: impl Fn(&MeshState) -> bool) -> Arc<MeshState> {
        let found = timeout(PATIENCE, self.states.wait_for(|(state, _)| wanted(state))).await;
        found.expect("the wanted state was not published").unwrap().0.clone()
    }

    async fn status(&mut self, wanted: impl Fn(&Status) -> bool) -> Status {
        let found = timeout(PATIENCE, self.status.wait_for(wanted)).await;
        found.expect("the wanted status was not reached").unwrap().clone()
    }
}

fn plaintext(server: &Server) -> ControlPlane {
    ControlPlane {
        address: format!("http://{}", server.address),
        cluster_id: "c1".into(),
        ..Default::default()
    }
}

/// Takes both initial requests, in their order.
async fn greet(stream: &mut Stream) -> [DeltaDiscoveryRequest; 2] {
    [stream.request().await, stream.request().await]
}

fn workload(name: &str, ip: &str) -> (String, Address) {
    let message = pod(name, &[ip]);
    let kind = crate::xds::proto::workload::address::Type::Workload(message);
    (uid(name), Address { r#type: Some(kind) })
}

fn web(port: u32) -> (String, Address) {
    let kind =
        crate::xds::proto::workload::address::Type::Service(service("web", "10.1.0.1", &[(port, 8080)]));
    ("shop/web.shop.svc.cluster.local".into(), Address { r#type: Some(kind) })
}

fn policy(name: &str) -> (String, Authorization) {
    let message = Authorization { name: name.into(), namespace: "shop".into(), ..Default::default() };
    (format!("shop/{name}"), message)
}

#[tokio::test]
async fn both_types_are_asked_for_at_once_and_every_response_is_acknowledged() {
    let mut server = Server::start().await;
    let mut client = Client::start(plaintext(&server));
    let mut stream = server.stream().await;
    assert_eq!(stream.metadata("clusterid").as_deref(), Some("c1"));
    assert_eq!(stream.metadata("authorization"), None, "no token file, no token");
    let [addresses, policies] = greet(&mut stream).await;
    assert_eq!((addresses.type_url.as_str(), policies.type_url.as_str()), (ADDRESS_TYPE, AUTHORIZATION_TYPE));
    for request in [&addresses, &policies] {
        assert!(request.resource_names_subscribe.is_empty() && request.resource_names_unsubscribe.is_empty());
        assert!(request.initial_resource_versions.is_empty());
        let node = request.node.as_ref().expect("the first request of each type carries the node");
        assert_eq!(node.id, "ztunnel~10.9.9.9~agent.mesh-system~mesh-system.svc.cluster.local");
        let fields = &node.metadata.as_ref().unwrap().fields;
        let wanted = [
            ("NAME", "agent"),
            ("NAMESPACE", "mesh-system"),
            ("INSTANCE_IPS", "10.9.9.9"),
            ("NODE_NAME", "n1"),
            ("CLUSTER_ID", "c1"),
        ];
        for (key, value) in wanted {
            assert_eq!(fields[key], string(value), "{key}");
        }
    }

    stream.respond(ADDRESS_TYPE, "n1", &[workload("a", "10.0.0.1"), web(80)], &[]).await;
    let ack = stream.request().await;
    assert_eq!((ack.type_url.as_str(), ack.response_nonce.as_str()), (ADDRESS_TYPE, "n1"));
    assert!(ack.error_detail.is_none() && ack.node.is_none() && ack.initial_resource_versions.is_empty());
    let state = client.state(|state| state.workload_count() == 1).await;
    assert!(state.service("shop/web.shop.svc.cluster.local").is_some());
    assert!(!client.status(|s| s.connected).await.synced, "policies have not been answered");

    stream.respond::<Authorization>(AUTHORIZATION_TYPE, "n2", &[], &[]).await;
    assert_eq!(stream.request().await.response_nonce, "n2", "an empty response is acknowledged, too");
    assert_eq!(client.status(|s| s.synced).await.held, 2);
    assert!(timeout(PATIENCE, client.states.wait_for(|(_, synced)| *synced)).await.is_ok());
}

#[tokio::test]
async fn what_can_be_decoded_is_applied_and_the_rest_is_named_in_the_answer() {
    let mut server = Server::start().await;
    let mut client = Client::start(plaintext(&server));
    let mut stream = server.stream().await;
    greet(&mut stream).await;
    let mut bad = pod("bad", &["10.0.0.9"]);
    bad.tunnel_protocol = 2;
    let bad_kind = crate::xds::proto::workload::address::Type::Workload(bad);
    let bad = (uid("bad"), Address { r#type: Some(bad_kind) });
    let empty = ("nothing".to_owned(), Address { r#type: None });
    stream.respond(ADDRESS_TYPE, "n1", &[workload("a", "10.0.0.1"), bad, empty], &[]).await;
    let nack = stream.request().await;
    assert_eq!(nack.response_nonce, "n1");
    let detail = nack.error_detail.expect("a NACK");
    assert_eq!(
        detail.message,
        format!(
            "{0}: workload {0}: tunnel_protocol: LEGACY_ISTIO_MTLS is not supported; use HBONE or NONE; \
             nothing: address nothing: type: is missing; expected `workload` or `service`",
            uid("bad")
        )
    );
    client.state(|state| state.workload_count() == 1).await;
    let status = client.status(|s| s.rejected.len() == 2).await;
    assert_eq!(status.rejected[0].name, uid("bad"));

    // What was rejected is not held: after a reconnect it is asked for again.
    stream.end().await;
    let mut stream = server.stream().await;
    let [addresses, _] = greet(&mut stream).await;
    assert_eq!(addresses.initial_resource_versions.keys().collect::<Vec<_>>(), [&uid("a")]);
}

#[tokio::test]
async fn a_rejection_is_forgotten_once_the_resource_is_accepted_removed_or_left_away() {
    let mut server = Server::start().await;
    let mut client = Client::start(plaintext(&server));
    let mut stream = server.stream().await;
    greet(&mut stream).await;
    let names = |s: &Status| s.rejected.iter().map(|r| r.name.clone()).collect::<Vec<_>>();
    let empty = |name: &str| (name.to_owned(), Address { r#type: None });
    let all = [empty(&uid("a")), empty("b"), empty("c")];
    stream.respond(ADDRESS_TYPE, "n1", &all, &[]).await;
    client.status(|s| names(s) == [uid("a"), "b".into(), "c".into()]).await;
    // A policy of the same name says nothing about the workload.
    let (_, same_name) = policy("p");
    stream.respond(AUTHORIZATION_TYPE, "n2", &[("b".to_owned(), same_name)], &[]).await;
    client.status(|s| s.synced && names(s) == [uid("a"), "b".into(), "c".into()]).await;

    stream.respond(ADDRESS_TYPE, "n3", &[workload("a", "10.0.0.1")], &[]).await;
    client.status(|s| names(s) == ["b", "c"]).await;
    stream.respond::<Address>(ADDRESS_TYPE, "n4", &[], &["b"]).await;
    client.status(|s| names(s) == ["c"]).await;
    // Rejected again, it is there once.
    stream.respond(ADDRESS_TYPE, "n5", &[empty("c"), workload("d", "10.0.0.4")], &[]).await;
    client.status(|s| s.held == 3 && names(s) == ["c"]).await;

    stream.end().await;
    let mut stream = server.stream().await;
    greet(&mut stream).await;
    stream.respond::<Address>(ADDRESS_TYPE, "n6", &[], &[]).await;
    client.status(|s| s.connected && s.rejected.is_empty()).await;
}

#[tokio::test]
async fn a_reconnect_names_what_is_held_and_takes_only_the_difference() {
    let mut server = Server::start().await;
    let mut client = Client::start(plaintext(&server));
    let mut stream = server.stream().await;
    greet(&mut stream).await;
    stream.respond(ADDRESS_TYPE, "n1", &[workload("a", "10.0.0.1"), workload("b", "10.0.0.2")], &[]).await;
    stream.respond(AUTHORIZATION_TYPE, "n2", &[policy("p")], &[]).await;
    client.state(|state| state.policy("shop/p").is_some()).await;
    stream.end().await;

    let mut stream = server.stream().await;
    let [addresses, policies] = greet(&mut stream).await;
    let held: Vec<_> =
        addresses.initial_resource_versions.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
    assert_eq!(held, [(uid("a"), "v-n1".to_owned()), (uid("b"), "v-n1".to_owned())]);
    assert_eq!(policies.initial_resource_versions.keys().collect::<Vec<_>>(), ["shop/p"]);
    assert!(addresses.node.is_some(), "each stream introduces itself");
    stream.respond(ADDRESS_TYPE, "n3", &[workload("a", "10.0.0.7")], &[&uid("b")]).await;
    stream.respond::<Authorization>(AUTHORIZATION_TYPE, "n4", &[], &["shop/p"]).await;
    let state = client.state(|state| state.policy("shop/p").is_none()).await;
    assert_eq!(state.workload_count(), 1);
    assert!(state.workload_by_ip("", ip("10.0.0.7")).is_some());
}

#[tokio::test]
async fn garbage_is_refused_by_name_and_the_last_good_state_keeps_serving() {
    let mut server = Server::start().await;
    let mut client = Client::start(plaintext(&server));
    let mut stream = server.stream().await;
    greet(&mut stream).await;
    stream.respond(ADDRESS_TYPE, "n1", &[workload("a", "10.0.0.1")], &[]).await;
    stream.request().await;

    stream.respond_raw("type.example.com/nonsense", "n2", &[("x", b"\xff\xff\xff".to_vec())]).await;
    let nack = stream.request().await;
    assert_eq!(nack.type_url, "type.example.com/nonsense");
    assert!(nack.error_detail.unwrap().message.contains("was not subscribed to"));

    stream.respond_raw(ADDRESS_TYPE, "n3", &[(&uid("a"), b"\xff\xff\xff".to_vec())]).await;
    let nack = stream.request().await;
    assert!(nack.error_detail.unwrap().message.starts_with(&format!("{}: cannot be decoded", uid("a"))));

    let many: Vec<_> = (0..500).map(|i| (format!("w{i}"), b"\xff".to_vec())).collect();
    let many: Vec<_> = many.iter().map(|(name, bytes)| (name.as_str(), bytes.clone())).collect();
    stream.respond_raw(ADDRESS_TYPE, "n4", &many).await;
    let message = stream.request().await.error_detail.unwrap().message;
    assert!(message.ends_with("and 450 more"), "the answer stays short: {} bytes", message.len());

    stream.respond_empty_resource(ADDRESS_TYPE, "n5", "hollow").await;
    assert_eq!(stream.request().await.error_detail.unwrap().message, "hollow: the resource is empty");
    let state = client.state(|_| true).await;
    assert_eq!(state.workload_count(), 1);
    assert!(state.workload_by_ip("", ip("10.0.0.1")).is_some());
}

#[tokio::test]
async fn bytes_that_are_no_http_and_servers_that_vanish_only_cost_retries() {
    let mut server = Server::start().await;
    let mut client = Client::start(plaintext(&server));
    let mut stream = server.stream().await;
    greet(&mut stream).await;
    stream.respond(ADDRESS_TYPE, "n1", &[workload("a", "10.0.0.1")], &[]).await;
    client.state(|state| state.workload_count() == 1).await;

    let address = server.kill().await;
    let status = client.status(|s| !s.connected && s.last_error.contains("cannot connect")).await;
    assert!(status.last_error.contains(&address.to_string()), "{}", status.last_error);
    assert_eq!(client.states.borrow().0.workload_count(), 1, "what is known keeps serving");

    let noise = server::serve_noise(address).await;
    client.status(|s| !s.connected && !s.last_error.contains("refused")).await;
    noise.abort();
    let _ = noise.await;

    let mut server = Server::start_at(address).await;
    let mut stream = server.stream().await;
    let [addresses, _] = greet(&mut stream).await;
    assert_eq!(addresses.initial_resource_versions.len(), 1, "it picks up where it was");
    stream.respond(ADDRESS_TYPE, "n1", &[workload("b", "10.0.0.2")], &[]).await;
    client.state(|state| state.workload_count() == 2).await;
}

#[tokio::test]
async fn refusals_are_reported_and_retried_and_the_token_is_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let token = dir.path().join("token");
    std::fs::write(&token, "stale\n").unwrap();
    let mut server = Server::start().await;
    server.require_token("fresh");
    let mut client = Client::start(ControlPlane { token: Some(token.clone()), ..plaintext(&server) });
    let status = client.status(|s| !s.last_error.is_empty()).await;
    assert!(status.last_error.contains("Unauthenticated: who are you"), "{}", status.last_error);
    std::fs::write(&token, "fresh\n").unwrap();
    let mut stream = server.stream().await;
    assert_eq!(stream.metadata("authorization").as_deref(), Some("Bearer fresh"));
    greet(&mut stream).await;
    std::fs::remove_file(&token).unwrap();
    stream.end().await;
    let status = client.status(|s| s.last_error.contains("token file")).await;
    assert!(status.last_error.contains("cannot read token file"), "{}", status.last_error);
}

#[tokio::test]
async fn settings_that_cannot_work_say_what_would() {
    let connect =
        |control_plane: ControlPlane| async move { control_plane.connect().await.unwrap_err().to_string() };
    let at = |address: &str| ControlPlane { address: address.into(), ..Default::default() };
    assert_eq!(
        connect(at("control:15010")).await,
        "control plane address \"control:15010\" is not valid: expected http://host:port or https://host:port"
    );
    assert!(connect(at("https://127.0.0.1:1")).await.contains("needs a root certificate file"));
    let missing =
        ControlPlane { root_cert: Some("/nonexistent/root.pem".into()), ..at("https://127.0.0.1:1") };
    assert!(
        connect(missing).await.starts_with("cannot read root certificate file \"/nonexistent/root.pem\"")
    );
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "not PEM").unwrap();
    let junk = ControlPlane { root_cert: Some(file.path().into()), ..at("https://127.0.0.1:1") };
    assert!(connect(junk).await.ends_with("holds no PEM certificate"));
    let headers = ControlPlane { headers: vec![("bad name".into(), "x".into())], ..at("http://127.0.0.1:1") };
    let mut metadata = tonic::metadata::MetadataMap::new();
    assert!(
        headers.authorize(&mut metadata).unwrap_err().to_string().contains("\"bad name\" cannot be sent")
    );
}

#[tokio::test]
async fn a_client_that_waits_long_tries_at_once_when_something_else_reached_the_control_plane() {
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let control_plane = ControlPlane { address: format!("http://{address}"), ..Default::default() };
    let again = control_plane.again.clone();
    let mut client = Client::start(control_plane);
    // Refused until the waits are long: the sum of those before the last is below three seconds.
    client.status(|status| !status.last_error.is_empty()).await;
    tokio::time::sleep(Duration::from_millis(2800)).await;
    let mut server = Server::start_at(address).await;
    let start = std::time::Instant::now();
    again.now();
    let _stream = timeout(PATIENCE, server.stream()).await.expect("no stream was opened");
    assert!(start.elapsed() < Duration::from_secs(1), "it waited for {:?}", start.elapsed());
}

#[tokio::test]
async fn whatever_else_asks_the_control_plane_tries_once_a_stream_is_open_though_its_answer_waits() {
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let control_plane = ControlPlane { address: format!("http://{address}"), ..Default::default() };
    let again = control_plane.again.clone();
    // Longer than any patience here: only being told ends it.
    let other = tokio::spawn(async move { again.sleep(PATIENCE * 100).await });
    let mut server = Server::start_at(address).await;
    let _client = Client::start(control_plane);
    let _stream = timeout(PATIENCE, server.stream()).await.expect("no stream was opened");
    timeout(PATIENCE, other).await.expect("it waits on").unwrap();
}
