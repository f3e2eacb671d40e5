//! What the API server holds of the objects that get a status: their identity, and the status that is there now, so that
//! nothing is written that is there already.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;
use tokio::sync::watch;

use crate::model::{Key, Kind, ObjectRef};
use crate::tree::Node;

/// Kinds that get a status.
const WITH_STATUS: &[Kind] = &[
    Kind::Service,
    Kind::ServiceEntry,
    Kind::WorkloadEntry,
    Kind::AuthorizationPolicy,
    Kind::PeerAuthentication,
    Kind::RequestAuthentication,
    Kind::Telemetry,
    Kind::VirtualService,
    Kind::DestinationRule,
    Kind::Gateway,
    Kind::IstioGateway,
    Kind::HTTPRoute,
    Kind::GRPCRoute,
    Kind::TCPRoute,
    Kind::TLSRoute,
];

/// One object as it is stored.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    /// `metadata.uid`: another object may come to have the name.
    pub uid: String,
    /// The apiVersion that it is watched in.
    pub api_version: String,
    /// `metadata.generation`.
    pub generation: i64,
    /// `status`, null when there is none.
    pub status: Value,
    /// `spec.parentRefs` of a route as they are written, null when there are none.
    pub parents: Value,
}

/// Every object that gets a status. Locked for a map operation only.
#[derive(Debug)]
pub struct Observed {
    stored: Mutex<BTreeMap<ObjectRef, Arc<Stored>>>,
    changes: watch::Sender<u64>,
}

impl Default for Observed {
    fn default() -> Self {
        Self { stored: Mutex::default(), changes: watch::Sender::new(0) }
    }
}

impl Observed {
    /// Wakes when an object or its status changed.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// One object.
    #[must_use]
    pub fn get(&self, object: &ObjectRef) -> Option<Arc<Stored>> {
        self.stored.lock().unwrap_or_else(PoisonError::into_inner).get(object).cloned()
    }

    /// All of them.
    #[must_use]
    pub fn all(&self) -> BTreeMap<ObjectRef, Arc<Stored>> {
        self.stored.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The part of one kind, for its watch.
    pub(super) fn of<'a>(&'a self, kind: Kind, api_version: &'a str) -> OfKind<'a> {
        OfKind { observed: self, kind, api_version, listed: None }
    }
}

/// Where a kind's watch writes.
pub(super) struct OfKind<'a> {
    observed: &'a Observed,
    kind: Kind,
    api_version: &'a str,
    /// What the present listing has had so far.
    listed: Option<BTreeSet<Key>>,
}

impl OfKind<'_> {
    /// A listing of all objects begins.
    pub(super) fn begin(&mut self) {
        self.listed = WITH_STATUS.contains(&self.kind).then(BTreeSet::new);
    }

    /// The listing is complete: what was not in it is gone.
    pub(super) fn end(&mut self) {
        if let Some(listed) = self.listed.take() {
            self.retain(|key| listed.contains(key));
        }
    }

    pub(super) fn saw(&mut self, key: &Key, tree: &Node) {
        if !WITH_STATUS.contains(&self.kind) {
            return;
        }
        if let Some(listed) = &mut self.listed {
            listed.insert(key.clone());
        }
        let generation = match tree.get("metadata").and_then(|m| m.get("generation")).map(Node::to_json) {
            Some(Value::Number(n)) => n.as_i64().unwrap_or_default(),
            _ => 0,
        };
        let status = tree.get("status").map_or(Value::Null, Node::to_json);
        let parents = tree.get("spec").and_then(|s| s.get("parentRefs")).map_or(Value::Null, Node::to_json);
        let uid = tree.get("metadata").and_then(|m| m.text("uid")).unwrap_or_default().to_owned();
        let api_version = self.api_version.to_owned();
        let stored = Arc::new(Stored { uid, api_version, generation, status, parents });
        let object = ObjectRef { kind: self.kind, key: key.clone() };
        let mut all = self.observed.stored.lock().unwrap_or_else(PoisonError::into_inner);
        let before = all.insert(object, Arc::clone(&stored));
        drop(all);
        if before.as_deref() != Some(&*stored) {
            self.changed();
        }
    }

    pub(super) fn lost(&self, key: &Key) {
        let object = ObjectRef { kind: self.kind, key: key.clone() };
        let gone = self.observed.stored.lock().unwrap_or_else(PoisonError::into_inner).remove(&object);
        if gone.is_some() {
            self.changed();
        }
    }

    /// The cluster does not have the kind.
    pub(super) fn forget(&self) {
        self.retain(|_| false);
    }

    fn retain(&self, keep: impl Fn(&Key) -> bool) {
        let mut all = self.observed.stored.lock().unwrap_or_else(PoisonError::into_inner);
        let before = all.len();
        all.retain(|object, _| object.kind != self.kind || keep(&object.key));
        let changed = all.len() != before;
        drop(all);
        if changed {
            self.changed();
        }
    }

    fn changed(&self) {
        self.observed.changes.send_modify(|n| *n += 1);
    }
}
