//! The control plane's relay: what all nodes tell in one stream, for those who may see it, and what it lets go.

use super::shop::{ENROLLED, ONLY_FRONTEND, SHOP, enrolled, metric, open, open_with, refused, talks};
use super::{Scenario, scenario};
use crate::bed::mesh::MeshOptions;
use crate::bed::pki::{Leaf, Pki};
use crate::bed::process::Proc;
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
        crate::bed::process::finish(place, argv, Duration::from_secs(20))
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
