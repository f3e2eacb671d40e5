//! YAML as a tree that remembers its lines.
//!
//! Serde alone forgets where a value came from as soon as it is read, and a validation error without a line is
//! half an error. Documents are first read into this tree, then typed from it by [`super::shape`].

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

/// One YAML value and the line it starts on (1-based, counted in the whole file).
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) line: usize,
    pub(crate) value: Value,
}

/// What a [`Node`] holds; scalars follow YAML's core schema (quoted scalars are always strings).
#[derive(Debug, Clone)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    Int(i64),
    Uint(u64),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

/// One key of a mapping; `line` is the key's.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) line: usize,
    pub(crate) key: String,
    pub(crate) value: Node,
}

/// A document that is no YAML.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SyntaxError {
    pub(crate) line: usize,
    pub(crate) message: String,
}

impl Node {
    /// The value under `key`, when this is a mapping that has it and it is not null.
    pub(crate) fn get(&self, key: &str) -> Option<&Self> {
        let Value::Map(entries) = &self.value else { return None };
        entries.iter().find(|e| e.key == key).map(|e| &e.value).filter(|n| !matches!(n.value, Value::Null))
    }

    /// The string under `key`.
    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        match &self.get(key)?.value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The line of a field path such as `spec.ports[0].port`; where the path leads nowhere (a missing field),
    /// the line of its deepest part that exists.
    pub(crate) fn line_of(&self, path: &str) -> usize {
        let (mut node, mut line) = (self, self.line);
        let mut rest = path;
        while !rest.is_empty() {
            if let Some(index) = rest.strip_prefix('[') {
                let Some((number, after)) = index.split_once(']') else { return line };
                let Value::List(items) = &node.value else { return line };
                let Some(item) = number.parse::<usize>().ok().and_then(|n| items.get(n)) else { return line };
                (node, line) = (item, item.line);
                rest = after.strip_prefix('.').unwrap_or(after);
            } else {
                let Value::Map(entries) = &node.value else { return line };
                // Keys may hold dots (labels); the longest key that the path continues with is meant.
                let found = entries
                    .iter()
                    .filter(|e| {
                        rest.strip_prefix(e.key.as_str())
                            .is_some_and(|r| r.is_empty() || r.starts_with('.') || r.starts_with('['))
                    })
                    .max_by_key(|e| e.key.len());
                let Some(entry) = found else { return line };
                (node, line) = (&entry.value, entry.line);
                rest = &rest[entry.key.len()..];
                rest = rest.strip_prefix('.').unwrap_or(rest);
            }
        }
        line
    }

    /// The same without lines, to be written down.
    pub(crate) fn to_json(&self) -> serde_json::Value {
        use serde_json::Value as Json;
        match &self.value {
            Value::Null => Json::Null,
            Value::Bool(v) => (*v).into(),
            Value::Int(v) => (*v).into(),
            Value::Uint(v) => (*v).into(),
            Value::Float(v) => (*v).into(),
            Value::Text(v) => v.as_str().into(),
            Value::List(items) => items.iter().map(Self::to_json).collect(),
            Value::Map(entries) => entries.iter().map(|e| (e.key.clone(), e.value.to_json())).collect(),
        }
    }

    fn shift(&mut self, by: usize) {
        self.line += by;
        match &mut self.value {
            Value::List(items) => items.iter_mut().for_each(|n| n.shift(by)),
            Value::Map(entries) => entries.iter_mut().for_each(|e| {
                e.line += by;
                e.value.shift(by);
            }),
            _ => {}
        }
    }
}

/// Splits a file into its documents and reads each on its own, so that a syntax error in one leaves the others
/// readable. Documents without content are skipped.
///
/// `---` at the start of a line is a document marker even inside a block scalar (YAML 1.2, 9.1.2), so splitting
/// by lines is exact.
pub(crate) fn documents(text: &str) -> Vec<Result<Node, SyntaxError>> {
    let mut out = Vec::new();
    let mut chunk = String::new();
    let mut first_line = 0;
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let trimmed = line.trim_end();
        if trimmed == "---" || trimmed.starts_with("--- ") || trimmed == "..." {
            out.extend(document(&chunk, first_line));
            chunk.clear();
            first_line = number;
            // What follows the marker on its line belongs to the document; keep columns as they are.
            chunk.push_str(&line.replacen("---", "   ", 1).replacen("...", "   ", 1));
        } else {
            chunk.push_str(line);
        }
    }
    out.extend(document(&chunk, first_line));
    out
}

fn document(text: &str, offset: usize) -> Option<Result<Node, SyntaxError>> {
    let has_content = text.lines().map(str::trim).any(|l| !l.is_empty() && !l.starts_with(['#', '%']));
    if !has_content {
        return None;
    }
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_events: 20_000_000,
            max_nodes: 10_000_000,
            max_total_scalar_bytes: 1 << 30,
        },
        with_snippet: false,
        strict_booleans: true,
    };
    Some(match serde_saphyr::from_str_with_options::<Node>(text, options) {
        Ok(mut node) => {
            node.shift(offset);
            Ok(node)
        }
        Err(error) => {
            let line = error.location().map_or(1, |l| usize::try_from(l.line()).unwrap_or(1));
            Err(SyntaxError { line: line + offset, message: without_place(&error.to_string()) })
        }
    })
}

/// The message without its place, which counts from the start of the document and not of the file.
fn without_place(message: &str) -> String {
    let line = message.lines().next().unwrap_or_default();
    line.split_once(" at line ").map_or(line, |(text, _)| text).to_owned()
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Value>::deserialize(deserializer)?;
        Ok(Self { line: usize::try_from(spanned.referenced.line()).unwrap_or(0), value: spanned.value })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        Value::deserialize(deserializer)
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
        while let Some(item) = seq.next_element::<Node>()? {
            items.push(item);
        }
        Ok(Value::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = map.next_key::<Spanned<String>>()? {
            let value = map.next_value::<Node>()?;
            let line = usize::try_from(key.referenced.line()).unwrap_or(value.line);
            entries.push(Entry { line, key: key.value, value });
        }
        Ok(Value::Map(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> Node {
        documents(text).pop().unwrap().unwrap()
    }

    #[test]
    fn lines_are_counted_in_the_whole_file_and_found_by_path() {
        let text = "# head\n---\na: 1\n---\nkind: X\nmetadata:\n  labels:\n    a.b/c: x\nspec:\n  ports:\n  - port: 1\n  - name: n\n    port: 2\n";
        let docs = documents(text);
        assert_eq!(docs.len(), 2);
        let node = docs[1].as_ref().unwrap();
        assert_eq!(node.text("kind"), Some("X"));
        assert_eq!(node.line_of("kind"), 5);
        assert_eq!(node.line_of("metadata.labels.a.b/c"), 8);
        assert_eq!(node.line_of("spec.ports[1].port"), 13);
        assert_eq!(node.line_of("spec.ports[1].missing"), 12);
        assert_eq!(node.line_of("spec.ports[7]"), 10);
    }

    #[test]
    fn a_syntax_error_spoils_its_own_document_only() {
        let docs = documents("a: 1\n---\nb: [1, 2\nc: }\n---\nd: 4\n");
        assert!(docs[0].is_ok() && docs[2].is_ok());
        let error = docs[1].as_ref().unwrap_err();
        assert!((3..=5).contains(&error.line), "{error:?}");
    }

    #[test]
    fn a_key_given_twice_is_an_error_with_its_line() {
        let docs = documents("x: 0\na: 1\na: 2\n");
        assert_eq!(docs[0].as_ref().unwrap_err().line, 3);
    }

    #[test]
    fn quoted_scalars_stay_strings_and_plain_ones_have_their_type() {
        let node = one("a: \"1\"\nb: 1\nc: true\nd: \"true\"\ne:\nf: 1.5\n8080: x\n");
        assert!(matches!(node.get("a").unwrap().value, Value::Text(_)));
        assert!(matches!(node.get("b").unwrap().value, Value::Int(1) | Value::Uint(1)));
        assert!(matches!(node.get("c").unwrap().value, Value::Bool(true)));
        assert!(matches!(node.get("d").unwrap().value, Value::Text(_)));
        assert!(node.get("e").is_none());
        assert!(matches!(node.get("f").unwrap().value, Value::Float(_)));
        assert_eq!(node.text("8080"), Some("x"));
    }
}
