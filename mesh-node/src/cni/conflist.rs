//! The container runtime's CNI configuration with the plugin at the end of its chain, and without it: pure.

use std::path::Path;

use serde_json::Value;

use super::NAME;

/// Why a configuration cannot be chained to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConflistError {
    /// No JSON.
    #[error("is no JSON: {0}")]
    Json(String),
    /// A single plugin's.
    #[error("has no list `plugins`: only configuration lists (.conflist) can be chained to")]
    NoList,
}

/// The file that a runtime uses: of those that are CNI configuration, the first by name.
#[must_use]
pub fn primary<'a>(names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let is_configuration = |name: &&str| {
        let extension = Path::new(name).extension().and_then(|e| e.to_str());
        !name.starts_with('.') && matches!(extension, Some("conf" | "conflist" | "json"))
    };
    names.into_iter().filter(is_configuration).min()
}

/// The configuration with the plugin's entry, `ours`, at its end; none if it is there already.
///
/// # Errors
/// It is no list of plugins.
pub fn chained(text: &str, ours: &Value) -> Result<Option<String>, ConflistError> {
    let mut config = parse(text)?;
    let plugins = plugins(&mut config)?;
    let last = plugins.last() == Some(ours);
    if last && plugins.iter().filter(|plugin| is_ours(plugin)).count() == 1 {
        return Ok(None);
    }
    plugins.retain(|plugin| !is_ours(plugin));
    plugins.push(ours.clone());
    Ok(Some(print(&config)))
}

/// The configuration without the plugin; none if it is not there.
///
/// # Errors
/// It is no JSON.
pub fn unchained(text: &str) -> Result<Option<String>, ConflistError> {
    let mut config = parse(text)?;
    let Ok(plugins) = plugins(&mut config) else { return Ok(None) };
    let before = plugins.len();
    plugins.retain(|plugin| !is_ours(plugin));
    let changed = plugins.len() != before;
    Ok(changed.then(|| print(&config)))
}

/// Types of the other plugins; none where there is no list.
#[must_use]
pub fn others(text: &str) -> Vec<String> {
    let Ok(mut config) = parse(text) else { return Vec::new() };
    let Ok(plugins) = plugins(&mut config) else { return Vec::new() };
    let others = plugins.iter().filter(|plugin| !is_ours(plugin));
    others.filter_map(|plugin| plugin.get("type")?.as_str().map(str::to_owned)).collect()
}

fn parse(text: &str) -> Result<Value, ConflistError> {
    serde_json::from_str(text).map_err(|error| ConflistError::Json(error.to_string()))
}

fn plugins(config: &mut Value) -> Result<&mut Vec<Value>, ConflistError> {
    config.get_mut("plugins").and_then(Value::as_array_mut).ok_or(ConflistError::NoList)
}

fn is_ours(plugin: &Value) -> bool {
    plugin.get("type").and_then(Value::as_str) == Some(NAME)
}

fn print(config: &Value) -> String {
    // A JSON value always prints.
    let mut text = serde_json::to_string_pretty(config).unwrap_or_default();
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ours(run_dir: &str) -> Value {
        json!({"type": NAME, "runDir": run_dir})
    }

    const BRIDGE: &str = r#"{"cniVersion":"0.4.0","name":"net","plugins":[{"type":"bridge","mtu":1500},
        {"type":"portmap","capabilities":{"portMappings":true}}]}"#;

    fn types(text: &str) -> Vec<String> {
        let config: Value = serde_json::from_str(text).unwrap();
        config["plugins"].as_array().unwrap().iter().map(|p| p["type"].as_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn the_plugin_is_chained_after_the_others_once_and_taken_out_without_a_trace() {
        let ours = ours("/run/undermesh");
        let with = chained(BRIDGE, &ours).unwrap().unwrap();
        assert_eq!(types(&with), ["bridge", "portmap", NAME]);
        assert_eq!(chained(&with, &ours), Ok(None));
        let without = unchained(&with).unwrap().unwrap();
        let same = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        assert_eq!(same(&without), same(BRIDGE));
        assert_eq!(unchained(BRIDGE), Ok(None));
    }

    #[test]
    fn a_plugin_of_another_setting_or_place_is_brought_to_the_end() {
        let old = chained(BRIDGE, &ours("/run/old")).unwrap().unwrap();
        let again = chained(&old, &ours("/run/undermesh")).unwrap().unwrap();
        assert_eq!(types(&again), ["bridge", "portmap", NAME]);
        assert!(again.contains("/run/undermesh") && !again.contains("/run/old"));
        let mut config: Value = serde_json::from_str(&again).unwrap();
        config["plugins"].as_array_mut().unwrap().push(json!({"type": "bandwidth"}));
        let last = chained(&config.to_string(), &ours("/run/undermesh")).unwrap().unwrap();
        assert_eq!(types(&last), ["bridge", "portmap", "bandwidth", NAME]);
    }

    #[test]
    fn what_cannot_be_chained_to_is_named() {
        let ours = ours("/run/undermesh");
        assert!(matches!(chained("{", &ours), Err(ConflistError::Json(_))));
        assert_eq!(chained(r#"{"type":"bridge"}"#, &ours), Err(ConflistError::NoList));
        assert_eq!(unchained(r#"{"type":"bridge"}"#), Ok(None));
    }

    #[test]
    fn the_runtime_uses_the_first_configuration_by_name() {
        let names = ["99-loopback.conf", "10-b.conflist", "README", ".05-x.conflist", "05-a.conflist.bak"];
        assert_eq!(primary(names), Some("10-b.conflist"));
        assert_eq!(primary(["README"]), None);
    }
}
