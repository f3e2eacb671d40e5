//! Every row of the reference's decision order and matching rules, what cannot be evaluated, and invariants.

mod invariants;

use std::sync::Arc;

use super::*;
use crate::state::samples::{Mesh, pod};
use crate::state::{MeshOptions, StateIndex};
use crate::xds::proto::security as wire;
use wire::string_match::MatchType;

fn conn(identity: Option<&str>, src: &str, dst: &str) -> Conn {
    Conn {
        src: src.parse().unwrap(),
        identity: identity.map(|id| id.parse().unwrap()),
        dst: dst.parse().unwrap(),
    }
}

const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";

fn from_cart() -> Conn {
    conn(Some(CART), "10.0.0.1:40000", "10.0.0.2:8080")
}

fn plaintext() -> Conn {
    conn(None, "10.0.0.1:40000", "10.0.0.2:8080")
}

fn exact(text: &str) -> wire::StringMatch {
    wire::StringMatch { match_type: Some(MatchType::Exact(text.into())) }
}

fn prefix(text: &str) -> wire::StringMatch {
    wire::StringMatch { match_type: Some(MatchType::Prefix(text.into())) }
}

fn suffix(text: &str) -> wire::StringMatch {
    wire::StringMatch { match_type: Some(MatchType::Suffix(text.into())) }
}

fn presence() -> wire::StringMatch {
    wire::StringMatch { match_type: Some(MatchType::Presence(())) }
}

/// A string match of a type that this version does not know.
fn untyped() -> wire::StringMatch {
    wire::StringMatch { match_type: None }
}

fn cidr(net: &str) -> wire::Address {
    let (ip, length) = net.split_once('/').unwrap();
    wire::Address { address: crate::state::samples::bytes(ip), length: length.parse().unwrap() }
}

fn account(namespace: &str, name: &str) -> wire::ServiceAccountMatch {
    wire::ServiceAccountMatch { namespace: namespace.into(), service_account: name.into() }
}

/// One rule with one clause per argument, each clause with those matches.
fn rule(clauses: &[&[&wire::Match]]) -> wire::Rule {
    let clause =
        |matches: &&[&wire::Match]| wire::Clause { matches: matches.iter().map(|m| (*m).clone()).collect() };
    wire::Rule { clauses: clauses.iter().map(clause).collect() }
}

fn policy(name: &str, action: wire::Action, rules: &[wire::Rule]) -> wire::Authorization {
    wire::Authorization {
        name: name.into(),
        namespace: "shop".into(),
        scope: wire::Scope::Namespace.into(),
        action: action.into(),
        rules: rules.to_vec(),
        ..Default::default()
    }
}

fn dry(mut policy: wire::Authorization) -> wire::Authorization {
    policy.dry_run = true;
    policy
}

fn set(policies: &[wire::Authorization]) -> PolicySet {
    PolicySet {
        policies: policies.iter().map(|p| Arc::new(Policy::decode(p).unwrap())).collect(),
        unknown: Vec::new(),
    }
}

fn verdict(policies: &[wire::Authorization], conn: &Conn) -> String {
    match evaluate(&set(policies), conn).verdict {
        Verdict::Allow(reason) => format!("allow: {reason}"),
        Verdict::Deny(reason) => format!("deny: {reason}"),
    }
}

/// A policy of one rule of one clause of one match.
fn only(action: wire::Action, m: &wire::Match) -> wire::Authorization {
    policy("p", action, &[rule(&[&[m]])])
}

/// Whether a readable match holds.
fn matches(m: &wire::Match, conn: &Conn) -> bool {
    let (denied, allowed) = deny_allow(m, conn);
    assert_eq!(denied, allowed, "a readable predicate means the same for both actions");
    denied
}

/// Whether a DENY and an ALLOW policy with this match count as matching.
fn deny_allow(m: &wire::Match, conn: &Conn) -> (bool, bool) {
    let denied = !evaluate(&set(&[only(Deny, m)]), conn).is_allowed();
    let allowed = evaluate(&set(&[only(Allow, m)]), conn).is_allowed();
    (denied, allowed)
}

fn all() -> wire::Rule {
    wire::Rule::default()
}

use wire::Action::{Allow, Deny};

fn cart_only() -> wire::Match {
    wire::Match { principals: vec![exact("cluster.local/ns/shop/sa/cart")], ..Default::default() }
}

fn nobody() -> wire::Match {
    wire::Match { principals: vec![exact("cluster.local/ns/shop/sa/nobody")], ..Default::default() }
}

#[test]
fn the_decision_order_is_that_of_the_reference() {
    let matching = |name, action| policy(name, action, &[rule(&[&[&cart_only()]])]);
    let other = |name, action| policy(name, action, &[rule(&[&[&nobody()]])]);
    let c = from_cart();
    let none = "allow: no allow policy applies to the workload";
    let denied = "deny: allow policies exist, but none allowed";
    assert_eq!(verdict(&[], &c), none);
    assert_eq!(verdict(&[matching("d", Deny)], &c), "deny: explicitly denied by: shop/d");
    assert_eq!(verdict(&[other("d", Deny)], &c), none);
    assert_eq!(verdict(&[matching("a", Allow)], &c), "allow: allowed by: shop/a");
    assert_eq!(verdict(&[other("a", Allow)], &c), denied);
    assert_eq!(verdict(&[other("a", Allow), matching("b", Allow)], &c), "allow: allowed by: shop/b");
    assert_eq!(
        verdict(&[matching("a", Allow), matching("d", Deny)], &c),
        "deny: explicitly denied by: shop/d",
        "a denial comes first wherever it stands"
    );
    assert_eq!(verdict(&[other("d", Deny), other("a", Allow)], &c), denied);
}

#[test]
fn dry_run_policies_report_and_decide_nothing() {
    let c = from_cart();
    let outcome = |policies: &[wire::Authorization]| {
        let decision = evaluate(&set(policies), &c);
        (decision.is_allowed(), decision.dry_run)
    };
    let matching = |name, action| policy(name, action, &[rule(&[&[&cart_only()]])]);
    let other = |name, action| policy(name, action, &[rule(&[&[&nobody()]])]);
    let key = |name: &str| Str::from(format!("shop/{name}"));

    assert_eq!(outcome(&[dry(matching("d", Deny))]), (true, vec![DryRun::WouldDeny(key("d"))]));
    assert_eq!(outcome(&[dry(other("d", Deny))]), (true, vec![]));
    assert_eq!(outcome(&[dry(matching("a", Allow))]), (true, vec![DryRun::WouldAllow(key("a"))]));
    assert_eq!(outcome(&[dry(other("a", Allow))]), (true, vec![DryRun::WouldDenyNoneAllowed]));
    assert_eq!(
        outcome(&[dry(other("a", Allow)), matching("b", Allow)]),
        (true, vec![]),
        "an enforced allow policy exists: enforcing the dry one would change nothing for it"
    );
    assert_eq!(
        outcome(&[dry(matching("a", Allow)), other("b", Allow)]),
        (false, vec![DryRun::WouldAllow(key("a"))]),
        "a dry-run allow does not let anything through"
    );
    assert_eq!(
        outcome(&[dry(matching("d", Deny)), dry(matching("a", Allow)), matching("e", Deny)]),
        (false, vec![DryRun::WouldDeny(key("d"))]),
        "what comes after a denial is not evaluated"
    );
}

#[test]
fn a_policy_without_rules_never_matches() {
    assert_eq!(
        verdict(&[policy("a", Allow, &[])], &from_cart()),
        "deny: allow policies exist, but none allowed"
    );
    assert!(evaluate(&set(&[policy("d", Deny, &[])]), &from_cart()).is_allowed());
}

#[test]
fn rules_are_alternatives_clauses_all_hold_matches_are_alternatives() {
    let (yes, no, empty) = (&cart_only(), &nobody(), &wire::Match::default());
    let c = from_cart();
    let denies = |rules: &[wire::Rule]| !evaluate(&set(&[policy("d", Deny, rules)]), &c).is_allowed();
    assert!(denies(&[all()]), "a rule without clauses matches everything");
    assert!(denies(&[rule(&[&[no]]), rule(&[&[yes]])]), "rules are OR-ed");
    assert!(!denies(&[rule(&[&[yes], &[no]])]), "clauses are AND-ed");
    assert!(denies(&[rule(&[&[yes], &[yes]])]));
    assert!(denies(&[rule(&[&[no, yes]])]), "matches are OR-ed");
    assert!(denies(&[rule(&[&[]])]), "a clause without matches is true");
    assert!(denies(&[rule(&[&[], &[yes]])]));
    assert!(!denies(&[rule(&[&[empty]])]), "a match without fields is skipped");
    assert!(denies(&[rule(&[&[empty, yes]])]));
    assert!(!denies(&[rule(&[&[yes], &[empty, empty]])]), "a clause of empty matches is false");
    assert!(!denies(&[rule(&[&[no]])]));
}

#[test]
fn within_a_match_fields_are_and_ed_values_are_or_ed_and_not_values_must_all_fail() {
    let c = from_cart();
    let ports = |values: &[u32]| wire::Match { destination_ports: values.to_vec(), ..Default::default() };
    assert!(matches(&ports(&[1, 8080]), &c));
    assert!(!matches(&ports(&[1, 2]), &c));
    let not_ports =
        |values: &[u32]| wire::Match { not_destination_ports: values.to_vec(), ..Default::default() };
    assert!(matches(&not_ports(&[1, 2]), &c));
    assert!(!matches(&not_ports(&[1, 8080]), &c));
    let both = |port| wire::Match { destination_ports: vec![port], ..cart_only() };
    assert!(matches(&both(8080), &c));
    assert!(!matches(&both(8081), &c));
    let contradiction =
        wire::Match { not_principals: vec![exact("cluster.local/ns/shop/sa/cart")], ..cart_only() };
    assert!(!matches(&contradiction, &c));
}

#[test]
fn addresses_are_compared_by_prefix() {
    let c = from_cart();
    let source = |net: &str| wire::Match { source_ips: vec![cidr(net)], ..Default::default() };
    assert!(matches(&source("10.0.0.0/24"), &c));
    assert!(matches(&source("10.0.0.1/32"), &c));
    assert!(matches(&source("0.0.0.0/0"), &c));
    assert!(matches(&source("::ffff:10.0.0.0/120"), &c), "a v4-mapped prefix is the IPv4 one");
    assert!(!matches(&source("10.0.1.0/24"), &c));
    assert!(!matches(&source("::/0"), &c), "IPv6 prefixes hold no IPv4 address");
    let mapped = Conn { src: "[::ffff:10.0.0.1]:1".parse().unwrap(), ..c.clone() };
    assert!(matches(&source("10.0.0.0/24"), &mapped), "a v4-mapped peer is an IPv4 one");
    let not_source = |net: &str| wire::Match { not_source_ips: vec![cidr(net)], ..Default::default() };
    assert!(!matches(&not_source("10.0.0.0/24"), &c));
    assert!(matches(&not_source("10.0.1.0/24"), &c));
    let to = |net: &str| wire::Match { destination_ips: vec![cidr(net)], ..Default::default() };
    assert!(matches(&to("10.0.0.2/32"), &c));
    assert!(!matches(&to("10.0.0.1/32"), &c));
    let not_to = |net: &str| wire::Match { not_destination_ips: vec![cidr(net)], ..Default::default() };
    assert!(!matches(&not_to("10.0.0.2/32"), &c));
    assert!(matches(&not_to("10.0.0.1/32"), &c));
}

#[test]
fn principals_are_the_identity_without_its_scheme_and_plaintext_has_none() {
    let is = |m: wire::StringMatch| wire::Match { principals: vec![m], ..Default::default() };
    let is_not = |m: wire::StringMatch| wire::Match { not_principals: vec![m], ..Default::default() };
    let (c, p) = (from_cart(), plaintext());
    assert!(matches(&is(exact("cluster.local/ns/shop/sa/cart")), &c));
    assert!(!matches(&is(exact("spiffe://cluster.local/ns/shop/sa/cart")), &c));
    assert!(matches(&is(prefix("cluster.local/ns/shop/")), &c));
    assert!(!matches(&is(prefix("other/")), &c));
    assert!(matches(&is(suffix("/sa/cart")), &c));
    assert!(!matches(&is(suffix("/sa/car")), &c));
    assert!(matches(&is(presence()), &c));
    for m in [presence(), prefix(""), suffix(""), exact("")] {
        assert!(!matches(&is(m.clone()), &p), "plaintext matches no principal: {m:?}");
        assert!(matches(&is_not(m), &p));
    }
    assert!(matches(&is_not(presence()), &p), "this is how STRICT is written");
    assert!(!matches(&is_not(presence()), &c));
}

#[test]
fn the_namespace_of_plaintext_is_the_empty_string() {
    let is = |m: wire::StringMatch| wire::Match { namespaces: vec![m], ..Default::default() };
    let is_not = |m: wire::StringMatch| wire::Match { not_namespaces: vec![m], ..Default::default() };
    let (c, p) = (from_cart(), plaintext());
    assert!(matches(&is(exact("shop")), &c));
    assert!(!matches(&is(exact("bank")), &c));
    assert!(!matches(&is(exact("shop")), &p));
    assert!(matches(&is_not(exact("shop")), &p), "empty differs from shop");
    assert!(!matches(&is_not(exact("shop")), &c));
    assert!(!matches(&is(presence()), &p));
    assert!(matches(&is_not(presence()), &p));
}

#[test]
fn service_accounts_match_in_any_trust_domain_and_need_an_identity() {
    let is = |a| wire::Match { service_accounts: vec![a], ..Default::default() };
    let is_not = |a| wire::Match { not_service_accounts: vec![a], ..Default::default() };
    let foreign = conn(Some("spiffe://other.example/ns/shop/sa/cart"), "10.0.0.1:1", "10.0.0.2:80");
    for c in [from_cart(), foreign] {
        assert!(matches(&is(account("shop", "cart")), &c));
        assert!(!matches(&is(account("shop", "pay")), &c));
        assert!(!matches(&is(account("bank", "cart")), &c));
        assert!(!matches(&is_not(account("shop", "cart")), &c));
        assert!(matches(&is_not(account("shop", "pay")), &c));
    }
    assert!(!matches(&is(account("shop", "cart")), &plaintext()));
    assert!(matches(&is_not(account("shop", "cart")), &plaintext()));
}

#[test]
fn what_cannot_be_evaluated_denies_in_deny_and_does_not_allow_in_allow() {
    let c = from_cart();
    let bad_cidr = wire::Address { address: vec![1, 2, 3], length: 8 };
    let long_cidr = wire::Address { address: vec![10, 0, 0, 0], length: 33 };
    let extension = wire::Extension { name: "x".into(), config: None };
    let cases = [
        wire::Match { principals: vec![untyped()], ..Default::default() },
        wire::Match { not_principals: vec![untyped()], ..Default::default() },
        wire::Match { namespaces: vec![untyped()], ..Default::default() },
        wire::Match { not_namespaces: vec![untyped()], ..Default::default() },
        wire::Match { source_ips: vec![bad_cidr.clone()], ..Default::default() },
        wire::Match { not_source_ips: vec![long_cidr.clone()], ..Default::default() },
        wire::Match { destination_ips: vec![long_cidr], ..Default::default() },
        wire::Match { not_destination_ips: vec![bad_cidr.clone()], ..Default::default() },
        wire::Match { destination_ports: vec![70_000], ..Default::default() },
        wire::Match { not_destination_ports: vec![70_000], ..Default::default() },
        wire::Match { extensions: vec![extension.clone()], ..Default::default() },
        // Together with what holds, the rest decides.
        wire::Match { not_source_ips: vec![bad_cidr.clone()], ..cart_only() },
        wire::Match { extensions: vec![extension.clone()], ..cart_only() },
    ];
    for case in cases {
        assert_eq!(deny_allow(&case, &c), (true, false), "{case:?}");
    }
    // What is certain stays certain.
    let listed = wire::Match { source_ips: vec![bad_cidr.clone(), cidr("10.0.0.0/8")], ..Default::default() };
    assert_eq!(deny_allow(&listed, &c), (true, true), "another value of the list holds");
    let excluded = wire::Match { not_source_ips: vec![bad_cidr, cidr("10.0.0.0/8")], ..Default::default() };
    assert_eq!(deny_allow(&excluded, &c), (false, false), "another value rules it out");
    let elsewhere = wire::Match { extensions: vec![extension], ..nobody() };
    assert_eq!(deny_allow(&elsewhere, &c), (false, false), "another field rules it out");
    let no_identity = wire::Match { principals: vec![untyped()], ..Default::default() };
    assert_eq!(
        deny_allow(&no_identity, &plaintext()),
        (false, false),
        "plaintext matches no principal at all"
    );
}

#[test]
fn unknown_scopes_and_actions_reject_the_policy() {
    let bad = wire::Authorization { action: 2, ..policy("p", Deny, &[]) };
    assert_eq!(
        Policy::decode(&bad).unwrap_err().to_string(),
        "authorization policy shop/p: action: value 2 is not known; known are ALLOW=0, DENY=1"
    );
    let bad = wire::Authorization { scope: 7, ..policy("p", Deny, &[]) };
    assert!(Policy::decode(&bad).unwrap_err().to_string().contains("scope: value 7 is not known"));
    let bad = wire::Authorization { name: String::new(), ..policy("p", Deny, &[]) };
    assert!(Policy::decode(&bad).unwrap_err().to_string().contains("name: is missing"));
}

fn scoped(name: &str, namespace: &str, scope: wire::Scope) -> wire::Authorization {
    wire::Authorization {
        namespace: namespace.into(),
        scope: scope.into(),
        ..policy(name, Deny, &[rule(&[&[&nobody()]])])
    }
}

fn keys(set: &PolicySet) -> Vec<String> {
    set.policies.iter().map(|p| p.key.to_string()).collect()
}

#[test]
fn a_workload_gets_global_policies_those_of_its_namespace_and_those_it_lists() {
    use wire::Scope::{Global, Namespace, WorkloadSelector};
    let mut listing = pod("a", &["10.0.0.1"]);
    listing.authorization_policies =
        ["shop/listed", "istio-system/strict", "bank/ns"].map(String::from).to_vec();
    let mut mesh = Mesh::default().with(listing).with(pod("b", &["10.0.0.2"]));
    for p in [
        scoped("zz", "istio-system", Global),
        scoped("aa", "istio-system", Global),
        scoped("ns", "shop", Namespace),
        scoped("ns", "bank", Namespace),
        scoped("listed", "shop", WorkloadSelector),
        scoped("strict", "istio-system", WorkloadSelector),
        scoped("other", "shop", WorkloadSelector),
    ] {
        mesh.index.apply_policy(&p).unwrap();
    }
    let state = mesh.state();
    assert_eq!(
        keys(&state.policies_for(&mesh.workload("a"))),
        ["istio-system/aa", "istio-system/zz", "shop/ns", "shop/listed", "istio-system/strict"]
    );
    assert_eq!(
        keys(&state.policies_for(&mesh.workload("b"))),
        ["istio-system/aa", "istio-system/zz", "shop/ns"]
    );
    mesh.index.remove_policy("istio-system/aa");
    mesh.index.remove_policy("shop/ns");
    assert_eq!(keys(&mesh.state().policies_for(&mesh.workload("b"))), ["istio-system/zz"]);
    // A change of scope moves it.
    mesh.index.apply_policy(&scoped("zz", "istio-system", WorkloadSelector)).unwrap();
    assert_eq!(keys(&mesh.state().policies_for(&mesh.workload("b"))), Vec::<String>::new());
}

fn listing_unknown(options: MeshOptions) -> (Mesh, Conn) {
    let mut workload = pod("a", &["10.0.0.1"]);
    workload.authorization_policies = vec!["shop/late".into()];
    let mesh = Mesh { index: StateIndex::new(options) }.with(workload);
    (mesh, from_cart())
}

#[test]
fn a_listed_policy_that_has_not_arrived_denies_until_it_does() {
    let (mut mesh, c) = listing_unknown(MeshOptions::default());
    let decide = |mesh: &mut Mesh| evaluate(&mesh.state().policies_for(&mesh.workload("a")), &c).verdict;
    let Verdict::Deny(reason) = decide(&mut mesh) else { panic!("must deny") };
    assert!(reason.is_pending());
    assert_eq!(reason.to_string(), "policy not yet known: shop/late");
    mesh.index.apply_policy(&scoped("late", "shop", wire::Scope::WorkloadSelector)).unwrap();
    assert_eq!(decide(&mut mesh), Verdict::Allow(AllowReason::NoAllowPolicies));
    mesh.index.remove_policy("shop/late");
    assert_eq!(decide(&mut mesh), Verdict::Allow(AllowReason::NoAllowPolicies), "it is known to be gone");
    mesh.index.apply_policy(&scoped("late", "shop", wire::Scope::WorkloadSelector)).unwrap();
    assert_eq!(keys(&mesh.state().policies_for(&mesh.workload("a"))), ["shop/late"], "and can come back");
}

#[test]
fn an_explicit_denial_wins_over_a_pending_policy() {
    let (mut mesh, c) = listing_unknown(MeshOptions::default());
    mesh.index.apply_policy(&policy("no", Deny, &[all()])).unwrap();
    let decision = evaluate(&mesh.state().policies_for(&mesh.workload("a")), &c);
    assert_eq!(decision.verdict, Verdict::Deny(DenyReason::Explicit("shop/no".into())));
}

#[test]
fn the_mesh_option_skips_unknown_policies_as_the_reference_does() {
    let options = MeshOptions { unknown_policy: UnknownPolicy::Skip, ..MeshOptions::default() };
    let (mut mesh, c) = listing_unknown(options);
    assert!(evaluate(&mesh.state().policies_for(&mesh.workload("a")), &c).is_allowed());
}

#[test]
fn removed_policies_that_nobody_lists_are_forgotten_when_there_are_many() {
    let (mut mesh, c) = listing_unknown(MeshOptions::default());
    mesh.index.apply_policy(&scoped("late", "shop", wire::Scope::WorkloadSelector)).unwrap();
    mesh.index.remove_policy("shop/late");
    for i in 0..3000 {
        mesh.index.remove_policy(&format!("shop/p{i}"));
    }
    let decision = evaluate(&mesh.state().policies_for(&mesh.workload("a")), &c);
    assert!(decision.is_allowed(), "the listed one is still known to be gone");
}

#[test]
fn an_explanation_names_the_rule_and_what_could_not_be_read() {
    let policies = [
        policy("d", Deny, &[rule(&[&[&nobody()]]), rule(&[&[&cart_only()]])]),
        policy("u", Allow, &[rule(&[&[&wire::Match { principals: vec![untyped()], ..Default::default() }]])]),
    ];
    let judgements = explain(&set(&policies), &from_cart());
    assert_eq!((judgements[0].matched, judgements[0].rule, judgements[0].unreadable), (true, Some(1), false));
    assert_eq!((judgements[1].matched, judgements[1].rule, judgements[1].unreadable), (false, None, true));
}
