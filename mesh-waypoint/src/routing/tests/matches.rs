//! Each kind of match.

use super::*;

/// Whether a match holds for a request, whatever the rule's place.
fn holds(matching: &l7::HttpMatch, request: &Request) -> bool {
    let routes = build([route("VirtualService", "v", [rule("it", [matching.clone()])])]);
    assert_eq!(routes.problems().count(), 0);
    routed(&routes, request) == "it"
}

#[test]
fn paths_match_whole_by_characters_by_segments_or_by_expression() {
    let table = [
        ("=/a", "/a", true),
        ("=/a", "/a/", false),
        ("=/a", "/A", false),
        ("=/a", "/a?q=1", true),
        ("i=/aB", "/Ab", true),
        ("/a*", "/a", true),
        ("/a*", "/ab", true),
        ("/a*", "/a/b", true),
        ("/a*", "/b/a", false),
        ("/a/*", "/a", false),
        ("i/API/*", "/api/x", true),
        ("/*", "/anything", true),
        ("/a", "/a", true),
        ("/a", "/a/", true),
        ("/a", "/a/b", true),
        ("/a", "/ab", false),
        ("/a/", "/a", true),
        ("/a/", "/a/b", true),
        ("/a/", "/ab", false),
        ("/", "/", true),
        ("/", "/a", true),
        ("i/Foo", "/fOO/x", true),
        ("i/Foo", "/fOOx", false),
        ("~/a", "/a", true),
        ("~/a", "/ab", false),
        ("~/a.*", "/ab/c", true),
        ("~/a.+", "/a", false),
        ("~/a.+", "/ab", true),
        ("~.*", "/x", true),
        ("~/v[0-9]+/x", "/v12/x", true),
        ("~/v[0-9]+/x", "/v12/xy", false),
        ("~/v[0-9]+/x", "/v/x", false),
        ("~/(a|b)/c", "/b/c", true),
        ("~/a|/b", "/b", true),
        ("~/a|/b", "/b/", false),
        ("~/a[(]b|/c", "/c", true),
        (r"~/a\.b", "/a.b", true),
        (r"~/a\.b", "/axb", false),
        ("~/ab?", "/a", true),
        ("~/ab*", "/abb", true),
        (r"~/\d", "/7", true),
        (r"~/\pL", "/é", true),
        ("~(?i)/a", "/A", true),
        // The case is ignored in exact and prefix matches only.
        ("i~/a", "/A", false),
    ];
    for (test, at, expected) in table {
        assert_eq!(holds(&path(test), &get(at)), expected, "{test} for {at}");
    }
}

#[test]
fn methods_schemes_and_authorities_match_as_texts() {
    let test = |field: &str, test: &str| {
        let value = Some(value(test));
        match field {
            "method" => l7::HttpMatch { method: value, ..Default::default() },
            "scheme" => l7::HttpMatch { scheme: value, ..Default::default() },
            _ => l7::HttpMatch { authority: value, ..Default::default() },
        }
    };
    let request = get("/").method(Method::POST).scheme("https").authority("Reviews.shop:9080");
    let table = [
        ("method", "=POST", true),
        ("method", "=GET", false),
        ("method", "~GET|POST", true),
        ("method", "i=post", true),
        ("scheme", "=https", true),
        ("scheme", "=http", false),
        ("authority", "=Reviews.shop:9080", true),
        ("authority", "=reviews.shop:9080", false),
        ("authority", "i=reviews.shop:9080", true),
        ("authority", "Reviews*", true),
        ("authority", "*:9080", true),
        ("authority", "i*.SHOP:9080", true),
        ("authority", "~.*shop.*", true),
        ("authority", "*", true),
    ];
    for (field, text, expected) in table {
        assert_eq!(holds(&test(field, text), &request), expected, "{field} {text}");
    }
}

#[test]
fn headers_match_by_value_presence_and_absence() {
    let request = get("/").with("user", "jason").with("tag", "a").with("tag", "b").with("empty", "");
    let table: [(&[(&str, &str)], bool); 24] = [
        (&[("user", "=jason")], true),
        (&[("user", "=Jason")], false),
        (&[("user", "i=Jason")], true),
        (&[("user", "ja*")], true),
        (&[("user", "*son")], true),
        (&[("user", "~j.s.n")], true),
        (&[("user", "i~J.S.N")], true),
        (&[("user", "~j.s")], false),
        (&[("user", "*")], true),
        (&[("other", "*")], false),
        (&[("other", "=")], false),
        (&[("empty", "=")], true),
        (&[("empty", "*")], true),
        // Several of one name are one value.
        (&[("tag", "=a,b")], true),
        (&[("tag", "=a")], false),
        (&[("user", "!=jason")], false),
        (&[("user", "!=eve")], true),
        (&[("other", "!=eve")], true),
        (&[("other", "!*")], true),
        (&[("user", "!*")], false),
        // An absent header is an empty one to a test that is inverted.
        (&[("other", "!=")], false),
        (&[("other", "!~.*")], false),
        (&[("user", "=jason"), ("tag", "a*")], true),
        (&[("user", "=jason"), ("tag", "b*")], false),
    ];
    for (tests, expected) in table {
        assert_eq!(holds(&headers(tests), &request), expected, "{tests:?}");
    }
    let pseudo = get("/").method(Method::PUT).authority("shop.example").scheme("https");
    assert!(holds(&headers(&[("host", "=shop.example")]), &pseudo));
    assert!(holds(&headers(&[(":authority", "=shop.example")]), &pseudo));
    assert!(holds(&headers(&[(":method", "=PUT"), (":scheme", "=https")]), &pseudo));
    assert!(!holds(&headers(&[("host", "!=shop.example")]), &pseudo));
    // Bytes that are no text are compared all the same.
    let mut bytes = get("/");
    bytes.headers.insert("user", HeaderValue::from_bytes(b"jas\xffon").unwrap());
    assert!(holds(&headers(&[("user", "jas*")]), &bytes));
    assert!(holds(&headers(&[("user", "~jas.on")]), &bytes));
}

#[test]
fn of_query_parameters_the_first_of_a_name_counts() {
    let request = get("/?a=1&b&a=2&c=x=y");
    let table: [(&[(&str, &str)], bool); 11] = [
        (&[("a", "=1")], true),
        (&[("a", "=2")], false),
        (&[("b", "=")], true),
        (&[("b", "*")], true),
        (&[("c", "=x=y")], true),
        (&[("d", "*")], false),
        (&[("a", "~[0-9]")], true),
        (&[("a", "1*")], true),
        (&[("c", "*y")], true),
        (&[("a", "=1"), ("b", "*")], true),
        (&[("a", "=1"), ("d", "*")], false),
    ];
    for (tests, expected) in table {
        assert_eq!(holds(&query(tests), &request), expected, "{tests:?}");
    }
    assert!(!holds(&query(&[("a", "*")]), &get("/")));
}

#[test]
fn a_source_is_known_by_its_certificate_and_labels() {
    let from = |namespace: &str, labels: &[(&str, &str)]| l7::HttpMatch {
        source_namespace: namespace.to_owned(),
        source_labels: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        ..Default::default()
    };
    let request = get("/").from("shop", &[("app", "cart"), ("version", "v2")]);
    assert!(holds(&from("shop", &[]), &request));
    assert!(!holds(&from("shop2", &[]), &request));
    assert!(holds(&from("", &[("app", "cart")]), &request));
    assert!(holds(&from("shop", &[("app", "cart"), ("version", "v2")]), &request));
    assert!(!holds(&from("", &[("app", "cart"), ("version", "v1")]), &request));
    assert!(!holds(&from("", &[("zone", "")]), &request));
    // A source that is not known is of no namespace.
    assert!(!holds(&from("shop", &[]), &get("/")));
    assert!(!holds(&from("", &[("app", "cart")]), &get("/")));
}

#[test]
fn the_port_is_that_of_the_service() {
    let on = |port| l7::HttpMatch { port, ..Default::default() };
    assert!(holds(&on(9080), &get("/")));
    assert!(!holds(&on(80), &get("/")));
    assert!(holds(&on(80), &get("/").to("shop", REVIEWS, 80)));
}

#[test]
fn claims_of_the_token_match_as_texts_and_lists() {
    let claim = |path: &[&str], test: &str| {
        let (invert, test) = test.strip_prefix('!').map_or((false, test), |rest| (true, rest));
        let claim = path.iter().map(|name| (*name).to_owned()).collect();
        let header = l7::HeaderMatch { claim, value: Some(value(test)), invert, ..Default::default() };
        l7::HttpMatch { headers: vec![header], ..Default::default() }
    };
    let request = get("/").claims(
        r#"{"sub":"eve","groups":["admin","dev"],"nested":{"a":{"b":"c"}},"scope":"read write","age":7}"#,
    );
    let table: [(&[&str], &str, bool); 16] = [
        (&["sub"], "=eve", true),
        (&["sub"], "=adam", false),
        (&["sub"], "!=adam", true),
        (&["sub"], "e*", true),
        (&["sub"], "*", true),
        (&["groups"], "=admin", true),
        (&["groups"], "=dev", true),
        (&["groups"], "=root", false),
        (&["groups"], "!=root", true),
        (&["nested", "a", "b"], "=c", true),
        (&["nested", "a"], "=c", false),
        (&["nested", "x", "b"], "=c", false),
        (&["scope"], "=write", true),
        (&["scope"], "=read write", true),
        (&["age"], "=7", false),
        (&["none"], "!*", true),
    ];
    for (path, test, expected) in table {
        assert_eq!(holds(&claim(path, test), &request), expected, "{path:?} {test}");
    }
    // No token, no claim.
    assert!(!holds(&claim(&["sub"], "=eve"), &get("/")));
    assert!(holds(&claim(&["sub"], "!=eve"), &get("/")));
}

#[test]
fn all_conditions_of_a_match_must_hold_and_one_match_is_enough() {
    let both = l7::HttpMatch {
        path: Some(path_match("/a")),
        method: Some(value("=GET")),
        headers: vec![header("x", "=1")],
        query: query(&[("q", "=1")]).query,
        ..Default::default()
    };
    assert!(holds(&both, &get("/a?q=1").with("x", "1")));
    assert!(!holds(&both, &get("/a?q=1")));
    assert!(!holds(&both, &get("/a").with("x", "1")));
    assert!(!holds(&both, &get("/b?q=1").with("x", "1")));
    assert!(!holds(&both, &get("/a?q=1").with("x", "1").method(Method::PUT)));
    let routes = build([route("VirtualService", "v", [rule("it", [both, path("=/z")])])]);
    assert_eq!(routed(&routes, &get("/z")), "it");
    assert_eq!(routed(&routes, &get("/y")), "404");
    // No match is every request.
    let routes = build([route("VirtualService", "v", [rule("it", [])])]);
    assert_eq!(routed(&routes, &get("/y")), "it");
}

#[test]
fn a_match_says_its_name_and_what_of_the_path_it_took() {
    use crate::routing::MatchedPath;
    let named = l7::HttpMatch { name: "old-clients".into(), ..path("/a/b*") };
    let routes = build([route("VirtualService", "v", [rule("it", [named])])]);
    let request = get("/a/bc");
    let found = matched(&routes, &request);
    assert_eq!((found.match_name, found.path), ("old-clients", MatchedPath::Characters(4)));
    let path_of = |kind, test: &str, at: &str| {
        matched(&build([route(kind, "v", [rule("it", [path(test)])])]), &get(at)).path
    };
    assert_eq!(path_of("VirtualService", "=/a", "/a"), MatchedPath::Whole);
    assert_eq!(path_of("VirtualService", "~/a.*", "/ab"), MatchedPath::Whole);
    assert_eq!(path_of("HTTPRoute", "/a/", "/a/b"), MatchedPath::Segments(2));
    assert_eq!(path_of("HTTPRoute", "/", "/a/b"), MatchedPath::Segments(0));
    // Without a path it is the prefix `/`, in the words of each API.
    let any = |kind| matched(&build([route(kind, "v", [rule("it", [])])]), &get("/a")).path;
    assert_eq!(any("VirtualService"), MatchedPath::Characters(1));
    assert_eq!(any("HTTPRoute"), MatchedPath::Segments(0));
}

#[test]
fn an_expression_that_does_not_compile_answers_500_and_is_listed() {
    let table = [
        (path("~/a("), "matches[0].path: is no regular expression: unclosed group"),
        (path("~/a)(?:b"), "matches[0].path: is no regular expression: unopened group"),
        (
            headers(&[("x", "~[")]),
            "matches[0].headers[0] \"x\": is no regular expression: unclosed character class",
        ),
        (query(&[("x", "~a**{")]), "matches[0].query[0] \"x\": is no regular expression"),
        (path("~(a{1000}){1000}"), "matches[0].path: is larger than 262144 bytes when compiled"),
        (headers(&[("a b", "=1")]), "matches[0].headers[0] \"a b\": is no name of a header"),
        (
            l7::HttpMatch { port: 70_000, ..Default::default() },
            "matches[0].port: 70000 is no port (0 to 65535)",
        ),
    ];
    for (matching, reason) in table {
        let routes = build([route(
            "VirtualService",
            "v",
            [rule("before", [path("=/before")]), rule("it", [matching.clone()]), rule("after", [])],
        )]);
        let found = matched(&routes, &get("/any")).rule;
        assert_eq!(&*found.name, "it", "{matching:?}");
        assert!(invalid(found).starts_with(reason), "{} / {reason}", invalid(found));
        assert_eq!(routed(&routes, &get("/before")), "before");
        let problems: Vec<_> = routes.problems().map(ToString::to_string).collect();
        assert_eq!(problems.len(), 1);
        assert!(problems[0].starts_with("VirtualService/shop/v: rule \"it\": matches[0]."), "{problems:?}");
        assert!(problems[0].ends_with("; requests under this rule are answered with 500"), "{problems:?}");
    }
    // Neither does inverting the test let requests past the rule.
    let inverted = headers(&[("x", "!~[")]);
    let routes = build([route("VirtualService", "v", [rule("it", [inverted]), rule("after", [])])]);
    assert_eq!(routed(&routes, &get("/")), "it");
    assert_eq!(routed(&routes, &get("/").with("x", "1")), "it");
}

#[test]
fn rules_with_thousands_of_conditions_are_found_like_any_other() {
    let conditions: Vec<_> = (0..5000).map(|n| header(&format!("x-{n}"), "=1")).collect();
    let matching = l7::HttpMatch { headers: conditions, ..l7::HttpMatch::default() };
    let rules = (0..8).map(|n| rule(&format!("r{n}"), [matching.clone()]));
    let routes = build([route("VirtualService", "v", rules)]);
    let with = |count| (0..count).fold(get("/"), |request, n| request.with(&format!("x-{n}"), "1"));
    assert_eq!(routed(&routes, &with(5000)), "r0");
    assert_eq!(routed(&routes, &with(4999)), "404");
}
