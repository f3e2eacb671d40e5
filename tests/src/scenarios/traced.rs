//! Flow tracing: what the kernel and the agents tell of connections, against what really happened to them.

use super::fast::warm;
use super::shop::{ONLY_FRONTEND, metric, refused, talks};
use super::{Scenario, scenario};
use crate::bed::capture::Segment;
use crate::bed::{Testbed, netns, run, wait};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::net::SocketAddr;
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("each end of a connection is told with its path and the bytes that went over it", 90, ends),
    scenario("one connection has one name on both nodes, in their logs and in meshctl trace", 90, one_story),
    scenario(
        "a dropped packet is told with the kernel's reason and its retransmission as tcpdump saw it",
        90,
        drops,
    ),
    scenario("a refused connection is told apart from one that nobody answers", 90, failures),
    scenario("a reset is told where it was sent and where it arrived", 90, resets),
    scenario("a denied connection is told with the policy that denied it", 60, denied),
    scenario("DNS answers are told with what they said and how long they took", 60, dns),
    scenario("round trips, drops and failures are metrics by pair of workloads", 90, metrics),
    scenario("flows go on while they are followed, also in Hubble's words", 90, followed),
];

const SOON: Duration = Duration::from_secs(15);
const VISITOR: &str = "outside/visitor";

/// The usual mesh, each of whose nodes traces each of its pods already.
fn open() -> Result<Testbed> {
    let bed = super::shop::open()?;
    for node in ["a", "b"] {
        let pods = bed.pods.values().filter(|pod| pod.spec.node == node).count();
        wait::until_true(&format!("all pods of {node} traced"), SOON, || {
            // Each has an IPv4 and an IPv6 address.
            Ok(metric(&bed.metrics(node)?, "undermesh_trace_addresses", &[]) >= 2.0 * pods as f64)
        })?;
    }
    Ok(bed)
}

/// Events of a node that fit, oldest first.
fn flows(bed: &Testbed, node: &str, args: &[&str]) -> Result<Vec<Value>> {
    let argv = [&["flows", "--last", "1000", "-o", "json"], args].concat();
    let text = bed.meshctl(node, &argv)?;
    text.lines().map(|line| serde_json::from_str(line).with_context(|| format!("no JSON: {line}"))).collect()
}

/// Waits for an event of a kind that fits, and gives the newest.
fn told(bed: &Testbed, node: &str, kind: &str, args: &[&str]) -> Result<Value> {
    let args = [args, &["--kind", kind]].concat();
    wait::until(&format!("event {args:?} on {node}"), SOON, || Ok(flows(bed, node, &args)?.pop()))
        .with_context(|| bed.meshctl_any(node, &["flows", "--last", "40"]).unwrap_or_default())
}

fn text<'a>(flow: &'a Value, pointer: &str) -> &'a str {
    flow.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn number(flow: &Value, pointer: &str) -> u64 {
    flow.pointer(pointer).and_then(Value::as_u64).unwrap_or(u64::MAX)
}

/// Checks parts of an event.
fn says(flow: &Value, expected: &[(&str, &str)]) -> Result<()> {
    for (pointer, value) in expected {
        ensure!(text(flow, pointer) == *value, "{pointer} is not {value:?} in {flow:#}");
    }
    Ok(())
}

fn ends() -> Result<()> {
    let bed = open()?;
    let backend = bed.pod("shop/backend")?.at(8080);
    // Between nodes, within a node, and from outside of the mesh.
    warm(&bed, "shop/local", backend)?;
    for (from, node, path) in
        [("shop/frontend", "a", "tunnel"), ("shop/local", "b", "fast"), (VISITOR, "a", "plain")]
    {
        let said = "x".repeat(5000);
        let outcome = bed.pod(from)?.call(&backend.to_string(), &["--send", &said, "--half-close"])?;
        ensure!(outcome.ok && outcome.received == said, "{from}: {}", outcome.problem());
        let (namespace, pod) = from.split_once('/').context("namespace/name")?;
        let args = ["--kind", "closed", "--from", from, "--to", "shop/backend", "--path", path];
        let of_size = |flow: &Value| number(flow, "/bytesToServer") == 5000;
        let closed = wait::until(&format!("the end of 5000 bytes of {from}"), SOON, || {
            Ok(flows(&bed, node, &args)?.into_iter().find(of_size))
        })
        .with_context(|| bed.meshctl_any(node, &["flows", "--last", "40"]).unwrap_or_default())?;
        says(
            &closed,
            &[
                ("/side", "client"),
                ("/source/namespace", namespace),
                ("/source/pod", pod),
                ("/destination/pod", "backend"),
                ("/destination/identity", "spiffe://cluster.local/ns/shop/sa/backend"),
                ("/closedWith", "fin"),
                ("/process/command", "mesh-tests"),
                ("/node", node),
            ],
        )?;
        ensure!(number(&closed, "/bytesToClient") == 5000, "{from}: {closed:#}");
        ensure!(text(&closed, "/destination/address") == backend.to_string(), "{closed:#}");
        let established = told(&bed, node, "established", &["--from", from, "--path", path])?;
        ensure!(number(&established, "/latencyUs") < 5_000_000, "{established:#}");
    }
    // What the server's kernel accepted, and from whom.
    let client = bed.pod("shop/frontend")?.at(0).ip().to_string();
    let accepted = told(&bed, "b", "accepted", &["--from", "shop/frontend", "--to", "shop/backend"])?;
    says(&accepted, &[("/side", "server"), ("/path", "tunnel")])?;
    ensure!(text(&accepted, "/source/address").starts_with(&client), "{accepted:#}");
    let at_server = told(&bed, "b", "closed", &["--from", VISITOR])?;
    let bytes = (number(&at_server, "/bytesToServer"), number(&at_server, "/bytesToClient"));
    ensure!(bytes == (5000, 5000), "at the server: {bytes:?}: {at_server:#}");
    Ok(())
}

/// The value of a field in the last line of a node's access log that has both words.
fn logged(bed: &Testbed, node: &str, words: [&str; 2], field: &str) -> Result<Option<String>> {
    let log = bed.node(node)?.agent(0)?.log();
    let line = log.lines().rfind(|line| words.iter().all(|word| line.contains(word)));
    let start = format!("{field}=\"");
    Ok(line.and_then(|line| Some(line.split_once(&start)?.1.split('"').next()?.to_owned())))
}

fn one_story() -> Result<()> {
    let bed = open()?;
    talks(&bed, "shop/frontend", "10.96.0.10:80")?;
    let connect = told(&bed, "a", "connect", &["--from", "shop/frontend", "--service", "shop/backend"])?;
    let id = text(&connect, "/connection").to_owned();
    ensure!(id.len() == 16, "no name in {connect:#}");
    says(&connect, &[("/service", "backend.shop.svc.cluster.local"), ("/path", "tunnel")])?;
    for (node, direction) in [("a", "outbound"), ("b", "inbound")] {
        let words = ["connection complete", direction];
        let logged =
            wait::until(&format!("line of {node}"), SOON, || logged(&bed, node, words, "connection"))?;
        ensure!(logged == id, "node {node} calls it {logged}, not {id}");
        let proxied = told(&bed, node, "proxied", &["--from", "shop/frontend"])?;
        ensure!(text(&proxied, "/connection") == id, "{proxied:#}");
        let story = bed.meshctl(node, &["trace", &id])?;
        ensure!(story.contains("proxied") && story.contains("shop/backend"), "{story}");
    }
    for (node, events) in [
        ("a", &["connect", "established", "closed", "proxied"][..]),
        ("b", &["accepted", "closed", "proxied"][..]),
    ] {
        wait::until_true(&format!("whole story on {node}"), SOON, || {
            let story = bed.meshctl(node, &["trace", &id])?;
            Ok(events.iter().all(|event| story.contains(event)))
        })
        .with_context(|| bed.meshctl_any(node, &["trace", &id]).unwrap_or_default())?;
    }
    let unknown = bed.meshctl("a", &["trace", "00000000000000ff"]);
    ensure!(unknown.is_err_and(|error| format!("{error:#}").contains("no node remembers")), "it was found");
    // While it is open it is a socket with that path.
    let held = bed.pod("shop/frontend")?.at(0).ip();
    let argv = ["mesh-tests", "tool", "call", "--to", "10.96.0.10:80", "--send", "x", "--hold-ms", "20000"];
    let mut open = bed.pod("shop/frontend")?.spawn(argv)?;
    wait::until_true("open connection in meshctl sockets", SOON, || {
        let list = bed.meshctl("a", &["sockets", "--from", "shop/frontend"])?;
        Ok(list.lines().any(|line| line.contains("established") && line.contains("tunnel")))
    })
    .with_context(|| format!("of {held}: {}", bed.meshctl_any("a", &["sockets"]).unwrap_or_default()))?;
    open.kill();
    wait::until_true("end of it", SOON, || {
        Ok(!bed.meshctl("a", &["sockets", "--from", "shop/frontend"])?.contains("established"))
    })
}

/// The client's source port and the packets of the first SYN, as tcpdump saw them.
fn syns(segments: &[Segment], to: SocketAddr) -> usize {
    segments.iter().filter(|segment| segment.syn && segment.to == to).count()
}

fn drops() -> Result<()> {
    let bed = open()?;
    let to = bed.pod("outside/site")?.at(8080);
    bed.pod("outside/site")?.netns.nft(
        "table inet um_drop {\n chain input {\n type filter hook input priority 0;\n tcp dport 8080 counter drop\n }\n}\n",
    )?;
    let visitor = bed.pod(VISITOR)?;
    visitor.netns.sysctl(&[("ipv4/tcp_syn_retries", "1")])?;
    let capture = bed.capture("a")?;
    let outcome = visitor.call(&to.to_string(), &["--send", "x", "--timeout-ms", "20000"])?;
    ensure!(!outcome.ok, "it got through");
    let seen = syns(&capture.stop()?, to);
    let args = ["--from", VISITOR, "--reason", "NETFILTER_DROP"];
    let counted = nft_counter(&bed, "outside/site")?;
    ensure!(counted >= 2, "nftables dropped {counted} packets only");
    let port = wait::until("all drops", SOON, || {
        let drops = flows(&bed, "b", &[&args[..], &["--kind", "drop"]].concat())?;
        let total: u64 =
            drops.iter().map(|flow| flow.get("count").and_then(Value::as_u64).unwrap_or(1)).sum();
        let first = drops.first().map(|flow| text(flow, "/source/address").to_owned());
        Ok(first.filter(|_| total == counted))
    })
    .with_context(|| bed.meshctl_any("b", &["flows", "--last", "40"]).unwrap_or_default())?;
    let again = told(&bed, "a", "retransmit", &["--from", VISITOR])?;
    ensure!(text(&again, "/source/address") == port, "{again:#} is not of {port}");
    let retransmitted: u64 = flows(&bed, "a", &["--kind", "retransmit", "--from", VISITOR])?
        .iter()
        .map(|flow| flow.get("count").and_then(Value::as_u64).unwrap_or(1))
        .sum();
    why_dropped(&bed)?;
    let expected = usize::try_from(retransmitted)? + 1;
    ensure!(seen == expected, "tcpdump saw {seen} SYNs, told are {retransmitted} retransmissions");
    Ok(())
}

/// What is between the two is found in one command.
fn why_dropped(bed: &Testbed) -> Result<()> {
    let why = bed.meshctl_any("b", &["why", VISITOR, "outside/site:8080"])?;
    ensure!(why.contains("NETFILTER_DROP") && why.contains("nft list ruleset"), "{why}");
    Ok(())
}

/// Packets that a pod's nftables have counted.
fn nft_counter(bed: &Testbed, pod: &str) -> Result<u64> {
    let netns = bed.pod(pod)?.netns.path();
    let enter = format!("--net={}", netns.display());
    let listed = netns::command("nsenter", [enter.as_str(), "nft", "list", "ruleset"])?;
    let count = listed.split("counter packets ").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok());
    count.with_context(|| format!("no counter in {listed}"))
}

fn failures() -> Result<()> {
    let bed = open()?;
    let site = bed.pod("outside/site")?;
    let visitor = bed.pod(VISITOR)?;
    visitor.netns.sysctl(&[("ipv4/tcp_syn_retries", "1")])?;
    let outcome = visitor.call(&site.at(9).to_string(), &["--send", "x", "--timeout-ms", "20000"])?;
    ensure!(outcome.kind == "ConnectionRefused", "{}", outcome.problem());
    let refused = told(&bed, "a", "failed", &["--from", VISITOR, "--reason", "ECONNREFUSED"])?;
    says(&refused, &[("/verdict", "failed"), ("/destination/pod", "site"), ("/path", "plain")])?;
    // The refusal itself, at the other node.
    let reset = told(&bed, "b", "reset_sent", &["--reason", "NO_SOCKET"])?;
    says(&reset, &[("/side", "server")]).or_else(|_| says(&reset, &[("/side", "node")]))?;
    site.netns.nft(
        "table inet um_drop {\n chain input {\n type filter hook input priority 0;\n tcp dport 8081 drop\n }\n}\n",
    )?;
    let outcome = visitor.call(&site.at(8081).to_string(), &["--send", "x", "--timeout-ms", "20000"])?;
    ensure!(!outcome.ok, "it got through");
    let silent = told(&bed, "a", "failed", &["--from", VISITOR, "--port", "8081"])?;
    says(&silent, &[("/verdict", "failed"), ("/reason", "ETIMEDOUT")])?;
    ensure!(number(&silent, "/retransmits") >= 1, "{silent:#}");
    Ok(())
}

fn resets() -> Result<()> {
    let bed = open()?;
    let to = bed.pod("outside/site")?.at(8080);
    let capture = bed.capture("a")?;
    // The client leaves with a reset instead of a FIN.
    bed.pod(VISITOR)?.call(&to.to_string(), &["--send", "hello\n", "--lines", "1", "--reset"])?;
    let closed = told(&bed, "a", "closed", &["--from", VISITOR, "--to", "outside/site"])?;
    says(&closed, &[("/closedWith", "rst"), ("/closedBy", "client"), ("/process/command", "mesh-tests")])?;
    let at_server = told(&bed, "b", "closed", &["--from", VISITOR, "--to", "outside/site"])?;
    says(&at_server, &[("/closedWith", "rst"), ("/closedBy", "client"), ("/side", "server")])?;
    let sent = told(&bed, "a", "reset_sent", &["--from", VISITOR])?;
    let received = told(&bed, "b", "reset_received", &["--from", VISITOR])?;
    let client = text(&closed, "/source/address");
    ensure!(
        text(&sent, "/source/address") == client && text(&received, "/source/address") == client,
        "{sent:#}"
    );
    ensure!(
        capture.stop()?.iter().any(|segment| segment.from.to_string() == client),
        "tcpdump saw nothing of it"
    );
    Ok(())
}

fn denied() -> Result<()> {
    let mut bed = open()?;
    let to = bed.pod("shop/backend")?.at(8080).to_string();
    bed.apply("policy", ONLY_FRONTEND)?;
    wait::until("policy in force", SOON, || refused(&bed, "shop/other", &to).map(Some))?;
    let denied = told(&bed, "b", "proxied", &["--verdict", "denied"])?;
    says(&denied, &[("/source/pod", "other"), ("/destination/pod", "backend"), ("/path", "tunnel")])?;
    ensure!(text(&denied, "/policy").contains("shop/only-frontend"), "no policy in {denied:#}");
    // The same connection at the client's node, by the same name.
    let id = text(&denied, "/connection");
    let at_client = flows(&bed, "a", &["--from", "shop/other"])?;
    ensure!(at_client.iter().any(|flow| text(flow, "/connection") == id), "node a does not know {id}");
    let why = bed.meshctl_any("b", &["why", "shop/other", "shop/backend:80"])?;
    ensure!(why.contains("shop/only-frontend"), "{why}");
    Ok(())
}

fn dns() -> Result<()> {
    let bed = open()?;
    let name = "backend.shop.svc.cluster.local";
    let script = "import socket,sys\nprint(socket.gethostbyname(sys.argv[1]))\n";
    let answer = bed.pod("shop/frontend")?.run(["python3", "-c", script, name])?;
    ensure!(answer.ok()?.trim() == "10.96.0.10", "{}", answer.out);
    let told = wait::until("DNS event", SOON, || {
        let events = flows(&bed, "a", &["--protocol", "dns"])?;
        Ok(events
            .into_iter()
            .find(|flow| text(flow, "/dns/query").starts_with(name) && text(flow, "/dns/queryType") == "A"))
    })
    .with_context(|| bed.meshctl_any("a", &["flows", "--last", "40"]).unwrap_or_default())?;
    says(&told, &[("/dns/answer", "NOERROR"), ("/source/pod", "frontend"), ("/kind", "dns")])?;
    ensure!(number(&told, "/latencyUs") < 1_000_000, "{told:#}");
    let none = bed.pod("shop/frontend")?.run(["python3", "-c", script, "nothing.shop.svc.cluster.local"])?;
    ensure!(none.ok().is_err(), "it has an address: {}", none.out);
    // Nobody is there to ask: the node says so after its patience.
    wait::until_true("SERVFAIL", SOON, || {
        Ok(flows(&bed, "a", &["--protocol", "dns"])?
            .iter()
            .any(|flow| text(flow, "/dns/answer") == "SERVFAIL"))
    })
}

fn metrics() -> Result<()> {
    let bed = open()?;
    let site = bed.pod("outside/site")?;
    let visitor = bed.pod(VISITOR)?;
    visitor.call(&site.at(9).to_string(), &["--send", "x", "--timeout-ms", "20000"])?;
    talks(&bed, "shop/frontend", &bed.pod("shop/backend")?.at(8080).to_string())?;
    let pair = [("source_workload", "visitor"), ("destination_workload", "site"), ("reason", "ECONNREFUSED")];
    let rtt = [("source_workload", "frontend"), ("destination_workload", "backend")];
    wait::until_true("metrics of the pairs", SOON, || {
        let text = bed.metrics("a")?;
        Ok(metric(&text, "undermesh_tcp_connect_failures_total", &pair) == 1.0
            && metric(&text, "undermesh_tcp_rtt_seconds_count", &rtt) >= 1.0)
    })
    .with_context(|| bed.metrics("a").unwrap_or_default())
}

fn followed() -> Result<()> {
    let bed = open()?;
    let socket = format!("unix:{}", bed.node("a")?.dir.join("run/admin.sock").display());
    let program = run::binary("meshctl")?.to_string_lossy().into_owned();
    let log = bed.dir.join("followed.log");
    let argv =
        [program.as_str(), "flows", "-f", "-o", "hubble", "--from", "shop/frontend", "--node", &socket];
    let mut following = crate::bed::process::Proc::spawn(&bed.control_place, argv, &log)?;
    // It is asked for what comes after it began: give it something until it has.
    let line = wait::until("a line of Hubble's JSON", SOON, || {
        talks(&bed, "shop/frontend", "10.96.0.10:80")?;
        let told = following.log();
        Ok(told.lines().find(|line| line.contains("\"FIN\":true")).map(str::to_owned))
    })
    .with_context(|| following.log())?;
    let flow: Value = serde_json::from_str(&line)?;
    says(
        &flow,
        &[
            ("/flow/verdict", "FORWARDED"),
            ("/flow/source/pod_name", "frontend"),
            ("/flow/source/namespace", "shop"),
            ("/flow/Type", "L3_L4"),
            ("/flow/traffic_direction", "EGRESS"),
            ("/flow/destination_service/name", "backend"),
            ("/node_name", "a"),
        ],
    )?;
    following.kill();
    // Wrong words are answered with the right ones.
    let wrong = bed.meshctl("a", &["flows", "--verdict", "lost"]);
    ensure!(
        wrong.is_err_and(|error| format!("{error:#}").contains("forwarded, denied, dropped, failed")),
        "accepted"
    );
    Ok(())
}
