//! Certificates of clients that are no peers of the mesh: who is accepted by a gateway that asks for them, and what is in
//! them.

use std::net::IpAddr;
use std::sync::Arc;

use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, SignatureScheme,
    client::danger::HandshakeSignatureValid,
};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime};
use x509_parser::extensions::GeneralName;
use x509_parser::objects::{oid_registry, oid2abbrev};
use x509_parser::prelude::{AttributeTypeAndValue, FromDer, X509Certificate, X509Name};

use super::error::PeerError;
use super::public_provider;

/// What a certificate says of whom it is for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CertificateNames {
    /// The subject as RFC 4514 writes it: the most specific part first.
    pub subject: String,
    /// DNS names of the subject alternative names.
    pub dns: Vec<String>,
    /// URIs.
    pub uris: Vec<String>,
    /// Addresses, and mail addresses.
    pub others: Vec<String>,
}

impl CertificateNames {
    /// Reads a certificate, DER.
    ///
    /// # Errors
    /// It is malformed.
    pub fn of(leaf: &CertificateDer<'_>) -> Result<Self, PeerError> {
        let malformed = |e: &dyn std::fmt::Display| PeerError::Unusable(e.to_string());
        let (_, leaf) = X509Certificate::from_der(leaf).map_err(|e| malformed(&e))?;
        let mut names = Self { subject: subject(leaf.subject()), ..Self::default() };
        let san = leaf.subject_alternative_name().map_err(|e| malformed(&e))?;
        for name in san.map(|san| san.value.general_names.as_slice()).unwrap_or_default() {
            match name {
                GeneralName::DNSName(name) => names.dns.push((*name).to_owned()),
                GeneralName::URI(name) => names.uris.push((*name).to_owned()),
                GeneralName::RFC822Name(name) => names.others.push((*name).to_owned()),
                GeneralName::IPAddress(bytes) => {
                    let v4 = <[u8; 4]>::try_from(*bytes).map(IpAddr::from);
                    let address = v4.or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from));
                    names.others.extend(address.map(|address| address.to_string()));
                }
                _ => {}
            }
        }
        Ok(names)
    }

    /// Whether one of the subject alternative names is this, letter by letter (DNS names: in either case).
    fn has(&self, wanted: &str) -> bool {
        self.dns.iter().any(|name| name.eq_ignore_ascii_case(wanted))
            || self.uris.iter().chain(&self.others).any(|name| name == wanted)
    }
}

/// A name as RFC 4514 writes it, which turns round the order of the encoding.
fn subject(name: &X509Name<'_>) -> String {
    let mut parts: Vec<String> = name
        .iter_rdn()
        .map(|rdn| {
            let one = |attribute: &AttributeTypeAndValue<'_>| {
                let of = attribute.attr_type();
                let key = oid2abbrev(of, oid_registry()).map_or_else(|_| of.to_string(), str::to_owned);
                format!("{key}={}", escaped(attribute.as_str().unwrap_or_default()))
            };
            rdn.iter().map(one).collect::<Vec<_>>().join("+")
        })
        .collect();
    parts.reverse();
    parts.join(",")
}

/// The value of an attribute (RFC 4514 §2.4): what separates parts does not do so inside of one.
fn escaped(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    let last = value.chars().count().saturating_sub(1);
    for (at, character) in value.chars().enumerate() {
        let outer = (at == 0 && matches!(character, ' ' | '#')) || (at == last && character == ' ');
        if outer || matches!(character, ',' | '+' | '"' | '\\' | '<' | '>' | ';') {
            out.push('\\');
        }
        out.push(character);
    }
    out
}

/// Why certificates of clients cannot be checked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClientRootsError {
    /// Nobody is named who may issue them.
    #[error("who issues them is no PEM with -----BEGIN CERTIFICATE-----")]
    NoRoots,
    /// The revocation lists are no PEM.
    #[error("the revocation list is no PEM with -----BEGIN X509 CRL-----: {0}")]
    Revocations(String),
    /// The library refuses what it was given.
    #[error("{0}")]
    Refused(String),
}

/// Accepts clients whose chain leads to one of `roots` (PEM), is valid and is on no list of `revocations` (PEM), and whose
/// certificate has one of `names`, where there are some. With `optional`, a client without a certificate, too.
///
/// # Errors
/// Roots or lists that cannot be read.
pub fn client_verifier(
    roots: &str,
    revocations: &str,
    names: Vec<String>,
    optional: bool,
) -> Result<Arc<dyn ClientCertVerifier>, ClientRootsError> {
    let issuers: Vec<CertificateDer<'static>> =
        CertificateDer::pem_slice_iter(roots.as_bytes()).filter_map(Result::ok).collect();
    let mut store = RootCertStore::empty();
    if store.add_parsable_certificates(issuers).0 == 0 {
        return Err(ClientRootsError::NoRoots);
    }
    let lists: Result<Vec<_>, _> =
        CertificateRevocationListDer::pem_slice_iter(revocations.as_bytes()).collect();
    let lists = lists.map_err(|error| ClientRootsError::Revocations(error.to_string()))?;
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(store), public_provider())
        .with_crls(lists)
        .allow_unknown_revocation_status();
    let builder = if optional { builder.allow_unauthenticated() } else { builder };
    let chains = builder.build().map_err(|error| ClientRootsError::Refused(error.to_string()))?;
    Ok(if names.is_empty() { chains } else { Arc::new(Named { chains, names }) })
}

/// Clients of certain names.
#[derive(Debug)]
struct Named {
    chains: Arc<dyn ClientCertVerifier>,
    names: Vec<String>,
}

impl ClientCertVerifier for Named {
    fn offer_client_auth(&self) -> bool {
        self.chains.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.chains.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chains.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.chains.verify_client_cert(leaf, intermediates, now)?;
        let presented = CertificateNames::of(leaf);
        let presented = presented.map_err(|_malformed| Error::from(CertificateError::BadEncoding))?;
        if self.names.iter().any(|name| presented.has(name)) {
            return Ok(verified);
        }
        Err(CertificateError::ApplicationVerificationFailure.into())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chains.verify_tls12_signature(message, leaf, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chains.verify_tls13_signature(message, leaf, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chains.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer,
        DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose,
        RevokedCertParams, SanType, SerialNumber,
    };

    use super::{
        CertificateDer, CertificateError, CertificateNames, ClientRootsError, UnixTime, client_verifier,
    };

    fn authority() -> CertifiedIssuer<'static, KeyPair> {
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
    }

    fn leaf(of: &CertifiedIssuer<'static, KeyPair>, names: Vec<SanType>) -> CertificateDer<'static> {
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "Shop, Inc.");
        params.distinguished_name.push(DnType::CommonName, "buyer");
        params.subject_alt_names = names;
        params.serial_number = Some(SerialNumber::from(7));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.signed_by(&KeyPair::generate().unwrap(), of).unwrap().der().clone()
    }

    #[test]
    fn a_certificate_says_its_names_of_every_kind() {
        let names = vec![
            SanType::DnsName("a.example".try_into().unwrap()),
            SanType::URI("spiffe://x/y".try_into().unwrap()),
            SanType::IpAddress("192.0.2.7".parse().unwrap()),
            SanType::Rfc822Name("buyer@a.example".try_into().unwrap()),
        ];
        let found = CertificateNames::of(&leaf(&authority(), names)).unwrap();
        assert_eq!(found.dns, ["a.example"]);
        assert_eq!(found.uris, ["spiffe://x/y"]);
        assert_eq!(found.others, ["192.0.2.7", "buyer@a.example"]);
        assert_eq!(found.subject, r"CN=buyer,O=Shop\, Inc.");
        assert!(CertificateNames::of(&CertificateDer::from(b"junk".to_vec())).is_err());
    }

    #[test]
    fn a_client_is_accepted_by_who_issued_its_certificate_and_by_its_name() {
        let (own, other) = (authority(), authority());
        let dns = |name: &str| vec![SanType::DnsName(name.try_into().unwrap())];
        let good = leaf(&own, dns("a.example"));
        let accepts = |names: &[&str], leaf: &CertificateDer<'_>| {
            let names = names.iter().map(|name| (*name).to_owned()).collect();
            let verifier = client_verifier(&own.pem(), "", names, false).unwrap();
            assert!(verifier.client_auth_mandatory());
            verifier.verify_client_cert(leaf, &[], UnixTime::now()).map(drop)
        };
        assert!(accepts(&[], &good).is_ok());
        assert!(accepts(&["b.example", "A.example"], &good).is_ok());
        let wrong = accepts(&["b.example"], &good).unwrap_err();
        assert_eq!(wrong, CertificateError::ApplicationVerificationFailure.into());
        assert!(accepts(&["a.example"], &leaf(&other, dns("a.example"))).is_err(), "of a stranger");
        let optional = client_verifier(&own.pem(), "", Vec::new(), true).unwrap();
        assert!(!optional.client_auth_mandatory() && optional.offer_client_auth());
    }

    #[test]
    fn a_client_whose_certificate_is_revoked_is_not_accepted() {
        let own = authority();
        let leaf = leaf(&own, Vec::new());
        let now = std::time::SystemTime::now();
        let accepts = |serial: u64| {
            let revoked = RevokedCertParams {
                serial_number: SerialNumber::from(serial),
                revocation_time: now.into(),
                reason_code: None,
                invalidity_date: None,
            };
            let list = CertificateRevocationListParams {
                this_update: now.into(),
                next_update: (now + std::time::Duration::from_secs(3600)).into(),
                crl_number: SerialNumber::from(1),
                issuing_distribution_point: None,
                revoked_certs: vec![revoked],
                key_identifier_method: KeyIdMethod::Sha256,
            };
            let list = list.signed_by(&own).unwrap().pem().unwrap();
            let verifier = client_verifier(&own.pem(), &list, Vec::new(), false).unwrap();
            verifier.verify_client_cert(&leaf, &[], UnixTime::now()).map(drop)
        };
        assert!(accepts(8).is_ok());
        assert_eq!(accepts(7).unwrap_err(), CertificateError::Revoked.into());
    }

    #[test]
    fn roots_and_lists_that_cannot_be_read_are_refused() {
        let refused =
            |roots: &str, lists: &str| client_verifier(roots, lists, Vec::new(), false).unwrap_err();
        assert_eq!(refused("junk", ""), ClientRootsError::NoRoots);
        let junk = "-----BEGIN X509 CRL-----\nSGVsbG8=\n-----END X509 CRL-----\n";
        assert!(matches!(refused(&authority().pem(), junk), ClientRootsError::Refused(_)));
    }
}
