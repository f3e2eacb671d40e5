//! What the control plane's debug port says, as far as `meshctl` shows it.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::ask::{AskError, Role, Server};
use crate::endpoint::Places;

/// The control plane at a glance.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Control {
    pub(super) endpoint: String,
    pub(super) version: String,
    pub(super) ready: bool,
    /// What it says about its readiness, when it is not ready.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) not_ready: String,
    /// Clients of the workload feed.
    pub(super) clients: Vec<Client>,
    /// What objects and files have wrong.
    pub(super) conditions: Vec<Condition>,
    pub(super) errors: Vec<Value>,
    /// When the root certificate of the mesh expires, in seconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) root_expires: Option<u64>,
}

/// An entry of `/debug/syncz`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Client {
    pub(super) proxy: String,
    /// By type URL.
    pub(super) resources: BTreeMap<String, Sync>,
}

/// What a client was sent and acknowledged of one type.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Sync {
    pub(super) sent: String,
    pub(super) acked: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) last_error: String,
}

impl Client {
    pub(super) fn is_synced(&self) -> bool {
        self.resources.values().all(|sync| sync.sent == sync.acked && sync.last_error.is_empty())
    }
}

/// An entry of `/debug/conditions`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Condition {
    pub(super) object: ObjectRef,
    pub(super) r#type: String,
    pub(super) status: Value,
    pub(super) reason: String,
    pub(super) message: String,
}

/// Names an object of the control plane.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct ObjectRef {
    pub(super) kind: String,
    pub(super) namespace: String,
    pub(super) name: String,
}

/// Asks for everything at once; an answer that is missing or of another shape is left out, except that somebody must
/// answer at all.
pub(super) async fn fetch(places: &Places) -> Result<Control, AskError> {
    let server = Server { endpoint: &places.control, role: Role::Control, timeout: places.timeout };
    let version = server.get("/version").await?;
    let (ready, clients, conditions, errors, metrics) = futures_util::join!(
        server.get("/ready"),
        server.json("/debug/syncz"),
        server.json("/debug/conditions"),
        server.json("/debug/errors"),
        server.get("/metrics"),
    );
    let ready = ready?;
    Ok(Control {
        endpoint: places.control.to_string(),
        version: if version.status == StatusCode::OK { read_version(&version.text()) } else { String::new() },
        ready: ready.status == StatusCode::OK,
        not_ready: if ready.status == StatusCode::OK { String::new() } else { ready.text() },
        clients: clients?,
        conditions: conditions?,
        errors: errors?,
        root_expires: metrics
            .ok()
            .and_then(|reply| gauge(&reply.text(), "citadel_server_root_cert_expiry_timestamp")),
    })
}

/// `/version` only, for `version`.
pub(super) async fn fetch_version(places: &Places) -> Result<String, AskError> {
    let server = Server { endpoint: &places.control, role: Role::Control, timeout: places.timeout };
    server.get("/version").await.map(|reply| read_version(&reply.text()))
}

/// Plain text, or JSON with `version`.
fn read_version(text: &str) -> String {
    let json = serde_json::from_str::<Value>(text).ok();
    let version = json.as_ref().and_then(|value| value.get("version")?.as_str());
    version.unwrap_or(text).to_owned()
}

/// A gauge of whole seconds out of Prometheus' text format.
fn gauge(metrics: &str, name: &str) -> Option<u64> {
    let line = metrics
        .lines()
        .find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])))?;
    let value = line.rsplit(' ').next()?;
    let whole = value.split_once('.').map_or(value, |(whole, _)| whole);
    whole.parse().ok()
}

impl Control {
    /// How long the root certificate still holds; none when that is not known or it has expired.
    pub(super) fn root_left(&self, now: SystemTime) -> Option<Duration> {
        let end = UNIX_EPOCH + Duration::from_secs(self.root_expires?);
        end.duration_since(now).ok()
    }

    /// Conditions that say that something is not honoured, one line each.
    pub(super) fn problems(&self) -> Vec<String> {
        let condition = |c: &Condition| {
            let ObjectRef { kind, namespace, name } = &c.object;
            let name = if namespace.is_empty() { name.clone() } else { format!("{namespace}/{name}") };
            format!("{kind} {name}: {}", c.message)
        };
        // A string, or an object with a text in one of the usual fields.
        let error = |value: &Value| {
            let text = value
                .as_str()
                .or_else(|| ["message", "error", "problem"].iter().find_map(|f| value.get(f)?.as_str()));
            text.map_or_else(|| value.to_string(), str::to_owned)
        };
        let false_ones = self
            .conditions
            .iter()
            .filter(|c| matches!(c.status.as_str(), Some("False")) || c.status == Value::Bool(false));
        let lagging = self.clients.iter().filter(|client| !client.is_synced());
        let lag = |client: &Client| {
            let why: Vec<&str> =
                client.resources.values().map(|s| s.last_error.as_str()).filter(|e| !e.is_empty()).collect();
            let why = if why.is_empty() {
                "has not acknowledged what it was sent".to_owned()
            } else {
                why.join("; ")
            };
            format!("client {}: {why}", client.proxy)
        };
        false_ones.map(condition).chain(self.errors.iter().map(error)).chain(lagging.map(lag)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_gauges_are_read_in_the_forms_in_which_they_come() {
        assert_eq!(read_version("0.1.0"), "0.1.0");
        assert_eq!(read_version(r#"{"version": "0.1.0", "commit": "x"}"#), "0.1.0");
        let metrics = "# HELP a_ts x\na_ts_other 1\na_ts{x=\"y\"} 1766000000.0\n";
        assert_eq!(gauge(metrics, "a_ts"), Some(1_766_000_000));
        assert_eq!(gauge("a_ts 7\n", "a_ts"), Some(7));
        assert_eq!(gauge(metrics, "b"), None);
    }
}
