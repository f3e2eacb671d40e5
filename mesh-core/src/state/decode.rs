//! Reading wire messages strictly: what a receiver cannot honour it rejects, naming the object and the field.

use std::net::IpAddr;

use ipnet::IpNet;

/// Why a resource of the control plane was rejected. The text names object, field, what is wrong and what would
/// be right; it travels back to the control plane in the NACK.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{resource}: {field}: {problem}")]
pub struct DecodeError {
    /// Kind and key of the object, for example `workload Kubernetes//Pod/shop/cart-1`.
    pub resource: String,
    /// The field as the API spells it, for example `addresses[1]`.
    pub field: String,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What is wrong with a field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// IP addresses have two lengths.
    #[error("is {0} bytes long; an IP address has 4 or 16")]
    AddressLength(usize),
    /// A CIDR prefix longer than its address.
    #[error("prefix length {length} is more than the {max} bits of the address")]
    PrefixLength {
        /// The length received.
        length: u32,
        /// The bits of the address.
        max: u8,
    },
    /// An enum number that this version does not know. Guessing could route or authorize wrongly.
    #[error("value {value} is not known; known are {known}")]
    UnknownEnum {
        /// The number received.
        value: i32,
        /// Names of the known values.
        known: &'static str,
    },
    /// A known value that this receiver cannot honour.
    #[error("{value} is not supported; use {instead}")]
    Unsupported {
        /// The value received.
        value: &'static str,
        /// What would be right.
        instead: &'static str,
    },
    /// A field that must be set and is not.
    #[error("is missing; expected {0}")]
    Missing(&'static str),
    /// A number outside the range of TCP ports.
    #[error("{value} is no port; expected {expected}")]
    Port {
        /// The number received.
        value: u32,
        /// The range.
        expected: &'static str,
    },
}

/// Where in which object a decoder is; makes the errors.
#[derive(Clone, Copy)]
pub(crate) struct Context<'a> {
    pub(crate) kind: &'static str,
    pub(crate) key: &'a str,
}

impl Context<'_> {
    pub(crate) fn error(&self, field: impl Into<String>, problem: Problem) -> DecodeError {
        DecodeError { resource: format!("{} {}", self.kind, self.key), field: field.into(), problem }
    }

    pub(crate) fn ip(&self, field: &str, bytes: &[u8]) -> Result<IpAddr, DecodeError> {
        ip_from_bytes(bytes).ok_or_else(|| self.error(field, Problem::AddressLength(bytes.len())))
    }

    /// A port that must name something: 1 to 65535.
    pub(crate) fn port(&self, field: &str, value: u32) -> Result<u16, DecodeError> {
        match u16::try_from(value) {
            Ok(port) if port != 0 => Ok(port),
            _ => Err(self.error(field, Problem::Port { value, expected: "1 to 65535" })),
        }
    }

    /// A port where 0 means unset.
    pub(crate) fn optional_port(&self, field: &str, value: u32) -> Result<Option<u16>, DecodeError> {
        match value {
            0 => Ok(None),
            _ => self.port(field, value).map(Some),
        }
    }

    pub(crate) fn known<T: TryFrom<i32>>(
        &self,
        field: &str,
        value: i32,
        known: &'static str,
    ) -> Result<T, DecodeError> {
        T::try_from(value).ok().ok_or_else(|| self.error(field, Problem::UnknownEnum { value, known }))
    }
}

/// An address in its wire form (4 or 16 bytes, network order); v4-mapped IPv6 counts as IPv4.
pub(crate) fn ip_from_bytes(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(IpAddr::from(v4));
    }
    <[u8; 16]>::try_from(bytes).ok().map(|v6| IpAddr::from(v6).to_canonical())
}

/// A prefix in its wire form, without host bits; a v4-mapped prefix becomes the IPv4 one. None when the bytes are
/// no address or the length does not fit.
pub(crate) fn cidr_from_bytes(bytes: &[u8], length: u32) -> Option<IpNet> {
    let ip = ip_from_bytes(bytes)?;
    let length = if ip.is_ipv4() && bytes.len() == 16 { length.checked_sub(96)? } else { length };
    IpNet::new(ip, u8::try_from(length).ok()?).ok().map(|net| net.trunc())
}
