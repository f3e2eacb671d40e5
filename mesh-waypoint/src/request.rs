//! What is known of a request before it is sent on: what rules, policies and balancers look at.

use std::net::SocketAddr;
use std::sync::Arc;

use http::{HeaderMap, Method};
use mesh_core::identity::SpiffeId;
use mesh_core::state::{Str, Workload};
use serde_json::{Map, Value};

use crate::config::{Labels, Snapshot};

/// Who sends.
#[derive(Debug, Clone)]
pub struct Source {
    /// The peer of the connection; the port is that of the application where it is known.
    pub address: SocketAddr,
    /// Of the certificate.
    pub identity: Option<SpiffeId>,
    /// The workload with this address.
    pub workload: Option<Arc<Workload>>,
    /// Its labels.
    pub labels: Option<Arc<Labels>>,
}

impl Source {
    /// Whoever has this address, and proved to be `identity`.
    #[must_use]
    pub fn of(snapshot: &Snapshot, address: SocketAddr, identity: Option<&SpiffeId>) -> Self {
        let workload = snapshot.mesh.workload_by_ip(&snapshot.own.network, address.ip());
        Self {
            address,
            identity: identity.cloned(),
            workload: workload.map(Arc::clone),
            labels: workload.and_then(|workload| snapshot.labels.get(&workload.uid)).map(Arc::clone),
        }
    }
}

/// What the connection was opened to.
#[derive(Debug, Clone)]
pub enum Addressed {
    /// A service, by its `namespace/hostname`, and its port.
    Service {
        /// `namespace/hostname`.
        key: Str,
        /// Service port.
        port: u16,
    },
    /// A workload that is bound to the waypoint, and its port.
    Workload {
        /// The workload.
        workload: Arc<Workload>,
        /// Its port.
        port: u16,
    },
    /// A listener of a gateway: the host of each request says what is meant.
    Gateway {
        /// Port of the listener.
        port: u16,
    },
}

impl Addressed {
    /// The port that was addressed.
    #[must_use]
    pub const fn port(&self) -> u16 {
        match self {
            Self::Service { port, .. } | Self::Workload { port, .. } | Self::Gateway { port } => *port,
        }
    }
}

/// The head of a request, and where it comes from.
#[derive(Debug, Clone, Copy)]
pub struct Head<'a> {
    /// Who sends.
    pub source: &'a Source,
    /// What the connection was opened to: the local address of the application's connection.
    pub destination: SocketAddr,
    /// What that address is.
    pub addressed: &'a Addressed,
    /// Method.
    pub method: &'a Method,
    /// `http` or `https`.
    pub scheme: &'a str,
    /// Host, with the port if it was given.
    pub authority: &'a str,
    /// Normalised path, without query.
    pub path: &'a str,
    /// Query, without `?`.
    pub query: Option<&'a str>,
    /// Headers.
    pub headers: &'a HeaderMap,
    /// The payload of the token that was verified, if there was one.
    pub claims: Option<&'a Map<String, Value>>,
}
