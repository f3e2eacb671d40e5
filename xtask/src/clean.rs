//! Removes what crashed runs left behind. `mesh-tests` knows its own names; this only finds a binary that does.

use crate::{run, testbed};
use anyhow::Result;

/// Cleans with the binary of the last build, or builds one.
pub(crate) fn run() -> Result<()> {
    run::check(testbed::mesh_tests(&testbed::last_built()?)?.arg("clean"))
}
