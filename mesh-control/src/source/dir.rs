//! A directory of Kubernetes-shaped YAML files, watched: the whole mesh without a cluster.
//!
//! Every file below the directory that ends in `.yaml`, `.yml` or `.json` is read; hidden files and directories
//! are skipped. Changes arrive from the kernel through `notify`, and every ten seconds all files are looked at
//! again, so that a lost event or a network file system only costs time.
//!
//! A file that is renamed into place is whole and is read at once. One that is being written is read when it rests.
//! What vanishes from a file may be on its way into another: it stays in force until the directory has rested.

mod loader;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{RecursiveMode, Watcher};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};
use tracing::warn;

use super::{Source, SourceError, State, report};
pub use loader::{Loader, Remembered};

/// What is being written is read once the directory was quiet for this long, so that half-written files are rarely
/// seen; and so is what follows another reading closely, so that a hundred renamed files are not a hundred readings.
const QUIET: Duration = Duration::from_millis(20);
/// Objects that vanish are let go once the directory was quiet for this long.
const REST: Duration = Duration::from_millis(100);
/// A directory that is never quiet is read this often.
const BUSY: Duration = Duration::from_millis(500);
/// All files are looked at again this often without any event.
const RESCAN: Duration = Duration::from_secs(10);
/// The same where the kernel cannot tell of changes.
const RESCAN_UNWATCHED: Duration = Duration::from_secs(1);

/// The directory source.
#[derive(Debug)]
pub struct DirectorySource {
    /// The directory.
    pub path: PathBuf,
    /// Namespace of the mesh settings.
    pub root_namespace: String,
    /// File that keeps the last good versions over a restart.
    pub memory: Option<PathBuf>,
}

impl DirectorySource {
    fn recall(&self) -> Vec<Remembered> {
        let Some(path) = &self.memory else { return Vec::new() };
        let read = match std::fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(io::Error::from),
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Vec::new(),
            Err(cause) => Err(cause),
        };
        read.inspect_err(|cause| warn!(path = %path.display(), %cause, "last good versions cannot be read"))
            .unwrap_or_default()
    }

    fn remember(&self, known: &mut Vec<Remembered>, loader: &Loader) {
        let now = loader.remembered();
        if let Some(path) = self.memory.as_ref().filter(|_| now != *known) {
            match crate::files::write_json(path, &now) {
                Ok(()) => *known = now,
                Err(cause) => {
                    warn!(path = %path.display(), %cause, "last good versions are not kept over a restart")
                }
            }
        }
    }
}

impl Source for DirectorySource {
    async fn run(self, out: watch::Sender<Arc<State>>) -> Result<(), SourceError> {
        let unreadable = |cause| SourceError::Unreadable { path: self.path.display().to_string(), cause };
        let mut loader = Loader::new(&self.root_namespace);
        let mut known = self.recall();
        loader.restore(&known);
        let (events, mut changed) = watch::channel(Change::default());
        // Kept here as well: without a watcher nothing ever changes, which is not the end.
        let events = Arc::new(events);
        let watcher = watch_directory(&self.path, Arc::clone(&events));
        let rescan = if watcher.is_some() { RESCAN } else { RESCAN_UNWATCHED };
        let mut first = true;
        let mut rested = true;
        loop {
            let path = self.path.clone();
            let files = match tokio::task::spawn_blocking(move || read_files(&path)).await {
                Ok(files) => files,
                Err(join) => Err(io::Error::other(join)),
            };
            match files {
                Ok(files) => {
                    let before = out.borrow().clone();
                    let loaded = if rested { Ok(loader.load(files)) } else { loader.load_unless_lost(files) };
                    let Ok(loaded) = loaded else {
                        settle(&mut changed, REST).await;
                        rested = true;
                        continue;
                    };
                    if let Some(state) = loaded {
                        report(&before, &state);
                        self.remember(&mut known, &loader);
                        out.send_replace(Arc::new(state));
                    }
                }
                Err(cause) if first => return Err(unreadable(cause)),
                // An unmounted or replaced directory must not empty the mesh: what is in force stays.
                Err(cause) => {
                    warn!(path = %self.path.display(), %cause, "the source directory cannot be read")
                }
            }
            first = false;
            rested = false;
            let read_at = Instant::now();
            tokio::select! {
                () = out.closed() => return Ok(()),
                () = sleep(rescan) => {}
                _ = changed.changed() => {
                    let whole = changed.borrow_and_update().is_whole();
                    if !whole || read_at.elapsed() < QUIET {
                        settle(&mut changed, QUIET).await;
                    }
                }
            }
        }
    }
}

/// Waits until no event came for a while.
async fn settle(changed: &mut watch::Receiver<Change>, quiet: Duration) {
    let latest = Instant::now() + BUSY;
    while Instant::now() < latest {
        let quiet = (Instant::now() + quiet).min(latest);
        if !matches!(timeout_at(quiet, changed.changed()).await, Ok(Ok(()))) {
            return;
        }
    }
}

/// What is known of the directory's changes.
#[derive(Debug, Clone, Copy, Default)]
struct Change {
    /// When something was last written in place: more of it may be to come.
    writing: Option<std::time::Instant>,
}

impl Change {
    /// Whether every file is likely to be as its writer wants it.
    fn is_whole(self) -> bool {
        self.writing.is_none_or(|at| at.elapsed() >= QUIET)
    }
}

/// Whether an event is a name that came, went or changed; anything else may be a part of a change.
fn is_rename(kind: notify::EventKind) -> bool {
    use notify::EventKind::{Modify, Remove};
    matches!(kind, Remove(_) | Modify(notify::event::ModifyKind::Name(_)))
}

fn watch_directory(path: &Path, events: Arc<watch::Sender<Change>>) -> Option<notify::RecommendedWatcher> {
    let handler = move |event: notify::Result<notify::Event>| {
        let kind = event.as_ref().map_or(notify::EventKind::Any, |event| event.kind);
        // Reading the files must not trigger the next reading.
        if matches!(kind, notify::EventKind::Access(_)) {
            return;
        }
        events.send_modify(|change| {
            if !is_rename(kind) {
                change.writing = Some(std::time::Instant::now());
            }
        });
    };
    let watcher = notify::recommended_watcher(handler)
        .and_then(|mut w| w.watch(path, RecursiveMode::Recursive).map(|()| w));
    watcher
        .inspect_err(|cause| {
            warn!(path = %path.display(), %cause, "no change events for the source directory; looking every second");
        })
        .ok()
}

/// Relative path to content, or why it cannot be read.
pub type Files = BTreeMap<String, Result<String, String>>;

/// Reads all files of a directory tree. A file that vanishes meanwhile is not there; one that cannot be read is
/// an entry that says why.
///
/// # Errors
/// The directory itself cannot be listed.
pub fn read_files(root: &Path) -> io::Result<Files> {
    let mut files = Files::new();
    let mut pending = vec![root.to_owned()];
    while let Some(directory) = pending.pop() {
        let entries = match std::fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(cause) if directory == root => return Err(cause),
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => continue,
            Err(cause) => {
                files.insert(relative(root, &directory), Err(cause.to_string()));
                continue;
            }
        };
        for entry in entries {
            let path = entry?.path();
            let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            // metadata() follows links: a mounted ConfigMap is made of them.
            let Ok(metadata) = std::fs::metadata(&path) else { continue };
            if name.starts_with('.') {
                continue;
            }
            if metadata.is_dir() {
                pending.push(path);
            } else if [".yaml", ".yml", ".json"].iter().any(|e| name.ends_with(e)) {
                match std::fs::read(&path) {
                    Ok(bytes) => {
                        let text = String::from_utf8(bytes)
                            .map_err(|e| format!("is not UTF-8 (byte {})", e.utf8_error().valid_up_to()));
                        files.insert(relative(root, &path), text);
                    }
                    Err(cause) if cause.kind() == io::ErrorKind::NotFound => {}
                    Err(cause) => drop(files.insert(relative(root, &path), Err(cause.to_string()))),
                }
            }
        }
    }
    Ok(files)
}

fn relative(root: &Path, path: &Path) -> String {
    path.strip_prefix(root).unwrap_or(path).display().to_string()
}
