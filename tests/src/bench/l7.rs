//! `bench l7`: our gateway and our waypoint beside Envoy, HAProxy, nginx and a bare relay, with the same routes, in one
//! run, interleaved. What is compared is CPU time per request first: the loads, the server and everything else share one
//! CPU, so that rates are those of the slower side.

mod grpc;
mod load;
mod peers;
mod rig;
mod routes;
mod scale;

use super::L7Args;
use super::rows::{Bar, Report, Row};
use super::stats::Estimate;
use crate::bed::run;
use anyhow::{Context, Result};
use load::Load;
use peers::Peer;
use rig::{Measured, Rig, Variant};
use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

const ENVOY: Variant = Variant::Peer(Peer::Envoy);
const HAPROXY: Variant = Variant::Peer(Peer::Haproxy);
const NGINX: Variant = Variant::Peer(Peer::Nginx);

/// Runs the whole bench.
///
/// # Errors
/// The testbed cannot be built or a load does not run.
pub(super) fn run(args: &L7Args) -> Result<Report> {
    let (rounds, seconds) = if args.quick { (3, 1.0) } else { (15, 2.0) };
    let wanted = |name: &str| args.only.as_ref().is_none_or(|only| name.contains(only.as_str()));
    eprintln!("building the testbed");
    let mut rig = Rig::build()?;
    let mut rows = Vec::new();
    if wanted("start") {
        eprintln!("start");
        rows.extend(scale::start(&rig, args.quick)?);
    }
    rig.start_proxies()?;
    if wanted("memory") {
        eprintln!("memory");
        rows.extend(scale::memory(&rig, args.quick)?);
    }
    if wanted("h1") {
        let variants = rig.variants();
        eprintln!("h1: {rounds} rounds of {} variants", variants.len());
        let all = measure(&rig, &variants, Load::Http1, rounds, seconds)?;
        rows.extend(http1_rows(&all));
    }
    if wanted("h2") {
        let without = [Variant::Relay, Variant::Full, Variant::Hbone, Variant::Direct];
        let variants: Vec<Variant> = rig.variants().into_iter().filter(|v| !without.contains(v)).collect();
        eprintln!("h2: {rounds} rounds of {} variants", variants.len());
        let all = measure(&rig, &variants, Load::Http2, rounds, seconds)?;
        rows.extend(http2_rows(&all));
    }
    if wanted("p99") {
        eprintln!("p99 at half of HAProxy's rate");
        rows.push(latency(&rig, rounds, seconds)?);
    }
    if wanted("grpc") {
        eprintln!("gRPC");
        rows.extend(grpc::rows(&rig, rounds, seconds)?);
    }
    if wanted("routes") {
        eprintln!("many routes");
        rows.extend(scale::routes(&mut rig, args.quick)?);
    }
    Ok(Report { machine: super::machine::describe(), rows })
}

/// The figure of a run that a ratio is made of.
type Figure = fn(&Measured) -> f64;

fn rate(measured: &Measured) -> f64 {
    measured.served.rate
}

fn p99(measured: &Measured) -> f64 {
    measured.served.p99
}

/// CPU seconds of the proxy per 10,000 requests.
fn cpu(measured: &Measured) -> f64 {
    measured.cpu * 1e4 / measured.served.requests
}

/// All runs of one load, by round.
struct Rounds(Vec<HashMap<Variant, Measured>>);

impl Rounds {
    /// Ratios of a figure, paired within each round.
    fn ratios(&self, of: Variant, to: Variant, figure: Figure) -> Vec<f64> {
        let of_round = |round: &HashMap<_, Measured>| {
            let (of, to) = (figure(round.get(&of)?), figure(round.get(&to)?));
            (of.is_finite() && to.is_finite() && to > 0.0).then(|| of / to)
        };
        self.0.iter().filter_map(of_round).collect()
    }

    fn absolute(&self, of: Variant, figure: Figure) -> Vec<f64> {
        self.0.iter().filter_map(|round| Some(figure(round.get(&of)?))).collect()
    }

    fn has(&self, variant: Variant) -> bool {
        self.0.iter().any(|round| round.contains_key(&variant))
    }

    /// A ratio to a peer, or the reason why there is none.
    fn against(&self, name: &str, bar: Bar, of: Variant, peer: Peer, figure: Figure) -> Row {
        if !self.has(Variant::Peer(peer)) {
            return Row::skipped(name, "ratio", bar, peer.missing());
        }
        let noise = Estimate::of(&self.ratios(Variant::Again, Variant::Ours, figure));
        Row::ratio(name, bar, self.ratios(of, Variant::Peer(peer), figure), noise)
    }
}

fn measure(rig: &Rig, variants: &[Variant], load: Load, rounds: usize, seconds: f64) -> Result<Rounds> {
    let mut variants = variants.to_vec();
    let mut all = Vec::with_capacity(rounds);
    for variant in &variants {
        rig.run(*variant, load, 1.0)?;
    }
    for _ in 0..rounds {
        run::check()?;
        let mut round = HashMap::new();
        for variant in &variants {
            round.insert(*variant, rig.run(*variant, load, seconds)?);
        }
        all.push(round);
        // A drift within a round must not favour the one that runs first.
        variants.reverse();
    }
    Ok(Rounds(all))
}

fn http1_rows(all: &Rounds) -> Vec<Row> {
    use Variant::{Again, Direct, Full, Hbone, Ours, Relay};
    let ratio = |name: &str, bar, of, to, figure: Figure| {
        let noise = Estimate::of(&all.ratios(Again, Ours, figure));
        Row::ratio(name, bar, all.ratios(of, to, figure), noise)
    };
    let mut rows = vec![
        all.against("l7.h1.cpu.vs_haproxy", Bar::AtMost(1.25), Ours, Peer::Haproxy, cpu),
        all.against("l7.h1.cpu.vs_envoy", Bar::AtMost(0.3), Ours, Peer::Envoy, cpu),
        all.against("l7.h1.rate.vs_haproxy", Bar::AtLeast(0.85), Ours, Peer::Haproxy, rate),
        all.against("l7.hbone.cpu.vs_envoy", Bar::AtMost(0.6), Hbone, Peer::Envoy, cpu),
        ratio("l7.full.cpu.vs_plain", Bar::AtMost(1.6), Full, Ours, cpu),
        all.against("l7.h1.cpu.vs_nginx", Bar::None, Ours, Peer::Nginx, cpu),
        ratio("l7.h1.cpu.vs_floor", Bar::None, Ours, Relay, cpu),
        ratio("l7.h1.rate.vs_floor", Bar::None, Ours, Relay, rate),
        ratio("aa.l7.h1.cpu", Bar::None, Again, Ours, cpu),
        ratio("aa.l7.h1.rate", Bar::None, Again, Ours, rate),
        Row::of("l7.h1.direct", "1/s", Bar::None, all.absolute(Direct, rate)),
    ];
    let named = [("", Ours), (".envoy", ENVOY), (".haproxy", HAPROXY), (".nginx", NGINX), (".floor", Relay)];
    for (suffix, variant) in named.into_iter().chain([(".hbone", Hbone), (".full", Full)]) {
        if all.has(variant) {
            let (costs, rates) = (all.absolute(variant, cpu), all.absolute(variant, rate));
            rows.push(Row::of(&format!("l7.h1.cpu{suffix}"), "s/10k", Bar::None, costs));
            rows.push(Row::of(&format!("l7.h1.rate{suffix}"), "1/s", Bar::None, rates));
        }
    }
    rows
}

fn http2_rows(all: &Rounds) -> Vec<Row> {
    use Variant::{Again, Ours};
    let mut rows = vec![
        all.against("l7.h2.cpu.vs_haproxy", Bar::AtMost(1.25), Ours, Peer::Haproxy, cpu),
        all.against("l7.h2.cpu.vs_envoy", Bar::AtMost(0.35), Ours, Peer::Envoy, cpu),
        all.against("l7.h2.cpu.vs_nginx", Bar::None, Ours, Peer::Nginx, cpu),
        Row::ratio("aa.l7.h2.cpu", Bar::None, all.ratios(Again, Ours, cpu), None),
    ];
    for (suffix, variant) in [("", Ours), (".envoy", ENVOY), (".haproxy", HAPROXY), (".nginx", NGINX)] {
        if all.has(variant) {
            let (costs, rates) = (all.absolute(variant, cpu), all.absolute(variant, rate));
            rows.push(Row::of(&format!("l7.h2.cpu{suffix}"), "s/10k", Bar::None, costs));
            rows.push(Row::of(&format!("l7.h2.rate{suffix}"), "1/s", Bar::None, rates));
        }
    }
    rows
}

/// The tail at a rate that both can serve.
fn latency(rig: &Rig, rounds: usize, seconds: f64) -> Result<Row> {
    let (name, bar) = ("l7.p99_at_half.vs_haproxy", Bar::AtMost(1.2));
    if !rig.variants().contains(&HAPROXY) {
        return Ok(Row::skipped(name, "ratio", bar, Peer::Haproxy.missing()));
    }
    let top = rig.run(HAPROXY, Load::Http1, seconds)?.served.rate;
    let load = Load::Paced(top / 2.0);
    let all = measure(rig, &[Variant::Ours, HAPROXY, Variant::Again], load, rounds, seconds)?;
    Ok(all.against(name, bar, Variant::Ours, Peer::Haproxy, p99))
}

/// The status of a GET on a connection of its own.
fn ask(to: SocketAddr, path: &str) -> Result<u16> {
    let patience = std::time::Duration::from_secs(5);
    let mut stream = TcpStream::connect_timeout(&to, patience).context("cannot connect")?;
    stream.set_read_timeout(Some(patience)).context("cannot set a time")?;
    let header = routes::HEADER;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nhost: bench.example\r\n{header}: yes\r\nconnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("cannot read")?;
    answer.split(' ').nth(1).and_then(|code| code.parse().ok()).context("no status")
}
