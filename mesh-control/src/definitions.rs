//! CustomResourceDefinitions of Istio's kinds, for clusters that have none: `mesh-control definitions`.
//!
//! They say what an API server can check by itself: values of enumerations, what a field needs and what excludes what, in
//! CEL. The rest passes and is judged by [`crate::model::read`], in the webhook and in status, so that a field that is
//! newer than this program is no reason to refuse an object. Clusters that have Istio's own definitions keep them.

mod schemas;
#[cfg(test)]
mod tests;

use serde_json::{Value, json};

use crate::model::Kind;
use crate::model::read::{KindInfo, kinds};
use schemas::Schema;

/// What a definition has besides group, versions and kind.
struct Shape {
    plural: &'static str,
    short: &'static [&'static str],
    /// Of `kubectl get`: title, path.
    columns: &'static [(&'static str, &'static str)],
    spec: fn() -> Schema,
}

fn shape(kind: Kind) -> Option<Shape> {
    let of = |plural, short, columns, spec| Some(Shape { plural, short, columns, spec });
    match kind {
        Kind::PeerAuthentication => {
            of("peerauthentications", &["pa"], &[("Mode", ".spec.mtls.mode")], schemas::peer_authentication)
        }
        Kind::AuthorizationPolicy => {
            of("authorizationpolicies", &["ap"], &[("Action", ".spec.action")], schemas::authorization_policy)
        }
        Kind::RequestAuthentication => {
            of("requestauthentications", &["ra"], &[], schemas::request_authentication)
        }
        Kind::Telemetry => of("telemetries", &["telemetry"], &[], schemas::telemetry),
        Kind::ServiceEntry => of(
            "serviceentries",
            &["se"],
            const {
                &[
                    ("Hosts", ".spec.hosts"),
                    ("Location", ".spec.location"),
                    ("Resolution", ".spec.resolution"),
                ]
            },
            schemas::service_entry,
        ),
        Kind::WorkloadEntry => {
            of("workloadentries", &["we"], &[("Address", ".spec.address")], schemas::workload_entry)
        }
        Kind::VirtualService => of(
            "virtualservices",
            &["vs"],
            const { &[("Gateways", ".spec.gateways"), ("Hosts", ".spec.hosts")] },
            schemas::virtual_service,
        ),
        Kind::IstioGateway => of("gateways", &["gw"], &[], schemas::istio_gateway),
        Kind::DestinationRule => {
            of("destinationrules", &["dr"], &[("Host", ".spec.host")], schemas::destination_rule)
        }
        _ => None,
    }
}

/// Definitions of all of Istio's kinds that are read here.
#[must_use]
pub fn all() -> Vec<Value> {
    kinds().filter_map(|info| Some(definition(&info, &shape(info.kind)?))).collect()
}

/// All of them as one file.
///
/// # Errors
/// None that is known: they are plain data.
pub fn yaml() -> Result<String, serde_saphyr::ser_error::Error> {
    let mut text = String::from(
        "# Written by `mesh-control definitions`. Istio's kinds, for clusters that have no definitions of them.\n",
    );
    for definition in all() {
        text += "---\n";
        text += &serde_saphyr::to_string(&definition)?;
    }
    Ok(text)
}

fn definition(info: &KindInfo, shape: &Shape) -> Value {
    let kind = info.kind.name();
    let columns: Vec<Value> = shape
        .columns
        .iter()
        .map(|(name, path)| json!({"name": name, "type": "string", "jsonPath": path}))
        .chain([json!({"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"})])
        .collect();
    let versions: Vec<Value> = info
        .versions
        .iter()
        .map(|version| {
            json!({
                "name": version,
                "served": true,
                "storage": *version == info.versions[0],
                "additionalPrinterColumns": columns,
                "subresources": {"status": {}},
                "schema": {"openAPIV3Schema": {
                    "type": "object",
                    "properties": {
                        "spec": (shape.spec)().value(),
                        "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
                    },
                }},
            })
        })
        .collect();
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": format!("{}.{}", shape.plural, info.group),
            "labels": {"app.kubernetes.io/part-of": "undermesh"},
            // An installation that is removed must not take an operator's objects with it.
            "annotations": {"helm.sh/resource-policy": "keep"},
        },
        "spec": {
            "group": info.group,
            "scope": "Namespaced",
            "names": {
                "kind": kind,
                "listKind": format!("{kind}List"),
                "plural": shape.plural,
                "singular": kind.to_lowercase(),
                "shortNames": shape.short,
                "categories": ["istio-io"],
            },
            "versions": versions,
        },
    })
}
