//! Writes the seeds of every fuzz target, from what the product itself makes of real values: resources of a real
//! conversion, bytes of a real tunnel, certificates of a real CA. The YAML ones are written by hand, and are the start.
//!
//! Keys and nonces are new each time, so that a second run changes the files; run it when a format changed.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a tool of the developers: a panic is the report")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use hickory_proto::op::{Message, MessageType, OpCode, Query};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use mesh_control::ads::snapshot::{ResourceType, Snapshot};
use mesh_control::ads::subscription::Subscription;
use mesh_control::ca::authority::{Authority, new_root};
use mesh_control::convert::{Captured, Mesh, convert};
use mesh_control::source::dir::Loader;
use mesh_core::hbone::{
    Authority as To, ClientConnection, ConnectRequest, Incoming, ServerConnection, Settings,
};
use mesh_core::identity::SpiffeId;
use mesh_core::tls::testing::{Leaf, TestCa};
use mesh_core::tls::{Channel, KeyAndCsr};
use mesh_core::xds::delta::DeltaState;
use mesh_core::xds::proto::node::{EnrolledPod, EnrolmentReport};
use prost::Message as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

fn main() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..");
    connect_requests(&seeds(&root, "mesh-core", "connect_request"));
    tunnel(&seeds(&root, "mesh-core", "server_bytes"), &seeds(&root, "mesh-core", "client_bytes"));
    resources(&root);
    certificates(&seeds(&root, "mesh-core", "certificates"));
    dns(&seeds(&root, "mesh-node", "dns_query"), &seeds(&root, "mesh-node", "dns_answer"));
    small_texts(&seeds(&root, "mesh-node", "small_texts"));
    node_requests(&seeds(&root, "mesh-control", "node_requests"));
}

fn seeds(root: &Path, krate: &str, target: &str) -> PathBuf {
    let dir = root.join(krate).join("fuzz/seeds").join(target);
    fs::create_dir_all(&dir).unwrap();
    dir
}

fn write(dir: &Path, name: &str, parts: &[&[u8]]) {
    fs::write(dir.join(name), parts.concat()).unwrap();
}

fn connect_requests(dir: &Path) {
    let baggage = "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.deployment.name=cart,service.name=cart,\
                   service.version=v1,cloud.region=r,cloud.availability_zone=z";
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let forwarded = "for=\"10.0.0.1:4711\";host=pay.shop.svc.cluster.local";
    let text = format!("10.0.0.7:8080\n{baggage}\n{forwarded}\n{trace}\nwest");
    write(dir, "address", &[text.as_bytes()]);
    write(dir, "host", &[b"pay.shop.svc.cluster.local:80\n\nfor=\"[fd00::1]:1\"\n\n"]);
    write(dir, "v6", &[b"[fd00::7]:15008"]);
}

/// The bytes of both directions of one tunnel with one stream that echoes.
fn tunnel(to_server: &Path, to_client: &Path) {
    let rt = tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default());
    let rt = rt.unwrap();
    let (sent, answered) = rt.block_on(recorded());
    // The flag: no preface is put in front, the server reads.
    write(to_server, "echo", &[&[2], &sent]);
    write(to_server, "only-preface", &[&[1]]);
    write(to_server, "cut", &[&[2], &sent[..sent.len() / 2]]);
    write(to_client, "echo", &[&[0], &answered]);
    write(to_client, "silent", &[&[3]]);
    write(to_client, "cut", &[&[0], &answered[..answered.len() / 2]]);
    // 200 and GOAWAY, as frames.
    let ok = [0, 0, 1, 1, 4, 0, 0, 0, 1, 0x88];
    let goaway = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0];
    write(to_client, "goaway", &[&[1], &ok, &goaway]);
}

async fn recorded() -> (Vec<u8>, Vec<u8>) {
    let (near, mut relay_near) = tokio::io::duplex(1 << 16);
    let (mut relay_far, far) = tokio::io::duplex(1 << 16);
    let (sent, answered) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(Vec::new())));
    let (up, down) = (Arc::clone(&sent), Arc::clone(&answered));
    let relay = tokio::spawn(async move {
        let (mut a, mut b) = ([0; 4096], [0; 4096]);
        loop {
            tokio::select! {
                n = relay_near.read(&mut a) => match n {
                    Ok(n) if n > 0 => {
                        up.lock().unwrap().extend_from_slice(&a[..n]);
                        relay_far.write_all(&a[..n]).await.unwrap();
                    }
                    _ => return,
                },
                n = relay_far.read(&mut b) => match n {
                    Ok(n) if n > 0 => {
                        down.lock().unwrap().extend_from_slice(&b[..n]);
                        relay_near.write_all(&b[..n]).await.unwrap();
                    }
                    _ => return,
                },
            }
        }
    });
    tokio::task::spawn_local(async move {
        let mut server = ServerConnection::handshake(Channel::bare(far), &Settings::server()).await.unwrap();
        while let Some(Ok(incoming)) = server.accept().await {
            let Incoming::Connect(connect) = incoming else { continue };
            let mut stream = connect.accept(None).unwrap().into_io();
            tokio::task::spawn_local(async move {
                let mut data = Vec::new();
                stream.read_to_end(&mut data).await.unwrap();
                stream.write_all(&data).await.unwrap();
                stream.shutdown().await.unwrap();
            });
        }
    });
    let (client, driver) = ClientConnection::handshake(Channel::bare(near), &Settings::client());
    let driver = tokio::task::spawn_local(driver);
    let to: To = "10.0.0.7:8080".parse().unwrap();
    let mut stream = client.open(&ConnectRequest::to(to)).await.unwrap().stream.into_io();
    stream.write_all(b"hello").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut echoed = Vec::new();
    stream.read_to_end(&mut echoed).await.unwrap();
    assert_eq!(echoed, b"hello");
    drop((stream, client));
    let _ = driver.await;
    let _ = relay.await;
    let bytes = |of: &Mutex<Vec<u8>>| of.lock().unwrap().clone();
    (bytes(&sent), bytes(&answered))
}

/// What the control plane sends of the YAML seeds: everything at once, and one file after the other.
fn resources(root: &Path) {
    let yaml = seeds(root, "mesh-control", "yaml");
    let dir = seeds(root, "mesh-core", "resources");
    let mut together = Vec::new();
    for name in ["shop", "entries"] {
        let text = fs::read_to_string(yaml.join(name).with_extension("yaml")).unwrap();
        let one = responses(&text);
        write(&dir, name, &[&one]);
        together.extend(one);
    }
    write(&dir, "both", &[&together]);
}

fn responses(text: &str) -> Vec<u8> {
    let state =
        Loader::new("istio-system").load([("a.yaml".to_owned(), Ok(text.to_owned()))].into()).unwrap();
    assert!(state.problems.is_empty(), "{:?}", state.problems);
    let mesh = Mesh::default().with_settings(&state.objects);
    let resources = convert(&state.objects, &mesh, &Captured::new());
    let snapshot = Snapshot::build(&resources, &Snapshot::default());
    let mut bytes = Vec::new();
    for request in DeltaState::new(Default::default()).initial_requests() {
        let mut subscription = Subscription::new(ResourceType::from_url(&request.type_url).unwrap());
        let _ = subscription.request(&request, "a");
        let mut response = subscription.respond(&snapshot).unwrap().read().unwrap();
        bytes.extend(response.encode_length_delimited_to_vec());
        // And what a deletion looks like.
        response.removed_resources = response.resources.drain(..).take(1).map(|r| r.name).collect();
        bytes.extend(response.encode_length_delimited_to_vec());
    }
    bytes
}

fn delimited(ders: &[&[u8]]) -> Vec<u8> {
    let one = |der: &&[u8]| [&u16::try_from(der.len()).unwrap().to_be_bytes(), *der].concat();
    ders.iter().flat_map(one).collect()
}

fn certificates(dir: &Path) {
    let ca = TestCa::new();
    let id = SpiffeId::new("cluster.local", "shop", "cart");
    let own = ca.issue(&id);
    let (leaf, root) = (own.chain()[0].as_ref(), own.roots()[0].as_ref());
    write(dir, "identity", &[&[0], id.to_string().as_bytes()]);
    write(dir, "peer", &[&[1], &delimited(&[leaf])]);
    let key = KeyAndCsr::generate(&id).unwrap();
    let chain = ca.sign(key.csr_pem(), &Leaf::of(&id));
    write(dir, "answer", &[&[2], chain.join("#").as_bytes()]);
    write(dir, "answer-der", &[&[3], &delimited(&[leaf, root])]);
    let crl = ca.crl(&[7]);
    write(dir, "list", &[&[4], crl.as_bytes()]);
    write(dir, "list-der", &[&[4], pem::parse(&crl).unwrap().contents()]);
}

fn dns(queries: &Path, answers: &Path) {
    let name = Name::from_ascii("a.shop.svc.cluster.local.").unwrap();
    let mut query = Message::new(7, MessageType::Query, OpCode::Query);
    query.metadata.recursion_desired = true;
    query.add_query(Query::query(name.clone(), RecordType::A));
    let asked = query.to_vec().unwrap();
    let mut answer = query.clone();
    answer.metadata.message_type = MessageType::Response;
    answer.add_answer(Record::from_rdata(name, 30, RData::A(A::new(10, 0, 0, 1))));
    let answered = answer.to_vec().unwrap();
    let mut edns = query.clone();
    edns.set_edns(Default::default());
    write(queries, "a", &[&asked]);
    write(queries, "edns", &[&edns.to_vec().unwrap()]);
    write(queries, "answer", &[&answered]);
    for (kind, text) in
        [(RecordType::AAAA, "b.shop"), (RecordType::SRV, "x.com"), (RecordType::PTR, "1.0.0.10.in-addr.arpa")]
    {
        let mut other = Message::new(8, MessageType::Query, OpCode::Query);
        other.add_query(Query::query(Name::from_ascii(text).unwrap(), kind));
        write(queries, &text.replace('.', "-"), &[&other.to_vec().unwrap()]);
    }
    let length = u16::try_from(asked.len()).unwrap().to_be_bytes();
    write(answers, "a", &[&length, &asked, &answered]);
    write(answers, "header-only", &[&length, &asked, &[0, 7, 0x81, 0x82, 0, 0, 0, 0, 0, 0, 0, 0]]);
}

fn small_texts(dir: &Path) {
    let ends = [
        0, 10, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 232, 10, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        0, 0, 0, 0, 80,
    ];
    write(dir, "proxy-header", &[&[0], &ends, b"spiffe://cluster.local/ns/shop/sa/cart"]);
    write(
        dir,
        "resolv-conf",
        &[&[1], b"# comment\nsearch shop.svc\nnameserver 10.0.0.53\nnameserver fd00::53\n"],
    );
    write(dir, "why", &[&[2], b"shop/cart\n[fd00::1]:80"]);
    write(dir, "why-name", &[&[2], b"cart\nservice/shop/pay:8080"]);
}

fn node_requests(dir: &Path) {
    let id = SpiffeId::new("cluster.local", "shop", "cart");
    let key = KeyAndCsr::generate(&id).unwrap();
    write(dir, "csr", &[&[0], key.csr_pem().as_bytes()]);
    write(dir, "csr-der", &[&[1], pem::parse(key.csr_pem()).unwrap().contents()]);
    let (cert, ca_key) = new_root("seed", SystemTime::now()).unwrap();
    let authority = Authority::new(&cert, &ca_key, "", &cert).unwrap();
    authority.sign(key.csr_pem(), &id, std::time::Duration::from_secs(60), SystemTime::now()).unwrap();
    write(dir, "token", &[&[2]]);
    write(dir, "token-edited", &[&[2], &[0, 40, b'x']]);
    let mut requests = DeltaState::new(Default::default()).initial_requests();
    requests[0].resource_names_subscribe = vec!["*".into(), "shop/backend.shop.svc.cluster.local".into()];
    requests[0].resource_names_unsubscribe = vec!["*".into()];
    let bytes: Vec<u8> = requests.iter().flat_map(|r| r.encode_length_delimited_to_vec()).collect();
    write(dir, "subscriptions", &[&[3], &bytes]);
    let pod = |uid: &str, problem: &str| EnrolledPod { workload_uid: uid.into(), problem: problem.into() };
    let pods = vec![pod("Kubernetes//Pod/shop/a", ""), pod("Kubernetes//Pod/shop/b", "no slots")];
    write(dir, "report", &[&[4], &EnrolmentReport { node: "a".into(), pods }.encode_to_vec()]);
}
