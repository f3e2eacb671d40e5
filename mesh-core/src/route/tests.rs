//! The rules of the node proxy for outbound and inbound connections, one test per rule.

mod balance;
mod inbound;

use std::collections::BTreeSet;

use super::*;
use crate::state::samples::*;
use crate::state::{MeshState, StateIndex};
use crate::xds::proto::workload as wire;

const ILLEGAL: [u16; 3] = [15001, 15006, 15008];

fn rng() -> fastrand::Rng {
    fastrand::Rng::with_seed(7)
}

fn go_excluding(mesh: &mut Mesh, to: &str, excluded: &[Str]) -> Result<Route, RouteError> {
    let source = mesh.workload("client");
    let client = source.addresses.first().copied().unwrap_or_else(|| ip("10.0.0.1"));
    let request = Outbound {
        source: &source,
        client,
        destination: to.parse().unwrap(),
        excluded,
        illegal_ports: &ILLEGAL,
    };
    outbound(&mesh.state(), &request, &mut rng())
}

fn go(mesh: &mut Mesh, to: &str) -> Result<Route, RouteError> {
    go_excluding(mesh, to, &[])
}

fn mesh() -> Mesh {
    Mesh::default().with(pod("client", &["10.0.0.1", "2001:db8::1"]))
}

fn dials(route: &Route) -> String {
    match &route.dial {
        Dial::Address(address) => address.to_string(),
        Dial::Hostname { hostname, port, .. } => format!("{hostname}:{port}"),
    }
}

/// The authority of a single tunnel, or `tcp`, or both authorities of a double one.
fn speaks(route: &Route) -> String {
    match &route.protocol {
        Protocol::Tcp => "tcp".to_owned(),
        Protocol::Hbone(tunnel) => tunnel.authority.to_string(),
        Protocol::DoubleHbone { outer, inner } => format!("{} in {}", inner.authority, outer.authority),
    }
}

fn expected(tunnel: &Tunnel) -> Vec<String> {
    tunnel.expected.iter().map(|id| id.principal()).collect()
}

fn single(route: &Route) -> &Tunnel {
    match &route.protocol {
        Protocol::Hbone(tunnel) => tunnel,
        other => panic!("not a single tunnel: {other:?}"),
    }
}

fn upstream(route: &Route) -> &str {
    route.upstream.as_ref().map_or("", |w| &w.name)
}

fn waypoint_for(host_name: &str) -> wire::GatewayAddress {
    gateway_by_host("shop", &host("shop", host_name), 15008)
}

/// A waypoint service `wp` with one instance.
fn with_waypoint(mesh: Mesh) -> Mesh {
    mesh.with(service("wp", "10.1.0.100", &[(15008, 15008)]))
        .with(pod("wp-1", &["10.0.0.100"]).serving("wp", &[]))
}

#[test]
fn a_call_to_our_own_ports_on_loopback_is_refused() {
    let mut mesh = mesh();
    for to in ["127.0.0.1:15001", "[::1]:15008", "[::ffff:127.0.0.1]:15006"] {
        assert_eq!(go(&mut mesh, to).unwrap_err(), RouteError::SelfCall, "{to}");
    }
    assert_eq!(go(&mut mesh, "127.0.0.1:80").unwrap().kind, RouteKind::Unknown);
    assert_eq!(go(&mut mesh, "192.0.2.1:15008").unwrap().kind, RouteKind::Unknown);
}

#[test]
fn an_unknown_address_is_passed_through() {
    let route = go(&mut mesh(), "192.0.2.1:443").unwrap();
    assert_eq!(
        (route.kind, dials(&route), speaks(&route)),
        (RouteKind::Unknown, "192.0.2.1:443".into(), "tcp".into())
    );
    assert!(route.upstream.is_none() && route.service.is_none() && !route.has_alternatives());
}

#[test]
fn a_workload_in_the_mesh_is_reached_by_hbone_on_its_own_address() {
    let route = go(&mut mesh().with(pod("cart", &["10.0.0.2"])), "10.0.0.2:8080").unwrap();
    assert_eq!(
        (route.kind, dials(&route), speaks(&route)),
        (RouteKind::Direct, "10.0.0.2:15008".into(), "10.0.0.2:8080".into())
    );
    assert_eq!(expected(single(&route)), ["cluster.local/ns/shop/sa/cart"]);
    assert!(!route.has_alternatives(), "a workload-addressed connection has one destination");
}

#[test]
fn a_workload_outside_of_the_mesh_is_reached_in_clear() {
    let route = go(&mut mesh().with(plain("legacy", &["10.0.0.2"])), "10.0.0.2:8080").unwrap();
    assert_eq!(
        (dials(&route), speaks(&route), upstream(&route)),
        ("10.0.0.2:8080".into(), "tcp".into(), "legacy")
    );
}

#[test]
fn a_service_goes_to_an_endpoint_and_its_target_port() {
    let mut web = service("web", "10.1.0.1", &[(80, 8080)]);
    web.subject_alt_names =
        vec!["spiffe://td/ns/x/sa/vm".into(), "spiffe://cluster.local/ns/shop/sa/a".into()];
    let mut mesh = mesh().with(web).with(pod("a", &["10.0.0.2"]).serving("web", &[]));
    let route = go(&mut mesh, "10.1.0.1:80").unwrap();
    assert_eq!(
        (dials(&route), speaks(&route), upstream(&route)),
        ("10.0.0.2:15008".into(), "10.0.0.2:8080".into(), "a")
    );
    assert_eq!(&*route.service.as_ref().unwrap().name, "web");
    assert_eq!(
        expected(single(&route)),
        ["cluster.local/ns/shop/sa/a", "td/ns/x/sa/vm"],
        "workload, then the names"
    );
    assert!(route.has_alternatives());
    assert_eq!(&**route.chosen().unwrap(), uid("a"));
}

#[test]
fn an_endpoints_own_port_mapping_wins_over_the_services() {
    let mut mesh = mesh()
        .with(service("web", "10.1.0.1", &[(80, 8080), (81, 0)]))
        .with(plain("a", &["10.0.0.2"]).serving("web", &[(80, 9090), (81, 7070)]));
    assert_eq!(dials(&go(&mut mesh, "10.1.0.1:80").unwrap()), "10.0.0.2:9090");
    assert_eq!(dials(&go(&mut mesh, "10.1.0.1:81").unwrap()), "10.0.0.2:7070", "a named port");
}

#[test]
fn a_service_without_a_usable_endpoint_fails_and_is_not_passed_through() {
    let mut mesh = mesh().with(service("web", "10.1.0.1", &[(80, 8080)]));
    let error = go(&mut mesh, "10.1.0.1:80").unwrap_err();
    assert_eq!(
        error.to_string(),
        "no healthy upstream: 10.1.0.1:80 (shop/web.shop.svc.cluster.local: 0 endpoints)"
    );
    assert_eq!(error.code().code(), "M0304");
    mesh.add(pod("a", &["10.0.0.2"]).serving("web", &[]));
    assert!(go(&mut mesh, "10.1.0.1:81").unwrap_err().to_string().contains("does not have this port"));
}

#[test]
fn a_passthrough_service_keeps_the_original_destination() {
    let mut external = service("ext", "192.0.2.0/24", &[(443, 443)]);
    external.load_balancing = Some(balancing(wire::load_balancing::Mode::Passthrough, &[]));
    let mut mesh = mesh().with(external).with(pod("a", &["10.0.0.2"]).serving("ext", &[]));
    let route = go(&mut mesh, "192.0.2.7:443").unwrap();
    assert_eq!(
        (route.kind, dials(&route), speaks(&route)),
        (RouteKind::Passthrough, "192.0.2.7:443".into(), "tcp".into())
    );
    assert!(!route.has_alternatives());
}

#[test]
fn a_service_with_a_waypoint_goes_through_it_with_its_own_address_untouched() {
    let mut web = service("web", "10.1.0.1", &[(80, 8080)]);
    web.waypoint = Some(waypoint_for("wp"));
    let mut mesh = with_waypoint(mesh()).with(web).with(pod("a", &["10.0.0.2"]).serving("web", &[]));
    let route = go(&mut mesh, "10.1.0.1:80").unwrap();
    assert_eq!(
        (route.kind, dials(&route), speaks(&route)),
        (RouteKind::ServiceWaypoint, "10.0.0.100:15008".into(), "10.1.0.1:80".into())
    );
    assert_eq!(upstream(&route), "wp-1", "metrics call the waypoint the destination workload");
    assert_eq!(
        &*route.service.as_ref().unwrap().name,
        "web",
        "and the addressed service the destination service"
    );
    assert_eq!(expected(single(&route)), ["cluster.local/ns/shop/sa/wp-1"]);
}

#[test]
fn a_waypoint_that_is_missing_or_has_no_endpoint_fails_and_is_never_bypassed() {
    let mut web = service("web", "10.1.0.1", &[(80, 8080)]);
    web.waypoint = Some(waypoint_for("wp"));
    let mut mesh = mesh().with(web).with(pod("a", &["10.0.0.2"]).serving("web", &[]));
    let error = go(&mut mesh, "10.1.0.1:80").unwrap_err();
    assert_eq!(error.to_string(), "unknown waypoint: shop/wp.shop.svc.cluster.local:15008 (not found)");
    mesh.add(service("wp", "10.1.0.100", &[(15008, 15008)]));
    let error = go(&mut mesh, "10.1.0.1:80").unwrap_err();
    assert_eq!((error.code().code(), error.to_string().contains("0 endpoints")), ("M0309", true), "{error}");
}

#[test]
fn weighted_waypoints_are_sampled_and_fall_back_to_the_plain_one() {
    let mut web = service("web", "10.1.0.1", &[(80, 8080)]);
    web.waypoint = Some(waypoint_for("wp"));
    let canary = |weight| wire::WeightedWaypoint { destination: Some(waypoint_for("canary")), weight };
    let primary = |weight| wire::WeightedWaypoint { destination: Some(waypoint_for("wp")), weight };
    web.weighted_waypoints = vec![primary(3), canary(1)];
    let mut mesh = with_waypoint(mesh())
        .with(service("canary", "10.1.0.101", &[(15008, 15008)]))
        .with(pod("canary-1", &["10.0.0.101"]).serving("canary", &[]))
        .with(web.clone());
    let source = mesh.workload("client");
    let state = mesh.state();
    let request = Outbound {
        source: &source,
        client: ip("10.0.0.1"),
        destination: "10.1.0.1:80".parse().unwrap(),
        excluded: &[],
        illegal_ports: &ILLEGAL,
    };
    let mut random = rng();
    let canaries = (0..4000)
        .filter(|_| upstream(&outbound(&state, &request, &mut random).unwrap()) == "canary-1")
        .count();
    assert!((800..1200).contains(&canaries), "{canaries} of 4000 for a quarter");
    web.weighted_waypoints = vec![canary(0)];
    mesh.add(web);
    assert_eq!(upstream(&go(&mut mesh, "10.1.0.1:80").unwrap()), "wp-1");
}

#[test]
fn a_waypoint_by_address_pins_the_family_and_one_by_name_adapts() {
    let wp = pod("wp-1", &["10.0.0.100", "2001:db8::100"]).serving("wp", &[]);
    let mut wp_service = service("wp", "10.1.0.100", &[(15008, 15008)]);
    wp_service.addresses.push(vip_on("", "2001:db8:1::100"));
    let web = |gateway| {
        let mut web = service("web", "10.1.0.1", &[(80, 8080)]);
        web.addresses.push(vip_on("", "2001:db8:1::1"));
        web.waypoint = Some(gateway);
        web
    };
    let mut mesh = mesh().with(wp).with(wp_service).with(web(waypoint_for("wp")));
    assert_eq!(dials(&go(&mut mesh, "10.1.0.1:80").unwrap()), "10.0.0.100:15008");
    assert_eq!(dials(&go(&mut mesh, "[2001:db8:1::1]:80").unwrap()), "[2001:db8::100]:15008");
    mesh.add(web(gateway_by_ip("", "10.1.0.100", 15008)));
    assert_eq!(dials(&go(&mut mesh, "[2001:db8:1::1]:80").unwrap()), "10.0.0.100:15008");
}

#[test]
fn a_workload_hides_a_service_when_asked_what_was_addressed_and_not_when_picking() {
    let mut web = service("web", "10.1.0.1", &[(80, 8080)]);
    web.waypoint = Some(waypoint_for("wp"));
    let mut mesh = with_waypoint(mesh())
        .with(web)
        .with(pod("a", &["10.0.0.2"]).serving("web", &[]))
        .with(pod("same-address", &["10.1.0.1"]));
    let route = go(&mut mesh, "10.1.0.1:80").unwrap();
    assert_eq!(
        (route.kind, upstream(&route)),
        (RouteKind::Direct, "a"),
        "no waypoint, but the service's endpoint"
    );
}

#[test]
fn a_service_without_waypoint_never_uses_the_waypoint_of_the_chosen_workload() {
    let behind = wire::Workload { waypoint: Some(waypoint_for("wp")), ..pod("a", &["10.0.0.2"]) };
    let mut mesh = with_waypoint(mesh())
        .with(service("web", "10.1.0.1", &[(80, 8080)]))
        .with(behind.serving("web", &[]));
    assert_eq!(go(&mut mesh, "10.1.0.1:80").unwrap().kind, RouteKind::Direct);
    let route = go(&mut mesh, "10.0.0.2:8080").unwrap();
    assert_eq!(
        (route.kind, dials(&route), speaks(&route)),
        (RouteKind::WorkloadWaypoint, "10.0.0.100:15008".into(), "10.0.0.2:8080".into())
    );
}

#[test]
fn traffic_from_the_waypoint_itself_goes_to_the_workload() {
    let behind = wire::Workload { waypoint: Some(waypoint_for("wp")), ..pod("a", &["10.0.0.2"]) };
    let mut mesh = with_waypoint(mesh()).with(behind);
    let state = mesh.state();
    let kind = |source: &str, client: &str| {
        let source = mesh.workload(source);
        let request = Outbound {
            source: &source,
            client: ip(client),
            destination: "10.0.0.2:8080".parse().unwrap(),
            excluded: &[],
            illegal_ports: &ILLEGAL,
        };
        outbound(&state, &request, &mut rng()).unwrap().kind
    };
    assert_eq!(kind("wp-1", "10.0.0.100"), RouteKind::Direct);
    assert_eq!(kind("wp-1", "10.0.0.99"), RouteKind::WorkloadWaypoint, "its identity from elsewhere");
    assert_eq!(
        kind("client", "10.0.0.100"),
        RouteKind::WorkloadWaypoint,
        "its address with another identity"
    );
}

fn far(name: &str) -> wire::Workload {
    wire::Workload { network: "far".into(), ..pod(name, &[]) }
}

/// Service `web` whose only endpoint is in network `far`, behind a gateway by name.
fn across(gateway: Option<wire::GatewayAddress>) -> Mesh {
    let mut web = service("web", "10.1.0.1", &[(80, 8080)]);
    web.subject_alt_names = vec!["spiffe://cluster.local/ns/shop/sa/remote".into()];
    let split = wire::Workload { network_gateway: gateway, ..far("split") }.serving("web", &[]);
    mesh().with(web).with(split)
}

fn with_gateway(mesh: Mesh) -> Mesh {
    mesh.with(service("gw", "10.1.0.200", &[(15008, 15008)]))
        .with(pod("gw-1", &["10.0.0.200"]).serving("gw", &[]))
}

#[test]
fn another_network_is_reached_by_a_tunnel_within_a_tunnel_to_its_gateway() {
    let mut mesh = with_gateway(across(Some(waypoint_for("gw"))));
    let route = go(&mut mesh, "10.1.0.1:80").unwrap();
    assert_eq!(
        (route.kind, dials(&route), upstream(&route)),
        (RouteKind::Gateway, "10.0.0.200:15008".into(), "gw-1")
    );
    let Protocol::DoubleHbone { outer, inner } = &route.protocol else { panic!("{route:?}") };
    let authority = "web.shop.svc.cluster.local:80";
    assert_eq!(
        (outer.authority.to_string(), inner.authority.to_string()),
        (authority.into(), authority.into())
    );
    assert_eq!(expected(outer), ["cluster.local/ns/shop/sa/gw-1"]);
    assert_eq!(expected(inner), ["cluster.local/ns/shop/sa/remote"], "only the names of the service");
    assert_eq!(&*route.endpoint.as_ref().unwrap().name, "split");
}

#[test]
fn another_network_without_a_usable_gateway_fails() {
    let error = go(&mut across(Some(waypoint_for("gw"))), "10.1.0.1:80").unwrap_err();
    assert_eq!(
        error.to_string(),
        "unknown network gateway: shop/gw.shop.svc.cluster.local:15008 (not found)"
    );
    assert_eq!(error.code().code(), "M0310");
    let error = go(&mut across(None), "10.1.0.1:80").unwrap_err().to_string();
    assert!(error.contains("1 without an address"), "{error}");
    let mut reachable = across(None)
        .with(wire::Workload { addresses: vec![bytes("172.16.0.1")], ..far("split").serving("web", &[]) });
    let error = go(&mut reachable, "10.1.0.1:80").unwrap_err().to_string();
    assert!(error.contains("names no gateway"), "an address of another network cannot be dialled: {error}");
}

#[test]
fn every_gateway_instance_is_tried_and_then_the_endpoints_of_other_networks() {
    let third = wire::Workload {
        network: "third".into(),
        network_gateway: Some(waypoint_for("gw-b")),
        ..pod("third", &[])
    };
    let mut mesh = with_gateway(across(Some(waypoint_for("gw"))))
        .with(pod("gw-2", &["10.0.0.201"]).serving("gw", &[]))
        .with(third.serving("web", &[]))
        .with(service("gw-b", "10.1.0.201", &[(15008, 15008)]))
        .with(pod("gw-b-1", &["10.0.0.210"]).serving("gw-b", &[]));
    let mut excluded = Vec::new();
    let mut seen = BTreeSet::new();
    let error = loop {
        match go_excluding(&mut mesh, "10.1.0.1:80", &excluded) {
            Ok(route) => {
                seen.insert(upstream(&route).to_owned());
                excluded.push(route.chosen().unwrap().clone());
            }
            Err(error) => break error.to_string(),
        }
    };
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), ["gw-1", "gw-2", "gw-b-1"]);
    assert!(
        error.starts_with("unknown network gateway:") && error.contains("refused this connection"),
        "{error}"
    );
}

#[test]
fn a_service_waypoint_in_another_network_is_reached_through_the_gateway() {
    let mut web = service("web", "10.1.0.1", &[(80, 8080)]);
    web.waypoint = Some(waypoint_for("wp"));
    let mut wp = service("wp", "10.1.0.100", &[(15008, 15008)]);
    wp.subject_alt_names = vec!["spiffe://cluster.local/ns/shop/sa/wp".into()];
    let instance = wire::Workload { network_gateway: Some(waypoint_for("gw")), ..far("wp-1") };
    let mut mesh = with_gateway(mesh()).with(web).with(wp).with(instance.serving("wp", &[]));
    let route = go(&mut mesh, "10.1.0.1:80").unwrap();
    assert_eq!((route.kind, upstream(&route)), (RouteKind::Gateway, "gw-1"));
    let authority = "web.shop.svc.cluster.local:80";
    assert_eq!(speaks(&route), format!("{authority} in {authority}"));
    let Protocol::DoubleHbone { inner, .. } = &route.protocol else { panic!() };
    assert_eq!(expected(inner), ["cluster.local/ns/shop/sa/wp"]);
}

#[test]
fn a_gateway_of_the_own_network_is_ignored() {
    let announced = wire::Workload { network_gateway: Some(waypoint_for("gw")), ..pod("a", &["10.0.0.2"]) };
    let mut mesh = with_gateway(mesh())
        .with(service("web", "10.1.0.1", &[(80, 8080)]))
        .with(announced.serving("web", &[]));
    assert_eq!(go(&mut mesh, "10.1.0.1:80").unwrap().kind, RouteKind::Direct);
}

#[test]
fn a_refused_endpoint_is_excluded_until_none_is_left() {
    let mut mesh = mesh().with(service("web", "10.1.0.1", &[(80, 8080)]));
    for (name, address) in [("a", "10.0.0.2"), ("b", "10.0.0.3"), ("c", "10.0.0.4")] {
        mesh.add(pod(name, &[address]).serving("web", &[]));
    }
    let mut excluded = Vec::new();
    let mut seen = BTreeSet::new();
    while let Ok(route) = go_excluding(&mut mesh, "10.1.0.1:80", &excluded) {
        seen.insert(upstream(&route).to_owned());
        excluded.push(route.chosen().unwrap().clone());
    }
    assert_eq!(seen.len(), 3);
    let error = go_excluding(&mut mesh, "10.1.0.1:80", &excluded).unwrap_err().to_string();
    assert!(error.contains("3 endpoints, 3 refused this connection"), "{error}");
}

#[test]
fn an_address_family_is_kept_where_the_workload_and_the_service_allow_it() {
    let mut web = service("web", "10.1.0.1", &[(80, 8080)]);
    web.addresses.push(vip_on("", "2001:db8:1::1"));
    let dual = plain("a", &["2001:db8::2", "10.0.0.2"]).serving("web", &[]);
    let mut mesh = mesh().with(web.clone()).with(dual);
    assert_eq!(dials(&go(&mut mesh, "10.1.0.1:80").unwrap()), "10.0.0.2:8080");
    assert_eq!(dials(&go(&mut mesh, "[2001:db8:1::1]:80").unwrap()), "[2001:db8::2]:8080");
    assert_eq!(
        dials(&go(&mut mesh, "[2001:db8::2]:9").unwrap()),
        "[2001:db8::2]:9",
        "one of its own addresses"
    );
    web.ip_families = wire::IpFamilies::Ipv6Only.into();
    mesh.add(web.clone());
    assert_eq!(
        dials(&go(&mut mesh, "10.1.0.1:80").unwrap()),
        "[2001:db8::2]:8080",
        "the service allows only IPv6"
    );
    mesh.add(plain("a", &["10.0.0.2"]).serving("web", &[]));
    assert!(matches!(go(&mut mesh, "10.1.0.1:80").unwrap_err(), RouteError::NoAddress(_)));
    web.ip_families = wire::IpFamilies::Automatic.into();
    mesh.add(web);
    assert_eq!(
        dials(&go(&mut mesh, "[2001:db8:1::1]:80").unwrap()),
        "10.0.0.2:8080",
        "the only address there is"
    );
}

#[test]
fn a_workload_with_a_hostname_waits_for_its_address() {
    let named = |tunnel: wire::TunnelProtocol| {
        wire::Workload { hostname: "db.example.com".into(), tunnel_protocol: tunnel.into(), ..pod("db", &[]) }
            .serving("db", &[])
    };
    let mut mesh =
        mesh().with(service("db", "10.1.0.1", &[(5432, 5432)])).with(named(wire::TunnelProtocol::None));
    let route = go(&mut mesh, "10.1.0.1:5432").unwrap();
    assert_eq!(dials(&route), "db.example.com:5432");
    let answers = [ip("2001:db8::5"), ip("192.0.2.5")];
    let resolved = route.clone().resolved(&answers, &mut rng()).unwrap();
    assert_eq!(dials(&resolved), "192.0.2.5:5432", "the family that was asked for");
    assert_eq!(dials(&route.clone().resolved(&answers[..1], &mut rng()).unwrap()), "[2001:db8::5]:5432");
    let error = route.resolved(&[], &mut rng()).unwrap_err().to_string();
    assert_eq!(error, format!("no ip addresses were resolved for workload: {}", uid("db")));

    mesh.add(named(wire::TunnelProtocol::Hbone));
    let route = go(&mut mesh, "10.1.0.1:5432").unwrap().resolved(&answers, &mut rng()).unwrap();
    assert_eq!((dials(&route), speaks(&route)), ("192.0.2.5:15008".into(), "192.0.2.5:5432".into()));
}

#[test]
fn lookups_use_the_nodes_network() {
    let local = |w: wire::Workload| wire::Workload { network: "here".into(), ..w };
    let mut mesh = Mesh::on_network("here")
        .with(local(pod("client", &["10.0.0.1"])))
        .with(local(pod("near", &["10.0.0.2"])))
        .with(pod("other", &["10.0.0.3"]));
    assert_eq!(upstream(&go(&mut mesh, "10.0.0.2:80").unwrap()), "near");
    assert_eq!(go(&mut mesh, "10.0.0.3:80").unwrap().kind, RouteKind::Unknown);
}

#[test]
fn an_empty_mesh_answers_every_address_without_a_panic() {
    let state: std::sync::Arc<MeshState> = StateIndex::default().snapshot();
    let source = crate::state::Workload::decode(&pod("client", &[])).unwrap();
    for destination in ["0.0.0.0:0", "[::]:0", "255.255.255.255:65535"] {
        let request = Outbound {
            source: &source,
            client: ip("::"),
            destination: destination.parse().unwrap(),
            excluded: &[],
            illegal_ports: &[],
        };
        assert_eq!(outbound(&state, &request, &mut rng()).unwrap().kind, RouteKind::Unknown);
    }
}
