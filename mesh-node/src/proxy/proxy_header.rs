//! The PROXY protocol v2 header for an application that asks for it (HBONE reference §12).
//!
//! Layout: HAProxy's `proxy-protocol.txt` §2.2; TLV 0xD0 carries the source's SPIFFE id, as Istio's node proxy does.

use std::net::{IpAddr, SocketAddr};

use mesh_core::identity::SpiffeId;

const SIGNATURE: [u8; 12] = [0x0D, 0x0A, 0x0D, 0x0A, 0x00, 0x0D, 0x0A, 0x51, 0x55, 0x49, 0x54, 0x0A];
/// Version 2, command PROXY.
const VERSION_COMMAND: u8 = 0x21;
const TCP4: u8 = 0x11;
const TCP6: u8 = 0x21;
/// Type of the field with the source's identity.
const IDENTITY_TLV: u8 = 0xD0;

/// The header bytes. Addresses of different families are both written as IPv6.
#[must_use]
pub fn encode(source: SocketAddr, destination: SocketAddr, identity: Option<&SpiffeId>) -> Vec<u8> {
    let mut body = Vec::with_capacity(64);
    let family = match (source.ip().to_canonical(), destination.ip().to_canonical()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            body.extend_from_slice(&from.octets());
            body.extend_from_slice(&to.octets());
            TCP4
        }
        (from, to) => {
            body.extend_from_slice(&v6(from));
            body.extend_from_slice(&v6(to));
            TCP6
        }
    };
    body.extend_from_slice(&source.port().to_be_bytes());
    body.extend_from_slice(&destination.port().to_be_bytes());
    if let Some(identity) = identity {
        let text = identity.to_string();
        // Kubernetes names are far below 64 KiB; a longer one could not have come through a certificate.
        if let Ok(length) = u16::try_from(text.len()) {
            body.push(IDENTITY_TLV);
            body.extend_from_slice(&length.to_be_bytes());
            body.extend_from_slice(text.as_bytes());
        }
    }
    let length = u16::try_from(body.len()).unwrap_or(u16::MAX);
    let mut header = Vec::with_capacity(16 + body.len());
    header.extend_from_slice(&SIGNATURE);
    header.extend_from_slice(&[VERSION_COMMAND, family]);
    header.extend_from_slice(&length.to_be_bytes());
    header.extend_from_slice(&body);
    header
}

fn v6(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ipv4_with_identity_is_laid_out_as_the_protocol_says() {
        let id = SpiffeId::new("td", "a", "b");
        let bytes = encode("10.0.0.1:1000".parse().unwrap(), "10.0.0.2:80".parse().unwrap(), Some(&id));
        assert_eq!(bytes[..12], SIGNATURE);
        assert_eq!(bytes[12..16], [0x21, 0x11, 0, 12 + 3 + 21]);
        assert_eq!(bytes[16..28], [10, 0, 0, 1, 10, 0, 0, 2, 0x03, 0xE8, 0, 80]);
        assert_eq!(bytes[28..31], [0xD0, 0, 21]);
        assert_eq!(&bytes[31..], b"spiffe://td/ns/a/sa/b");
    }

    #[test]
    fn mixed_families_are_written_as_ipv6() {
        let bytes = encode("10.0.0.1:1".parse().unwrap(), "[fd00::2]:80".parse().unwrap(), None);
        assert_eq!(bytes[12..16], [0x21, 0x21, 0, 36]);
        assert_eq!(bytes[26..32], [0xFF, 0xFF, 10, 0, 0, 1]);
        assert_eq!(bytes.len(), 16 + 36);
    }
}
