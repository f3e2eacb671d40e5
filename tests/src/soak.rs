//! The soak run: two nodes under mixed load, while pods come and go and join and leave, policies change and
//! certificates rotate, round after round. No connection may fail, and what the processes of the mesh hold must not
//! grow: memory, descriptors, threads and entries of the kernel's maps are the same after the load as they were after
//! the first rounds of it.

mod figures;
mod traffic;

use crate::bed::mesh::MeshOptions;
use crate::bed::{Testbed, Topology, run, wait};
use crate::scenarios::shop::{ONLY_FRONTEND, SHOP, enrolled, refused, talks};
use anyhow::{Context, Result, ensure};
use figures::{Figures, excess};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};
use traffic::Traffic;

/// Options of the command.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// How long the load runs, without start and end
    #[arg(long, default_value_t = 30)]
    minutes: u64,
}

/// How long and how fast.
#[derive(Debug)]
pub struct Plan {
    /// Rounds before the figures that the end is compared with.
    pub warm_up: u64,
    /// Rounds between them.
    pub rounds: u64,
    /// One round: every kind of churn once.
    pub round: Duration,
    /// Lifetime of certificates. They are renewed at half of it, counted from two minutes before they were signed: ones
    /// of 140 s after ten seconds.
    pub secret_ttl: &'static str,
}

/// Time for what the mesh keeps on purpose after a load: unused tunnels and records of connections that are over.
const SETTLE: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_secs(20);

/// Two more pods in the mesh: `store` on b serves, `roamer` on a joins and leaves.
const MORE: &str = "
apiVersion: v1
kind: Pod
metadata: {name: store, namespace: shop, labels: {app: store}}
spec:
  nodeName: b
  serviceAccountName: store
  containers:
  - name: main
    image: none
    command: [mesh-tests, tool, serve, --echo, '8080', --source, '8083']
    ports: [{containerPort: 8080}, {containerPort: 8083}]
---
apiVersion: v1
kind: Pod
metadata: {name: roamer, namespace: shop, labels: {app: roamer}}
spec: {nodeName: a, serviceAccountName: roamer, containers: [{name: main, image: none}]}
";

/// A pod of one round.
const GUEST: &str = "
apiVersion: v1
kind: Pod
metadata: {name: guest, namespace: shop, labels: {app: guest}}
spec: {nodeName: NODE, serviceAccountName: guest, containers: [{name: main, image: none}]}
";

const MODE: &str = "istio.io/dataplane-mode";

/// Runs it and tells how it goes.
///
/// # Errors
/// Something failed, or grew.
pub fn run(args: &Args) -> Result<bool> {
    let round = Duration::from_secs(10);
    let plan = Plan { warm_up: 6, rounds: args.minutes * 60 / round.as_secs(), round, secret_ttl: "140s" };
    let begin = Instant::now();
    println!("soaking for {} minutes, after {} rounds of warm-up", args.minutes, plan.warm_up);
    soak(&plan, |line| println!("{:>6} s  {line}", begin.elapsed().as_secs()))?;
    Ok(true)
}

/// The whole run.
///
/// # Errors
/// A connection failed, a process ended, or something grew.
pub(crate) fn soak(plan: &Plan, tell: impl Fn(&str)) -> Result<()> {
    // Tunnels that nobody uses go soon, so that what is left at the end is what is held by mistake.
    let agent = MeshOptions::agent(&["--secret-ttl", plan.secret_ttl, "--pool-unused-release", "2s"]);
    // The relay keeps an hour's events; what it may hold is full after the warm-up.
    let options = MeshOptions { control: vec!["--relay-memory=1".into()], ..agent };
    let mut bed = Testbed::build(&Topology::nodes(&["a", "b"]), &format!("{SHOP}---{MORE}"))?;
    bed.start_mesh(&options)?;
    enrolled(
        &bed,
        &["shop/frontend", "shop/other", "shop/backend", "shop/local", "shop/store", "shop/roamer"],
    )?;
    let mut serials = BTreeSet::new();
    rounds(&mut bed, plan.warm_up, plan.round, &mut serials, &tell).context("during the warm-up")?;
    let before = calm(&bed)?;
    tell(&format!("after the warm-up: {before}"));
    serials.clear();
    rounds(&mut bed, plan.rounds, plan.round, &mut serials, &tell)?;
    let renewed = u64::try_from(serials.len()).unwrap_or(u64::MAX);
    ensure!(renewed > plan.rounds / 2, "only {renewed} certificates in {} rounds", plan.rounds);
    let mut after = Figures::of(&bed)?;
    let settled = wait::until_true("figures as after the warm-up", SETTLE, || {
        after = Figures::of(&bed)?;
        Ok(excess(&before, &after).is_empty())
    });
    tell(&format!("at the end:        {after}"));
    settled.with_context(|| format!("something grew: {}", excess(&before, &after).join("; ")))
}

/// The figures once they stand still: what they fall to after the load.
fn calm(bed: &Testbed) -> Result<Figures> {
    let mut last = Figures::of(bed)?;
    let mut since = Instant::now();
    let end = Instant::now() + SETTLE / 2;
    // Tunnels go within twelve seconds; nothing else is waited for that takes longer.
    while since.elapsed() < Duration::from_secs(14) && Instant::now() < end {
        run::pause(Duration::from_millis(500))?;
        let now = Figures::of(bed)?;
        if now.counts() != last.counts() {
            since = Instant::now();
        }
        last = now;
    }
    Ok(last)
}

/// Rounds of churn under one load.
fn rounds(
    bed: &mut Testbed,
    count: u64,
    round: Duration,
    serials: &mut BTreeSet<String>,
    tell: &impl Fn(&str),
) -> Result<()> {
    let mut traffic = Traffic::start(bed)?;
    for number in 1..=count {
        let end = Instant::now() + round;
        churn(bed, number).with_context(|| format!("in round {number}"))?;
        traffic.burst(bed).with_context(|| format!("in round {number}"))?;
        serials.extend(crate::scenarios::serials(bed, "a", "/sa/frontend")?);
        traffic.alive()?;
        alive(bed)?;
        tell(&format!("round {number}: {}", Figures::of(bed)?));
        run::pause(end.saturating_duration_since(Instant::now()))?;
    }
    traffic.unharmed()
}

/// Every kind of change once. What it leaves is what it found.
fn churn(bed: &mut Testbed, number: u64) -> Result<()> {
    let to = bed.pod("shop/backend")?.at(8080).to_string();
    bed.apply("policy", ONLY_FRONTEND)?;
    wait::until("policy in force", SOON, || refused(bed, "shop/other", &to).map(Some))?;
    talks(bed, "shop/frontend", &to)?;
    bed.label("Pod", "roamer", MODE, Some("none"))?;
    bed.wait_protocol("shop/roamer", "TCP")?;
    let node = if number.is_multiple_of(2) { "a" } else { "b" };
    bed.apply("guest", &GUEST.replace("NODE", node))?;
    enrolled(bed, &["shop/guest"])?;
    let store = bed.pod("shop/store")?.at(8080).to_string();
    talks(bed, "shop/guest", &store)?;
    refused(bed, "shop/guest", &to)?;
    bed.remove("policy")?;
    wait::until("policy gone", SOON, || talks(bed, "shop/other", &to).map(Some))?;
    bed.label("Pod", "roamer", MODE, None)?;
    bed.wait_enrolled(&["shop/roamer"])?;
    talks(bed, "shop/roamer", &store)?;
    bed.remove("guest")
}

/// Every process of the mesh still runs.
fn alive(bed: &mut Testbed) -> Result<()> {
    for name in ["a", "b"] {
        let agent = bed.node_mut(name)?.agent_mut(0)?;
        ensure!(agent.running()?, "the agent on {name} ended: {}", agent.log());
    }
    let control = bed.control.as_mut().context("no control plane")?;
    ensure!(control.running()?, "the control plane ended: {}", control.log());
    Ok(())
}
