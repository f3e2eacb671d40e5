use mesh_core::xds::proto::l7 as wire;
use wire::gateway::Inside;
use wire::http_rule::Action;
use wire::listener_tls::Mode;

use super::virtual_services::{problems, service};
use crate::convert::Resources;
use crate::model::Key;
use crate::testing::{certificate, resources, secret};

/// The pod of gateway `edge/in`, with a Service that has a port of its own.
const PROXY: &str = "---
apiVersion: v1
kind: Pod
metadata: {name: p, namespace: edge, labels: {gateway.networking.k8s.io/gateway-name: in, istio: ingressgateway}}
spec: {nodeName: a, serviceAccountName: proxy, containers: [{name: main, image: none, ports: [{name: web, containerPort: 8080}]}]}
---
apiVersion: v1
kind: Service
metadata: {name: in, namespace: edge}
spec: {selector: {istio: ingressgateway}, ports: [{name: http, port: 80, targetPort: web}, {name: https, port: 443, targetPort: 8443}]}
";

/// Istio's Gateway `shop/public` for those proxies.
fn gateway(servers: &str) -> String {
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: Gateway\nmetadata: {{name: public, namespace: shop}}\nspec: {{selector: {{istio: ingressgateway}}, servers: [{servers}]}}\n"
    )
}

/// VirtualService `namespace/vs`.
fn bound(namespace: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: vs, namespace: {namespace}}}\nspec:\n{spec}"
    )
}

const TO_WEB: &str = "route: [{destination: {host: web.shop.svc.cluster.local}}]";
const HTTP: &str = "{port: {number: 80, name: http, protocol: HTTP}, hosts: ['*']}";

fn listeners(resources: &Resources) -> &[wire::gateway::Listener] {
    &resources.l7.gateways["Gateway/edge/in"].listeners
}

fn said<'r>(resources: &'r Resources, object: &str, kind: &str) -> (bool, &'r str) {
    let condition = resources.condition(object, kind);
    (condition.status, &condition.message)
}

const OBJECT: &str = "Gateway.networking.istio.io shop/public";

#[test]
fn a_port_is_that_of_the_proxies_service_where_it_has_it() {
    let servers = "{port: {number: 80, name: a, protocol: HTTP}, hosts: [a.example]}, \
                   {port: {number: 8080, name: b, protocol: HTTP2}, hosts: [b.example]}, \
                   {port: {number: 443, name: c, protocol: TLS}, hosts: [c.example], tls: {mode: PASSTHROUGH}}, \
                   {port: {number: 31400, name: d, protocol: TCP}, hosts: ['*']}";
    let resources = resources(&[PROXY, &gateway(servers)].concat());
    let told: Vec<_> = listeners(&resources)
        .iter()
        .map(|l| (l.name.as_str(), l.port, l.hostname.as_str(), l.inside(), l.tls.is_some()))
        .collect();
    let expected = [
        ("istio/8080", 8080, "", Inside::Http, false),
        ("istio/shop/public/2/8443/c.example", 8443, "c.example", Inside::Stream, true),
        ("istio/31400", 31400, "", Inside::Stream, false),
    ];
    assert_eq!(told, expected, "80 and 8080 are the same port of the pods");
    assert!(said(&resources, OBJECT, "Accepted").0);
}

#[test]
fn a_gateway_that_selects_no_proxy_says_so() {
    let alone = resources(&gateway(HTTP));
    assert!(alone.l7.gateways.is_empty());
    let (accepted, why) = said(&alone, OBJECT, "Accepted");
    assert!(!accepted && why.contains("has also istio=ingressgateway"), "{why}");
    // Waypoints are no gateways, though their pods have the label.
    let waypoint = "---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: in, namespace: edge}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
";
    let resources = resources(&[PROXY, waypoint, &gateway(HTTP)].concat());
    assert!(resources.l7.gateways.is_empty() && !said(&resources, OBJECT, "Accepted").0);
}

#[test]
fn gateways_of_other_namespaces_select_nothing_where_the_settings_say_so() {
    let scoped = "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\ndata: {undermesh: 'scopeGatewayToNamespace: true'}\n";
    let tls = https("a", "a.example", "mode: SIMPLE, credentialName: site");
    let site = secret("edge", "site", &certificate("a.example"));
    let foreign = [PROXY, scoped, &gateway(&tls), &site].concat();
    let resources = crate::testing::resources(&foreign);
    assert!(resources.l7.gateways.is_empty() && resources.l7.credentials.is_empty());
    assert!(crate::testing::objects(&foreign).credentials.is_empty(), "its Secrets are not read either");
    let own = foreign.replace("{name: public, namespace: shop}", "{name: public, namespace: edge}");
    assert_eq!(crate::testing::resources(&own).l7.credentials.len(), 1);
}

#[test]
fn a_virtual_service_is_bound_where_host_and_namespace_are_right() {
    let hosts = |host: &str, namespace: &str, own: &str| {
        let server = format!("{{port: {{number: 80, name: http, protocol: HTTP}}, hosts: ['{host}']}}");
        let spec = format!("  hosts: ['{own}']\n  gateways: [shop/public]\n  http: [{{{TO_WEB}}}]\n");
        let all = resources(&[PROXY, &gateway(&server), &service("web"), &bound(namespace, &spec)].concat());
        let object = format!("VirtualService {namespace}/vs");
        assert_eq!(said(&all, &object, "Accepted").0, !all.l7.routes.is_empty());
        all.l7.routes.values().next().map(|route| route.hostnames.clone()).unwrap_or_default()
    };
    for (host, namespace, own, expected) in [
        ("*", "bank", "a.example", "a.example"),
        ("*.example", "bank", "a.example", "a.example"),
        ("a.example", "bank", "*", "a.example"),
        ("a.example", "bank", "*.example", "a.example"),
        ("*", "bank", "*", "*"),
        ("b.example", "bank", "a.example", ""),
        ("*.example", "bank", "example", ""),
        ("./a.example", "bank", "a.example", ""),
        ("./a.example", "shop", "a.example", "a.example"),
        ("bank/*", "bank", "a.example", "a.example"),
        ("bank/*", "shop", "a.example", ""),
    ] {
        let expected: &[&str] = if expected.is_empty() { &[] } else { &[expected] };
        assert_eq!(hosts(host, namespace, own), expected, "{host} {namespace} {own}");
    }
}

#[test]
fn rules_count_in_the_mesh_or_at_a_gateways_port_as_they_say() {
    let servers = "{port: {number: 80, name: a, protocol: HTTP}, hosts: ['*']}, \
                   {port: {number: 9000, name: b, protocol: HTTP}, hosts: ['*']}";
    let rule = |name: &str, matches: &str| format!("  - {{name: {name}, match: [{matches}], {TO_WEB}}}\n");
    let spec = [
        "  hosts: [web.shop.svc.cluster.local]\n  gateways: [mesh, public]\n  http:\n",
        &rule("mesh", "{gateways: [mesh]}"),
        &rule("outside", "{gateways: [shop/public], uri: {prefix: /a}}"),
        &rule("other", "{gateways: [another]}"),
        &rule("port", "{port: 9000}"),
        &rule("labelled", "{sourceLabels: {istio: ingressgateway}, sourceNamespace: edge}"),
        &rule("from-shop", "{sourceNamespace: shop}"),
        &rule("everywhere", "{uri: {prefix: /b}}"),
    ]
    .concat();
    let resources = resources(&[PROXY, &gateway(servers), &service("web"), &bound("shop", &spec)].concat());
    let names = |route: &str| -> Vec<String> {
        resources.l7.routes[route].http.iter().map(|rule| rule.name.clone()).collect()
    };
    assert_eq!(names("VirtualService/shop/vs"), ["mesh", "port", "labelled", "from-shop", "everywhere"]);
    assert_eq!(names("VirtualService/shop/vs@0"), ["outside", "labelled", "everywhere"]);
    assert_eq!(names("VirtualService/shop/vs@1"), ["outside", "port", "labelled", "everywhere"]);
    let of = |route: &str| {
        let route = &resources.l7.routes[route];
        let all: Vec<String> =
            route.gateways.iter().map(|l| format!("{}/{}/{}", l.namespace, l.name, l.listener)).collect();
        (all, route.parents.len())
    };
    assert_eq!(of("VirtualService/shop/vs@0"), (vec!["edge/in/istio/8080".to_owned()], 0));
    assert_eq!(of("VirtualService/shop/vs@1"), (vec!["edge/in/istio/9000".to_owned()], 0));
    let decided = &resources.l7.routes["VirtualService/shop/vs@1"].http[1].matches[0];
    assert_eq!(*decided, wire::HttpMatch::default(), "port and source are decided already");
    let (accepted, why) = said(&resources, "VirtualService shop/vs", "Accepted");
    assert!(
        accepted && why.contains("spec.http[2].match[0].gateways (another, which spec.gateways does not"),
        "{why}"
    );
}

#[test]
fn the_same_rules_at_several_servers_are_told_of_once() {
    let servers = "{port: {number: 80, name: a, protocol: HTTP}, hosts: ['*']}, \
                   {port: {number: 9000, name: b, protocol: HTTP}, hosts: ['*']}";
    let spec = format!("  hosts: [a.example]\n  gateways: [public]\n  http: [{{{TO_WEB}}}]\n");
    let resources = resources(&[PROXY, &gateway(servers), &service("web"), &bound("shop", &spec)].concat());
    assert_eq!(resources.l7.routes.len(), 1);
    assert_eq!(resources.l7.routes["VirtualService/shop/vs@0"].gateways.len(), 2);
}

#[test]
fn a_virtual_service_for_gateways_that_are_not_there_is_told() {
    let spec = format!("  hosts: [a.example]\n  gateways: [nowhere, edge/public]\n  http: [{{{TO_WEB}}}]\n");
    let resources = resources(&[PROXY, &gateway(HTTP), &service("web"), &bound("shop", &spec)].concat());
    assert!(resources.l7.routes.is_empty());
    let (accepted, why) = said(&resources, "VirtualService shop/vs", "Accepted");
    assert!(!accepted && why.contains("Gateway.networking.istio.io shop/nowhere does not exist"), "{why}");
    let (resolved, why) = said(&resources, "VirtualService shop/vs", "ResolvedRefs");
    assert!(!resolved && why.contains("spec.gateways[1]: Gateway.networking.istio.io edge/public"), "{why}");
    // One that is exported to its own namespace only is not seen by the proxies of another.
    let hidden =
        format!("  hosts: [a.example]\n  gateways: [public]\n  exportTo: ['.']\n  http: [{{{TO_WEB}}}]\n");
    let all = [PROXY, &gateway(HTTP), &service("web"), &bound("shop", &hidden)].concat();
    assert!(crate::testing::resources(&all).l7.routes.is_empty());
}

#[test]
fn clients_of_a_server_that_redirects_come_to_https_first_whatever_is_bound_to_it() {
    let server =
        "{port: {number: 80, name: a, protocol: HTTP}, hosts: ['*.example'], tls: {httpsRedirect: true}}";
    let spec = format!("  hosts: [a.example]\n  gateways: [public]\n  http: [{{{TO_WEB}}}]\n");
    let resources = resources(&[PROXY, &gateway(server), &service("web"), &bound("shop", &spec)].concat());
    let redirect = &resources.l7.routes["Gateway.networking.istio.io/shop/public/0@edge/in"];
    assert_eq!(
        redirect.hostnames,
        ["*.example", "a.example"],
        "of the rules for a host of its own, it is the first"
    );
    assert!(redirect.origin.as_ref().unwrap().created < 0);
    let Some(Action::Redirect(to)) = &redirect.http[0].action else { panic!("{redirect:?}") };
    assert_eq!((to.scheme.as_str(), to.status), ("https", 0));
    let unless = &redirect.http[0].matches[0].headers[0];
    assert_eq!((unless.name.as_str(), unless.invert), ("x-forwarded-proto", true));
}

fn https(name: &str, hosts: &str, tls: &str) -> String {
    format!("{{port: {{number: 443, name: {name}, protocol: HTTPS}}, hosts: [{hosts}], tls: {{{tls}}}}}")
}

/// An Opaque Secret of namespace edge.
fn opaque(name: &str, data: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Secret\nmetadata: {{name: {name}, namespace: edge}}\nstringData: {{{data}}}\n"
    )
}

#[test]
fn certificates_are_those_of_the_proxies_namespace_and_go_to_their_account() {
    let pair = certificate("a.example");
    let server =
        https("a", "a.example, b.example", "mode: SIMPLE, credentialName: site, minProtocolVersion: TLSV1_3");
    for there in [
        secret("edge", "site", &pair),
        opaque("site", &format!("cert: {:?}, key: {:?}", pair.0, pair.1)),
        opaque("site", &format!("tls.crt: {:?}, tls.key: {:?}", pair.0, pair.1)),
    ] {
        let resources = resources(&[PROXY, &gateway(&server), &there].concat());
        let told = &resources.l7.credentials["Gateway/edge/in/Secret/edge/site"];
        assert_eq!(told.account, Key::new("edge", "proxy"));
        assert_eq!(told.credential.private_key, pair.1);
        let [a, b] = listeners(&resources) else { panic!() };
        assert_eq!((a.hostname.as_str(), b.hostname.as_str()), ("a.example", "b.example"));
        assert_eq!((a.server == b.server, a.server.is_empty()), (true, false), "they share connections");
        let tls = a.tls.as_ref().unwrap();
        assert_eq!((tls.mode(), tls.min_version()), (Mode::Terminate, wire::listener_tls::Version::Tls13));
        assert_eq!(tls.credentials, ["Gateway/edge/in/Secret/edge/site"]);
        assert!(said(&resources, OBJECT, "ResolvedRefs").0);
    }
    // The namespace of the Gateway is another.
    let elsewhere = resources(&[PROXY, &gateway(&server), &secret("shop", "site", &pair)].concat());
    assert!(elsewhere.l7.credentials.is_empty());
    assert!(listeners(&elsewhere)[0].tls.as_ref().unwrap().credentials.is_empty(), "nobody is served");
    let (resolved, why) = said(&elsewhere, OBJECT, "ResolvedRefs");
    assert!(!resolved && why.contains("there is no Secret edge/site with tls.crt and tls.key"), "{why}");
}

#[test]
fn clients_certificates_are_checked_by_the_roots_of_one_of_the_secrets_or_nobody_is_served() {
    let pair = certificate("a.example");
    let tls = |mode: &str, more: &str| {
        https("a", "a.example", &format!("mode: {mode}, credentialName: site{more}"))
    };
    let site = format!("cert: {:?}, key: {:?}", pair.0, pair.1);
    let told = |server: &str, secrets: &str| {
        let resources = resources(&[PROXY, &gateway(server), secrets].concat());
        let tls = listeners(&resources)[0].tls.clone().unwrap();
        (tls.clients.clone(), tls.credentials.len(), said(&resources, OBJECT, "ResolvedRefs").1.to_owned())
    };
    let own = opaque("site", &format!("{site}, cacert: own, crl: list"));
    let (clients, served, _) = told(&tls("MUTUAL", ", subjectAltNames: [b.example]"), &own);
    let clients = clients.unwrap();
    assert_eq!((clients.roots.as_str(), clients.revocations.as_str()), ("own", "list"));
    assert_eq!(
        (clients.subject_alt_names, clients.optional, served),
        (vec!["b.example".to_owned()], false, 1)
    );
    let apart = own.clone() + &opaque("site-cacert", "ca.crt: apart");
    assert_eq!(
        told(&tls("OPTIONAL_MUTUAL", ""), &apart).0.map(|c| (c.roots, c.optional)),
        Some(("apart".into(), true))
    );
    let named = own.clone() + &opaque("roots", "ca.crt: named");
    let server = tls("MUTUAL", ", caCertCredentialName: roots");
    assert_eq!(told(&server, &named).0.map(|c| c.roots), Some("named".into()));
    // Who asks for certificates that nobody can check serves nobody.
    let (clients, served, why) = told(&server, &own);
    assert_eq!((clients, served), (None, 0));
    assert!(why.contains("no Secret edge/roots has ca.crt"), "{why}");
    assert_eq!(told(&tls("SIMPLE", ""), &own).0, None);
}

#[test]
fn what_one_port_cannot_be_is_refused_and_the_rest_is_served() {
    let servers = "{port: {number: 80, name: a, protocol: HTTP}, hosts: ['*']}, \
                   {port: {number: 80, name: b, protocol: TCP}, hosts: ['*']}, \
                   {port: {number: 443, name: c, protocol: TLS}, hosts: [c.example, d.example], tls: {mode: PASSTHROUGH}}, \
                   {port: {number: 443, name: d, protocol: TLS}, hosts: [d.example, e.example], tls: {mode: PASSTHROUGH}}, \
                   {port: {number: 443, name: e, protocol: TLS}, hosts: [e.example], tls: {mode: ISTIO_MUTUAL}}";
    let resources = resources(&[PROXY, &gateway(servers)].concat());
    let hosts: Vec<&str> = listeners(&resources).iter().map(|l| l.hostname.as_str()).collect();
    assert_eq!(hosts, ["", "c.example", "d.example", "e.example"]);
    let (accepted, why) = said(&resources, OBJECT, "Accepted");
    assert!(accepted, "{why}");
    for part in [
        "spec.servers[1]: port 8080 of edge/in is there for HTTP already",
        "spec.servers[3].hosts: d.example at port 8443 of edge/in is another server's already",
        "spec.servers[4].tls.mode (write PASSTHROUGH, SIMPLE, MUTUAL or OPTIONAL_MUTUAL; the server is not served)",
    ] {
        assert!(why.contains(part), "{part}: {why}");
    }
}

#[test]
fn streams_go_by_port_and_by_the_name_that_is_asked_for() {
    let pair = certificate("a.example");
    let servers = "{port: {number: 31400, name: a, protocol: TCP}, hosts: ['*']}, \
                   {port: {number: 9443, name: b, protocol: TLS}, hosts: [b.example], tls: {mode: SIMPLE, credentialName: site}}, \
                   {port: {number: 443, name: c, protocol: TLS}, hosts: ['*.example'], tls: {mode: PASSTHROUGH}}";
    let spec = format!(
        "  hosts: ['*']
  gateways: [public]
  tcp:
  - {{match: [{{port: 31400, sourceSubnet: 192.0.2.0/24}}], {TO_WEB}}}
  - {{match: [{{port: 9443}}], {TO_WEB}}}
  tls:
  - {{match: [{{sniHosts: [c.example, other]}}, {{port: 1, sniHosts: [d.example]}}], {TO_WEB}}}
"
    );
    let all =
        [PROXY, &gateway(servers), &secret("edge", "site", &pair), &service("web"), &bound("shop", &spec)];
    let resources = resources(&all.concat());
    let told: Vec<_> = resources
        .l7
        .routes
        .values()
        .map(|r| {
            (r.gateways[0].listener.as_str(), r.hostnames.clone(), r.tcp.len(), r.tcp[0].matches[0].clone())
        })
        .collect();
    let from = wire::TcpMatch { source_subnets: vec!["192.0.2.0/24".into()], ..Default::default() };
    assert_eq!(told[0], ("istio/31400", vec!["*".to_owned()], 1, from));
    assert_eq!(
        told[1],
        ("istio/shop/public/1/9443/b.example", vec!["b.example".to_owned()], 1, wire::TcpMatch::default())
    );
    let passed =
        ("istio/shop/public/2/8443/*.example", vec!["c.example".to_owned()], 1, wire::TcpMatch::default());
    assert_eq!(told[2..], [passed]);
    assert_eq!(listeners(&resources)[1].inside(), Inside::Stream);
}

#[test]
fn policies_that_select_the_proxies_are_told_to_them() {
    let policy = |namespace: &str, selector: &str| {
        format!(
            "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: {namespace}}}\nspec: {{{selector}action: DENY, rules: [{{to: [{{operation: {{paths: [/a]}}}}]}}]}}\n"
        )
    };
    let selector = "selector: {matchLabels: {istio: ingressgateway}}, ";
    let targets = |policy: &str| {
        let resources = resources(&[PROXY, &gateway(HTTP), policy].concat());
        let one = resources.l7.authorizations.values().next();
        one.map(|a| {
            (
                a.targets.iter().map(|t| format!("{}/{}", t.namespace, t.name)).collect::<Vec<_>>(),
                a.rules.len(),
            )
        })
    };
    let expected = Some((vec!["edge/in".to_owned()], 1));
    assert_eq!(targets(&policy("edge", selector)), expected);
    assert_eq!(targets(&policy("edge", "")), expected);
    assert_eq!(targets(&policy("istio-system", selector)), expected);
    assert_eq!(targets(&policy("istio-system", "")), expected);
    assert_eq!(targets(&policy("shop", selector)), None);
    assert_eq!(targets(&policy("edge", "selector: {matchLabels: {a: b}}, ")), None);
    let tokens = "---\napiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {name: t, namespace: edge}\nspec: {selector: {matchLabels: {istio: ingressgateway}}, jwtRules: [{issuer: a, jwks: '{\"keys\":[]}'}]}\n";
    let resources = resources(&[PROXY, &gateway(HTTP), tokens].concat());
    assert_eq!(resources.l7.authentications["RequestAuthentication/edge/t"].targets.len(), 1);
    let (bound, why) = said(&resources, "RequestAuthentication edge/t", "WaypointAccepted");
    assert!(bound && why == "bound to gateway edge/in", "{why}");
}

#[test]
fn what_is_wrong_with_a_server_is_said_with_what_would_be_right() {
    let port = |protocol: &str| format!("port: {{number: 80, name: a, protocol: {protocol}}}, hosts: ['*']");
    for (given, expected) in [
        (String::new(), "spec.servers: missing; write at least one, with port and hosts"),
        ("{hosts: [a]}".into(), "spec.servers[0].port.name: missing"),
        ("{hosts: [a]}".into(), "spec.servers[0].port.number: 0 is no port"),
        (
            format!("{{{}}}", port("UDP")),
            "spec.servers[0].port.protocol: \"UDP\" is not served; write one of HTTP",
        ),
        ("{port: {number: 80, name: a, protocol: HTTP}}".into(), "spec.servers[0].hosts: missing"),
        (
            "{port: {number: 80, name: a, protocol: HTTP}, hosts: ['a b']}".into(),
            "spec.servers[0].hosts[0]: \"a b\" is no host",
        ),
        (format!("{{{}}}", port("HTTPS")), "spec.servers[0].tls: missing; port.protocol HTTPS needs it"),
        (
            format!("{{{}, tls: {{mode: SIMPLE}}}}", port("HTTPS")),
            "spec.servers[0].tls.credentialName: missing; name a Secret",
        ),
        (
            format!("{{{}, tls: {{mode: SIMPLE, credentialName: a}}}}", port("HTTP")),
            "spec.servers[0].tls: has settings of TLS beside httpsRedirect",
        ),
        (
            format!("{{{}, tls: {{mode: PASSTHROUGH, credentialName: a}}}}", port("TLS")),
            "spec.servers[0].tls: names certificates, and with mode PASSTHROUGH",
        ),
        (
            format!("{{{}, tls: {{mode: SIMPLE, credentialName: a, httpsRedirect: true}}}}", port("HTTPS")),
            "spec.servers[0].tls.httpsRedirect: is for servers of port.protocol HTTP",
        ),
        (
            format!(
                "{{{}, tls: {{mode: SIMPLE, credentialName: a, minProtocolVersion: TLSV1_3, maxProtocolVersion: TLSV1_2}}}}",
                port("HTTPS")
            ),
            "spec.servers[0].tls.minProtocolVersion: is newer than maxProtocolVersion",
        ),
        (
            format!("{{{0}}}, {{{0}}}", port("HTTP")),
            "spec.servers[1].port.name: \"a\" is there already; give each port its own",
        ),
    ] {
        let found = problems(&gateway(&given));
        assert!(found.iter().any(|problem| problem.starts_with(expected)), "{expected}: {found:?}");
    }
    let other = "apiVersion: gateway.example/v1\nkind: Gateway\nmetadata: {name: a}\n";
    let found = problems(other);
    let expected = "apiVersion: Gateway has apiVersion gateway.networking.k8s.io/v1 or gateway.networking.k8s.io/v1beta1 or networking.istio.io/v1";
    assert!(found[0].starts_with(expected), "{found:?}");
}
