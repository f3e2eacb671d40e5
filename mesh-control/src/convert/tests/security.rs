use mesh_core::xds::proto::l7 as wire;
use wire::target::Kind;

use super::virtual_services::{WAYPOINT, problems, service};
use crate::convert::Resources;
use crate::testing::resources;

fn policy(spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: shop}}\nspec:\n{spec}"
    )
}

fn tokens(spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{name: t, namespace: shop}}\nspec:\n{spec}"
    )
}

fn with(text: &str) -> Resources {
    resources(&format!("{WAYPOINT}{}{text}", service("web")))
}

const WEB: &str = "  targetRefs: [{kind: Service, group: \"\", name: web}]\n";

fn told(resources: &Resources) -> &wire::Authorization {
    &resources.l7.authorizations["AuthorizationPolicy/shop/p"]
}

#[test]
fn only_frontend_with_a_token_may_call_backend() {
    // Both samples of the introduction to Istio, at a waypoint.
    let text = policy(&format!(
        "{WEB}  rules:\n    - from:\n        - source:\n            principals: [\"cluster.local/ns/default/sa/frontend\"]\n"
    )) + &tokens(&format!(
        "{WEB}  jwtRules:\n  - {{issuer: https://issuer.example, jwksUri: https://issuer.example/keys}}\n"
    ));
    let resources = with(&text);
    let policy = told(&resources);
    assert_eq!(policy.action(), wire::authorization::Action::Allow);
    assert_eq!(policy.rules[0].from[0].principals, ["cluster.local/ns/default/sa/frontend"]);
    let target = wire::Target {
        kind: Kind::Service.into(),
        namespace: "shop".into(),
        name: "web".into(),
        hostnames: vec!["web.shop.svc.cluster.local".into()],
    };
    assert_eq!(policy.targets, std::slice::from_ref(&target));
    assert!(resources.authorizations.is_empty(), "nodes do not get it");
    let condition = resources.condition("AuthorizationPolicy shop/p", "WaypointAccepted");
    assert_eq!(
        (condition.status, condition.reason.as_str(), condition.message.as_str()),
        (true, "Accepted", "bound to shop/wp")
    );
    assert!(resources.conditions.iter().all(|c| c.kind != "ZtunnelAccepted"));
    let authentication = &resources.l7.authentications["RequestAuthentication/shop/t"];
    assert_eq!(authentication.targets, [target]);
    assert_eq!(authentication.rules[0].jwks_uri, "https://issuer.example/keys");
    assert!(resources.condition("RequestAuthentication shop/t", "WaypointAccepted").status);
}

#[test]
fn every_field_of_a_policy_is_carried_over_as_it_is_written() {
    let text = policy(&format!(
        "{WEB}  action: DENY\n  rules:\n  - from:\n    - source: {{principals: [a/*], notPrincipals: ['*/b'], requestPrincipals: ['iss/*'], notRequestPrincipals: ['*'], namespaces: [n], notNamespaces: [m], ipBlocks: [10.0.0.1/8], notIpBlocks: [10.1.0.0/16], remoteIpBlocks: [1.2.3.4], notRemoteIpBlocks: [fd00::/8], trustDomains: [td], notTrustDomains: [tx]}}\n    - source: {{serviceAccounts: [sa, n/sb], notServiceAccounts: [sc]}}\n    to:\n    - operation: {{hosts: ['*.example'], notHosts: [x], ports: ['80'], notPorts: ['81'], methods: [GET], notMethods: [PUT], paths: ['/a/{{*}}/b/{{**}}', '/c*'], notPaths: [/d]}}\n    when:\n    - {{key: 'request.headers[x]', values: [a], notValues: [b]}}\n    - {{key: 'request.auth.claims[a][b]', values: [c]}}\n    - {{key: source.serviceAccount, values: [sd]}}\n"
    ));
    let resources = with(&text);
    let policy = told(&resources);
    assert_eq!(policy.action(), wire::authorization::Action::Deny);
    let rule = &policy.rules[0];
    let one = |values: &[&str]| values.iter().map(|v| (*v).to_owned()).collect::<Vec<_>>();
    let expected = wire::PolicySource {
        principals: one(&["a/*"]),
        not_principals: one(&["*/b"]),
        request_principals: one(&["iss/*"]),
        not_request_principals: one(&["*"]),
        namespaces: one(&["n"]),
        not_namespaces: one(&["m"]),
        ip_blocks: one(&["10.0.0.1/8"]),
        not_ip_blocks: one(&["10.1.0.0/16"]),
        remote_ip_blocks: one(&["1.2.3.4"]),
        not_remote_ip_blocks: one(&["fd00::/8"]),
        trust_domains: one(&["td"]),
        not_trust_domains: one(&["tx"]),
        ..wire::PolicySource::default()
    };
    assert_eq!(rule.from[0], expected);
    assert_eq!(rule.from[1].service_accounts, ["shop/sa", "n/sb"], "complete");
    assert_eq!(rule.from[1].not_service_accounts, ["shop/sc"]);
    let expected = wire::Operation {
        hosts: one(&["*.example"]),
        not_hosts: one(&["x"]),
        ports: one(&["80"]),
        not_ports: one(&["81"]),
        methods: one(&["GET"]),
        not_methods: one(&["PUT"]),
        paths: one(&["/a/{*}/b/{**}", "/c*"]),
        not_paths: one(&["/d"]),
    };
    assert_eq!(rule.to, [expected]);
    assert_eq!(
        (rule.when[0].key.as_str(), rule.when[0].not_values.as_slice()),
        ("request.headers[x]", one(&["b"]).as_slice())
    );
    assert_eq!(rule.when[1].key, "request.auth.claims[a][b]");
    assert_eq!(rule.when[2].values, ["shop/sd"]);
}

/// Targets, namespace of the policy, then status, reason, a part of the message, and how many targets are told.
type Binding = (&'static str, &'static str, bool, &'static str, &'static str, usize);

#[rustfmt::skip]
const BINDINGS: [Binding; 10] = [
    ("{GATEWAY, name: wp}", "shop", true, "Accepted", "bound to shop/wp", 1),
    ("{group: networking.istio.io, kind: ServiceEntry, name: out}", "shop", true, "Accepted", "bound to shop/wp", 1),
    ("{GATEWAYClass, name: istio-waypoint}", "istio-system", true, "Accepted", "class istio-waypoint", 1),
    ("{GATEWAYClass, name: istio-waypoint}", "shop", false, "Invalid", "root namespace istio-system", 0),
    ("{GATEWAYClass, name: istio}", "istio-system", false, "Invalid", "no class of waypoints", 0),
    ("{GATEWAY, name: in}", "shop", true, "Accepted", "bound to shop/in", 1),
    ("{GATEWAY, name: no}", "shop", false, "TargetNotFound", "Gateway shop/no does not exist", 0),
    ("{SERVICE, name: no}", "shop", false, "TargetNotFound", "Service shop/no does not exist", 0),
    ("{SERVICE, name: plain}", "shop", false, "AncestorNotBound", "Service shop/plain has no waypoint", 1),
    ("{SERVICE, name: web}, {SERVICE, name: no}", "shop", true, "PartiallyInvalid", "bound to shop/wp; Service shop/no", 1),
];

#[test]
fn a_policy_says_what_it_is_bound_to() {
    let entry = "---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: out, namespace: shop, labels: {istio.io/use-waypoint: wp}}\nspec: {hosts: [api.example], ports: [{number: 443, name: tls, protocol: TLS}], resolution: DNS}\n";
    let class = "---\napiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: in, namespace: shop}\nspec: {gatewayClassName: istio, listeners: [{name: a, port: 80, protocol: HTTP}]}\n";
    let plain = service("plain").replace("istio.io/use-waypoint: wp", "a: b");
    for (targets, namespace, status, reason, text, count) in BINDINGS {
        let targets = targets
            .replace("GATEWAY", "group: gateway.networking.k8s.io, kind: Gateway")
            .replace("SERVICE", "group: '', kind: Service");
        let policy = policy(&format!("  targetRefs: [{targets}]\n"))
            .replace("namespace: shop", &format!("namespace: {namespace}"));
        let resources = with(&format!("{entry}{class}{plain}{policy}"));
        let condition =
            resources.condition(&format!("AuthorizationPolicy {namespace}/p"), "WaypointAccepted");
        assert_eq!((condition.status, condition.reason.as_str()), (status, reason), "{targets}");
        assert!(condition.message.contains(text), "{targets}: {}", condition.message);
        let told: usize = resources.l7.authorizations.values().map(|a| a.targets.len()).sum();
        assert_eq!(told, count, "{targets}");
    }
    let singular = with(&policy("  targetRef: {kind: Service, group: \"\", name: web}\n"));
    assert_eq!(told(&singular).targets[0].name, "web");
}

#[test]
fn external_authorization_names_a_provider_of_the_mesh_settings() {
    let settings = "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\ndata:\n  mesh: |\n    extensionProviders:\n    - name: ext\n      envoyExtAuthzGrpc: {service: shop/authz.shop.svc.cluster.local, port: 9000, timeout: 2s, failOpen: true, statusOnError: \"503\", includeRequestBodyInCheck: {maxRequestBytes: 4096, allowPartialMessage: true}}\n    - name: web\n      envoyExtAuthzHttp: {service: authz.example, port: 80, pathPrefix: /check, includeRequestHeadersInCheck: [cookie], includeAdditionalHeadersInCheck: {x: y}, headersToUpstreamOnAllow: [a], headersToDownstreamOnDeny: [b], headersToDownstreamOnAllow: [c]}\n    - name: traces\n      datadog: {service: z, port: 1}\n";
    let custom = |name: &str| {
        with(&format!(
            "{settings}{}",
            policy(&format!("{WEB}  action: CUSTOM\n  provider: {{name: {name}}}\n  rules: [{{}}]\n"))
        ))
    };
    let known = custom("ext");
    assert_eq!(
        (told(&known).provider.as_str(), told(&known).action()),
        ("ext", wire::authorization::Action::Custom)
    );
    assert!(known.conditions.iter().all(|c| c.reason != "ProviderNotFound"));
    assert!(known.conditions.iter().any(|c| c.message.contains("extensionProviders[2] (datadog)")));
    let providers = &known.l7.settings["mesh"].providers;
    let grpc = &providers[0];
    let service = grpc.service.clone().unwrap();
    assert_eq!(
        (service.namespace.as_str(), service.hostname.as_str(), service.port),
        ("shop", "authz.shop.svc.cluster.local", 9000)
    );
    assert!(grpc.grpc && grpc.fail_open && grpc.allow_partial_message);
    assert_eq!((grpc.status_on_error, grpc.max_request_bytes, grpc.timeout.unwrap().seconds), (503, 4096, 2));
    let http = &providers[1];
    assert_eq!(
        (http.grpc, http.path_prefix.as_str(), http.include_request_headers.as_slice()),
        (false, "/check", ["cookie".to_owned()].as_slice())
    );
    assert_eq!(
        (http.additional_headers[0].value.as_str(), http.headers_to_upstream_on_allow[0].as_str()),
        ("y", "a")
    );
    let unknown = custom("nobody");
    let condition = unknown.condition("AuthorizationPolicy shop/p", "ResolvedRefs");
    assert_eq!((condition.status, condition.reason.as_str()), (false, "ProviderNotFound"));
}

#[test]
fn a_condition_that_no_waypoint_can_evaluate_makes_the_policy_stricter() {
    let rules = "  rules:\n  - when: [{key: experimental.envoy.filters.x, values: [a]}, {key: 'request.headers[y]', values: [b]}]\n";
    let allow = with(&policy(&format!("{WEB}{rules}")));
    assert!(told(&allow).rules.is_empty(), "ALLOW allows less");
    let deny = with(&policy(&format!("{WEB}  action: DENY\n{rules}")));
    assert_eq!(told(&deny).rules[0].when.len(), 1, "DENY denies more");
    let message = &deny.condition("AuthorizationPolicy shop/p", "WaypointAccepted").message;
    assert!(message.contains("spec.rules[0].when[0] (experimental.envoy.filters.x)"), "{message}");
}

#[test]
fn every_field_of_a_token_rule_is_carried_over() {
    let text = tokens(&format!(
        "{WEB}  jwtRules:\n  - {{issuer: i, audiences: [a], jwks: '{{\"keys\":[]}}', fromHeaders: [{{name: X-Jwt, prefix: 'J '}}], fromParams: [p], fromCookies: [c], outputPayloadToHeader: X-Payload, forwardOriginalToken: true, outputClaimToHeaders: [{{header: X-Sub, claim: sub}}], timeout: 1s, spaceDelimitedClaims: [scp]}}\n  - {{issuer: j, jwks_uri: http://j/keys}}\n"
    ));
    let resources = with(&text);
    let rules = &resources.l7.authentications["RequestAuthentication/shop/t"].rules;
    let rule = &rules[0];
    assert_eq!(
        (rule.issuer.as_str(), rule.audiences.as_slice(), rule.jwks.as_str()),
        ("i", ["a".to_owned()].as_slice(), "{\"keys\":[]}")
    );
    assert_eq!((rule.from_headers[0].name.as_str(), rule.from_headers[0].prefix.as_str()), ("x-jwt", "J "));
    assert_eq!((rule.from_params[0].as_str(), rule.from_cookies[0].as_str()), ("p", "c"));
    assert_eq!((rule.output_payload_to_header.as_str(), rule.forward_original_token), ("x-payload", true));
    assert_eq!(
        (rule.output_claim_to_headers[0].header.as_str(), rule.output_claim_to_headers[0].claim.as_str()),
        ("x-sub", "sub")
    );
    assert_eq!((rule.timeout.unwrap().seconds, rule.space_delimited_claims[0].as_str()), (1, "scp"));
    assert_eq!(rules[1].jwks_uri, "http://j/keys");
    for spec in ["  jwtRules: []\n", "  selector: {matchLabels: {a: b}}\n"] {
        let nowhere = with(&tokens(spec));
        let condition = nowhere.condition("RequestAuthentication shop/t", "WaypointAccepted");
        assert_eq!((condition.status, condition.reason.as_str()), (false, "UnsupportedValue"), "{spec}");
        assert!(nowhere.l7.authentications.is_empty());
    }
}

#[test]
fn what_is_wrong_is_refused_with_the_field_and_what_would_be_right() {
    let rule = |rule: &str| tokens(&format!("{WEB}  jwtRules: [{{{rule}}}]\n"));
    let operation = |o: &str| policy(&format!("{WEB}  rules: [{{to: [{{operation: {{{o}}}}}]}}]\n"));
    for (text, expected) in [
        (rule("jwksUri: https://a/b"), "spec.jwtRules[0].issuer: missing"),
        (rule("issuer: a"), "spec.jwtRules[0].jwksUri: missing; write jwksUri or jwks"),
        (
            rule("issuer: a, jwksUri: keys.example/a"),
            "spec.jwtRules[0].jwksUri: \"keys.example/a\" is no URL; begin it with https://",
        ),
        (rule("issuer: a, jwks: '{}'"), "spec.jwtRules[0].jwks: is no set of keys"),
        (
            operation("paths: ['/a/{**}/{*}']"),
            "spec.rules[0].to[0].operation.paths[0]: \"/a/{**}/{*}\" has {*} after {**}",
        ),
        (
            operation("paths: ['/a{*}']"),
            "spec.rules[0].to[0].operation.paths[0]: \"/a{*}\" has the segment \"a{*}\"",
        ),
        (operation("methods: [G*T]"), "spec.rules[0].to[0].operation.methods[0]: \"G*T\" has * inside"),
        (
            policy(&format!("{WEB}  rules: [{{when: [{{key: remote.ip, values: [here]}}]}}]\n")),
            "spec.rules[0].when[0].values[0]: \"here\" is neither an IP address nor a CIDR",
        ),
        (
            policy("  targetRefs: [{group: '', kind: Pod, name: a}]\n"),
            "spec.targetRefs[0]: Pod of group \"\" is no target; write one of Service (group \"\")",
        ),
        (
            policy("  targetRefs: [{kind: Gateway, name: a}]\n"),
            "spec.targetRefs[0]: Gateway of group \"\" is no target",
        ),
        (policy(&format!("{WEB}  action: CUSTOM\n  provider: {{}}\n")), "spec.provider.name: missing"),
    ] {
        let found = problems(&text);
        assert!(found.iter().any(|f| f.starts_with(expected)), "{expected}: {found:#?}");
    }
}
