//! The state of one type on one stream: what the client asked for, what it holds, what it still has to be told.
//! Pure: fed with requests and snapshots.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use mesh_core::xds::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};

use super::service::Push;
use super::snapshot::{Entries, Entry, ResourceType, Snapshot};
use crate::model::Key;

/// Responses that may be unanswered before the oldest nonce is forgotten.
const REMEMBERED_NONCES: usize = 64;

/// What a request says about earlier responses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// No nonce: a subscription of its own accord.
    None,
    /// The response with this nonce was applied.
    Ack(String),
    /// Parts of the response were rejected; the others were applied.
    Nack(String),
    /// The nonce is not one that is waited for.
    Stale,
}

/// What a response says.
#[derive(Debug, Default)]
struct News {
    resources: Vec<Resource>,
    /// Further ones, encoded once for all clients that get the same.
    shared: Bytes,
    removed: Vec<String>,
}

impl News {
    fn is_empty(&self) -> bool {
        self.resources.is_empty() && self.shared.is_empty() && self.removed.is_empty()
    }
}

/// What a client has.
#[derive(Debug, Default)]
struct Held {
    /// All of these, which are a snapshot's: a client of a large mesh costs no memory of its own.
    all: Option<Arc<Entries>>,
    /// Else these, by name, with their versions.
    listed: BTreeMap<Arc<str>, String>,
}

impl Held {
    fn len(&self) -> usize {
        self.all.as_ref().map_or(self.listed.len(), |all| all.len())
    }

    /// One by one, for a client that does not want all any more, or asks for single ones.
    fn listed(&mut self) -> &mut BTreeMap<Arc<str>, String> {
        if let Some(all) = self.all.take() {
            self.listed = all.iter().map(|(name, entry)| (name.clone(), entry.version.clone())).collect();
        }
        &mut self.listed
    }
}

/// One type on one stream.
#[derive(Debug)]
pub struct Subscription {
    kind: ResourceType,
    started: bool,
    wildcard: bool,
    /// Asked for by name or alias.
    keys: BTreeSet<String>,
    /// Asked for since the last response: they get an answer even when nothing is new about them.
    asked: BTreeSet<String>,
    /// The next response goes out even when it is empty.
    must_answer: bool,
    held: Held,
    /// What the client was last brought up to date with.
    seen: Option<Arc<Entries>>,
    outstanding: VecDeque<String>,
    next_nonce: u64,
    /// Node of the client; an on-demand client also gets the workloads of its node.
    node: String,
    /// The service account that the client has proved to be.
    account: Option<Key>,
}

impl Subscription {
    /// A type that a client, who has not proved who it is, has not asked for yet.
    #[must_use]
    pub fn new(kind: ResourceType) -> Self {
        Self::of(kind, None)
    }

    /// The same of a client that has proved to be `account`.
    #[must_use]
    pub fn of(kind: ResourceType, account: Option<Key>) -> Self {
        Self {
            kind,
            started: false,
            wildcard: false,
            keys: BTreeSet::new(),
            asked: BTreeSet::new(),
            must_answer: false,
            held: Held::default(),
            seen: None,
            outstanding: VecDeque::new(),
            next_nonce: 1,
            node: String::new(),
            account,
        }
    }

    /// Number of resources that the client holds.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// Takes a request of this type.
    pub fn request(&mut self, request: &DeltaDiscoveryRequest, node: &str) -> Reply {
        if !self.started {
            self.started = true;
            self.must_answer = true;
            self.wildcard = request.resource_names_subscribe.is_empty();
            node.clone_into(&mut self.node);
            let versions = request.initial_resource_versions.iter();
            let versions = versions.map(|(name, version)| (Arc::from(name.as_str()), version.clone()));
            self.held = Held { all: None, listed: versions.collect() };
        }
        for key in &request.resource_names_subscribe {
            self.must_answer = true;
            if key == "*" {
                self.wildcard = true;
            } else {
                self.keys.insert(key.clone());
                self.asked.insert(key.clone());
            }
        }
        for key in &request.resource_names_unsubscribe {
            self.seen = None;
            if key == "*" {
                self.wildcard = false;
            } else {
                self.keys.remove(key);
                self.asked.remove(key);
                self.held.listed().remove(key.as_str());
            }
        }
        self.reply(request)
    }

    fn reply(&mut self, request: &DeltaDiscoveryRequest) -> Reply {
        if request.response_nonce.is_empty() {
            return Reply::None;
        }
        let Some(position) = self.outstanding.iter().position(|n| *n == request.response_nonce) else {
            return Reply::Stale;
        };
        self.outstanding.drain(..=position);
        match &request.error_detail {
            None => Reply::Ack(request.response_nonce.clone()),
            Some(error) => Reply::Nack(cut(&error.message)),
        }
    }

    /// What the client has to be told to be up to date with `snapshot`; nothing when it is.
    pub fn respond(&mut self, snapshot: &Snapshot) -> Option<Push> {
        if !self.started {
            return None;
        }
        let all = snapshot.entries(self.kind);
        let asked = std::mem::take(&mut self.asked);
        let is_new = !self.seen.as_ref().is_some_and(|seen| Arc::ptr_eq(seen, all));
        if !is_new && asked.is_empty() && !self.must_answer {
            return None;
        }
        let whole = self.held.all.clone().filter(|_| self.wildcard && asked.is_empty());
        let has_nothing = self.wildcard && self.held.len() == 0 && asked.is_empty();
        let news = match whole {
            Some(held) => self.changes(snapshot, &held),
            None if has_nothing && !self.kind.is_confidential() => {
                News { shared: snapshot.encoded(self.kind), ..News::default() }
            }
            None => self.compared(snapshot, asked),
        };
        self.seen = Some(all.clone());
        if self.wildcard && !self.kind.is_confidential() {
            self.held = Held { all: Some(all.clone()), listed: BTreeMap::new() };
        }
        if news.is_empty() && !self.must_answer {
            return None;
        }
        self.must_answer = false;
        let nonce = format!("{}-{}", self.kind.short(), self.next_nonce);
        self.next_nonce += 1;
        self.outstanding.push_back(nonce.clone());
        while self.outstanding.len() > REMEMBERED_NONCES {
            self.outstanding.pop_front();
        }
        let own = DeltaDiscoveryResponse {
            system_version_info: snapshot.number.to_string(),
            resources: news.resources,
            type_url: self.kind.url().to_owned(),
            nonce,
            removed_resources: news.removed,
        };
        Some(Push { own, shared: news.shared })
    }

    /// For a client that has all of `held` and wants all there is.
    fn changes(&self, snapshot: &Snapshot, held: &Arc<Entries>) -> News {
        let all = snapshot.entries(self.kind);
        let changed = snapshot.changes(self.kind, held);
        let (there, gone): (Vec<_>, Vec<_>) =
            changed.names.iter().partition(|name| all.contains_key(&***name));
        let resources = match changed.shared {
            Some(_) => Vec::new(),
            None => {
                there.iter().filter_map(|name| Some(all.get(&***name)?.resource(name, self.kind))).collect()
            }
        };
        let removed = gone.iter().map(|name| name.to_string()).collect();
        News { resources, shared: changed.shared.unwrap_or_default(), removed }
    }

    /// For any other: each resource against what the client has of it.
    fn compared(&mut self, snapshot: &Snapshot, asked: BTreeSet<String>) -> News {
        let (kind, all) = (self.kind, snapshot.entries(self.kind));
        // What is not for the client is not there.
        let account = self.account.clone();
        let get = |name: &str| all.get(name).filter(|entry| entry.is_for(account.as_ref()));
        let explicit: BTreeSet<Arc<str>> = asked.iter().flat_map(|k| self.names(snapshot, k)).collect();
        let wanted = (!self.wildcard).then(|| self.wanted(snapshot));
        let mut news = News::default();
        let held = self.held.listed();
        let mut send = |name: &Arc<str>| {
            let Some(entry) = get(name) else { return };
            if held.get(name) != Some(&entry.version) || explicit.contains(name) {
                news.resources.push(entry.resource(name, kind));
                held.insert(name.clone(), entry.version.clone());
            }
        };
        match &wanted {
            None => all.keys().for_each(send),
            Some(wanted) => wanted.iter().for_each(&mut send),
        }
        held.retain(|name, _| {
            let exists = get(name).is_some();
            if !exists {
                news.removed.push(name.to_string());
            }
            exists
        });
        // The negative answer to what was asked for and is not there.
        for key in asked {
            if self.names(snapshot, &key).is_empty() && !news.removed.contains(&key) {
                news.removed.push(key);
            }
        }
        news
    }

    fn names(&self, snapshot: &Snapshot, key: &str) -> Vec<Arc<str>> {
        match self.kind {
            ResourceType::Address => snapshot.resolve(key),
            _ => {
                let found = snapshot.entries(self.kind).get_key_value(key);
                let is_for = |(_, entry): &(_, &Arc<Entry>)| entry.is_for(self.account.as_ref());
                found.filter(is_for).map(|(name, _)| name.clone()).into_iter().collect()
            }
        }
    }

    /// On demand: what was asked for, what belongs to it, what the client got before, and its own node's
    /// workloads as soon as it asked for anything.
    fn wanted(&self, snapshot: &Snapshot) -> BTreeSet<Arc<str>> {
        let mut wanted: BTreeSet<Arc<str>> = match &self.held.all {
            Some(all) => all.keys().cloned().collect(),
            None => self.held.listed.keys().cloned().collect(),
        };
        for key in &self.keys {
            wanted.extend(self.names(snapshot, key));
        }
        if self.kind == ResourceType::Address && !self.keys.is_empty() {
            wanted.extend(snapshot.on_node(&self.node).iter().cloned());
        }
        wanted
    }
}

/// The beginning of what a client says, which logs and conditions show: it may say as much as it likes.
fn cut(message: &str) -> String {
    const LONGEST: usize = 1024;
    message[..message.floor_char_boundary(LONGEST)].to_owned()
}

#[cfg(test)]
mod tests;
