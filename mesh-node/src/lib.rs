//! The per-node agent: captures the connections of enrolled pods, carries them in mutual TLS, decides L4 policy.
//!
//! | module | for |
//! |---|---|
//! | [`config`] | what an operator can set: flags, environment, YAML file |
//! | [`runtime`] | from settings to a running agent, and from a signal to its end |
//! | [`capture`] | the kernel side: programs, maps, pins, enrolling a pod, doctor |
//! | [`pods`] | the pods of this node, whatever tells about them |
//! | [`cni`] | the CNI plugin that holds a pod's start until it is captured, and the agent's side of it |
//! | [`control`] | the control runtime: workload feed, enrolment, reports |
//! | [`certs`] | certificates of this node's pods: fetched ahead, renewed at half of their life |
//! | [`proxy`] | the data path: workers, outbound, inbound, tunnels |
//! | [`fastpath`] | pairs of pods of this node that may talk without the agent |
//! | [`dns`] | the DNS proxy for the names of the mesh |
//! | [`admin`] | what the agent says about itself: admin, metrics, readiness |
//! | [`memory`] | memory that is no longer needed goes back to the kernel |
//! | [`generations`] | how old and new agents of a node know each other |
//! | [`trace`] | what the kernel tells of connections and packets, joined with the mesh |
//! | [`uninstall`] | taking everything off a node |
//! | [`sys`] | every unsafe system call |
//!
//! Threads, ports, files and signals: `ARCHITECTURE.md`.

pub mod admin;
pub mod capture;
pub mod certs;
pub mod cni;
pub mod config;
pub mod control;
pub mod dns;
pub mod fastpath;
pub mod generations;
pub mod link;
pub mod memory;
pub mod pods;
pub mod proxy;
pub mod runtime;
pub mod sys;
pub mod trace;
pub mod uninstall;
