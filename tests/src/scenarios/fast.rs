//! The fast path: two pods of one node over plain kernel TCP.

use super::shop::{self, ONLY_FRONTEND, open, open_with, talks};
use super::{Scenario, scenario};
use crate::bed::mesh::MeshOptions;
use crate::bed::{Load, Testbed, Topology, net, netns, run, wait};
use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("on one node, the second connection goes straight through the kernel", 60, direct),
    scenario("on the fast path, no byte goes through the agent", 60, no_bytes),
    scenario("with sameNode tunnel, pods of one node use the tunnel", 60, tunnel),
    scenario("a policy change ends a fast-path connection that it denies", 60, policy),
    scenario("a fast-path connection notices neither a crash nor an upgrade of the agent", 120, undisturbed),
    scenario(
        "direct connections work beside a thousand that the agent carries between the same pods",
        90,
        beside,
    ),
    scenario("a waypoint-less pair that policy denies never gets the fast path", 60, denied),
    scenario(
        "a revoked certificate ends the fast-path connections of its identity and no others",
        90,
        revoked,
    ),
    scenario("an expired certificate ends the fast-path connections of its identity", 120, expired),
    scenario("a pair whose packets a masquerading node changes goes back to the tunnel", 90, masqueraded),
    scenario("a pair between which only port 15008 is open goes back to the tunnel", 90, only_hbone),
    scenario(
        "on a shared segment an ARP spoofer gets no plaintext of pods that would talk directly",
        90,
        spoofed,
    ),
];

/// The client beside the server.
const LOCAL: &str = "shop/local";

/// Whether the client's kernel shows a connection straight to the server's address: on the tunnel path the client's
/// socket leads to a listener inside its own pod instead.
pub(super) fn is_direct(bed: &Testbed, from: &str, to: SocketAddr) -> Result<bool> {
    Ok(net::established(&bed.pod(from)?.netns)?.iter().any(|(_, remote)| *remote == to))
}

/// Holds a connection open and says whether it is direct.
pub(super) fn direct_now(bed: &Testbed, from: &str, to: SocketAddr) -> Result<bool> {
    let local = bed.pod(from)?;
    let argv = ["mesh-tests", "tool", "call", "--to", &to.to_string(), "--send", "x", "--hold-ms", "10000"];
    let mut held = local.spawn(argv)?;
    let direct = wait::until("open connection", Duration::from_secs(10), || {
        let open = net::established(&local.netns)?;
        let captured = open.iter().any(|(own, remote)| own.ip() == remote.ip());
        Ok((is_direct(bed, from, to)? || captured).then_some(!captured))
    })?;
    held.kill();
    // The next look must not see this one.
    wait::until_true("end of a connection", Duration::from_secs(10), || {
        Ok(net::established(&local.netns)?
            .iter()
            .all(|(own, remote)| *remote != to && own.ip() != remote.ip()))
    })?;
    Ok(direct)
}

/// Connects until the pair is on the fast path.
pub(super) fn warm(bed: &Testbed, from: &str, to: SocketAddr) -> Result<()> {
    wait::until_true("fast path", Duration::from_secs(10), || direct_now(bed, from, to))
}

fn direct() -> Result<()> {
    let bed = open()?;
    let backend = bed.pod("shop/backend")?;
    for to in [backend.at(8081), backend.at6(8081)] {
        ensure!(!direct_now(&bed, LOCAL, to)?, "the first connection to {to} did not go through the tunnel");
        let (_, first) = bed.pod("shop/local")?.greeted(&to.to_string())?;
        warm(&bed, LOCAL, to)?;
        let (outcome, second) = bed.pod("shop/local")?.greeted(&to.to_string())?;
        ensure!(
            first.peer.ip() == second.peer.ip(),
            "the server saw {} and then {}",
            first.peer,
            second.peer
        );
        ensure!(outcome.peer == Some(to) && second.local == to, "{:?} {}", outcome.peer, second.local);
    }
    Ok(())
}

fn no_bytes() -> Result<()> {
    let bed = open()?;
    let to = bed.pod("shop/backend")?.at(8082);
    let local = bed.pod("shop/local")?;
    warm(&bed, LOCAL, to)?;
    let node = bed.node("b")?;
    let before = node.agent(0)?.cpu_seconds()?;
    let argv = ["--to".to_owned(), to.to_string(), "--shape".to_owned(), "bulk".to_owned()];
    let figures = crate::bed::load::measure(local, None, &argv, 2.0)?;
    let used = node.agent(0)?.cpu_seconds()? - before;
    #[expect(clippy::cast_precision_loss, reason = "gigabytes")]
    let gigabytes = figures.bytes as f64 / 1e9;
    ensure!(gigabytes > 0.2, "only {gigabytes:.2} GB in two seconds: {}", figures.first_error);
    // A proxy that carried them would need well above 0.3 s for each gigabyte.
    ensure!(used < 0.05 + 0.05 * gigabytes, "the agent used {used:.2} s of CPU for {gigabytes:.1} GB");
    Ok(())
}

fn tunnel() -> Result<()> {
    let bed = open_with(&Topology::nodes(&["a", "b"]), &MeshOptions::agent(&["--same-node", "tunnel"]))?;
    let backend = bed.pod("shop/backend")?;
    for _ in 0..5 {
        ensure!(!direct_now(&bed, LOCAL, backend.at(8080))?, "the pair uses the fast path");
    }
    let (_, seen) = bed.pod("shop/local")?.greeted(&backend.at(8081).to_string())?;
    ensure!(seen.peer.ip() == bed.pod("shop/local")?.at(0).ip(), "the server saw {}", seen.peer);
    Ok(())
}

fn policy() -> Result<()> {
    let mut bed = open()?;
    let to = bed.pod("shop/backend")?.at(8080);
    warm(&bed, LOCAL, to)?;
    let mut load = Load::start(
        bed.pod("shop/local")?,
        &to.to_string(),
        &["--shape", "pp", "--conns", "2", "--pause-ms", "2"],
    )?;
    wait::until_true("fast-path connections", Duration::from_secs(5), || is_direct(&bed, LOCAL, to))?;
    // A policy that changes nothing for the pair leaves it alone.
    bed.apply("policy", ONLY_FRONTEND)?;
    run::pause(Duration::from_secs(2))?;
    ensure!(load.running()?, "an allowed fast-path connection was cut");
    bed.apply("policy", &ONLY_FRONTEND.replace("sa/frontend", "sa/nobody"))?;
    wait::until_true("end of the denied connections", Duration::from_secs(10), || Ok(!load.running()?))?;
    let figures = load.figures()?;
    ensure!(figures.errors == 2, "{} connections were cut: {}", figures.errors, figures.first_error);
    shop::refused(&bed, "shop/local", &to.to_string())
}

fn undisturbed() -> Result<()> {
    let mut bed = open()?;
    let to = bed.pod("shop/backend")?.at(8080);
    warm(&bed, LOCAL, to)?;
    let load = Load::start(
        bed.pod("shop/local")?,
        &to.to_string(),
        &["--shape", "pp", "--conns", "4", "--pause-ms", "1"],
    )?;
    wait::until_true("fast-path connections", Duration::from_secs(5), || is_direct(&bed, LOCAL, to))?;
    bed.kill_agent("b")?;
    run::pause(Duration::from_secs(5))?;
    bed.start_agent("b", &MeshOptions::default())?;
    bed.wait_agent_ready("b")?;
    bed.start_agent("b", &MeshOptions::default())?;
    bed.wait_agent_ready("b")?;
    bed.node("b")?.agent(0)?.signal(Signal::TERM)?;
    run::pause(Duration::from_secs(2))?;
    let figures = load.stop()?;
    ensure!(figures.errors == 0 && figures.alive == 4, "{} failed: {}", figures.errors, figures.first_error);
    // A gap of several round trips would show as one long one.
    ensure!(figures.max_us < 1e6, "a round trip took {:.0} ms", figures.max_us / 1e3);
    Ok(())
}

/// The agent connects to the application from the client's address: its ports must not be those that the client's
/// kernel picks for direct connections.
fn beside() -> Result<()> {
    let mut bed = open_with(&Topology::nodes(&["a", "b"]), &MeshOptions::agent(&["--same-node", "tunnel"]))?;
    let to = bed.pod("shop/backend")?.at(8080);
    let mut held =
        Load::start(bed.pod("shop/local")?, &to.to_string(), &["--shape", "hold", "--conns", "1000"])?;
    held.wait_holding(1000, Duration::from_secs(60))?;
    bed.start_agent("b", &MeshOptions::default())?;
    bed.wait_agent_ready("b")?;
    bed.node("b")?.agent(0)?.signal(Signal::TERM)?;
    wait::until_true("fast path", Duration::from_secs(10), || {
        let local = bed.pod("shop/local")?;
        let one = ["mesh-tests", "tool", "call", "--to", &to.to_string(), "--hold-ms", "5000"];
        let mut one = local.spawn(one)?;
        let direct =
            wait::until_true("direct connection", Duration::from_millis(500), || is_direct(&bed, LOCAL, to));
        one.kill();
        Ok(direct.is_ok())
    })?;
    let argv = ["--to", &to.to_string(), "--shape", "crr", "--conns", "16"].map(str::to_owned);
    let figures = crate::bed::load::measure(bed.pod("shop/local")?, None, &argv, 3.0)?;
    ensure!(
        figures.ops > 1000 && figures.errors == 0,
        "{} of {} failed: {}",
        figures.errors,
        figures.ops,
        figures.first_error
    );
    let held = held.stop()?;
    ensure!(held.alive == 1000, "only {} held connections are alive: {}", held.alive, held.first_error);
    Ok(())
}

fn denied() -> Result<()> {
    let mut bed = open()?;
    bed.apply("policy", &ONLY_FRONTEND.replace("sa/frontend", "sa/other"))?;
    let to = bed.pod("shop/backend")?.at(8080);
    wait::until("policy in force", Duration::from_secs(10), || {
        shop::refused(&bed, "shop/local", &to.to_string()).map(Some)
    })?;
    for _ in 0..5 {
        shop::refused(&bed, "shop/local", &to.to_string())?;
    }
    talks(&bed, "shop/other", &to.to_string())
}

const NEIGHBOUR: &str = "
apiVersion: v1
kind: Pod
metadata: {name: neighbour, namespace: shop}
spec: {nodeName: b, serviceAccountName: other, containers: [{name: main, image: none}]}
";

/// Two connections of a pod over the fast path that are in use all the time.
fn hold_direct(bed: &Testbed, from: &str, to: SocketAddr) -> Result<Load> {
    warm(bed, from, to)?;
    let options = ["--shape", "pp", "--conns", "2", "--pause-ms", "2"];
    let load = Load::start(bed.pod(from)?, &to.to_string(), &options)?;
    wait::until_true("fast-path connections", Duration::from_secs(5), || is_direct(bed, from, to))?;
    Ok(load)
}

/// A revocation list of the mesh's own CA that names the certificate which a node has for an identity, by openssl.
fn revocation_list(bed: &Testbed, node: &str, identity: &str) -> Result<Vec<u8>> {
    let dump: serde_json::Value = serde_json::from_str(&bed.admin(node, "/config_dump")?)?;
    let certificates = dump["certificates"].as_array().context("/config_dump has no certificates")?;
    let found = certificates.iter().find(|c| c["identity"].as_str().is_some_and(|id| id.ends_with(identity)));
    let dir = bed.dir.join("revoke");
    std::fs::create_dir_all(&dir)?;
    let file = |name: &str| dir.join(name).to_string_lossy().into_owned();
    let pem =
        found.and_then(|c| c["certChain"][0]["pem"].as_str()).context("no certificate for the identity")?;
    std::fs::write(file("leaf.pem"), pem)?;
    let authority = bed.state_dir().join("ca/1");
    let authority = |name: &str| authority.join(name).to_string_lossy().into_owned();
    std::fs::write(file("index.txt"), "")?;
    std::fs::write(file("number"), "01")?;
    let config = format!(
        "[ca]\ndefault_ca = mesh\n[mesh]\ndatabase = {}\ncrlnumber = {}\ndefault_md = sha256\n\
         default_crl_days = 1\ncrl_extensions = extensions\n[extensions]\nauthorityKeyIdentifier = keyid\n",
        file("index.txt"),
        file("number")
    );
    std::fs::write(file("config"), config)?;
    let (certificate, key) = (authority("ca-cert.pem"), authority("ca-key.pem"));
    let openssl = |args: [&str; 2]| {
        let config = file("config");
        let common = ["ca", "-config", &config, "-cert", &certificate, "-keyfile", &key];
        netns::command("openssl", common.into_iter().chain(args))
    };
    openssl(["-revoke", &file("leaf.pem")])?;
    openssl(["-gencrl", "-batch"]).map(String::into_bytes)
}

fn revoked() -> Result<()> {
    let mut bed = Testbed::build(&Topology::nodes(&["a", "b"]), shop::SHOP)?;
    let lists = bed.dir.join("revoked.pem");
    std::fs::write(&lists, "")?;
    bed.start_mesh(&MeshOptions::agent(&["--crl", &lists.to_string_lossy()]))?;
    bed.apply("neighbour", NEIGHBOUR)?;
    shop::enrolled(&bed, &["shop/backend", LOCAL, "shop/neighbour"])?;
    let to = bed.pod("shop/backend")?.at(8080);
    let mut revoked = hold_direct(&bed, LOCAL, to)?;
    let mut other = hold_direct(&bed, "shop/neighbour", to)?;
    ensure!(revoked.running()?, "the connections did not last until the revocation");
    std::fs::write(&lists, revocation_list(&bed, "b", "/sa/frontend")?)?;
    // The file is looked at every two seconds, and must have been left alone for as long.
    wait::until_true("end of the connections", Duration::from_secs(8), || Ok(!revoked.running()?))?;
    let figures = revoked.figures()?;
    ensure!(figures.errors == 2, "{} connections were cut: {}", figures.errors, figures.first_error);
    shop::refused(&bed, LOCAL, &to.to_string())?;
    run::pause(Duration::from_secs(2))?;
    ensure!(other.running()?, "a connection of another identity was cut");
    let figures = other.stop()?;
    ensure!(figures.errors == 0, "{} connections were cut: {}", figures.errors, figures.first_error);
    Ok(())
}

fn expired() -> Result<()> {
    let mut bed = open_with(&Topology::nodes(&["a", "b"]), &MeshOptions::agent(&["--secret-ttl", "20s"]))?;
    let to = bed.pod("shop/backend")?.at(8080);
    let mut load = hold_direct(&bed, LOCAL, to)?;
    // Longer than a certificate lives: while they are renewed nothing ends.
    run::pause(Duration::from_secs(22))?;
    ensure!(load.running()?, "the connections did not outlive a certificate that was renewed");
    bed.control.take().context("the control plane does not run")?.kill();
    wait::until_true("end of the connections", Duration::from_secs(30), || Ok(!load.running()?))?;
    let figures = load.figures()?;
    ensure!(figures.errors == 2, "{} connections were cut: {}", figures.errors, figures.first_error);
    Ok(())
}

/// Connects until the agent of node b says this, then sees that the pair talks through the tunnel and goes on to.
fn goes_back(bed: &Testbed, to: SocketAddr, event: &str) -> Result<()> {
    wait::until_true("event of the agent", Duration::from_secs(20), || {
        // It may be lost on the way or refused: that is what the agent is to notice.
        let _ = bed.pod(LOCAL)?.call(&to.to_string(), &["--send", "x", "--timeout-ms", "2000"]);
        Ok(bed.node("b")?.agent(0)?.log().contains(event))
    })?;
    for _ in 0..3 {
        talks(bed, LOCAL, &to.to_string())?;
        ensure!(!direct_now(bed, LOCAL, to)?, "the pair is on the fast path again");
    }
    Ok(())
}

fn masqueraded() -> Result<()> {
    let mut bed = open()?;
    // Strict: what arrives under the node's address is refused, so that a pair which stayed direct would be broken.
    bed.apply("strict", &shop::peer_authentication("STRICT"))?;
    let to = bed.pod("shop/backend")?.at(8080);
    // Before the first connection: translation that begins in the middle breaks tunnels that are open.
    bed.node("b")?.netns.nft(
        "table ip um {\n chain nat {\n type nat hook postrouting priority srcnat;\n \
         iifname \"v*\" oifname \"v*\" masquerade\n }\n}\n",
    )?;
    goes_back(&bed, to, "masquerading")
}

fn only_hbone() -> Result<()> {
    let bed = open()?;
    let to = bed.pod("shop/backend")?.at(8080);
    warm(&bed, LOCAL, to)?;
    bed.node("b")?.netns.nft(
        "table ip um {\n chain network {\n type filter hook forward priority filter;\n iifname \"v*\" oifname \"v*\" \
         tcp flags & (syn | ack) == syn tcp dport != 15008 drop\n }\n}\n",
    )?;
    goes_back(&bed, to, "NetworkPolicy")
}

/// Moves pods of node b, which have routed veths, onto one bridge and into one subnet.
fn onto_segment(bed: &Testbed, pods: &[&str]) -> Result<()> {
    let node = bed.node("b")?;
    let host = net::underlay_v4(net::node_place(node.index));
    let mut lines: Vec<String> = [
        "link add seg type bridge",
        "link set seg type bridge mcast_snooping 0 forward_delay 0",
        "link set seg up",
        "addr add 169.254.1.1/32 dev seg",
    ]
    .map(str::to_owned)
    .into();
    for key in pods {
        let pod = bed.pod(key)?;
        let IpAddr::V4(v4) = pod.at(0).ip() else { continue };
        lines.push(format!("link set v{} master seg", v4.octets()[3]));
        lines.push(format!("route replace {v4}/32 dev seg src {host}"));
        pod.netns.batch(&[format!("addr add {v4}/24 dev eth0")])?;
    }
    node.netns.batch(&lines)
}

/// Tells everybody, twenty times a second, that an address is at the sender's device.
const SPOOF: &str = r"
import socket, struct, sys, time
raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0806))
raw.bind(('eth0', 0))
me, claimed, all = raw.getsockname()[4], socket.inet_aton(sys.argv[1]), b'\xff' * 6
answer = struct.pack('!HHBBH', 1, 0x0800, 6, 4, 2) + me + claimed + all + claimed
print(me.hex(':'), flush=True)
while True:
    raw.send(all + me + b'\x08\x06' + answer)
    time.sleep(0.05)
";

fn spoofed() -> Result<()> {
    const SECRET: &str = "the-plaintext-of-the-victim";
    let bed = open()?;
    let (victim, attacker) = (bed.pod(LOCAL)?, bed.pod("outside/site")?);
    let to = bed.pod("shop/backend")?.at(8080);
    let held = hold_direct(&bed, LOCAL, to)?;
    onto_segment(&bed, &[LOCAL, "shop/backend", "outside/site"])?;
    wait::until_true("end of the direct connections", Duration::from_secs(10), || {
        Ok(!is_direct(&bed, LOCAL, to)?)
    })?;
    drop(held);
    for _ in 0..3 {
        talks(&bed, LOCAL, &to.to_string())?;
        ensure!(!direct_now(&bed, LOCAL, to)?, "the pair is direct on a shared segment");
    }
    // The attacker takes the server's address, by raw frames and as its own, and listens on its ports.
    let capture = crate::bed::capture::Capture::start(
        &attacker.netns.path(),
        &bed.node("b")?.cgroup,
        "eth0",
        &bed.dir,
    )?;
    attacker.netns.batch(&[format!("addr add {}/32 dev lo", to.ip())])?;
    let _tunnels = attacker.spawn(["mesh-tests", "tool", "serve", "--sink", "15008"])?;
    let spoofer = attacker.spawn(["python3", "-c", SPOOF, &to.ip().to_string()])?;
    wait::until_true("spoofed neighbour", Duration::from_secs(20), || {
        // The victim looks for its server again and again.
        let sent = ["--send", SECRET, "--timeout-ms", "500"];
        let _ = victim.call(&to.to_string(), &sent);
        let neighbours =
            netns::command("ip", ["-n", victim.netns.name(), "neigh", "show", "to", &to.ip().to_string()])?;
        let address = spoofer.log();
        Ok(!address.trim().is_empty() && neighbours.contains(address.trim()))
    })?;
    for _ in 0..5 {
        let outcome =
            victim.call(&to.to_string(), &["--send", SECRET, "--half-close", "--timeout-ms", "1500"])?;
        ensure!(!outcome.ok || outcome.received != SECRET, "the attacker answered as the server");
    }
    let seen = capture.stop()?;
    let reached = seen.iter().any(|s| s.to == SocketAddr::new(to.ip(), 15_008) && !s.payload.is_empty());
    ensure!(reached, "no tunnel of the victim was led to the attacker: the attack did not work");
    ensure!(!crate::bed::capture::carries(&seen, SECRET.as_bytes()), "the attacker saw the plaintext");
    Ok(())
}
