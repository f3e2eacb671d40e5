//! The small formats of the agent; the first byte says which. Each has too little in it for a target of its own.
//!
//! 0: the PROXY header that the agent writes, read back by the protocol's text (HAProxy's `proxy-protocol.txt`, 2.2).
//! 1: `resolv.conf`. 2: what somebody asks `why`, on the admin port.
#![no_main]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use libfuzzer_sys::fuzz_target;
use mesh_core::identity::SpiffeId;
use mesh_core::why::Question;
use mesh_node::dns::resolv;
use mesh_node::proxy::proxy_header;

fuzz_target!(|data: &[u8]| {
    let Some((kind, rest)) = data.split_first() else { return };
    match kind % 3 {
        0 => header(rest),
        1 => nameservers(rest),
        _ => question(rest),
    }
});

/// Input: two addresses with ports, each IPv4 or IPv6 by a bit of the first byte; the rest is an identity.
fn header(bytes: &[u8]) {
    let Some((ends, rest)) = bytes.split_first_chunk::<37>() else { return };
    let address = |at: usize, is_v6: bool| {
        let (ip, port) = ends[at..at + 18].split_at(16);
        let ip: [u8; 16] = ip.try_into().expect("16 bytes");
        let v4: [u8; 4] = ip[..4].try_into().expect("4 bytes");
        let ip = if is_v6 { IpAddr::from(Ipv6Addr::from(ip)) } else { IpAddr::from(Ipv4Addr::from(v4)) };
        SocketAddr::new(ip, u16::from_be_bytes([port[0], port[1]]))
    };
    let (source, destination) = (address(1, ends[0] & 1 == 1), address(19, ends[0] & 2 == 2));
    let identity = std::str::from_utf8(rest).ok().and_then(|text| text.parse::<SpiffeId>().ok());
    let written = proxy_header::encode(source, destination, identity.as_ref());
    let (from, to, name) = read(&written).expect("what we write is a PROXY header");
    let canonical = |a: SocketAddr| SocketAddr::new(a.ip().to_canonical(), a.port());
    assert_eq!((from, to), (canonical(source), canonical(destination)));
    assert_eq!(name, identity.map(|id| id.to_string()));
}

/// A reader that knows the protocol only from its text.
fn read(header: &[u8]) -> Option<(SocketAddr, SocketAddr, Option<String>)> {
    let body = header.strip_prefix(b"\r\n\r\n\0\r\nQUIT\n")?;
    let [0x21, family, high, low, body @ ..] = body else { return None };
    if body.len() != usize::from(u16::from_be_bytes([*high, *low])) {
        return None;
    }
    let size = match family {
        0x11 => 4,
        0x21 => 16,
        _ => return None,
    };
    let ip = |bytes: &[u8]| match <[u8; 4]>::try_from(bytes) {
        Ok(v4) => Some(IpAddr::from(v4)),
        Err(_) => Some(IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?).to_canonical()),
    };
    let (addresses, rest) = body.split_at_checked(2 * size)?;
    let ([a, b, c, d], fields) = rest.split_first_chunk::<4>()?;
    let from = SocketAddr::new(ip(&addresses[..size])?, u16::from_be_bytes([*a, *b]));
    let to = SocketAddr::new(ip(&addresses[size..])?, u16::from_be_bytes([*c, *d]));
    let name = match fields {
        [] => None,
        [0xD0, high, low, text @ ..] => {
            if text.len() != usize::from(u16::from_be_bytes([*high, *low])) {
                return None;
            }
            Some(String::from_utf8(text.to_vec()).ok()?)
        }
        _ => return None,
    };
    Some((from, to, name))
}

fn nameservers(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    for server in resolv::nameservers(&text) {
        assert!(text.contains(&server.ip().to_string()) || server.is_ipv6(), "{server} is not in the file");
    }
}

/// Input: two lines, source and destination.
fn question(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let (src, dst) = text.split_once('\n').unwrap_or((&text, ""));
    if let Ok(question) = Question::new(src, dst, None) {
        assert!(question.src == src && !question.dst.is_empty() && question.port != Some(0));
        assert!(dst.contains(&question.dst), "{question:?} is not what was asked");
        let with_port = |port: u16| Question::new(src, dst, Some(port)).is_ok();
        match question.port {
            Some(port) => assert!(with_port(port) && !with_port(port ^ 1), "one port is one port"),
            None => assert!(with_port(80)),
        }
    }
}
