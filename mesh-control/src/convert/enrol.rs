//! Which pods should be in the mesh, and what is announced about them meanwhile.

use mesh_core::xds::proto::workload::{Extension, TunnelProtocol};
use mesh_core::xds::{ENROL_EXTENSION, SETTINGS_EXTENSION};
use prost::Message;
use prost_types::value::Kind as Json;
use prost_types::{Any, ListValue, Struct, Value};

use super::Context;
use crate::model::mesh::{SameNode, Undermesh};
use crate::model::{Condition, Kind, ObjectRef, Objects, Pod};

/// Says that a pod is captured, in the words of Istio's node agent.
pub(crate) const REDIRECTION: &str = "ambient.istio.io/redirection";
/// Beside [`REDIRECTION`]: it was written from here, from the report of an agent of ours, and tells us nothing.
pub(crate) const MARK: &str = "undermesh.io/redirection";
const MODE: &str = "istio.io/dataplane-mode";
const SAME_NODE: &str = "undermesh.io/same-node";
const DNS_CAPTURE: &str = "ambient.istio.io/dns-capture";
/// Annotations of Istio's node agent that have no effect here.
const UNSUPPORTED: &[&str] =
    &["ambient.istio.io/bypass-inbound-capture", "istio.io/reroute-virtual-interfaces"];
/// Namespaces whose pods are never enrolled.
const EXCLUDED: &[&str] = &["kube-system"];

/// What a pod is announced as.
pub(super) struct Enrolment {
    pub(super) tunnel: TunnelProtocol,
    pub(super) native: bool,
    pub(super) extensions: Vec<Extension>,
}

/// Decides by labels whether a pod should be enrolled, and by its node's report whether it is.
pub(super) fn enrolment(context: &mut Context<'_>, pod: &Pod, captured: bool) -> Enrolment {
    let wanted = wanted(context, pod);
    let annotated = pod.meta.annotation(REDIRECTION) == Some("enabled")
        && pod.meta.annotation(MARK).is_none()
        && !pod.host_network;
    let native = pod.meta.label("networking.istio.io/tunnel") == Some("http");
    let tunnel = if annotated || native || (wanted && captured) {
        TunnelProtocol::Hbone
    } else {
        TunnelProtocol::None
    };
    let mut extensions = Vec::new();
    if wanted {
        extensions.push(Extension { name: ENROL_EXTENSION.to_owned(), config: None });
        extensions.extend(settings(context, pod));
        let set = UNSUPPORTED.iter().filter(|a| pod.meta.annotation(a).is_some());
        let set: Vec<String> = set.map(|a| format!("annotation {a}")).collect();
        context.unsupported(&ObjectRef::of(Kind::Pod, &pod.meta), &set);
    }
    Enrolment { tunnel, native, extensions }
}

/// Whether a pod should be enrolled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision {
    Enrol,
    /// Nobody asks for it.
    NotAsked,
    /// It is asked for and cannot be: reason and message of the condition.
    Refused(&'static str, &'static str),
}

/// Whether pods of a namespace join the mesh unless they say otherwise.
pub(crate) fn namespace_joins(objects: &Objects, namespace: &str) -> bool {
    objects.namespace_label(namespace, MODE) == Some("ambient") && !EXCLUDED.contains(&namespace)
}

/// Decides by labels alone; nothing that only a pod with an address has is asked.
pub(crate) fn decide(objects: &Objects, pod: &Pod) -> Decision {
    let namespace = objects.namespace_label(&pod.meta.namespace, MODE) == Some("ambient");
    let asked = match pod.meta.label(MODE) {
        Some("none") => false,
        Some("ambient") => true,
        _ => namespace,
    };
    if !asked {
        Decision::NotAsked
    } else if EXCLUDED.contains(&pod.meta.namespace.as_str()) {
        Decision::Refused("ExcludedNamespace", "pods of this namespace are never enrolled")
    } else if pod.host_network {
        Decision::Refused(
            "HostNetwork",
            "a pod on the host's network is never enrolled: its connections cannot be told from the node's",
        )
    } else if pod.meta.annotation("sidecar.istio.io/status").is_some() {
        Decision::Refused("Sidecar", "the pod has an injected sidecar, which does the mesh's work itself")
    } else {
        Decision::Enrol
    }
}

fn wanted(context: &mut Context<'_>, pod: &Pod) -> bool {
    let decision = decide(context.objects, pod);
    if let Decision::Refused(reason, message) = decision {
        let object = ObjectRef::of(Kind::Pod, &pod.meta);
        context.conditions.push(Condition::new(object, "undermesh.io/Enrolled", false, reason, message));
    }
    decision == Decision::Enrol
}

/// The settings that hold for one pod, when they are not the defaults.
fn settings(context: &mut Context<'_>, pod: &Pod) -> Option<Extension> {
    let mut settings = context.mesh.undermesh.clone();
    let namespace = context.objects.namespaces.get(&pod.meta.namespace);
    let places = [
        namespace
            .and_then(|n| Some((n.meta.annotation(SAME_NODE)?, ObjectRef::of(Kind::Namespace, &n.meta)))),
        pod.meta.annotation(SAME_NODE).map(|v| (v, ObjectRef::of(Kind::Pod, &pod.meta))),
    ];
    for (value, object) in places.into_iter().flatten() {
        settings.same_node = SameNode::parse(value).or_else(|| {
            context.conditions.push(Condition::new(
                object,
                "Accepted",
                false,
                "InvalidValue",
                format!("annotation {SAME_NODE} is {value:?}; write fast or tunnel (taken as tunnel)"),
            ));
            Some(SameNode::Tunnel)
        });
    }
    match pod.meta.annotation(DNS_CAPTURE) {
        None => {}
        Some("true") => settings.dns_capture = Some(true),
        Some("false") => settings.dns_capture = Some(false),
        Some(other) => context.conditions.push(Condition::new(
            ObjectRef::of(Kind::Pod, &pod.meta),
            "Accepted",
            false,
            "InvalidValue",
            format!("annotation {DNS_CAPTURE} is {other:?}; write \"true\" or \"false\" (the mesh's setting holds)"),
        )),
    }
    if settings == Undermesh::default() {
        return None;
    }
    let config = Any {
        type_url: "type.googleapis.com/google.protobuf.Struct".into(),
        value: to_struct(&settings).encode_to_vec(),
    };
    Some(Extension { name: SETTINGS_EXTENSION.to_owned(), config: Some(config) })
}

/// The settings by the names of the ConfigMap.
fn to_struct(settings: &Undermesh) -> Struct {
    let value = |kind| Value { kind: Some(kind) };
    let list = |values: Vec<Json>| {
        value(Json::ListValue(ListValue { values: values.into_iter().map(value).collect() }))
    };
    let mut fields = std::collections::BTreeMap::new();
    if let Some(same_node) = settings.same_node {
        fields.insert("sameNode".to_owned(), value(Json::StringValue(same_node.as_str().to_owned())));
    }
    if settings.fail_open {
        fields.insert("failOpen".to_owned(), value(Json::BoolValue(true)));
    }
    if let Some(capture) = settings.capture_outside {
        fields.insert("captureOutside".to_owned(), value(Json::BoolValue(capture)));
    }
    if let Some(capture) = settings.dns_capture {
        fields.insert("dnsCapture".to_owned(), value(Json::BoolValue(capture)));
    }
    if !settings.excluded_cidrs.is_empty() {
        let cidrs = settings.excluded_cidrs.iter().map(|c| Json::StringValue(c.to_string())).collect();
        fields.insert("excludedCIDRs".to_owned(), list(cidrs));
    }
    if !settings.excluded_ports.is_empty() {
        let ports = settings.excluded_ports.iter().map(|p| Json::NumberValue(f64::from(*p))).collect();
        fields.insert("excludedPorts".to_owned(), list(ports));
    }
    Struct { fields }
}
