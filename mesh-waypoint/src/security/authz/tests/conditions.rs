//! What each key of `when` matches.

use super::*;
use crate::security::testing::when;

fn condition(key: &str, values: &[&str], cases: &[(Case, bool)]) {
    for (case, matches) in cases {
        let truth = if *matches { True } else { False };
        let inverse = if *matches { False } else { True };
        assert_eq!(judge(&when(key, values, &[]), case), truth, "{key} {values:?} and {case:?}");
        assert_eq!(judge(&when(key, &[], values), case), inverse, "{key} not {values:?} and {case:?}");
    }
}

#[test]
fn keys_of_source_and_destination_mean_what_the_fields_mean() {
    let case = || Case::get("/").header("x-forwarded-for", "203.0.113.5");
    condition("source.ip", &["10.1.0.0/16"], &[(case(), true), (case().at("10.2.0.1"), false)]);
    condition("remote.ip", &["203.0.113.0/24"], &[(case(), true), (Case::get("/"), false)]);
    condition("source.namespace", &["front"], &[(case(), true), (by(""), false)]);
    condition("source.serviceAccount", &["front/web"], &[(case(), true), (by(""), false)]);
    condition("source.trustDomain", &["cluster.local"], &[(case(), true), (by(""), false)]);
    condition("source.principal", &["cluster.local/ns/front/*"], &[(case(), true), (by(""), false)]);
    condition("destination.ip", &["10.96.0.0/12"], &[(case(), true)]);
    condition("destination.ip", &["10.1.0.0/16"], &[(case(), false)]);
    condition("destination.port", &["80"], &[(case(), true), (case().port(81), false)]);
    // Requests are not read out of TLS that passes through.
    condition("connection.sni", &["*"], &[(case(), false)]);
}

#[test]
fn values_and_not_values_of_one_condition_both_hold() {
    let rule = when("source.namespace", &["f*"], &["front2"]);
    assert_eq!(judge(&rule, &by("spiffe://a/ns/front/sa/web")), True);
    assert_eq!(judge(&rule, &by("spiffe://a/ns/front2/sa/web")), False);
    assert_eq!(judge(&rule, &by("spiffe://a/ns/back/sa/web")), False);
}

#[test]
fn headers_are_found_whatever_the_case_of_their_name() {
    let with = |value: &str| Case::get("/").header("x-role", value);
    condition(
        "request.headers[X-Role]",
        &["admin", "op*", "*er"],
        &[
            (with("admin"), true),
            (with("operator"), true),
            (with("reader"), true),
            (with("Admin"), false),
            (with(""), false),
            (Case::get("/"), false),
        ],
    );
    condition(
        "request.headers[x-role]",
        &["*"],
        &[(with("x"), true), (with(""), false), (Case::get("/"), false)],
    );
    // A star inside is one of the characters of a value.
    condition(
        "request.headers[accept]",
        &["text/*;q=1"],
        &[
            (Case::get("/").header("accept", "text/*;q=1"), true),
            (Case::get("/").header("accept", "text/plain;q=1"), false),
        ],
    );
    condition("request.headers[:method]", &["GET"], &[(Case::get("/"), true)]);
    condition(
        "request.headers[:path]",
        &["/a?b=c"],
        &[(Case::get("/a").query("b=c"), true), (Case::get("/a"), false)],
    );
    condition(
        "request.headers[host]",
        &["cart.shop"],
        &[(Case::get("/"), true), (Case::get("/").host("x"), false)],
    );
}

#[test]
fn a_second_line_of_a_header_hides_nothing() {
    let twice = |a: &str, b: &str| Case::get("/").header("x-role", a).header("x-role", b);
    let rule = when("request.headers[x-role]", &["admin"], &[]);
    assert_eq!(judge(&rule, &twice("admin", "x")), Unknown);
    assert_eq!(judge(&rule, &twice("x", "admin")), Unknown);
    assert_eq!(judge(&rule, &twice("x", "y")), False);
    let joined = when("request.headers[x-role]", &["a,b"], &[]);
    assert_eq!(judge(&joined, &twice("a", "b")), Unknown);
    assert_eq!(judge(&when("request.headers[x-role]", &["*"], &[]), &twice("a", "b")), True);
}

#[test]
fn a_header_that_is_no_text_is_compared_by_its_bytes() {
    let case = Case::get("/").header("x-role", b"admin\xff");
    assert_eq!(judge(&when("request.headers[x-role]", &["admin*"], &[]), &case), True);
    assert_eq!(judge(&when("request.headers[x-role]", &["admin"], &[]), &case), False);
}

#[test]
fn claims_are_texts_or_lists_of_texts_at_any_depth() {
    let token = |claims| Case::get("/").claims(claims);
    condition(
        "request.auth.principal",
        &["https://id/alice"],
        &[
            (token(json!({"iss": "https://id", "sub": "alice"})), true),
            (token(json!({"iss": "https://id", "sub": "bob"})), false),
        ],
    );
    condition(
        "request.auth.audiences",
        &["shop"],
        &[
            (token(json!({"aud": "shop"})), true),
            (token(json!({"aud": ["x", "shop"]})), true),
            (token(json!({"aud": ["x"]})), false),
            (token(json!({})), false),
            (Case::get("/"), false),
        ],
    );
    condition(
        "request.auth.presenter",
        &["app"],
        &[(token(json!({"azp": "app"})), true), (token(json!({})), false)],
    );
    condition(
        "request.auth.claims[groups]",
        &["dev", "op*"],
        &[
            (token(json!({"groups": ["x", "dev"]})), true),
            (token(json!({"groups": "ops"})), true),
            (token(json!({"groups": ["x", ["dev"]]})), false),
            (token(json!({"groups": []})), false),
            (token(json!({"groups": null})), false),
            (token(json!({"other": "dev"})), false),
        ],
    );
    condition(
        "request.auth.claims[realm][roles]",
        &["admin"],
        &[
            (token(json!({"realm": {"roles": ["admin"]}})), true),
            (token(json!({"realm": {"roles": ["user"]}})), false),
            (token(json!({"realm": "roles"})), false),
            (token(json!({"realm.roles": ["admin"]})), false),
        ],
    );
    condition("request.auth.claims[https://x/y]", &["z"], &[(token(json!({"https://x/y": "z"})), true)]);
    condition(
        "request.auth.claims[groups]",
        &["*"],
        &[(token(json!({"groups": ["dev"]})), true), (token(json!({"groups": ""})), false)],
    );
}

#[test]
fn a_claim_of_another_type_that_reads_like_the_value_is_unknown() {
    let token = |claims| Case::get("/").claims(claims);
    let rule = |value: &str| when("request.auth.claims[x]", &[value], &[]);
    assert_eq!(judge(&rule("true"), &token(json!({"x": true}))), Unknown);
    assert_eq!(judge(&rule("true"), &token(json!({"x": false}))), False);
    assert_eq!(judge(&rule("42"), &token(json!({"x": 42}))), Unknown);
    assert_eq!(judge(&rule("42"), &token(json!({"x": [42, "y"]}))), Unknown);
    assert_eq!(judge(&rule("*"), &token(json!({"x": {"y": 1}}))), Unknown);
    assert_eq!(judge(&rule("y"), &token(json!({"x": {"y": 1}}))), False);
}

#[test]
fn keys_that_are_not_known_are_unknown_and_named() {
    for key in [
        "source.nonsense",
        "request.headers",
        "request.headers[]",
        "request.headers[a][b]",
        "request.auth.claims",
        "request.auth.claims[a",
        "request.auth.claims[a]b",
        "request.auth.claims[a][]",
        "experimental.envoy.filters.network.mysql_proxy[db.table]",
        "",
    ] {
        for rule in [when(key, &["x"], &[]), when(key, &[], &["x"])] {
            let (truth, problems) = judge_with(&rule, &Case::get("/"), &l7::Settings::default());
            assert_eq!(truth, Unknown, "{key}");
            assert_eq!(problems.len(), 1, "{key}");
            assert_eq!(problems[0].field, "rules[0].when[0].key");
        }
    }
    let (truth, problems) =
        judge_with(&when("source.ip", &[], &[]), &Case::get("/"), &l7::Settings::default());
    assert_eq!((truth, problems.len()), (Unknown, 1), "a condition without values");
}
