//! What plugin and agent say to each other: one line of JSON each way.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Longest line.
pub const LONGEST: u64 = 64 << 10;

/// From the plugin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase")]
pub enum Request {
    /// A pod starts.
    Add(Starting),
    /// A pod's network is taken down.
    Del {
        /// The pod's uid.
        uid: String,
    },
}

/// A pod whose network is there and whose containers are not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Starting {
    /// As the runtime knows it; empty where it does not say.
    pub uid: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Path of its network namespace.
    pub netns: PathBuf,
}

/// From the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Why the pod must not start yet; none lets it go on.
    pub problem: Option<String>,
}

/// What holds while no agent answers; written by the agent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// Namespaces whose pods are in the mesh unless they say otherwise.
    pub namespaces: BTreeSet<String>,
    /// Whether pods start without the mesh then.
    pub fail_open: bool,
}
