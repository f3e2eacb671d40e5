//! Flow tracing: what the kernel tells of connections and packets, joined with what the mesh knows of them.
//!
//! | module | for |
//! |---|---|
//! | [`told`] | one event as it is kept: small, and written out only when somebody asks |
//! | [`join`] | from the kernel's events and the agent's records to events of the mesh; pure |
//! | [`pairs`] | figures by pair of workloads, for metrics |
//! | [`ring`] | the last events, and who waits for the next |
//! | [`spans`] | connections as spans, for a collector |
//! | [`run`] | the thread that reads the kernel's ring, and the pods that are traced |
//!
//! The kernel tells of sockets in pods' namespaces and of packets with pods' addresses. The agent adds what only it knows:
//! its records of connections that it carried or refused (the same that the access log gets), and DNS answers. None of it
//! touches a data worker: records come from the log's thread.

pub mod join;
pub mod pairs;
pub mod ring;
pub mod run;
pub mod spans;
pub mod told;

pub use join::{Context, Joiner, LocalPod, Pods, Policies};
pub use ring::Flows;
pub use run::Tracer;
pub use told::Told;
