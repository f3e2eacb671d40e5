//! Where objects come from. Everything after this is blind to it.

pub mod dir;
pub mod kube;

use std::fmt;
use std::future::Future;
use std::sync::Arc;

use serde::Serialize;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::model::{Kind, ObjectRef, Objects};

/// A source of objects.
pub trait Source: Send + 'static {
    /// Reads everything, publishes it, and goes on publishing whenever something changes, until the receiver is
    /// gone. Before the first complete state there may be some that hold no objects and say what is missing.
    ///
    /// # Errors
    /// Only what makes the source useless from the start, for example a directory that does not exist.
    fn run(self, out: watch::Sender<Arc<State>>) -> impl Future<Output = Result<(), SourceError>> + Send;
}

/// What a source knows at one moment.
#[derive(Debug, Default)]
pub struct State {
    /// False until the source has been read once.
    pub synced: bool,
    /// Objects in force.
    pub objects: Arc<Objects>,
    /// What is wrong with the source; the objects named here are in force as they were before, or not at all.
    pub problems: Vec<Problem>,
    /// Until the source has been read once: what is missing, and why, a line each.
    pub waiting: Vec<String>,
}

/// Something in a source that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Problem {
    /// File, relative to the directory; empty for objects of an API server.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub file: String,
    /// Line, 1-based; 0 when the file as a whole is meant.
    pub line: usize,
    /// The object, when its kind and name could be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub object: Option<ObjectRef>,
    /// Path of the field, may be empty.
    pub field: String,
    /// What is wrong, and what would be right.
    pub message: String,
    /// What is in force instead.
    pub consequence: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file)?;
        if self.line > 0 {
            write!(f, ":{}", self.line)?;
        }
        if let Some(object) = &self.object {
            write!(f, "{}{object}", if self.file.is_empty() { "" } else { ": " })?;
        }
        if !self.field.is_empty() {
            write!(f, ": {}", self.field)?;
        }
        write!(f, ": {}", self.message)?;
        if !self.consequence.is_empty() {
            write!(f, " ({})", self.consequence)?;
        }
        Ok(())
    }
}

const KEPT: &str = "its last good version stays in force";
const ABSENT: &str = "it is not in force";

/// What is in force while an object's newest version cannot be used.
fn consequence(object: &ObjectRef, kept: bool) -> &'static str {
    match object.kind {
        _ if kept => KEPT,
        Kind::AuthorizationPolicy => "it is not in force, so it neither allows nor denies anything",
        _ => ABSENT,
    }
}

/// Tells the log what became wrong and what became right.
fn report(before: &State, after: &State) {
    for problem in after.problems.iter().filter(|p| !before.problems.contains(p)) {
        warn!(%problem, "bad input");
    }
    for problem in before.problems.iter().filter(|p| !after.problems.contains(p)) {
        let object = problem.object.as_ref().map(ToString::to_string);
        info!(file = problem.file, line = problem.line, object, field = problem.field, "corrected");
    }
}

/// Why a source cannot run.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The directory cannot be read.
    #[error("cannot read {path}: {cause}; create it, or name another")]
    Unreadable {
        /// The directory.
        path: String,
        /// The operating system's reason.
        cause: std::io::Error,
    },
    /// There is no cluster to connect to.
    #[error(
        "--source kubernetes: {0}; run in a pod with a service account, or set KUBECONFIG (and kubernetes:CONTEXT)"
    )]
    NoCluster(String),
    /// The cluster was not read whole.
    #[error(
        "the cluster could not be read: {0}; check that it can be reached, and that you may list all kinds (kubectl auth \
         can-i list pods -A)"
    )]
    NotRead(String),
    /// `--source` names no known source.
    #[error("unknown source {0:?}; write dir:PATH, kubernetes or kubernetes:CONTEXT")]
    Unknown(String),
}
