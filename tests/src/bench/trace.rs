//! `bench trace`: what flow tracing costs. The same loads with every hook attached and with none, interleaved in one run,
//! and with none once more: what two equal runs differ by.

use super::rig::{Measured, Rig, Shape, Variant};
use super::rows::{Bar, Report, Row};
use super::stats::Estimate;
use crate::bed::http;
use crate::bed::run;
use anyhow::{Result, ensure};
use std::collections::HashMap;
use std::time::Duration;

/// Options of `bench trace`.
#[derive(clap::Args)]
pub(super) struct Args {
    /// One JSON object on standard output instead of a table
    #[arg(long)]
    pub(super) json: bool,
    /// Few short runs: shows that the bench works, its figures mean little
    #[arg(long)]
    pub(super) quick: bool,
}

const SHAPES: [Shape; 2] = [
    Shape { name: "bulk", load: "bulk", connections: 1 },
    Shape { name: "connections", load: "crr", connections: 16 },
];
const VARIANTS: [(Variant, &str); 3] =
    [(Variant::PlainLocal, "plain"), (Variant::Fast, "fast"), (Variant::Tunnel, "tunnel")];
/// The agents look at what they were told this often.
const TURNED: Duration = Duration::from_millis(300);

/// What runs one after the other; the third is the first again.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum State {
    Off,
    On,
    OffAgain,
}

fn turn(rig: &Rig, state: State) -> Result<()> {
    for node in rig.bed.nodes.values() {
        let path = format!("/trace?on={}", state == State::On);
        http::ask_unix(&node.dir.join("run/admin.sock"), "POST", &path)?;
    }
    run::pause(TURNED)
}

type Round = HashMap<(State, &'static str, &'static str), Measured>;

/// Runs it.
///
/// # Errors
/// The testbed cannot be built, a load does not run, or nothing was traced.
pub(super) fn run(args: &Args) -> Result<Report> {
    let (rounds, seconds) = if args.quick { (3, 0.3) } else { (15, 0.5) };
    eprintln!("building the testbed");
    let rig = Rig::build(None)?;
    let mut all: Vec<Round> = Vec::with_capacity(rounds);
    let mut states = [State::Off, State::On, State::OffAgain];
    for number in 0..rounds {
        run::check()?;
        eprintln!("round {} of {rounds}", number + 1);
        let mut round = Round::new();
        for state in states {
            turn(&rig, state)?;
            for shape in SHAPES {
                for (variant, name) in VARIANTS {
                    let before = rig.agents_cpu()?;
                    let mut measured = rig.run(variant, shape, seconds)?;
                    // What was told last is read within this time; where nothing is traced it is waited for as well.
                    run::pause(TURNED / 2)?;
                    measured.cpu = rig.agents_cpu()? - before;
                    round.insert((state, shape.name, name), measured);
                }
            }
        }
        all.push(round);
        states.reverse();
    }
    let mut rows = Vec::new();
    for (_, variant) in VARIANTS {
        rows.extend(rows_of(&all, variant));
    }
    rows.push(lost(&rig)?);
    Ok(Report { machine: super::machine::describe(), rows })
}

fn ratios(
    all: &[Round],
    of: State,
    shape: &'static str,
    variant: &'static str,
    figure: fn(&Measured) -> f64,
) -> Vec<f64> {
    let pair = |round: &Round| {
        let (with, without) =
            (figure(round.get(&(of, shape, variant))?), figure(round.get(&(State::Off, shape, variant))?));
        (without > 0.0).then(|| with / without)
    };
    all.iter().filter_map(pair).collect()
}

fn rows_of(all: &[Round], variant: &'static str) -> Vec<Row> {
    let throughput: fn(&Measured) -> f64 = |measured| measured.figures.gbits();
    let rate: fn(&Measured) -> f64 = |measured| measured.figures.rate();
    let mut rows = Vec::new();
    for (shape, figure, bar) in [("bulk", throughput, 0.97), ("connections", rate, 0.95)] {
        let noise = Estimate::of(&ratios(all, State::OffAgain, shape, variant, figure));
        let runs = ratios(all, State::On, shape, variant, figure);
        rows.push(Row::ratio(&format!("trace.{shape}.{variant}"), Bar::AtLeast(bar), runs, noise));
        let noise = ratios(all, State::OffAgain, shape, variant, figure);
        rows.push(Row::of(&format!("trace.{shape}.{variant}.a_a"), "ratio", Bar::None, noise));
    }
    // What the agents need for 10,000 connections beyond what they need without tracing.
    let cpu = |round: &Round| {
        let each = |state| {
            let measured = round.get(&(state, "connections", variant))?;
            #[expect(clippy::cast_precision_loss, reason = "some ten thousand")]
            let ops = measured.figures.ops as f64;
            (ops > 0.0).then(|| measured.cpu * 1e4 / ops)
        };
        Some(each(State::On)? - each(State::Off)?)
    };
    let runs = all.iter().filter_map(cpu).collect();
    rows.push(Row::of(&format!("trace.cpu.{variant}"), "s/10k", Bar::AtMost(0.05), runs));
    rows
}

/// The share of events that found no room, in percent.
fn lost(rig: &Rig) -> Result<Row> {
    let mut shares = Vec::new();
    for node in rig.bed.nodes.keys() {
        let text = rig.bed.metrics(node)?;
        let value = |outcome: &str| {
            let start = format!("undermesh_trace_events_total{{outcome=\"{outcome}\"}} ");
            text.lines().find_map(|line| line.strip_prefix(&start)?.parse::<f64>().ok()).unwrap_or(0.0)
        };
        ensure!(value("told") > 0.0, "nothing was traced on {node}");
        shares.push(100.0 * value("lost") / (value("told") + value("lost")));
    }
    Ok(Row::largest("trace.lost", "percent", Bar::AtMost(1.0), shares))
}
