//! `bench l4`: every shape on every variant, interleaved, as paired ratios.

use super::rig::{Measured, Rig, Shape, Variant};
use super::rows::{Bar, Report, Row};
use super::stats::Estimate;
use super::{L4Args, enrol, memory, times};
use crate::bed::run;
use anyhow::Result;
use std::collections::HashMap;

const SHAPES: &[Shape] = &[
    Shape { name: "bulk1", load: "bulk", connections: 1 },
    Shape { name: "bulk8", load: "bulk", connections: 8 },
    Shape { name: "bulk1r", load: "bulkr", connections: 1 },
    Shape { name: "pp1", load: "pp", connections: 1 },
    Shape { name: "pp32", load: "pp", connections: 32 },
    Shape { name: "crr1", load: "crr", connections: 1 },
    Shape { name: "crr16", load: "crr", connections: 16 },
];

/// The figure of a run that a ratio is made of.
type Figure = fn(&Measured) -> f64;

fn throughput(measured: &Measured) -> f64 {
    measured.figures.gbits()
}

fn rate(measured: &Measured) -> f64 {
    measured.figures.rate()
}

fn p50(measured: &Measured) -> f64 {
    measured.figures.p50_us
}

/// CPU seconds per gigabyte.
fn cpu_per_byte(measured: &Measured) -> f64 {
    measured.cpu / (measured.figures.gbits() * measured.figures.seconds / 8.0)
}

/// CPU seconds per 10,000 operations.
fn cpu_per_operation(measured: &Measured) -> f64 {
    measured.cpu * 1e4 / measured.figures.ops as f64
}

/// All runs of one shape, by round.
struct Rounds(Vec<HashMap<&'static str, Measured>>);

fn key(variant: Variant) -> &'static str {
    match variant {
        Variant::PlainLocal => "plain_local",
        Variant::PlainLocalAgain => "plain_local_again",
        Variant::Fast => "fast",
        Variant::Plain => "plain",
        Variant::Tunnel => "tunnel",
        Variant::TunnelAgain => "tunnel_again",
        Variant::Relay => "relay",
        Variant::Ztunnel => "ztunnel",
    }
}

impl Rounds {
    /// Ratios of a figure, paired within each round.
    fn ratios(&self, of: Variant, to: Variant, figure: Figure) -> Vec<f64> {
        let of_round = |round: &HashMap<_, Measured>| {
            let (of, to) = (figure(round.get(key(of))?), figure(round.get(key(to))?));
            (of.is_finite() && to.is_finite() && to > 0.0).then(|| of / to)
        };
        self.0.iter().filter_map(of_round).collect()
    }

    fn absolute(&self, of: Variant, figure: Figure) -> Vec<f64> {
        self.0
            .iter()
            .filter_map(|round| Some(figure(round.get(key(of))?)))
            .filter(|v| v.is_finite())
            .collect()
    }
}

/// Runs the whole bench.
///
/// # Errors
/// The testbed cannot be built or a load does not run.
pub(super) fn run(args: &L4Args) -> Result<Report> {
    let (rounds, seconds) = if args.quick { (3, 0.3) } else { (15, 0.5) };
    let wanted = |name: &str| args.only.as_ref().is_none_or(|only| name.contains(only.as_str()));
    eprintln!("building the testbed");
    let mut rig = Rig::build(args.ztunnel.as_deref())?;
    let mut rows = Vec::new();
    // First: later, what is resident tells of the loads.
    if wanted("memory") {
        eprintln!("memory");
        rows.extend(memory::rows(&rig, args.quick)?);
    }
    for shape in SHAPES.iter().filter(|shape| wanted(shape.name)) {
        eprintln!("{}: {rounds} rounds of {} variants", shape.name, rig.variants().len());
        let all = measure(&rig, *shape, rounds, seconds)?;
        rows.extend(rows_of(*shape, &all, rig.peer.is_some()));
    }
    if wanted("cold") {
        eprintln!("cold first connection");
        rows.extend(times::rows(&mut rig, args.quick)?);
    }
    if wanted("enrol") || args.only.as_ref().is_some_and(|only| only.starts_with("enrol.")) {
        eprintln!("enrolment");
        rows.extend(enrol::rows(&mut rig, args.quick, args.only.as_deref())?);
    }
    Ok(Report { machine: super::machine::describe(), rows })
}

fn measure(rig: &Rig, shape: Shape, rounds: usize, seconds: f64) -> Result<Rounds> {
    let mut variants = rig.variants();
    let mut all = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        run::check()?;
        let mut round = HashMap::new();
        for variant in &variants {
            round.insert(key(*variant), rig.run(*variant, shape, seconds)?);
        }
        all.push(round);
        // A drift within a round must not favour the one that runs first.
        variants.reverse();
    }
    Ok(Rounds(all))
}

fn rows_of(shape: Shape, all: &Rounds, peer: bool) -> Vec<Row> {
    use Variant::*;
    let name = shape.name;
    // The figure, its name, whether more is better, the fast path's bar, the CPU figure and its unit.
    let (figure, what, more, fast, cpu, cpu_unit): (Figure, _, _, _, Figure, _) = match shape.load {
        "bulk" | "bulkr" => (throughput, "", true, Bar::AtLeast(0.95), cpu_per_byte, "s/GB"),
        "pp" => (p50, ".p50", false, Bar::AtMost(1.05), cpu_per_operation, "s/10k"),
        _ => (rate, "", true, Bar::AtLeast(0.85), cpu_per_operation, "s/10k"),
    };
    let no_worse = if more { Bar::AtLeast(1.0) } else { Bar::AtMost(1.0) };
    let local_noise = all.ratios(PlainLocalAgain, PlainLocal, figure);
    let noise = all.ratios(TunnelAgain, Tunnel, figure);
    let cpu_noise = all.ratios(TunnelAgain, Tunnel, cpu);
    let interval = |runs: &[f64]| Estimate::of(runs);
    let unit = match shape.load {
        "bulk" | "bulkr" => "Gb/s",
        "pp" => "us",
        _ => "1/s",
    };
    let mut rows = vec![
        Row::ratio(
            &format!("fastpath.{name}{what}.vs_nomesh"),
            fast,
            all.ratios(Fast, PlainLocal, figure),
            interval(&local_noise),
        ),
        Row::ratio(&format!("aa.local.{name}{what}"), Bar::None, local_noise, None),
        Row::of(&format!("tunnel.{name}{what}"), unit, Bar::None, all.absolute(Tunnel, figure)),
        Row::of(&format!("tunnel.{name}.cpu"), cpu_unit, Bar::None, all.absolute(Tunnel, cpu)),
        Row::ratio(
            &format!("tunnel.{name}{what}.vs_nomesh"),
            Bar::None,
            all.ratios(Tunnel, Plain, figure),
            None,
        ),
        Row::ratio(
            &format!("tunnel.{name}{what}.vs_floor"),
            Bar::None,
            all.ratios(Tunnel, Relay, figure),
            None,
        ),
        Row::ratio(&format!("tunnel.{name}.cpu.vs_floor"), Bar::None, all.ratios(Tunnel, Relay, cpu), None),
    ];
    let (speed, cost) = (format!("tunnel.{name}{what}.vs_ztunnel"), format!("tunnel.{name}.cpu.vs_ztunnel"));
    if peer {
        rows.push(Row::ratio(&speed, no_worse, all.ratios(Tunnel, Ztunnel, figure), interval(&noise)));
        rows.push(Row::ratio(
            &cost,
            Bar::AtMost(1.0),
            all.ratios(Tunnel, Ztunnel, cpu),
            interval(&cpu_noise),
        ));
    } else {
        rows.push(Row::skipped(&speed, "ratio", no_worse, super::zpeer::MISSING));
        rows.push(Row::skipped(&cost, "ratio", Bar::AtMost(1.0), super::zpeer::MISSING));
    }
    rows.push(Row::ratio(&format!("aa.tunnel.{name}{what}"), Bar::None, noise, None));
    rows.push(Row::ratio(&format!("aa.tunnel.{name}.cpu"), Bar::None, cpu_noise, None));
    rows
}
