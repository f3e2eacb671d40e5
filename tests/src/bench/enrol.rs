//! Enrolment: the time from a label to the first connection out of the pod that the mesh carries.
//!
//! What is waited for is the answer of a server that takes mutual TLS only ([`crate::tools::join`]): a pod that is not
//! captured is refused by it, a pod of which half is captured is not answered.

use super::rig::{ECHO, Rig};
use super::rows::{Bar, Row};
use crate::bed::process::Proc;
use crate::bed::{Pod, wait};
use crate::tools::join::{Joined, now_ns};
use anyhow::{Context, Result, ensure};
use std::time::Duration;

/// Where pods join; the server is on the other node.
const NODE: &str = "a";
/// Identities of the thousand.
const ACCOUNTS: usize = 20;
/// How long a thousand pods may take, and to be let go.
const LONGEST: Duration = Duration::from_secs(120);

/// Rows of one pod and of a thousand; of one of them only if `only` names it (`enrol.pod`, `enrol.1000`), which then is
/// as many pods, once, however quick it is to be.
///
/// # Errors
/// A pod is not enrolled, or half of it.
pub(super) fn rows(rig: &mut Rig, quick: bool, only: Option<&str>) -> Result<Vec<Row>> {
    let (single, many, repeat) = if quick { (10, 100, 1) } else { (60, 1000, 3) };
    let many = if only == Some("enrol.1000") { 1000 } else { many };
    rig.bed.apply("enrol-server", SERVER)?;
    let server = rig.bed.pod("strict/server")?.spawn(["mesh-tests", "tool", "serve", "--echo", "9000"])?;
    rig.bed.wait_enrolled(&["strict/server"])?;
    let mut rows = Vec::new();
    if only != Some("enrol.1000") {
        // Each is an identity of its own: its certificate has to be fetched.
        let one = (0..single).map(|i| join_one(rig, i)).collect::<Result<Vec<_>>>()?;
        rows.push(Row::p99("enrol.pod", "ms", Bar::AtMost(50.0), one.clone()));
        rows.push(Row::of("enrol.pod.p50", "ms", Bar::None, one));
    }
    if only == Some("enrol.pod") {
        return Ok(rows);
    }
    eprintln!("starting {many} pods");
    let pods: String = (0..many).map(|i| pod("many", i, &format!("account-{}", i % ACCOUNTS))).collect();
    rig.bed.apply("enrol-many-namespace", &namespace("many"))?;
    rig.bed.apply("enrol-many", &pods)?;
    let before = files(rig)?;
    let mut spent = Vec::new();
    let took = (0..repeat).map(|turn| {
        if turn > 0 {
            leave_many(rig)?;
        }
        let before = cpu(rig)?;
        let took = join_many(rig, many)? / 1e3;
        spent.push((cpu(rig)?, before));
        Ok(took)
    });
    let took = took.collect::<Result<Vec<f64>>>();
    let each = (files(rig)? - before) / many as f64;
    let (name, bar) = (format!("enrol.{many}"), Bar::AtMost(5.0));
    rows.push(match took {
        Ok(took) => Row::of(&name, "s", bar, took),
        // The figures of all other rows must not be lost for it.
        Err(error) => Row { ok: Some(false), ..Row::skipped(&name, "s", bar, &format!("{error:#}")) },
    });
    rows.push(Row::of("enrol.files_per_pod", "files", Bar::None, vec![each]));
    for (i, who) in SPENDERS.iter().enumerate() {
        let runs = spent.iter().map(|(after, before)| (after[i] - before[i]) * 1e3 / many as f64).collect();
        rows.push(Row::of(&format!("{name}.cpu.{who}"), "ms/pod", Bar::None, runs));
    }
    drop(server);
    Ok(rows)
}

const SERVER: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: strict, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict, namespace: strict}
spec: {mtls: {mode: STRICT}}
---
apiVersion: v1
kind: Pod
metadata: {name: server, namespace: strict}
spec: {nodeName: b, containers: [{name: main, image: none}]}
";

fn namespace(name: &str) -> String {
    format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}}}\n")
}

fn pod(namespace: &str, i: usize, account: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: p{i}, namespace: {namespace}}}\n\
         spec: {{nodeName: {NODE}, serviceAccountName: {account}, containers: [{{name: main, image: none}}]}}\n---\n"
    )
}

/// Milliseconds from the label on a pod to its first connection through the mesh.
fn join_one(rig: &mut Rig, i: usize) -> Result<f64> {
    rig.bed.apply(&format!("enrol-one-{i}"), &pod("single", i, &format!("account-{i}")))?;
    let key = format!("single/p{i}");
    timed(rig, &[key], |rig| {
        let name = format!("p{i}");
        rig.bed.edit("Pod", &name, |pod| {
            if pod["metadata"]["namespace"] == "single" {
                pod["metadata"]["labels"] = serde_json::json!({"istio.io/dataplane-mode": "ambient"});
            }
        })
    })
}

/// Milliseconds from the label on their namespace to the first connection of the last pod.
fn join_many(rig: &mut Rig, many: usize) -> Result<f64> {
    let keys: Vec<String> = (0..many).map(|i| format!("many/p{i}")).collect();
    timed(rig, &keys, |rig| rig.bed.label("Namespace", "many", "istio.io/dataplane-mode", Some("ambient")))
}

/// Takes the label away and waits until the agent has let all pods go.
fn leave_many(rig: &mut Rig) -> Result<()> {
    rig.bed.label("Namespace", "many", "istio.io/dataplane-mode", None)?;
    wait::until_true("release of all pods", LONGEST, || {
        Ok(!rig.bed.admin(NODE, "/pods")?.contains("\"many\""))
    })
}

/// Milliseconds from a change to the moment at which every pod was answered.
fn timed(rig: &mut Rig, keys: &[String], change: impl FnOnce(&mut Rig) -> Result<()>) -> Result<f64> {
    let server = rig.bed.pod("strict/server")?.at(ECHO).to_string();
    let pods: Vec<&Pod> = keys.iter().map(|key| rig.bed.pod(key)).collect::<Result<_>>()?;
    let first = pods.first().context("no pod joins")?;
    let mut argv = ["mesh-tests", "tool", "join", "--to", &server].map(str::to_owned).to_vec();
    for pod in &pods {
        argv.extend(["--netns".to_owned(), pod.netns.path().to_string_lossy().into_owned()]);
    }
    let mut witness = first.spawn(argv)?;
    said(&mut witness, "waiting")?;
    let start = now_ns();
    change(rig)?;
    let seen: Joined =
        serde_json::from_str(&said(&mut witness, "{")?).context("the witness is unreadable")?;
    ensure!(seen.stuck == 0, "{} connections were neither refused nor answered", seen.stuck);
    #[expect(clippy::cast_precision_loss, reason = "nanoseconds of seconds")]
    let took = seen.at_ns.saturating_sub(start) as f64 / 1e6;
    Ok(took)
}

/// Waits for a line that begins with `with`.
fn said(witness: &mut Proc, with: &str) -> Result<String> {
    wait::until(&format!("line {with:?} of the witness"), LONGEST, || {
        let log = witness.log();
        let line = log.lines().find(|line| line.starts_with(with)).map(str::to_owned);
        if line.is_none() && !witness.running()? {
            return Err(wait::hopeless(format!("the witness ended: {log}")));
        }
        Ok(line)
    })
}

/// Who works while pods join: the agent of their node, the agent of the server's, which answers a new tunnel of each pod,
/// and the control plane.
const SPENDERS: [&str; 3] = ["agent", "peer", "control"];

/// CPU seconds of [`SPENDERS`] so far.
fn cpu(rig: &Rig) -> Result<[f64; 3]> {
    let agent = |node| rig.bed.node(node)?.agents.last().context("no agent runs")?.cpu_seconds();
    let control = rig.bed.control.as_ref().context("no control plane runs")?.cpu_seconds()?;
    Ok([agent(NODE)?, agent("b")?, control])
}

/// Files that the node's agent holds open.
fn files(rig: &Rig) -> Result<f64> {
    let pid = rig.bed.node(NODE)?.agents.last().context("no agent runs")?.pid();
    let count = std::fs::read_dir(format!("/proc/{pid}/fd")).context("the agent has ended")?.count();
    #[expect(clippy::cast_precision_loss, reason = "thousands")]
    Ok(count as f64)
}
