//! Stock ztunnel as a node's agent: the peer that the tunnel is compared with and must understand.
//!
//! Its binary is never part of the project: scenarios and benches take a path and are skipped without one. What is
//! here is what Istio's CNI agent does for it: [`agent`] starts it, [`zds`] hands it the pods, [`redirect`] sends their traffic to it.

pub mod agent;
pub mod redirect;
pub mod zds;
