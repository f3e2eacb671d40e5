//! Stock ztunnel on two nodes of its own, fed by our control plane: the peer of the tunnel rows.

use crate::bed::Testbed;
use crate::peer::agent::{self, Ztunnel};
use anyhow::Result;
use std::path::{Path, PathBuf};

/// Why rows against it are skipped.
pub(super) const MISSING: &str = "no stock ztunnel binary: give one with --ztunnel PATH";
/// Its nodes in the testbed.
pub(super) const NODES: [&str; 2] = ["c", "d"];

/// Two running ztunnels.
pub(super) struct Peer {
    binary: PathBuf,
    agents: Vec<Ztunnel>,
}

impl Peer {
    /// Redirects the pods of its nodes and starts it there.
    ///
    /// # Errors
    /// It does not start, or refuses a pod.
    pub(super) fn start(bed: &Testbed, binary: &Path) -> Result<Self> {
        NODES.iter().try_for_each(|node| agent::redirect_pods(bed, node))?;
        let mut peer = Self { binary: binary.to_owned(), agents: Vec::new() };
        peer.restart(bed)?;
        Ok(peer)
    }

    /// Starts both anew: nothing is cached, no tunnel is open.
    ///
    /// # Errors
    /// As [`Peer::start`].
    pub(super) fn restart(&mut self, bed: &Testbed) -> Result<()> {
        self.agents.clear();
        for node in NODES {
            self.agents.push(Ztunnel::start(bed, node, &self.binary)?);
        }
        Ok(())
    }

    /// Process ids, the client's node first.
    #[must_use]
    pub(super) fn pids(&self) -> Vec<u32> {
        self.agents.iter().map(|agent| agent.process.pid()).collect()
    }
}
