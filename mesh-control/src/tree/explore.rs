//! Which fields a type reads: asked of its `Deserialize`, so that no list of them can be out of date.

use std::collections::BTreeSet;
use std::fmt;

use serde::de::value::StrDeserializer;
use serde::de::{
    self, DeserializeOwned, DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, SeqAccess, Visitor,
};

/// Deeper types hold themselves.
const DEEPEST: usize = 16;

/// A step into a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Field(&'static str),
    Item,
    Entry,
}

/// Paths of all fields of a type: `spec.http[].match[].headers.{}.exact`, where `{}` is any key.
pub(crate) fn fields<T: DeserializeOwned>() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut open: Vec<Vec<Step>> = vec![Vec::new()];
    while let Some(path) = open.pop() {
        let mut below = Vec::new();
        // It always fails: what is found on the way is what it is for.
        let _ = T::deserialize(Walk { path: &path, at: 0, below: &mut below });
        for step in below {
            let next: Vec<Step> = path.iter().copied().chain([step]).collect();
            found.insert(text(&next));
            if next.len() < DEEPEST && next.first() != Some(&Step::Field("metadata")) {
                open.push(next);
            }
        }
    }
    found
}

fn text(path: &[Step]) -> String {
    let mut text = String::new();
    for step in path {
        match step {
            Step::Item => text.push_str("[]"),
            Step::Field(_) | Step::Entry => {
                if !text.is_empty() {
                    text.push('.');
                }
                text.push_str(if let Step::Field(name) = step { name } else { "{}" });
            }
        }
    }
    text
}

/// Leads a value along a path, and notes what is at its end.
struct Walk<'a> {
    path: &'a [Step],
    at: usize,
    below: &'a mut Vec<Step>,
}

#[derive(Debug)]
struct Found;

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("found")
    }
}

impl std::error::Error for Found {}

impl de::Error for Found {
    fn custom<T: fmt::Display>(_message: T) -> Self {
        Self
    }
}

impl<'a> Walk<'a> {
    /// The value behind the next step, if there is one.
    fn next(self) -> Result<(Step, Self), &'a mut Vec<Step>> {
        match self.path.get(self.at) {
            Some(step) => Ok((*step, Self { at: self.at + 1, ..self })),
            None => Err(self.below),
        }
    }
}

impl<'de> Deserializer<'de> for Walk<'_> {
    type Error = Found;

    fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, Found> {
        Err(Found)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Found> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Found> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Found> {
        match self.next() {
            Ok((_, item)) => visitor.visit_seq(One(Some(("", item)))),
            Err(below) => {
                below.push(Step::Item);
                Err(Found)
            }
        }
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Found> {
        match self.next() {
            Ok((_, entry)) => visitor.visit_map(One(Some(("1", entry)))),
            Err(below) => {
                below.push(Step::Entry);
                Err(Found)
            }
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Found> {
        match self.next() {
            Ok((Step::Field(name), value)) => visitor.visit_map(One(Some((name, value)))),
            Ok(_) => Err(Found),
            Err(below) => {
                below.extend(fields.iter().map(|field| Step::Field(field)));
                Err(Found)
            }
        }
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct tuple
        tuple_struct enum identifier ignored_any
    }
}

/// A list or a mapping with one value.
struct One<'a>(Option<(&'static str, Walk<'a>)>);

impl<'de> SeqAccess<'de> for One<'_> {
    type Error = Found;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Found> {
        self.0.take().map(|(_, value)| seed.deserialize(value)).transpose()
    }
}

impl<'de> MapAccess<'de> for One<'_> {
    type Error = Found;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Found> {
        let Some((name, _)) = &self.0 else { return Ok(None) };
        let key: StrDeserializer<'_, Found> = (*name).into_deserializer();
        seed.deserialize(key).map(Some)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, Found> {
        let (_, value) = self.0.take().ok_or(Found)?;
        seed.deserialize(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase", default)]
    #[derive(Default)]
    struct Outer {
        first_one: Option<Inner>,
        many: Vec<Inner>,
        named: BTreeMap<String, Inner>,
    }

    #[derive(serde::Deserialize, Default)]
    struct Inner {
        #[allow(dead_code, reason = "only its name matters")]
        #[serde(rename = "type")]
        kind: String,
        #[allow(dead_code, reason = "only its name matters")]
        numbers: Vec<u32>,
    }

    #[test]
    fn every_field_of_a_type_is_found_through_lists_options_and_mappings() {
        let found: Vec<String> = fields::<Outer>().into_iter().collect();
        let expected = [
            "firstOne",
            "firstOne.numbers",
            "firstOne.numbers[]",
            "firstOne.type",
            "many",
            "many[]",
            "many[].numbers",
            "many[].numbers[]",
            "many[].type",
            "named",
            "named.{}",
            "named.{}.numbers",
            "named.{}.numbers[]",
            "named.{}.type",
        ];
        assert_eq!(found, expected);
        let outer = Outer::default();
        assert!(outer.first_one.is_none() && outer.many.is_empty() && outer.named.is_empty());
    }
}
