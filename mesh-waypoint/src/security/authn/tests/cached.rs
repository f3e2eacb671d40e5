//! Tokens that were verified before. Each test has a thread, and so a cache, of its own.

use super::*;
use crate::security::Policies;
use crate::security::jwks::{KeyStore, Roots};
use crate::security::testing::own;

#[test]
fn a_token_that_was_verified_says_the_same_again_without_another_check() {
    let issuer = Issuer::new();
    let set = policies(vec![l7::JwtRule { output_payload_to_header: "x-payload".into(), ..issuer.rule() }]);
    let case = bearer(&issuer.sign(&json!({"iss": ISSUER, "sub": "alice", "scope": "a b"})));
    let first = authenticate(&set, &case).unwrap();
    let again = authenticate(&set, &case).unwrap();
    assert!(Arc::ptr_eq(first.claims.as_ref().unwrap(), again.claims.as_ref().unwrap()));
    assert_eq!(first.edits, again.edits);
    assert_eq!(cache::len(), 1);
}

#[test]
fn a_cached_token_expires_all_the_same() {
    let issuer = Issuer::new();
    let set = policies(vec![issuer.rule()]);
    let case =
        bearer(&issuer.sign(&json!({"iss": ISSUER, "sub": "alice", "nbf": 1_000_000, "exp": 2_000_000})));
    let at = |now: u64| {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(now);
        subject(&authenticate_at(&set, &case, now)).map(|_| ())
    };
    assert_eq!(at(1_500_000), Ok(()));
    assert_eq!(cache::len(), 1);
    assert_eq!(at(3_000_000), Err(TokenError::Expired));
    assert_eq!(at(500_000), Err(TokenError::NotYetValid));
    assert_eq!(at(1_500_000), Ok(()));
}

#[test]
fn a_token_of_another_rule_or_of_keys_that_were_withdrawn_is_not_in_the_cache() {
    let issuer = Issuer::new();
    let case = bearer(&issuer.sign(&alice()));
    let (store, _fetcher) = KeyStore::new(Roots::System);
    let source = store.source("http://issuer.example/keys", Duration::from_millis(1));
    source.publish(&issuer.jwks(Some("k")));
    let rule =
        l7::JwtRule { jwks: String::new(), jwks_uri: "http://issuer.example/keys".into(), ..issuer.rule() };
    let with = |rule: l7::JwtRule| {
        let policies = Policies::build(
            &resources([], [authentication(vec![rule])], l7::Settings::default()),
            &own(),
            &store,
        );
        Arc::clone(policies.for_service(&case.addressed))
    };
    let set = with(rule.clone());
    assert_eq!(subject(&authenticate(&set, &case)), Ok(Some("alice")));
    // A rule with other audiences.
    let stricter = with(l7::JwtRule { audiences: strings(&["shop"]), ..rule });
    assert_eq!(subject(&authenticate(&stricter, &case)), Err(TokenError::AudienceNotAllowed));
    // The issuer has another key of the same name now.
    source.publish(&Issuer::new().jwks(Some("k")));
    assert_eq!(subject(&authenticate(&set, &case)), Err(TokenError::VerificationFails));
    source.publish(&issuer.jwks(Some("k")));
    assert_eq!(subject(&authenticate(&set, &case)), Ok(Some("alice")));
}

#[test]
fn tokens_that_do_not_hold_or_are_huge_are_not_kept_and_the_rest_is_bounded() {
    let issuer = Issuer::new();
    let set = policies(vec![issuer.rule()]);
    let filler = |length: usize| "x".repeat(length);
    let token = |i: usize, length: usize| {
        issuer.sign(&json!({"iss": ISSUER, "sub": i.to_string(), "filler": filler(length)}))
    };
    assert!(authenticate(&set, &bearer(&Issuer::new().sign(&alice()))).is_err());
    assert!(authenticate(&set, &bearer(&token(0, 9000))).is_ok());
    assert_eq!(cache::len(), 0);
    let often = bearer(&token(1, 0));
    let first = authenticate(&set, &often).unwrap().claims.unwrap();
    let mut most = 0;
    for i in 0..1000 {
        authenticate(&set, &bearer(&token(i, 3000))).unwrap();
        authenticate(&set, &often).unwrap();
        most = most.max(cache::len());
    }
    // Of 4 KiB and more each, in 1 MiB.
    assert!((100..=256).contains(&most), "{most}");
    let last = authenticate(&set, &often).unwrap().claims.unwrap();
    assert!(Arc::ptr_eq(&first, &last), "what is used stays");
}
