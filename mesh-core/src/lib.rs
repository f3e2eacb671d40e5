//! What more than one binary of the mesh needs.
//!
//! | module | for |
//! |---|---|
//! | [`identity`] | SPIFFE identities and trust domains |
//! | [`policy`] | L4 authorization: policies and their pure evaluation |
//! | [`state`] | the model of the mesh: workloads, services, policies; its builder and its snapshots |
//! | [`xds`] | the wire messages (workload API, ADS, CA) and the delta client |
#![forbid(unsafe_code)]

pub mod identity;
pub mod policy;
pub mod state;
pub mod xds;
