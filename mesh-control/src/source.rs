//! Where objects come from. Everything after this is blind to it.

pub mod dir;

use std::fmt;
use std::future::Future;
use std::sync::Arc;

use serde::Serialize;
use tokio::sync::watch;

use crate::model::{ObjectRef, Objects};

/// A source of objects.
pub trait Source: Send + 'static {
    /// Reads everything, publishes it, and goes on publishing whenever something changes, until the receiver is
    /// gone. The first published state is complete.
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
}

/// Something in a source that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Problem {
    /// File, relative to the directory.
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
            write!(f, ": {object}")?;
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

/// Why a source cannot run.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The directory cannot be read.
    #[error("cannot read the source directory {path}: {cause}; create it, or correct --source dir:PATH")]
    Unreadable {
        /// The directory.
        path: String,
        /// The operating system's reason.
        cause: std::io::Error,
    },
    /// `--source` names no known source.
    #[error("unknown source {0:?}; write dir:PATH")]
    Unknown(String),
}
