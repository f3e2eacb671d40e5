//! The relay: what nodes tell of connections, in one stream for the whole mesh.
//!
//! | module | for |
//! |---|---|
//! | [`ring`] | the last hour, or as much of it as there is room for; who waits for the next |
//! | [`intake`] | nodes' streams (`undermesh.node.v1.NodeService/ReportFlows`) |
//! | [`questions`] | asking nodes' agents on behalf of operators |
//! | [`graph`] | figures by client and server, for the map |
//! | [`facts`] | what the map says of services, configuration and STRICT |
//! | [`gate`] | who may see what |
//! | [`web`] | the answers, and the map's page |
//! | [`listen`] | the TLS port |
//!
//! Nobody waits for a reader: nodes write into the ring, readers ask for what comes after the event that they saw last, and
//! hear how many they missed. A node that has more to tell than it is asked for keeps the rest to itself and counts it.

pub mod facts;
pub mod gate;
pub mod graph;
pub mod intake;
pub mod listen;
pub mod questions;
pub mod ring;
pub mod web;

pub use ring::{Limits, Relay};
