mod histories;

use super::samples::*;
use super::*;
use crate::xds::proto::{security, workload as wire};

fn decode_error(workload: wire::Workload) -> String {
    Workload::decode(&workload).unwrap_err().to_string()
}

fn service_error(service: wire::Service) -> String {
    Service::decode(&service).unwrap_err().to_string()
}

fn endpoint_names(service: &ServiceEndpoints) -> Vec<String> {
    let mut names: Vec<_> = service.endpoints().map(|e| e.workload.name.to_string()).collect();
    names.sort();
    names
}

#[test]
fn rejected_workloads_name_object_field_problem_and_fix() {
    let bad = |edit: fn(&mut wire::Workload)| {
        let mut workload = pod("cart", &["10.0.0.1"]);
        edit(&mut workload);
        decode_error(workload)
    };
    let object = "workload Kubernetes//Pod/shop/cart";
    assert_eq!(
        bad(|w| w.addresses.push(vec![1, 2, 3])),
        format!("{object}: addresses[1]: is 3 bytes long; an IP address has 4 or 16")
    );
    assert_eq!(
        bad(|w| w.tunnel_protocol = 2),
        format!("{object}: tunnel_protocol: LEGACY_ISTIO_MTLS is not supported; use HBONE or NONE")
    );
    assert_eq!(
        bad(|w| w.tunnel_protocol = 9),
        format!("{object}: tunnel_protocol: value 9 is not known; known are NONE=0, HBONE=1")
    );
    assert_eq!(
        bad(|w| w.waypoint = Some(wire::GatewayAddress::default())),
        format!("{object}: waypoint.destination: is missing; expected `hostname` or `address`")
    );
    assert_eq!(
        bad(|w| w.network_gateway = Some(gateway_by_ip("n2", "9.9.9.9", 70000))),
        format!("{object}: network_gateway.hbone_mtls_port: 70000 is no port; expected 1 to 65535")
    );
    for (field, text) in [
        ("workload_type", bad(|w| w.workload_type = 17)),
        ("status", bad(|w| w.status = -1)),
        ("network_mode", bad(|w| w.network_mode = 4)),
        ("application_tunnel.protocol", {
            bad(|w| w.application_tunnel = Some(wire::ApplicationTunnel { protocol: 5, port: 0 }))
        }),
    ] {
        assert!(text.starts_with(&format!("{object}: {field}: value ")), "{text}");
    }
    assert!(decode_error(wire::Workload::default()).contains("uid: is missing"));
    let ports = pod("cart", &[]).serving("web", &[(0, 80)]);
    assert!(
        decode_error(ports)
            .contains("services[shop/web.shop.svc.cluster.local].ports[0].service_port: 0 is no")
    );
}

#[test]
fn rejected_services_name_object_field_problem_and_fix() {
    use wire::load_balancing::{Mode as M, Scope as S};
    let object = "service shop/web.shop.svc.cluster.local";
    let bad = |edit: &dyn Fn(&mut wire::Service)| {
        let mut it = service("web", "10.1.0.1", &[(80, 8080)]);
        edit(&mut it);
        service_error(it)
    };
    assert_eq!(
        bad(&|s| s.addresses[0].length = Some(33)),
        format!("{object}: addresses[0].length: prefix length 33 is more than the 32 bits of the address")
    );
    assert!(
        bad(&|s| s.load_balancing = Some(balancing(M::Strict, &[S::UnspecifiedScope])))
            .starts_with(&format!("{object}: load_balancing.routing_preference[0]: value 0 is not known"))
    );
    let mode = wire::LoadBalancing { mode: 8, ..Default::default() };
    assert!(bad(&|s| s.load_balancing = Some(mode.clone())).contains("load_balancing.mode: value 8"));
    let health = wire::LoadBalancing { health_policy: 8, ..Default::default() };
    assert!(bad(&|s| s.load_balancing = Some(health.clone())).contains("health_policy: value 8"));
    assert!(bad(&|s| s.ip_families = 7).contains("ip_families: value 7"));
    assert!(bad(&|s| s.ports[0].app_protocol = 99).contains("ports[0].app_protocol: value 99"));
    assert!(bad(&|s| s.ports[0].service_port = 65536).contains("ports[0].service_port: 65536 is no port"));
    assert!(
        bad(&|s| s.weighted_waypoints.push(wire::WeightedWaypoint::default()))
            .contains("weighted_waypoints[0].destination: is missing")
    );
    assert!(service_error(wire::Service::default()).contains("hostname: is missing"));
}

#[test]
fn an_unknown_visibility_means_public_and_foreign_names_are_left_out() {
    let mut msg = service("web", "10.1.0.1", &[(80, 8080)]);
    msg.visibility = 42;
    msg.subject_alt_names = vec!["web.example.com".into(), "spiffe://td/ns/a/sa/b".into()];
    let decoded = Service::decode(&msg).unwrap();
    assert_eq!(decoded.visibility, Visibility::Public);
    assert_eq!(decoded.subject_alt_names, vec!["spiffe://td/ns/a/sa/b".parse().unwrap()]);
}

#[test]
fn unset_fields_take_the_defaults_of_the_api() {
    let msg = wire::Workload { service_account: String::new(), ..pod("cart", &["::ffff:10.0.0.1"]) };
    let workload = Workload::decode(&msg).unwrap();
    assert_eq!(workload.identity.to_string(), "spiffe://cluster.local/ns/shop/sa/default");
    assert_eq!((&*workload.cluster_id, workload.capacity), ("Kubernetes", 1));
    assert_eq!(workload.addresses, vec![ip("10.0.0.1")], "v4-mapped counts as IPv4");
    let zero = wire::Workload { capacity: Some(0), ..pod("cart", &[]) };
    assert_eq!(Workload::decode(&zero).unwrap().capacity, 0, "an explicit 0 is no default");
}

#[test]
fn endpoints_wait_for_their_service_and_survive_its_update() {
    let mut mesh = Mesh::default().with(pod("a", &["10.0.0.1"]).serving("web", &[]));
    assert_eq!(
        mesh.index.staged().map(|(key, n)| (key.to_string(), n)).collect::<Vec<_>>(),
        vec![("shop/web.shop.svc.cluster.local".to_owned(), 1)]
    );
    mesh.add(service("web", "10.1.0.1", &[(80, 8080)]));
    assert_eq!(mesh.index.staged().count(), 0);
    let key = "shop/web.shop.svc.cluster.local";
    assert_eq!(endpoint_names(mesh.state().service(key).unwrap()), ["a"]);

    mesh.add(service("web", "10.1.0.2", &[(81, 8080)]));
    let state = mesh.state();
    assert_eq!(endpoint_names(state.service(key).unwrap()), ["a"]);
    assert!(state.service_by_ip("", ip("10.1.0.1"), None).is_none(), "the old address is gone");
    assert!(state.service_by_ip("", ip("10.1.0.2"), None).is_some());

    mesh.index.remove_address(key);
    assert!(mesh.state().service(key).is_none());
    assert!(mesh.state().service_by_ip("", ip("10.1.0.2"), None).is_none());
    assert!(mesh.state().service_by_hostname("web.shop.svc.cluster.local", None).is_none());
    mesh.add(service("web", "10.1.0.2", &[(81, 8080)]));
    assert_eq!(endpoint_names(mesh.state().service(key).unwrap()), ["a"], "they waited again");
}

#[test]
fn a_workload_update_replaces_it_everywhere() {
    let key = "shop/web.shop.svc.cluster.local";
    let other = "shop/api.shop.svc.cluster.local";
    let mut mesh = Mesh::default()
        .with(service("web", "10.1.0.1", &[(80, 8080)]))
        .with(service("api", "10.1.0.2", &[(80, 8080)]))
        .with(pod("a", &["10.0.0.1"]).serving("web", &[]));
    let before = mesh.state();
    mesh.add(pod("a", &["10.0.0.9"]).serving("api", &[]));
    let state = mesh.state();
    assert!(state.workload_by_ip("", ip("10.0.0.1")).is_none());
    assert_eq!(&*state.workload_by_ip("", ip("10.0.0.9")).unwrap().name, "a");
    assert_eq!(endpoint_names(state.service(key).unwrap()), Vec::<String>::new());
    assert_eq!(endpoint_names(state.service(other).unwrap()), ["a"]);
    assert!(before.workload_by_ip("", ip("10.0.0.1")).is_some(), "a snapshot never changes");
    assert_eq!(endpoint_names(before.service(key).unwrap()), ["a"]);

    mesh.index.remove_address(&uid("a"));
    let state = mesh.state();
    assert_eq!(state.workload_count(), 0);
    assert!(state.workload_by_ip("", ip("10.0.0.9")).is_none());
    assert_eq!(endpoint_names(state.service(other).unwrap()), Vec::<String>::new());
    assert!(state.local_workload(&LocalWorkload::new("shop", "a", "a", "n1")).is_none());
}

#[test]
fn a_service_update_filters_the_attached_endpoints_by_its_health_policy() {
    let sick = wire::Workload { status: wire::WorkloadStatus::Unhealthy.into(), ..pod("b", &["10.0.0.2"]) };
    let mut mesh = Mesh::default()
        .with(service("web", "10.1.0.1", &[(80, 8080)]))
        .with(pod("a", &["10.0.0.1"]).serving("web", &[]))
        .with(sick.serving("web", &[]));
    let key = "shop/web.shop.svc.cluster.local";
    assert_eq!(endpoint_names(mesh.state().service(key).unwrap()), ["a"]);
    let mut all = service("web", "10.1.0.1", &[(80, 8080)]);
    all.load_balancing = Some(wire::LoadBalancing {
        health_policy: wire::load_balancing::HealthPolicy::AllowAll.into(),
        ..Default::default()
    });
    mesh.add(all);
    assert_eq!(endpoint_names(mesh.state().service(key).unwrap()), ["a", "b"]);
    mesh.add(service("web", "10.1.0.1", &[(80, 8080)]));
    assert_eq!(endpoint_names(mesh.state().service(key).unwrap()), ["a"]);
}

#[test]
fn a_removed_name_is_a_service_only_when_it_can_be_one() {
    let key = "shop/web.shop.svc.cluster.local";
    let mut mesh =
        Mesh::default().with(service("web", "10.1.0.1", &[(80, 8080)])).with(pod("a", &["10.0.0.1"]));
    let version = mesh.state().version();
    mesh.index.remove_address("Kubernetes//Pod/shop/unknown");
    mesh.index.remove_address("shop/unknown.example.com");
    mesh.index.remove_address("nonsense");
    assert_eq!(mesh.state().version(), version, "unknown names change nothing");
    mesh.index.remove_address(key);
    assert!(mesh.state().service(key).is_none());
    assert_eq!(mesh.state().workload_count(), 1);
}

#[test]
fn several_workloads_on_one_address_rank_pods_then_tunnels_then_arrival() {
    let entry = |name: &str, tunnel: wire::TunnelProtocol| wire::Workload {
        uid: format!("Kubernetes/networking.istio.io/WorkloadEntry/shop/{name}"),
        tunnel_protocol: tunnel.into(),
        ..pod(name, &["10.0.0.1"])
    };
    let found = |mesh: &mut Mesh| mesh.state().workload_by_ip("", ip("10.0.0.1")).unwrap().name.to_string();
    let mut mesh = Mesh::default()
        .with(entry("first", wire::TunnelProtocol::None))
        .with(entry("second", wire::TunnelProtocol::None));
    assert_eq!(found(&mut mesh), "first");
    mesh.add(entry("tunnel", wire::TunnelProtocol::Hbone));
    assert_eq!(found(&mut mesh), "tunnel");
    mesh.add(plain("plain-pod", &["10.0.0.1"]));
    assert_eq!(found(&mut mesh), "plain-pod");
    mesh.add(pod("pod", &["10.0.0.1"]));
    assert_eq!(found(&mut mesh), "pod");
}

#[test]
fn a_workload_on_its_hosts_network_is_never_found_by_address() {
    let host = wire::Workload { network_mode: 1, ..pod("kube-proxy", &["10.0.0.1"]) };
    let mut mesh = Mesh::default().with(host);
    assert!(mesh.state().workload_by_ip("", ip("10.0.0.1")).is_none());
    assert!(mesh.state().workload(&uid("kube-proxy")).is_some());
}

#[test]
fn addresses_belong_to_their_network() {
    let far = wire::Workload { network: "n2".into(), ..pod("far", &["10.0.0.1"]) };
    let mut mesh = Mesh::default().with(pod("near", &["10.0.0.1"])).with(far);
    let state = mesh.state();
    assert_eq!(&*state.workload_by_ip("", ip("10.0.0.1")).unwrap().name, "near");
    assert_eq!(&*state.workload_by_ip("n2", ip("10.0.0.1")).unwrap().name, "far");
    assert!(state.workload_by_ip("n3", ip("10.0.0.1")).is_none());
}

#[test]
fn several_services_on_one_address_rank_visibility_namespace_canonical_arrival() {
    let found = |mesh: &mut Mesh, client: Option<&str>| {
        mesh.state().service_by_ip("", ip("10.1.0.1"), client).map(|s| s.service.host.namespace().to_owned())
    };
    let mut mesh = Mesh::default();
    for namespace in ["b", "c"] {
        let mut it = service(&format!("{namespace}/web"), "10.1.0.1", &[(80, 80)]);
        it.canonical = false;
        mesh.add(it);
    }
    assert_eq!(found(&mut mesh, Some("x")).as_deref(), Some("b"), "arrival");
    mesh.add(service("d/web", "10.1.0.1", &[(80, 80)]));
    assert_eq!(found(&mut mesh, Some("x")).as_deref(), Some("d"), "canonical");
    assert_eq!(found(&mut mesh, Some("c")).as_deref(), Some("c"), "namespace of the client");
    let mut private = service("d/web", "10.1.0.1", &[(80, 80)]);
    private.visibility = wire::Visibility::Namespace.into();
    mesh.add(private);
    assert_eq!(found(&mut mesh, Some("x")).as_deref(), Some("b"), "private ones are not there for others");
    assert_eq!(found(&mut mesh, None).as_deref(), Some("b"));
    assert_eq!(found(&mut mesh, Some("d")).as_deref(), Some("d"));
    assert_eq!(
        mesh.state()
            .service_by_hostname("web.d.svc.cluster.local", Some("x"))
            .map(|s| s.service.name.clone()),
        None
    );
}

#[test]
fn prefixes_count_only_without_an_exact_address_and_the_longest_wins_within_a_rank() {
    let mut mesh = Mesh::default()
        .with(service("wide", "10.0.0.0/8", &[(80, 80)]))
        .with(service("narrow", "10.2.0.0/16", &[(80, 80)]))
        .with(service("mine/wide", "10.0.0.0/8", &[(80, 80)]))
        .with(service("exact", "10.2.0.1", &[(80, 80)]))
        .with(service("six", "2001:db8::/32", &[(80, 80)]));
    let found = |mesh: &mut Mesh, address: &str, client: &str| {
        mesh.state().service_by_ip("", ip(address), Some(client)).map(|s| s.service.host.key().to_string())
    };
    let key = |name: &str| {
        let (ns, short) = name.split_once('/').unwrap_or(("shop", name));
        Some(format!("{ns}/{}", host(ns, short)))
    };
    assert_eq!(found(&mut mesh, "10.2.0.1", "x"), key("exact"));
    assert_eq!(found(&mut mesh, "10.2.0.1", "mine"), key("exact"), "an exact address beats the namespace");
    assert_eq!(found(&mut mesh, "10.2.0.2", "x"), key("narrow"));
    assert_eq!(found(&mut mesh, "10.2.0.2", "mine"), key("mine/wide"), "the namespace beats the length");
    assert_eq!(found(&mut mesh, "10.9.0.2", "x"), key("wide"));
    assert_eq!(found(&mut mesh, "2001:db8::1", "x"), key("six"));
    assert_eq!(found(&mut mesh, "11.0.0.1", "x"), None);
    mesh.index.remove_address(&key("narrow").unwrap());
    assert_eq!(found(&mut mesh, "10.2.0.2", "x"), key("wide"));
    mesh.index.remove_address(&key("six").unwrap());
    assert_eq!(found(&mut mesh, "2001:db8::1", "x"), None);
}

#[test]
fn an_address_is_a_workload_first_and_a_name_is_a_service_first() {
    let named = wire::Workload { hostname: host("shop", "web"), ..pod("vm", &[]) };
    let alone = wire::Workload { hostname: "vm.example.com".into(), ..pod("alone", &[]) };
    let mut mesh = Mesh::default()
        .with(service("web", "10.1.0.1", &[(80, 80)]))
        .with(pod("odd", &["10.1.0.1"]))
        .with(named)
        .with(alone);
    let state = mesh.state();
    assert!(
        matches!(state.address("", ip("10.1.0.1"), None), Some(Address::Workload(w)) if &*w.name == "odd")
    );
    let name = |hostname: &str| NamespacedHostname::new("shop", hostname);
    assert!(matches!(state.named(&name(&host("shop", "web"))), Some(Address::Service(_))));
    assert!(
        matches!(state.named(&name("vm.example.com")), Some(Address::Workload(w)) if &*w.name == "alone")
    );
    assert!(
        state.named(&NamespacedHostname::new("other", "vm.example.com")).is_none(),
        "exactly that namespace"
    );
}

#[test]
fn a_local_workload_is_found_by_name_account_and_node_together() {
    let mut mesh = Mesh::default().with(pod("a", &["10.0.0.1"]));
    let state = mesh.state();
    let found = |ns, name, sa, node| state.local_workload(&LocalWorkload::new(ns, name, sa, node)).is_some();
    assert!(found("shop", "a", "a", "n1"));
    assert!(!found("shop", "a", "other", "n1"));
    assert!(!found("shop", "a", "a", "n2"));
    assert!(!found("bank", "a", "a", "n1"));
}

#[test]
fn the_services_version_differs_where_the_names_of_services_do() {
    let mut mesh = Mesh::default().with(service("cart", "10.1.0.1", &[(80, 8080)]));
    let first = mesh.state().services_version();
    mesh.add(pod("a", &["10.0.0.1"]));
    mesh.add(service("cart", "10.1.0.2", &[(81, 8080)]));
    assert_eq!(mesh.state().services_version(), first);
    mesh.add(service("pay", "10.1.0.3", &[(80, 8080)]));
    let second = mesh.state().services_version();
    assert_ne!(second, first);
    mesh.index.remove_service("shop/pay.shop.svc.cluster.local");
    let third = mesh.state().services_version();
    assert!(third != second && third != first);
    // Neither is that of another state the same.
    let mut other = Mesh::default().with(service("pay", "10.1.0.1", &[(80, 8080)]));
    assert!(![first, second, third].contains(&other.state().services_version()));
}

#[test]
fn the_version_grows_only_with_changes_and_the_policy_version_only_with_policies() {
    let mut mesh = Mesh::default().with(pod("a", &["10.0.0.1"]));
    let first = mesh.state();
    mesh.add(pod("a", &["10.0.0.1"]));
    assert_eq!(mesh.state().version(), first.version(), "the same again is no change");
    mesh.add(pod("b", &["10.0.0.2"]));
    let second = mesh.state();
    assert!(second.version() > first.version());
    assert_eq!(second.policy_version(), first.policy_version());
    let policy = security::Authorization { name: "p".into(), namespace: "shop".into(), ..Default::default() };
    mesh.index.apply_policy(&policy).unwrap();
    assert!(mesh.state().policy_version() > second.policy_version());
    let third = mesh.state();
    mesh.index.apply_policy(&policy).unwrap();
    assert_eq!(mesh.state().policy_version(), third.policy_version());
    let strict = wire::Workload {
        authorization_policies: vec!["istio-system/strict".into()],
        ..pod("b", &["10.0.0.2"])
    };
    mesh.add(strict);
    assert!(mesh.state().policy_version() > third.policy_version(), "other policies apply to it now");
}

#[test]
fn hostnames_are_equal_whatever_their_case() {
    let external =
        wire::Service { hostname: "API.Example.com".into(), ..service("api", "10.1.0.9", &[(443, 443)]) };
    let mut mesh = Mesh::default().with(external);
    for asked in ["api.example.com", "API.EXAMPLE.COM"] {
        assert!(mesh.state().service_by_hostname(asked, None).is_some(), "{asked}");
        assert_eq!(mesh.state().services_by_hostname(asked).count(), 1);
    }
    mesh.index.remove_address("shop/API.Example.com");
    assert!(mesh.state().service_by_hostname("api.example.com", None).is_none());
}

#[test]
fn enrolment_is_wanted_by_the_tunnel_or_by_the_extension() {
    let asked = wire::Workload {
        extensions: vec![wire::Extension { name: crate::xds::ENROL_EXTENSION.into(), config: None }],
        ..plain("a", &[])
    };
    assert!(Workload::decode(&asked).unwrap().wants_enrolment());
    assert!(Workload::decode(&pod("a", &[])).unwrap().wants_enrolment());
    assert!(!Workload::decode(&plain("a", &[])).unwrap().wants_enrolment());
}

#[test]
fn the_dump_has_the_types_that_kiali_decodes() {
    let mut web = service("web", "10.1.0.1", &[(80, 8080), (443, 0)]);
    web.waypoint = Some(gateway_by_host("shop", &host("shop", "wp"), 15008));
    let mut mesh = Mesh::default().with(web).with(pod("a", &["10.0.0.1"]).serving("web", &[(443, 8443)]));
    let state = mesh.state();
    let (workloads, services) = (state.dump_workloads(), state.dump_services());
    let w = &workloads[0];
    assert_eq!(w["workloadIps"], serde_json::json!(["10.0.0.1"]));
    assert_eq!((w["protocol"].as_str(), w["networkMode"].as_str()), (Some("HBONE"), Some("Standard")));
    assert_eq!(w["services"], serde_json::json!(["shop/web.shop.svc.cluster.local"]));
    let s = &services[0];
    assert_eq!(s["vips"], serde_json::json!(["/10.1.0.1"]));
    assert_eq!(s["ports"], serde_json::json!({"80": 8080, "443": 0}));
    assert_eq!(s["waypoint"]["hboneMtlsPort"], 15008);
    assert_eq!(s["waypoint"]["destination"], "shop/wp.shop.svc.cluster.local");
    assert_eq!(s["endpoints"][uid("a")]["port"], serde_json::json!({"443": 8443}));
}

/// Best time of a batch of one-workload updates, each with its snapshot, in a mesh of that many workloads; every
/// service has ten endpoints, whatever the size.
fn update_time(workloads: u32) -> std::time::Duration {
    let services = workloads / 10;
    let mut mesh = Mesh::default();
    for s in 0..services {
        mesh.add(service(&format!("s{s}"), &format!("10.200.{}.{}", s / 256, s % 256), &[(80, 8080)]));
    }
    let workload = |i: u32, revision: String| wire::Workload {
        canonical_revision: revision,
        ..pod(&format!("w{i}"), &[&format!("10.1.{}.{}", i / 256, i % 256)])
            .serving(&format!("s{}", i % services), &[])
    };
    for i in 0..workloads {
        mesh.add(workload(i, "v1".into()));
    }
    let mut held = mesh.state();
    let best = (0..20).map(|round| {
        let start = std::time::Instant::now();
        for i in 0..20 {
            mesh.add(workload(i * 7, format!("r{round}")));
            held = mesh.state();
        }
        start.elapsed()
    });
    let best = best.min().unwrap();
    assert_eq!(held.workload_count(), workloads as usize);
    best
}

#[test]
fn one_change_among_ten_thousand_workloads_does_not_copy_the_mesh() {
    let (small, large) = (update_time(500), update_time(10_000));
    assert!(large < small * 6, "{large:?} in a mesh twenty times as large as one with {small:?}");
}
