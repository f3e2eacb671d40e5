//! The relay's own port, over TLS: for those who are not on this machine.

use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use http::{Method, Request, StatusCode};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use mesh_core::admin::http::{Reply, text};
use mesh_core::admin::slots::{CONNECTION_TIMEOUT, HEAD_TIMEOUT, Slots};
use rustls::RootCertStore;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tracing::{debug, warn};

use super::gate::Origin;
use super::web::Web;

/// A TLS handshake takes no longer.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// Demands a client certificate that chains to one of a file's.
///
/// # Errors
/// The file cannot be read, or holds no certificate.
pub fn client_verifier(path: &Path) -> Result<Arc<dyn ClientCertVerifier>, String> {
    let problem = |what: String| format!("--relay-client-ca {}: {what}", path.display());
    let pem = std::fs::read(path).map_err(|cause| problem(cause.to_string()))?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|cause| problem(cause.to_string()))?;
        roots.add(certificate).map_err(|cause| problem(cause.to_string()))?;
    }
    if roots.is_empty() {
        return Err(problem("holds no PEM certificate".to_owned()));
    }
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), mesh_core::tls::provider())
        .build()
        .map_err(|cause| problem(cause.to_string()))
}

/// Answers until `stop` says so.
pub async fn serve(
    web: Web,
    listener: TcpListener,
    tls: Arc<ArcSwap<rustls::ServerConfig>>,
    mut stop: watch::Receiver<bool>,
) {
    let slots = Slots::default();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|s| *s) => return,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "relay listener");
                sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Some(slot) = slots.take(Some(peer.ip())) else {
            debug!(%peer, "relay connection closed: too many are open");
            continue;
        };
        let acceptor = TlsAcceptor::from(tls.load_full());
        let web = web.clone();
        tokio::spawn(async move {
            let _slot = slot;
            connection(&web, acceptor, stream).await;
        });
    }
}

async fn connection(web: &Web, acceptor: TlsAcceptor, stream: TcpStream) {
    let stream = match timeout(HANDSHAKE, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return debug!(%error, "relay handshake"),
        Err(_) => return debug!("relay handshake takes too long"),
    };
    let service = service_fn(|request| async move { Ok::<_, Infallible>(answer(web, request).await) });
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).keep_alive(false);
    match timeout(CONNECTION_TIMEOUT, http.serve_connection(TokioIo::new(stream), service)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%error, "relay connection"),
        Err(_) => debug!("relay connection closed: it took too long"),
    }
}

async fn answer(web: &Web, request: Request<Incoming>) -> Reply {
    if request.method() != Method::GET {
        return text(StatusCode::METHOD_NOT_ALLOWED, "only GET is answered\n");
    }
    let (parts, _) = request.into_parts();
    web.answer(&parts, Origin::Tls).await
}
