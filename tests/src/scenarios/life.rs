//! Change under load: enrolment, crashes, upgrades, lost control planes, rotating certificates.

use super::shop::{self, ENROLLED, ONLY_FRONTEND, SHOP, enrolled, open, open_with, refused, talks};
use super::{Scenario, scenario};
use crate::bed::mesh::MeshOptions;
use crate::bed::{Load, Testbed, Topology, run, wait};
use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use std::time::Duration;

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("a namespace joins and leaves the mesh under traffic without a failed request", 120, enrol_live),
    scenario("a pod that opts out stays out", 60, opt_out),
    scenario("a pod that comes later is in the mesh, and one that goes is gone", 90, come_and_go),
    scenario("an agent is killed and comes back: closed while it is away, working after", 120, killed),
    scenario("with fail open, pods talk in the clear while no agent is alive", 90, fail_open),
    scenario("an agent is replaced under load and nothing is lost", 120, upgrade),
    scenario(
        "the control plane is killed: traffic goes on, and policies arrive when it is back",
        120,
        control_away,
    ),
    scenario("certificates rotate under load and nothing is lost", 120, rotation),
    scenario("a pod's sandbox vanishes mid-stream and others do not notice", 90, vanish),
    scenario("a bad file is reported by line and the last good version stays in force", 60, bad_yaml),
];

const SOON: Duration = Duration::from_secs(15);

fn backend(bed: &Testbed) -> Result<String> {
    Ok(bed.pod("shop/backend")?.at(8080).to_string())
}

/// New connections all the time, and some that stay, from one pod to the backend.
pub(super) struct Traffic {
    new: Load,
    open: Load,
}

impl Traffic {
    pub(super) fn start(bed: &Testbed, from: &str) -> Result<Self> {
        let (pod, to) = (bed.pod(from)?, backend(bed)?);
        let new = Load::start(pod, &to, &["--shape", "crr", "--pause-ms", "2"])?;
        let open = Load::start(pod, &to, &["--shape", "pp", "--conns", "4", "--pause-ms", "2"])?;
        Ok(Self { new, open })
    }

    pub(super) fn unharmed(self, what: &str) -> Result<()> {
        for (name, load) in [("new", self.new), ("open", self.open)] {
            let figures = load.stop()?;
            ensure!(
                figures.ops > 0,
                "{what}: the load with {name} connections did nothing: {}",
                figures.first_error
            );
            ensure!(
                figures.errors == 0,
                "{what}: {} of {} requests over {name} connections failed: {}",
                figures.errors,
                figures.ops,
                figures.first_error
            );
        }
        Ok(())
    }
}

fn enrol_live() -> Result<()> {
    let mut bed = Testbed::build(
        &Topology::nodes(&["a", "b"]),
        &SHOP.replace("{istio.io/dataplane-mode: ambient}", "{}"),
    )?;
    bed.start_mesh(&MeshOptions::default())?;
    let traffic = Traffic::start(&bed, "shop/frontend")?;
    let before = bed.capture("a")?;
    run::pause(Duration::from_millis(500))?;
    ensure!(before.stop()?.iter().all(|s| s.to.port() != 15_008), "there is a tunnel before there is a mesh");
    bed.label("Namespace", "shop", "istio.io/dataplane-mode", Some("ambient"))?;
    enrolled(&bed, ENROLLED)?;
    let during = bed.capture("a")?;
    run::pause(Duration::from_millis(1500))?;
    let segments = during.stop()?;
    ensure!(segments.iter().any(|s| s.to.port() == 15_008), "no tunnel after enrolment");
    let to = bed.pod("shop/backend")?.at(8080);
    ensure!(!segments.iter().any(|s| s.syn && s.to == to), "a new connection still goes in the clear");
    bed.label("Namespace", "shop", "istio.io/dataplane-mode", None)?;
    for key in ENROLLED {
        bed.wait_protocol(key, "TCP")?;
    }
    wait::until_true("new connections in the clear again", Duration::from_secs(20), || {
        let after = bed.capture("a")?;
        run::pause(Duration::from_millis(200))?;
        Ok(after.stop()?.iter().any(|s| s.syn && s.to == to))
    })?;
    run::pause(Duration::from_millis(500))?;
    traffic.unharmed("joining and leaving")
}

fn opt_out() -> Result<()> {
    let mut bed = Testbed::build(
        &Topology::nodes(&["a", "b"]),
        &SHOP.replace(
            "name: other, namespace: shop, labels: {",
            "name: other, namespace: shop, labels: {istio.io/dataplane-mode: none, ",
        ),
    )?;
    bed.start_mesh(&MeshOptions::default())?;
    enrolled(&bed, &["shop/frontend", "shop/backend"])?;
    let capture = bed.capture("a")?;
    talks(&bed, "shop/other", &backend(&bed)?)?;
    let segments = capture.stop()?;
    ensure!(segments.iter().all(|s| s.to.port() != 15_008), "the pod that opted out has a tunnel");
    talks(&bed, "shop/frontend", &backend(&bed)?)?;
    shop::tunnelled(&bed)
}

fn come_and_go() -> Result<()> {
    let mut bed = open()?;
    let late = "
apiVersion: v1
kind: Pod
metadata: {name: late, namespace: shop, labels: {app: late}}
spec: {nodeName: a, serviceAccountName: frontend, containers: [{name: main, image: none}]}
";
    for round in 0..3 {
        bed.apply("late", late)?;
        enrolled(&bed, &["shop/late"]).with_context(|| format!("round {round}"))?;
        let capture = bed.capture("a")?;
        talks(&bed, "shop/late", &backend(&bed)?)?;
        ensure!(capture.stop()?.iter().any(|s| s.to.port() == 15_008), "the late pod has no tunnel");
        bed.remove("late")?;
    }
    talks(&bed, "shop/frontend", &backend(&bed)?)
}

fn killed() -> Result<()> {
    let mut bed = open()?;
    let to = backend(&bed)?;
    talks(&bed, "shop/frontend", &to)?;
    bed.kill_agent("a")?;
    // Closed by default: never in the clear.
    let capture = bed.capture("a")?;
    refused(&bed, "shop/frontend", &to).context("no agent on the client's node")?;
    let segments = capture.stop()?;
    ensure!(
        segments.iter().all(|s| s.to.port() != 8080),
        "it went out in the clear while no agent was alive"
    );
    bed.start_agent("a", &MeshOptions::default())?;
    bed.wait_agent_ready("a")?;
    wait::until("traffic after the restart", SOON, || talks(&bed, "shop/frontend", &to).map(Some))?;
    bed.kill_agent("b")?;
    refused(&bed, "outside/visitor", &to).context("no agent on the server's node")?;
    refused(&bed, "shop/frontend", &to).context("no agent on the server's node")?;
    bed.start_agent("b", &MeshOptions::default())?;
    bed.wait_agent_ready("b")?;
    wait::until("traffic after the restart", SOON, || talks(&bed, "shop/frontend", &to).map(Some))
}

fn fail_open() -> Result<()> {
    let mut bed = open_with(&Topology::nodes(&["a", "b"]), &MeshOptions::agent(&["--fail", "open"]))?;
    let to = backend(&bed)?;
    talks(&bed, "shop/frontend", &to)?;
    bed.kill_agent("a")?;
    bed.kill_agent("b")?;
    let capture = bed.capture("a")?;
    // Stale after three seconds without a heartbeat.
    wait::until("traffic without agents", SOON, || talks(&bed, "shop/frontend", &to).map(Some))?;
    let segments = capture.stop()?;
    ensure!(
        segments.iter().any(|s| s.to.to_string() == to),
        "traffic without agents did not go in the clear"
    );
    Ok(())
}

fn upgrade() -> Result<()> {
    let mut bed = open()?;
    let traffic = Traffic::start(&bed, "shop/frontend")?;
    let local = Traffic::start(&bed, "shop/local")?;
    run::pause(Duration::from_millis(500))?;
    for node in ["a", "b"] {
        bed.start_agent(node, &MeshOptions::default())?;
        bed.wait_agent_ready(node)?;
        bed.node(node)?.agent(0)?.signal(Signal::TERM)?;
        run::pause(Duration::from_secs(1))?;
    }
    run::pause(Duration::from_secs(1))?;
    traffic.unharmed("upgrade")?;
    local.unharmed("upgrade, on one node")?;
    // Nothing holds the old agents any more: they go.
    for node in ["a", "b"] {
        bed.node_mut(node)?.agent_mut(0)?.wait(SOON).with_context(|| format!("the old agent on {node}"))?;
    }
    talks(&bed, "shop/frontend", &backend(&bed)?)
}

fn control_away() -> Result<()> {
    let mut bed = open()?;
    let to = backend(&bed)?;
    let traffic = Traffic::start(&bed, "shop/frontend")?;
    if let Some(control) = &mut bed.control {
        control.kill();
    }
    run::pause(Duration::from_secs(2))?;
    talks(&bed, "shop/other", &to)?;
    talks(&bed, "shop/local", &to)?;
    bed.start_control(&MeshOptions::default())?;
    bed.apply("policy", ONLY_FRONTEND)?;
    wait::until("policy of the new control plane", Duration::from_secs(40), || {
        refused(&bed, "shop/other", &to).map(Some)
    })?;
    traffic.unharmed("a lost control plane")
}

/// Serial numbers of the certificates that a node holds for a service account.
pub(crate) fn serials(bed: &Testbed, node: &str, account: &str) -> Result<Vec<String>> {
    let dump: Value = serde_json::from_str(&bed.admin(node, "/config_dump")?).context("no JSON")?;
    let all = dump["certificates"].as_array().context("no certificates in the dump")?;
    let own = all.iter().filter(|c| c["identity"].as_str().is_some_and(|id| id.ends_with(account)));
    Ok(own.filter_map(|c| Some(c.pointer("/certChain/0/serialNumber")?.as_str()?.to_owned())).collect())
}

fn rotation() -> Result<()> {
    let options = MeshOptions::agent(&["--secret-ttl", "12s"]);
    let bed = open_with(&Topology::nodes(&["a", "b"]), &options)?;
    let first = serials(&bed, "a", "/sa/frontend")?;
    ensure!(!first.is_empty(), "no certificate for frontend");
    let traffic = Traffic::start(&bed, "shop/frontend")?;
    wait::until_true("another certificate", Duration::from_secs(40), || {
        Ok(serials(&bed, "a", "/sa/frontend")? != first)
    })?;
    // Past the end of the first certificate, new tunnels and old connections both work.
    run::pause(Duration::from_secs(14))?;
    talks(&bed, "shop/frontend", &backend(&bed)?)?;
    talks(&bed, "shop/other", &backend(&bed)?)?;
    traffic.unharmed("rotation")
}

fn vanish() -> Result<()> {
    let mut bed = open()?;
    let doomed = "
apiVersion: v1
kind: Pod
metadata: {name: doomed, namespace: shop, labels: {app: doomed}}
spec:
  nodeName: b
  containers: [{name: main, image: none, command: [mesh-tests, tool, serve, --echo, '8080', --source, '8083'], ports: [{containerPort: 8080}, {containerPort: 8083}]}]
";
    bed.apply("doomed", doomed)?;
    enrolled(&bed, &["shop/doomed"])?;
    let to = bed.pod("shop/doomed")?.at(8080).to_string();
    let source = bed.pod("shop/doomed")?.at(8083).to_string();
    let lost =
        Load::start(bed.pod("shop/frontend")?, &to, &["--shape", "pp", "--conns", "2", "--pause-ms", "2"])?;
    let stream = Load::start(bed.pod("shop/other")?, &source, &["--shape", "bulkr"])?;
    let traffic = Traffic::start(&bed, "shop/frontend")?;
    run::pause(Duration::from_millis(500))?;
    bed.crash_pod("shop/doomed")?;
    run::pause(Duration::from_secs(2))?;
    traffic.unharmed("another pod's end")?;
    let figures = lost.stop()?;
    ensure!(figures.ops > 0 && figures.errors > 0, "connections to the vanished pod: {figures:?}");
    drop(stream);
    let node = bed.node_mut("b")?;
    ensure!(node.agent_mut(0)?.running()?, "the agent ended: {}", node.agent(0)?.log());
    shop::talks(&bed, "shop/local", &backend(&bed)?)
}

fn bad_yaml() -> Result<()> {
    let mut bed = open()?;
    let to = backend(&bed)?;
    bed.apply("policy", ONLY_FRONTEND)?;
    wait::until("policy in force", SOON, || refused(&bed, "shop/other", &to).map(Some))?;
    bed.write_live("policy", &ONLY_FRONTEND.replace("action: ALLOW", "action: ALOW"))?;
    let errors = wait::until("report of the bad file", SOON, || {
        let errors = bed.control_get("/debug/errors")?;
        Ok(errors.contains("ALOW").then_some(errors))
    })?;
    // `action` is on line 7 of the file (the text begins with an empty line).
    for part in ["policy.yaml", "only-frontend", "action", "7", "ALLOW"] {
        ensure!(errors.contains(part), "the report does not name {part}: {errors}");
    }
    refused(&bed, "shop/other", &to)?;
    talks(&bed, "shop/frontend", &to)?;
    bed.write_live("policy", "kind: [this is\n  no: yaml")?;
    wait::until_true("report of the broken file", SOON, || Ok(bed.control_get("/debug/errors")? != errors))?;
    refused(&bed, "shop/other", &to)?;
    bed.write_live("policy", ONLY_FRONTEND)?;
    wait::until_true("end of the report", SOON, || {
        Ok(!bed.control_get("/debug/errors")?.contains("policy.yaml"))
    })
}
