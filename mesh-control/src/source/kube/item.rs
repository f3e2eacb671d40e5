//! One object of a watch: a tree, and the few fields of its metadata that a watch needs.

use std::borrow::Cow;

use kube::Resource;
use kube::api::{ApiResource, ObjectMeta};
use kube::core::DynamicResourceScope;
use serde::{Deserialize, Deserializer};

use crate::model::Key;
use crate::model::read::KindInfo;
use crate::tree::{Entry, Json, Node, Value};

#[derive(Debug, Clone)]
pub(super) struct Item {
    meta: ObjectMeta,
    pub(super) tree: Node,
}

impl Item {
    pub(super) fn key(&self) -> Key {
        Key::new(self.meta.namespace.clone().unwrap_or_default(), self.meta.name.clone().unwrap_or_default())
    }

    /// The tree with apiVersion and kind, which the items of a list lack.
    pub(super) fn named(mut self, api_version: &str, kind: &str) -> Node {
        if let Value::Map(entries) = &mut self.tree.value {
            for (key, text) in [("apiVersion", api_version), ("kind", kind)] {
                entries.retain(|e| e.key != key);
                let value = Node { line: 0, value: Value::Text(text.to_owned()) };
                entries.push(Entry { line: 0, key: key.to_owned(), value });
            }
        }
        self.tree
    }
}

impl<'de> Deserialize<'de> for Item {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Json(tree) = Json::deserialize(deserializer)?;
        let text = |key: &str| tree.get("metadata").and_then(|m| m.text(key)).map(str::to_owned);
        let meta = ObjectMeta {
            name: text("name"),
            namespace: text("namespace"),
            resource_version: text("resourceVersion"),
            ..ObjectMeta::default()
        };
        Ok(Self { meta, tree })
    }
}

impl Resource for Item {
    type DynamicType = ApiResource;
    type Scope = DynamicResourceScope;

    fn kind(resource: &ApiResource) -> Cow<'_, str> {
        Cow::Borrowed(&resource.kind)
    }

    fn group(resource: &ApiResource) -> Cow<'_, str> {
        Cow::Borrowed(&resource.group)
    }

    fn version(resource: &ApiResource) -> Cow<'_, str> {
        Cow::Borrowed(&resource.version)
    }

    fn plural(resource: &ApiResource) -> Cow<'_, str> {
        Cow::Borrowed(&resource.plural)
    }

    fn meta(&self) -> &ObjectMeta {
        &self.meta
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.meta
    }
}

/// How the API server names a kind in paths.
pub(crate) fn resource(group: &str, version: &str, kind: &str) -> ApiResource {
    let api_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    let lower = kind.to_lowercase();
    let plural = match lower.strip_suffix('y') {
        Some(stem) if !lower.ends_with("ay") => format!("{stem}ies"),
        _ if lower.ends_with('s') => format!("{lower}es"),
        _ => format!("{lower}s"),
    };
    ApiResource {
        group: group.to_owned(),
        version: version.to_owned(),
        api_version,
        kind: kind.to_owned(),
        plural,
    }
}

/// The same for a kind that is read.
pub(super) fn resource_of(info: &KindInfo, version: &str) -> ApiResource {
    resource(info.group, version, &info.kind.name())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plurals_are_those_of_the_api() {
        let plural = |kind| resource("g", "v1", kind).plural;
        assert_eq!(plural("AuthorizationPolicy"), "authorizationpolicies");
        assert_eq!(plural("ServiceEntry"), "serviceentries");
        assert_eq!(plural("Gateway"), "gateways");
        assert_eq!(plural("GatewayClass"), "gatewayclasses");
        assert_eq!(plural("PeerAuthentication"), "peerauthentications");
        assert_eq!(plural("EndpointSlice"), "endpointslices");
        assert_eq!(plural("HTTPRoute"), "httproutes");
    }

    #[test]
    fn an_item_of_a_list_gets_its_kind() {
        let item: Item =
            serde_json::from_str(r#"{"metadata":{"namespace":"a","name":"b","resourceVersion":"7"}}"#)
                .unwrap();
        assert_eq!(item.key(), Key::new("a", "b"));
        assert_eq!(item.meta().resource_version.as_deref(), Some("7"));
        let tree = item.named("v1", "Pod");
        assert_eq!((tree.text("apiVersion"), tree.text("kind")), (Some("v1"), Some("Pod")));
    }
}
