//! TLS to applications, inside of the tunnel where there is one: what a destination's `tls` says (SIMPLE, MUTUAL). The
//! protocol is TLS 1.3.

use std::sync::Arc;

use mesh_core::xds::proto::l7;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::TlsConnector;

use super::dial::DialError;
use super::io::EndpointIo;
use crate::security::jwks::system_roots;

/// What is spoken inside, as ALPN says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Inside {
    Http1,
    Http2,
    Other,
}

impl Inside {
    pub(super) const fn of_http(http2: bool) -> Self {
        if http2 { Self::Http2 } else { Self::Http1 }
    }
}

/// Makes the configuration of a destination's connections.
///
/// # Errors
/// What cannot be used, with what would be right.
pub(super) fn config(tls: &l7::ClientTls, inside: Inside) -> Result<Arc<ClientConfig>, String> {
    if !tls.invalid.is_empty() {
        return Err(tls.invalid.clone());
    }
    let provider = mesh_core::tls::provider();
    let verifier = Arc::new(Verifier::new(tls, &provider)?);
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = if tls.certificate_chain.is_empty() {
        builder.with_no_client_auth()
    } else {
        let chain = certificates("certificate_chain", &tls.certificate_chain)?;
        let key = PrivateKeyDer::from_pem_slice(tls.private_key.as_bytes());
        let key = key.map_err(|error| format!("private_key: {error}"))?;
        builder.with_client_auth_cert(chain, key).map_err(|error| format!("certificate_chain: {error}"))?
    };
    config.alpn_protocols = match inside {
        Inside::Http1 => vec![b"http/1.1".to_vec()],
        Inside::Http2 => vec![b"h2".to_vec()],
        Inside::Other => Vec::new(),
    };
    Ok(Arc::new(config))
}

/// The handshake with an application; `host` is its name unless the destination says another.
pub(super) async fn connect(
    config: Arc<ClientConfig>,
    tls: &l7::ClientTls,
    host: &str,
    io: EndpointIo,
) -> Result<EndpointIo, DialError> {
    let name = if tls.sni.is_empty() { host } else { &tls.sni };
    let failed = |text: String| DialError::Tls(text.into());
    let name = ServerName::try_from(name.to_owned()).map_err(|error| failed(format!("{name}: {error}")))?;
    let connected = TlsConnector::from(config).connect(name, Box::new(io)).await;
    Ok(EndpointIo::Tls(Box::new(connected.map_err(|error| failed(error.to_string()))?)))
}

fn certificates(field: &str, pem: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    let read = read.map_err(|error| format!("{field}: {error}"))?;
    if read.is_empty() { Err(format!("{field} holds no PEM certificate")) } else { Ok(read) }
}

/// Which servers are accepted.
#[derive(Debug)]
struct Verifier {
    /// None: whoever it is (`insecureSkipVerify`).
    chains: Option<Arc<WebPkiServerVerifier>>,
    /// One of these instead of the name that is asked for.
    names: Vec<ServerName<'static>>,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn new(tls: &l7::ClientTls, provider: &Arc<CryptoProvider>) -> Result<Self, String> {
        let provider = Arc::clone(provider);
        if tls.insecure_skip_verify {
            return Ok(Self { chains: None, names: Vec::new(), provider });
        }
        let roots = if tls.roots.is_empty() { system_roots()? } else { certificates("roots", &tls.roots)? };
        let mut store = RootCertStore::empty();
        if store.add_parsable_certificates(roots).0 == 0 {
            return Err("roots: none can be read".to_owned());
        }
        let crls: Result<Vec<_>, _> =
            CertificateRevocationListDer::pem_slice_iter(tls.revocations.as_bytes()).collect();
        let crls = crls.map_err(|error| format!("revocations: {error}"))?;
        let chains = WebPkiServerVerifier::builder_with_provider(Arc::new(store), Arc::clone(&provider))
            .with_crls(crls)
            .allow_unknown_revocation_status()
            .build()
            .map_err(|error| format!("roots: {error}"))?;
        let name = |name: &String| {
            let parsed = ServerName::try_from(name.clone());
            parsed.map_err(|_not_a_name| {
                format!(
                    "subject_alt_names: {name:?} is neither a DNS name nor an address, which are compared"
                )
            })
        };
        let names = tls.subject_alt_names.iter().map(name).collect::<Result<_, _>>()?;
        Ok(Self { chains: Some(chains), names, provider })
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        asked: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(chains) = &self.chains else { return Ok(ServerCertVerified::assertion()) };
        let verify = |name: &ServerName<'_>| chains.verify_server_cert(leaf, intermediates, name, ocsp, now);
        let Some((first, others)) = self.names.split_first() else { return verify(asked) };
        others.iter().fold(verify(first), |verified, name| verified.or_else(|_| verify(name)))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, leaf, signature, known)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, leaf, signature, known)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_cannot_be_used_are_named() {
        let wrong = |tls: l7::ClientTls| config(&tls, Inside::Http1).unwrap_err();
        let invalid = l7::ClientTls { invalid: "the secret is not there".into(), ..Default::default() };
        assert_eq!(wrong(invalid), "the secret is not there");
        let junk = l7::ClientTls { roots: "junk".into(), ..Default::default() };
        assert_eq!(wrong(junk), "roots holds no PEM certificate");
        let root = mesh_core::tls::testing::TestCa::new().root_pem().to_owned();
        let uri = l7::ClientTls {
            roots: root.clone(),
            subject_alt_names: vec!["spiffe://x/y".into()],
            ..Default::default()
        };
        assert!(wrong(uri).starts_with("subject_alt_names: \"spiffe://x/y\" is neither"));
        let good = l7::ClientTls { roots: root, ..Default::default() };
        assert_eq!(config(&good, Inside::Http2).unwrap().alpn_protocols, [b"h2".to_vec()]);
    }
}
