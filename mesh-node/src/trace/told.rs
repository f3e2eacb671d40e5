//! One event as it is kept. Who talks to whom is shared by all events of a pair of workloads, so that an event is a few
//! numbers and reference counts; it becomes a [`Flow`] with its texts when somebody asks.

use std::net::SocketAddr;
use std::sync::Arc;

use mesh_core::flows::{ConnectionId, Dns, Flow, Kind, Party, Path, Process, Side, Verdict};
use mesh_core::state::Str;

use super::join::Live;

/// Who talks to whom, without the ports of one connection.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ends {
    /// The client; its address is each event's own.
    pub source: Party,
    /// The server.
    pub destination: Party,
    /// Hostname of the service.
    pub service: String,
}

/// The process that connected or listens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Caller {
    /// Its id.
    pub pid: u32,
    /// Its name, ended by a zero byte.
    pub comm: [u8; 16],
    /// Id of its cgroup.
    pub cgroup: u64,
}

impl Caller {
    /// The name as text.
    #[must_use]
    pub fn command(&self) -> String {
        let end = self.comm.iter().position(|byte| *byte == 0).unwrap_or(self.comm.len());
        String::from_utf8_lossy(&self.comm[..end]).into_owned()
    }
}

/// Why something happened.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Reason {
    /// No reason.
    #[default]
    None,
    /// The kernel's number for a drop.
    Drop(u32),
    /// The kernel's number for a reset.
    Reset(u32),
    /// An error number.
    Errno(u32),
    /// A word of the mesh.
    Word(&'static str),
}

/// Numbers of an event; what it does not have is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Numbers {
    /// From SYN to connected, or question to answer, microseconds.
    pub latency_us: Option<u64>,
    /// Since the connection began, microseconds.
    pub duration_us: Option<u64>,
    /// Client to server, server to client.
    pub bytes: Option<[u64; 2]>,
    /// Smoothed and smallest round trip time, microseconds.
    pub rtt_us: Option<[u32; 2]>,
    /// Segments sent again, and segments that nobody acknowledged.
    pub segments: Option<[u32; 2]>,
}

/// See the module.
#[derive(Debug, Clone, Default)]
pub struct Told {
    /// Microseconds since 1970.
    pub at_us: u64,
    /// The connection; 0 where it is not known.
    pub connection: ConnectionId,
    /// What it says.
    pub kind: Kind,
    /// Which end saw it.
    pub side: Side,
    /// What became of it.
    pub verdict: Verdict,
    /// What carries the bytes.
    pub path: Path,
    /// `tcp`, `udp` or `dns`.
    pub protocol: &'static str,
    /// Who talks to whom.
    pub ends: Arc<Ends>,
    /// Address of the client.
    pub client: Option<SocketAddr>,
    /// Address of the server.
    pub server: Option<SocketAddr>,
    /// What was asked for, where it is another.
    pub asked: Option<SocketAddr>,
    /// Who called.
    pub caller: Caller,
    /// Why.
    pub reason: Reason,
    /// In words.
    pub detail: Option<Arc<str>>,
    /// What decided.
    pub policy: Option<Str>,
    /// Figures.
    pub numbers: Numbers,
    /// Who ended it, and with what.
    pub closed: Option<(Side, &'static str)>,
    /// How often.
    pub count: u32,
    /// A DNS question.
    pub dns: Option<Box<Dns>>,
}

/// What the kernel calls things, and which container a cgroup is: asked when an event is written out.
pub trait Names: Send + Sync {
    /// Name of a reason for a drop.
    fn drop_reason(&self, reason: u32) -> String;
    /// Name of a reason for a reset; none where there is none.
    fn reset_reason(&self, reason: u32) -> Option<String>;
    /// The container of a cgroup id; empty where it is not known.
    fn container(&self, cgroup: u64) -> String;
}

/// The names of error numbers that connections fail with.
#[must_use]
pub fn errno(number: u32) -> String {
    let name = match i32::try_from(number).unwrap_or(0) {
        0 => "ABORTED",
        libc::ECONNREFUSED => "ECONNREFUSED",
        libc::ETIMEDOUT => "ETIMEDOUT",
        libc::ECONNRESET => "ECONNRESET",
        libc::ECONNABORTED => "ECONNABORTED",
        libc::EHOSTUNREACH => "EHOSTUNREACH",
        libc::ENETUNREACH => "ENETUNREACH",
        libc::ENETDOWN => "ENETDOWN",
        libc::EPIPE => "EPIPE",
        libc::EPROTO => "EPROTO",
        libc::EACCES => "EACCES",
        libc::EPERM => "EPERM",
        other => return format!("errno {other}"),
    };
    name.to_owned()
}

impl Told {
    /// What all events of a connection have in common.
    #[must_use]
    pub fn of_live(live: &Live) -> Self {
        Self {
            connection: live.connection,
            side: live.side,
            path: live.path,
            protocol: "tcp",
            ends: Arc::clone(&live.ends),
            client: Some(live.client),
            server: Some(live.server),
            asked: live.asked,
            caller: live.caller,
            policy: live.policy.clone(),
            count: 1,
            ..Self::default()
        }
    }

    /// The event with its texts.
    #[must_use]
    pub fn flow(&self, seq: u64, node: &str, names: &dyn Names) -> Flow {
        let party = |party: &Party, address| Party { address, ..party.clone() };
        let numbers = &self.numbers;
        Flow {
            seq,
            at_us: self.at_us,
            node: node.to_owned(),
            connection: (!self.connection.is_none()).then_some(self.connection),
            kind: self.kind,
            side: self.side,
            verdict: self.verdict,
            path: self.path,
            protocol: self.protocol.to_owned(),
            source: party(&self.ends.source, self.client),
            destination: party(&self.ends.destination, self.server),
            service: self.ends.service.clone(),
            asked: self.asked,
            process: (self.caller.pid != 0).then(|| Process {
                pid: self.caller.pid,
                command: self.caller.command(),
                container: names.container(self.caller.cgroup),
            }),
            reason: self.reason(names),
            detail: self.detail.as_deref().unwrap_or_default().to_owned(),
            policy: self.policy.as_deref().unwrap_or_default().to_owned(),
            latency_us: numbers.latency_us,
            duration_us: numbers.duration_us,
            bytes_to_server: numbers.bytes.map(|bytes| bytes[0]),
            bytes_to_client: numbers.bytes.map(|bytes| bytes[1]),
            srtt_us: numbers.rtt_us.map(|rtt| rtt[0]),
            min_rtt_us: numbers.rtt_us.map(|rtt| rtt[1]),
            retransmits: numbers.segments.map(|segments| segments[0]),
            unacked: numbers.segments.map(|segments| segments[1]),
            closed_by: match self.closed {
                Some((Side::Client, _)) => "client".to_owned(),
                Some((Side::Server, _)) => "server".to_owned(),
                _ => String::new(),
            },
            closed_with: self.closed.map(|(_, with)| with.to_owned()).unwrap_or_default(),
            count: self.count,
            dns: self.dns.as_deref().cloned(),
        }
    }

    /// The reason in the kernel's word, or the mesh's.
    #[must_use]
    pub fn reason(&self, names: &dyn Names) -> String {
        match self.reason {
            Reason::None => String::new(),
            Reason::Drop(reason) => names.drop_reason(reason),
            Reason::Reset(reason) => names.reset_reason(reason).unwrap_or_default(),
            Reason::Errno(number) => errno(number),
            Reason::Word(word) => word.to_owned(),
        }
    }
}
