//! HTTP/1.1 over blocking sockets: many idle connections, and the time from a program's start to its first answer.

use anyhow::{Context, Result, bail};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What to ask.
#[derive(clap::Args)]
pub struct Question {
    /// Server
    #[arg(long)]
    to: SocketAddr,
    /// Path
    #[arg(long, default_value = "/")]
    path: String,
    /// Value of the header `host`
    #[arg(long, default_value = "bench.example")]
    host: String,
    /// More headers, as `name: value`
    #[arg(long)]
    header: Vec<String>,
}

/// Opens connections, asks once on each, and keeps them.
#[derive(clap::Args)]
pub struct HoldArgs {
    #[command(flatten)]
    question: Question,
    /// How many
    #[arg(long)]
    conns: usize,
}

/// Starts a program and waits until it answers with 200.
#[derive(clap::Args)]
pub struct StartArgs {
    #[command(flatten)]
    question: Question,
    /// The program
    #[arg(last = true, required = true)]
    program: Vec<String>,
}

const PATIENCE: Duration = Duration::from_secs(20);

impl Question {
    /// The status of the answer; its body is read.
    fn ask(&self, stream: &mut TcpStream) -> std::io::Result<u16> {
        let Self { path, host, header, .. } = self;
        let more: String = header.iter().map(|line| format!("{line}\r\n")).collect();
        stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: {host}\r\n{more}\r\n").as_bytes())?;
        let mut read = Vec::new();
        let mut buffer = [0; 8192];
        loop {
            let n = stream.read(&mut buffer)?;
            if n == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            read.extend_from_slice(&buffer[..n]);
            let text = String::from_utf8_lossy(&read);
            let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
            let length = head.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
            });
            if body.len() >= length.unwrap_or(0) {
                let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
                return Ok(status.unwrap_or(0));
            }
        }
    }

    fn open(&self) -> std::io::Result<TcpStream> {
        let stream = TcpStream::connect_timeout(&self.to, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    }
}

/// Says `holding N` and goes on until it is killed.
///
/// # Errors
/// A connection is refused, or not answered with 200.
pub fn hold(args: &HoldArgs) -> Result<()> {
    let mut held = Vec::with_capacity(args.conns);
    for n in 0..args.conns {
        let mut stream = args.question.open().with_context(|| format!("connection {n}"))?;
        let status = args.question.ask(&mut stream).with_context(|| format!("request {n}"))?;
        if status != 200 {
            bail!("request {n} got {status}");
        }
        held.push(stream);
    }
    println!("holding {}", held.len());
    loop {
        std::thread::park();
    }
}

/// Prints the milliseconds that it took, and ends the program.
///
/// # Errors
/// It cannot be started or does not answer.
pub fn start(args: &StartArgs) -> Result<()> {
    let begin = Instant::now();
    let mut child = Command::new(&args.program[0])
        .args(&args.program[1..])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {}", args.program[0]))?;
    let taken = loop {
        let answered = args.question.open().and_then(|mut stream| args.question.ask(&mut stream));
        if answered.is_ok_and(|status| status == 200) {
            break Some(begin.elapsed());
        }
        if begin.elapsed() > PATIENCE || child.try_wait().is_ok_and(|ended| ended.is_some()) {
            break None;
        }
        std::thread::sleep(Duration::from_micros(500));
    };
    let _ = child.kill();
    let _ = child.wait();
    let taken = taken.with_context(|| format!("{} does not answer", args.program[0]))?;
    println!("{}", taken.as_secs_f64() * 1e3);
    Ok(())
}
