//! What changes while traffic runs: pods that come and go, agents, the control plane, the node's own daemons.

use super::pods::{self, IMAGE, PORT};
use super::{Bed, SYSTEM, Scenario, Space, scenario};
use crate::bed::net::listeners;
use crate::bed::run as this_run;
use crate::bed::wait;
use crate::cluster::kubectl::{has_condition, name};
use crate::cluster::node;
use crate::tools::load::Figures;
use anyhow::{Context, Result, ensure};
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

pub(super) const SCENARIOS: &[Scenario] = &[
    scenario("fifty running pods are captured soon after their namespace is labelled", 240, fifty),
    scenario("pods come and go fifty at once, and each of them is captured", 300, churn),
    scenario("init containers and jobs are in the mesh with their first connection", 180, jobs),
    scenario("agents are replaced one after the other under load, and nothing fails", 300, rollout),
    scenario(
        "idle connections of a database live through the replacement of agents, which end with the last of them",
        300,
        idle,
    ),
    scenario("an agent that is killed comes back, and its pods are in the mesh again", 180, killed),
    scenario(
        "with the API server and the control plane away, traffic goes on and agents start again",
        240,
        away,
    ),
    scenario("containerd is killed and comes back, and captured pods stay so", 180, containerd),
];

/// Label of namespaces and pods in the mesh.
const MODE: &str = "istio.io/dataplane-mode";

pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// A deployment of pods that answer on [`PORT`], spread over the nodes.
fn deployment(replicas: usize) -> String {
    format!(
        "---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: many}}
spec:
  replicas: {replicas}
  selector: {{matchLabels: {{app: many}}}}
  template:
    metadata: {{labels: {{app: many}}}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: main
        image: {IMAGE}
        imagePullPolicy: IfNotPresent
        command: [mesh-tests, tool, web, --name, many, --port, '{PORT}']
        ports: [{{containerPort: {PORT}}}]
"
    )
}

/// The pods of the deployment that are ready and stay: their addresses by name.
fn ready(bed: &Bed, space: &Space<'_>) -> Result<BTreeMap<String, String>> {
    let args = ["--namespace", space.name(), "get", "pods", "--selector", "app=many"];
    let list = bed.kubectl.json(&args)?;
    let items = list["items"].as_array().cloned().unwrap_or_default();
    let stays = |pod: &&serde_json::Value| {
        pod["metadata"]["deletionTimestamp"].is_null() && has_condition(pod, "Ready")
    };
    let address = |pod: &serde_json::Value| pod["status"]["podIP"].as_str().unwrap_or_default().to_owned();
    Ok(items.iter().filter(stays).map(|pod| (name(pod), address(pod))).collect())
}

fn wait_many(bed: &Bed, space: &Space<'_>, count: usize) -> Result<BTreeMap<String, String>> {
    wait::until(&format!("{count} ready pods"), Duration::from_secs(150), || {
        Ok(Some(ready(bed, space)?).filter(|pods| pods.len() == count))
    })
}

/// Addresses of the pods in whose network namespaces more listens than their own server: those that are captured.
fn captured(bed: &Bed) -> Result<BTreeSet<String>> {
    let script = format!(
        "for p in /run/netns/*; do [ -z \"$(nsenter --net=$p ss -Hltn not sport = {PORT})\" ] || nsenter --net=$p ip -o \
         -4 address show eth0; done"
    );
    let mut found = BTreeSet::new();
    for name in &bed.nodes {
        let out = node::inside(bed.layout()?, name)?.args(["sh", "-c", &script]).output()?;
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let address = |line: &str| Some(line.split_whitespace().nth(3)?.split('/').next()?.to_owned());
        found.extend(text.lines().filter_map(address));
    }
    Ok(found)
}

/// Pods of a set that are not captured.
fn missing(bed: &Bed, pods: &BTreeMap<String, String>) -> Result<Vec<String>> {
    let captured = captured(bed)?;
    Ok(pods
        .iter()
        .filter(|(_, address)| !captured.contains(*address))
        .map(|(name, _)| name.clone())
        .collect())
}

fn fifty(bed: &Bed) -> Result<()> {
    bed.layout()?;
    bed.mesh()?;
    let space = bed.space(&[])?;
    space.apply(&deployment(50))?;
    let pods = wait_many(bed, &space, 50)?;
    ensure!(missing(bed, &pods)?.len() == 50, "pods without a label are captured");
    let before = with_other_listeners();
    let start = Instant::now();
    space.label(MODE, Some("ambient"))?;
    wait::until_true("fifty network namespaces with listeners of an agent", PATIENCE, || {
        Ok(with_other_listeners().difference(&before).count() >= 50)
    })?;
    eprintln!("fifty pods were captured within {:.2} s of their label", start.elapsed().as_secs_f64());
    ensure!(missing(bed, &pods)?.is_empty(), "others than the fifty pods are captured");
    Ok(())
}

/// Network namespaces of this machine in which somebody listens beside a pod's own server, by their inode: quickly, by one
/// process of each.
fn with_other_listeners() -> BTreeSet<u64> {
    let (mut seen, mut found) = (BTreeSet::new(), BTreeSet::new());
    for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        // Those that end meanwhile are nobody's.
        let Ok(netns) = std::fs::metadata(process.path().join("ns/net")) else { continue };
        if !seen.insert(netns.ino()) {
            continue;
        }
        let tables = ["net/tcp", "net/tcp6"].map(|file| std::fs::read_to_string(process.path().join(file)));
        let mut ports = tables.iter().flatten().flat_map(|table| listeners(table)).map(|at| at.port());
        if ports.any(|port| port.to_string() != PORT) {
            found.insert(netns.ino());
        }
    }
    found
}

fn churn(bed: &Bed) -> Result<()> {
    bed.layout()?;
    bed.mesh()?;
    let space = bed.space(&[(MODE, "ambient")])?;
    space.apply(&deployment(50))?;
    let first = wait_many(bed, &space, 50)?;
    // Each was held until it was captured: there is nothing to wait for.
    let left_out = missing(bed, &first)?;
    ensure!(left_out.is_empty(), "ready pods are not captured: {left_out:?}");
    space.kubectl(&["delete", "pods", "--selector", "app=many", "--wait=false"])?;
    let second = wait::until("fifty other pods", Duration::from_secs(150), || {
        let pods = ready(bed, &space)?;
        let other = pods.len() == 50 && !pods.keys().any(|pod| first.contains_key(pod));
        Ok(other.then_some(pods))
    })?;
    let left_out = missing(bed, &second)?;
    ensure!(left_out.is_empty(), "ready pods are not captured: {left_out:?}");
    space.apply(&pods::client("client", &bed.nodes[0]))?;
    space.wait_ready(&["client"])?;
    for address in second.values().step_by(10) {
        space.curl("client", &format!("http://{address}:{PORT}/"))?;
    }
    Ok(())
}

/// mutual TLS or nothing: what gets an answer was in the mesh.
const STRICT: &str = "
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default}
spec: {mtls: {mode: STRICT}}
";

fn jobs(bed: &Bed) -> Result<()> {
    bed.mesh()?;
    let space = bed.space(&[(MODE, "ambient")])?;
    space.apply(&(STRICT.to_owned() + &pods::web("server", &bed.nodes[1])))?;
    space.wait_ready(&["server"])?;
    let url = format!("http://{}/", space.server("server")?);
    let outside = bed.space(&[])?;
    outside.apply(&pods::client("client", &bed.nodes[0]))?;
    outside.wait_ready(&["client"])?;
    wait::until_true("refusal of plain text", PATIENCE, || Ok(outside.curl("client", &url).is_err()))?;
    let ask = format!("[curl, --silent, --show-error, --fail, --max-time, '5', '{url}']");
    space.apply(&format!(
        "
apiVersion: batch/v1
kind: Job
metadata: {{name: job}}
spec:
  completions: 4
  parallelism: 2
  backoffLimit: 0
  template:
    spec:
      restartPolicy: Never
      initContainers:
      - {{name: before, image: '{IMAGE}', imagePullPolicy: IfNotPresent, command: {ask}}}
      containers:
      - {{name: main, image: '{IMAGE}', imagePullPolicy: IfNotPresent, command: {ask}}}
"
    ))?;
    wait::until_true("end of the job", PATIENCE, || {
        let job = space.get("job", "job")?;
        if has_condition(&job, "Failed") {
            let logs =
                space.kubectl(&["logs", "--selector", "job-name=job", "--all-containers", "--tail=5"])?;
            return Err(wait::hopeless(format!("the job failed: {logs}")));
        }
        Ok(has_condition(&job, "Complete"))
    })
}

/// A pod that makes HTTP requests, or holds round trips on open connections, until it is told to end.
pub(super) fn load(name: &str, node: &str, to: &str, shape: &str, pause_ms: &str) -> String {
    let argv = [
        "mesh-tests",
        "tool",
        "load",
        "--shape",
        shape,
        "--conns",
        "4",
        "--pause-ms",
        pause_ms,
        "--seconds",
        "0",
        "--to",
        to,
    ];
    pods::pod(name, node, &argv)
        .replace("terminationGracePeriodSeconds: 1", "terminationGracePeriodSeconds: 10")
        + "  restartPolicy: Never\n"
}

/// Servers on the second node, loads on the first: requests on new connections, and round trips on old ones.
pub(super) fn under_load(bed: &Bed, space: &Space<'_>) -> Result<()> {
    let (a, b) = (&bed.nodes[0], &bed.nodes[1]);
    let echo = pods::pod("echo", b, &["mesh-tests", "tool", "serve", "--echo", PORT]);
    space.apply(&[pods::web("web", b), echo].concat())?;
    space.wait_ready(&["web", "echo"])?;
    space.wait_captured(&["web", "echo"], true)?;
    let to = |pod: &str| -> Result<String> { Ok(space.server(pod)?.to_string()) };
    let loads = [load("requests", a, &to("web")?, "http", "20"), load("trips", a, &to("echo")?, "pp", "20")];
    space.apply(&loads.concat())?;
    space.wait_ready(&["requests", "trips"])
}

/// Ends a load; what it saw.
pub(super) fn figures(space: &Space<'_>, pod: &str) -> Result<Figures> {
    space.exec(pod, &["sh", "-c", "kill -TERM 1"])?;
    wait::until(&format!("figures of {pod}"), PATIENCE, || {
        let logs = space.kubectl(&["logs", pod])?;
        let last = logs.lines().last().unwrap_or_default();
        Ok(serde_json::from_str(last).ok())
    })
}

pub(super) fn unharmed(space: &Space<'_>, least: u64) -> Result<()> {
    for pod in ["requests", "trips"] {
        let figures = figures(space, pod)?;
        ensure!(figures.errors == 0, "{pod}: {} failures, first: {}", figures.errors, figures.first_error);
        ensure!(figures.ops > least, "{pod} made only {} round trips", figures.ops);
    }
    Ok(())
}

fn agents(bed: &Bed) -> Result<BTreeSet<String>> {
    let args = ["--namespace", SYSTEM, "get", "pods", "--selector", "app=undermesh-node"];
    let list = bed.kubectl.json(&args)?;
    Ok(list["items"].as_array().cloned().unwrap_or_default().iter().map(name).collect())
}

/// Those that nobody has told to leave.
fn serving(bed: &Bed) -> Result<BTreeSet<String>> {
    let args = ["--namespace", SYSTEM, "get", "pods", "--selector", "app=undermesh-node"];
    let list = bed.kubectl.json(&args)?;
    let items = list["items"].as_array().cloned().unwrap_or_default();
    Ok(items.iter().filter(|pod| pod["metadata"]["deletionTimestamp"].is_null()).map(name).collect())
}

/// The agent of a node that nobody has told to leave: those of an earlier scenario may still carry something.
fn agent_of(bed: &Bed, node: &str) -> Result<String> {
    let field = format!("spec.nodeName={node}");
    let args = [
        "--namespace",
        SYSTEM,
        "get",
        "pods",
        "--selector",
        "app=undermesh-node",
        "--field-selector",
        &field,
    ];
    let list = bed.kubectl.json(&args)?;
    let items = list["items"].as_array().cloned().unwrap_or_default();
    let serves = items.iter().find(|pod| pod["metadata"]["deletionTimestamp"].is_null()).map(name);
    serves.with_context(|| format!("no agent on {node}"))
}

fn rollout(bed: &Bed) -> Result<()> {
    bed.mesh()?;
    let space = bed.space(&[(MODE, "ambient")])?;
    under_load(bed, &space)?;
    let before = agents(bed)?;
    bed.kubectl.run(&["--namespace", SYSTEM, "rollout", "restart", "daemonset/undermesh-node"])?;
    bed.kubectl.run(&[
        "--namespace",
        SYSTEM,
        "rollout",
        "status",
        "daemonset/undermesh-node",
        "--timeout=120s",
    ])?;
    // Longer than the drain, so that the old agents' last connections would be cut.
    wait::until_true("end of the old agents", PATIENCE, || Ok(agents(bed)?.is_disjoint(&before)))?;
    this_run::pause(Duration::from_secs(2))?;
    let requests = figures(&space, "requests")?;
    ensure!(requests.errors == 0, "{} requests failed: {}", requests.errors, requests.first_error);
    ensure!(requests.ops > 100, "only {} requests were made", requests.ops);
    Ok(())
}

/// How long agents of [`idle`] may carry connections: longer than the scenario.
const DRAIN: &str = "node.drainSeconds=600";

/// Restores what [`Bed::install`] sets, also when a scenario fails.
struct ShortDrain<'a>(&'a Bed);

impl Drop for ShortDrain<'_> {
    fn drop(&mut self) {
        if let Err(error) = upgrade(self.0, "node.drainSeconds=5") {
            eprintln!("warning: the agents' drain is not short again: {error:#}");
        }
    }
}

fn upgrade(bed: &Bed, set: &str) -> Result<()> {
    bed.meshctl()?.run(&["upgrade", "--set", set, "--wait-timeout", "120s"]).map(drop)
}

fn idle(bed: &Bed) -> Result<()> {
    bed.mesh()?;
    upgrade(bed, DRAIN)?;
    let short = ShortDrain(bed);
    let space = bed.space(&[(MODE, "ambient")])?;
    let (a, b) = (&bed.nodes[0], &bed.nodes[1]);
    let redis = ["redis-server", "--port", PORT, "--protected-mode", "no", "--save", ""];
    let echo = pods::pod("echo", b, &["mesh-tests", "tool", "serve", "--echo", PORT]);
    space.apply(&[pods::pod("redis", b, &redis), echo].concat())?;
    space.wait_ready(&["redis", "echo"])?;
    space.wait_captured(&["redis", "echo"], true)?;
    // It waits for words and says nothing itself; a connection that breaks is its end.
    let address = space.address("redis")?.to_string();
    let subscribe = ["redis-cli", "-h", &address, "-p", PORT, "subscribe", "news"];
    let subscriber = pods::pod("subscriber", a, &subscribe) + "  restartPolicy: Never\n";
    let trips = load("trips", a, &space.server("echo")?.to_string(), "pp", "250");
    space.apply(&[subscriber, trips].concat())?;
    space.wait_ready(&["subscriber", "trips"])?;
    let ask = |words: &[&str]| space.exec("redis", &[&["redis-cli", "-p", PORT], words].concat());
    wait::until_true("a subscriber", PATIENCE, || {
        Ok(ask(&["pubsub", "numsub", "news"])?.trim_end().ends_with('1'))
    })?;

    let (before, start) = (serving(bed)?, Instant::now());
    // Another template, and so other agents; done once these serve, though the old ones go on carrying.
    upgrade(bed, "node.drainSeconds=601")?;
    bed.meshctl()?.run(&["verify"])?;
    this_run::pause(Duration::from_secs(8))?;
    let (after, now) = (agents(bed)?, serving(bed)?);
    ensure!(before.is_subset(&after), "agents with open connections have gone: {before:?}, {after:?}");
    ensure!(now.is_disjoint(&before) && now.len() == before.len(), "{now:?} are to serve after {before:?}");
    ask(&["publish", "news", "words-after"])?;
    wait::until_true("what was published", PATIENCE, || {
        Ok(space.kubectl(&["logs", "subscriber"])?.contains("words-after"))
    })?;
    let list = ask(&["client", "list", "type", "pubsub"])?;
    let age = list.split_whitespace().find_map(|word| word.strip_prefix("age=")?.parse::<u64>().ok());
    let least = start.elapsed().as_secs();
    ensure!(age.is_some_and(|age| age >= least), "the connection is not the one of before: {list}");
    let trips = figures(&space, "trips")?;
    ensure!(trips.errors == 0, "{} failures, first: {}", trips.errors, trips.first_error);
    // Four connections in turn, four times a second, for as long as the upgrade and eight seconds more.
    ensure!(trips.ops >= 32, "only {} round trips", trips.ops);

    // Nothing else is open: what held the old agents has gone, and long before their limit they go.
    space.kubectl(&["delete", "pod", "subscriber", "--now"])?;
    wait::until_true("end of the old agents", PATIENCE, || Ok(agents(bed)?.is_disjoint(&before)))?;
    drop(short);
    Ok(())
}

fn killed(bed: &Bed) -> Result<()> {
    bed.mesh()?;
    let space = bed.space(&[(MODE, "ambient")])?;
    let (a, b) = (&bed.nodes[0], &bed.nodes[1]);
    space.apply(&[pods::client("client", a), pods::web("server", b)].concat())?;
    space.wait_ready(&["client", "server"])?;
    space.wait_captured(&["client", "server"], true)?;
    let url = format!("http://{}/", space.server("server")?);
    space.curl("client", &url)?;
    let agent = agent_of(bed, b)?;
    let script = "kill -9 $(pidof mesh-node)";
    node::inside(bed.layout()?, b)?.args(["sh", "-c", script]).status().context("cannot run kill")?;
    wait::until_true("agent that was started again", PATIENCE, || {
        let pod = bed.kubectl.json(&["--namespace", SYSTEM, "get", "pod", &agent])?;
        let restarts = pod["status"]["containerStatuses"][0]["restartCount"].as_u64().unwrap_or(0);
        Ok(restarts > 0 && has_condition(&pod, "Ready"))
    })?;
    wait::until_true("answer through the new agent", PATIENCE, || Ok(space.curl("client", &url).is_ok()))?;
    space.wait_captured(&["client", "server"], true)?;
    // A second time at once: the agent is back off, but only for its own sake.
    space.apply(&pods::web("later", b))?;
    space.wait_ready(&["later"])?;
    space.wait_captured(&["later"], true)
}

fn away(bed: &Bed) -> Result<()> {
    let layout = bed.layout()?;
    bed.mesh()?;
    let space = bed.space(&[(MODE, "ambient")])?;
    under_load(bed, &space)?;
    let agent = agent_of(bed, &bed.nodes[1])?;
    let istiod = ["--namespace", SYSTEM, "scale", "deployment/istiod"];
    bed.kubectl.run(&[&istiod[..], &["--replicas=0"]].concat())?;
    wait::until_true("end of the control plane", PATIENCE, || {
        let args = ["--namespace", SYSTEM, "get", "pods", "--selector", "app=istiod"];
        Ok(bed.kubectl.json(&args)?["items"].as_array().is_some_and(Vec::is_empty))
    })?;
    let outcome = crate::cluster::life::without_api(layout, || {
        ensure!(!bed.kubectl.api_ready(), "the API server still answers");
        this_run::pause(bed.away)
    });
    bed.kubectl.run(&[&istiod[..], &["--replicas=1"]].concat())?;
    // After a long absence the cluster's own controllers try the API server once a minute or so.
    bed.kubectl.run(&["--namespace", SYSTEM, "rollout", "status", "deployment/istiod", "--timeout=180s"])?;
    outcome?;
    ensure!(agent == agent_of(bed, &bed.nodes[1])?, "the agent was replaced");
    unharmed(&space, 200)
}

fn containerd(bed: &Bed) -> Result<()> {
    let layout = bed.layout()?;
    bed.mesh()?;
    let space = bed.space(&[(MODE, "ambient")])?;
    under_load(bed, &space)?;
    let inside = |script: &str| -> Result<String> {
        let out = node::inside(layout, &bed.nodes[1])?.args(["sh", "-c", script]).output()?;
        Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned())
    };
    let old = inside("pidof containerd")?;
    inside(&format!("kill -9 {old}"))?;
    wait::until_true("another containerd", PATIENCE, || {
        let new = inside("pidof containerd")?;
        Ok(!new.is_empty() && new != old && inside("ctr version >/dev/null && echo well")? == "well")
    })?;
    space.apply(&pods::web("later", &bed.nodes[1]))?;
    space.wait_ready(&["later"])?;
    space.wait_captured(&["later", "web", "echo"], true)?;
    unharmed(&space, 100)
}
