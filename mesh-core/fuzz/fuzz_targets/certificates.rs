//! Names, chains and revocation lists, from peers, from the CA and from files. The first byte says what the rest is.
//!
//! - A SPIFFE identity prints as it was parsed.
//! - No answer of a CA is taken for a key or an identity that it is not for.
//! - A chain that nobody signed is no reason to end a connection, and its names are read or refused.
//! - A revocation list that cannot be used leaves the ones in force, and one that can never un-revokes by accident.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use mesh_core::identity::SpiffeId;
use mesh_core::tls::testing::{Leaf, TestCa};
use mesh_core::tls::{
    KeyAndCsr, PeerError, Revocations, WorkloadCertificate, certificate, peer_identity, verify,
};
use rustls_pki_types::CertificateDer;

const REVOKED: u64 = 7;

/// A mesh in which one peer's certificate is revoked.
struct Mesh {
    id: SpiffeId,
    own: WorkloadCertificate,
    revoked: WorkloadCertificate,
    lists: Revocations,
    crl: String,
}

static MESH: LazyLock<Mesh> = LazyLock::new(|| {
    let ca = TestCa::new();
    let lists = Revocations::default();
    let id = SpiffeId::new("cluster.local", "shop", "cart");
    let leaf = Leaf { serial: REVOKED, ..Leaf::of(&id) };
    Mesh {
        own: ca.issue_with(&id, &Leaf::of(&id), &lists),
        revoked: ca.issue_with(&id, &leaf, &lists),
        crl: ca.crl(&[REVOKED]),
        id,
        lists,
    }
});

fuzz_target!(|data: &[u8]| {
    let Some((kind, rest)) = data.split_first() else { return };
    match kind % 5 {
        0 => identity(rest),
        1 => peer(rest),
        2 => answer(
            rest.split(|b| *b == b'#').map(|part| String::from_utf8_lossy(part).into_owned()).collect(),
        ),
        3 => answer(pieces(rest).into_iter().map(|der| certificate::to_pem(&[der])).collect()),
        _ => list(rest),
    }
});

fn identity(text: &[u8]) {
    let Ok(text) = std::str::from_utf8(text) else { return };
    if let Ok(id) = text.parse::<SpiffeId>() {
        assert_eq!(id.to_string(), text);
        assert_eq!(format!("spiffe://{}", id.principal()), text);
        // Not every name can stand in a certificate.
        let _ = KeyAndCsr::generate(&id);
    }
}

/// DER, each piece after its length.
fn pieces(mut bytes: &[u8]) -> Vec<CertificateDer<'static>> {
    let mut found = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk::<2>() {
        let (piece, rest) = rest.split_at(usize::from(u16::from_be_bytes(*length)).min(rest.len()));
        found.push(CertificateDer::from(piece.to_vec()));
        bytes = rest;
    }
    found
}

fn peer(bytes: &[u8]) {
    let chain = pieces(bytes);
    if let (Ok(id), Some(leaf)) = (peer_identity(&chain), chain.first()) {
        let names = verify::uri_sans(leaf).expect("the identity is one of them");
        assert!(names.contains(&id.to_string()));
    }
    assert!(MESH.own.recheck_peer(&chain).is_ok(), "nothing that our CA revoked");
}

fn answer(chain: Vec<String>) {
    let key = KeyAndCsr::generate(&MESH.id).expect("a key");
    // The key is a new one: whatever the certificates are for, it is not this key.
    assert!(WorkloadCertificate::new(key, &chain, &MESH.lists).is_err());
}

fn list(bytes: &[u8]) {
    let is_revoked = || matches!(MESH.own.recheck_peer(MESH.revoked.chain()), Err(PeerError::Revoked));
    MESH.lists.load_pem(MESH.crl.as_bytes()).expect("a good list");
    assert!(is_revoked());
    for text in [bytes.to_vec(), pem::encode(&pem::Pem::new("X509 CRL", bytes)).into_bytes()] {
        match MESH.lists.load_pem(&text) {
            Err(_) => assert!(is_revoked(), "a bad list replaced a good one"),
            Ok(count) => {
                assert!(count > 0 || text.trim_ascii().is_empty(), "only an empty file turns revocation off");
                let _ = MESH.own.recheck_peer(MESH.revoked.chain());
                MESH.lists.load_pem(MESH.crl.as_bytes()).expect("a good list");
            }
        }
    }
}
