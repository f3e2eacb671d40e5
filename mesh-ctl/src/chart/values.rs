//! Values: the chart's own, then files, then `--set`; the later ones win.

use serde_json::{Map, Value};

/// A `--set` that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "--set {given:?}: {problem}; write for example node.drainSeconds=600 or mesh.settings.excludedPorts=[22, 9100]"
)]
pub struct SetError {
    given: String,
    problem: String,
}

/// `over` laid over `base`: maps are joined, anything else is replaced, null removes.
#[must_use]
pub fn merged(base: Value, over: Value) -> Value {
    match (base, over) {
        (Value::Object(mut base), Value::Object(over)) => {
            for (key, value) in over {
                if value.is_null() {
                    base.remove(&key);
                    continue;
                }
                let below = base.remove(&key).unwrap_or(Value::Null);
                base.insert(key, merged(below, value));
            }
            Value::Object(base)
        }
        (_, over) => over,
    }
}

/// One `--set`: a path of names with dots between them, `=`, and a value as in YAML.
///
/// # Errors
/// No `=`, an empty name, or a value that is no YAML.
pub fn set(given: &str) -> Result<Value, SetError> {
    let error = |problem: &str| SetError { given: given.to_owned(), problem: problem.to_owned() };
    let (path, text) = given.split_once('=').ok_or_else(|| error("there is no `=`"))?;
    let names: Vec<&str> = path.split('.').collect();
    if names.iter().any(|name| name.is_empty()) {
        return Err(error("a name in the path is empty"));
    }
    let value: Value = if text.is_empty() {
        Value::String(String::new())
    } else {
        serde_saphyr::from_str(text).map_err(|e| error(&format!("the value is no YAML ({e})")))?
    };
    Ok(names
        .into_iter()
        .rev()
        .fold(value, |value, name| Value::Object(Map::from_iter([(name.to_owned(), value)]))))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn later_values_win_and_maps_are_joined() {
        let base = json!({"a": {"b": 1, "c": [1, 2]}, "d": "x"});
        let over = json!({"a": {"c": [3], "e": true}, "d": null});
        assert_eq!(merged(base, over), json!({"a": {"b": 1, "c": [3], "e": true}}));
    }

    #[test]
    fn a_set_is_a_path_and_a_value() {
        for (given, expected) in [
            ("node.drainSeconds=600", json!({"node": {"drainSeconds": 600}})),
            ("image.tag=", json!({"image": {"tag": ""}})),
            ("a=[x, 2]", json!({"a": ["x", 2]})),
            ("a.b=x=y", json!({"a": {"b": "x=y"}})),
            ("a=true", json!({"a": true})),
        ] {
            assert_eq!(set(given).unwrap(), expected, "{given}");
        }
        for (given, expected) in [("a.b", "no `=`"), ("a..b=1", "is empty"), ("a=[", "no YAML")] {
            let error = set(given).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
