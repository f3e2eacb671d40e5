//! A cluster's directories in every cgroup hierarchy: version 2, and the ones of version 1 where a machine has them.
//!
//! Every process of a cluster is somewhere below its directory in the version 2 hierarchy, so that one write ends all
//! of them. A node lives in a cgroup namespace whose root is its own directory in each hierarchy: it sees what a
//! machine of its own would see, and programs that its agent attaches to "the root" reach no further.

use crate::bed::cgroup;
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hierarchy {
    /// Where it is mounted.
    pub(super) at: PathBuf,
    /// `cgroup` or `cgroup2`.
    pub(super) kind: String,
    /// What `mount` has to be told to mount the same one again: its controllers or its name.
    pub(super) options: String,
}

/// Every hierarchy of this mount namespace, from `/proc/self/mounts`.
pub(super) fn mounted(table: &str) -> Vec<Hierarchy> {
    let mut found = Vec::new();
    for line in table.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let [_, at, kind @ ("cgroup" | "cgroup2"), options, ..] = fields.as_slice() else { continue };
        // What the mount itself does (read-only, relatime) is said by others; what is left names the hierarchy.
        let options: Vec<&str> = match *kind {
            "cgroup" => options
                .split(',')
                .filter(|option| !matches!(*option, "rw" | "ro" | "nosuid" | "nodev" | "noexec" | "relatime"))
                .filter(|option| !option.starts_with("release_agent"))
                .collect(),
            _ => Vec::new(),
        };
        found.push(Hierarchy { at: (*at).into(), kind: (*kind).to_owned(), options: options.join(",") });
    }
    found
}

fn here() -> Result<Vec<Hierarchy>> {
    let table = fs::read_to_string("/proc/self/mounts").context("cannot read /proc/self/mounts")?;
    Ok(mounted(&table))
}

/// Makes a directory (relative to each hierarchy's root) that processes can join.
pub(super) fn create(below: &str) -> Result<()> {
    for hierarchy in here()? {
        let mut dir = hierarchy.at.clone();
        for part in Path::new(below).components() {
            let parent = dir.clone();
            dir.push(part);
            if hierarchy.kind == "cgroup2" {
                delegate(&parent);
            }
            fs::create_dir_all(&dir).with_context(|| format!("cannot make the cgroup {}", dir.display()))?;
            // A cpuset without CPUs takes no process.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if let Ok(inherited) = fs::read(parent.join(file)) {
                    let path = dir.join(file);
                    if hierarchy.kind == "cgroup" {
                        fs::write(&path, inherited)
                            .with_context(|| format!("cannot write {}", path.display()))?;
                    }
                }
            }
        }
    }
    Ok(())
}

/// Lets children of a version 2 directory use what controllers it has; a hybrid's has none.
fn delegate(dir: &Path) {
    for controller in
        fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default().split_whitespace()
    {
        // A controller may be refused (threads that run in real time); the kubelet then says which it misses.
        let _ = fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"));
    }
}

/// Moves the calling process into a directory of every hierarchy.
pub(super) fn join(below: &str) -> Result<()> {
    for hierarchy in here()? {
        let procs = hierarchy.at.join(below).join("cgroup.procs");
        fs::write(&procs, "0").with_context(|| format!("cannot join {}", procs.display()))?;
    }
    Ok(())
}

/// Whether a process is left below a directory.
pub(super) fn populated(below: &str) -> Result<bool> {
    let events = cgroup::mount()?.join(below).join("cgroup.events");
    Ok(fs::read_to_string(events).unwrap_or_default().contains("populated 1"))
}

/// Ends everything below a directory and removes it from every hierarchy.
pub(super) fn remove(below: &str) -> Result<()> {
    cgroup::remove(&cgroup::mount()?.join(below))?;
    for hierarchy in here()?.iter().filter(|hierarchy| hierarchy.kind == "cgroup") {
        let dir = hierarchy.at.join(below);
        let end = Instant::now() + Duration::from_secs(5);
        // The kernel lets go of what ended processes used a moment after their end.
        while let Err(error) = remove_dirs(&dir) {
            if Instant::now() > end {
                return Err(error).with_context(|| format!("cannot remove the cgroup {}", dir.display()));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    Ok(())
}

fn remove_dirs(dir: &Path) -> std::io::Result<()> {
    let Ok(entries) = fs::read_dir(dir) else { return Ok(()) };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_dirs(&entry.path())?;
        }
    }
    fs::remove_dir(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_of_both_versions_are_read_with_what_names_them() {
        let table = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
             cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,nosuid,relatime,cpu,cpuacct 0 0\n\
             cgroup /sys/fs/cgroup/systemd cgroup rw,relatime,xattr,release_agent=/lib/x,name=systemd 0 0\n\
             cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime,nsdelegate 0 0\n";
        let named: Vec<_> = mounted(table)
            .into_iter()
            .map(|h| format!("{} {} {}", h.at.display(), h.kind, h.options))
            .collect();
        assert_eq!(
            named,
            [
                "/sys/fs/cgroup/cpu,cpuacct cgroup cpu,cpuacct",
                "/sys/fs/cgroup/systemd cgroup xattr,name=systemd",
                "/sys/fs/cgroup/unified cgroup2 ",
            ]
        );
    }
}
