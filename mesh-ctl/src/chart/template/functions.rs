//! The functions, each as Helm's of that name.

use serde_json::Value;

/// Calls a function.
///
/// # Errors
/// There is none of that name, or it cannot take these arguments.
pub(super) fn call(name: &str, arguments: &[Value]) -> Result<Value, String> {
    match (name, arguments) {
        ("quote", [value]) => Ok(Value::String(Value::String(text(value)).to_string())),
        ("default", [otherwise, value]) => Ok(if truth(value) { value } else { otherwise }.clone()),
        ("toYaml", [value]) => yaml(value).map(Value::String),
        ("nindent", [Value::Number(by), value]) => Ok(format!("\n{}", indent(by, &text(value))).into()),
        ("indent", [Value::Number(by), value]) => Ok(indent(by, &text(value)).into()),
        ("printf", [Value::String(format), values @ ..]) => printf(format, values).map(Value::String),
        ("add", values) => {
            let sum =
                values.iter().map(|v| v.as_i64().ok_or("add takes whole numbers")).sum::<Result<i64, _>>();
            Ok(sum?.into())
        }
        ("base", [Value::String(path)]) => Ok(path.rsplit('/').next().unwrap_or_default().into()),
        ("dir", [Value::String(path)]) => Ok(match path.rsplit_once('/') {
            Some(("", _)) => "/",
            Some((parent, _)) => parent,
            None => ".",
        }
        .into()),
        ("eq", [a, b]) => Ok((a == b).into()),
        ("ne", [a, b]) => Ok((a != b).into()),
        ("not", [value]) => Ok((!truth(value)).into()),
        ("and", [values @ .., last]) => Ok(values.iter().find(|v| !truth(v)).unwrap_or(last).clone()),
        ("or", [values @ .., last]) => Ok(values.iter().find(|v| truth(v)).unwrap_or(last).clone()),
        _ => Err(format!("no function `{name}` that takes these {} arguments", arguments.len())),
    }
}

/// What is not empty.
pub(super) fn truth(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(map) => !map.is_empty(),
    }
}

/// A value as output shows it.
pub(super) fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

fn indent(by: &serde_json::Number, text: &str) -> String {
    let pad = " ".repeat(usize::try_from(by.as_u64().unwrap_or(0)).unwrap_or(0));
    text.split('\n').map(|line| format!("{pad}{line}")).collect::<Vec<_>>().join("\n")
}

fn yaml(value: &Value) -> Result<String, String> {
    let text = serde_saphyr::to_string(value).map_err(|error| format!("toYaml: {error}"))?;
    Ok(text.trim_end_matches('\n').to_owned())
}

/// `%s`, `%d`, `%v` and `%%`.
fn printf(format: &str, values: &[Value]) -> Result<String, String> {
    let mut out = String::new();
    let mut values = values.iter();
    let mut chars = format.chars();
    while let Some(char) = chars.next() {
        if char != '%' {
            out.push(char);
            continue;
        }
        match chars.next() {
            Some('%') => out.push('%'),
            Some('s' | 'd' | 'v') => out.push_str(&text(values.next().ok_or("printf: too few values")?)),
            other => return Err(format!("printf: %{} is not known", other.unwrap_or(' '))),
        }
    }
    if values.next().is_some() { Err("printf: too many values".to_owned()) } else { Ok(out) }
}
