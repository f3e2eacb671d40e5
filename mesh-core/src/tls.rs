//! Mutual TLS between workloads: keys, certificates, and who is accepted.
//!
//! | module | for |
//! |---|---|
//! | [`key`] | a key and its signing request, one pair per identity and rotation |
//! | [`certificate`] | what the CA answers, checked; TLS configurations made from it |
//! | [`crl`] | revocation |
//! | [`verify`] | which peer is accepted: SPIFFE identities in place of host names |
//! | [`handshake`] | the handshake itself, with errors that say which side has to do what |
//! | [`channel`] | a connection after it |
//! | [`record`], `receiving`, `sending`, [`buffers`] | its records, sealed and opened in place |
//! | [`server`] | certificates of gateways, for clients that are no peers |
//! | [`clients`] | certificates of those clients |
//!
//! There is one provider, aws-lc-rs, and between peers one parameter set: TLS 1.3, AES-GCM, hybrid post-quantum key exchange first,
//! ALPN `h2`, no SNI, no resumption. Both sides always present a certificate.

use std::sync::{Arc, LazyLock};

use rustls::crypto::{CryptoProvider, aws_lc_rs};

pub mod buffers;
pub mod certificate;
pub mod channel;
pub mod clients;
pub mod crl;
mod error;
pub mod handshake;
pub mod key;
pub(crate) mod receiving;
pub mod record;
pub(crate) mod sending;
pub mod server;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod verify;

pub use certificate::{CertificateError, WorkloadCertificate, expiry};
pub use channel::Channel;
pub use clients::{CertificateNames, ClientRootsError, client_verifier};
pub use crl::Revocations;
pub use error::{PeerError, TlsError};
pub use handshake::{accept, connect};
pub use key::KeyAndCsr;
pub use server::{ServerKeyError, public_provider, server_key};
pub use verify::peer_identity;

/// The application protocol of the tunnel.
pub const ALPN: &[u8] = b"h2";

/// The provider of all TLS between peers of the mesh: AES-256-GCM before AES-128-GCM, X25519MLKEM768 before X25519, P-256, P-384.
#[must_use]
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
        Arc::new(CryptoProvider {
            cipher_suites: vec![
                aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
                aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
            ],
            kx_groups: vec![
                aws_lc_rs::kx_group::X25519MLKEM768,
                aws_lc_rs::kx_group::X25519,
                aws_lc_rs::kx_group::SECP256R1,
                aws_lc_rs::kx_group::SECP384R1,
            ],
            ..aws_lc_rs::default_provider()
        })
    });
    Arc::clone(&PROVIDER)
}

#[cfg(test)]
mod tests;
