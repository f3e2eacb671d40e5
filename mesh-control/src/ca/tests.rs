use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use mesh_core::tls::certificate::WorkloadCertificate;
use mesh_core::tls::crl::Revocations;
use mesh_core::tls::key::KeyAndCsr;
use prost_types::{Struct, Value};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, UnixTime};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::authority::{new_intermediate, new_root};
use super::store::{CaError, generations, rotate};
use super::*;
use crate::ads::seconds;

fn front() -> SpiffeId {
    SpiffeId::new("cluster.local", "shop", "front")
}

fn sign(store: &CaStore, ttl: Duration, now: SystemTime) -> (Vec<String>, KeyAndCsr) {
    let key = KeyAndCsr::generate(&front()).unwrap();
    (store.authority().sign(key.csr_pem(), &front(), ttl, now).unwrap(), key)
}

fn ders(pem: &str) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(pem.as_bytes()).map(Result::unwrap).collect()
}

/// Verifies as a peer does, with the given roots, by an implementation that did not make the certificate.
fn verifies(chain: &[String], roots: &str, now: SystemTime) -> bool {
    let leaf = ders(&chain[0]).remove(0);
    let between: Vec<_> = chain[1..chain.len() - 1].iter().flat_map(|p| ders(p)).collect();
    let roots = ders(roots);
    let anchors: Vec<_> = roots.iter().map(|r| anchor_from_trusted_cert(r).unwrap()).collect();
    let leaf = EndEntityCert::try_from(&leaf).unwrap();
    let time = UnixTime::since_unix_epoch(Duration::from_secs(seconds(now)));
    [KeyUsage::client_auth(), KeyUsage::server_auth()].into_iter().all(|usage| {
        leaf.verify_for_usage(webpki::ALL_VERIFICATION_ALGS, &anchors, &between, time, usage, None, None)
            .is_ok()
    })
}

#[test]
fn a_certificate_has_the_form_that_nodes_expect() {
    let dir = tempfile::tempdir().unwrap();
    let now = SystemTime::now();
    let store = CaStore::open(dir.path(), None, now).unwrap();
    let (chain, key) = sign(&store, Duration::from_secs(3600), now);
    assert_eq!(chain.len(), 3, "leaf, intermediate, roots");
    assert!(verifies(&chain, &chain[2], now));
    assert_eq!(chain[2], std::fs::read_to_string(dir.path().join("root-cert.pem")).unwrap());
    let der = ders(&chain[0]).remove(0);
    let (_, cert) = X509Certificate::from_der(&der).unwrap();
    let san = cert
        .get_extension_unique(&x509_parser::oid_registry::OID_X509_EXT_SUBJECT_ALT_NAME)
        .unwrap()
        .unwrap();
    assert!(san.critical);
    let names = &cert.subject_alternative_name().unwrap().unwrap().value.general_names;
    assert_eq!(names, &[GeneralName::URI("spiffe://cluster.local/ns/shop/sa/front")]);
    let usage = cert.key_usage().unwrap().unwrap().value;
    assert!(usage.digital_signature() && usage.key_encipherment() && !usage.key_cert_sign());
    let extended = cert.extended_key_usage().unwrap().unwrap().value;
    assert!(extended.server_auth && extended.client_auth);
    assert!(!cert.is_ca());
    let validity = cert.validity();
    assert_eq!(validity.not_after.timestamp() - validity.not_before.timestamp(), 3600 + 120);
    assert_eq!(cert.raw_serial().len(), 16);
    let (again, _) = sign(&store, Duration::from_secs(3600), now);
    let again = ders(&again[0]).remove(0);
    assert_ne!(cert.raw_serial(), X509Certificate::from_der(&again).unwrap().1.raw_serial());
    assert_eq!(WorkloadCertificate::new(key, &chain, &Revocations::default()).unwrap().identity(), &front());
}

#[test]
fn the_identity_comes_from_the_caller_and_never_from_the_request() {
    let dir = tempfile::tempdir().unwrap();
    let store = CaStore::open(dir.path(), None, SystemTime::now()).unwrap();
    let admin = KeyAndCsr::generate(&SpiffeId::new("cluster.local", "kube-system", "admin")).unwrap();
    let chain = store.authority().sign(admin.csr_pem(), &front(), DEFAULT_TTL, SystemTime::now()).unwrap();
    let der = ders(&chain[0]).remove(0);
    let (_, cert) = X509Certificate::from_der(&der).unwrap();
    let names = &cert.subject_alternative_name().unwrap().unwrap().value.general_names;
    assert_eq!(names, &[GeneralName::URI("spiffe://cluster.local/ns/shop/sa/front")]);
}

#[test]
fn broken_requests_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = CaStore::open(dir.path(), None, SystemTime::now()).unwrap();
    let good = KeyAndCsr::generate(&front()).unwrap();
    // One bit of the signature, which ends the request.
    let (_, pem) = x509_parser::pem::parse_x509_pem(good.csr_pem().as_bytes()).unwrap();
    let mut der = pem.contents;
    *der.last_mut().unwrap() ^= 1;
    let forged = to_pem("CERTIFICATE REQUEST", &der);
    let certificate = store.authority().roots().to_owned();
    for (csr, why) in [
        ("", "is no PEM"),
        ("-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", "is no PKCS#10"),
        (certificate.as_str(), "not a CERTIFICATE REQUEST"),
        (forged.as_str(), "signature is not of its key"),
    ] {
        let error = store.authority().sign(csr, &front(), DEFAULT_TTL, SystemTime::now()).unwrap_err();
        assert!(error.to_string().contains(why), "{error}");
    }
}

fn to_pem(label: &str, der: &[u8]) -> String {
    use std::fmt::Write;
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = format!("-----BEGIN {label}-----\n");
    for line in der.chunks(48) {
        for three in line.chunks(3) {
            let bits = (u32::from(three[0]) << 16)
                | (u32::from(*three.get(1).unwrap_or(&0)) << 8)
                | u32::from(*three.get(2).unwrap_or(&0));
            for i in 0..4 {
                let c = if i <= three.len() { ALPHABET[(bits >> (18 - 6 * i)) as usize & 63] } else { b'=' };
                out.push(char::from(c));
            }
        }
        out.push('\n');
    }
    writeln!(out, "-----END {label}-----").unwrap();
    out
}

#[test]
fn lifetimes_are_bounded() {
    let ask =
        |seconds| lifetime(&IstioCertificateRequest { validity_duration: seconds, ..Default::default() });
    assert_eq!(ask(0).unwrap(), DEFAULT_TTL);
    assert_eq!(ask(-5).unwrap(), DEFAULT_TTL);
    assert_eq!(ask(60).unwrap(), Duration::from_secs(60));
    assert_eq!(ask(MAX_TTL.as_secs() as i64).unwrap(), MAX_TTL);
    assert!(ask(MAX_TTL.as_secs() as i64 + 1).unwrap_err().message().contains("longer than"));
}

#[test]
fn a_node_may_ask_for_its_pods_or_for_itself() {
    let text = "
apiVersion: v1
kind: Pod
metadata: {name: a, namespace: shop}
spec: {nodeName: n1, serviceAccountName: front, containers: []}
---
apiVersion: v1
kind: Pod
metadata: {name: done, namespace: shop}
spec: {nodeName: n1, serviceAccountName: job, containers: []}
status: {phase: Failed}
";
    let source = Arc::new(crate::testing::load(text));
    let published = Published { source, ..Published::default() };
    let caller = |node: &str| Caller {
        node: node.into(),
        namespace: "istio-system".into(),
        service_account: "mesh-node".into(),
        agent: true,
    };
    let ask = |node: &str, wanted: Option<&str>| {
        let field = |w: &str| {
            let kind = Some(Kind::StringValue(w.to_owned()));
            Struct { fields: [("ImpersonatedIdentity".to_owned(), Value { kind })].into() }
        };
        let request = IstioCertificateRequest { metadata: wanted.map(field), ..Default::default() };
        identity(&caller(node), &request, &published).map(|id| id.to_string())
    };
    let front = "spiffe://cluster.local/ns/shop/sa/front";
    assert_eq!(ask("n1", Some(front)).as_deref(), Ok(front));
    assert_eq!(ask("n1", None).as_deref(), Ok("spiffe://cluster.local/ns/istio-system/sa/mesh-node"));
    assert!(ask("n2", Some(front)).unwrap_err().contains("scheduled on node n2"));
    assert!(ask("n1", Some("spiffe://cluster.local/ns/shop/sa/job")).is_err(), "its pod has ended");
    assert!(ask("n1", Some("spiffe://other/ns/shop/sa/front")).unwrap_err().contains("trust domain"));
    assert!(ask("n1", Some("front")).is_err());
}

#[test]
fn who_is_no_nodes_agent_gets_its_own_identity_and_no_other() {
    let text = "
apiVersion: v1
kind: Pod
metadata: {name: a, namespace: shop}
spec: {nodeName: n1, serviceAccountName: front, containers: []}
";
    let published = Published { source: Arc::new(crate::testing::load(text)), ..Published::default() };
    let caller = Caller {
        node: "n1".into(),
        namespace: "shop".into(),
        service_account: "waypoint".into(),
        agent: false,
    };
    let ask = |wanted: &str| {
        let kind = Some(Kind::StringValue(wanted.to_owned()));
        let fields = [("ImpersonatedIdentity".to_owned(), Value { kind })].into();
        let request = IstioCertificateRequest { metadata: Some(Struct { fields }), ..Default::default() };
        identity(&caller, &request, &published).map(|id| id.to_string())
    };
    let own = "spiffe://cluster.local/ns/shop/sa/waypoint";
    assert_eq!(ask(own).as_deref(), Ok(own));
    assert!(ask("spiffe://cluster.local/ns/shop/sa/front").unwrap_err().contains("is no node's agent"));
}

#[test]
fn a_rotation_is_trusted_at_once_signs_after_the_overlap_and_ends_the_old_root_late() {
    let dir = tempfile::tempdir().unwrap();
    let start = SystemTime::now();
    let store = CaStore::open(dir.path(), None, start).unwrap();
    let old_roots = store.authority().roots().to_owned();
    let (before, _) = sign(&store, DEFAULT_TTL, start);
    let overlap = Duration::from_secs(24 * 3600);
    rotate(dir.path(), None, overlap, start).unwrap();

    store.refresh(start);
    let both = store.authority().roots().to_owned();
    assert_eq!(ders(&both).len(), 2);
    assert_eq!(std::fs::read_to_string(dir.path().join("root-cert.pem")).unwrap(), both);
    let (during, _) = sign(&store, DEFAULT_TTL, start);
    assert!(
        verifies(&during, &old_roots, start),
        "peers that have not heard yet still trust new certificates"
    );
    assert_eq!(ders(during.last().unwrap()).len(), 2, "and learn the new root with the next one");

    let later = start + overlap + Duration::from_secs(1);
    store.refresh(later);
    let (after, _) = sign(&store, DEFAULT_TTL, later);
    assert!(!verifies(&after, &old_roots, later), "the new root signs");
    assert!(verifies(&after, &both, later));
    assert!(verifies(&before[..], after.last().unwrap(), start), "old certificates are still trusted");

    let end = later + MAX_TTL;
    store.refresh(end);
    assert_eq!(ders(store.authority().roots()).len(), 1);
    assert_eq!(generations(dir.path(), end).unwrap().len(), 2);
}

#[test]
fn keys_are_private_and_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let now = SystemTime::now();
    let first = CaStore::open(dir.path(), None, now).unwrap().authority().roots().to_owned();
    assert_eq!(CaStore::open(dir.path(), None, now).unwrap().authority().roots(), first);
    for name in ["ca/1/root-key.pem", "ca/1/ca-key.pem"] {
        let mode = std::fs::metadata(dir.path().join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
}

fn plug_in(dir: &Path, root: &str, cert: &str, key: &str, chain: Option<&str>) {
    for (name, pem) in [("root-cert.pem", root), ("ca-cert.pem", cert), ("ca-key.pem", key)] {
        std::fs::write(dir.join(name), pem).unwrap();
    }
    if let Some(pem) = chain {
        std::fs::write(dir.join("cert-chain.pem"), pem).unwrap();
    }
}

#[test]
fn a_plugged_in_ca_signs_with_its_chain_and_is_checked() {
    let now = SystemTime::now();
    let (state, ca) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (root, root_key) = new_root("corp", now).unwrap();
    let (cert, key) = new_intermediate("corp mesh", &root, &root_key, now).unwrap();
    plug_in(ca.path(), &root, &cert, &key, Some(&format!("{cert}{root}")));
    let store = CaStore::open(state.path(), Some(ca.path()), now).unwrap();
    let (chain, _) = sign(&store, DEFAULT_TTL, now);
    assert_eq!(chain.len(), 3, "the root in cert-chain.pem is not repeated");
    assert!(verifies(&chain, &root, now));
    assert!(matches!(rotate(state.path(), Some(ca.path()), DEFAULT_TTL, now), Err(CaError::PluggedIn)));

    let (other, _) = new_root("other", now).unwrap();
    plug_in(ca.path(), &other, &cert, &key, None);
    let text = CaStore::open(state.path(), Some(ca.path()), now).unwrap_err().to_string();
    assert!(text.contains("lead to the root"), "{text}");
    store.refresh(now);
    assert!(verifies(&sign(&store, DEFAULT_TTL, now).0, &root, now), "bad new files leave it as it was");

    plug_in(ca.path(), &root, &cert, &root_key, None);
    let text = CaStore::open(state.path(), Some(ca.path()), now).unwrap_err().to_string();
    assert!(text.contains("does not belong"), "{text}");
    std::fs::remove_file(ca.path().join("ca-key.pem")).unwrap();
    let text = CaStore::open(state.path(), Some(ca.path()), now).unwrap_err().to_string();
    assert!(text.contains("ca-key.pem"), "{text}");
}
