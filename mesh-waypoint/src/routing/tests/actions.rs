//! Where requests end, and what is done to them on the way.

use std::time::Duration;

use http::StatusCode;

use super::*;
use crate::routing::{Abort, Forward, Injected, RateLimit, shadow_authority};

fn forward_of(backends: Vec<l7::WeightedBackend>) -> Arc<crate::routing::Rule> {
    let action = Some(l7::http_rule::Action::Forward(l7::Forward { backends }));
    compiled(l7::HttpRule { action, ..rule("it", []) })
}

fn forward(rule: &crate::routing::Rule) -> &Forward {
    match &rule.action {
        Action::Forward(forward) => forward,
        other => panic!("{other:?}"),
    }
}

fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

#[test]
fn backends_are_picked_by_weight() {
    let weights = [80, 0, 15, 5];
    let subsets = ["v1", "v2", "v3", "v4"];
    let of = |(weight, subset): (u32, &str)| {
        let mut backend = backend(REVIEWS, weight);
        backend.backend.as_mut().unwrap().subset = subset.to_owned();
        backend
    };
    let rule = forward_of(weights.into_iter().zip(subsets).map(of).collect());
    let mut counts = BTreeMap::new();
    for random in 0..1000 {
        let backend = forward(&rule).pick_backend(random).unwrap();
        *counts.entry(backend.backend.subset.as_deref().unwrap()).or_insert(0) += 1;
    }
    assert_eq!(counts, BTreeMap::from([("v1", 800), ("v3", 150), ("v4", 50)]));
    // The largest weights do not overflow.
    let rule = forward_of(vec![backend(REVIEWS, u32::MAX), backend(REVIEWS, u32::MAX)]);
    assert!(forward(&rule).pick_backend(u64::MAX).is_some());
}

#[test]
fn without_weights_or_backends_there_is_nothing_to_pick() {
    assert!(forward(&forward_of(vec![])).pick_backend(1).is_none());
    assert!(forward(&forward_of(vec![backend(REVIEWS, 0)])).pick_backend(1).is_none());
}

#[test]
fn a_backend_that_cannot_be_used_keeps_its_share() {
    let invalid = l7::Backend { invalid: "no ReferenceGrant".into(), ..l7::Backend::default() };
    let unusable = l7::WeightedBackend { backend: Some(invalid), weight: 1, ..Default::default() };
    let rule = forward_of(vec![backend(REVIEWS, 3), unusable]);
    let picked = |random| forward(&rule).pick_backend(random).unwrap().backend.invalid.as_deref();
    assert_eq!([picked(0), picked(2), picked(3)], [None, None, Some("no ReferenceGrant")]);
}

#[test]
fn a_backend_is_found_by_its_key_or_as_the_waypoint_sees_its_name() {
    let rule = |service| {
        forward_of(vec![l7::WeightedBackend {
            backend: Some(l7::Backend { service: Some(service), ..Default::default() }),
            weight: 1,
            ..Default::default()
        }])
    };
    let mesh = mesh_of([("other", "x.example"), ("mesh", "x.example"), ("shop", REVIEWS)]);
    let namespace = |service| {
        let rule = rule(service);
        let found = forward(&rule).backends[0].backend.service(&mesh, &own());
        found.map(|found| found.service.host.namespace().to_owned())
    };
    assert_eq!(namespace(parent("other", "X.example", 0)).as_deref(), Some("other"));
    assert_eq!(namespace(parent("", "x.example", 0)).as_deref(), Some("mesh"));
    assert_eq!(namespace(parent("shop", "x.example", 0)), None);
    assert_eq!(namespace(parent("", REVIEWS, 0)).as_deref(), Some("shop"));
}

#[test]
fn a_backend_without_port_has_the_only_one_or_that_of_the_request() {
    let two = service("shop", REVIEWS);
    let mut one = two.clone();
    Arc::make_mut(&mut one.ports).remove(&80);
    let port = |port, service: &Service, addressed| {
        let rule = forward_of(vec![l7::WeightedBackend {
            backend: Some(l7::Backend { service: Some(parent("shop", REVIEWS, port)), ..Default::default() }),
            ..Default::default()
        }]);
        forward(&rule).backends[0].backend.port(service, addressed)
    };
    assert_eq!(port(80, &two, 9080), 80);
    assert_eq!(port(0, &two, 9080), 9080);
    assert_eq!(port(0, &one, 80), 9080);
}

#[test]
fn parts_that_cannot_be_honoured_answer_500() {
    let negative = Some(prost_types::Duration { seconds: -1, nanos: 0 });
    let response = |status| {
        let response = l7::DirectResponse { status, body: Vec::new() };
        Some(l7::http_rule::Action::DirectResponse(response))
    };
    let abort = |kind, parts_per_million| {
        Some(l7::Fault { delay: None, abort: Some(l7::fault::Abort { kind, parts_per_million }) })
    };
    let it = || rule("it", []);
    let nowhere = l7::WeightedBackend::default();
    let table = [
        (l7::HttpRule { timeout: negative, ..it() }, "timeout: is negative; 0 s or more is right"),
        (
            l7::HttpRule { action: None, ..it() },
            "action: has none: forward, redirect or direct_response is needed",
        ),
        (
            l7::HttpRule { action: response(99), ..it() },
            "direct_response.status: 99 is no status of an answer (200 to 599)",
        ),
        (l7::HttpRule { fault: abort(None, 1), ..it() }, "fault.abort: needs `http_status` or `grpc_status`"),
        (
            l7::HttpRule { fault: abort(Some(l7::fault::abort::Kind::GrpcStatus(17)), 1), ..it() },
            "fault.abort.grpc_status: 17 is no gRPC status (0 to 16)",
        ),
        (
            l7::HttpRule { fault: abort(Some(l7::fault::abort::Kind::HttpStatus(503)), 1_000_001), ..it() },
            "fault.abort.parts_per_million: 1000001 is more than all (a million)",
        ),
        (
            l7::HttpRule { mirrors: vec![l7::Mirror { backend: None, parts_per_million: 1 }], ..it() },
            "mirrors[0].backend.service.hostname: is needed",
        ),
        (
            l7::HttpRule { rate_limit: Some(l7::RateLimit { tokens: 1, ..Default::default() }), ..it() },
            "rate_limit: `tokens` and `per` must be more than 0",
        ),
        (
            l7::HttpRule {
                action: Some(l7::http_rule::Action::Forward(l7::Forward { backends: vec![nowhere] })),
                ..it()
            },
            "forward.backends[0].backend.service.hostname: is needed",
        ),
    ];
    for (rule, reason) in table {
        assert_eq!(invalid(&compiled(rule)), reason);
    }
}

#[test]
fn a_direct_response_has_its_status_and_body() {
    let response = l7::DirectResponse { status: 418, body: b"short and stout".to_vec() };
    let action = Some(l7::http_rule::Action::DirectResponse(response));
    let rule = compiled(l7::HttpRule { action, ..rule("it", []) });
    let Action::Respond(response) = &rule.action else { panic!("{rule:?}") };
    assert_eq!((response.status, &response.body[..]), (StatusCode::IM_A_TEAPOT, &b"short and stout"[..]));
}

#[test]
fn a_timeout_of_zero_is_none() {
    let timeout = |timeout| compiled(l7::HttpRule { timeout, ..rule("it", []) }).timeout;
    assert_eq!(timeout(None), None);
    assert_eq!(timeout(seconds(0)), None);
    assert_eq!(timeout(seconds(3)), Some(Duration::from_secs(3)));
}

#[test]
fn faults_take_their_share_of_requests() {
    use l7::fault::abort::Kind;
    let fault = |delay: u32, abort: u32, kind| {
        let rule = compiled(l7::HttpRule {
            fault: Some(l7::Fault {
                delay: Some(l7::fault::Delay { fixed: seconds(5), parts_per_million: delay }),
                abort: Some(l7::fault::Abort { kind: Some(kind), parts_per_million: abort }),
            }),
            ..rule("it", [])
        });
        let fault = rule.fault.clone();
        *fault.unwrap()
    };
    let http = Abort::Http(StatusCode::SERVICE_UNAVAILABLE);
    let delay = Some(Duration::from_secs(5));
    let some = fault(100_000, 1, Kind::HttpStatus(503));
    assert_eq!(some.decide(99_999, 0), Injected { delay, abort: Some(http) });
    assert_eq!(some.decide(100_000, 0), Injected { delay: None, abort: Some(http) });
    assert_eq!(some.decide(1_099_999, 1), Injected { delay, abort: None });
    let all = fault(1_000_000, 1_000_000, Kind::GrpcStatus(14));
    assert_eq!(all.decide(u64::MAX, u64::MAX), Injected { delay, abort: Some(Abort::Grpc(14)) });
    assert_eq!(fault(0, 0, Kind::GrpcStatus(14)).decide(0, 0), Injected::default());
}

#[test]
fn mirrors_take_their_share_of_requests() {
    let mirror = |hostname, parts_per_million| l7::Mirror {
        backend: Some(l7::Backend { service: Some(parent("shop", hostname, 0)), ..Default::default() }),
        parts_per_million,
    };
    let rule = compiled(l7::HttpRule {
        mirrors: vec![mirror("a.example", 250_000), mirror("b.example", 1_000_000)],
        ..rule("it", [])
    });
    let taken = |random| rule.mirrors.iter().map(|mirror| mirror.share.takes(random)).collect::<Vec<_>>();
    assert_eq!(taken(249_999), [true, true]);
    assert_eq!(taken(250_000), [false, true]);
    assert_eq!(&*rule.mirrors[1].backend.hostname, "b.example");
}

#[test]
fn a_copy_of_a_request_is_marked_behind_its_host() {
    let table = [
        ("reviews", "reviews-shadow"),
        ("reviews.shop:9080", "reviews.shop-shadow:9080"),
        ("[::1]:80", "[::1]-shadow:80"),
    ];
    for (authority, expected) in table {
        assert_eq!(shadow_authority(authority), expected);
    }
}

#[test]
fn what_others_decide_by_is_handed_on() {
    let rule = compiled(l7::HttpRule {
        retry: Some(l7::Retry { attempts: 3, ..Default::default() }),
        session: Some(l7::SessionPersistence { name: "s".into(), ..Default::default() }),
        rate_limit: Some(l7::RateLimit { tokens: 10, per: seconds(1), burst: 0, per_identity: true }),
        ..rule("it", [])
    });
    assert_eq!(rule.retry.as_ref().unwrap().attempts, 3);
    assert_eq!(rule.session.as_ref().unwrap().name, "s");
    let limit = l7::RateLimit { tokens: 10, per: seconds(1), burst: 0, per_identity: true };
    assert_eq!(rule.rate_limit, Some(RateLimit { name: "VirtualService/shop/v/it".into(), limit }));
    assert_eq!((&*rule.resource, &*rule.name), ("VirtualService/shop/v", "it"));
}
