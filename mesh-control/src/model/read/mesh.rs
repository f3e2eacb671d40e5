//! Reader of the ConfigMap `istio`.

use std::sync::Arc;

use k8s_openapi::api::core::v1::ConfigMap;
use mesh_core::telemetry::Layout;
use serde::Deserialize;

use super::super::mesh::{MESH_CONFIG_FIELDS, MeshSettings, SameNode, Undermesh};
use super::super::{Meta, Object};
use super::{Check, Document, FieldError, is_dns_name, is_label, meta, shape, waypoint_settings};
use crate::tree::{Node, Value, documents, nearest, typed};

/// Key `undermesh` as it is written; values are checked one by one so that each error names its field.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct UndermeshText {
    same_node: Option<SameNode>,
    fail_open: bool,
    scope_gateway_to_namespace: bool,
    #[serde(rename = "excludedCIDRs")]
    excluded_cidrs: Vec<String>,
    excluded_ports: Vec<i64>,
    capture_outside: Option<bool>,
    dns_capture: Option<bool>,
}

pub(super) fn config_map(doc: &Document<'_>) -> Result<Object, Vec<FieldError>> {
    let object: ConfigMap = shape(doc)?;
    let mut check = Check::new(doc);
    let data = object.data.unwrap_or_default();
    let meta: Arc<Meta> = Arc::new(meta(doc, object.metadata, &mut check));
    if doc.key.name != "istio" || doc.key.namespace != doc.root_namespace {
        return check.finish(Object::Ignored(meta));
    }
    let mut settings = MeshSettings::default();
    for (key, text) in &data {
        let field = format!("data.{key}");
        match key.as_str() {
            "mesh" => {
                embedded(text, &field, &mut check, |node, check| mesh_config(node, &mut settings, check))
            }
            "undermesh" => {
                embedded(text, &field, &mut check, |node, check| {
                    undermesh(node, &mut settings.undermesh, check)
                });
            }
            // Istio's installer writes it; single-network meshes leave it empty.
            "meshNetworks" => {}
            _ => check.error(&field, "unknown key; this ConfigMap has `mesh` and `undermesh`"),
        }
    }
    check.finish(Object::MeshSettings(meta, Arc::new(settings)))
}

/// Reads YAML inside a string. Errors carry the path inside it.
fn embedded<F>(text: &str, field: &str, check: &mut Check<'_>, read: F)
where
    F: FnOnce(&Node, &mut Vec<(String, String)>),
{
    let mut errors = Vec::new();
    match documents(text).as_slice() {
        [] => {}
        [Ok(node)] => read(node, &mut errors),
        [Err(e)] => errors.push((String::new(), format!("line {} of the value: {}", e.line, e.message))),
        _ => errors.push((String::new(), "holds several documents; write one".to_owned())),
    }
    for (inner, message) in errors {
        let place = if inner.is_empty() { field.to_owned() } else { format!("{field}.{inner}") };
        check.error(place, message);
    }
}

fn mesh_config(node: &Node, settings: &mut MeshSettings, errors: &mut Vec<(String, String)>) {
    let Value::Map(entries) = &node.value else {
        errors.push((String::new(), "expected a mapping such as `trustDomain: example.org`".into()));
        return;
    };
    for entry in entries {
        let mut text = |check: fn(&str) -> bool, what: &str| match &entry.value.value {
            Value::Text(t) if check(t) => Some(t.clone()),
            _ => {
                errors.push((entry.key.clone(), format!("expected {what}")));
                None
            }
        };
        match entry.key.as_str() {
            "rootNamespace" => settings.root_namespace = text(is_label, "the name of a namespace"),
            "trustDomain" => {
                settings.trust_domain = text(is_dns_name, "a trust domain such as cluster.local");
            }
            "trustDomainAliases" => match typed::<Vec<String>>(&entry.value) {
                Ok(aliases) if aliases.iter().all(|a| is_dns_name(a)) => {
                    settings.trust_domain_aliases = aliases
                }
                _ => errors.push((entry.key.clone(), "expected a list of trust domains".into())),
            },
            name if waypoint_settings::FIELDS.contains(&name) => {
                let MeshSettings { waypoints, unsupported, .. } = &mut *settings;
                waypoint_settings::field(name, &entry.value, waypoints, unsupported, errors);
            }
            known if MESH_CONFIG_FIELDS.contains(&known) => settings.unsupported.push(known.to_owned()),
            unknown => {
                let mut known = vec!["rootNamespace", "trustDomain", "trustDomainAliases"];
                known.extend(waypoint_settings::FIELDS);
                let hint = nearest(unknown, &known)
                    .map_or_else(|| "remove it".to_owned(), |n| format!("did you mean `{n}`?"));
                errors.push((unknown.to_owned(), format!("unknown field of MeshConfig; {hint}")));
            }
        }
    }
    // Its encoding is a field of its own, and may stand after it.
    if let Some(layout) = &settings.waypoints.access_log_layout
        && let Err(error) = Layout::read(layout)
    {
        errors.push(("accessLogFormat".to_owned(), error.to_string()));
    }
}

fn undermesh(node: &Node, settings: &mut Undermesh, errors: &mut Vec<(String, String)>) {
    let text: UndermeshText = match typed(node) {
        Ok(text) => text,
        Err(shape) => {
            errors.extend(shape.into_iter().map(|e| (e.field, e.message)));
            return;
        }
    };
    *settings = Undermesh {
        same_node: text.same_node,
        fail_open: text.fail_open,
        scope_gateway_to_namespace: text.scope_gateway_to_namespace,
        capture_outside: text.capture_outside,
        dns_capture: text.dns_capture,
        ..Undermesh::default()
    };
    for (i, cidr) in text.excluded_cidrs.iter().enumerate() {
        match cidr.parse::<ipnet::IpNet>() {
            Ok(net) => settings.excluded_cidrs.push(net.trunc()),
            Err(_) => errors.push((
                format!("excludedCIDRs[{i}]"),
                format!("{cidr:?} is no CIDR; write one such as 10.0.0.0/8"),
            )),
        }
    }
    for (i, port) in text.excluded_ports.iter().enumerate() {
        match u16::try_from(*port) {
            Ok(port) if port != 0 => settings.excluded_ports.push(port),
            _ => errors.push((format!("excludedPorts[{i}]"), format!("{port} is no port; write 1 to 65535"))),
        }
    }
}
