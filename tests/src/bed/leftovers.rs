//! What runs leave behind when they are killed, found by name and removed.
//!
//! Every name that a testbed makes starts with `um-<pid>-`; kernel tests use `um-` names with their process id
//! somewhere. A name is dead when none of its numbers is the id of a living process.

use super::{cgroup, netns, run};
use anyhow::{Context, Result};
use std::path::Path;

/// bpffs directory below which agents pin.
pub const PINS: &str = "/sys/fs/bpf/undermesh";

/// Removes everything of runs whose process is gone, and says what.
///
/// # Errors
/// Something could not be removed.
pub fn clean() -> Result<()> {
    let removed = remove(&dead)? + crate::cluster::life::remove_dead()?;
    println!("{removed} leftovers removed");
    Ok(())
}

/// As [`clean`], without a word if there is nothing.
///
/// # Errors
/// As [`clean`].
pub fn remove_dead() -> Result<()> {
    let removed = remove(&dead)? + crate::cluster::life::remove_dead()?;
    if removed > 0 {
        eprintln!("removed {removed} leftovers of runs that were killed");
    }
    Ok(())
}

/// Removes everything of this run, for an end in a hurry.
///
/// # Errors
/// Something could not be removed.
pub fn remove_own() -> Result<()> {
    let own = format!("um-{}-", std::process::id());
    remove(&|name: &str| name.starts_with(&own)).map(|_| ())
}

/// Whether a name belongs to a run that is gone.
fn dead(name: &str) -> bool {
    let mut ids = name
        .split(['-', '_', '.'])
        // Tests of the kernel programs are `um-k1234-0`.
        .filter_map(|part| part.strip_prefix('k').unwrap_or(part).parse::<u32>().ok())
        .filter(|id| *id > 99)
        .peekable();
    name.starts_with("um-")
        && ids.peek().is_some()
        && !ids.any(|id| Path::new(&format!("/proc/{id}")).exists())
}

fn remove(gone: &dyn Fn(&str) -> bool) -> Result<usize> {
    let mut removed = 0;
    if let Ok(mount) = cgroup::mount() {
        for name in names(&mount, gone) {
            cgroup::remove(&mount.join(&name))?;
            removed += 1;
        }
    }
    for name in names(Path::new(netns::DIR), gone) {
        netns::command("ip", ["netns", "del", &name])?;
        removed += 1;
    }
    for parent in [PINS, "/sys/fs/bpf", run::RUNS] {
        for name in names(Path::new(parent), gone) {
            let path = Path::new(parent).join(&name);
            std::fs::remove_dir_all(&path).with_context(|| format!("cannot remove {}", path.display()))?;
            removed += 1;
        }
    }
    Ok(removed)
}

fn names(dir: &Path, gone: &dyn Fn(&str) -> bool) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).filter(|name| gone(name)).collect()
}

#[cfg(test)]
mod tests {
    use super::dead;

    #[test]
    fn a_name_is_dead_only_when_its_process_is_gone() {
        assert!(!dead(&format!("um-{}-0-a", std::process::id())));
        // No process id is this large: the kernel's limit is 2^22.
        assert!(dead("um-99999999-0-a"));
        assert!(dead("um-k99999999-0-br"));
        assert!(!dead(&format!("um-k{}-0-br", std::process::id())));
        assert!(!dead("um-without-a-number"));
        assert!(!dead("somebody-99999999-else"));
    }
}
