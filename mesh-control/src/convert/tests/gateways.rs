use mesh_core::xds::proto::l7;
use mesh_core::xds::proto::l7::gateway::Inside;
use mesh_core::xds::proto::l7::listener_tls::Mode;

use crate::convert::{ListenerState, Resources};
use crate::model::{Key, Kind};
use crate::testing::{certificate, resources, secret};

const OTHER: &str = "---\napiVersion: gateway.networking.k8s.io/v1beta1\nkind: ReferenceGrant\nmetadata: {name: g, namespace: bank}\nspec: {from: [{group: gateway.networking.k8s.io, kind: Gateway, namespace: edge}], to: [{group: '', kind: Secret, name: cert}]}\n";

/// Gateway `in` of namespace `edge`, of class istio.
fn gateway(listeners: &str) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: in, namespace: edge}}\nspec: {{gatewayClassName: istio, listeners: [{listeners}]}}\n"
    )
}

fn https(reference: &str) -> String {
    gateway(&format!(
        "{{name: https, port: 443, protocol: HTTPS, hostname: a.example, tls: {{certificateRefs: [{reference}]}}}}"
    ))
}

fn states(resources: &Resources) -> &[ListenerState] {
    &resources.attachments.listeners[&Key::new("edge", "in")]
}

/// Reason and text of what is unresolved at the first listener, and whether it serves anybody.
fn unresolved(yaml: &str) -> (String, String, bool) {
    let resources = resources(yaml);
    let state = &states(&resources)[0];
    let (reason, why) = state.unresolved.clone().unwrap_or_default();
    (reason.to_owned(), why, state.serves)
}

#[test]
fn a_certificate_is_told_to_the_proxies_of_its_gateway_and_the_listener_names_it() {
    let pair = certificate("a.example");
    let resources = resources(&[https("{name: cert}"), secret("edge", "cert", &pair)].concat());
    let name = "Gateway/edge/in/Secret/edge/cert";
    let told = &resources.l7.credentials[name];
    assert_eq!(told.account, Key::new("edge", "in-istio"), "who runs what is deployed for it");
    assert_eq!((&told.credential.certificate_chain, &told.credential.private_key), (&pair.0, &pair.1));
    let listener = &resources.l7.gateways["Gateway/edge/in"].listeners[0];
    let tls = listener.tls.as_ref().unwrap();
    assert_eq!((tls.mode(), tls.credentials.as_slice()), (Mode::Terminate, &[name.to_owned()][..]));
    let [state] = states(&resources) else { panic!() };
    assert_eq!((state.serves, &state.unresolved, &state.refusal), (true, &None, &None));
    assert_eq!(state.kinds, [Kind::HTTPRoute, Kind::GRPCRoute]);
    let text = format!("{resources:?}");
    assert!(!text.contains(pair.1.lines().nth(1).unwrap()), "a key is never printed");
}

#[test]
fn a_gateway_that_somebody_deploys_himself_names_the_account_that_gets_its_keys() {
    let own = https("{name: cert}")
        .replace("{name: in, ", "{name: in, annotations: {gateway.istio.io/service-account: edge-proxy}, ");
    let resources = resources(&[own, secret("edge", "cert", &certificate("a.example"))].concat());
    let told = resources.l7.credentials.values().next().unwrap();
    assert_eq!(told.account, Key::new("edge", "edge-proxy"));
}

#[test]
fn a_certificate_that_cannot_be_used_is_said_with_what_would_be_right() {
    let (chain, key) = certificate("a.example");
    let (_, other) = certificate("a.example");
    let at = |pair: (&str, &str)| {
        let pair = (pair.0.to_owned(), pair.1.to_owned());
        unresolved(&[https("{name: cert}"), secret("edge", "cert", &pair)].concat())
    };
    for ((reason, why, serves), expected) in [
        (
            at((&chain, &other)),
            "Secret edge/cert: of tls.crt and tls.key, the key is not the one of the first certificate",
        ),
        (at(("junk", &key)), "the certificate is no PEM"),
        (at((&chain, "junk")), "the key is no PEM of a private key"),
        (unresolved(&https("{name: cert}")), "there is no Secret edge/cert of type kubernetes.io/tls"),
        (
            unresolved(&https("{kind: Vault, name: cert}")),
            "Vault of group \"\" holds no certificate; name a Secret",
        ),
        (
            unresolved(&https("{group: x.example, name: cert}")),
            "Secret of group \"x.example\" holds no certificate",
        ),
        (unresolved(&https("")), "tls.certificateRefs is missing"),
    ] {
        assert_eq!((reason.as_str(), serves), ("InvalidCertificateRef", false), "{why}");
        assert!(why.contains(expected), "{why}");
        assert!(!why.contains("PRIVATE"), "{why}");
    }
    // Of several, the others are served.
    let two = https("{name: gone}, {name: cert}");
    let (reason, why, serves) = unresolved(&[two, secret("edge", "cert", &(chain, key))].concat());
    assert_eq!((reason.as_str(), serves), ("InvalidCertificateRef", true), "{why}");
}

#[test]
fn a_certificate_of_another_namespace_needs_a_grant_there() {
    let bank = secret("bank", "cert", &certificate("a.example"));
    let named = https("{name: cert, namespace: bank}");
    let (reason, why, serves) = unresolved(&[named.as_str(), &bank].concat());
    assert_eq!((reason.as_str(), serves), ("RefNotPermitted", false), "{why}");
    assert!(why.contains("no ReferenceGrant there lets Gateways of namespace edge name it"), "{why}");
    assert!(resources(&[named.as_str(), &bank].concat()).l7.credentials.is_empty());
    let granted = resources(&[named.as_str(), &bank, OTHER].concat());
    assert!(granted.l7.credentials.contains_key("Gateway/edge/in/Secret/bank/cert"));
    for other in [
        ("name: cert}]", "name: another}]"),
        ("kind: Gateway", "kind: HTTPRoute"),
        ("namespace: edge", "namespace: x"),
    ] {
        let (reason, ..) = unresolved(&[named.as_str(), &bank, &OTHER.replace(other.0, other.1)].concat());
        assert_eq!(reason, "RefNotPermitted", "{other:?}");
    }
}

#[test]
fn listeners_that_cannot_share_a_port_and_what_is_not_served_say_so() {
    let tls = "tls: {certificateRefs: [{name: cert}]}";
    let all = gateway(&format!(
        "{{name: a, port: 443, protocol: HTTPS, {tls}}}, {{name: b, port: 443, protocol: HTTPS, {tls}}}, \
         {{name: c, port: 443, protocol: HTTP}}, {{name: d, port: 443, protocol: TLS, hostname: d.example, tls: {{mode: Passthrough}}}}, \
         {{name: e, port: 8443, protocol: TLS, {tls}}}, {{name: f, port: 9000, protocol: TCP}}, \
         {{name: g, port: 9000, protocol: TCP}}, {{name: h, port: 443, protocol: TCP}}, {{name: i, port: 53, protocol: UDP}}"
    ));
    let resources = resources(&[all, secret("edge", "cert", &certificate("a.example"))].concat());
    let refusals: Vec<_> =
        states(&resources).iter().map(|s| s.refusal.as_ref().map(|(reason, _)| *reason)).collect();
    let (host, protocol) = (Some("HostnameConflict"), Some("ProtocolConflict"));
    assert_eq!(
        refusals,
        [None, host, protocol, None, None, None, host, protocol, Some("UnsupportedProtocol")]
    );
    assert_eq!(states(&resources)[3].kinds, [Kind::TLSRoute]);
    assert_eq!(states(&resources)[4].kinds, [Kind::TLSRoute, Kind::TCPRoute]);
    assert_eq!(states(&resources)[5].kinds, [Kind::TCPRoute]);
    let told = &resources.l7.gateways["Gateway/edge/in"].listeners;
    let modes: Vec<_> = told
        .iter()
        .map(|l| (l.name.as_str(), l.tls.as_ref().map(l7::ListenerTls::mode), l.inside()))
        .collect();
    let expected = [
        ("a", Some(Mode::Terminate), Inside::Http),
        ("d", Some(Mode::Passthrough), Inside::Stream),
        ("e", Some(Mode::Terminate), Inside::Stream),
        ("f", None, Inside::Stream),
    ];
    assert_eq!(modes, expected);
}

#[test]
fn a_gateway_that_is_to_check_clients_is_not_served_without_that() {
    let asks = https("{name: cert}").replace("listeners:", "tls: {frontend: {default: {}}}, listeners:");
    let resources = resources(&[asks, secret("edge", "cert", &certificate("a.example"))].concat());
    let (reason, why) = states(&resources)[0].refusal.clone().unwrap();
    assert_eq!(reason, "UnsupportedValue");
    assert!(why.contains("spec.tls.frontend asks for certificates of clients"), "{why}");
    assert!(resources.l7.gateways.is_empty() && resources.l7.credentials.is_empty());
}

#[test]
fn tls_that_is_passed_on_takes_the_names_of_its_routes() {
    let gateway =
        gateway("{name: tls, port: 443, protocol: TLS, hostname: '*.example', tls: {mode: Passthrough}}");
    let route = "---\napiVersion: gateway.networking.k8s.io/v1\nkind: TLSRoute\nmetadata: {name: r, namespace: edge}\nspec: {parentRefs: [{name: in}], hostnames: [a.example], rules: [{backendRefs: [{name: web, port: 443}]}]}\n";
    let service = "---\napiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: edge}\nspec: {clusterIP: 10.2.0.1, ports: [{port: 443}]}\n";
    let resources = resources(&[&gateway, route, service].concat());
    let told = &resources.l7.routes["TLSRoute/edge/r"];
    assert_eq!(told.hostnames, ["a.example"]);
    let backend = told.tcp[0].backends[0].backend.as_ref().unwrap();
    assert_eq!(
        (backend.service.as_ref().unwrap().hostname.as_str(), backend.invalid.as_str()),
        ("web.edge.svc.cluster.local", "")
    );
    assert_eq!(states(&resources)[0].attached, 1);
    assert!(resources.condition("TLSRoute edge/r", "Accepted").status);
}

#[test]
fn a_class_of_any_name_is_served_while_it_has_a_controller_of_ours() {
    let class = |controller: &str| {
        format!(
            "---\napiVersion: gateway.networking.k8s.io/v1\nkind: GatewayClass\nmetadata: {{name: edge}}\nspec: {{controllerName: {controller}}}\n"
        )
    };
    let own = gateway("{name: http, port: 80, protocol: HTTP}")
        .replace("gatewayClassName: istio", "gatewayClassName: edge");
    let served = |class: &str| resources(&[class, &own].concat()).l7.gateways.contains_key("Gateway/edge/in");
    assert!(
        served(&class("istio.io/gateway-controller")) && served(&class("undermesh.io/gateway-controller"))
    );
    assert!(
        !served("") && !served(&class("example.com/other")) && !served(&class("istio.io/mesh-controller"))
    );
    // In whichever order they come.
    let objects = crate::testing::objects(&[own.as_str(), &class("istio.io/gateway-controller")].concat());
    let mut objects = (*objects).clone();
    let controller =
        |objects: &crate::model::Objects| objects.gateways.values().next().unwrap().gateway_controller();
    assert_eq!(controller(&objects), Some("istio.io/gateway-controller"));
    objects.remove(&crate::model::ObjectRef { kind: Kind::GatewayClass, key: Key::new("", "edge") });
    assert_eq!(controller(&objects), None);
}

#[test]
fn parameters_of_a_class_of_ours_have_no_effect_and_say_so() {
    let class = |controller: &str| {
        format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: GatewayClass\nmetadata: {{name: edge}}\n\
             spec: {{controllerName: {controller}, parametersRef: {{group: '', kind: ConfigMap, name: a, namespace: b}}}}\n"
        )
    };
    let ours = resources(&class("istio.io/gateway-controller"));
    let message = &ours.condition("GatewayClass edge", "Accepted").message;
    assert!(message.starts_with("no effect: spec.parametersRef; write "), "{message}");
    assert_eq!(resources(&class("example.com/other")).conditions, []);
}

#[test]
fn a_listener_asks_clients_for_certificates_where_istios_option_says_so() {
    let pair = certificate("a.example");
    let at = |mode: &str, secrets: &str| {
        let own = gateway(&format!(
            "{{name: https, port: 443, protocol: HTTPS, tls: {{certificateRefs: [{{name: cert}}], options: {{gateway.istio.io/tls-terminate-mode: {mode}}}}}}}"
        ));
        let resources = resources(&[&own, secrets].concat());
        let state = states(&resources)[0].clone();
        let told =
            resources.l7.gateways.get("Gateway/edge/in").map(|told| told.listeners[0].tls.clone().unwrap());
        (told, state)
    };
    let own = secret("edge", "cert", &pair).replace("tls.key:", "ca.crt: own, tls.key:");
    let beside = "---\napiVersion: v1\nkind: Secret\nmetadata: {name: cert-cacert, namespace: edge}\nstringData: {ca.crt: beside}\n";
    let clients = |mode: &str, secrets: &str| {
        let (told, state) = at(mode, secrets);
        assert!(state.serves, "{state:?}");
        told.unwrap().clients.map(|clients| (clients.roots, clients.optional))
    };
    assert_eq!(clients("MUTUAL", &own), Some(("own".into(), false)));
    assert_eq!(clients("OPTIONAL_MUTUAL", &(own.clone() + beside)), Some(("beside".into(), true)));
    assert_eq!(clients("SIMPLE", &own), None);
    let (told, state) = at("MUTUAL", &secret("edge", "cert", &pair));
    let told = told.unwrap();
    assert_eq!((told.clients, told.credentials.len(), state.serves), (None, 0, false));
    let why = state.unresolved.unwrap().1;
    assert_eq!(
        why,
        "no Secret edge/cert-cacert or edge/cert has ca.crt, by which clients' certificates are told"
    );
    let (told, state) = at("ISTIO_MUTUAL", &own);
    assert_eq!((told, state.refusal.unwrap().0), (None, "UnsupportedValue"));
    let wrong = super::virtual_services::problems(&gateway(
        "{name: https, port: 443, protocol: HTTPS, tls: {certificateRefs: [{name: cert}], options: {gateway.istio.io/tls-terminate-mode: NONE}}}",
    ));
    assert!(wrong[0].contains("\"NONE\" is no mode; write SIMPLE, MUTUAL or OPTIONAL_MUTUAL"), "{wrong:?}");
}
