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
        let known = std::fs::read_to_string(archive.with_extension("names")).unwrap_or_default();
        if has_all(&there, &known) {
            continue;
        }
        ctr(layout, name, &["images", "import", &archive.to_string_lossy()])?;
        imported += 1;
    }
    Ok(imported)
}

/// Whether a node's list (`ctr images ls`: name, type, digest) has every line, of a name and its digest, of an archive's.
/// One image may have names in several archives.
fn has_all(list: &str, known: &str) -> bool {
    let has = |line: &str| {
        let wanted: Vec<&str> = line.split(' ').collect();
        list.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).any(|words| {
            words.first() == wanted.first()
                && words.get(2).is_some_and(|digest| wanted.last() == Some(digest))
        })
    };
    !known.is_empty() && known.lines().all(has)
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

#[cfg(test)]
mod tests {
    use super::has_all;

    #[test]
    fn an_image_is_on_a_node_once_it_is_there_under_each_of_its_names() {
        let list = "REF TYPE DIGEST SIZE\na/x:1 application/manifest sha256:11 5 MiB\nb/x:1 application/manifest sha256:22 5 MiB\n";
        for (known, there) in [
            ("a/x:1 sha256:11\n", true),
            ("a/x:1 sha256:11\nb/x:1 sha256:22\n", true),
            // The image is there under another name, or the name is another image's.
            ("a/x:2 sha256:11\n", false),
            ("a/x:1 sha256:22\n", false),
            ("", false),
        ] {
            assert_eq!(has_all(list, known), there, "{known}");
        }
    }
}
