//! Tokens in requests. The signatures of `openssl.json` are OpenSSL's; tokens with other contents are signed here.

mod cached;
mod outputs;

use std::time::{Duration, SystemTime};

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use futures_util::FutureExt;
use mesh_core::xds::proto::l7::jwt_rule::TokenHeader;
use serde_json::json;

use super::*;
use crate::security::ServicePolicies;
use crate::security::testing::{Case, build, origin, resources, service_target, strings};

const ISSUER: &str = "https://issuer.example";

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_900_000_000)
}

fn encode(value: &Value) -> String {
    URL_SAFE_NO_PAD.encode(value.to_string())
}

/// Somebody with a key.
struct Issuer(Ed25519KeyPair);

impl Issuer {
    fn new() -> Self {
        Self(Ed25519KeyPair::generate().unwrap())
    }

    fn jwks(&self, kid: Option<&str>) -> String {
        let x = URL_SAFE_NO_PAD.encode(self.0.public_key().as_ref());
        let mut key = json!({"kty": "OKP", "crv": "Ed25519", "x": x});
        if let Some(kid) = kid {
            key["kid"] = kid.into();
        }
        json!({ "keys": [key] }).to_string()
    }

    fn sign_with(&self, header: &Value, claims: &Value) -> String {
        let message = format!("{}.{}", encode(header), encode(claims));
        let signature = URL_SAFE_NO_PAD.encode(self.0.sign(message.as_bytes()));
        format!("{message}.{signature}")
    }

    fn sign(&self, claims: &Value) -> String {
        self.sign_with(&json!({"alg": "EdDSA", "kid": "k"}), claims)
    }

    fn rule(&self) -> l7::JwtRule {
        l7::JwtRule { issuer: ISSUER.into(), jwks: self.jwks(Some("k")), ..Default::default() }
    }
}

fn authentication(rules: Vec<l7::JwtRule>) -> l7::Authentication {
    let origin = origin("RequestAuthentication", "shop", "jwt");
    l7::Authentication { origin, targets: vec![service_target()], rules }
}

fn policies(rules: Vec<l7::JwtRule>) -> Arc<ServicePolicies> {
    let policies = build(&resources([], [authentication(rules)], l7::Settings::default()));
    assert_eq!(policies.problems(), []);
    Arc::clone(policies.for_service(&Case::get("/").addressed))
}

/// With inline keys nothing is ever waited for.
fn authenticate_at(set: &ServicePolicies, case: &Case, now: SystemTime) -> Result<Authenticated, Refusal> {
    set.authenticate(&case.head(), now).now_or_never().expect("inline keys are there")
}

fn authenticate(set: &ServicePolicies, case: &Case) -> Result<Authenticated, Refusal> {
    authenticate_at(set, case, now())
}

fn bearer(token: &str) -> Case {
    Case::get("/").header("authorization", format!("Bearer {token}"))
}

fn subject(outcome: &Result<Authenticated, Refusal>) -> Result<Option<&str>, TokenError> {
    match outcome {
        Ok(passed) => Ok(passed.claims.as_ref().map(|claims| claims["sub"].as_str().unwrap_or(""))),
        Err(refusal) => Err(refusal.error),
    }
}

fn alice() -> Value {
    json!({"iss": ISSUER, "sub": "alice"})
}

fn fixture() -> (String, Map<String, Value>) {
    let Ok(Value::Object(file)) = serde_json::from_str(include_str!("tests/openssl.json")) else {
        panic!("no JSON")
    };
    (file["jwks"].to_string(), file["tokens"].as_object().unwrap().clone())
}

fn fixture_rule() -> l7::JwtRule {
    l7::JwtRule {
        issuer: ISSUER.into(),
        jwks: fixture().0,
        audiences: strings(&["shop"]),
        ..Default::default()
    }
}

#[test]
fn tokens_that_openssl_signed_hold_with_every_algorithm() {
    let set = policies(vec![fixture_rule()]);
    let (_, tokens) = fixture();
    assert_eq!(tokens.len(), 10);
    for (algorithm, token) in &tokens {
        let passed = authenticate(&set, &bearer(token.as_str().unwrap())).unwrap();
        assert_eq!(passed.principal().as_deref(), Some("https://issuer.example/alice"), "{algorithm}");
        assert_eq!(passed.claims.unwrap()["scope"], json!(["read", "write"]));
    }
}

#[test]
fn a_token_that_was_changed_anywhere_does_not_hold() {
    let set = policies(vec![fixture_rule()]);
    let (_, tokens) = fixture();
    for (algorithm, token) in &tokens {
        let token = token.as_str().unwrap();
        let (message, signature) = token.rsplit_once('.').unwrap();
        let (header, _) = message.split_once('.').unwrap();
        let mut bytes = URL_SAFE_NO_PAD.decode(signature).unwrap();
        bytes[7] ^= 1;
        let changed = [
            format!("{message}.{}", URL_SAFE_NO_PAD.encode(&bytes)),
            format!("{message}."),
            format!("{message}.{}", URL_SAFE_NO_PAD.encode(vec![0; bytes.len()])),
            format!("{header}.{}.{signature}", encode(&json!({"iss": ISSUER, "sub": "root", "aud": "shop"}))),
        ];
        for token in changed {
            assert_eq!(
                subject(&authenticate(&set, &bearer(&token))),
                Err(TokenError::VerificationFails),
                "{algorithm}"
            );
        }
    }
}

#[test]
fn no_token_chooses_an_algorithm_that_its_key_is_not_for() {
    let set = policies(vec![fixture_rule()]);
    let (jwks, tokens) = fixture();
    let jwks: Value = serde_json::from_str(&jwks).unwrap();
    let claims = encode(&json!({"iss": ISSUER, "sub": "root", "aud": "shop"}));
    let forged = |header: Value, signature: &[u8]| {
        format!("{}.{claims}.{}", encode(&header), URL_SAFE_NO_PAD.encode(signature))
    };
    for none in ["none", "None", "NONE", "", "RS1", "HS256", "HS512", "rs256"] {
        assert_eq!(
            subject(&authenticate(&set, &bearer(&forged(json!({"alg": none, "kid": "rsa"}), b"")))),
            Err(TokenError::UnsupportedAlg),
            "{none}"
        );
    }
    // What is public as the secret of an HMAC.
    let modulus = URL_SAFE_NO_PAD.decode(jwks["keys"][0]["n"].as_str().unwrap()).unwrap();
    let header = json!({"alg": "HS256", "kid": "rsa"});
    let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, &modulus);
    let tag = aws_lc_rs::hmac::sign(&key, format!("{}.{claims}", encode(&header)).as_bytes());
    assert_eq!(
        subject(&authenticate(&set, &bearer(&forged(header, tag.as_ref())))),
        Err(TokenError::UnsupportedAlg)
    );
    // The key of this id is for RSA.
    let header = json!({"alg": "ES256", "kid": "rsa"});
    assert_eq!(subject(&authenticate(&set, &bearer(&forged(header, &[1; 64])))), Err(TokenError::NoKey));
    // A key that names its algorithm is for no other.
    let mut only_512 = jwks;
    only_512["keys"][0]["alg"] = "RS512".into();
    let set = policies(vec![l7::JwtRule { jwks: only_512.to_string(), ..fixture_rule() }]);
    let outcome = |alg: &str| authenticate(&set, &bearer(tokens[alg].as_str().unwrap()));
    assert_eq!(subject(&outcome("RS512")), Ok(Some("alice")));
    assert_eq!(subject(&outcome("RS256")), Err(TokenError::NoKey));
    assert_eq!(subject(&outcome("PS512")), Err(TokenError::NoKey));
}

#[test]
fn key_ids_have_to_be_equal_where_both_have_one() {
    let issuer = Issuer::new();
    let signed = |header: Value| issuer.sign_with(&header, &alice());
    let with_id = policies(vec![issuer.rule()]);
    let without_id = policies(vec![l7::JwtRule { jwks: issuer.jwks(None), ..issuer.rule() }]);
    let other_key = policies(vec![l7::JwtRule { jwks: Issuer::new().jwks(None), ..issuer.rule() }]);
    let cases = [
        (&with_id, json!({"alg": "EdDSA", "kid": "k"}), Ok(Some("alice"))),
        (&with_id, json!({"alg": "EdDSA"}), Ok(Some("alice"))),
        (&with_id, json!({"alg": "EdDSA", "kid": ""}), Ok(Some("alice"))),
        (&with_id, json!({"alg": "EdDSA", "kid": "new"}), Err(TokenError::NoKey)),
        (&without_id, json!({"alg": "EdDSA", "kid": "any"}), Ok(Some("alice"))),
        (&other_key, json!({"alg": "EdDSA", "kid": "any"}), Err(TokenError::VerificationFails)),
    ];
    for (set, header, expected) in cases {
        assert_eq!(subject(&authenticate(set, &bearer(&signed(header.clone())))), expected, "{header}");
    }
}

#[test]
fn what_is_no_token_is_refused_with_the_reason() {
    let issuer = Issuer::new();
    let set = policies(vec![issuer.rule()]);
    let header = json!({"alg": "EdDSA", "kid": "k"});
    let good = encode(&header);
    let with_header = |value: Value| issuer.sign_with(&value, &alice());
    let with_claims = |value: Value| issuer.sign_with(&header, &value);
    let claims = encode(&alice());
    let cases = [
        (String::new(), TokenError::BadFormat),
        ("x".to_owned(), TokenError::BadFormat),
        ("a.b".to_owned(), TokenError::BadFormat),
        ("a.b.c.d".to_owned(), TokenError::BadFormat),
        (format!("!.{claims}.x"), TokenError::HeaderBase64),
        (format!("{good}=.{claims}.x"), TokenError::HeaderBase64),
        (format!("eyI.{claims}.x"), TokenError::HeaderJson),
        (with_header(json!("x")), TokenError::HeaderJson),
        (with_header(json!({})), TokenError::HeaderAlg),
        (with_header(json!({"alg": 1})), TokenError::HeaderAlg),
        (with_header(json!({"alg": "EdDSA", "kid": 1})), TokenError::HeaderKid),
        (with_header(json!({"alg": "EdDSA", "crit": ["exp"]})), TokenError::Critical),
        (with_header(json!({"alg": "EdDSA", "crit": ["b64"], "b64": false})), TokenError::Critical),
        (format!("{good}.!.x"), TokenError::PayloadBase64),
        (format!("{good}.eyI.x"), TokenError::PayloadJson),
        (with_claims(json!(["x"])), TokenError::PayloadJson),
        (with_claims(json!({"iss": 1})), TokenError::Iss),
        (with_claims(json!({"iss": ISSUER, "sub": {}})), TokenError::Sub),
        (with_claims(json!({"iss": ISSUER, "exp": "x"})), TokenError::Exp),
        (with_claims(json!({"iss": ISSUER, "exp": -1})), TokenError::Exp),
        (with_claims(json!({"iss": ISSUER, "nbf": null})), TokenError::Nbf),
        (with_claims(json!({"iss": ISSUER, "aud": 1})), TokenError::Aud),
        (with_claims(json!({"iss": ISSUER, "aud": ["a", 1]})), TokenError::Aud),
        (format!("{good}.{claims}.!"), TokenError::SignatureBase64),
        (with_claims(json!({"iss": "https://other"})), TokenError::UnknownIssuer),
        (with_claims(json!({})), TokenError::UnknownIssuer),
    ];
    for (token, expected) in cases {
        assert_eq!(subject(&authenticate(&set, &bearer(&token))), Err(expected), "{token}");
    }
    let bytes = Case::get("/").header("authorization", b"Bearer \xff.\xff.\xff");
    assert_eq!(subject(&authenticate(&set, &bytes)), Err(TokenError::BadFormat));
}

#[test]
fn a_token_holds_between_its_times_with_a_minute_of_skew() {
    let issuer = Issuer::new();
    let set = policies(vec![issuer.rule()]);
    let at = |claims: Value, now: u64| {
        let mut all = alice();
        all.as_object_mut().unwrap().extend(claims.as_object().unwrap().clone());
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(now);
        subject(&authenticate_at(&set, &bearer(&issuer.sign(&all)), now)).map(|_| ())
    };
    assert_eq!(at(json!({}), 5_000_000_000), Ok(()));
    assert_eq!(at(json!({"exp": 1000}), 1060), Ok(()));
    assert_eq!(at(json!({"exp": 1000}), 1061), Err(TokenError::Expired));
    assert_eq!(at(json!({"exp": 0}), 1061), Err(TokenError::Expired));
    assert_eq!(at(json!({"exp": 1000.5}), 1060), Ok(()));
    assert_eq!(at(json!({"nbf": 1000}), 940), Ok(()));
    assert_eq!(at(json!({"nbf": 1000}), 939), Err(TokenError::NotYetValid));
}

#[test]
fn audiences_are_compared_without_scheme_and_last_slash() {
    let issuer = Issuer::new();
    let outcome = |allowed: &[&str], aud: Value| {
        let set = policies(vec![l7::JwtRule { audiences: strings(allowed), ..issuer.rule() }]);
        let claims = json!({"iss": ISSUER, "sub": "alice", "aud": aud});
        subject(&authenticate(&set, &bearer(&issuer.sign(&claims)))).map(|_| ())
    };
    assert_eq!(outcome(&[], json!("anything")), Ok(()));
    assert_eq!(outcome(&["shop"], json!("shop")), Ok(()));
    assert_eq!(outcome(&["shop", "pay"], json!(["x", "pay"])), Ok(()));
    assert_eq!(outcome(&["https://shop.example/"], json!("http://shop.example")), Ok(()));
    assert_eq!(outcome(&["shop"], json!("shopping")), Err(TokenError::AudienceNotAllowed));
    assert_eq!(outcome(&["shop"], json!([])), Err(TokenError::AudienceNotAllowed));
    let set = policies(vec![l7::JwtRule { audiences: strings(&["shop"]), ..issuer.rule() }]);
    let refusal = authenticate(&set, &bearer(&issuer.sign(&alice()))).unwrap_err();
    assert_eq!(refusal.status(), StatusCode::FORBIDDEN, "a token for nobody in particular");
}

#[test]
fn tokens_are_found_where_the_rule_says_and_only_there() {
    let issuer = Issuer::new();
    let token = issuer.sign(&alice());
    let usual = policies(vec![issuer.rule()]);
    let own = policies(vec![l7::JwtRule {
        from_headers: vec![
            TokenHeader { name: "x-token".into(), prefix: String::new() },
            TokenHeader { name: "X-Auth".into(), prefix: "JWT ".into() },
        ],
        from_params: strings(&["jwt"]),
        from_cookies: strings(&["session"]),
        ..issuer.rule()
    }]);
    let get = || Case::get("/");
    let cases = [
        (bearer(&token), true, false),
        (get().header("authorization", format!("bearer {token}")), true, false),
        (get().header("authorization", format!("Basic {token}")), false, false),
        (get().header("authorization", &token), false, false),
        (get().query(&format!("access_token={token}")), true, false),
        (get().query(&format!("a=b&access%5Ftoken={}", token.replace('.', "%2E"))), true, false),
        (get().query("a=b&access_tokens=x"), false, false),
        (get().header("x-token", &token), false, true),
        (get().header("x-auth", format!("JWT {token}")), false, true),
        (get().header("x-auth", format!("jwt {token}")), false, false),
        (get().query(&format!("x=1&jwt={token}")), false, true),
        (get().header("cookie", format!("a=b; session={token}")), false, true),
        (get().header("cookie", "a=b").header("cookie", format!("session=\"{token}\";c=d")), false, true),
        (get().header("cookie", format!("xsession={token}")), false, false),
        (get(), false, false),
    ];
    for (case, in_usual, in_own) in cases {
        for (set, found) in [(&usual, in_usual), (&own, in_own)] {
            let expected = Ok(found.then_some("alice"));
            assert_eq!(subject(&authenticate(set, &case)), expected, "{case:?}");
        }
    }
}

#[test]
fn every_token_in_the_places_of_a_rule_has_to_hold() {
    let issuer = Issuer::new();
    let set = policies(vec![issuer.rule()]);
    let (good, bad) = (issuer.sign(&alice()), Issuer::new().sign(&alice()));
    let cases = [
        bearer(&good).header("authorization", format!("Bearer {bad}")),
        bearer(&bad).header("authorization", format!("Bearer {good}")),
        bearer(&good).query(&format!("access_token={bad}")),
        Case::get("/").query(&format!("access_token={good}&access_token={bad}")),
    ];
    for case in cases {
        assert_eq!(subject(&authenticate(&set, &case)), Err(TokenError::VerificationFails), "{case:?}");
    }
    assert!(authenticate(&set, &bearer(&format!("{good},Bearer {bad}"))).is_err());
    assert!(authenticate(&set, &bearer(&good).query(&format!("access_token={good}"))).is_ok());
}

#[test]
fn a_token_that_holds_for_one_of_several_rules_passes() {
    let (a, b) = (Issuer::new(), Issuer::new());
    let of_b = l7::JwtRule { issuer: "https://b".into(), ..b.rule() };
    let elsewhere = l7::JwtRule {
        from_headers: vec![TokenHeader { name: "x-token".into(), prefix: String::new() }],
        ..of_b.clone()
    };
    let bob = json!({"iss": "https://b", "sub": "bob"});
    for rules in [vec![a.rule(), of_b.clone()], vec![of_b, a.rule()]] {
        let set = policies(rules);
        assert_eq!(subject(&authenticate(&set, &bearer(&a.sign(&alice())))), Ok(Some("alice")));
        assert_eq!(subject(&authenticate(&set, &bearer(&b.sign(&bob)))), Ok(Some("bob")));
        // Signed by the wrong one of two issuers.
        assert_eq!(subject(&authenticate(&set, &bearer(&a.sign(&bob)))), Err(TokenError::VerificationFails));
        let stranger = a.sign(&json!({"iss": "https://c"}));
        assert_eq!(subject(&authenticate(&set, &bearer(&stranger))), Err(TokenError::UnknownIssuer));
        assert_eq!(subject(&authenticate(&set, &Case::get("/"))), Ok(None));
    }
    let set = policies(vec![a.rule(), elsewhere]);
    let bad = Case::get("/").header("x-token", "nonsense");
    assert_eq!(
        subject(&authenticate(&set, &bad)),
        Err(TokenError::BadFormat),
        "one place is bad, the other empty"
    );
}

#[test]
fn a_refusal_reads_like_envoys() {
    let set = policies(vec![Issuer::new().rule()]);
    let case = Case { path: "/a\"b\\c".into(), ..bearer("nonsense") };
    let refusal = authenticate(&set, &case).unwrap_err();
    assert_eq!(refusal.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(
        refusal.body(),
        "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections"
    );
    assert_eq!(refusal.www_authenticate(), "Bearer realm=\"http://cart.shop/abc\", error=\"invalid_token\"");
    assert_eq!(
        refusal.details(),
        "jwt_authn_access_denied{Jwt_is_not_in_the_form_of_Header.Payload.Signature_with_two_dots_and_3_sections}"
    );
    let long =
        authenticate(&set, &Case { path: format!("/{}", "x".repeat(400)), ..bearer("x") }).unwrap_err();
    assert_eq!(long.www_authenticate().len(), "Bearer realm=\"\", error=\"invalid_token\"".len() + 256);
}

#[test]
fn a_rule_that_cannot_be_honoured_refuses_every_token_and_says_why() {
    let issuer = Issuer::new();
    let rule = |change: fn(&mut l7::JwtRule)| {
        let mut rule = issuer.rule();
        change(&mut rule);
        rule
    };
    let header = |name: &str| TokenHeader { name: name.into(), prefix: String::new() };
    let bad_header = l7::JwtRule { from_headers: vec![header("no header")], ..issuer.rule() };
    let cases = [
        (rule(|rule| rule.jwks = "{".into()), "jwtRules[0].jwks"),
        (rule(|rule| rule.jwks = r#"{"keys": []}"#.into()), "jwtRules[0].jwks"),
        (rule(|rule| rule.jwks = r#"{"keys": [{"kty": "oct", "k": "eA"}]}"#.into()), "jwtRules[0].jwks"),
        (rule(|rule| rule.jwks.clear()), "jwtRules[0].jwksUri"),
        (rule(|rule| rule.issuer.clear()), "jwtRules[0].issuer"),
        (bad_header, "jwtRules[0].fromHeaders"),
    ];
    let claims = [alice(), json!({"sub": "alice"})];
    for (rule, field) in cases {
        let policies = build(&resources([], [authentication(vec![rule])], l7::Settings::default()));
        assert_eq!(policies.problems().iter().map(|p| p.field.as_str()).collect::<Vec<_>>(), [field]);
        let set = policies.for_service(&Case::get("/").addressed);
        for claims in &claims {
            assert!(authenticate(set, &bearer(&issuer.sign(claims))).is_err(), "{field}");
        }
    }
}

#[test]
fn keys_that_cannot_be_used_are_left_out_and_named() {
    let issuer = Issuer::new();
    let mut jwks: Value = serde_json::from_str(&issuer.jwks(Some("k"))).unwrap();
    let others = [
        json!({"kty": "oct", "k": "eA"}),
        json!({"kty": "RSA", "n": "AQAB", "e": "AQAB"}),
        json!({"kty": "RSA", "e": "AQAB"}),
        json!({"kty": "EC", "crv": "secp256k1", "x": "", "y": ""}),
        json!({"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}),
        json!({"kty": "EC", "crv": "P-256", "x": "A".repeat(43), "y": "A".repeat(43)}),
        json!({"kty": "OKP", "crv": "Ed448", "x": "AA"}),
        json!({"kty": "OKP", "crv": "Ed25519", "x": "AA"}),
        json!({"kty": "OKP", "crv": "Ed25519", "x": "A".repeat(43), "use": "enc"}),
        json!({"kty": "OKP", "crv": "Ed25519", "x": "A".repeat(43), "alg": "RS256"}),
        json!({"kid": "x"}),
        json!(1),
    ];
    jwks["keys"].as_array_mut().unwrap().extend(others.clone());
    let rule = l7::JwtRule { jwks: jwks.to_string(), ..issuer.rule() };
    let policies = build(&resources([], [authentication(vec![rule])], l7::Settings::default()));
    assert_eq!(policies.problems().len(), others.len(), "{:#?}", policies.problems());
    let set = policies.for_service(&Case::get("/").addressed);
    assert_eq!(subject(&authenticate(set, &bearer(&issuer.sign(&alice())))), Ok(Some("alice")));
}
