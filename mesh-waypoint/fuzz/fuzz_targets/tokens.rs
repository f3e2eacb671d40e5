//! Tokens in requests. Input: lines; `?` begins the query, `=` a line of cookies, `-` a line of `x-token`, anything else
//! is a line of `authorization`. The keys are public ones of OpenSSL's, so that only its own tokens can hold; a request
//! without what was taken out of it has no token.
#![no_main]

use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};

use futures_util::FutureExt;
use http::{HeaderMap, HeaderValue, Method};
use libfuzzer_sys::fuzz_target;
use mesh_core::xds::proto::l7;
use mesh_waypoint::config::{Own, Resources};
use mesh_waypoint::request::{Addressed, Head, Source};
use mesh_waypoint::security::Policies;
use mesh_waypoint::security::authn::Authenticated;
use mesh_waypoint::security::jwks::{KeyStore, Roots};

const ISSUER: &str = "https://issuer.example";
const FILE: &str = include_str!("../../src/security/authn/tests/openssl.json");

static POLICIES: LazyLock<Policies> = LazyLock::new(|| {
    let file: serde_json::Value = serde_json::from_str(FILE).expect("JSON");
    let header =
        |name: &str, prefix: &str| l7::jwt_rule::TokenHeader { name: name.into(), prefix: prefix.into() };
    let usual = l7::JwtRule { issuer: ISSUER.into(), jwks: file["jwks"].to_string(), ..Default::default() };
    let own = l7::JwtRule {
        from_headers: vec![header("authorization", "Bearer "), header("x-token", "")],
        from_params: vec!["access_token".into(), "t".into()],
        from_cookies: vec!["t".into()],
        ..usual
    };
    let gateway = l7::Target { name: "w".into(), ..Default::default() };
    let authentication =
        l7::Authentication { targets: vec![gateway], rules: vec![own], ..Default::default() };
    let resources =
        Resources { authentications: [("a".into(), Arc::new(authentication))].into(), ..Default::default() };
    let own = Own { gateway: "w".into(), ..Own::default() };
    Policies::build(&resources, &own, &KeyStore::new(Roots::System).0)
});

fuzz_target!(|data: &[u8]| {
    let (mut headers, mut query) = (HeaderMap::new(), None);
    for line in data.split(|b| *b == b'\n') {
        let (name, value) = match line.split_first() {
            Some((b'?', rest)) => {
                query = Some(String::from_utf8_lossy(rest).into_owned());
                continue;
            }
            Some((b'=', rest)) => ("cookie", rest),
            Some((b'-', rest)) => ("x-token", rest),
            _ => ("authorization", line),
        };
        if let Ok(value) = HeaderValue::from_bytes(value) {
            headers.append(name, value);
        }
    }
    let Some(passed) = authenticate(&headers, query.as_deref()) else { return };
    let Some(claims) = &passed.claims else { return };
    assert_eq!(
        (&claims["iss"], &claims["sub"]),
        (&ISSUER.into(), &"alice".into()),
        "somebody forged a token"
    );
    passed.edits.apply(&mut headers);
    let query = passed.edits.query().or(query.as_deref());
    let again = authenticate(&headers, query);
    assert!(again.is_some_and(|again| again.claims.is_none()), "a token was left: {headers:?} {query:?}");
});

fn authenticate(headers: &HeaderMap, query: Option<&str>) -> Option<Authenticated> {
    let address = "10.0.0.1:1".parse().expect("an address");
    let source = Source { address, identity: None, workload: None, labels: None };
    let addressed = Addressed::Service { key: "a/b".into(), port: 80 };
    let head = Head {
        source: &source,
        destination: address,
        addressed: &addressed,
        method: &Method::GET,
        scheme: "http",
        authority: "b",
        path: "/",
        query,
        headers,
        claims: None,
    };
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_900_000_000);
    let outcome = POLICIES.for_service(&addressed).authenticate(&head, now).now_or_never();
    match outcome.expect("inline keys are never waited for") {
        Ok(passed) => Some(passed),
        Err(refusal) => {
            assert!(refusal.status().is_client_error());
            assert!(refusal.www_authenticate().as_bytes().starts_with(b"Bearer realm=\"http://b/\""));
            None
        }
    }
}
