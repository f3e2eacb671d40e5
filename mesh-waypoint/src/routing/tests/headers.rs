//! Edits of headers, and what other origins are answered.

use super::*;

fn edits(set: &[(&str, &str)], add: &[(&str, &str)], remove: &[&str]) -> l7::HeaderEdits {
    let pairs = |list: &[(&str, &str)]| {
        list.iter().map(|(n, v)| l7::Header { name: (*n).to_owned(), value: (*v).to_owned() }).collect()
    };
    l7::HeaderEdits {
        set: pairs(set),
        add: pairs(add),
        remove: remove.iter().map(|name| (*name).to_owned()).collect(),
    }
}

fn map(list: &[(&str, &str)]) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in list {
        map.append(name.parse::<HeaderName>().unwrap(), value.parse().unwrap());
    }
    map
}

#[test]
fn headers_are_removed_then_set_then_added() {
    let rule = compiled(l7::HttpRule {
        request_headers: Some(edits(
            &[("A", "set"), ("b", "set"), ("d", "set")],
            &[("a", "added"), ("c", "added")],
            &["B", "E"],
        )),
        response_headers: Some(edits(&[("server", "mine")], &[], &["x-powered-by"])),
        ..rule("it", [])
    });
    let mut request = map(&[("a", "1"), ("a", "2"), ("b", "1"), ("c", "1"), ("e", "1"), ("f", "1")]);
    rule.edit_request(None, &mut request);
    let expected = map(&[
        ("a", "set"),
        ("a", "added"),
        ("b", "set"),
        ("c", "1"),
        ("c", "added"),
        ("d", "set"),
        ("f", "1"),
    ]);
    assert_eq!(request, expected);
    let mut response = map(&[("server", "theirs"), ("x-powered-by", "x")]);
    rule.edit_response(None, &mut response);
    assert_eq!(response, map(&[("server", "mine")]));
}

#[test]
fn edits_of_the_rule_come_after_those_of_the_backend() {
    let with = |to: &str| Some(edits(&[("who", to)], &[("order", to)], &[]));
    let own = l7::WeightedBackend {
        request_headers: with("backend"),
        response_headers: with("backend"),
        ..backend(REVIEWS, 1)
    };
    let action = l7::http_rule::Action::Forward(l7::Forward { backends: vec![own] });
    let rule = compiled(l7::HttpRule {
        request_headers: with("rule"),
        response_headers: with("rule"),
        action: Some(action),
        ..rule("it", [])
    });
    let Action::Forward(forward) = &rule.action else { panic!("{rule:?}") };
    let backend = Some(&forward.backends[0]);
    let expected = map(&[("who", "rule"), ("order", "backend"), ("order", "rule")]);
    let mut headers = HeaderMap::new();
    rule.edit_request(backend, &mut headers);
    assert_eq!(headers, expected);
    let mut headers = HeaderMap::new();
    rule.edit_response(backend, &mut headers);
    assert_eq!(headers, expected);
}

#[test]
fn a_host_that_is_set_is_the_authority() {
    for name in ["Host", ":authority"] {
        let rule = compiled(l7::HttpRule {
            request_headers: Some(edits(&[(name, "a.example:81")], &[], &[])),
            rewrite: Some(l7::Rewrite { authority: "b.example".into(), path: None }),
            ..rule("it", [])
        });
        assert_eq!(rule.authority_for(None).unwrap(), "a.example:81");
        let mut headers = map(&[("x", "1")]);
        rule.edit_request(None, &mut headers);
        assert_eq!(headers, map(&[("x", "1")]));
    }
}

#[test]
fn headers_that_frame_a_message_are_left_alone_and_that_is_said() {
    let routes = build([route(
        "VirtualService",
        "v",
        [l7::HttpRule {
            request_headers: Some(edits(
                &[("Transfer-Encoding", "chunked"), ("x", "1")],
                &[("content-length", "1")],
                &["Connection", "host"],
            )),
            ..rule("it", [])
        }],
    )]);
    let problems: Vec<_> = routes.problems().map(ToString::to_string).collect();
    let line = |field: &str| {
        format!(
            "VirtualService/shop/v: rule \"it\": request_headers.{field}: how messages are framed and sent is for the \
             proxy to say; it has no effect"
        )
    };
    let fields =
        ["set \"Transfer-Encoding\"", "add \"content-length\"", "remove \"Connection\"", "remove \"host\""];
    assert_eq!(problems, fields.map(line));
    let request = get("/");
    let mut headers = map(&[("connection", "close"), ("host", "a")]);
    matched(&routes, &request).rule.edit_request(None, &mut headers);
    assert_eq!(headers, map(&[("connection", "close"), ("host", "a"), ("x", "1")]));
}

#[test]
fn an_edit_that_cannot_be_done_answers_500() {
    let reason = |edits| {
        invalid(&compiled(l7::HttpRule { request_headers: Some(edits), ..rule("it", []) })).to_owned()
    };
    assert_eq!(
        reason(edits(&[("a b", "1")], &[], &[])),
        "request_headers.set \"a b\": is no name of a header (RFC 9110, section 5.1)"
    );
    assert_eq!(
        reason(edits(&[], &[("a", "1\r\nb: 2")], &[])),
        "request_headers.add \"a\": the value has characters that no header may have: control characters"
    );
    assert_eq!(
        reason(edits(&[], &[], &["a:"])),
        "request_headers.remove \"a:\": is no name of a header (RFC 9110, section 5.1)"
    );
    assert_eq!(
        reason(edits(&[("host", "a b")], &[], &[])),
        "request_headers.set \"host\": \"a b\" is no host, nor host:port"
    );
}

fn cors(edit: impl FnOnce(&mut l7::Cors)) -> Arc<crate::routing::Rule> {
    let mut cors = l7::Cors {
        allow_origins: vec![value("=https://shop.example"), value("~https://.*\\.shop\\.example")],
        allow_methods: vec!["GET".into(), "PUT".into()],
        allow_headers: vec!["x-one".into(), "x-two".into()],
        expose_headers: vec!["x-three".into()],
        max_age: Some(prost_types::Duration { seconds: 600, nanos: 0 }),
        allow_credentials: false,
        forward_unmatched_preflights: true,
    };
    edit(&mut cors);
    compiled(l7::HttpRule { cors: Some(cors), ..rule("it", []) })
}

const PREFLIGHT: [(&str, &str); 3] = [
    ("origin", "https://shop.example"),
    ("access-control-request-method", "PUT"),
    ("access-control-request-headers", "x-one, x-nine"),
];

#[test]
fn a_preflight_of_an_allowed_origin_is_answered() {
    let rule = cors(|_| {});
    let cors = rule.cors.as_ref().unwrap();
    let answer = cors.preflight(&Method::OPTIONS, &map(&PREFLIGHT)).unwrap();
    let expected = map(&[
        ("access-control-allow-origin", "https://shop.example"),
        ("vary", "Origin"),
        ("access-control-allow-methods", "GET,PUT"),
        ("access-control-allow-headers", "x-one,x-two"),
        ("access-control-expose-headers", "x-three"),
        ("access-control-max-age", "600"),
    ]);
    assert_eq!(answer, expected);
    let by_expression = map(&[("origin", "https://www.shop.example"), PREFLIGHT[1]]);
    let answer = cors.preflight(&Method::OPTIONS, &by_expression).unwrap();
    assert_eq!(answer["access-control-allow-origin"], "https://www.shop.example");
}

#[test]
fn what_is_no_preflight_is_sent_on() {
    let rule = cors(|cors| cors.forward_unmatched_preflights = false);
    let cors = rule.cors.as_ref().unwrap();
    assert_eq!(cors.preflight(&Method::GET, &map(&PREFLIGHT)), None);
    assert_eq!(cors.preflight(&Method::OPTIONS, &map(&PREFLIGHT[..1])), None);
    assert_eq!(cors.preflight(&Method::OPTIONS, &map(&PREFLIGHT[1..])), None);
}

#[test]
fn a_preflight_of_another_origin_is_sent_on_or_answered_without_leave() {
    let foreign = map(&[("origin", "https://evil.example"), PREFLIGHT[1]]);
    let rule = cors(|_| {});
    assert_eq!(rule.cors.as_ref().unwrap().preflight(&Method::OPTIONS, &foreign), None);
    let rule = cors(|cors| cors.forward_unmatched_preflights = false);
    let answer = rule.cors.as_ref().unwrap().preflight(&Method::OPTIONS, &foreign);
    assert_eq!(answer, Some(HeaderMap::new()));
}

#[test]
fn wildcards_name_what_is_asked_for_where_credentials_are_allowed() {
    let any = |credentials| {
        cors(|cors| {
            cors.allow_methods = vec!["*".into()];
            cors.allow_headers = vec!["*".into()];
            cors.allow_credentials = credentials;
        })
    };
    let answer = |credentials| {
        any(credentials).cors.as_ref().unwrap().preflight(&Method::OPTIONS, &map(&PREFLIGHT)).unwrap()
    };
    let with = answer(true);
    assert_eq!(with["access-control-allow-credentials"], "true");
    assert_eq!(with["access-control-allow-methods"], "PUT");
    assert_eq!(with["access-control-allow-headers"], "x-one, x-nine");
    let without = answer(false);
    assert_eq!(without.get("access-control-allow-credentials"), None);
    assert_eq!(without["access-control-allow-methods"], "*");
    assert_eq!(without["access-control-allow-headers"], "*");
}

#[test]
fn responses_to_an_allowed_origin_say_so_and_others_do_not() {
    let rule = cors(|cors| cors.allow_credentials = true);
    let cors = rule.cors.as_ref().unwrap();
    let request = map(&[("origin", "https://shop.example")]);
    let origin = cors.allowed_origin(&request).unwrap();
    let mut response = map(&[("access-control-allow-origin", "https://else.example"), ("vary", "Accept")]);
    cors.edit_response(origin, &mut response);
    let expected = map(&[
        ("access-control-allow-origin", "https://shop.example"),
        ("access-control-allow-credentials", "true"),
        ("access-control-expose-headers", "x-three"),
        ("vary", "Accept"),
        ("vary", "Origin"),
    ]);
    assert_eq!(response, expected);
    cors.edit_response(origin, &mut response);
    assert_eq!(response, expected);
    assert_eq!(cors.allowed_origin(&map(&[("origin", "https://evil.example")])), None);
    assert_eq!(cors.allowed_origin(&map(&[])), None);
}
