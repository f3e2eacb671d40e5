//! Many threads on one cluster: what is counted stays right whatever they do at the same time.

use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::*;

const THREADS: usize = 8;

/// Runs the same on many threads at once, with a number and a random source of their own.
fn together(work: impl Fn(usize, &mut fastrand::Rng) + Sync) {
    let barrier = Barrier::new(THREADS);
    std::thread::scope(|scope| {
        for n in 0..THREADS {
            let (barrier, work) = (&barrier, &work);
            scope.spawn(move || {
                barrier.wait();
                work(n, &mut fastrand::Rng::with_seed(n as u64));
            });
        }
    });
}

#[test]
fn limits_hold_and_counts_return_to_zero_under_load_and_changes() {
    let mut world = World::with_endpoints(10);
    let policy = |connections| l7::TrafficPolicy {
        connection_pool: Some(l7::ConnectionPool {
            max_connections: Some(connections),
            ..l7::ConnectionPool::default()
        }),
        outlier_detection: Some(l7::OutlierDetection {
            max_ejection_percent: Some(30),
            consecutive_5xx: Some(1),
            base_ejection_time: Some(prost_types::Duration { seconds: 0, nanos: 1_000_000 }),
            ..l7::OutlierDetection::default()
        }),
        ..l7::TrafficPolicy::default()
    };
    world.policy(policy(5));
    let cluster = world.web();
    let held = AtomicUsize::new(0);
    let clock = AtomicU64::new(0);
    // Two versions of the world that alternate: the policy, and one endpoint that comes and goes.
    let mut views = Vec::new();
    for n in 0..2 {
        world.policy(policy(5));
        if n == 1 {
            world.remove(9);
        }
        let destinations = Destinations::build(&world.resources, &world.own);
        let labels = world.resources.labels.clone();
        views.push(View::new(world.own.clone(), world.index.snapshot(), labels, destinations));
    }
    let (start, clusters) = (world.start, &world.clusters);
    together(|n, rng| {
        for round in 0..3000_u64 {
            let now = start + Duration::from_micros(clock.fetch_add(100, Ordering::SeqCst));
            if n == 0 && round % 10 == 0 {
                clusters.apply(views[(round / 10 % 2) as usize].clone(), now);
                continue;
            }
            let permit = cluster.admit(Limit::Connection, now);
            if permit.is_ok() {
                assert!(held.fetch_add(1, Ordering::SeqCst) < 5, "never more than five at a time");
            }
            let picked = cluster.pick(&PickContext::new(now), rng).unwrap();
            picked.report(if rng.u8(..) < 60 { Outcome::Status(500) } else { Outcome::Status(200) }, now);
            if permit.is_ok() {
                held.fetch_sub(1, Ordering::SeqCst);
            }
        }
    });
    let dump = cluster.dump(world.at(10_000_000));
    assert_eq!(dump["connections"], 0);
    assert!(dump["endpoints"].as_array().unwrap().iter().all(|e| e["active"] == 0), "{dump:#}");
    let context = PickContext::new(world.at(10_000_000));
    assert!(cluster.pick(&context, &mut world.rng).is_ok());
}

#[test]
fn of_many_who_see_the_last_failure_one_ejects() {
    let mut world = World::with_endpoints(10);
    world.policy(l7::TrafficPolicy { outlier_detection: Some(detecting()), ..l7::TrafficPolicy::default() });
    let cluster = world.web();
    let picked = cluster.pick(&PickContext::new(world.start), &mut world.rng).unwrap();
    together(|_, _| {
        for _ in 0..100 {
            picked.report(Outcome::Status(500), world.start);
        }
    });
    let dump = cluster.dump(world.start);
    let ejections: u64 = dump["endpoints"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| e["outlier"]["ejections"].as_u64().unwrap())
        .sum();
    assert_eq!(ejections, 1, "{dump:#}");
}

#[test]
fn threads_that_ask_for_a_new_cluster_at_once_get_the_same_one() {
    let mut world = World::with_endpoints(3);
    world.apply(0);
    let found = std::sync::Mutex::new(Vec::new());
    together(|_, _| {
        let cluster = world.subset("").unwrap();
        found.lock().unwrap().push(cluster);
    });
    let found = found.into_inner().unwrap();
    assert!(found.iter().all(|cluster| Arc::ptr_eq(cluster, &found[0])));
}

#[test]
fn a_token_is_given_once() {
    let start = Instant::now();
    for per_identity in [false, true] {
        let limit = l7::RateLimit { tokens: 1000, per: seconds(1000), burst: 1000, per_identity };
        let limiter = RateLimiter::new(&limit, start);
        let passed = AtomicUsize::new(0);
        together(|_, _| {
            for _ in 0..1000 {
                if limiter.check(Some("spiffe://cluster.local/ns/a/sa/b"), start).is_ok() {
                    passed.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        assert_eq!(passed.into_inner(), 1000, "per identity: {per_identity}");
    }
}

#[test]
fn turns_of_round_robin_are_shared_evenly_between_threads() {
    let mut world = World::with_endpoints(4);
    world.policy(balanced(simple(l7::load_balancer::Simple::RoundRobin)));
    let cluster = world.web();
    together(|_, rng| {
        for _ in 0..1000 {
            cluster.pick(&PickContext::new(world.start), rng).unwrap();
        }
    });
    let dump = cluster.dump(world.start);
    for endpoint in dump["endpoints"].as_array().unwrap() {
        assert_eq!(endpoint["requests"], THREADS * 1000 / 4, "{dump:#}");
    }
}
