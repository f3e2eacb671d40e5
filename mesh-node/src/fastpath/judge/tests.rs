use mesh_core::state::{MeshOptions, StateIndex};
use mesh_core::xds::proto::security;
use mesh_core::xds::proto::workload as wire;

use super::*;
use crate::proxy::tests::bed::{address, policy, workload};

fn ip(last: u8) -> IpAddr {
    [10, 0, 0, last].into()
}

fn pods() -> Vec<PodFacts> {
    let pod = |name: &str, last: u8| PodFacts {
        cookie: last.into(),
        local: LocalWorkload::new("shop", name, name, "n1"),
        addresses: Arc::new(vec![ip(last)]),
        on_segment: false,
        left: false,
    };
    vec![pod("a", 1), pod("b", 2)]
}

const PAIR: Pair = Pair {
    netns: 1,
    source: IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1)),
    destination: IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2)),
    port: 80,
};

fn state(change: impl FnOnce(&mut wire::Workload), more: impl FnOnce(&mut StateIndex)) -> Arc<MeshState> {
    let mut index = StateIndex::new(MeshOptions::default());
    let a = workload("a", ip(1), "n1");
    let mut b = workload("b", ip(2), "n1");
    change(&mut b);
    for w in [a, b] {
        index.apply_address(&w.uid.clone(), &address(w)).unwrap();
    }
    more(&mut index);
    index.snapshot()
}

fn verdict(state: &MeshState, pair: &Pair) -> Option<Option<Str>> {
    let pods = pods();
    Judge::new(state, &pods, SameNode::Fast).allows(pair, |_| true)
}

fn rule_for_principal(principal: &str) -> security::Rule {
    let exact = security::string_match::MatchType::Exact(principal.to_owned());
    let principals = vec![security::StringMatch { match_type: Some(exact) }];
    let matches = vec![security::Match { principals, ..Default::default() }];
    security::Rule { clauses: vec![security::Clause { matches }] }
}

#[test]
fn two_enrolled_pods_without_policies_may() {
    assert_eq!(verdict(&state(|_| (), |_| ()), &PAIR), Some(None));
}

#[test]
fn on_a_shared_segment_the_pair_stays_on_the_tunnel() {
    let state = state(|_| (), |_| ());
    for i in 0..2 {
        let mut pods = pods();
        pods[i].on_segment = true;
        assert_eq!(Judge::new(&state, &pods, SameNode::Fast).allows(&PAIR, |_| true), None);
    }
}

#[test]
fn the_policy_that_allows_is_named() {
    let allow = |index: &mut StateIndex| {
        let rule = rule_for_principal("cluster.local/ns/shop/sa/a");
        index.apply_policy(&policy("only-a", security::Action::Allow as i32, vec![rule])).unwrap();
    };
    assert_eq!(verdict(&state(|_| (), allow), &PAIR), Some(Some("shop/only-a".into())));
}

#[test]
fn a_dry_run_policy_keeps_no_pair_off_and_says_what_it_would_do() {
    let dry = |index: &mut StateIndex| {
        let rule = rule_for_principal("cluster.local/ns/shop/sa/a");
        let mut dry = policy("dry", security::Action::Deny as i32, vec![rule]);
        dry.dry_run = true;
        index.apply_policy(&dry).unwrap();
    };
    let (state, pods) = (state(|_| (), dry), pods());
    let judge = Judge::new(&state, &pods, SameNode::Fast);
    assert_eq!(judge.allows(&PAIR, |_| true), Some(None));
    assert_eq!(judge.dry_run(&PAIR), [DryRun::WouldDeny("shop/dry".into())]);
    assert_eq!(judge.dry_run(&Pair { source: ip(9), ..PAIR }), []);
}

#[test]
fn a_policy_that_does_not_allow_the_source_identity_keeps_the_pair_off() {
    let allow = |index: &mut StateIndex| {
        let rule = rule_for_principal("cluster.local/ns/shop/sa/somebody");
        index.apply_policy(&policy("other", security::Action::Allow as i32, vec![rule])).unwrap();
    };
    assert_eq!(verdict(&state(|_| (), allow), &PAIR), None);
}

/// As the control plane sends `sameNode: tunnel`.
fn same_node_tunnel() -> wire::Extension {
    let word = prost_types::value::Kind::StringValue("tunnel".into());
    let fields = [("sameNode".to_owned(), prost_types::Value { kind: Some(word) })].into();
    let value = prost::Message::encode_to_vec(&prost_types::Struct { fields });
    let config = Some(prost_types::Any { type_url: String::new(), value });
    wire::Extension { name: mesh_core::xds::SETTINGS_EXTENSION.into(), config }
}

#[test]
fn whatever_the_tunnel_would_do_besides_keeps_the_pair_off() {
    let waypoint = wire::GatewayAddress {
        destination: Some(wire::gateway_address::Destination::Hostname(wire::NamespacedHostname {
            namespace: "shop".into(),
            hostname: "waypoint.shop.svc.cluster.local".into(),
        })),
        hbone_mtls_port: 15008,
    };
    type Change = Box<dyn FnOnce(&mut wire::Workload)>;
    let cases: [(&str, Change); 4] = [
        ("waypoint", Box::new(|w| w.waypoint = Some(waypoint))),
        ("application tunnel", Box::new(|w| w.application_tunnel = Some(wire::ApplicationTunnel::default()))),
        ("not announced as HBONE", Box::new(|w| w.tunnel_protocol = 0)),
        ("sameNode: tunnel", Box::new(|w| w.extensions.push(same_node_tunnel()))),
    ];
    for (name, change) in cases {
        assert_eq!(verdict(&state(change, |_| ()), &PAIR), None, "{name}");
    }
}

#[test]
fn a_source_address_that_is_not_the_namespaces_own_is_nobody() {
    let state = state(|_| (), |_| ());
    assert_eq!(verdict(&state, &Pair { source: ip(9), ..PAIR }), None);
    assert_eq!(verdict(&state, &Pair { netns: 9, ..PAIR }), None);
    assert_eq!(verdict(&state, &Pair { destination: ip(9), ..PAIR }), None);
}

#[test]
fn without_certificates_or_by_setting_the_pair_stays_on_the_tunnel() {
    let (state, pods) = (state(|_| (), |_| ()), pods());
    let fast = Judge::new(&state, &pods, SameNode::Fast);
    assert_eq!(fast.allows(&PAIR, |id| id.service_account() != "a"), None);
    assert_eq!(fast.allows(&PAIR, |id| id.service_account() != "b"), None);
    let tunnel = Judge::new(&state, &pods, SameNode::Tunnel);
    assert_eq!(tunnel.allows(&PAIR, |_| true), None);
}

#[test]
fn the_meshs_own_ports_stay_on_the_tunnel_which_refuses_them() {
    assert_eq!(verdict(&state(|_| (), |_| ()), &Pair { port: 15_008, ..PAIR }), None);
}

/// Whether an open connection of the pair ends.
fn ends(state: &MeshState, pods: &[PodFacts]) -> bool {
    Judge::new(state, pods, SameNode::Fast).ends_connections(&PAIR, |_| false)
}

#[test]
fn a_connection_outlives_that_its_ends_leave_the_mesh_and_no_new_one_is_direct() {
    let announced = state(|_| (), |_| ());
    let leaves = state(|b| b.tunnel_protocol = 0, |_| ());
    assert!(!ends(&leaves, &pods()), "the destination is about to leave");
    for i in 0..2 {
        let mut remembered = pods();
        remembered[i].left = true;
        assert!(!ends(&announced, &remembered), "{i} has left");
        assert_eq!(Judge::new(&announced, &remembered, SameNode::Fast).allows(&PAIR, |_| true), None, "{i}");
        let mut forgotten = pods();
        forgotten.remove(i);
        assert!(!ends(&announced, &forgotten), "{i} left before this agent came");
    }
}

#[test]
fn a_connection_of_a_pod_that_left_still_ends_when_policy_denies_it() {
    let deny = |index: &mut StateIndex| {
        let rule = rule_for_principal("cluster.local/ns/shop/sa/a");
        index.apply_policy(&policy("not-a", security::Action::Deny as i32, vec![rule])).unwrap();
    };
    let denied = state(|_| (), deny);
    let mut pods = pods();
    pods[0].left = true;
    assert!(ends(&denied, &pods));
}

#[test]
fn a_pod_that_comes_back_counts_as_it_is_now() {
    let mut known = pods();
    known[0].left = true;
    known.extend(pods());
    let state = state(|_| (), |_| ());
    assert_eq!(Judge::new(&state, &known, SameNode::Fast).allows(&PAIR, |_| true), Some(None));
}

#[test]
fn a_connection_from_an_address_that_is_not_the_pods_any_more_ends() {
    let mut moved = pods();
    moved[0].addresses = Arc::new(vec![ip(7)]);
    assert!(ends(&state(|_| (), |_| ()), &moved));
}
