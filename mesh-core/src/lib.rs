//! What more than one binary of the mesh needs.
//!
//! | module | for |
//! |---|---|
//! | [`admin`] | what an admin endpoint answers, as types; its HTTP server and readiness |
//! | [`error`] | stable codes: side, retry, fix |
//! | [`expression`] | expressions in CEL over what is known of a request |
//! | [`flows`] | events of connections: their JSON, filters, Hubble's shape |
//! | [`hbone`] | the tunnel: CONNECT over HTTP/2, both sides, and the copy loop |
//! | [`identity`] | SPIFFE identities and trust domains |
//! | [`listen`] | sockets that listen on every address, whatever families the kernel has |
//! | [`policy`] | L4 authorization: policies and their pure evaluation |
//! | [`route`] | where a connection goes: pure decisions over the model |
//! | [`signals`] | SIGTERM and SIGINT |
//! | [`state`] | the model of the mesh: workloads, services, policies; its builder and its snapshots |
//! | [`tap`] | requests at waypoints, one by one, for who listens |
//! | [`telemetry`] | metrics, access log, logging |
//! | [`tls`] | mutual TLS with SPIFFE identities |
//! | [`why`] | why a connection is allowed, denied or lost, and what decides |
//! | [`xds`] | the wire messages (workload API, ADS, CA) and the delta client |
#![forbid(unsafe_code)]

pub mod admin;
pub mod error;
pub mod expression;
pub mod flows;
pub mod hbone;
pub mod identity;
pub mod listen;
pub mod policy;
pub mod recent;
pub mod route;
pub mod signals;
pub mod state;
pub mod tap;
pub mod telemetry;
pub mod tls;
pub mod why;
pub mod xds;
