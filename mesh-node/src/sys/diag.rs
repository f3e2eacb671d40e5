//! Socket diagnostics over netlink: destroying one connection (SOCK_DESTROY, RFC-less; include/uapi/linux/inet_diag.h).

use super::{Netns, check};
use mesh_ebpf::Address;
use socket2::{Domain, Protocol, Type};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;

const NETLINK_SOCK_DIAG: i32 = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLMSG_ERROR: u16 = 2;

/// `nlmsghdr` and `inet_diag_req_v2`.
#[repr(C)]
struct Request {
    length: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    port: u32,
    family: u8,
    protocol: u8,
    extensions: u8,
    zero: u8,
    states: u32,
    /// Network order.
    source_port: u16,
    destination_port: u16,
    source: [u32; 4],
    destination: [u32; 4],
    interface: u32,
    /// Which socket of this address; all ones: any.
    cookie: [u32; 2],
}

/// `nlmsghdr`, then the start of `nlmsgerr`, or of `inet_diag_msg`: four bytes (family, state, …), ports, addresses,
/// interface, cookie.
#[repr(C)]
#[derive(Default)]
struct Answer {
    length: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    port: u32,
    error: i32,
    rest: [u32; 32],
}

fn words(ip: IpAddr, family: u8) -> [u32; 4] {
    let address = Address::from(ip);
    // An IPv4 socket is found by one word; an IPv6 socket with IPv4 addresses by the v4-mapped ones.
    if i32::from(family) == libc::AF_INET { [address.0[3], 0, 0, 0] } else { address.0 }
}

/// Ends a TCP connection of the namespace, as seen from the socket that is bound to `local`: the socket's owner gets
/// ECONNABORTED, the peer a reset. Says whether there was such a socket.
///
/// # Errors
/// `Unsupported` (EOPNOTSUPP) on a kernel without CONFIG_INET_DIAG_DESTROY; without CAP_NET_ADMIN.
pub fn sock_destroy(netns: &Netns, local: SocketAddr, remote: SocketAddr) -> io::Result<bool> {
    let kind = Protocol::from(NETLINK_SOCK_DIAG);
    let socket = netns.socket(Domain::from(libc::AF_NETLINK), Type::DGRAM, Some(kind))?;
    let (local_ip, remote_ip) = (local.ip().to_canonical(), remote.ip().to_canonical());
    let families: &[i32] =
        if local_ip.is_ipv4() { &[libc::AF_INET, libc::AF_INET6] } else { &[libc::AF_INET6] };
    let mut destroyed = false;
    for family in families {
        let family = *family as u8;
        let request = Request {
            length: size_of::<Request>() as u32,
            kind: SOCK_DIAG_BY_FAMILY,
            flags: NLM_F_REQUEST,
            sequence: 1,
            port: 0,
            family,
            protocol: libc::IPPROTO_TCP as u8,
            extensions: 0,
            zero: 0,
            states: u32::MAX,
            source_port: local.port().to_be(),
            destination_port: remote.port().to_be(),
            source: words(local_ip, family),
            destination: words(remote_ip, family),
            interface: 0,
            cookie: [u32::MAX; 2],
        };
        // Where there is no such connection the kernel's look-up goes on to a listener, and that must live.
        if let Some(cookie) = find(&socket, &request)? {
            let (kind, flags) = (SOCK_DESTROY, NLM_F_REQUEST | NLM_F_ACK);
            destroyed |= destroy(&socket, &Request { kind, flags, cookie, ..request })?;
        }
    }
    Ok(destroyed)
}

/// The cookie of the connection that a request is about, if there is one.
fn find(socket: &socket2::Socket, request: &Request) -> io::Result<Option<[u32; 2]>> {
    let answer = ask(socket, request)?;
    match (answer.kind, -answer.error) {
        (SOCK_DIAG_BY_FAMILY, _) => {
            let [source, destination] = [request.source_port, request.destination_port].map(u16::to_ne_bytes);
            let ports = u32::from_ne_bytes([source[0], source[1], destination[0], destination[1]]);
            // A listener has no remote port.
            Ok((answer.rest[0] == ports).then(|| [answer.rest[10], answer.rest[11]]))
        }
        (NLMSG_ERROR, libc::ENOENT) => Ok(None),
        (NLMSG_ERROR, code) => Err(io::Error::from_raw_os_error(code)),
        _ => Err(unexpected()),
    }
}

fn destroy(socket: &socket2::Socket, request: &Request) -> io::Result<bool> {
    let answer = ask(socket, request)?;
    match (answer.kind, -answer.error) {
        (NLMSG_ERROR, 0) => Ok(true),
        (NLMSG_ERROR, libc::ENOENT) => Ok(false),
        (NLMSG_ERROR, code) => Err(io::Error::from_raw_os_error(code)),
        _ => Err(unexpected()),
    }
}

fn unexpected() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "unexpected answer of socket diagnostics")
}

fn ask(socket: &socket2::Socket, request: &Request) -> io::Result<Answer> {
    // SAFETY: the request is a live repr(C) value without padding, of the size that we give.
    let sent = unsafe {
        libc::send(socket.as_raw_fd(), std::ptr::from_ref(request).cast(), size_of::<Request>(), 0)
    };
    check(sent as libc::c_long)?;
    let mut answer = Answer::default();
    // SAFETY: the kernel writes at most the size of `answer`.
    let received =
        unsafe { libc::recv(socket.as_raw_fd(), (&raw mut answer).cast(), size_of::<Answer>(), 0) };
    check(received as libc::c_long)?;
    Ok(answer)
}
