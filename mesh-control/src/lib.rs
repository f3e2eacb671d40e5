//! The control plane: sources -> model -> resources -> push; certificate authority.
//!
//! | module | for |
//! |---|---|
//! | [`source`] | where objects come from; [`source::dir`]: a watched directory of YAML; [`source::kube`]: an API server |
//! | [`model`] | the objects, validated, blind to their source |
//! | [`convert`] | model to wire resources, pure |
//! | [`hub`] | the newest objects and snapshot, and what makes the second from the first |
//! | [`analysis`] | what is wrong, or likely not meant, in files and clusters |
//! | [`ads`] | the delta ADS server |
//! | [`enrol`] | what nodes report as captured |
//! | [`relay`] | what all nodes tell of connections, and who may see it |
//! | [`replicas`] | other replicas of the control plane: what agents tell one, all know |
//! | [`auth`] | tokens: who a client is |
//! | [`fields`] | which fields of the APIs have an effect, as tables |
//! | [`ca`] | the certificate authority |
//! | [`kubernetes`] | what is done in a cluster besides reading it |
//! | [`definitions`] | CustomResourceDefinitions of Istio's kinds, for clusters that have none |
//! | [`debug`] | 15014: metrics, readiness, JSON |
//! | [`server`] | listeners and tasks |
//! | [`cli`] | the command line |
#![forbid(unsafe_code)]

pub mod ads;
pub mod analysis;
pub mod auth;
pub mod ca;
pub mod cli;
pub mod convert;
pub mod debug;
pub mod definitions;
pub mod enrol;
pub mod fields;
mod files;
pub mod hub;
pub mod kubernetes;
pub mod metrics;
pub mod model;
pub mod relay;
pub mod replicas;
pub mod server;
pub mod source;
#[cfg(test)]
mod testing;
mod tree;
