//! Requests: where they go, what becomes of them on the way, and what is said of them.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use http::{Request, Version};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use mesh_core::xds::proto::l7;
use mesh_core::xds::proto::workload::AppProtocol;
use tokio::sync::Notify;

use super::bed::*;
use crate::proxy::http::LocalExec;

#[test]
fn a_request_reaches_an_application_through_its_tunnel_and_another_one_without() {
    run(async {
        let near = App { tunnel: true, ..named("near").await };
        let waypoint = Bed::new(&[near]).start().await;
        let answer = waypoint.get("/").await;
        assert_eq!(said(&answer), (200, "near"));
        assert!(answer.headers().contains_key("x-envoy-upstream-service-time"));
        let labels = [
            "reporter=\"waypoint\"",
            "destination_workload=\"near\"",
            "destination_service=\"web.shop.svc.cluster.local\"",
            "source_principal=\"spiffe://cluster.local/ns/shop/sa/client\"",
            "response_code=\"200\"",
            "response_flags=\"-\"",
            "connection_security_policy=\"mutual_tls\"",
        ];
        waypoint.expect_metric("istio_requests_total", &labels, 1.0).await;
        let waypoint = Bed::new(&[named("far").await]).start().await;
        assert_eq!(said(&waypoint.get("/").await), (200, "far"));
    });
}

#[test]
fn an_endpoint_keeps_host_path_and_body_and_gets_what_identifies_the_request() {
    run(async {
        let seen = Rc::new(RefCell::new(Vec::new()));
        let keep = Rc::clone(&seen);
        let echo = app("echo", move |request: Request<bytes::Bytes>| {
            keep.borrow_mut().push(request.headers().clone());
            let answer = format!("{} {} {:?}", request.method(), request.uri(), request.body());
            std::future::ready(text(200, answer))
        });
        let waypoint = Bed::new(&[echo.await]).start().await;
        let mut request = post("/a/b?c=d", "body");
        request.headers_mut().insert("connection", "x-mine".parse().unwrap());
        request.headers_mut().insert("x-mine", "1".parse().unwrap());
        assert_eq!(said(&waypoint.ask(request).await), (200, "POST /a/b?c=d b\"body\""));
        let mut request = get("/");
        request.headers_mut().insert("x-request-id", "given".parse().unwrap());
        waypoint.ask(request).await;
        let seen = seen.borrow();
        assert_eq!(seen[0]["host"], "web.shop");
        assert_eq!(seen[0]["x-forwarded-proto"], "http");
        assert_eq!(seen[0]["x-envoy-attempt-count"], "1");
        assert_eq!(seen[0]["x-request-id"].len(), 36);
        assert!(!seen[0].contains_key("x-mine"), "{:?}", seen[0]);
        assert_eq!(seen[1]["x-request-id"], "given");
    });
}

#[test]
fn what_is_not_bound_to_the_waypoint_is_refused() {
    run(async {
        let refused = async |waypoint: &Waypoint, to: &str| match waypoint.connect(to).await {
            Err(mesh_core::hbone::Error::Status(status)) => status.as_u16(),
            other => panic!("{to}: {other:?}"),
        };
        let waypoint = Bed::new(&[named("a").await]).bound_to("other.shop.svc.cluster.local").start().await;
        assert_eq!(refused(&waypoint, VIP).await, 404);
        let app = named("a").await;
        let pod = app.address.to_string();
        let waypoint = Bed::new(&[app]).start().await;
        assert_eq!(refused(&waypoint, &pod).await, 404, "the pod itself is not bound");
        assert_eq!(refused(&waypoint, "240.0.0.1:81").await, 404, "the service has no such port");
        assert_eq!(refused(&waypoint, "240.0.0.9:80").await, 404, "nobody knows the address");
        assert!(waypoint.connect("web.shop.svc.cluster.local:80").await.is_ok(), "by name");
    });
}

#[test]
fn connections_to_endpoints_are_used_again_and_replaced_when_the_endpoint_closed_them() {
    run(async {
        let made = Rc::new(Cell::new(0));
        let count = Rc::clone(&made);
        let app = raw("app", move |mut stream| {
            use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
            count.set(count.get() + 1);
            async move {
                let mut buffer = [0; 4096];
                // Two requests, then an end without a word.
                for _ in 0..2 {
                    if stream.read(&mut buffer).await.unwrap_or(0) == 0 {
                        return;
                    }
                    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
                }
            }
        });
        let waypoint = Bed::new(&[app.await]).start().await;
        let mut connection = waypoint.http1().await;
        for _ in 0..2 {
            assert_eq!(said(&connection.ask(get("/")).await), (200, "ok"));
        }
        assert_eq!(made.get(), 1, "the second request used the first one's connection");
        assert_eq!(said(&connection.ask(get("/")).await), (200, "ok"));
        assert_eq!(made.get(), 2);
    });
}

#[test]
fn http_2_is_spoken_on_either_side() {
    run(async {
        let version = app("app", |request: Request<bytes::Bytes>| {
            std::future::ready(text(200, format!("{:?} {}", request.version(), request.uri())))
        });
        let waypoint = Bed::new(&[version.await]).speaks(AppProtocol::Http2).start().await;
        assert_eq!(said(&waypoint.get("/x").await), (200, "HTTP/2.0 http://web.shop/x"));
        let io = waypoint.connect(VIP).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(LocalExec, TokioIo::new(io)).await.unwrap();
        drop(tokio::task::spawn_local(connection));
        let request = Request::builder().uri("http://web.shop/y").version(Version::HTTP_2);
        let answer =
            sender.send_request(request.body(Full::<bytes::Bytes>::default()).unwrap()).await.unwrap();
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(&*body, b"HTTP/2.0 http://web.shop/y");
    });
}

#[test]
fn a_canary_gets_its_share_and_a_header_chooses_for_good() {
    run(async {
        let version = |app: App, version: &str| App {
            labels: [("version".to_owned(), version.to_owned())].into(),
            ..app
        };
        let apps = [version(named("one").await, "v1"), version(named("two").await, "v2")];
        let subset = |name: &str| l7::Subset {
            name: name.into(),
            labels: [("version".to_owned(), name.to_owned())].into(),
            policy: None,
        };
        let subsets = l7::Destination { subsets: vec![subset("v1"), subset("v2")], ..Default::default() };
        let tester = l7::HeaderMatch {
            name: "x-tester".into(),
            value: Some(l7::StringMatch {
                kind: Some(l7::string_match::Kind::Exact("yes".into())),
                ..Default::default()
            }),
            ..Default::default()
        };
        let matched = l7::HttpMatch { headers: vec![tester], ..Default::default() };
        let chosen = l7::HttpRule { name: "chosen".into(), matches: vec![matched], ..forward(&[("v2", 1)]) };
        let bed = Bed::new(&apps).destination(subsets).rule(chosen).rule(forward(&[("v1", 80), ("v2", 20)]));
        let waypoint = bed.start().await;
        let mut connection = waypoint.http1().await;
        let mut canary = 0;
        for _ in 0..1000 {
            let answer = connection.ask(get("/")).await;
            assert_eq!(answer.status(), 200);
            canary += usize::from(answer.body() == "two");
        }
        // Six standard deviations.
        assert!((124..=276).contains(&canary), "{canary} of 1000");
        for _ in 0..20 {
            let mut request = get("/");
            request.headers_mut().insert("x-tester", "yes".parse().unwrap());
            assert_eq!(said(&connection.ask(request).await), (200, "two"));
        }
    });
}

#[test]
fn without_an_endpoint_or_a_rule_the_answer_says_so_as_envoy_does() {
    run(async {
        let waypoint = Bed::new(&[]).start().await;
        let answer = waypoint.get("/").await;
        assert_eq!(said(&answer), (503, "no healthy upstream"));
        waypoint.expect_metric("istio_requests_total", &["response_flags=\"UH\""], 1.0).await;

        let path =
            l7::PathMatch { kind: Some(l7::path_match::Kind::Exact("/only".into())), ignore_case: false };
        let matched = l7::HttpMatch { path: Some(path), ..Default::default() };
        let rule = l7::HttpRule { matches: vec![matched], ..forward(&[("", 1)]) };
        let waypoint = Bed::new(&[named("a").await]).rule(rule).start().await;
        assert_eq!(said(&waypoint.get("/only").await), (200, "a"));
        assert_eq!(said(&waypoint.get("/other").await), (404, ""));
        let labels = ["response_flags=\"NR\"", "response_code=\"404\""];
        waypoint.expect_metric("istio_requests_total", &labels, 1.0).await;

        let mut grpc = get("/only/Method");
        grpc.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
        let answer = waypoint.ask(grpc).await;
        assert_eq!(
            (answer.status().as_u16(), &answer.headers()["grpc-status"]),
            (200, &"12".parse().unwrap())
        );
    });
}

#[test]
fn a_rule_may_answer_itself_delay_abort_rewrite_and_edit() {
    run(async {
        let echo = app("echo", |request: Request<bytes::Bytes>| {
            let host = request.headers()["host"].to_str().unwrap();
            std::future::ready(text(200, format!("{host}{}", request.uri())))
        });
        let on = |path: &str, rule: l7::HttpRule| {
            let kind = Some(l7::path_match::Kind::Prefix(path.into()));
            let path = Some(l7::PathMatch { kind, ignore_case: false });
            l7::HttpRule { matches: vec![l7::HttpMatch { path, ..Default::default() }], ..rule }
        };
        let direct = l7::DirectResponse { status: 418, body: b"tea".to_vec() };
        let direct =
            l7::HttpRule { action: Some(l7::http_rule::Action::DirectResponse(direct)), ..forward(&[]) };
        let redirect = l7::Redirect { authority: "new.shop".into(), status: 302, ..Default::default() };
        let redirect =
            l7::HttpRule { action: Some(l7::http_rule::Action::Redirect(redirect)), ..forward(&[]) };
        let abort = l7::fault::Abort {
            kind: Some(l7::fault::abort::Kind::HttpStatus(555)),
            parts_per_million: 1_000_000,
        };
        let fault = l7::Fault { delay: None, abort: Some(abort) };
        let fault = l7::HttpRule { fault: Some(fault), ..forward(&[("", 1)]) };
        let rewrite = l7::Rewrite {
            authority: "inner.shop".into(),
            path: Some(l7::rewrite::Path::Prefix("/new".into())),
        };
        let set = l7::Header { name: "x-by".into(), value: "rule".into() };
        let rewrite = l7::HttpRule {
            rewrite: Some(rewrite),
            response_headers: Some(l7::HeaderEdits { set: vec![set], ..Default::default() }),
            ..forward(&[("", 1)])
        };
        let bed = Bed::new(&[echo.await]).rule(on("/tea", direct)).rule(on("/moved", redirect));
        let waypoint = bed.rule(on("/broken", fault)).rule(on("/old", rewrite)).start().await;
        assert_eq!(said(&waypoint.get("/tea").await), (418, "tea"));
        let moved = waypoint.get("/moved/x?y").await;
        assert_eq!(
            (moved.status().as_u16(), &moved.headers()["location"]),
            (302, &"http://new.shop/moved/x?y".parse().unwrap())
        );
        assert_eq!(said(&waypoint.get("/broken").await), (555, "fault filter abort"));
        waypoint.expect_metric("istio_requests_total", &["response_flags=\"FI\""], 1.0).await;
        let old = waypoint.get("/old/x").await;
        assert_eq!(said(&old), (200, "inner.shop/new/x"));
        assert_eq!(old.headers()["x-by"], "rule");
    });
}

#[test]
fn a_copy_of_a_request_goes_to_the_mirror_with_its_body() {
    run(async {
        let (told, mut seen) = tokio::sync::mpsc::unbounded_channel();
        let both = app("both", move |request: Request<bytes::Bytes>| {
            let host = request.headers()["host"].to_str().unwrap().to_owned();
            told.send((host, request.body().clone())).unwrap();
            std::future::ready(text(200, "ok"))
        });
        let backend = forward(&[("", 1)]);
        let Some(l7::http_rule::Action::Forward(to)) = backend.action.clone() else { unreachable!() };
        let mirror = l7::Mirror { backend: to.backends[0].backend.clone(), parts_per_million: 1_000_000 };
        let waypoint =
            Bed::new(&[both.await]).rule(l7::HttpRule { mirrors: vec![mirror], ..backend }).start().await;
        assert_eq!(said(&waypoint.ask(post("/", "body")).await), (200, "ok"));
        let mut hosts = Vec::new();
        for _ in 0..2 {
            let (host, body) = tokio::time::timeout(PATIENCE, seen.recv()).await.unwrap().unwrap();
            assert_eq!(&*body, b"body", "{host}");
            hosts.push(host);
        }
        hosts.sort();
        assert_eq!(hosts, ["web.shop", "web.shop-shadow"]);
    });
}

#[test]
fn a_client_that_leaves_is_recorded_as_gone() {
    run(async {
        let came = Rc::new(Notify::new());
        let told = Rc::clone(&came);
        let slow = app("slow", move |_| {
            told.notify_one();
            async {
                tokio::time::sleep(PATIENCE).await;
                text(200, "late")
            }
        });
        let waypoint = Bed::new(&[slow.await]).start().await;
        tokio::select! {
            answer = waypoint.get("/") => panic!("it was answered: {answer:?}"),
            () = came.notified() => {}
        }
        let labels = ["response_flags=\"DC\"", "response_code=\"0\""];
        waypoint.expect_metric("istio_requests_total", &labels, 1.0).await;
    });
}
