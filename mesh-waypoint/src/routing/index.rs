//! Finds the first rule that matches.

use std::sync::Arc;

use super::compiled::Entry;
use super::matching::MatchedPath;
use crate::request::Head;

/// Matches of one service's port in their order of precedence.
#[derive(Debug)]
pub(super) struct Index {
    entries: Vec<Arc<Entry>>,
}

impl Index {
    pub(super) fn build(entries: Vec<Arc<Entry>>) -> Self {
        Self { entries }
    }

    /// The first that matches.
    pub(super) fn find(&self, head: &Head<'_>, port: u16) -> Option<(&Arc<Entry>, MatchedPath)> {
        self.entries.iter().find_map(|entry| Some((entry, entry.matching.test(head, port)?)))
    }
}
