//! How the agents of one node know each other: one file per live agent in the run directory.
//!
//! During an upgrade the old agent drains while the new one serves; `meshctl status` lists both from these files, and
//! an agent that is told to leave looks here whether a successor has taken its pods over.
//! `admin.sock` is a symbolic link to the socket of the newest agent.

use std::io;
use std::path::{Path, PathBuf};

pub use mesh_core::admin::{Agent, Phase};

use crate::link::{Link, remove};
use crate::proxy::failures::now_ms;

/// This agent's file and socket in the run directory; removed on drop.
#[derive(Debug)]
pub struct Registration {
    run_dir: PathBuf,
    me: Agent,
}

impl Registration {
    /// Creates the run directory if needed and writes this agent's file.
    ///
    /// # Errors
    /// The directory or file cannot be written.
    pub fn new(run_dir: &Path) -> io::Result<Self> {
        use std::os::unix::fs::DirBuilderExt as _;
        let agents = run_dir.join("agents");
        std::fs::DirBuilder::new().recursive(true).mode(0o750).create(&agents)?;
        let now = now_ms();
        let me = Agent {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_ms: now,
            phase: Phase::Starting,
            since_ms: now,
            connections: 0,
        };
        let registration = Self { run_dir: run_dir.to_owned(), me };
        registration.write()?;
        Ok(registration)
    }

    /// `admin.sock`, and this agent's own socket.
    #[must_use]
    pub fn admin_socket(&self) -> Link {
        Link::new(&self.run_dir, "admin.sock", "sock")
    }

    /// Says what this agent is doing now.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn update(&mut self, phase: Phase, connections: usize) -> io::Result<()> {
        if (self.me.phase, self.me.connections) == (phase, connections) {
            return Ok(());
        }
        if self.me.phase != phase {
            self.me.phase = phase;
            self.me.since_ms = now_ms();
        }
        self.me.connections = connections;
        self.write()
    }

    /// Whether an agent that started later serves the node.
    #[must_use]
    pub fn has_successor(&self) -> bool {
        list(&self.run_dir)
            .iter()
            .any(|g| g.pid != self.me.pid && g.phase == Phase::Serving && g.started_ms >= self.me.started_ms)
    }

    /// Whether an agent that started later is about to serve the node.
    #[must_use]
    pub fn has_heir(&self) -> bool {
        list(&self.run_dir)
            .iter()
            .any(|g| g.pid != self.me.pid && g.phase == Phase::Starting && g.started_ms >= self.me.started_ms)
    }

    /// Whether all draining agents together hold more than `limit` bytes, and this one is the oldest of them: the one
    /// that ends what it still carries.
    #[must_use]
    pub fn must_make_room(&self, limit: u64) -> bool {
        must_make_room(self.me.pid, &list(&self.run_dir), limit, private_memory)
    }

    fn write(&self) -> io::Result<()> {
        let path = self.run_dir.join("agents").join(format!("{}.json", self.me.pid));
        let temporary = path.with_extension("json.new");
        std::fs::write(&temporary, serde_json::to_vec(&self.me)?)?;
        std::fs::rename(&temporary, &path)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let agents = self.run_dir.join("agents");
        // What cannot be removed is skipped by readers: its process is gone.
        let _ = remove(&agents.join(format!("{}.json", self.me.pid)));
        let link = self.admin_socket();
        let _ = remove(&link.socket());
        link.leave();
    }
}

/// The agents that are alive, oldest first. Files of dead ones are removed.
#[must_use]
pub fn list(run_dir: &Path) -> Vec<Agent> {
    let Ok(files) = std::fs::read_dir(run_dir.join("agents")) else { return Vec::new() };
    let mut alive: Vec<Agent> = files
        .flatten()
        .filter(|f| f.path().extension().is_some_and(|e| e == "json"))
        .filter_map(|f| {
            let generation: Agent = serde_json::from_slice(&std::fs::read(f.path()).ok()?).ok()?;
            if Path::new("/proc").join(generation.pid.to_string()).exists() {
                return Some(generation);
            }
            let _ = remove(&f.path());
            let _ = remove(&f.path().with_extension("sock"));
            None
        })
        .collect();
    alive.sort_by_key(|g| (g.started_ms, g.pid));
    alive
}

/// Whether an agent that started later than this process is there and means to stay: what it registered must stay, too.
#[must_use]
pub fn has_later(run_dir: &Path) -> bool {
    is_followed(std::process::id(), &list(run_dir))
}

/// `agents`: the oldest first.
fn is_followed(me: u32, agents: &[Agent]) -> bool {
    let mut later = agents.iter().skip_while(|agent| agent.pid != me).skip(1);
    later.any(|agent| agent.phase != Phase::Draining)
}

/// `agents`: the oldest first; `memory`: bytes by process id.
fn must_make_room(me: u32, agents: &[Agent], limit: u64, memory: impl Fn(u32) -> u64) -> bool {
    let draining = || agents.iter().filter(|agent| agent.phase == Phase::Draining);
    draining().next().is_some_and(|oldest| oldest.pid == me)
        && draining().map(|agent| memory(agent.pid)).sum::<u64>() > limit
}

/// Resident bytes that a process shares with no other, 0 once it is gone. The code is one for all agents.
fn private_memory(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    let pages: Vec<u64> = text.split(' ').filter_map(|field| field.parse().ok()).collect();
    let [_, resident, shared, ..] = pages[..] else { return 0 };
    resident.saturating_sub(shared) * rustix::param::page_size() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, pid: u32, phase: Phase, started_ms: u64) {
        let g = Agent { pid, version: "0".into(), started_ms, phase, since_ms: 0, connections: 0 };
        std::fs::write(dir.join(format!("agents/{pid}.json")), serde_json::to_vec(&g).unwrap()).unwrap();
    }

    #[test]
    fn an_agent_lists_itself_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let mut me = Registration::new(dir.path()).unwrap();
        me.admin_socket().take().unwrap();
        me.update(Phase::Draining, 7).unwrap();
        let listed = list(dir.path());
        assert_eq!(
            (listed[0].pid, listed[0].phase, listed[0].connections),
            (std::process::id(), Phase::Draining, 7)
        );
        drop(me);
        assert!(list(dir.path()).is_empty());
        assert!(std::fs::symlink_metadata(dir.path().join("admin.sock")).is_err());
    }

    #[test]
    fn a_serving_agent_that_started_later_is_the_successor() {
        let dir = tempfile::tempdir().unwrap();
        let me = Registration::new(dir.path()).unwrap();
        let other = std::os::unix::process::parent_id();
        write(dir.path(), other, Phase::Starting, me.me.started_ms + 1);
        assert!(!me.has_successor() && me.has_heir(), "it does not serve yet");
        write(dir.path(), other, Phase::Serving, me.me.started_ms + 1);
        assert!(me.has_successor() && !me.has_heir());
        write(dir.path(), other, Phase::Serving, 1);
        assert!(!me.has_successor(), "it is an older one");
        write(dir.path(), other, Phase::Starting, 1);
        assert!(!me.has_heir(), "it is an older one");
    }

    #[test]
    fn the_oldest_draining_agent_makes_room_when_all_of_them_hold_too_much() {
        let agent = |pid, phase| Agent {
            pid,
            version: "0".into(),
            started_ms: u64::from(pid),
            phase,
            since_ms: 0,
            connections: 1,
        };
        let agents = [agent(1, Phase::Draining), agent(2, Phase::Draining), agent(3, Phase::Serving)];
        let must = |me, limit| must_make_room(me, &agents, limit, |pid| u64::from(pid) * 100);
        // The serving one's 300 do not count.
        assert!(must(1, 299));
        assert!(!must(1, 300), "they fit");
        assert!(!must(2, 299) && !must(3, 299), "not the oldest one that drains");
    }

    #[test]
    fn an_agent_is_followed_by_one_that_started_later_and_does_not_leave() {
        let agent = |pid, phase| Agent {
            pid,
            version: "0".into(),
            started_ms: u64::from(pid),
            phase,
            since_ms: 0,
            connections: 0,
        };
        let agents = [agent(1, Phase::Serving), agent(2, Phase::Starting), agent(3, Phase::Draining)];
        assert!(is_followed(1, &agents), "by one that is about to serve");
        assert!(!is_followed(2, &agents), "one that leaves is none");
        assert!(!is_followed(3, &agents), "the last one");
        assert!(!is_followed(4, &agents), "one that is not listed");
    }

    #[test]
    fn a_process_has_private_memory_until_it_is_gone() {
        assert!(private_memory(std::process::id()) > 100_000);
        assert_eq!(private_memory(u32::MAX), 0);
    }

    #[test]
    fn a_dead_agent_is_not_listed_and_its_file_goes() {
        let dir = tempfile::tempdir().unwrap();
        let _me = Registration::new(dir.path()).unwrap();
        write(dir.path(), u32::MAX, Phase::Serving, 1);
        assert_eq!(list(dir.path()).len(), 1);
        assert!(!dir.path().join("agents").join(format!("{}.json", u32::MAX)).exists());
    }

    #[test]
    fn an_older_agent_that_leaves_keeps_the_link_of_the_newer_one() {
        let dir = tempfile::tempdir().unwrap();
        let me = Registration::new(dir.path()).unwrap();
        std::os::unix::fs::symlink("agents/1.sock", dir.path().join("admin.sock")).unwrap();
        drop(me);
        assert!(std::fs::symlink_metadata(dir.path().join("admin.sock")).is_ok());
    }
}
