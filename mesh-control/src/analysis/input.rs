//! Where the objects of an analysis come from: files, or a cluster that is read once.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kube::Client;
use tokio::sync::watch;

use crate::model::{Object, ObjectRef};
use crate::source::dir::{Files, Loader, read_files};
use crate::source::kube::KubernetesSource;
use crate::source::{Source, SourceError, State};

/// A cluster is read within this, or not at all.
const PATIENCE: Duration = Duration::from_secs(30);

/// Objects of files, and where each is.
#[derive(Debug)]
pub struct Read {
    /// The objects, and what is wrong with the others.
    pub state: State,
    /// How many files there were.
    pub files: usize,
    loader: Loader,
}

impl Read {
    /// Every object that can be used.
    pub fn objects(&self) -> impl Iterator<Item = &Object> {
        self.loader.objects()
    }

    /// File and line of an object.
    #[must_use]
    pub fn place(&self, object: &ObjectRef) -> Option<String> {
        self.loader.place(object)
    }
}

/// Reads files, and directories with all that is below them. A name in a message is as it was given here.
///
/// # Errors
/// One of them cannot be read.
pub fn read_paths(paths: &[impl AsRef<Path>], root_namespace: &str) -> Result<Read, SourceError> {
    let mut files = Files::new();
    for path in paths.iter().map(AsRef::as_ref) {
        let unreadable = |cause| SourceError::Unreadable { path: path.display().to_string(), cause };
        if path.is_dir() {
            // A directory alone is what is looked at: names below it say enough.
            let below = |name: String| match paths.len() {
                1 => name,
                _ => path.join(name).display().to_string(),
            };
            files.extend(
                read_files(path).map_err(unreadable)?.into_iter().map(|(name, text)| (below(name), text)),
            );
        } else {
            let text = std::fs::read_to_string(path).map_err(unreadable)?;
            files.insert(path.display().to_string(), Ok(text));
        }
    }
    let number = files.len();
    let mut loader = Loader::new(root_namespace);
    let state = loader.load(files).unwrap_or_default();
    Ok(Read { state, files: number, loader })
}

/// Reads a cluster once, with the rights of whoever asks.
///
/// # Errors
/// Not all of it could be read in 30 seconds.
pub async fn read_cluster(client: Client, root_namespace: &str) -> Result<Arc<State>, SourceError> {
    let source =
        KubernetesSource { client, root_namespace: root_namespace.to_owned(), observed: Arc::default() };
    let (out, mut states) = watch::channel(Arc::<State>::default());
    let reading = tokio::spawn(source.run(out));
    let read = tokio::time::timeout(PATIENCE, states.wait_for(|state| state.synced)).await;
    let read = read.map(|state| state.map(|state| Arc::clone(&state)));
    reading.abort();
    let why = match read {
        Ok(Ok(state)) => return Ok(state),
        Ok(Err(_)) => "reading ended".to_owned(),
        Err(_) => {
            let missing = states.borrow().waiting.join("; ");
            format!("not all was read within {} s: {missing}", PATIENCE.as_secs())
        }
    };
    Err(SourceError::NotRead(why))
}
