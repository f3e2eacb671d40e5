//! Where things are: the clone, the cache outside of it, and the directories that cargo builds into.

use anyhow::{Context, Result};
use std::env;
use std::path::PathBuf;

/// The root of the workspace: of the clone that cargo runs this for. The binary may be another clone's, since all of them
/// build into one cache.
pub(crate) fn root() -> PathBuf {
    let here = env::var_os("CARGO_MANIFEST_DIR").map_or(env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    here.parent().map_or(here.clone(), PathBuf::from)
}

/// `UM_CACHE`, by default `~/.cache/undermesh`: tools and build output that a second clone can use again.
pub(crate) fn cache() -> Result<PathBuf> {
    if let Some(dir) = env::var_os("UM_CACHE").filter(|dir| !dir.is_empty()) {
        return Ok(PathBuf::from(dir));
    }
    let home =
        env::var_os("HOME").context("neither UM_CACHE nor HOME is set: set UM_CACHE to a directory")?;
    Ok(PathBuf::from(home).join(".cache/undermesh"))
}

/// Where the workspace is built: `CARGO_TARGET_DIR`, by default `target` in the cache.
pub(crate) fn target() -> Result<PathBuf> {
    match env::var_os("CARGO_TARGET_DIR").filter(|dir| !dir.is_empty()) {
        Some(dir) => Ok(root().join(dir)),
        None => Ok(cache()?.join("target")),
    }
}

/// Where the kernel programs are built: another compiler, so another directory.
pub(crate) fn bpf_target() -> Result<PathBuf> {
    Ok(target()?.join("kernel-programs"))
}

/// Programs that setup builds (bpf-linker).
pub(crate) fn tools() -> Result<PathBuf> {
    Ok(cache()?.join("tools"))
}

/// `PATH` with the cached tools in front.
pub(crate) fn path_with_tools() -> Result<std::ffi::OsString> {
    let old = env::var_os("PATH").unwrap_or_default();
    let mut dirs = vec![tools()?.join("bin")];
    dirs.extend(env::split_paths(&old));
    // Debian keeps these out of a plain user's PATH, and PostgreSQL's server out of everybody's.
    for dir in ["/usr/local/sbin", "/usr/sbin", "/sbin"] {
        if !dirs.iter().any(|known| known.as_os_str() == dir) {
            dirs.push(dir.into());
        }
    }
    env::join_paths(dirs).context("a directory in PATH contains a colon")
}
