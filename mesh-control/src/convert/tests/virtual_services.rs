use mesh_core::xds::proto::l7 as wire;
use wire::http_rule::Action;
use wire::path_match::Kind as Path;
use wire::string_match::Kind;

use crate::convert::Resources;
use crate::testing::{load, resources};

/// Service `name` of namespace shop with a port 80, behind waypoint shop/wp.
pub(super) fn service(name: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop, labels: {{istio.io/use-waypoint: wp}}}}\nspec: {{ports: [{{name: http, port: 80}}]}}\n"
    )
}

pub(super) const WAYPOINT: &str = "---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: wp, namespace: shop}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
status: {addresses: [{type: Hostname, value: wp.shop.svc.cluster.local}]}
";

/// VirtualService `name` of namespace shop.
fn named(name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n{spec}"
    )
}

/// The rules are those of VirtualService shop/web for host web, beside services web and api.
fn with(rules: &str) -> Resources {
    resources(&format!(
        "{WAYPOINT}{}{}{}",
        service("web"),
        service("api"),
        named("web", &format!("  hosts: [web]\n{rules}"))
    ))
}

fn route(resources: &Resources) -> &wire::Route {
    &resources.l7.routes["VirtualService/shop/web"]
}

/// What is wrong with the only document of a file.
pub(super) fn problems(text: &str) -> Vec<String> {
    load(text).problems.iter().map(|p| format!("{}: {}", p.field, p.message)).collect()
}

fn exact(value: &str) -> Option<wire::StringMatch> {
    Some(wire::StringMatch { kind: Some(Kind::Exact(value.into())), ignore_case: false })
}

#[test]
fn the_canary_of_the_introduction_sends_every_fifth_request_to_version_two() {
    let text = format!(
        "{WAYPOINT}{}{}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: task-service, namespace: shop}}
spec:
  host: task-service
  subsets:
  - {{name: v1, labels: {{version: v1}}}}
  - {{name: v2, labels: {{version: v2}}}}
",
        service("task-service"),
        named(
            "task-service",
            "  hosts: [task-service]
  http:
    - route:
        - destination:
            host: task-service
            subset: v1
          weight: 80
        - destination:
            host: task-service
            subset: v2
          weight: 20
    - retries:
        attempts: 3
        perTryTimeout: 2s
        retryOn: gateway-error,connect-failure,refused-stream
      route: [{destination: {host: task-service}}]
"
        )
    );
    let resources = resources(&text);
    let route = &resources.l7.routes["VirtualService/shop/task-service"];
    let host = "task-service.shop.svc.cluster.local";
    assert_eq!(route.parents, [wire::ServiceRef { hostname: host.into(), ..Default::default() }]);
    let Some(Action::Forward(forward)) = &route.http[0].action else { panic!("{route:?}") };
    let shares: Vec<_> = forward.backends.iter().map(|b| (b.backend.clone().unwrap(), b.weight)).collect();
    let of = |subset: &str| wire::Backend {
        service: Some(wire::ServiceRef { hostname: host.into(), ..Default::default() }),
        subset: subset.into(),
        invalid: String::new(),
    };
    assert_eq!(shares, [(of("v1"), 80), (of("v2"), 20)]);
    let retry = route.http[1].retry.clone().unwrap();
    assert_eq!((retry.attempts, retry.per_try_timeout.unwrap().seconds), (3, 2));
    assert_eq!(retry.on, ["gateway-error", "connect-failure", "refused-stream"]);
    assert!(retry.status_codes.is_empty());
    let rule = &resources.l7.destinations["DestinationRule/shop/task-service"];
    assert_eq!(rule.hostname, host);
    assert_eq!(rule.subsets[1].labels["version"], "v2");
    for (object, kind) in
        [("VirtualService", "Accepted"), ("VirtualService", "ResolvedRefs"), ("DestinationRule", "Accepted")]
    {
        let condition = resources.condition(&format!("{object} shop/task-service"), kind);
        assert!(condition.status && !condition.message.contains("no effect"), "{condition:?}");
    }
    let condition = resources.condition("VirtualService shop/task-service", "ResolvedWaypoints");
    assert_eq!((condition.status, condition.reason.as_str()), (true, "ResolvedWaypoints"));
}

#[test]
fn every_part_of_a_match_is_carried_over() {
    let resources = with("  http:
  - name: all
    match:
    - name: m
      uri: {prefix: /Api}
      ignoreUriCase: true
      scheme: {exact: https}
      method: {regex: GET|HEAD}
      authority: {prefix: web}
      headers: {X-User: {exact: jason}, cookie: {regex: '.*a=b.*'}, trace: {}, '@request.auth.claims.groups': {exact: admin}, '@request.auth.claims[a][b.c]': {prefix: x}}
      withoutHeaders: {x-bot: {}}
      queryParams: {q: {exact: '1'}}
      port: 80
      sourceLabels: {app: client}
      sourceNamespace: clients
    - uri: {exact: /a}
    - uri: {regex: /b.*}
    route: [{destination: {host: api, port: {number: 80}}}]
");
    let rule = &route(&resources).http[0];
    assert_eq!(rule.name, "all");
    let matched = &rule.matches[0];
    assert_eq!(matched.name, "m");
    let path = |m: &wire::HttpMatch| m.path.clone().map(|p| (p.kind.unwrap(), p.ignore_case)).unwrap();
    assert_eq!(path(matched), (Path::Prefix("/Api".into()), true));
    assert_eq!(path(&rule.matches[1]), (Path::Exact("/a".into()), false));
    assert_eq!(path(&rule.matches[2]), (Path::Regex("/b.*".into()), false));
    assert_eq!(matched.scheme, exact("https"));
    assert_eq!(matched.method.as_ref().unwrap().kind, Some(Kind::Regex("GET|HEAD".into())));
    assert_eq!(matched.authority.as_ref().unwrap().kind, Some(Kind::Prefix("web".into())));
    let header = |name: &str| matched.headers.iter().find(|h| h.name == name && h.claim.is_empty()).unwrap();
    assert_eq!(header("x-user").value, exact("jason"));
    assert_eq!(header("trace").value.as_ref().unwrap().kind, Some(Kind::Present(true)));
    assert!(header("x-bot").invert && !header("trace").invert);
    let claims: Vec<_> =
        matched.headers.iter().filter(|h| !h.claim.is_empty()).map(|h| h.claim.clone()).collect();
    assert_eq!(claims, [vec!["groups".to_owned()], vec!["a".into(), "b.c".into()]]);
    assert_eq!(matched.query, [wire::QueryMatch { name: "q".into(), value: exact("1") }]);
    assert_eq!((matched.port, matched.source_namespace.as_str()), (80, "clients"));
    assert_eq!(matched.source_labels["app"], "client");
    let Some(Action::Forward(forward)) = &rule.action else { panic!() };
    let service = forward.backends[0].backend.clone().unwrap().service.unwrap();
    assert_eq!((service.hostname.as_str(), service.port), ("api.shop.svc.cluster.local", 80));
    assert_eq!(forward.backends[0].weight, 1, "the only one gets everything");
    assert_eq!(resources.condition("VirtualService shop/web", "Accepted").reason, "Accepted");
}

#[test]
fn every_action_is_carried_over() {
    let resources = with("  http:
  - match: [{uri: {prefix: /r}}]
    redirect: {uri: /new, authority: other, scheme: https, derivePort: FROM_REQUEST_PORT}
  - match: [{uri: {prefix: /d}}]
    directResponse: {status: 503, body: {string: gone}}
  - directResponse: {status: 200, body: {bytes: aGk=}}
    match: [{uri: {prefix: /e}}]
  - headers: {request: {set: {x-a: '1'}, add: {x-b: '2'}, remove: [X-C]}, response: {remove: [server]}}
    rewrite: {uri: /v1, authority: api}
    timeout: 1.5s
    mirror: {host: api}
    mirrorPercentage: {value: 0.5}
    corsPolicy: {allowOrigins: [{exact: '*'}, {regex: 'https://.*'}], allowMethods: [GET], allowHeaders: [x], exposeHeaders: [z], maxAge: 24h, allowCredentials: true, unmatchedPreflights: IGNORE}
    fault: {delay: {fixedDelay: 5s, percentage: {value: 10}}, abort: {grpcStatus: UNAVAILABLE, percentage: {value: 1}}}
    retries: {attempts: 2, retryOn: '5xx,429', backoff: 10ms, retryRemoteLocalities: true, retryIgnorePreviousHosts: false}
    route:
    - {destination: {host: web}, weight: 3, headers: {request: {set: {x-d: '4'}}}}
    - {destination: {host: api}, weight: 1}
");
    let http = &route(&resources).http;
    let Some(Action::Redirect(redirect)) = &http[0].action else { panic!() };
    assert_eq!(redirect.path, Some(wire::redirect::Path::Full("/new".into())));
    assert_eq!(
        (redirect.status, redirect.scheme.as_str(), redirect.authority.as_str()),
        (301, "https", "other")
    );
    assert_eq!(redirect.derive_port(), wire::redirect::DerivePort::FromRequestPort);
    let direct = |rule: &wire::HttpRule| match &rule.action {
        Some(Action::DirectResponse(direct)) => (direct.status, direct.body.clone()),
        other => panic!("{other:?}"),
    };
    assert_eq!(direct(&http[1]), (503, b"gone".to_vec()));
    assert_eq!(direct(&http[2]), (200, b"hi".to_vec()));
    let rule = &http[3];
    let edits = rule.request_headers.clone().unwrap();
    assert_eq!((edits.set[0].name.as_str(), edits.add[0].value.as_str()), ("x-a", "2"));
    assert_eq!(edits.remove, ["x-c"]);
    assert_eq!(rule.response_headers.clone().unwrap().remove, ["server"]);
    let rewrite = rule.rewrite.clone().unwrap();
    assert_eq!(
        (rewrite.path, rewrite.authority.as_str()),
        (Some(wire::rewrite::Path::Prefix("/v1".into())), "api")
    );
    assert_eq!(rule.timeout.unwrap().nanos, 500_000_000);
    assert_eq!(rule.mirrors[0].parts_per_million, 5_000);
    let mirror = rule.mirrors[0].backend.clone().unwrap().service.unwrap();
    assert_eq!(mirror.hostname, "api.shop.svc.cluster.local");
    let cors = rule.cors.clone().unwrap();
    assert_eq!(cors.allow_origins[0].kind, Some(Kind::Present(true)), "* is any origin");
    assert!(!cors.forward_unmatched_preflights && cors.allow_credentials);
    assert_eq!(cors.max_age.unwrap().seconds, 86_400);
    let fault = rule.fault.unwrap();
    assert_eq!(fault.delay.unwrap().parts_per_million, 100_000);
    let abort = fault.abort.unwrap();
    assert_eq!(
        (abort.kind, abort.parts_per_million),
        (Some(wire::fault::abort::Kind::GrpcStatus(14)), 10_000)
    );
    let retry = rule.retry.clone().unwrap();
    assert_eq!(retry.on, ["5xx", "retriable-status-codes"]);
    assert_eq!((retry.status_codes, retry.ignore_previous_hosts), (vec![429], Some(false)));
    let Some(Action::Forward(forward)) = &rule.action else { panic!() };
    assert_eq!(forward.backends.iter().map(|b| b.weight).collect::<Vec<_>>(), [3, 1]);
    assert_eq!(forward.backends[0].request_headers.clone().unwrap().set[0].name, "x-d");
    let names: Vec<&str> = http.iter().map(|r| r.name.as_str()).collect();
    assert_eq!(names, ["rule-0", "rule-1", "rule-2", "rule-3"]);
}

#[test]
fn the_rules_of_a_delegate_hold_within_the_rule_that_delegates() {
    let text = format!(
        "{WAYPOINT}{}{}{}",
        service("web"),
        named("web", "  hosts: [web]\n  http:\n  - name: outer\n    match: [{uri: {prefix: /shop}, headers: {x: {exact: '1'}}}]\n    timeout: 3s\n    delegate: {name: inner, namespace: team}\n"),
        named("inner", "  http:\n  - name: cart\n    match: [{uri: {prefix: /shop/cart}, method: {exact: GET}}]\n    route: [{destination: {host: cart}}]\n  - name: other\n    match: [{uri: {prefix: /other}}]\n    route: [{destination: {host: cart}}]\n  - name: rest\n    timeout: 1s\n    route: [{destination: {host: web.shop.svc.cluster.local}}]\n")
            .replace("namespace: shop", "namespace: team")
    );
    let resources = resources(&text);
    let http = &route(&resources).http;
    let names: Vec<&str> = http.iter().map(|r| r.name.as_str()).collect();
    assert_eq!(names, ["outer-cart", "outer-rest"]);
    let matched = &http[0].matches[0];
    assert_eq!(matched.path.clone().unwrap().kind, Some(Path::Prefix("/shop/cart".into())));
    assert_eq!((matched.headers.len(), matched.method.clone()), (1, exact("GET")));
    assert_eq!((http[0].timeout.unwrap().seconds, http[1].timeout.unwrap().seconds), (3, 1));
    assert_eq!(http[1].matches[0].path.clone().unwrap().kind, Some(Path::Prefix("/shop".into())));
    let condition = resources.condition("VirtualService shop/web", "Accepted");
    assert!(condition.message.contains("team/inner spec.http[1] matches nothing"), "{condition:?}");
    let missing = resources.condition("VirtualService shop/web", "ResolvedRefs");
    assert!(missing.message.contains("cart.team.svc.cluster.local names no service"), "{missing:?}");
    assert!(!resources.l7.routes.contains_key("VirtualService/team/inner"));
    assert!(resources.condition("VirtualService team/inner", "Accepted").status);
}

#[test]
fn a_delegate_that_is_not_there_leaves_its_rule_out_and_says_so() {
    let resources = with("  http: [{delegate: {name: nobody}}, {route: [{destination: {host: web}}]}]\n");
    assert_eq!(route(&resources).http.len(), 1);
    let condition = resources.condition("VirtualService shop/web", "ResolvedRefs");
    assert_eq!((condition.status, condition.reason.as_str()), (false, "DelegateNotFound"));
    assert!(condition.message.contains("shop/nobody"));
}

#[test]
fn connections_have_rules_too_and_server_names_count_where_they_are_the_services_own() {
    let resources = with("  tls:
  - match: [{sniHosts: [web.shop.svc.cluster.local], port: 80}, {sniHosts: [other.example]}]
    route: [{destination: {host: api}}]
  - match: [{sniHosts: [a.example, b.example]}]
    route: [{destination: {host: web}}]
  tcp:
  - match: [{port: 80, destinationSubnets: [10.0.0.0/8], sourceLabels: {app: a}, sourceNamespace: n}, {sourceSubnet: 10.0.0.0/8}]
    route: [{destination: {host: web}, weight: 9}, {destination: {host: api}, weight: 1}]
  - match: [{sourceSubnet: 10.0.0.0/8}]
    route: [{destination: {host: web}}]
");
    let tcp = &route(&resources).tcp;
    assert_eq!(tcp.len(), 2);
    assert_eq!(
        tcp[0].matches,
        [wire::TcpMatch {
            port: 80,
            sni_hosts: vec!["web.shop.svc.cluster.local".into()],
            ..Default::default()
        }]
    );
    let matched = &tcp[1].matches;
    assert_eq!(matched.len(), 1, "a match that cannot be evaluated never holds");
    assert_eq!(
        (matched[0].destination_subnets[0].as_str(), matched[0].source_namespace.as_str()),
        ("10.0.0.0/8", "n")
    );
    assert_eq!(tcp[1].backends.iter().map(|b| b.weight).collect::<Vec<_>>(), [9, 1]);
    let message = &resources.condition("VirtualService shop/web", "Accepted").message;
    for part in [
        "spec.tls[0].match[1].sniHosts",
        "spec.tls[1].match[0].sniHosts",
        "spec.tcp[0].match[1] (sourceSubnet",
    ] {
        assert!(message.contains(part), "{part}: {message}");
    }
}

#[test]
fn a_virtual_service_is_told_with_the_namespaces_that_it_is_for() {
    let rule = "  http: [{route: [{destination: {host: web}}]}]\n";
    assert_eq!(route(&with(rule)).exported_to, ["*"]);
    let some = with(&format!("  exportTo: [., other]\n{rule}"));
    assert_eq!(route(&some).exported_to, ["shop", "other"]);
    let nobody = with(&format!("  exportTo: ['~']\n{rule}"));
    assert_eq!(route(&nobody).exported_to, ["shop"]);
    assert!(nobody.condition("VirtualService shop/web", "Accepted").message.contains("spec.exportTo[~]"));
}

#[test]
fn a_delegate_that_is_not_exported_to_who_delegates_is_left_out_and_that_is_said() {
    let text = |export: &str| {
        let inner = format!(
            "  exportTo: [{export}]\n  http: [{{name: it, route: [{{destination: {{host: web.shop.svc.cluster.local}}}}]}}]\n"
        );
        format!(
            "{WAYPOINT}{}{}{}",
            service("web"),
            named("web", "  hosts: [web]\n  http: [{delegate: {name: inner, namespace: team}}]\n"),
            named("inner", &inner).replace("namespace: shop", "namespace: team")
        )
    };
    assert_eq!(route(&crate::testing::resources(&text("other, shop"))).http.len(), 1);
    let hidden = crate::testing::resources(&text("."));
    assert!(route(&hidden).http.is_empty());
    let said = &hidden.condition("VirtualService shop/web", "ResolvedRefs").message;
    assert!(said.contains("team/inner is not exported to shop"), "{said}");
}

#[test]
fn what_has_no_effect_is_named() {
    let resources = with("  gateways: [mesh, ingress]
  http:
  - match: [{uri: {prefix: /}, statPrefix: x, headers: {uri: {exact: /a}}}, {uri: {prefix: /a}, gateways: [ingress]}]
    fault: {abort: {httpStatus: 500}}
    headers: {request: {set: {x-peer: '%DOWNSTREAM_REMOTE_ADDRESS%', Host: a.example, Transfer-Encoding: x}, remove: [host]}}
    route: [{destination: {host: web}}]
  - match: [{gateways: [ingress]}]
    route: [{destination: {host: api}}]
");
    assert_eq!(route(&resources).http.len(), 1, "a rule for other gateways only is none here");
    assert_eq!(route(&resources).http[0].matches.len(), 1);
    let edits = route(&resources).http[0].request_headers.clone().unwrap();
    assert_eq!(edits.set.iter().map(|h| h.name.as_str()).collect::<Vec<_>>(), ["host", "x-peer"]);
    let condition = resources.condition("VirtualService shop/web", "Accepted");
    assert_eq!((condition.status, condition.reason.as_str()), (true, "UnsupportedValue"));
    for part in [
        "spec.http[0].match[0].statPrefix",
        "spec.http[0].match[0].headers.uri",
        "spec.http[0].fault.abort (without percentage",
        "spec.http[0].headers.request.set.x-peer (Envoy's % operators",
        "spec.http[0].headers.request.set.Transfer-Encoding (transfer-encoding is the proxy's)",
        "spec.http[0].headers.request.remove[0] (host is the proxy's)",
    ] {
        assert!(condition.message.contains(part), "{part}: {}", condition.message);
    }
    let condition = resources.condition("VirtualService shop/web", "ResolvedRefs");
    let missing = "spec.gateways[1]: Gateway.networking.istio.io shop/ingress does not exist";
    assert!(!condition.status && condition.message.contains(missing), "{}", condition.message);
    let only = crate::testing::resources(&named(
        "web",
        "  hosts: [web]\n  gateways: [ingress]\n  http: [{route: [{destination: {host: web}}]}]\n",
    ));
    assert!(only.l7.routes.is_empty());
    assert!(!only.condition("VirtualService shop/web", "Accepted").status);
}

#[test]
fn what_is_wrong_is_refused_with_the_field_and_what_would_be_right() {
    let rule = |rule: &str| problems(&named("web", &format!("  hosts: [web]\n  http: [{rule}]\n")));
    let to = "route: [{destination: {host: web}}]";
    for (given, expected) in [
        ("{}", "spec.http[0]: does nothing; write one of route, redirect, directResponse, delegate"),
        (
            &*format!("{{{to}, timeout: 5}}"),
            "spec.http[0].timeout: expected a string, found the number 5 (write it in quotes: \"5\")",
        ),
        (
            &*format!("{{{to}, timeout: 5x}}"),
            "spec.http[0].timeout: \"5x\" is no duration; write one such as 1.5s, 250ms or 1h",
        ),
        (
            &*format!("{{{to}, match: [{{uri: {{regex: '['}}}}]}}"),
            "spec.http[0].match[0].uri.regex: \"[\" is no regular expression of RE2",
        ),
        (
            &*format!("{{{to}, match: [{{uri: {{exact: a, prefix: b}}}}]}}"),
            "spec.http[0].match[0].uri: has several of exact, prefix, regex; keep one",
        ),
        (&*format!("{{{to}, redirect: {{uri: /}}}}"), "spec.http[0]: has route and redirect; keep one"),
        (
            &*format!("{{{to}, retries: {{attempts: 1, retryOn: sometimes}}}}"),
            "spec.http[0].retries.retryOn: \"sometimes\" is unknown; write 5xx, gateway-error",
        ),
        (
            &*format!("{{{to}, fault: {{abort: {{grpcStatus: NOPE}}}}}}"),
            "spec.http[0].fault.abort.grpcStatus: \"NOPE\" is no status of gRPC",
        ),
        (
            "{route: [{destination: {host: a}}, {destination: {host: b}}]}",
            "spec.http[0].route: has only weights of 0",
        ),
        (
            "{route: [{destination: {host: a, port: {number: 0}}}]}",
            "spec.http[0].route[0].destination.port.number: 0 is no port",
        ),
        (
            "{route: [{destination: {host: a}, wieght: 5}]}",
            "spec.http[0].route[0].wieght: unknown field; did you mean `weight`?",
        ),
        (
            &*format!("{{{to}, rewrite: {{authority: 'a b'}}}}"),
            "spec.http[0].rewrite.authority: \"a b\" is no host, nor host:port",
        ),
        (
            &*format!(r"{{{to}, rewrite: {{uriRegexRewrite: {{match: '/(a)', rewrite: '\2'}}}}}}"),
            "spec.http[0].rewrite.uriRegexRewrite.rewrite: names group 2, and the pattern has 1",
        ),
        (
            &*format!("{{{to}, corsPolicy: {{allowMethods: ['A B']}}}}"),
            "spec.http[0].corsPolicy.allowMethods[0]: \"A B\" is no name of a method or header",
        ),
        (
            "{redirect: {uri: /a, redirectCode: 200}}",
            "spec.http[0].redirect.redirectCode: 200 is no redirect",
        ),
    ] {
        let found = rule(given);
        assert!(found.iter().any(|f| f.starts_with(expected)), "{given}: {found:#?}");
    }
    let star = problems(&named("web", "  hosts: ['*']\n  http: [{route: [{destination: {host: web}}]}]\n"));
    assert!(star[0].starts_with("spec.hosts[0]: * would take every service"), "{star:?}");
}

#[test]
fn what_is_named_and_not_there_is_told() {
    let resources = with(
        "  http: [{route: [{destination: {host: nobody}, weight: 1}, {destination: {host: api, subset: v9}, weight: 1}, {destination: {host: api, port: {number: 81}}, weight: 1}]}]\n",
    );
    let condition = resources.condition("VirtualService shop/web", "ResolvedRefs");
    assert_eq!((condition.status, condition.reason.as_str()), (false, "BackendNotFound"));
    for part in [
        "spec.http[0].route[0].destination: nobody.shop.svc.cluster.local names no service",
        "spec.http[0].route[1].destination.subset: no DestinationRule for api.shop.svc.cluster.local has a subset v9",
        "spec.http[0].route[2].destination: api.shop.svc.cluster.local has no port 81; it has 80",
    ] {
        assert!(condition.message.contains(part), "{part}: {}", condition.message);
    }
    assert_eq!(route(&resources).http.len(), 1, "it is told to waypoints all the same");
}

#[test]
fn whether_a_waypoint_reads_it_is_told() {
    let unbound = service("web").replace("istio.io/use-waypoint: wp", "a: b");
    let rule = "  hosts: [web]\n  http: [{route: [{destination: {host: web}}]}]\n";
    let told = |text: &str| {
        let resources = resources(text);
        let condition = resources.condition("VirtualService shop/web", "ResolvedWaypoints");
        (condition.status, condition.reason.clone())
    };
    assert_eq!(told(&format!("{unbound}{}", named("web", rule))), (false, "MissingUseWaypointLabel".into()));
    assert_eq!(told(&named("web", rule)), (false, "NoMatchingParent".into()));
    assert_eq!(
        told(&format!("{WAYPOINT}{}{}", service("web"), named("web", rule))),
        (true, "ResolvedWaypoints".into())
    );
    let foreign = named("web", &rule.replace("[web]", "[web.shop.svc.cluster.local]"))
        .replace("namespace: shop", "namespace: other");
    let resources = resources(&format!("{WAYPOINT}{}{foreign}", service("web")));
    let condition = resources.condition("VirtualService other/web", "Accepted");
    assert_eq!((condition.status, condition.reason.as_str()), (false, "Conflicted"));
    assert!(
        condition.message.contains("does not count for web.shop.svc.cluster.local"),
        "{}",
        condition.message
    );
}
