//! Token buckets.

use proptest::prelude::*;

use super::*;

fn limit(tokens: u32, per: i64, burst: u32) -> l7::RateLimit {
    l7::RateLimit { tokens, per: seconds(per), burst, per_identity: false }
}

fn allowed(limiter: &RateLimiter, identity: Option<&str>, now: Instant) -> usize {
    (0..10_000).take_while(|_| limiter.check(identity, now).is_ok()).count()
}

#[test]
fn a_full_bucket_gives_its_burst_and_then_what_comes_in_time() {
    let start = Instant::now();
    let limiter = RateLimiter::new(&limit(10, 1, 5), start);
    assert_eq!(allowed(&limiter, None, start), 5);
    let limited = limiter.check(None, start).unwrap_err();
    assert_eq!(limited.retry_after, Duration::from_millis(100));
    assert_eq!(allowed(&limiter, None, start + Duration::from_millis(99)), 0);
    assert_eq!(allowed(&limiter, None, start + Duration::from_millis(100)), 1);
    assert_eq!(allowed(&limiter, None, start + Duration::from_millis(400)), 3);
    assert_eq!(allowed(&limiter, None, start + Duration::from_secs(60)), 5, "never more than the burst");
}

#[test]
fn without_a_burst_the_tokens_of_a_period_may_come_at_once() {
    let start = Instant::now();
    assert_eq!(allowed(&RateLimiter::new(&limit(7, 60, 0), start), None, start), 7);
    let nothing = RateLimiter::new(&limit(0, 1, 0), start);
    assert!(nothing.check(None, start + Duration::from_secs(3600)).is_err(), "no tokens: nothing passes");
}

#[test]
fn each_identity_has_its_own_bucket_where_the_limit_says_so() {
    let start = Instant::now();
    let per_identity = RateLimiter::new(&l7::RateLimit { per_identity: true, ..limit(3, 60, 0) }, start);
    assert_eq!(allowed(&per_identity, Some("a"), start), 3);
    assert_eq!(allowed(&per_identity, Some("b"), start), 3);
    assert_eq!(allowed(&per_identity, None, start), 3);
    assert_eq!(allowed(&per_identity, None, start), 0, "those without an identity share one");
    let shared = RateLimiter::new(&limit(3, 60, 0), start);
    assert_eq!(allowed(&shared, Some("a"), start) + allowed(&shared, Some("b"), start), 3);
}

#[test]
fn identities_beyond_the_table_get_no_more_than_their_limit() {
    let start = Instant::now();
    let limiter = RateLimiter::new(&l7::RateLimit { per_identity: true, ..limit(2, 60, 0) }, start);
    let names: Vec<_> = (0..20_000).map(|n| format!("spiffe://cluster.local/ns/a/sa/{n}")).collect();
    let mut all = 0;
    for name in &names {
        let count = allowed(&limiter, Some(name), start);
        assert!(count <= 2);
        all += count;
    }
    assert_eq!(all, 2 * 4096, "every place of the table was used, and none twice");
    let later = start + Duration::from_secs(61);
    assert_eq!(allowed(&limiter, Some("new"), later), 2, "a place whose bucket is full is free for another");
}

#[test]
fn a_rule_that_is_read_again_keeps_its_bucket_and_a_changed_one_begins_anew() {
    let start = Instant::now();
    let limiters = RateLimiters::default();
    let rule: Str = "HTTPRoute/shop/web/0".into();
    assert_eq!(allowed(&limiters.get(&rule, &limit(3, 60, 0), start), None, start), 3);
    assert_eq!(allowed(&limiters.get(&rule, &limit(3, 60, 0), start), None, start), 0);
    assert_eq!(allowed(&limiters.get(&rule, &limit(4, 60, 0), start), None, start), 4);
    assert_eq!(allowed(&limiters.get(&"other".into(), &limit(3, 60, 0), start), None, start), 3);
    limiters.retain([(&"other".into(), &limit(3, 60, 0))].into_iter());
    assert_eq!(allowed(&limiters.get(&rule, &limit(3, 60, 0), start), None, start), 3);
    assert_eq!(allowed(&limiters.get(&"other".into(), &limit(3, 60, 0), start), None, start), 0);
    // A limit that a rule had once is not kept while the rule is.
    limiters.retain([(&rule, &limit(4, 60, 0))].into_iter());
    assert_eq!(allowed(&limiters.get(&rule, &limit(3, 60, 0), start), None, start), 3);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// In any window of time no more pass than the burst and what comes in that time; and those that wait as long as they
    /// are told pass.
    #[test]
    fn no_window_passes_more_than_burst_and_rate(
        tokens in 1_u32..100,
        burst in 1_u32..20,
        gaps in prop::collection::vec(0_u64..200_000, 1..300),
    ) {
        let start = Instant::now();
        let limiter = RateLimiter::new(&limit(tokens, 1, burst), start);
        let mut now = 0;
        let mut passed = Vec::new();
        for gap in gaps {
            now += gap;
            match limiter.check(None, start + Duration::from_micros(now)) {
                Ok(()) => passed.push(now),
                Err(limited) => {
                    let waited = start + Duration::from_micros(now) + limited.retry_after;
                    prop_assert!(limiter.check(None, waited).is_ok());
                    now += limited.retry_after.as_micros() as u64 + 1;
                    passed.push(now);
                }
            }
        }
        for (i, from) in passed.iter().enumerate() {
            for (n, to) in passed[i..].iter().enumerate() {
                let most = f64::from(burst) + (to - from) as f64 * f64::from(tokens) / 1e6;
                prop_assert!((n + 1) as f64 <= most + 1.0, "{} in {} us", n + 1, to - from);
            }
        }
    }
}
