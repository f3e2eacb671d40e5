//! Where a request goes.

use std::net::SocketAddr;
use std::sync::Arc;

use mesh_core::hbone::Authority;
use mesh_core::identity::SpiffeId;
use mesh_core::route::{Protocol, Route, Tunnel};
use mesh_core::state::Str;
use mesh_core::xds::proto::l7;
use rustls::ClientConfig;

use crate::upstream::{Cluster, Policy};

/// Where a request goes, and how it is carried there.
#[derive(Debug, Clone)]
pub struct Destination {
    /// The backend that the endpoint was picked of.
    pub cluster: Arc<Cluster>,
    /// What holds for its connections.
    pub policy: Arc<Policy>,
    /// What to dial: an address; and to speak.
    pub route: Arc<Route>,
    /// That address.
    pub dial: SocketAddr,
    /// Whether the application speaks HTTP/2.
    pub http2: bool,
    /// TLS of the application, with the name that it goes by.
    pub secure: Option<Secure>,
}

/// TLS of an application.
#[derive(Debug, Clone)]
pub struct Secure {
    /// What the destination says.
    pub tls: Arc<l7::ClientTls>,
    /// The same, ready to be used.
    pub config: Arc<ClientConfig>,
    /// The service's name.
    pub host: Str,
}

impl Destination {
    pub(super) fn key(&self) -> Key {
        let authority = self.tunnel().map(|tunnel| tunnel.authority.clone());
        let cluster = Arc::as_ptr(&self.cluster).addr();
        let config = self.secure.as_ref().map_or(0, |secure| Arc::as_ptr(&secure.config).addr());
        Key { cluster, dial: self.dial, authority, http2: self.http2, config }
    }

    fn tunnel(&self) -> Option<&Tunnel> {
        match &self.route.protocol {
            Protocol::Hbone(tunnel) => Some(tunnel),
            Protocol::DoubleHbone { inner, .. } => Some(inner),
            Protocol::Tcp => None,
        }
    }

    /// The application's address, as far as it is known here.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        match self.tunnel().map(|tunnel| &tunnel.authority) {
            Some(Authority::Socket(address)) => *address,
            Some(Authority::Host { .. }) | None => self.dial,
        }
    }

    /// Whether who proved to be `peer` may answer. Without a tunnel nobody proves anything.
    pub(super) fn accepts(&self, peer: Option<&SpiffeId>) -> bool {
        match (self.tunnel(), peer) {
            (None, None) => true,
            (Some(tunnel), Some(peer)) => tunnel.expected.contains(peer),
            _ => false,
        }
    }
}

/// What two requests must have in common to share connections.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// By address in memory; connections keep their cluster.
    cluster: usize,
    dial: SocketAddr,
    authority: Option<Authority>,
    http2: bool,
    config: usize,
}
