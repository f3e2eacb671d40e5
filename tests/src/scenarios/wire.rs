//! Traffic between nodes: what is on the wire, and what both ends see.

use super::shop::{self, open};
use super::{Scenario, scenario};
use crate::bed::capture::{self, Segment};
use crate::bed::mesh::MeshOptions;
use crate::bed::net::Link;
use crate::bed::{Load, Testbed, Topology, net, wait};
use anyhow::{Context, Result, ensure};
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("between nodes, what pods say in the clear is TLS to port 15008 on the wire", 60, encrypted),
    scenario("both ends see each other's true addresses, over IPv4, IPv6 and mapped sockets", 60, addresses),
    scenario("service addresses, named ports and headless names lead to the right pod", 60, services),
    scenario("traffic to and from outside the mesh passes in the clear with its addresses", 60, outside),
    scenario("a pod that calls itself is left alone", 60, itself),
    scenario("half-closed connections deliver every byte both ways", 60, half_close),
    scenario("a reset on one side is a reset on the other", 60, reset),
    scenario("large transfers arrive unharmed", 90, large),
    scenario("a thousand connections are open at once and all alive", 90, thousand),
    scenario("over a lossy link with a small MTU everything arrives", 120, lossy),
    scenario("a server that does not listen is a refusal, not a silence", 60, nobody),
    scenario(
        "a tunnel that broke unseen is replaced, and the connection that met it works",
        60,
        broken_tunnel,
    ),
    scenario("datagrams other than DNS are left alone, with both ends' addresses", 60, datagrams),
];

/// No application byte and no application port is on the wire; TLS to 15008 is.
fn check_wire(segments: &[Segment], words: &[u8]) -> Result<()> {
    ensure!(!capture::carries(segments, words), "the plaintext is on the wire");
    let hbone = |segment: &&Segment| segment.to.port() == 15_008 || segment.from.port() == 15_008;
    let tunnel: Vec<_> = segments.iter().filter(hbone).collect();
    ensure!(tunnel.iter().any(|s| s.syn), "nobody opened a connection to port 15008");
    // TLS record types: handshake 0x16, application data 0x17 (RFC 8446, section 5.1).
    ensure!(tunnel.iter().any(|s| s.payload.starts_with(&[0x16, 0x03])), "no TLS handshake to port 15008");
    ensure!(tunnel.iter().any(|s| s.payload.starts_with(&[0x17, 0x03])), "no TLS data to port 15008");
    let bare = segments.iter().find(|s| [8080, 8081].contains(&s.to.port()));
    ensure!(bare.is_none(), "a segment went straight to the application: {:?}", bare.map(|s| (s.from, s.to)));
    Ok(())
}

fn encrypted() -> Result<()> {
    let bed = open()?;
    let words = "only the two of us know";
    let (frontend, backend) = (bed.pod("shop/frontend")?, bed.pod("shop/backend")?);
    for to in [backend.at(8080), backend.at6(8080)] {
        let capture = bed.capture("a")?;
        let outcome = frontend.call(&to.to_string(), &["--send", words, "--half-close"])?;
        ensure!(outcome.ok && outcome.received == words, "{to}: {}", outcome.problem());
        check_wire(&capture.stop()?, words.as_bytes()).with_context(|| format!("to {to}"))?;
    }
    Ok(())
}

fn addresses() -> Result<()> {
    let bed = open()?;
    let (frontend, backend) = (bed.pod("shop/frontend")?, bed.pod("shop/backend")?);
    let (v4, v6) = (backend.at(8081), backend.at6(8081));
    for (to, own) in [(v4, frontend.at(0).ip()), (v6, frontend.at6(0).ip())] {
        let (outcome, seen) = frontend.greeted(&to.to_string())?;
        ensure!(seen.peer.ip() == own, "the server saw {} as its client instead of {own}", seen.peer);
        ensure!(seen.local == to, "the server saw itself as {} instead of {to}", seen.local);
        ensure!(outcome.peer == Some(to), "getpeername said {:?} instead of {to}", outcome.peer);
        ensure!(
            outcome.local.map(|a| a.ip()) == Some(own),
            "getsockname said {:?} instead of {own}",
            outcome.local
        );
    }
    let mapped = frontend.call(&v4.to_string(), &["--mapped", "--lines", "1"])?;
    ensure!(mapped.ok && mapped.peer == Some(v4), "a mapped socket: {:?} {}", mapped.peer, mapped.problem());
    shop::tunnelled(&bed)
}

fn services() -> Result<()> {
    let bed = open()?;
    let frontend = bed.pod("shop/frontend")?;
    let backend = bed.pod("shop/backend")?;
    for to in [
        "10.96.0.10:81",
        "[fd96::10]:81",
        "backend:81",
        "backend.shop:81",
        "backend.shop.svc.cluster.local:81",
    ] {
        let (outcome, seen) = frontend.greeted(to)?;
        ensure!(seen.local.port() == 8081, "{to} led to port {}", seen.local.port());
        ensure!([backend.at(8081), backend.at6(8081)].contains(&seen.local), "{to} led to {}", seen.local);
        let peer = outcome.peer.map(|a| a.to_string()).unwrap_or_default();
        ensure!(["10.96.0.10:81", "[fd96::10]:81"].contains(&&*peer), "getpeername said {peer} for {to}");
    }
    shop::talks(&bed, "shop/frontend", "10.96.0.10:80")?;
    let (_, seen) = frontend.greeted("backend-headless.shop:8081")?;
    ensure!([backend.at(8081), backend.at6(8081)].contains(&seen.local), "headless led to {}", seen.local);
    // A port that the service does not have leads nowhere.
    shop::refused(&bed, "shop/frontend", "10.96.0.10:9999")
}

fn outside() -> Result<()> {
    let bed = open()?;
    let site = bed.pod("outside/site")?;
    let visitor = bed.pod("outside/visitor")?;
    let frontend = bed.pod("shop/frontend")?;
    let backend = bed.pod("shop/backend")?;
    let capture = bed.capture("a")?;
    shop::talks(&bed, "shop/frontend", &site.at(8080).to_string())?;
    for (from, to) in [(frontend, site.at(8081)), (visitor, backend.at(8081)), (visitor, backend.at6(8081))] {
        let (outcome, seen) = from.greeted(&to.to_string())?;
        let own = if to.is_ipv4() { from.at(0).ip() } else { from.at6(0).ip() };
        ensure!(seen.peer.ip() == own, "{to} saw {} instead of {own}", seen.peer);
        ensure!(outcome.peer == Some(to), "getpeername said {:?} instead of {to}", outcome.peer);
    }
    let segments = capture.stop()?;
    ensure!(capture::carries(&segments, b"hello"), "plaintext to outside the mesh is not on the wire");
    ensure!(segments.iter().all(|s| s.to.port() != 15_008), "somebody tunnelled to outside the mesh");
    Ok(())
}

fn itself() -> Result<()> {
    let bed = open()?;
    let backend = bed.pod("shop/backend")?;
    for to in ["127.0.0.1:8081".to_owned(), backend.at(8081).to_string(), backend.at6(8081).to_string()] {
        let (_, seen) = backend.greeted(&to)?;
        ensure!(seen.peer.ip() == seen.local.ip(), "{to}: it saw {} as its client", seen.peer);
    }
    Ok(())
}

fn half_close() -> Result<()> {
    let bed = open()?;
    let backend = bed.pod("shop/backend")?.at(8080).to_string();
    // The client shuts its side down after the last byte and reads to the end: every byte must come back after that.
    let outcome = bed.pod("shop/frontend")?.call(&backend, &["--echo-bytes", "5000000"])?;
    ensure!(outcome.ok && outcome.bytes == 5_000_000, "{} bytes: {}", outcome.bytes, outcome.problem());
    shop::talks(&bed, "shop/frontend", &backend)?;
    shop::tunnelled(&bed)
}

fn reset() -> Result<()> {
    let bed = open()?;
    let (frontend, backend) = (bed.pod("shop/frontend")?, bed.pod("shop/backend")?);
    // The client resets: the server's socket must go, not linger half-open.
    let outcome = frontend.call(&backend.at(8081).to_string(), &["--lines", "1", "--reset"])?;
    ensure!(outcome.ok, "{}", outcome.problem());
    let client = frontend.at(0).ip();
    wait::until_true("server without the reset connection", Duration::from_secs(5), || {
        let open = net::established(&backend.netns)?;
        Ok(!open.iter().any(|(local, remote)| local.port() == 8081 && remote.ip() == client))
    })?;
    shop::tunnelled(&bed)?;
    // The server's process dies with unread data: its kernel resets, and so must the client's socket be.
    let held = frontend.spawn([
        "mesh-tests",
        "tool",
        "call",
        "--to",
        &backend.at(8080).to_string(),
        "--hold-ms",
        "15000",
    ])?;
    wait::until_true("held connection at the server", Duration::from_secs(10), || {
        Ok(net::established(&backend.netns)?.iter().any(|(l, r)| l.port() == 8080 && r.ip() == client))
    })?;
    backend.programs[0].signal(rustix::process::Signal::KILL)?;
    wait::until_true("the client's end of the connection", Duration::from_secs(10), || {
        Ok(held.log().contains("\"stage\":\"held\"") && held.log().contains("\"ok\":false"))
    })
    .with_context(|| format!("the client said {}", held.log()))
}

fn large() -> Result<()> {
    let bed = open()?;
    let backend = bed.pod("shop/backend")?;
    for to in [backend.at(8080), backend.at6(8080)] {
        let outcome = bed.pod("shop/frontend")?.call(&to.to_string(), &["--echo-bytes", "50000000"])?;
        ensure!(
            outcome.ok && outcome.bytes == 50_000_000,
            "{to}: {} bytes: {}",
            outcome.bytes,
            outcome.problem()
        );
    }
    shop::tunnelled(&bed)
}

fn thousand() -> Result<()> {
    let bed = open()?;
    let backend = bed.pod("shop/backend")?;
    let mut load = Load::start(
        bed.pod("shop/frontend")?,
        &backend.at(8080).to_string(),
        &["--shape", "hold", "--conns", "1000"],
    )?;
    load.wait_holding(1000, Duration::from_secs(60))?;
    let client = bed.pod("shop/frontend")?.at(0).ip();
    let open = net::established(&backend.netns)?;
    let seen = open.iter().filter(|(local, remote)| local.port() == 8080 && remote.ip() == client).count();
    // Application and agent each have an end in the pod's namespace; the application's has the client as its peer.
    ensure!(seen >= 1000, "the server has {seen} connections from the client");
    let tunnels = open.iter().filter(|(local, _)| local.port() == 15_008).count();
    ensure!(tunnels > 0 && tunnels < 100, "{tunnels} tunnels for 1000 connections");
    let figures = load.stop()?;
    ensure!(figures.alive == 1000, "only {} were alive: {}", figures.alive, figures.first_error);
    Ok(())
}

fn lossy() -> Result<()> {
    let topology =
        Topology { link: Link { mtu: 1280, loss_percent: 2, delay_ms: 0 }, ..Topology::nodes(&["a", "b"]) };
    let bed = shop::open_with(&topology, &MeshOptions::default())?;
    let backend = bed.pod("shop/backend")?;
    let outcome = bed
        .pod("shop/frontend")?
        .call(&backend.at(8080).to_string(), &["--echo-bytes", "5000000", "--timeout-ms", "15000"])?;
    ensure!(outcome.ok, "{}", outcome.problem());
    many_short(&bed, 20)?;
    shop::tunnelled(&bed)
}

fn many_short(bed: &Testbed, count: usize) -> Result<()> {
    let backend = bed.pod("shop/backend")?.at(8080).to_string();
    (0..count).try_for_each(|_| shop::talks(bed, "shop/frontend", &backend))
}

fn nobody() -> Result<()> {
    let bed = open()?;
    let backend = bed.pod("shop/backend")?;
    shop::refused(&bed, "shop/frontend", &backend.at(9999).to_string())?;
    shop::refused(&bed, "shop/frontend", &backend.at6(9999).to_string())?;
    shop::talks(&bed, "shop/frontend", &backend.at(8080).to_string())?;
    shop::tunnelled(&bed)
}

/// What the server says: the client's address as it sees it.
const UDP_SERVER: &str = "
import socket
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
s.bind(('::', 7000))
while True:
    data, peer = s.recvfrom(2048)
    s.sendto(f'{data.decode()} from {peer[0].removeprefix(\"::ffff:\")} {peer[1]}'.encode(), peer)
";

/// Prints the answer, who sent it, and the own port.
const UDP_CLIENT: &str = "
import socket, sys
s = socket.socket(socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(5)
s.sendto(b'hello', (sys.argv[1], 7000))
data, peer = s.recvfrom(2048)
print(data.decode(), 'by', peer[0], 'to', s.getsockname()[1])
";

fn datagrams() -> Result<()> {
    let bed = open()?;
    let (frontend, backend) = (bed.pod("shop/frontend")?, bed.pod("shop/backend")?);
    let mut server = backend.spawn(["python3", "-c", UDP_SERVER])?;
    wait::until_true("UDP server", Duration::from_secs(10), || {
        ensure!(server.running()?, "it ended: {}", server.log());
        Ok(backend.output(["ss", "-Hlnu"])?.contains(":7000"))
    })?;
    for (to, own) in [(backend.at(0).ip(), frontend.at(0).ip()), (backend.at6(0).ip(), frontend.at6(0).ip())]
    {
        let said = frontend.output(["python3", "-c", UDP_CLIENT, &to.to_string()])?;
        let port = said.trim().rsplit(' ').next().unwrap_or_default();
        let expected = format!("hello from {own} {port} by {to} to {port}");
        ensure!(said.trim() == expected, "the exchange was {said:?} instead of {expected:?}");
    }
    // The mesh has nothing to say about it, and still carries TCP.
    shop::talks(&bed, "shop/frontend", &backend.at(8080).to_string())
}

/// The far end of the tunnel vanishes without a word, as after a reboot: the next connection's CONNECT is what learns of
/// it.
fn broken_tunnel() -> Result<()> {
    let bed = open()?;
    let backend = bed.pod("shop/backend")?;
    let to = backend.at(8080).to_string();
    // Every worker of the agent has its own tunnel, and the kernel chooses the worker.
    let often = || (0..12).try_for_each(|_| shop::talks(&bed, "shop/frontend", &to));
    often()?;
    shop::tunnelled(&bed)?;
    backend.output([
        "sh",
        "-ec",
        "nft add table inet um\n\
         nft add chain inet um out '{ type filter hook output priority 0; }'\n\
         nft add rule inet um out tcp flags rst drop\n\
         ss -HK state established sport = :15008\n\
         nft delete table inet um",
    ])?;
    let open = net::established(&backend.netns)?;
    ensure!(!open.iter().any(|(local, _)| local.port() == 15_008), "the tunnel is still there: {open:?}");
    often()
}
