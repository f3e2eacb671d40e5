//! The certificate authority of the control plane.

use std::time::Duration;

use futures_util::future::LocalBoxFuture;
use mesh_core::identity::SpiffeId;
use mesh_core::tls::{KeyAndCsr, Revocations, WorkloadCertificate};
use mesh_core::xds::ca::CaClient;
use tokio::sync::watch;

use crate::certs::Authority;

/// How the authority answered last.
#[derive(Debug, Clone, Default)]
pub struct CaStatus {
    /// Whether it answered.
    pub connected: bool,
    /// Milliseconds since the epoch; 0 when it was never asked.
    pub since_ms: u64,
    /// Why it did not.
    pub problem: Option<String>,
}

/// Fetches over gRPC, for identities that the node's token allows.
pub struct GrpcAuthority {
    client: CaClient,
    lifetime: Duration,
    revocations: Revocations,
    status: watch::Sender<CaStatus>,
}

impl GrpcAuthority {
    /// Certificates of `lifetime`, checked against `revocations` when peers present theirs.
    #[must_use]
    pub fn new(
        client: CaClient,
        lifetime: Duration,
        revocations: Revocations,
        status: watch::Sender<CaStatus>,
    ) -> Self {
        Self { client, lifetime, revocations, status }
    }

    async fn fetch(&self, identity: SpiffeId) -> Result<WorkloadCertificate, String> {
        let key = KeyAndCsr::generate(&identity).map_err(|e| e.to_string())?;
        let signed = self.client.sign(key.csr_pem(), &identity, self.lifetime).await;
        let problem = signed.as_ref().err().map(ToString::to_string);
        // A refusal is an answer, too.
        let connected = signed.as_ref().err().is_none_or(mesh_core::xds::ca::CaError::is_refusal);
        self.status.send_if_modified(|status| {
            let turned = status.connected != connected || status.since_ms == 0;
            if turned {
                status.connected = connected;
                status.since_ms = crate::proxy::failures::now_ms();
            }
            status.problem = problem;
            turned
        });
        let chain = signed.map_err(|e| e.to_string())?;
        WorkloadCertificate::new(key, &chain, &self.revocations).map_err(|e| e.to_string())
    }
}

impl Authority for GrpcAuthority {
    fn fetch(&self, identity: &SpiffeId) -> LocalBoxFuture<'_, Result<WorkloadCertificate, String>> {
        Box::pin(Self::fetch(self, identity.clone()))
    }
}
