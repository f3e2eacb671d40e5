//! Style and licences: rustfmt, clippy, cargo-deny.

use crate::{paths, run};
use anyhow::Result;
use std::process::Command;

/// Runs every check and stops at the first that fails.
pub(crate) fn run() -> Result<()> {
    let cargo = || -> Result<Command> {
        let mut cargo = Command::new("cargo");
        cargo.current_dir(paths::root()).env("CARGO_TARGET_DIR", paths::target()?);
        Ok(cargo)
    };
    run::step("rustfmt");
    run::check(cargo()?.args(["fmt", "--all", "--check"]))?;
    run::step("clippy");
    run::check(cargo()?.args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    // Behind features, so that no other build compiles libFuzzer.
    run::check(cargo()?.args([
        "clippy",
        "--bins",
        "-p",
        "mesh-core-fuzz",
        "-p",
        "mesh-node-fuzz",
        "-p",
        "mesh-waypoint-fuzz",
        "-p",
        "mesh-control-fuzz",
        "--features",
        "mesh-core-fuzz/fuzz,mesh-node-fuzz/fuzz,mesh-waypoint-fuzz/fuzz,mesh-control-fuzz/seeds",
        "--",
        "-D",
        "warnings",
    ]))?;
    if run::have("cargo-deny") || run::output(Command::new("cargo").args(["deny", "--version"])).is_ok() {
        run::step("cargo-deny");
        run::check(cargo()?.args(["deny", "check"]))?;
    } else {
        run::step("cargo-deny: skipped, it is not installed (cargo install cargo-deny)");
    }
    Ok(())
}
