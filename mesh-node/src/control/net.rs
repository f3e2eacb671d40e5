//! A pod's network as the kernel programs and the pod's namespace make it.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use mesh_core::flows::ConnectionId;
use socket2::Socket;

use crate::capture::{Capture, EnrolledPod};
use crate::proxy::net::PodNet;
use crate::sys;

/// [`PodNet`] of an enrolled pod.
pub struct KernelNet {
    /// The kernel side.
    pub capture: Arc<Capture>,
    /// The pod.
    pub pod: Arc<EnrolledPod>,
}

impl PodNet for KernelNet {
    fn original_destination(
        &self,
        local: SocketAddr,
        peer: SocketAddr,
    ) -> Option<(SocketAddr, ConnectionId)> {
        self.capture.take_original(local, peer)
    }

    fn outbound_socket(&self, destination: SocketAddr) -> io::Result<Socket> {
        sys::outbound_socket(&self.pod.netns, destination.is_ipv6())
    }

    fn application_socket(&self, source: IpAddr, destination: SocketAddr) -> io::Result<Socket> {
        sys::application_socket(&self.pod.netns, destination, Some(source))
    }
}
