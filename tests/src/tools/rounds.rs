//! An exact number of round trips: request and answer of fixed sizes, one at a time, on one connection after the other.
//!
//! Nothing overlaps and nothing depends on time, so that a proxy between the two does the same work in every run.

use super::serve::listen;
use anyhow::{Context, Result, ensure};
use socket2::SockRef;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};

/// The first bytes of every request: the sizes of request and answer.
const HEAD: usize = 8;

/// The server, or a client and how much it does.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Serve this port
    #[arg(long, conflicts_with = "to")]
    serve: Option<u16>,
    /// The server to talk to
    #[arg(long, required_unless_present = "serve")]
    to: Option<SocketAddr>,
    /// Connections, one after the other
    #[arg(long, default_value_t = 1)]
    connections: u32,
    /// Round trips on each
    #[arg(long, default_value_t = 1)]
    rounds: u32,
    /// Bytes of a request
    #[arg(long, default_value_t = 64)]
    up: u32,
    /// Bytes of an answer
    #[arg(long, default_value_t = 64)]
    down: u32,
}

/// Serves without end, or does what it is asked to and ends.
///
/// # Errors
/// The port is taken, or a round trip failed.
pub fn run(args: &Args) -> Result<()> {
    if let Some(port) = args.serve {
        for stream in listen(port)?.incoming() {
            let stream = stream.context("cannot accept")?;
            if let Err(error) = answer(stream) {
                eprintln!("a connection broke: {error}");
            }
        }
    }
    let to = args.to.context("neither a port to serve nor a server")?;
    ensure!(args.up as usize >= HEAD, "a request has at least {HEAD} bytes");
    (0..args.connections)
        .try_for_each(|n| ask(to, args).with_context(|| format!("connection {n} of {}", args.connections)))
}

/// Answers requests until the client ends.
fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut head = [0; HEAD];
    let (mut request, mut answer) = (Vec::new(), Vec::new());
    loop {
        match stream.read_exact(&mut head) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        }
        let [a, b, c, d, e, f, g, h] = head;
        request.resize((u32::from_be_bytes([a, b, c, d]) as usize).saturating_sub(HEAD), 0);
        answer.resize(u32::from_be_bytes([e, f, g, h]) as usize, b'a');
        stream.read_exact(&mut request)?;
        stream.write_all(&answer)?;
    }
}

fn ask(to: SocketAddr, args: &Args) -> Result<()> {
    let mut stream = TcpStream::connect(to).context("cannot connect")?;
    SockRef::from(&stream).set_tcp_nodelay(true)?;
    let mut request = vec![b'r'; args.up as usize];
    request[..HEAD].copy_from_slice(&[args.up.to_be_bytes(), args.down.to_be_bytes()].concat());
    let mut answer = vec![0; args.down as usize];
    for _ in 0..args.rounds {
        stream.write_all(&request)?;
        stream.read_exact(&mut answer)?;
    }
    // The server ends once it has seen our end: whatever is between us is then done with this connection, too.
    stream.shutdown(Shutdown::Write)?;
    ensure!(stream.read(&mut [0])? == 0, "the server sent more than was asked for");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_round_trip_has_the_sizes_that_were_asked_for() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || {
            for _ in 0..2 {
                answer(listener.accept().unwrap().0).unwrap();
            }
        });
        let args = Args { serve: None, to: Some(to), connections: 2, rounds: 3, up: 100_000, down: 1 };
        run(&args).unwrap();
        server.join().unwrap();
    }
}
