use mesh_core::xds::proto::l7 as wire;
use wire::http_rule::Action;
use wire::path_match::Kind as Path;
use wire::string_match::Kind;

use super::virtual_services::{WAYPOINT, problems, service};
use crate::convert::Resources;
use crate::testing::resources;

const PARENT: &str = "parentRefs: [{group: '', kind: Service, name: web}]";

/// Route `r` of namespace shop.
fn route(kind: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{name: r, namespace: shop, creationTimestamp: \"2026-01-01T00:00:00Z\"}}\nspec: {{{spec}}}\n"
    )
}

/// That route beside services web and api.
fn with(kind: &str, spec: &str) -> Resources {
    resources(&format!("{WAYPOINT}{}{}{}", service("web"), service("api"), route(kind, spec)))
}

fn http(rules: &str) -> Resources {
    with("HTTPRoute", &format!("{PARENT}, rules: [{rules}]"))
}

fn told<'a>(resources: &'a Resources, kind: &str) -> &'a wire::Route {
    &resources.l7.routes[&format!("{kind}/shop/r")]
}

/// Status, reason and message of a condition of the route.
fn condition(resources: &Resources, route: &str, kind: &str) -> (bool, String, String) {
    let found = resources.condition(&format!("{route} shop/r"), kind);
    (found.status, found.reason.clone(), found.message.clone())
}

fn forward(rule: &wire::HttpRule) -> &[wire::WeightedBackend] {
    match &rule.action {
        Some(Action::Forward(forward)) => &forward.backends,
        other => panic!("{other:?}"),
    }
}

fn value(kind: Kind) -> Option<wire::StringMatch> {
    Some(wire::StringMatch { kind: Some(kind), ignore_case: false })
}

fn path(m: &wire::HttpMatch) -> Path {
    m.path.clone().and_then(|p| p.kind).unwrap()
}

#[test]
fn an_http_route_says_what_it_matches() {
    let resources = http(
        "{name: a, matches: [{path: {type: Exact, value: /a}, method: GET, headers: [{name: X-A, value: '1'}, {type: RegularExpression, name: x-b, value: b+}], queryParams: [{name: q, value: z}]}, {path: {value: /b}}, {path: {type: RegularExpression, value: /c.*}}, {headers: [{name: x, value: y}]}], backendRefs: [{name: web, port: 80}]}, {backendRefs: [{name: web, port: 80}]}",
    );
    let route = told(&resources, "HTTPRoute");
    let parent =
        wire::ServiceRef { namespace: "shop".into(), hostname: "web.shop.svc.cluster.local".into(), port: 0 };
    assert_eq!(route.parents, std::slice::from_ref(&parent));
    let origin = route.origin.clone().unwrap();
    assert_eq!(
        (origin.kind.as_str(), origin.name.as_str(), origin.created),
        ("HTTPRoute", "r", 1_767_225_600)
    );
    let matches = &route.http[0].matches;
    assert_eq!(path(&matches[0]), Path::Exact("/a".into()));
    assert_eq!(path(&matches[1]), Path::Segments("/b".into()));
    assert_eq!(path(&matches[2]), Path::Regex("/c.*".into()));
    assert_eq!(path(&matches[3]), Path::Segments("/".into()), "the API's default");
    assert_eq!(matches[0].method, value(Kind::Exact("GET".into())));
    let headers: Vec<_> = matches[0].headers.iter().map(|h| (h.name.as_str(), h.value.clone())).collect();
    assert_eq!(headers, [("x-a", value(Kind::Exact("1".into()))), ("x-b", value(Kind::Regex("b+".into())))]);
    assert_eq!(matches[0].query[0].name, "q");
    assert_eq!(path(&route.http[1].matches[0]), Path::Segments("/".into()));
    assert_eq!(
        route.http.iter().map(|r| r.name.as_str()).collect::<Vec<_>>(),
        ["a", "rule-1"],
        "every rule has a name"
    );
    let backend = forward(&route.http[0])[0].clone();
    assert_eq!(
        (backend.backend.unwrap().service, backend.weight),
        (Some(wire::ServiceRef { port: 80, ..parent }), 1)
    );
    assert_eq!(condition(&resources, "HTTPRoute", "Accepted").1, "Accepted");
    assert_eq!(condition(&resources, "HTTPRoute", "ResolvedRefs").1, "ResolvedRefs");
    assert_eq!(condition(&resources, "HTTPRoute", "ResolvedWaypoints").1, "ResolvedWaypoints");
}

#[test]
fn filters_of_a_rule_and_of_a_backend_are_carried_over() {
    let resources = http(
        "{filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: a, value: '1'}], add: [{name: b, value: '2'}], remove: [C]}}, {type: ResponseHeaderModifier, responseHeaderModifier: {remove: [server]}}, {type: RequestMirror, requestMirror: {backendRef: {name: api, port: 80}, fraction: {numerator: 1, denominator: 8}}}, {type: RequestMirror, requestMirror: {backendRef: {name: api, port: 80}, percent: 50}}, {type: URLRewrite, urlRewrite: {hostname: h, path: {type: ReplacePrefixMatch, replacePrefixMatch: /v1}}}, {type: CORS, cors: {allowOrigins: ['https://a.example', 'https://*.b.example', '*'], allowMethods: [GET], allowCredentials: true}}], matches: [{path: {value: /x}}], backendRefs: [{name: web, port: 80, weight: 3, filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: d, value: '4'}]}}, {type: RequestMirror, requestMirror: {backendRef: {name: api, port: 80}}}]}, {name: api, port: 80, weight: 0}]}, {filters: [{type: RequestRedirect, requestRedirect: {scheme: https, hostname: n, path: {type: ReplaceFullPath, replaceFullPath: /f}, statusCode: 301}}]}, {filters: [{type: RequestRedirect, requestRedirect: {port: 8443}}]}",
    );
    let rules = &told(&resources, "HTTPRoute").http;
    let edits = rules[0].request_headers.clone().unwrap();
    assert_eq!((edits.set[0].name.as_str(), edits.add[0].value.as_str()), ("a", "2"));
    assert_eq!(edits.remove, ["c"]);
    assert!(rules[0].response_headers.is_some());
    let shares: Vec<u32> = rules[0].mirrors.iter().map(|m| m.parts_per_million).collect();
    assert_eq!(shares, [125_000, 500_000]);
    let mirror = rules[0].mirrors[0].backend.clone().unwrap().service.unwrap();
    assert_eq!(mirror.hostname, "api.shop.svc.cluster.local");
    let rewrite = rules[0].rewrite.clone().unwrap();
    assert_eq!(
        (rewrite.authority.as_str(), rewrite.path),
        ("h", Some(wire::rewrite::Path::Prefix("/v1".into())))
    );
    let cors = rules[0].cors.clone().unwrap();
    let origins: Vec<_> = cors.allow_origins.into_iter().map(|o| o.kind.unwrap()).collect();
    assert_eq!(
        origins,
        [
            Kind::Exact("https://a.example".into()),
            Kind::Regex("https://.+\\.b\\.example".into()),
            Kind::Present(true)
        ]
    );
    assert_eq!((cors.max_age.unwrap().seconds, cors.forward_unmatched_preflights), (5, false));
    let backends = forward(&rules[0]);
    assert_eq!(backends.iter().map(|b| b.weight).collect::<Vec<_>>(), [3, 0]);
    assert_eq!(backends[0].request_headers.clone().unwrap().set[0].name, "d");
    assert_eq!(backends[0].mirrors[0].parts_per_million, 1_000_000);
    assert!(backends[0].mirrors[0].backend.clone().unwrap().service.is_some());
    let redirect = |rule: &wire::HttpRule| match rule.action.clone() {
        Some(Action::Redirect(redirect)) => redirect,
        other => panic!("{other:?}"),
    };
    let first = redirect(&rules[1]);
    assert_eq!((first.status, first.path.clone()), (301, Some(wire::redirect::Path::Full("/f".into()))));
    assert_eq!(first.derive_port(), wire::redirect::DerivePort::FromProtocolDefault);
    assert_eq!((redirect(&rules[2]).status, redirect(&rules[2]).port), (302, 8443));
}

#[test]
fn timeouts_retries_and_sessions_are_carried_over() {
    let to = "backendRefs: [{name: web, port: 80}]";
    let resources = http(&format!(
        "{{timeouts: {{request: 10s, backendRequest: 2s}}, retry: {{codes: [500, 503], attempts: 3, backoff: 100ms}}, sessionPersistence: {{sessionName: s, absoluteTimeout: 1h, cookieConfig: {{lifetimeType: Permanent}}}}, {to}}}, {{timeouts: {{backendRequest: 2s}}, sessionPersistence: {{type: Header}}, {to}}}, {{timeouts: {{request: 0s}}, retry: {{}}, {to}}}"
    ));
    let rules = &told(&resources, "HTTPRoute").http;
    let retry = rules[0].retry.clone().unwrap();
    assert_eq!((rules[0].timeout.unwrap().seconds, retry.per_try_timeout.unwrap().seconds), (10, 2));
    assert_eq!((retry.attempts, retry.status_codes.clone()), (3, vec![500, 503]));
    assert_eq!(retry.backoff.unwrap().nanos, 100_000_000);
    assert_eq!(
        retry.on,
        ["connect-failure", "refused-stream", "unavailable", "cancelled", "retriable-status-codes"]
    );
    let session = rules[0].session.clone().unwrap();
    assert_eq!(
        (session.name.as_str(), session.header, session.lifetime.unwrap().seconds),
        ("s", false, 3600)
    );
    assert_eq!(rules[1].timeout.unwrap().seconds, 2, "without retry it is for the request");
    assert!(rules[1].retry.is_none() && rules[1].session.clone().unwrap().header);
    assert!(rules[2].timeout.is_none(), "0s is no timeout");
    assert_eq!(rules[2].retry.clone().unwrap().attempts, 2);
}

#[test]
fn a_grpc_route_matches_methods_as_paths() {
    let resources = with(
        "GRPCRoute",
        &format!(
            "{PARENT}, rules: [{{matches: [{{method: {{service: a.B, method: C}}}}, {{method: {{service: a.B}}}}, {{method: {{method: C}}}}, {{method: {{type: RegularExpression, service: 'a\\..*', method: Get.*}}, headers: [{{name: x, value: y}}]}}, {{}}], backendRefs: [{{name: api, port: 80}}]}}]"
        ),
    );
    let rule = &told(&resources, "GRPCRoute").http[0];
    let paths: Vec<Option<Path>> = rule.matches.iter().map(|m| m.path.clone().and_then(|p| p.kind)).collect();
    assert_eq!(
        paths,
        [
            Some(Path::Exact("/a.B/C".into())),
            Some(Path::Segments("/a.B".into())),
            Some(Path::Regex("/[^/]+/C".into())),
            Some(Path::Regex("/(?:a\\..*)/(?:Get.*)".into())),
            None
        ]
    );
    assert_eq!(rule.matches[3].headers[0].name, "x");
    assert_eq!(
        forward(rule)[0].backend.clone().unwrap().service.unwrap().hostname,
        "api.shop.svc.cluster.local"
    );
}

#[test]
fn routes_of_connections_have_weights_and_tls_routes_the_name_of_the_service() {
    let refs = "rules: [{backendRefs: [{name: web, port: 80, weight: 9}, {name: api, port: 80}]}, {backendRefs: [{name: api, port: 80}]}]";
    let tcp = with("TCPRoute", &format!("{}, {refs}", PARENT.replace("name: web}", "name: web, port: 80}")));
    let rules = &told(&tcp, "TCPRoute").tcp;
    assert_eq!(rules.len(), 1);
    assert_eq!(rules[0].backends.iter().map(|b| b.weight).collect::<Vec<_>>(), [9, 1]);
    assert_eq!(told(&tcp, "TCPRoute").parents[0].port, 80);
    assert!(condition(&tcp, "TCPRoute", "Accepted").2.contains("spec.rules[1]"));
    let tls = with(
        "TLSRoute",
        &format!("{PARENT}, hostnames: [web.shop.svc.cluster.local, other.example], {refs}"),
    );
    assert_eq!(told(&tls, "TLSRoute").tcp[0].matches[0].sni_hosts, ["web.shop.svc.cluster.local"]);
    assert!(condition(&tls, "TLSRoute", "Accepted").2.contains("spec.hostnames[1] (other.example"));
    let foreign = with("TLSRoute", &format!("{PARENT}, hostnames: [other.example], {refs}"));
    assert!(told(&foreign, "TLSRoute").tcp.is_empty());
}

#[test]
fn a_backend_of_another_namespace_needs_a_grant() {
    let other = service("pay").replace("namespace: shop", "namespace: bank");
    let spec = format!("{PARENT}, rules: [{{backendRefs: [{{name: pay, namespace: bank, port: 80}}]}}]");
    let with = |grant: &str| {
        resources(&format!("{WAYPOINT}{}{other}{}{grant}", service("web"), route("HTTPRoute", &spec)))
    };
    let grant = |from: &str, to: &str| {
        format!(
            "---\napiVersion: gateway.networking.k8s.io/v1beta1\nkind: ReferenceGrant\nmetadata: {{name: g, namespace: bank}}\nspec: {{from: [{{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: {from}}}], to: [{{group: '', kind: Service{to}}}]}}\n"
        )
    };
    let backend = |r: &Resources| forward(&told(r, "HTTPRoute").http[0])[0].backend.clone().unwrap();
    let refused = with("");
    assert_eq!(backend(&refused).service, None);
    assert!(backend(&refused).invalid.contains("no ReferenceGrant"), "{:?}", backend(&refused));
    assert_eq!(condition(&refused, "HTTPRoute", "ResolvedRefs").1, "RefNotPermitted");
    assert!(condition(&refused, "HTTPRoute", "Accepted").0, "the route itself is in order");
    for (text, granted) in [
        (grant("shop", ""), true),
        (grant("shop", ", name: pay"), true),
        (grant("shop", ", name: other"), false),
        (grant("elsewhere", ""), false),
        (grant("shop", "").replace("HTTPRoute", "GRPCRoute"), false),
    ] {
        assert_eq!(backend(&with(&text)).service.is_some(), granted, "{text}");
    }
}

#[test]
fn what_a_route_names_and_is_not_there_answers_500_and_is_told() {
    let entry = "---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: out, namespace: shop}\nspec: {hosts: [api.example], ports: [{number: 443, name: tls, protocol: TLS}], resolution: DNS}\n";
    let backend = |reference: &str| {
        let resources = resources(&format!(
            "{WAYPOINT}{}{entry}{}",
            service("web"),
            route("HTTPRoute", &format!("{PARENT}, rules: [{{backendRefs: [{{{reference}}}]}}]"))
        ));
        let backend = forward(&told(&resources, "HTTPRoute").http[0])[0].backend.clone().unwrap();
        (backend, condition(&resources, "HTTPRoute", "ResolvedRefs"))
    };
    for (reference, reason, text) in [
        ("name: nobody, port: 80", "BackendNotFound", "nobody.shop.svc.cluster.local names no service"),
        ("name: web, port: 81", "BackendNotFound", "has no port 81; it has 80"),
        ("name: web", "BackendNotFound", "port is missing"),
        ("name: web.shop, port: 80", "BackendNotFound", "is a host; write the name of the Service"),
        ("group: x, kind: Y, name: web, port: 80", "InvalidKind", "Y of group \"x\" is no backend"),
        (
            "group: networking.istio.io, kind: Hostname, name: no.example, port: 1",
            "BackendNotFound",
            "no.example names no service",
        ),
    ] {
        let (backend, (ok, found, message)) = backend(reference);
        assert!(backend.service.is_none() && backend.invalid.contains(text), "{reference}: {backend:?}");
        assert_eq!((ok, found.as_str()), (false, reason), "{reference}");
        assert!(message.starts_with("spec.rules[0].backendRefs[0]: "), "{message}");
    }
    let (found, (ok, ..)) =
        backend("group: networking.istio.io, kind: Hostname, name: api.example, port: 443");
    assert_eq!((found.service.unwrap().hostname.as_str(), ok), ("api.example", true));
    let nobody = http("{backendRefs: []}");
    let Some(Action::DirectResponse(direct)) = &told(&nobody, "HTTPRoute").http[0].action else { panic!() };
    assert_eq!(direct.status, 500, "there is nobody to send to");
}

#[test]
fn parents_are_services_of_the_own_namespace_and_everything_else_says_why_not() {
    let entry = "---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: out, namespace: shop, labels: {istio.io/use-waypoint: wp}}\nspec: {hosts: [api.example, b.example], ports: [{number: 443, name: tls, protocol: TLS}], resolution: DNS}\n";
    let rules = "rules: [{backendRefs: [{name: web, port: 80}]}]";
    let foreign = service("far").replace("namespace: shop", "namespace: bank");
    let of = |parents: &str| {
        resources(&format!(
            "{WAYPOINT}{}{entry}{foreign}{}",
            service("web"),
            route("HTTPRoute", &format!("parentRefs: [{parents}], {rules}"))
        ))
    };
    for (parents, reason, text) in [
        ("", "NoMatchingParent", "spec.parentRefs is missing"),
        (
            "{group: '', kind: Service, name: nobody}",
            "NoMatchingParent",
            "Service shop/nobody does not exist",
        ),
        (
            "{group: '', kind: Service, name: web, port: 81}",
            "NoMatchingParent",
            "Service shop/web has no port 81",
        ),
        (
            "{name: wp}",
            "NoMatchingParent",
            "Gateway shop/wp of class istio-waypoint takes no routes; to reach a waypoint, name the Service",
        ),
        (
            "{group: '', kind: Service, name: far, namespace: bank}",
            "NotAllowedByListeners",
            "of another namespace",
        ),
        ("{group: x, kind: Y, name: z}", "InvalidKind", "Y of group \"x\" is no parent"),
    ] {
        let resources = of(parents);
        let (ok, found, message) = condition(&resources, "HTTPRoute", "Accepted");
        assert_eq!((ok, found.as_str()), (false, reason), "{parents}");
        assert!(message.contains(text), "{parents}: {message}");
        assert!(resources.l7.routes.is_empty());
    }
    let both = of(
        "{group: networking.istio.io, kind: ServiceEntry, name: out}, {group: '', kind: Service, name: nobody}",
    );
    let hosts: Vec<&str> = told(&both, "HTTPRoute").parents.iter().map(|p| p.hostname.as_str()).collect();
    assert_eq!(hosts, ["api.example", "b.example"]);
    let (ok, _, message) = condition(&both, "HTTPRoute", "Accepted");
    assert!(ok && message.contains("spec.parentRefs[1]: Service shop/nobody does not exist"), "{message}");
    let unlabelled = service("web").replace("istio.io/use-waypoint: wp", "a: b");
    let unbound = resources(&format!("{unlabelled}{}", route("HTTPRoute", &format!("{PARENT}, {rules}"))));
    assert_eq!(condition(&unbound, "HTTPRoute", "ResolvedWaypoints").1, "MissingUseWaypointLabel");
}

#[test]
fn fields_without_effect_and_filters_that_cannot_be_applied_are_named() {
    let resources = with(
        "HTTPRoute",
        "parentRefs: [{group: '', kind: Service, name: web, sectionName: http}], hostnames: [a.example], useDefaultGateways: All, rules: [{matches: [{headers: [{name: a, value: '1'}, {name: A, value: '2'}], queryParams: [{name: q, value: '1'}, {name: q, value: '2'}]}], sessionPersistence: {idleTimeout: 1h, absoluteTimeout: 1h}, backendRefs: [{name: web, port: 80, filters: [{type: CORS, cors: {allowOrigins: ['*']}}]}]}]",
    );
    let (ok, reason, message) = condition(&resources, "HTTPRoute", "Accepted");
    assert_eq!((ok, reason.as_str()), (true, "UnsupportedValue"));
    for part in [
        "spec.parentRefs[0].sectionName",
        "spec.hostnames",
        "spec.useDefaultGateways",
        "spec.rules[0].matches[0].headers[1]",
        "spec.rules[0].matches[0].queryParams[1]",
        "spec.rules[0].sessionPersistence.idleTimeout",
        "spec.rules[0].sessionPersistence.absoluteTimeout",
        "spec.rules[0].backendRefs[0].filters (CORS",
    ] {
        assert!(message.contains(part), "{part}: {message}");
    }
    let to = "backendRefs: [{name: web, port: 80}]";
    let refused = http(&format!(
        "{{filters: [{{type: ExtensionRef, extensionRef: {{group: x, kind: Y, name: z}}}}], {to}}}, {{filters: [{{type: ExternalAuth, externalAuth: {{}}}}], {to}}}, {{{to}}}"
    ));
    let (ok, reason, message) = condition(&refused, "HTTPRoute", "Accepted");
    assert_eq!((ok, reason.as_str()), (false, "InvalidFilter"));
    assert!(
        message.contains("spec.rules[0].filters[0] (ExtensionRef), spec.rules[1].filters[0] (ExternalAuth)")
    );
    let rules = &told(&refused, "HTTPRoute").http;
    assert!(matches!(&rules[0].action, Some(Action::DirectResponse(d)) if d.status == 500), "never skipped");
    assert_eq!(forward(&rules[2]).len(), 1);
}

#[test]
fn what_is_wrong_is_refused_with_the_field_and_what_would_be_right() {
    let to = "backendRefs: [{name: web, port: 80}]";
    for (rule, expected) in [
        (
            "matches: [{path: {value: a}}]",
            "spec.rules[0].matches[0].path.value: \"a\" is no path; begin it with /",
        ),
        (
            "matches: [{path: {type: RegularExpression, value: '('}}]",
            "spec.rules[0].matches[0].path.value: \"(\" is no regular expression",
        ),
        (
            "matches: [{path: {type: Glob, value: /}}]",
            "spec.rules[0].matches[0].path.type: unknown variant `Glob`",
        ),
        (
            "filters: [{type: URLRewrite}]",
            "spec.rules[0].filters[0].urlRewrite: missing; the filter's type needs it",
        ),
        (
            "filters: [{type: Rewrite}]",
            "spec.rules[0].filters[0].type: \"Rewrite\" is unknown; write RequestHeaderModifier",
        ),
        (
            "matches: [{path: {type: Exact, value: /a}}], filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /}}}]",
            "spec.rules[0].filters: replacePrefixMatch needs matches by PathPrefix only",
        ),
        (
            "timeouts: {request: 1s, backendRequest: 2s}",
            "spec.rules[0].timeouts.backendRequest: is longer than request",
        ),
        (
            "filters: [{type: RequestMirror, requestMirror: {backendRef: {name: a, port: 1}, fraction: {numerator: 2, denominator: 1}}}]",
            "spec.rules[0].filters[0].requestMirror.fraction: is no share",
        ),
        (
            "filters: [{type: RequestRedirect, requestRedirect: {scheme: ftp}}]",
            "spec.rules[0].filters[0].requestRedirect.scheme: \"ftp\" is no scheme",
        ),
    ] {
        let found = problems(&route("HTTPRoute", &format!("{PARENT}, rules: [{{{rule}, {to}}}]")));
        assert!(found.iter().any(|f| f.starts_with(expected)), "{rule}: {found:#?}");
    }
    let redirect = problems(&route(
        "HTTPRoute",
        &format!(
            "{PARENT}, rules: [{{filters: [{{type: RequestRedirect, requestRedirect: {{port: 1}}}}], {to}}}]"
        ),
    ));
    assert!(redirect[0].contains("RequestRedirect may not stand beside backendRefs"), "{redirect:?}");
    let grpc = problems(&route(
        "GRPCRoute",
        &format!(
            "{PARENT}, rules: [{{filters: [{{type: CORS, cors: {{}}}}], matches: [{{method: {{}}}}], {to}}}]"
        ),
    ));
    assert!(grpc.iter().any(|p| p.contains("CORS is no filter of a GRPCRoute")), "{grpc:?}");
    assert!(grpc.iter().any(|p| p.starts_with("spec.rules[0].matches[0].method: is empty")), "{grpc:?}");
}

#[test]
fn where_a_route_of_the_gateway_api_names_a_service_virtual_services_do_not_count() {
    let rules = [
        "http: [{route: [{destination: {host: web}}]}]",
        "tcp: [{route: [{destination: {host: web}}]}]",
        "http: [{route: [{destination: {host: web}}]}], tcp: [{route: [{destination: {host: web}}]}]",
    ];
    let given = |kind: &str, hosts: &str, rules: &str| {
        let resources = resources(&format!(
            "{WAYPOINT}{}{}{}---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: v, namespace: shop}}\nspec: {{hosts: [{hosts}], {rules}}}\n",
            service("web"),
            service("api"),
            route(kind, &format!("{PARENT}, rules: [{{backendRefs: [{{name: web, port: 80}}]}}]")),
        ));
        resources.condition("VirtualService shop/v", "Accepted").clone()
    };
    for (kind, part, counts) in [
        ("HTTPRoute", "http", [false, true, true]),
        ("GRPCRoute", "http", [false, true, true]),
        ("TCPRoute", "tcp and tls", [true, false, true]),
        ("TLSRoute", "tcp and tls", [true, false, true]),
    ] {
        let said = format!(
            "its {part} rules do not count for web.shop.svc.cluster.local, for which {kind}/shop/r does"
        );
        for (rules, counts) in rules.into_iter().zip(counts) {
            let has_part =
                rules.contains(&format!("{}:", &part[..3])) || rules.contains("http:") && part == "http";
            let only = given(kind, "web", rules);
            assert_eq!(only.status, counts, "{kind}: {rules}");
            assert_eq!(only.message.contains(&said), has_part, "{kind}: {rules}: {}", only.message);
            assert_eq!(only.reason == "Conflicted", has_part, "{kind}: {rules}");
            let both = given(kind, "web, api", rules);
            assert!(both.status, "it counts for api: {both:?}");
        }
    }
}

/// Gateway `in` of namespace `edge`, of class istio.
fn gateway(listeners: &str) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: in, namespace: edge}}\nspec: {{gatewayClassName: istio, listeners: [{listeners}]}}\n"
    )
}

fn at_gateway(listeners: &str, spec: &str) -> Resources {
    let rules = "rules: [{backendRefs: [{name: web, port: 80}]}]";
    let spec = format!("{spec}, {rules}");
    resources(&format!("{}{}{}", service("web"), gateway(listeners), route("HTTPRoute", &spec)))
}

#[test]
fn a_gateway_is_told_with_its_listeners_for_http_and_the_routes_that_they_admit() {
    let listeners = "{name: http, port: 80, protocol: HTTP, hostname: '*.example.com', allowedRoutes: {namespaces: {from: All}}}, \
         {name: own, port: 80, protocol: HTTP}, {name: quic, port: 443, protocol: QUIC, allowedRoutes: {namespaces: {from: All}}}";
    let resources =
        at_gateway(listeners, "parentRefs: [{name: in, namespace: edge}], hostnames: [a.example.com]");
    let told_gateway = &resources.l7.gateways["Gateway/edge/in"];
    let names: Vec<_> =
        told_gateway.listeners.iter().map(|l| (l.name.as_str(), l.port, l.hostname.as_str())).collect();
    assert_eq!(names, [("http", 80, "*.example.com"), ("own", 80, "")]);
    let accepted = resources.condition("Gateway edge/in", "Accepted");
    assert!(
        accepted.status && accepted.message.contains("spec.listeners[2]: protocol is \"QUIC\""),
        "{accepted:?}"
    );
    let route = told(&resources, "HTTPRoute");
    let listeners: Vec<_> =
        route.gateways.iter().map(|l| (l.namespace.as_str(), l.name.as_str(), l.listener.as_str())).collect();
    assert_eq!(listeners, [("edge", "in", "http")]);
    assert_eq!((route.hostnames.as_slice(), route.parents.len()), (&["a.example.com".to_owned()][..], 0));
    assert!(condition(&resources, "HTTPRoute", "Accepted").0);
}

#[test]
fn what_came_of_each_parent_is_said_of_those_that_are_ours() {
    let listeners = "{name: a, port: 80, protocol: HTTP, allowedRoutes: {namespaces: {from: All}}}, \
         {name: b, port: 81, protocol: HTTP, allowedRoutes: {namespaces: {from: All}, kinds: [{kind: GRPCRoute}]}}";
    let parents = "parentRefs: [{name: in, namespace: edge}, {name: in, namespace: edge, sectionName: a}, \
         {name: in, namespace: edge, sectionName: b}, {name: gone}, {group: '', kind: Service, name: web}, \
         {group: '', kind: Service, name: gone}]";
    let resources = at_gateway(listeners, parents);
    let (_, states) = resources.attachments.parents.iter().next().unwrap();
    let said: Vec<_> =
        states.iter().map(|s| (s.index, s.refusal.as_ref().map(|(reason, _)| *reason))).collect();
    assert_eq!(
        said,
        [(0, None), (1, None), (2, Some("NotAllowedByListeners")), (4, None), (5, Some("NoMatchingParent"))],
        "a gateway that is not there may be anybody's"
    );
    let (_, listeners) = resources.attachments.listeners.iter().next().unwrap();
    let attached: Vec<u32> = listeners.iter().map(|l| l.attached).collect();
    assert_eq!(attached, [1, 0], "once, however often it is named");
}

#[test]
fn a_route_that_no_listener_takes_says_why() {
    let all = "allowedRoutes: {namespaces: {from: All}}";
    let http = format!("{{name: http, port: 80, protocol: HTTP, hostname: a.example, {all}}}");
    for (listeners, spec, reason) in [
        (http.as_str(), "parentRefs: [{name: out, namespace: edge}]", "NoMatchingParent"),
        (&http, "parentRefs: [{name: in, namespace: edge, sectionName: tls}]", "NoMatchingParent"),
        (&http, "parentRefs: [{name: in, namespace: edge, port: 81}]", "NoMatchingParent"),
        (
            &http,
            "parentRefs: [{name: in, namespace: edge}], hostnames: [b.example]",
            "NoMatchingListenerHostname",
        ),
        (
            "{name: http, port: 80, protocol: HTTP}",
            "parentRefs: [{name: in, namespace: edge}]",
            "NotAllowedByListeners",
        ),
    ] {
        let resources = at_gateway(listeners, spec);
        let (ok, found, message) = condition(&resources, "HTTPRoute", "Accepted");
        assert_eq!((ok, found.as_str()), (false, reason), "{spec}: {message}");
        assert!(resources.l7.routes.is_empty());
    }
}
