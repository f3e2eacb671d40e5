//! Why a tunnel or one of its streams ended.

use std::io;

use http::StatusCode;

use super::http2::Reason;
use super::request::RequestError;
use crate::error::Code;
use crate::tls::TlsError;

/// The end of a tunnel, or of one stream, that nobody wished for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The request cannot be written.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The peer answered with something else than 200.
    #[error("http status: {0}")]
    Status(StatusCode),
    /// The peer sent GOAWAY(NO_ERROR): open another connection.
    #[error("the peer is draining this tunnel (GOAWAY)")]
    Draining,
    /// The peer closed the connection with a reason.
    #[error("the peer closed the tunnel: {0}")]
    PeerClosed(Reason),
    /// We closed the connection, because of what the peer sent.
    #[error("the peer broke the rules of HTTP/2: {0}")]
    Violation(Reason),
    /// The stream was aborted, RST_STREAM.
    #[error("the stream was reset: {0}")]
    Reset(Reason),
    /// No answer to a ping.
    #[error("no answer to a keepalive ping")]
    Silent,
    /// The peer began with something that is not HTTP/2.
    #[error("the peer does not speak HTTP/2: {0}")]
    NotHttp2(Reason),
    /// The peer sent no HTTP/2 preface in time.
    #[error("the peer did not begin HTTP/2 in time")]
    HandshakeTimeout,
    /// The peer's TLS refused us, seen only once TLS 1.3 was through on our side, or its TLS broke.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The connection below broke.
    #[error("the tunnel's connection broke: {0}")]
    Io(io::Error),
    /// The tunnel is closed already.
    #[error("the tunnel is closed")]
    Closed,
}

impl Error {
    /// The stable code.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::Request(e) => e.code(),
            Self::Status(StatusCode::BAD_REQUEST) => Code::PeerBadRequest,
            Self::Status(StatusCode::UNAUTHORIZED) => Code::PeerDenied,
            Self::Status(StatusCode::SERVICE_UNAVAILABLE) => Code::PeerUnavailable,
            Self::Status(_) => Code::PeerStatus,
            Self::Draining | Self::Closed => Code::TunnelDraining,
            Self::PeerClosed(_) | Self::Io(_) => Code::TunnelLost,
            Self::Violation(_) => Code::TunnelViolation,
            Self::Reset(_) => Code::TunnelReset,
            Self::Silent => Code::TunnelSilent,
            Self::NotHttp2(_) | Self::HandshakeTimeout => Code::TunnelHandshake,
            Self::Tls(e) => e.code(),
        }
    }

    /// Whether a request that got this answer was certainly not processed by the peer, so that it may be sent again
    /// on another connection (RFC 9113 §8.7).
    #[must_use]
    pub fn unprocessed(&self) -> bool {
        matches!(self, Self::Draining | Self::Closed | Self::Reset(Reason::REFUSED_STREAM))
    }

    /// Whether the tunnel as a whole broke without a word of the peer: another connection may still work.
    #[must_use]
    pub fn broke(&self) -> bool {
        matches!(self, Self::Io(_) | Self::Silent)
    }
}
