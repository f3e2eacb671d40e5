//! Documents that are made out of the product: `docs/api`.

use crate::{build, paths, run};
use anyhow::Result;
use std::process::Command;

/// Builds the control plane and has it write what it knows of the APIs' fields.
pub(crate) fn run() -> Result<()> {
    let built = build::run(false)?;
    run::step("docs/api");
    let mut control = Command::new(built.bin.join("mesh-control"));
    run::check(control.current_dir(paths::root()).args(["fields", "--out", "docs/api"]))
}
