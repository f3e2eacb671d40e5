//! The kernel's half of the fast path: verdicts, their generation, and figures of connections.
//!
//! A change of policy goes in this order: verdicts that still matter are written for the next generation
//! ([`Capture::set_verdict`] with [`Capture::generation`] + 1), then [`Capture::bump_generation`] flips, then
//! connections that are now denied are destroyed ([`Capture::destroy`]).

use super::layouts::OtherLayout;
use super::{Capture, CaptureError};
use crate::sys;
use crate::sys::bpf::{Table, Write};
use mesh_ebpf::{Verdict, VerdictKey, config, flow};
use serde::Serialize;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{MutexGuard, PoisonError};

/// A connect call is over long before: what its hook reserved, and nothing took, belongs to none.
const RESERVED_NS: u64 = 2_000_000_000;

/// A source and a destination of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pair {
    /// Netns cookie of the source pod.
    pub netns: u64,
    pub source: IpAddr,
    pub destination: IpAddr,
    pub port: u16,
}

impl From<&Pair> for VerdictKey {
    fn from(pair: &Pair) -> Self {
        Self {
            netns: pair.netns,
            source: pair.source.into(),
            destination: pair.destination.into(),
            port: pair.port,
            zero: [0; 3],
        }
    }
}

impl From<&VerdictKey> for Pair {
    fn from(key: &VerdictKey) -> Self {
        Self {
            netns: key.netns,
            source: key.source.to_ip(),
            destination: key.destination.to_ip(),
            port: key.port,
        }
    }
}

/// What policy says of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    pub allow: bool,
    /// The agent's number for the deciding policy.
    pub policy: u32,
    /// The agent's own bits (dry-run results).
    pub flags: u32,
}

/// Where a connection of the fast path stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FlowState {
    /// The SYN is on its way.
    Opening,
    Established,
    /// Closed after it was established: the figures are final.
    Closed,
    /// Never established.
    Failed,
}

/// Figures of a connection of the fast path, from its client's socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct FlowFigures {
    /// The client's socket cookie: unique until the machine reboots.
    pub id: u64,
    pub state: FlowState,
    pub client: SocketAddr,
    pub server: SocketAddr,
    /// Netns cookie of the client.
    pub netns: u64,
    /// CLOCK_MONOTONIC.
    pub opened_ns: u64,
    pub updated_ns: u64,
    /// Bytes that the client sent and the server acknowledged.
    pub bytes_sent: u64,
    pub bytes_received: u64,
    pub srtt_us: u32,
    pub retransmits: u32,
    pub generation: u32,
    pub policy: u32,
    pub flags: u32,
    /// The client is connected, but nobody accepted the connection as it left: its source was changed on the way.
    pub astray: bool,
}

fn has_ended(state: u32) -> bool {
    !matches!(state, flow::OPENING | flow::ESTABLISHED | flow::RESERVED)
}

fn figures(id: u64, flow: &mesh_ebpf::Flow) -> FlowFigures {
    let tuple = &flow.tuple;
    FlowFigures {
        id,
        state: match flow.state {
            flow::OPENING => FlowState::Opening,
            flow::ESTABLISHED => FlowState::Established,
            flow::CLOSED => FlowState::Closed,
            _ => FlowState::Failed,
        },
        client: SocketAddr::new(tuple.client.to_ip(), tuple.client_port),
        server: SocketAddr::new(tuple.server.to_ip(), tuple.server_port),
        netns: flow.netns,
        opened_ns: flow.opened_ns,
        updated_ns: flow.updated_ns,
        bytes_sent: flow.bytes_sent,
        bytes_received: flow.bytes_received,
        srtt_us: flow.srtt_us,
        retransmits: flow.retransmits,
        generation: flow.generation,
        policy: flow.policy,
        flags: flow.verdict_flags,
        astray: flow.astray != 0,
    }
}

impl Capture {
    /// The current generation of verdicts.
    ///
    /// # Errors
    /// Only if the kernel refuses the map read.
    pub fn generation(&self) -> Result<u32, CaptureError> {
        Ok(u32::try_from(self.maps.config(config::GENERATION)? & u64::from(u32::MAX)).unwrap_or(0))
    }

    /// Makes the kernel believe none of the present verdicts, which stay readable for the next judgement. That is two
    /// generations away: the agent may have died between writing verdicts for the next one and its flip.
    ///
    /// # Errors
    /// Only if the kernel refuses.
    pub(super) fn distrust_verdicts(&self) -> Result<(), CaptureError> {
        let next = self.generation()?.wrapping_add(2);
        self.maps.set_config(config::GENERATION, u64::from(next))
    }

    /// Starts the next generation: verdicts of older ones no longer hold, and are removed. Returns it.
    ///
    /// # Errors
    /// Only if the kernel refuses the map write.
    pub fn bump_generation(&self) -> Result<u32, CaptureError> {
        let next = self.generation()?.wrapping_add(1);
        self.maps.set_config(config::GENERATION, u64::from(next))?;
        let failed = |source| CaptureError::Map { map: "VERDICTS", source };
        for (key, verdict) in self.maps.verdicts.entries().map_err(failed)? {
            if verdict.generation.wrapping_sub(next).cast_signed() < 0 {
                self.maps.verdicts.remove(&key).map_err(failed)?;
            }
        }
        Ok(next)
    }

    /// Writes the verdict on a pair; it holds in `generation` and while an older one is current.
    ///
    /// # Errors
    /// The map is full: the pair stays on the tunnel.
    pub fn set_verdict(&self, pair: &Pair, decision: Decision, generation: u32) -> Result<(), CaptureError> {
        let verdict = Verdict {
            generation,
            allow: u32::from(decision.allow),
            policy: decision.policy,
            flags: decision.flags,
        };
        self.maps
            .verdicts
            .set(&pair.into(), &verdict, Write::Any)
            .map_err(|source| super::maps::full("VERDICTS", source, 1))
    }

    /// Removes the verdict on a pair: its next connection goes through the tunnel.
    ///
    /// # Errors
    /// Only if the kernel refuses the map write.
    pub fn remove_verdict(&self, pair: &Pair) -> Result<(), CaptureError> {
        let removed = self.maps.verdicts.remove(&pair.into());
        removed.map(|_| ()).map_err(|source| CaptureError::Map { map: "VERDICTS", source })
    }

    /// All verdicts, with their generations.
    ///
    /// # Errors
    /// Only if the kernel refuses the map read.
    pub fn verdicts(&self) -> Result<Vec<(Pair, Decision, u32)>, CaptureError> {
        let entries =
            self.maps.verdicts.entries().map_err(|source| CaptureError::Map { map: "VERDICTS", source })?;
        let readable = |(key, verdict): &(VerdictKey, Verdict)| {
            let decision =
                Decision { allow: verdict.allow == 1, policy: verdict.policy, flags: verdict.flags };
            (key.into(), decision, verdict.generation)
        };
        Ok(entries.iter().map(readable).collect())
    }

    /// Figures of all connections of the fast path. Those that ended since the last call are among them once, and
    /// gone afterwards: call it from one place, at least every few seconds.
    ///
    /// # Errors
    /// Only if the kernel refuses the map read.
    pub fn fastpath_flows(&self) -> Result<Vec<FlowFigures>, CaptureError> {
        let mut flows = self.read_flows(&self.maps.flows)?;
        let mut others = self.others();
        for other in others.iter_mut() {
            let found = other.flows.as_ref().map_or(Ok(Vec::new()), |table| self.read_flows(table))?;
            other.is_used = !found.is_empty();
            flows.extend(found);
        }
        others.retain(|other| !other.is_over());
        Ok(flows)
    }

    /// What agents of other layouts left.
    pub(super) fn others(&self) -> MutexGuard<'_, Vec<OtherLayout>> {
        self.others.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_flows(&self, table: &Table<u64, mesh_ebpf::Flow>) -> Result<Vec<FlowFigures>, CaptureError> {
        let failed = |source| CaptureError::Map { map: "FLOWS", source };
        let mut flows = Vec::new();
        for (id, flow) in table.entries().map_err(failed)? {
            if flow.state == flow::RESERVED {
                // The connect call failed before it chose a port.
                if sys::monotonic_ns().saturating_sub(flow.opened_ns) > RESERVED_NS {
                    let is_over =
                        |now: &mesh_ebpf::Flow| (now.state, now.opened_ns) == (flow.state, flow.opened_ns);
                    self.forget_flow(table, id, is_over)?;
                }
                continue;
            }
            if has_ended(flow.state) {
                self.forget_flow(table, id, |now| has_ended(now.state))?;
            }
            flows.push(figures(id, &flow));
        }
        Ok(flows)
    }

    /// Removes a flow that is over. Its socket may be connecting again at this very moment, under the same cookie: what
    /// was taken and is not over goes back, or its connection is ended.
    fn forget_flow(
        &self,
        table: &Table<u64, mesh_ebpf::Flow>,
        id: u64,
        is_over: impl Fn(&mesh_ebpf::Flow) -> bool,
    ) -> Result<(), CaptureError> {
        let failed = |source| CaptureError::Map { map: "FLOWS", source };
        let Some(taken) = table.take(&id).map_err(failed)? else { return Ok(()) };
        if is_over(&taken) {
            return Ok(());
        }
        match table.set(&id, &taken, Write::New) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                self.destroy(&figures(id, &taken)).map(drop)
            }
            _ => Ok(()),
        }
    }

    /// Ends a connection of the fast path at its client: the client gets ECONNABORTED, the server a reset. Says
    /// whether it was still there.
    ///
    /// # Errors
    /// The kernel lacks CONFIG_INET_DIAG_DESTROY.
    pub fn destroy(&self, flow: &FlowFigures) -> Result<bool, CaptureError> {
        let Some(pod) = self.known(flow.netns) else { return Ok(false) };
        sys::sock_destroy(&pod.netns, flow.client, flow.server).map_err(|source| CaptureError::Pod {
            pod: pod.info.to_string(),
            action: "destroy a connection",
            source,
        })
    }

    /// Says which cgroups (ids: inode of the cgroup2 directory) kubelets live in; their probes of declared ports
    /// reach applications directly. Replaces the earlier list.
    ///
    /// # Errors
    /// More than 64 cgroups.
    pub fn set_kubelet_cgroups(&self, cgroups: &[u64]) -> Result<(), CaptureError> {
        super::maps::sync(&self.maps.kubelets, "KUBELETS", cgroups.iter().map(|id| (*id, 1)).collect())
    }
}
