//! Outlier detection.

use proptest::prelude::*;

use super::*;

const ERROR: Outcome = Outcome::Status(500);
const GATEWAY: Outcome = Outcome::Status(503);
const OK: Outcome = Outcome::Status(200);

fn world(count: usize, outlier: l7::OutlierDetection) -> (World, Arc<Cluster>) {
    let mut world = World::with_endpoints(count);
    world.policy(l7::TrafficPolicy { outlier_detection: Some(outlier), ..l7::TrafficPolicy::default() });
    let cluster = world.web();
    (world, cluster)
}

/// Whether endpoint 0 of two is ejected by these outcomes.
fn ejects(outlier: l7::OutlierDetection, outcomes: &[Outcome]) -> bool {
    let (mut world, cluster) = world(2, outlier);
    world.report(&cluster, 0, outcomes, 0);
    match world.used(&cluster, 1).len() {
        1 => true,
        2 => false,
        other => panic!("{other} endpoints"),
    }
}

#[test]
fn five_errors_in_a_row_eject_and_a_success_starts_the_count_anew() {
    assert!(!ejects(detecting(), &[ERROR; 4]));
    assert!(ejects(detecting(), &[ERROR; 5]));
    assert!(ejects(detecting(), &[Outcome::Status(500), Outcome::Status(503), ERROR, GATEWAY, ERROR]));
    assert!(!ejects(detecting(), &[ERROR, ERROR, ERROR, ERROR, OK, ERROR, ERROR, ERROR, ERROR]));
    assert!(!ejects(detecting(), &[ERROR, ERROR, ERROR, ERROR, Outcome::Status(404), ERROR]), "no 5xx");
}

#[test]
fn gateway_errors_have_a_limit_of_their_own() {
    let outlier = || l7::OutlierDetection {
        consecutive_5xx: Some(0),
        consecutive_gateway_errors: Some(3),
        ..detecting()
    };
    assert!(ejects(outlier(), &[GATEWAY; 3]));
    assert!(ejects(outlier(), &[Outcome::Status(502), Outcome::Status(504), GATEWAY]));
    assert!(!ejects(outlier(), &[GATEWAY, GATEWAY, ERROR, GATEWAY, GATEWAY]), "another error is not one");
    assert!(!ejects(outlier(), &[GATEWAY, GATEWAY, OK, GATEWAY]));
    assert!(!ejects(outlier(), &[ERROR; 20]), "0 turns the other off");
    assert!(
        !ejects(outlier(), &[Outcome::Status(501); 20]) && !ejects(outlier(), &[Outcome::Status(505); 20])
    );
    let both = l7::OutlierDetection { consecutive_5xx: Some(5), ..outlier() };
    assert!(ejects(both, &[GATEWAY; 3]), "the smaller one is reached first");
}

#[test]
fn failures_of_connections_count_as_503_and_timeouts_as_504_unless_they_are_split() {
    let (failed, late) = (Outcome::ConnectionFailed, Outcome::TimedOut);
    let gateway = l7::OutlierDetection { consecutive_gateway_errors: Some(2), ..detecting() };
    assert!(ejects(gateway, &[failed, late]));
    assert!(ejects(detecting(), &[failed, late, ERROR, failed, failed]));
    assert!(
        ejects(detecting(), &[failed, failed, failed, failed, Outcome::Connected, failed]),
        "not a success"
    );

    let split = || l7::OutlierDetection {
        split_local_errors: true,
        consecutive_5xx: Some(5),
        consecutive_local_failures: Some(2),
        ..detecting()
    };
    assert!(ejects(split(), &[failed, late]));
    assert!(!ejects(split(), &[failed, Outcome::Connected, failed]), "a connection starts the count anew");
    assert!(!ejects(split(), &[failed, ERROR, ERROR, ERROR, ERROR]), "counted apart");
    assert!(ejects(split(), &[failed, OK, failed]), "an answer says nothing of connections");
    let off = l7::OutlierDetection { consecutive_local_failures: Some(0), ..split() };
    assert!(!ejects(off, &[failed; 20]));
}

#[test]
fn grpc_statuses_count_as_the_http_statuses_that_they_stand_for() {
    let statuses: Vec<_> = [0, 1, 2, 5, 7, 13, 14, 16].map(Outcome::grpc).into();
    let expected = [200, 499, 500, 404, 403, 500, 503, 401].map(Outcome::Status);
    assert_eq!(statuses, expected);
}

#[test]
fn the_share_of_ejected_endpoints_stays_below_its_maximum() {
    let (mut world, cluster) = world(3, l7::OutlierDetection::default());
    world.report(&cluster, 0, &[ERROR; 5], 0);
    assert_eq!(world.used(&cluster, 1).len(), 3, "one of three is more than 10 %");
    assert_eq!(cluster.dump(world.at(1))["ejectionsNotAllowed"], 1);

    let half = l7::OutlierDetection { max_ejection_percent: Some(50), ..l7::OutlierDetection::default() };
    let (mut world, cluster) = self::world(4, half);
    for n in 0..2 {
        world.report(&cluster, n, &[ERROR; 5], 0);
    }
    assert_eq!(world.used(&cluster, 1), ["web-2", "web-3"]);
    world.report(&cluster, 2, &[ERROR; 5], 1);
    assert_eq!(world.used(&cluster, 2), ["web-2", "web-3"]);
    world.report(&cluster, 2, &[ERROR; 5], 30_002);
    assert_eq!(
        world.used(&cluster, 30_003),
        ["web-0", "web-1", "web-3"],
        "the count began anew, and there is room"
    );
}

#[test]
fn an_ejection_takes_the_base_time_as_often_as_there_were_ejections() {
    let (mut world, cluster) = world(2, detecting());
    let is_out = |world: &mut World, millis| world.used(&cluster, millis) == ["web-1"];
    let mut now = 0;
    for times in 1..=4 {
        world.report(&cluster, 0, &[ERROR; 5], now);
        assert!(is_out(&mut world, now + 1));
        assert!(is_out(&mut world, now + times * 30_000 - 1), "ejection {times}");
        assert!(!is_out(&mut world, now + times * 30_000));
        now += times * 30_000;
    }
}

#[test]
fn each_interval_without_an_ejection_forgives_one() {
    let (mut world, cluster) = world(2, detecting());
    let mut eject = |now| {
        world.report(&cluster, 0, &[ERROR; 5], now);
        cluster.dump(world.at(now))["endpoints"]
            .as_array()
            .unwrap()
            .iter()
            .find_map(|e| Some(e["outlier"]["ejected_for_ms"].as_u64().unwrap()).filter(|ms| *ms > 0))
            .unwrap()
    };
    assert_eq!(eject(0), 30_000);
    assert_eq!(eject(30_000), 60_000);
    assert_eq!(eject(90_000), 90_000);
    assert_eq!(eject(180_000 + 9_999), 120_000, "less than an interval");
    assert_eq!(eject(309_999 + 20_000), 90_000, "two intervals: from 4 to 2, and one more");
    assert_eq!(eject(10_000_000), 30_000);
}

#[test]
fn an_ejection_is_never_longer_than_five_minutes_or_its_base_time() {
    let longest = |base| {
        let (mut world, cluster) =
            world(2, l7::OutlierDetection { base_ejection_time: seconds(base), ..detecting() });
        let mut now = 0;
        let mut last = 0;
        for _ in 0..30 {
            world.report(&cluster, 0, &[ERROR; 5], now);
            let dump = cluster.dump(world.at(now));
            let of = |e: &serde_json::Value| e["outlier"]["ejected_for_ms"].as_u64().unwrap();
            last = dump["endpoints"].as_array().unwrap().iter().map(of).max().unwrap();
            now += last;
        }
        last
    };
    assert_eq!(longest(30), 300_000);
    assert_eq!(longest(1000), 1_000_000);
}

#[test]
fn with_too_few_left_ejections_are_disregarded() {
    let outlier = l7::OutlierDetection { min_health_percent: Some(50), ..detecting() };
    let (mut world, cluster) = world(4, outlier);
    for n in 0..2 {
        world.report(&cluster, n, &[ERROR; 5], 0);
    }
    assert_eq!(world.used(&cluster, 1), ["web-2", "web-3"], "half are left");
    world.report(&cluster, 2, &[ERROR; 5], 0);
    assert_eq!(world.used(&cluster, 1), ["web-0", "web-1", "web-2", "web-3"], "a quarter is");
}

#[test]
fn when_all_are_ejected_and_nothing_panics_there_is_no_endpoint() {
    let (mut world, cluster) = world(2, detecting());
    let now = world.start;
    let picks: Vec<_> =
        (0..2).map(|_| cluster.pick(&PickContext::new(now), &mut world.rng).unwrap()).collect();
    assert_ne!(name(&picks[0]), name(&picks[1]));
    for picked in &picks {
        for _ in 0..5 {
            picked.report(ERROR, now);
        }
    }
    let error = cluster.pick(&PickContext::new(now), &mut world.rng).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("no healthy endpoint of {WEB}:80: 2 endpoints, 2 ejected by outlier detection")
    );
}

#[test]
fn ejections_outlive_changes_of_endpoints_but_not_the_end_of_the_policy() {
    let (mut world, cluster) = world(3, detecting());
    world.report(&cluster, 0, &[ERROR; 5], 0);
    world.pod(pod(3));
    world.apply(1);
    assert_eq!(world.used(&cluster, 1), ["web-1", "web-2", "web-3"]);
    world.resources.destinations.clear();
    world.apply(2);
    assert_eq!(world.used(&cluster, 2).len(), 4);
}

#[test]
fn what_one_thread_has_seen_to_end_does_not_begin_again_by_another_threads_clock() {
    let (mut world, cluster) =
        world(4, l7::OutlierDetection { max_ejection_percent: Some(25), ..detecting() });
    world.report(&cluster, 0, &[ERROR; 5], 0);
    assert_eq!(world.used(&cluster, 30_000).len(), 4, "over");
    world.report(&cluster, 1, &[ERROR; 5], 29_000);
    assert_eq!(world.used(&cluster, 29_000), ["web-0", "web-2", "web-3"]);
    assert_eq!(world.used(&cluster, 59_999), ["web-0", "web-2", "web-3"], "from the later clock on");
    assert_eq!(world.used(&cluster, 60_000).len(), 4);
}

#[test]
fn an_endpoint_that_went_and_came_back_is_a_new_one() {
    let (mut world, cluster) = world(3, detecting());
    world.report(&cluster, 0, &[ERROR; 5], 0);
    world.remove(0);
    world.apply(1);
    world.pod(pod(0));
    world.apply(2);
    assert_eq!(world.used(&cluster, 2).len(), 3);
}

#[test]
fn what_is_reported_of_an_endpoint_that_is_gone_ejects_nobody() {
    let (mut world, cluster) = world(2, detecting());
    let picked = cluster.pick(&PickContext::new(world.start), &mut world.rng).unwrap();
    let n = if name(&picked) == "web-0" { 0 } else { 1 };
    world.remove(n);
    world.apply(1);
    for _ in 0..5 {
        picked.report(ERROR, world.at(1));
    }
    assert_eq!(world.used(&cluster, 1), [format!("web-{}", 1 - n)]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever fails in whatever order: never more endpoints are out than the maximum allows.
    #[test]
    fn ejections_never_exceed_their_maximum(
        count in 1_usize..20,
        percent in 1_u32..=100,
        steps in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>(), 0_u64..20_000), 1..150),
    ) {
        let outlier = l7::OutlierDetection {
            max_ejection_percent: Some(percent),
            consecutive_5xx: Some(1),
            ..l7::OutlierDetection::default()
        };
        let (mut world, cluster) = world(count, outlier);
        let context = PickContext::new(world.start);
        let mut picks = std::collections::BTreeMap::new();
        while picks.len() < count {
            let picked = cluster.pick(&context, &mut world.rng).unwrap();
            picks.insert(name(&picked), picked);
        }
        let picks: Vec<_> = picks.into_values().collect();
        let mut now = 0;
        for (at, fails, later) in steps {
            now += later;
            picks[at.index(count)].report(if fails { ERROR } else { OK }, world.at(now));
            let dump = cluster.dump(world.at(now));
            let out = dump["endpoints"].as_array().unwrap();
            let out = out.iter().filter(|e| e["outlier"]["ejected_for_ms"] != 0).count();
            prop_assert!(out * 100 <= percent as usize * count, "{out} of {count} at {percent} %");
            if out < count {
                prop_assert!(cluster.pick(&PickContext::new(world.at(now)), &mut world.rng).is_ok());
            }
        }
    }
}
