//! What strangers and broken peers send.

use super::shop::{open, peer_authentication, refused, talks};
use super::{Scenario, scenario};
use crate::bed::{Pod, Testbed, net, wait};
use anyhow::{Context, Result, ensure};
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("plaintext and garbage to port 15008 get nothing and hurt nobody", 60, garbage),
    scenario("TLS to port 15008 without a client certificate is refused", 60, no_certificate),
    scenario("capture ports cannot be reached from outside the pod", 90, capture_ports),
    scenario(
        "a pod that dials the mesh's own listeners, or has them dialled, gets nothing and starts no loop",
        90,
        loops,
    ),
    scenario("a flood of connections from outside leaves the mesh working", 90, flood),
];

/// Both agents live, and friends still talk.
pub(super) fn unhurt(bed: &mut Testbed) -> Result<()> {
    for name in ["a", "b"] {
        let node = bed.node_mut(name)?;
        ensure!(node.agent_mut(0)?.running()?, "the agent on {name} ended: {}", node.agent(0)?.log());
    }
    let to = bed.pod("shop/backend")?.at(8080).to_string();
    talks(bed, "shop/frontend", &to)
}

/// Ports on which the agent listens in backend's namespace: all but the application's.
pub(super) fn agents_ports(backend: &Pod) -> Result<Vec<u16>> {
    let all = net::listening_ports(&backend.netns)?;
    let ports: Vec<u16> = all.into_iter().filter(|port| !(8080..=8083).contains(port)).collect();
    ensure!(ports.len() >= 3, "the agent's listeners are not seen: {ports:?}");
    Ok(ports)
}

/// Neither from inside nor by a peer's CONNECT may a listener of the agent be reached: the agent would connect to
/// itself.
fn loops() -> Result<()> {
    let mut bed = open()?;
    let backend = bed.pod("shop/backend")?;
    let own = agents_ports(backend)?;
    let descriptors = |bed: &Testbed| -> Result<usize> {
        let pid = bed.node("b")?.agent(0)?.pid();
        Ok(std::fs::read_dir(format!("/proc/{pid}/fd"))?.count())
    };
    let before = descriptors(&bed)?;
    for port in own {
        for (from, to) in [
            ("shop/backend", format!("127.0.0.1:{port}")),
            ("shop/backend", backend.at(port).to_string()),
            ("shop/frontend", backend.at(port).to_string()),
        ] {
            let outcome =
                bed.pod(from)?.call(&to, &["--send", "x", "--half-close", "--timeout-ms", "3000"])?;
            ensure!(outcome.received.is_empty(), "{from} got {:?} from {to}", outcome.received);
        }
    }
    let after = descriptors(&bed)?;
    ensure!(after < before + 50, "the agent on b has {after} descriptors, {before} before");
    unhurt(&mut bed)
}

fn garbage() -> Result<()> {
    let mut bed = open()?;
    let (visitor, backend) = (bed.pod("outside/visitor")?, bed.pod("shop/backend")?);
    let long = "GET / HTTP/1.1\r\nX: ".to_owned() + &"x".repeat(100_000) + "\r\n\r\n";
    let words = [
        "CONNECT 10.30.2.1:8080 HTTP/1.1\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "\u{16}\u{3}\u{1}\u{7f}\u{7f}",
        &long,
    ];
    for to in [backend.at(15_008), backend.at6(15_008)] {
        for word in words {
            let outcome =
                visitor.call(&to.to_string(), &["--send", word, "--half-close", "--timeout-ms", "8000"])?;
            // A TLS alert (record type 21) is all that may come back.
            let received = outcome.received.as_bytes();
            ensure!(
                received.is_empty() || received[0] == 21,
                "{:?} was answered with {:?}",
                &word[..5],
                outcome.received
            );
        }
    }
    unhurt(&mut bed)
}

fn no_certificate() -> Result<()> {
    let mut bed = open()?;
    let to = bed.pod("shop/backend")?.at(15_008).to_string();
    let visitor = bed.pod("outside/visitor")?;
    // TLS 1.3 tells a client of its missing certificate only after the handshake: ask for something, and stay after the
    // end of input (-ign_eof) until the server has closed.
    let line = format!(
        "(printf 'PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n'; cat /dev/null) | timeout 10 openssl s_client -connect {to} -alpn h2 -tls1_3 -ign_eof 2>&1"
    );
    let out = visitor.run(["sh", "-c", &line])?.out;
    ensure!(out.contains("certificate required") || out.contains("alert"), "no alert: {out}");
    ensure!(!out.contains("CONNECTION ESTABLISHED"), "{out}");
    unhurt(&mut bed)
}

fn capture_ports() -> Result<()> {
    let mut bed = open()?;
    bed.apply("peer", &peer_authentication("STRICT"))?;
    let backend = bed.pod("shop/backend")?;
    let to = backend.at(8080).to_string();
    wait::until("STRICT in force", Duration::from_secs(10), || {
        refused(&bed, "outside/visitor", &to).map(Some)
    })?;
    // Every port that listens in the pod's namespace, the application's own and the agent's.
    let ports = listening_ports(&bed)?;
    ensure!(ports.len() > 4, "the agent has no listeners in the pod: {ports:?}");
    for port in ports {
        let outcome = bed.pod("outside/visitor")?.call(
            &backend.at(port).to_string(),
            &["--send", "x\n", "--lines", "1", "--timeout-ms", "3000"],
        )?;
        ensure!(!outcome.ok, "port {port} answered {:?} in the clear", outcome.received);
    }
    unhurt(&mut bed)
}

fn listening_ports(bed: &Testbed) -> Result<Vec<u16>> {
    let text = bed.pod("shop/backend")?.output(["ss", "-Hltn"])?;
    let mut ports: Vec<u16> = text
        .lines()
        .filter_map(|line| line.split_whitespace().nth(3)?.rsplit(':').next()?.parse().ok())
        .collect();
    ports.sort_unstable();
    ports.dedup();
    Ok(ports)
}

fn flood() -> Result<()> {
    let mut bed = open()?;
    let to = bed.pod("shop/backend")?.at(15_008).to_string();
    // Connections that say nothing, from a stranger, while friends want to talk.
    let visitor = bed.pod("outside/visitor")?;
    let script = format!(
        "import socket,time\nh,p='{}'.rsplit(':',1)\ns=[]\nfor i in range(2000):\n  c=socket.socket(); c.setblocking(False)\n  c.connect_ex((h,int(p))); s.append(c)\nprint('open',flush=True)\ntime.sleep(20)",
        to
    );
    let flood = visitor.spawn(["python3", "-c", &script])?;
    wait::until_true("flood", Duration::from_secs(15), || Ok(flood.log().contains("open")))
        .with_context(|| flood.log())?;
    let backend = bed.pod("shop/backend")?.at(8080).to_string();
    for _ in 0..10 {
        talks(&bed, "shop/frontend", &backend)?;
    }
    drop(flood);
    unhurt(&mut bed)
}
