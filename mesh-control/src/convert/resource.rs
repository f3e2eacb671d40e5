//! Messages that outlive the conversion that made them: encoded once, however many snapshots hold them.

use std::fmt;
use std::sync::{Arc, OnceLock};

use prost::Message;
use twox_hash::XxHash64;

use crate::model::Key;

/// One encoded resource.
#[derive(PartialEq, Eq)]
pub struct Entry {
    /// Hash of the content, so that it is equal on every replica and across restarts.
    pub version: String,
    /// The encoded message.
    pub value: Vec<u8>,
    /// Other names to ask by.
    pub aliases: Vec<String>,
    /// The service account whose proxies alone are told; none: it is for everybody.
    pub only_for: Option<Key>,
}

/// The message may hold a key.
impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry").field("version", &self.version).finish_non_exhaustive()
    }
}

impl Entry {
    pub(crate) fn new(message: &impl Message, aliases: &[String], only_for: Option<Key>) -> Self {
        let value = message.encode_to_vec();
        let version = format!("{:x}", XxHash64::oneshot(0, &value));
        Self { version, value, aliases: aliases.to_vec(), only_for }
    }

    /// Whether a client of a service account may be told; none: one that has not proved who it is.
    #[must_use]
    pub fn is_for(&self, account: Option<&Key>) -> bool {
        self.only_for.is_none() || self.only_for.as_ref() == account
    }
}

/// A message for everybody, and what it is encoded once somebody asks.
#[derive(Debug)]
pub struct Resource<M> {
    /// The message.
    pub message: M,
    /// Other names that an on-demand client may ask by: `<network>/<ip>`.
    pub aliases: Vec<String>,
    entry: OnceLock<Arc<Entry>>,
}

impl<M: Message> Resource<M> {
    pub(crate) fn new(message: M, aliases: Vec<String>) -> Self {
        Self { message, aliases, entry: OnceLock::new() }
    }

    pub(crate) fn entry(&self) -> Arc<Entry> {
        self.entry.get_or_init(|| Arc::new(Entry::new(&self.message, &self.aliases, None))).clone()
    }
}

impl<M: PartialEq> PartialEq for Resource<M> {
    fn eq(&self, other: &Self) -> bool {
        self.message == other.message && self.aliases == other.aliases
    }
}
