//! TCP servers on one machine-wide simple plan: echo and greeting on one epoll loop, sink and source on threads.

use anyhow::{Context, Result};
use rustix::event::epoll::{self, EventData, EventFlags};
use serde_json::json;
use socket2::{Domain, Protocol, Socket, Type};
use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;

/// Which ports serve what; each may be given more than once.
#[derive(clap::Args)]
pub struct Args {
    /// Give back what comes
    #[arg(long, value_name = "PORT")]
    echo: Vec<u16>,
    /// One line of JSON with the addresses that the server sees, then echo
    #[arg(long, value_name = "PORT")]
    greet: Vec<u16>,
    /// Read and forget
    #[arg(long, value_name = "PORT")]
    sink: Vec<u16>,
    /// Write without end
    #[arg(long, value_name = "PORT")]
    source: Vec<u16>,
    /// Write one line per connection to standard output
    #[arg(long)]
    log: bool,
}

/// A dual-stack listener.
///
/// # Errors
/// The port is taken.
pub fn listen(port: u16) -> Result<TcpListener> {
    let socket =
        Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP)).context("cannot make a socket")?;
    socket.set_only_v6(false).context("cannot listen on IPv4 and IPv6")?;
    socket.set_reuse_address(true).context("cannot reuse an address")?;
    let address = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    socket.bind(&address.into()).with_context(|| format!("cannot bind port {port}"))?;
    socket.listen(4096).with_context(|| format!("cannot listen on port {port}"))?;
    Ok(socket.into())
}

/// An address without the v4-mapped form.
pub fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Serves without end.
///
/// # Errors
/// A port is taken.
pub fn run(args: &Args) -> Result<()> {
    for (ports, serve) in [(&args.sink, sink as fn(TcpStream)), (&args.source, source)] {
        for port in ports {
            let listener = listen(*port)?;
            let log = args.log;
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    report(log, &stream);
                    std::thread::spawn(move || serve(stream));
                }
            });
        }
    }
    let mut server = Server::new(args.log)?;
    for port in &args.echo {
        server.listen(*port, false)?;
    }
    for port in &args.greet {
        server.listen(*port, true)?;
    }
    server.run()
}

fn report(log: bool, stream: &TcpStream) {
    if log && let (Ok(peer), Ok(local)) = (stream.peer_addr(), stream.local_addr()) {
        println!("{}", json!({"peer": plain(peer), "local": plain(local)}));
    }
}

fn sink(mut stream: TcpStream) {
    let mut buffer = vec![0; 256 * 1024];
    while matches!(stream.read(&mut buffer), Ok(read) if read > 0) {}
}

fn source(mut stream: TcpStream) {
    let buffer = vec![b'x'; 256 * 1024];
    while stream.write_all(&buffer).is_ok() {}
}

struct Conn {
    stream: TcpStream,
    /// What could not be written yet.
    pending: Vec<u8>,
    /// The peer has sent everything.
    ended: bool,
}

enum Entry {
    Listener { listener: TcpListener, greet: bool },
    Conn(Conn),
}

struct Server {
    epoll: OwnedFd,
    entries: HashMap<u64, Entry>,
    next: u64,
    log: bool,
    buffer: Vec<u8>,
}

impl Server {
    fn new(log: bool) -> Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).context("cannot make an epoll")?;
        Ok(Self { epoll, entries: HashMap::new(), next: 0, log, buffer: vec![0; 64 * 1024] })
    }

    fn listen(&mut self, port: u16, greet: bool) -> Result<()> {
        let listener = listen(port)?;
        listener.set_nonblocking(true).context("cannot set non-blocking")?;
        epoll::add(&self.epoll, &listener, EventData::new_u64(self.next), EventFlags::IN)
            .context("cannot watch")?;
        self.entries.insert(self.next, Entry::Listener { listener, greet });
        self.next += 1;
        Ok(())
    }

    fn run(&mut self) -> Result<()> {
        let mut events = Vec::with_capacity(256);
        loop {
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), None) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error).context("cannot wait for events"),
            }
            for event in events.drain(..) {
                let id = event.data.u64();
                if matches!(self.entries.get(&id), Some(Entry::Listener { .. })) {
                    self.accept(id)?;
                } else if !self.serve(id) {
                    self.entries.remove(&id);
                }
            }
        }
    }

    fn accept(&mut self, id: u64) -> Result<()> {
        loop {
            let Some(Entry::Listener { listener, greet }) = self.entries.get(&id) else { return Ok(()) };
            let greet = *greet;
            let (stream, peer) = match listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                // The client left before we came: its loss.
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
                Err(error) => return Err(error).context("cannot accept"),
            };
            report(self.log, &stream);
            let mut conn = Conn { stream, pending: Vec::new(), ended: false };
            let ready = conn.stream.set_nodelay(true).and_then(|()| conn.stream.set_nonblocking(true));
            if ready.is_err() {
                continue;
            }
            if greet && let Ok(local) = conn.stream.local_addr() {
                let line = format!("{}\n", json!({"peer": plain(peer), "local": plain(local)}));
                if conn.stream.write_all(line.as_bytes()).is_err() {
                    continue;
                }
            }
            let data = EventData::new_u64(self.next);
            if epoll::add(&self.epoll, &conn.stream, data, EventFlags::IN).is_ok() {
                self.entries.insert(self.next, Entry::Conn(conn));
                self.next += 1;
            }
        }
    }

    /// Moves what can be moved; whether the connection lives on.
    fn serve(&mut self, id: u64) -> bool {
        let Some(Entry::Conn(conn)) = self.entries.get_mut(&id) else { return false };
        let was_blocked = !conn.pending.is_empty();
        if was_blocked && !flush(conn) {
            return false;
        }
        if conn.pending.is_empty() && !conn.ended {
            match conn.stream.read(&mut self.buffer) {
                Ok(0) => conn.ended = true,
                Ok(read) => {
                    conn.pending.extend_from_slice(&self.buffer[..read]);
                    if !flush(conn) {
                        return false;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => return false,
            }
        }
        if conn.ended && conn.pending.is_empty() {
            let _ = conn.stream.shutdown(Shutdown::Write);
            return false;
        }
        let blocked = !conn.pending.is_empty();
        if blocked != was_blocked {
            // While output waits, input waits too: that is the back pressure of an echo.
            let flags = if blocked { EventFlags::OUT } else { EventFlags::IN };
            return epoll::modify(&self.epoll, &conn.stream, EventData::new_u64(id), flags).is_ok();
        }
        true
    }
}

fn flush(conn: &mut Conn) -> bool {
    while !conn.pending.is_empty() {
        match conn.stream.write(&conn.pending) {
            Ok(0) => return false,
            Ok(written) => drop(conn.pending.drain(..written)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
            Err(_) => return false,
        }
    }
    true
}
