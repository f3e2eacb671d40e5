//! What becomes of a request whose token holds.

use mesh_core::xds::proto::l7::jwt_rule::ClaimHeader;

use super::*;
use crate::security::authz::Verdict;
use crate::security::testing::{policy, when};

fn after(case: &Case, passed: &Authenticated) -> (HeaderMap, Option<String>) {
    let mut headers = case.headers.clone();
    passed.edits.apply(&mut headers);
    let query = passed.edits.query().or(case.query.as_deref()).map(str::to_owned);
    (headers, query)
}

#[test]
fn the_token_is_taken_out_unless_it_is_to_be_forwarded() {
    let issuer = Issuer::new();
    let token = issuer.sign(&alice());
    let everywhere = |forward_original_token| {
        policies(vec![l7::JwtRule {
            from_headers: vec![TokenHeader { name: "authorization".into(), prefix: "Bearer ".into() }],
            from_params: strings(&["t"]),
            from_cookies: strings(&["t"]),
            forward_original_token,
            ..issuer.rule()
        }])
    };
    let case = bearer(&token)
        .query(&format!("a=1&t={token}&b=2"))
        .header("cookie", format!("a=1; t={token}; b=2"))
        .header("cookie", format!("t={token}"))
        .header("x-other", "stays");
    let (headers, query) = after(&case, &authenticate(&everywhere(false), &case).unwrap());
    assert!(!headers.contains_key("authorization"));
    assert_eq!(headers.get_all("cookie").iter().collect::<Vec<_>>(), ["a=1; b=2"]);
    assert_eq!(headers["x-other"], "stays");
    assert_eq!(query.as_deref(), Some("a=1&b=2"));

    let (headers, query) = after(&case, &authenticate(&everywhere(true), &case).unwrap());
    assert_eq!((&headers, &query), (&case.headers, &case.query));

    let no_token = Case::get("/").header("authorization", "Basic eA").header("cookie", "a=1");
    let passed = authenticate(&everywhere(false), &no_token).unwrap();
    assert_eq!(after(&no_token, &passed).0, no_token.headers);
}

#[test]
fn payload_and_claims_are_given_out_in_headers() {
    let issuer = Issuer::new();
    let claim = |header: &str, claim: &str| ClaimHeader { header: header.into(), claim: claim.into() };
    let set = policies(vec![l7::JwtRule {
        output_payload_to_header: "X-Payload".into(),
        output_claim_to_headers: vec![
            claim("x-sub", "sub"),
            claim("x-level", "level"),
            claim("x-admin", "admin"),
            claim("x-city", "address.city"),
            claim("x-dotted", "a.b"),
            claim("x-groups", "groups"),
            claim("x-bad", "bad"),
            claim("x-missing", "missing"),
        ],
        ..issuer.rule()
    }]);
    let claims = json!({
        "iss": ISSUER, "sub": "alice", "level": 7, "admin": true, "address": {"city": "Bonn"}, "a.b": "dotted",
        "groups": ["dev"], "bad": "x\r\nx-admin: true", "scope": "read write",
    });
    let token = issuer.sign(&claims);
    let case =
        bearer(&token).header("x-missing", "forged").header("x-admin", "forged").header("x-bad", "forged");
    let (headers, _) = after(&case, &authenticate(&set, &case).unwrap());
    let text = |name: &str| headers.get(name).map(|value| value.to_str().unwrap().to_owned());
    assert_eq!(text("x-payload").as_deref(), token.split('.').nth(1), "as it was signed");
    assert_eq!(text("x-sub").as_deref(), Some("alice"));
    assert_eq!(text("x-level").as_deref(), Some("7"));
    assert_eq!(text("x-admin").as_deref(), Some("true"));
    assert_eq!(text("x-city").as_deref(), Some("Bonn"));
    assert_eq!(text("x-dotted").as_deref(), Some("dotted"));
    assert_eq!(text("x-groups"), Some(URL_SAFE_NO_PAD.encode(r#"["dev"]"#)));
    assert_eq!(text("x-bad"), None);
    assert_eq!(text("x-missing"), None);
}

#[test]
fn headers_that_rules_give_out_are_never_the_clients() {
    let issuer = Issuer::new();
    let set = policies(vec![
        l7::JwtRule { output_payload_to_header: "x-payload".into(), ..issuer.rule() },
        l7::JwtRule {
            issuer: "https://b".into(),
            output_claim_to_headers: vec![ClaimHeader { header: "x-user".into(), claim: "sub".into() }],
            ..issuer.rule()
        },
    ]);
    let forged =
        |case: Case| case.header("x-payload", "forged").header("x-payload", "twice").header("x-user", "root");
    let without = forged(Case::get("/"));
    let (headers, _) = after(&without, &authenticate(&set, &without).unwrap());
    assert_eq!(headers.len(), 0, "{headers:?}");
    let with = forged(bearer(&issuer.sign(&alice())));
    let (headers, _) = after(&with, &authenticate(&set, &with).unwrap());
    assert!(!headers.contains_key("x-user"));
    assert_eq!(headers.get_all("x-payload").iter().count(), 1);
    assert_ne!(headers["x-payload"], "forged");
}

#[test]
fn space_delimited_claims_are_lists_for_policies() {
    let issuer = Issuer::new();
    let set = policies(vec![l7::JwtRule { space_delimited_claims: strings(&["roles"]), ..issuer.rule() }]);
    let claims =
        json!({"iss": ISSUER, "scope": "a b", "permission": " c  d ", "roles": "e f", "name": "g h"});
    let passed = authenticate(&set, &bearer(&issuer.sign(&claims))).unwrap().claims.unwrap();
    assert_eq!(passed["scope"], json!(["a", "b"]));
    assert_eq!(passed["permission"], json!(["c", "d"]));
    assert_eq!(passed["roles"], json!(["e", "f"]));
    assert_eq!(passed["name"], json!("g h"));
}

#[test]
fn policies_see_the_claims_of_a_token_that_holds() {
    let issuer = Issuer::new();
    let allow = policy(
        "p",
        l7::authorization::Action::Allow,
        vec![when("request.auth.claims[scope]", &["write"], &[])],
    );
    let policies = build(&resources([allow], [authentication(vec![issuer.rule()])], l7::Settings::default()));
    let set = policies.for_service(&Case::get("/").addressed);
    let allowed = |claims: &Value| {
        let mut case = bearer(&issuer.sign(claims));
        let passed = authenticate(set, &case).unwrap();
        case.claims = passed.claims.as_deref().cloned();
        set.check(&case.head()).verdict == Verdict::Allow
    };
    assert!(allowed(&json!({"iss": ISSUER, "scope": "read write"})));
    assert!(!allowed(&json!({"iss": ISSUER, "scope": "read"})));
    assert!(set.check(&Case::get("/").head()).verdict != Verdict::Allow, "a request without a token");
}

#[test]
fn services_without_rules_do_nothing() {
    let set = policies(vec![]);
    assert!(set.is_empty() && !set.has_token_rules());
    let passed = authenticate(&set, &bearer("nonsense")).unwrap();
    assert!(passed.claims.is_none() && passed.edits.is_empty());
}
