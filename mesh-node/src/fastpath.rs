//! Which pairs of pods of this node may talk without the agent.

use std::net::{IpAddr, SocketAddr};

/// A connection between two pods of this node that worked through the tunnel.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Candidate {
    /// Uid of the client's pod.
    pub pod: String,
    /// The client's address.
    pub source: IpAddr,
    /// The server's address and port, as the client asked for them.
    pub destination: SocketAddr,
}
