//! Fetching of key documents over HTTP and HTTPS.

use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Uri, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::{KeySet, KeySetError, KeySource};

/// Larger documents are refused: known issuers have a few KiB.
const MAX_BYTES: usize = 1024 * 1024;
/// Of one fetch.
const MAX_REDIRECTS: usize = 3;
/// Where distributions keep their bundles.
const BUNDLES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// Whom HTTPS servers have to be certified by.
#[derive(Debug, Clone)]
pub enum Roots {
    /// The bundle of the system, or the one that `SSL_CERT_FILE` names. Read when the first HTTPS URI is there.
    System,
    /// These.
    Given(Vec<CertificateDer<'static>>),
}

/// Why keys could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Not `http://` or `https://` with a host.
    #[error("{0:?} is no http or https URI with a host")]
    Uri(String),
    /// No trusted roots.
    #[error("no certificates of authorities: {0}")]
    Roots(String),
    /// No connection.
    #[error("cannot connect: {0}")]
    Connect(#[from] std::io::Error),
    /// No answer that is HTTP.
    #[error("no answer: {0}")]
    Http(#[from] hyper::Error),
    /// An answer other than 200.
    #[error("answered {0}")]
    Status(http::StatusCode),
    /// Too many, or from HTTPS to HTTP.
    #[error("redirected to {0:?}, which is not followed")]
    Redirect(String),
    /// Too large, or broken off.
    #[error("no whole document: {0}")]
    Body(Box<dyn std::error::Error + Send + Sync>),
    /// Too slow.
    #[error("no answer within {}", humantime::format_duration(*.0))]
    Timeout(Duration),
    /// Not keys.
    #[error("the document {0}")]
    Keys(#[from] KeySetError),
}

/// Fetches for a [`super::KeyStore`].
#[derive(Debug)]
pub struct Fetcher {
    sources: mpsc::UnboundedReceiver<Weak<KeySource>>,
    tls: Arc<Tls>,
}

#[derive(Debug)]
struct Tls {
    roots: Roots,
    config: OnceLock<Result<Arc<ClientConfig>, String>>,
}

impl Fetcher {
    pub(super) fn new(sources: mpsc::UnboundedReceiver<Weak<KeySource>>, roots: Roots) -> Self {
        Self { sources, tls: Arc::new(Tls { roots, config: OnceLock::new() }) }
    }

    /// Fetches until the store and all of its sources are dropped.
    pub async fn run(mut self) {
        let mut tasks = JoinSet::new();
        loop {
            tokio::select! {
                source = self.sources.recv() => match source {
                    Some(source) => {
                        tasks.spawn(keep(source, Arc::clone(&self.tls)));
                    }
                    None => break,
                },
                Some(ended) = tasks.join_next() => {
                    if let Err(error) = ended {
                        tracing::error!("a task that fetches keys ended: {error}");
                    }
                }
            }
        }
    }
}

/// Fetches one source for as long as a rule holds it.
async fn keep(source: Weak<KeySource>, tls: Arc<Tls>) {
    loop {
        let Some(strong) = source.upgrade() else { return };
        let timeout = strong.timeout;
        let result = match tokio::time::timeout(timeout, fetch(&strong.uri, &tls)).await {
            Ok(result) => result,
            Err(_) => Err(FetchError::Timeout(timeout)),
        };
        strong.fetched(result);
        let (wanted, next) = (Arc::clone(&strong.wanted), strong.next());
        drop(strong);
        // Whoever wants keys has looked at the time of the last fetch.
        drop(tokio::time::timeout(next, wanted.notified()).await);
    }
}

async fn fetch(uri: &str, tls: &Tls) -> Result<KeySet, FetchError> {
    let mut uri: Uri = uri.parse().ok().ok_or_else(|| FetchError::Uri(uri.to_owned()))?;
    for _ in 0..=MAX_REDIRECTS {
        match get(&uri, tls).await? {
            Answer::Document(document) => return Ok(KeySet::read(&document)?),
            Answer::Elsewhere(location) => {
                let next = follow(&uri, &location).ok_or(FetchError::Redirect(location))?;
                uri = next;
            }
        }
    }
    Err(FetchError::Redirect(uri.to_string()))
}

enum Answer {
    Document(Bytes),
    Elsewhere(String),
}

/// Where a redirect leads; never from HTTPS to HTTP.
fn follow(from: &Uri, location: &str) -> Option<Uri> {
    let target: Uri = location.parse().ok()?;
    let mut parts = target.into_parts();
    if parts.scheme.is_none() && parts.authority.is_none() {
        parts.scheme = from.scheme().cloned();
        parts.authority = from.authority().cloned();
    }
    let target = Uri::from_parts(parts).ok()?;
    let secure = |uri: &Uri| uri.scheme_str() == Some("https");
    (secure(&target) || !secure(from)).then_some(target)
}

async fn get(uri: &Uri, tls: &Tls) -> Result<Answer, FetchError> {
    let wrong = || FetchError::Uri(uri.to_string());
    let authority = uri.authority().ok_or_else(wrong)?;
    let host = uri.host().filter(|host| !host.is_empty()).ok_or_else(wrong)?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let secure = match uri.scheme_str() {
        Some("https") => true,
        Some("http") => false,
        _ => return Err(wrong()),
    };
    let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
    let stream = TcpStream::connect((host, port)).await?;
    let path = uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    let request = Request::get(path)
        .header(header::HOST, authority.as_str().rsplit('@').next().unwrap_or_default())
        .header(header::ACCEPT, "application/jwk-set+json, application/json")
        .header(header::USER_AGENT, concat!("undermesh/", env!("CARGO_PKG_VERSION")))
        .body(Empty::new());
    let request = request.ok().ok_or_else(wrong)?;
    if secure {
        let name = ServerName::try_from(host.to_owned()).ok().ok_or_else(wrong)?;
        let config = tls.config().await?;
        let stream = tokio_rustls::TlsConnector::from(config).connect(name, stream).await?;
        exchange(TokioIo::new(stream), request).await
    } else {
        exchange(TokioIo::new(stream), request).await
    }
}

async fn exchange<S>(stream: S, request: Request<Empty<Bytes>>) -> Result<Answer, FetchError>
where
    S: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await?;
    let exchange = async move {
        let response = sender.send_request(request).await?;
        let status = response.status();
        if status.is_redirection()
            && let Some(location) = response.headers().get(header::LOCATION)
        {
            return Ok(Answer::Elsewhere(String::from_utf8_lossy(location.as_bytes()).into_owned()));
        }
        if status != http::StatusCode::OK {
            return Err(FetchError::Status(status));
        }
        let body = Limited::new(response.into_body(), MAX_BYTES).collect().await.map_err(FetchError::Body)?;
        Ok(Answer::Document(body.to_bytes()))
    };
    tokio::pin!(exchange);
    tokio::select! {
        answer = &mut exchange => answer,
        // The connection may end before the body of its last answer has been read.
        ended = connection => match ended {
            Ok(()) => exchange.await,
            Err(error) => Err(error.into()),
        },
    }
}

impl Tls {
    async fn config(&self) -> Result<Arc<ClientConfig>, FetchError> {
        if self.config.get().is_none() {
            let roots = self.roots.clone();
            // Reads and parses a few hundred KiB.
            let config = tokio::task::spawn_blocking(move || client_config(roots)).await;
            let config = config.unwrap_or_else(|error| Err(error.to_string()));
            drop(self.config.set(config));
        }
        match self.config.get() {
            Some(Ok(config)) => Ok(Arc::clone(config)),
            Some(Err(error)) => Err(FetchError::Roots(error.clone())),
            None => Err(FetchError::Roots("not read".to_owned())),
        }
    }
}

/// The bundle of the system, or the one that `SSL_CERT_FILE` names.
///
/// # Errors
/// There is none, or it cannot be read.
pub(crate) fn system_roots() -> Result<Vec<CertificateDer<'static>>, String> {
    let named = std::env::var("SSL_CERT_FILE").ok();
    let mut files = named.iter().map(String::as_str).chain(BUNDLES);
    let file = files.find(|file| std::path::Path::new(file).is_file()).ok_or_else(|| {
        format!("none of {} is there; set SSL_CERT_FILE to a bundle in PEM", BUNDLES.join(", "))
    })?;
    let text = std::fs::read(file).map_err(|error| format!("{file}: {error}"))?;
    Ok(CertificateDer::pem_slice_iter(&text).filter_map(Result::ok).collect())
}

fn client_config(roots: Roots) -> Result<Arc<ClientConfig>, String> {
    let certificates = match roots {
        Roots::Given(certificates) => certificates,
        Roots::System => system_roots()?,
    };
    let mut store = RootCertStore::empty();
    let (added, _) = store.add_parsable_certificates(certificates);
    if added == 0 {
        return Err("there is none that can be read".to_owned());
    }
    let config = ClientConfig::builder_with_provider(mesh_core::tls::provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(store)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redirect_never_leads_from_https_to_http() {
        let follow = |from: &str, to: &str| follow(&from.parse().unwrap(), to).map(|uri| uri.to_string());
        assert_eq!(follow("https://a/x", "https://b/y").as_deref(), Some("https://b/y"));
        assert_eq!(follow("http://a/x", "https://b/y").as_deref(), Some("https://b/y"));
        assert_eq!(follow("https://a/x", "/y?z").as_deref(), Some("https://a/y?z"));
        assert_eq!(follow("https://a/x", "http://b/y"), None);
        assert_eq!(follow("https://a/x", "http://a/x"), None);
        assert_eq!(follow("https://a/x", "\u{7f}"), None);
    }
}
