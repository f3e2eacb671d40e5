//! What is in force, changed object by object: pure, so that every order of events is tested without a cluster.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::model::credential::SecretTypes;
use crate::model::read::{FieldError, Read};
use crate::model::{Key, Kind, Object, ObjectRef, Objects};
use crate::source::{Problem, State, consequence};

/// Secrets that are named.
pub(super) type Named = BTreeMap<Key, Naming>;

/// How a Secret is named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Naming {
    /// A number that no earlier naming of it had.
    number: u64,
    /// What it may be.
    pub(super) types: SecretTypes,
}

/// What a watch tells.
#[derive(Debug)]
pub(super) enum Change {
    /// A listing of all objects of a kind begins.
    Begin(Kind),
    /// An object is there, valid or not.
    Apply(Kind, Key, Result<Object, Vec<FieldError>>),
    /// An object is gone.
    Delete(Kind, Key),
    /// The listing is complete: what was not in it is gone.
    End(Kind),
    /// The cluster does not have this kind (any more).
    Absent(Kind),
    /// A Secret that is named has been looked for: it was told before this, or is not there or not to be read.
    Looked(Key),
    /// Something cannot be read, with the reason, or can be again.
    Trouble(String, Option<String>),
}

impl Change {
    /// An object that was read.
    pub(super) fn apply(kind: Kind, key: Key, read: Read) -> Self {
        Self::Apply(kind, key, read.result)
    }
}

#[derive(Debug, Default)]
struct Progress {
    listed: bool,
    /// What the present listing has had so far.
    seen: Option<BTreeSet<Key>>,
}

#[derive(Debug)]
pub(super) struct Store {
    objects: Objects,
    /// The key of the ConfigMap that the settings in force are from.
    settings: Option<Key>,
    problems: BTreeMap<ObjectRef, Vec<Problem>>,
    progress: BTreeMap<Kind, Progress>,
    /// Secrets that gateways name, and those of them that have been looked for since they are named.
    named: Named,
    looked: BTreeSet<Key>,
    namings: u64,
    /// Why something cannot be read, by its name.
    troubles: BTreeMap<String, String>,
    dirty: bool,
}

impl Store {
    pub(super) fn new(kinds: impl Iterator<Item = Kind>) -> Self {
        Self {
            objects: Objects::default(),
            settings: None,
            problems: BTreeMap::new(),
            progress: kinds.map(|kind| (kind, Progress::default())).collect(),
            named: Named::new(),
            looked: BTreeSet::new(),
            namings: 0,
            troubles: BTreeMap::new(),
            dirty: true,
        }
    }

    /// Every kind has been listed once, or is not there, and every Secret that is named has been looked for: a gateway must
    /// not be told to close a port because its certificate has not been read yet.
    pub(super) fn is_complete(&self) -> bool {
        self.progress.values().all(|p| p.listed) && self.has_looked()
    }

    fn has_looked(&self) -> bool {
        self.named.keys().all(|key| self.looked.contains(key))
    }

    /// Something cannot be read.
    pub(super) fn is_troubled(&self) -> bool {
        !self.troubles.is_empty()
    }

    /// What has not been listed, a line each, with the reason where there is one.
    pub(super) fn waiting(&self) -> Vec<String> {
        let unlisted = self.progress.iter().filter(|(_, p)| !p.listed).map(|(kind, _)| *kind);
        let unlisted = unlisted.chain((!self.has_looked()).then_some(Kind::Secret)).map(|kind| kind.name());
        let troubled: BTreeSet<String> = self.troubles.keys().cloned().collect();
        let quiet =
            unlisted.filter(|name| !troubled.contains(name)).map(|name| format!("{name}: not listed yet"));
        self.troubles.iter().map(|(what, why)| format!("{what}: {why}")).chain(quiet).collect()
    }

    /// The Secrets that gateways name now. What was read of others is let go.
    pub(super) fn named_secrets(&mut self) -> &Named {
        let now = self.objects.named_secrets();
        if !now.iter().eq(self.named.iter().map(|(key, naming)| (key, &naming.types))) {
            self.objects.credentials.retain(|key, _| now.contains_key(key));
            self.problems.retain(|object, _| object.kind != Kind::Secret || now.contains_key(&object.key));
            self.named.retain(|key, naming| now.get(key) == Some(&naming.types));
            self.looked.retain(|key| self.named.contains_key(key));
            self.namings += 1;
            for (key, types) in now {
                self.named.entry(key).or_insert(Naming { number: self.namings, types });
            }
        }
        &self.named
    }

    /// Something changed since the last [`Store::state`].
    pub(super) fn is_dirty(&self) -> bool {
        self.dirty
    }

    /// What is in force. The maps are copied, not the objects: what is published stays as it is.
    pub(super) fn state(&mut self) -> State {
        self.dirty = false;
        let problems = self.problems.values().flatten().cloned().collect();
        let objects = Arc::new(self.objects.clone());
        State { synced: self.is_complete(), objects, problems, waiting: Vec::new() }
    }

    pub(super) fn take(&mut self, change: Change) {
        match change {
            Change::Begin(kind) => self.progress.entry(kind).or_default().seen = Some(BTreeSet::new()),
            Change::Apply(kind, key, result) => {
                let progress = self.progress.get_mut(&kind);
                if let Some(seen) = progress.and_then(|progress| progress.seen.as_mut()) {
                    seen.insert(key.clone());
                }
                if kind == Kind::Secret && !self.named.contains_key(&key) {
                    // Its watch ends.
                    return;
                }
                self.apply(ObjectRef { kind, key }, result);
            }
            Change::Delete(kind, key) => self.delete(&ObjectRef { kind, key }),
            Change::Trouble(what, Some(why)) => drop(self.troubles.insert(what, why)),
            Change::Trouble(what, None) => drop(self.troubles.remove(&what)),
            Change::Looked(key) => {
                // Something may wait for this.
                self.dirty = true;
                self.looked.insert(key);
            }
            Change::End(kind) => {
                let progress = self.progress.entry(kind).or_default();
                progress.listed = true;
                let seen = progress.seen.take().unwrap_or_default();
                self.keep_only(kind, &seen);
            }
            Change::Absent(kind) => {
                self.troubles.remove(&kind.name());
                *self.progress.entry(kind).or_default() = Progress { listed: true, seen: None };
                self.keep_only(kind, &BTreeSet::new());
            }
        }
    }

    fn apply(&mut self, object: ObjectRef, result: Result<Object, Vec<FieldError>>) {
        match result {
            Ok(Object::Ignored(_)) => {}
            Ok(new) => {
                self.dirty |= self.problems.remove(&object).is_some();
                if matches!(new, Object::MeshSettings(..)) {
                    self.settings = Some(object.key);
                }
                self.dirty |= self.objects.insert(new);
            }
            Err(errors) => {
                let consequence = consequence(&object, self.objects.contains(&object)).to_owned();
                let problem = |e: FieldError| Problem {
                    file: String::new(),
                    line: 0,
                    object: Some(object.clone()),
                    field: e.field,
                    message: e.message,
                    consequence: consequence.clone(),
                };
                let problems: Vec<Problem> = errors.into_iter().map(problem).collect();
                let before = self.problems.insert(object.clone(), problems);
                self.dirty |= before.as_ref() != self.problems.get(&object);
            }
        }
    }

    fn delete(&mut self, object: &ObjectRef) {
        self.dirty |= self.problems.remove(object).is_some();
        if object.kind == Kind::ConfigMap && self.settings.as_ref() != Some(&object.key) {
            return;
        }
        self.dirty |= self.objects.remove(object);
    }

    fn keys(&self, kind: Kind) -> Vec<Key> {
        match kind {
            Kind::ConfigMap => {
                self.settings.iter().filter(|_| self.objects.settings.is_some()).cloned().collect()
            }
            _ => self.objects.keys(kind),
        }
    }

    fn keep_only(&mut self, kind: Kind, seen: &BTreeSet<Key>) {
        let mut gone: Vec<Key> = self.keys(kind).into_iter().filter(|key| !seen.contains(key)).collect();
        let bad = self.problems.keys().filter(|o| o.kind == kind && !seen.contains(&o.key));
        gone.extend(bad.map(|o| o.key.clone()));
        for key in gone {
            self.delete(&ObjectRef { kind, key });
        }
    }
}

#[cfg(test)]
mod tests;
