//! An agent under valgrind's callgrind, and the instructions that its threads have run.

use crate::bed::netns;
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};

/// The thread of the control runtime: configuration, certificates, timers. What it does depends on time, not on traffic.
const CONTROL: u32 = 1;

/// Agents that are counted, with their files in one directory.
pub(super) struct Callgrind {
    /// Callgrind's files, and what it talks through.
    dir: PathBuf,
    /// Profiles of what was counted go here.
    keep: Option<PathBuf>,
}

impl Callgrind {
    /// Keeps its files in `dir`, and copies of the profiles in `keep`.
    ///
    /// # Errors
    /// A directory cannot be made.
    pub(super) fn new(dir: PathBuf, keep: Option<PathBuf>) -> Result<Self> {
        for dir in [Some(&dir), keep.as_ref()].into_iter().flatten() {
            std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        Ok(Self { dir, keep })
    }

    /// The command that runs `agent` counted, on one CPU where nothing that wakes up interrupts what runs.
    pub(super) fn command(&self, agent: &Path, cpu: usize) -> Vec<String> {
        let dir = self.dir.display();
        let mut argv = batch(cpu);
        argv.extend([
            "valgrind".to_owned(),
            "--tool=callgrind".to_owned(),
            "--separate-threads=yes".to_owned(),
            "--fair-sched=try".to_owned(),
            format!("--vgdb-prefix={dir}/vgdb"),
            format!("--callgrind-out-file={dir}/callgrind.%p"),
            agent.to_string_lossy().into_owned(),
        ]);
        argv
    }

    /// Instructions that the data path's threads of process `pid` have run since the last time. `label` names the
    /// profile.
    ///
    /// # Errors
    /// The process does not answer, or its profile is unreadable.
    pub(super) fn count(&self, pid: u32, label: &str) -> Result<u64> {
        let prefix = format!("--vgdb-prefix={}/vgdb", self.dir.display());
        let of = format!("--pid={pid}");
        netns::command("vgdb", [&prefix, &of, "--cmd-time-out=60", "dump", label])?;
        let mut total = 0;
        let mut threads = 0;
        for entry in std::fs::read_dir(&self.dir).context("cannot list callgrind's files")? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if !name.starts_with(&format!("callgrind.{pid}.")) {
                continue;
            }
            let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {name}"))?;
            let (thread, count) = parse(&text).with_context(|| format!("{name} is no profile"))?;
            threads += 1;
            if thread != CONTROL {
                total += count;
            }
            if let Some(keep) = &self.keep
                && count > 0
            {
                let to = keep.join(format!("callgrind.{label}.{thread}"));
                std::fs::write(&to, &text).with_context(|| format!("cannot write {}", to.display()))?;
            }
            std::fs::remove_file(&path).with_context(|| format!("cannot remove {name}"))?;
        }
        ensure!(threads > 1, "callgrind wrote {threads} profiles of process {pid}");
        Ok(total)
    }
}

/// Runs what follows on one CPU as a batch job: what wakes up waits until what runs has to wait, so that everything
/// happens in the same order every time.
pub(super) fn batch(cpu: usize) -> Vec<String> {
    ["chrt", "--batch", "0", "taskset", "-c", &cpu.to_string()].map(str::to_owned).to_vec()
}

/// Thread and instructions of a profile (callgrind's file format, version 1).
fn parse(text: &str) -> Option<(u32, u64)> {
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    Some((field("thread")?.trim().parse().ok()?, field("totals")?.split(' ').next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_says_whose_instructions_it_counts() {
        let text =
            "# callgrind format\nversion: 1\npid: 7\nthread: 6\nevents: Ir\nfn=(1) f\n1 20\ntotals: 123\n";
        assert_eq!(parse(text), Some((6, 123)));
        assert_eq!(parse("events: Ir"), None);
    }
}
