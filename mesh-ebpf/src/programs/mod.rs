//! The bodies of the programs.

pub(crate) mod connect;
pub(crate) mod context;
pub(crate) mod datagram;
pub(crate) mod egress;
pub(crate) mod lookup;
pub(crate) mod maps;
pub(crate) mod peer;
pub(crate) mod probe;
pub(crate) mod sockets;
pub(crate) mod trace;
pub(crate) mod trace_points;
