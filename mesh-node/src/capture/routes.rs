//! The network namespace of a pod, seen through netlink: its addresses, and the one rule and one local route (per
//! family) that lead the answers of the application back to the agent's socket.
//!
//! The agent connects to the application with the client's address as its source. The answer is addressed to the
//! client; `tcp_fwmark_accept` gives it the mark of the SYN, the rule sends the mark to a table of its own, and that
//! table's only route delivers everything locally. Where no socket listens the kernel answers by itself;
//! `fwmark_reflect` gives its RST the same way, so that a refusal arrives as one.

use crate::sys::{Netns, write_sysctl};
use mesh_ebpf::AGENT_MARK;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use rtnetlink::packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use rtnetlink::packet_route::link::{LinkFlags, LinkMessage};
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;

/// Routing table and rule of the agent's connections to the application (Istio uses the same number).
const TABLE: u8 = 100;
/// Index of `lo` in every network namespace.
const LOOPBACK: u32 = 1;
/// The kernel's datagrams are never longer (NETLINK: the reader's buffer, at most 32 KiB).
const LARGEST_ANSWER: usize = 32 << 10;
const GROUP_IPV4_ADDRESSES: u32 = 5;
const GROUP_IPV6_ADDRESSES: u32 = 9;

/// A netlink socket in a pod's namespace.
pub(super) struct PodNetlink {
    socket: Socket,
}

/// An address of the namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OwnAddress {
    pub(super) ip: IpAddr,
    /// May be the source and the rewritten destination of connections: neither link-local nor on its way out.
    pub(super) primary: bool,
    pub(super) interface: u32,
    /// The address is part of a subnet on its link, as on a bridge: others on that link could claim it (ARP, neighbour
    /// discovery). A pod behind a routed veth of its own has a host prefix.
    pub(super) on_segment: bool,
}

impl PodNetlink {
    /// Opens the socket in the namespace and subscribes it to changes of addresses.
    ///
    /// # Errors
    /// The namespace is gone, or out of descriptors.
    pub(super) fn open(netns: &Netns) -> io::Result<Self> {
        netns.run(|| {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            socket.add_membership(GROUP_IPV4_ADDRESSES)?;
            socket.add_membership(GROUP_IPV6_ADDRESSES)?;
            Ok(Self { socket })
        })?
    }

    /// Discards notifications; says whether there were any. An overrun counts as one.
    pub(super) fn drain(&self) -> io::Result<bool> {
        self.socket.set_non_blocking(true)?;
        let mut any = false;
        let mut buffer = Vec::with_capacity(8192);
        let result = loop {
            buffer.clear();
            match self.socket.recv(&mut buffer, 0) {
                Ok(_) => any = true,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break Ok(any),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => any = true,
                Err(error) => break Err(error),
            }
        };
        self.socket.set_non_blocking(false)?;
        result
    }

    /// All addresses of the namespace but loopback's.
    pub(super) fn addresses(&self) -> io::Result<Vec<OwnAddress>> {
        let mut found = Vec::new();
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        self.exchange(request, NLM_F_DUMP, &mut |message| {
            if let RouteNetlinkMessage::NewAddress(address) = message {
                found.extend(own_address(&address));
            }
        })?;
        found.sort_by_key(|address| address.interface);
        Ok(found)
    }

    /// The rule and the local route of one family.
    fn route_marked(family: AddressFamily) -> [RouteNetlinkMessage; 2] {
        let mut rule = RuleMessage::default();
        rule.header.family = family;
        rule.header.table = TABLE;
        rule.header.action = RuleAction::ToTable;
        rule.attributes = vec![RuleAttribute::FwMark(AGENT_MARK), RuleAttribute::Table(u32::from(TABLE))];
        let mut route = RouteMessage::default();
        route.header.address_family = family;
        route.header.table = TABLE;
        route.header.protocol = RouteProtocol::Static;
        route.header.scope = RouteScope::Host;
        route.header.kind = RouteType::Local;
        route.attributes = vec![RouteAttribute::Oif(LOOPBACK)];
        [RouteNetlinkMessage::NewRule(rule), RouteNetlinkMessage::NewRoute(route)]
    }

    /// Prepares the namespace for the agent's connections to the application.
    pub(super) fn prepare(&self, netns: &Netns) -> io::Result<()> {
        let mut lo = LinkMessage::default();
        lo.header.index = LOOPBACK;
        lo.header.flags = LinkFlags::Up;
        lo.header.change_mask = LinkFlags::Up;
        let create = |message| (message, NLM_F_CREATE | NLM_F_EXCL);
        let [v4, v6] = [AddressFamily::Inet, AddressFamily::Inet6].map(Self::route_marked);
        let requests = [(RouteNetlinkMessage::SetLink(lo), 0)];
        let requests = requests.into_iter().chain(v4.into_iter().chain(v6).map(create)).collect();
        for (i, outcome) in self.ask_all(requests)?.into_iter().enumerate() {
            match outcome {
                // From an earlier agent.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                // IPv6 is off in this kernel or namespace: there is nothing to route.
                Err(error)
                    if i >= 3
                        && matches!(
                            error.raw_os_error(),
                            Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP | libc::EACCES | libc::EPERM)
                        ) => {}
                other => other?,
            }
        }
        set_sysctls(netns, "1")
    }

    /// Takes back what [`PodNetlink::prepare`] did; `lo` stays up.
    pub(super) fn clean(&self, netns: &Netns) -> io::Result<()> {
        let of_family = |family| {
            Self::route_marked(family).map(|message| match message {
                RouteNetlinkMessage::NewRule(rule) => (RouteNetlinkMessage::DelRule(rule), 0),
                RouteNetlinkMessage::NewRoute(route) => (RouteNetlinkMessage::DelRoute(route), 0),
                other => (other, 0),
            })
        };
        let requests = [AddressFamily::Inet, AddressFamily::Inet6].into_iter().flat_map(of_family).collect();
        for outcome in self.ask_all(requests)? {
            match outcome {
                // It is not there, or IPv6 is off.
                Err(error)
                    if matches!(
                        error.raw_os_error(),
                        Some(
                            libc::ENOENT
                                | libc::ESRCH
                                | libc::EAFNOSUPPORT
                                | libc::EOPNOTSUPP
                                | libc::EACCES
                                | libc::EPERM
                        )
                    ) => {}
                other => other?,
            }
        }
        set_sysctls(netns, "0")
    }

    /// Gives `lo` an address.
    pub(super) fn add_to_loopback(&self, ip: IpAddr) -> io::Result<()> {
        let mut message = AddressMessage::default();
        message.header.family = if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        message.header.prefix_len = if ip.is_ipv4() { 32 } else { 128 };
        message.header.index = LOOPBACK;
        // Usable at once, not only when the kernel's worker has come round to it.
        message.header.flags = AddressHeaderFlags::Nodad;
        message.attributes = vec![AddressAttribute::Local(ip), AddressAttribute::Address(ip)];
        self.add(RouteNetlinkMessage::NewAddress(message))
    }

    fn add(&self, message: RouteNetlinkMessage) -> io::Result<()> {
        match self.exchange(message, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, &mut |_| {}) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        }
    }

    /// Sends requests in one datagram and tells what became of each.
    fn ask_all(&self, requests: Vec<(RouteNetlinkMessage, u16)>) -> io::Result<Vec<io::Result<()>>> {
        let count = requests.len();
        let mut bytes = Vec::new();
        for (sequence, (request, flags)) in (1..).zip(requests) {
            append(&mut bytes, request, NLM_F_ACK | flags, sequence);
        }
        self.socket.send(&bytes, 0)?;
        // The kernel answers in order, one datagram each.
        (1..).take(count).map(|sequence| Ok(self.answers(sequence, &mut |_| {}))).collect()
    }

    /// Sends a request and gives every answer to `each` until the kernel says that it is done.
    fn exchange(
        &self,
        request: RouteNetlinkMessage,
        flags: u16,
        each: &mut dyn FnMut(RouteNetlinkMessage),
    ) -> io::Result<()> {
        const SEQUENCE: u32 = 1;
        let mut bytes = Vec::new();
        append(&mut bytes, request, flags, SEQUENCE);
        self.socket.send(&bytes, 0)?;
        self.answers(SEQUENCE, each)
    }

    /// Gives every answer to a request to `each` until the kernel says that it is done.
    fn answers(&self, sequence: u32, each: &mut dyn FnMut(RouteNetlinkMessage)) -> io::Result<()> {
        let mut answer = Vec::with_capacity(LARGEST_ANSWER);
        loop {
            answer.clear();
            match self.socket.recv(&mut answer, 0) {
                // Notifications were lost; they only say what a dump says anyway.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => continue,
                other => other?,
            };
            if read_answer(&answer, sequence, each)? {
                return Ok(());
            }
        }
    }
}

/// Whether answers have the mark of what they answer.
fn set_sysctls(netns: &Netns, value: &str) -> io::Result<()> {
    netns.run(|| {
        write_sysctl("net/ipv4/tcp_fwmark_accept", value)?;
        write_sysctl("net/ipv4/fwmark_reflect", value)?;
        match write_sysctl("net/ipv6/fwmark_reflect", value) {
            // IPv6 is off in this kernel.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    })?
}

/// Takes back what an agent did in a pod's network namespace; nothing to do if that is gone.
///
/// # Errors
/// The kernel refuses.
pub fn clean_namespace(path: &Path) -> io::Result<()> {
    let netns = match Netns::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    PodNetlink::open(&netns)?.clean(&netns)
}

/// Appends a request to a datagram, where each begins at a multiple of four bytes.
fn append(bytes: &mut Vec<u8>, request: RouteNetlinkMessage, flags: u16, sequence: u32) {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    header.sequence_number = sequence;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request));
    message.finalize();
    let start = bytes.len();
    bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
    message.serialize(&mut bytes[start..]);
}

/// Reads one datagram of answers; says whether it was the last. Notifications carry another sequence number.
fn read_answer(bytes: &[u8], sequence: u32, each: &mut dyn FnMut(RouteNetlinkMessage)) -> io::Result<bool> {
    let mut rest = bytes;
    while rest.len() >= 16 {
        let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).map_err(io::Error::other)?;
        let length = (message.header.length as usize).next_multiple_of(4).clamp(16, rest.len());
        rest = &rest[length..];
        if message.header.sequence_number != sequence {
            continue;
        }
        match message.payload {
            NetlinkPayload::Done(_) => return Ok(true),
            NetlinkPayload::Error(error) => {
                return if error.code.is_none() { Ok(true) } else { Err(error.to_io()) };
            }
            NetlinkPayload::InnerMessage(inner) => each(inner),
            _ => {}
        }
    }
    Ok(false)
}

/// The address that an answer is about, unless it is loopback's.
fn own_address(message: &AddressMessage) -> Option<OwnAddress> {
    let mut local = None;
    for attribute in &message.attributes {
        match attribute {
            // On a point-to-point link `Address` is the peer's.
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) if local.is_none() => local = Some(*ip),
            _ => {}
        }
    }
    let ip = local?;
    if ip.is_loopback() {
        return None;
    }
    let link_local = matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
    let leaving = message.header.flags.contains(AddressHeaderFlags::Deprecated);
    let host_prefix = if ip.is_ipv4() { 32 } else { 128 };
    let on_segment = !link_local && message.header.prefix_len < host_prefix;
    Some(OwnAddress { ip, primary: !link_local && !leaving, interface: message.header.index, on_segment })
}

impl AsRawFd for PodNetlink {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}
