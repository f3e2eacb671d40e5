//! Sockets of the tunnel inside a pod's network namespace.

use super::{Netns, check};
use mesh_ebpf::AGENT_MARK;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::AsRawFd;

fn set_option(socket: &Socket, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the kernel reads `size_of(value)` bytes from `value`, which lives until the call returns.
    check(
        unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                level,
                name,
                (&raw const value).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        }
        .into(),
    )
    .map(|_| ())
}

/// A non-blocking TCP listener in the namespace, for both families where IPv6 is on, in a reuse-port group: the
/// first of a group with `port` 0, the others with the port of the first. Only `sk_lookup` and the pod itself reach
/// it. `backlog` connections wait for accept (capped by the namespace's `net.core.somaxconn`).
///
/// # Errors
/// The namespace is gone, the port taken, or out of descriptors.
pub fn listener(netns: &Netns, port: u16, backlog: i32) -> io::Result<TcpListener> {
    netns.run(|| listener_here(port, backlog))?
}

/// Groups of [`listener`]s in one visit of the namespace: `groups` of them, each of `size` sockets that share a port.
///
/// # Errors
/// As for [`listener`].
pub fn listener_groups(
    netns: &Netns,
    groups: usize,
    size: usize,
    backlog: i32,
) -> io::Result<Vec<Vec<TcpListener>>> {
    let group = |_| {
        let mut made = Vec::with_capacity(size);
        let mut port = 0;
        for _ in 0..size {
            let listener = listener_here(port, backlog)?;
            if port == 0 {
                port = listener.local_addr()?.port();
            }
            made.push(listener);
        }
        Ok(made)
    };
    netns.run(|| (0..groups).map(group).collect())?
}

fn listener_here(port: u16, backlog: i32) -> io::Result<TcpListener> {
    let socket = match bound(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))) {
        Ok(socket) => socket,
        // IPv6 is off in the kernel or in this namespace.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) => {
            bound(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))?
        }
        Err(error) => return Err(error),
    };
    socket.listen(backlog)?;
    Ok(socket.into())
}

fn bound(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_port(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// A non-blocking TCP socket in the pod's namespace for a connection of the pod to the network (a tunnel, or
/// plaintext to outside the mesh); the source is the pod's own address.
///
/// # Errors
/// The namespace is gone, or out of descriptors.
pub fn outbound_socket(netns: &Netns, ipv6: bool) -> io::Result<Socket> {
    let domain = if ipv6 { Domain::IPV6 } else { Domain::IPV4 };
    netns.socket(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))
}

/// Source ports of the agent's connections to applications: below the range that kernels pick from by default
/// (32768 to 60999), because the client's own kernel picks the ports of its direct connections to the same
/// application without knowing of ours. One of ours that it picks too would swallow its SYN: the application's socket
/// for our connection answers it, towards `lo`.
const SOURCE_PORTS: std::ops::Range<u32> = 1_024..32_768;
/// How many.
const COUNT: u32 = SOURCE_PORTS.end - SOURCE_PORTS.start;

/// The `n`th source port of an agent. Each goes through the range in an order of its own, and in another one each time
/// round: a thousand idle connections, made one after the other by an earlier agent or by itself, would else lie in the
/// way as one block when the order comes to them.
fn source_port(pid: u32, n: u32) -> u16 {
    // Each step is one to one on 15 bits, so that every value comes once a round; the few above the range are skipped
    // by going on from them.
    const BITS: u32 = 15;
    const MASK: u32 = (1 << BITS) - 1;
    let key = pid.wrapping_add((n / COUNT).wrapping_mul(7_919)).wrapping_mul(0x9E37_79B9);
    let mut place = n % COUNT;
    loop {
        place = (place ^ (key >> 17)).wrapping_mul(0x6EED) & MASK;
        place ^= place >> 7;
        place = place.wrapping_mul(((key >> 2) & MASK) | 1) & MASK;
        place ^= place >> 8;
        place = place.wrapping_mul(0x3AC5) & MASK;
        if place < COUNT {
            return u16::try_from(SOURCE_PORTS.start + place).unwrap_or(u16::MAX);
        }
    }
}

/// Binds to the next of [`SOURCE_PORTS`]. Sockets may share a port, so that the number of connections is bounded by
/// whole tuples; a tuple that is taken shows at connect.
fn bind_below_ephemeral(socket: &Socket, source: IpAddr) -> io::Result<()> {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    const TRIES: u32 = 64;
    socket.set_reuse_address(true)?;
    let mut last = None;
    for _ in 0..TRIES {
        let port = source_port(std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        match socket.bind(&SockAddr::from(SocketAddr::new(source, port))) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => last = Some(error),
            bound => return bound,
        }
    }
    Err(last.unwrap_or_else(|| io::ErrorKind::AddrInUse.into()))
}

/// A non-blocking TCP socket in the pod's namespace for the agent's connection to the application, with the
/// client's address as its source. It goes through `lo` (device and mark; the namespace's rule and route for the
/// mark lead the answers back), so that `sk_lookup` sees it come from inside. Without `source`, or with one that is
/// the destination itself, the kernel picks the source.
///
/// # Errors
/// The namespace is gone, out of descriptors, or without CAP_NET_ADMIN.
pub fn application_socket(
    netns: &Netns,
    destination: SocketAddr,
    source: Option<IpAddr>,
) -> io::Result<Socket> {
    let socket = outbound_socket(netns, destination.is_ipv6())?;
    socket.set_mark(AGENT_MARK)?;
    socket.bind_device(Some(b"lo"))?;
    let Some(source) = source.map(|ip| ip.to_canonical()).filter(|ip| *ip != destination.ip()) else {
        return Ok(socket);
    };
    const IPV6_TRANSPARENT: libc::c_int = 75;
    match source {
        IpAddr::V4(_) => socket.set_ip_transparent_v4(true)?,
        IpAddr::V6(_) => set_option(&socket, libc::IPPROTO_IPV6, IPV6_TRANSPARENT, 1)?,
    }
    bind_below_ephemeral(&socket, source)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_source_port_has_its_turn_whatever_the_agents_process_id_is() {
        for pid in [1, 30, 31, 4_711, 65_536, u32::MAX] {
            let ports: HashSet<u16> = (0..COUNT).map(|n| source_port(pid, n)).collect();
            assert_eq!(ports.len(), COUNT as usize, "pid {pid}");
            assert!(ports.iter().all(|port| SOURCE_PORTS.contains(&u32::from(*port))), "pid {pid}");
        }
    }

    #[test]
    fn a_thousand_connections_of_an_agent_are_no_wall_when_its_ports_come_round_again() {
        for pid in [1, 1000, 4_711, 65_535, 70_000] {
            let held: HashSet<u16> = (0..1000).map(|n| source_port(pid, n)).collect();
            for round in 1..20 {
                let mut row = 0;
                for n in 0..COUNT {
                    row = if held.contains(&source_port(pid, round * COUNT + n)) { row + 1 } else { 0 };
                    assert!(row < 16, "pid {pid}, round {round}: {row} ports in a row are taken");
                }
            }
        }
    }

    #[test]
    fn a_thousand_connections_of_one_agent_are_no_wall_for_another() {
        for (old, new) in [(1000, 1001), (1000, 1002), (4_711, 28_233), (70_000, 70_011)] {
            let held: HashSet<u16> = (0..1000).map(|n| source_port(old, n)).collect();
            let mut row = 0;
            for n in 0..COUNT {
                row = if held.contains(&source_port(new, n)) { row + 1 } else { 0 };
                assert!(row < 16, "pids {old} and {new}: {row} ports in a row are taken");
            }
        }
    }
}
