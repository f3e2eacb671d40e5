//! One signing key with its chain and the roots that the mesh trusts: signs, and knows nothing of files.

use std::time::{Duration, SystemTime};

use aws_lc_rs::rand;
use mesh_core::identity::SpiffeId;
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::public_key::PublicKey;

/// Lifetime of a certificate when the request names none.
pub const DEFAULT_TTL: Duration = Duration::from_secs(24 * 3600);
/// Longest lifetime that is signed.
pub const MAX_TTL: Duration = Duration::from_secs(90 * 24 * 3600);
/// Certificates are valid from a little earlier, for peers whose clock is behind.
const BACKDATE: Duration = Duration::from_secs(120);
const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// Signs certificates.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// Intermediates from the signing certificate upwards, one PEM certificate each; empty when the root signs.
    chain: Vec<String>,
    /// All trusted roots, concatenated.
    roots: String,
    not_after: SystemTime,
    root_not_after: SystemTime,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

/// Why a certificate was not signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// The request is no usable PKCS#10.
    #[error("csr: {0}")]
    Csr(String),
    /// The key or the library failed.
    #[error("signing: {0}")]
    Sign(String),
}

/// Why key and certificates make no authority.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct AuthorityError(pub String);

fn bad(message: impl Into<String>) -> AuthorityError {
    AuthorityError(message.into())
}

impl Authority {
    /// From PEM: the signing certificate and its key, the certificates between it and the root (roots among them
    /// are skipped), and the trusted roots.
    ///
    /// # Errors
    /// Key and certificate do not belong together, the certificate may not sign, or leads to none of the roots.
    pub fn new(cert: &str, key: &str, between: &str, roots: &str) -> Result<Self, AuthorityError> {
        let certs = certificates(cert).map_err(|e| bad(format!("the CA certificate {e}")))?;
        let signing = certs.first().ok_or_else(|| bad("the CA certificate is missing"))?;
        let root_certs = certificates(roots).map_err(|e| bad(format!("the root certificate {e}")))?;
        if root_certs.is_empty() {
            return Err(bad("the root certificate is missing"));
        }
        let key = KeyPair::from_pem(key).map_err(|e| bad(format!("the CA key cannot be read: {e}")))?;
        let mut chain: Vec<CertificateDer<'static>> = Vec::new();
        if !root_certs.contains(signing) {
            chain.push(signing.clone());
        }
        let others = certificates(between).map_err(|e| bad(format!("the certificate chain {e}")))?;
        for cert in certs[1..].iter().chain(&others) {
            if !root_certs.contains(cert) && !chain.contains(cert) {
                chain.push(cert.clone());
            }
        }
        let (_, parsed) =
            X509Certificate::from_der(signing).map_err(|e| bad(format!("the CA certificate: {e}")))?;
        if parsed.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
            return Err(bad("the CA key does not belong to the CA certificate"));
        }
        if !parsed.basic_constraints().ok().flatten().is_some_and(|b| b.value.ca) {
            return Err(bad("the CA certificate is no CA (basic constraints)"));
        }
        leads_to_root(signing, &chain, &root_certs)?;
        let root_not_after = root_certs.iter().map(not_after).min().unwrap_or(SystemTime::UNIX_EPOCH);
        // Nothing that is signed may outlive anything above it.
        let limit = chain.iter().map(not_after).min().unwrap_or_else(|| not_after(signing));
        let issuer =
            Issuer::from_ca_cert_der(signing, key).map_err(|e| bad(format!("the CA certificate: {e}")))?;
        let chain = chain.iter().map(|c| pem(std::slice::from_ref(c))).collect();
        Ok(Self { issuer, chain, roots: pem(&root_certs), not_after: limit, root_not_after })
    }

    /// The bundle of trusted roots (PEM).
    #[must_use]
    pub fn roots(&self) -> &str {
        &self.roots
    }

    /// The certificates from the signing one upwards, without roots (PEM).
    #[must_use]
    pub fn chain(&self) -> &[String] {
        &self.chain
    }

    /// When the signing chain ends.
    #[must_use]
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// When the first of the trusted roots ends.
    #[must_use]
    pub fn root_not_after(&self) -> SystemTime {
        self.root_not_after
    }

    /// Signs the public key of `csr` (PEM) for `identity`. The chain is leaf, intermediates, bundle of roots.
    ///
    /// # Errors
    /// The request is broken or its signature is not of its key; signing failed.
    pub fn sign(
        &self,
        csr: &str,
        identity: &SpiffeId,
        ttl: Duration,
        now: SystemTime,
    ) -> Result<Vec<String>, SignError> {
        let key = public_key(csr)?;
        let san = Ia5String::try_from(identity.to_string()).map_err(|e| SignError::Sign(e.to_string()))?;
        let mut params = self.leaf(ttl, now)?;
        params.subject_alt_names = vec![SanType::URI(san)];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let leaf = params.signed_by(&key, &self.issuer).map_err(|e| SignError::Sign(e.to_string()))?;
        let mut chain = vec![leaf.pem()];
        chain.extend(self.chain.iter().cloned());
        chain.push(self.roots.clone());
        Ok(chain)
    }

    /// A certificate for this process's own listener: chain without roots, and the key (PKCS#8 DER).
    ///
    /// # Errors
    /// A name is neither a DNS name nor an address; signing failed.
    pub fn server_certificate(
        &self,
        names: &[String],
        ttl: Duration,
        now: SystemTime,
    ) -> Result<(Vec<CertificateDer<'static>>, Vec<u8>), SignError> {
        let failed = |e: rcgen::Error| SignError::Sign(e.to_string());
        let key = KeyPair::generate().map_err(failed)?;
        let mut params = self.leaf(ttl, now)?;
        params.subject_alt_names = CertificateParams::new(names).map_err(failed)?.subject_alt_names;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let leaf = params.signed_by(&key, &self.issuer).map_err(failed)?;
        let mut chain = vec![leaf.der().clone()];
        for pem in &self.chain {
            chain.extend(certificates(pem).map_err(SignError::Sign)?);
        }
        Ok((chain, key.serialize_der()))
    }

    /// What all leaves have. The subject is empty, which makes the SAN extension critical (RFC 5280 4.2.1.6).
    fn leaf(&self, ttl: Duration, now: SystemTime) -> Result<CertificateParams, SignError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.not_before = (now - BACKDATE).into();
        params.not_after = (now + ttl).min(self.not_after).into();
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial()?);
        Ok(params)
    }
}

/// A root and its key, PEM.
///
/// # Errors
/// The library failed.
pub fn new_root(name: &str, now: SystemTime) -> Result<(String, String), SignError> {
    let failed = |e: rcgen::Error| SignError::Sign(e.to_string());
    let key = KeyPair::generate().map_err(failed)?;
    let params = ca_params(name, now, 10 * YEAR, BasicConstraints::Unconstrained)?;
    let cert = params.self_signed(&key).map_err(failed)?;
    Ok((cert.pem(), key.serialize_pem()))
}

/// An intermediate under a root, and its key, PEM.
///
/// # Errors
/// The root cannot be used; the library failed.
pub fn new_intermediate(
    name: &str,
    root_cert: &str,
    root_key: &str,
    now: SystemTime,
) -> Result<(String, String), SignError> {
    let failed = |e: rcgen::Error| SignError::Sign(e.to_string());
    let root = certificates(root_cert).map_err(SignError::Sign)?;
    let end = root.first().map_or(now, not_after);
    let issuer =
        KeyPair::from_pem(root_key).and_then(|k| Issuer::from_ca_cert_pem(root_cert, k)).map_err(failed)?;
    let key = KeyPair::generate().map_err(failed)?;
    let mut params = ca_params(name, now, 5 * YEAR, BasicConstraints::Constrained(0))?;
    params.not_after = (now + 5 * YEAR).min(end).into();
    params.use_authority_key_identifier_extension = true;
    let cert = params.signed_by(&key, &issuer).map_err(failed)?;
    Ok((cert.pem(), key.serialize_pem()))
}

fn ca_params(
    name: &str,
    now: SystemTime,
    life: Duration,
    constraints: BasicConstraints,
) -> Result<CertificateParams, SignError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "undermesh");
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = (now - BACKDATE).into();
    params.not_after = (now + life).into();
    params.is_ca = IsCa::Ca(constraints);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.serial_number = Some(serial()?);
    Ok(params)
}

/// 128 random bits, positive.
fn serial() -> Result<SerialNumber, SignError> {
    let mut bytes = [0; 16];
    rand::fill(&mut bytes).map_err(|e| SignError::Sign(e.to_string()))?;
    bytes[0] = (bytes[0] & 0x7f) | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

/// The public key of a request whose signature proves that the sender has the private one.
fn public_key(csr: &str) -> Result<SubjectPublicKeyInfo, SignError> {
    let (_, pem) = x509_parser::pem::parse_x509_pem(csr.as_bytes())
        .map_err(|e| SignError::Csr(format!("is no PEM: {e}")))?;
    if !matches!(pem.label.as_str(), "CERTIFICATE REQUEST" | "NEW CERTIFICATE REQUEST") {
        return Err(SignError::Csr(format!("is a {}, not a CERTIFICATE REQUEST", pem.label)));
    }
    let (_, request) = X509CertificationRequest::from_der(&pem.contents)
        .map_err(|e| SignError::Csr(format!("is no PKCS#10: {e}")))?;
    request
        .verify_signature()
        .map_err(|e| SignError::Csr(format!("its signature is not of its key: {e}")))?;
    let info = &request.certification_request_info.subject_pki;
    if let Ok(PublicKey::RSA(rsa)) = info.parsed()
        && rsa.key_size() < 2048
    {
        return Err(SignError::Csr(format!("RSA key of {} bits; use 2048 or P-256", rsa.key_size())));
    }
    SubjectPublicKeyInfo::from_der(info.raw)
        .map_err(|e| SignError::Csr(format!("its key cannot be used: {e}")))
}

/// Certificates of a PEM text.
fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|e| format!("is no PEM certificate: {e}"))
}

fn not_after(cert: &CertificateDer<'static>) -> SystemTime {
    let end =
        X509Certificate::from_der(cert).map(|(_, c)| c.validity().not_after.timestamp()).unwrap_or_default();
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(end).unwrap_or_default())
}

/// Follows issuers by signature.
fn leads_to_root(
    signing: &CertificateDer<'static>,
    chain: &[CertificateDer<'static>],
    roots: &[CertificateDer<'static>],
) -> Result<(), AuthorityError> {
    if roots.contains(signing) {
        return Ok(());
    }
    let mut current = signing;
    for _ in 0..=chain.len() {
        let (_, cert) = X509Certificate::from_der(current).map_err(|e| bad(e.to_string()))?;
        let signed_by = |issuer: &&CertificateDer<'static>| {
            X509Certificate::from_der(issuer)
                .is_ok_and(|(_, i)| cert.verify_signature(Some(i.public_key())).is_ok())
        };
        if roots.iter().any(|r| signed_by(&r)) {
            return Ok(());
        }
        match chain.iter().find(|c| *c != current && signed_by(c)) {
            Some(next) => current = next,
            None => break,
        }
    }
    Err(bad(
        "the CA certificate does not lead to the root certificate; add what is between to cert-chain.pem",
    ))
}

/// PEM with the line ends of files.
fn pem(certs: &[CertificateDer<'_>]) -> String {
    mesh_core::tls::certificate::to_pem(certs).replace("\r\n", "\n")
}
