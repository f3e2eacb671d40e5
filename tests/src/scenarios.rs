//! The scenarios: whole-mesh tests whose names are sentences.
//!
//! Each gets a deadline and builds its own testbed, so that none depends on another. A scenario's assertions read a
//! side that the product does not write: a packet capture, the kernel's socket tables, a server's own log, what a
//! client got.

mod control;
mod dashboards;
mod endpoints;
mod fast;
mod gateway_tls;
mod gateways;
mod hostile;
mod insight;
mod interfaces;
mod interop;
mod istio_gateways;
mod kiali;
mod leaving;
mod life;
mod map;
mod network;
mod overload;
mod peers;
mod plain;
mod policy;
mod programs;
mod relayed;
pub(crate) mod runner;
mod services;
mod settings;
pub(crate) mod shop;
mod soak;
mod time;
mod traced;
mod upgrades;
mod waypoint;
mod waypoint_authz;
mod waypoint_grpc;
mod waypoint_http2;
mod waypoint_keys;
mod waypoint_rules;
mod waypoint_seen;
mod waypoint_sent;
mod waypoint_telemetry;
mod waypoints;
mod wire;

use crate::bed::mesh::MeshOptions;
use crate::bed::run as this_run;
use crate::bed::{Testbed, Topology};
use anyhow::Result;
pub(crate) use life::serials;
pub(crate) use programs::nginx_conf;
use runner::Case;
use std::fmt;
use std::time::Duration;

/// How a scenario ends early without having failed.
#[derive(Debug)]
pub struct Skip(pub String);

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// An error that makes the running scenario count as skipped, with the reason.
pub fn skip(reason: impl Into<String>) -> anyhow::Error {
    Skip(reason.into()).into()
}

/// A scenario.
pub struct Scenario {
    /// The behaviour, as a sentence.
    pub name: &'static str,
    /// How long it may take.
    pub deadline: Duration,
    /// The test.
    pub run: fn() -> Result<()>,
}

/// Builds a table entry.
pub const fn scenario(name: &'static str, seconds: u64, run: fn() -> Result<()>) -> Scenario {
    Scenario { name, deadline: Duration::from_secs(seconds), run }
}

/// Which scenarios.
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// Words that a name must contain, all of them
    filter: Vec<String>,
    /// Stop after the first failure
    #[arg(long)]
    pub(crate) fail_fast: bool,
}

impl RunArgs {
    /// Whether a scenario was asked for.
    pub(crate) fn wants(&self, name: &str) -> bool {
        self.filter.iter().all(|word| name.contains(word.as_str()))
    }
}

fn all() -> impl Iterator<Item = &'static Scenario> {
    [
        plain::SCENARIOS,
        wire::SCENARIOS,
        policy::SCENARIOS,
        fast::SCENARIOS,
        life::SCENARIOS,
        leaving::SCENARIOS,
        upgrades::SCENARIOS,
        insight::SCENARIOS,
        traced::SCENARIOS,
        relayed::SCENARIOS,
        dashboards::SCENARIOS,
        kiali::SCENARIOS,
        map::SCENARIOS,
        programs::SCENARIOS,
        settings::SCENARIOS,
        services::SCENARIOS,
        endpoints::SCENARIOS,
        hostile::SCENARIOS,
        interfaces::SCENARIOS,
        peers::SCENARIOS,
        waypoints::SCENARIOS,
        waypoint::SCENARIOS,
        waypoint_authz::SCENARIOS,
        waypoint_grpc::SCENARIOS,
        waypoint_http2::SCENARIOS,
        waypoint_keys::SCENARIOS,
        waypoint_rules::SCENARIOS,
        waypoint_seen::SCENARIOS,
        waypoint_sent::SCENARIOS,
        waypoint_telemetry::SCENARIOS,
        time::SCENARIOS,
        control::SCENARIOS,
        gateway_tls::SCENARIOS,
        gateways::SCENARIOS,
        interop::SCENARIOS,
        istio_gateways::SCENARIOS,
        network::SCENARIOS,
        overload::SCENARIOS,
        soak::SCENARIOS,
    ]
    .into_iter()
    .flatten()
}

/// Builds the shop and leaves it running; prints how to look at it.
///
/// # Errors
/// It does not start; the error comes after Ctrl-C too.
pub fn up(agent: &[String]) -> Result<bool> {
    let options = MeshOptions { agent: agent.to_vec(), ..MeshOptions::default() };
    let mut bed = Testbed::build(&Topology::nodes(&["a", "b"]), shop::SHOP)?;
    let started = bed.start_mesh(&options).and_then(|()| bed.wait_enrolled(shop::ENROLLED));
    println!("{}", guide(&bed)?);
    if let Err(error) = started {
        println!("the mesh did not come up: {error:#}\n{}", bed.explain());
    }
    loop {
        this_run::pause(Duration::from_secs(3600))?;
    }
}

/// Where things are, for a person who explores a running testbed.
///
/// # Errors
/// The own path cannot be found.
pub fn guide(bed: &Testbed) -> Result<String> {
    let own = std::env::current_exe()?;
    let mut text = format!("YAML that the control plane reads (edit it): {}\n", bed.live.display());
    for node in bed.nodes.values() {
        text += &format!(
            "node {}: namespace {}, admin {}, logs {}\n",
            node.name,
            node.netns.name(),
            node.dir.join("run/admin.sock").display(),
            node.dir.join("logs").display()
        );
    }
    for pod in bed.pods.values() {
        text += &format!(
            "{:<18} {:<12} {} in --netns {} --cgroup {} -- sh\n",
            pod.key(),
            pod.v4,
            own.display(),
            pod.place.netns.display(),
            pod.place.cgroup.display()
        );
    }
    Ok(text)
}

/// Prints every name.
pub fn list() {
    for scenario in all() {
        println!("{}", scenario.name);
    }
}

/// Runs the scenarios that match, one after the other; whether all passed.
///
/// # Errors
/// The run was interrupted.
pub fn run(args: &RunArgs) -> Result<bool> {
    let chosen = all().filter(|scenario| args.wants(scenario.name));
    let cases = chosen.map(|scenario| Case {
        name: scenario.name,
        deadline: scenario.deadline,
        test: Box::new(|| (scenario.run)()),
    });
    runner::run(&cases.collect::<Vec<_>>(), args.fail_fast)
}
