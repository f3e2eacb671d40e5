//! Which endpoint, without localities and hashes.

use mesh_core::route::{Dial, Protocol, RouteKind};
use proptest::prelude::*;

use super::*;
use l7::load_balancer::{Simple, Warmup};

fn world(algorithm: Simple, pods: Vec<wire::Workload>) -> World {
    let mut world = World::with_endpoints(0);
    for pod in pods {
        world.pod(pod);
    }
    world.policy(balanced(simple(algorithm)));
    world
}

fn plain(count: usize) -> Vec<wire::Workload> {
    (0..count).map(pod).collect()
}

#[test]
fn round_robin_takes_one_after_the_other() {
    let mut world = world(Simple::RoundRobin, plain(5));
    let cluster = world.web();
    let first: Vec<_> = (0..5).map(|_| world.pick(&cluster)).collect();
    let mut sorted = first.clone();
    sorted.sort();
    assert_eq!(sorted, ["web-0", "web-1", "web-2", "web-3", "web-4"]);
    assert_eq!((0..5).map(|_| world.pick(&cluster)).collect::<Vec<_>>(), first);
}

#[test]
fn round_robin_with_weights_spreads_the_turns_of_an_endpoint_evenly() {
    let mut world = world(Simple::RoundRobin, vec![weighted(0, 1), weighted(1, 9)]);
    let cluster = world.web();
    for _ in 0..20 {
        let counts = world.spread(&cluster, 0, 10);
        let of_light = counts.get("web-0").copied().unwrap_or_default();
        assert!((0..=2).contains(&of_light), "{counts:?} of every ten");
    }
}

#[test]
fn the_position_of_round_robin_is_kept_over_changes() {
    let mut world = world(Simple::RoundRobin, plain(3));
    let cluster = world.web();
    let order: Vec<_> = (0..3).map(|_| world.pick(&cluster)).collect();
    world.pick(&cluster);
    world.policy(l7::TrafficPolicy {
        outlier_detection: Some(detecting()),
        ..balanced(simple(Simple::RoundRobin))
    });
    let again = world.web();
    assert!(Arc::ptr_eq(&cluster, &again));
    assert_eq!(world.pick(&cluster), order[1]);
}

#[test]
fn least_request_takes_the_less_loaded_of_two() {
    let mut world = world(Simple::LeastRequest, plain(2));
    let cluster = world.web();
    let context = PickContext::new(world.start);
    let mut pick = || cluster.pick(&context, &mut world.rng).unwrap();
    let first = pick();
    let second = pick();
    assert_ne!(name(&first), name(&second));
    let busy = name(&first);
    drop(second);
    for _ in 0..50 {
        assert_ne!(name(&pick()), busy);
    }
}

#[test]
fn least_request_goes_by_load_in_proportion_to_weight() {
    let mut world = world(Simple::LeastRequest, vec![weighted(0, 1), weighted(1, 3)]);
    let cluster = world.web();
    let context = PickContext::new(world.start);
    let held: Vec<_> = (0..400).map(|_| cluster.pick(&context, &mut world.rng).unwrap()).collect();
    let of_light = held.iter().filter(|picked| name(picked) == "web-0").count();
    assert!((85..=115).contains(&of_light), "a quarter of 400 at a time: {of_light}");
}

#[test]
fn an_endpoint_that_hangs_gets_hardly_any_requests() {
    let mut world = world(Simple::LeastRequest, plain(10));
    let cluster = world.web();
    let context = PickContext::new(world.start);
    let mut hanging = Vec::new();
    for _ in 0..1000 {
        let picked = cluster.pick(&context, &mut world.rng).unwrap();
        if name(&picked) == "web-3" {
            hanging.push(picked);
        }
    }
    assert!((1..=3).contains(&hanging.len()), "{}", hanging.len());
}

#[test]
fn random_reaches_everybody_alike() {
    let mut world = world(Simple::Random, plain(4));
    let cluster = world.web();
    let counts = world.spread(&cluster, 0, 8000);
    assert!(counts.values().all(|count| (1800..=2200).contains(count)), "{counts:?}");
}

#[test]
fn passthrough_dials_what_the_client_wanted() {
    let mut world = world(Simple::Passthrough, plain(2));
    let cluster = world.web();
    let original = "10.1.0.1:80".parse().unwrap();
    let context = PickContext { original: Some(original), ..PickContext::new(world.start) };
    let picked = cluster.pick(&context, &mut world.rng).unwrap();
    assert_eq!(picked.endpoint().workload, None);
    assert_eq!(picked.endpoint().route.dial, Dial::Address(original));
    assert_eq!(picked.endpoint().route.protocol, Protocol::Tcp);
    assert!(cluster.pick(&PickContext::new(world.start), &mut world.rng).is_err());
}

#[test]
fn an_endpoint_is_reached_through_its_tunnel_or_plainly_at_its_target_port() {
    let mut out = pod(1);
    out.tunnel_protocol = wire::TunnelProtocol::None.into();
    let mut world = world(Simple::RoundRobin, vec![pod(0), out]);
    let mut own_port = pod(2);
    own_port.services = [(
        WEB.to_owned(),
        wire::PortList { ports: vec![wire::Port { service_port: 80, target_port: 9090, app_protocol: 0 }] },
    )]
    .into();
    world.pod(own_port);
    let cluster = world.web();
    let context = PickContext::new(world.start);
    let mut ways: Vec<_> = (0..3)
        .map(|_| {
            let picked = cluster.pick(&context, &mut world.rng).unwrap();
            let Dial::Address(dial) = picked.endpoint().route.dial else { panic!("a name") };
            let authority = match &picked.endpoint().route.protocol {
                Protocol::Hbone(tunnel) => tunnel.authority.to_string(),
                _ => "plain".to_owned(),
            };
            format!("{} {dial} {authority} {}", name(&picked), picked.endpoint().port)
        })
        .collect();
    ways.sort();
    assert_eq!(
        ways,
        [
            "web-0 10.0.0.1:15008 10.0.0.1:8080 8080",
            "web-1 10.0.0.2:8080 plain 8080",
            "web-2 10.0.0.3:15008 10.0.0.3:9090 9090",
        ]
    );
}

#[test]
fn an_endpoint_is_dialled_by_an_address_that_the_service_allows_or_by_its_name() {
    use mesh_core::state::IpFamilies;
    let mut world = World::with_endpoints(0);
    world.pod(wire::Workload { addresses: vec![bytes("10.0.0.1"), bytes("fd00::1")], ..pod(0) });
    let dial = |world: &mut World| {
        let cluster = world.subset("").unwrap();
        let picked = cluster.pick(&PickContext::new(world.start), &mut world.rng).unwrap();
        picked.endpoint().route.dial.clone()
    };
    world.web();
    assert_eq!(dial(&mut world), Dial::Address("10.0.0.1:15008".parse().unwrap()));
    world.service(wire::Service { ip_families: wire::IpFamilies::Ipv6Only.into(), ..service() });
    world.apply(1);
    assert_eq!(dial(&mut world), Dial::Address("[fd00::1]:15008".parse().unwrap()));
    let named = wire::Workload {
        addresses: Vec::new(),
        hostname: "web.example.com".into(),
        tunnel_protocol: wire::TunnelProtocol::None.into(),
        ..pod(0)
    };
    world.pod(named);
    world.apply(2);
    let expected = Dial::Hostname {
        hostname: "web.example.com".into(),
        port: 8080,
        families: IpFamilies::V6Only,
        prefer_v4: true,
    };
    assert_eq!(dial(&mut world), expected);
    world.pod(wire::Workload { addresses: vec![bytes("10.0.0.1")], ..pod(0) });
    world.apply(3);
    let error = world.subset("").unwrap().pick(&PickContext::new(world.start), &mut world.rng).unwrap_err();
    assert_eq!(error.left_out, LeftOut { endpoints: 1, unreachable: 1, ..LeftOut::default() });
}

#[test]
fn a_workload_is_reached_itself_even_when_it_is_not_ready() {
    let mut world = World::with_endpoints(0);
    world.pod(wire::Workload { status: wire::WorkloadStatus::Unhealthy.into(), ..pod(0) });
    let service = world.web();
    let error = service.pick(&PickContext::new(world.start), &mut world.rng).unwrap_err();
    assert_eq!(error.left_out, LeftOut { endpoints: 1, unhealthy: 1, ..LeftOut::default() });
    let key = ClusterKey::workload(&uid(0).into(), 8443);
    let cluster = world.clusters.cluster(&key, world.start).unwrap();
    let picked = cluster.pick(&PickContext::new(world.start), &mut world.rng).unwrap();
    assert_eq!(picked.endpoint().route.kind, RouteKind::Direct);
    assert_eq!((name(&picked), picked.endpoint().port), ("web-0".to_owned(), 8443));
    world.remove(0);
    world.apply(1);
    assert_eq!(
        world.clusters.cluster(&key, world.start).unwrap_err(),
        UnknownCluster::Workload(uid(0).into())
    );
}

#[test]
fn an_endpoint_of_another_network_is_reached_through_the_gateway_there() {
    let mut world = World::with_endpoints(1);
    let gateway = wire::Workload {
        uid: "Kubernetes//Pod/istio-system/eastwest".into(),
        name: "eastwest".into(),
        namespace: "istio-system".into(),
        addresses: vec![bytes("10.9.0.9")],
        network: "west".into(),
        service_account: "eastwest".into(),
        services: Default::default(),
        ..pod(9)
    };
    world.pod(gateway);
    let far = wire::Workload {
        network: "west".into(),
        addresses: Vec::new(),
        network_gateway: Some(wire::GatewayAddress {
            destination: Some(wire::gateway_address::Destination::Address(wire::NetworkAddress {
                network: "west".into(),
                address: bytes("10.9.0.9"),
                length: None,
            })),
            hbone_mtls_port: 15008,
        }),
        ..pod(1)
    };
    world.pod(far);
    let lost = wire::Workload { network: "east".into(), ..pod(2) };
    world.pod(lost);
    let cluster = world.web();
    let context = PickContext { sticky: Some(hash_of(1)), ..PickContext::new(world.start) };
    let route = cluster.pick(&context, &mut world.rng).unwrap().endpoint().route.clone();
    assert_eq!(route.dial, Dial::Address("10.9.0.9:15008".parse().unwrap()));
    let Protocol::DoubleHbone { outer, inner } = &route.protocol else { panic!("{route:?}") };
    assert_eq!(outer.authority.to_string(), format!("{HOST}:80"));
    assert_eq!(outer.expected[0].service_account(), "eastwest");
    assert_eq!(inner.authority, outer.authority);
    assert_eq!(world.used(&cluster, 0), ["web-0", "web-1"], "nobody knows a gateway to the third");
    world.index.remove_address("Kubernetes//Pod/istio-system/eastwest");
    world.apply(1);
    assert_eq!(world.used(&cluster, 1), ["web-0"]);
}

fn hash_of(n: usize) -> u64 {
    super::super::endpoint::id(&uid(n).into())
}

#[test]
fn what_was_tried_is_avoided_as_long_as_there_is_something_else() {
    for algorithm in [Simple::Random, Simple::LeastRequest, Simple::RoundRobin] {
        let mut world = world(algorithm, plain(20));
        let cluster = world.web();
        for _ in 0..20 {
            let mut tried = Vec::new();
            let mut names = std::collections::BTreeSet::new();
            for _ in 0..20 {
                let context = PickContext { tried: &tried, ..PickContext::new(world.start) };
                let picked = cluster.pick(&context, &mut world.rng).unwrap();
                assert!(names.insert(name(&picked)), "{algorithm:?}: {} again", name(&picked));
                tried.push(picked.tried());
            }
            let context = PickContext { tried: &tried, ..PickContext::new(world.start) };
            assert!(cluster.pick(&context, &mut world.rng).is_ok(), "all were tried: any may be again");
            let context = PickContext { tried: &tried[..19], avoid_tried: false, ..context };
            let names: std::collections::BTreeSet<_> =
                (0..60).map(|_| world.pick_with(&cluster, &context)).collect();
            assert!(names.len() > 1, "{algorithm:?}: none is avoided");
        }
    }
}

#[test]
fn a_session_stays_with_its_endpoint_while_that_takes_requests() {
    let mut world = world(Simple::RoundRobin, plain(5));
    world.policy(l7::TrafficPolicy {
        outlier_detection: Some(detecting()),
        ..balanced(simple(Simple::RoundRobin))
    });
    let cluster = world.web();
    let first = cluster.pick(&PickContext::new(world.start), &mut world.rng).unwrap();
    let sticky = Some(first.endpoint().sticky());
    let context = PickContext { sticky, ..PickContext::new(world.start) };
    for _ in 0..20 {
        assert_eq!(world.pick_with(&cluster, &context), name(&first));
    }
    let tried = [first.tried()];
    assert_ne!(world.pick_with(&cluster, &PickContext { tried: &tried, ..context }), name(&first));
    for _ in 0..5 {
        first.report(Outcome::Status(500), world.start);
    }
    assert_ne!(world.pick_with(&cluster, &context), name(&first));
}

#[test]
fn a_capacity_of_zero_takes_nothing() {
    let mut world = world(Simple::LeastRequest, vec![weighted(0, 0), weighted(1, 2)]);
    let cluster = world.web();
    assert_eq!(world.used(&cluster, 0), ["web-1"]);
    world.remove(1);
    world.apply(1);
    let error = cluster.pick(&PickContext::new(world.at(1)), &mut world.rng).unwrap_err();
    assert_eq!(error.left_out, LeftOut { endpoints: 1, without_capacity: 1, ..LeftOut::default() });
}

#[test]
fn unready_endpoints_take_requests_where_the_service_publishes_them() {
    let mut world = World::with_endpoints(1);
    world.pod(wire::Workload { status: wire::WorkloadStatus::Unhealthy.into(), ..pod(1) });
    let cluster = world.web();
    assert_eq!(world.used(&cluster, 0), ["web-0"]);
    let all = wire::load_balancing::HealthPolicy::AllowAll.into();
    let load_balancing = wire::LoadBalancing { health_policy: all, ..wire::LoadBalancing::default() };
    world.service(wire::Service { load_balancing: Some(load_balancing), ..service() });
    world.apply(1);
    assert_eq!(world.used(&cluster, 1), ["web-0", "web-1"]);
}

fn warming(algorithm: Simple, warmup: Warmup) -> World {
    let mut world = World::with_endpoints(1);
    let load_balancer = l7::LoadBalancer { warmup: Some(warmup), ..simple(algorithm) };
    world.policy(balanced(load_balancer));
    world
}

#[test]
fn a_new_endpoint_gets_its_full_share_only_after_its_warmup() {
    for algorithm in [Simple::RoundRobin, Simple::LeastRequest] {
        let mut world = warming(algorithm, Warmup { duration: seconds(100), ..Warmup::default() });
        let cluster = world.web();
        world.pod(pod(1));
        world.apply(1000);
        let mut share = |millis| {
            let counts = world.spread(&cluster, millis, 6000);
            *counts.get("web-1").unwrap_or(&0) as f64 / 6000.0
        };
        // Of its weight beside one endpoint with all of its own: least request always compares the two, and with no
        // load takes the first, so that the share is that of the first draw.
        let shares = [share(1000), share(51_000), share(101_000)];
        assert!((0.04..0.14).contains(&shares[0]), "{algorithm:?}: a tenth of the other's: {shares:?}");
        assert!((0.28..0.39).contains(&shares[1]), "{algorithm:?}: half of the other's: {shares:?}");
        assert!((0.46..0.54).contains(&shares[2]), "{algorithm:?}: the same: {shares:?}");
    }
}

#[test]
fn aggression_and_minimum_shape_the_warmup() {
    let warmup = |minimum_percent, aggression| super::super::policy::Warmup {
        duration: Duration::from_secs(100),
        minimum_percent,
        aggression,
    };
    let factor = |minimum, aggression, age| {
        (warmup(minimum, aggression).factor(Duration::from_secs(age)) * 1000.0).round() / 1000.0
    };
    assert_eq!(factor(10.0, 1.0, 0), 0.1);
    assert_eq!(factor(10.0, 1.0, 25), 0.25);
    assert_eq!(factor(30.0, 1.0, 25), 0.3);
    assert_eq!(factor(10.0, 2.0, 25), 0.5, "25 % of the time, to the power of 1/2");
    assert_eq!(factor(10.0, 2.0, 100), 1.0);
}

#[test]
fn endpoints_that_were_there_before_us_are_warm() {
    let mut world = warming(Simple::RoundRobin, Warmup { duration: seconds(100), ..Warmup::default() });
    world.pod(pod(1));
    let cluster = world.web();
    let counts = world.spread(&cluster, 1, 1000);
    assert_eq!(counts.values().copied().collect::<Vec<_>>(), [500, 500]);
}

#[test]
fn a_cluster_of_a_service_that_is_gone_is_forgotten_and_comes_back_anew() {
    let mut world = World::with_endpoints(1);
    let cluster = world.web();
    let held = cluster.pick(&PickContext::new(world.start), &mut world.rng).unwrap();
    world.index.remove_address(WEB);
    world.apply(1);
    assert_eq!(world.subset("").unwrap_err(), UnknownCluster::Service(WEB.into()));
    assert!(world.clusters.all().is_empty());
    drop(held);
    world.service(service());
    world.apply(2);
    assert!(!Arc::ptr_eq(&cluster, &world.subset("").unwrap()));
}

#[test]
fn counts_go_on_when_endpoints_and_policies_change() {
    let mut world = World::with_endpoints(2);
    let cluster = world.web();
    let held: Vec<_> =
        (0..6).map(|_| cluster.pick(&PickContext::new(world.start), &mut world.rng).unwrap()).collect();
    world.pod(pod(2));
    world.pod(weighted(0, 1));
    world.policy(balanced(simple(Simple::LeastRequest)));
    world.apply(1);
    let dump = cluster.dump(world.at(1));
    let active: Vec<_> =
        dump["endpoints"].as_array().unwrap().iter().map(|e| e["active"].as_u64().unwrap()).collect();
    assert_eq!(active.iter().sum::<u64>(), 6, "{dump:#}");
    drop(held);
    let dump = cluster.dump(world.at(1));
    assert!(dump["endpoints"].as_array().unwrap().iter().all(|e| e["active"] == 0), "{dump:#}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever the weights are, each endpoint gets its part in the long run.
    #[test]
    fn weights_hold_in_the_long_run(
        weights in prop::collection::vec(1_u32..50, 1..12),
        algorithm in prop::sample::select(vec![Simple::RoundRobin, Simple::Random, Simple::LeastRequest]),
        seed: u64,
    ) {
        let mut world = world(algorithm, weights.iter().enumerate().map(|(n, w)| weighted(n, *w)).collect());
        world.rng = fastrand::Rng::with_seed(seed);
        let cluster = world.web();
        let requests = 20_000;
        let counts = world.spread(&cluster, 0, requests);
        let sum: u32 = weights.iter().sum();
        for (n, weight) in weights.iter().enumerate() {
            let part = f64::from(*weight) / f64::from(sum);
            let got = *counts.get(&format!("web-{n}")).unwrap_or(&0) as f64 / requests as f64;
            // Five standard deviations of what chance alone does.
            let tolerance = 5.0 * (part * (1.0 - part) / requests as f64).sqrt() + 0.001;
            prop_assert!((got - part).abs() <= tolerance, "{algorithm:?} {n}: {got} instead of {part}");
        }
    }
}
