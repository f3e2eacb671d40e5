//! `bench instructions`: user-space instructions of the agents, counted by valgrind.
//!
//! Time on a shared machine is noise; the number of instructions is not. Each operation runs N and then 2N times on a
//! warm tunnel, one after the other, and the difference is what N of them cost: start-up, the first connection and what
//! is idle cancel out. The figures are of a whole agent in the testbed, kernel capture included, but of its release
//! build: they tell whether a change made the path longer, not how fast it is.
//!
//! The last recorded figures are in `tests/instructions.json`. They hold for the environment that stands there:
//! valgrind emulates one CPU for every host of a kind (without AVX-512, for example), and the C library's own code is
//! counted, too.

use super::callgrind::{Callgrind, batch};
use super::machine;
use super::rows::{Bar, Report, Row};
use crate::bed::mesh::MeshOptions;
use crate::bed::process::{self, Proc};
use crate::bed::{Testbed, Topology, net, netns, run, wait};
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// Below the root of the workspace.
const RECORD: &str = "tests/instructions.json";
/// A figure may rise by this much over the recorded one.
const RISE: f64 = 0.05;
const HOW: &str = "make the path cheaper again or, if it has to be this long, record it with \
                   `cargo xtask bench instructions --record` and say why in the commit";
const PORT: u16 = 9000;
/// A round of the bulk operations moves this much.
const CHUNK: u32 = 64 * 1024;

/// Options of `bench instructions`.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Write the figures into tests/instructions.json instead of comparing with what is there
    #[arg(long)]
    record: bool,
    /// One JSON object on standard output instead of a table
    #[arg(long)]
    json: bool,
    /// The agent to count, if not the one beside this program
    #[arg(long, value_name = "PATH")]
    agent: Option<PathBuf>,
    /// How often everything is counted; the figure is the median
    #[arg(long, default_value_t = 3)]
    repeat: usize,
    /// Keep the profiles here, for callgrind_annotate: callgrind.SIDE.OPERATION-COUNT.THREAD
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// Only operations whose name contains this (nothing is recorded)
    #[arg(long, conflicts_with = "record")]
    only: Option<String>,
}

/// What is counted.
struct Operation {
    name: &'static str,
    /// N.
    times: u32,
    /// Options of `tool rounds` for that many.
    options: fn(u32) -> Vec<String>,
}

const OPERATIONS: &[Operation] = &[
    Operation { name: "round_trip", times: 400, options: |n| options(1, n, 64, 64) },
    Operation { name: "connection", times: 100, options: |n| options(n, 1, 64, 64) },
    Operation { name: "mib_up", times: 8, options: |n| options(1, n * (1 << 20) / CHUNK, CHUNK, 1) },
    Operation { name: "mib_down", times: 8, options: |n| options(1, n * (1 << 20) / CHUNK, 8, CHUNK) },
];

fn options(connections: u32, rounds: u32, up: u32, down: u32) -> Vec<String> {
    [("--connections", connections), ("--rounds", rounds), ("--up", up), ("--down", down)]
        .iter()
        .flat_map(|(option, value)| [(*option).to_owned(), value.to_string()])
        .collect()
}

/// The file of recorded figures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Record {
    about: String,
    environment: Environment,
    figures: BTreeMap<String, u64>,
}

/// What figures depend on beside the code; the compiler is fixed by rust-toolchain.toml.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Environment {
    arch: String,
    /// What valgrind's emulated CPU takes over from the host's.
    cpu: String,
    libc: String,
    valgrind: String,
}

impl Environment {
    fn here() -> Result<Self> {
        let first = |text: String| text.lines().next().unwrap_or_default().trim().to_owned();
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let flags: Vec<&str> =
            info.lines().find(|line| line.starts_with("flags")).unwrap_or_default().split(' ').collect();
        let taken: Vec<&str> =
            ["aes", "avx", "avx2", "bmi2"].into_iter().filter(|flag| flags.contains(flag)).collect();
        Ok(Self {
            arch: std::env::consts::ARCH.to_owned(),
            cpu: taken.join(" "),
            libc: first(netns::command("ldd", ["--version"])?),
            valgrind: first(netns::command("valgrind", ["--version"])?),
        })
    }
}

/// Counts, and compares or records; false when a figure rose too far.
///
/// # Errors
/// The testbed or valgrind does not run.
pub(super) fn run(args: &Args) -> Result<bool> {
    let here = Environment::here()?;
    let counted = count(args)?;
    if args.record {
        let figures = counted.iter().map(|(name, runs)| (name.clone(), median(runs))).collect();
        let about = format!(
            "User-space instructions of an agent per operation, by `cargo xtask bench instructions --record`. \
             A rise of more than {:.0} % fails `cargo xtask test`. valgrind emulates a CPU of its own: the \
             figures hold where the environment is the same, elsewhere nothing is compared.",
            RISE * 100.0
        );
        let record = Record { about, environment: here.clone(), figures };
        let text = serde_json::to_string_pretty(&record)? + "\n";
        std::fs::write(RECORD, text)
            .with_context(|| format!("cannot write {RECORD}: run it in the workspace"))?;
    }
    let text = std::fs::read_to_string(RECORD)
        .with_context(|| format!("cannot read {RECORD}: run it in the workspace"))?;
    let record: Record = serde_json::from_str(&text).with_context(|| format!("{RECORD} is not readable"))?;
    let rows: Vec<Row> = counted.iter().map(|(name, runs)| row(name, runs, &record, &here)).collect();
    let report = Report { machine: machine::describe(), rows };
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{}", report.table());
        println!("{}", summary(&report));
    }
    let rose: Vec<String> =
        counted.iter().filter_map(|(name, runs)| rise(name, runs, &record, &here)).collect();
    for line in &rose {
        eprintln!("{line}");
    }
    if !rose.is_empty() {
        eprintln!("{HOW}");
    }
    Ok(report.rows.iter().all(|row| row.ok != Some(false)))
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "counts are far from the limits")]
fn median(runs: &[f64]) -> u64 {
    super::stats::Estimate::of(runs).map_or(0, |estimate| estimate.median.round() as u64)
}

/// The most that a recorded figure may become.
#[expect(clippy::cast_precision_loss, reason = "counts are far from the limits")]
fn limit(recorded: u64) -> f64 {
    (recorded as f64 * (1.0 + RISE)).round()
}

fn row(name: &str, runs: &[f64], record: &Record, here: &Environment) -> Row {
    let full = format!("instructions.{name}");
    let unit = "instr";
    let Some(&recorded) = record.figures.get(name) else {
        // Whoever adds a figure records it; one that was lost must not pass for good.
        return Row { ok: Some(false), ..Row::of(&full, unit, Bar::None, runs.to_vec()) };
    };
    let row = Row::of(&full, unit, Bar::AtMost(limit(recorded)), runs.to_vec());
    if record.environment == *here {
        return row;
    }
    let why = format!("recorded in another environment: {:?}, here: {here:?}", record.environment);
    Row { ok: None, skipped: Some(why), ..row }
}

/// The complaint about a figure, if there is one.
#[expect(clippy::cast_precision_loss, reason = "counts are far from the limits")]
fn rise(name: &str, runs: &[f64], record: &Record, here: &Environment) -> Option<String> {
    let now = median(runs);
    match record.figures.get(name) {
        None => Some(format!("{name} is {now} instructions and not recorded")),
        Some(&recorded) if record.environment == *here && now as f64 > limit(recorded) => {
            let per_cent = (now as f64 / recorded as f64 - 1.0) * 100.0;
            Some(format!(
                "{name} rose from {recorded} to {now} instructions: {per_cent:+.1} %, {:+.0} % is allowed",
                RISE * 100.0
            ))
        }
        Some(_) => None,
    }
}

/// The closing line, as tests have it.
fn summary(report: &Report) -> String {
    let count = |ok: Option<bool>| report.rows.iter().filter(|row| row.ok == ok).count();
    let failed = count(Some(false));
    let word = if failed == 0 { "ok" } else { "FAILED" };
    format!("test result: {word}. {} passed; {failed} failed; {} skipped", count(Some(true)), count(None))
}

fn pod(name: &str, node: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: mesh}}\n\
         spec: {{nodeName: {node}, containers: [{{name: main, image: none}}]}}\n---\n"
    )
}

/// Two nodes with counted agents, one pod each.
struct Counted {
    bed: Testbed,
    callgrind: Callgrind,
    cpu: usize,
    _server: Proc,
}

impl Counted {
    fn build(args: &Args) -> Result<Self> {
        let namespace = "apiVersion: v1\nkind: Namespace\nmetadata: {name: mesh, labels: {istio.io/dataplane-mode: \
                         ambient}}\n---\n";
        let yaml = format!("{namespace}{}{}", pod("client", "a"), pod("server", "b"));
        let mut bed = Testbed::build(&Topology::nodes(&["a", "b"]), &yaml)?;
        let callgrind = Callgrind::new(bed.dir.join("callgrind"), args.keep.clone())?;
        let cpu = one_cpu()?;
        let agent = match &args.agent {
            Some(path) => std::path::absolute(path).context("cannot find the agent")?,
            None => run::binary("mesh-node")?,
        };
        ensure!(agent.is_file(), "{} is not there", agent.display());
        let options = MeshOptions {
            agent_command: Some(callgrind.command(&agent, cpu)),
            ..MeshOptions::agent(&["--workers", "1", "--trace", "false"])
        };
        bed.start_mesh(&options).with_context(|| bed.explain())?;
        bed.wait_enrolled(&["mesh/client", "mesh/server"])?;
        let argv = batch(cpu).into_iter().chain(own(&["--serve", &PORT.to_string()])?);
        let server = bed.pod("mesh/server")?.spawn(argv)?;
        wait::until_true("server", Duration::from_secs(20), || bed.pod("mesh/server")?.listening(PORT))?;
        Ok(Self { bed, callgrind, cpu, _server: server })
    }

    /// Runs an operation, waits until its connections are gone, and returns what each side's agent has run.
    fn run(&self, operation: &Operation, times: u32) -> Result<[u64; 2]> {
        let (client, server) = (self.bed.pod("mesh/client")?, self.bed.pod("mesh/server")?);
        let to = server.at(PORT).to_string();
        let mut argv = batch(self.cpu);
        argv.extend(own(&["--to", &to])?);
        argv.extend((operation.options)(times));
        let done = process::finish(&client.place, argv, Duration::from_secs(300))?;
        done.ok().with_context(|| format!("{times} times {}", operation.name))?;
        wait::until_true("end of all connections", Duration::from_secs(20), || {
            let open = [net::established(&client.netns)?, net::established(&server.netns)?].concat();
            Ok(open.iter().all(|(local, remote)| [local.port(), remote.port()].contains(&15_008)))
        })?;
        let label = |side: &str| format!("{side}.{}-{times}", operation.name);
        Ok([self.count("a", &label("client"))?, self.count("b", &label("server"))?])
    }

    fn count(&self, node: &str, label: &str) -> Result<u64> {
        let agent = self.bed.node(node)?.agent(0)?;
        self.callgrind.count(agent.pid(), label).with_context(|| format!("the agent on {node}"))
    }
}

/// This program's `tool rounds`.
fn own(args: &[&str]) -> Result<Vec<String>> {
    let own = std::env::current_exe().context("cannot find the own path")?;
    let own = own.to_string_lossy().into_owned();
    let tool = [own.as_str(), "tool", "rounds"].into_iter().chain(args.iter().copied());
    Ok(tool.map(str::to_owned).collect())
}

/// The last CPU that this process may use: the first has the most interrupts.
fn one_cpu() -> Result<usize> {
    let set = rustix::thread::sched_getaffinity(None).context("cannot ask which CPUs there are")?;
    (0..rustix::thread::CpuSet::MAX_CPU).rev().find(|cpu| set.is_set(*cpu)).context("there is no CPU")
}

/// Every figure's runs, by name.
fn count(args: &Args) -> Result<BTreeMap<String, Vec<f64>>> {
    let wanted = |operation: &&Operation| args.only.as_ref().is_none_or(|only| operation.name.contains(only));
    let bed = Counted::build(args)?;
    let mut counted: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for operation in OPERATIONS.iter().filter(wanted) {
        eprintln!("{}, {} and {} times", operation.name, operation.times, operation.times * 2);
        bed.run(operation, operation.times / 4)?;
        for _ in 0..args.repeat.max(1) {
            let (once, twice) =
                (bed.run(operation, operation.times)?, bed.run(operation, operation.times * 2)?);
            for (i, side) in ["client", "server"].into_iter().enumerate() {
                let more = twice[i].checked_sub(once[i]).context("twice as much took less")?;
                let name = format!("{side}.{}", operation.name);
                #[expect(clippy::cast_precision_loss, reason = "counts are far from the limits")]
                counted.entry(name).or_default().push(more as f64 / f64::from(operation.times));
            }
        }
    }
    Ok(counted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn environment(libc: &str) -> Environment {
        Environment {
            arch: "x".to_owned(),
            cpu: String::new(),
            libc: libc.to_owned(),
            valgrind: String::new(),
        }
    }

    fn record() -> Record {
        let figures = BTreeMap::from([("client.connection".to_owned(), 1000)]);
        Record { about: String::new(), environment: environment("1"), figures }
    }

    #[test]
    fn a_rise_of_more_than_five_per_cent_fails_and_is_named() {
        let (record, here) = (record(), environment("1"));
        for (now, ok) in [(900.0, true), (1000.0, true), (1050.0, true), (1051.0, false)] {
            assert_eq!(row("client.connection", &[now], &record, &here).ok, Some(ok), "{now}");
            assert_eq!(rise("client.connection", &[now], &record, &here).is_none(), ok, "{now}");
        }
        let said = rise("client.connection", &[1100.0], &record, &here).unwrap();
        assert!(said.contains("client.connection rose from 1000 to 1100"), "{said}");
    }

    #[test]
    fn a_figure_that_nobody_recorded_fails() {
        let (record, here) = (record(), environment("1"));
        assert_eq!(row("server.connection", &[1.0], &record, &here).ok, Some(false));
        assert!(rise("server.connection", &[1.0], &record, &here).is_some());
    }

    #[test]
    fn figures_of_another_environment_are_skipped_with_the_reason() {
        let (record, here) = (record(), environment("2"));
        let row = row("client.connection", &[5000.0], &record, &here);
        assert_eq!(row.ok, None);
        assert!(row.skipped.is_some_and(|why| why.contains("another environment")));
    }

    #[test]
    fn the_recorded_figures_are_those_that_are_counted() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("instructions.json");
        let record: Record = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let counted: Vec<String> = ["client", "server"]
            .iter()
            .flat_map(|side| OPERATIONS.iter().map(move |operation| format!("{side}.{}", operation.name)))
            .collect();
        assert_eq!(record.figures.len(), counted.len());
        assert!(counted.iter().all(|name| record.figures.contains_key(name)), "{:?}", record.figures);
    }
}
