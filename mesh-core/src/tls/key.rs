//! The private key of an identity, and the request to have it certified.

use std::fmt;

use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls_pki_types::PrivatePkcs8KeyDer;

use super::certificate::CertificateError;
use crate::identity::SpiffeId;

/// A fresh ECDSA P-256 key and a PKCS#10 request for one identity.
///
/// The key is neither printed nor serialised, and is wiped from memory when dropped.
pub struct KeyAndCsr {
    identity: SpiffeId,
    key: Key,
    csr: String,
}

/// PKCS#8, wiped on drop (rustls-pki-types does that for its own copies only on request).
pub(super) struct Key(pub(super) PrivatePkcs8KeyDer<'static>);

impl Drop for Key {
    fn drop(&mut self) {
        zeroize::Zeroize::zeroize(&mut self.0);
    }
}

impl KeyAndCsr {
    /// Makes a key, and a request with an empty subject and the identity as its URI SAN.
    ///
    /// # Errors
    /// The identity cannot stand in a certificate (not ASCII), or the system has no randomness.
    pub fn generate(identity: &SpiffeId) -> Result<Self, CertificateError> {
        let mut pair =
            KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(CertificateError::KeyGeneration)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let uri = identity.to_string().try_into().map_err(CertificateError::KeyGeneration)?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        let csr = params
            .serialize_request(&pair)
            .and_then(|request| request.pem())
            .map_err(CertificateError::KeyGeneration)?;
        let key = Key(PrivatePkcs8KeyDer::from(pair.serialize_der()));
        zeroize::Zeroize::zeroize(&mut pair);
        Ok(Self { identity: identity.clone(), key, csr })
    }

    /// The request, PEM, as the CA service takes it.
    #[must_use]
    pub fn csr_pem(&self) -> &str {
        &self.csr
    }

    /// Whom the certificate is for.
    #[must_use]
    pub const fn identity(&self) -> &SpiffeId {
        &self.identity
    }

    pub(super) fn into_parts(self) -> (SpiffeId, Key) {
        (self.identity, self.key)
    }
}

impl fmt::Debug for KeyAndCsr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyAndCsr").field("identity", &self.identity).finish_non_exhaustive()
    }
}
