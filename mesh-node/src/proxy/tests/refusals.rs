use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_core::hbone::{Authority, ConnectRequest};
use mesh_core::tls::testing::{Leaf, TestCa};
use mesh_core::xds::proto::security;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::bed::*;
use crate::config::Config;

/// The application must see a reset, not an end that looks complete.
async fn is_reset(connect: impl Future<Output = std::io::Result<TcpStream>>) {
    let mut rest = Vec::new();
    let read = async { connect.await?.read_to_end(&mut rest).await };
    let read = tokio::time::timeout(Duration::from_secs(10), read).await.unwrap();
    assert_eq!(read.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert!(rest.is_empty());
}

fn deny_all(index: &mut mesh_core::state::StateIndex) {
    let everything = security::Rule { clauses: vec![] };
    index.apply_policy(&policy("no", security::Action::Deny as i32, vec![everything])).unwrap();
}

#[tokio::test(flavor = "local")]
async fn a_denied_connection_is_reset_and_both_sides_say_why() {
    let bed = Bed::with(Config::default(), deny_all).await;
    is_reset(bed.a.try_connect(bed.echo)).await;
    until("both report", || !bed.a.codes().is_empty() && !bed.b.codes().is_empty()).await;
    assert_eq!(bed.a.codes(), ["M0212"], "the peer answered 401");
    let failure = bed.b.shared.failures.newest().remove(0);
    assert_eq!((failure.code.as_str(), failure.flag.as_str()), ("M0401", "DENY"));
    assert!(failure.error.contains("explicitly denied by: shop/no"), "{}", failure.error);
    assert_eq!(failure.src_identity.as_deref(), Some("spiffe://cluster.local/ns/shop/sa/a"));
}

#[tokio::test(flavor = "local")]
async fn plaintext_is_denied_by_a_policy_that_wants_an_identity_and_allowed_without_one() {
    let bed = Bed::new().await;
    // The echo server and the plaintext listener share an address, not a port: the application is where the
    // connection was going, which here is the listener's own port. So only the verdict is looked at.
    let strict = |index: &mut mesh_core::state::StateIndex| {
        let presence = security::string_match::MatchType::Presence(());
        let not_principals = vec![security::StringMatch { match_type: Some(presence) }];
        let matches = vec![security::Match { not_principals, ..Default::default() }];
        let rule = security::Rule { clauses: vec![security::Clause { matches }] };
        index.apply_policy(&policy("strict", security::Action::Deny as i32, vec![rule])).unwrap();
    };
    bed.b.publish(mesh(bed.a.ip, bed.b.ip, strict));
    is_reset(bed.b.plaintext()).await;
    assert_eq!(bed.b.codes(), ["M0401"]);
    // Through the tunnel the same policy lets it pass.
    assert!(exchange(bed.a.connect(bed.echo).await, b"x").await.is_ok());
}

#[tokio::test(flavor = "local")]
async fn a_peer_with_another_identity_than_the_workload_is_not_trusted() {
    let ca = Arc::new(TestCa::new());
    let bed = Bed::signed_by(Arc::clone(&ca), ca, Leaf::of, Config::default(), |_| ()).await;
    // As the near side knows it, the pod has another service account than the far side proves.
    let mut other = workload("b", bed.b.ip, "n2");
    other.service_account = "somebody-else".to_owned();
    bed.a.publish(mesh(bed.a.ip, bed.b.ip, |index| {
        index.apply_address(&other.uid.clone(), &address(other)).unwrap();
    }));
    is_reset(bed.a.try_connect(bed.echo)).await;
    until("reported", || !bed.a.codes().is_empty()).await;
    assert_eq!(bed.a.codes()[0], "M0101");
}

#[tokio::test(flavor = "local")]
async fn a_peer_of_a_foreign_authority_is_not_trusted() {
    let (ours, theirs) = (Arc::new(TestCa::new()), Arc::new(TestCa::new()));
    let bed = Bed::signed_by(ours, theirs, Leaf::of, Config::default(), |_| ()).await;
    is_reset(bed.a.try_connect(bed.echo)).await;
    until("reported", || !bed.a.codes().is_empty()).await;
    assert_eq!(bed.a.codes()[0], "M0106");
}

#[tokio::test(flavor = "local")]
async fn an_expired_certificate_is_never_served() {
    let expired = |identity: &mesh_core::identity::SpiffeId| Leaf {
        not_after: SystemTime::now() - Duration::from_secs(1),
        ..Leaf::of(identity)
    };
    let ca = Arc::new(TestCa::new());
    let mut config = Config::default();
    config.proxy.workload_wait = Duration::from_millis(300);
    let bed = Bed::signed_by(Arc::clone(&ca), ca, expired, config, |_| ()).await;
    is_reset(bed.a.try_connect(bed.echo)).await;
    until("the far side says why", || bed.b.codes().contains(&"M0120".to_owned())).await;
}

#[tokio::test(flavor = "local")]
async fn plaintext_on_the_tunnel_port_is_refused_with_a_code() {
    let bed = Bed::new().await;
    let mut stream = TcpStream::connect((bed.b.ip, 15_008)).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut rest = Vec::new();
    // An alert or a reset, but no service.
    let _ = stream.read_to_end(&mut rest).await;
    until("reported", || !bed.b.codes().is_empty()).await;
    assert_eq!(bed.b.codes(), ["M0111"]);
}

#[tokio::test(flavor = "local")]
async fn a_pod_over_its_limit_of_connections_is_reset_with_a_code() {
    let mut config = Config::default();
    config.proxy.max_connections_per_pod = 1;
    let bed = Bed::with(config, |_| ()).await;
    let outside = echo_server(fresh_ip()).await;
    let mut first = bed.a.connect(outside).await;
    first.read_u8().await.unwrap();
    is_reset(bed.a.try_connect(outside)).await;
    assert_eq!(bed.a.codes(), ["M0313"]);
    drop(first);
    until("the first is gone", || bed.a.pod.gauge.open() == 0).await;
    assert!(exchange(bed.a.connect(outside).await, b"x").await.is_ok());
}

#[tokio::test(flavor = "local")]
async fn an_application_that_does_not_listen_is_a_503_and_a_reset() {
    let bed = Bed::new().await;
    let closed = {
        let listener = tokio::net::TcpListener::bind((bed.b.ip, 0)).await.unwrap();
        listener.local_addr().unwrap()
    };
    is_reset(bed.a.try_connect(closed)).await;
    until("both report", || !bed.a.codes().is_empty() && !bed.b.codes().is_empty()).await;
    assert_eq!((bed.a.codes()[0].as_str(), bed.b.codes()[0].as_str()), ("M0213", "M0301"));
}

#[tokio::test(flavor = "local")]
async fn an_application_that_calls_the_meshs_own_ports_on_loopback_is_reset() {
    let bed = Bed::new().await;
    is_reset(bed.a.try_connect(SocketAddr::new(bed.b.ip, 15_001))).await;
    assert_eq!(bed.a.codes(), ["M0312"]);
}

#[tokio::test(flavor = "local")]
async fn a_tunnel_leads_only_to_this_pod_and_not_to_the_meshs_own_ports() {
    let bed = Bed::new().await;
    let tunnel = bed.a.tunnel(bed.b.ip, "spiffe://cluster.local/ns/shop/sa/b").await;
    let cases: [(Authority, u16, &str); 4] = [
        (SocketAddr::new(bed.a.ip, 80).into(), 400, "M0306"),
        ("203.0.113.9:80".parse().unwrap(), 400, "M0306"),
        (SocketAddr::new(bed.b.ip, 15_006).into(), 503, "M0307"),
        ("nobody.shop.svc.cluster.local:80".parse().unwrap(), 503, "M0308"),
    ];
    for (authority, status, code) in cases {
        match tunnel.open(&ConnectRequest::to(authority.clone())).await {
            Err(mesh_core::hbone::Error::Status(answer)) => {
                assert_eq!(answer.as_u16(), status, "{authority}")
            }
            other => panic!("{authority}: {other:?}"),
        }
        assert_eq!(bed.b.codes()[0], code, "{authority}");
    }
    assert!(tunnel.open(&ConnectRequest::to(bed.echo)).await.is_ok(), "the tunnel itself is not harmed");
}

#[tokio::test(flavor = "local")]
async fn a_pod_that_is_gone_takes_its_connections_with_it() {
    let bed = Bed::new().await;
    let mut stream = bed.a.connect(bed.echo).await;
    stream.read_u8().await.unwrap();
    bed.b.pod.gone.cancel();
    let mut rest = Vec::new();
    let _ = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut rest)).await.unwrap();
    until("reported", || bed.b.codes().contains(&"M0315".to_owned())).await;
}

#[tokio::test(flavor = "local")]
async fn a_denial_for_want_of_an_allow_names_the_policies_that_do_not_allow() {
    let bed = Bed::with(Config::default(), |index| {
        index.apply_policy(&policy("nobody", security::Action::Allow as i32, vec![])).unwrap();
    })
    .await;
    is_reset(bed.a.try_connect(bed.echo)).await;
    until("reported", || !bed.b.codes().is_empty()).await;
    let failure = bed.b.shared.failures.newest().remove(0);
    assert_eq!(failure.decided_by.as_deref(), Some("AuthorizationPolicy shop/nobody"));
}

#[tokio::test(flavor = "local")]
async fn a_revoked_peer_loses_its_open_tunnels_and_gets_no_new_one() {
    let bed = Bed::new().await;
    let mut stream = bed.a.connect(bed.echo).await;
    stream.read_u8().await.unwrap();
    let id = "spiffe://cluster.local/ns/shop/sa/a".parse().unwrap();
    let serial = bed.a.shared.certificates.get(&id).unwrap().serial().parse().unwrap();
    bed.revocations.load_pem(bed.ca.crl(&[serial]).as_bytes()).unwrap();
    bed.b.worker.tell(crate::proxy::worker::Command::RecheckPeers);
    is_reset_later(stream).await;
    until("the far side says why", || bed.b.codes().contains(&"M0107".to_owned())).await;
    is_reset(bed.a.try_connect(bed.echo)).await;
}

/// As [`is_reset`], for a connection that has carried bytes.
async fn is_reset_later(mut stream: TcpStream) {
    let mut rest = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut rest)).await.unwrap();
    assert_eq!(read.unwrap_err().kind(), ErrorKind::ConnectionReset);
}
