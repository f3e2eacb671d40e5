//! The network: an underlay bridge, nodes on it, pods behind routed veths.
//!
//! Every pod has its own /32 (and /128) with a link-local next hop, so that no two pods share a layer-2 segment and a
//! node only carries what it routes. Congestion control is fixed per route, because a namespace may not set it.

use super::netns::Netns;
use anyhow::{Context, Result};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// What the underlay does to packets.
#[derive(Debug, Clone, Copy)]
pub struct Link {
    /// Largest packet, for the underlay and the pods.
    pub mtu: u32,
    /// Per cent of packets that are lost on the way into each node.
    pub loss_percent: u32,
    /// One-way delay in milliseconds (needs the kernel's netem).
    pub delay_ms: u32,
}

impl Default for Link {
    fn default() -> Self {
        Self { mtu: 1500, loss_percent: 0, delay_ms: 0 }
    }
}

/// The control plane's place on the underlay.
pub const CONTROL: u8 = 2;

/// Address of place `n` on the underlay.
pub fn underlay_v4(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(172, 30, 0, n)
}

/// Address of place `n` on the underlay.
pub fn underlay_v6(n: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd30, 0, 0, 0, 0, 0, 0, u16::from(n))
}

/// The place of node `index` (from 1) on the underlay.
pub fn node_place(index: u8) -> u8 {
    10 + index
}

/// Address of pod `n` of node `index`.
pub fn pod_v4(index: u8, n: u16) -> Ipv4Addr {
    let [high, low] = n.to_be_bytes();
    Ipv4Addr::new(10, 30 + high, index, low)
}

/// Address of pod `n` of node `index`.
pub fn pod_v6(index: u8, n: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd30, 0, 0, u16::from(index), 0, 0, 0, n)
}

/// Makes the underlay's namespace with its bridge.
///
/// # Errors
/// The kernel has no bridge, or `ip` failed.
pub fn underlay(name: &str, link: Link) -> Result<Netns> {
    let netns = Netns::create(name)?;
    netns.sysctl(&[("ipv6/conf/default/disable_ipv6", "1")])?;
    netns.batch(&[
        "link add br0 type bridge".to_owned(),
        "link set br0 type bridge mcast_snooping 0 forward_delay 0".to_owned(),
        format!("link set br0 mtu {} up", link.mtu),
    ])?;
    Ok(netns)
}

/// Makes a namespace on the underlay at `place`; `port` names its end in the underlay.
///
/// # Errors
/// `ip` failed, or the link asks for what the kernel cannot do.
pub fn attach(name: &str, underlay: &Netns, place: u8, link: Link) -> Result<Netns> {
    let netns = Netns::create(name)?;
    netns.sysctl(&[
        ("ipv4/ip_forward", "1"),
        ("ipv4/conf/all/rp_filter", "0"),
        ("ipv4/conf/default/rp_filter", "0"),
        ("ipv6/conf/default/accept_dad", "0"),
        ("ipv6/conf/all/forwarding", "1"),
    ])?;
    let port = format!("n{place}");
    netns.batch(&[
        format!(
            "link add eth0 mtu {} type veth peer name {port} mtu {} netns {}",
            link.mtu,
            link.mtu,
            underlay.name()
        ),
        "link set eth0 up".to_owned(),
        format!("addr add {}/24 dev eth0", underlay_v4(place)),
        format!("addr add {}/64 dev eth0 nodad", underlay_v6(place)),
    ])?;
    underlay.batch(&[format!("link set {port} master br0 up")])?;
    shape(&netns, "eth0", link)?;
    Ok(netns)
}

/// Applies loss and delay to what arrives on (and leaves by) a device.
///
/// # Errors
/// Delay needs netem, which this kernel may not have.
pub fn shape(netns: &Netns, device: &str, link: Link) -> Result<()> {
    if link.loss_percent > 0 {
        netns.nft(&format!(
            "table inet um_loss {{\n chain in {{\n type filter hook ingress device \"{device}\" priority 0;\n \
             numgen random mod 100 < {} drop\n }}\n}}\n",
            link.loss_percent
        ))?;
    }
    if link.delay_ms > 0 {
        let delay = format!("{}ms", link.delay_ms);
        super::netns::command(
            "tc",
            [
                "-n",
                netns.name(),
                "qdisc",
                "add",
                "dev",
                device,
                "root",
                "netem",
                "delay",
                &delay,
                "limit",
                "100000",
            ],
        )
        .context("delay needs the kernel's netem")?;
    }
    Ok(())
}

/// Routes on node `index` to every other node's pods.
///
/// # Errors
/// `ip` failed.
pub fn routes(netns: &Netns, index: u8, nodes: u8) -> Result<()> {
    let mut lines = Vec::new();
    for other in (1..=nodes).filter(|other| *other != index) {
        let place = node_place(other);
        for high in 30..38 {
            lines.push(format!("route add 10.{high}.{other}.0/24 via {} congctl cubic", underlay_v4(place)));
        }
        lines.push(format!("route add fd30:0:0:{other:x}::/64 via {} congctl cubic", underlay_v6(place)));
    }
    netns.batch(&lines)
}

/// Makes a pod's namespace behind its node; returns it with its device up.
///
/// # Errors
/// `ip` failed.
pub fn pod(name: &str, node: &Netns, index: u8, n: u16, mtu: u32) -> Result<Netns> {
    let netns = Netns::create(name)?;
    let (v4, v6) = (pod_v4(index, n), pod_v6(index, n));
    let host = underlay_v4(node_place(index));
    // Known for good: all namespaces of the machine share a table of 1,024 neighbours that are learnt.
    let [high, low] = n.to_be_bytes();
    let (own, peer) = (mac(0x70, index, high, low), mac(0x6e, index, high, low));
    netns.sysctl(&[("ipv6/conf/default/accept_dad", "0"), ("ipv4/ip_unprivileged_port_start", "0")])?;
    netns.batch(&[
        format!(
            "link add eth0 mtu {mtu} address {own} type veth peer name v{n} mtu {mtu} address {peer} netns {}",
            node.name()
        ),
        "link set eth0 up".to_owned(),
        format!("addr add {v4}/32 dev eth0"),
        format!("addr add {v6}/128 dev eth0 nodad"),
    ])?;
    node.batch(&[
        format!("addr add 169.254.1.1/32 dev v{n}"),
        format!("addr add fe80::1/64 dev v{n} nodad"),
        format!("link set v{n} up"),
        format!("neigh add {v4} lladdr {own} dev v{n} nud permanent"),
        format!("route add {v4}/32 dev v{n} src {host} congctl cubic"),
        format!("route add {v6}/128 dev v{n} src {} congctl cubic", underlay_v6(node_place(index))),
    ])?;
    netns.batch(&[
        "route add 169.254.1.1 dev eth0 scope link".to_owned(),
        format!("neigh add 169.254.1.1 lladdr {peer} dev eth0 nud permanent"),
        format!("route add default via 169.254.1.1 dev eth0 src {v4} congctl cubic"),
        "route add fe80::1 dev eth0".to_owned(),
        format!("route add default via fe80::1 dev eth0 src {v6} congctl cubic"),
    ])?;
    Ok(netns)
}

/// A locally administered hardware address.
fn mac(kind: u8, index: u8, high: u8, low: u8) -> String {
    format!("02:75:{kind:02x}:{index:02x}:{high:02x}:{low:02x}")
}

/// The TCP ports that listen in the namespace (on any address), from the kernel's own table.
///
/// # Errors
/// The namespace cannot be entered.
pub fn listening_ports(netns: &Netns) -> Result<std::collections::BTreeSet<u16>> {
    netns.within(|| {
        let mut ports = std::collections::BTreeSet::new();
        for table in ["tcp", "tcp6"] {
            let text = std::fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap_or_default();
            for line in text.lines().skip(1) {
                let fields: Vec<&str> = line.split_whitespace().take(4).collect();
                if let [_, local, _, "0A"] = fields.as_slice() {
                    let port = local.rsplit(':').next().and_then(|port| u16::from_str_radix(port, 16).ok());
                    ports.extend(port);
                }
            }
        }
        ports
    })
}

/// Whether a TCP port listens in the namespace (on any address), from the kernel's own table.
///
/// # Errors
/// The namespace cannot be entered.
pub fn listening(netns: &Netns, port: u16) -> Result<bool> {
    let suffix = format!(":{port:04X}");
    netns.within(|| {
        ["tcp", "tcp6"].iter().any(|table| {
            let text = std::fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap_or_default();
            text.lines().skip(1).any(|line| {
                let fields: Vec<&str> = line.split_whitespace().take(4).collect();
                matches!(fields.as_slice(), [_, local, _, "0A"] if local.ends_with(&suffix))
            })
        })
    })
}

/// The established TCP connections of a namespace as (local, remote), from the kernel's own table.
///
/// # Errors
/// The namespace cannot be entered.
pub fn established(netns: &Netns) -> Result<Vec<(std::net::SocketAddr, std::net::SocketAddr)>> {
    netns.within(|| {
        let mut found = Vec::new();
        for table in ["tcp", "tcp6"] {
            let text = std::fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap_or_default();
            found.extend(sockets(&text, "01"));
        }
        found
    })
}

/// Where somebody listens, by a table of the kernel (`/proc/PID/net/tcp`, `tcp6`).
pub fn listeners(table: &str) -> impl Iterator<Item = std::net::SocketAddr> {
    sockets(table, "0A").map(|(local, _)| local)
}

/// Local and remote addresses of a table's sockets of a state, as the kernel numbers them; its head has no address.
fn sockets(
    table: &str,
    state: &'static str,
) -> impl Iterator<Item = (std::net::SocketAddr, std::net::SocketAddr)> {
    table.lines().filter_map(move |line| {
        let fields: Vec<&str> = line.split_whitespace().take(4).collect();
        let [_, local, remote, found] = fields.as_slice() else { return None };
        if *found == state { hex_address(local).zip(hex_address(remote)) } else { None }
    })
}

/// An address as /proc/net/tcp writes it: words of the address in host byte order, then the port.
fn hex_address(text: &str) -> Option<std::net::SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let mut bytes = Vec::with_capacity(16);
    for word in address.as_bytes().chunks(8) {
        let word = u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok()?;
        bytes.extend(word.to_ne_bytes());
    }
    let ip = match bytes.len() {
        4 => IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?)),
        16 => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?)).to_canonical(),
        _ => return None,
    };
    Some((ip, port).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_are_told_from_connections() {
        let table = "  sl  local_address rem_address   st\n   0: 0100007F:1F90 00000000:0000 0A 0\n   \
                     1: 0100007F:1F91 0100007F:0050 01 0\n";
        assert_eq!(listeners(table).collect::<Vec<_>>(), ["127.0.0.1:8080".parse().unwrap()]);
    }

    #[test]
    fn kernel_tables_read_as_addresses() {
        assert_eq!(hex_address("0100007F:1F90"), Some("127.0.0.1:8080".parse().unwrap()));
        assert_eq!(
            hex_address("0000000000000000FFFF00000100007F:0050"),
            Some("127.0.0.1:80".parse().unwrap())
        );
        assert_eq!(hex_address("nonsense"), None);
    }
}
