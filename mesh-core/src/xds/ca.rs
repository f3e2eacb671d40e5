//! The client of the certificate authority (`istio.v1.auth`).

use std::time::Duration;

use prost_types::value::Kind;
use prost_types::{Struct, Value};
use tokio::sync::Mutex;
use tonic::Request;
use tonic::transport::Channel;

use super::channel::{ChannelError, ControlPlane};
use super::proto::ca::IstioCertificateRequest;
use super::proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;
use crate::identity::SpiffeId;

#[cfg(test)]
mod tests;

/// How long one signing may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The CA cannot be reached or asked.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The CA said no.
    #[error("the CA at {address} did not sign for {identity}: {code:?}: {message}")]
    Refused {
        /// Where it is.
        address: String,
        /// For whom.
        identity: SpiffeId,
        /// The gRPC status.
        code: tonic::Code,
        /// Its text.
        message: String,
    },
    /// The answer has no certificate.
    #[error(
        "the CA at {address} answered for {identity} with {count} certificates; expected the leaf first, the roots last"
    )]
    Incomplete {
        /// Where it is.
        address: String,
        /// For whom.
        identity: SpiffeId,
        /// How many there were.
        count: usize,
    },
}

impl CaError {
    /// Whether the CA decided against us, as opposed to not being there.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        use tonic::Code;
        let Self::Refused { code, .. } = self else { return false };
        matches!(code, Code::Unauthenticated | Code::PermissionDenied | Code::InvalidArgument)
    }
}

/// Asks the CA to sign for workloads of this node.
#[derive(Debug)]
pub struct CaClient {
    server: ControlPlane,
    /// The connection, with the roots that it was opened with.
    channel: Mutex<Option<(Option<Vec<u8>>, Channel)>>,
}

impl CaClient {
    /// A client that connects when it is first asked.
    #[must_use]
    pub fn new(server: ControlPlane) -> Self {
        Self { server, channel: Mutex::new(None) }
    }

    /// Has a signing request (PEM, PKCS#10) signed for `identity`, a workload of this node. Returns the PEM chain: leaf,
    /// intermediates, and last the bundle of roots.
    ///
    /// # Errors
    /// The CA is away, refuses, or answers without a chain.
    pub async fn sign(&self, csr: &str, identity: &SpiffeId, ttl: Duration) -> Result<Vec<String>, CaError> {
        let value = Value { kind: Some(Kind::StringValue(identity.to_string())) };
        let fields = [("ImpersonatedIdentity".to_owned(), value)].into();
        self.ask(csr, identity, ttl, Some(Struct { fields })).await
    }

    /// As [`Self::sign`], for the identity that the token itself stands for: that of a waypoint. The CA decides which
    /// one that is; the certificate tells.
    ///
    /// # Errors
    /// As [`Self::sign`].
    pub async fn sign_own(
        &self,
        csr: &str,
        identity: &SpiffeId,
        ttl: Duration,
    ) -> Result<Vec<String>, CaError> {
        self.ask(csr, identity, ttl, None).await
    }

    async fn ask(
        &self,
        csr: &str,
        identity: &SpiffeId,
        ttl: Duration,
        metadata: Option<Struct>,
    ) -> Result<Vec<String>, CaError> {
        let mut request = Request::new(IstioCertificateRequest {
            csr: csr.to_owned(),
            validity_duration: i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX),
            metadata,
        });
        request.set_timeout(TIMEOUT);
        self.server.authorize(request.metadata_mut())?;
        let mut client = IstioCertificateServiceClient::new(self.channel().await?);
        let refused = |code, message: &str| CaError::Refused {
            address: self.server.address.clone(),
            identity: identity.clone(),
            code,
            message: message.to_owned(),
        };
        let answer = tokio::time::timeout(TIMEOUT, client.create_certificate(request)).await;
        let chain = match answer {
            Ok(Ok(response)) => {
                self.server.again.now();
                response.into_inner().cert_chain
            }
            Ok(Err(status)) => {
                if status.code() == tonic::Code::Unavailable {
                    *self.channel.lock().await = None;
                }
                return Err(refused(status.code(), status.message()));
            }
            Err(elapsed) => {
                *self.channel.lock().await = None;
                return Err(refused(
                    tonic::Code::DeadlineExceeded,
                    &format!("no answer within {TIMEOUT:?} ({elapsed})"),
                ));
            }
        };
        if chain.len() < 2 {
            let (address, count) = (self.server.address.clone(), chain.len());
            return Err(CaError::Incomplete { address, identity: identity.clone(), count });
        }
        Ok(chain)
    }

    /// The open connection; a new one when there is none or the file of roots has changed.
    async fn channel(&self) -> Result<Channel, CaError> {
        let roots = self.server.read_roots()?;
        let mut slot = self.channel.lock().await;
        if let Some((with, channel)) = &*slot
            && *with == roots
        {
            return Ok(channel.clone());
        }
        let channel = self.server.connect().await?;
        *slot = Some((roots, channel.clone()));
        Ok(channel)
    }
}
