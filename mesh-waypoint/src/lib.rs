//! The L7 proxy: takes the requests to the services and workloads that are bound to it, out of HBONE, decides where each
//! goes and whether it may, and carries it on.
//!
//! | module | for |
//! |---|---|
//! | [`cli`] | flags |
//! | [`runtime`] | from flags to a running process, and from a signal to its end |
//! | [`certificate`] | the waypoint's own certificate |
//! | [`feed`] | from the control plane's resources to a snapshot |
//! | [`admin`] | metrics, readiness, dumps |
//! | [`telemetry`] | one record per request |
//! | [`tap`] | requests, one by one, for who listens |
//! | [`observe`] | what is said of requests, as Telemetry resources have it; no I/O |
//! | [`trace`] | trace contexts, and spans for collectors |
//! | [`config`] | what the control plane says, as one immutable snapshot |
//! | [`ports`] | what a gateway speaks at its ports, and with which certificates; no I/O |
//! | [`request`] | what is known of a request before it is sent on |
//! | [`routing`] | which rule a request falls under, and what the rule does to it; no I/O |
//! | [`upstream`] | which endpoint takes it, and whether it may be tried (again); no I/O |
//! | [`security`] | who sent it and whether they may: tokens, policies |
//! | [`proxy`] | sockets: HBONE and HTTP on both sides |
#![forbid(unsafe_code)]

pub mod admin;
pub mod certificate;
pub mod cli;
pub mod config;
pub mod feed;
pub mod observe;
pub mod ports;
pub mod proxy;
pub mod request;
pub mod routing;
pub mod runtime;
pub mod security;
pub mod tap;
pub mod telemetry;
pub mod trace;
pub mod upstream;
