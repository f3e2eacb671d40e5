//! Clocks that are set while the mesh runs. Control plane and agents see the time through libfaketime, which reads the
//! offset from a file; the time that measures intervals goes on as it does when somebody sets a machine's clock.

use super::life::{Traffic, serials};
use super::shop::{ENROLLED, SHOP, enrolled, talks};
use super::{Scenario, scenario, skip};
use crate::bed::mesh::MeshOptions;
use crate::bed::{Load, Testbed, Topology, netns, run, wait};
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario(
        "clocks are set thirteen hours ahead and back: certificates are renewed, and nothing is lost",
        120,
        set_clocks,
    ),
    scenario(
        "clocks are set past the end of every certificate: open connections stay, new ones wait for new ones",
        90,
        past_the_end,
    ),
];

const SOON: Duration = Duration::from_secs(30);

/// The library that fakes the time of threaded programs, where Debian puts it.
fn library() -> Result<PathBuf> {
    let dirs = std::fs::read_dir("/usr/lib").context("cannot list /usr/lib")?;
    let files = dirs.flatten().map(|dir| dir.path().join("faketime/libfaketimeMT.so.1"));
    files
        .into_iter()
        .find(|file| file.is_file())
        .ok_or_else(|| skip("libfaketime is not installed: run `cargo xtask setup`"))
}

struct Clock(PathBuf);

impl Clock {
    fn set(&self, offset: &str) -> Result<()> {
        let new = self.0.with_extension("new");
        std::fs::write(&new, offset).context("cannot write the offset")?;
        std::fs::rename(&new, &self.0).context("cannot set the clock")
    }

    fn environment(&self, library: &Path) -> Vec<(String, String)> {
        let file = self.0.to_string_lossy().into_owned();
        [
            ("LD_PRELOAD", library.to_string_lossy().into_owned()),
            ("FAKETIME_TIMESTAMP_FILE", file),
            ("FAKETIME_NO_CACHE", "1".to_owned()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
            ("NO_FAKE_STAT", "1".to_owned()),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into()
    }
}

/// The shop under a clock that can be set, with tokens that outlive what is done to it.
fn open() -> Result<(Testbed, Clock)> {
    let library = library()?;
    let mut bed = Testbed::build(&Topology::nodes(&["a", "b"]), SHOP)?;
    let clock = Clock(bed.dir.join("clock"));
    clock.set("+0")?;
    let options = MeshOptions { env: clock.environment(&library), ..MeshOptions::default() };
    bed.start_mesh(&options)?;
    let program = run::binary("mesh-control")?.to_string_lossy().into_owned();
    let state = bed.state_dir().to_string_lossy().into_owned();
    for node in bed.nodes.values() {
        let args = ["token", "--ttl", "240h", "--node", &node.name, "--state-dir", &state];
        std::fs::write(node.dir.join("token"), netns::command(&program, args)?.trim())
            .context("cannot write a token")?;
    }
    enrolled(&bed, ENROLLED)?;
    Ok((bed, clock))
}

/// Waits until a node has another certificate for every account than it had.
fn renewed(bed: &Testbed, before: &[(&str, &str, Vec<String>)]) -> Result<()> {
    for (node, account, old) in before {
        wait::until_true(&format!("another certificate of {account} on {node}"), SOON, || {
            Ok(serials(bed, node, account)? != *old)
        })?;
    }
    Ok(())
}

fn held(bed: &Testbed) -> Result<Vec<(&'static str, &'static str, Vec<String>)>> {
    [("a", "/sa/frontend"), ("a", "/sa/other"), ("b", "/sa/backend")]
        .into_iter()
        .map(|(node, account)| Ok((node, account, serials(bed, node, account)?)))
        .collect()
}

fn set_clocks() -> Result<()> {
    let (mut bed, clock) = open()?;
    let to = bed.pod("shop/backend")?.at(8080).to_string();
    let traffic = Traffic::start(&bed, "shop/frontend")?;
    let before = held(&bed)?;
    clock.set("+13h")?;
    // They live for a day: that they are renewed now shows that the clock is another one.
    renewed(&bed, &before)?;
    talks(&bed, "shop/frontend", &to)?;
    // Nobody has a tunnel from there yet: handshakes with the new certificates.
    talks(&bed, "shop/local", &bed.pod("shop/backend")?.at6(8080).to_string())?;
    let before = held(&bed)?;
    clock.set("+0")?;
    // Those of the future are worth nothing now; a pod that has no tunnel yet needs new ones at once.
    wait::until("traffic of another pod", SOON, || talks(&bed, "shop/other", &to).map(Some))?;
    renewed(&bed, &before)?;
    traffic.unharmed("set clocks")?;
    for name in ["a", "b"] {
        let node = bed.node_mut(name)?;
        ensure!(node.agent_mut(0)?.running()?, "the agent on {name} ended");
    }
    Ok(())
}

fn past_the_end() -> Result<()> {
    let (bed, clock) = open()?;
    let to = bed.pod("shop/backend")?.at(8080).to_string();
    let load =
        Load::start(bed.pod("shop/frontend")?, &to, &["--shape", "pp", "--conns", "4", "--pause-ms", "2"])?;
    let before = held(&bed)?;
    clock.set("+25h")?;
    // Its first connection needs a new certificate at this end and at the other.
    wait::until("traffic of another pod", SOON, || talks(&bed, "shop/other", &to).map(Some))?;
    renewed(&bed, &before)?;
    talks(&bed, "shop/other", &to)?;
    let figures = load.stop()?;
    ensure!(figures.errors == 0 && figures.alive == 4, "open connections were hurt: {}", figures.first_error);
    Ok(())
}
