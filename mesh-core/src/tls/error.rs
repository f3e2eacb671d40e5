//! What can go wrong between two peers' TLS, in words that name the side and the fix.

use std::fmt;
use std::io;
use std::sync::Arc;

use rustls::{AlertDescription, CertificateError, InvalidMessage, OtherError};
use rustls_pki_types::UnixTime;

use crate::error::Code;
use crate::identity::SpiffeId;

/// Why a peer's certificate is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PeerError {
    /// None of the certificate's URI SANs is one that we expect at that address.
    #[error(
        "the peer presented {} but {} was expected",
        list(presented, "no URI SAN"),
        list(expected, "no identity")
    )]
    WrongIdentity {
        /// The URI SANs of the certificate.
        presented: Vec<String>,
        /// What the destination may be.
        expected: Vec<String>,
    },
    /// The certificate has SPIFFE identities, none in our trust domain.
    #[error(
        "the peer presented {} but only trust domain {expected} is accepted",
        list(presented, "no identity")
    )]
    WrongTrustDomain {
        /// The URI SANs of the certificate.
        presented: Vec<String>,
        /// Our own certificate's trust domain.
        expected: String,
    },
    /// No URI SAN of the form `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
    #[error("the peer's certificate has no SPIFFE identity, it presented {}", list(presented, "no URI SAN"))]
    NoIdentity {
        /// The URI SANs of the certificate.
        presented: Vec<String>,
    },
    /// Past its end of validity.
    #[error("the peer's certificate expired {} seconds ago", seconds(*not_after, *now))]
    Expired {
        /// End of validity.
        not_after: UnixTime,
        /// Our clock.
        now: UnixTime,
    },
    /// Before its begin of validity.
    #[error("the peer's certificate is valid only in {} seconds", seconds(*now, *not_before))]
    NotYetValid {
        /// Begin of validity.
        not_before: UnixTime,
        /// Our clock.
        now: UnixTime,
    },
    /// No chain to a root of ours.
    #[error("the peer's certificate was not issued by a CA that the local workload trusts")]
    UnknownIssuer,
    /// On the revocation list.
    #[error("the peer's certificate is revoked")]
    Revoked,
    /// Anything else about the certificate.
    #[error("the peer's certificate cannot be used: {0}")]
    Unusable(String),
}

impl PeerError {
    /// The stable code.
    #[must_use]
    pub const fn code(&self) -> Code {
        match self {
            Self::WrongIdentity { .. } => Code::PeerIdentity,
            Self::WrongTrustDomain { .. } => Code::PeerTrustDomain,
            Self::NoIdentity { .. } => Code::PeerWithoutIdentity,
            Self::Expired { .. } => Code::PeerExpired,
            Self::NotYetValid { .. } => Code::PeerNotYetValid,
            Self::UnknownIssuer => Code::PeerIssuer,
            Self::Revoked => Code::PeerRevoked,
            Self::Unusable(_) => Code::PeerCertificate,
        }
    }

    /// The form in which rustls carries it through a handshake, and from which it picks the alert for the peer.
    pub(super) fn into_rustls(self) -> rustls::Error {
        rustls::Error::InvalidCertificate(match self {
            Self::Expired { not_after, now } => CertificateError::ExpiredContext { time: now, not_after },
            Self::NotYetValid { not_before, now } => {
                CertificateError::NotValidYetContext { time: now, not_before }
            }
            Self::UnknownIssuer => CertificateError::UnknownIssuer,
            Self::Revoked => CertificateError::Revoked,
            other => CertificateError::Other(OtherError(Arc::new(other))),
        })
    }

    fn from_rustls(error: &CertificateError) -> Self {
        match error {
            CertificateError::ExpiredContext { time, not_after } => {
                Self::Expired { not_after: *not_after, now: *time }
            }
            CertificateError::NotValidYetContext { time, not_before } => {
                Self::NotYetValid { not_before: *not_before, now: *time }
            }
            CertificateError::UnknownIssuer => Self::UnknownIssuer,
            CertificateError::Revoked => Self::Revoked,
            CertificateError::Other(OtherError(inner)) => match inner.downcast_ref::<Self>() {
                Some(ours) => ours.clone(),
                None => Self::Unusable(inner.to_string()),
            },
            other => Self::Unusable(other.to_string()),
        }
    }
}

impl From<webpki::Error> for PeerError {
    fn from(error: webpki::Error) -> Self {
        match error {
            webpki::Error::CertExpired { time, not_after } => Self::Expired { not_after, now: time },
            webpki::Error::CertNotValidYet { time, not_before } => {
                Self::NotYetValid { not_before, now: time }
            }
            // Signed by somebody with the name of a CA of ours and another key: two meshes whose CAs have the same
            // names, or the time before a rotation has arrived.
            webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey => Self::UnknownIssuer,
            webpki::Error::CertRevoked => Self::Revoked,
            other => Self::Unusable(other.to_string()),
        }
    }
}

/// Why a handshake failed, or a TLS connection broke.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// We do not accept the peer.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// The peer sent no certificate.
    #[error("the peer sent no certificate; only mesh workloads may connect")]
    NoPeerCertificate,
    /// The peer does not accept us.
    #[error("the peer refused our certificate or handshake: {}", alert_text(*.0))]
    RefusedByPeer(AlertDescription),
    /// Not TLS at all.
    #[error("the peer does not speak TLS on this port")]
    NotTls,
    /// No version, suite, key exchange or application protocol in common.
    #[error("no TLS parameters in common: {0}")]
    Parameters(String),
    /// The handshake took too long.
    #[error("the TLS handshake did not finish within {} seconds", .0.as_secs())]
    Timeout(std::time::Duration),
    /// The connection below broke.
    #[error("the connection broke during the TLS handshake: {0}")]
    Io(io::Error),
    /// Something that the protocol rules out.
    #[error("TLS failed: {0}")]
    Protocol(rustls::Error),
}

impl TlsError {
    /// The stable code.
    #[must_use]
    pub const fn code(&self) -> Code {
        match self {
            Self::Peer(e) => e.code(),
            Self::NoPeerCertificate => Code::PeerWithoutCertificate,
            Self::RefusedByPeer(_) => Code::PeerRefusedUs,
            Self::NotTls => Code::NotTls,
            Self::Parameters(_) => Code::TlsParameters,
            Self::Timeout(_) => Code::TlsTimeout,
            Self::Io(_) | Self::Protocol(_) => Code::TlsTransport,
        }
    }

    /// The TLS error that an I/O error of a TLS stream carries, if it is one. In TLS 1.3 a server's refusal of the
    /// client's certificate reaches the client only after the client's handshake is done.
    #[must_use]
    pub fn inside(error: &io::Error) -> Option<Self> {
        error.get_ref()?.downcast_ref::<rustls::Error>().map(|e| e.clone().into())
    }
}

impl From<io::Error> for TlsError {
    fn from(error: io::Error) -> Self {
        Self::inside(&error).unwrap_or(Self::Io(error))
    }
}

impl From<rustls::Error> for TlsError {
    fn from(error: rustls::Error) -> Self {
        match error {
            rustls::Error::InvalidCertificate(e) => Self::Peer(PeerError::from_rustls(&e)),
            rustls::Error::NoCertificatesPresented => Self::NoPeerCertificate,
            rustls::Error::InvalidMessage(
                InvalidMessage::InvalidContentType | InvalidMessage::UnknownProtocolVersion,
            ) => Self::NotTls,
            rustls::Error::PeerIncompatible(why) => Self::Parameters(format!("{why:?}")),
            rustls::Error::NoApplicationProtocol => Self::Parameters("ALPN without h2".into()),
            rustls::Error::AlertReceived(
                alert @ (AlertDescription::ProtocolVersion
                | AlertDescription::HandshakeFailure
                | AlertDescription::InsufficientSecurity
                | AlertDescription::NoApplicationProtocol),
            ) => Self::Parameters(alert_text(alert)),
            rustls::Error::AlertReceived(alert) => Self::RefusedByPeer(alert),
            other => Self::Protocol(other),
        }
    }
}

/// What an alert means when it comes from the other side of a mutual handshake.
fn alert_text(alert: AlertDescription) -> String {
    let meaning = match alert {
        AlertDescription::CertificateExpired => "our certificate has expired by the peer's clock",
        AlertDescription::CertificateRevoked => "our certificate is on the peer's revocation list",
        AlertDescription::UnknownCA => "the peer does not trust our CA",
        AlertDescription::CertificateRequired => "the peer wants a certificate",
        AlertDescription::BadCertificate
        | AlertDescription::CertificateUnknown
        | AlertDescription::UnsupportedCertificate => {
            "our certificate is not acceptable to the peer (identity or trust domain)"
        }
        AlertDescription::NoApplicationProtocol => "the peer does not offer ALPN h2",
        AlertDescription::ProtocolVersion => "the peer does not offer TLS 1.3",
        AlertDescription::HandshakeFailure => "the peer shares no cipher suite or key exchange with us",
        _ => "see the peer's log",
    };
    format!("{meaning} (alert {alert:?})")
}

fn list(names: &[String], none: &'static str) -> impl fmt::Display {
    if names.is_empty() { none.to_owned() } else { names.join(" or ") }
}

fn seconds(from: UnixTime, to: UnixTime) -> u64 {
    to.as_secs().saturating_sub(from.as_secs())
}

/// The expected identities as texts, for an error.
pub(super) fn texts(ids: &[SpiffeId]) -> Vec<String> {
    ids.iter().map(ToString::to_string).collect()
}
