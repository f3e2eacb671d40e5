//! Circuit breaking.

use proptest::prelude::*;

use super::*;

fn limited(pool: l7::ConnectionPool, retry_budget: Option<l7::RetryBudget>) -> (World, Arc<Cluster>) {
    let mut world = World::with_endpoints(1);
    world.policy(l7::TrafficPolicy {
        connection_pool: Some(pool),
        retry_budget,
        ..l7::TrafficPolicy::default()
    });
    let cluster = world.web();
    (world, cluster)
}

fn pool() -> l7::ConnectionPool {
    l7::ConnectionPool {
        max_connections: Some(1),
        http1_max_pending_requests: Some(2),
        http2_max_requests: Some(3),
        max_retries: Some(4),
        ..l7::ConnectionPool::default()
    }
}

#[test]
fn each_limit_holds_and_a_permit_that_is_dropped_makes_room() {
    let (world, cluster) = limited(pool(), None);
    for (limit, max) in [(Limit::Connection, 1), (Limit::Pending, 2), (Limit::Request, 3), (Limit::Retry, 4)]
    {
        let mut permits: Vec<_> = (0..max).map(|_| cluster.admit(limit, world.start).unwrap()).collect();
        let overflow = cluster.admit(limit, world.start).unwrap_err();
        assert_eq!(overflow, Overflow { cluster: format!("{WEB}:80"), limit, max });
        permits.pop();
        permits.push(cluster.admit(limit, world.start).unwrap());
        assert!(cluster.admit(limit, world.start).is_err());
    }
    let error = {
        let _one = cluster.admit(Limit::Connection, world.start).unwrap();
        cluster.admit(Limit::Connection, world.start).unwrap_err()
    };
    assert_eq!(error.to_string(), format!("{WEB}:80 has reached maxConnections (1)"));
}

#[test]
fn without_limits_everything_is_admitted_and_counted() {
    let mut world = World::with_endpoints(1);
    let cluster = world.web();
    let permits: Vec<_> = (0..5000).map(|_| cluster.admit(Limit::Request, world.start).unwrap()).collect();
    assert_eq!(cluster.dump(world.start)["requests"], 5000);
    drop(permits);
    assert_eq!(cluster.dump(world.start)["requests"], 0);
}

#[test]
fn a_limit_that_is_lowered_counts_what_is_there_already() {
    let (mut world, cluster) = limited(pool(), None);
    let mut permits: Vec<_> = (0..3).map(|_| cluster.admit(Limit::Request, world.start).unwrap()).collect();
    let lower = l7::ConnectionPool { http2_max_requests: Some(2), ..pool() };
    world.policy(l7::TrafficPolicy { connection_pool: Some(lower), ..l7::TrafficPolicy::default() });
    world.apply(1);
    assert!(cluster.admit(Limit::Request, world.start).is_err());
    permits.truncate(2);
    assert!(cluster.admit(Limit::Request, world.start).is_err());
    permits.truncate(1);
    assert!(cluster.admit(Limit::Request, world.start).is_ok());
}

#[test]
fn a_retry_budget_takes_the_place_of_max_retries() {
    let budget = l7::RetryBudget { percent: Some(20.0), ..l7::RetryBudget::default() };
    let (world, cluster) = limited(l7::ConnectionPool { max_retries: Some(1), ..pool() }, Some(budget));
    let admit = |limit| cluster.admit(limit, world.start);
    let retries: Vec<_> = (0..3).map(|_| admit(Limit::Retry).unwrap()).collect();
    assert_eq!(admit(Limit::Retry).unwrap_err().max, 3, "the minimum");
    drop(retries);
    let budget = l7::RetryBudget { percent: Some(20.0), ..l7::RetryBudget::default() };
    let (world, cluster) = limited(l7::ConnectionPool::default(), Some(budget));
    let admit = |limit| cluster.admit(limit, world.start);
    let requests: Vec<_> = (0..40).map(|_| admit(Limit::Request).unwrap()).collect();
    let _pending: Vec<_> = (0..10).map(|_| admit(Limit::Pending).unwrap()).collect();
    let retries: Vec<_> = (0..10).map(|_| admit(Limit::Retry).unwrap()).collect();
    assert_eq!(admit(Limit::Retry).unwrap_err().max, 10, "20 % of 40 requests and 10 that wait");
    drop((requests, retries));
    assert_eq!(admit(Limit::Retry).map(drop), Ok(()));
}

#[test]
fn a_retry_budget_with_an_interval_also_counts_requests_that_are_over() {
    let budget = l7::RetryBudget { percent: Some(10.0), interval: seconds(10), min_concurrency: Some(1) };
    let (world, cluster) = limited(l7::ConnectionPool::default(), Some(budget));
    let allowed = |millis| {
        let mut retries = Vec::new();
        loop {
            match cluster.admit(Limit::Retry, world.at(millis)) {
                Ok(permit) => retries.push(permit),
                Err(overflow) => break overflow.max,
            }
        }
    };
    for _ in 0..100 {
        cluster.admit(Limit::Request, world.at(10_000)).unwrap();
    }
    assert_eq!(allowed(10_000), 10, "10 % of a hundred");
    assert_eq!(allowed(19_000), 10);
    assert!((4..=6).contains(&allowed(25_000)), "half of the interval before");
    assert_eq!(allowed(40_000), 1, "the minimum");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever comes and goes in whatever order: nothing is left when all is dropped, and no limit is ever exceeded.
    #[test]
    fn counts_never_leak(steps in prop::collection::vec((0_usize..6, any::<prop::sample::Index>()), 0..200)) {
        let (mut world, cluster) = limited(pool(), None);
        let (mut permits, mut picks) = (Vec::new(), Vec::new());
        let limits = [Limit::Connection, Limit::Pending, Limit::Request, Limit::Retry];
        for (step, at) in steps {
            match step {
                0..=3 => permits.extend(cluster.admit(limits[step], world.start).ok()),
                4 => picks.push(cluster.pick(&PickContext::new(world.start), &mut world.rng).unwrap()),
                _ if !permits.is_empty() => drop(permits.swap_remove(at.index(permits.len()))),
                _ if !picks.is_empty() => drop(picks.swap_remove(at.index(picks.len()))),
                _ => {}
            }
            let dump = cluster.dump(world.start);
            for (name, max) in [("connections", 1), ("pending", 2), ("requests", 3), ("retries", 4)] {
                prop_assert!(dump[name].as_u64().unwrap() <= max, "{dump:#}");
            }
            prop_assert_eq!(dump["endpoints"][0]["active"].as_u64().unwrap(), picks.len() as u64);
        }
        drop((permits, picks));
        let dump = cluster.dump(world.start);
        for name in ["connections", "pending", "requests", "retries"] {
            prop_assert_eq!(&dump[name], 0);
        }
        prop_assert_eq!(&dump["endpoints"][0]["active"], 0);
    }
}
