use std::sync::Arc;
use std::time::Duration;

use mesh_core::tls::Revocations;
use mesh_core::tls::testing::{Leaf, TestCa};

use super::*;

fn identity(account: &str) -> SpiffeId {
    SpiffeId::new("cluster.local", "shop", account)
}

/// One identity's slot with a certificate of this serial and end.
fn slot(ca: &TestCa, id: &SpiffeId, lists: &Revocations, serial: u64, not_after: SystemTime) -> Slot {
    let leaf = Leaf { serial, not_after, ..Leaf::of(id) };
    Slot { certificate: Some(Arc::new(ca.issue_with(id, &leaf, lists))), failure: None }
}

#[test]
fn a_revoked_identity_is_disowned_and_no_other() {
    let (ca, lists, now) = (TestCa::new(), Revocations::default(), SystemTime::now());
    let (a, b) = (identity("a"), identity("b"));
    let later = now + Duration::from_secs(3600);
    let slots = HashMap::from([
        (a.clone(), slot(&ca, &a, &lists, 11, later)),
        (b.clone(), slot(&ca, &b, &lists, 12, later)),
    ]);
    let before = Identities::of(&slots);
    assert!(before.vouch_for(&a, now) && !before.disown(&a, now));
    lists.load_pem(ca.crl(&[11]).as_bytes()).unwrap();
    let after = Identities::of(&slots);
    assert!(!after.vouch_for(&a, now) && after.disown(&a, now));
    assert!(after.vouch_for(&b, now) && !after.disown(&b, now));
}

#[test]
fn a_new_certificate_brings_a_revoked_identity_back() {
    let (ca, lists, now) = (TestCa::new(), Revocations::default(), SystemTime::now());
    let a = identity("a");
    lists.load_pem(ca.crl(&[11]).as_bytes()).unwrap();
    let slots = HashMap::from([(a.clone(), slot(&ca, &a, &lists, 12, now + Duration::from_secs(60)))]);
    assert!(Identities::of(&slots).vouch_for(&a, now));
}

#[test]
fn an_expired_identity_is_disowned_from_the_moment_on_and_the_moment_is_noticed() {
    let (ca, lists, now) = (TestCa::new(), Revocations::default(), SystemTime::now());
    let a = identity("a");
    let slots = HashMap::from([(a.clone(), slot(&ca, &a, &lists, 11, now + Duration::from_secs(10)))]);
    let known = Identities::of(&slots);
    let (shortly, later) = (now + Duration::from_secs(5), now + Duration::from_secs(15));
    assert!(known.vouch_for(&a, shortly) && !known.expired_between(now, shortly));
    assert!(known.disown(&a, later) && !known.vouch_for(&a, later));
    assert!(known.expired_between(shortly, later));
    assert!(!known.expired_between(later, later + Duration::from_secs(1)), "it is news only once");
}

#[test]
fn an_identity_without_a_certificate_is_neither_vouched_for_nor_disowned() {
    let slots = HashMap::from([(identity("a"), Slot { certificate: None, failure: Some("away".into()) })]);
    let (known, now) = (Identities::of(&slots), SystemTime::now());
    assert!(!known.vouch_for(&identity("a"), now) && !known.disown(&identity("a"), now));
}
