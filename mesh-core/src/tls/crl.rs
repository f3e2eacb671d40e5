//! Certificate revocation lists, as they are at this moment.

use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls_pki_types::CertificateRevocationListDer;
use rustls_pki_types::pem::PemObject;
use webpki::{CertRevocationList, OwnedCertRevocationList};

/// The revocation lists in force. Clones share them: a list that is loaded counts for every handshake from then on, in
/// every configuration that was made with it.
#[derive(Clone, Debug, Default)]
pub struct Revocations(Arc<ArcSwap<Vec<CertRevocationList<'static>>>>);

/// Why a file is no revocation list. The lists in force are kept.
#[derive(Debug, thiserror::Error)]
pub enum CrlError {
    /// The text has a PEM block that cannot be decoded.
    #[error("the revocation list is not PEM: {0}")]
    Pem(rustls_pki_types::pem::Error),
    /// A PEM block is no list that can be used.
    #[error("X509 CRL block number {number} of the revocation list cannot be used: {cause}")]
    List {
        /// Position in the file, from 1.
        number: usize,
        /// What is wrong with it.
        cause: webpki::Error,
    },
    /// Text, but no list.
    #[error("the revocation list holds no X509 CRL block; an empty file turns revocation off")]
    NoList,
}

impl Revocations {
    /// Replaces the lists with those of a PEM file; an empty file means none.
    ///
    /// # Errors
    /// A block of the file cannot be used; the lists stay as they were.
    pub fn load_pem(&self, pem: &[u8]) -> Result<usize, CrlError> {
        let mut lists = Vec::new();
        for (index, der) in CertificateRevocationListDer::pem_slice_iter(pem).enumerate() {
            let der = der.map_err(CrlError::Pem)?;
            let list = OwnedCertRevocationList::from_der(&der)
                .map_err(|cause| CrlError::List { number: index + 1, cause })?;
            lists.push(CertRevocationList::from(list));
        }
        if lists.is_empty() && !pem.trim_ascii().is_empty() {
            return Err(CrlError::NoList);
        }
        let count = lists.len();
        self.0.store(Arc::new(lists));
        Ok(count)
    }

    pub(super) fn lists(&self) -> Arc<Vec<CertRevocationList<'static>>> {
        self.0.load_full()
    }
}
