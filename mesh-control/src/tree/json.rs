//! JSON from an API server as a tree, without what the mesh never reads.
//!
//! The same tree that files are read into, so that objects of both are typed and checked by the same code. There are no
//! lines: a stored object has no file.

use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::yaml::{Entry, Node, Value};

/// Kept by the API server for itself, often half of an object's text; and the schema of a definition.
const SKIPPED: &[&str] = &["managedFields", "openAPIV3Schema"];
/// An annotation with a copy of the whole object.
const COPY: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// A [`Node`] that is read from JSON.
#[derive(Debug, Clone)]
pub(crate) struct Json(pub(crate) Node);

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(JsonVisitor).map(|value| Self(Node { line: 0, value }))
    }
}

struct JsonVisitor;

impl<'de> Visitor<'de> for JsonVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }

    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(Value::Int(v))
    }

    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(Value::Uint(v))
    }

    fn visit_f64<E>(self, v: f64) -> Result<Value, E> {
        Ok(Value::Float(v))
    }

    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(Value::Text(v.to_owned()))
    }

    fn visit_string<E>(self, v: String) -> Result<Value, E> {
        Ok(Value::Text(v))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(Json(item)) = seq.next_element()? {
            items.push(item);
        }
        Ok(Value::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            if key == COPY || SKIPPED.contains(&key.as_str()) {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let Json(value) = map.next_value()?;
            entries.push(Entry { line: 0, key, value });
        }
        Ok(Value::Map(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stored_object_is_a_tree_without_its_copies_and_its_managers() {
        let text = r#"{"kind":"Pod","metadata":{"name":"a","managedFields":[{"x":1}],
            "annotations":{"kubectl.kubernetes.io/last-applied-configuration":"{}","b":"c"}},
            "spec":{"n":[1,-1,1.5,null,true]}}"#;
        let Json(node) = serde_json::from_str(text).unwrap();
        let plain = serde_json::json!({
            "kind": "Pod", "metadata": {"name": "a", "annotations": {"b": "c"}},
            "spec": {"n": [1, -1, 1.5, null, true]},
        });
        assert_eq!(node.to_json(), plain);
    }
}
