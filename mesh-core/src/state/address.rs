//! Addresses as the workload API writes them: a network name and an IP, a prefix, or a namespaced hostname.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use super::Str;
use super::decode::{Context, DecodeError, Problem, cidr_from_bytes};
use crate::xds::proto::workload as wire;

/// Port of HBONE when a gateway reference names none (Istio's default).
pub(crate) const DEFAULT_HBONE_PORT: u16 = 15008;

/// A prefix of addresses, always in canonical form (no host bits, no v4-mapped IPv6).
pub type Cidr = IpNet;

/// One address of one network. The empty network is the default one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NetworkAddress {
    /// Name of the network; addresses are unique only within it.
    pub network: Str,
    /// The address.
    pub ip: IpAddr,
}

impl fmt::Display for NetworkAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.ip)
    }
}

/// A prefix of one network, shorter than one host.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NetworkCidr {
    /// Name of the network.
    pub network: Str,
    /// The prefix.
    pub cidr: Cidr,
}

impl fmt::Display for NetworkCidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.cidr)
    }
}

/// A hostname as one namespace defines it. Displays as, and is looked up by, `namespace/hostname`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NamespacedHostname {
    key: Str,
    hostname_at: usize,
}

impl NamespacedHostname {
    /// Joins the two parts.
    #[must_use]
    pub fn new(namespace: &str, hostname: &str) -> Self {
        Self { key: format!("{namespace}/{hostname}").into(), hostname_at: namespace.len() + 1 }
    }

    /// `namespace/hostname`, the resource name of a service.
    #[must_use]
    pub fn key(&self) -> &Str {
        &self.key
    }

    /// The hostname.
    #[must_use]
    pub fn hostname(&self) -> &str {
        &self.key[self.hostname_at..]
    }

    /// The namespace that defines it.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.key[..self.hostname_at - 1]
    }
}

impl fmt::Display for NamespacedHostname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.key)
    }
}

/// Where a waypoint or a network gateway is, with its HBONE port.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum GatewayAddress {
    /// By hostname: adapts to the address family of the caller.
    Hostname(NamespacedHostname, u16),
    /// By address: pins the address family.
    Address(NetworkAddress, u16),
}

impl GatewayAddress {
    /// The port on which it speaks HBONE.
    #[must_use]
    pub fn port(&self) -> u16 {
        match self {
            Self::Hostname(_, port) | Self::Address(_, port) => *port,
        }
    }

    pub(super) fn decode(
        cx: Context<'_>,
        field: &str,
        msg: &wire::GatewayAddress,
    ) -> Result<Self, DecodeError> {
        use wire::gateway_address::Destination;
        let port = cx
            .optional_port(&format!("{field}.hbone_mtls_port"), msg.hbone_mtls_port)?
            .unwrap_or(DEFAULT_HBONE_PORT);
        match &msg.destination {
            Some(Destination::Hostname(name)) if name.hostname.is_empty() => Err(cx.error(
                format!("{field}.hostname.hostname"),
                Problem::Missing("the hostname of the gateway"),
            )),
            Some(Destination::Hostname(name)) => {
                Ok(Self::Hostname(NamespacedHostname::new(&name.namespace, &name.hostname), port))
            }
            Some(Destination::Address(address)) => {
                let ip = cx.ip(&format!("{field}.address.address"), &address.address)?;
                Ok(Self::Address(NetworkAddress { network: address.network.as_str().into(), ip }, port))
            }
            None => {
                Err(cx.error(format!("{field}.destination"), Problem::Missing("`hostname` or `address`")))
            }
        }
    }
}

impl fmt::Display for GatewayAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hostname(name, port) => write!(f, "{name}:{port}"),
            Self::Address(address, port) => write!(f, "{address}:{port}"),
        }
    }
}

/// Where a workload runs; unset parts are empty. The parts are compared one by one: no hierarchy is implied.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Locality {
    /// For example `eu-central`.
    pub region: Str,
    /// For example `a`.
    pub zone: Str,
    /// For example `rack-7`.
    pub subzone: Str,
}

impl Default for Locality {
    fn default() -> Self {
        Self { region: "".into(), zone: "".into(), subzone: "".into() }
    }
}

/// A virtual address of a service: one host, or a prefix.
pub(super) enum Vip {
    Host(NetworkAddress),
    Prefix(NetworkCidr),
}

impl Vip {
    pub(super) fn decode(
        cx: Context<'_>,
        field: &str,
        msg: &wire::NetworkAddress,
    ) -> Result<Self, DecodeError> {
        let network: Str = msg.network.as_str().into();
        let ip = cx.ip(&format!("{field}.address"), &msg.address)?;
        let Some(length) = msg.length else { return Ok(Self::Host(NetworkAddress { network, ip })) };
        match cidr_from_bytes(&msg.address, length) {
            Some(cidr) if cidr.prefix_len() == cidr.max_prefix_len() => {
                Ok(Self::Host(NetworkAddress { network, ip }))
            }
            Some(cidr) => Ok(Self::Prefix(NetworkCidr { network, cidr })),
            None => {
                let max = if ip.is_ipv4() { 32 } else { 128 };
                Err(cx.error(format!("{field}.length"), Problem::PrefixLength { length, max }))
            }
        }
    }
}
