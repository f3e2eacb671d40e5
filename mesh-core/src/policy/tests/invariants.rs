//! What must hold for every set of policies and every connection.

use proptest::prelude::*;

use super::*;

/// Few values, so that matches happen.
fn text() -> impl Strategy<Value = wire::StringMatch> {
    prop_oneof![
        Just(exact("shop")),
        Just(exact("cluster.local/ns/shop/sa/cart")),
        Just(prefix("cluster.local/ns/shop/")),
        Just(suffix("/sa/cart")),
        Just(presence()),
        Just(untyped()),
    ]
}

fn net() -> impl Strategy<Value = wire::Address> {
    prop_oneof![
        Just(cidr("10.0.0.0/24")),
        Just(cidr("10.0.1.0/24")),
        Just(cidr("::/0")),
        Just(wire::Address { address: vec![1], length: 8 }),
    ]
}

fn some<T: std::fmt::Debug>(values: impl Strategy<Value = T>) -> impl Strategy<Value = Vec<T>> {
    prop::collection::vec(values, 0..2)
}

fn a_match() -> impl Strategy<Value = wire::Match> {
    let port = || prop_oneof![Just(8080_u32), Just(9090), Just(70_000)];
    let texts = (some(text()), some(text()), some(text()), some(text()));
    let rest = (some(net()), some(net()), some(port()), some(port()));
    (texts, rest).prop_map(|((namespaces, not_namespaces, principals, not_principals), (s, ns, p, np))| {
        wire::Match {
            namespaces,
            not_namespaces,
            principals,
            not_principals,
            source_ips: s,
            not_source_ips: ns,
            destination_ports: p,
            not_destination_ports: np,
            ..Default::default()
        }
    })
}

fn a_rule() -> impl Strategy<Value = wire::Rule> {
    let clause = prop::collection::vec(a_match(), 0..3).prop_map(|matches| wire::Clause { matches });
    prop::collection::vec(clause, 0..3).prop_map(|clauses| wire::Rule { clauses })
}

fn a_policy(action: impl Strategy<Value = wire::Action>) -> impl Strategy<Value = wire::Authorization> {
    (action, prop::collection::vec(a_rule(), 0..3), prop::bool::weighted(0.2))
        .prop_map(|(action, rules, dry_run)| wire::Authorization { dry_run, ..policy("p", action, &rules) })
}

fn any_policy() -> impl Strategy<Value = wire::Authorization> {
    a_policy(prop_oneof![Just(Allow), Just(Deny)])
}

fn policies() -> impl Strategy<Value = Vec<wire::Authorization>> {
    prop::collection::vec(any_policy(), 0..5)
}

fn a_conn() -> impl Strategy<Value = Conn> {
    let identity = prop_oneof![
        Just(None),
        Just(Some(CART)),
        Just(Some("spiffe://other/ns/bank/sa/pay")),
        Just(Some("spiffe://cluster.local/ns/shop/sa/pay")),
    ];
    let port = prop_oneof![Just("10.0.0.9:8080"), Just("10.0.0.9:9090")];
    let from = prop_oneof![Just("10.0.0.1:1"), Just("10.0.1.1:1"), Just("[2001:db8::1]:1")];
    (identity, from, port).prop_map(|(identity, from, to)| conn(identity, from, to))
}

fn allows(policies: &[wire::Authorization], conn: &Conn) -> bool {
    evaluate(&set(policies), conn).is_allowed()
}

fn readable(policies: &[wire::Authorization]) -> bool {
    set(policies).policies.iter().all(|p| !p.is_partly_unreadable())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn adding_a_deny_policy_never_widens(mut all in policies(), deny in a_policy(Just(Deny)), c in a_conn()) {
        let before = allows(&all, &c);
        all.push(deny);
        prop_assert!(before || !allows(&all, &c));
    }

    #[test]
    fn removing_a_rule_from_an_allow_policy_never_widens(
        mut all in policies(), mut allow in a_policy(Just(Allow)), c in a_conn(),
    ) {
        prop_assume!(!allow.rules.is_empty());
        all.push(allow.clone());
        let before = allows(&all, &c);
        allow.rules.pop();
        *all.last_mut().unwrap() = allow;
        prop_assert!(before || !allows(&all, &c), "a policy without rules stays and denies");
    }

    #[test]
    fn removing_an_allow_policy_never_widens_unless_it_was_the_last(
        all in policies(), allow in a_policy(Just(Allow)), c in a_conn(),
    ) {
        let others_enforced = all.iter().any(|p| p.action == i32::from(Allow) && !p.dry_run);
        prop_assume!(others_enforced);
        let mut with = all.clone();
        with.push(allow);
        prop_assert!(allows(&with, &c) || !allows(&all, &c));
    }

    #[test]
    fn dry_run_policies_change_no_verdict(mut all in policies(), extra in any_policy(), c in a_conn()) {
        let before = evaluate(&set(&all), &c).verdict;
        all.push(dry(extra));
        prop_assert_eq!(before, evaluate(&set(&all), &c).verdict);
    }

    #[test]
    fn the_order_of_policies_changes_no_verdict(all in policies(), c in a_conn()) {
        let mut reversed = all.clone();
        reversed.reverse();
        prop_assert_eq!(allows(&all, &c), allows(&reversed, &c));
    }

    /// Dropping the values that cannot be evaluated, as the reference does, may only widen what we decide.
    #[test]
    fn unreadable_values_are_never_laxer_than_any_reading_of_them(all in policies(), c in a_conn(), as_true: bool) {
        // Stand-ins: a value that surely matches, or one that surely does not.
        let any_net = if as_true { ["0.0.0.0/0", "::/0"] } else { ["192.0.2.1/32", "192.0.2.1/32"] };
        let (me_principal, me_namespace) = match &c.identity {
            Some(identity) => (identity.principal(), identity.namespace().to_owned()),
            None => (String::new(), String::new()),
        };
        let stand_in = |list: &mut Vec<wire::StringMatch>, me: &str| for m in list.iter_mut() {
            if m.match_type.is_none() {
                *m = exact(if as_true { me } else { "surely not" });
            }
        };
        let mut read = all.clone();
        for m in read.iter_mut().flat_map(|p| &mut p.rules).flat_map(|r| &mut r.clauses).flat_map(|c| &mut c.matches) {
            stand_in(&mut m.principals, &me_principal);
            stand_in(&mut m.not_principals, &me_principal);
            stand_in(&mut m.namespaces, &me_namespace);
            stand_in(&mut m.not_namespaces, &me_namespace);
            for list in [&mut m.source_ips, &mut m.not_source_ips] {
                let bad = list.iter().any(|a| a.address.len() == 1);
                list.retain(|a| a.address.len() != 1);
                if bad {
                    list.extend(any_net.map(cidr));
                }
            }
            for list in [&mut m.destination_ports, &mut m.not_destination_ports] {
                for port in list.iter_mut().filter(|port| **port == 70_000) {
                    *port = if as_true { u32::from(c.dst.port()) } else { 1 };
                }
            }
        }
        prop_assert!(readable(&read));
        prop_assert!(allows(&read, &c) || !allows(&all, &c), "what we allow, every reading allows");
    }
}
