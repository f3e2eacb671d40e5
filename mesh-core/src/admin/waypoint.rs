//! What a waypoint's admin port says of rules and backends: it writes these, `meshctl waypoint` reads them.
//!
//! | request | answer |
//! |---|---|
//! | `GET /routes` | `Vec<`[`RouteTable`]`>` |
//! | `GET /clusters` | `Vec<`[`Cluster`]`>` |
//! | `GET /tap?listener=ID&since=N&wait=SECONDS&…` | [`crate::tap::Batch`] |

use serde::{Deserialize, Serialize};

/// The rules of one service's port.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct RouteTable {
    /// `namespace/hostname`; of a gateway's listener `:port/host`.
    pub host: String,
    /// 0: every port that has no rules of its own.
    pub port: u16,
    /// In the order in which they are tried.
    pub rules: Vec<RuleEntry>,
}

/// A rule, at the place of one or more of its matches.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct RuleEntry {
    /// `Kind/namespace/name` of the object.
    pub object: String,
    /// Name of the rule in it.
    pub rule: String,
    /// `http` or `tcp`.
    pub protocol: String,
    /// One of these has to hold; empty: always.
    pub matches: Vec<String>,
    /// Where requests end.
    pub destinations: Vec<DestinationEntry>,
    /// What is answered here instead.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub answer: String,
    /// What else is done to its requests.
    pub policies: Vec<String>,
    /// Requests since the rule was read, for this rule as a whole.
    pub hits: u64,
}

/// A destination with its share.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct DestinationEntry {
    /// Hostname of the service.
    pub service: String,
    /// Its port; 0 is not said.
    pub port: u16,
    /// Name of the subset; empty: all.
    pub subset: String,
    /// Relative to the sum.
    pub weight: u32,
    /// Why it cannot be used.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub invalid: String,
}

/// A backend that has been used.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Cluster {
    /// Its name: service, port, subset.
    pub cluster: String,
    /// Objects that its policy comes from.
    pub policies: Vec<String>,
    /// How an endpoint is chosen.
    pub algorithm: String,
    /// Requests at a time.
    pub requests: u64,
    /// Requests that a limit refused.
    pub overflows: u64,
    /// Its endpoints.
    pub endpoints: Vec<ClusterEndpoint>,
}

/// An endpoint of a backend.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ClusterEndpoint {
    /// Uid of the workload; empty where the client's own destination is dialled.
    pub workload: String,
    /// `namespace/name` of the workload.
    pub name: String,
    /// Its address, or the name that is resolved.
    pub address: String,
    /// Port of the application.
    pub port: u16,
    /// Whether it is reached by HBONE.
    pub hbone: bool,
    /// Weight among its level.
    pub weight: u32,
    /// Level of priority; 0 comes first.
    pub priority: usize,
    /// `region/zone/subzone`.
    pub locality: Option<String>,
    /// Requests at a time.
    pub active: u64,
    /// Requests so far.
    pub requests: u64,
    /// Tries so far that failed: no connection, no answer in time, status 5xx.
    pub failures: u64,
    /// Outlier detection.
    pub outlier: Outlier,
}

/// What outlier detection has counted of an endpoint.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Outlier {
    /// How much longer it takes no requests; 0: it takes some.
    pub ejected_for_ms: u64,
    /// Ejections, as the next one's length is multiplied by them.
    pub ejections: u32,
    /// Statuses 5xx in a row.
    pub consecutive_5xx: u32,
}
