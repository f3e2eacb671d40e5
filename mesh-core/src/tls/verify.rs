//! Which peer is accepted.
//!
//! A chain has to lead to the roots that came with the *local* workload's certificate, be valid now, fit its purpose and
//! not be revoked; that much is webpki's. Instead of a host name, SPIFFE URI SANs are compared: a server must be one of
//! the identities that the client expects, a client must be of the server's own trust domain.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use webpki::{
    EndEntityCert, ExtendedKeyUsageValidator, KeyUsage, RevocationCheckDepth, RevocationOptionsBuilder,
    UnknownStatusPolicy,
};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::crl::Revocations;
use super::error::{PeerError, texts};
use crate::identity::SpiffeId;

/// Roots and revocations: what a chain is checked against.
#[derive(Clone, Debug)]
pub(super) struct Trust {
    pub(super) roots: Arc<[TrustAnchor<'static>]>,
    pub(super) revocations: Revocations,
    pub(super) provider: Arc<CryptoProvider>,
}

impl Trust {
    /// Checks chain, validity, purpose and revocation. A status that no list knows is allowed.
    pub(super) fn check_chain(
        &self,
        chain: &[CertificateDer<'_>],
        usage: impl ExtendedKeyUsageValidator,
        now: UnixTime,
    ) -> Result<(), PeerError> {
        let [leaf, intermediates @ ..] = chain else { return Err(PeerError::UnknownIssuer) };
        let lists = self.revocations.lists();
        let lists: Vec<_> = lists.iter().collect();
        // Without any list there is nothing to ask, which the builder reports as an error.
        let revocation = RevocationOptionsBuilder::new(&lists).ok().map(|options| {
            options
                .with_depth(RevocationCheckDepth::Chain)
                .with_status_policy(UnknownStatusPolicy::Allow)
                .build()
        });
        EndEntityCert::try_from(leaf)?.verify_for_usage(
            self.provider.signature_verification_algorithms.all,
            &self.roots,
            intermediates,
            now,
            usage,
            revocation,
            None,
        )?;
        Ok(())
    }
}

/// The URI SANs of a certificate, in their order.
///
/// # Errors
/// The certificate is malformed.
pub fn uri_sans(leaf: &CertificateDer<'_>) -> Result<Vec<String>, PeerError> {
    let malformed = |e: &dyn std::fmt::Display| PeerError::Unusable(e.to_string());
    let (_, leaf) = X509Certificate::from_der(leaf).map_err(|e| malformed(&e))?;
    let san = leaf.subject_alternative_name().map_err(|e| malformed(&e))?;
    let names = san.map(|san| san.value.general_names.as_slice()).unwrap_or_default();
    Ok(names
        .iter()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some((*uri).to_owned()),
            _ => None,
        })
        .collect())
}

/// Who a peer is: the first URI SAN of its leaf that is a workload identity.
///
/// # Errors
/// The chain is empty or malformed, or has no such SAN.
pub fn peer_identity(chain: &[CertificateDer<'_>]) -> Result<SpiffeId, PeerError> {
    let Some(leaf) = chain.first() else { return Err(PeerError::NoIdentity { presented: Vec::new() }) };
    let presented = uri_sans(leaf)?;
    presented.iter().find_map(|san| san.parse().ok()).ok_or(PeerError::NoIdentity { presented })
}

/// The server's view of a client.
#[derive(Debug)]
pub(super) struct AcceptTrustDomain {
    pub(super) trust: Trust,
    /// Our own leaf's trust domain; compared exactly.
    pub(super) trust_domain: String,
}

impl AcceptTrustDomain {
    pub(super) fn check(&self, chain: &[CertificateDer<'_>], now: UnixTime) -> Result<(), PeerError> {
        self.trust.check_chain(chain, KeyUsage::client_auth(), now)?;
        let presented = chain.first().map(uri_sans).transpose()?.unwrap_or_default();
        let mut ids = presented.iter().filter_map(|san| san.parse::<SpiffeId>().ok()).peekable();
        if ids.peek().is_none() {
            return Err(PeerError::NoIdentity { presented });
        }
        if ids.any(|id| id.trust_domain() == self.trust_domain) {
            return Ok(());
        }
        Err(PeerError::WrongTrustDomain { presented, expected: self.trust_domain.clone() })
    }
}

/// The client's view of a server.
#[derive(Debug)]
pub(super) struct ExpectIdentity {
    pub(super) trust: Trust,
    /// Any of these; an empty list accepts nobody.
    pub(super) expected: Box<[SpiffeId]>,
}

impl ExpectIdentity {
    pub(super) fn check(&self, chain: &[CertificateDer<'_>], now: UnixTime) -> Result<(), PeerError> {
        self.trust.check_chain(chain, KeyUsage::server_auth(), now)?;
        let presented = chain.first().map(uri_sans).transpose()?.unwrap_or_default();
        let is_expected = |san: &String| san.parse().is_ok_and(|id: SpiffeId| self.expected.contains(&id));
        if presented.iter().any(is_expected) {
            return Ok(());
        }
        Err(PeerError::WrongIdentity { presented, expected: texts(&self.expected) })
    }
}

/// Leaf and intermediates in one list, as both checks take them.
fn chain<'a>(leaf: &CertificateDer<'a>, rest: &[CertificateDer<'a>]) -> Vec<CertificateDer<'a>> {
    std::iter::once(leaf).chain(rest).cloned().collect()
}

/// The parts of rustls' verifier traits that are the same for both sides: signatures are the provider's matter.
macro_rules! signatures_by_provider {
    () => {
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            let algorithms = &self.trust.provider.signature_verification_algorithms;
            verify_tls12_signature(message, cert, dss, algorithms)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            let algorithms = &self.trust.provider.signature_verification_algorithms;
            verify_tls13_signature(message, cert, dss, algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.trust.provider.signature_verification_algorithms.supported_schemes()
        }
    };
}

impl ClientCertVerifier for AcceptTrustDomain {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // No hints: every mesh client has one certificate to offer.
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check(&chain(leaf, rest), now).map_err(PeerError::into_rustls)?;
        Ok(ClientCertVerified::assertion())
    }

    signatures_by_provider!();
}

impl ServerCertVerifier for ExpectIdentity {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(&chain(leaf, rest), now).map_err(PeerError::into_rustls)?;
        Ok(ServerCertVerified::assertion())
    }

    signatures_by_provider!();
}
