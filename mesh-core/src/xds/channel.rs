//! Connections to the control plane, for configuration and for certificates.
//!
//! Files are read again for every connection and every call: roots and tokens rotate under a running node.

use std::path::PathBuf;
use std::time::Duration;

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tonic::metadata::{Ascii, MetadataKey, MetadataMap, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

use super::again::Again;

/// For the TCP connection and, with TLS, its handshake.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// PING on an idle connection, and how long to wait for its answer: a control plane that vanished is noticed.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(10);
const TCP_KEEPALIVE: Duration = Duration::from_secs(300);
const TCP_KEEPALIVE_INTERVAL: Duration = Duration::from_secs(75);
const TCP_KEEPALIVE_RETRIES: u32 = 9;
/// A full state comes in one message: windows that let it stream.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;

/// Where a service of the control plane is, and how this node proves who it is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ControlPlane {
    /// `https://host:15012`, or `http://host:15010` without encryption.
    pub address: String,
    /// PEM file with the roots that the server's certificate must chain to; needed for `https`.
    pub root_cert: Option<PathBuf>,
    /// Name that the certificate must carry, where it is not the host of the address.
    pub server_name: Option<String>,
    /// File with the bearer token.
    pub token: Option<PathBuf>,
    /// Name of the cluster, sent as `clusterid`.
    pub cluster_id: String,
    /// Further metadata of every call.
    pub headers: Vec<(String, String)>,
    /// Shared with whatever else of the process asks the same control plane.
    pub again: Again,
}

/// Why the control plane cannot be reached or asked.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// Not a URL that we can use.
    #[error("control plane address {0:?} is not valid: expected http://host:port or https://host:port")]
    Address(String),
    /// `https` needs roots.
    #[error(
        "control plane address {0:?} needs a root certificate file (--root-cert), or http:// for plaintext"
    )]
    NoRoots(String),
    /// A file cannot be read.
    #[error("cannot read {what} {path:?}: {source}")]
    File {
        /// What it holds.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{what} {path:?} {problem}")]
    Content {
        /// What it should hold.
        what: &'static str,
        /// Where it is.
        path: PathBuf,
        /// What is wrong.
        problem: &'static str,
    },
    /// Metadata that cannot be sent.
    #[error("header {0:?} cannot be sent: names are lower-case ASCII, values visible ASCII")]
    Header(String),
    /// The connection failed.
    #[error("cannot connect to the control plane at {address}: {reason}")]
    Connect {
        /// Where.
        address: String,
        /// The chain of causes.
        reason: String,
    },
}

impl ControlPlane {
    /// Opens a connection.
    ///
    /// # Errors
    /// What is wrong with the settings, a file, or the connection.
    pub async fn connect(&self) -> Result<Channel, ChannelError> {
        let endpoint = self.endpoint()?;
        endpoint
            .connect()
            .await
            .map_err(|error| ChannelError::Connect { address: self.address.clone(), reason: causes(&error) })
    }

    /// Adds token, cluster and further headers to a call.
    ///
    /// # Errors
    /// The token cannot be read, or a header cannot be sent.
    pub fn authorize(&self, metadata: &mut MetadataMap) -> Result<(), ChannelError> {
        if let Some(path) = &self.token {
            let what = "token file";
            let token = std::fs::read_to_string(path).map_err(|source| ChannelError::File {
                what,
                path: path.clone(),
                source,
            })?;
            let problem = |problem| ChannelError::Content { what, path: path.clone(), problem };
            if token.trim().is_empty() {
                return Err(problem("is empty"));
            }
            let value = format!("Bearer {}", token.trim()).parse::<MetadataValue<Ascii>>();
            let mut value = value.ok().ok_or_else(|| problem("holds characters that no token has"))?;
            value.set_sensitive(true);
            metadata.insert("authorization", value);
        }
        let cluster = ("clusterid".to_owned(), self.cluster_id.clone());
        for (name, value) in self.headers.iter().chain((!self.cluster_id.is_empty()).then_some(&cluster)) {
            let parsed = (name.parse::<MetadataKey<Ascii>>(), value.parse::<MetadataValue<Ascii>>());
            let (Ok(key), Ok(value)) = parsed else { return Err(ChannelError::Header(name.clone())) };
            metadata.insert(key, value);
        }
        Ok(())
    }

    /// The roots as they are in the file now; none without TLS.
    pub(super) fn read_roots(&self) -> Result<Option<Vec<u8>>, ChannelError> {
        if !self.address.starts_with("https://") {
            return Ok(None);
        }
        let Some(path) = &self.root_cert else { return Err(ChannelError::NoRoots(self.address.clone())) };
        let what = "root certificate file";
        let pem =
            std::fs::read(path).map_err(|source| ChannelError::File { what, path: path.clone(), source })?;
        if !CertificateDer::pem_slice_iter(&pem).any(|cert| cert.is_ok()) {
            return Err(ChannelError::Content {
                what,
                path: path.clone(),
                problem: "holds no PEM certificate",
            });
        }
        Ok(Some(pem))
    }

    fn endpoint(&self) -> Result<Endpoint, ChannelError> {
        let bad_address = || ChannelError::Address(self.address.clone());
        if !self.address.starts_with("http://") && !self.address.starts_with("https://") {
            return Err(bad_address());
        }
        let endpoint = Endpoint::from_shared(self.address.clone()).ok().ok_or_else(bad_address)?;
        let endpoint = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .tcp_keepalive(Some(TCP_KEEPALIVE))
            .tcp_keepalive_interval(Some(TCP_KEEPALIVE_INTERVAL))
            .tcp_keepalive_retries(Some(TCP_KEEPALIVE_RETRIES))
            .http2_keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW);
        let Some(roots) = self.read_roots()? else { return Ok(endpoint) };
        let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(roots));
        if let Some(name) = &self.server_name {
            tls = tls.domain_name(name.clone());
        }
        endpoint
            .tls_config(tls)
            .map_err(|error| ChannelError::Connect { address: self.address.clone(), reason: causes(&error) })
    }
}

/// An error with its causes: the outermost text of transport errors says nothing.
pub(super) fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let next = cause.to_string();
        if !text.ends_with(&next) {
            text = format!("{text}: {next}");
        }
        source = cause.source();
    }
    text
}
