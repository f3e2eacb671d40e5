//! The HTTP variant.

use super::*;

fn http() -> l7::Provider {
    l7::Provider {
        path_prefix: "/check".into(),
        include_request_headers: strings(&["X-Tenant", "x-pre*", "*-suf"]),
        additional_headers: vec![l7::Header { name: "x-from".into(), value: "mesh".into() }],
        headers_to_upstream_on_allow: strings(&["x-user*"]),
        headers_to_downstream_on_allow: strings(&["set-cookie"]),
        headers_to_downstream_on_deny: strings(&["x-why"]),
        grpc: false,
        ..grpc()
    }
}

fn with_headers(status: u16, headers: &[(&'static str, &'static str)]) -> Reply {
    let mut reply = Reply { status: StatusCode::from_u16(status).unwrap(), ..Reply::default() };
    for (name, value) in headers {
        reply.headers.append(*name, HeaderValue::from_static(value));
    }
    reply
}

#[test]
fn the_question_is_the_requests_head_with_the_headers_that_are_wanted() {
    let case = Case::get("/cart")
        .query("a=b")
        .method("PUT")
        .header("authorization", "Bearer x")
        .header("x-tenant", "t")
        .header("x-pre-1", "p")
        .header("a-suf", "s")
        .header("x-from", "client")
        .header("cookie", "c=d")
        .header("content-length", "99");
    let head = case.head();
    let question = question(&http(), &asked(&head, None)).unwrap();
    assert!(!question.grpc);
    assert_eq!(question.timeout, Duration::from_secs(600));
    let (parts, body) = question.request.into_parts();
    assert_eq!((parts.method.as_str(), body.len()), ("PUT", 0));
    assert_eq!(parts.uri, "http://cart.shop/check/cart?a=b");
    let mut sent: Vec<String> =
        parts.headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
    sent.sort();
    assert_eq!(
        sent,
        [
            "a-suf: s",
            "authorization: Bearer x",
            "content-length: 0",
            "x-from: mesh",
            "x-pre-1: p",
            "x-tenant: t"
        ]
    );

    let body = Body { bytes: Bytes::from_static(b"hello"), partial: true };
    let question = super::super::question(
        &l7::Provider { max_request_bytes: 5, allow_partial_message: true, ..http() },
        &asked(&head, Some(&body)),
    )
    .unwrap();
    assert_eq!(question.request.body(), "hello");
    assert_eq!(question.request.headers()["content-length"], "5");
    assert_eq!(question.request.headers()["x-envoy-auth-partial-body"], "true");
}

#[test]
fn only_200_is_a_yes_and_passes_on_what_is_listed() {
    let reply = with_headers(
        200,
        &[
            ("x-user", "alice"),
            ("x-user-group", "dev"),
            ("x-user-group", "ops"),
            ("set-cookie", "a=b"),
            ("x-other", "no"),
            ("x-envoy-auth-headers-to-remove", "x-gone, x-gone-too, host"),
        ],
    );
    let Answer::Allow(allowed) = answer(&http(), Ok(reply)) else { panic!("denied") };
    let mut headers = HeaderMap::new();
    for name in ["x-user", "x-user-group", "x-gone", "x-gone-too", "host", "x-other"] {
        headers.insert(name, HeaderValue::from_static("client"));
    }
    for change in &allowed.headers {
        change.apply(&mut headers);
    }
    let all =
        |name: &str| headers.get_all(name).iter().map(|v| v.to_str().unwrap()).collect::<Vec<_>>().join(",");
    for (name, expected) in [
        ("x-user", "alice"),
        ("x-user-group", "dev,ops"),
        ("x-gone", ""),
        ("x-gone-too", ""),
        ("host", "client"),
        ("x-other", "client"),
    ] {
        assert_eq!(all(name), expected, "{name}");
    }
    assert_eq!(
        allowed.response_headers,
        [HeaderChange::Append(header::SET_COOKIE, HeaderValue::from_static("a=b"))]
    );
    for status in [201, 204, 302, 401, 403, 404] {
        assert_eq!(denial(&answer(&http(), Ok(with_headers(status, &[])))), (status, BY_AUTHORIZER));
    }
    for status in [500, 503] {
        assert_eq!(denial(&answer(&http(), Ok(with_headers(status, &[])))), (403, BY_FAILURE));
    }
}

#[test]
fn a_no_passes_its_body_and_the_headers_that_are_listed_or_all() {
    let reply = || Reply {
        body: Bytes::from_static(b"why"),
        ..with_headers(
            401,
            &[
                ("x-why", "1"),
                ("www-authenticate", "Basic"),
                ("x-other", "2"),
                ("content-length", "3"),
                ("connection", "close"),
            ],
        )
    };
    let names = |provider: &l7::Provider| {
        let Answer::Deny(denied) = answer(provider, Ok(reply())) else { panic!("allowed") };
        assert_eq!(&*denied.body, b"why");
        denied.headers.iter().map(|(name, _)| name.as_str().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(names(&http()), ["x-why", "www-authenticate"]);
    let all = l7::Provider { headers_to_downstream_on_deny: Vec::new(), ..http() };
    assert_eq!(names(&all), ["x-why", "www-authenticate", "x-other"]);
}

#[test]
fn a_question_that_cannot_be_asked_is_a_failure() {
    let case = Case::get("/").host("not a host");
    let head = case.head();
    let error = question(&http(), &asked(&head, None)).map(drop).unwrap_err();
    assert_eq!(denial(&answer(&http(), Err(error))), (403, BY_FAILURE));
}
