//! How sockets enter and leave a pod's network namespace.
//!
//! One small trait, so that the proxies are tested over loopback without the kernel programs. The real one is
//! [`crate::capture`]'s.

use std::io;
use std::net::{IpAddr, SocketAddr};

use mesh_core::flows::ConnectionId;
use socket2::Socket;

/// The network of one pod. Implementations are called on data workers: a few system calls, no lock.
pub trait PodNet: Send + Sync {
    /// Where the application wanted to go when it made the connection that was just accepted, once; and what flow
    /// events call the connection.
    fn original_destination(&self, local: SocketAddr, peer: SocketAddr)
    -> Option<(SocketAddr, ConnectionId)>;

    /// A TCP socket in the pod's namespace for connecting to `destination` outside the pod; not connected.
    ///
    /// # Errors
    /// The namespace is gone, or no file is left.
    fn outbound_socket(&self, destination: SocketAddr) -> io::Result<Socket>;

    /// A TCP socket in the pod's namespace, bound so that the application at `destination` sees `source`; not
    /// connected.
    ///
    /// # Errors
    /// As for [`PodNet::outbound_socket`].
    fn application_socket(&self, source: IpAddr, destination: SocketAddr) -> io::Result<Socket>;

    /// Whether a connection that `listener` accepted at `local` was dialled to the listener itself, from inside the
    /// pod or by the agent for a peer. What the kernel programs steer to it keeps the address that the client asked
    /// for, which is never the listener's port: that port is taken.
    fn dialled_listener(&self, local: SocketAddr, listener: SocketAddr) -> bool {
        local.port() == listener.port()
    }
}
