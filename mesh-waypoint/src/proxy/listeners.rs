//! A gateway's ports: opened and closed as its Gateway says, by every worker for itself.
//!
//! A listener that goes takes nothing new; what is open on it goes on until the client leaves.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mesh_core::state::{AppProtocol, Str};
use mesh_core::xds::proto::l7::gateway::Inside;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::client_certificate;
use super::detect::Spoken;
use super::http::{self, Downstream, Secured};
use super::io::{ClientIo, ClientStream, Prefixed};
use super::worker::{self, Local};
use super::{hello, tcp};
use crate::config::Snapshot;
use crate::ports::{Port, Way};
use crate::request::{Addressed, Source};

/// A client's TLS handshake may take this long.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// A client that has connected must have begun a request after this long.
const FIRST_BYTES: Duration = Duration::from_secs(60);

/// Keeps the ports open that the snapshots name, until the drain begins.
pub async fn serve(local: &Rc<Local>) {
    let mut open: BTreeMap<u16, DropGuard> = BTreeMap::new();
    let mut wanted = local.shared.ports.subscribe();
    loop {
        let now = wanted.borrow_and_update().clone();
        open.retain(|port, _| now.contains(port));
        for port in now.iter().filter(|port| **port != 0) {
            if open.contains_key(port) {
                continue;
            }
            let address = SocketAddr::new(local.shared.config.listen.ip(), *port);
            match bind(address) {
                Ok(listener) => {
                    let until = CancellationToken::new();
                    open.insert(*port, until.clone().drop_guard());
                    let local = Rc::clone(local);
                    drop(tokio::task::spawn_local(async move {
                        tokio::select! {
                            () = accept(&local, &listener, address.port()) => {}
                            () = until.cancelled() => {}
                        }
                    }));
                }
                Err(error) => tracing::error!(%address, %error, "cannot listen for a gateway"),
            }
        }
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { return },
            () = local.shared.drain.cancelled() => return,
        }
    }
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::from_std(worker::listen(address)?)
}

async fn accept(local: &Rc<Local>, listener: &TcpListener, port: u16) {
    loop {
        match listener.accept().await {
            Ok((stream, from)) => {
                let local = Rc::clone(local);
                drop(tokio::task::spawn_local(async move { handle(&local, stream, from, port).await }));
            }
            Err(error) => worker::on_accept_error(&error).await,
        }
    }
}

/// Takes a client's connection to its end.
async fn handle(local: &Rc<Local>, stream: TcpStream, from: SocketAddr, port: u16) {
    let from = SocketAddr::new(from.ip().to_canonical(), from.port());
    let Ok(destination) = stream.local_addr() else { return };
    let destination = SocketAddr::new(destination.ip().to_canonical(), destination.port());
    let _counted = local.shared.count();
    let spoken = local.shared.snapshot.load().ports.get(port).cloned();
    let client = Client { local, from, destination, port };
    match spoken {
        Some(Port::Plain) => {
            client.http(Prefixed::new(Bytes::new(), ClientStream::Plain(stream)), None).await;
        }
        Some(Port::Stream) => {
            let io = Prefixed::new(Bytes::new(), ClientStream::Plain(stream));
            // Boxed, as TLS below: what serves requests needs no room for it.
            Box::pin(client.stream(io, None)).await;
        }
        Some(secure @ Port::Secure(_)) => Box::pin(client.tls(stream, &secure)).await,
        // The port closes.
        None => {}
    }
}

/// A client that has connected.
struct Client<'a> {
    local: &'a Rc<Local>,
    from: SocketAddr,
    destination: SocketAddr,
    port: u16,
}

impl Client<'_> {
    /// Finds the listener for the name that the client asks for, and ends TLS or passes it on.
    async fn tls(&self, mut stream: TcpStream, port: &Port) {
        let read = tokio::time::timeout(HANDSHAKE, hello::read(&mut stream)).await;
        let (name, said) = match read {
            Ok(Ok(read)) => read,
            Ok(Err(error)) => return self.refused(&error),
            Err(_) => return self.refused(&"no hello in time"),
        };
        let asked = (!name.is_empty()).then_some(&*name);
        let listener = port.listener(asked);
        let way = listener.map(|listener| (Str::clone(&listener.server), listener.way.clone()));
        let Some((listener, way)) = way else {
            hello::refuse(&mut stream).await;
            return self.refused(&format_args!("no listener is for the name {name:?}"));
        };
        let secured = |server, certificate| Some(Secured { server, name: Str::clone(&name), certificate });
        match way {
            Way::Terminate(config, inside) => {
                let accepted = TlsAcceptor::from(config).accept(Prefixed::new(said, stream));
                match tokio::time::timeout(HANDSHAKE, accepted).await {
                    Ok(Ok(tls)) => {
                        let shown = tls.get_ref().1.peer_certificates().and_then(<[_]>::first);
                        let secured = secured(listener, shown.and_then(client_certificate::header));
                        let io = Prefixed::new(Bytes::new(), ClientStream::Tls(Box::new(tls)));
                        match inside {
                            Inside::Http => self.http(io, secured).await,
                            Inside::Stream => self.stream(io, secured).await,
                        }
                    }
                    Ok(Err(error)) => self.refused(&error),
                    Err(_) => self.refused(&"no handshake in time"),
                }
            }
            Way::Pass => {
                let io = Prefixed::new(said, ClientStream::Plain(stream));
                self.stream(io, secured(listener, None)).await;
            }
            Way::Nowhere(why) => {
                hello::refuse(&mut stream).await;
                self.refused(&format_args!("listener {listener}: {why}"));
            }
        }
    }

    async fn stream(&self, io: ClientIo, secured: Option<Secured>) {
        tcp::serve(&self.downstream(false, secured), io).await;
    }

    fn refused(&self, error: &dyn std::fmt::Display) {
        tracing::debug!(client = %self.from, port = self.port, %error, "a TLS client was refused");
    }

    async fn http(&self, io: ClientIo, secured: Option<Secured>) {
        let spoken = tokio::time::timeout(FIRST_BYTES, tcp::version(io)).await;
        let Ok(Some((spoken, io))) = spoken else { return };
        http::serve(self.downstream(spoken == Spoken::Http2, secured), io).await;
    }

    fn downstream(&self, http2: bool, secured: Option<Secured>) -> Rc<Downstream> {
        let snapshot = self.local.shared.snapshot.load_full();
        Rc::new(Downstream {
            worker: Rc::clone(self.local),
            source: Source::of(&snapshot, self.from, None),
            addressed: Addressed::Gateway { port: self.port },
            destination: self.destination,
            secured,
            protocol: AppProtocol::Unknown,
            http2,
            reported: own(&snapshot, &self.local.shared.config.pod),
            upgraded: RefCell::default(),
            latest: RefCell::default(),
            served: Cell::default(),
        })
    }
}

/// The gateway's own workload.
fn own(snapshot: &Snapshot, pod: &str) -> Option<Arc<mesh_core::state::Workload>> {
    snapshot.mesh.workloads_by_name(&snapshot.own.namespace, pod).next().map(Arc::clone)
}
