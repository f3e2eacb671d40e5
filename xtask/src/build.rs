//! The build: kernel programs and the map's page first, then the workspace, which embeds them.

use crate::{bpf, map, paths, run};
use anyhow::{Result, bail};
use std::path::PathBuf;
use std::process::Command;

/// What a build produced.
pub(crate) struct Built {
    /// The kernel programs, one object file.
    pub(crate) object: PathBuf,
    /// The directory of the binaries.
    pub(crate) bin: PathBuf,
}

/// A cargo command for the workspace, with the target directory, the object and the map's page set.
pub(crate) fn cargo(object: &std::path::Path) -> Result<Command> {
    let mut cargo = Command::new("cargo");
    cargo
        .current_dir(paths::root())
        .env("CARGO_TARGET_DIR", paths::target()?)
        .env("UM_BPF_OBJECT", object)
        .env("UM_MAP", map::build()?)
        .env("PATH", paths::path_with_tools()?);
    Ok(cargo)
}

/// Builds everything; `release` selects the optimised profile.
pub(crate) fn run(release: bool) -> Result<Built> {
    profile(if release { "release" } else { "dev" })
}

/// Builds everything in a cargo profile.
pub(crate) fn profile(profile: &str) -> Result<Built> {
    needs_compilers()?;
    let object = bpf::build()?;
    run::step(&format!("workspace ({profile})"));
    run::check(cargo(&object)?.args([
        "build",
        "--workspace",
        "--bins",
        "--exclude",
        "xtask",
        "--profile",
        profile,
    ]))?;
    let dir = if profile == "dev" { "debug" } else { profile };
    Ok(Built { object, bin: paths::target()?.join(dir) })
}

/// The agent alone, optimised, around the kernel programs of an earlier build.
pub(crate) fn optimised_agent(built: &Built) -> Result<PathBuf> {
    run::step("agent (release)");
    run::check(cargo(&built.object)?.args([
        "build",
        "--package",
        "mesh-node",
        "--bin",
        "mesh-node",
        "--release",
    ]))?;
    Ok(paths::target()?.join("release/mesh-node"))
}

/// Says what is missing before cargo fails for its lack.
pub(crate) fn needs_compilers() -> Result<()> {
    for (program, package) in [("cc", "gcc"), ("cmake", "cmake")] {
        if !run::have(program) {
            bail!(
                "{program} is missing (the TLS library needs it): run `cargo xtask setup`, or install {package}"
            );
        }
    }
    Ok(())
}
