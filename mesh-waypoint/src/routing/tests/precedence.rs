//! Whose rules count, and in what order.

use super::*;
use crate::config::Role;

fn at(mut route: l7::Route, namespace: &str, created: i64) -> l7::Route {
    let origin = route.origin.as_mut().unwrap();
    origin.namespace = namespace.to_owned();
    origin.created = created;
    route
}

fn for_parents(route: l7::Route, parents: impl IntoIterator<Item = l7::ServiceRef>) -> l7::Route {
    l7::Route { parents: parents.into_iter().collect(), ..route }
}

#[test]
fn a_service_without_rules_is_reached_as_it_is_addressed() {
    let routes = build([route("VirtualService", "v", [rule("it", [])])]);
    assert_eq!(routed(&routes, &get("/").to("shop", "details.shop.svc.cluster.local", 9080)), "default");
    assert_eq!(routed(&Routes::default(), &get("/")), "default");
    // An object with rules for connections only says nothing of requests.
    let tcp_only = l7::Route { tcp: vec![l7::TcpRule::default()], ..route("VirtualService", "v", []) };
    assert_eq!(routed(&build([tcp_only]), &get("/")), "default");
}

#[test]
fn what_is_sent_to_a_workload_itself_falls_under_no_rule() {
    let workload = mesh_core::state::Workload::decode(&wire::Workload {
        uid: "Kubernetes//Pod/shop/a".into(),
        name: "a".into(),
        namespace: "shop".into(),
        ..Default::default()
    });
    let addressed = Addressed::Workload { workload: Arc::new(workload.unwrap()), port: 9080 };
    let routes = build([route("VirtualService", "v", [rule("it", [])])]);
    assert_eq!(routed(&routes, &Request { addressed, ..get("/") }), "default");
}

#[test]
fn rules_of_a_virtual_service_are_tried_in_their_order() {
    let routes = build([route(
        "VirtualService",
        "v",
        [rule("prefix", [path("/a*")]), rule("exact", [path("=/a")]), rule("b", [path("/b*")])],
    )]);
    assert_eq!(routed(&routes, &get("/a")), "prefix");
    assert_eq!(routed(&routes, &get("/b")), "b");
    assert_eq!(routed(&routes, &get("/c")), "404");
}

#[test]
fn older_virtual_services_come_first_and_then_the_lesser_name() {
    let named = |name: &str, namespace, created| {
        at(route("VirtualService", name, [rule(&format!("{namespace}-{name}"), [])]), namespace, created)
    };
    assert_eq!(routed(&build([named("a", "shop", 2), named("b", "shop", 1)]), &get("/")), "shop-b");
    assert_eq!(routed(&build([named("a", "shop", 1), named("b", "shop", 1)]), &get("/")), "shop-a");
    assert_eq!(routed(&build([named("z", "mesh", 1), named("a", "shop", 1)]), &get("/")), "mesh-z");
}

#[test]
fn a_virtual_service_counts_in_the_namespace_of_the_service_or_the_waypoint_only() {
    let of = |namespace| at(route("VirtualService", "v", [rule("it", [])]), namespace, 0);
    assert_eq!(routed(&build([of("shop")]), &get("/")), "it");
    assert_eq!(routed(&build([of("mesh")]), &get("/")), "it");
    assert_eq!(routed(&build([of("other")]), &get("/")), "default");
}

#[test]
fn a_route_of_the_gateway_api_counts_in_the_namespace_of_the_service_only() {
    let of = |namespace| at(route("HTTPRoute", "h", [rule("it", [])]), namespace, 0);
    assert_eq!(routed(&build([of("shop")]), &get("/")), "it");
    assert_eq!(routed(&build([of("mesh")]), &get("/")), "default");
    // Then it does not push virtual services aside, either.
    let vs = route("VirtualService", "v", [rule("vs", [])]);
    assert_eq!(routed(&build([of("other"), vs]), &get("/")), "vs");
}

#[test]
fn virtual_services_do_not_count_where_a_route_of_the_gateway_api_names_the_service() {
    for kind in ["HTTPRoute", "GRPCRoute"] {
        let old = at(route("VirtualService", "v", [rule("vs", [])]), "shop", 1);
        let new = at(route(kind, "h", [rule("it", [path("/a")])]), "shop", 2);
        let routes = build([old, new]);
        assert_eq!(routed(&routes, &get("/a")), "it");
        assert_eq!(routed(&routes, &get("/b")), "404");
    }
    // One for connections leaves requests alone.
    let tcp = route("TCPRoute", "t", []);
    let vs = route("VirtualService", "v", [rule("vs", [])]);
    assert_eq!(routed(&build([tcp, vs]), &get("/")), "vs");
}

#[test]
fn precedence_is_decided_for_each_port() {
    let vs = route("VirtualService", "v", [rule("vs", [])]);
    let only_80 = for_parents(route("HTTPRoute", "h", [rule("http", [])]), [parent("shop", REVIEWS, 80)]);
    let routes = build([vs, only_80]);
    assert_eq!(routed(&routes, &get("/").to("shop", REVIEWS, 80)), "http");
    assert_eq!(routed(&routes, &get("/").to("shop", REVIEWS, 9080)), "vs");
    // The same object may name the service and one of its ports.
    let both = for_parents(
        route("HTTPRoute", "h", [rule("http", [])]),
        [parent("shop", REVIEWS, 0), parent("shop", REVIEWS, 80)],
    );
    let routes = build([both]);
    assert_eq!(routed(&routes, &get("/").to("shop", REVIEWS, 80)), "http");
    assert_eq!(routed(&routes, &get("/").to("shop", REVIEWS, 9080)), "http");
}

#[test]
fn more_specific_matches_of_the_gateway_api_win_whatever_their_place() {
    let method = l7::HttpMatch { method: Some(value("=GET")), ..path("/a/b") };
    let two_headers = l7::HttpMatch { headers: vec![header("x", "*"), header("y", "*")], ..path("/a/b") };
    let one_header = l7::HttpMatch { headers: vec![header("x", "*")], ..path("/a/b") };
    let two_params = l7::HttpMatch { query: query(&[("q", "*"), ("r", "*")]).query, ..path("/a/b") };
    let one_param = l7::HttpMatch { query: query(&[("q", "*")]).query, ..path("/a/b") };
    // From the least to the most specific, over two objects.
    let rules = [
        rule("longer-regex", [path("~/.*/b/c/.*")]),
        rule("nothing", []),
        rule("short", [path("/a")]),
        rule("long", [path("/a/b")]),
        rule("one-param", [one_param]),
        rule("two-params", [two_params]),
        rule("one-header", [one_header]),
        rule("two-headers", [two_headers]),
        rule("method", [method]),
        rule("exact", [path("=/a/b")]),
    ];
    let (odd, even): (Vec<_>, Vec<_>) = rules.into_iter().enumerate().partition(|(at, _)| at % 2 == 1);
    let of = |rules: Vec<(usize, l7::HttpRule)>| rules.into_iter().map(|(_, rule)| rule);
    let routes = build([
        at(route("HTTPRoute", "a", of(even)), "shop", 1),
        at(route("GRPCRoute", "b", of(odd)), "shop", 2),
    ]);
    let post = |path: &str| get(path).method(Method::POST);
    let table = [
        (get("/a/b?q&r").with("x", "").with("y", ""), "exact"),
        (get("/a/b/?q&r").with("x", "").with("y", ""), "method"),
        (post("/a/b/?q&r").with("x", "").with("y", ""), "two-headers"),
        (post("/a/b/?q&r").with("x", ""), "one-header"),
        (post("/a/b/?q&r"), "two-params"),
        (post("/a/b/?q"), "one-param"),
        (post("/a/b/c"), "long"),
        (post("/a/bc"), "short"),
        // Istio: expressions come after every prefix, as `/` is one.
        (post("/x/b/c/d"), "nothing"),
    ];
    for (request, expected) in table {
        assert_eq!(routed(&routes, &request), expected, "{request:?}");
    }
}

#[test]
fn the_rules_of_a_service_are_listed_in_the_order_in_which_they_are_tried() {
    let named = l7::HttpMatch { name: "m".into(), ..path("=/a") };
    let routes = build([route("HTTPRoute", "h", [rule("any", []), rule("two", [path("/b"), named])])]);
    let services: Vec<_> = routes.services().map(ToString::to_string).collect();
    assert_eq!(services, [format!("shop/{REVIEWS}")]);
    let listed: Vec<_> = routes.rules(&services[0], 80).map(|(rule, name)| (&*rule.name, name)).collect();
    assert_eq!(listed, [("two", "m"), ("two", ""), ("any", "")]);
    assert_eq!(routes.rules("shop/other", 80).count(), 0);
}

#[test]
fn between_equally_specific_matches_age_then_name_then_position_decide() {
    let of = |name: &str, created, rules: &[&str]| {
        at(route("HTTPRoute", name, rules.iter().map(|r| rule(r, [path("/a")]))), "shop", created)
    };
    assert_eq!(routed(&build([of("a", 2, &["new"]), of("b", 1, &["old"])]), &get("/a")), "old");
    assert_eq!(routed(&build([of("b", 1, &["b"]), of("a", 1, &["a"])]), &get("/a")), "a");
    assert_eq!(routed(&build([of("a", 1, &["first", "second"])]), &get("/a")), "first");
}

#[test]
fn parents_may_be_wildcards_and_of_any_namespace() {
    let mesh = mesh_of([
        ("shop", REVIEWS),
        ("ext", "api.example.com"),
        ("ext", "*.example.com"),
        ("ext", "example.com"),
    ]);
    let vs = |hostname: &str, namespace: &str| {
        let vs = at(route("VirtualService", "v", [rule("it", [])]), "mesh", 0);
        for_parents(vs, [parent(namespace, hostname, 0)])
    };
    let routed_with = |route: l7::Route, namespace: &str, hostname: &str| {
        let routes = Routes::build(&resources([route]), &mesh, &own(), &Routes::default());
        routed(&routes, &get("/").to(namespace, hostname, 80))
    };
    assert_eq!(routed_with(vs("*.example.com", ""), "ext", "api.example.com"), "it");
    assert_eq!(routed_with(vs("*.example.com", ""), "ext", "*.example.com"), "it");
    assert_eq!(routed_with(vs("*.example.com", ""), "ext", "example.com"), "default");
    assert_eq!(routed_with(vs("*.example.com", "other"), "ext", "api.example.com"), "default");
    assert_eq!(routed_with(vs("*", ""), "ext", "example.com"), "it");
    assert_eq!(routed_with(vs("API.example.com", ""), "ext", "api.example.com"), "it");
    assert_eq!(routed_with(vs("API.example.com", "ext"), "ext", "api.example.com"), "it");
    assert_eq!(routed_with(vs("api.example.com", "other"), "ext", "api.example.com"), "default");
}

fn tcp(name: &str, matches: impl IntoIterator<Item = l7::TcpMatch>) -> l7::TcpRule {
    let backends = vec![backend(REVIEWS, 1)];
    l7::TcpRule { name: name.to_owned(), matches: matches.into_iter().collect(), backends }
}

fn tcp_route(kind: &str, name: &str, rules: impl IntoIterator<Item = l7::TcpRule>) -> l7::Route {
    l7::Route { tcp: rules.into_iter().collect(), ..route(kind, name, []) }
}

fn tcp_routed(routes: &Routes, request: &Request) -> String {
    let destination = "10.1.0.1".parse().unwrap();
    let found = routes.tcp(&request.addressed, "", &request.source, destination);
    found.map_or_else(|| "default".to_owned(), |rule| rule.name.to_string())
}

#[test]
fn connections_fall_under_the_first_rule_that_matches() {
    let matching = |edit: fn(&mut l7::TcpMatch)| {
        let mut matching = l7::TcpMatch::default();
        edit(&mut matching);
        matching
    };
    let only = |matching: l7::TcpMatch| build([tcp_route("VirtualService", "v", [tcp("it", [matching])])]);
    let request = get("/").from("shop", &[("app", "cart")]);
    let table = [
        (matching(|_| {}), true),
        (matching(|m| m.port = 9080), true),
        (matching(|m| m.port = 80), false),
        (matching(|m| m.destination_subnets = vec!["10.2.0.0/16".into(), "10.1.0.0/16".into()]), true),
        (matching(|m| m.destination_subnets = vec!["10.1.0.1".into()]), true),
        (matching(|m| m.destination_subnets = vec!["10.2.0.0/16".into()]), false),
        (matching(|m| m.source_subnets = vec!["192.0.2.0/24".into()]), false),
        (matching(|m| m.source_subnets = vec!["192.0.2.0/24".into(), "10.0.0.0/8".into()]), true),
        (matching(|m| m.source_namespace = "shop".into()), true),
        (matching(|m| m.source_namespace = "other".into()), false),
        (matching(|m| m.source_labels = [("app".into(), "cart".into())].into()), true),
        (matching(|m| m.source_labels = [("app".into(), "other".into())].into()), false),
        (matching(|m| m.sni_hosts = vec!["Reviews.shop.svc.cluster.local".into()]), true),
        (matching(|m| m.sni_hosts = vec!["other.example".into()]), false),
        (matching(|m| m.sni_hosts = vec![REVIEWS.into(), "other.example".into()]), false),
    ];
    for (matching, expected) in table {
        let found = tcp_routed(&only(matching.clone()), &request) == "it";
        assert_eq!(found, expected, "{matching:?}");
    }
    let two = [tcp("other-port", [matching(|m| m.port = 80)]), tcp("it", []), tcp("late", [])];
    assert_eq!(tcp_routed(&build([tcp_route("VirtualService", "v", two)]), &request), "it");
    let bad = only(matching(|m| m.destination_subnets = vec!["10.1".into()]));
    let reason = "matches[0].destination_subnets: \"10.1\" is no address, nor address/length";
    let rule = bad.tcp(&request.addressed, "", &request.source, "10.1.0.1".parse().unwrap()).unwrap();
    assert_eq!(rule.invalid.as_deref(), Some(reason));
    assert_eq!(bad.problems().count(), 1);
}

#[test]
fn routes_of_the_gateway_api_for_connections_come_before_virtual_services() {
    let vs = tcp_route("VirtualService", "a", [tcp("vs", [])]);
    let tcp_of = tcp_route("TCPRoute", "a", [tcp("tcp", [])]);
    let tls = tcp_route("TLSRoute", "z", [tcp("tls", [])]);
    assert_eq!(tcp_routed(&build([vs.clone()]), &get("/")), "vs");
    assert_eq!(tcp_routed(&build([vs.clone(), tcp_of.clone()]), &get("/")), "tcp");
    assert_eq!(tcp_routed(&build([vs, tcp_of, tls]), &get("/")), "tls");
    // One for requests leaves connections alone.
    let http = route("HTTPRoute", "h", [rule("http", [])]);
    let vs = tcp_route("VirtualService", "a", [tcp("vs", [])]);
    assert_eq!(tcp_routed(&build([http, vs]), &get("/")), "vs");
}

/// Gateway `mesh/gw` with two listeners, and these routes for it.
fn gateway(routes: impl IntoIterator<Item = l7::Route>, previous: &Routes) -> Routes {
    let listener = |name: &str, port, hostname: &str| l7::gateway::Listener {
        name: name.into(),
        port,
        hostname: hostname.into(),
        ..Default::default()
    };
    let listeners = vec![listener("http", 80, ""), listener("shop", 8080, "*.shop.example")];
    let mut resources = resources(routes);
    resources.gateways.insert("Gateway/mesh/gw".into(), Arc::new(l7::Gateway { origin: None, listeners }));
    let own = Own { gateway: "gw".into(), role: Role::Gateway, ..own() };
    Routes::build(&resources, &mesh(), &own, previous)
}

#[test]
fn tls_that_a_gateway_passes_on_goes_where_the_route_of_the_most_specific_name_says() {
    let passing = |name: &str, hostnames: &[&str]| {
        // What the rule says of services is not looked at here.
        let of_service = l7::TcpMatch { sni_hosts: vec!["of.a.service".into()], ..Default::default() };
        let l7::Route { gateways, hostnames, .. } = outside(name, &["shop"], hostnames);
        let route = tcp_route("TLSRoute", name, [tcp(name, [of_service])]);
        l7::Route { parents: Vec::new(), gateways, hostnames, ..route }
    };
    let routes = gateway([passing("wide", &[]), passing("exact", &["a.shop.example"])], &Routes::default());
    let request = get("/").outside(8080, "ignored.example");
    let passed = |name: &str| {
        let found = routes.tcp(&request.addressed, name, &request.source, "10.1.0.1".parse().unwrap());
        found.map(|rule| rule.name.to_string())
    };
    assert_eq!(passed("a.shop.example").as_deref(), Some("exact"));
    assert_eq!(passed("b.shop.example").as_deref(), Some("wide"));
    assert_eq!(passed("other.example"), None, "it goes nowhere");
}

/// A route of these listeners and hosts, with one rule of its name.
fn outside(name: &str, listeners: &[&str], hostnames: &[&str]) -> l7::Route {
    let reference = |listener: &&str| l7::GatewayRef {
        namespace: "mesh".into(),
        name: "gw".into(),
        listener: (*listener).into(),
    };
    l7::Route {
        parents: Vec::new(),
        gateways: listeners.iter().map(reference).collect(),
        hostnames: hostnames.iter().map(|host| (*host).to_owned()).collect(),
        ..route("HTTPRoute", name, [rule(name, [])])
    }
}

#[test]
fn a_gateways_listener_takes_the_routes_of_the_most_specific_host() {
    let other = l7::Route {
        gateways: vec![l7::GatewayRef { namespace: "x".into(), name: "gw".into(), listener: "http".into() }],
        ..outside("other", &[], &[])
    };
    let all = [
        outside("any", &["http"], &[]),
        outside("wide", &["http"], &["*.example"]),
        outside("narrow", &["http", "shop"], &["*.shop.example", "elsewhere.example"]),
        outside("exact", &["http"], &["a.shop.example"]),
        other,
        route("HTTPRoute", "of-service", [rule("of-service", [])]),
    ];
    let routes = gateway(all.clone(), &Routes::default());
    let table = [
        (80, "a.shop.example", "exact"),
        (80, "A.Shop.Example:80", "exact"),
        (80, "b.shop.example", "narrow"),
        (80, "c.b.shop.example", "narrow"),
        (80, "elsewhere.example", "narrow"),
        (80, "b.example", "wide"),
        (80, "example", "any"),
        (80, "", "any"),
        (80, "10.0.0.1:8080", "any"),
        (8080, "b.shop.example", "narrow"),
        // The listener's own host, and nothing beside it.
        (8080, "elsewhere.example", "none"),
        (8080, "a.other.example", "none"),
        (81, "a.shop.example", "none"),
    ];
    for (port, host, expected) in table {
        let found = match routes.http(&get("/").outside(port, host).head()) {
            Routed::Rule(matched) => matched.rule.name.to_string(),
            Routed::NotFound => "none".to_owned(),
            Routed::Default => panic!("a gateway has no default"),
        };
        assert_eq!(found, expected, "{port} {host}");
    }
    // What goes and comes later ends in the same.
    let fewer = gateway(all[1..].to_vec(), &routes);
    let request = get("/").outside(80, "example");
    assert!(matches!(fewer.http(&request.head()), Routed::NotFound));
    assert!(matches!(gateway(all, &fewer).http(&request.head()), Routed::Rule(_)));
    // A waypoint has nothing to do with listeners.
    let waypoint = build([outside("any", &["http"], &[])]);
    assert!(matches!(waypoint.http(&request.head()), Routed::NotFound));
}

#[test]
fn a_virtual_service_counts_where_it_is_exported_to() {
    let exported = |to: &[&str], namespace| {
        let route = at(route("VirtualService", "v", [rule("it", [])]), namespace, 1);
        routed(
            &build([l7::Route { exported_to: to.iter().map(ToString::to_string).collect(), ..route }]),
            &get("/"),
        )
    };
    // The waypoint is in mesh, the service in shop.
    assert_eq!(exported(&[], "shop"), "it");
    assert_eq!(exported(&["*"], "shop"), "it");
    assert_eq!(exported(&["other", "mesh"], "shop"), "it");
    assert_eq!(exported(&["shop"], "shop"), "default", "to its own namespace, where the waypoint is not");
    assert_eq!(exported(&["."], "mesh"), "it");
    assert_eq!(exported(&["shop"], "mesh"), "default");
}
