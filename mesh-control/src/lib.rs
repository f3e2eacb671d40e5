//! The control plane: sources -> model -> resources -> push; certificate authority.
//!
//! | module | for |
//! |---|---|
//! | [`source`] | where objects come from; [`source::dir`]: a watched directory of YAML |
//! | [`model`] | the objects, validated, blind to their source |
//! | [`convert`] | model to wire resources, pure |
//! | [`hub`] | the newest objects and snapshot, and what makes the second from the first |
//! | [`ads`] | the delta ADS server |
//! | [`enrol`] | what nodes report as captured |
//! | [`auth`] | tokens: who a client is |
//! | [`ca`] | the certificate authority |
//! | [`debug`] | 15014: metrics, readiness, JSON |
//! | [`server`] | listeners and tasks |
//! | [`cli`] | the command line |
#![forbid(unsafe_code)]

pub mod ads;
pub mod auth;
pub mod ca;
pub mod cli;
pub mod convert;
pub mod debug;
pub mod enrol;
mod files;
pub mod hub;
pub mod metrics;
pub mod model;
pub mod server;
pub mod source;
#[cfg(test)]
mod testing;
mod tree;
