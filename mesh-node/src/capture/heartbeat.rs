//! Signs of life, on a thread of their own: a data path that is busy or blocked must not look dead, and a process
//! that is stopped or gone must.

use super::CaptureError;
use super::maps::Maps;
use crate::sys::{self, bpf::Write};
use mesh_ebpf::config;
use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::thread::JoinHandle;
use std::time::Duration;

const INTERVAL: Duration = Duration::from_millis(500);

/// Who this agent is for the exemption.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Agent {
    /// The process id that the kernel programs see; only known in the host's pid namespace.
    process: Option<u32>,
}

/// Exempts this process: by process id where it is the one that the kernel sees, by cgroup otherwise.
pub(super) fn register_agent(maps: &Maps) -> Result<Agent, CaptureError> {
    // The inode of the initial pid namespace is a constant of the kernel (PROC_PID_INIT_INO).
    const INITIAL_PID_NAMESPACE: u64 = 0xefff_fffc;
    let initial = fs::metadata("/proc/self/ns/pid").is_ok_and(|meta| meta.ino() == INITIAL_PID_NAMESPACE);
    if initial {
        let agent = Agent { process: Some(std::process::id()) };
        agent.beat(maps, sys::monotonic_ns())?;
        forget_dead(maps)?;
        return Ok(agent);
    }
    let Some(cgroup) = own_cgroup() else {
        tracing::warn!(
            "this process's cgroup is not found below any cgroup2 mount: its own connections are captured"
        );
        return Ok(Agent { process: None });
    };
    forget_gone(maps, cgroup)?;
    maps.agent_cgroups
        .set(&cgroup, &1, Write::Any)
        .map_err(|source| CaptureError::Map { map: "AGENT_CGROUPS", source })?;
    Ok(Agent { process: None })
}

/// Removes cgroups of earlier agents that are gone: every container has another one, and the map has few places.
fn forget_gone(maps: &Maps, own: u64) -> Result<(), CaptureError> {
    let failed = |source| CaptureError::Map { map: "AGENT_CGROUPS", source };
    let mut there = HashSet::new();
    super::loader::cgroup2_mounts().iter().for_each(|mount| add_cgroups(mount, &mut there));
    // Who does not see its own sees others' no better.
    if !there.contains(&own) {
        return Ok(());
    }
    for (cgroup, _) in maps.agent_cgroups.entries().map_err(failed)? {
        if !there.contains(&cgroup) {
            maps.agent_cgroups.remove(&cgroup).map_err(failed)?;
        }
    }
    Ok(())
}

/// Ids of a cgroup and of those below it.
fn add_cgroups(directory: &Path, ids: &mut HashSet<u64>) {
    let Ok(metadata) = fs::metadata(directory) else { return };
    ids.insert(metadata.ino());
    let entries = fs::read_dir(directory).into_iter().flatten().filter_map(Result::ok);
    for entry in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        add_cgroups(&entry.path(), ids);
    }
}

/// Removes agents that showed no sign of life for a minute.
fn forget_dead(maps: &Maps) -> Result<(), CaptureError> {
    let failed = |source| CaptureError::Map { map: "AGENTS", source };
    for (process, seen) in maps.agents.entries().map_err(failed)? {
        if sys::monotonic_ns().saturating_sub(seen) > 60_000_000_000 {
            maps.agents.remove(&process).map_err(failed)?;
        }
    }
    Ok(())
}

/// The id of the process's cgroup2 directory: below the mount that leads to it, which in a container need not be the
/// first one.
fn own_cgroup() -> Option<u64> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    super::loader::cgroup2_mounts().into_iter().find_map(|mount| {
        let directory = mount.join(path.trim_start_matches('/'));
        let processes = fs::read_to_string(directory.join("cgroup.procs")).ok()?;
        let is_ours = processes.lines().any(|line| line.parse() == Ok(std::process::id()));
        if is_ours { Some(fs::metadata(&directory).ok()?.ino()) } else { None }
    })
}

impl Agent {
    fn beat(&self, maps: &Maps, now: u64) -> Result<(), CaptureError> {
        if let Some(process) = self.process {
            maps.agents
                .set(&process, &now, Write::Any)
                .map_err(|source| CaptureError::Map { map: "AGENTS", source })?;
        }
        Ok(())
    }
}

/// The thread; it ends when this is dropped.
pub(super) struct Heartbeat {
    stop: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
    /// Whether the mesh is to see the signs of life; the exemption of this process always does.
    shown: Arc<AtomicBool>,
}

impl Heartbeat {
    pub(super) fn start(maps: Arc<Maps>, agent: Agent, shown: bool) -> Result<Self, CaptureError> {
        let shown = Arc::new(AtomicBool::new(shown));
        let is_shown = Arc::clone(&shown);
        let beat = move || -> Result<(), CaptureError> {
            let now = sys::monotonic_ns();
            agent.beat(&maps, now)?;
            if is_shown.load(Ordering::Relaxed) { maps.set_config(config::HEARTBEAT, now) } else { Ok(()) }
        };
        // The first one before anything depends on it.
        beat()?;
        let (stop, stopped) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("heartbeat".into())
            .spawn(move || {
                while stopped.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
                    if let Err(error) = beat() {
                        tracing::error!(%error, "heartbeat failed: enrolled pods will be refused");
                    }
                }
            })
            .map_err(|source| CaptureError::Thread { name: "heartbeat", source })?;
        Ok(Self { stop: Some(stop), thread: Some(thread), shown })
    }
}

impl Heartbeat {
    /// Shows signs of life to the mesh from the next beat on, or no more; this process stays exempt.
    pub(super) fn show(&self, shown: bool) {
        self.shown.store(shown, Ordering::Relaxed);
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // The thread cannot panic in a way that matters here: the heartbeat simply goes stale.
            let _ = thread.join();
        }
    }
}
