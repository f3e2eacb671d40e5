//! Sockets that listen on every address, whatever families the kernel has.

use socket2::{Domain, Protocol, Socket, Type};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// A TCP socket bound to `address`, non-blocking; `prepare` sets options before. `[::]` takes both families, and where the
/// kernel has no IPv6 (`ipv6.disable=1`) it means `0.0.0.0`, so that one default serves every cluster.
///
/// # Errors
/// The address cannot be bound, or an option is refused.
pub fn bound(address: SocketAddr, prepare: impl Fn(&Socket) -> io::Result<()>) -> io::Result<Socket> {
    let bind = |address: SocketAddr| {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        if address.is_ipv6() {
            // The machine's own default may be another one (net.ipv6.bindv6only).
            socket.set_only_v6(false)?;
        }
        socket.set_nonblocking(true)?;
        prepare(&socket)?;
        socket.bind(&address.into())?;
        Ok(socket)
    };
    match bind(address) {
        Err(error) if lacks_ipv6(&error) && address.is_ipv6() && address.ip().is_unspecified() => {
            bind(SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), address.port()))
        }
        other => other,
    }
}

/// The kernel has no IPv6, or it is off in this network namespace.
fn lacks_ipv6(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AddrNotAvailable | io::ErrorKind::Unsupported)
        || error.raw_os_error() == Some(EAFNOSUPPORT)
}

/// Linux's errno of address families that it was built or started without, on every architecture that we ship for.
const EAFNOSUPPORT: i32 = 97;

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv6Addr, TcpStream};

    #[test]
    fn a_socket_on_every_address_takes_clients_of_both_families() {
        let socket = bound(SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)), |_| Ok(())).unwrap();
        socket.listen(8).unwrap();
        let port = socket.local_addr().unwrap().as_socket().unwrap().port();
        for ip in [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)] {
            TcpStream::connect((ip, port)).unwrap();
        }
    }

    #[test]
    fn an_address_that_is_not_ours_is_an_error_and_never_another_one() {
        let foreign = SocketAddr::from((Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1), 0));
        let error = bound(foreign, |_| Ok(())).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrNotAvailable);
    }

    #[test]
    fn only_a_missing_family_is_reason_to_listen_on_another() {
        assert!(lacks_ipv6(&io::Error::from_raw_os_error(EAFNOSUPPORT)));
        assert!(!lacks_ipv6(&io::ErrorKind::AddrInUse.into()));
    }
}
