//! Reader of Gateways.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1 as metav1;
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::super::l7::Reference;
use super::super::{
    AllowedNamespaces, ClientMode, Gateway, GatewayClass, GatewayHost, LabelSelector, Listener, ListenerTls,
    Object, SelectorOperator, controller_of,
};
use super::istio::Resource;
use super::{Check, Document, FieldError, meta, shape};

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct GatewaySpec {
    gateway_class_name: String,
    listeners: Vec<ListenerText>,
    addresses: Vec<GatewayAddressText>,
    infrastructure: InfrastructureText,
    allowed_listeners: Option<IgnoredAny>,
    default_scope: Option<IgnoredAny>,
    tls: Option<GatewayTlsText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct GatewayTlsText {
    backend: Option<IgnoredAny>,
    frontend: Option<IgnoredAny>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct InfrastructureText {
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    parameters_ref: Option<ParametersText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ParametersText {
    group: String,
    kind: String,
    name: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ListenerText {
    name: String,
    port: i64,
    protocol: String,
    allowed_routes: Option<AllowedRoutesText>,
    hostname: String,
    tls: Option<ListenerTlsText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ListenerTlsText {
    mode: ModeText,
    certificate_refs: Vec<SecretText>,
    options: BTreeMap<String, String>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize)]
enum ModeText {
    #[default]
    Terminate,
    Passthrough,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct SecretText {
    group: String,
    kind: Option<String>,
    namespace: String,
    name: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct AllowedRoutesText {
    namespaces: Option<RouteNamespacesText>,
    kinds: Vec<RouteKindText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RouteKindText {
    group: Option<String>,
    kind: String,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize)]
enum FromText {
    #[default]
    Same,
    All,
    Selector,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RouteNamespacesText {
    from: FromText,
    selector: Option<metav1::LabelSelector>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct GatewayAddressText {
    #[serde(rename = "type")]
    kind: Option<String>,
    value: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct GatewayStatus {
    addresses: Vec<GatewayAddressText>,
    #[serde(rename = "conditions")]
    _conditions: Option<IgnoredAny>,
    #[serde(rename = "listeners")]
    _listeners: Option<IgnoredAny>,
    #[serde(rename = "attachedListenerSets")]
    _attached: Option<IgnoredAny>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ClassSpec {
    controller_name: String,
    #[serde(rename = "description")]
    _description: Option<IgnoredAny>,
    parameters_ref: Option<IgnoredAny>,
}

pub(super) fn gateway_class(doc: &Document<'_>) -> Result<Object, Vec<FieldError>> {
    let object: Resource<ClassSpec> = shape(doc)?;
    let mut check = Check::new(doc);
    let meta = meta(doc, object.metadata, &mut check);
    let ClassSpec { controller_name: controller, parameters_ref, .. } = object.spec.unwrap_or_default();
    let unsupported = parameters_ref.map(|_| "spec.parametersRef".to_owned()).into_iter().collect();
    if controller.is_empty() {
        check.error("spec.controllerName", "missing; write istio.io/gateway-controller for gateways of ours");
    }
    check.finish(Object::GatewayClass(Arc::new(GatewayClass { meta, controller, unsupported })))
}

pub(super) fn gateway(doc: &Document<'_>) -> Result<Object, Vec<FieldError>> {
    let object: Resource<GatewaySpec, GatewayStatus> = shape(doc)?;
    let mut check = Check::new(doc);
    let meta = meta(doc, object.metadata, &mut check);
    let spec = object.spec.unwrap_or_default();
    let status = object.status.unwrap_or_default();
    if spec.gateway_class_name.is_empty() {
        check.error("spec.gatewayClassName", "missing; write istio-waypoint for a waypoint");
    }
    if spec.listeners.is_empty() {
        check.error("spec.listeners", "missing; a waypoint has {name: mesh, port: 15008, protocol: HBONE}");
    }
    let tls = spec.tls.unwrap_or_default();
    let set = [
        ("allowedListeners", spec.allowed_listeners.is_some()),
        ("defaultScope", spec.default_scope.is_some()),
        ("tls.backend", tls.backend.is_some()),
    ];
    let mut unsupported: Vec<String> =
        set.iter().filter(|(_, set)| *set).map(|(name, _)| format!("spec.{name}")).collect();
    let listeners = listeners(spec.listeners, &mut unsupported, &mut check);
    let manual = gateway_addresses(spec.addresses, "spec.addresses", &mut check);
    let assigned = gateway_addresses(status.addresses, "status.addresses", &mut check);
    check.finish(Object::Gateway(Arc::new(Gateway {
        meta,
        controller: controller_of(&spec.gateway_class_name, None),
        class: spec.gateway_class_name,
        listeners,
        addresses: if assigned.is_empty() { manual.clone() } else { assigned },
        manual,
        infrastructure_labels: spec.infrastructure.labels,
        infrastructure_annotations: spec.infrastructure.annotations,
        parameters: spec.infrastructure.parameters_ref.map(|p| (p.group, p.kind, p.name)),
        validates_clients: tls.frontend.is_some(),
        unsupported,
    })))
}

/// Of the kinds of routes, where none is written.
const GATEWAY_GROUP: &str = "gateway.networking.k8s.io";
/// The option of a listener that says which certificates clients have to show.
const TERMINATE_MODE: &str = "gateway.istio.io/tls-terminate-mode";
/// Protocols of listeners that take routes.
const ROUTED: [&str; 4] = ["HTTP", "HTTPS", "TLS", "TCP"];

fn listeners(
    given: Vec<ListenerText>,
    unsupported: &mut Vec<String>,
    check: &mut Check<'_>,
) -> Vec<Listener> {
    let mut listeners = Vec::new();
    for (i, l) in given.into_iter().enumerate() {
        let field = format!("spec.listeners[{i}]");
        let routed = ROUTED.contains(&l.protocol.as_str());
        let kinds = l.allowed_routes.as_ref().is_some_and(|a| !a.kinds.is_empty()) && !routed;
        // Of bytes nobody says for which host they are.
        let hostname = !l.hostname.is_empty() && (!routed || l.protocol == "TCP");
        if !l.hostname.is_empty() {
            check
                .dns_name(&format!("{field}.hostname"), l.hostname.strip_prefix("*.").unwrap_or(&l.hostname));
        }
        let tls = l.tls.is_some() && !routed;
        for (name, set) in [("hostname", hostname), ("tls", tls), ("allowedRoutes.kinds", kinds)] {
            if set {
                unsupported.push(format!("{field}.{name}"));
            }
        }
        let port = check.port(&format!("{field}.port"), l.port);
        if l.protocol.is_empty() {
            check.error(format!("{field}.protocol"), "missing; write HBONE for a waypoint");
        }
        let tls =
            l.tls.map(|text| listener_tls(text, &l.protocol, &format!("{field}.tls"), unsupported, check));
        let routes = l.allowed_routes.unwrap_or_default();
        let kinds =
            routes.kinds.into_iter().map(|k| (k.group.unwrap_or_else(|| GATEWAY_GROUP.to_owned()), k.kind));
        let kinds = kinds.collect();
        let allowed = allowed(routes.namespaces.unwrap_or_default(), &field, check);
        let (name, protocol, hostname) = (l.name, l.protocol, l.hostname);
        listeners.push(Listener { name, port, protocol, hostname, allowed, kinds, tls });
    }
    listeners
}

fn listener_tls(
    text: ListenerTlsText,
    protocol: &str,
    field: &str,
    unsupported: &mut Vec<String>,
    check: &mut Check<'_>,
) -> ListenerTls {
    let passthrough = text.mode == ModeText::Passthrough;
    match protocol {
        "HTTP" => check.error(field, "does not go with protocol HTTP; write protocol HTTPS, or take it away"),
        "TCP" => check.error(field, "does not go with protocol TCP; write protocol TLS, or take it away"),
        "HTTPS" if passthrough => {
            check.error(
                format!("{field}.mode"),
                "Passthrough does not go with protocol HTTPS; write protocol TLS",
            );
        }
        _ => {}
    }
    let clients = options(&text.options, field, unsupported, check);
    let mut certificates = Vec::new();
    for (i, reference) in text.certificate_refs.into_iter().enumerate() {
        if reference.name.is_empty() {
            check.error(format!("{field}.certificateRefs[{i}].name"), "missing; write the name of a Secret");
        }
        certificates.push(Reference {
            group: reference.group,
            kind: reference.kind.unwrap_or_else(|| "Secret".to_owned()),
            namespace: reference.namespace,
            name: reference.name,
            ..Reference::default()
        });
    }
    if passthrough && !certificates.is_empty() {
        unsupported
            .push(format!("{field}.certificateRefs (with mode Passthrough nothing is decrypted here)"));
    }
    ListenerTls { passthrough, certificates, clients }
}

/// `tls.options`, of which Istio's for certificates of clients counts.
fn options(
    given: &BTreeMap<String, String>,
    field: &str,
    unsupported: &mut Vec<String>,
    check: &mut Check<'_>,
) -> ClientMode {
    let mut clients = ClientMode::None;
    for (name, value) in given {
        if name != TERMINATE_MODE {
            unsupported.push(format!("{field}.options[{name}]"));
            continue;
        }
        clients = match value.as_str() {
            "SIMPLE" => ClientMode::None,
            "MUTUAL" => ClientMode::Required,
            "OPTIONAL_MUTUAL" => ClientMode::Optional,
            "ISTIO_MUTUAL" => ClientMode::Mesh,
            other => {
                check.error(
                    format!("{field}.options.{TERMINATE_MODE}"),
                    format!("{other:?} is no mode; write SIMPLE, MUTUAL or OPTIONAL_MUTUAL"),
                );
                continue;
            }
        };
    }
    clients
}

fn allowed(namespaces: RouteNamespacesText, field: &str, check: &mut Check<'_>) -> AllowedNamespaces {
    let place = format!("{field}.allowedRoutes.namespaces.selector");
    match (namespaces.from, namespaces.selector) {
        (FromText::Same, _) => AllowedNamespaces::Same,
        (FromText::All, _) => AllowedNamespaces::All,
        (FromText::Selector, Some(s)) => AllowedNamespaces::Selector(label_selector(s, &place, check)),
        (FromText::Selector, None) => {
            check.error(place, "missing; from: Selector needs one");
            AllowedNamespaces::Same
        }
    }
}

fn gateway_addresses(given: Vec<GatewayAddressText>, field: &str, check: &mut Check<'_>) -> Vec<GatewayHost> {
    let mut addresses = Vec::new();
    for (i, a) in given.into_iter().enumerate() {
        match a.kind.as_deref() {
            Some("Hostname") => {
                check.dns_name(&format!("{field}[{i}].value"), &a.value);
                addresses.push(GatewayHost::Hostname(a.value));
            }
            None | Some("IPAddress") => {
                addresses.extend(check.ip(&format!("{field}[{i}].value"), &a.value).map(GatewayHost::Ip));
            }
            Some(other) => {
                check.error(
                    format!("{field}[{i}].type"),
                    format!("{other:?} is not supported; write IPAddress or Hostname"),
                );
            }
        }
    }
    addresses
}

fn label_selector(selector: metav1::LabelSelector, field: &str, check: &mut Check<'_>) -> LabelSelector {
    let mut expressions = Vec::new();
    for (i, e) in selector.match_expressions.into_iter().flatten().enumerate() {
        let operator = match e.operator.as_str() {
            "In" => SelectorOperator::In,
            "NotIn" => SelectorOperator::NotIn,
            "Exists" => SelectorOperator::Exists,
            "DoesNotExist" => SelectorOperator::DoesNotExist,
            other => {
                check.error(
                    format!("{field}.matchExpressions[{i}].operator"),
                    format!("{other:?} is unknown; write In, NotIn, Exists or DoesNotExist"),
                );
                continue;
            }
        };
        expressions.push((e.key, operator, e.values.unwrap_or_default()));
    }
    LabelSelector { labels: selector.match_labels.unwrap_or_default(), expressions }
}
