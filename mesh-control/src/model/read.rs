//! Documents to validated objects: what an API server and Istio's admission webhook would refuse is refused
//! here, with the field, what is wrong and what would be right.

mod authentication;
mod balancing;
mod destination_rule;
mod gateway;
mod gateway_filters;
mod gateway_route;
mod gateway_tcp;
mod istio;
mod istio_gateway;
mod kube;
mod mesh;
mod observing;
mod policy;
mod policy_requests;
mod probes;
mod telemetry;
pub(crate) mod traffic;
mod values;
mod virtual_actions;
mod virtual_service;
mod waypoint_settings;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::de::DeserializeOwned;

use super::{Key, Kind, Meta, Object, ObjectRef};
use crate::tree::{Node, ShapeError, Value, explore, nearest, typed, typed_known};
use authentication::request_authentication;

/// One thing that is wrong with an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FieldError {
    pub(crate) line: usize,
    pub(crate) field: String,
    pub(crate) message: String,
}

impl From<ShapeError> for FieldError {
    fn from(e: ShapeError) -> Self {
        Self { line: e.line, field: e.field, message: e.message }
    }
}

/// A document that was read as far as it could be.
#[derive(Debug)]
pub(crate) struct Read {
    /// Known as soon as kind and name could be read, also when the rest is wrong.
    pub(crate) object: Option<ObjectRef>,
    pub(crate) line: usize,
    pub(crate) result: Result<Object, Vec<FieldError>>,
    /// The document as text, where losing its object over a restart would open the mesh.
    pub(crate) text: Option<Arc<str>>,
}

/// Kinds whose last good version is kept over a restart.
const KEPT: &[Kind] = &[
    Kind::AuthorizationPolicy,
    Kind::RequestAuthentication,
    Kind::PeerAuthentication,
    Kind::ConfigMap,
    Kind::Namespace,
    Kind::Gateway,
];

const GATEWAYS: &str = "gateway.networking.k8s.io";
const NETWORKING: &str = "networking.istio.io";
const NETWORKING_VERSIONS: &[&str] = &["v1", "v1beta1", "v1alpha3"];

/// A kind as an API server knows it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KindInfo {
    pub(crate) group: &'static str,
    /// Versions that can be read, the preferred one first.
    pub(crate) versions: &'static [&'static str],
    pub(crate) kind: Kind,
}

/// Every kind that is read.
pub(crate) fn kinds() -> impl Iterator<Item = KindInfo> {
    KINDS.iter().map(|(group, versions, kind, ..)| KindInfo { group, versions, kind: *kind })
}

/// API group and versions, kind, reader, whether it has a namespace.
type Reader = fn(&Document<'_>) -> Result<Object, Vec<FieldError>>;
const KINDS: &[(&str, &[&str], Kind, Reader, bool)] = &[
    ("", &["v1"], Kind::Namespace, kube::namespace, false),
    ("", &["v1"], Kind::Node, kube::node, false),
    ("", &["v1"], Kind::ServiceAccount, kube::service_account, true),
    ("", &["v1"], Kind::Pod, kube::pod, true),
    ("", &["v1"], Kind::Service, kube::service, true),
    ("", &["v1"], Kind::ConfigMap, mesh::config_map, true),
    ("", &["v1"], Kind::Secret, kube::secret, true),
    ("discovery.k8s.io", &["v1"], Kind::EndpointSlice, kube::endpoint_slice, true),
    ("security.istio.io", &["v1", "v1beta1"], Kind::PeerAuthentication, istio::peer_authentication, true),
    ("security.istio.io", &["v1", "v1beta1"], Kind::AuthorizationPolicy, policy::authorization_policy, true),
    (NETWORKING, NETWORKING_VERSIONS, Kind::ServiceEntry, istio::service_entry, true),
    (NETWORKING, NETWORKING_VERSIONS, Kind::WorkloadEntry, istio::workload_entry, true),
    (GATEWAYS, &["v1", "v1beta1"], Kind::GatewayClass, gateway::gateway_class, false),
    (GATEWAYS, &["v1", "v1beta1"], Kind::Gateway, gateway::gateway, true),
    (NETWORKING, NETWORKING_VERSIONS, Kind::IstioGateway, istio_gateway::istio_gateway, true),
    (GATEWAYS, &["v1", "v1beta1"], Kind::HTTPRoute, gateway_route::http_route, true),
    (GATEWAYS, &["v1", "v1alpha2"], Kind::GRPCRoute, gateway_route::grpc_route, true),
    (GATEWAYS, &["v1", "v1alpha3", "v1alpha2"], Kind::TLSRoute, gateway_tcp::tls_route, true),
    (GATEWAYS, &["v1", "v1alpha2"], Kind::TCPRoute, gateway_tcp::tcp_route, true),
    (GATEWAYS, &["v1", "v1beta1"], Kind::ReferenceGrant, gateway_tcp::reference_grant, true),
    ("security.istio.io", &["v1", "v1beta1"], Kind::RequestAuthentication, request_authentication, true),
    ("telemetry.istio.io", &["v1", "v1alpha1"], Kind::Telemetry, telemetry::telemetry, true),
    (NETWORKING, NETWORKING_VERSIONS, Kind::VirtualService, virtual_service::virtual_service, true),
    (NETWORKING, NETWORKING_VERSIONS, Kind::DestinationRule, destination_rule::destination_rule, true),
];

/// A document on its way to an object.
pub(crate) struct Document<'a> {
    pub(crate) node: &'a Node,
    pub(crate) key: Key,
    /// Namespace in which the mesh settings and mesh-wide policies live.
    pub(crate) root_namespace: &'a str,
    /// Fields that are not known are passed over.
    lenient: bool,
    /// Nothing is read: only the fields that would be are wanted.
    fields: Option<&'a RefCell<BTreeSet<String>>>,
}

/// The fields that are read of a kind, as paths: `spec.http[].match[].uri`, with `{}` for any key of a mapping.
pub(crate) fn fields(kind: Kind) -> BTreeSet<String> {
    let found = RefCell::new(BTreeSet::new());
    let node = Node { line: 0, value: Value::Null };
    if let Some((.., reader, _)) = KINDS.iter().find(|known| known.2 == kind) {
        let key = Key::new("", "");
        // It gives nothing but what it notes.
        let _ =
            reader(&Document { node: &node, key, root_namespace: "", lenient: false, fields: Some(&found) });
    }
    found.into_inner()
}

/// Reads one document as people write it.
pub(crate) fn read(node: &Node, root_namespace: &str) -> Read {
    read_from(node, root_namespace, false)
}

/// Reads one object as an API server stores it. Of Kubernetes' own kinds it may hold fields that this program is too old
/// to know; they change nothing that is read here. An unknown field of a policy or route does, and is an error.
pub(crate) fn read_stored(node: &Node, root_namespace: &str) -> Read {
    read_from(node, root_namespace, true)
}

fn read_from(node: &Node, root_namespace: &str, stored: bool) -> Read {
    let fail = |field: &str, message: String| Read {
        object: None,
        line: node.line,
        result: Err(vec![FieldError { line: node.line_of(field), field: field.to_owned(), message }]),
        text: None,
    };
    let Some(api_version) = node.text("apiVersion") else {
        return fail("apiVersion", "missing; write the API group and version, for example v1".into());
    };
    let Some(kind_name) = node.text("kind") else {
        return fail("kind", "missing; write the kind of the object, for example Pod".into());
    };
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    let named: Vec<_> = KINDS.iter().filter(|k| k.2.name() == kind_name).collect();
    if named.is_empty() {
        return fail("kind", unknown_kind(group, kind_name));
    }
    let is_it = |k: &&&(&str, &[&str], Kind, Reader, bool)| group == k.0 && k.1.contains(&version);
    let Some((wanted_group, _, kind, reader, namespaced)) = named.iter().find(is_it) else {
        let of_group = |(group, versions, ..): &&(&str, &[&str], Kind, Reader, bool)| -> Vec<String> {
            let text = |v: &&str| if group.is_empty() { (*v).to_owned() } else { format!("{group}/{v}") };
            versions.iter().map(text).collect()
        };
        // A version that is not known is of the group that it names.
        let of_this = named.iter().filter(|k| k.0 == group).flat_map(of_group).collect::<Vec<_>>();
        let all = || named.iter().flat_map(of_group).collect();
        let options = if of_this.is_empty() { all() } else { of_this };
        return fail("apiVersion", format!("{kind_name} has apiVersion {}", options.join(" or ")));
    };
    let metadata = node.get("metadata");
    let Some(name) = metadata.and_then(|m| m.text("name")).filter(|n| !n.is_empty()) else {
        return fail("metadata.name", format!("missing; every {kind_name} needs a name"));
    };
    let namespace = match (namespaced, metadata.and_then(|m| m.text("namespace"))) {
        (false, _) => "",
        (true, Some(namespace)) if !namespace.is_empty() => namespace,
        (true, _) => "default",
    };
    let key = Key::new(namespace, name);
    let lenient = stored && matches!(*wanted_group, "" | "discovery.k8s.io");
    let result = reader(&Document { node, key: key.clone(), root_namespace, lenient, fields: None });
    let keep = !stored && KEPT.contains(kind) && !matches!(result, Err(_) | Ok(Object::Ignored(_)));
    let text = keep.then(|| node.to_json().to_string().into());
    Read { object: Some(ObjectRef { kind: *kind, key }), line: node.line, result, text }
}

fn unknown_kind(group: &str, kind: &str) -> String {
    let mut names: Vec<String> = KINDS.iter().map(|k| k.2.name()).collect();
    names.dedup();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    match nearest(kind, &names) {
        Some(near) => format!("unknown kind {kind}; did you mean {near}?"),
        None if group.ends_with("istio.io") || group.ends_with("gateway.networking.k8s.io") => {
            format!("{kind} of {group} is not supported yet and has no effect; remove it from this directory")
        }
        None => format!("unknown kind {kind}; this directory may hold {} and List", names.join(", ")),
    }
}

/// Collects what is wrong with one object.
pub(crate) struct Check<'a> {
    node: &'a Node,
    errors: Vec<FieldError>,
}

impl<'a> Check<'a> {
    pub(crate) fn new(doc: &Document<'a>) -> Self {
        Self::of(doc.node)
    }

    /// Checks a part of a document by itself.
    fn of(node: &'a Node) -> Self {
        Self { node, errors: Vec::new() }
    }

    /// Reports a field.
    pub(crate) fn error(&mut self, field: impl Into<String>, message: impl Into<String>) {
        let field = field.into();
        self.errors.push(FieldError { line: self.node.line_of(&field), field, message: message.into() });
    }

    /// The object, unless something was wrong.
    pub(crate) fn finish<T>(self, object: T) -> Result<T, Vec<FieldError>> {
        if self.errors.is_empty() { Ok(object) } else { Err(self.errors) }
    }

    /// A port number.
    pub(crate) fn port(&mut self, field: &str, value: i64) -> u16 {
        match u16::try_from(value) {
            Ok(port) if port != 0 => port,
            _ => {
                self.error(field, format!("{value} is no port; write a number from 1 to 65535"));
                0
            }
        }
    }

    /// A port number written as text.
    pub(crate) fn port_text(&mut self, field: &str, value: &str) -> u16 {
        match value.parse::<u16>() {
            Ok(port) if port != 0 => port,
            _ => {
                self.error(field, format!("{value:?} is no port; write a number from 1 to 65535, in quotes"));
                0
            }
        }
    }

    /// An IP address.
    pub(crate) fn ip(&mut self, field: &str, value: &str) -> Option<IpAddr> {
        match value.parse() {
            Ok(ip) => Some(ip),
            Err(_) => {
                self.error(
                    field,
                    format!("{value:?} is no IP address; write one such as 10.0.0.1 or fd00::1"),
                );
                None
            }
        }
    }

    /// A CIDR or a single address. Host bits are cleared, as Istio does.
    pub(crate) fn cidr(&mut self, field: &str, value: &str) -> Option<IpNet> {
        let parsed =
            value.parse::<IpNet>().map(|n| n.trunc()).or_else(|_| value.parse::<IpAddr>().map(IpNet::from));
        match parsed {
            Ok(net) => Some(net),
            Err(_) => {
                self.error(
                    field,
                    format!("{value:?} is neither an IP address nor a CIDR such as 10.0.0.0/8"),
                );
                None
            }
        }
    }

    /// A DNS label (RFC 1123).
    pub(crate) fn label(&mut self, field: &str, value: &str) {
        if !is_label(value) {
            self.error(
                field,
                format!("{value:?} is no DNS label; use at most 63 of a-z, 0-9 and -, not at the ends"),
            );
        }
    }

    /// A DNS name (RFC 1123).
    pub(crate) fn dns_name(&mut self, field: &str, value: &str) {
        if !is_dns_name(value) {
            self.error(
                field,
                format!("{value:?} is no DNS name; use labels of a-z, 0-9 and - joined by dots"),
            );
        }
    }
}

pub(crate) fn is_label(value: &str) -> bool {
    let alnum = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let bytes = value.as_bytes();
    (1..=63).contains(&bytes.len())
        && bytes.iter().all(|c| alnum(*c) || *c == b'-')
        && alnum(bytes[0])
        && alnum(bytes[bytes.len() - 1])
}

pub(crate) fn is_dns_name(value: &str) -> bool {
    value.len() <= 253 && value.split('.').all(is_label)
}

/// Types a document; shape errors are all the errors there are then.
pub(crate) fn shape<T: DeserializeOwned>(doc: &Document<'_>) -> Result<T, Vec<FieldError>> {
    if let Some(fields) = doc.fields {
        fields.borrow_mut().extend(explore::fields::<T>());
        return Err(Vec::new());
    }
    let typed = if doc.lenient { typed_known(doc.node) } else { typed(doc.node) };
    typed.map_err(|errors| errors.into_iter().map(FieldError::from).collect())
}

/// Metadata, checked.
pub(crate) fn meta(doc: &Document<'_>, metadata: ObjectMeta, check: &mut Check<'_>) -> Meta {
    if !doc.key.namespace.is_empty() {
        check.label("metadata.namespace", &doc.key.namespace);
    }
    check.dns_name("metadata.name", &doc.key.name);
    Meta {
        namespace: doc.key.namespace.clone(),
        name: doc.key.name.clone(),
        labels: metadata.labels.unwrap_or_default(),
        annotations: metadata.annotations.unwrap_or_default(),
        created: metadata.creation_timestamp.map(|t| t.0.as_second()),
        uid: metadata.uid.unwrap_or_default(),
        generation: metadata.generation.unwrap_or_default(),
        deleting: metadata.deletion_timestamp.is_some(),
    }
}

/// Label selectors of Istio: at least a key, no wildcards.
pub(crate) fn match_labels(labels: &BTreeMap<String, String>, field: &str, check: &mut Check<'_>) {
    for (key, value) in labels {
        if key.is_empty() || key.contains('*') || value.contains('*') {
            check.error(
                format!("{field}.{key}"),
                "a selector takes exact labels; wildcards and empty keys are not supported",
            );
        }
    }
}
