//! Requests whose ends two readers could see in different places (RFC 9112 §6.3, §11.2), and clients that never end one.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use mesh_core::xds::proto::l7;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::bed::*;

/// What a request may not bring with it.
const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nhost: web.shop\r\n\r\n";

/// Requests as bytes, and whether they are refused or taken in the one way that is left.
const CORPUS: &[(&str, &str, bool)] = &[
    ("two lengths", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\ncontent-length: 42\r\n\r\n", true),
    ("a list of lengths", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 0, 42\r\n\r\n", true),
    ("a length with a sign", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: +42\r\n\r\n", true),
    ("a negative length", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n", true),
    ("a length in hex", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 0x2a\r\n\r\n", true),
    (
        "a length beyond all",
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999999999999\r\n\r\n",
        true,
    ),
    (
        "space before the colon",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding : chunked\r\n\r\n0\r\n\r\n",
        true,
    ),
    (
        "a coding that is not the last",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        true,
    ),
    ("an unknown coding", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: xchunked\r\n\r\n0\r\n\r\n", true),
    (
        "a coding with a control character",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
        true,
    ),
    (
        "a coding in HTTP/1.0",
        "POST / HTTP/1.0\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        true,
    ),
    ("a folded line", "POST / HTTP/1.1\r\nhost: a\r\nx: y\r\n content-length: 42\r\n\r\n", true),
    ("a carriage return in a value", "POST / HTTP/1.1\r\nhost: a\r\nx: y\rcontent-length: 42\r\n\r\n", true),
    ("a zero byte in a value", "POST / HTTP/1.1\r\nhost: a\r\nx: \0\r\n\r\n", true),
    ("a name with a space", "POST / HTTP/1.1\r\nhost: a\r\nx y: z\r\n\r\n", true),
    ("no name", "POST / HTTP/1.1\r\nhost: a\r\n: z\r\n\r\n", true),
    ("two hosts", "POST / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", true),
    ("no host", "GET / HTTP/1.1\r\n\r\n", true),
    ("a host that is none", "GET / HTTP/1.1\r\nhost: a b\r\n\r\n", true),
    ("a target with a space", "GET /a b HTTP/1.1\r\nhost: a\r\n\r\n", true),
    ("a version that is none", "GET / HTTP/1.9\r\nhost: a\r\n\r\n", true),
    ("a method that is none", "G(T / HTTP/1.1\r\nhost: a\r\n\r\n", true),
    // Which of the two holds is said (RFC 9112 §6.3): the coding, and the length goes no further.
    (
        "a length and a coding",
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n2a\r\n{smuggled}\r\n0\r\n\r\n",
        false,
    ),
    (
        "a coding and a length",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n2a\r\n{smuggled}\r\n0\r\n\r\n",
        false,
    ),
    (
        "the same length twice",
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 42\r\ncontent-length: 42\r\n\r\n{smuggled}",
        false,
    ),
    // Chunks that cannot be read end the request.
    (
        "a chunk in hex with a prefix",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0x2a\r\n",
        true,
    ),
    ("a chunk with a sign", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n-1\r\n", true),
    (
        "a chunk beyond all",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
        true,
    ),
];

/// What the client gets, and the requests that reach the application: method, path, how the body's end is said.
async fn sent(bytes: &[u8]) -> (String, Vec<(String, String)>) {
    let seen = Rc::new(RefCell::new(Vec::new()));
    let keep = Rc::clone(&seen);
    let web = app("web", move |request: Request<Bytes>| {
        let framed = ["content-length", "transfer-encoding"];
        let framed = framed.into_iter().filter(|name| request.headers().contains_key(*name));
        keep.borrow_mut().push((request.uri().path().to_owned(), framed.collect::<Vec<_>>().join("+")));
        std::future::ready(text(200, "web"))
    });
    let waypoint = Bed::new(&[web.await]).start().await;
    let mut stream = waypoint.connect(VIP).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    let mut piece = [0; 4096];
    // A connection that is kept has said all there is.
    while let Ok(Ok(n)) = tokio::time::timeout(Duration::from_millis(150), stream.read(&mut piece)).await
        && n > 0
    {
        answer.extend_from_slice(&piece[..n]);
    }
    let seen = seen.borrow().clone();
    (String::from_utf8_lossy(&answer).into_owned(), seen)
}

#[test]
fn a_request_whose_end_is_unclear_is_refused_and_smuggles_nothing() {
    run(async {
        for (name, request, refused) in CORPUS {
            let whole = if *refused {
                format!("{request}{SMUGGLED}")
            } else {
                request.replace("{smuggled}", SMUGGLED)
            };
            let (answer, seen) = sent(whole.as_bytes()).await;
            let smuggled = seen.iter().any(|(path, _)| path == "/smuggled");
            assert!(!smuggled, "{name}: {seen:?}");
            if *refused {
                let status = answer.get(9..12).unwrap_or_default();
                assert!(
                    status.is_empty() || status.starts_with('4') || status == "505",
                    "{name}: {answer:?}"
                );
            } else {
                assert!(answer.starts_with("HTTP/1.1 200"), "{name}: {answer:?}");
                assert_eq!(seen.len(), 1, "{name}: {seen:?}");
                assert!(!seen[0].1.contains('+'), "{name}: two ends for the endpoint: {seen:?}");
            }
        }
        assert_eq!(SMUGGLED.len(), 0x2a, "the corpus counts on it");
    });
}

#[test]
fn a_client_that_breaks_its_request_does_not_eject_the_endpoint() {
    run(async {
        let outlier = l7::OutlierDetection {
            consecutive_5xx: Some(1),
            consecutive_gateway_errors: Some(1),
            max_ejection_percent: Some(100),
            ..l7::OutlierDetection::default()
        };
        let policy = l7::TrafficPolicy { outlier_detection: Some(outlier), ..l7::TrafficPolicy::default() };
        let destination = l7::Destination { policy: Some(policy), ..l7::Destination::default() };
        let waypoint = Bed::new(&[named("web").await]).destination(destination).start().await;
        for _ in 0..3 {
            let mut stream = waypoint.connect(VIP).await.unwrap();
            let broken =
                "POST / HTTP/1.1\r\nhost: web.shop\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\nx\r\n";
            stream.write_all(broken.as_bytes()).await.unwrap();
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer).await;
            assert!(answer.starts_with(b"HTTP/1.1 400"), "{}", String::from_utf8_lossy(&answer));
        }
        assert_eq!(said(&waypoint.get("/").await), (200, "web"));
    });
}

#[test]
fn heads_that_are_too_large_are_refused() {
    run(async {
        let many: String = (0..150).map(|n| format!("x-{n}: y\r\n")).collect();
        let (answer, seen) = sent(format!("GET / HTTP/1.1\r\nhost: a\r\n{many}\r\n").as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 431") && seen.is_empty(), "{answer:?}");
        let long = format!("GET / HTTP/1.1\r\nhost: a\r\nx: {}\r\n\r\n", "y".repeat(70 << 10));
        let (answer, seen) = sent(long.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 431") && seen.is_empty(), "{answer:?}");
    });
}

#[test]
fn a_head_that_never_ends_is_given_up() {
    run_for(Duration::from_secs(600), async {
        let waypoint = Bed::new(&[named("web").await]).start().await;
        let mut stream = waypoint.connect(VIP).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nhost: web.shop\r\nx-slow: ").await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        tokio::time::pause();
        tokio::time::advance(Duration::from_secs(301)).await;
        tokio::time::resume();
        let mut answer = Vec::new();
        // Whether with a word or without, the stream ends.
        let _ = stream.read_to_end(&mut answer).await;
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 408"), "{answer:?}");
    });
}
