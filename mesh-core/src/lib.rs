//! What more than one binary of the mesh needs.
//!
//! | module | for |
//! |---|---|
//! | [`error`] | stable codes: side, retry, fix |
//! | [`hbone`] | the tunnel: CONNECT over HTTP/2, both sides, and the copy loop |
//! | [`identity`] | SPIFFE identities and trust domains |
//! | [`policy`] | L4 authorization: policies and their pure evaluation |
//! | [`route`] | where a connection goes: pure decisions over the model |
//! | [`state`] | the model of the mesh: workloads, services, policies; its builder and its snapshots |
//! | [`tls`] | mutual TLS with SPIFFE identities |
//! | [`xds`] | the wire messages (workload API, ADS, CA) and the delta client |
#![forbid(unsafe_code)]

pub mod error;
pub mod hbone;
pub mod identity;
pub mod policy;
pub mod route;
pub mod state;
pub mod tls;
pub mod xds;
