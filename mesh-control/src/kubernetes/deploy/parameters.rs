//! What `spec.infrastructure.parametersRef` changes in the objects that are deployed: a ConfigMap whose keys are the parts,
//! and whose values are written over them. Lists whose entries have names are joined by name, as `kubectl patch` does;
//! others are replaced. What says whose the objects are stays as it is. Pure.

use std::collections::BTreeMap;

use serde_json::Value;

use super::manifest::Manifests;
use crate::model::Gateway;
use crate::tree::yaml::documents;

/// Keys of the ConfigMap.
const DEPLOYMENT: &str = "deployment";
const SERVICE: &str = "service";
const SERVICE_ACCOUNT: &str = "serviceAccount";

/// What is written over each part.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Parameters {
    parts: BTreeMap<String, Value>,
}

/// The ConfigMap that a Gateway names; none where it names none.
///
/// # Errors
/// It names something else.
pub(super) fn named(gateway: &Gateway) -> Result<Option<&str>, String> {
    match &gateway.parameters {
        None => Ok(None),
        Some((group, kind, name)) if group.is_empty() && kind == "ConfigMap" => Ok(Some(name)),
        Some((group, kind, _)) => Err(format!(
            "spec.infrastructure.parametersRef names a {kind} of group {group:?}; write group \"\", kind ConfigMap"
        )),
    }
}

/// Reads a ConfigMap's data.
///
/// # Errors
/// A key or its text that cannot be used.
pub(super) fn read(name: &str, data: &BTreeMap<String, String>) -> Result<Parameters, String> {
    let mut parts = BTreeMap::new();
    for (key, text) in data {
        if ![DEPLOYMENT, SERVICE, SERVICE_ACCOUNT].contains(&key.as_str()) {
            return Err(format!(
                "ConfigMap {name}, key {key}: not supported; write {DEPLOYMENT}, {SERVICE} or {SERVICE_ACCOUNT}"
            ));
        }
        let mut all = documents(text).into_iter();
        let value = match (all.next(), all.next()) {
            (Some(Ok(node)), None) => node.to_json(),
            (Some(Err(error)), _) => {
                return Err(format!("ConfigMap {name}, key {key}, line {}: {}", error.line, error.message));
            }
            _ => return Err(format!("ConfigMap {name}, key {key}: write one YAML object")),
        };
        if !value.is_object() {
            return Err(format!("ConfigMap {name}, key {key}: write a YAML object such as `spec: {{…}}`"));
        }
        parts.insert(key.clone(), value);
    }
    Ok(Parameters { parts })
}

impl Parameters {
    /// The objects with what is written over them.
    pub(super) fn over(&self, mut made: Manifests) -> Manifests {
        for (key, part) in [
            (DEPLOYMENT, &mut made.deployment),
            (SERVICE, &mut made.service),
            (SERVICE_ACCOUNT, &mut made.service_account),
        ] {
            let Some(change) = self.parts.get(key) else { continue };
            let own = part.clone();
            merge(part, change);
            keep(part, &own);
        }
        made
    }
}

/// Puts back what ties an object to its Gateway.
fn keep(part: &mut Value, own: &Value) {
    let paths = [
        "/apiVersion",
        "/kind",
        "/metadata/name",
        "/metadata/namespace",
        "/metadata/ownerReferences",
        "/spec/selector",
    ];
    for path in paths {
        if let (Some(place), Some(value)) = (part.pointer_mut(path), own.pointer(path)) {
            *place = value.clone();
        }
    }
    for path in ["/metadata/labels", "/spec/template/metadata/labels"] {
        if let (Some(place), Some(value)) = (part.pointer_mut(path), own.pointer(path)) {
            merge(place, value);
        }
    }
}

/// Writes `change` over `value`; null takes away.
fn merge(value: &mut Value, change: &Value) {
    match (value, change) {
        (Value::Object(fields), Value::Object(changes)) => {
            for (key, change) in changes {
                if change.is_null() {
                    fields.remove(key);
                } else {
                    merge(fields.entry(key.clone()).or_insert(Value::Null), change);
                }
            }
        }
        (Value::Array(entries), Value::Array(changes))
            if named_entries(entries) && named_entries(changes) =>
        {
            for change in changes {
                match entries.iter_mut().find(|entry| entry["name"] == change["name"]) {
                    Some(entry) => merge(entry, change),
                    None => entries.push(change.clone()),
                }
            }
        }
        (value, change) => value.clone_from(change),
    }
}

fn named_entries(list: &[Value]) -> bool {
    list.iter().all(|entry| entry["name"].is_string())
}

#[cfg(test)]
mod tests {
    use super::super::manifest::manifests;
    use super::*;
    use crate::convert::Mesh;

    const GATEWAY: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: in, namespace: shop, uid: u1}
spec:
  gatewayClassName: istio
  infrastructure: {parametersRef: {group: '', kind: ConfigMap, name: settings}}
  listeners: [{name: http, port: 80, protocol: HTTP}]
";

    fn data(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, text)| ((*key).to_owned(), (*text).to_owned())).collect()
    }

    #[test]
    fn what_is_written_over_the_parts_changes_them_and_not_whose_they_are() {
        let objects = crate::testing::objects(GATEWAY);
        let gateway = objects.gateways.values().next().unwrap();
        assert_eq!(named(gateway), Ok(Some("settings")));
        let made = manifests(gateway, &Mesh::default(), "registry/waypoint:1");
        let parameters = read(
            "settings",
            &data(&[
                (
                    "deployment",
                    "metadata: {name: other, labels: {a: b, gateway.istio.io/managed: x}}\nspec:\n  replicas: 3\n  selector: {matchLabels: {x: y}}\n  template: {spec: {terminationGracePeriodSeconds: null, containers: [{name: gateway, resources: {limits: {cpu: '4'}}}, {name: side, image: s}]}}",
                ),
                ("service", "spec: {type: ClusterIP, externalTrafficPolicy: Local}"),
            ]),
        )
        .unwrap();
        let changed = parameters.over(made.clone());
        let (deployment, own) = (&changed.deployment, &made.deployment);
        assert_eq!(deployment["spec"]["replicas"], 3);
        assert_eq!(deployment["metadata"]["name"], "in-istio");
        assert_eq!(deployment["metadata"]["labels"]["a"], "b");
        assert_eq!(
            deployment["metadata"]["labels"]["gateway.istio.io/managed"],
            "istio.io-gateway-controller"
        );
        assert_eq!(deployment["spec"]["selector"], own["spec"]["selector"]);
        let pod = &deployment["spec"]["template"]["spec"];
        assert!(pod.get("terminationGracePeriodSeconds").is_none());
        let containers = pod["containers"].as_array().unwrap();
        assert_eq!(containers.len(), 2);
        assert_eq!(containers[0]["image"], "registry/waypoint:1");
        assert_eq!(containers[0]["resources"]["limits"]["cpu"], "4");
        assert_eq!(containers[0]["resources"]["limits"]["memory"], "1Gi");
        assert_eq!(changed.service["spec"]["type"], "ClusterIP");
        assert_eq!(changed.service_account, made.service_account);
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let wrong = |key: &str, text: &str| read("s", &data(&[(key, text)])).unwrap_err();
        assert!(wrong("podDisruptionBudget", "{}").contains("key podDisruptionBudget: not supported"));
        assert!(wrong("service", "a: [").contains("ConfigMap s, key service, line 1"));
        assert!(wrong("service", "text").contains("write a YAML object"));
        let other = GATEWAY.replace("group: ''", "group: x.io").replace("kind: ConfigMap", "kind: Settings");
        let objects = crate::testing::objects(&other);
        let gateway = objects.gateways.values().next().unwrap();
        assert!(named(gateway).unwrap_err().contains("kind ConfigMap"));
    }
}
