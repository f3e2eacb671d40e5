//! TLS to the control plane: its certificate is checked against the mesh's roots, and ours is shown where there is one.

use std::path::Path;
use std::sync::Arc;

use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::cli::Proof;

fn certificates(flag: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let wrong = |problem: String| format!("{flag} {}: {problem}", path.display());
    let pem = std::fs::read(path).map_err(|error| wrong(error.to_string()))?;
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match read {
        Ok(read) if !read.is_empty() => Ok(read),
        Ok(_) => Err(wrong("holds no PEM certificate".to_owned())),
        Err(error) => Err(wrong(error.to_string())),
    }
}

/// Settings from files.
pub(super) fn settings(proof: &Proof) -> Result<Arc<ClientConfig>, String> {
    let path = proof.root_cert.as_ref().ok_or("https:// needs the roots of its certificate")?;
    let mut roots = RootCertStore::empty();
    for certificate in certificates("--root-cert", path)? {
        roots.add(certificate).map_err(|error| format!("--root-cert {}: {error}", path.display()))?;
    }
    let builder = ClientConfig::builder_with_provider(mesh_core::tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots);
    let (Some(chain), Some(key)) = (&proof.client_cert, &proof.client_key) else {
        return Ok(Arc::new(builder.with_no_client_auth()));
    };
    let wrong = |error: String| format!("--client-key {}: {error}", key.display());
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| wrong(error.to_string()))?;
    let chain = certificates("--client-cert", chain)?;
    builder.with_client_auth_cert(chain, private).map(Arc::new).map_err(|error| wrong(error.to_string()))
}

/// The handshake.
pub(super) async fn connect(
    stream: TcpStream,
    host: &str,
    settings: Arc<ClientConfig>,
) -> Result<TlsStream<TcpStream>, String> {
    let name = ServerName::try_from(host.to_owned()).map_err(|error| format!("host {host:?}: {error}"))?;
    TlsConnector::from(settings).connect(name, stream).await.map_err(|error| format!("TLS: {error}"))
}
