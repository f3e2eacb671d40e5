//! The per-node agent: captures the connections of enrolled pods, carries them in mutual TLS, decides L4 policy.
//!
//! | module | for |
//! |---|---|
//! | [`capture`] | kernel capture: programs, maps, pins, enrolled pods |
//! | [`config`] | what an operator can set: flags, environment, YAML file |
//! | [`certs`] | certificates of this node's pods: fetched ahead, renewed at half of their life |
//! | [`proxy`] | the data path: workers, outbound, inbound, tunnels |
//! | [`fastpath`] | pairs of pods of this node that may talk without the agent |
//! | [`dns`] | the DNS proxy for the names of the mesh |
//! | [`admin`] | what the agent says about itself: admin, metrics, readiness |
//! | [`generations`] | how old and new agents of a node know each other |
//! | [`pods`] | the pods of this node |
//! | [`sys`] | every unsafe system call |
//!
//! Threads, ports, files and signals: `ARCHITECTURE.md`.

pub mod admin;
pub mod capture;
pub mod certs;
pub mod config;
pub mod dns;
pub mod fastpath;
pub mod generations;
pub mod pods;
pub mod proxy;
pub mod sys;
