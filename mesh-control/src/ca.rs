//! The certificate authority: `istio.v1.auth.IstioCertificateService`.
//!
//! Of a certificate request only the public key is used. The identity comes from the caller: its own, or one
//! that it asks for by name (`ImpersonatedIdentity`), which a node gets only for pods that are scheduled on it.

pub mod authority;
pub mod store;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_core::identity::SpiffeId;
use mesh_core::xds::proto::ca::istio_certificate_service_server::IstioCertificateService;
use mesh_core::xds::proto::ca::{IstioCertificateRequest, IstioCertificateResponse};
use prost_types::value::Kind;
use tonic::{Request, Response, Status};
use tracing::{info, warn};

use crate::auth::{Access, Caller};
use crate::hub::{Hub, Published};
use crate::metrics::Metrics;
use authority::{DEFAULT_TTL, MAX_TTL, SignError};
use store::CaStore;

/// The service.
#[derive(Debug, Clone)]
pub struct CaServer {
    hub: Arc<Hub>,
    store: Arc<CaStore>,
    access: Access,
    metrics: Arc<Metrics>,
}

impl CaServer {
    /// A server that signs with the store's current authority.
    #[must_use]
    pub fn new(hub: Arc<Hub>, store: Arc<CaStore>, access: Access, metrics: Arc<Metrics>) -> Self {
        Self { hub, store, access, metrics }
    }
}

/// The identity that a request gets, or why it gets none (for the log).
fn identity(
    caller: &Caller,
    request: &IstioCertificateRequest,
    published: &Published,
) -> Result<SpiffeId, String> {
    let trust_domain = &published.mesh.trust_domain;
    let field = |name: &str| match request.metadata.as_ref()?.fields.get(name)?.kind.as_ref()? {
        Kind::StringValue(text) if !text.is_empty() => Some(text.clone()),
        _ => None,
    };
    let Some(wanted) = field("ImpersonatedIdentity") else {
        return Ok(SpiffeId::new(trust_domain, &caller.namespace, &caller.service_account));
    };
    let wanted: SpiffeId = wanted.parse().map_err(|e: mesh_core::identity::InvalidSpiffeId| e.to_string())?;
    if wanted.trust_domain() != trust_domain {
        return Err(format!("{wanted} is not of trust domain {trust_domain}"));
    }
    // A waypoint asks for itself by name.
    if wanted.namespace() == caller.namespace && wanted.service_account() == caller.service_account {
        return Ok(wanted);
    }
    if !caller.agent {
        return Err(format!(
            "{}/{} is no node's agent and asks for the identity {wanted}; see --trusted-node-account",
            caller.namespace, caller.service_account
        ));
    }
    let here = published.objects().pods.values().any(|pod| {
        pod.node == caller.node
            && !pod.terminal
            && pod.meta.namespace == wanted.namespace()
            && pod.service_account == wanted.service_account()
    });
    if here { Ok(wanted) } else { Err(format!("no pod of {wanted} is scheduled on node {}", caller.node)) }
}

/// The lifetime that a request gets.
fn lifetime(request: &IstioCertificateRequest) -> Result<Duration, Status> {
    match u64::try_from(request.validity_duration) {
        Ok(0) | Err(_) => Ok(DEFAULT_TTL),
        Ok(wanted) if wanted > MAX_TTL.as_secs() => Err(Status::invalid_argument(format!(
            "validity_duration {wanted} s is longer than {} s, the most that this CA signs",
            MAX_TTL.as_secs()
        ))),
        Ok(wanted) => Ok(Duration::from_secs(wanted)),
    }
}

#[tonic::async_trait]
impl IstioCertificateService for CaServer {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        self.metrics.csr_count.inc();
        let refuse = |caller: &str, why: &str| {
            warn!(caller, why, "certificate refused");
            self.metrics.authentication_failure();
            Status::unauthenticated("not authorized to get this certificate")
        };
        let caller = match self.access.caller(request.metadata()).await {
            Ok(Some(caller)) => caller,
            Ok(None) => return Err(refuse("unknown", "the listener has no authentication")),
            Err(status) if status.code() == tonic::Code::Unavailable => return Err(status),
            Err(_) => return Err(refuse("unknown", "no valid token")),
        };
        let request = request.into_inner();
        let published = self.hub.published();
        let identity = identity(&caller, &request, &published).map_err(|why| refuse(&caller.node, &why))?;
        let signer = request.metadata.as_ref().and_then(|m| m.fields.get("CertSigner"));
        if let Some(Kind::StringValue(signer)) = signer.and_then(|v| v.kind.as_ref())
            && !signer.is_empty()
        {
            return Err(Status::invalid_argument(format!(
                "CertSigner {signer:?}: this CA has no other signers"
            )));
        }
        let ttl = lifetime(&request)?;
        let now = SystemTime::now();
        let chain = self.store.authority().sign(&request.csr, &identity, ttl, now).map_err(|error| {
            warn!(node = caller.node, %identity, %error, "certificate not signed");
            match error {
                SignError::Csr(_) => {
                    self.metrics.csr_parsing_errors.inc();
                    Status::invalid_argument(error.to_string())
                }
                SignError::Sign(_) => {
                    self.metrics.csr_sign_errors.inc();
                    Status::internal("the certificate could not be signed")
                }
            }
        })?;
        self.metrics.issued.inc();
        self.store.note_issued(&identity.to_string(), now + ttl);
        info!(node = caller.node, %identity, ttl_s = ttl.as_secs(), "certificate issued");
        Ok(Response::new(IstioCertificateResponse { cert_chain: chain }))
    }
}

#[cfg(test)]
mod tests;
