//! A certificate authority for tests, of this crate and of those that depend on it (feature `testing`).
//!
//! It answers as the CA service does, and can also issue what a CA never should.

use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertificateSigningRequestParams,
    DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevocationReason, RevokedCertParams, SanType, SerialNumber,
};

use super::{KeyAndCsr, Revocations, WorkloadCertificate};
use crate::identity::SpiffeId;

/// A root with its key.
pub struct TestCa {
    issuer: Issuer<'static, KeyPair>,
    root_pem: String,
}

/// What a leaf shall say, where it differs from what is asked for.
#[derive(Clone, Debug)]
pub struct Leaf {
    /// Begin of validity.
    pub not_before: SystemTime,
    /// End of validity.
    pub not_after: SystemTime,
    /// URI SANs, in order.
    pub uris: Vec<String>,
    /// Extended key usages; empty leaves the extension out.
    pub usages: Vec<ExtendedKeyUsagePurpose>,
    /// Serial number.
    pub serial: u64,
}

impl Leaf {
    /// What the real CA issues for an identity.
    #[must_use]
    pub fn of(identity: &SpiffeId) -> Self {
        let now = SystemTime::now();
        Self {
            not_before: now - Duration::from_secs(120),
            not_after: now + Duration::from_secs(24 * 3600),
            uris: vec![identity.to_string()],
            usages: vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
            serial: fastrand::u64(1..),
        }
    }
}

#[allow(clippy::unwrap_used, reason = "test support: a panic is the report")]
impl TestCa {
    /// A new root. Two of them do not trust each other.
    #[must_use]
    pub fn new() -> Self {
        Self::named(&format!("test {}", fastrand::u64(..)))
    }

    /// A new root of a given name, which others may have as well.
    #[must_use]
    pub fn named(name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, name);
        let root = params.self_signed(&key).unwrap();
        Self { root_pem: root.pem(), issuer: Issuer::new(params, key) }
    }

    /// The root, PEM.
    #[must_use]
    pub fn root_pem(&self) -> &str {
        &self.root_pem
    }

    /// Signs a request with what the leaf says, as the CA service answers: leaf first, roots last.
    #[must_use]
    pub fn sign(&self, csr_pem: &str, leaf: &Leaf) -> Vec<String> {
        let mut request = CertificateSigningRequestParams::from_pem(csr_pem).unwrap();
        let params = &mut request.params;
        params.not_before = leaf.not_before.into();
        params.not_after = leaf.not_after.into();
        params.serial_number = Some(SerialNumber::from(leaf.serial));
        params.subject_alt_names =
            leaf.uris.iter().map(|uri| SanType::URI(uri.as_str().try_into().unwrap())).collect();
        params.extended_key_usages.clone_from(&leaf.usages);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        vec![request.signed_by(&self.issuer).unwrap().pem(), self.root_pem.clone()]
    }

    /// A good certificate for an identity.
    #[must_use]
    pub fn issue(&self, identity: &SpiffeId) -> WorkloadCertificate {
        self.issue_with(identity, &Leaf::of(identity), &Revocations::default())
    }

    /// A certificate whose first URI SAN is the identity, else as the leaf says.
    #[must_use]
    pub fn issue_with(
        &self,
        identity: &SpiffeId,
        leaf: &Leaf,
        revocations: &Revocations,
    ) -> WorkloadCertificate {
        let key = KeyAndCsr::generate(identity).unwrap();
        let chain = self.sign(key.csr_pem(), leaf);
        WorkloadCertificate::new(key, &chain, revocations).unwrap()
    }

    /// A revocation list with these serial numbers, PEM.
    #[must_use]
    pub fn crl(&self, serials: &[u64]) -> String {
        let now = SystemTime::now();
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: now.into(),
            reason_code: Some(RevocationReason::KeyCompromise),
            invalidity_date: None,
        };
        CertificateRevocationListParams {
            this_update: now.into(),
            next_update: (now + Duration::from_secs(3600)).into(),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        }
        .signed_by(&self.issuer)
        .unwrap()
        .pem()
        .unwrap()
    }
}

impl Default for TestCa {
    fn default() -> Self {
        Self::new()
    }
}
