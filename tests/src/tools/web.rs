//! A tiny HTTP/1.1 service: says who it is and who asked, and may ask another service first.

use super::serve;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

/// The service.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Its name in answers
    #[arg(long)]
    name: String,
    /// Its port
    #[arg(long)]
    port: u16,
    /// Services to ask for each request: host:port
    #[arg(long)]
    ask: Vec<String>,
}

/// Serves without end.
///
/// # Errors
/// The port is taken.
pub fn run(args: &Args) -> Result<()> {
    let listener = serve::listen(args.port)?;
    for stream in listener.incoming().flatten() {
        let args = args.clone();
        std::thread::spawn(move || {
            // The client's end ends the connection; there is nobody to tell.
            let _ = connection(&args, stream);
        });
    }
    Ok(())
}

fn connection(args: &Args, mut stream: TcpStream) -> Result<()> {
    let peer = serve::plain(stream.peer_addr().context("no peer")?);
    stream.set_nodelay(true).context("cannot set nodelay")?;
    let mut reader = BufReader::new(stream.try_clone().context("cannot share a socket")?);
    while let Some(request) = request(&mut reader)? {
        let answers: Vec<Value> = args.ask.iter().map(|to| ask(to)).collect();
        let failed = answers.iter().any(|answer| answer.get("error").is_some());
        let mut body = json!({"service": args.name, "client": peer.ip(), "request": request});
        if !answers.is_empty() {
            body["asked"] = json!(answers);
        }
        let body = format!("{body}\n");
        let status = if failed { "502 Bad Gateway" } else { "200 OK" };
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all((head + &body).as_bytes()).context("the client left")?;
    }
    Ok(())
}

/// Reads one request head (bodies are not supported) and returns its first line.
fn request(reader: &mut impl BufRead) -> Result<Option<String>> {
    let mut first = String::new();
    if reader.read_line(&mut first).context("cannot read")? == 0 {
        return Ok(None);
    }
    let mut line = String::new();
    loop {
        line.clear();
        if reader.read_line(&mut line).context("cannot read")? == 0 || line.trim().is_empty() {
            return Ok(Some(first.trim().to_owned()));
        }
    }
}

fn ask(to: &str) -> Value {
    match try_ask(to) {
        Ok(body) => serde_json::from_str(&body).unwrap_or(Value::String(body)),
        Err(error) => json!({"error": format!("{to}: {error:#}")}),
    }
}

fn try_ask(to: &str) -> Result<String> {
    let address = to.to_socket_addrs().context("cannot resolve")?.next().context("no address")?;
    let patience = Duration::from_secs(5);
    let mut stream = TcpStream::connect_timeout(&address, patience).context("cannot connect")?;
    stream.set_read_timeout(Some(patience)).context("cannot set a timeout")?;
    write!(stream, "GET / HTTP/1.1\r\nHost: {to}\r\n\r\n").context("cannot send")?;
    let mut reader = BufReader::new(stream);
    let mut length = 0;
    let mut line = String::new();
    loop {
        line.clear();
        if reader.read_line(&mut line).context("cannot read")? == 0 {
            anyhow::bail!("it closed the connection");
        }
        if line.trim().is_empty() {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().context("bad length")?;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).context("the answer is cut short")?;
    Ok(String::from_utf8_lossy(&body).into_owned())
}
