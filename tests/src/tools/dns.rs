//! A DNS server with fixed A records, standing for the cluster's own; it logs every question that reaches it.

use anyhow::{Context, Result};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};

/// What it knows.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// `NAME=ADDRESS`; may be given more than once
    #[arg(long, value_parser = parse_record)]
    record: Vec<(String, Ipv4Addr)>,
    /// Port to serve
    #[arg(long, default_value_t = 53)]
    port: u16,
}

fn parse_record(text: &str) -> Result<(String, Ipv4Addr), String> {
    let (name, address) = text.split_once('=').ok_or("a record is NAME=ADDRESS")?;
    Ok((name.to_ascii_lowercase(), address.parse().map_err(|e| format!("{address:?}: {e}"))?))
}

/// Serves UDP and TCP without end.
///
/// # Errors
/// The port is taken.
pub fn run(args: &Args) -> Result<()> {
    let udp = UdpSocket::bind(("0.0.0.0", args.port)).context("cannot bind UDP")?;
    let tcp = TcpListener::bind(("0.0.0.0", args.port)).context("cannot bind TCP")?;
    let over_tcp = args.clone();
    std::thread::spawn(move || {
        for stream in tcp.incoming().flatten() {
            let args = over_tcp.clone();
            std::thread::spawn(move || serve_tcp(&args, stream));
        }
    });
    let mut buffer = [0; 4096];
    loop {
        let Ok((read, from)) = udp.recv_from(&mut buffer) else { continue };
        if let Some(answer) = answer(args, &buffer[..read], "udp") {
            let _ = udp.send_to(&answer, from);
        }
    }
}

fn serve_tcp(args: &Args, mut stream: std::net::TcpStream) {
    let mut length = [0; 2];
    while stream.read_exact(&mut length).is_ok() {
        let mut query = vec![0; usize::from(u16::from_be_bytes(length))];
        if stream.read_exact(&mut query).is_err() {
            return;
        }
        let Some(answer) = answer(args, &query, "tcp") else { return };
        let Ok(size) = u16::try_from(answer.len()) else { return };
        if stream.write_all(&[&size.to_be_bytes()[..], &answer].concat()).is_err() {
            return;
        }
    }
}

/// Answers one query: NOERROR with the record, or NXDOMAIN (RFC 1035).
fn answer(args: &Args, query: &[u8], over: &str) -> Option<Vec<u8>> {
    let mut at = 12;
    let mut labels = Vec::new();
    loop {
        let length = usize::from(*query.get(at)?);
        at += 1;
        if length == 0 {
            break;
        }
        labels.push(String::from_utf8_lossy(query.get(at..at + length)?).to_ascii_lowercase());
        at += length;
    }
    let kind = u16::from_be_bytes(query.get(at..at + 2)?.try_into().ok()?);
    let question = query.get(12..at + 4)?;
    let name = labels.join(".");
    println!("{over} {name} {kind}");
    let known: Vec<Ipv4Addr> =
        args.record.iter().filter(|(n, _)| *n == name).map(|(_, address)| *address).collect();
    let found: &[Ipv4Addr] = if kind == 1 { &known } else { &[] };
    let code = if known.is_empty() { 3 } else { 0 };
    let mut out = query.get(..2)?.to_vec();
    out.extend([0x81, 0x80 | code, 0, 1]);
    out.extend(u16::try_from(found.len()).ok()?.to_be_bytes());
    out.extend([0, 0, 0, 0]);
    out.extend(question);
    for address in found {
        out.extend([0xc0, 0x0c, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4]);
        out.extend(address.octets());
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_name_has_its_address_and_another_does_not_exist() {
        let args = Args { record: vec![("a.example".to_owned(), Ipv4Addr::new(192, 0, 2, 1))], port: 0 };
        let ask = |label: u8| {
            let mut query = vec![7, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, label, 7];
            query.extend(b"example\0\0\x01\0\x01");
            answer(&args, &query, "udp").unwrap()
        };
        assert!(ask(b'a').ends_with(&[192, 0, 2, 1]));
        assert_eq!(ask(b'b')[3] & 0x0f, 3);
    }
}
