//! The part of JSON Schema that the chart's `values.schema.json` uses.

use regex::Regex;
use serde_json::{Map, Value};

/// What is wrong with values: path, problem, and what would be right. Empty when nothing is.
#[must_use]
pub fn problems(schema: &Value, values: &Value) -> Vec<String> {
    let mut found = Vec::new();
    check(schema, values, "", &mut found);
    found
}

fn check(schema: &Value, value: &Value, path: &str, found: &mut Vec<String>) {
    let Some(schema) = schema.as_object() else { return };
    let place = if path.is_empty() { "the values" } else { path };
    if let Some(kind) = schema.get("type").and_then(Value::as_str)
        && !is_of(kind, value)
    {
        found.push(format!("{place}: is {value}, must be {}", article(kind)));
        return;
    }
    if let Some(allowed) = schema.get("enum").and_then(Value::as_array)
        && !allowed.contains(value)
    {
        let allowed: Vec<_> = allowed.iter().map(ToString::to_string).collect();
        found.push(format!("{place}: is {value}, must be one of {}", allowed.join(", ")));
    }
    match value {
        Value::String(text) => check_text(schema, text, place, found),
        Value::Number(number) => {
            let bound = |name| schema.get(name).and_then(Value::as_f64);
            let number = number.as_f64().unwrap_or_default();
            if let Some(least) = bound("minimum").filter(|least| number < *least) {
                found.push(format!("{place}: is {number}, must be {least} at least"));
            }
            if let Some(most) = bound("maximum").filter(|most| number > *most) {
                found.push(format!("{place}: is {number}, must be {most} at most"));
            }
        }
        Value::Array(items) => {
            if let Some(schema) = schema.get("items") {
                for (index, item) in items.iter().enumerate() {
                    check(schema, item, &format!("{path}[{index}]"), found);
                }
            }
        }
        Value::Object(map) => check_map(schema, map, path, found),
        Value::Null | Value::Bool(_) => {}
    }
}

fn check_text(schema: &Map<String, Value>, text: &str, place: &str, found: &mut Vec<String>) {
    if schema.contains_key("minLength") && text.is_empty() {
        found.push(format!("{place}: is empty, must not be"));
    }
    if let Some(pattern) = schema.get("pattern").and_then(Value::as_str)
        && !Regex::new(pattern).is_ok_and(|pattern| pattern.is_match(text))
    {
        found.push(format!("{place}: is {text:?}, must be of the form {pattern}"));
    }
}

fn check_map(schema: &Map<String, Value>, map: &Map<String, Value>, path: &str, found: &mut Vec<String>) {
    let known = schema.get("properties").and_then(Value::as_object);
    for (key, value) in map {
        let inner = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        match (known.and_then(|known| known.get(key)), schema.get("additionalProperties")) {
            (Some(schema), _) => check(schema, value, &inner, found),
            (None, Some(Value::Bool(false))) => {
                let names: Vec<_> = known.into_iter().flat_map(Map::keys).map(String::as_str).collect();
                found.push(format!("{inner}: is not known; known are {}", names.join(", ")));
            }
            (None, Some(schema)) => check(schema, value, &inner, found),
            (None, None) => {}
        }
    }
}

fn is_of(kind: &str, value: &Value) -> bool {
    match kind {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        _ => true,
    }
}

fn article(kind: &str) -> &'static str {
    match kind {
        "object" => "a map",
        "array" => "a list",
        "string" => "a text",
        "boolean" => "true or false",
        "integer" => "a whole number",
        _ => "a number",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_value_that_cannot_be_is_named_with_what_could() {
        let schema = json!({
            "type": "object", "additionalProperties": false,
            "properties": {
                "a": {"type": "string", "pattern": "^/"},
                "n": {"type": "integer", "minimum": 5, "maximum": 9},
                "k": {"enum": ["x", "y"]},
                "l": {"type": "array", "items": {"type": "string", "minLength": 1}},
                "m": {"type": "object", "additionalProperties": {"type": "string"}}
            }
        });
        let fine = json!({"a": "/x", "n": 5, "k": "x", "l": ["p"], "m": {"q": "r"}});
        assert!(problems(&schema, &fine).is_empty());
        let wrong = json!({"a": "x", "n": 4, "k": "z", "l": ["", 7], "m": {"q": 1}, "b": 1});
        let expected = [
            "a: is \"x\", must be of the form ^/",
            "b: is not known; known are a, k, l, m, n",
            "k: is \"z\", must be one of \"x\", \"y\"",
            "l[0]: is empty, must not be",
            "l[1]: is 7, must be a text",
            "m.q: is 1, must be a text",
            "n: is 4, must be 5 at least",
        ];
        assert_eq!(problems(&schema, &wrong), expected);
        assert_eq!(problems(&schema, &json!([])), ["the values: is [], must be a map"]);
    }
}
