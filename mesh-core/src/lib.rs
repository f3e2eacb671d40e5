//! What more than one binary of the mesh needs.
//!
//! | module | for |
//! |---|---|
//! | [`identity`] | SPIFFE identities and trust domains |
//! | [`xds`] | the wire messages (workload API, ADS, CA) and the delta client |
#![forbid(unsafe_code)]

pub mod identity;
pub mod xds;
