//! The control plane's relay: what all nodes tell in one stream, for those who may see it, and what it lets go.

use super::shop::{ENROLLED, ONLY_FRONTEND, SHOP, enrolled, metric, open, open_with, refused, talks};
use super::{Scenario, scenario};
use crate::bed::mesh::MeshOptions;
use crate::bed::pki::{Leaf, Pki};
use crate::bed::process::{Finished, Place, Proc, finish};
use crate::bed::{Testbed, Topology, net, run, wait};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario(
        "the relay tells of one connection what both of its nodes saw, also while it is followed",
        90,
        both,
    ),
    scenario(
        "the relay is asked from other machines with a client certificate and not without",
        90,
        certified,
    ),
    scenario("a node with more to tell than the relay takes counts the rest and serves on", 90, bounded),
    scenario(
        "every node's agent is asked through the control plane, and nothing on it can be changed that way",
        120,
        passed_on,
    ),
    scenario("the relay has what nodes tell again after its control plane was killed", 120, restarted),
];

const SOON: Duration = Duration::from_secs(15);
const RELAY: &str = "http://127.0.0.1:15014";

/// Events of the relay that fit, oldest first.
fn relayed(bed: &Testbed, args: &[&str]) -> Result<Vec<Value>> {
    let all = ["flows", "--last", "1000", "-o", "json", "--control", RELAY];
    let done = bed.meshctl_in(&bed.control_place, &[&all[..], args].concat())?;
    done.ok()?
        .lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("no JSON: {line}")))
        .collect()
}

fn text<'a>(flow: &'a Value, pointer: &str) -> &'a str {
    flow.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn both() -> Result<()> {
    let mut bed = open()?;
    let program = run::binary("meshctl")?.to_string_lossy().into_owned();
    let argv = [&program, "flows", "-f", "--from", "shop/frontend", "--kind", "closed", "--control", RELAY];
    let following = Proc::spawn(&bed.control_place, argv, &bed.dir.join("followed.log"))?;
    wait::until_true("both nodes at the relay", SOON, || {
        Ok(metric(&bed.control_get("/metrics")?, "undermesh_relay_nodes", &[]) == 2.0)
    })?;
    let told = |kind: &str| relayed(&bed, &["--from", "shop/frontend", "--kind", kind]);
    // A pod is traced a moment after it is captured.
    wait::until_true("connections that both nodes tell of", SOON, || {
        talks(&bed, "shop/frontend", "10.96.0.10:80")?;
        Ok(!told("connect")?.is_empty() && !told("accepted")?.is_empty())
    })?;
    let before = told("connect")?.len();
    talks(&bed, "shop/frontend", "10.96.0.10:80")?;
    let id = wait::until("the relay's word of another", SOON, || {
        let seen = told("connect")?;
        Ok(seen.last().filter(|_| seen.len() > before).map(|flow| text(flow, "/connection").to_owned()))
    })?;
    let ask = |argv: &[&str]| {
        let done = bed.meshctl_in(&bed.control_place, &[argv, &["--control", RELAY]].concat())?;
        anyhow::Ok(done.out)
    };
    let whole = wait::until("the whole story at the relay", SOON, || {
        let story = ask(&["trace", &id, "-o", "json"])?;
        let events: Vec<Value> = story.lines().map_while(|line| serde_json::from_str(line).ok()).collect();
        let has = |node: &str, kind: &str| {
            events.iter().any(|flow| text(flow, "/node") == node && text(flow, "/kind") == kind)
        };
        let all = [("a", "connect"), ("a", "closed"), ("b", "accepted"), ("b", "closed"), ("b", "proxied")];
        Ok(all.iter().all(|(node, kind)| has(node, kind)).then_some(events))
    })?;
    let times: Vec<u64> = whole.iter().filter_map(|flow| flow.get("atUs")?.as_u64()).collect();
    ensure!(times.is_sorted(), "not in order: {whole:#?}");
    // By what the agents say themselves: the same events.
    for node in ["a", "b"] {
        let own = bed.meshctl(node, &["trace", &id, "-o", "json"])?;
        for line in own.lines() {
            let event: Value = serde_json::from_str(line)?;
            ensure!(whole.contains(&event), "the relay does not have {event:#}");
        }
    }
    wait::until_true("it while it is followed", SOON, || {
        talks(&bed, "shop/frontend", "10.96.0.10:80")?;
        let told = following.log();
        Ok([" a ", " b "].iter().all(|node| told.contains(node)) && told.contains("shop/backend"))
    })
    .with_context(|| following.log())?;
    // Conditions hold at the relay as at a node, and wrong ones are answered with the right words.
    bed.apply("policy", ONLY_FRONTEND)?;
    let to = bed.pod("shop/backend")?.at(8080).to_string();
    wait::until("policy in force", SOON, || refused(&bed, "shop/other", &to).map(Some))?;
    let denied = wait::until("the denial", SOON, || Ok(relayed(&bed, &["--verdict", "denied"])?.pop()))?;
    ensure!(text(&denied, "/policy").contains("shop/only-frontend"), "{denied:#}");
    ensure!(text(&denied, "/source/pod") == "other" && text(&denied, "/node") == "b", "{denied:#}");
    let wrong = bed.control_get("/flows?verdict=lost").err().map(|error| format!("{error:#}"));
    let wrong = wrong.unwrap_or_default();
    ensure!(wrong.contains("forwarded, denied, dropped, failed"), "{wrong}");
    Ok(())
}

fn certified() -> Result<()> {
    let mut bed = Testbed::build(&Topology::nodes(&["a", "b"]), SHOP)?;
    let own = Pki::create(&bed.dir.join("people"), "people")?;
    let other = Pki::create(&bed.dir.join("other"), "other")?;
    let roots = own.root().display().to_string();
    let control = net::underlay_v4(net::CONTROL);
    let options = MeshOptions {
        control: vec![
            "--listen-relay=[::]:15016".into(),
            format!("--relay-client-ca={roots}"),
            format!("--name={control}"),
        ],
        ..MeshOptions::default()
    };
    bed.start_mesh(&options)?;
    enrolled(&bed, ENROLLED)?;
    talks(&bed, "shop/frontend", "10.96.0.10:80")?;
    let place = &bed.node("a")?.agent_place;
    let root = bed.state_dir().join("root-cert.pem").display().to_string();
    let url = format!("https://{control}:15016");
    let ask = |more: &[&str]| {
        let argv = ["flows", "--from", "shop/frontend", "--control", &url, "--root-cert", &root];
        bed.meshctl_in(place, &[&argv[..], more].concat())
    };
    let with = |issued: &crate::bed::pki::Issued| {
        let (chain, key) = (issued.chain.display().to_string(), issued.key.display().to_string());
        ask(&["--client-cert", &chain, "--client-key", &key])
    };
    let jane = own.issue("jane", Leaf::of("DNS:jane"))?;
    wait::until_true("events over TLS", SOON, || Ok(with(&jane)?.ok()?.contains("shop/backend")))?;
    for (who, done) in [("nobody", ask(&[])?), ("a stranger", with(&other.issue("x", Leaf::of("DNS:x"))?)?)] {
        ensure!(done.ok().is_err() && !done.out.contains("shop/"), "{who} saw {}", done.out);
        ensure!(done.err.contains("--client-cert"), "{who} was told {}", done.err);
    }
    // The same by a client that is not ours.
    let curl = |more: &[&str]| {
        let argv = ["curl", "-sS", "--max-time", "10", "--cacert", &root];
        let flows = format!("{url}/flows?last=5");
        let argv: Vec<&str> = [&argv[..], more, &[&flows]].concat();
        finish(place, argv, Duration::from_secs(20))
    };
    let (chain, key) = (jane.chain.display().to_string(), jane.key.display().to_string());
    ensure!(curl(&["--cert", &chain, "--key", &key])?.ok()?.contains("\"kind\""), "curl saw nothing");
    ensure!(curl(&[])?.ok().is_err(), "curl got in without a certificate");
    Ok(())
}

fn bounded() -> Result<()> {
    let options = MeshOptions { control: vec!["--relay-events=20".into()], ..MeshOptions::default() };
    let bed = open_with(&Topology::nodes(&["a", "b"]), &options)?;
    let to = bed.pod("outside/site")?.at(8080);
    let script = "import socket,sys\nfor i in range(400):\n s=socket.create_connection((sys.argv[1],int(sys.argv[2])),10)\n s.sendall(b'x')\n s.shutdown(1)\n assert s.recv(9)==b'x'\n s.close()\n";
    let argv = ["python3", "-c", script, &to.ip().to_string(), &to.port().to_string()];
    bed.pod("outside/visitor")?.run(argv)?.ok()?;
    let nothing = bed.pod("outside/site")?.at(9).to_string();
    bed.pod("outside/visitor")?.call(&nothing, &["--send", "x", "--timeout-ms", "20000"])?;
    // The node itself has them, the relay a part; what failed goes before what did not.
    let own = wait::until("the node's own events", SOON, || {
        let own = bed.meshctl("a", &["flows", "--last", "4000", "-o", "json", "--kind", "closed"])?;
        Ok(Some(own.lines().filter(|line| line.contains("visitor")).count()).filter(|own| *own >= 300))
    })?;
    let failed = ["--verdict", "failed", "--from", "outside/visitor"];
    wait::until_true("the failure at the relay", SOON, || Ok(!relayed(&bed, &failed)?.is_empty()))?;
    let seen = relayed(&bed, &["--kind", "closed"])?.len();
    ensure!(seen < own, "the relay has {seen} of {own}");
    let held = metric(
        &bed.control_get("/metrics")?,
        "undermesh_relay_missed_events_total",
        &[("reason", "held_back")],
    );
    ensure!(held > 100.0, "{held} are counted");
    let said = bed.meshctl_in(&bed.control_place, &["flows", "--control", RELAY])?.err;
    ensure!(said.contains("stayed on their nodes") && said.contains("--relay-events"), "said: {said}");
    // Nothing waits for it.
    talks(&bed, "shop/frontend", "10.96.0.10:80")
}

/// `meshctl` on the control plane's machine, which reaches nothing else.
fn through_control(bed: &Testbed, words: &[&str]) -> Result<Finished> {
    bed.meshctl_in(&bed.control_place, &[words, &["--control", RELAY]].concat())
}

/// The nodes whose agents the control plane can ask.
fn agents(bed: &Testbed) -> Result<Vec<String>> {
    serde_json::from_str(&bed.control_get("/nodes")?).context("no list of nodes")
}

fn passed_on() -> Result<()> {
    let mut bed = open()?;
    let place = bed.control_place.clone();
    wait::until_true("both agents", SOON, || Ok(agents(&bed)? == ["a", "b"]))?;
    // What is open at the client is what the pod's kernel says is open.
    let argv = ["mesh-tests", "tool", "call", "--to", "10.96.0.10:80", "--send", "x", "--hold-ms", "60000"];
    let _open = bed.pod("shop/frontend")?.spawn(argv)?;
    let sockets = wait::until("it at both nodes", SOON, || {
        let all = through_control(&bed, &["sockets", "--from", "shop/frontend", "-o", "json"])?;
        let all: Value = serde_json::from_str(all.ok()?)?;
        let sockets = all["sockets"].as_array().cloned().unwrap_or_default();
        let at = |node: &str| sockets.iter().any(|socket| text(socket, "/node") == node);
        Ok((at("a") && at("b")).then_some(sockets))
    })?;
    let done = bed.pod("shop/frontend")?.run(["ss", "-Htn", "state", "established"])?;
    let kernel = done.ok()?;
    for socket in sockets.iter().filter(|socket| text(socket, "/node") == "a") {
        let from = text(socket, "/source/address");
        ensure!(kernel.contains(&format!("{from} ")), "no socket {from} in {kernel}");
    }
    // The verdict and its exit code are those of an agent that is asked directly.
    bed.apply("policy", ONLY_FRONTEND)?;
    let to = bed.pod("shop/backend")?.at(8080).to_string();
    wait::until("policy in force", SOON, || refused(&bed, "shop/other", &to).map(Some))?;
    let question = ["why", "shop/other", "shop/backend:80"];
    let (why, own) = (through_control(&bed, &question)?, bed.meshctl_any("a", &question)?);
    ensure!(why.ok().is_err(), "it is allowed: {}", why.out);
    let decided = |said: &str| said.lines().find(|line| line.starts_with("decided by")).map(str::to_owned);
    let by = decided(&why.out).unwrap_or_default();
    ensure!(
        by.contains("shop/only-frontend") && Some(&by) == decided(&own).as_ref(),
        "{} is not {own}",
        why.out
    );
    for words in [&["status"][..], &["certs"], &["doctor"]] {
        let said = through_control(&bed, words)?;
        let words_said: Vec<&str> = said.out.split_whitespace().collect();
        ensure!(
            ["a", "b"].iter().all(|node| words_said.contains(node)),
            "{words:?}: {} {}",
            said.out,
            said.err
        );
    }
    only_what_changes_nothing(&place)?;
    // An agent that dies is not there any more, and its successor is.
    bed.kill_agent("b")?;
    wait::until_true("one agent less", SOON, || Ok(agents(&bed)? == ["a"]))?;
    bed.start_agent("b", &MeshOptions::default())?;
    wait::until_true("both agents again", Duration::from_secs(30), || Ok(agents(&bed)? == ["a", "b"]))
}

/// By a client that is not ours: what is passed on to agents, and to which.
fn only_what_changes_nothing(place: &Place) -> Result<()> {
    let ask = |method: &str, path: &str| {
        let url = format!("{RELAY}{path}");
        let argv = ["curl", "-sS", "--max-time", "10", "-X", method, "-w", " %{http_code}", &url];
        let done = finish(place, argv, Duration::from_secs(20))?;
        anyhow::Ok(done.ok()?.to_owned())
    };
    for (method, path, status) in [
        ("POST", "/nodes/a/quitquitquit", "405"),
        ("GET", "/nodes/a/quitquitquit", "405"),
        ("GET", "/nodes/a/trace?on=false", "405"),
        ("GET", "/nodes/a/nothing", "404"),
        ("GET", "/nodes/c/status", "404"),
        ("GET", "/nodes/a/status", "200"),
    ] {
        let said = ask(method, path)?;
        ensure!(said.ends_with(&format!(" {status}")), "{method} {path}: {said}");
    }
    let unknown = ask("GET", "/nodes/c/status")?;
    ensure!(unknown.contains("connected are: a, b"), "{unknown}");
    Ok(())
}

fn restarted() -> Result<()> {
    let mut bed = open()?;
    talks(&bed, "shop/frontend", "10.96.0.10:80")?;
    wait::until_true("events", SOON, || Ok(!relayed(&bed, &["--from", "shop/frontend"])?.is_empty()))?;
    bed.control.take().context("no control plane")?.kill();
    talks(&bed, "shop/frontend", "10.96.0.10:80")?;
    bed.start_control(&MeshOptions::default())?;
    // What happened while it was away comes, too: nodes keep it.
    wait::until_true("events of the time without", Duration::from_secs(45), || {
        let seen = relayed(&bed, &["--from", "shop/frontend", "--kind", "connect"])?;
        Ok(!seen.is_empty())
    })?;
    let seen = relayed(&bed, &["--from", "shop/frontend", "--kind", "connect"])?;
    let ids: std::collections::BTreeSet<&str> = seen.iter().map(|flow| text(flow, "/connection")).collect();
    ensure!(ids.len() == seen.len(), "told twice: {seen:#?}");
    Ok(())
}
