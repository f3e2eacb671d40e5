//! What each field of a policy matches.

mod conditions;
mod invariants;
mod order;

use mesh_core::policy::Truth::{self, False, True, Unknown};
use mesh_core::xds::proto::l7::{self, Operation, PolicySource};
use serde_json::json;

use super::facts::Facts;
use super::*;
use crate::security::Problem;
use crate::security::testing::{Case, from, policy, strings, to};

/// What a rule says about a request, and what is wrong with the rule.
fn judge_with(rule: &l7::AuthorizationRule, case: &Case, settings: &l7::Settings) -> (Truth, Vec<Problem>) {
    let mut problems = Vec::new();
    let policy = policy("p", l7::authorization::Action::Allow, vec![rule.clone()]);
    let compiled = compile::policy(&policy, settings, &mut problems);
    let head = case.head();
    let facts = Facts::of_request(&head, settings.trusted_proxies as usize);
    (compiled.rules[0].truth(&facts), problems)
}

fn judge(rule: &l7::AuthorizationRule, case: &Case) -> Truth {
    let (truth, problems) = judge_with(rule, case, &l7::Settings::default());
    assert_eq!(problems, [], "{rule:?}");
    truth
}

/// Checks a field and its negation against requests.
fn field<T: Clone>(
    values: &[&str],
    cases: &[(Case, bool)],
    rule: impl Fn(T) -> l7::AuthorizationRule,
    positive: impl Fn(Vec<String>) -> T,
    negative: impl Fn(Vec<String>) -> T,
) {
    for (case, matches) in cases {
        let truth = if *matches { True } else { False };
        let inverse = if *matches { False } else { True };
        assert_eq!(judge(&rule(positive(strings(values))), case), truth, "{values:?} and {case:?}");
        assert_eq!(judge(&rule(negative(strings(values))), case), inverse, "not {values:?} and {case:?}");
    }
}

fn source(
    values: &[&str],
    cases: &[(Case, bool)],
    positive: impl Fn(Vec<String>) -> PolicySource,
    negative: impl Fn(Vec<String>) -> PolicySource,
) {
    field(values, cases, from, positive, negative);
}

fn operation(
    values: &[&str],
    cases: &[(Case, bool)],
    positive: impl Fn(Vec<String>) -> Operation,
    negative: impl Fn(Vec<String>) -> Operation,
) {
    field(values, cases, to, positive, negative);
}

fn by(identity: &str) -> Case {
    Case::get("/").from(identity)
}

fn principals(values: &[&str], cases: &[(Case, bool)]) {
    source(
        values,
        cases,
        |principals| PolicySource { principals, ..Default::default() },
        |not_principals| PolicySource { not_principals, ..Default::default() },
    );
}

#[test]
fn principals_are_compared_whole_or_by_one_end() {
    let web = || by("spiffe://cluster.local/ns/front/sa/web");
    let other = || by("spiffe://cluster.local/ns/front/sa/web2");
    principals(
        &["cluster.local/ns/front/sa/web"],
        &[(web(), true), (other(), false), (by(""), false), (by("spiffe://x.org/ns/front/sa/web"), false)],
    );
    principals(
        &["cluster.local/ns/front/*"],
        &[(web(), true), (by("spiffe://cluster.local/ns/b/sa/web"), false)],
    );
    principals(&["*/sa/web"], &[(web(), true), (by("spiffe://x.org/ns/a/sa/web"), true), (other(), false)]);
    principals(&["*"], &[(web(), true), (by(""), false)]);
    principals(&["a/ns/b/sa/c", "*/sa/web2"], &[(web(), false), (other(), true)]);
}

#[test]
fn a_principal_of_the_mesh_holds_in_each_alias_of_its_trust_domain() {
    let settings = l7::Settings {
        trust_domain: "new.org".into(),
        trust_domain_aliases: vec!["old.org".into()],
        ..Default::default()
    };
    let cases = [
        ("old.org/ns/a/sa/b", [true, true, false, false]),
        ("new.org/ns/a/sa/b", [true, true, false, false]),
        // Points to the trust domain of the mesh.
        ("cluster.local/ns/a/sa/b", [true, true, false, false]),
        ("else.org/ns/a/sa/b", [false, false, true, false]),
        ("*old.org/ns/a/sa/b", [true, true, false, true]),
        ("old.org/ns/a/sa/*", [true, true, false, false]),
        ("old.org/ns/a/*", [false, true, false, false]),
        ("*/ns/a/sa/b", [true, true, true, true]),
    ];
    for (value, expected) in cases {
        for (domain, expected) in ["new.org", "old.org", "else.org", "very-old.org"].into_iter().zip(expected)
        {
            let rule = from(PolicySource { principals: strings(&[value]), ..Default::default() });
            let case = by(&format!("spiffe://{domain}/ns/a/sa/b"));
            let (truth, _) = judge_with(&rule, &case, &settings);
            assert_eq!(truth == True, expected, "{value} and {domain}");
        }
    }
}

#[test]
fn namespaces_accounts_and_trust_domains_are_those_of_the_certificate() {
    let cases = |matching: bool| [(by("spiffe://cluster.local/ns/front/sa/web"), matching), (by(""), false)];
    for (values, matching) in
        [(&["front"], true), (&["fr*"], true), (&["*nt"], true), (&["*"], true), (&["fron"], false)]
    {
        source(
            values,
            &cases(matching),
            |namespaces| PolicySource { namespaces, ..Default::default() },
            |not_namespaces| PolicySource { not_namespaces, ..Default::default() },
        );
    }
    // The policy is of namespace shop.
    for (values, matching) in
        [(&["front/web"], true), (&["web"], false), (&["front/we"], false), (&["shop/web"], false)]
    {
        source(
            values,
            &cases(matching),
            |service_accounts| PolicySource { service_accounts, ..Default::default() },
            |not_service_accounts| PolicySource { not_service_accounts, ..Default::default() },
        );
    }
    source(
        &["web"],
        &[(by("spiffe://any.org/ns/shop/sa/web"), true)],
        |service_accounts| PolicySource { service_accounts, ..Default::default() },
        |not_service_accounts| PolicySource { not_service_accounts, ..Default::default() },
    );
    for (values, matching) in [(&["cluster.local"], true), (&["*.local"], true), (&["local"], false)] {
        source(
            values,
            &cases(matching),
            |trust_domains| PolicySource { trust_domains, ..Default::default() },
            |not_trust_domains| PolicySource { not_trust_domains, ..Default::default() },
        );
    }
}

#[test]
fn ip_blocks_are_prefixes_of_the_peer_whatever_its_form() {
    let at = |address: &str| Case::get("/").at(address);
    source(
        &["10.1.0.0/16", "192.0.2.7", "2001:db8::/32"],
        &[
            (at("10.1.2.3"), true),
            (at("10.2.0.1"), false),
            (at("192.0.2.7"), true),
            (at("192.0.2.8"), false),
            (at("::ffff:10.1.2.3"), true),
            (at("2001:db8::1"), true),
            (at("2001:db9::1"), false),
            // What the client says does not count.
            (at("10.2.0.1").header("x-forwarded-for", "10.1.2.3"), false),
        ],
        |ip_blocks| PolicySource { ip_blocks, ..Default::default() },
        |not_ip_blocks| PolicySource { not_ip_blocks, ..Default::default() },
    );
    source(
        &["::ffff:10.0.0.0/104"],
        &[(at("10.9.9.9"), true), (at("11.0.0.1"), false)],
        |ip_blocks| PolicySource { ip_blocks, ..Default::default() },
        |not_ip_blocks| PolicySource { not_ip_blocks, ..Default::default() },
    );
}

#[test]
fn the_remote_address_is_the_one_that_the_trusted_proxies_have_seen() {
    let forwarded = |lines: &[&str]| {
        lines.iter().fold(Case::get("/").at("10.9.9.9"), |case, line| case.header("x-forwarded-for", line))
    };
    let rule = from(PolicySource { remote_ip_blocks: strings(&["203.0.113.0/24"]), ..Default::default() });
    let cases = [
        (0, forwarded(&["203.0.113.5"]), True),
        (0, forwarded(&["203.0.113.5, 198.51.100.1"]), False),
        (0, forwarded(&["198.51.100.1,203.0.113.5"]), True),
        (1, forwarded(&["203.0.113.5, 198.51.100.1"]), True),
        (1, forwarded(&["203.0.113.5", "198.51.100.1"]), True),
        (1, forwarded(&["198.51.100.2", "203.0.113.5, 198.51.100.1"]), True),
        (2, forwarded(&["198.51.100.2", "203.0.113.5, 198.51.100.1"]), False),
        // Fewer than the proxies that are trusted: the peer counts.
        (1, forwarded(&["203.0.113.5"]), False),
        (0, forwarded(&[]), False),
        // Anybody can write this.
        (0, forwarded(&["203.0.113.5, nonsense"]), Unknown),
        (0, forwarded(&["203.0.113.5,"]), Unknown),
    ];
    for (trusted_proxies, case, expected) in cases {
        let settings = l7::Settings { trusted_proxies, ..Default::default() };
        assert_eq!(judge_with(&rule, &case, &settings).0, expected, "{trusted_proxies} and {case:?}");
    }
    let peer = Case::get("/").at("203.0.113.9");
    assert_eq!(judge(&rule, &peer), True, "without the header the peer is the client");
    let not = from(PolicySource { not_remote_ip_blocks: strings(&["203.0.113.0/24"]), ..Default::default() });
    assert_eq!(judge(&not, &peer), False);
    assert_eq!(judge(&not, &forwarded(&["nonsense"])), Unknown);
}

#[test]
fn request_principals_are_issuer_and_subject() {
    let token = |claims| Case::get("/").claims(claims);
    let alice = || token(json!({"iss": "https://id.example", "sub": "alice"}));
    for (values, matching) in [
        (&["https://id.example/alice"], true),
        (&["https://id.example/*"], true),
        (&["*/alice"], true),
        (&["*"], true),
        (&["https://id.example/bob"], false),
    ] {
        source(
            values,
            &[
                (alice(), matching),
                (Case::get("/"), false),
                (token(json!({"iss": "https://id.example"})), false),
                (token(json!({"iss": "https://id.example", "sub": ""})), false),
                (token(json!({"sub": "alice"})), false),
            ],
            |request_principals| PolicySource { request_principals, ..Default::default() },
            |not_request_principals| PolicySource { not_request_principals, ..Default::default() },
        );
    }
}

#[test]
fn hosts_are_compared_whatever_their_case_and_port() {
    let host = |authority: &str| Case::get("/").host(authority);
    operation(
        &["cart.shop", "*.Example.com", "api.*", "pay:8443"],
        &[
            (host("cart.shop"), true),
            (host("CART.shop"), true),
            (host("cart.shop:80"), true),
            (host("cart.shop.evil"), false),
            (host("cart.shop."), true),
            (host("cart.shop.:80"), true),
            (host("x.example.COM"), true),
            (host("x.example.com:8080"), true),
            (host("example.com"), false),
            (host("api.anything:1"), true),
            (host("pay:8443"), true),
            (host("pay"), false),
            (host("pay:443"), false),
            (host(""), false),
        ],
        |hosts| Operation { hosts, ..Default::default() },
        |not_hosts| Operation { not_hosts, ..Default::default() },
    );
    operation(
        &["[2001:db8::1]"],
        &[(host("[2001:db8::1]"), true), (host("[2001:db8::1]:80"), true), (host("[2001:db8::2]"), false)],
        |hosts| Operation { hosts, ..Default::default() },
        |not_hosts| Operation { not_hosts, ..Default::default() },
    );
}

#[test]
fn methods_are_compared_as_they_are() {
    for (values, expected) in [
        (&["GET"], [true, false, false]),
        (&["get"], [false, false, true]),
        (&["G*"], [true, false, false]),
        (&["*ST"], [false, true, false]),
        (&["*"], [true, true, true]),
    ] {
        let requests = ["GET", "POST", "get"].map(|method| Case::get("/").method(method));
        let cases: Vec<_> = requests.into_iter().zip(expected).collect();
        operation(
            values,
            &cases,
            |methods| Operation { methods, ..Default::default() },
            |not_methods| Operation { not_methods, ..Default::default() },
        );
    }
}

#[test]
fn ports_are_those_that_were_addressed() {
    operation(
        &["80", "8443"],
        &[(Case::get("/"), true), (Case::get("/").port(8443), true), (Case::get("/").port(8080), false)],
        |ports| Operation { ports, ..Default::default() },
        |not_ports| Operation { not_ports, ..Default::default() },
    );
}

fn paths(values: &[&str], cases: &[(&str, bool)]) {
    let cases: Vec<_> =
        cases.iter().map(|(path, matches)| (Case::get(path).query("a=/b"), *matches)).collect();
    operation(
        values,
        &cases,
        |paths| Operation { paths, ..Default::default() },
        |not_paths| Operation { not_paths, ..Default::default() },
    );
}

#[test]
fn paths_are_compared_without_the_query() {
    paths(&["/admin"], &[("/admin", true), ("/admin/", false), ("/Admin", false), ("/", false)]);
    paths(
        &["/admin*"],
        &[("/admin", true), ("/admin/x", true), ("/administrator", true), ("/x/admin", false)],
    );
    paths(&["*/admin"], &[("/admin", true), ("/x/admin", true), ("/admin/x", false)]);
    paths(&["*"], &[("/", true), ("/x", true)]);
    paths(&["/shop.Cart/Add"], &[("/shop.Cart/Add", true), ("/shop.Cart/Remove", false)]);
    paths(&["/a%2fb", "/c%2Fd"], &[("/a%2Fb", true), ("/a%2fb", true), ("/c%2fd", true), ("/a/b", false)]);
}

#[test]
fn path_templates_match_whole_segments() {
    paths(&["/foo/{*}"], &[("/foo/bar", true), ("/foo/bar/baz", false), ("/foo/", false), ("/foo", false)]);
    paths(&["/foo/{*}/"], &[("/foo/bar/", true), ("/foo/bar", false), ("/foo//", false)]);
    paths(
        &["/foo/{**}"],
        &[("/foo/", true), ("/foo/bar", true), ("/foo/bar/baz", true), ("/foo", false), ("/food/x", false)],
    );
    paths(&["/foo/{**}/"], &[("/foo/bar/", true), ("/foo//", true), ("/foo/bar", false), ("/foo/", false)]);
    paths(
        &["/foo/{*}/bar/{**}"],
        &[
            ("/foo/buzz/bar/", true),
            ("/foo/buzz/bar/baz", true),
            ("/foo/bar/baz", false),
            ("/foo/a/b/bar/", false),
        ],
    );
    paths(
        &["/{*}/a/{*}/b"],
        &[("/x/a/y/b", true), ("/x/a/y/c", false), ("//a/y/b", false), ("/x/a/y/b/", false)],
    );
    paths(&["/{**}"], &[("/", true), ("/a/b", true)]);
    paths(
        &["/v1/{**}/end"],
        &[("/v1/a/end", true), ("/v1/a/b/end", true), ("/v1/end", false), ("/v1/a/ending", false)],
    );
}

#[test]
fn a_template_whose_documentation_and_proxy_disagree_is_unknown_there() {
    let rule = to(Operation { paths: strings(&["/foo/{**}/"]), ..Default::default() });
    assert_eq!(judge(&rule, &Case::get("/foo/bar/baz.txt")), Unknown);
}

#[test]
fn fields_are_anded_values_and_entries_are_ored() {
    let get_or_head_of_a =
        Operation { methods: strings(&["GET", "HEAD"]), paths: strings(&["/a"]), ..Default::default() };
    let not_b =
        Operation { paths: strings(&["/b*"]), not_paths: strings(&["/b/secret"]), ..Default::default() };
    let rule = l7::AuthorizationRule {
        from: vec![
            PolicySource { namespaces: strings(&["x"]), ..Default::default() },
            PolicySource {
                namespaces: strings(&["front"]),
                ip_blocks: strings(&["10.0.0.0/8"]),
                ..Default::default()
            },
        ],
        to: vec![get_or_head_of_a, not_b],
        when: vec![l7::Condition {
            key: "request.headers[x]".into(),
            values: strings(&["1"]),
            not_values: Vec::new(),
        }],
    };
    let with = |case: Case| case.header("x", "1");
    for (case, expected) in [
        (with(Case::get("/a")), True),
        (with(Case::get("/a").method("HEAD")), True),
        (with(Case::get("/a").method("POST")), False),
        (with(Case::get("/b/x").method("POST")), True),
        (with(Case::get("/b/secret")), False),
        (with(Case::get("/a").at("11.0.0.1")), False),
        (with(Case::get("/a").at("11.0.0.1").from("spiffe://cluster.local/ns/x/sa/y")), True),
        (Case::get("/a"), False),
    ] {
        assert_eq!(judge(&rule, &case), expected, "{case:?}");
    }
    assert_eq!(
        judge(&l7::AuthorizationRule::default(), &Case::get("/")),
        True,
        "a rule without parts matches all"
    );
}

#[test]
fn what_cannot_be_read_is_unknown_and_named() {
    let cases = [
        (
            from(PolicySource { ip_blocks: strings(&["10.0.0.0/33"]), ..Default::default() }),
            "rules[0].from[0].ipBlocks[0]",
        ),
        (
            from(PolicySource { not_remote_ip_blocks: strings(&["x"]), ..Default::default() }),
            "rules[0].from[0].notRemoteIpBlocks[0]",
        ),
        (
            from(PolicySource { service_accounts: strings(&["a/*"]), ..Default::default() }),
            "rules[0].from[0].serviceAccounts[0]",
        ),
        (
            from(PolicySource { service_accounts: strings(&["a/b/c"]), ..Default::default() }),
            "rules[0].from[0].serviceAccounts[0]",
        ),
        (
            from(PolicySource { principals: strings(&["a*b"]), ..Default::default() }),
            "rules[0].from[0].principals[0]",
        ),
        (
            from(PolicySource { namespaces: strings(&[""]), ..Default::default() }),
            "rules[0].from[0].namespaces[0]",
        ),
        (from(PolicySource::default()), "rules[0].from[0]"),
        (to(Operation { ports: strings(&["99999"]), ..Default::default() }), "rules[0].to[0].ports[0]"),
        (to(Operation { not_ports: strings(&["0"]), ..Default::default() }), "rules[0].to[0].notPorts[0]"),
        (to(Operation { paths: strings(&["/{**}/a/{*}"]), ..Default::default() }), "rules[0].to[0].paths[0]"),
        (to(Operation { paths: strings(&["/*/a/{*}"]), ..Default::default() }), "rules[0].to[0].paths[0]"),
        (to(Operation { paths: strings(&["/a/{*}.txt"]), ..Default::default() }), "rules[0].to[0].paths[0]"),
        (to(Operation { paths: strings(&["/a/x{*}"]), ..Default::default() }), "rules[0].to[0].paths[0]"),
        (to(Operation { paths: strings(&["/a/{**}b"]), ..Default::default() }), "rules[0].to[0].paths[0]"),
        (to(Operation { paths: strings(&["/a/*/b"]), ..Default::default() }), "rules[0].to[0].paths[0]"),
        (to(Operation { hosts: strings(&["a.*.b"]), ..Default::default() }), "rules[0].to[0].hosts[0]"),
        (to(Operation::default()), "rules[0].to[0]"),
    ];
    let case = Case::get("/a").from("spiffe://cluster.local/ns/a/sa/b");
    for (rule, field) in cases {
        let (truth, problems) = judge_with(&rule, &case, &l7::Settings::default());
        assert_eq!(truth, Unknown, "{rule:?}");
        let [problem] = &problems[..] else { panic!("{problems:?}") };
        assert_eq!((problem.object.as_str(), problem.field.as_str()), ("AuthorizationPolicy shop/p", field));
    }
}

#[test]
fn a_value_that_can_be_read_still_counts_beside_one_that_cannot() {
    let rule = to(Operation { ports: strings(&["80", "x"]), ..Default::default() });
    let (truth, problems) = judge_with(&rule, &Case::get("/"), &l7::Settings::default());
    assert_eq!((truth, problems.len()), (True, 1));
    let not = to(Operation { not_ports: strings(&["80", "x"]), ..Default::default() });
    assert_eq!(judge_with(&not, &Case::get("/"), &l7::Settings::default()).0, False);
}
