//! Whole-system tests on one Linux machine, without a cluster.
//!
//! - [`bed`] makes nodes, pods and the network between them out of network namespaces and cgroups, from the same YAML
//!   that the control plane's directory source reads, and runs the mesh and unmodified programs in them.
//! - [`tools`] are small programs that run inside pods: servers, clients, load.
//! - [`scenarios`] are the tests: each a sentence, each looking at a side that the product does not write.
//! - [`peer`] runs stock ztunnel beside us, where its binary is given.
//! - [`demo`] tells the story to a person; [`bench`] measures it; [`soak`] goes on with it for as long as asked.
#![forbid(unsafe_code)]

pub mod bed;
pub mod bench;
pub mod demo;
pub mod peer;
pub mod scenarios;
pub mod soak;
pub mod tools;
