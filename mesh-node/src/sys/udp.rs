//! The DNS sockets of a pod. One socket receives, wherever the datagram was sent to; answers leave from the address
//! and port that was asked, because connected clients accept nothing else.

use super::{Netns, check};
use mesh_ebpf::{DNS_PORTS, DNS_PORTS_START};
use socket2::{Domain, Protocol, Socket, Type};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::OnceLock;

const IP_RECVORIGDSTADDR: libc::c_int = 20;
const IPV6_RECVORIGDSTADDR: libc::c_int = 74;

/// A received datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// Bytes written to the buffer; a longer datagram was cut.
    pub length: usize,
    /// Who sent it.
    pub peer: SocketAddr,
    /// Where it was sent: the pod's own address and a port of the DNS range.
    pub local: SocketAddr,
}

fn set(socket: &Socket, level: libc::c_int, name: libc::c_int) -> io::Result<()> {
    let on: libc::c_int = 1;
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel reads `length` bytes from `on`, which lives until the call returns.
    check(unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const on).cast(), length) }.into())
        .map(|_| ())
}

/// A non-blocking socket bound to `port` of every address, for both families where IPv6 is on.
fn socket(netns: &Netns, port: u16) -> io::Result<Socket> {
    let make = |domain, address: SocketAddr| -> io::Result<Socket> {
        let socket = netns.socket(domain, Type::DGRAM, Some(Protocol::UDP))?;
        if address.is_ipv6() {
            socket.set_only_v6(false)?;
            set(&socket, libc::IPPROTO_IPV6, IPV6_RECVORIGDSTADDR)?;
        }
        set(&socket, libc::IPPROTO_IP, IP_RECVORIGDSTADDR)?;
        // Several agents overlap while one replaces the other.
        socket.set_reuse_port(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        Ok(socket)
    };
    match make(Domain::IPV6, SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) => {
            make(Domain::IPV4, SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)))
        }
        made => made,
    }
}

/// The socket that receives a pod's DNS queries once it is registered as the pod's `DnsUdp` listener.
///
/// # Errors
/// The namespace is gone, or out of descriptors.
pub fn dns_socket(netns: &Netns) -> io::Result<UdpSocket> {
    Ok(socket(netns, 0)?.into())
}

#[repr(C)]
union Control {
    bytes: [u8; 128],
    /// Control messages must be aligned like their header.
    header: libc::cmsghdr,
}

fn address(storage: &libc::sockaddr_storage) -> Option<SocketAddr> {
    // SAFETY: the family tells which of the two layouts the kernel wrote; the storage is large enough for both.
    unsafe {
        match i32::from(storage.ss_family) {
            libc::AF_INET => {
                let v4 = &*std::ptr::from_ref(storage).cast::<libc::sockaddr_in>();
                let ip = Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr));
                Some(SocketAddr::V4(SocketAddrV4::new(ip, u16::from_be(v4.sin_port))))
            }
            libc::AF_INET6 => {
                let v6 = &*std::ptr::from_ref(storage).cast::<libc::sockaddr_in6>();
                let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
                let port = u16::from_be(v6.sin6_port);
                Some(match ip.to_canonical() {
                    IpAddr::V4(v4) => SocketAddr::V4(SocketAddrV4::new(v4, port)),
                    IpAddr::V6(v6) => SocketAddr::new(v6.into(), port),
                })
            }
            _ => None,
        }
    }
}

/// Receives one datagram with the address that it was sent to.
///
/// # Errors
/// `WouldBlock` if there is none.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Datagram> {
    // SAFETY: all-zero bytes are valid for these plain C types.
    let (mut peer, mut message): (libc::sockaddr_storage, libc::msghdr) =
        unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
    let mut control = Control { bytes: [0; 128] };
    let mut vector = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    message.msg_name = (&raw mut peer).cast();
    message.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    message.msg_iov = &raw mut vector;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = size_of::<Control>();
    // SAFETY: every pointer in `message` is to a live buffer of the length given beside it.
    let length = check(unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0) } as libc::c_long)?;
    // SAFETY: the kernel filled the control buffer; the CMSG functions stay inside msg_controllen.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    let mut local = None;
    while !header.is_null() {
        // SAFETY: the header points into the control buffer, as above; the payload is copied unaligned.
        unsafe {
            let kind = ((*header).cmsg_level, (*header).cmsg_type);
            if kind == (libc::IPPROTO_IP, IP_RECVORIGDSTADDR)
                || kind == (libc::IPPROTO_IPV6, IPV6_RECVORIGDSTADDR)
            {
                let mut storage: libc::sockaddr_storage = std::mem::zeroed();
                let size = (*header).cmsg_len.saturating_sub(libc::CMSG_LEN(0) as usize);
                let size = size.min(size_of::<libc::sockaddr_storage>());
                std::ptr::copy_nonoverlapping(libc::CMSG_DATA(header), (&raw mut storage).cast(), size);
                local = address(&storage);
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    let missing =
        |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("datagram without its {what}"));
    Ok(Datagram {
        length: usize::try_from(length).unwrap_or(0),
        peer: address(&peer).ok_or_else(|| missing("source"))?,
        local: local.ok_or_else(|| missing("destination"))?,
    })
}

/// Answers a pod's DNS queries: one socket per port of the range that was ever asked, made on demand.
pub struct Responder {
    netns: Netns,
    sockets: [OnceLock<UdpSocket>; DNS_PORTS as usize],
}

impl Responder {
    /// For the pod of this namespace.
    #[must_use]
    pub const fn new(netns: Netns) -> Self {
        Self { netns, sockets: [const { OnceLock::new() }; DNS_PORTS as usize] }
    }

    /// Sends an answer from the address and port that the query was sent to ([`Datagram::local`]).
    ///
    /// # Errors
    /// `from` is no port of the DNS range, the namespace is gone, out of descriptors, or the send queue is full.
    pub fn send(&self, answer: &[u8], from: SocketAddr, to: SocketAddr) -> io::Result<()> {
        let place = usize::from(from.port().wrapping_sub(DNS_PORTS_START));
        let Some(cell) = self.sockets.get(place) else {
            let text = format!("port {} is not one of the DNS range", from.port());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        };
        let socket = match cell.get() {
            Some(socket) => socket,
            None => {
                let socket = socket(&self.netns, from.port())?;
                cell.get_or_init(|| socket.into())
            }
        };
        send_from(socket.as_fd(), answer, from.ip(), to)
    }
}

/// Sends with a chosen source address.
fn send_from(socket: BorrowedFd<'_>, data: &[u8], from: IpAddr, to: SocketAddr) -> io::Result<()> {
    let is_v6_socket =
        rustix::net::getsockname(socket)?.address_family() == rustix::net::AddressFamily::INET6;
    let to = match to {
        SocketAddr::V4(v4) if is_v6_socket => SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port()),
        other => other,
    };
    let to = socket2::SockAddr::from(to);
    // SAFETY: all-zero bytes are valid for this plain C type.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    let mut control = Control { bytes: [0; 128] };
    let mut vector = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    message.msg_name = to.as_ptr().cast_mut().cast();
    message.msg_namelen = to.len();
    message.msg_iov = &raw mut vector;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = size_of::<Control>();
    let written = match from {
        IpAddr::V4(ip) => {
            let info = libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: libc::in_addr { s_addr: u32::from(ip).to_be() },
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            put(&message, libc::IPPROTO_IP, libc::IP_PKTINFO, &info)
        }
        IpAddr::V6(ip) => {
            let info =
                libc::in6_pktinfo { ipi6_addr: libc::in6_addr { s6_addr: ip.octets() }, ipi6_ifindex: 0 };
            put(&message, libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, &info)
        }
    };
    message.msg_controllen = written;
    // SAFETY: every pointer in `message` is to a live buffer of the length given beside it; the kernel only reads.
    check(unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) } as libc::c_long)
        .map(|_| ())
}

/// Writes one control message into the message's buffer and returns the length used.
fn put<T: Copy>(message: &libc::msghdr, level: libc::c_int, kind: libc::c_int, value: &T) -> usize {
    // SAFETY: the control buffer is 128 bytes, aligned, and larger than any of the two payloads with its header.
    unsafe {
        let header = libc::CMSG_FIRSTHDR(std::ptr::from_ref(message));
        (*header).cmsg_level = level;
        (*header).cmsg_type = kind;
        (*header).cmsg_len = libc::CMSG_LEN(size_of::<T>() as u32) as usize;
        std::ptr::copy_nonoverlapping(
            std::ptr::from_ref(value).cast::<u8>(),
            libc::CMSG_DATA(header),
            size_of::<T>(),
        );
        libc::CMSG_SPACE(size_of::<T>() as u32) as usize
    }
}
