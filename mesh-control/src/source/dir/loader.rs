//! Files to objects: pure, so that every rule of "the last good version stays in force" is tested without a
//! file system.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use twox_hash::XxHash64;

use super::Files;
use crate::model::credential::SecretTypes;
use crate::model::read::{Read, read};
use crate::model::{Object, ObjectRef, Objects};
use crate::source::{ABSENT, Problem, State, consequence};
use crate::tree::{Node, Value, documents};

/// Remembers the last good version of each object from one reading to the next.
#[derive(Debug)]
pub struct Loader {
    root_namespace: String,
    files: BTreeMap<String, Parsed>,
    in_force: BTreeMap<ObjectRef, Good>,
    problems: Vec<Problem>,
    loaded: bool,
}

#[derive(Debug)]
struct Parsed {
    name: Arc<str>,
    hash: u64,
    documents: Vec<Read>,
}

#[derive(Debug, Clone)]
struct Good {
    object: Object,
    file: Arc<str>,
    line: usize,
    hash: u64,
    text: Option<Arc<str>>,
}

/// An object is in no file any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lost;

/// An object in force, as it is kept over a restart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remembered {
    /// The file that it was read from.
    pub file: String,
    /// The document.
    pub text: String,
}

impl Loader {
    /// An empty loader; mesh settings are read from the ConfigMap `istio` of `root_namespace`.
    #[must_use]
    pub fn new(root_namespace: &str) -> Self {
        Self {
            root_namespace: root_namespace.to_owned(),
            files: BTreeMap::new(),
            in_force: BTreeMap::new(),
            problems: Vec::new(),
            loaded: false,
        }
    }

    /// What must not be lost over a restart: policies, settings and what decides about enrolment.
    #[must_use]
    pub fn remembered(&self) -> Vec<Remembered> {
        let one =
            |g: &Good| Some(Remembered { file: g.file.to_string(), text: g.text.as_deref()?.to_owned() });
        self.in_force.values().filter_map(one).collect()
    }

    /// Every object in force.
    pub fn objects(&self) -> impl Iterator<Item = &Object> {
        self.in_force.values().map(|good| &good.object)
    }

    /// File and line of an object in force.
    #[must_use]
    pub fn place(&self, object: &ObjectRef) -> Option<String> {
        self.in_force.get(object).map(|good| format!("{}:{}", good.file, good.line))
    }

    /// Takes what an earlier process remembered as the last good versions. To be called before the first
    /// [`Loader::load`], which lets go of everything that is really gone.
    pub fn restore(&mut self, remembered: &[Remembered]) {
        for kept in remembered {
            for document in documents(&kept.text).into_iter().flatten() {
                let read = read(&document, &self.root_namespace);
                if let (Some(reference), Ok(object)) = (read.object, read.result) {
                    let good =
                        Good { object, file: kept.file.as_str().into(), line: 0, hash: 0, text: read.text };
                    self.in_force.insert(reference, good);
                }
            }
        }
    }

    /// Takes the present content of all files. Nothing when nothing changed.
    pub fn load(&mut self, files: Files) -> Option<State> {
        let (good, problems) = self.compare(files);
        self.take(good, problems)
    }

    /// The same, unless an object that is in force would no longer be.
    ///
    /// # Errors
    /// It would; all stays as it is.
    pub fn load_unless_lost(&mut self, files: Files) -> Result<Option<State>, Lost> {
        let (good, problems) = self.compare(files);
        if self.in_force.keys().all(|reference| good.contains_key(reference)) {
            Ok(self.take(good, problems))
        } else {
            Err(Lost)
        }
    }

    fn take(&mut self, good: BTreeMap<ObjectRef, Good>, problems: Vec<Problem>) -> Option<State> {
        let changed = !self.loaded || problems != self.problems || !same(&self.in_force, &good);
        self.loaded = true;
        self.problems = problems;
        self.in_force = good;
        changed.then(|| self.state())
    }

    /// What would be in force, and what is wrong with the files. Remembers how they were parsed.
    fn compare(&mut self, files: Files) -> (BTreeMap<ObjectRef, Good>, Vec<Problem>) {
        let mut problems = Vec::new();
        let mut unreadable = BTreeSet::new();
        let mut good: BTreeMap<ObjectRef, Good> = BTreeMap::new();
        let mut bad: Vec<(String, Vec<Problem>)> = Vec::new();
        self.parse(files, &mut problems, &mut unreadable);
        for (file, parsed) in &self.files {
            for document in &parsed.documents {
                match (&document.object, &document.result) {
                    (Some(reference), Ok(object)) => match good.entry(reference.clone()) {
                        Entry::Occupied(first) => problems.push(Problem {
                            file: file.clone(),
                            line: document.line,
                            object: Some(reference.clone()),
                            field: "metadata.name".into(),
                            message: format!(
                                "is already defined in {}:{}; delete or rename one",
                                first.get().file,
                                first.get().line
                            ),
                            consequence: "the first one is in force".into(),
                        }),
                        Entry::Vacant(place) => {
                            place.insert(Good {
                                object: object.clone(),
                                file: Arc::clone(&parsed.name),
                                line: document.line,
                                hash: parsed.hash,
                                text: document.text.clone(),
                            });
                        }
                    },
                    (reference, Err(errors)) => {
                        if reference.is_none() {
                            unreadable.insert(file.clone());
                        }
                        let found = errors.iter().map(|e| Problem {
                            file: file.clone(),
                            line: e.line,
                            object: reference.clone(),
                            field: e.field.clone(),
                            message: e.message.clone(),
                            consequence: String::new(),
                        });
                        bad.push((file.clone(), found.collect()));
                    }
                    (None, Ok(_)) => {}
                }
            }
        }
        self.keep_last_good(&mut good, &bad, &unreadable);
        for (file, found) in bad {
            problems.extend(found.into_iter().map(|p| with_consequence(p, &file, &good)));
        }
        problems.sort();
        (good, problems)
    }

    /// Parses the files that changed.
    fn parse(&mut self, files: Files, problems: &mut Vec<Problem>, unreadable: &mut BTreeSet<String>) {
        let mut old = std::mem::take(&mut self.files);
        for (file, content) in files {
            match content {
                Ok(text) => {
                    let hash = XxHash64::oneshot(0, text.as_bytes());
                    let parsed = match old.remove(&file) {
                        Some(parsed) if parsed.hash == hash => parsed,
                        _ => {
                            Parsed { name: file.as_str().into(), hash, documents: self.read_documents(&text) }
                        }
                    };
                    self.files.insert(file, parsed);
                }
                Err(cause) => {
                    problems.push(Problem {
                        file: file.clone(),
                        line: 0,
                        object: None,
                        field: String::new(),
                        message: format!("cannot be read: {cause}"),
                        consequence: "objects that were read from it before stay in force".into(),
                    });
                    unreadable.insert(file);
                }
            }
        }
    }

    fn read_documents(&self, text: &str) -> Vec<Read> {
        let mut out = Vec::new();
        for document in documents(text) {
            match document {
                Ok(node) => self.read_node(&node, &mut out),
                Err(e) => out.push(Read {
                    object: None,
                    line: e.line,
                    result: Err(vec![crate::model::read::FieldError {
                        line: e.line,
                        field: String::new(),
                        message: format!("is no valid YAML: {}", e.message),
                    }]),
                    text: None,
                }),
            }
        }
        out
    }

    fn read_node(&self, node: &Node, out: &mut Vec<Read>) {
        if node.text("kind") == Some("List") && node.text("apiVersion") == Some("v1") {
            if let Some(Value::List(items)) = node.get("items").map(|n| &n.value) {
                items.iter().for_each(|item| self.read_node(item, out));
            }
            return;
        }
        out.push(read(node, &self.root_namespace));
    }

    /// An object whose new version is wrong, or whose file has a part that cannot be told to be another object,
    /// stays as it was.
    fn keep_last_good(
        &self,
        good: &mut BTreeMap<ObjectRef, Good>,
        bad: &[(String, Vec<Problem>)],
        unreadable: &BTreeSet<String>,
    ) {
        let bad: BTreeSet<&ObjectRef> =
            bad.iter().flat_map(|(_, p)| p).filter_map(|p| p.object.as_ref()).collect();
        for (reference, last) in &self.in_force {
            if !good.contains_key(reference) && (bad.contains(reference) || unreadable.contains(&*last.file))
            {
                good.insert(reference.clone(), last.clone());
            }
            if let (Object::Credential(before), Some(now)) = (&last.object, good.get_mut(reference))
                && let Object::Credential(credential) = &mut now.object
            {
                *credential = Arc::clone(credential).over(Some(before));
            }
        }
    }

    fn state(&self) -> State {
        let mut objects = Objects::default();
        for good in self.in_force.values() {
            objects.insert(good.object.clone());
        }
        let named = objects.named_secrets();
        objects.credentials.retain(|key, secret| {
            named.get(key).is_some_and(|types| *types == SecretTypes::Any || secret.is_tls)
        });
        State {
            synced: true,
            objects: Arc::new(objects),
            problems: self.problems.clone(),
            waiting: Vec::new(),
        }
    }
}

fn with_consequence(problem: Problem, file: &str, good: &BTreeMap<ObjectRef, Good>) -> Problem {
    let consequence = match &problem.object {
        Some(reference) => consequence(reference, good.contains_key(reference)),
        None if good.values().any(|g| *g.file == *file) => {
            "objects that were read from this file before stay in force"
        }
        None => ABSENT,
    };
    Problem { consequence: consequence.to_owned(), ..problem }
}

/// Equal sets of objects. Objects of an unchanged file are the same; those of a changed file count as changed,
/// which costs a conversion and no push when the resources come out equal.
fn same(a: &BTreeMap<ObjectRef, Good>, b: &BTreeMap<ObjectRef, Good>) -> bool {
    a.len() == b.len()
        && a.iter().zip(b).all(|((ra, ga), (rb, gb))| ra == rb && ga.hash == gb.hash && ga.file == gb.file)
}

#[cfg(test)]
mod tests;
