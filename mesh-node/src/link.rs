//! Sockets that agents of one node take over from each other: a symbolic link in the run directory to the socket of the
//! newest agent, which has a path of its own.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::UnixStream;

/// How often it is looked after that somebody answers.
pub const LOOKED_AFTER: Duration = Duration::from_secs(1);

/// A link and where this agent has it point.
#[derive(Clone, Debug)]
pub struct Link {
    run_dir: PathBuf,
    name: &'static str,
    /// Below the run directory.
    own: PathBuf,
}

impl Link {
    /// The link `name` in the run directory, to this agent's socket `agents/PID.EXTENSION` there.
    #[must_use]
    pub fn new(run_dir: &Path, name: &'static str, extension: &str) -> Self {
        let own = Path::new("agents").join(format!("{}.{extension}", std::process::id()));
        Self { run_dir: run_dir.to_owned(), name, own }
    }

    /// This agent's own socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.run_dir.join(&self.own)
    }

    fn path(&self) -> PathBuf {
        self.run_dir.join(self.name)
    }

    fn is_own(&self) -> bool {
        std::fs::read_link(self.path()).is_ok_and(|to| to == self.own)
    }

    /// Points it at this agent's socket.
    ///
    /// # Errors
    /// The link cannot be made.
    pub fn take(&self) -> io::Result<()> {
        let temporary = self.run_dir.join(format!(".{}.{}", self.name, std::process::id()));
        remove(&temporary)?;
        std::os::unix::fs::symlink(&self.own, &temporary)?;
        std::fs::rename(&temporary, self.path())
    }

    /// Removes it, unless it is another agent's by now.
    pub fn leave(&self) {
        if self.is_own() {
            // Whoever looks for an agent there finds that none answers.
            let _ = remove(&self.path());
        }
    }

    /// Points it at this agent again once nobody answers where it points: of two agents that start at the same time, the
    /// one that is to leave may be the last to take it. Never returns.
    pub async fn keep(&self, every: Duration) {
        let path = self.path();
        loop {
            tokio::time::sleep(every).await;
            if self.is_own() || UnixStream::connect(&path).await.is_ok() {
                continue;
            }
            let name = self.name;
            match self.take() {
                Ok(()) => tracing::info!("nobody answered at {name}: this agent does now"),
                Err(error) => tracing::warn!(%error, "cannot point {name} at this agent"),
            }
        }
    }
}

/// Removes a file that may not be there.
///
/// # Errors
/// It stays.
pub fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    const NAME: &str = "a.sock";

    fn points_at(link: &Link) -> PathBuf {
        std::fs::read_link(link.path()).unwrap()
    }

    #[tokio::test]
    async fn an_agent_takes_a_socket_once_the_one_that_took_it_last_has_left() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("agents")).unwrap();
        let link = Link::new(dir.path(), NAME, "sock");
        link.take().unwrap();
        // Another one that started at the same time takes it, and serves.
        let other = UnixListener::bind(dir.path().join("agents/1.sock")).unwrap();
        std::fs::remove_file(link.path()).unwrap();
        std::os::unix::fs::symlink("agents/1.sock", link.path()).unwrap();
        let looked = async |for_ms| {
            let keep = link.keep(Duration::from_millis(5));
            let _ = tokio::time::timeout(Duration::from_millis(for_ms), keep).await;
        };
        looked(100).await;
        assert_eq!(points_at(&link), Path::new("agents/1.sock"), "it was taken from one who serves");
        link.leave();
        assert_eq!(points_at(&link), Path::new("agents/1.sock"), "it is another's to remove");
        // Its file stays when it leaves.
        drop(other);
        looked(100).await;
        assert_eq!(points_at(&link), link.own);
        link.leave();
        assert!(std::fs::symlink_metadata(link.path()).is_err());
    }
}
