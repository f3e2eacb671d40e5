//! Bytes of a seed in both directions, with a hash of what arrived on either side, in every order of ending.
//!
//! The server logs one line per connection: what it received and how that ended. What a client says it sent can so be
//! compared with what the other side saw.

use super::serve::listen;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use std::io::{Error, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// Who ends its direction first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Both send at once.
    Both,
    /// The server sends only after it has seen the client's end.
    ClientFirst,
    /// The client sends only after it has seen the server's end.
    ServerFirst,
}

/// The server, or one connection and what it carries.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Serve this port
    #[arg(long, conflicts_with = "to")]
    serve: Option<u16>,
    /// The server to talk to
    #[arg(long, required_unless_present = "serve")]
    to: Option<SocketAddr>,
    /// Bytes to send
    #[arg(long, default_value_t = 0)]
    up: u64,
    /// Bytes to receive
    #[arg(long, default_value_t = 0)]
    down: u64,
    /// Who ends first
    #[arg(long, value_enum, default_value_t = Order::Both)]
    order: Order,
    /// What the bytes are made of
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Bytes of a write, and of a read
    #[arg(long, default_value_t = 64 * 1024)]
    piece: usize,
    /// Pause after each read, in microseconds
    #[arg(long, default_value_t = 0)]
    pause_us: u64,
    /// The socket's receive buffer, which bounds its window
    #[arg(long)]
    receive_buffer: Option<usize>,
    /// Give up when nothing moves for this many milliseconds
    #[arg(long, default_value_t = 30_000)]
    timeout_ms: u64,
}

/// What one side saw of a connection.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Seen {
    /// The client's seed, by which both sides' reports belong together.
    pub seed: u64,
    /// Bytes received.
    pub received: u64,
    /// Of the bytes received.
    pub received_hash: String,
    /// Bytes sent.
    pub sent: u64,
    /// Of the bytes sent.
    pub sent_hash: String,
    /// What went wrong, or nothing.
    pub error: String,
    /// How long it took.
    pub seconds: f64,
}

/// A stream of bytes from a seed (xorshift64*): none can be lost, doubled or moved without the hash showing it.
struct Bytes(u64);

impl Bytes {
    const fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn fill(&mut self, buffer: &mut [u8]) {
        for byte in buffer {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            *byte = self.0.wrapping_mul(0x2545_F491_4F6C_DD1D).to_be_bytes()[0];
        }
    }
}

/// FNV-1a.
struct Hash(u64);

impl Hash {
    const fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01B3);
        }
    }

    fn text(&self) -> String {
        format!("{:016x}", self.0)
    }
}

/// What the client asks for: the first bytes of a connection.
struct Header {
    up: u64,
    down: u64,
    seed: u64,
    order: Order,
}

impl Header {
    const SIZE: usize = 25;

    fn encode(&self) -> Vec<u8> {
        let mut bytes = [self.up, self.down, self.seed].map(u64::to_be_bytes).concat();
        bytes.push(self.order as u8);
        bytes
    }

    fn decode(bytes: [u8; Self::SIZE]) -> Option<Self> {
        let number = |at: usize| Some(u64::from_be_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        let order = [Order::Both, Order::ClientFirst, Order::ServerFirst];
        Some(Self {
            up: number(0)?,
            down: number(8)?,
            seed: number(16)?,
            order: *order.get(usize::from(bytes[24]))?,
        })
    }
}

/// Serves without end, or carries one connection and prints what it [`Seen`].
///
/// # Errors
/// The port is taken. What goes wrong with a connection is in what is printed.
pub fn run(args: &Args) -> Result<()> {
    if let Some(port) = args.serve {
        let listener = listen(port)?;
        if let Some(size) = args.receive_buffer {
            // Before the handshake, so that the window is small from the start; what is accepted inherits it.
            SockRef::from(&listener).set_recv_buffer_size(size).context("cannot set the receive buffer")?;
        }
        for stream in listener.incoming() {
            let stream = stream.context("cannot accept")?;
            let args = args.clone();
            std::thread::spawn(move || serve(stream, &args));
        }
    }
    let to = args.to.context("neither a port to serve nor a server")?;
    let start = Instant::now();
    let mut seen = Seen { seed: args.seed, ..Seen::default() };
    if let Err(error) = client(to, args, &mut seen) {
        seen.error = format!("{:?}: {error}", error.kind());
    }
    seen.seconds = start.elapsed().as_secs_f64();
    println!("{}", serde_json::to_string(&seen).context("cannot print what was seen")?);
    Ok(())
}

fn client(to: SocketAddr, args: &Args, seen: &mut Seen) -> std::io::Result<()> {
    let timeout = Duration::from_millis(args.timeout_ms);
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    if let Some(size) = args.receive_buffer {
        socket.set_recv_buffer_size(size)?;
    }
    socket.connect_timeout(&to.into(), timeout)?;
    let mut stream = TcpStream::from(socket);
    prepare(&stream, args)?;
    let header = Header { up: args.up, down: args.down, seed: args.seed, order: args.order };
    stream.write_all(&header.encode())?;
    carry(&stream, args, seen, args.up, args.order == Order::ServerFirst, args.order == Order::ClientFirst)?;
    if seen.received != args.down {
        return Err(Error::new(
            ErrorKind::UnexpectedEof,
            format!("{} of {} bytes", seen.received, args.down),
        ));
    }
    Ok(())
}

fn serve(mut stream: TcpStream, args: &Args) {
    let start = Instant::now();
    let mut seen = Seen::default();
    let mut header = [0; Header::SIZE];
    let result = prepare(&stream, args).and_then(|()| stream.read_exact(&mut header)).and_then(|()| {
        let header = Header::decode(header).ok_or(ErrorKind::InvalidData)?;
        seen.seed = header.seed;
        let [client_first, server_first] =
            [Order::ClientFirst, Order::ServerFirst].map(|o| header.order == o);
        carry(&stream, args, &mut seen, header.down, client_first, server_first)?;
        if seen.received == header.up { Ok(()) } else { Err(ErrorKind::UnexpectedEof.into()) }
    });
    if let Err(error) = result {
        seen.error = format!("{:?}: {error}", error.kind());
    }
    seen.seconds = start.elapsed().as_secs_f64();
    if let Ok(line) = serde_json::to_string(&seen) {
        println!("{line}");
    }
}

fn prepare(stream: &TcpStream, args: &Args) -> std::io::Result<()> {
    let timeout = Some(Duration::from_millis(args.timeout_ms));
    stream.set_nodelay(true)?;
    stream.set_read_timeout(timeout)?;
    stream.set_write_timeout(timeout)
}

/// Sends `bytes` and receives to the end: at once, or one after the other.
fn carry(
    stream: &TcpStream,
    args: &Args,
    seen: &mut Seen,
    bytes: u64,
    receive_first: bool,
    send_first: bool,
) -> std::io::Result<()> {
    // The two ends send different bytes.
    let seed = if args.serve.is_some() { !seen.seed } else { seen.seed };
    let send = || send(stream, args, seed, bytes);
    let receive = || receive(stream, args);
    let (sent, received) = if receive_first {
        let received = receive();
        (if received.2.is_ok() { send() } else { (0, Hash::new(), Ok(())) }, received)
    } else if send_first {
        let sent = send();
        let received = if sent.2.is_ok() { receive() } else { (0, Hash::new(), Ok(())) };
        (sent, received)
    } else {
        std::thread::scope(|scope| {
            let sender = scope.spawn(send);
            let received = receive();
            let failed = || (0, Hash::new(), Err(Error::other("the sender panicked")));
            (sender.join().unwrap_or_else(|_| failed()), received)
        })
    };
    (seen.sent, seen.sent_hash) = (sent.0, sent.1.text());
    (seen.received, seen.received_hash) = (received.0, received.1.text());
    received.2.and(sent.2)
}

type Moved = (u64, Hash, std::io::Result<()>);

/// Sends, then ends the direction.
fn send(mut stream: &TcpStream, args: &Args, seed: u64, bytes: u64) -> Moved {
    let (mut sent, mut hash, mut source) = (0, Hash::new(), Bytes::new(seed));
    let mut buffer = vec![0; args.piece];
    while sent < bytes {
        let size = usize::try_from(bytes - sent).unwrap_or(usize::MAX).min(buffer.len());
        source.fill(&mut buffer[..size]);
        if let Err(error) = stream.write_all(&buffer[..size]) {
            return (sent, hash, Err(error));
        }
        hash.add(&buffer[..size]);
        sent += size as u64;
    }
    let ended = stream.shutdown(Shutdown::Write);
    (sent, hash, ended)
}

/// Receives until the peer has ended its direction.
fn receive(mut stream: &TcpStream, args: &Args) -> Moved {
    let (mut received, mut hash) = (0, Hash::new());
    let mut buffer = vec![0; args.piece];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return (received, hash, Ok(())),
            Ok(read) => {
                hash.add(&buffer[..read]);
                received += read as u64;
            }
            Err(error) => return (received, hash, Err(error)),
        }
        if args.pause_us > 0 {
            std::thread::sleep(Duration::from_micros(args.pause_us));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_see_the_same_bytes_in_every_order() {
        for order in [Order::Both, Order::ClientFirst, Order::ServerFirst] {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let to = listener.local_addr().unwrap();
            let args = Args {
                serve: None,
                to: Some(to),
                up: 300_000,
                down: 200_001,
                order,
                seed: 7,
                piece: 1000,
                pause_us: 0,
                receive_buffer: None,
                timeout_ms: 5000,
            };
            let side = Args { serve: Some(1), to: None, ..args.clone() };
            let server = std::thread::spawn(move || serve(listener.accept().unwrap().0, &side));
            let mut seen = Seen { seed: 7, ..Seen::default() };
            client(to, &args, &mut seen).unwrap();
            server.join().unwrap();
            assert_eq!((seen.sent, seen.received), (300_000, 200_001), "{order:?}");
            let mut expected = vec![0; 200_001];
            Bytes::new(!7).fill(&mut expected);
            let mut hash = Hash::new();
            hash.add(&expected);
            assert_eq!(seen.received_hash, hash.text(), "{order:?}");
        }
    }

    #[test]
    fn a_byte_that_is_lost_doubled_or_moved_changes_the_hash() {
        let hash = |bytes: &[u8]| {
            let mut hash = Hash::new();
            hash.add(bytes);
            hash.0
        };
        let whole = hash(b"abcd");
        assert!([&b"abd"[..], b"abccd", b"abdc"].iter().all(|other| hash(other) != whole));
    }
}
