//! Pods from a directory: one JSON file per pod, written by whoever starts pods on a machine without Kubernetes.
//!
//! What a file says decides which identity a namespace gets, so the directory and its files must belong to root and
//! be writable by nobody else.

use super::{PodInfo, PodSnapshot, PodSource, SourceError, WatchGuard};
use crate::dns::names::MAX_SEARCH;
use notify::{RecursiveMode, Watcher};
use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Reads `*.json` of one directory.
#[derive(Clone, Debug)]
pub struct DirectorySource {
    path: PathBuf,
    /// Who must own the directory and the files.
    owner: u32,
}

impl DirectorySource {
    /// A source over `path`, which must belong to root.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path, owner: 0 }
    }

    fn error(&self, problem: impl Into<String>) -> SourceError {
        SourceError { path: self.path.clone(), problem: problem.into() }
    }
}

/// Why a file or directory is not to be trusted, if so.
fn insecure(metadata: &fs::Metadata, owner: u32) -> Option<String> {
    if metadata.uid() != owner {
        return Some(format!("belongs to user {}, must belong to user {owner}", metadata.uid()));
    }
    let mode = metadata.mode() & 0o7777;
    (mode & 0o022 != 0).then(|| format!("mode {mode:04o} lets others write, must be {:04o}", mode & !0o022))
}

fn read(path: &Path, owner: u32) -> Result<PodInfo, String> {
    let metadata = fs::symlink_metadata(path).map_err(|error| error.to_string())?;
    if !metadata.is_file() {
        return Err("not a regular file".into());
    }
    if let Some(problem) = insecure(&metadata, owner) {
        return Err(problem);
    }
    let text = fs::read_to_string(path).map_err(|error| error.to_string())?;
    let pod: PodInfo = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    let required = [
        ("uid", &pod.uid),
        ("name", &pod.name),
        ("namespace", &pod.namespace),
        ("service_account", &pod.service_account),
    ];
    for (field, value) in required {
        if value.is_empty() {
            return Err(format!("field `{field}` is empty, must name the pod"));
        }
    }
    for (field, value) in [("netns", &pod.netns), ("cgroup", &pod.cgroup)] {
        if !value.is_absolute() {
            return Err(format!("field `{field}` is `{}`, must be an absolute path", value.display()));
        }
    }
    if pod.dns_search.as_ref().is_some_and(|list| list.len() > MAX_SEARCH) {
        return Err(format!(
            "field `dns_search` has more than {MAX_SEARCH} domains, the most that pods have"
        ));
    }
    if pod.probe_ports.contains(&0) {
        return Err("field `probe_ports` has 0, must be ports from 1 to 65535".into());
    }
    Ok(pod)
}

impl PodSource for DirectorySource {
    fn snapshot(&self) -> Result<PodSnapshot, SourceError> {
        let metadata = fs::metadata(&self.path)
            .map_err(|error| self.error(format!("{error}; create it, owned by root, mode 0755")))?;
        if let Some(problem) = insecure(&metadata, self.owner) {
            return Err(self.error(problem));
        }
        let mut snapshot = PodSnapshot::default();
        let mut paths: Vec<PathBuf> = fs::read_dir(&self.path)
            .map_err(|error| self.error(error.to_string()))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
            .collect();
        paths.sort();
        let mut uids = HashSet::with_capacity(paths.len());
        for path in paths {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            match read(&path, self.owner) {
                Ok(pod) if uids.insert(pod.uid.clone()) => snapshot.pods.push(pod),
                Ok(pod) => {
                    let problem = format!("uid `{}` is already taken by another file", pod.uid);
                    snapshot.rejected.push((name, problem));
                }
                // Removed between the listing and the reading.
                Err(_) if !path.exists() => {}
                Err(problem) => snapshot.rejected.push((name, problem)),
            }
        }
        Ok(snapshot)
    }

    fn watch(&self, changed: Arc<dyn Fn() + Send + Sync>) -> Result<WatchGuard, SourceError> {
        let heed = move |event: notify::Result<notify::Event>| {
            // Taking a snapshot makes access events: heeding them, the reconciler would chase itself.
            if !event.is_ok_and(|event| event.kind.is_access()) {
                changed();
            }
        };
        let mut watcher = notify::recommended_watcher(heed)
            .map_err(|error| self.error(format!("cannot watch: {error}")))?;
        watcher
            .watch(&self.path, RecursiveMode::NonRecursive)
            .map_err(|error| self.error(format!("cannot watch: {error}")))?;
        Ok(WatchGuard::new(watcher))
    }
}

#[cfg(test)]
mod tests;
