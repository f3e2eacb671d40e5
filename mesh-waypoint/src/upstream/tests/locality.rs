//! Near and far.

use super::*;
use l7::locality_setting::{Distribute, Failover};
use wire::load_balancing::{Mode, Scope};

const PLACES: [&str; 8] = ["r1/a/1", "r1/a/1", "r1/a/2", "r1/a/2", "r1/b/1", "r1/b/1", "r2/a/1", "r3/a/1"];

fn world(places: &[&str]) -> World {
    let mut world = World::with_endpoints(0);
    for (n, place) in places.iter().enumerate() {
        world.pod(placed(n, place));
    }
    world
}

fn setting(setting: l7::LocalitySetting, outlier: bool) -> l7::TrafficPolicy {
    l7::TrafficPolicy {
        outlier_detection: outlier.then(detecting),
        ..balanced(l7::LoadBalancer { locality: Some(setting), ..l7::LoadBalancer::default() })
    }
}

/// Ejects these endpoints, and gives the names of those that get requests then.
fn without(world: &mut World, cluster: &Arc<Cluster>, out: &[usize]) -> Vec<String> {
    for n in out {
        world.report(cluster, *n, &[Outcome::Status(500); 5], 0);
    }
    world.used(cluster, 1)
}

fn names(numbers: impl IntoIterator<Item = usize>) -> Vec<String> {
    numbers.into_iter().map(|n| format!("web-{n}")).collect()
}

#[test]
fn requests_stay_near_and_go_further_step_by_step_when_what_is_near_fails() {
    let mut world = world(&PLACES);
    world.policy(setting(l7::LocalitySetting::default(), true));
    let cluster = world.web();
    assert_eq!(world.used(&cluster, 0), names([0, 1]), "subzone");
    assert_eq!(without(&mut world, &cluster, &[0, 1]), names([2, 3]), "zone");
    assert_eq!(without(&mut world, &cluster, &[2, 3]), names([4, 5]), "region");
    assert_eq!(without(&mut world, &cluster, &[4, 5]), names([6, 7]), "elsewhere");
    assert_eq!(world.used(&cluster, 30_001), names([0, 1]), "and back");
}

#[test]
fn the_mesh_fails_over_between_localities_unless_it_says_otherwise() {
    let policy =
        || l7::TrafficPolicy { outlier_detection: Some(detecting()), ..l7::TrafficPolicy::default() };
    let mut world = world(&PLACES);
    world.policy(policy());
    let cluster = world.web();
    assert_eq!(world.used(&cluster, 0), names([0, 1]));
    world.settings(|settings| {
        settings.locality =
            Some(l7::LocalitySetting { enabled: Some(false), ..l7::LocalitySetting::default() });
    });
    world.apply(0);
    assert_eq!(world.used(&cluster, 0), names(0..8));
    world.policy(setting(l7::LocalitySetting::default(), true));
    world.apply(0);
    assert_eq!(world.used(&cluster, 0), names([0, 1]), "the rule says so for its host");
    world.settings(|settings| settings.locality = None);
    let off = l7::LocalitySetting { enabled: Some(false), ..l7::LocalitySetting::default() };
    world.policy(setting(off, true));
    world.apply(0);
    assert_eq!(world.used(&cluster, 0), names(0..8));
}

#[test]
fn without_outlier_detection_localities_do_not_matter() {
    let mut world = world(&PLACES);
    world.policy(setting(l7::LocalitySetting::default(), false));
    let cluster = world.web();
    assert_eq!(world.used(&cluster, 0), names(0..8));
}

#[test]
fn a_level_that_lost_a_few_still_takes_everything_and_then_what_it_can() {
    let places: Vec<_> = (0..20).map(|n| if n < 10 { "r1/a/1" } else { "r2/a/1" }).collect();
    let mut world = world(&places);
    world.policy(setting(l7::LocalitySetting::default(), true));
    let cluster = world.web();
    let far = |world: &mut World, out: &[usize]| {
        without(world, &cluster, out);
        let counts = world.spread(&cluster, 1, 4000);
        let far: usize = counts.iter().filter(|(name, _)| name.len() == 6).map(|(_, count)| count).sum();
        far as f64 / 4000.0
    };
    assert_eq!(far(&mut world, &[0, 1]), 0.0, "8 of 10, times 1.4");
    let part = far(&mut world, &[2, 3, 4, 5]);
    assert!((0.40..0.48).contains(&part), "4 of 10 take 56 %: {part}");
}

#[test]
fn failover_rules_send_a_region_to_another_one() {
    let mut world = world(&["r1/a/1", "r2/a/1", "r3/a/1"]);
    let failover = vec![Failover { from: "r1".into(), to: "r3".into() }];
    world.policy(setting(l7::LocalitySetting { failover, ..l7::LocalitySetting::default() }, true));
    let cluster = world.web();
    assert_eq!(world.used(&cluster, 0), names([0]));
    assert_eq!(without(&mut world, &cluster, &[0]), names([2]));
    assert_eq!(without(&mut world, &cluster, &[2]), names([1]));
}

#[test]
fn failover_priority_goes_by_the_labels_that_are_shared_in_their_order() {
    let mut world = world(&["r1/a/1", "r1/a/1", "r1/b/1", "r2/a/1"]);
    let failover_priority = vec!["topology.kubernetes.io/region".into(), "version=v2".into()];
    world.policy(setting(l7::LocalitySetting { failover_priority, ..l7::LocalitySetting::default() }, true));
    for (n, version) in ["v1", "v2", "v2", "v2"].into_iter().enumerate() {
        world.labels(n, &[("version", version)]);
    }
    let cluster = world.web();
    assert_eq!(world.used(&cluster, 0), names([1, 2]), "region and version");
    assert_eq!(without(&mut world, &cluster, &[1, 2]), names([0]), "region");
    assert_eq!(
        without(&mut world, &cluster, &[0]),
        names([3]),
        "a label after one that differs does not count"
    );
}

#[test]
fn failover_priority_by_a_label_of_our_own_compares_it_with_the_waypoints() {
    let mut world = world(&["r1/a/1", "r1/a/1"]);
    let waypoint = wire::Workload {
        uid: "Kubernetes//Pod/shop/waypoint-1".into(),
        name: "waypoint-1".into(),
        workload_name: "waypoint".into(),
        node: "n1".into(),
        services: Default::default(),
        addresses: vec![bytes("10.5.0.1")],
        ..pod(0)
    };
    world.pod(waypoint);
    let own: Labels = [("track".to_owned(), "blue".to_owned())].into();
    Arc::make_mut(&mut world.resources.labels)
        .insert("Kubernetes//Pod/shop/waypoint-1".into(), Arc::new(own));
    world.labels(0, &[("track", "green")]);
    world.labels(1, &[("track", "blue")]);
    let failover_priority = vec!["track".into()];
    world.policy(setting(l7::LocalitySetting { failover_priority, ..l7::LocalitySetting::default() }, true));
    let cluster = world.web();
    assert_eq!(world.used(&cluster, 0), names([1]));
    world.labels(0, &[("track", "blue")]);
    world.apply(1);
    assert_eq!(world.used(&cluster, 1), names([0, 1]), "labels that change are seen");
}

fn distribute(rules: &[(&str, &[(&str, u32)])]) -> l7::LocalitySetting {
    let distribute = rules.iter().map(|(from, to)| Distribute {
        from: (*from).into(),
        to: to.iter().map(|(to, share)| ((*to).to_owned(), *share)).collect(),
    });
    l7::LocalitySetting { distribute: distribute.collect(), ..l7::LocalitySetting::default() }
}

fn share(world: &mut World, cluster: &Arc<Cluster>, of: &[usize]) -> f64 {
    let counts = world.spread(cluster, 1, 8000);
    of.iter().map(|n| counts.get(&format!("web-{n}")).copied().unwrap_or_default()).sum::<usize>() as f64
        / 8000.0
}

#[test]
fn a_distribution_gives_each_locality_its_share_and_others_nothing() {
    let mut world = world(&PLACES);
    let rules = distribute(&[
        ("r9/*", &[("r9/*", 100)]),
        ("r1/a/*", &[("r1/a/*", 70), ("r1/b/1", 20), ("r2/*", 10)]),
        ("r1/*", &[("r3/*", 100)]),
    ]);
    world.policy(setting(rules, false));
    let cluster = world.web();
    let shares = [&[0, 1, 2, 3][..], &[4, 5], &[6], &[7]].map(|of| share(&mut world, &cluster, of));
    for (got, wanted) in shares.into_iter().zip([0.7, 0.2, 0.1, 0.0]) {
        assert!((got - wanted).abs() < 0.03, "{shares:?}");
    }
    let dump = cluster.dump(world.start);
    assert_eq!(dump["leftOut"]["out_of_scope"], 1);
}

#[test]
fn the_share_of_a_locality_without_endpoints_goes_to_the_others_in_proportion() {
    let mut world = world(&["r1/a/1", "r2/a/1"]);
    world.policy(setting(distribute(&[("r1/*", &[("r1/*", 30), ("r2/*", 10), ("r9/*", 60)])]), false));
    let cluster = world.web();
    let near = share(&mut world, &cluster, &[0]);
    assert!((near - 0.75).abs() < 0.03, "{near}");
}

#[test]
fn a_distribution_from_elsewhere_leaves_all_alike() {
    let mut world = world(&PLACES);
    world.policy(setting(distribute(&[("r2/*", &[("r2/*", 100)])]), true));
    let cluster = world.web();
    assert_eq!(world.used(&cluster, 0), names(0..8));
}

#[test]
fn a_locality_that_lost_endpoints_gets_less_of_a_distribution() {
    let mut world = world(&["r1/a/1", "r1/a/1", "r1/a/1", "r1/a/1", "r2/a/1"]);
    world.policy(setting(distribute(&[("r1/*", &[("r1/*", 50), ("r2/*", 50)])]), true));
    let cluster = world.web();
    let near = |world: &mut World| share(world, &cluster, &[0, 1, 2, 3]);
    assert!((near(&mut world) - 0.5).abs() < 0.03);
    without(&mut world, &cluster, &[0]);
    assert!((near(&mut world) - 0.5).abs() < 0.03, "three quarters, times 1.4, are enough");
    without(&mut world, &cluster, &[1, 2]);
    // 0.25 x 1.4 = 0.35 of 50 beside 50.
    let got = near(&mut world);
    assert!((got - 0.35 / 1.35).abs() < 0.03, "{got}");
}

fn scoped(mode: Mode, scopes: &[Scope]) -> wire::Service {
    let load_balancing = wire::LoadBalancing {
        mode: mode.into(),
        routing_preference: scopes.iter().map(|scope| (*scope).into()).collect(),
        ..wire::LoadBalancing::default()
    };
    wire::Service { load_balancing: Some(load_balancing), ..service() }
}

#[test]
fn a_services_traffic_distribution_holds_without_a_rule_and_fails_over() {
    let mut world = world(&PLACES);
    world.service(scoped(Mode::Failover, &[Scope::Network, Scope::Region, Scope::Zone]));
    let cluster = world.web();
    assert_eq!(world.used(&cluster, 0), names(0..4));
    for n in 0..4 {
        world.remove(n);
    }
    world.apply(1);
    assert_eq!(world.used(&cluster, 1), names([4, 5]));
    world.policy(setting(distribute(&[("*", &[("*", 100)])]), false));
    world.apply(2);
    assert_eq!(world.used(&cluster, 2), names(4..8), "what the rule says about localities comes first");
}

#[test]
fn a_strict_service_uses_only_what_is_in_scope() {
    let mut world = world(&PLACES);
    world.pod(wire::Workload { node: "n1".into(), ..placed(7, "r3/a/1") });
    world.service(scoped(Mode::Strict, &[Scope::Node]));
    let cluster = world.web();
    assert_eq!(world.used(&cluster, 0), names([7]));
    world.remove(7);
    world.apply(1);
    let error = cluster.pick(&PickContext::new(world.at(1)), &mut world.rng).unwrap_err();
    assert_eq!(error.left_out, LeftOut { endpoints: 7, out_of_scope: 7, ..LeftOut::default() });
}

#[test]
fn the_cluster_scope_compares_with_the_cluster_of_the_waypoint() {
    let mut world = world(&["r1/a/1"]);
    world.pod(wire::Workload { cluster_id: "west".into(), ..placed(1, "r1/a/1") });
    world.service(scoped(Mode::Strict, &[Scope::Cluster]));
    let cluster = world.web();
    assert_eq!(world.used(&cluster, 0), names([0]), "the default cluster");
    world.pod(wire::Workload {
        uid: "west//Pod/shop/waypoint-1".into(),
        name: "waypoint-1".into(),
        workload_name: "waypoint".into(),
        cluster_id: "west".into(),
        services: Default::default(),
        addresses: vec![bytes("10.5.0.1")],
        ..pod(0)
    });
    world.apply(1);
    assert_eq!(world.used(&cluster, 1), names([1]));
}

#[test]
fn a_service_that_asks_for_no_choice_gets_the_clients_destination() {
    let mut world = world(&["r1/a/1"]);
    world.service(scoped(Mode::Passthrough, &[]));
    let cluster = world.web();
    let original = "192.0.2.7:443".parse().unwrap();
    let context = PickContext { original: Some(original), ..PickContext::new(world.start) };
    let picked = cluster.pick(&context, &mut world.rng).unwrap();
    assert_eq!(picked.endpoint().route.dial, mesh_core::route::Dial::Address(original));
}

fn zone_aware(min_cluster_size: u32) -> l7::TrafficPolicy {
    let zone_aware = Some(l7::load_balancer::ZoneAware { enabled: true, min_cluster_size });
    balanced(l7::LoadBalancer { zone_aware, ..l7::LoadBalancer::default() })
}

fn replica(world: &mut World, n: usize, zone: &str) {
    world.pod(wire::Workload {
        uid: format!("Kubernetes//Pod/shop/waypoint-{n}"),
        name: format!("waypoint-{n}"),
        workload_name: "waypoint".into(),
        services: Default::default(),
        addresses: vec![bytes(&format!("10.5.0.{n}"))],
        ..placed(n, zone)
    });
}

#[test]
fn zone_aware_requests_stay_in_the_zone_as_far_as_it_can_take_them() {
    let mut world = world(&["r1/a/1", "r1/a/1", "r1/b/1", "r1/b/1", "r1/b/1", "r1/b/1"]);
    replica(&mut world, 1, "r1/a/1");
    replica(&mut world, 2, "r1/b/1");
    world.policy(zone_aware(6));
    let cluster = world.web();
    // Half of the replicas, a third of the endpoints: two thirds of our requests stay.
    let here = share(&mut world, &cluster, &[0, 1]);
    assert!((here - 2.0 / 3.0).abs() < 0.03, "{here}");
    world.pod(placed(6, "r1/a/1"));
    world.pod(placed(7, "r1/a/1"));
    world.apply(1);
    assert_eq!(world.used(&cluster, 1), names([0, 1, 6, 7]), "half of the endpoints: all stay");
    world.policy(zone_aware(9));
    world.apply(2);
    assert_eq!(world.used(&cluster, 2), names(0..8), "too small a cluster");
}

#[test]
fn zone_aware_without_replicas_or_endpoints_in_the_zone_leaves_all_alike() {
    let mut world = world(&["r1/b/1", "r1/b/1", "r1/c/1", "r1/c/1", "r1/c/1", "r1/c/1"]);
    world.policy(zone_aware(0));
    let cluster = world.web();
    let part = share(&mut world, &cluster, &[0, 1]);
    assert!((part - 1.0 / 3.0).abs() < 0.03, "{part}");
    world.pod(placed(0, "r1/a/1"));
    world.apply(1);
    let here = share(&mut world, &cluster, &[0]);
    assert!((here - 1.0 / 6.0).abs() < 0.03, "with one replica, as far as anybody knows: {here}");
}

#[test]
fn a_retry_may_leave_its_locality() {
    let mut world = world(&["r1/a/1", "r1/a/1", "r2/a/1"]);
    world.policy(setting(l7::LocalitySetting::default(), true));
    let cluster = world.web();
    let first = cluster.pick(&PickContext::new(world.start), &mut world.rng).unwrap();
    let tried = [first.tried()];
    let stay = PickContext { tried: &tried, ..PickContext::new(world.start) };
    assert_ne!(world.pick_with(&cluster, &stay), "web-2");
    let leave = PickContext { leave_localities: true, ..stay };
    assert_eq!(world.pick_with(&cluster, &leave), "web-2");
    assert_eq!(world.pick_with(&cluster, &PickContext { avoid_tried: false, ..leave }), "web-2");
    world.remove(2);
    world.apply(1);
    assert_ne!(world.pick_with(&cluster, &leave), name(&first), "nothing elsewhere: the other one here");
}
