//! Scenarios on a real Kubernetes: the one that [`crate::cluster`] makes, or any that KUBECONFIG names.
//!
//! Assertions read what the product does not write: packets on the wire between nodes, what programs in pods print,
//! what the API server and the kubelets say.

mod bed;
mod change;
pub mod conformance;
mod families;
mod gateways;
mod mesh;
mod network;
mod node;
mod plain;
mod pods;
mod replicas;
mod rules;
mod stock;
mod watched;
mod waypoint;
mod waypoints;

pub use bed::{Bed, SYSTEM, Space, Watched};

use crate::scenarios::RunArgs;
use crate::scenarios::runner::{self, Case};
use anyhow::Result;
use std::path::PathBuf;
use std::time::Duration;

/// What to do.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Run scenarios: all, or those whose name contains a filter
    Run(Args),
    /// List the scenarios
    List,
    /// Run the Gateway API's conformance suite
    Conformance(conformance::Args),
}

/// Which scenarios, and where.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    run: RunArgs,
    /// On the cluster that KUBECONFIG names, which has the images (`cargo xtask cluster images`) and at least two nodes
    #[arg(long)]
    external: bool,
    /// For how many seconds the API server and the control plane are away, where they are
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    away: u64,
    /// Directory of Kubernetes's programs
    #[arg(long, env = "UM_KUBERNETES")]
    binaries: Option<PathBuf>,
    /// Directory of image archives that every node gets
    #[arg(long, env = "UM_IMAGES")]
    images: Option<PathBuf>,
}

/// A scenario on a cluster.
pub struct Scenario {
    /// The behaviour, as a sentence.
    pub name: &'static str,
    /// How long it may take.
    pub deadline: Duration,
    /// The test.
    pub run: fn(&Bed) -> Result<()>,
}

/// Builds a table entry.
pub const fn scenario(name: &'static str, seconds: u64, run: fn(&Bed) -> Result<()>) -> Scenario {
    Scenario { name, deadline: Duration::from_secs(seconds), run }
}

fn all() -> impl Iterator<Item = &'static Scenario> {
    [
        plain::SCENARIOS,
        mesh::SCENARIOS,
        families::SCENARIOS,
        network::SCENARIOS,
        change::SCENARIOS,
        replicas::SCENARIOS,
        gateways::SCENARIOS,
        waypoint::SCENARIOS,
        waypoints::SCENARIOS,
        watched::SCENARIOS,
        rules::SCENARIOS,
        stock::SCENARIOS,
        node::SCENARIOS,
    ]
    .into_iter()
    .flatten()
}

/// Prints every name.
pub fn list() {
    for scenario in all() {
        println!("{}", scenario.name);
    }
}

/// Runs the scenarios that match on a cluster that is up, or on one for as long as they run; whether all passed.
///
/// # Errors
/// There is no cluster and none can be made, or the run was interrupted.
pub fn run(args: &Args) -> Result<bool> {
    let chosen: Vec<_> = all().filter(|scenario| args.run.wants(scenario.name)).collect();
    let mut bed = match args.external {
        true => Bed::external(args.binaries.as_deref())?,
        false => Bed::local(args.binaries.clone(), args.images.clone())?,
    };
    bed.away = Duration::from_secs(args.away);
    let cases: Vec<_> = chosen
        .iter()
        .map(|scenario| Case {
            name: scenario.name,
            deadline: scenario.deadline + bed.away,
            test: Box::new(|| (scenario.run)(&bed)),
        })
        .collect();
    runner::run(&cases, args.run.fail_fast)
}
