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
    let mut cargo = cargo(&object)?;
    cargo.args(["build", "--workspace", "--bins", "--exclude", "xtask", "--profile", profile]);
    let dir = match profile {
        "dev" => "debug".to_owned(),
        "dist" => format!("{}/dist", make_static(&mut cargo)?),
        other => other.to_owned(),
    };
    run::check(&mut cargo)?;
    Ok(Built { object, bin: paths::target()?.join(dir) })
}

/// What is shipped needs nothing of the machine that it comes to: nodes run the CNI plugin outside of its image, with
/// whatever C library they have. Returns the target, which has to be named so that macros are not made static, too.
fn make_static(cargo: &mut Command) -> Result<String> {
    let about = run::output(Command::new("rustc").arg("-vV"))?;
    let host = about.lines().find_map(|line| line.strip_prefix("host: "));
    let Some(host) = host else { bail!("rustc -vV names no host:\n{about}") };
    let flags = format!("target.{host}.rustflags=[\"-Ctarget-feature=+crt-static\"]");
    cargo.args(["--target", host, "--config", &flags]);
    Ok(host.to_owned())
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
