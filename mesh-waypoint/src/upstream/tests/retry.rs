//! Whether, when and where again.

use http::{HeaderMap, HeaderValue};

use super::*;

fn policy(on: &[&str]) -> RetryPolicy {
    with(l7::Retry {
        attempts: 2,
        on: on.iter().map(|name| (*name).to_owned()).collect(),
        ..Default::default()
    })
}

fn with(retry: l7::Retry) -> RetryPolicy {
    RetryPolicy::new(Some(&retry), &l7::Settings::default())
}

fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
    pairs.iter().map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_str(value).unwrap())).collect()
}

fn retries_status(policy: &RetryPolicy, status: u16) -> bool {
    retries_answer(policy, status, &[], &[])
}

fn retries_answer(
    policy: &RetryPolicy,
    status: u16,
    answer: &[(&'static str, &str)],
    request: &[(&'static str, &str)],
) -> bool {
    let (headers, request) = (headers(answer), headers(request));
    policy.should_retry(&TryEnd::Response { status, headers: &headers, request: &request }, 1)
}

#[test]
fn each_condition_covers_what_envoy_documents() {
    const STATUSES: [u16; 9] = [200, 404, 409, 429, 500, 501, 502, 503, 504];
    let ends = [
        TryEnd::ConnectFailure,
        TryEnd::RefusedStream,
        TryEnd::Reset { request_started: false },
        TryEnd::Reset { request_started: true },
        TryEnd::PerTryTimeout,
        TryEnd::Overflow,
    ];
    // Statuses; then connect failure, refused stream, reset before and after the request began, timeout, overflow.
    let table: [(&str, &[u16], [u8; 6]); 9] = [
        ("5xx", &[500, 501, 502, 503, 504], [1, 1, 1, 1, 1, 0]),
        ("gateway-error", &[502, 503, 504], [1, 1, 1, 1, 1, 0]),
        ("reset", &[], [1, 1, 1, 1, 1, 0]),
        ("reset-before-request", &[], [1, 1, 1, 0, 0, 0]),
        ("connect-failure", &[], [1, 0, 0, 0, 0, 0]),
        ("refused-stream", &[], [0, 1, 0, 0, 0, 0]),
        ("retriable-4xx", &[409], [0; 6]),
        ("retriable-status-codes", &[], [0; 6]),
        ("retriable-headers", &[], [0; 6]),
    ];
    for (on, statuses, expected) in table {
        let policy = policy(&[on]);
        let covered: Vec<_> =
            STATUSES.into_iter().filter(|status| retries_status(&policy, *status)).collect();
        assert_eq!(covered, statuses, "{on}");
        let covered = ends.map(|end| u8::from(policy.should_retry(&end, 1)));
        assert_eq!(covered, expected, "{on}: {ends:?}");
    }
}

#[test]
fn grpc_conditions_go_by_the_status_in_the_headers() {
    let codes = [
        ("cancelled", "1"),
        ("deadline-exceeded", "4"),
        ("resource-exhausted", "8"),
        ("internal", "13"),
        ("unavailable", "14"),
    ];
    for (on, own) in codes {
        let policy = policy(&[on]);
        for code in (0..=16).map(|code: u8| code.to_string()) {
            let retries = retries_answer(&policy, 200, &[("grpc-status", &code)], &[]);
            assert_eq!(retries, code == own, "{on} at grpc-status {code}");
        }
        assert!(!retries_status(&policy, 503), "{on}: not an HTTP status");
    }
}

#[test]
fn status_codes_are_those_that_are_listed() {
    let listed = with(l7::Retry {
        attempts: 1,
        on: vec!["reset".into()],
        status_codes: vec![418],
        ..Default::default()
    });
    assert!(retries_status(&listed, 418));
    assert!(!retries_status(&listed, 503));
    let written = policy(&["connect-failure", "429"]);
    assert!(retries_status(&written, 429));
}

#[test]
fn headers_are_those_that_the_request_names() {
    let policy = policy(&["retriable-headers"]);
    let request = [("x-envoy-retriable-header-names", "x-again, X-Other")];
    assert!(retries_answer(&policy, 200, &[("x-other", "1")], &request));
    assert!(!retries_answer(&policy, 200, &[("x-else", "1")], &request));
    assert!(!retries_answer(&policy, 200, &[("x-other", "1")], &[]));
}

#[test]
fn an_answer_that_says_it_is_overload_is_not_retried() {
    for header in ["x-envoy-overloaded", "x-envoy-ratelimited"] {
        assert!(!retries_answer(&policy(&["5xx"]), 503, &[(header, "true")], &[]), "{header}");
    }
}

#[test]
fn without_a_rule_the_meshs_policy_counts_and_then_istios() {
    let istio = RetryPolicy::new(None, &l7::Settings::default());
    assert_eq!((istio.attempts, istio.avoid_tried, istio.per_try_timeout), (2, true, None));
    assert!(retries_status(&istio, 503));
    assert!(!retries_status(&istio, 500));
    assert!(!retries_status(&istio, 502));
    assert!(istio.should_retry(&TryEnd::ConnectFailure, 1));
    assert!(istio.should_retry(&TryEnd::RefusedStream, 1));
    assert!(!istio.should_retry(&TryEnd::Reset { request_started: true }, 1));
    assert!(retries_answer(&istio, 200, &[("grpc-status", "14")], &[]));
    assert!(retries_answer(&istio, 200, &[("grpc-status", "1")], &[]));

    let mesh = l7::Settings {
        default_retry: Some(l7::Retry { attempts: 7, on: vec!["5xx".into()], ..Default::default() }),
        ..l7::Settings::default()
    };
    let policy = RetryPolicy::new(None, &mesh);
    assert!(policy.attempts == 7 && retries_status(&policy, 500));
    let rule = RetryPolicy::new(Some(&l7::Retry { attempts: 1, ..Default::default() }), &mesh);
    assert_eq!(rule.attempts, 1);
    assert!(retries_status(&rule, 503) && !retries_status(&rule, 500), "on what is not said: Istio's list");
}

#[test]
fn there_are_as_many_retries_as_attempts() {
    let policy = policy(&["connect-failure"]);
    let retries =
        (1..=4).map(|tries| policy.should_retry(&TryEnd::ConnectFailure, tries)).collect::<Vec<_>>();
    assert_eq!(retries, [true, true, false, false]);
    let none = with(l7::Retry { attempts: 0, on: vec!["5xx".into()], ..Default::default() });
    assert!(!none.should_retry(&TryEnd::ConnectFailure, 1));
}

#[test]
fn the_backoff_doubles_up_to_ten_times_its_base_with_full_jitter() {
    let longest = |policy: &RetryPolicy, tries| {
        let values = (0..1000_u64).map(|n| policy.backoff(tries, n.wrapping_mul(0x9E37_79B9_7F4A_7C15)));
        let (mut min, mut max) = (Duration::MAX, Duration::ZERO);
        for value in values {
            (min, max) = (min.min(value), max.max(value));
        }
        assert!(min < max / 50, "full jitter: {min:?} to {max:?}");
        (max.as_secs_f64() * 1000.0).ceil() as u64
    };
    let default = policy(&["5xx"]);
    assert_eq!([1, 2, 3, 4, 5, 60].map(|tries| longest(&default, tries)), [25, 50, 100, 200, 250, 250]);
    let base = Some(prost_types::Duration { seconds: 0, nanos: 100_000_000 });
    let slow = with(l7::Retry { attempts: 1, backoff: base, ..Default::default() });
    assert_eq!([1, 2, 9].map(|tries| longest(&slow, tries)), [100, 200, 1000]);
}

#[test]
fn where_again_is_as_the_rule_says() {
    let stay = policy(&["5xx"]);
    assert!((1..9).all(|tries| !stay.leave_localities(tries)));
    let leave = with(l7::Retry {
        attempts: 9,
        remote_localities: true,
        ignore_previous_hosts: Some(false),
        per_try_timeout: seconds(2),
        ..Default::default()
    });
    assert_eq!([1, 2, 3].map(|tries| leave.leave_localities(tries)), [false, true, true]);
    assert_eq!((leave.avoid_tried, leave.per_try_timeout), (false, Some(Duration::from_secs(2))));
}
