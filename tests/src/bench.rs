//! Benches: ratios in one run, against no mesh, against two bare relays, and against stock ztunnel where its binary is
//! given. Rows are the promises of docs/SPECIFICATION.md, by the same names.
//!
//! One shared machine is noisy, so every figure is the median of paired ratios of interleaved runs, with its interval,
//! and beside each group the same thing is measured twice: a row that this A/A pair cannot resolve is "too noisy",
//! never "ok".

mod aead;
mod callgrind;
mod control;
mod enrol;
mod instructions;
mod l4;
mod l7;
mod machine;
mod memory;
mod rig;
mod rows;
mod stats;
mod times;
mod trace;
mod zpeer;

use anyhow::Result;
use std::path::PathBuf;

/// Which bench.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(clap::Subcommand)]
enum Bench {
    /// The L4 data path: no mesh, fast path, tunnel, bare relays, stock ztunnel
    L4(L4Args),
    /// What flow tracing costs: throughput, new connections, the agents' CPU
    Trace(trace::Args),
    /// The L7 proxy: gateway and waypoint, Envoy, HAProxy, nginx, a bare relay
    L7(L7Args),
    /// The control plane: start, memory, changes with many pods and nodes
    Control(control::Args),
    /// Instructions of the agents per round trip, connection and mebibyte, against the recorded ones
    Instructions(instructions::Args),
}

/// Options of `bench l4`.
#[derive(clap::Args)]
pub struct L4Args {
    /// One JSON object on standard output instead of a table
    #[arg(long)]
    json: bool,
    /// Few short runs: shows that the bench works, its figures mean little
    #[arg(long)]
    quick: bool,
    /// A stock ztunnel binary to compare with
    #[arg(long, value_name = "PATH")]
    ztunnel: Option<PathBuf>,
    /// Only rows whose name contains this
    #[arg(long)]
    only: Option<String>,
}

/// Options of `bench l7`.
#[derive(clap::Args)]
pub struct L7Args {
    /// One JSON object on standard output instead of a table
    #[arg(long)]
    json: bool,
    /// Few short runs: shows that the bench works, its figures mean little
    #[arg(long)]
    quick: bool,
    /// Only groups whose name contains this: start, memory, h1, h2, p99, grpc, routes
    #[arg(long)]
    only: Option<String>,
}

/// Runs one; false when a promise does not hold.
///
/// # Errors
/// The testbed cannot be built or a load does not run.
pub fn run(args: &Args) -> Result<bool> {
    let (report, json) = match &args.bench {
        Bench::L4(args) => (l4::run(args)?, args.json),
        Bench::L7(args) => (l7::run(args)?, args.json),
        Bench::Trace(args) => (trace::run(args)?, args.json),
        Bench::Control(args) => (control::run(args)?, args.json()),
        Bench::Instructions(args) => return instructions::run(args),
    };
    if json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{}", report.table());
    }
    Ok(report.rows.iter().all(|row| row.ok != Some(false)))
}
