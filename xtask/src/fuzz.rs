//! Fuzzing: builds every fuzz target of the workspace with libFuzzer, and runs them.
//!
//! A target is a file in `<crate>/fuzz/fuzz_targets`, its seeds are in `<crate>/fuzz/seeds/<target>`. What a run learns
//! lives in the cache: inputs that reach new code (`fuzz/corpus`), findings, and libFuzzer's own output (`fuzz/logs`).
//! A later run starts from them: a finding is tried first, until it is none any more.
//!
//! The tests repeat one run instead, the same each time: from the seeds alone, with a fixed random number. Whether they
//! pass depends on the code and not on luck; an input that was found once belongs among the seeds.
//!
//! The build is cargo's with the compiler's own coverage pass, as cargo-fuzz does it, so that nothing has to be
//! installed: `sancov-module` is part of stable, libFuzzer is compiled by the crate `libfuzzer-sys`.

use crate::{build, paths, run, setup};
use anyhow::{Context, Result, bail};
use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Which targets to fuzz, and for how long.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// How long each target runs
    #[arg(long, default_value_t = DEFAULT_SECONDS)]
    seconds: u32,
    /// Targets by name, or by a part of it; all by default
    targets: Vec<String>,
}

const DEFAULT_SECONDS: u32 = 60;

/// What the compiler is told: count every edge, and hand comparisons to libFuzzer.
const COVERAGE: [&str; 6] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cllvm-args=-simplifycfg-branch-fold-threshold=0",
];
/// The longest input; every parser here meets its limits well below.
const LONGEST_INPUT: u32 = 16 << 10;
/// An input that takes longer than this many seconds is a finding.
const SLOW: u32 = 20;
/// So is one that takes more memory than this.
const MEMORY_MIB: u32 = 2048;
/// The exit code of libFuzzer after an interruption.
const INTERRUPTED: i32 = 72;

/// How much is tried.
#[derive(Clone, Copy)]
enum Effort {
    /// Onward from what earlier runs have learned, for so many seconds.
    Explore(u32),
    /// The same inputs each time.
    Repeat,
}

/// What a repeated run tries, at most so long. Slow targets come less far.
const REPEATED_RUNS: u32 = 500_000;
const REPEATED_SECONDS: u32 = 30;

/// One fuzz target.
struct Target {
    name: String,
    package: String,
    seeds: PathBuf,
}

/// What a run of a target amounted to.
pub(crate) struct Outcome {
    pub(crate) name: String,
    figures: Figures,
    /// What went wrong, with the input and how to try it again.
    pub(crate) finding: Option<String>,
}

/// What libFuzzer says at the end.
#[derive(Debug, Default, PartialEq, Eq)]
struct Figures {
    runs: u64,
    /// Edges reached by seeds and corpus, and at the end.
    coverage: Option<(u64, u64)>,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "fuzz {}: {} runs, ", self.name, self.figures.runs)?;
        match self.figures.coverage {
            Some((before, after)) => {
                write!(f, "coverage {after} (+{}), ", after.saturating_sub(before))?;
            }
            None => write!(f, "no coverage, ")?,
        }
        match &self.finding {
            None => write!(f, "no findings"),
            Some(finding) => write!(f, "1 finding\n{finding}"),
        }
    }
}

/// `cargo xtask fuzz`.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::run()?;
    let outcomes = all(&args.targets, Effort::Explore(args.seconds))?;
    if run::interrupted() {
        bail!("interrupted");
    }
    if outcomes.is_empty() {
        let names: Vec<String> = targets()?.into_iter().map(|target| target.name).collect();
        bail!("no fuzz target is called {}; there are {}", args.targets.join(", "), names.join(", "));
    }
    let found = outcomes.iter().filter(|outcome| outcome.finding.is_some()).count();
    if found > 0 {
        bail!("{found} targets have findings");
    }
    Ok(())
}

/// The run of the tests, for every target whose name contains one of `words`, which may be none; all of them without
/// words.
pub(crate) fn repeat(words: &[String]) -> Result<Vec<Outcome>> {
    all(words, Effort::Repeat)
}

/// Builds, and runs as many targets side by side as there are cores.
fn all(words: &[String], effort: Effort) -> Result<Vec<Outcome>> {
    let targets = targets()?;
    let named = |target: &&Target| words.is_empty() || words.iter().any(|word| target.name.contains(word));
    let chosen: Vec<&Target> = targets.iter().filter(named).collect();
    if chosen.is_empty() {
        return Ok(Vec::new());
    }
    let bin = build_targets(&targets)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let each = match effort {
        Effort::Explore(seconds) => format!("for {seconds} s each"),
        Effort::Repeat => format!("{REPEATED_RUNS} runs or {REPEATED_SECONDS} s each"),
    };
    run::step(&format!("fuzzing {} targets, {each}, {cores} at once", chosen.len()));
    let next = AtomicUsize::new(0);
    let outcomes = Mutex::new(Vec::new());
    let work = || -> Result<()> {
        while let Some(target) = chosen.get(next.fetch_add(1, Ordering::Relaxed)) {
            if run::interrupted() {
                return Ok(());
            }
            let outcome = fuzz(target, &bin, effort)?;
            println!("{outcome}");
            outcomes.lock().unwrap_or_else(PoisonError::into_inner).push(outcome);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..cores.min(chosen.len())).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|thread| match thread.join() {
            Ok(result) => result,
            Err(_) => bail!("a thread of the fuzz run panicked"),
        })
    })?;
    Ok(outcomes.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Every target of the workspace.
fn targets() -> Result<Vec<Target>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(paths::root()).context("cannot list the workspace")? {
        let krate = entry?.path();
        let Ok(files) = fs::read_dir(krate.join("fuzz/fuzz_targets")) else { continue };
        let package = krate.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        for file in files {
            let file = file?.path();
            let Some(name) = file.file_stem().map(|stem| stem.to_string_lossy().into_owned()) else {
                continue;
            };
            let seeds = krate.join("fuzz/seeds").join(&name);
            found.push(Target { name, package: format!("{package}-fuzz"), seeds });
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// Builds all targets at once, and says where they are.
fn build_targets(targets: &[Target]) -> Result<PathBuf> {
    let target_dir = paths::target()?.join("fuzzing");
    let host = host()?;
    run::step("fuzz targets");
    let mut packages: Vec<&str> = targets.iter().map(|target| target.package.as_str()).collect();
    packages.sort_unstable();
    packages.dedup();
    let mut cargo = Command::new("cargo");
    cargo
        .current_dir(paths::root())
        .env("CARGO_TARGET_DIR", &target_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", COVERAGE.join("\u{1f}"))
        .env("PATH", paths::path_with_tools()?)
        // With a target, build scripts and macros are compiled without the flags.
        .args(["build", "--profile", "fuzz", "--bins", "--target", &host]);
    for package in packages {
        cargo.args(["-p", package, "--features", &format!("{package}/fuzz")]);
    }
    build::needs_compilers()?;
    run::check(&mut cargo)?;
    Ok(target_dir.join(host).join("fuzz"))
}

/// This machine's name for cargo.
fn host() -> Result<String> {
    let text = run::output(Command::new("rustc").arg("-vV"))?;
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).context("`rustc -vV` names no host")
}

/// Runs one target to its end.
fn fuzz(target: &Target, bin: &Path, effort: Effort) -> Result<Outcome> {
    let cache = paths::cache()?.join("fuzz");
    let corpus = cache.join("corpus").join(&target.name);
    let findings = cache.join("findings").join(&target.name);
    let logs = cache.join("logs");
    for dir in [&corpus, &findings, &logs] {
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    let before = files(&findings)?;
    let log = logs.join(format!("{}.log", target.name));
    let output = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let program = bin.join(&target.name);
    let mut prefix = OsString::from("-artifact_prefix=");
    prefix.push(findings.join(""));
    // The kernel ends it when we are gone, however that happens.
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "TERM"])
        .arg(&program)
        .arg(prefix)
        .arg(format!("-max_len={LONGEST_INPUT}"))
        .arg(format!("-timeout={SLOW}"))
        .arg(format!("-rss_limit_mb={MEMORY_MIB}"))
        .arg("-print_final_stats=1")
        // Logs of the product would drown libFuzzer's.
        .env_remove("RUST_LOG")
        .stdout(output.try_clone().context("cannot share the log file")?)
        .stderr(output);
    match effort {
        // The first directory takes what is new.
        Effort::Explore(seconds) => {
            command.arg(format!("-max_total_time={seconds}")).args([&corpus, &findings, &target.seeds])
        }
        Effort::Repeat => {
            let fresh = cache.join("repeated").join(&target.name);
            empty(&fresh)?;
            command
                .args(["-seed=1", &format!("-runs={REPEATED_RUNS}")])
                .arg(format!("-max_total_time={REPEATED_SECONDS}"))
                .args([&fresh, &target.seeds])
        }
    };
    let line = run::shown(&command);
    let status = command.status().with_context(|| format!("cannot start `{line}`"))?;
    let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
    let finding = if status.success() || status.code() == Some(INTERRUPTED) || run::interrupted() {
        None
    } else {
        let new = files(&findings)?.into_iter().find(|file| !before.contains(file));
        Some(describe(&text, &program, new.as_deref(), &log))
    };
    Ok(Outcome { name: target.name.clone(), figures: figures(&text), finding })
}

fn empty(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot empty {}", dir.display()));
        }
        _ => {}
    }
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))
}

fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
    Ok(entries.filter_map(|entry| Some(entry.ok()?.path())).collect())
}

/// What a person needs to start from.
fn describe(log: &str, program: &Path, input: Option<&Path>, file: &Path) -> String {
    let panic = log.lines().skip_while(|line| !line.contains("panicked at")).take(4);
    let error = log.lines().filter(|line| line.contains("ERROR: libFuzzer")).take(1);
    let said: Vec<&str> = panic.chain(error).collect();
    let again = match input {
        Some(input) => format!("try it again: {} {}", program.display(), input.display()),
        None => "an input of an earlier run fails still or again".to_owned(),
    };
    format!("    {}\n    {again}\n    libFuzzer's output: {}", said.join("\n    "), file.display())
}

/// Reads libFuzzer's output: `#8 INITED cov: 71 ft: …`, `#99 DONE cov: 90 …`, `stat::number_of_executed_units: 99`.
fn figures(log: &str) -> Figures {
    let mut figures = Figures::default();
    for line in log.lines() {
        if let Some(runs) = line.strip_prefix("stat::number_of_executed_units:") {
            figures.runs = runs.trim().parse().unwrap_or(figures.runs);
        }
        let mut words = line.split_whitespace().skip_while(|word| *word != "cov:");
        let covered = words.nth(1).and_then(|word| word.parse().ok());
        let is_progress = line.starts_with('#') && !line.contains("READ");
        if let (true, Some(now)) = (is_progress, covered) {
            let before = figures.coverage.map_or(now, |(before, _)| before);
            figures.coverage = Some((before, now));
        }
    }
    figures
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "INFO: Loaded 1 modules   (70 inline 8-bit counters)
#4\tREAD units: 3
#5\tINITED cov: 71 ft: 80 corp: 3/12b exec/s: 0 rss: 40Mb
#99\tNEW    cov: 75 ft: 85 corp: 4/16b lim: 4 exec/s: 0 rss: 41Mb
#1048576\tpulse  cov: 90 ft: 99 corp: 5/20b lim: 8 exec/s: 0 rss: 44Mb
#1200000\tDONE   cov: 91 ft: 99 corp: 5/20b lim: 8 exec/s: 0 rss: 44Mb
stat::number_of_executed_units: 1200000
stat::new_units_added:          2";

    #[test]
    fn a_closing_line_says_how_much_was_run_and_what_was_new() {
        let outcome = Outcome { name: "x".to_owned(), figures: figures(LOG), finding: None };
        assert_eq!(outcome.to_string(), "fuzz x: 1200000 runs, coverage 91 (+20), no findings");
    }

    #[test]
    fn a_finding_names_the_panic_and_the_input() {
        let log = "thread '<unnamed>' panicked at mesh-core/src/x.rs:1:2:\nindex out of bounds\nnote: x\n\
                   ==7== ERROR: libFuzzer: deadly signal";
        let text = describe(log, Path::new("/bin/x"), Some(Path::new("/f/crash-1")), Path::new("/l/x.log"));
        for part in ["index out of bounds", "deadly signal", "/bin/x /f/crash-1", "/l/x.log"] {
            assert!(text.contains(part), "{part} is missing in {text}");
        }
    }

    #[test]
    fn every_target_has_seeds() {
        let targets = targets().unwrap();
        assert!(targets.len() >= 10, "{} targets", targets.len());
        for target in targets {
            let seeds = files(&target.seeds).unwrap();
            assert!(seeds.len() >= 2, "{} has {} seeds", target.name, seeds.len());
        }
    }
}
