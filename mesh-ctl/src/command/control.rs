//! What the control plane's debug port says, as far as `meshctl` shows it.

use std::collections::BTreeMap;
use std::fmt;
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
    pub(super) nodes: Vec<Node>,
    /// What there is to say about objects.
    pub(super) conditions: Vec<Condition>,
    /// What is wrong in the source.
    pub(super) errors: Vec<SourceError>,
    /// When the first root certificate of the mesh ends, in seconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) root_expires: Option<u64>,
}

/// An entry of `/debug/syncz`: a connected client of the workload feed.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Client {
    pub(super) id: String,
    pub(super) node: String,
    /// By short name of the type.
    pub(super) types: BTreeMap<String, Sync>,
}

/// How far a client is with one type; nonces.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Sync {
    pub(super) sent: String,
    pub(super) acked: String,
    pub(super) resources: usize,
    pub(super) rejects: u64,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) last_reject: String,
}

impl Client {
    pub(super) fn is_synced(&self) -> bool {
        self.types.values().all(|sync| sync.sent == sync.acked)
    }

    fn name(&self) -> &str {
        if self.node.is_empty() { &self.id } else { &self.node }
    }
}

/// An entry of `/debug/nodes`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Node {
    pub(super) name: String,
    pub(super) connected: bool,
    pub(super) pods: Vec<String>,
}

/// An entry of `/debug/conditions`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Condition {
    pub(super) object: ObjectRef,
    pub(super) r#type: String,
    /// True is the good case.
    pub(super) status: bool,
    pub(super) reason: String,
    pub(super) message: String,
}

/// An entry of `/debug/errors`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct SourceError {
    pub(super) file: String,
    /// 0 when the file as a whole is meant.
    pub(super) line: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) object: Option<ObjectRef>,
    pub(super) field: String,
    pub(super) message: String,
    pub(super) consequence: String,
}

/// Names an object of the control plane.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct ObjectRef {
    pub(super) kind: String,
    pub(super) namespace: String,
    pub(super) name: String,
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        mesh_core::why::Object::new(&self.kind, &self.namespace, &self.name).fmt(f)
    }
}

impl fmt::Display for SourceError {
    /// `shop.yaml:12: Pod shop/a: spec.x: what is wrong (what is in force instead)`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = if self.line > 0 { format!(":{}", self.line) } else { String::new() };
        let object = self.object.as_ref().map_or_else(String::new, |object| format!(": {object}"));
        let field = if self.field.is_empty() { String::new() } else { format!(": {}", self.field) };
        let instead =
            if self.consequence.is_empty() { String::new() } else { format!(" ({})", self.consequence) };
        write!(f, "{}{line}{object}{field}: {}{instead}", self.file, self.message)
    }
}

/// Asks for everything at once; an answer that is missing or of another shape is left out, except that somebody must
/// answer at all.
pub(super) async fn fetch(places: &Places) -> Result<Control, AskError> {
    let server = Server {
        endpoint: &places.control,
        role: Role::Control,
        timeout: places.timeout,
        proof: Some(&places.proof),
    };
    let version = server.get("/version").await?;
    let (ready, syncz, nodes, conditions, errors, metrics) = futures_util::join!(
        server.get("/ready"),
        server.json("/debug/syncz"),
        server.json("/debug/nodes"),
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
        clients: syncz?,
        nodes: nodes?,
        conditions: conditions?,
        errors: errors?,
        root_expires: metrics
            .ok()
            .and_then(|reply| gauge(&reply.text(), "citadel_server_root_cert_expiry_timestamp")),
    })
}

/// `/version` only, for `version`.
pub(super) async fn fetch_version(places: &Places) -> Result<String, AskError> {
    let server = Server {
        endpoint: &places.control,
        role: Role::Control,
        timeout: places.timeout,
        proof: Some(&places.proof),
    };
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

    /// What is not in force as it was written, one line each. A client that has not acknowledged the last push is no
    /// problem: that is so for a moment after every change.
    pub(super) fn problems(&self) -> Vec<String> {
        let conditions = self.conditions.iter().filter(|c| !c.status && !c.is_note());
        let conditions = conditions.map(|c| format!("{}: {}", c.object, c.message));
        conditions.chain(self.errors.iter().map(ToString::to_string)).collect()
    }

    /// What somebody should know without anything being broken: fields that were not honoured to the letter, pods
    /// that are left out for good reason, and resources that a node refused.
    pub(super) fn notes(&self) -> Vec<String> {
        let conditions = self.conditions.iter().filter(|c| c.is_note());
        let rejects = self.clients.iter().flat_map(|client| {
            let rejected = client.types.values().filter(|sync| !sync.last_reject.is_empty());
            rejected.map(|sync| format!("node {} refused: {}", client.name(), sync.last_reject))
        });
        conditions.map(|c| format!("{}: {}", c.object, c.message)).chain(rejects).collect()
    }
}

impl Condition {
    /// Neither fine nor broken.
    fn is_note(&self) -> bool {
        let partly = matches!(
            self.reason.as_str(),
            "UnsupportedValue" | "NoWaypoint" | "Conflicted" | "PartiallyInvalid"
        );
        let advisory = matches!(self.r#type.as_str(), "undermesh.io/Enrolled" | "ResolvedWaypoints");
        if self.status { partly } else { advisory }
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
