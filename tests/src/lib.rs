//! Whole-system tests on one Linux machine, without a cluster and with one.
//!
//! - [`bed`] makes nodes, pods and the network between them out of network namespaces and cgroups, from the same YAML
//!   that the control plane's directory source reads, and runs the mesh and unmodified programs in them.
//! - [`tools`] are small programs that run inside pods: servers, clients, load.
//! - [`scenarios`] are the tests: each a sentence, each looking at a side that the product does not write.
//! - [`cluster`] is a real Kubernetes of several nodes on this machine.
//! - [`k8s`] are the scenarios on it.
//! - [`peer`] runs stock ztunnel beside us, where its binary is given.
//! - [`demo`] tells the story to a person; [`bench`] measures it; [`soak`] goes on with it for as long as asked.
#![forbid(unsafe_code)]

pub mod bed;
pub mod bench;
pub mod cluster;
pub mod demo;
pub mod k8s;
pub mod peer;
pub mod scenarios;
pub mod soak;
pub mod tools;
