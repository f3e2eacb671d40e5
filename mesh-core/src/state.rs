//! What a node knows of its mesh: workloads, services and L4 policies, validated and indexed.
//!
//! Wire messages become [`Workload`], [`Service`] and [`crate::policy::Policy`] or a [`DecodeError`] that names
//! the object and the field. [`StateIndex`] is the builder on the control runtime; [`MeshState`] is the immutable
//! snapshot that the data path reads. A snapshot shares its structure with the one before it, so that a change of
//! one workload among thousands costs what that workload costs, and taking a snapshot costs nothing.

mod address;
mod decode;
mod dump;
mod index;
mod mesh;
#[cfg(test)]
pub(crate) mod samples;
mod service;
mod settings;
mod shared;
#[cfg(test)]
mod tests;
mod workload;

pub use address::{Cidr, GatewayAddress, Locality, NamespacedHostname, NetworkAddress, NetworkCidr};
pub(crate) use decode::{Context, cidr_from_bytes};
pub use decode::{DecodeError, Problem};
pub use index::StateIndex;
pub use mesh::{Address, LocalWorkload, MeshOptions, MeshState};
pub use service::{
    Endpoint, HealthPolicy, IpFamilies, LoadBalancing, Mode, Scope, Service, ServiceEndpoints, ServicePort,
    Visibility, WeightedWaypoint,
};
pub use settings::{SameNode, Settings, SettingsError};
pub use workload::{
    AppProtocol, ApplicationTunnel, Extensions, Health, NetworkMode, PortMap, TunnelProtocol, Workload,
    WorkloadType,
};

/// A shared string: names are copied into many indexes and labels.
pub type Str = std::sync::Arc<str>;
