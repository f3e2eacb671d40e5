//! The loops of each load shape.

use super::{Args, Figures, Stop, nanos};
use anyhow::{Context, Result};
use rustix::event::epoll::{self, EventData, EventFlags};
use socket2::{Domain, Protocol, Socket, Type};
use std::io::{Error, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A connection that takes this long on one machine is lost.
const UNANSWERED: Duration = Duration::from_secs(1);
/// A stream on which no byte moves for this long is stuck.
const STUCK: Duration = Duration::from_secs(5);
const CONNECT: Duration = Duration::from_secs(20);

fn target(args: &Args, n: usize) -> SocketAddr {
    args.to[n % args.to.len()]
}

fn open(to: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, CONNECT)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(CONNECT))?;
    Ok(stream)
}

fn round_trip(stream: &mut TcpStream, message: &[u8], buffer: &mut [u8]) -> std::io::Result<()> {
    stream.write_all(message)?;
    stream.read_exact(buffer)
}

/// Round trips on one connection, blocking: the least that a client can do.
pub(super) fn one(args: &Args, stop: &Stop, times: &mut Vec<u32>) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut stream = open(target(args, 0)).context("cannot connect")?;
    let message = vec![b'p'; args.size];
    let mut buffer = vec![0; args.size];
    let start = Instant::now();
    while !stop.now() {
        let begin = Instant::now();
        if let Err(error) = round_trip(&mut stream, &message, &mut buffer) {
            figures.fail("round trip", &error);
            return Ok(figures);
        }
        times.push(nanos(begin));
        figures.ops += 1;
        if args.pause_ms > 0 {
            std::thread::sleep(Duration::from_millis(args.pause_ms));
        }
    }
    figures.alive = 1;
    figures.seconds = start.elapsed().as_secs_f64();
    Ok(figures)
}

/// Connect, round trip, close, one after the other.
pub(super) fn connect_one(args: &Args, stop: &Stop, times: &mut Vec<u32>) -> Result<Figures> {
    let mut figures = Figures::default();
    let message = vec![b'c'; args.size];
    let mut buffer = vec![0; args.size];
    let mut n = 0;
    while !stop.now() {
        let begin = Instant::now();
        let to = target(args, n);
        n += 1;
        match open(to).and_then(|mut stream| round_trip(&mut stream, &message, &mut buffer)) {
            Ok(()) => {
                times.push(nanos(begin));
                figures.ops += 1;
            }
            Err(error) => {
                figures.fail("connect and round trip", &error);
                // A server that is away must not turn this into a busy loop.
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        if args.pause_ms > 0 {
            std::thread::sleep(Duration::from_millis(args.pause_ms));
        }
    }
    Ok(figures)
}

/// One HTTP/1.1 request per connection, one after the other.
pub(super) fn http(args: &Args, stop: &Stop, times: &mut Vec<u32>) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut n = 0;
    while !stop.now() {
        let begin = Instant::now();
        let to = target(args, n);
        n += 1;
        match get(to) {
            Ok(()) => {
                times.push(nanos(begin));
                figures.ops += 1;
            }
            Err(error) => figures.fail("request", &error),
        }
        std::thread::sleep(Duration::from_millis(args.pause_ms));
    }
    Ok(figures)
}

fn get(to: SocketAddr) -> std::io::Result<()> {
    let mut stream = open(to)?;
    stream.write_all(format!("GET / HTTP/1.1\r\nHost: {to}\r\n\r\n").as_bytes())?;
    let mut head = [0; 12];
    stream.read_exact(&mut head)?;
    if &head == b"HTTP/1.1 200" {
        return Ok(());
    }
    let mut rest = [0; 1024];
    let read = stream.read(&mut rest)?;
    Err(Error::other(format!("{}{}", String::from_utf8_lossy(&head), String::from_utf8_lossy(&rest[..read]))))
}

struct Slot {
    stream: Option<TcpStream>,
    begin: Instant,
    /// Bytes of this round trip that came back.
    read: usize,
    sent: bool,
}

/// Many connections on one epoll loop; with `reconnect`, each lives for one round trip.
pub(super) fn many(args: &Args, stop: &Stop, times: &mut Vec<u32>, reconnect: bool) -> Result<Figures> {
    let mut run = Many {
        args,
        epoll: epoll::create(epoll::CreateFlags::CLOEXEC).context("cannot make an epoll")?,
        figures: Figures::default(),
        times,
        message: vec![b'm'; args.size],
        reconnect,
        next: 0,
    };
    let mut slots: Vec<Slot> = Vec::with_capacity(args.conns);
    for _ in 0..args.conns {
        let mut slot = Slot { stream: None, begin: Instant::now(), read: 0, sent: false };
        if !reconnect {
            // The connections of a round-trip load are there before its time begins.
            let stream = open(target(args, run.next)).context("cannot connect")?;
            stream.set_nonblocking(true).context("cannot set non-blocking")?;
            slot.stream = Some(stream);
            run.next += 1;
        }
        slots.push(slot);
    }
    let start = Instant::now();
    for (id, slot) in slots.iter_mut().enumerate() {
        if reconnect {
            run.connect(id, slot);
        } else {
            run.watch(id, slot);
        }
    }
    let mut events = Vec::with_capacity(256);
    while !stop.now() {
        events.clear();
        let left = stop.left();
        let timeout = rustix::event::Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(0),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        match epoll::wait(&run.epoll, rustix::buffer::spare_capacity(&mut events), Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot wait for events"),
        }
        for event in events.drain(..) {
            let id = usize::try_from(event.data.u64()).unwrap_or(usize::MAX);
            if let Some(slot) = slots.get_mut(id) {
                run.advance(id, slot);
            }
        }
        if reconnect {
            // Slots whose connection failed start again here, at most once per turn.
            for (id, slot) in slots.iter_mut().enumerate().filter(|(_, slot)| slot.stream.is_none()) {
                run.connect(id, slot);
            }
        } else if slots.iter().all(|slot| slot.stream.is_none()) {
            break;
        }
    }
    let mut figures = run.figures;
    figures.seconds = start.elapsed().as_secs_f64();
    if reconnect {
        // One that nobody answers would otherwise count neither way.
        for slot in slots.iter().filter(|slot| slot.begin.elapsed() > UNANSWERED) {
            figures.fail("connect", &Error::other(format!("no answer for {:?}", slot.begin.elapsed())));
        }
    }
    figures.alive = slots.iter().filter(|slot| slot.stream.is_some()).count() as u64;
    Ok(figures)
}

struct Many<'a> {
    args: &'a Args,
    epoll: OwnedFd,
    figures: Figures,
    times: &'a mut Vec<u32>,
    message: Vec<u8>,
    reconnect: bool,
    next: usize,
}

impl Many<'_> {
    fn connect(&mut self, id: usize, slot: &mut Slot) {
        let to = target(self.args, self.next);
        self.next += 1;
        slot.begin = Instant::now();
        slot.read = 0;
        slot.sent = false;
        match begin_connect(to) {
            Ok(stream) => {
                slot.stream = Some(stream);
                self.watch(id, slot);
            }
            Err(error) => self.figures.fail("connect", &error),
        }
    }

    /// Watches a new connection for being writable, which is also when its connect is over.
    fn watch(&mut self, id: usize, slot: &mut Slot) {
        slot.begin = if slot.sent { slot.begin } else { Instant::now() };
        if let Some(stream) = &slot.stream
            && let Err(error) =
                epoll::add(&self.epoll, stream, EventData::new_u64(id as u64), EventFlags::OUT)
        {
            self.figures.fail("watch", &error.into());
            slot.stream = None;
        }
    }

    fn advance(&mut self, id: usize, slot: &mut Slot) {
        let result = if slot.sent { self.receive(id, slot) } else { self.send(id, slot) };
        if let Err(error) = result {
            let what = if slot.sent { "read" } else { "connect or send" };
            self.figures.fail(what, &error);
            slot.stream = None;
        }
    }

    fn send(&self, id: usize, slot: &mut Slot) -> std::io::Result<()> {
        let Some(stream) = &mut slot.stream else { return Ok(()) };
        if let Some(error) = stream.take_error()? {
            return Err(error);
        }
        stream.write_all(&self.message)?;
        slot.sent = true;
        epoll::modify(&self.epoll, stream, EventData::new_u64(id as u64), EventFlags::IN)?;
        Ok(())
    }

    fn receive(&mut self, id: usize, slot: &mut Slot) -> std::io::Result<()> {
        let Some(stream) = &mut slot.stream else { return Ok(()) };
        let mut buffer = [0; 4096];
        let want = (self.message.len() - slot.read).min(buffer.len());
        match stream.read(&mut buffer[..want]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(read) => slot.read += read,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        }
        if slot.read < self.message.len() {
            return Ok(());
        }
        self.times.push(nanos(slot.begin));
        self.figures.ops += 1;
        slot.read = 0;
        if self.reconnect {
            slot.stream = None;
            self.connect(id, slot);
            return Ok(());
        }
        if self.args.pause_ms > 0 {
            std::thread::sleep(Duration::from_millis(self.args.pause_ms));
        }
        slot.begin = Instant::now();
        stream.write_all(&self.message)
    }
}

fn begin_connect(to: SocketAddr) -> std::io::Result<TcpStream> {
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

/// Bytes as fast as they go, one thread per connection, measured after the connections are up.
pub(super) fn bulk(args: &Args, stop: &Stop, send: bool) -> Result<Figures> {
    let streams: Vec<TcpStream> = (0..args.conns)
        .map(|n| TcpStream::connect_timeout(&target(args, n), CONNECT))
        .collect::<std::io::Result<_>>()
        .context("cannot connect")?;
    let moved = AtomicU64::new(0);
    let start = Instant::now();
    let mut figures = Figures::default();
    let results: Vec<std::io::Result<()>> = std::thread::scope(|scope| {
        let threads: Vec<_> = streams
            .iter()
            .map(|stream| {
                let moved = &moved;
                scope.spawn(move || pump(stream, args, stop, send, moved))
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Err(Error::other("a stream's thread panicked"))))
            .collect()
    });
    figures.seconds = start.elapsed().as_secs_f64();
    for error in results.into_iter().filter_map(Result::err) {
        figures.fail("stream", &error);
    }
    figures.bytes = moved.load(Ordering::Relaxed);
    Ok(figures)
}

fn pump(
    mut stream: &TcpStream,
    args: &Args,
    stop: &Stop,
    send: bool,
    moved: &AtomicU64,
) -> std::io::Result<()> {
    let mut buffer = vec![b'b'; 128 * 1024];
    // A stream that stands still must not outlive the measurement.
    let tick = Some(Duration::from_millis(100));
    stream.set_read_timeout(tick)?;
    stream.set_write_timeout(tick)?;
    let mut last = Instant::now();
    while !stop.now() {
        let result = if send { stream.write(&buffer) } else { stream.read(&mut buffer) };
        match result {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(bytes) => {
                moved.fetch_add(bytes as u64, Ordering::Relaxed);
                last = Instant::now();
                if args.pause_ms > 0 {
                    std::thread::sleep(Duration::from_millis(args.pause_ms));
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => return Err(error),
        }
    }
    if last.elapsed() > STUCK {
        return Err(Error::other(format!("no byte moved for {:?}", last.elapsed())));
    }
    Ok(())
}

/// Opens connections with up to 64 under way, says `holding`, and keeps them until told to stop.
pub(super) fn hold(args: &Args, stop: &Stop, times: &mut Vec<u32>) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut held = Vec::with_capacity(args.conns);
    let message = vec![b'h'; args.size];
    let start = Instant::now();
    let workers = 64.min(args.conns.max(1));
    let results: Vec<Vec<(u32, std::io::Result<TcpStream>)>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..workers)
            .map(|worker| {
                let message = &message;
                scope.spawn(move || {
                    let mut buffer = vec![0; message.len()];
                    let open_one = |n: usize| {
                        let begin = Instant::now();
                        let stream = open(target(args, n)).and_then(|mut stream| {
                            round_trip(&mut stream, message, &mut buffer)?;
                            Ok(stream)
                        });
                        (nanos(begin), stream)
                    };
                    (worker..args.conns).step_by(workers).map(open_one).collect::<Vec<_>>()
                })
            })
            .collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
    });
    for (time, result) in results.into_iter().flatten() {
        match result {
            Ok(stream) => {
                times.push(time);
                held.push(stream);
                figures.ops += 1;
            }
            Err(error) => figures.fail("open", &error),
        }
    }
    figures.seconds = start.elapsed().as_secs_f64();
    println!("holding {} ({} failed {})", held.len(), figures.errors, figures.first_error);
    while !stop.now() {
        std::thread::sleep(stop.left().max(Duration::from_millis(1)));
    }
    let mut buffer = vec![0; message.len()];
    for stream in &mut held {
        match round_trip(stream, &message, &mut buffer) {
            Ok(()) => figures.alive += 1,
            Err(error) => figures.fail("held connection", &error),
        }
    }
    Ok(figures)
}
