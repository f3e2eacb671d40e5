//! Finds the first match, in the order of precedence, without looking at those that cannot hold.
//!
//! Matches are filed by their path in a [`tree::PathTree`]; a request visits the files along its own path only. Where a
//! file holds many, it is divided by the values of headers, query parameters and the like that its matches ask for, see
//! [`bucket::Bucket`]. What cannot be filed (a regular expression that begins with anything, an absent header) is
//! looked at one by one, as far as nothing better is found. The files only save work: every candidate is tested whole,
//! and the least position wins.

mod bucket;
mod tree;

use std::borrow::Cow;
use std::sync::Arc;

use super::compiled::Entry;
use super::matching::{MatchedPath, PathTest};
use crate::request::Head;
use tree::{PathTree, Place};

/// Matches of one service's port.
#[derive(Debug)]
pub(super) struct Index {
    /// In their order of precedence.
    entries: Vec<Arc<Entry>>,
    paths: PathTree,
    /// In lower case, for matches that ignore the case.
    folded: Option<PathTree>,
}

/// The best match so far, for one request.
struct Search<'a> {
    entries: &'a [Arc<Entry>],
    head: &'a Head<'a>,
    port: u16,
    /// Position of the best; the number of entries while there is none.
    best: u32,
    path: MatchedPath,
}

impl Index {
    /// `entries` are in the order of precedence; there are fewer than 2^32.
    pub(super) fn build(entries: Vec<Arc<Entry>>) -> Self {
        let mut exact_case = Vec::with_capacity(entries.len());
        let mut folded = Vec::new();
        for (position, entry) in (0..).zip(&entries) {
            let (text, place, ignores_case) = match &entry.matching.path {
                PathTest::Any | PathTest::Broken => ("", Place::Prefix, false),
                PathTest::Exact(text) => (&*text.text, Place::Exact, text.ignore_case),
                PathTest::Prefix(text) => (&*text.text, Place::Prefix, text.ignore_case),
                PathTest::Segments(text) => (&*text.text, Place::Segments, text.ignore_case),
                PathTest::Regex(pattern) => (pattern.prefix(), Place::Prefix, false),
            };
            let list = if ignores_case { &mut folded } else { &mut exact_case };
            list.push((text, place, position));
        }
        let paths = PathTree::build(exact_case, &entries);
        let folded = (!folded.is_empty()).then(|| PathTree::build(folded, &entries));
        Self { paths, folded, entries }
    }

    /// In their order of precedence.
    pub(super) fn entries(&self) -> &[Arc<Entry>] {
        &self.entries
    }

    /// The first that matches.
    pub(super) fn find(&self, head: &Head<'_>, port: u16) -> Option<(&Arc<Entry>, MatchedPath)> {
        let none = u32::try_from(self.entries.len()).unwrap_or(u32::MAX);
        let mut search = Search { entries: &self.entries, head, port, best: none, path: MatchedPath::Whole };
        self.paths.walk(head.path, &mut |bucket| bucket.search(&mut search));
        if let Some(folded) = &self.folded {
            let path = if head.path.bytes().any(|b| b.is_ascii_uppercase()) {
                Cow::Owned(head.path.to_ascii_lowercase())
            } else {
                Cow::Borrowed(head.path)
            };
            folded.walk(&path, &mut |bucket| bucket.search(&mut search));
        }
        Some((self.entries.get(search.best as usize)?, search.path))
    }

    /// One after the other: what [`Self::find`] must agree with.
    #[cfg(test)]
    pub(super) fn find_one_by_one(&self, head: &Head<'_>, port: u16) -> Option<(&Arc<Entry>, MatchedPath)> {
        self.entries.iter().find_map(|entry| Some((entry, entry.matching.test(head, port)?)))
    }
}

impl Search<'_> {
    /// Takes the first of ascending positions that matches and is better than the best so far.
    fn try_each(&mut self, positions: &[u32]) {
        for &position in positions {
            if position >= self.best {
                return;
            }
            let Some(entry) = self.entries.get(position as usize) else { return };
            if let Some(path) = entry.matching.test(self.head, self.port) {
                self.best = position;
                self.path = path;
                return;
            }
        }
    }
}
