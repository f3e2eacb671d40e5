//! The file of revocation lists: read at start, and again two seconds after it changed.

use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use mesh_core::tls::Revocations;
use tokio::sync::Notify;

use crate::proxy::worker::{Command, Worker};

/// Also how long a file must have been left alone: writers are seldom atomic.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Follows `path` for ever, and tells the workers and the fast path of changes. A file that cannot be used leaves the
/// lists in force.
pub async fn follow(path: &Path, revocations: &Revocations, workers: Rc<Vec<Worker>>, fast_path: Rc<Notify>) {
    let mut loaded = None;
    let mut seen = None;
    loop {
        let modified = modified(path);
        if modified != loaded && modified == seen {
            loaded = modified;
            load(path, revocations);
            workers.iter().for_each(|w| w.tell(Command::RecheckPeers));
            fast_path.notify_one();
        }
        seen = modified;
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Loads the file once, for the start.
pub fn load(path: &Path, revocations: &Revocations) {
    let read = std::fs::read(path).map_err(|e| e.to_string());
    match read.and_then(|pem| revocations.load_pem(&pem).map_err(|e| e.to_string())) {
        Ok(lists) => tracing::info!(path = %path.display(), lists, "revocation lists loaded"),
        Err(error) => {
            tracing::error!(path = %path.display(), %error, "revocation lists unchanged");
        }
    }
}

fn modified(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path).and_then(|m| m.modified()).ok()
}
