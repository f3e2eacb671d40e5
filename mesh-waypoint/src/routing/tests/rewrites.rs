//! What becomes of paths, authorities and locations.

use http::StatusCode;

use super::*;
use crate::routing::{MatchedPath, RewriteError};

fn rewrite(path: l7::rewrite::Path) -> l7::HttpRule {
    l7::HttpRule {
        rewrite: Some(l7::Rewrite { path: Some(path), ..l7::Rewrite::default() }),
        ..rule("it", [])
    }
}

/// Path and query after the rewrite of a rule that matched `test`.
fn rewritten(kind: &str, test: &str, to: l7::rewrite::Path, request: &str) -> String {
    let rule = l7::HttpRule { matches: vec![path(test)], ..rewrite(to) };
    let routes = build([route(kind, "r", [rule])]);
    let request = get(request);
    let found = matched(&routes, &request);
    let head = request.head();
    let new = found.rule.rewrite_for(None).unwrap().path(found.path, head.path, head.query).unwrap();
    new.unwrap().to_string()
}

#[test]
fn a_segment_prefix_is_replaced_as_the_gateway_api_has_it() {
    let table = [
        ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
        ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
        ("/foo/bar", "/foo/", "/xyz", "/xyz/bar"),
        ("/foo/bar", "/foo/", "/xyz/", "/xyz/bar"),
        ("/foo", "/foo", "/xyz", "/xyz"),
        ("/foo/", "/foo", "/xyz", "/xyz/"),
        ("/foo/bar", "/foo", "", "/bar"),
        ("/foo/", "/foo", "", "/"),
        ("/foo", "/foo", "", "/"),
        ("/foo/", "/foo", "/", "/"),
        ("/foo", "/foo", "/", "/"),
        ("/bar", "/", "/xyz", "/xyz/bar"),
        ("/", "/", "/xyz", "/xyz/"),
        ("/foo/bar?q=1&r", "/foo", "/xyz", "/xyz/bar?q=1&r"),
    ];
    for (at, test, to, expected) in table {
        let new = rewritten("HTTPRoute", test, l7::rewrite::Path::Prefix(to.into()), at);
        assert_eq!(new, expected, "{at}: {test} to {to}");
    }
}

#[test]
fn characters_of_a_prefix_are_replaced_as_envoy_has_it() {
    let table = [
        ("/foo/bar", "/foo*", "/xyz", "/xyz/bar"),
        ("/foo/bar", "/foo/*", "/xyz", "/xyzbar"),
        ("/foo/bar", "/foo/*", "/", "/bar"),
        ("/foo/bar", "/foo*", "/", "//bar"),
        ("/foobar", "/foo*", "/xyz", "/xyzbar"),
        ("/bar", "/*", "/xyz/", "/xyz/bar"),
        ("/foo/bar?a=/foo", "/foo*", "/xyz", "/xyz/bar?a=/foo"),
        ("/FOO/bar", "i/foo*", "/xyz", "/xyz/bar"),
        // What was matched whole is replaced whole.
        ("/foo", "=/foo", "/xyz", "/xyz"),
        ("/foo/bar", "~/f.*", "/xyz", "/xyz"),
        // A query of the replacement goes first.
        ("/foo?b=2", "=/foo", "/xyz?a=1", "/xyz?a=1&b=2"),
    ];
    for (at, test, to, expected) in table {
        let new = rewritten("VirtualService", test, l7::rewrite::Path::Prefix(to.into()), at);
        assert_eq!(new, expected, "{at}: {test} to {to}");
    }
}

#[test]
fn a_full_replacement_keeps_the_query_only() {
    let full = |at: &str, to: &str| rewritten("HTTPRoute", "/", l7::rewrite::Path::Full(to.into()), at);
    assert_eq!(full("/foo/bar?q=1", "/xyz"), "/xyz?q=1");
    assert_eq!(full("/foo/bar", "/xyz/"), "/xyz/");
    assert_eq!(full("/foo", "xyz"), "/xyz");
    assert_eq!(full("/foo", ""), "/");
}

#[test]
fn an_expression_is_replaced_wherever_it_matches() {
    let regex = |pattern: &str, replacement: &str, at: &str| {
        let to = l7::RegexRewrite { pattern: pattern.into(), replacement: replacement.into() };
        rewritten("VirtualService", "/*", l7::rewrite::Path::Regex(to), at)
    };
    let table = [
        (r"^/service/([^/]+)(/.*)$", r"\2/instance/\1", "/service/foo/v1/api", "/v1/api/instance/foo"),
        ("one", "two", "/xxx/one/yyy/one/zzz?one", "/xxx/two/yyy/two/zzz?one"),
        ("^(.*?)one(.*)$", r"\1two\2", "/xxx/one/yyy/one/zzz", "/xxx/two/yyy/one/zzz"),
        ("(?i)/xxx/", "/yyy/", "/aaa/XxX/bbb", "/aaa/yyy/bbb"),
        ("a", r"[\0]", "/a/a", "/%5Ba%5D/%5Ba%5D"),
        ("(a)|(b)", r"<\1\2>", "/ab", "/%3Ca%3E%3Cb%3E"),
        ("none", "x", "/a", "/a"),
        ("^/(.)", r"\1", "/abc", "/abc"),
        ("/b", r"?x=\0", "/a/b?c", "/a?x=/b&c"),
        (r"\+", r"\\", "/a+b", "/a%5Cb"),
    ];
    for (pattern, replacement, at, expected) in table {
        assert_eq!(regex(pattern, replacement, at), expected, "{pattern} to {replacement} in {at}");
    }
}

#[test]
fn a_rewrite_that_cannot_be_done_answers_500() {
    let regex = |pattern: &str, replacement: &str| {
        l7::rewrite::Path::Regex(l7::RegexRewrite {
            pattern: pattern.into(),
            replacement: replacement.into(),
        })
    };
    let table = [
        (regex("(", ""), "rewrite.regex.pattern: is no regular expression: unclosed group"),
        (regex("(a)", r"\2"), r"rewrite.regex.replacement: names the group \2, and the pattern has 1"),
        (
            regex("a", r"\n"),
            "rewrite.regex.replacement: has a backslash that is followed neither by a digit nor by another one",
        ),
    ];
    for (path, reason) in table {
        assert_eq!(invalid(&compiled(rewrite(path))), reason);
    }
    let host = |authority: &str| {
        compiled(l7::HttpRule {
            rewrite: Some(l7::Rewrite { authority: authority.into(), path: None }),
            ..rule("it", [])
        })
    };
    assert_eq!(invalid(&host("a b")), "rewrite.authority: \"a b\" is no host, nor host:port");
    assert_eq!(invalid(&host("user@a")), "rewrite.authority: \"user@a\" is no host, nor host:port");
    assert_eq!(host("a.example:80").authority_for(None).unwrap(), "a.example:80");
}

#[test]
fn a_path_that_would_become_too_long_is_an_error() {
    let to = l7::RegexRewrite { pattern: "a".into(), replacement: "bbbbbbbbbb".into() };
    let rule = compiled(rewrite(l7::rewrite::Path::Regex(to)));
    let path = "/".to_owned() + &"a".repeat(7000);
    let rewrite = rule.rewrite_for(None).unwrap();
    assert_eq!(rewrite.path(MatchedPath::Whole, &path, None), Err(RewriteError::TooLong));
    assert!(rewrite.path(MatchedPath::Whole, &path[..6000], None).is_ok());
    let query = "q".repeat(6000);
    assert_eq!(rewrite.path(MatchedPath::Whole, &path[..6000], Some(&query)), Err(RewriteError::TooLong));
}

#[test]
fn the_rewrite_of_a_backend_wins_over_that_of_the_rule() {
    let prefix = |authority: &str| l7::Rewrite { authority: authority.into(), path: None };
    let own = l7::WeightedBackend { rewrite: Some(prefix("backend")), ..backend(REVIEWS, 1) };
    let forward = l7::Forward { backends: vec![own, backend(REVIEWS, 1)] };
    let rule = compiled(l7::HttpRule {
        rewrite: Some(prefix("rule")),
        action: Some(l7::http_rule::Action::Forward(forward)),
        ..rule("it", [])
    });
    let Action::Forward(forward) = &rule.action else { panic!("{rule:?}") };
    assert_eq!(rule.authority_for(Some(&forward.backends[0])).unwrap(), "backend");
    assert_eq!(rule.authority_for(Some(&forward.backends[1])).unwrap(), "rule");
    assert_eq!(rule.authority_for(None).unwrap(), "rule");
}

fn location(redirect: l7::Redirect, test: &str, request: &Request) -> (StatusCode, String) {
    let action = Some(l7::http_rule::Action::Redirect(redirect));
    let rule = l7::HttpRule { matches: vec![path(test)], action, ..rule("it", []) };
    let routes = build([route("VirtualService", "v", [rule])]);
    let found = matched(&routes, request);
    let Action::Redirect(redirect) = &found.rule.action else { panic!("{:?}", found.rule) };
    let location = redirect.location(&request.head(), found.path).unwrap();
    (redirect.status, location.to_str().unwrap().to_owned())
}

#[test]
fn a_redirect_derives_its_port_as_it_is_told() {
    use l7::redirect::DerivePort::{FromProtocolDefault, FromRequestPort, Keep};
    // Scheme, authority, port and derivation of the redirect; authority of the request, by http; location.
    let table = [
        ("", "", 0, Keep, "a:8080", "http://a:8080/p?q=1"),
        ("", "", 0, Keep, "a", "http://a/p?q=1"),
        ("", "", 0, Keep, "[::1]:8080", "http://[::1]:8080/p?q=1"),
        ("", "", 0, Keep, "[::1]", "http://[::1]/p?q=1"),
        ("https", "", 0, Keep, "a:80", "https://a/p?q=1"),
        ("https", "", 0, Keep, "a:8080", "https://a:8080/p?q=1"),
        ("", "b", 0, Keep, "a:8080", "http://b/p?q=1"),
        ("", "b:81", 0, Keep, "a:8080", "http://b:81/p?q=1"),
        ("HTTPS", "b", 0, Keep, "a:8080", "https://b/p?q=1"),
        ("", "", 8443, Keep, "a:8080", "http://a:8443/p?q=1"),
        ("https", "", 443, Keep, "a:8080", "https://a/p?q=1"),
        ("http", "", 80, Keep, "a:8080", "http://a/p?q=1"),
        ("https", "", 80, Keep, "a", "https://a:80/p?q=1"),
        ("", "b:81", 82, Keep, "a", "http://b:82/p?q=1"),
        ("https", "", 0, FromProtocolDefault, "a:8080", "https://a/p?q=1"),
        ("", "", 0, FromProtocolDefault, "a:8080", "http://a/p?q=1"),
        ("", "", 0, FromRequestPort, "a", "http://a:9080/p?q=1"),
        ("https", "b", 0, FromRequestPort, "a:1", "https://b:9080/p?q=1"),
    ];
    for (scheme, authority, port, derive, of_request, expected) in table {
        let redirect = l7::Redirect {
            scheme: scheme.into(),
            authority: authority.into(),
            port,
            derive_port: derive.into(),
            ..l7::Redirect::default()
        };
        let request = get("/p?q=1").authority(of_request);
        let case = format!("{redirect:?} of {of_request}");
        assert_eq!(
            location(redirect, "/*", &request),
            (StatusCode::MOVED_PERMANENTLY, expected.into()),
            "{case}"
        );
    }
    let plain = l7::Redirect { scheme: "http".into(), ..l7::Redirect::default() };
    let secure = get("/p").authority("a:443").scheme("https");
    assert_eq!(location(plain, "/*", &secure).1, "http://a/p");
}

#[test]
fn a_redirect_replaces_the_path_and_keeps_the_query() {
    use l7::redirect::Path::{Full, Prefix};
    let to = |path| l7::Redirect { path: Some(path), status: 307, ..l7::Redirect::default() };
    let table = [
        (Full("/new".into()), "/*", "/old?q=1", "http://reviews:9080/new?q=1"),
        (Full("/new?r=2".into()), "/*", "/old?q=1", "http://reviews:9080/new?r=2"),
        (Full("new".into()), "/*", "/old", "http://reviews:9080/new"),
        (Prefix("/new".into()), "/old*", "/old/x?q=1", "http://reviews:9080/new/x?q=1"),
        (Prefix("/new/".into()), "/old", "/old/x", "http://reviews:9080/new/x"),
        (Prefix("".into()), "/old", "/old", "http://reviews:9080/"),
        (Prefix("/new".into()), "=/old", "/old", "http://reviews:9080/new"),
        (Full("/a b\r\nx: y".into()), "/*", "/", "http://reviews:9080/a%20b%0D%0Ax:%20y"),
    ];
    for (path, test, at, expected) in table {
        let case = format!("{path:?} of {at}");
        let found = location(to(path), test, &get(at));
        assert_eq!(found, (StatusCode::TEMPORARY_REDIRECT, expected.to_owned()), "{case}");
    }
}

#[test]
fn a_redirect_that_cannot_be_answered_is_a_500() {
    let reason = |redirect: l7::Redirect| {
        let action = Some(l7::http_rule::Action::Redirect(redirect));
        invalid(&compiled(l7::HttpRule { action, ..rule("it", []) })).to_owned()
    };
    let of = l7::Redirect::default;
    assert_eq!(
        reason(l7::Redirect { status: 200, ..of() }),
        "redirect.status: 200 is no redirection (300 to 399)"
    );
    assert_eq!(
        reason(l7::Redirect { scheme: "ht tp".into(), ..of() }),
        "redirect.scheme: \"ht tp\" is no scheme; `http` or `https` is one"
    );
    assert_eq!(
        reason(l7::Redirect { authority: "a/b".into(), ..of() }),
        "redirect.authority: \"a/b\" is no host, nor host:port"
    );
    assert_eq!(reason(l7::Redirect { port: 65_536, ..of() }), "redirect.port: 65536 is no port (1 to 65535)");
}
