//! Questions and answers, byte by byte where they go over the wire.

mod http_variant;

use std::cell::RefCell;
use std::sync::Arc;

use futures_util::FutureExt;
use http::Version;
use mesh_core::xds::proto::ext_authz as wire;
use prost::Message;
use wire::check_response::HttpResponse;
use wire::header_value_option::AppendAction;

use super::*;
use crate::security::testing::{Case, strings};

fn grpc() -> l7::Provider {
    l7::Provider {
        name: "opa".into(),
        grpc: true,
        service: Some(l7::ServiceRef {
            namespace: "auth".into(),
            hostname: "opa.auth.svc.cluster.local".into(),
            port: 9191,
        }),
        ..Default::default()
    }
}

fn asked<'a>(head: &'a Head<'a>, body: Option<&'a Body>) -> Asked<'a> {
    Asked { head, protocol: "HTTP/2", time: SystemTime::UNIX_EPOCH + Duration::new(1_900_000_000, 5), body }
}

fn framed(message: &wire::CheckResponse) -> Bytes {
    let bytes = message.encode_to_vec();
    let mut body = vec![0];
    body.extend_from_slice(&u32::try_from(bytes.len()).unwrap().to_be_bytes());
    body.extend_from_slice(&bytes);
    body.into()
}

fn reply(message: &wire::CheckResponse) -> Reply {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    Reply { body: framed(message), trailers, ..Reply::default() }
}

fn option(key: &str, value: &str) -> wire::HeaderValueOption {
    let header = wire::HeaderValue { key: key.into(), value: value.into(), raw_value: Vec::new() };
    wire::HeaderValueOption { header: Some(header), ..Default::default() }
}

fn yes(ok: wire::OkHttpResponse) -> wire::CheckResponse {
    let status = Some(wire::Status::default());
    wire::CheckResponse { status, http_response: Some(HttpResponse::OkResponse(ok)) }
}

fn no(denied: Option<wire::DeniedHttpResponse>) -> wire::CheckResponse {
    let status = Some(wire::Status { code: 7, message: "no".into() });
    wire::CheckResponse { status, http_response: denied.map(HttpResponse::DeniedResponse) }
}

fn denial(answer: &Answer) -> (u16, &'static str) {
    match answer {
        Answer::Deny(denied) => (denied.status.as_u16(), denied.details),
        Answer::Allow(_) => (200, ""),
    }
}

const BY_AUTHORIZER: &str = "ext_authz_denied";
const BY_FAILURE: &str = "ext_authz_error";

#[test]
fn a_grpc_question_says_what_envoy_says() {
    let case = Case::get("/cart/1")
        .query("a=b")
        .method("POST")
        .header("x-request-id", "id-1")
        .header("x-twice", "1")
        .header("x-twice", "2")
        .header("content-length", "42");
    let head = case.head();
    let provider =
        l7::Provider { timeout: Some(prost_types::Duration { seconds: 2, nanos: 500_000_000 }), ..grpc() };
    let question = question(&provider, &asked(&head, None)).unwrap();
    assert!(question.grpc);
    assert_eq!(question.timeout, Duration::from_millis(2500));
    assert_eq!(question.service.hostname, "opa.auth.svc.cluster.local");
    let (parts, body) = question.request.into_parts();
    assert_eq!((parts.method.as_str(), parts.version), ("POST", Version::HTTP_2));
    assert_eq!(parts.uri, "http://opa.auth.svc.cluster.local:9191/envoy.service.auth.v3.Authorization/Check");
    assert_eq!(parts.headers["content-type"], "application/grpc");
    assert_eq!(parts.headers["te"], "trailers");
    assert_eq!(parts.headers["grpc-timeout"], "2500m");
    assert_eq!(body[0], 0);
    assert_eq!(body[1..5], u32::try_from(body.len() - 5).unwrap().to_be_bytes());
    let attributes = wire::CheckRequest::decode(&body[5..]).unwrap().attributes.unwrap();
    let source = attributes.source.unwrap();
    assert_eq!(source.principal, "spiffe://cluster.local/ns/front/sa/web");
    let address = |peer: wire::attribute_context::Peer| peer.address.unwrap().socket_address.unwrap();
    assert_eq!(address(source), wire::SocketAddress { address: "10.1.2.3".into(), port_value: 40000 });
    assert_eq!(
        address(attributes.destination.unwrap()),
        wire::SocketAddress { address: "10.96.0.7".into(), port_value: 80 }
    );
    let request = attributes.request.unwrap();
    assert_eq!(request.time, Some(prost_types::Timestamp { seconds: 1_900_000_000, nanos: 5 }));
    let http = request.http.unwrap();
    assert_eq!(
        [&http.id, &http.method, &http.path, &http.host, &http.scheme, &http.protocol],
        ["id-1", "POST", "/cart/1?a=b", "cart.shop", "http", "HTTP/2"]
    );
    assert_eq!(http.size, 42);
    for (name, value) in [
        (":authority", "cart.shop"),
        (":method", "POST"),
        (":path", "/cart/1?a=b"),
        (":scheme", "http"),
        ("x-request-id", "id-1"),
        ("x-twice", "1,2"),
    ] {
        assert_eq!(http.headers.get(name).map(String::as_str), Some(value), "{name}");
    }
    assert_eq!(http.headers.len(), 7);
}

#[test]
fn the_wire_form_has_envoys_field_numbers() {
    // status { code: 7 }, denied_response { status { code: 401 }, headers { header { key: "a", value: "b" } }, body: "c" }
    let bytes = [
        0x0a, 0x02, 0x08, 0x07, 0x12, 0x12, 0x0a, 0x03, 0x08, 0x91, 0x03, 0x12, 0x08, 0x0a, 0x06, 0x0a, 0x01,
        b'a', 0x12, 0x01, b'b', 0x1a, 0x01, b'c',
    ];
    let expected = no(Some(wire::DeniedHttpResponse {
        status: Some(wire::HttpStatus { code: 401 }),
        headers: vec![option("a", "b")],
        body: "c".into(),
    }));
    let mut decoded = wire::CheckResponse::decode(&bytes[..]).unwrap();
    decoded.status.as_mut().unwrap().message = "no".into();
    assert_eq!(decoded, expected);
}

#[test]
fn the_beginning_of_the_body_goes_along_where_it_is_wanted() {
    let case = Case::get("/");
    let head = case.head();
    let wants = |bytes, cut| l7::Provider { max_request_bytes: bytes, allow_partial_message: cut, ..grpc() };
    let sent = |provider: l7::Provider, body: &Body| {
        let question = question(&provider, &asked(&head, Some(body)))?;
        let message = wire::CheckRequest::decode(&question.request.body()[5..]).unwrap();
        Ok::<_, String>(message.attributes.unwrap().request.unwrap().http.unwrap())
    };
    let http = |body: &Body| sent(wants(10, true), body).unwrap();
    let text = http(&Body { bytes: Bytes::from_static(b"hello"), partial: true });
    assert_eq!((text.body.as_str(), text.raw_body.len()), ("hello", 0));
    assert_eq!(text.headers["x-envoy-auth-partial-body"], "true");
    let bytes = http(&Body { bytes: Bytes::from_static(b"\xff\xfe"), partial: false });
    assert_eq!((bytes.body.as_str(), &*bytes.raw_body), ("", &b"\xff\xfe"[..]));
    assert_eq!(bytes.headers["x-envoy-auth-partial-body"], "false");

    assert_eq!(body_limit(&grpc()), None);
    assert_eq!(body_limit(&wants(10, true)), Some(BodyLimit { bytes: 10, cut: true }));
    // Each gets what it wants of what was collected.
    let hello = Body { bytes: Bytes::from_static(b"hello"), partial: false };
    let cut = sent(wants(2, true), &hello).unwrap();
    assert_eq!((cut.body.as_str(), cut.headers["x-envoy-auth-partial-body"].as_str()), ("he", "true"));
    assert!(sent(wants(2, false), &hello).is_err());
    let none = sent(grpc(), &hello).unwrap();
    assert_eq!((none.body.as_str(), none.headers.contains_key("x-envoy-auth-partial-body")), ("", false));
}

#[test]
fn a_grpc_yes_changes_headers_and_query() {
    let with = |key: &str, append: Option<bool>, action: AppendAction| wire::HeaderValueOption {
        append,
        append_action: action.into(),
        ..option(key, "new")
    };
    let default = AppendAction::AppendIfExistsOrAdd;
    let message = yes(wire::OkHttpResponse {
        headers: vec![
            option("x-set", "new"),
            with("x-append", Some(true), default),
            with("x-not-append", Some(false), default),
            with("x-absent", None, AppendAction::AddIfAbsent),
            with("x-present", None, AppendAction::AddIfAbsent),
            with("x-overwrite", None, AppendAction::OverwriteIfExists),
            with("x-overwrite-nothing", None, AppendAction::OverwriteIfExists),
            with("x-overwrite-or-add", None, AppendAction::OverwriteIfExistsOrAdd),
            // What is ours.
            option(":path", "/root"),
            option("Host", "evil"),
            option("content-length", "1"),
            option("transfer-encoding", "chunked"),
        ],
        headers_to_remove: strings(&["x-gone", "host", ":method"]),
        response_headers_to_add: vec![option("x-seen", "1")],
        query_parameters_to_set: vec![wire::QueryParameter { key: "user".into(), value: "a&b=c".into() }],
        query_parameters_to_remove: strings(&["token"]),
    });
    let Answer::Allow(allowed) = answer(&grpc(), Ok(reply(&message))) else { panic!("denied") };
    let mut headers = HeaderMap::new();
    let before = ["x-set", "x-append", "x-not-append", "x-present", "x-overwrite", "x-gone", "host"];
    for name in before {
        headers.insert(name, HeaderValue::from_static("old"));
    }
    for change in &allowed.headers {
        change.apply(&mut headers);
    }
    let all =
        |name: &str| headers.get_all(name).iter().map(|v| v.to_str().unwrap()).collect::<Vec<_>>().join(",");
    for (name, expected) in [
        ("x-set", "new"),
        ("x-append", "old,new"),
        ("x-not-append", "new"),
        ("x-absent", "new"),
        ("x-present", "old"),
        ("x-overwrite", "new"),
        ("x-overwrite-nothing", ""),
        ("x-overwrite-or-add", "new"),
        ("x-gone", ""),
        ("host", "old"),
        ("content-length", ""),
        ("transfer-encoding", ""),
    ] {
        assert_eq!(all(name), expected, "{name}");
    }
    let changed = allowed.changed_query(Some("a=1&token=x&user=old&token"));
    assert_eq!(changed.as_deref(), Some("a=1&user=a%26b%3Dc"));
    assert_eq!(allowed.changed_query(None).as_deref(), Some("user=a%26b%3Dc"));
    assert_eq!(Allowed::default().changed_query(Some("a=1")), None);
    assert_eq!(allowed.response_headers.len(), 1);
}

#[test]
fn a_grpc_no_is_answered_as_it_says() {
    let denied = wire::DeniedHttpResponse {
        status: Some(wire::HttpStatus { code: 302 }),
        headers: vec![
            option("location", "https://login"),
            option("set-cookie", "a=b"),
            option("content-length", "9"),
        ],
        body: "go away".into(),
    };
    let Answer::Deny(denied) = answer(&grpc(), Ok(reply(&no(Some(denied))))) else { panic!("allowed") };
    assert_eq!(
        (denied.status.as_u16(), &*denied.body, denied.details),
        (302, &b"go away"[..], BY_AUTHORIZER)
    );
    let names: Vec<_> = denied.headers.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["location", "set-cookie"]);
    // Without more words it is 403.
    assert_eq!(denial(&answer(&grpc(), Ok(reply(&no(None))))), (403, BY_AUTHORIZER));
    let without_status = Some(wire::DeniedHttpResponse::default());
    assert_eq!(denial(&answer(&grpc(), Ok(reply(&no(without_status))))), (403, BY_AUTHORIZER));
}

#[test]
fn a_yes_may_have_no_words() {
    for message in [wire::CheckResponse::default(), yes(wire::OkHttpResponse::default())] {
        assert_eq!(answer(&grpc(), Ok(reply(&message))), Answer::Allow(Allowed::default()));
    }
}

#[test]
fn what_is_no_answer_refuses_with_the_status_of_errors_or_passes_if_that_is_allowed() {
    let good = yes(wire::OkHttpResponse::default());
    let mut cut = reply(&good);
    cut.body.truncate(cut.body.len() - 1);
    let mut more = reply(&good);
    more.body = [&more.body[..], b"x"].concat().into();
    let mut compressed = reply(&good);
    compressed.body = [&[1], &compressed.body[1..]].concat().into();
    let status = |value: &'static str| {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static(value));
        trailers
    };
    let bad_name = yes(wire::OkHttpResponse { headers: vec![option("a b", "c")], ..Default::default() });
    let bad_value =
        yes(wire::OkHttpResponse { headers: vec![option("a", "b\r\nc: d")], ..Default::default() });
    let contradiction = wire::CheckResponse {
        status: None,
        http_response: Some(HttpResponse::DeniedResponse(wire::DeniedHttpResponse::default())),
    };
    let cases = [
        Err("connection refused".to_owned()),
        Ok(Reply::default()),
        Ok(Reply { status: StatusCode::SERVICE_UNAVAILABLE, ..reply(&good) }),
        Ok(Reply { trailers: HeaderMap::new(), ..reply(&good) }),
        Ok(Reply { trailers: status("14"), ..reply(&good) }),
        Ok(Reply { trailers: HeaderMap::new(), headers: status("2"), ..Reply::default() }),
        Ok(Reply { body: Bytes::new(), ..reply(&good) }),
        Ok(Reply { body: Bytes::from_static(b"\0\0\0\0\x02\xff\xff"), ..reply(&good) }),
        Ok(cut),
        Ok(more),
        Ok(compressed),
        Ok(reply(&bad_name)),
        Ok(reply(&bad_value)),
        Ok(reply(&contradiction)),
    ];
    for case in cases {
        let copy = || match &case {
            Ok(reply) => Ok(Reply {
                status: reply.status,
                headers: reply.headers.clone(),
                body: reply.body.clone(),
                trailers: reply.trailers.clone(),
            }),
            Err(error) => Err(error.clone()),
        };
        assert_eq!(denial(&answer(&grpc(), copy())), (403, BY_FAILURE), "{case:?}");
        let with_status = l7::Provider { status_on_error: 503, ..grpc() };
        assert_eq!(denial(&answer(&with_status, copy())), (503, BY_FAILURE), "{case:?}");
        let open = l7::Provider { fail_open: true, ..grpc() };
        assert_eq!(answer(&open, copy()), Answer::Allow(Allowed::default()), "{case:?}");
    }
    let no_status = l7::Provider { status_on_error: 77, ..grpc() };
    assert_eq!(denial(&answer(&no_status, Err("x".into()))), (403, BY_FAILURE));
}

/// Answers by the authority of a question, and remembers whom it asked.
struct Answers(RefCell<Vec<String>>);

impl Transport for Answers {
    async fn send(&self, question: Question) -> Result<Reply, String> {
        let name = question.service.hostname;
        self.0.borrow_mut().push(name.clone());
        match name.as_str() {
            "no" => Ok(reply(&no(None))),
            name => Ok(reply(&yes(wire::OkHttpResponse {
                headers: vec![option("x-by", name)],
                ..Default::default()
            }))),
        }
    }
}

#[test]
fn everybody_has_to_say_yes_and_the_first_no_ends_it() {
    let ask_all = |names: &[&str]| {
        let asks: Vec<Ask> = names
            .iter()
            .map(|name| {
                let service = l7::ServiceRef { hostname: (*name).into(), port: 1, ..Default::default() };
                let provider = Arc::new(l7::Provider { service: Some(service), ..grpc() });
                Ask { provider, policy: "shop/p".into(), rule: 0 }
            })
            .collect();
        let (case, answers) = (Case::get("/"), Answers(RefCell::default()));
        let head = case.head();
        let answer = ask(&asks, &asked(&head, None), &answers).now_or_never().unwrap();
        (answer, answers.0.into_inner())
    };
    let (answer, whom) = ask_all(&["a", "b"]);
    let Answer::Allow(allowed) = answer else { panic!("denied") };
    assert_eq!((allowed.headers.len(), whom), (2, strings(&["a", "b"])));
    let (answer, whom) = ask_all(&["a", "no", "b"]);
    assert_eq!((denial(&answer), whom), ((403, BY_AUTHORIZER), strings(&["a", "no"])));
}
