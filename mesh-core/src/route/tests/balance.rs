//! Filtering, ranking and picking of endpoints.

use std::collections::BTreeMap;

use super::*;
use crate::route::balance::{choose_address, pick_weighted};
use crate::state::Workload;
use wire::load_balancing::{Mode as M, Scope as S};

/// A client in region r1, zone a, subzone 1, node n1, cluster c1, and service `web` with this balancing.
fn placed(mode: M, scopes: &[S], endpoints: Vec<wire::Workload>) -> Mesh {
    let mut web = service("web", "10.1.0.1", &[(80, 8080)]);
    web.load_balancing = Some(balancing(mode, scopes));
    let client = at(pod("client", &["10.0.0.1"]), "r1", "a", "1", "n1");
    let mut mesh = Mesh::default().with(web).with(client);
    for endpoint in endpoints {
        mesh.add(endpoint.serving("web", &[]));
    }
    mesh
}

fn at(mut w: wire::Workload, region: &str, zone: &str, subzone: &str, node: &str) -> wire::Workload {
    w.locality = Some(wire::Locality { region: region.into(), zone: zone.into(), subzone: subzone.into() });
    w.node = node.into();
    w.cluster_id = "c1".into();
    w
}

fn names(mesh: &mut Mesh) -> Vec<String> {
    let state = mesh.state();
    let found = state.service("shop/web.shop.svc.cluster.local").unwrap();
    let source = mesh.workload("client");
    let candidates = candidates(found, &source, 80, Resolution::Standard, &[]);
    let mut names: Vec<_> = candidates.endpoints.iter().map(|e| e.workload.name.to_string()).collect();
    names.sort();
    names
}

#[test]
fn without_a_mode_every_endpoint_is_as_good() {
    let far = at(pod("far", &["10.0.0.3"]), "r9", "z", "9", "n9");
    let near = at(pod("near", &["10.0.0.2"]), "r1", "a", "1", "n1");
    let mut mesh = placed(M::UnspecifiedMode, &[S::Node], vec![near, far]);
    assert_eq!(names(&mut mesh), ["far", "near"]);
}

#[test]
fn failover_keeps_those_with_the_longest_run_of_shared_scopes() {
    let scopes = [S::Network, S::Region, S::Zone];
    let region = at(pod("region", &["10.0.0.2"]), "r1", "b", "1", "n1");
    let nothing = at(pod("nothing", &["10.0.0.3"]), "r2", "b", "9", "n9");
    let zone = || at(pod("zone", &["10.0.0.4"]), "r1", "a", "9", "n9");
    let only_zone = at(pod("only-zone", &["10.0.0.5"]), "r2", "a", "1", "n1");
    let others = vec![region, nothing, only_zone];
    let mut mesh = placed(M::Failover, &scopes, others);
    assert_eq!(names(&mut mesh), ["region"], "a scope after a difference does not count");
    mesh.add(zone().serving("web", &[]));
    assert_eq!(names(&mut mesh), ["zone"]);
    mesh.index.remove_address(&uid("zone"));
    mesh.index.remove_address(&uid("region"));
    assert_eq!(names(&mut mesh), ["nothing", "only-zone"], "nothing is better than nobody");
}

#[test]
fn failover_prefers_the_own_network_and_still_compares_the_rest_among_remote_ones() {
    let remote = |name: &str, region: &str, zone: &str| wire::Workload {
        network: "far".into(),
        network_gateway: Some(gateway_by_ip("", "192.0.2.1", 15008)),
        ..at(pod(name, &[]), region, zone, "", "")
    };
    let scopes = [S::Network, S::Region, S::Zone];
    let mut mesh =
        placed(M::Failover, &scopes, vec![remote("same-zone", "r1", "a"), remote("elsewhere", "r2", "b")]);
    assert_eq!(names(&mut mesh), ["same-zone"]);
    mesh.add(at(pod("local", &["10.0.0.2"]), "r9", "z", "9", "n9").serving("web", &[]));
    assert_eq!(names(&mut mesh), ["local"], "any endpoint of the own network outranks every remote one");
}

#[test]
fn failover_with_the_network_later_stops_at_it_like_at_any_scope() {
    let remote = wire::Workload {
        network: "far".into(),
        network_gateway: Some(gateway_by_ip("", "192.0.2.1", 15008)),
        ..at(pod("remote", &[]), "r1", "a", "1", "n1")
    };
    let local = at(pod("local", &["10.0.0.2"]), "r1", "b", "1", "n1");
    let mut mesh = placed(M::Failover, &[S::Region, S::Network, S::Zone], vec![remote, local]);
    assert_eq!(names(&mut mesh), ["local"]);
}

#[test]
fn strict_keeps_only_those_that_share_every_scope_and_fails_without() {
    let here = at(pod("here", &["10.0.0.2"]), "r1", "a", "1", "n1");
    let there = at(pod("there", &["10.0.0.3"]), "r1", "a", "1", "n2");
    let mut mesh = placed(M::Strict, &[S::Node], vec![here, there]);
    assert_eq!(names(&mut mesh), ["here"]);
    mesh.index.remove_address(&uid("here"));
    let error = go(&mut mesh, "10.1.0.1:80").unwrap_err().to_string();
    assert!(error.contains("1 endpoints, 1 outside of the traffic policy's scope"), "{error}");
}

#[test]
fn every_scope_compares_its_own_value_and_empty_equals_empty() {
    let base = || at(pod("e", &["10.0.0.2"]), "r1", "a", "1", "n1");
    type Edit = fn(&mut wire::Workload);
    let cases: [(S, Edit); 6] = [
        (S::Region, |w| w.locality.as_mut().unwrap().region = "x".into()),
        (S::Zone, |w| w.locality.as_mut().unwrap().zone = "x".into()),
        (S::Subzone, |w| w.locality.as_mut().unwrap().subzone = "x".into()),
        (S::Node, |w| w.node = "x".into()),
        (S::Cluster, |w| w.cluster_id = "x".into()),
        (S::Network, |w| {
            w.network = "x".into();
            w.network_gateway = Some(gateway_by_ip("", "192.0.2.1", 15008));
        }),
    ];
    for (scope, change) in cases {
        let mut other = base();
        change(&mut other);
        assert_eq!(names(&mut placed(M::Strict, &[scope], vec![base()])), ["e"], "{scope:?}");
        assert!(names(&mut placed(M::Strict, &[scope], vec![other])).is_empty(), "{scope:?}");
    }
    let nowhere = wire::Workload { locality: None, ..pod("client", &["10.0.0.1"]) };
    let mut mesh = placed(M::Strict, &[S::Zone], vec![pod("e", &["10.0.0.2"])]).with(nowhere);
    assert_eq!(names(&mut mesh), ["e"]);
}

#[test]
fn endpoints_that_cannot_serve_are_left_out_and_counted() {
    let mut mesh = Mesh::default()
        .with(pod("client", &["10.0.0.1"]))
        .with(service("web", "10.1.0.1", &[(80, 0)]))
        .with(pod("no-port", &["10.0.0.2"]).serving("web", &[(81, 1)]))
        .with(pod("no-address", &[]).serving("web", &[(80, 1)]))
        .with(wire::Workload { status: 1, ..pod("sick", &["10.0.0.3"]) }.serving("web", &[(80, 1)]))
        .with(wire::Workload { capacity: Some(0), ..pod("idle", &["10.0.0.4"]) }.serving("web", &[(80, 1)]));
    let error = go(&mut mesh, "10.1.0.1:80").unwrap_err().to_string();
    let wanted = "4 endpoints, 1 not ready, 1 without an address, 1 without the port, 1 with capacity 0";
    assert!(error.contains(wanted), "{error}");
    mesh.add(pod("good", &["10.0.0.5"]).serving("web", &[(80, 1)]));
    assert_eq!(upstream(&go(&mut mesh, "10.1.0.1:80").unwrap()), "good");
}

#[test]
fn an_unhealthy_endpoint_is_still_reached_by_its_own_address() {
    let sick = wire::Workload { status: 1, ..pod("sick", &["10.0.0.3"]) };
    assert_eq!(upstream(&go(&mut mesh().with(sick), "10.0.0.3:80").unwrap()), "sick");
}

#[test]
fn picks_follow_the_capacities() {
    let mut mesh = mesh().with(service("web", "10.1.0.1", &[(80, 8080)]));
    for (name, address, capacity) in
        [("one", "10.0.0.2", 1), ("three", "10.0.0.3", 3), ("none", "10.0.0.4", 0)]
    {
        mesh.add(wire::Workload { capacity: Some(capacity), ..pod(name, &[address]) }.serving("web", &[]));
    }
    let state = mesh.state();
    let source = mesh.workload("client");
    let found = state.service("shop/web.shop.svc.cluster.local").unwrap();
    let mut counts = BTreeMap::<String, u32>::new();
    let mut random = rng();
    for _ in 0..8000 {
        let selected = select(found, &source, 80, Resolution::Standard, &[], &mut random).unwrap();
        *counts.entry(selected.endpoint.workload.name.to_string()).or_default() += 1;
    }
    assert!((1700..2300).contains(&counts["one"]), "{counts:?}");
    assert_eq!(counts["one"] + counts["three"], 8000);
}

#[test]
fn a_huge_sum_of_capacities_does_not_overflow() {
    let items = vec![u32::MAX; 3];
    let mut random = rng();
    for _ in 0..100 {
        assert!(pick_weighted(&items, |w| *w, &mut random).is_some());
    }
    assert!(pick_weighted(&[0_u32, 0], |w| *w, &mut random).is_none());
}

#[test]
fn a_waypoint_with_an_application_tunnel_needs_no_port_on_its_service() {
    let tunnelled = |name: &str| wire::Workload {
        application_tunnel: Some(wire::ApplicationTunnel { protocol: 1, port: 9000 }),
        ..pod(name, &["10.0.0.100"])
    };
    let mut web = service("web", "10.1.0.1", &[(80, 8080)]);
    web.waypoint = Some(waypoint_for("wp"));
    let mut mesh = mesh()
        .with(web)
        .with(service("wp", "10.1.0.100", &[(9999, 9999)]))
        .with(pod("wp-plain", &["10.0.0.99"]).serving("wp", &[]))
        .with(tunnelled("wp-1").serving("wp", &[]));
    let route = go(&mut mesh, "10.1.0.1:80").unwrap();
    assert_eq!((dials(&route), upstream(&route)), ("10.0.0.100:15008".into(), "wp-1"));
}

#[test]
fn a_dial_address_is_chosen_by_what_was_asked() {
    let workload = Workload::decode(&pod("a", &["10.0.0.2", "10.0.0.3", "2001:db8::2"])).unwrap();
    let choose = |asked: &str, families| choose_address(&workload, asked.parse().unwrap(), families);
    assert_eq!(choose("10.0.0.3:80", IpFamilies::Automatic), Some(ip("10.0.0.3")));
    assert_eq!(choose("[::ffff:10.0.0.3]:80", IpFamilies::Automatic), Some(ip("10.0.0.3")));
    assert_eq!(choose("10.9.9.9:80", IpFamilies::Dual), Some(ip("10.0.0.2")));
    assert_eq!(choose("[2001:db8::99]:80", IpFamilies::Dual), Some(ip("2001:db8::2")));
    assert_eq!(choose("[2001:db8::99]:80", IpFamilies::V4Only), Some(ip("10.0.0.2")));
}
