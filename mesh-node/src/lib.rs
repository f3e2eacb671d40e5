//! The per-node agent: captures the connections of enrolled pods, carries them in mutual TLS, decides L4 policy.
//!
//! | module | for |
//! |---|---|
//! | [`config`] | what an operator can set: flags, environment, YAML file |
//! | [`dns`] | the DNS proxy for the names of the mesh |
//!
//! Threads, ports, files and signals: `ARCHITECTURE.md`.

pub mod config;
pub mod dns;
