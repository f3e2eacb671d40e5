//! Waits until connections out of pods reach a server that takes none but the mesh's, and says when.
//!
//! A pod that is not captured connects in the clear and is refused; one that is captured is answered. So the first
//! answer is the moment from which a pod is in the mesh, as its own application sees it.

use crate::bed::netns;
use anyhow::{Context, Result, ensure};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

/// A connection that is neither answered nor refused for this long is stuck between both.
const STUCK: Duration = Duration::from_secs(1);
/// Between attempts of one pod.
const PAUSE: Duration = Duration::from_millis(1);

/// Which pods.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// An echo server that refuses plaintext
    #[arg(long)]
    to: SocketAddr,
    /// Network namespaces of the pods
    #[arg(long, required = true)]
    netns: Vec<PathBuf>,
}

/// What was seen.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Joined {
    /// When every pod had been answered, on the machine's monotonic clock.
    pub at_ns: u64,
    /// Connections that were refused meanwhile.
    pub refused: u64,
    /// Connections that were neither refused nor answered.
    pub stuck: u64,
}

/// The machine's monotonic clock, which all its processes share.
#[must_use]
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// Prints `waiting` once every pod was refused, and a [`Joined`] once every pod was answered.
///
/// # Errors
/// A pod is answered before anybody enrolled it, or its namespace is gone.
pub fn run(args: &Args) -> Result<()> {
    for pod in &args.netns {
        netns::enter(pod)?;
        ensure!(attempt(args.to).is_err(), "{} is answered before it was enrolled", pod.display());
    }
    println!("waiting");
    let mut seen = Joined::default();
    for pod in &args.netns {
        netns::enter(pod)?;
        while let Err(error) = attempt(args.to) {
            if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) {
                seen.stuck += 1;
            } else {
                seen.refused += 1;
            }
            std::thread::sleep(PAUSE);
        }
    }
    seen.at_ns = now_ns();
    println!("{}", serde_json::to_string(&seen).context("cannot print what was seen")?);
    Ok(())
}

/// One connection with one byte to and fro.
fn attempt(to: SocketAddr) -> std::io::Result<()> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    socket.connect_timeout(&to.into(), STUCK)?;
    let mut stream: TcpStream = socket.into();
    stream.set_read_timeout(Some(STUCK))?;
    stream.write_all(b"?")?;
    stream.read_exact(&mut [0])
}
