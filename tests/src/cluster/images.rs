//! Bringing images into nodes, without a registry.

use super::layout::Layout;
use super::node;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Stdio;

/// Imports every archive of a directory into every node that does not have it.
///
/// # Errors
/// No cluster is up, a node does not run, or containerd refuses an archive.
pub fn load(layout: &Layout, images: &Path) -> Result<()> {
    let state = layout.state()?;
    let archives = archives(images)?;
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            state.nodes.iter().map(|name| (name, scope.spawn(|| import(layout, name, &archives)))).collect();
        for (name, thread) in threads {
            let Ok(result) = thread.join() else { bail!("importing images into {name} panicked") };
            let imported = result.with_context(|| format!("cannot bring the images to node {name}"))?;
            eprintln!("{name}: {imported} images imported, {} were there", archives.len() - imported);
        }
        Ok(())
    })
}

/// The archives of a directory, in the order of their names.
pub(super) fn archives(images: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(images).with_context(|| {
        format!("no images in {}: `cargo xtask cluster images` makes them", images.display())
    })?;
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|ext| ext == "tar"))
        .collect();
    found.sort();
    if found.is_empty() {
        bail!("no image archives (*.tar) in {}: `cargo xtask cluster images` makes them", images.display());
    }
    Ok(found)
}

/// Imports what one node does not have; returns how many that were.
pub(super) fn import(layout: &Layout, name: &str, archives: &[PathBuf]) -> Result<usize> {
    let there = ctr(layout, name, &["images", "ls"])?;
    let mut imported = 0;
    for archive in archives {
        // What the archive is stands beside it, so that it need not be read to see that it is there already.
        let digest = std::fs::read_to_string(archive.with_extension("digest")).unwrap_or_default();
        if !digest.trim().is_empty() && there.contains(digest.trim()) {
            continue;
        }
        ctr(layout, name, &["images", "import", &archive.to_string_lossy()])?;
        imported += 1;
    }
    Ok(imported)
}

fn ctr(layout: &Layout, name: &str, args: &[&str]) -> Result<String> {
    let out = node::inside(layout, name)?
        .args(["ctr", "--namespace", "k8s.io"])
        .args(args)
        .stdin(Stdio::null())
        .output()
        .context("cannot run ctr: is the package containerd installed?")?;
    if !out.status.success() {
        bail!("ctr {}: {}", args.join(" "), String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}
