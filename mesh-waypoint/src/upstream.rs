//! Which endpoint takes a request, and whether it may be tried (again).
//!
//! Nothing here waits, dials or reads a clock: time and random numbers are arguments. A request's way through it:
//!
//! 1. [`Clusters::cluster`] gives the [`Cluster`] of a backend: one service port, or a subset of it. There is one set of
//!    clusters for the whole process; what they count holds for all workers together.
//! 2. [`Cluster::admit`] says whether one more request, connection or retry may be (circuit breaking).
//! 3. [`HashKey::hash`] gives what consistent hashing goes by, [`Cluster::pick`] the endpoint.
//! 4. [`Picked::report`] tells how it went (outlier detection); [`RetryPolicy`] says whether and when to try again.
//!
//! The control runtime calls [`Clusters::apply`] with what a new snapshot says, before the snapshot is published. What is
//! read per request are immutable tables behind `arc-swap` and atomic counters; locks are taken only where tables are
//! built: for a new backend, a change of configuration or endpoints, and an ejection.

mod choose;
mod cluster;
mod clusters;
mod destinations;
mod dump;
mod endpoint;
mod hash;
mod limits;
mod live;
mod locality;
mod members;
mod outlier;
mod policy;
mod rate;
mod registry;
mod retry;
mod table;
#[cfg(test)]
mod tests;

pub use cluster::{Cluster, PickContext, Picked, Tried};
pub use clusters::{ClusterKey, Clusters, Target, UnknownCluster, View};
pub use destinations::Destinations;
pub use endpoint::{Endpoint, LeftOut, NoEndpoint};
pub use hash::{HashKey, Hashed};
pub use limits::{Limit, Overflow, Permit};
pub use outlier::Outcome;
pub use policy::{
    Algorithm, Balancer, ConnectionPolicy, Keepalive, Limits, LocalityPolicy, OutlierPolicy, Policy,
    RetryBudget, Warmup,
};
pub use rate::{Limited, RateLimiter, RateLimiters};
pub use retry::{RetryPolicy, TryEnd};
