//! Benches: ratios in one run, against no mesh, against two bare relays, and against stock ztunnel where its binary is
//! given. Rows are the promises of docs/SPECIFICATION.md, by the same names.
//!
//! One shared machine is noisy, so every figure is the median of paired ratios of interleaved runs, with its interval,
//! and beside each group the same thing is measured twice: a row that this A/A pair cannot resolve is "too noisy",
//! never "ok".

mod aead;
mod callgrind;
mod enrol;
mod instructions;
mod l4;
mod machine;
mod memory;
mod rig;
mod rows;
mod stats;
mod times;
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

/// Runs one; false when a promise does not hold.
///
/// # Errors
/// The testbed cannot be built or a load does not run.
pub fn run(args: &Args) -> Result<bool> {
    let l4 = match &args.bench {
        Bench::L4(l4) => l4,
        Bench::Instructions(args) => return instructions::run(args),
    };
    let report = l4::run(l4)?;
    if l4.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{}", report.table());
    }
    Ok(report.rows.iter().all(|row| row.ok != Some(false)))
}
