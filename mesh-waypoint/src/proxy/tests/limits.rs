//! Retries, timeouts and limits.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use http::Request;
use mesh_core::xds::proto::l7;

use super::bed::*;

fn duration(millis: u64) -> Option<prost_types::Duration> {
    Duration::from_millis(millis).try_into().ok()
}

fn retry(attempts: u32, on: &[&str]) -> Option<l7::Retry> {
    let on = on.iter().map(|&on| on.to_owned()).collect();
    Some(l7::Retry { attempts, on, backoff: duration(1), ..l7::Retry::default() })
}

/// An application that fails so many requests with 503 and then answers with the body that it got.
async fn failing(times: usize) -> (App, Rc<Cell<usize>>) {
    let asked = Rc::new(Cell::new(0));
    let count = Rc::clone(&asked);
    let app = app("failing", move |request: Request<bytes::Bytes>| {
        count.set(count.get() + 1);
        let answer = if count.get() <= times { text(503, "not yet") } else { text(200, request.into_body()) };
        std::future::ready(answer)
    });
    (app.await, asked)
}

#[test]
fn a_failed_request_is_tried_again_with_its_body_until_it_works_or_no_try_is_left() {
    run(async {
        let rule = || l7::HttpRule { retry: retry(2, &["5xx"]), ..forward(&[("", 1)]) };
        let (app, asked) = failing(2).await;
        let waypoint = Bed::new(&[app]).rule(rule()).start().await;
        assert_eq!(said(&waypoint.ask(post("/", "whole")).await), (200, "whole"));
        assert_eq!(asked.get(), 3);
        let (app, asked) = failing(9).await;
        let waypoint = Bed::new(&[app]).rule(rule()).start().await;
        assert_eq!(said(&waypoint.ask(post("/", "whole")).await), (503, "not yet"));
        assert_eq!(asked.get(), 3);
        waypoint.expect_metric("istio_requests_total", &["response_flags=\"URX\""], 1.0).await;
    });
}

#[test]
fn a_body_that_is_too_large_to_keep_is_sent_once() {
    run(async {
        let rule = l7::HttpRule { retry: retry(2, &["5xx"]), ..forward(&[("", 1)]) };
        let (app, asked) = failing(1).await;
        let waypoint = Bed::new(&[app]).rule(rule).start().await;
        let large = vec![b'x'; 200 << 10];
        assert_eq!(said(&waypoint.ask(post("/", large.clone())).await), (503, "not yet"));
        assert_eq!(asked.get(), 1);
        let answer = waypoint.ask(post("/", large.clone())).await;
        assert_eq!((answer.status().as_u16(), answer.body().len()), (200, large.len()));
    });
}

#[test]
fn an_endpoint_that_refuses_connections_is_passed_over() {
    run(async {
        let dead = App { name: "dead".into(), ..named("dead").await };
        let gone = std::net::TcpListener::bind((own_ip(), 0)).unwrap().local_addr().unwrap();
        let dead = App { address: gone, ..dead };
        let rule = l7::HttpRule { retry: retry(3, &["connect-failure"]), ..forward(&[("", 1)]) };
        let waypoint = Bed::new(&[dead.clone(), named("alive").await]).rule(rule).start().await;
        let mut connection = waypoint.http1().await;
        for _ in 0..50 {
            assert_eq!(said(&connection.ask(get("/")).await), (200, "alive"));
        }
        let waypoint = Bed::new(&[dead]).start().await;
        let answer = waypoint.get("/").await;
        let (status, body) = said(&answer);
        let start = "upstream connect error or disconnect/reset before headers. reset reason: remote connection failure";
        assert!(status == 503 && body.starts_with(start), "{status} {body}");
        waypoint.expect_metric("istio_requests_total", &["response_flags=\"UF,URX\""], 1.0).await;
    });
}

#[test]
fn a_request_ends_with_its_timeout_and_a_try_with_its_own() {
    run(async {
        let slow = || {
            app("slow", |_| async {
                tokio::time::sleep(PATIENCE).await;
                text(200, "late")
            })
        };
        let rule = l7::HttpRule { timeout: duration(100), ..forward(&[("", 1)]) };
        let waypoint = Bed::new(&[slow().await]).rule(rule).start().await;
        let began = Instant::now();
        assert_eq!(said(&waypoint.get("/").await), (504, "upstream request timeout"));
        assert!(began.elapsed() >= Duration::from_millis(100) && began.elapsed() < PATIENCE / 4);
        waypoint.expect_metric("istio_requests_total", &["response_flags=\"UT\""], 1.0).await;

        let retry = retry(3, &["5xx"]).map(|retry| l7::Retry { per_try_timeout: duration(100), ..retry });
        let rule = l7::HttpRule { retry, ..forward(&[("", 1)]) };
        let waypoint = Bed::new(&[slow().await, named("fast").await]).rule(rule).start().await;
        for _ in 0..4 {
            assert_eq!(said(&waypoint.get("/").await), (200, "fast"));
        }
    });
}

#[test]
fn requests_beyond_the_limit_are_refused_and_those_beyond_the_connections_wait() {
    run(async {
        let slow = app("slow", |_| async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            text(200, "ok")
        });
        let pool = |pool: l7::ConnectionPool| l7::Destination {
            policy: Some(l7::TrafficPolicy { connection_pool: Some(pool), ..Default::default() }),
            ..Default::default()
        };
        let one = l7::ConnectionPool { http2_max_requests: Some(1), ..Default::default() };
        let app = slow.await;
        let waypoint = Bed::new(std::slice::from_ref(&app)).destination(pool(one)).start().await;
        let (first, second) = futures_util::join!(waypoint.get("/"), waypoint.get("/"));
        let mut codes = [first.status().as_u16(), second.status().as_u16()];
        codes.sort_unstable();
        assert_eq!(codes, [200, 503]);
        waypoint.expect_metric("istio_requests_total", &["response_flags=\"UO\""], 1.0).await;

        let one = l7::ConnectionPool {
            max_connections: Some(1),
            http1_max_pending_requests: Some(1),
            ..Default::default()
        };
        let waypoint = Bed::new(&[app]).destination(pool(one)).start().await;
        // A request that dials waits, too (Envoy): from here on the connection is there.
        assert_eq!(waypoint.get("/").await.status(), 200);
        let (a, b, c) = futures_util::join!(waypoint.get("/"), waypoint.get("/"), waypoint.get("/"));
        let mut codes = [a, b, c].map(|answer| answer.status().as_u16());
        codes.sort_unstable();
        assert_eq!(codes, [200, 200, 503], "one is served, one waits for its connection, one is too many");
    });
}

#[test]
fn a_rate_limit_refuses_what_is_beyond_it() {
    run(async {
        let limit = l7::RateLimit { tokens: 2, per: duration(3_600_000), burst: 2, per_identity: false };
        let rule = l7::HttpRule { rate_limit: Some(limit), ..forward(&[("", 1)]) };
        let waypoint = Bed::new(&[named("a").await]).rule(rule).start().await;
        assert_eq!(waypoint.get("/").await.status(), 200);
        assert_eq!(waypoint.get("/").await.status(), 200);
        let refused = waypoint.get("/").await;
        assert_eq!(said(&refused), (429, "local_rate_limited"));
        waypoint.expect_metric("istio_requests_total", &["response_flags=\"RL\""], 1.0).await;
    });
}
