//! What holds for all policies and requests.

use l7::authorization::Action;
use proptest::prelude::*;
use proptest::sample::select;

use super::*;
use crate::security::testing::{policies, when};

const TEXTS: &[&str] = &[
    "",
    "*",
    "a",
    "a*",
    "*a",
    "a*b",
    "/a",
    "/a/*",
    "/{*}",
    "/{**}",
    "/{*}/{**}/b",
    "{**}{*}",
    "cluster.local/ns/front/sa/web",
    "front",
    "front/web",
    "80",
    "99999",
    "10.0.0.0/8",
    "10.1.2.3",
    "::/0",
    "GET",
    "é",
    "[",
    "cart.shop",
    "true",
    "1",
];
const KEYS: &[&str] = &[
    "source.ip",
    "remote.ip",
    "source.namespace",
    "source.serviceAccount",
    "source.trustDomain",
    "source.principal",
    "destination.ip",
    "destination.port",
    "connection.sni",
    "request.headers[x]",
    "request.headers[x-forwarded-for]",
    "request.auth.principal",
    "request.auth.audiences",
    "request.auth.presenter",
    "request.auth.claims[x]",
    "request.auth.claims[x][y]",
    "nonsense",
    "request.headers[",
    "",
];

fn texts() -> impl Strategy<Value = Vec<String>> {
    prop::collection::vec(select(TEXTS).prop_map(str::to_owned), 0..3)
}

fn sources() -> impl Strategy<Value = PolicySource> {
    (prop::collection::vec(texts(), 14)).prop_map(|lists| {
        let mut lists = lists.into_iter();
        let mut next = || lists.next().unwrap_or_default();
        PolicySource {
            principals: next(),
            not_principals: next(),
            request_principals: next(),
            not_request_principals: next(),
            namespaces: next(),
            not_namespaces: next(),
            ip_blocks: next(),
            not_ip_blocks: next(),
            remote_ip_blocks: next(),
            not_remote_ip_blocks: next(),
            service_accounts: next(),
            not_service_accounts: next(),
            trust_domains: next(),
            not_trust_domains: next(),
        }
    })
}

fn operations() -> impl Strategy<Value = Operation> {
    prop::collection::vec(texts(), 8).prop_map(|lists| {
        let mut lists = lists.into_iter();
        let mut next = || lists.next().unwrap_or_default();
        Operation {
            hosts: next(),
            not_hosts: next(),
            ports: next(),
            not_ports: next(),
            methods: next(),
            not_methods: next(),
            paths: next(),
            not_paths: next(),
        }
    })
}

fn rules() -> impl Strategy<Value = l7::AuthorizationRule> {
    let conditions = (select(KEYS), texts(), texts()).prop_map(|(key, values, not_values)| l7::Condition {
        key: key.to_owned(),
        values,
        not_values,
    });
    (
        prop::collection::vec(sources(), 0..2),
        prop::collection::vec(operations(), 0..2),
        prop::collection::vec(conditions, 0..2),
    )
        .prop_map(|(from, to, when)| l7::AuthorizationRule { from, to, when })
}

fn authorizations() -> impl Strategy<Value = l7::Authorization> {
    (0..4, any::<bool>(), prop::collection::vec(rules(), 0..3)).prop_map(|(action, dry_run, rules)| {
        let action = Action::try_from(action).unwrap_or_default();
        l7::Authorization { dry_run, provider: "opa".into(), ..policy("p", action, rules) }
    })
}

fn requests() -> impl Strategy<Value = Case> {
    let identity = select(&["", "spiffe://cluster.local/ns/front/sa/web", "spiffe://x/ns/a/sa/b"][..]);
    let value = select(&["a", "true", "", "10.1.1.1", "10.1.1.1, x", "b,a"][..]);
    let claims = select(vec![
        None,
        Some(json!({"iss": "a", "sub": "b", "x": {"y": ["a", 1]}})),
        Some(json!({"x": true})),
    ]);
    (identity, select(TEXTS), value, claims, any::<u16>()).prop_map(
        |(identity, text, value, claims, port)| {
            let path = if text.starts_with('/') { text.to_owned() } else { format!("/{text}") };
            let case = Case::get(&path)
                .from(identity)
                .port(port)
                .header("x", value)
                .header("x-forwarded-for", value);
            match claims {
                Some(claims) => case.claims(claims),
                None => case,
            }
        },
    )
}

fn settings() -> l7::Settings {
    l7::Settings {
        providers: vec![l7::Provider {
            name: "opa".into(),
            service: Some(l7::ServiceRef::default()),
            ..Default::default()
        }],
        ..Default::default()
    }
}

proptest! {
    #[test]
    fn one_more_deny_policy_never_allows_more(
        set in prop::collection::vec(authorizations(), 0..4),
        denial in prop::collection::vec(rules(), 0..3),
        case in requests(),
    ) {
        let before = policies(set.clone(), settings()).check(&case.head());
        let more = policy("more", Action::Deny, denial);
        let after = policies(set.into_iter().chain([more]), settings()).check(&case.head());
        prop_assert!(before.verdict == Verdict::Allow || after.verdict != Verdict::Allow);
    }

    #[test]
    fn one_more_value_that_cannot_be_read_never_allows_more(
        set in prop::collection::vec(authorizations(), 1..4),
        case in requests(),
    ) {
        let before = policies(set.clone(), settings());
        let broken = set.into_iter().map(|mut policy| {
            for rule in &mut policy.rules {
                rule.when.extend(when("nonsense", &["x"], &[]).when);
            }
            policy
        });
        let after = policies(broken, settings());
        // A DENY rule that did not match for another reason still does not.
        let head = case.head();
        let (before_asks, after_asks) = (before.ask(&head).asks.len(), after.ask(&head).asks.len());
        prop_assert!(before_asks <= after_asks);
        prop_assert!(before.check(&head).verdict == Verdict::Allow || after.check(&head).verdict != Verdict::Allow);
    }

    #[test]
    fn a_policy_in_dry_run_decides_nothing(set in prop::collection::vec(authorizations(), 0..4), case in requests()) {
        let enforced: Vec<_> = set.iter().filter(|policy| !policy.dry_run).cloned().collect();
        let head = case.head();
        prop_assert_eq!(
            policies(set, settings()).check(&head).verdict,
            policies(enforced, settings()).check(&head).verdict
        );
    }

    #[test]
    fn a_stream_is_never_allowed_what_every_request_on_it_is_denied(
        set in prop::collection::vec(authorizations(), 1..4),
        case in requests(),
    ) {
        let set = policies(set, settings());
        let stream = Stream { source: &case.source, destination: case.destination, addressed: &case.addressed, sni: "" };
        if set.check_stream(&stream).verdict == Verdict::Allow {
            let head = case.head();
            prop_assert_eq!(set.check(&head).verdict, Verdict::Allow);
            prop_assert!(set.ask(&head).asks.is_empty());
        }
    }
}
