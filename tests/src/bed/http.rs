//! A minimal HTTP GET, for admin endpoints and for clients that must live in another namespace.
//!
//! Written by hand because it has to speak over sockets that were made elsewhere and must not share code with the
//! product it looks at.

use anyhow::{Context, Result, bail};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(5);

/// GET over a unix socket; the body of a 200.
///
/// # Errors
/// No answer, or another status (named with its body).
pub fn get_unix(socket: &Path, path: &str) -> Result<String> {
    let stream =
        UnixStream::connect(socket).with_context(|| format!("cannot connect to {}", socket.display()))?;
    stream.set_read_timeout(Some(PATIENCE)).context("cannot set a timeout")?;
    ask(stream, "GET", path)
}

/// A request with any method over a unix socket.
///
/// # Errors
/// As [`get_unix`].
pub fn ask_unix(socket: &Path, method: &str, path: &str) -> Result<String> {
    let stream =
        UnixStream::connect(socket).with_context(|| format!("cannot connect to {}", socket.display()))?;
    stream.set_read_timeout(Some(PATIENCE)).context("cannot set a timeout")?;
    ask(stream, method, path)
}

/// GET over TCP, from the namespace of the calling thread; the body of a 200.
///
/// # Errors
/// As [`get_unix`].
pub fn get_tcp(to: SocketAddr, path: &str) -> Result<String> {
    let stream =
        TcpStream::connect_timeout(&to, PATIENCE).with_context(|| format!("cannot connect to {to}"))?;
    stream.set_read_timeout(Some(PATIENCE)).context("cannot set a timeout")?;
    ask(stream, "GET", path)
}

fn ask(mut stream: impl Read + Write, method: &str, path: &str) -> Result<String> {
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).context("cannot send the request")?;
    let mut raw = Vec::new();
    stream.read_to_end(&mut raw).context("cannot read the answer")?;
    parse(&raw).with_context(|| format!("{method} {path}"))
}

fn parse(raw: &[u8]) -> Result<String> {
    let end = raw.windows(4).position(|w| w == b"\r\n\r\n").context("the answer has no end of headers")?;
    let head = String::from_utf8_lossy(&raw[..end]).into_owned();
    let body = &raw[end + 4..];
    let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    let body = if chunked { unchunk(body)? } else { body.to_vec() };
    let body = String::from_utf8_lossy(&body).into_owned();
    let status = head.split(' ').nth(1).unwrap_or_default();
    if status != "200" {
        bail!("status {status}: {}", body.trim());
    }
    Ok(body)
}

fn unchunk(mut rest: &[u8]) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end = rest.windows(2).position(|w| w == b"\r\n").context("a chunk without a size")?;
        let size = String::from_utf8_lossy(&rest[..end]).into_owned();
        let size = usize::from_str_radix(size.split(';').next().unwrap_or_default().trim(), 16)
            .with_context(|| format!("bad chunk size {size:?}"))?;
        rest = &rest[end + 2..];
        if size == 0 {
            return Ok(body);
        }
        if rest.len() < size + 2 {
            bail!("the answer ends inside a chunk");
        }
        body.extend_from_slice(&rest[..size]);
        rest = &rest[size + 2..];
    }
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn chunked_and_plain_bodies_read_alike() {
        assert_eq!(parse(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi").unwrap(), "hi");
        let chunked =
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n1;x\r\n!\r\n0\r\n\r\n";
        assert_eq!(parse(chunked).unwrap(), "hi!");
        assert!(parse(b"HTTP/1.1 503 No\r\n\r\nwhy").unwrap_err().to_string().contains("why"));
    }
}
