//! `doctor`: what each node's agent finds when it probes its kernel and machine.

use std::time::Duration;

use mesh_core::admin::{Fitness, Probe};
use serde::Serialize;

use crate::ask;
use crate::cli::Global;
use crate::endpoint::Places;
use crate::output::{Block, Exit, Report};
use crate::table::{Cell, Table, Tone};

/// Probing makes real connections and loads real programs.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Serialize)]
struct Finding {
    endpoint: String,
    probes: Vec<Probe>,
}

/// Runs the command.
pub async fn run(places: &Places, global: &Global) -> Report {
    let asked = ask::nodes::<Vec<Probe>>(&places.nodes, "/doctor", places.timeout.max(PATIENCE)).await;
    let findings: Vec<Finding> = asked
        .answers
        .into_iter()
        .map(|(endpoint, probes)| Finding { endpoint: endpoint.to_string(), probes })
        .collect();
    let missing = findings.iter().flat_map(|f| &f.probes).any(|probe| probe.state == Fitness::Missing);
    let report = Report::new(global.output, &findings, || findings.iter().flat_map(blocks).collect())
        .exit(if missing { Exit::No } else { Exit::Fine });
    let report = report.unanswered(Exit::Unreachable, &asked.errors);
    if asked.errors.is_empty() {
        return report;
    }
    report.error(
        Exit::Unreachable,
        "without its agent, a node is probed by `mesh-node doctor` on the node itself",
    )
}

fn blocks(finding: &Finding) -> Vec<Block> {
    let mut table = Table::new(&["CHECK", "STATE", "FOUND"]);
    for probe in &finding.probes {
        let (state, tone) = match probe.state {
            Fitness::Ok => ("ok", Tone::Good),
            Fitness::Degraded => ("degraded", Tone::Warn),
            Fitness::Missing => ("missing", Tone::Bad),
        };
        table.row([probe.name.clone().into(), Cell::new(state, tone), probe.detail.clone().into()]);
        for (what, text) in [("costs", &probe.cost), ("fix", &probe.fix)] {
            if !text.is_empty() && probe.state != Fitness::Ok {
                table.more(format!("{what}: {text}"));
            }
        }
    }
    vec![Block::Line(Tone::Title, finding.endpoint.clone()), Block::Table(table), Block::Gap]
}
