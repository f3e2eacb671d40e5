//! A pod's sockets and capture's records, where there is a kernel side: everything but this file runs without one.

use std::io;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use mesh_core::state::LocalWorkload;
use socket2::{Domain, Protocol, Type};

use super::pod::PodNetwork;
use super::recent::Recent;
use super::{Pod, PodHandle, Server, Transport};
use crate::capture::{Capture, CaptureError, EnrolledPod, ListenerKind};
use crate::sys;
use crate::sys::udp::{Datagram, Responder};

/// Connections that wait for accept.
const BACKLOG: i32 = 128;

/// [`PodNetwork`] of an enrolled pod.
struct Captured {
    capture: Arc<Capture>,
    pod: Arc<EnrolledPod>,
    responder: Responder,
    recent: Recent,
}

impl PodNetwork for Captured {
    fn udp(&self, server: SocketAddr) -> io::Result<UdpSocket> {
        // No mark: the agent's sockets are exempt by who they are, and the mark would route them to `lo`.
        let domain = if server.is_ipv6() { Domain::IPV6 } else { Domain::IPV4 };
        let socket = self.pod.netns.socket(domain, Type::DGRAM, Some(Protocol::UDP))?;
        socket.set_nonblocking(true)?;
        Ok(socket.into())
    }

    fn tcp(&self, server: SocketAddr) -> io::Result<TcpStream> {
        sys::outbound_socket(&self.pod.netns, server.is_ipv6()).map(TcpStream::from)
    }

    fn receive(&self, socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Datagram> {
        let datagram = sys::udp::receive(socket, buffer)?;
        self.recent.asked(datagram.local.port());
        Ok(datagram)
    }

    fn reply(&self, answer: &[u8], from: SocketAddr, to: SocketAddr) -> io::Result<()> {
        self.responder.send(answer, from, to)
    }

    fn asked(&self, transport: Transport, local: SocketAddr, peer: SocketAddr) -> Option<SocketAddr> {
        match transport {
            Transport::Udp => self.capture.dns_original_server(&self.pod, local.port()),
            Transport::Tcp => self.capture.take_original_dst(local, peer),
        }
    }

    fn make_room(&self, taken: &[u16]) {
        for port in self.recent.oldest(taken) {
            if let Err(error) = self.capture.forget_nameserver(&self.pod, port) {
                tracing::error!(pod = %self.pod.info, %error, "cannot free a nameserver's port");
            }
        }
    }
}

impl Server {
    /// Serves an enrolled pod: makes its two sockets inside its namespace, registers them with capture in place of
    /// an older agent's, and answers until the handle is dropped. Call it before [`Capture::activate`]. `node` is
    /// the name of this node.
    ///
    /// # Errors
    /// The namespace is gone, IPv4 and IPv6 are both off, out of descriptors, or the kernel refuses the map write.
    pub fn serve_pod(
        &self,
        pod: &Arc<EnrolledPod>,
        capture: &Arc<Capture>,
        node: &str,
    ) -> Result<PodHandle, CaptureError> {
        let info = &pod.info;
        let failed = |source| CaptureError::Pod { pod: info.to_string(), action: "serve DNS", source };
        let udp = sys::udp::dns_socket(&pod.netns).map_err(failed)?;
        let tcp = sys::listener(&pod.netns, 0, BACKLOG).map_err(failed)?;
        capture.set_listener(pod, ListenerKind::DnsUdp, &udp)?;
        capture.set_listener(pod, ListenerKind::DnsTcp, &tcp)?;
        let search =
            info.dns_search.clone().unwrap_or_else(|| self.rules().domain.default_search(&info.namespace));
        let network = Captured {
            capture: Arc::clone(capture),
            pod: Arc::clone(pod),
            responder: Responder::new(pod.netns.clone()),
            recent: Recent::default(),
        };
        let local = LocalWorkload::new(&info.namespace, &info.name, &info.service_account, node);
        self.serve(Pod { local, search, udp, tcp, network: Arc::new(network) }).map_err(failed)
    }
}
