//! Removes what crashed runs left behind. `mesh-tests` knows its own names; this only finds a binary that does.

use crate::{bpf, build, paths, run, testbed};
use anyhow::Result;

/// Cleans with the binary of the last build, or builds one.
pub(crate) fn run() -> Result<()> {
    let target = paths::target()?;
    let last = ["debug", "release"]
        .into_iter()
        .map(|dir| target.join(dir))
        .find(|dir| dir.join("mesh-tests").is_file());
    let built = match last {
        Some(bin) => build::Built { object: paths::bpf_target()?.join(bpf::OBJECT), bin },
        None => build::run(false)?,
    };
    run::check(testbed::mesh_tests(&built)?.arg("clean"))
}
