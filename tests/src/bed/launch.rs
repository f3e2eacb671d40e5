//! `mesh-tests in`: becomes a program inside a pod.
//!
//! Entering happens in the process itself, before exec, so that the program's very first system call is already made
//! in the right namespace and cgroup.

use anyhow::{Context, Result};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

/// Where to run what.
#[derive(clap::Args)]
pub struct Args {
    /// Network namespace file
    #[arg(long)]
    netns: PathBuf,
    /// cgroup2 directory
    #[arg(long)]
    cgroup: PathBuf,
    /// A file to see as /etc/resolv.conf
    #[arg(long)]
    resolv: Option<PathBuf>,
    /// The only CPU to run on
    #[arg(long)]
    cpu: Option<usize>,
    /// The program and its arguments
    #[arg(last = true, required = true)]
    program: Vec<String>,
}

/// Never returns when it works.
///
/// # Errors
/// The namespace, cgroup or program is not there.
pub fn exec(args: &Args) -> Result<()> {
    let procs = args.cgroup.join("cgroup.procs");
    std::fs::write(&procs, "0")
        .with_context(|| format!("cannot join the cgroup {}", args.cgroup.display()))?;
    super::netns::enter(&args.netns)?;
    if let Some(cpu) = args.cpu {
        let mut set = rustix::thread::CpuSet::new();
        set.set(cpu);
        rustix::thread::sched_setaffinity(None, &set).with_context(|| format!("cannot run on CPU {cpu}"))?;
    }
    let mut command;
    if let Some(resolv) = &args.resolv {
        // A private mount namespace, so that only this program sees the file.
        command = Command::new("unshare");
        command
            .args(["--mount", "--propagation", "private", "sh", "-c"])
            .arg("mount --bind \"$0\" /etc/resolv.conf && exec \"$@\"")
            .arg(resolv)
            .args(&args.program);
    } else {
        command = Command::new(&args.program[0]);
        command.args(&args.program[1..]);
    }
    let error = command.exec();
    Err(error).with_context(|| format!("cannot run {}: is it installed?", args.program[0]))
}
