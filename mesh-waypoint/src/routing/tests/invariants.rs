//! What must hold for every set of rules and every request.

use http::Uri;
use proptest::prelude::*;
use proptest::sample::select;
use prost::Message;

use super::*;
use crate::routing::MatchedPath;

/// Few texts, so that rules overlap and requests fall under them.
fn a_path_test() -> impl Strategy<Value = Option<l7::PathMatch>> {
    let tests = [
        "=/",
        "=/a",
        "=/a/b",
        "=/ab",
        "i=/A",
        "i=/a/B",
        "/*",
        "/a*",
        "/a/*",
        "/ab*",
        "/abc*",
        "i/A*",
        "i/a/B*",
        "/",
        "/a",
        "/a/",
        "/a/b",
        "/ab",
        "i/A",
        "i/a/B",
        "~/a.*",
        "~/a.+",
        "~/a/b",
        "~/a|/b",
        "~/(a|b)/.*",
        "~/ab?",
        "~.*b",
        "~/[ab]+",
        r"~/a\.b",
        "~(",
        "~(?i)/A",
        "=",
        "*",
        "=a",
    ];
    prop::option::of(select(tests.to_vec()).prop_map(path_match))
}

fn a_value_test() -> impl Strategy<Value = l7::StringMatch> {
    let tests =
        ["=1", "=2", "=3", "=", "i=A", "=a", "=A", "1*", "*2", "~[12]", "~.*", "i~a", "*", "~[", "=1,2"];
    let unset = l7::StringMatch::default();
    prop_oneof![9 => select(tests.to_vec()).prop_map(value), 1 => Just(unset)]
}

fn a_header_test() -> impl Strategy<Value = l7::HeaderMatch> {
    let names = ["x", "y", "z", "host"];
    let claims = [&[][..], &[], &[], &["c"], &["scope"]];
    let claims =
        select(claims.to_vec()).prop_map(|claim| claim.iter().map(|name| (*name).to_owned()).collect());
    (select(names.to_vec()), prop::option::of(a_value_test()), prop::bool::weighted(0.15), claims).prop_map(
        |(name, value, invert, claim)| l7::HeaderMatch { name: name.to_owned(), value, invert, claim },
    )
}

fn a_match() -> impl Strategy<Value = l7::HttpMatch> {
    let query = (select(&["p", "q"][..]), prop::option::of(a_value_test()))
        .prop_map(|(name, value)| l7::QueryMatch { name: name.to_owned(), value });
    let rarely = |text: &'static [&'static str]| prop::option::weighted(0.2, select(text).prop_map(value));
    let source = (select(&["", "", "", "shop"][..]), prop::bool::weighted(0.1));
    (
        a_path_test(),
        rarely(&["=GET", "=POST", "~GET|PUT"]),
        rarely(&["=reviews", "i=REVIEWS", "rev*"]),
        prop::collection::vec(a_header_test(), 0..3),
        prop::collection::vec(query, 0..2),
        prop_oneof![9 => Just(0), 1 => Just(80_u32)],
        source,
    )
        .prop_map(|(path, method, authority, headers, query, port, (namespace, labels))| l7::HttpMatch {
            path,
            method,
            authority,
            headers,
            query,
            port,
            source_namespace: namespace.to_owned(),
            source_labels: labels.then(|| ("app".to_owned(), "cart".to_owned())).into_iter().collect(),
            ..l7::HttpMatch::default()
        })
}

fn some_rules(kind: &'static str) -> impl Strategy<Value = l7::Route> {
    let rules = prop::collection::vec(prop::collection::vec(a_match(), 0..4), 0..40);
    rules.prop_map(move |rules| route(kind, "r", rules.into_iter().map(|matches| rule("r", matches))))
}

/// An object that comes, changes or goes.
fn a_change() -> impl Strategy<Value = (String, Option<l7::Route>)> {
    let parents = prop::collection::vec(
        (select(&[REVIEWS, "details.shop.svc.cluster.local", "*"][..]), 0..2_u32),
        0..3,
    );
    let object = (select(&["VirtualService", "HTTPRoute"][..]), select(&["a", "b", "c"][..]));
    let rules = prop::collection::vec(select(&["one", "two", "three"][..]), 0..3);
    (object, parents, rules, 0..3_i64, prop::bool::weighted(0.3)).prop_map(
        |((kind, name), parents, rules, created, goes)| {
            let mut route = route(kind, name, rules.into_iter().map(|name| rule(name, [])));
            route.parents = parents.into_iter().map(|(host, port)| parent("", host, port * 80)).collect();
            if let Some(origin) = &mut route.origin {
                origin.created = created;
            }
            (format!("{kind}/shop/{name}"), (!goes).then_some(route))
        },
    )
}

fn a_request() -> impl Strategy<Value = Request> {
    let paths = [
        "/", "/a", "/A", "/a/", "/a/b", "/a/B", "/A/b/c", "/ab", "/abc", "/abb", "/a.b", "/b/x", "/b",
        "/x/b", "*", "/ba",
    ];
    let values = select(&["1", "2", "3", "", "a", "A", "12", "~"][..]);
    let headers = prop::collection::vec((select(&["x", "y", "z", "w"][..]), values.clone()), 0..5);
    let query = prop::collection::vec((select(&["p", "q", "r"][..]), values), 0..3);
    let rest = (
        select(&[Method::GET, Method::POST, Method::PUT][..]),
        select(&["reviews", "Reviews", "other"][..]),
        any::<bool>(),
        any::<bool>(),
        select(&[80, 9080][..]),
    );
    (select(paths.to_vec()), headers, query, rest).prop_map(|(path, headers, query, rest)| {
        let (method, authority, known, token, port) = rest;
        let query: Vec<_> = query.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let mut request = get(path).method(method).authority(authority).to("shop", REVIEWS, port);
        request.query = (!query.is_empty()).then(|| query.join("&"));
        for (name, value) in headers {
            request = request.with(name, value);
        }
        if known {
            request = request.from("shop", &[("app", "cart")]);
        }
        if token { request.claims(r#"{"c":["1","a"],"scope":"1 2"}"#) } else { request }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    /// The index finds what looking at one rule after the other finds.
    #[test]
    fn the_index_finds_the_first_match_and_no_other(
        route in prop_oneof![some_rules("VirtualService"), some_rules("HTTPRoute")],
        requests in prop::collection::vec(a_request(), 16),
    ) {
        let routes = build([route]);
        let rules = routes.services.get(&*format!("shop/{REVIEWS}"));
        for request in requests {
            let Addressed::Service { port, .. } = request.addressed else { unreachable!() };
            let Some(index) = rules.and_then(|rules| rules.port(port).http.as_ref()) else { continue };
            let found = index.find(&request.head(), port).map(|(entry, path)| (Arc::as_ptr(entry), path));
            let expected = index.find_one_by_one(&request.head(), port);
            prop_assert_eq!(found, expected.map(|(entry, path)| (Arc::as_ptr(entry), path)), "{:?}", request);
        }
    }

    /// One change after the other ends where building everything at once does.
    #[test]
    fn changes_in_a_row_come_to_what_building_at_once_comes_to(
        steps in prop::collection::vec((a_change(), 0..3_usize), 1..12),
    ) {
        let hosts = [REVIEWS, "details.shop.svc.cluster.local"];
        let meshes = [mesh(), mesh_of([("shop", REVIEWS)]), mesh()];
        let mut resources = Resources::default();
        let mut routes = Routes::default();
        for ((name, route), at) in steps {
            match route {
                Some(route) => resources.routes.insert(name, route.into()),
                None => resources.routes.remove(&name),
            };
            routes = Routes::build(&resources, &meshes[at], &own(), &routes);
            let at_once = Routes::build(&resources, &meshes[at], &own(), &Routes::default());
            if at == 1 {
                routes.settle(&mut resources.routes);
            }
            for host in hosts {
                let listed = |routes: &Routes, port| -> Vec<_> {
                    let key = format!("shop/{host}");
                    routes.rules(&key, port).map(|(rule, _)| format!("{} {}", rule.resource, rule.name)).collect()
                };
                for port in [80, 9080] {
                    prop_assert_eq!(listed(&routes, port), listed(&at_once, port));
                }
            }
            prop_assert_eq!(routes.services().count(), at_once.services().count());
        }
    }

    /// Splitting off what an expression begins with changes nothing.
    #[test]
    fn an_expression_means_what_the_engine_says(
        pattern in r"[ab./*+?()|\\\[\]^$-]{0,8}",
        values in prop::collection::vec(r"[ab./*+?()|\\^$-]{0,6}", 16),
    ) {
        let patterns = crate::routing::pattern::Patterns::default();
        let by_engine = patterns.whole_by_engine(&pattern);
        let ours = patterns.whole(&pattern);
        prop_assert_eq!(ours.is_ok(), by_engine.is_ok(), "{:?} {:?}", ours, by_engine);
        if let (Ok(ours), Ok(by_engine)) = (ours, by_engine) {
            for value in values {
                let expected = by_engine.is_match(value.as_bytes());
                prop_assert_eq!(ours.is_match(value.as_bytes()), expected, "{:?} {:?}", &pattern, &value);
                prop_assert!(!expected || value.starts_with(ours.prefix()));
            }
        }
    }

    /// Whatever is written into a rule, what it makes of a request is a URI.
    #[test]
    fn rewrites_and_redirects_make_uris(
        replacement in "\\PC{0,12}",
        pattern in select(&["/", "a", "(.)", "^", "$", "[^/]*", "é"][..]),
        kind in 0..3,
        test in select(&["/*", "/a*", "/", "/a", "=/a", "~.*", "i/A/*"][..]),
        at in select(&["/", "/a", "/a/", "/a/%20b", "/a%", "/é", "/a//b", "/A/x"][..]),
        query in prop::option::of("[a-z%=&?/ é#]{0,6}"),
    ) {
        let rewrite = match kind {
            0 => l7::rewrite::Path::Full(replacement.clone()),
            1 => l7::rewrite::Path::Prefix(replacement.clone()),
            _ => l7::rewrite::Path::Regex(l7::RegexRewrite {
                pattern: pattern.to_owned(),
                replacement: replacement.replace('\\', "\\\\"),
            }),
        };
        let redirect = l7::Redirect {
            path: Some(match kind {
                0 => l7::redirect::Path::Full(replacement),
                _ => l7::redirect::Path::Prefix(replacement),
            }),
            ..l7::Redirect::default()
        };
        let rule = l7::HttpRule {
            matches: vec![path(test), l7::HttpMatch::default()],
            rewrite: Some(l7::Rewrite { path: Some(rewrite), ..l7::Rewrite::default() }),
            action: Some(l7::http_rule::Action::Redirect(redirect)),
            ..l7::HttpRule::default()
        };
        let routes = build([route("VirtualService", "v", [rule])]);
        let mut request = get("/");
        request.path = at.to_owned();
        request.query = query;
        let head = request.head();
        let found = matched(&routes, &request);
        let new = found.rule.rewrite_for(None).unwrap().path(found.path, head.path, head.query).unwrap().unwrap();
        prop_assert!(is_target(new.as_str()), "{}", new);
        let uri: Uri = new.as_str().parse().unwrap();
        prop_assert_eq!(uri.path_and_query(), Some(&new));
        let Action::Redirect(redirect) = &found.rule.action else { unreachable!() };
        let location = redirect.location(&head, found.path).unwrap();
        let target = location.to_str().unwrap().strip_prefix("http://reviews:9080").unwrap().to_owned();
        prop_assert!(is_target(&target), "{}", target);
    }

    /// Prefixes come from matches; a length that is none of the path's does no harm.
    #[test]
    fn a_matched_length_beyond_the_path_does_not_panic(length in 0..9_usize, at in "[/a-zé]{0,4}") {
        let rewrite = l7::Rewrite { path: Some(l7::rewrite::Path::Prefix("/x".into())), ..Default::default() };
        let rule = compiled(l7::HttpRule { rewrite: Some(rewrite), ..rule("it", []) });
        for matched in [MatchedPath::Characters(length), MatchedPath::Segments(length)] {
            let new = rule.rewrite_for(None).unwrap().path(matched, &at, None).unwrap().unwrap();
            prop_assert!(is_target(new.as_str()), "{}", new);
        }
    }

    /// Whatever the control plane sends is compiled, and requests get an answer.
    #[test]
    fn any_route_can_be_compiled(
        texts in prop::collection::vec("\\PC{0,6}", 1..20),
        numbers in prop::collection::vec(prop_oneof![any::<u32>(), 0..600_u32], 1..20),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        request in a_request(),
    ) {
        let route = full_route(&mut Cursor { texts: &texts, numbers: &numbers, text: 0, number: 0 });
        let mut bytes = route.encode_to_vec();
        for (at, byte) in flips {
            *at.get_mut(&mut bytes) = byte;
        }
        let flipped = l7::Route::decode(&*bytes).ok();
        for mut route in std::iter::once(route).chain(flipped) {
            route.parents.push(parent("", REVIEWS, 0));
            if let Some(origin) = &mut route.origin {
                origin.namespace = "shop".to_owned();
            }
            let routes = build([route]);
            let _ = routes.problems().map(ToString::to_string).count();
            let _ = routes.tcp(&request.addressed, "", &request.source, "10.0.0.1".parse().unwrap());
            if let Routed::Rule(found) = routes.http(&request.head()) {
                apply_all(found, &request);
            }
        }
    }
}

/// An origin-form target (RFC 9112, section 3.2.1), strictly by RFC 3986.
fn is_target(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-._~/?:@!$&'()*+,;=%".contains(&b);
    let mut parts = text.split('%');
    let head_has_no_escape = parts.next().is_some();
    let escapes = parts.all(|part| part.len() >= 2 && part.bytes().take(2).all(|b| b.is_ascii_hexdigit()));
    text.starts_with('/') && text.bytes().all(allowed) && head_has_no_escape && escapes
}

/// Everything that a rule can do to a request.
fn apply_all(found: Matched<'_>, request: &Request) {
    let (rule, head) = (found.rule, request.head());
    let mut headers = request.headers.clone();
    rule.edit_request(None, &mut headers);
    rule.edit_response(None, &mut headers);
    if let Some(rewrite) = rule.rewrite_for(None) {
        let _ = rewrite.path(found.path, head.path, head.query);
    }
    if let Some(cors) = &rule.cors {
        let _ = cors.preflight(head.method, head.headers);
    }
    if let Some(fault) = &rule.fault {
        let _ = fault.decide(1, 2);
    }
    match &rule.action {
        Action::Forward(forward) => {
            let backend = forward.pick_backend(7);
            rule.edit_request(backend, &mut headers);
            let _ = rule.authority_for(backend);
        }
        Action::Redirect(redirect) => {
            let _ = redirect.location(&head, found.path);
        }
        Action::Respond(_) | Action::Invalid(_) => {}
    }
}

/// Hands out texts and numbers, over and over.
struct Cursor<'a> {
    texts: &'a [String],
    numbers: &'a [u32],
    text: usize,
    number: usize,
}

impl Cursor<'_> {
    fn text(&mut self) -> String {
        self.text += 1;
        self.texts[self.text % self.texts.len()].clone()
    }

    fn number(&mut self) -> u32 {
        self.number += 1;
        self.numbers[self.number % self.numbers.len()]
    }

    fn flag(&mut self) -> bool {
        self.number().is_multiple_of(2)
    }

    fn duration(&mut self) -> Option<prost_types::Duration> {
        let seconds = i64::from(self.number()) - 100;
        self.flag().then_some(prost_types::Duration { seconds, nanos: -1 })
    }

    fn value(&mut self) -> l7::StringMatch {
        use l7::string_match::Kind;
        let kind = match self.number() % 6 {
            0 => Some(Kind::Exact(self.text())),
            1 => Some(Kind::Prefix(self.text())),
            2 => Some(Kind::Suffix(self.text())),
            3 => Some(Kind::Regex(self.text())),
            4 => Some(Kind::Present(self.flag())),
            _ => None,
        };
        l7::StringMatch { kind, ignore_case: self.flag() }
    }

    fn edits(&mut self) -> Option<l7::HeaderEdits> {
        let header = |cx: &mut Self| l7::Header { name: cx.text(), value: cx.text() };
        Some(l7::HeaderEdits { set: vec![header(self)], add: vec![header(self)], remove: vec![self.text()] })
    }

    fn service(&mut self) -> l7::ServiceRef {
        l7::ServiceRef { namespace: self.text(), hostname: self.text(), port: self.number() }
    }

    fn backend(&mut self) -> Option<l7::Backend> {
        Some(l7::Backend { service: Some(self.service()), subset: self.text(), invalid: self.text() })
    }

    fn rewrite(&mut self) -> Option<l7::Rewrite> {
        use l7::rewrite::Path;
        let path = match self.number() % 4 {
            0 => Some(Path::Full(self.text())),
            1 => Some(Path::Prefix(self.text())),
            2 => Some(Path::Regex(l7::RegexRewrite { pattern: self.text(), replacement: self.text() })),
            _ => None,
        };
        let authority = if self.flag() { self.text() } else { String::new() };
        Some(l7::Rewrite { authority, path })
    }

    fn redirect(&mut self) -> l7::Redirect {
        let path = self.flag().then(|| l7::redirect::Path::Prefix(self.text()));
        l7::Redirect {
            scheme: self.text(),
            authority: self.text(),
            port: self.number(),
            derive_port: i32::from(self.flag()),
            status: self.number(),
            path,
        }
    }

    fn weighted(&mut self) -> l7::WeightedBackend {
        l7::WeightedBackend {
            backend: self.backend(),
            weight: self.number(),
            request_headers: self.edits(),
            response_headers: self.edits(),
            mirrors: vec![l7::Mirror { backend: self.backend(), parts_per_million: self.number() }],
            redirect: self.flag().then(|| self.redirect()),
            rewrite: self.rewrite(),
        }
    }

    fn matching(&mut self) -> l7::HttpMatch {
        use l7::path_match::Kind;
        let kind = match self.number() % 5 {
            0 => Some(Kind::Exact(self.text())),
            1 => Some(Kind::Prefix(self.text())),
            2 => Some(Kind::Segments(self.text())),
            3 => Some(Kind::Regex(self.text())),
            _ => None,
        };
        let header = l7::HeaderMatch {
            name: self.text().to_lowercase(),
            value: Some(self.value()),
            invert: self.flag(),
            claim: if self.flag() { vec![self.text()] } else { Vec::new() },
        };
        l7::HttpMatch {
            name: self.text(),
            path: Some(l7::PathMatch { kind, ignore_case: self.flag() }),
            method: self.flag().then(|| self.value()),
            scheme: self.flag().then(|| self.value()),
            authority: self.flag().then(|| self.value()),
            headers: vec![header],
            query: vec![l7::QueryMatch { name: self.text(), value: Some(self.value()) }],
            port: self.number(),
            source_namespace: String::new(),
            source_labels: BTreeMap::new(),
        }
    }

    fn action(&mut self) -> Option<l7::http_rule::Action> {
        use l7::http_rule::Action;
        match self.number() % 4 {
            0 => Some(Action::Forward(l7::Forward { backends: vec![self.weighted(), self.weighted()] })),
            1 => Some(Action::Redirect(self.redirect())),
            2 => {
                let response = l7::DirectResponse { status: self.number(), body: vec![0] };
                Some(Action::DirectResponse(response))
            }
            _ => None,
        }
    }

    fn http_rule(&mut self) -> l7::HttpRule {
        use l7::fault::abort::Kind;
        let abort = l7::fault::Abort {
            kind: Some(if self.flag() {
                Kind::HttpStatus(self.number())
            } else {
                Kind::GrpcStatus(self.number())
            }),
            parts_per_million: self.number(),
        };
        let delay = l7::fault::Delay { fixed: self.duration(), parts_per_million: self.number() };
        l7::HttpRule {
            name: self.text(),
            matches: vec![self.matching(), l7::HttpMatch::default()],
            request_headers: self.edits(),
            response_headers: self.edits(),
            rewrite: self.rewrite(),
            action: self.action(),
            mirrors: vec![l7::Mirror { backend: self.backend(), parts_per_million: self.number() }],
            cors: Some(l7::Cors {
                allow_origins: vec![self.value()],
                allow_methods: vec![self.text()],
                allow_headers: vec![self.text()],
                expose_headers: vec![self.text()],
                max_age: self.duration(),
                allow_credentials: self.flag(),
                forward_unmatched_preflights: self.flag(),
            }),
            fault: Some(l7::Fault { delay: Some(delay), abort: Some(abort) }),
            timeout: self.duration(),
            retry: None,
            session: None,
            rate_limit: Some(l7::RateLimit {
                tokens: self.number(),
                per: self.duration(),
                burst: self.number(),
                per_identity: self.flag(),
            }),
        }
    }
}

/// Every field in use.
fn full_route(cx: &mut Cursor<'_>) -> l7::Route {
    let tcp_match = l7::TcpMatch {
        port: cx.number(),
        sni_hosts: vec![cx.text()],
        source_subnets: Vec::new(),
        destination_subnets: vec![cx.text()],
        source_namespace: cx.text(),
        source_labels: BTreeMap::from([(cx.text(), cx.text())]),
    };
    let kinds = ["HTTPRoute", "VirtualService", "TLSRoute", "TCPRoute", ""];
    l7::Route {
        origin: Some(l7::Origin {
            kind: kinds[cx.number() as usize % kinds.len()].to_owned(),
            namespace: cx.text(),
            name: cx.text(),
            created: i64::from(cx.number()),
        }),
        parents: vec![cx.service()],
        http: vec![cx.http_rule(), cx.http_rule()],
        tcp: vec![l7::TcpRule { name: cx.text(), matches: vec![tcp_match], backends: vec![cx.weighted()] }],
        ..l7::Route::default()
    }
}
