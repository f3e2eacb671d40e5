//! Generated wire messages; the sources are `mesh-core/proto/**.proto`.
#![allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::use_self,
    clippy::too_many_lines,
    clippy::allow_attributes_without_reason,
    reason = "generated code"
)]

/// `istio.workload`: addresses of the mesh.
pub mod workload {
    tonic::include_proto!("istio.workload");
}
/// `istio.security`: L4 authorization policies.
pub mod security {
    tonic::include_proto!("istio.security");
}
/// `istio.v1.auth`: the certificate authority.
pub mod ca {
    tonic::include_proto!("istio.v1.auth");
}
/// `envoy.service.discovery.v3`: delta ADS.
pub mod discovery {
    tonic::include_proto!("envoy.service.discovery.v3");
}
/// `envoy.service.auth.v3`: external authorization.
pub mod ext_authz {
    tonic::include_proto!("envoy.service.auth.v3");
}
/// `undermesh.node.v1`: enrolment reports.
pub mod node {
    tonic::include_proto!("undermesh.node.v1");
}
/// `undermesh.l7.v1`: what waypoints are told.
pub mod l7 {
    tonic::include_proto!("undermesh.l7.v1");

    /// Whose it is, and never what it is.
    impl std::fmt::Debug for Credential {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("Credential").field("origin", &self.origin).finish_non_exhaustive()
        }
    }
}
/// `runtime.v1`: what a container runtime tells of its pods.
pub mod cri {
    tonic::include_proto!("runtime.v1");
}
/// OTLP: spans on their way to a collector.
pub mod otlp {
    tonic::include_proto!("opentelemetry.trace");
}
