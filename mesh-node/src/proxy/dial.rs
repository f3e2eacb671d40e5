//! Connecting: sockets, then TLS and HTTP/2 for a tunnel.
//!
//! Socket options cost a system call each. Listeners carry them for what they accept (Linux copies them), tunnels are
//! few, and a connection to the application never leaves the machine: it gets TCP_NODELAY only, since a dead peer on
//! the same kernel is noticed without keepalive.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use mesh_core::error::Code;
use mesh_core::hbone::{ClientConnection, Settings};
use mesh_core::identity::SpiffeId;
use mesh_core::telemetry::{Reporter, ReporterLabels};
use mesh_core::tls::{self, TlsError, WorkloadCertificate};
use socket2::{SockRef, Socket, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpSocket, TcpStream};

    let expiry = Expiry::of(&certificate, &peer.chain);
    tokio::task::spawn_local(drive(Rc::clone(proxy), driver, certificate, peer));
    Ok(TunnelHandle { connection, peer: identity, expiry, doubted: Rc::default() })
