//! Certificates by which a gateway answers clients that are no peers of the mesh, and what it speaks with them.

use std::sync::{Arc, LazyLock};

use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::sign::CertifiedKey;
use rustls::{Error, InconsistentKeys};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// Why a chain and a key do not make a server's certificate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ServerKeyError {
    /// The chain is no PEM, or has no certificate.
    #[error("the certificate is no PEM with -----BEGIN CERTIFICATE-----{0}")]
    NoCertificate(String),
    /// The key is no PEM of a private key.
    #[error("the key is no PEM of a private key (PKCS #8, PKCS #1 or SEC 1, without a passphrase){0}")]
    NoKey(String),
    /// A key of a kind that is not supported, or damaged.
    #[error("the key cannot be used: {0}; RSA, ECDSA (P-256, P-384, P-521) and Ed25519 can")]
    Key(String),
    /// Certificate and key are of different pairs.
    #[error(
        "the key is not the one of the first certificate; the server's own certificate comes first in the chain"
    )]
    Mismatch,
    /// The first certificate cannot be read.
    #[error("the first certificate cannot be read: {0}")]
    Certificate(String),
}

/// What gateways speak with clients from outside: TLS 1.3, and TLS 1.2 with forward secrecy and authenticated encryption.
#[must_use]
pub fn public_provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> =
        LazyLock::new(|| Arc::new(aws_lc_rs::default_provider()));
    Arc::clone(&PROVIDER)
}

/// Reads a server's chain and key, both PEM, and checks that they belong together.
///
/// # Errors
/// What is wrong, without a byte of the key.
pub fn server_key(chain: &[u8], key: &[u8]) -> Result<CertifiedKey, ServerKeyError> {
    let because = |error: &dyn std::fmt::Display| format!(" ({error})");
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(chain).collect();
    let certificates = certificates.map_err(|error| ServerKeyError::NoCertificate(because(&error)))?;
    if certificates.is_empty() {
        return Err(ServerKeyError::NoCertificate(String::new()));
    }
    // Whatever the parser says of a key must not quote it.
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|_quotes| ServerKeyError::NoKey(String::new()))?;
    let key = public_provider().key_provider.load_private_key(key);
    let key = key.map_err(|error| ServerKeyError::Key(error.to_string()))?;
    let certified = CertifiedKey::new(certificates, key);
    match certified.keys_match() {
        Ok(()) | Err(Error::InconsistentKeys(InconsistentKeys::Unknown)) => Ok(certified),
        Err(Error::InconsistentKeys(_)) => Err(ServerKeyError::Mismatch),
        Err(error) => Err(ServerKeyError::Certificate(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(names: &[&str]) -> (String, String) {
        let made =
            rcgen::generate_simple_self_signed(names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>());
        let made = made.unwrap();
        (made.cert.pem(), made.signing_key.serialize_pem())
    }

    #[test]
    fn a_certificate_goes_with_its_own_key_and_no_other() {
        let (chain, key) = pair(&["a.example"]);
        let (_, other) = pair(&["a.example"]);
        assert!(server_key(chain.as_bytes(), key.as_bytes()).is_ok());
        let wrong = |chain: &str, key: &str| server_key(chain.as_bytes(), key.as_bytes()).unwrap_err();
        assert_eq!(wrong(&chain, &other), ServerKeyError::Mismatch);
        assert!(matches!(wrong("junk", &key), ServerKeyError::NoCertificate(_)));
        assert!(matches!(wrong(&key, &key), ServerKeyError::NoCertificate(_)), "a key is no certificate");
        assert!(matches!(wrong(&chain, &chain), ServerKeyError::NoKey(_)));
        let junk = "-----BEGIN CERTIFICATE-----\nSGVsbG8gd29ybGQ=\n-----END CERTIFICATE-----\n";
        assert!(matches!(wrong(junk, &key), ServerKeyError::Certificate(_)));
    }

    #[test]
    fn what_is_wrong_with_a_key_is_said_without_the_key() {
        let (chain, key) = pair(&["a.example"]);
        let cut = key.replace("-----END PRIVATE KEY-----", "");
        let text = server_key(chain.as_bytes(), cut.as_bytes()).unwrap_err().to_string();
        let secret = key.lines().nth(1).unwrap();
        assert!(!text.contains(&secret[..12]), "{text}");
    }
}
