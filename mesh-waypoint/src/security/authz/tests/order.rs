//! What policies together do.

use std::sync::Arc;

use l7::authorization::Action::{Allow, Audit, Custom as CustomAction, Deny};

use super::*;
use crate::security::testing::{
    anything, build, class_target, gateway_target, own, policies, resources, service_target, when,
};
use crate::security::{Policies, ServicePolicies};

fn on(path: &str) -> l7::AuthorizationRule {
    to(Operation { paths: strings(&[path]), ..Default::default() })
}

fn verdict(policies: &ServicePolicies, path: &str) -> String {
    let case = Case::get(path);
    match policies.check(&case.head()).verdict {
        Verdict::Allow => "allow".to_owned(),
        Verdict::Deny(denial) => denial.details(),
    }
}

const NONE_MATCHED: &str = "rbac_access_denied_matched_policy[none]";

#[test]
fn deny_comes_before_allow_and_one_allow_policy_closes_the_rest() {
    let set = policies(
        [policy("a", Allow, vec![on("/x*")]), policy("d", Deny, vec![on("/never"), on("/x/secret")])],
        l7::Settings::default(),
    );
    assert_eq!(verdict(&set, "/x/y"), "allow");
    assert_eq!(verdict(&set, "/x/secret"), "rbac_access_denied_matched_policy[ns[shop]-policy[d]-rule[1]]");
    assert_eq!(verdict(&set, "/y"), NONE_MATCHED);
    let only_deny = policies([policy("d", Deny, vec![on("/secret")])], l7::Settings::default());
    assert_eq!(verdict(&only_deny, "/y"), "allow");
}

#[test]
fn a_policy_without_rules_matches_nothing_and_one_with_an_empty_rule_everything() {
    let of = |action, rules| policies([policy("p", action, rules)], l7::Settings::default());
    assert_eq!(verdict(&of(Allow, vec![]), "/"), NONE_MATCHED);
    assert_eq!(verdict(&of(Allow, vec![anything()]), "/"), "allow");
    assert_eq!(verdict(&of(Deny, vec![]), "/"), "allow");
    assert!(verdict(&of(Deny, vec![anything()]), "/").contains("policy[p]"));
    assert_eq!(verdict(&of(Audit, vec![]), "/"), "allow");
    let none = policies([], l7::Settings::default());
    assert!(none.is_empty());
    assert_eq!(verdict(&none, "/"), "allow");
}

#[test]
fn what_cannot_be_read_makes_every_action_stricter() {
    let unreadable = || when("source.nonsense", &["x"], &[]);
    let of = |action| policies([policy("p", action, vec![unreadable()])], l7::Settings::default());
    assert_eq!(verdict(&of(Allow), "/"), NONE_MATCHED);
    assert!(verdict(&of(Deny), "/").contains("policy[p]"));
    let mut unknown_action = policy("p", Allow, vec![anything()]);
    unknown_action.action = 77;
    unknown_action.dry_run = true;
    let set = policies([unknown_action], l7::Settings::default());
    assert!(verdict(&set, "/").contains("policy[p]"), "an action of the future denies");
}

#[test]
fn audit_and_dry_run_are_reported_and_change_nothing() {
    let dry = |name: &str, action, path: &str| l7::Authorization {
        dry_run: true,
        ..policy(name, action, vec![on(path)])
    };
    let set = policies(
        [
            policy("audit", Audit, vec![on("/*")]),
            dry("dry-deny", Deny, "/x"),
            dry("dry-allow", Allow, "/x*"),
            policy("deny", Deny, vec![on("/denied")]),
        ],
        l7::Settings::default(),
    );
    let reports = |path: &str| {
        let case = Case::get(path);
        let decision = set.check(&case.head());
        let reports: Vec<(Option<String>, Effect)> =
            decision.reports.iter().map(|r| (r.policy.as_deref().map(str::to_owned), r.effect)).collect();
        (decision.verdict == Verdict::Allow, reports)
    };
    let of = |name: &str, effect| (Some(format!("shop/{name}")), effect);
    assert_eq!(
        reports("/x"),
        (
            true,
            vec![
                of("audit", Effect::Audit),
                of("dry-deny", Effect::WouldDeny),
                of("dry-allow", Effect::WouldAllow),
            ]
        )
    );
    assert_eq!(reports("/y"), (true, vec![of("audit", Effect::Audit), (None, Effect::WouldDenyNoneAllowed)]));
    assert_eq!(reports("/denied"), (false, vec![of("audit", Effect::Audit)]));
}

fn provider(name: &str) -> l7::Provider {
    l7::Provider {
        name: name.into(),
        grpc: true,
        service: Some(l7::ServiceRef::default()),
        ..Default::default()
    }
}

fn custom(name: &str, provider: &str, rules: Vec<l7::AuthorizationRule>) -> l7::Authorization {
    l7::Authorization { provider: provider.into(), ..policy(name, CustomAction, rules) }
}

fn asked(set: &ServicePolicies, case: &Case) -> (Vec<String>, bool) {
    let custom = set.ask(&case.head());
    let asks = custom.asks.iter().map(|ask| format!("{} for {}", ask.provider.name, ask.policy)).collect();
    (asks, custom.denied.is_some())
}

#[test]
fn custom_policies_that_match_ask_each_provider_once() {
    let nowhere = l7::Provider { service: None, fail_open: true, ..provider("missing") };
    let settings =
        l7::Settings { providers: vec![provider("opa"), provider("login"), nowhere], ..Default::default() };
    let set = policies(
        [
            custom("a", "opa", vec![on("/x*")]),
            custom("b", "opa", vec![on("/x/y")]),
            custom("c", "login", vec![on("/x/*")]),
            custom("d", "missing", vec![on("/missing")]),
        ],
        settings,
    );
    assert_eq!(asked(&set, &Case::get("/x/y")), (strings(&["opa for shop/a", "login for shop/c"]), false));
    assert_eq!(asked(&set, &Case::get("/x")), (strings(&["opa for shop/a"]), false));
    assert_eq!(asked(&set, &Case::get("/y")), (vec![], false));
    assert_eq!(asked(&set, &Case::get("/missing")), (vec![], true), "a provider that is not there denies");
    assert_eq!(verdict(&set, "/x/y"), "allow", "nothing else is denied by it");
}

#[test]
fn a_custom_policy_about_tokens_asks_before_tokens_are_known() {
    let settings = l7::Settings { providers: vec![provider("opa")], ..Default::default() };
    for rule in [
        when("request.auth.claims[group]", &["x"], &[]),
        from(PolicySource { request_principals: strings(&["*"]), ..Default::default() }),
        from(PolicySource { not_request_principals: strings(&["*"]), ..Default::default() }),
    ] {
        let set = policies([custom("a", "opa", vec![rule])], settings.clone());
        assert_eq!(asked(&set, &Case::get("/")).0.len(), 1);
    }
}

#[test]
fn a_custom_policy_in_dry_run_asks_nobody() {
    let settings = l7::Settings { providers: vec![provider("opa")], ..Default::default() };
    let set =
        policies([l7::Authorization { dry_run: true, ..custom("a", "opa", vec![anything()]) }], settings);
    let case = Case::get("/");
    let custom = set.ask(&case.head());
    assert_eq!((custom.asks.len(), custom.reports.len()), (0, 1));
    assert_eq!(custom.reports[0].effect, Effect::WouldAsk);
}

#[test]
fn streams_are_refused_where_a_rule_about_requests_might_refuse() {
    let case = Case::get("/");
    let stream =
        |sni| Stream { source: &case.source, destination: case.destination, addressed: &case.addressed, sni };
    let decide = |action, rule: l7::AuthorizationRule, sni| {
        let settings = l7::Settings { providers: vec![provider("opa")], ..Default::default() };
        let policy = l7::Authorization { provider: "opa".into(), ..policy("p", action, vec![rule]) };
        policies([policy], settings).check_stream(&stream(sni)).verdict == Verdict::Allow
    };
    let ports = |port: &str| to(Operation { ports: strings(&[port]), ..Default::default() });
    let ports_and_path =
        |port: &str| to(Operation { ports: strings(&[port]), paths: strings(&["/x"]), ..Default::default() });
    assert!(decide(Allow, ports("80"), ""));
    assert!(!decide(Allow, ports("81"), ""));
    assert!(!decide(Allow, on("*"), ""), "an ALLOW rule about requests allows no stream");
    assert!(!decide(Deny, ports_and_path("80"), ""), "a DENY rule about requests denies streams");
    assert!(decide(Deny, ports_and_path("81"), ""));
    assert!(!decide(CustomAction, ports("80"), ""));
    assert!(decide(CustomAction, ports("81"), ""));
    assert!(decide(Allow, when("connection.sni", &["*.example.com"], &[]), "A.example.com"));
    assert!(!decide(Allow, when("connection.sni", &["*.example.com"], &[]), ""));
    assert!(!decide(Deny, when("remote.ip", &["10.0.0.0/8"], &[]), ""));
}

fn applies(policies: &Policies, case: &Case) -> bool {
    let head = case.head();
    policies.for_service(&case.addressed).check(&head).verdict != Verdict::Allow
}

fn targeting(namespace: &str, target: l7::Target) -> Policies {
    let denial = l7::Authorization {
        origin: crate::security::testing::origin("AuthorizationPolicy", namespace, "p"),
        targets: vec![target],
        ..policy("p", Deny, vec![anything()])
    };
    build(&resources([denial], [], l7::Settings { root_namespace: "root".into(), ..Default::default() }))
}

#[test]
fn a_policy_applies_to_what_it_targets() {
    let cart = || Case::get("/");
    let pay = || Case {
        addressed: Addressed::Service { key: "shop/pay.shop.svc.cluster.local".into(), port: 80 },
        ..cart()
    };
    let upper = || Case {
        addressed: Addressed::Service { key: "shop/Cart.shop.svc.cluster.local".into(), port: 80 },
        ..cart()
    };
    let entry =
        || Case { addressed: Addressed::Service { key: "shop/*.example.com".into(), port: 80 }, ..cart() };
    let other_namespace = || Case {
        addressed: Addressed::Service { key: "x/cart.shop.svc.cluster.local".into(), port: 80 },
        ..cart()
    };
    let of = |policies: Policies| {
        [cart(), upper(), pay(), entry(), other_namespace()].map(|case| applies(&policies, &case))
    };

    assert_eq!(of(targeting("shop", service_target())), [true, true, false, false, false]);
    let wildcard = l7::Target {
        kind: l7::target::Kind::ServiceEntry.into(),
        namespace: "shop".into(),
        name: "ext".into(),
        hostnames: vec!["*.EXAMPLE.com".into()],
    };
    assert_eq!(of(targeting("shop", wildcard)), [false, false, false, true, false]);
    assert_eq!(of(targeting("shop", gateway_target("shop", "waypoint"))), [true; 5]);
    assert_eq!(of(targeting("shop", gateway_target("shop", "other"))), [false; 5]);
    assert_eq!(of(targeting("shop", gateway_target("", "waypoint"))), [true; 5]);
    assert_eq!(of(targeting("x", gateway_target("", "waypoint"))), [false; 5]);
    assert_eq!(of(targeting("other", gateway_target("other", "waypoint"))), [false; 5]);
    assert_eq!(of(targeting("root", class_target("istio-waypoint"))), [true; 5]);
    assert_eq!(of(targeting("root", class_target("istio"))), [false; 5]);
    // As in Istio: not everybody may write a policy for the whole mesh.
    let of_anybody = targeting("shop", class_target("istio-waypoint"));
    assert_eq!(of_anybody.problems().len(), 1);
    assert_eq!(of(of_anybody), [false; 5]);
    // A kind of the future: better too strict.
    let unknown = targeting("shop", l7::Target { kind: 99, ..service_target() });
    assert_eq!(unknown.problems().len(), 1);
    assert_eq!(of(unknown), [true; 5]);
}

#[test]
fn a_service_has_its_own_policies_and_those_of_the_gateway_whatever_their_order() {
    let gateway = || l7::Authorization {
        targets: vec![gateway_target("shop", "waypoint")],
        ..policy("g", Deny, vec![on("/g")])
    };
    let service = || policy("s", Deny, vec![on("/s")]);
    let both = || l7::Authorization {
        targets: vec![service_target(), gateway_target("shop", "waypoint")],
        ..policy("b", Deny, vec![on("/b")])
    };
    for order in [vec![gateway(), service(), both()], vec![service(), both(), gateway()]] {
        let set = policies(order, l7::Settings::default());
        assert_eq!(verdict(&set, "/"), "allow");
        for name in ["g", "s", "b"] {
            assert!(verdict(&set, &format!("/{name}")).contains(&format!("policy[{name}]")));
        }
    }
}

#[test]
fn workloads_have_the_policies_of_the_gateway_only() {
    let wire = mesh_core::xds::proto::workload::Workload { uid: "u".into(), ..Default::default() };
    let workload = Arc::new(mesh_core::state::Workload::decode(&wire).unwrap());
    let case = Case { addressed: Addressed::Workload { workload, port: 80 }, ..Case::get("/") };
    assert!(applies(&targeting("shop", gateway_target("shop", "waypoint")), &case));
    assert!(!applies(&targeting("shop", service_target()), &case));
    assert_eq!(own().gateway, "waypoint");
}
