//! A bare copy relay: what any user-space proxy must at least do, without TLS, policy or telemetry.
//!
//! Two of them in the place of two agents are the floor that a tunnel is measured against. One thread, one epoll loop,
//! one shared buffer: as little per byte and per connection as plain sockets allow.

use super::serve;
use anyhow::{Context, Result};
use rustix::event::epoll::{self, EventData, EventFlags};
use socket2::{Domain, Protocol, Socket, Type};
use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;

/// From where to where.
#[derive(clap::Args)]
pub struct Args {
    /// `PORT=ADDRESS:PORT`; may be given more than once
    #[arg(long, value_parser = parse_route)]
    route: Vec<(u16, SocketAddr)>,
}

fn parse_route(text: &str) -> Result<(u16, SocketAddr), String> {
    let (port, to) = text.split_once('=').ok_or("a route is PORT=ADDRESS:PORT")?;
    Ok((port.parse().map_err(|e| format!("{port:?}: {e}"))?, to.parse().map_err(|e| format!("{to:?}: {e}"))?))
}

/// One direction's sender and what waits for it.
struct Side {
    stream: TcpStream,
    pending: Vec<u8>,
    read_ended: bool,
    shut: bool,
}

struct Relay {
    epoll: OwnedFd,
    listeners: Vec<(TcpListener, SocketAddr)>,
    /// A pair has two sides: ids `2n` (client) and `2n + 1` (server).
    pairs: HashMap<u64, [Side; 2]>,
    next: u64,
    buffer: Vec<u8>,
}

/// Listeners have the ids from here on.
const LISTENERS: u64 = 1 << 40;

/// Relays without end.
///
/// # Errors
/// A port is taken.
pub fn run(args: &Args) -> Result<()> {
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).context("cannot make an epoll")?;
    let mut relay =
        Relay { epoll, listeners: Vec::new(), pairs: HashMap::new(), next: 0, buffer: vec![0; 256 * 1024] };
    for (id, (port, to)) in (LISTENERS..).zip(&args.route) {
        let listener = serve::listen(*port)?;
        listener.set_nonblocking(true).context("cannot set non-blocking")?;
        epoll::add(&relay.epoll, &listener, EventData::new_u64(id), EventFlags::IN)
            .context("cannot watch")?;
        relay.listeners.push((listener, *to));
    }
    let mut events = Vec::with_capacity(256);
    loop {
        events.clear();
        match epoll::wait(&relay.epoll, rustix::buffer::spare_capacity(&mut events), None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error).context("cannot wait for events"),
        }
        for event in events.drain(..) {
            let id = event.data.u64();
            if let Some(listener) = id.checked_sub(LISTENERS) {
                relay.accept(usize::try_from(listener).unwrap_or(0));
            } else if !relay.advance(id) {
                relay.pairs.remove(&(id / 2));
            }
        }
    }
}

impl Relay {
    fn accept(&mut self, listener: usize) {
        while let Some((listener, to)) = self.listeners.get(listener) {
            let Ok((client, _)) = listener.accept() else { return };
            let Ok(server) = begin(&client, *to) else { continue };
            let n = self.next;
            self.next += 1;
            let both = EventFlags::IN | EventFlags::OUT | EventFlags::ET;
            let watched = epoll::add(&self.epoll, &client, EventData::new_u64(2 * n), both)
                .and_then(|()| epoll::add(&self.epoll, &server, EventData::new_u64(2 * n + 1), both));
            if watched.is_ok() {
                let side = |stream| Side { stream, pending: Vec::new(), read_ended: false, shut: false };
                self.pairs.insert(n, [side(client), side(server)]);
            }
        }
    }

    /// Moves both directions as far as they go; whether the pair lives on.
    fn advance(&mut self, id: u64) -> bool {
        let Some(pair) = self.pairs.get_mut(&(id / 2)) else { return true };
        let [client, server] = pair;
        shift(client, server, &mut self.buffer)
            && shift(server, client, &mut self.buffer)
            && !(client.shut && server.shut)
    }
}

fn begin(client: &TcpStream, to: SocketAddr) -> std::io::Result<TcpStream> {
    client.set_nonblocking(true)?;
    client.set_nodelay(true)?;
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    socket.set_tcp_nodelay(true)?;
    match socket.connect(&to.into()) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::INPROGRESS.raw_os_error()) => {}
        Err(error) => return Err(error),
    }
    Ok(socket.into())
}

/// Copies from one side to the other until one of them would block; false on an error.
fn shift(from: &mut Side, to: &mut Side, buffer: &mut [u8]) -> bool {
    loop {
        while !to.pending.is_empty() {
            match to.stream.write(&to.pending) {
                Ok(written) => drop(to.pending.drain(..written)),
                Err(error) if waits(&error) => return true,
                Err(_) => return false,
            }
        }
        if from.read_ended {
            if !to.shut {
                to.shut = true;
                return to.stream.shutdown(Shutdown::Write).is_ok();
            }
            return true;
        }
        match from.stream.read(buffer) {
            Ok(0) => from.read_ended = true,
            Ok(read) => match to.stream.write(&buffer[..read]) {
                Ok(written) => to.pending.extend_from_slice(&buffer[written..read]),
                Err(error) if waits(&error) => to.pending.extend_from_slice(&buffer[..read]),
                Err(_) => return false,
            },
            Err(error) if waits(&error) => return true,
            Err(_) => return false,
        }
    }
}

/// A socket that is still connecting reads and writes as "not connected".
fn waits(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::NotConnected)
}
