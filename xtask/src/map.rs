//! The map that mesh-control serves: npm gets what its lock names into the cache, esbuild makes one script of it.

use crate::{paths, run};
use anyhow::{Context, Result, bail};
use sha2::{Digest as _, Sha256};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where the sources are, and what of them makes the page.
const SOURCE: &str = "mesh-control/map";
/// What goes into the page as it is.
const PAGE: [&str; 2] = ["index.html", "map.css"];

/// The directory in the cache that npm works in: packages, sources, the driver of the browser test.
pub(crate) fn work() -> Result<PathBuf> {
    Ok(paths::cache()?.join("map/work"))
}

/// All files below a directory, by their path in it.
fn files(root: &Path, below: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    let directory = root.join(below);
    for entry in
        std::fs::read_dir(&directory).with_context(|| format!("cannot read {}", directory.display()))?
    {
        let entry = entry.context("cannot read a directory")?;
        let path = below.join(entry.file_name());
        if path.as_os_str() == "node_modules" {
            continue;
        }
        if entry.file_type().context("cannot look at a file")?.is_dir() {
            files(root, &path, found)?;
        } else {
            found.push(path);
        }
    }
    Ok(())
}

fn hash(root: &Path, files: &[PathBuf]) -> Result<String> {
    let mut hash = Sha256::new();
    for file in files {
        let text =
            std::fs::read(root.join(file)).with_context(|| format!("cannot read {}", file.display()))?;
        hash.update(file.to_string_lossy().as_bytes());
        hash.update([0]);
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(&text);
    }
    Ok(hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect())
}

/// Builds the page unless it is there, and gives its directory.
pub(crate) fn build() -> Result<PathBuf> {
    let source = paths::root().join(SOURCE);
    let mut all = Vec::new();
    files(&source, Path::new(""), &mut all)?;
    all.sort();
    let page = paths::cache()?.join("map").join(hash(&source, &all)?);
    if page.join("map.js").is_file() && work()?.join("node_modules").is_dir() {
        return Ok(page);
    }
    if !run::have("npm") || !run::have("node") {
        bail!("npm or node is missing (the map is bundled with them): run `cargo xtask setup`");
    }
    run::step("the map");
    let work = work()?;
    for file in &all {
        let to = work.join(file);
        std::fs::create_dir_all(to.parent().unwrap_or(&work)).context("cannot make a directory")?;
        std::fs::copy(source.join(file), &to).with_context(|| format!("cannot copy {}", file.display()))?;
    }
    let mut npm = Command::new("npm");
    npm.current_dir(&work).args(["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]);
    run::check(&mut npm)?;
    // Under another name until it is whole.
    let half = page.with_extension("half");
    std::fs::create_dir_all(&half).context("cannot make a directory")?;
    let script = half.join("map.js");
    let mut esbuild = Command::new(work.join("node_modules/.bin/esbuild"));
    esbuild.current_dir(&work).args([
        "src/map.js",
        "--bundle",
        "--minify",
        "--format=iife",
        "--target=es2022",
    ]);
    esbuild.args(["--legal-comments=eof", "--log-level=warning"]);
    run::check(esbuild.arg(format!("--outfile={}", script.display())))?;
    for name in PAGE {
        std::fs::copy(source.join(name), half.join(name)).with_context(|| format!("cannot copy {name}"))?;
    }
    if page.is_dir() {
        std::fs::remove_dir_all(&page).context("cannot remove an unfinished page")?;
    }
    std::fs::rename(&half, &page).context("cannot put the page in place")?;
    Ok(page)
}
