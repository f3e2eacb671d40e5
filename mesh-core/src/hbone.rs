//! HBONE: one CONNECT stream of HTTP/2 over mutual TLS per connection of the application.
//!
//! The parts, from the wire upwards:
//!
//! | module | for |
//! |---|---|
//! | [`http2`] | frames, header blocks, windows |
//! | [`authority`], [`baggage`], [`request`] | what a CONNECT says: pure encoding and parsing |
//! | [`client`], [`server`] | one connection each way: settings, keepalive, GOAWAY |
//! | [`stream`] | the bytes of one CONNECT, with flow control |
//! | [`copy`] | the loop between a socket and a stream, or two sockets |
//!
//! The wire behaviour is that of Istio ambient, so that a peer may be any node proxy or waypoint of it. HTTP/2 and
//! the records of TLS are our own, because of what they cost: no byte is copied on its way, no task is woken for another,
//! and an idle connection holds next to nothing.

pub mod authority;
pub mod baggage;
pub mod client;
pub mod copy;
mod error;
pub mod http2;
pub mod request;
pub mod server;
mod settings;
pub mod stream;

pub use authority::Authority;
pub use baggage::{Baggage, BaggageHeader};
pub use client::{ClientConnection, Opened, Opening};
pub use error::Error;
pub use http2::Reason;
pub use request::{ConnectRequest, Forwarded, RequestError, TraceParent};
pub use server::{Incoming, IncomingConnect, ServerConnection};
pub use settings::Settings;
pub use stream::HboneStream;

/// The port on which every mesh workload accepts HBONE.
pub const PORT: u16 = 15008;

#[cfg(test)]
mod tests;
