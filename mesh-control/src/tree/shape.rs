//! Types a YAML tree strictly, as an API server would: unknown fields, wrong types and unknown enum values are
//! errors that know their line and path; nulls are absent fields.

use std::cell::RefCell;
use std::fmt;

use serde::de::value::StrDeserializer;
use serde::de::{
    self, DeserializeOwned, DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, SeqAccess, Visitor,
};

use super::yaml::{Entry, Node, Value};

/// One thing that is wrong with the shape of a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ShapeError {
    pub(crate) line: usize,
    /// Path of the field, for example `spec.ports[0].port`; empty for the document itself.
    pub(crate) field: String,
    pub(crate) message: String,
}

/// Reads `T` from a tree.
///
/// # Errors
/// All unknown fields, and the first value of a wrong type.
pub(crate) fn typed<T: DeserializeOwned>(node: &Node) -> Result<T, Vec<ShapeError>> {
    let unknown = RefCell::new(Vec::new());
    let result = T::deserialize(Shape { node, path: &Path::Root, unknown: &unknown });
    let mut errors = unknown.into_inner();
    match result {
        Ok(value) if errors.is_empty() => Ok(value),
        Ok(_) => Err(errors),
        Err(error) => {
            let (line, field) = error.place.unwrap_or((node.line, String::new()));
            errors.push(ShapeError { line, field, message: error.message });
            Err(errors)
        }
    }
}

/// Reads `T` from a tree and passes over fields that it does not have: an API server that is newer than this program
/// checked them.
///
/// # Errors
/// The first value of a wrong type.
pub(crate) fn typed_known<T: DeserializeOwned>(node: &Node) -> Result<T, Vec<ShapeError>> {
    let unknown = RefCell::new(Vec::new());
    T::deserialize(Shape { node, path: &Path::Root, unknown: &unknown }).map_err(|error| {
        let (line, field) = error.place.unwrap_or((node.line, String::new()));
        vec![ShapeError { line, field, message: error.message }]
    })
}

/// The field being read, as a list that lives on the stack.
enum Path<'p> {
    Root,
    Key(&'p Self, &'p str),
    Index(&'p Self, usize),
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root => Ok(()),
            Self::Key(Self::Root, key) => f.write_str(key),
            Self::Key(parent, key) => write!(f, "{parent}.{key}"),
            Self::Index(parent, index) => write!(f, "{parent}[{index}]"),
        }
    }
}

#[derive(Debug)]
struct TypeError {
    place: Option<(usize, String)>,
    message: String,
}

impl TypeError {
    fn at(mut self, line: usize, path: &Path<'_>) -> Self {
        self.place.get_or_insert_with(|| (line, path.to_string()));
        self
    }
}

impl fmt::Display for TypeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for TypeError {}

impl de::Error for TypeError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self { place: None, message: message.to_string() }
    }
}

#[derive(Clone, Copy)]
struct Shape<'a> {
    node: &'a Node,
    path: &'a Path<'a>,
    unknown: &'a RefCell<Vec<ShapeError>>,
}

impl Shape<'_> {
    fn describe(&self) -> String {
        match &self.node.value {
            Value::Null => "nothing".into(),
            Value::Bool(v) => format!("the boolean {v}"),
            Value::Int(v) => format!("the number {v}"),
            Value::Uint(v) => format!("the number {v}"),
            Value::Float(v) => format!("the number {v}"),
            Value::Text(v) => format!("the string {v:?}"),
            Value::List(_) => "a list".into(),
            Value::Map(_) => "a mapping".into(),
        }
    }

    fn mismatch(&self, wanted: &str) -> TypeError {
        let fix = match (&self.node.value, wanted) {
            (Value::Bool(v), "a string") => format!(" (write it in quotes: \"{v}\")"),
            (Value::Int(v), "a string") => format!(" (write it in quotes: \"{v}\")"),
            (Value::Uint(v), "a string") => format!(" (write it in quotes: \"{v}\")"),
            (Value::Float(v), "a string") => format!(" (write it in quotes: \"{v}\")"),
            (Value::Text(v), "a boolean") if v == "true" || v == "false" => {
                format!(" (write it without quotes: {v})")
            }
            (Value::Text(v), "a number") if v.parse::<i64>().is_ok() => {
                format!(" (write it without quotes: {v})")
            }
            _ => String::new(),
        };
        de::Error::custom(format!("expected {wanted}, found {}{fix}", self.describe()))
    }
}

macro_rules! number {
    ($($method:ident)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TypeError> {
            match self.node.value {
                Value::Int(v) => visitor.visit_i64(v),
                Value::Uint(v) => visitor.visit_u64(v),
                _ => Err(self.mismatch("a number")),
            }
        }
    )*};
}

impl<'de> Deserializer<'de> for Shape<'_> {
    type Error = TypeError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TypeError> {
        match &self.node.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(v) => visitor.visit_bool(*v),
            Value::Int(v) => visitor.visit_i64(*v),
            Value::Uint(v) => visitor.visit_u64(*v),
            Value::Float(v) => visitor.visit_f64(*v),
            Value::Text(v) => visitor.visit_str(v),
            Value::List(_) => self.deserialize_seq(visitor),
            Value::Map(_) => self.deserialize_map(visitor),
        }
    }

    number! { deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64
    deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64 }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TypeError> {
        match self.node.value {
            Value::Bool(v) => visitor.visit_bool(v),
            _ => Err(self.mismatch("a boolean")),
        }
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TypeError> {
        match &self.node.value {
            Value::Text(v) => visitor.visit_str(v),
            _ => Err(self.mismatch("a string")),
        }
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TypeError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TypeError> {
        match self.node.value {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, TypeError> {
        // A quantity may be written as a number (`cpu: 2`); the API keeps it as text.
        if name == "Quantity" {
            let text = match self.node.value {
                Value::Int(v) => v.to_string(),
                Value::Uint(v) => v.to_string(),
                Value::Float(v) => v.to_string(),
                _ => return visitor.visit_newtype_struct(self),
            };
            let text: StrDeserializer<'_, TypeError> = text.as_str().into_deserializer();
            return visitor.visit_newtype_struct(text);
        }
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TypeError> {
        let Value::List(items) = &self.node.value else { return Err(self.mismatch("a list")) };
        visitor.visit_seq(ListWalk { shape: self, items: items.iter().enumerate() })
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TypeError> {
        let Value::Map(entries) = &self.node.value else { return Err(self.mismatch("a mapping")) };
        visitor.visit_map(MapWalk { shape: self, entries: entries.iter(), known: None, current: None })
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, TypeError> {
        let Value::Map(entries) = &self.node.value else { return Err(self.mismatch("a mapping")) };
        visitor.visit_map(MapWalk {
            shape: self,
            entries: entries.iter(),
            known: Some(fields),
            current: None,
        })
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, TypeError> {
        match &self.node.value {
            Value::Text(v) => {
                let variant: StrDeserializer<'_, TypeError> = v.as_str().into_deserializer();
                visitor.visit_enum(variant)
            }
            _ => Err(self.mismatch("a string")),
        }
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TypeError> {
        visitor.visit_unit()
    }

    serde::forward_to_deserialize_any! {
        i128 u128 f32 f64 char bytes byte_buf unit unit_struct tuple tuple_struct identifier
    }
}

struct ListWalk<'a> {
    shape: Shape<'a>,
    items: std::iter::Enumerate<std::slice::Iter<'a, Node>>,
}

impl<'de> SeqAccess<'de> for ListWalk<'_> {
    type Error = TypeError;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, TypeError> {
        let Some((index, node)) = self.items.next() else { return Ok(None) };
        let path = Path::Index(self.shape.path, index);
        let shape = Shape { node, path: &path, unknown: self.shape.unknown };
        seed.deserialize(shape).map(Some).map_err(|e| e.at(node.line, &path))
    }
}

struct MapWalk<'a> {
    shape: Shape<'a>,
    entries: std::slice::Iter<'a, Entry>,
    known: Option<&'static [&'static str]>,
    current: Option<&'a Entry>,
}

impl<'de> MapAccess<'de> for MapWalk<'_> {
    type Error = TypeError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, TypeError> {
        for entry in self.entries.by_ref() {
            if let Some(known) = self.known
                && !known.contains(&entry.key.as_str())
            {
                let hint = match nearest(&entry.key, known) {
                    Some(near) => format!("; did you mean `{near}`?"),
                    None if known.len() <= 12 => format!("; known fields: {}", known.join(", ")),
                    None => "; remove it".to_owned(),
                };
                self.shape.unknown.borrow_mut().push(ShapeError {
                    line: entry.line,
                    field: Path::Key(self.shape.path, &entry.key).to_string(),
                    message: format!("unknown field{hint}"),
                });
                continue;
            }
            if matches!(entry.value.value, Value::Null) {
                continue;
            }
            self.current = Some(entry);
            let key: StrDeserializer<'_, TypeError> = entry.key.as_str().into_deserializer();
            return seed
                .deserialize(key)
                .map(Some)
                .map_err(|e: TypeError| e.at(entry.line, &Path::Key(self.shape.path, &entry.key)));
        }
        Ok(None)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, TypeError> {
        let Some(entry) = self.current.take() else {
            return Err(de::Error::custom("a value was asked for before its key"));
        };
        let path = Path::Key(self.shape.path, &entry.key);
        let shape = Shape { node: &entry.value, path: &path, unknown: self.shape.unknown };
        seed.deserialize(shape).map_err(|e| e.at(entry.line, &path))
    }
}

/// The candidate that a misspelt word most likely means.
pub(crate) fn nearest<'c>(word: &str, candidates: &[&'c str]) -> Option<&'c str> {
    let lower = word.to_lowercase();
    candidates
        .iter()
        .map(|c| (distance(&lower, &c.to_lowercase()), *c))
        .filter(|(d, c)| *d <= (c.len() / 3).clamp(1, 3))
        .min()
        .map(|(_, c)| c)
}

/// Edit distance; two neighbours in the wrong order are one edit.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut before = vec![0; b.len() + 1];
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for i in 0..a.len() {
        let mut next = vec![i + 1];
        for j in 0..b.len() {
            let mut best = (row[j] + usize::from(a[i] != b[j])).min(next[j] + 1).min(row[j + 1] + 1);
            if i > 0 && j > 0 && a[i] == b[j - 1] && a[i - 1] == b[j] {
                best = best.min(before[j - 1] + 1);
            }
            next.push(best);
        }
        before = std::mem::replace(&mut row, next);
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::super::yaml::documents;
    use super::*;
    use k8s_openapi::api::core::v1::Service;

    fn errors<T: DeserializeOwned + fmt::Debug>(text: &str) -> Vec<ShapeError> {
        typed::<T>(documents(text)[0].as_ref().unwrap()).unwrap_err()
    }

    #[test]
    fn an_unknown_field_names_its_line_path_and_the_likely_spelling() {
        let text = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec:\n  ports:\n  - port: 80\n    targetport: 8080\n";
        assert_eq!(
            errors::<Service>(text),
            vec![ShapeError {
                line: 7,
                field: "spec.ports[0].targetport".into(),
                message: "unknown field; did you mean `targetPort`?".into()
            }]
        );
    }

    #[test]
    fn a_wrong_type_names_its_line_path_and_the_fix() {
        let text = "apiVersion: v1\nkind: Service\nmetadata:\n  name: a\n  labels:\n    version: 1\n";
        let found = errors::<Service>(text);
        assert_eq!(found[0].line, 6);
        assert_eq!(found[0].field, "metadata.labels.version");
        assert_eq!(found[0].message, "expected a string, found the number 1 (write it in quotes: \"1\")");
    }

    #[test]
    fn what_a_newer_api_server_adds_is_passed_over_and_a_wrong_type_is_not() {
        let text = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {ports: [{port: 80, shiny: 1}], new: {}}\n";
        let node = documents(text).pop().unwrap().unwrap();
        let service: Service = typed_known(&node).unwrap();
        assert_eq!(service.spec.unwrap().ports.unwrap()[0].port, 80);
        let wrong = documents(&text.replace("80", "x")).pop().unwrap().unwrap();
        assert_eq!(typed_known::<Service>(&wrong).unwrap_err()[0].field, "spec.ports[0].port");
    }

    #[test]
    fn nulls_are_absent_fields_and_quantities_may_be_numbers() {
        let text = "apiVersion: v1\nkind: Node\nmetadata: {name: a, labels: null}\nstatus:\n  capacity:\n    cpu: 2\n";
        let node = documents(text).pop().unwrap().unwrap();
        let node: k8s_openapi::api::core::v1::Node = typed(&node).unwrap();
        assert_eq!(node.status.unwrap().capacity.unwrap()["cpu"].0, "2");
        assert!(node.metadata.labels.is_none());
    }
}
