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

/// What the rows of a shape promise.
struct Bars {
    /// The fast path's figure, of that without a mesh.
    fast: Bar,
    /// The tunnel's figure, of the peer's.
    figure: Bar,
    /// The agents' CPU, of the peer's.
    cpu: Bar,
    /// In its place: the agents' CPU, of bare relays and their ciphers.
    floor: Bar,
}

impl Bars {
    fn of(shape: Shape) -> Self {
        let (fast, figure, cpu, floor) = match (shape.load, shape.name) {
            ("bulk" | "bulkr", _) => (Bar::AtLeast(0.97), Bar::AtLeast(2.0), 0.6, Bar::AtMost(1.5)),
            ("pp", "pp1") => (Bar::AtMost(1.03), Bar::AtMost(0.85), 0.8, Bar::AtMost(1.3)),
            ("pp", _) => (Bar::AtMost(1.03), Bar::AtMost(0.7), 0.6, Bar::None),
            _ => (Bar::AtLeast(0.9), Bar::AtLeast(2.5), 0.4, Bar::None),
        };
        Self { fast, figure, cpu: Bar::AtMost(cpu), floor }
    }
}

fn rows_of(shape: Shape, all: &Rounds, peer: bool) -> Vec<Row> {
    use Variant::*;
    let name = shape.name;
    let bars = Bars::of(shape);
    // The figure, its name, the CPU figure, and both units.
    let (figure, what, unit, cpu, cpu_unit): (Figure, _, _, Figure, _) = match shape.load {
        "bulk" | "bulkr" => (throughput, "", "Gb/s", cpu_per_byte, "s/GB"),
        "pp" => (p50, ".p50", "us", cpu_per_operation, "s/10k"),
        _ => (rate, "", "1/s", cpu_per_operation, "s/10k"),
    };
    let local_noise = all.ratios(PlainLocalAgain, PlainLocal, figure);
    let noise = all.ratios(TunnelAgain, Tunnel, figure);
    let cpu_noise = all.ratios(TunnelAgain, Tunnel, cpu);
    let interval = |runs: &[f64]| Estimate::of(runs);
    let ratio = |name: String, bar, runs, noise: Option<&[f64]>| {
        Row::ratio(&name, bar, runs, noise.and_then(interval))
    };
    // What a relay would cost that ciphers as each agent does: once out, once in.
    let aead = if cpu_unit == "s/GB" { super::aead::seconds_per_gigabyte() } else { 0.0 };
    let mut floor = all.absolute(Tunnel, cpu);
    for (own, relay) in floor.iter_mut().zip(all.absolute(Relay, cpu)) {
        *own /= relay + aead;
    }
    let floor = ratio(format!("tunnel.{name}.cpu.vs_floor"), bars.floor, floor, Some(&cpu_noise));
    let (speed, cost) = (format!("tunnel.{name}{what}.vs_ztunnel"), format!("tunnel.{name}.cpu.vs_ztunnel"));
    let (speed, cost) = if peer {
        (
            ratio(speed, bars.figure, all.ratios(Tunnel, Ztunnel, figure), Some(&noise)),
            ratio(cost, bars.cpu, all.ratios(Tunnel, Ztunnel, cpu), Some(&cpu_noise)),
        )
    } else {
        (
            Row::skipped(&speed, "ratio", bars.figure, super::zpeer::MISSING),
            Row::skipped(&cost, "ratio", bars.cpu, super::zpeer::MISSING),
        )
    };
    let fast = all.ratios(Fast, PlainLocal, figure);
    vec![
        ratio(format!("fastpath.{name}{what}.vs_nomesh"), bars.fast, fast, Some(&local_noise)),
        ratio(format!("aa.local.{name}{what}"), Bar::None, local_noise, None),
        Row::of(&format!("tunnel.{name}{what}"), unit, Bar::None, all.absolute(Tunnel, figure)),
        Row::of(&format!("tunnel.{name}.cpu"), cpu_unit, Bar::None, all.absolute(Tunnel, cpu)),
        ratio(format!("tunnel.{name}{what}.vs_nomesh"), Bar::None, all.ratios(Tunnel, Plain, figure), None),
        ratio(format!("tunnel.{name}{what}.vs_floor"), Bar::None, all.ratios(Tunnel, Relay, figure), None),
        speed,
        cost.or(&floor),
        floor,
        ratio(format!("aa.tunnel.{name}{what}"), Bar::None, noise, None),
        ratio(format!("aa.tunnel.{name}.cpu"), Bar::None, cpu_noise, None),
    ]
}
