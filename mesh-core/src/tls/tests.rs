//! Each rule of the handshake, over real sockets.

mod records;

use std::time::{Duration, SystemTime};

use rcgen::ExtendedKeyUsagePurpose;
use rustls::server::Acceptor;
use rustls::{CipherSuite, ClientConfig, NamedGroup};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::handshake::Peer;
use super::testing::{Leaf, TestCa};
use super::*;
use crate::error::{Code, ResponseFlag};
use crate::identity::SpiffeId;

fn cart() -> SpiffeId {
    SpiffeId::new("cluster.local", "shop", "cart")
}

fn pay() -> SpiffeId {
    SpiffeId::new("cluster.local", "shop", "pay")
}

/// What both sides saw. The client's view includes its first read, which is when it learns of a refusal.
struct Outcome {
    client: Result<Peer, TlsError>,
    server: Result<Peer, TlsError>,
}

async fn handshake_with(config: Arc<ClientConfig>, server: &WorkloadCertificate) -> Outcome {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server_config = server.server_config();
    let server = async {
        let (socket, _) = listener.accept().await.unwrap();
        let (mut stream, peer) = accept(server_config, socket).await?;
        stream.write_all(b"hello").await.unwrap();
        stream.shutdown().await.unwrap();
        Ok(peer)
    };
    let client = async {
        let socket = TcpStream::connect(address).await.unwrap();
        let (mut stream, peer) = connect(config, socket).await?;
        let mut hello = Vec::new();
        stream.read_to_end(&mut hello).await?;
        assert_eq!(hello, b"hello");
        Ok(peer)
    };
    let (client, server) = tokio::join!(client, server);
    Outcome { client, server }
}

async fn handshake(
    client: &WorkloadCertificate,
    expected: &[SpiffeId],
    server: &WorkloadCertificate,
) -> Outcome {
    handshake_with(client.client_config(expected).unwrap(), server).await
}

fn peer_error(result: Result<Peer, TlsError>) -> PeerError {
    match result {
        Err(TlsError::Peer(error)) => error,
        other => panic!("expected a refusal of the peer, got {other:?}"),
    }
}

#[tokio::test]
async fn two_workloads_of_a_mesh_know_each_other() {
    let ca = TestCa::new();
    let outcome = handshake(&ca.issue(&cart()), &[pay()], &ca.issue(&pay())).await;
    assert_eq!(outcome.client.unwrap().identity, pay());
    assert_eq!(outcome.server.unwrap().identity, cart());
}

#[tokio::test]
async fn any_of_the_expected_identities_will_do() {
    let ca = TestCa::new();
    let expected = [SpiffeId::new("", "other", "one"), pay()];
    assert!(handshake(&ca.issue(&cart()), &expected, &ca.issue(&pay())).await.client.is_ok());
}

#[tokio::test]
async fn a_server_with_another_identity_is_refused_and_both_names_are_told() {
    let ca = TestCa::new();
    let outcome = handshake(&ca.issue(&cart()), &[pay()], &ca.issue(&cart())).await;
    let error = peer_error(outcome.client);
    assert_eq!(error.code(), Code::PeerIdentity);
    let text = error.to_string();
    assert!(text.contains("presented spiffe://cluster.local/ns/shop/sa/cart"), "{text}");
    assert!(text.contains("spiffe://cluster.local/ns/shop/sa/pay was expected"), "{text}");
    assert!(matches!(outcome.server, Err(TlsError::RefusedByPeer(_))), "{:?}", outcome.server);
}

#[tokio::test]
async fn an_empty_expected_set_matches_nobody() {
    let ca = TestCa::new();
    let error = peer_error(handshake(&ca.issue(&cart()), &[], &ca.issue(&pay())).await.client);
    assert!(error.to_string().contains("no identity was expected"), "{error}");
}

#[tokio::test]
async fn a_server_is_found_by_any_of_its_uri_sans() {
    let ca = TestCa::new();
    let second = SpiffeId::new("", "shop", "second");
    let mut leaf = Leaf::of(&pay());
    leaf.uris.push(second.to_string());
    let server = ca.issue_with(&pay(), &leaf, &Revocations::default());
    assert!(handshake(&ca.issue(&cart()), &[second], &server).await.client.is_ok());
}

#[tokio::test]
async fn a_client_of_another_trust_domain_is_refused() {
    let ca = TestCa::new();
    let foreign = SpiffeId::new("other.example", "shop", "cart");
    let outcome = handshake(&ca.issue(&foreign), &[pay()], &ca.issue(&pay())).await;
    let error = peer_error(outcome.server);
    assert_eq!(error.code(), Code::PeerTrustDomain);
    assert!(error.to_string().contains("only trust domain cluster.local"), "{error}");
    // In TLS 1.3 the client learns it with its first read.
    let client = outcome.client.unwrap_err();
    assert_eq!(client.code(), Code::PeerRefusedUs);
    assert!(client.to_string().contains("our certificate is not acceptable"), "{client}");
}

#[tokio::test]
async fn one_san_of_our_trust_domain_suffices_but_the_first_one_is_the_identity() {
    let ca = TestCa::new();
    let foreign = SpiffeId::new("other.example", "shop", "cart");
    let mut leaf = Leaf::of(&foreign);
    leaf.uris.push(cart().to_string());
    let client = ca.issue_with(&foreign, &leaf, &Revocations::default());
    let outcome = handshake(&client, &[pay()], &ca.issue(&pay())).await;
    assert_eq!(outcome.server.unwrap().identity, foreign);
}

#[tokio::test]
async fn a_foreign_ca_is_refused_by_both_sides() {
    let (ours, theirs) = (TestCa::new(), TestCa::new());
    let outcome = handshake(&ours.issue(&cart()), &[pay()], &theirs.issue(&pay())).await;
    assert_eq!(peer_error(outcome.client), PeerError::UnknownIssuer);
    let server = outcome.server.unwrap_err();
    assert!(server.to_string().contains("the peer does not trust our CA"), "{server}");
}

#[tokio::test]
async fn a_foreign_ca_with_the_name_of_ours_is_still_a_foreign_ca() {
    let client = TestCa::named("mesh").issue(&cart());
    let outcome = handshake(&client, &[pay()], &TestCa::named("mesh").issue(&pay())).await;
    assert_eq!(peer_error(outcome.client), PeerError::UnknownIssuer);
}

#[tokio::test]
async fn an_expired_client_or_server_is_refused_and_told_so() {
    let ca = TestCa::new();
    let mut leaf = Leaf::of(&pay());
    leaf.not_before = SystemTime::now() - Duration::from_secs(7200);
    leaf.not_after = SystemTime::now() - Duration::from_secs(60);
    let expired = ca.issue_with(&pay(), &leaf, &Revocations::default());

    let outcome = handshake(&ca.issue(&cart()), &[pay()], &expired).await;
    let error = peer_error(outcome.client);
    assert_eq!(error.code(), Code::PeerExpired);
    assert!(error.to_string().starts_with("the peer's certificate expired 6"), "{error}");
    let server = outcome.server.unwrap_err();
    assert!(server.to_string().contains("our certificate has expired by the peer's clock"), "{server}");

    let outcome = handshake(&expired, &[cart()], &ca.issue(&cart())).await;
    assert_eq!(peer_error(outcome.server).code(), Code::PeerExpired);
}

#[tokio::test]
async fn a_certificate_from_the_future_is_refused() {
    let ca = TestCa::new();
    let mut leaf = Leaf::of(&pay());
    leaf.not_before = SystemTime::now() + Duration::from_secs(600);
    let early = ca.issue_with(&pay(), &leaf, &Revocations::default());
    let error = peer_error(handshake(&ca.issue(&cart()), &[pay()], &early).await.client);
    assert_eq!(error.code(), Code::PeerNotYetValid);
}

#[tokio::test]
async fn a_certificate_for_clients_only_is_no_server() {
    let ca = TestCa::new();
    let mut leaf = Leaf::of(&pay());
    leaf.usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let server = ca.issue_with(&pay(), &leaf, &Revocations::default());
    let error = peer_error(handshake(&ca.issue(&cart()), &[pay()], &server).await.client);
    assert_eq!(error.code(), Code::PeerCertificate);
}

#[tokio::test]
async fn a_revoked_peer_is_refused_by_both_sides_and_only_it() {
    let ca = TestCa::new();
    let revocations = Revocations::default();
    let (mut pay_leaf, mut cart_leaf) = (Leaf::of(&pay()), Leaf::of(&cart()));
    (pay_leaf.serial, cart_leaf.serial) = (4711, 4712);
    let pay_cert = ca.issue_with(&pay(), &pay_leaf, &revocations);
    let cart_cert = ca.issue_with(&cart(), &cart_leaf, &revocations);
    // Made before the list is known, so that the configurations have to follow it.
    let config = cart_cert.client_config(&[pay()]).unwrap();
    let before = handshake_with(Arc::clone(&config), &pay_cert).await;
    let chain = before.client.unwrap().chain;
    assert!(cart_cert.recheck_peer(&chain).is_ok());

    assert_eq!(revocations.load_pem(ca.crl(&[4711]).as_bytes()).unwrap(), 1);
    let error = peer_error(handshake_with(config, &pay_cert).await.client);
    assert_eq!(error, PeerError::Revoked);
    assert_eq!(error.code().flag(), ResponseFlag::CertRevoked);
    assert_eq!(peer_error(handshake(&pay_cert, &[cart()], &cart_cert).await.server), PeerError::Revoked);
    assert_eq!(cart_cert.recheck_peer(&chain), Err(PeerError::Revoked), "the open connection is found");

    let foreign = format!("{}{}", ca.crl(&[]), TestCa::new().crl(&[4711]));
    assert_eq!(revocations.load_pem(foreign.as_bytes()).unwrap(), 2);
    assert!(
        handshake(&cart_cert, &[pay()], &pay_cert).await.client.is_ok(),
        "another CA's list says nothing"
    );
    revocations.load_pem(TestCa::new().crl(&[4711]).as_bytes()).unwrap();
    assert!(handshake(&cart_cert, &[pay()], &pay_cert).await.client.is_ok(), "an unknown status is allowed");

    revocations.load_pem(ca.crl(&[4711]).as_bytes()).unwrap();
    let other = ca.issue_with(&pay(), &Leaf::of(&pay()), &revocations);
    assert!(handshake(&cart_cert, &[pay()], &other).await.client.is_ok(), "an unlisted serial is accepted");
    assert_eq!(revocations.load_pem(b"").unwrap(), 0);
    assert!(handshake(&cart_cert, &[pay()], &pay_cert).await.client.is_ok(), "an empty file ends revocation");
}

#[test]
fn an_expired_certificate_is_still_found_on_the_list() {
    let ca = TestCa::new();
    let revocations = Revocations::default();
    let mut leaf = Leaf::of(&pay());
    leaf.serial = 99;
    leaf.not_after = SystemTime::now() - Duration::from_secs(5);
    let expired = ca.issue_with(&pay(), &leaf, &revocations);
    let us = ca.issue_with(&cart(), &Leaf::of(&cart()), &revocations);
    assert!(us.recheck_peer(expired.chain()).is_ok());
    revocations.load_pem(ca.crl(&[99]).as_bytes()).unwrap();
    assert_eq!(us.recheck_peer(expired.chain()), Err(PeerError::Revoked));
}

#[test]
fn a_bad_revocation_list_names_its_block_and_leaves_the_old_one_in_force() {
    let revocations = Revocations::default();
    revocations.load_pem(TestCa::new().crl(&[1]).as_bytes()).unwrap();
    let two = format!("{}-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n", TestCa::new().crl(&[2]));
    let error = revocations.load_pem(two.as_bytes()).unwrap_err();
    assert!(error.to_string().contains("block number 2"), "{error}");
    assert!(revocations.load_pem(b"not a list").unwrap_err().to_string().contains("no X509 CRL block"));
    assert_eq!(revocations.lists().len(), 1);
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let ca = TestCa::new();
    let server = ca.issue(&pay());
    let mut config = (*ca.issue(&cart()).client_config(&[pay()]).unwrap()).clone();
    config.client_auth_cert_resolver = Arc::new(NoCertificate);
    let outcome = handshake_with(Arc::new(config), &server).await;
    let error = outcome.server.unwrap_err();
    assert_eq!(error.code(), Code::PeerWithoutCertificate, "{error}");
    let client = outcome.client.unwrap_err();
    assert!(client.to_string().contains("the peer wants a certificate"), "{client}");
}

#[derive(Debug)]
struct NoCertificate;

impl rustls::client::ResolvesClientCert for NoCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

/// The first message of our client, as a server sees it.
async fn client_hello(config: Arc<ClientConfig>) -> rustls::server::Accepted {
    let (ours, mut theirs) = tokio::io::duplex(64 << 10);
    // With a name, as nobody in the mesh does: even then none may be sent.
    let name = rustls_pki_types::ServerName::try_from("pay.example").unwrap();
    let client = tokio::spawn(async move {
        let _ = tokio_rustls::TlsConnector::from(config).connect(name, ours).await;
    });
    let mut acceptor = Acceptor::default();
    let accepted = loop {
        let mut bytes = vec![0; 16 << 10];
        let n = theirs.read(&mut bytes).await.unwrap();
        acceptor.read_tls(&mut &bytes[..n]).unwrap();
        if let Some(accepted) = acceptor.accept().unwrap_or_else(|(e, _)| panic!("{e}")) {
            break accepted;
        }
    };
    client.abort();
    accepted
}

#[tokio::test]
async fn the_client_sends_no_name_and_offers_exactly_the_tunnels_parameters() {
    let config = TestCa::new().issue(&cart()).client_config(&[pay()]).unwrap();
    let accepted = client_hello(config).await;
    let hello = accepted.client_hello();
    assert_eq!(hello.server_name(), None);
    assert_eq!(hello.alpn().unwrap().collect::<Vec<_>>(), [b"h2"]);
    let suites: Vec<_> = hello
        .cipher_suites()
        .iter()
        .filter(|s| **s != CipherSuite::TLS_EMPTY_RENEGOTIATION_INFO_SCSV)
        .collect();
    assert_eq!(suites, [&CipherSuite::TLS13_AES_256_GCM_SHA384, &CipherSuite::TLS13_AES_128_GCM_SHA256]);
    let groups = hello.named_groups().unwrap();
    let ours = [NamedGroup::X25519MLKEM768, NamedGroup::X25519, NamedGroup::secp256r1, NamedGroup::secp384r1];
    assert_eq!(groups, ours);
}

#[tokio::test]
async fn hybrid_post_quantum_key_exchange_and_aes_256_are_negotiated_without_tickets() {
    let ca = TestCa::new();
    let (server, config) =
        (ca.issue(&pay()).server_config(), ca.issue(&cart()).client_config(&[pay()]).unwrap());
    let (a, b) = tokio::io::duplex(64 << 10);
    // The client is rustls' own, which counts tickets.
    let name = rustls_pki_types::ServerName::try_from("pay.example").unwrap();
    let (client, server) =
        tokio::join!(tokio_rustls::TlsConnector::from(config).connect(name, a), accept(server, b));
    let (mut client, mut server) = (client.unwrap(), server.unwrap().0);
    // Tickets would come before the first byte of data.
    server.write_all(b"x").await.unwrap();
    assert_eq!(client.read_u8().await.unwrap(), b'x');
    let state = client.get_ref().1;
    assert_eq!(state.negotiated_key_exchange_group().unwrap().name(), NamedGroup::X25519MLKEM768);
    assert_eq!(state.negotiated_cipher_suite().unwrap().suite(), CipherSuite::TLS13_AES_256_GCM_SHA384);
    assert_eq!(state.tls13_tickets_received(), 0);
    assert_eq!(server.facts().group, Some(NamedGroup::X25519MLKEM768));
    assert_eq!(server.facts().suite, Some(CipherSuite::TLS13_AES_256_GCM_SHA384));
}

#[tokio::test]
async fn a_client_without_alpn_is_refused_as_is_one_with_another() {
    let ca = TestCa::new();
    let server = ca.issue(&pay());
    for alpn in [vec![], vec![b"http/1.1".to_vec()]] {
        let mut config = (*ca.issue(&cart()).client_config(&[pay()]).unwrap()).clone();
        config.alpn_protocols.clone_from(&alpn);
        let outcome = handshake_with(Arc::new(config), &server).await;
        let error = outcome.server.unwrap_err();
        assert_eq!(error.code(), Code::TlsParameters, "{alpn:?}: {error}");
    }
}

#[tokio::test]
async fn plain_text_to_the_tunnel_port_is_named_as_such() {
    for text in [&b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"[..], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &[0; 64]] {
        let (mut ours, theirs) = tokio::io::duplex(4096);
        ours.write_all(text).await.unwrap();
        let error = accept(TestCa::new().issue(&pay()).server_config(), theirs).await.unwrap_err();
        assert_eq!(error.code(), Code::NotTls, "{error}");
    }
}

#[tokio::test]
async fn tls_1_2_is_refused_with_the_alert_that_says_so() {
    // A ClientHello of TLS 1.2: no supported_versions extension; one ECDHE-ECDSA suite, X25519, ECDSA-P256.
    let mut hello = vec![3, 3];
    hello.extend([7; 32]);
    hello.extend([0, 0, 2, 0xc0, 0x2c, 1, 0]);
    let extensions = [0, 10, 0, 4, 0, 2, 0, 29, 0, 13, 0, 4, 0, 2, 4, 3, 0, 23, 0, 0];
    hello.extend([0, u8::try_from(extensions.len()).unwrap()]);
    hello.extend(extensions);
    let length = u8::try_from(hello.len()).unwrap();
    let mut record = vec![22, 3, 1, 0, length + 4, 1, 0, 0, length];
    record.extend(hello);

    let (mut ours, theirs) = tokio::io::duplex(4096);
    ours.write_all(&record).await.unwrap();
    let error = accept(TestCa::new().issue(&pay()).server_config(), theirs).await.unwrap_err();
    assert_eq!(error.code(), Code::TlsParameters, "{error}");
    let mut alert = Vec::new();
    ours.read_to_end(&mut alert).await.unwrap();
    assert_eq!(alert, [21, 3, 3, 0, 2, 2, 70], "fatal alert protocol_version");
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_says_nothing_is_given_up() {
    let (_silent, theirs) = tokio::io::duplex(64);
    let error = accept(TestCa::new().issue(&pay()).server_config(), theirs).await.unwrap_err();
    assert_eq!(error.code(), Code::TlsTimeout);
}

#[test]
fn the_request_has_an_empty_subject_the_identity_as_uri_and_a_p256_key() {
    use x509_parser::prelude::FromDer as _;
    let key = KeyAndCsr::generate(&cart()).unwrap();
    let der = pem::parse(key.csr_pem()).unwrap();
    assert_eq!(der.tag(), "CERTIFICATE REQUEST");
    let (_, csr) = x509_parser::prelude::X509CertificationRequest::from_der(der.contents()).unwrap();
    csr.verify_signature().unwrap();
    let info = &csr.certification_request_info;
    assert_eq!(info.subject.iter().count(), 0);
    assert_eq!(info.subject_pki.subject_public_key.data.len(), 65, "an uncompressed P-256 point");
    let text = format!("{:?}", csr.requested_extensions().unwrap().collect::<Vec<_>>());
    assert!(text.contains("URI(\"spiffe://cluster.local/ns/shop/sa/cart\")"), "{text}");
}

#[test]
fn keys_are_never_printed() {
    let key = KeyAndCsr::generate(&cart()).unwrap();
    assert_eq!(format!("{key:?}"), "KeyAndCsr { identity: spiffe://cluster.local/ns/shop/sa/cart, .. }");
    let text = format!("{:?}", TestCa::new().issue(&cart()));
    assert!(text.starts_with("WorkloadCertificate { identity: spiffe") && !text.contains("key"), "{text}");
}

#[test]
fn the_cas_answer_is_checked_entry_by_entry() {
    let ca = TestCa::new();
    let answer = |change: &dyn Fn(&mut Vec<String>)| {
        let key = KeyAndCsr::generate(&cart()).unwrap();
        let mut chain = ca.sign(key.csr_pem(), &Leaf::of(&cart()));
        change(&mut chain);
        WorkloadCertificate::new(key, &chain, &Revocations::default()).map(|_| ())
    };
    assert!(answer(&|_| {}).is_ok());
    let text = |change: &dyn Fn(&mut Vec<String>)| answer(change).unwrap_err().to_string();

    assert!(text(&|c| c.truncate(1)).contains("1 chain entries"));
    assert!(text(&Vec::clear).contains("0 chain entries"));
    assert!(
        text(&|c| c[0] = "nothing".into())
            .contains("entry 0 of the CA's answer (the leaf) holds no CERTIFICATE")
    );
    let doubled = text(&|c| c[0] = c[0].repeat(2));
    assert!(doubled.contains("holds 2 certificates, it must be one"), "{doubled}");
    let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    assert!(text(&|c| c[1] = broken.into()).contains("(the roots) holds a certificate that is no root"));
    assert!(text(&|c| c.insert(1, String::new())).contains("entry 1 of the CA's answer (an intermediate)"));
    assert!(text(&|c| c[0] = broken.into()).contains("entry 0"));
    let torn = "-----BEGIN CERTIFICATE-----\n*\n-----END CERTIFICATE-----\n";
    assert!(text(&|c| c[0] = torn.into()).contains("is not PEM"));
}

#[test]
fn a_certificate_for_somebody_else_or_of_another_key_is_refused() {
    let ca = TestCa::new();
    let key = KeyAndCsr::generate(&cart()).unwrap();
    let chain = ca.sign(key.csr_pem(), &Leaf::of(&pay()));
    let error = WorkloadCertificate::new(key, &chain, &Revocations::default()).unwrap_err();
    assert_eq!(error.code(), Code::CertificateUnusable);
    let text = error.to_string();
    assert!(
        text.contains(
            "is for spiffe://cluster.local/ns/shop/sa/pay, not for spiffe://cluster.local/ns/shop/sa/cart"
        ),
        "{text}"
    );

    let (key, other) = (KeyAndCsr::generate(&cart()).unwrap(), KeyAndCsr::generate(&cart()).unwrap());
    let chain = ca.sign(other.csr_pem(), &Leaf::of(&cart()));
    let error = WorkloadCertificate::new(key, &chain, &Revocations::default()).unwrap_err();
    assert!(matches!(error, CertificateError::WrongKey(_)), "{error}");
}

#[test]
fn facts_for_dumps_are_those_of_the_leaf() {
    let ca = TestCa::new();
    let mut leaf = Leaf::of(&cart());
    leaf.serial = 123_456;
    leaf.not_before = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    leaf.not_after = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_100);
    let cert = ca.issue_with(&cart(), &leaf, &Revocations::default());
    assert_eq!(cert.serial(), "123456");
    assert_eq!((cert.not_before(), cert.not_after()), (leaf.not_before, leaf.not_after));
    assert_eq!(cert.renew_at(), leaf.not_before + Duration::from_secs(50));
    assert!(!cert.is_valid_at(SystemTime::now()) && cert.is_valid_at(cert.renew_at()));
    assert_eq!(certificate::to_pem(cert.roots()).replace('\r', ""), ca.root_pem().replace('\r', ""));
    assert_eq!((cert.chain().len(), cert.roots().len()), (1, 1));
}

#[test]
fn a_root_bundle_trusts_each_of_its_roots() {
    let (old, new) = (TestCa::new(), TestCa::new());
    let key = KeyAndCsr::generate(&cart()).unwrap();
    let mut chain = old.sign(key.csr_pem(), &Leaf::of(&cart()));
    chain[1].push_str(new.root_pem());
    let both = WorkloadCertificate::new(key, &chain, &Revocations::default()).unwrap();
    assert_eq!(both.roots().len(), 2);
    let rt = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    rt.block_on(async {
        for ca in [&old, &new] {
            let config = both.client_config(&[pay()]).unwrap();
            let (a, b) = tokio::io::duplex(64 << 10);
            let server = ca.issue(&pay()).server_config();
            let (client, _) = tokio::join!(connect(config, a), accept(server, b));
            assert!(client.is_ok());
        }
    });
}
