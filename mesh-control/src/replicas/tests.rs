use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_core::flows::Flow;
use mesh_core::xds::channel::ControlPlane;
use mesh_core::xds::proto::node::replica_service_server::ReplicaServiceServer;
use mesh_core::xds::proto::node::{EnrolledPod, EnrolmentReport, FlowReport, ObjectVersion};
use tokio::net::TcpListener;
use tokio::time::{Instant, sleep};
use tokio_stream::wrappers::TcpListenerStream;

use super::client::{Client, FollowError};
use super::*;
use crate::ads::{Clients, Programmed};
use crate::auth::{Access, Caller, TokenKey};
use crate::convert::Mesh;
use crate::enrol::Report;
use crate::hub::{Debounce, Hub};
use crate::metrics::Metrics;
use crate::model::{Key, Kind, ObjectRef};
use crate::relay::Limits;
use crate::relay::questions::NoAnswer;
use crate::testing::{load, objects};

fn told() -> Told {
    let relay = Relay::new(Limits::default(), Arc::new(Metrics::new()));
    Told { enrolments: Arc::new(Enrolments::open(None)), relay: Arc::new(relay), agents: Arc::default() }
}

fn report(node: &str, captured: &[&str]) -> EnrolmentReport {
    let pod = |uid: &&str| EnrolledPod { workload_uid: (*uid).to_owned(), problem: String::new() };
    EnrolmentReport { node: node.to_owned(), pods: captured.iter().map(pod).collect() }
}

fn captured(told: &Told, node: &str) -> Vec<String> {
    told.enrolments.captured().get(node).into_iter().flatten().cloned().collect()
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        sleep(Duration::from_millis(10)).await;
    }
}

/// A replica that listens; what connects to it as an account.
struct Bed {
    told: Told,
    hub: Arc<Hub>,
    clients: Arc<Clients>,
    objects: watch::Sender<Arc<State>>,
    dir: tempfile::TempDir,
    address: SocketAddr,
    key: Arc<TokenKey>,
}

impl Bed {
    async fn start() -> Self {
        let (told, dir) = (told(), tempfile::tempdir().unwrap());
        let key = Arc::new(TokenKey::open(dir.path()).unwrap());
        let account = Key::new("istio-system", "istiod");
        let (hub, clients) = (Arc::new(Hub::new(Mesh::default())), Arc::new(Clients::default()));
        let (objects, states) = watch::channel(Arc::default());
        let (of, of_hub) = (Replicas::new(None, told.clone()), hub.clone());
        tokio::spawn(async move {
            of_hub.run(states, of, Debounce::default(), Arc::new(Metrics::new())).await;
        });
        let proxies = Arc::new(Proxies::new(hub.clone(), clients.clone()));
        let server =
            ReplicaServer { told: told.clone(), proxies, access: Access::Token(key.clone()), account };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = tonic::transport::Server::builder().add_service(ReplicaServiceServer::new(server));
        tokio::spawn(router.serve_with_incoming(TcpListenerStream::new(listener)));
        Self { told, hub, clients, objects, dir, address, key }
    }

    fn client(&self, account: &str, told: &Told) -> Client {
        let caller = Caller {
            node: "n1".into(),
            namespace: "istio-system".into(),
            service_account: account.into(),
            agent: true,
        };
        let token = self.key.issue(&caller, Duration::from_secs(60), SystemTime::now()).unwrap();
        let path = self.dir.path().join(account);
        std::fs::write(&path, token).unwrap();
        let address = format!("http://{}", self.address);
        let server = ControlPlane { address, token: Some(path), ..ControlPlane::default() };
        Client::of("a", server, told.clone())
    }
}

#[tokio::test]
async fn what_agents_tell_one_replica_the_others_know_and_they_ask_through_it() {
    let bed = Bed::start().await;
    bed.told.enrolments.report(report("n1", &["p1"]));
    let other = told();
    assert_eq!(bed.client("istiod", &other).first().await.unwrap(), 1);
    assert_eq!(captured(&other, "n1"), ["p1"], "before anything is served");

    let following = tokio::spawn(bed.client("istiod", &other).run());
    bed.told.agents.echo("n1");
    until("its agents are known", || other.agents.nodes().contains("n1")).await;
    bed.told.enrolments.report(report("n1", &["p1", "p2"]));
    bed.told.enrolments.report(report("n2", &["p3"]));
    until("later reports are known", || {
        captured(&other, "n1") == ["p1", "p2"] && captured(&other, "n2") == ["p3"]
    })
    .await;

    let events = mesh_core::flows::lines([&Flow { node: "n1".into(), ..Flow::default() }]);
    bed.told.relay.tell(FlowReport { node: "n1".into(), events, held_back: 3, lost: 0 });
    until("events are known", || other.relay.newest() == 1).await;
    assert_eq!(other.relay.nodes()["n1"].held_back, 3);

    let answer = other.agents.ask("n1", "/status?x=y").await.unwrap();
    assert_eq!((answer.status, answer.content_type.as_str()), (200, "text/plain"));
    assert_eq!(answer.body, "/status?x=y".repeat(100_000).as_bytes(), "in many pieces");
    let unknown = other.agents.ask("n2", "/status").await.unwrap_err();
    assert!(matches!(&unknown, NoAnswer::Unknown { connected, .. } if connected == "n1"), "{unknown}");
    following.abort();
}

#[tokio::test]
async fn proxies_of_every_replica_count_and_a_replica_that_does_not_answer_is_waited_for() {
    const POLICY: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop, uid: u, generation: 2}
spec: {rules: [{}]}
";
    let bed = Bed::start().await;
    let here = told();
    let following = tokio::spawn(bed.client("istiod", &here).run());
    until("the other replica is known", || !here.agents.replicas().is_empty()).await;
    bed.clients.having("old", 0);
    let asked = |generation| ObjectVersion {
        kind: "AuthorizationPolicy".into(),
        namespace: "shop".into(),
        name: "p".into(),
        uid: "u".into(),
        generation,
    };
    let object = ObjectRef { kind: Kind::AuthorizationPolicy, key: Key::new("shop", "p") };
    let ask =
        async |generation| programmed(&here.agents, vec![asked(generation)]).await.said[&object].clone();
    let names = vec!["old".to_owned()];
    let nobody = Programmed { waiting: 1, names, ..Programmed::default() };
    assert_eq!(ask(2).await, nobody, "it has not read anything");

    bed.objects.send_replace(Arc::new(State { synced: true, ..load(POLICY) }));
    until("it has read the policy", || bed.hub.ready()).await;
    bed.clients.having("new", bed.hub.snapshot().number);
    assert_eq!(ask(2).await, Programmed { current: 1, ..nobody.clone() });
    let first = bed.hub.snapshot().number;
    let more = format!("{POLICY}---{}", POLICY.replace("name: p", "name: q"));
    bed.objects.send_replace(Arc::new(State { synced: true, ..load(&more) }));
    until("it has read more", || bed.hub.snapshot().number > first).await;
    assert_eq!(ask(2).await.current, 1, "what came later has no part in it");
    assert_eq!(ask(3).await.current, 0, "a version that it has not read");

    std::fs::remove_file(bed.dir.path().join("istiod")).unwrap();
    assert_eq!(programmed(&here.agents, vec![asked(2)]).await.silent, ["a"], "it refuses");
    following.abort();
}

#[tokio::test]
async fn only_replicas_are_told_and_may_ask() {
    let bed = Bed::start().await;
    let error = bed.client("undermesh-node", &told()).first().await.unwrap_err();
    assert!(
        matches!(&error, FollowError::Status(status) if status.code() == tonic::Code::PermissionDenied),
        "{error}"
    );
}

#[test]
fn the_later_report_of_a_node_holds_and_the_node_itself_is_always_later() {
    let told = told();
    let learnt = |at_us, uid: &str| Report { at_us, ..Report::of(report("", &[uid]).pods) };
    told.enrolments.report(report("n1", &["own"]));
    assert!(!told.enrolments.learn("n1".into(), learnt(1, "old")));
    assert_eq!(captured(&told, "n1"), ["own"]);
    // The clock of the other replica is an hour ahead.
    let ahead = told.enrolments.reports()["n1"].at_us + 3_600_000_000;
    assert!(told.enrolments.learn("n1".into(), learnt(ahead, "elsewhere")));
    assert_eq!(captured(&told, "n1"), ["elsewhere"]);
    told.enrolments.report(report("n1", &["back"]));
    assert_eq!(captured(&told, "n1"), ["back"]);
    assert!(!told.enrolments.learn("n1".into(), learnt(ahead, "elsewhere")), "it comes a second time");
    assert!(!told.enrolments.learn("n2".into(), learnt(0, "untimed")));
}

const SLICES: &str = "
{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: istio-system}, spec: {containers: []}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: istiod-4, namespace: istio-system, labels: {kubernetes.io/service-name: istiod}}
addressType: IPv4
ports: [{name: grpc-xds, port: 15010}, {name: https-dns, port: 15012}]
endpoints:
- {addresses: [10.0.0.1], conditions: {ready: true}, targetRef: {kind: Pod, name: a}}
- {addresses: [10.0.0.2], conditions: {ready: true}, targetRef: {kind: Pod, name: b}}
- {addresses: [10.0.0.3], conditions: {ready: false}, targetRef: {kind: Pod, name: c}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: istiod-6, namespace: istio-system, labels: {kubernetes.io/service-name: istiod}}
addressType: IPv6
ports: [{name: https-dns, port: 15012}]
endpoints:
- {addresses: ['fd00::2'], conditions: {ready: true}, targetRef: {kind: Pod, name: b}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: istiod-4, namespace: shop, labels: {kubernetes.io/service-name: istiod}}
addressType: IPv4
ports: [{name: https-dns, port: 15012}]
endpoints:
- {addresses: [10.0.0.9], conditions: {ready: true}, targetRef: {kind: Pod, name: evil}}
";

#[test]
fn the_others_are_the_endpoints_of_the_control_planes_own_service() {
    let settings = Settings {
        replica: "a".into(),
        namespace: "istio-system".into(),
        token: PathBuf::new(),
        roots: PathBuf::new(),
    };
    let objects = objects(SLICES);
    let found = |only_ready| {
        let all = others(&objects, &settings, only_ready).into_iter();
        all.map(|(name, address)| format!("{name} {address}")).collect::<Vec<_>>()
    };
    assert_eq!(found(false), ["b 10.0.0.2:15012", "c 10.0.0.3:15012"]);
    assert_eq!(found(true), ["b 10.0.0.2:15012"]);
}

#[tokio::test(start_paused = true)]
async fn before_anything_is_told_the_agents_of_nodes_that_had_captured_pods_have_their_say_but_not_forever() {
    let objects = objects(
        "
apiVersion: v1
kind: Pod
metadata: {name: p, namespace: shop, annotations: {undermesh.io/redirection: enabled}}
spec: {nodeName: n1, containers: []}
---
apiVersion: v1
kind: Pod
metadata: {name: q, namespace: shop}
spec: {nodeName: n2, containers: []}
",
    );
    let told = told();
    let replicas = Replicas::new(None, told.clone());
    let start = Instant::now();
    replicas.agents_first(&objects).await;
    assert_eq!(start.elapsed(), AGENTS, "n1 says nothing");
    let start = Instant::now();
    let say = async {
        sleep(Duration::from_secs(1)).await;
        told.enrolments.report(report("n1", &["p"]));
    };
    tokio::join!(replicas.agents_first(&objects), say);
    assert_eq!(start.elapsed(), Duration::from_secs(1));
    let start = Instant::now();
    replicas.agents_first(&objects).await;
    assert_eq!(start.elapsed(), Duration::ZERO);
}
