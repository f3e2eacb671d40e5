//! The kernel programs on the running kernel, with real sockets in real network namespaces. Needs root and
//! `UM_BPF_OBJECT`; `cargo xtask test kernel` sets both up.
//!
//! Each test makes its own namespaces (`um-k<pid>-…`) and loads its own programs and maps, so that tests run side by
//! side. Programs are attached to the cgroup that the tests run in; they let everything go that is not enrolled.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "kernel/support.rs"]
mod support;

#[path = "kernel/dns.rs"]
mod dns;
#[path = "kernel/enrolment.rs"]
mod enrolment;
#[path = "kernel/fastpath.rs"]
mod fastpath;
#[path = "kernel/inbound.rs"]
mod inbound;
#[path = "kernel/life.rs"]
mod life;
#[path = "kernel/lossy.rs"]
mod lossy;
#[path = "kernel/outbound.rs"]
mod outbound;
#[path = "kernel/trace.rs"]
mod trace;
