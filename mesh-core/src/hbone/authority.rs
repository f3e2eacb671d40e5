//! `:authority` of a CONNECT: where the peer is asked to go.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

/// The destination of a tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Authority {
    /// `IPv4:port` or `[IPv6]:port`: a workload or a service address. IPv4-mapped IPv6 is turned into IPv4.
    Socket(SocketAddr),
    /// `host:port`: a service by name, with the service's port (across networks).
    Host {
        /// Lower-case DNS name, without a trailing dot.
        host: Box<str>,
        /// The service's port, never 0.
        port: u16,
    },
}

/// Why a text is no [`Authority`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAuthority {
    /// There is nothing after the host.
    #[error("authority {0:?} has no port; it must be address:port or host:port")]
    NoPort(String),
    /// The port is not 1 to 65535.
    #[error("authority {0:?} has a port that is not a number from 1 to 65535")]
    BadPort(String),
    /// The host is neither an address nor a DNS name.
    #[error("authority {0:?} names neither an IP address nor a DNS name")]
    BadHost(String),
}

/// RFC 1035: a name has at most 255 octets on the wire, 253 as text.
const LONGEST_NAME: usize = 253;

impl Authority {
    /// The port.
    #[must_use]
    pub fn port(&self) -> u16 {
        match self {
            Self::Socket(addr) => addr.port(),
            Self::Host { port, .. } => *port,
        }
    }
}

impl From<SocketAddr> for Authority {
    fn from(addr: SocketAddr) -> Self {
        Self::Socket(SocketAddr::new(addr.ip().to_canonical(), addr.port()))
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(addr) => addr.fmt(f),
            Self::Host { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

impl FromStr for Authority {
    type Err = InvalidAuthority;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // A peer chooses the text: what we echo into logs stays short.
        let shown = || text.chars().take(80).collect::<String>();
        if let Ok(addr) = text.parse::<SocketAddr>() {
            return if addr.port() == 0 { Err(InvalidAuthority::BadPort(shown())) } else { Ok(addr.into()) };
        }
        let Some((host, port)) = text.rsplit_once(':') else {
            return Err(InvalidAuthority::NoPort(shown()));
        };
        if host.ends_with(']') || !host.starts_with('[') && host.contains(':') {
            // An IPv6 address whose port did not parse, or one without brackets.
            return Err(InvalidAuthority::BadHost(shown()));
        }
        if host.starts_with('[') {
            return Err(InvalidAuthority::NoPort(shown()));
        }
        let host = host.strip_suffix('.').unwrap_or(host);
        if !is_dns_name(host) {
            return Err(InvalidAuthority::BadHost(shown()));
        }
        // `u16::from_str` takes a leading plus sign, an authority must not.
        if !port.bytes().all(|b| b.is_ascii_digit()) {
            return Err(InvalidAuthority::BadPort(shown()));
        }
        match port.parse::<u16>() {
            Ok(port) if port != 0 => Ok(Self::Host { host: host.to_ascii_lowercase().into(), port }),
            _ => Err(InvalidAuthority::BadPort(shown())),
        }
    }
}

/// Letters, digits, hyphens and underscores in non-empty labels; not an IPv4 address in disguise.
fn is_dns_name(host: &str) -> bool {
    let label = |l: &str| {
        (1..=63).contains(&l.len()) && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    host.len() <= LONGEST_NAME
        && host.split('.').all(label)
        && !host.bytes().all(|b| b.is_ascii_digit() || b == b'.')
}
