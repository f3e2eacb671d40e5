//! What happened to a connection, an event at a time: who talked to whom, over which path, how fast, what was lost or
//! denied and why. Nodes write these ([`Flow`]), `meshctl` reads, filters ([`filter`]) and translates them
//! ([`hubble`]).
//!
//! `GET /flows` of a node's admin endpoint, and of the control plane's relay for all nodes, answers with JSON lines: a
//! [`Flow`] each, and a [`Mark`] as the last line, which says where to go on. Fields that are not known are left out.

pub mod filter;
pub mod hubble;

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

pub use filter::Filter;

/// What an event says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A client's SYN is about to leave.
    #[default]
    Connect,
    /// A client is connected.
    Established,
    /// A server's kernel has the connection.
    Accepted,
    /// A connection ended; its figures are final.
    Closed,
    /// A connection was never established.
    Failed,
    /// A segment was sent again.
    Retransmit,
    /// A reset was sent.
    ResetSent,
    /// A reset arrived.
    ResetReceived,
    /// A packet was dropped.
    Drop,
    /// A name was asked for and answered.
    Dns,
    /// The agent's account of a connection that it carried, or that policy refused.
    Proxied,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 11] = [
        Self::Connect,
        Self::Established,
        Self::Accepted,
        Self::Closed,
        Self::Failed,
        Self::Retransmit,
        Self::ResetSent,
        Self::ResetReceived,
        Self::Drop,
        Self::Dns,
        Self::Proxied,
    ];

    /// As in JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Established => "established",
            Self::Accepted => "accepted",
            Self::Closed => "closed",
            Self::Failed => "failed",
            Self::Retransmit => "retransmit",
            Self::ResetSent => "reset_sent",
            Self::ResetReceived => "reset_received",
            Self::Drop => "drop",
            Self::Dns => "dns",
            Self::Proxied => "proxied",
        }
    }
}

/// What became of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It went on.
    #[default]
    Forwarded,
    /// Policy refused it.
    Denied,
    /// The kernel dropped a packet.
    Dropped,
    /// It did not work.
    Failed,
}

impl Verdict {
    /// All verdicts.
    pub const ALL: [Self; 4] = [Self::Forwarded, Self::Denied, Self::Dropped, Self::Failed];

    /// As in JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Forwarded => "forwarded",
            Self::Denied => "denied",
            Self::Dropped => "dropped",
            Self::Failed => "failed",
        }
    }
}

/// What carries the bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Path {
    /// Nothing is known of it.
    #[default]
    Unknown,
    /// The kernel, between two pods of one node that policy allows to talk.
    Fast,
    /// HBONE: mutual TLS between nodes.
    Tunnel,
    /// HBONE to a waypoint.
    Waypoint,
    /// Neither: not in the mesh, at one end at least.
    Plain,
}

impl Path {
    /// All paths.
    pub const ALL: [Self; 5] = [Self::Unknown, Self::Fast, Self::Tunnel, Self::Waypoint, Self::Plain];

    /// As in JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Fast => "fast",
            Self::Tunnel => "tunnel",
            Self::Waypoint => "waypoint",
            Self::Plain => "plain",
        }
    }
}

/// Which end of the connection an event was seen at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The client's.
    #[default]
    Client,
    /// The server's.
    Server,
    /// On the way: in the node, not in a pod.
    Node,
}

/// Names a connection for its whole life, the same in all events of a node, in the access log and, in the low half of
/// the trace id, on the tunnel: so at the other node, too.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct ConnectionId(pub u64);

impl ConnectionId {
    /// Of a connection that a client of this machine began: by the moment (CLOCK_MONOTONIC ns) and its own address and
    /// port, which nobody else had at that moment.
    #[must_use]
    pub fn of(opened_ns: u64, client: SocketAddr) -> Self {
        let ip = match client.ip() {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
            IpAddr::V6(v6) => v6.to_bits(),
        };
        // splitmix64: spreads what differs in a few bits over all of them; nobody attacks it.
        let mix = |mut x: u64| {
            x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            x ^ (x >> 31)
        };
        #[allow(clippy::cast_possible_truncation, reason = "both halves are mixed in")]
        let (high, low) = ((ip >> 64) as u64, ip as u64);
        let id = mix(mix(mix(opened_ns) ^ high) ^ low ^ u64::from(client.port()));
        // Zero is no connection.
        Self(id.max(1))
    }

    /// Whether it names none.
    #[must_use]
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }
}

impl fmt::Display for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for ConnectionId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match u64::from_str_radix(text, 16) {
            Ok(id) if text.len() == 16 && id != 0 => Ok(Self(id)),
            _ => Err(format!("{text:?} names no connection: give the 16 hex digits of a flow's id")),
        }
    }
}

impl Serialize for ConnectionId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ConnectionId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// One end of a connection.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Party {
    /// Address and port as the packets have them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<SocketAddr>,
    /// Kubernetes namespace.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    /// Name of the pod.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub pod: String,
    /// Name of its owner, for example of the Deployment.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub workload: String,
    /// SPIFFE URI.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub identity: String,
    /// Node that it runs on.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub node: String,
}

impl Party {
    /// `namespace/pod`, else the address, else `-`.
    #[must_use]
    pub fn label(&self) -> String {
        match (self.pod.is_empty(), self.address) {
            (false, _) => format!("{}/{}", self.namespace, self.pod),
            (true, Some(address)) => address.ip().to_string(),
            (true, None) => "-".to_owned(),
        }
    }
}

/// The process that connected, or that listens.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Process {
    /// Its id on the node.
    pub pid: u32,
    /// Its name, 15 characters at most.
    pub command: String,
    /// Last part of its cgroup's path: the container, where a runtime made one.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub container: String,
}

/// A question to the node's DNS and its answer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Dns {
    /// The name, without the last dot.
    pub query: String,
    /// `A`, `AAAA`, …
    pub query_type: String,
    /// `NOERROR`, `NXDOMAIN`, …
    pub answer: String,
    /// Whether the node knew the answer itself.
    pub local: bool,
}

/// One event of one connection.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Flow {
    /// Number of the event on its node; grows.
    pub seq: u64,
    /// When, microseconds since 1970.
    pub at_us: u64,
    /// Node that saw it.
    pub node: String,
    /// The connection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connection: Option<ConnectionId>,
    /// What it says.
    pub kind: Kind,
    /// Which end saw it.
    pub side: Side,
    /// What became of it.
    pub verdict: Verdict,
    /// What carries the bytes.
    pub path: Path,
    /// `tcp`, `udp` or `dns`.
    pub protocol: String,
    /// The client, or whoever sent a dropped packet that belongs to no connection that is known.
    pub source: Party,
    /// The server: the endpoint where it is known, else what was asked for.
    pub destination: Party,
    /// Hostname of the service that was asked for, or that the endpoint stands for.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub service: String,
    /// What the application asked for, where it is not the destination's address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub asked: Option<SocketAddr>,
    /// The process of the side that saw it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process: Option<Process>,
    /// Why: the kernel's name for a drop or a reset, the error of a failure, a code of the mesh.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// In words, where the mesh knows more.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub detail: String,
    /// Policy that decided.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub policy: String,
    /// From SYN to connected, or from question to answer, microseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_us: Option<u64>,
    /// Since it began, microseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub duration_us: Option<u64>,
    /// Bytes from client to server.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_to_server: Option<u64>,
    /// Bytes from server to client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_to_client: Option<u64>,
    /// Smoothed round trip time, microseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub srtt_us: Option<u32>,
    /// Smallest round trip time, microseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_rtt_us: Option<u32>,
    /// Segments that the side sent again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retransmits: Option<u32>,
    /// Segments that nobody had acknowledged at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unacked: Option<u32>,
    /// Who ended it: `client` or `server`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub closed_by: String,
    /// How: `fin` or `rst`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub closed_with: String,
    /// How often it happened since it was last told.
    #[serde(skip_serializing_if = "is_one")]
    pub count: u32,
    /// A DNS question.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dns: Option<Dns>,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_one(count: &u32) -> bool {
    *count <= 1
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// The last line of an answer: where to go on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Mark {
    /// Ask for events after this one.
    pub next: u64,
    /// Events after the one that was asked for, that were forgotten before this answer.
    pub forgotten: u64,
    /// Events that the kernel had no room for since the agent started; at the relay, of all nodes that report to it.
    pub lost: u64,
    /// Events that nodes did not send to the relay, as it takes so many in a second at most; none at a node.
    #[serde(skip_serializing_if = "is_zero")]
    pub held_back: u64,
}

/// One line of an answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
#[allow(clippy::large_enum_variant, reason = "nearly all are flows")]
pub enum Line {
    /// Has a field `next`, which no event has.
    Mark {
        /// The mark.
        mark: Mark,
    },
    /// An event.
    Flow(Flow),
}

/// Reads an answer of `/flows`.
///
/// # Errors
/// A line is no JSON of that shape, or the last line is missing: the answer was cut off.
pub fn parse(body: &[u8]) -> Result<(Vec<Flow>, Mark), String> {
    let mut flows = Vec::new();
    for line in body.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        match serde_json::from_slice(line) {
            Ok(Line::Flow(flow)) => flows.push(flow),
            Ok(Line::Mark { mark }) => return Ok((flows, mark)),
            Err(error) => return Err(format!("a line of /flows is not what was expected: {error}")),
        }
    }
    Err("the answer of /flows was cut off".to_owned())
}

/// Writes an answer of `/flows`.
#[must_use]
pub fn write<'a>(flows: impl IntoIterator<Item = &'a Flow>, mark: Mark) -> Vec<u8> {
    let mut body = lines(flows);
    end(&mut body, mark);
    body
}

/// Writes events as lines, without the last one.
#[must_use]
pub fn lines<'a>(flows: impl IntoIterator<Item = &'a Flow>) -> Vec<u8> {
    let mut body = Vec::new();
    for flow in flows {
        // Neither writing to memory nor these types can fail.
        let _ = serde_json::to_writer(&mut body, flow);
        body.push(b'\n');
    }
    body
}

/// Ends an answer with its last line.
pub fn end(body: &mut Vec<u8>, mark: Mark) {
    let _ = serde_json::to_writer(&mut *body, &Line::Mark { mark });
    body.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_read_as_it_was_written_and_one_that_was_cut_off_is_refused() {
        let id = ConnectionId::of(5, "10.0.0.1:4000".parse().unwrap());
        let flow = Flow { seq: 3, connection: Some(id), count: 1, srtt_us: Some(0), ..Flow::default() };
        let mark = Mark { next: 4, forgotten: 1, lost: 2, held_back: 3 };
        let body = write([&flow], mark);
        assert_eq!(parse(&body).unwrap(), (vec![Flow { count: 0, ..flow }], mark));
        let cut = body.iter().position(|byte| *byte == b'\n').unwrap();
        assert!(parse(&body[..=cut]).unwrap_err().contains("cut off"));
        assert!(parse(b"<html>\n").is_err());
    }

    #[test]
    fn connections_have_ids_of_their_own_that_survive_being_written() {
        let client = |port| SocketAddr::from(([10, 0, 0, 1], port));
        let id = ConnectionId::of(1, client(40000));
        for other in [ConnectionId::of(2, client(40000)), ConnectionId::of(1, client(40001))] {
            assert_ne!(id, other);
        }
        assert_eq!(id.to_string().parse(), Ok(id));
        for wrong in ["", "xyz", "0000000000000000", "12", "00000000000000000001"] {
            assert!(wrong.parse::<ConnectionId>().is_err(), "{wrong}");
        }
        let mapped = "[::ffff:10.0.0.1]:40000".parse().unwrap();
        assert_eq!(ConnectionId::of(1, mapped), id, "one address in two notations");
    }

    #[test]
    fn words_of_enumerations_are_those_of_their_json() {
        for kind in Kind::ALL {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.as_str());
        }
        for verdict in Verdict::ALL {
            assert_eq!(serde_json::to_value(verdict).unwrap(), verdict.as_str());
        }
        for path in Path::ALL {
            assert_eq!(serde_json::to_value(path).unwrap(), path.as_str());
        }
    }
}
