//! Streams that are not HTTP: their bytes are copied.

use std::rc::Rc;
use std::time::{Duration, Instant};

use mesh_core::error::Code;
use mesh_core::flows::ConnectionId;
use mesh_core::telemetry::{Failure, Opened, Recorder, Telemetry};
use tokio::io::AsyncReadExt as _;

use super::detect::{Spoken, sniff};
use super::forward::{self, Chosen};
use super::http::Downstream;
use super::io::{ClientIo, EndpointIo, Metered, Prefixed};
use crate::telemetry;

/// A client that says nothing for this long on a port without a declared protocol gets its connection to the endpoint,
/// so that the endpoint may speak first. Who then speaks first decides.
const SILENCE: Duration = Duration::from_millis(100);
/// Bytes that are read at once while the protocol is not known.
const FIRST_BYTES: usize = 4096;
/// Bytes after which it must be.
const ENOUGH: usize = 16 << 10;

/// Bytes of HTTP/2's preface that no request of HTTP/1 begins with.
const PREFACE_START: usize = 14;

/// What came of looking at a client's first bytes.
pub enum First {
    /// The client speaks HTTP, or something else.
    Client(Spoken, ClientIo),
    /// The endpoint spoke first: a stream of another protocol, connected already.
    Endpoint(ClientIo, Box<(Chosen, Prefixed<EndpointIo>)>),
    /// The client left before it was known.
    Nobody,
}

/// Finds out what a stream speaks that nobody has declared. `limit` is when the mesh's settings want it to be taken
/// for TCP at the latest.
pub async fn detect(downstream: &Rc<Downstream>, io: ClientIo, limit: Option<Duration>) -> First {
    let mut io = io;
    let mut read = Vec::new();
    let deadline = limit.map(|limit| Instant::now() + limit);
    let mut endpoint: Option<(Chosen, EndpointIo)> = None;
    let mut tried = false;
    loop {
        let mut more = vec![0; FIRST_BYTES];
        let mut theirs = vec![0; FIRST_BYTES];
        let quiet = async {
            match (tried, deadline) {
                (false, _) => tokio::time::sleep(SILENCE).await,
                (true, Some(deadline)) => tokio::time::sleep_until(deadline.into()).await,
                (true, None) => std::future::pending().await,
            }
        };
        let spoken_to = async {
            match &mut endpoint {
                Some((_, io)) => io.read(&mut theirs).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            n = io.read(&mut more) => match n {
                Ok(n) if n > 0 => {
                    read.extend_from_slice(&more[..n]);
                    let spoken = sniff(&read).or((read.len() > ENOUGH).then_some(Spoken::Other));
                    if let Some(spoken) = spoken {
                        return First::Client(spoken, io.after(read.into()));
                    }
                }
                // The end of what it says, before it was enough to tell: the endpoint may still answer.
                Ok(_) if !read.is_empty() => return First::Client(Spoken::Other, io.after(read.into())),
                _ => return First::Nobody,
            },
            n = spoken_to => {
                let Some((chosen, endpoint)) = endpoint.take() else { return First::Nobody };
                theirs.truncate(n.unwrap_or_default());
                let endpoint = Prefixed::new(theirs.into(), endpoint);
                return First::Endpoint(io.after(read.into()), Box::new((chosen, endpoint)));
            }
            () = quiet => {
                if tried || deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                    return First::Client(Spoken::Other, io.after(read.into()));
                }
                tried = true;
                // An endpoint that cannot be connected to is told to the client once it is known what it speaks.
                endpoint = forward::connect(downstream).await.ok();
            }
        }
    }
}

/// Which version of HTTP a client speaks on a port that is declared to speak HTTP; none if it leaves before it says
/// so. What is no HTTP/2 is for the server of HTTP/1 to judge.
pub async fn version(mut io: ClientIo) -> Option<(Spoken, ClientIo)> {
    let mut read = Vec::new();
    loop {
        match io.next_bytes().await {
            Ok(more) if !more.is_empty() => read.extend_from_slice(&more),
            _ => return None,
        }
        if read.len() >= PREFACE_START || sniff(&read).is_some() {
            let spoken = if read.starts_with(b"PRI * HTTP/2.0") { Spoken::Http2 } else { Spoken::Http1 };
            return Some((spoken, io.after(read.into())));
        }
    }
}

/// Carries a stream to an endpoint.
pub async fn serve(downstream: &Rc<Downstream>, io: ClientIo) {
    let started = Instant::now();
    match forward::connect(downstream).await {
        Ok((chosen, endpoint)) => {
            copy(downstream, io, chosen, Prefixed::new(bytes::Bytes::new(), endpoint), started).await;
        }
        Err(refused) => {
            let recorder = open(downstream, None, started);
            let denied = refused.status == http::StatusCode::FORBIDDEN;
            let code = if denied { Code::PolicyDenied } else { Code::DialFailed };
            recorder.finish(Some(Failure::new(code, refused.text())));
        }
    }
}

/// Copies in both directions until both have ended.
pub async fn copy(
    downstream: &Rc<Downstream>,
    client: ClientIo,
    chosen: Chosen,
    mut endpoint: Prefixed<EndpointIo>,
    started: Instant,
) {
    let recorder = Rc::new(open(downstream, Some(&chosen), started));
    let mut client = Metered::new(client, Rc::clone(&recorder));
    let copied = tokio::io::copy_bidirectional(&mut client, &mut endpoint).await;
    if let Err(error) = &copied {
        tracing::debug!(client = %downstream.source.address, %error, "a stream ended early");
    }
    recorder.finish(None);
}

fn open(downstream: &Rc<Downstream>, chosen: Option<&Chosen>, started: Instant) -> Recorder {
    let shared = &downstream.worker.shared;
    let service = chosen.and_then(|chosen| chosen.to.route.service.clone());
    let service = service.or_else(|| forward::addressed_service(downstream));
    let connection = telemetry::connection(downstream, chosen.and_then(Chosen::workload), service);
    let telemetry =
        Telemetry { tcp: shared.telemetry.tcp.clone(), access_log: shared.telemetry.access_log.clone() };
    let opened = Opened {
        id: ConnectionId::default(),
        connection,
        started,
        source: downstream.source.address,
        destination: downstream.destination,
        hbone_target: chosen.map(|chosen| chosen.to.address().into()),
        fast_path: false,
    };
    telemetry.open(&mut downstream.worker.connections.borrow_mut(), opened)
}
