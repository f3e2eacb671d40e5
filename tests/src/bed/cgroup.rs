//! cgroup2 directories: where each pod's and each agent's processes live, and how a testbed ends all of them at once.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The cgroup2 mount of this machine.
///
/// # Errors
/// There is none.
pub fn mount() -> Result<PathBuf> {
    let table = std::fs::read_to_string("/proc/self/mounts").context("cannot read /proc/self/mounts")?;
    for line in table.lines() {
        let mut fields = line.split(' ');
        if let (Some(_), Some(at), Some("cgroup2")) = (fields.next(), fields.next(), fields.next()) {
            return Ok(PathBuf::from(at));
        }
    }
    bail!("no cgroup2 is mounted: run `cargo xtask setup`, or mount one with `mount -t cgroup2 none DIR`")
}

/// A directory with everything below it; on drop its processes are killed and it is removed.
#[derive(Debug)]
pub struct Tree {
    path: PathBuf,
}

impl Tree {
    /// Makes a directory at the top of the cgroup2 mount.
    ///
    /// # Errors
    /// No mount, or no permission.
    pub fn create(name: &str) -> Result<Self> {
        let path = mount()?.join(name);
        std::fs::create_dir_all(&path).with_context(|| {
            format!("cannot make the cgroup {}: is cgroup2 writable here?", path.display())
        })?;
        Ok(Self { path })
    }

    /// Makes a directory below.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn child(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        std::fs::create_dir_all(&path)
            .with_context(|| format!("cannot make the cgroup {}", path.display()))?;
        Ok(path)
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            eprintln!("warning: {error:#}");
        }
    }
}

/// Kills everything below a cgroup and removes it.
///
/// # Errors
/// Processes that will not die within ten seconds.
pub fn remove(path: &Path) -> Result<()> {
    if !path.is_dir() {
        return Ok(());
    }
    let _ = std::fs::write(path.join("cgroup.kill"), "1");
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let events = std::fs::read_to_string(path.join("cgroup.events")).unwrap_or_default();
        if !events.contains("populated 1") {
            break;
        }
        if Instant::now() > end {
            bail!("processes in {} do not end", path.display());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    remove_dirs(path).with_context(|| format!("cannot remove the cgroup {}", path.display()))
}

fn remove_dirs(path: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_dirs(&entry.path())?;
        }
    }
    std::fs::remove_dir(path)
}
