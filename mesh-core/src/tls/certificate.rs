//! A workload's certificate as the CA answers it, and the TLS configurations made from it.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::client::Resumption;
use rustls::server::NoServerSessionStorage;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, TrustAnchor, UnixTime};
use webpki::{ExtendedKeyUsageValidator, KeyPurposeIdIter};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::crl::Revocations;
use super::error::PeerError;
use super::key::KeyAndCsr;
use super::verify::{AcceptTrustDomain, ExpectIdentity, Trust, uri_sans};
use super::{ALPN, provider};
use crate::error::Code;
use crate::identity::SpiffeId;

/// One identity's key, chain and roots. Never printed or serialised with its key; immutable, so that a rotation is a new
/// one.
pub struct WorkloadCertificate {
    identity: SpiffeId,
    key: Arc<CertifiedKey>,
    roots: Vec<CertificateDer<'static>>,
    leaf: Facts,
    trust: Trust,
    server: Arc<ServerConfig>,
}

/// What a leaf says about itself.
struct Facts {
    serial: String,
    not_before: SystemTime,
    not_after: SystemTime,
}

/// Why the CA's answer, or our own key, cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CertificateError {
    /// No key or request could be made.
    #[error("no key and signing request could be made: {0}")]
    KeyGeneration(rcgen::Error),
    /// Leaf and roots are needed.
    #[error("the CA answered with {0} chain entries; a leaf and, last, the roots are needed")]
    TooShort(usize),
    /// An entry is not what its place demands.
    #[error("entry {index} of the CA's answer ({role}) {problem}")]
    Entry {
        /// Position, from 0.
        index: usize,
        /// What the entry should be.
        role: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// A certificate for somebody else.
    #[error("the CA's certificate is for {}, not for {expected}", presented.as_deref().unwrap_or("nobody (no URI SAN)"))]
    WrongIdentity {
        /// The leaf's first URI SAN.
        presented: Option<String>,
        /// Whom we asked for.
        expected: SpiffeId,
    },
    /// A certificate of another key.
    #[error("the CA's certificate is not of the key that was sent: {0}")]
    WrongKey(rustls::Error),
    /// rustls takes no configuration from it.
    #[error("no TLS configuration can be made: {0}")]
    Config(rustls::Error),
}

impl CertificateError {
    /// The stable code.
    #[must_use]
    pub const fn code(&self) -> Code {
        match self {
            Self::KeyGeneration(_) => Code::NoCertificate,
            _ => Code::CertificateUnusable,
        }
    }
}

impl WorkloadCertificate {
    /// Takes the CA's answer to a request: `[leaf, intermediates…, roots]`, each PEM, only the last may hold several.
    ///
    /// # Errors
    /// The answer is too short or malformed, or its leaf is of another identity (its first URI SAN counts) or key.
    pub fn new(
        key: KeyAndCsr,
        chain: &[impl AsRef<str>],
        revocations: &Revocations,
    ) -> Result<Self, CertificateError> {
        let [leaf, intermediates @ .., roots] = chain else {
            return Err(CertificateError::TooShort(chain.len()));
        };
        let mut certs = vec![one_certificate(0, "the leaf", leaf.as_ref())?];
        for (i, pem) in intermediates.iter().enumerate() {
            certs.push(one_certificate(i + 1, "an intermediate", pem.as_ref())?);
        }
        let roots = certificates(chain.len() - 1, "the roots", roots.as_ref())?;
        let anchors = trust_anchors(chain.len() - 1, &roots)?;

        let (identity, key) = key.into_parts();
        let presented = uri_sans(&certs[0]).map_err(|e| entry(0, "the leaf", &e))?.into_iter().next();
        if presented.as_deref() != Some(identity.to_string().as_str()) {
            return Err(CertificateError::WrongIdentity { presented, expected: identity });
        }
        let leaf = facts(&certs[0])?;

        let provider = provider();
        let signing = provider
            .key_provider
            .load_private_key(PrivateKeyDer::Pkcs8(key.0.clone_key()))
            .map_err(CertificateError::WrongKey)?;
        let key = CertifiedKey::new(certs, signing);
        key.keys_match().map_err(CertificateError::WrongKey)?;
        let key = Arc::new(key);

        let trust = Trust { roots: anchors.into(), revocations: revocations.clone(), provider };
        let server = Arc::new(server_config(&identity, &key, &trust)?);
        Ok(Self { identity, key, roots, leaf, trust, server })
    }

    /// Whose certificate it is.
    #[must_use]
    pub const fn identity(&self) -> &SpiffeId {
        &self.identity
    }

    /// Begin of validity.
    #[must_use]
    pub const fn not_before(&self) -> SystemTime {
        self.leaf.not_before
    }

    /// End of validity.
    #[must_use]
    pub const fn not_after(&self) -> SystemTime {
        self.leaf.not_after
    }

    /// When to fetch the next one: half of the lifetime after its begin.
    #[must_use]
    pub fn renew_at(&self) -> SystemTime {
        let lifetime = self.leaf.not_after.duration_since(self.leaf.not_before).unwrap_or_default();
        self.leaf.not_before + lifetime / 2
    }

    /// Whether it can be used at that time.
    #[must_use]
    pub fn is_valid_at(&self, now: SystemTime) -> bool {
        self.leaf.not_before <= now && now < self.leaf.not_after
    }

    /// The leaf's serial number, decimal.
    #[must_use]
    pub fn serial(&self) -> &str {
        &self.leaf.serial
    }

    /// Leaf and intermediates, DER, for dumps.
    #[must_use]
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.key.cert
    }

    /// The roots that came with the certificate, DER, for dumps.
    #[must_use]
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// The configuration to accept tunnels for this workload: a client certificate is mandatory, its chain leads to
    /// our roots, it is of our trust domain.
    #[must_use]
    pub fn server_config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server)
    }

    /// The configuration to open a tunnel as this workload to a peer that must be one of `expected`. An empty list
    /// accepts nobody. Cheap, but worth keeping per pool key.
    ///
    /// # Errors
    /// rustls refuses its own provider, which the tests rule out.
    pub fn client_config(&self, expected: &[SpiffeId]) -> Result<Arc<ClientConfig>, CertificateError> {
        let verifier = ExpectIdentity { trust: self.trust.clone(), expected: expected.into() };
        let mut config = ClientConfig::builder_with_provider(Arc::clone(&self.trust.provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(CertificateError::Config)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(&self.key))));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.enable_sni = false;
        config.resumption = Resumption::disabled();
        // The record layer is ours.
        config.enable_secret_extraction = true;
        Ok(Arc::new(config))
    }

    /// Checks again the chain of a peer that is connected to this workload, after the revocation lists changed.
    ///
    /// # Errors
    /// The peer's certificate, or one above it, is revoked by now. Nothing else counts any more: open connections
    /// outlive a rotation of certificates and roots.
    pub fn recheck_peer(&self, chain: &[CertificateDer<'_>]) -> Result<(), PeerError> {
        let mut at = UnixTime::now();
        // Expiry is reported before revocation: look at each expired certificate at a time when it was valid.
        for _ in 0..=chain.len() {
            match self.trust.check_chain(chain, AnyPurpose, at) {
                Err(PeerError::Revoked) => return Err(PeerError::Revoked),
                Err(PeerError::Expired { not_after, .. }) if not_after < at => at = not_after,
                _ => return Ok(()),
            }
        }
        Ok(())
    }
}

/// For a second look: the first one has checked the purpose.
struct AnyPurpose;

impl ExtendedKeyUsageValidator for AnyPurpose {
    fn validate(&self, _: KeyPurposeIdIter<'_, '_>) -> Result<(), webpki::Error> {
        Ok(())
    }
}

impl fmt::Debug for WorkloadCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkloadCertificate")
            .field("identity", &self.identity)
            .field("serial", &self.leaf.serial)
            .field("not_after", &self.leaf.not_after)
            .finish_non_exhaustive()
    }
}

/// The end of validity of a chain: of the certificate in it that ends first. `None` if none can be read. The second
/// that it names still counts as valid (RFC 5280 §4.1.2.5).
#[must_use]
pub fn expiry(chain: &[CertificateDer<'_>]) -> Option<SystemTime> {
    chain.iter().filter_map(|der| Some(facts(der).ok()?.not_after)).min()
}

/// PEM of certificates, for dumps.
#[must_use]
pub fn to_pem(certs: &[CertificateDer<'_>]) -> String {
    certs.iter().map(|der| pem::encode(&pem::Pem::new("CERTIFICATE", der.as_ref()))).collect()
}

fn entry(index: usize, role: &'static str, problem: &dyn fmt::Display) -> CertificateError {
    CertificateError::Entry { index, role, problem: problem.to_string() }
}

fn certificates(
    index: usize,
    role: &'static str,
    pem: &str,
) -> Result<Vec<CertificateDer<'static>>, CertificateError> {
    let certs: Vec<_> = CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|e| entry(index, role, &format_args!("is not PEM: {e}")))?;
    if certs.is_empty() {
        return Err(entry(index, role, &"holds no CERTIFICATE block"));
    }
    Ok(certs)
}

fn one_certificate(
    index: usize,
    role: &'static str,
    pem: &str,
) -> Result<CertificateDer<'static>, CertificateError> {
    let mut certs = certificates(index, role, pem)?;
    match (certs.pop(), certs.len()) {
        (Some(cert), 0) => Ok(cert),
        (_, more) => {
            Err(entry(index, role, &format_args!("holds {} certificates, it must be one", more + 1)))
        }
    }
}

fn trust_anchors(
    index: usize,
    roots: &[CertificateDer<'_>],
) -> Result<Vec<TrustAnchor<'static>>, CertificateError> {
    let anchor = |der| webpki::anchor_from_trusted_cert(der).map(|a| a.to_owned());
    roots
        .iter()
        .map(anchor)
        .collect::<Result<_, _>>()
        .map_err(|e| entry(index, "the roots", &format_args!("holds a certificate that is no root: {e}")))
}

fn facts(leaf: &CertificateDer<'_>) -> Result<Facts, CertificateError> {
    let (_, cert) = X509Certificate::from_der(leaf).map_err(|e| entry(0, "the leaf", &e))?;
    let time = |t: x509_parser::time::ASN1Time| {
        UNIX_EPOCH + Duration::from_secs(u64::try_from(t.timestamp()).unwrap_or_default())
    };
    Ok(Facts {
        serial: cert.serial.to_string(),
        not_before: time(cert.validity().not_before),
        not_after: time(cert.validity().not_after),
    })
}

fn server_config(
    identity: &SpiffeId,
    key: &Arc<CertifiedKey>,
    trust: &Trust,
) -> Result<ServerConfig, CertificateError> {
    let verifier =
        AcceptTrustDomain { trust: trust.clone(), trust_domain: identity.trust_domain().to_owned() };
    let mut config = ServerConfig::builder_with_provider(Arc::clone(&trust.provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(CertificateError::Config)?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(key))));
    config.alpn_protocols = vec![ALPN.to_vec()];
    // No ticket, no resumption: every handshake shows certificates.
    config.send_tls13_tickets = 0;
    // And no room for sessions: every certificate that is renewed would have 30 KiB of it.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    // The record layer is ours.
    config.enable_secret_extraction = true;
    Ok(config)
}
