//! One TCP connection with every address and error that its client sees.

use super::serve::plain;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

/// What to do.
#[derive(clap::Args)]
pub struct Args {
    /// host:port
    #[arg(long)]
    to: String,
    /// Text to send
    #[arg(long, default_value = "")]
    send: String,
    /// Send this many bytes instead and expect them back
    #[arg(long, default_value_t = 0)]
    echo_bytes: usize,
    /// Read this many lines
    #[arg(long, default_value_t = 0)]
    lines: usize,
    /// Shut the sending side down after sending, and read to the end
    #[arg(long)]
    half_close: bool,
    /// Close by reset instead of FIN
    #[arg(long)]
    reset: bool,
    /// Bind to this address first
    #[arg(long)]
    bind: Option<SocketAddr>,
    /// Use an IPv6 socket for an IPv4 address
    #[arg(long)]
    mapped: bool,
    /// Keep it open and wait for the peer to end it, this many milliseconds at most
    #[arg(long, default_value_t = 0)]
    hold_ms: u64,
    /// Give up after this many milliseconds
    #[arg(long, default_value_t = 15_000)]
    timeout_ms: u64,
}

/// What came of it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// Whether everything went as asked.
    pub ok: bool,
    /// Where it failed: `resolve`, `connect`, `send`, `read`, `held`.
    pub stage: String,
    /// The error's kind, as Rust names it.
    pub kind: String,
    /// The error's text.
    pub error: String,
    /// `getsockname`.
    pub local: Option<SocketAddr>,
    /// `getpeername`.
    pub peer: Option<SocketAddr>,
    /// What was read, as text (not of `--echo-bytes`).
    pub received: String,
    /// Bytes read.
    pub bytes: usize,
    /// Milliseconds until the connection was there.
    pub connect_ms: f64,
    /// Milliseconds in all.
    pub total_ms: f64,
}

impl Outcome {
    /// Where and why it failed, for messages.
    pub fn problem(&self) -> String {
        format!("{} failed after {:.0} ms: {} ({})", self.stage, self.total_ms, self.kind, self.error)
    }
}

/// Connects and prints an [`Outcome`].
///
/// # Errors
/// Only standard output can fail.
pub fn run(args: &Args) -> Result<()> {
    let start = Instant::now();
    let mut outcome = Outcome { stage: "resolve".to_owned(), ..Outcome::default() };
    match attempt(args, start, &mut outcome) {
        Ok(()) => outcome.ok = true,
        Err(error) => {
            outcome.kind = format!("{:?}", error.kind());
            outcome.error = error.to_string();
        }
    }
    outcome.total_ms = start.elapsed().as_secs_f64() * 1e3;
    println!("{}", serde_json::to_string(&outcome).context("cannot print the outcome")?);
    Ok(())
}

fn attempt(args: &Args, start: Instant, outcome: &mut Outcome) -> std::io::Result<()> {
    let timeout = Duration::from_millis(args.timeout_ms);
    let nothing = || std::io::Error::new(ErrorKind::NotFound, "the name has no address");
    let to = args.to.to_socket_addrs()?.next().ok_or_else(nothing)?;
    outcome.stage = "connect".to_owned();
    let mut stream = connect(to, args, timeout)?;
    outcome.connect_ms = start.elapsed().as_secs_f64() * 1e3;
    outcome.local = stream.local_addr().ok().map(plain);
    outcome.peer = stream.peer_addr().ok().map(plain);
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    if args.reset {
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    }
    if args.echo_bytes > 0 {
        return echo(&mut stream, args.echo_bytes, outcome);
    }
    outcome.stage = "send".to_owned();
    stream.write_all(args.send.as_bytes())?;
    if args.half_close {
        stream.shutdown(Shutdown::Write)?;
    }
    outcome.stage = "read".to_owned();
    let mut received = Vec::new();
    let want = |received: &[u8]| {
        args.half_close || received.iter().filter(|byte| **byte == b'\n').count() < args.lines
    };
    let mut buffer = vec![0; 64 * 1024];
    while want(&received) {
        match stream.read(&mut buffer)? {
            0 if args.half_close => break,
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            read => received.extend_from_slice(&buffer[..read]),
        }
    }
    if args.hold_ms > 0 {
        outcome.stage = "held".to_owned();
        hold(&mut stream, Duration::from_millis(args.hold_ms))?;
    }
    outcome.bytes = received.len();
    outcome.received = String::from_utf8_lossy(&received).into_owned();
    Ok(())
}

fn connect(to: SocketAddr, args: &Args, timeout: Duration) -> std::io::Result<TcpStream> {
    let target = match (to.ip(), args.mapped) {
        (IpAddr::V4(v4), true) => SocketAddr::new(v4.to_ipv6_mapped().into(), to.port()),
        _ => to,
    };
    let socket = Socket::new(Domain::for_address(target), Type::STREAM, Some(Protocol::TCP))?;
    if args.mapped {
        socket.set_only_v6(false)?;
    }
    if let Some(bind) = args.bind {
        socket.set_reuse_address(true)?;
        socket.bind(&bind.into())?;
    }
    socket.connect_timeout(&target.into(), timeout)?;
    Ok(socket.into())
}

/// Sends a pattern and checks that it comes back, reading and writing at the same time.
fn echo(stream: &mut TcpStream, bytes: usize, outcome: &mut Outcome) -> std::io::Result<()> {
    outcome.stage = "send".to_owned();
    let mut writer = stream.try_clone()?;
    let sender = std::thread::spawn(move || -> std::io::Result<()> {
        let mut sent = 0;
        while sent < bytes {
            let chunk: Vec<u8> = (sent..bytes.min(sent + 65_536)).map(pattern).collect();
            writer.write_all(&chunk)?;
            sent += chunk.len();
        }
        writer.shutdown(Shutdown::Write)
    });
    let mut buffer = vec![0; 256 * 1024];
    let result = loop {
        match stream.read(&mut buffer) {
            Ok(0) => break Ok(()),
            Ok(read) => {
                let at = outcome.bytes;
                if (0..read).any(|i| buffer[i] != pattern(at + i)) {
                    break Err(std::io::Error::new(ErrorKind::InvalidData, format!("wrong byte after {at}")));
                }
                outcome.bytes += read;
            }
            Err(error) => break Err(error),
        }
    };
    match sender.join() {
        Ok(sent) => sent?,
        Err(_) => return Err(std::io::Error::other("the sender panicked")),
    }
    outcome.stage = "read".to_owned();
    result?;
    if outcome.bytes != bytes {
        return Err(std::io::Error::new(
            ErrorKind::UnexpectedEof,
            format!("{} of {bytes} bytes", outcome.bytes),
        ));
    }
    Ok(())
}

fn pattern(at: usize) -> u8 {
    // 251 is prime, so that a shift by any buffer size shows.
    u8::try_from(at % 251).unwrap_or(0)
}

/// Waits, whatever comes: an end by the peer within the time is an error that says how it ended.
fn hold(stream: &mut TcpStream, time: Duration) -> std::io::Result<()> {
    let end = Instant::now() + time;
    let mut buffer = [0; 4096];
    while let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut buffer) {
            Ok(0) => return Err(std::io::Error::new(ErrorKind::UnexpectedEof, "the peer closed")),
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
