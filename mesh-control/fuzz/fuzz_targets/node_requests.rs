//! Whatever a node, or somebody in its place, asks the control plane. The first byte says what the rest is.
//!
//! 0, 1: a certificate request (PEM, DER): what is signed is the identity that was decided on, whatever the request says.
//! 2: a token: edits of a good one; only the good one is taken, and it names only its own node.
//! 3: subscriptions, messages `DeltaDiscoveryRequest` each after its length: a client that then asks for everything, by
//!    the real client's code, holds exactly what there is.
//! 4: an enrolment report: what it says is captured, and nothing else.
#![no_main]

use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};

use libfuzzer_sys::fuzz_target;
use mesh_control::ads::snapshot::{ResourceType, Snapshot};
use mesh_control::ads::subscription::Subscription;
use mesh_control::auth::{Caller, TokenKey};
use mesh_control::ca::authority::{Authority, new_root};
use mesh_control::convert::{Captured, Mesh, convert};
use mesh_control::enrol::Enrolments;
use mesh_control::source::dir::Loader;
use mesh_core::identity::SpiffeId;
use mesh_core::tls::verify::uri_sans;
use mesh_core::xds::delta::{DeltaState, Handler};
use mesh_core::xds::proto::discovery::DeltaDiscoveryRequest;
use mesh_core::xds::proto::node::EnrolmentReport;
use mesh_core::xds::proto::security::Authorization;
use mesh_core::xds::proto::workload::Address;
use prost::Message as _;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;

const NODE: &str = "node-a";

fuzz_target!(|data: &[u8]| {
    let Some((kind, rest)) = data.split_first() else { return };
    match kind % 5 {
        0 => request(&String::from_utf8_lossy(rest)),
        1 => request(&pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", rest))),
        2 => token(rest),
        3 => subscriptions(rest),
        _ => report(rest),
    }
});

static AUTHORITY: LazyLock<Authority> = LazyLock::new(|| {
    let (cert, key) = new_root("fuzz", SystemTime::now()).expect("a root");
    Authority::new(&cert, &key, "", &cert).expect("an authority")
});

fn request(csr: &str) {
    let identity = SpiffeId::new("cluster.local", "shop", "cart");
    let Ok(chain) = AUTHORITY.sign(csr, &identity, Duration::from_secs(60), SystemTime::now()) else {
        return;
    };
    let leaf = CertificateDer::from_pem_slice(chain[0].as_bytes()).expect("a certificate");
    assert_eq!(uri_sans(&leaf).expect("well-formed"), [identity.to_string()]);
    assert_eq!(chain.len(), 2, "leaf and root");
}

static TOKENS: LazyLock<(TokenKey, String)> = LazyLock::new(|| {
    let dir = tempfile::tempdir().expect("a directory");
    let key = TokenKey::open(dir.path()).expect("a key");
    let token = key.issue(&caller(), Duration::from_secs(86_400), SystemTime::now()).expect("a token");
    (key, token)
});

fn caller() -> Caller {
    Caller {
        node: NODE.into(),
        namespace: "istio-system".into(),
        service_account: "mesh-node".into(),
        agent: true,
    }
}

/// Input: pairs of a place in the token and the byte to put there; a pair for the end cuts it.
fn token(edits: &[u8]) {
    let (key, good) = &*TOKENS;
    let mut bytes = good.clone().into_bytes();
    for edit in edits.chunks_exact(3) {
        let at = usize::from(u16::from_be_bytes([edit[0], edit[1]])) % (bytes.len() + 1);
        match bytes.get_mut(at) {
            Some(byte) => *byte = edit[2],
            None => bytes.truncate(usize::from(edit[2]).max(1)),
        }
    }
    let text = String::from_utf8_lossy(&bytes);
    match key.verify(&text) {
        Ok(found) => assert!(text == good.as_str() && found == caller(), "{text} was taken for {found:?}"),
        Err(_) => assert_ne!(text, good.as_str()),
    }
}

const OBJECTS: &str = include_str!("../seeds/yaml/shop.yaml");

static SNAPSHOT: LazyLock<Snapshot> = LazyLock::new(|| {
    let files = [("a.yaml".to_owned(), Ok(OBJECTS.to_owned()))].into();
    let state = Loader::new("istio-system").load(files).expect("the first state");
    let mesh = Mesh::default().with_settings(&state.objects);
    Snapshot::build(&convert(&state.objects, &mesh, &Captured::new()), &Snapshot::default())
});

/// Counts what a client is told.
#[derive(Default)]
struct Told(usize);

impl Handler for Told {
    fn address(&mut self, _: &str, _: &Address) -> Result<(), String> {
        self.0 += 1;
        Ok(())
    }
    fn remove_address(&mut self, _: &str) {}
    fn policy(&mut self, _: &str, _: &Authorization) -> Result<(), String> {
        self.0 += 1;
        Ok(())
    }
    fn remove_policy(&mut self, _: &str) {}
    fn commit(&mut self, _: bool) {}
}

fn subscriptions(mut bytes: &[u8]) {
    let mut subscriptions = ResourceType::ALL.map(Subscription::new);
    while let Ok(request) = DeltaDiscoveryRequest::decode_length_delimited(&mut bytes) {
        for subscription in &mut subscriptions {
            let _ = subscription.request(&request, NODE);
            if let Some(response) = subscription.respond(&SNAPSHOT) {
                assert!(!response.own.nonce.is_empty());
            }
            assert!(subscription.respond(&SNAPSHOT).is_none(), "told twice");
        }
        if bytes.is_empty() {
            break;
        }
    }
    // Whatever a stream was asked before, a new one is not touched by it.
    let mut client = DeltaState::new(Default::default());
    let mut told = Told::default();
    let mut there = 0;
    for request in client.initial_requests() {
        let kind = ResourceType::from_url(&request.type_url).expect("a type that there is");
        let mut fresh = Subscription::new(kind);
        let _ = fresh.request(&request, NODE);
        let response = fresh.respond(&SNAPSHOT).expect("the first answer");
        let response = response.read().expect("a message");
        let received = client.receive(response, &mut told);
        assert_eq!(received.rejected, []);
        there += SNAPSHOT.entries(kind).len();
    }
    assert_eq!((client.held(), told.0), (there, there));
}

fn report(bytes: &[u8]) {
    let Ok(report) = EnrolmentReport::decode(bytes) else { return };
    let enrolments = Arc::new(Enrolments::open(None));
    enrolments.report(report.clone());
    let captured = enrolments.captured();
    let named = captured.get(&report.node).cloned().unwrap_or_default();
    assert!(captured.len() <= 1, "a node reports for itself only");
    for uid in &named {
        let says = |pod: &&_| -> bool { is_captured(pod, uid) };
        assert!(report.pods.iter().any(|pod| says(&pod)), "{uid} was not reported as captured");
    }
}

fn is_captured(pod: &mesh_core::xds::proto::node::EnrolledPod, uid: &str) -> bool {
    pod.workload_uid == uid && pod.problem.is_empty()
}
