//! The test groups, from fast to real, each closed by one summary line.

use crate::build::Built;
use crate::{build, cluster, conformance, fuzz, kubernetes, paths, peers, run, setup, testbed};
use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use std::fmt;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

/// Which tests to run.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The group; every group by default
    #[arg(value_enum, default_value_t = Group::All)]
    group: Group,
    /// Passed on: a name filter for cargo's tests or for the scenarios
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    filter: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Group {
    /// Everything without a kernel or a network
    Pure,
    /// Every fuzz target, with the same inputs each time
    Fuzz,
    /// The kernel programs on the running kernel (root)
    Kernel,
    /// Whole-mesh scenarios on real traffic (root)
    Testbed,
    /// Instructions that the agents run per round trip, connection and mebibyte, against the recorded ones (root)
    Instructions,
    /// The mesh on a real Kubernetes of two nodes (root), or with `--external` on the one that KUBECONFIG names
    K8s,
    /// The Gateway API's conformance suite on a Kubernetes of two nodes (root); not part of `all`, for it takes long
    Conformance,
    /// All of them but that, in this order
    All,
}

/// What a group's run amounted to.
#[derive(Default)]
struct Tally {
    passed: u64,
    failed: u64,
    skipped: u64,
    /// What failed: the lists that test programs close with, line by line.
    failures: Vec<String>,
    /// A reason to fail that is not a counted test: a crash, a build error.
    broken: Option<String>,
    /// Why a whole group was skipped.
    unable: Option<String>,
}

impl Tally {
    /// Adds another run of the same group.
    fn join(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.failures.extend(other.failures);
        self.broken = self.broken.take().or(other.broken);
        self.unable = self.unable.take().or(other.unable);
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)?;
        let why = self.broken.as_ref().or(self.unable.as_ref());
        why.map_or(Ok(()), |why| write!(f, " ({why})"))
    }
}

/// Runs the groups asked for; an error if anything failed.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::run()?;
    let built = build::run(false)?;
    let wanted = |group| args.group == Group::All || args.group == group;
    let mut lines = Vec::new();
    let mut failed = false;
    let mut close = |name: &str, tally: Tally| {
        failed |= tally.failed > 0 || tally.broken.is_some();
        lines.push(format!("{name}: {tally}"));
        lines.extend_from_slice(&tally.failures);
        println!("{name}: {tally}");
    };
    if wanted(Group::Pure) {
        close("pure", pure(&built, &args.filter)?);
    }
    if wanted(Group::Fuzz) && !run::interrupted() {
        close("fuzz", fuzzed(&args.filter)?);
    }
    if wanted(Group::Kernel) && !run::interrupted() {
        close("kernel", kernel(&built, &args.filter)?);
    }
    if wanted(Group::Testbed) && !run::interrupted() {
        close("testbed", scenarios(&built, &args.filter)?);
    }
    // A filter names tests, and figures are none.
    let whole = args.group == Group::Instructions || args.filter.is_empty();
    if wanted(Group::Instructions) && whole && !run::interrupted() {
        close("instructions", instructions(&built)?);
    }
    if wanted(Group::K8s) && !run::interrupted() {
        let asked = args.group == Group::K8s;
        close("k8s", on_kubernetes(built, asked, &args.filter)?);
    }
    if args.group == Group::Conformance && !run::interrupted() {
        close("conformance", counted(&mut conformance::command(build::run(false)?, &args.filter)?)?);
    }
    println!("\n{}", lines.join("\n"));
    if run::interrupted() {
        bail!("interrupted");
    }
    if failed {
        bail!("some tests failed");
    }
    Ok(())
}

/// Integration tests of every crate, by file name; the kernel group's files start with `kernel`, those that need an API
/// server with `kubernetes`.
fn integration_tests() -> Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(paths::root()).context("cannot list the workspace")? {
        let dir = entry?.path();
        let package = dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let Ok(tests) = std::fs::read_dir(dir.join("tests")) else { continue };
        for file in tests {
            let file = file?.path();
            let (Some(stem), Some("rs")) = (file.file_stem(), file.extension().and_then(|e| e.to_str()))
            else {
                continue;
            };
            found.push((package.clone(), stem.to_string_lossy().into_owned()));
        }
    }
    found.sort();
    Ok(found)
}

fn pure(built: &Built, filter: &[String]) -> Result<Tally> {
    run::step("pure tests");
    let mut cargo = build::cargo(&built.object)?;
    cargo.args(["test", "--workspace", "--no-fail-fast", "--lib", "--bins"]);
    let elsewhere = |name: &str| name.starts_with("kernel") || name.starts_with("kubernetes");
    for (_, name) in integration_tests()?.iter().filter(|(_, name)| !elsewhere(name)) {
        cargo.args(["--test", name]);
    }
    cargo.arg("--").args(filter);
    counted(&mut cargo)
}

fn fuzzed(filter: &[String]) -> Result<Tally> {
    let outcomes = fuzz::repeat(filter)?;
    let failed = outcomes.iter().filter(|outcome| outcome.finding.is_some()).count() as u64;
    Ok(Tally { passed: outcomes.len() as u64 - failed, failed, ..Tally::default() })
}

fn kernel(built: &Built, filter: &[String]) -> Result<Tally> {
    run::step("kernel tests");
    let names: Vec<_> =
        integration_tests()?.into_iter().filter(|(_, name)| name.starts_with("kernel")).collect();
    if names.is_empty() {
        return Ok(Tally { broken: Some("no kernel tests found".to_owned()), ..Tally::default() });
    }
    let mut cargo = build::cargo(&built.object)?;
    cargo.args(["test", "--no-fail-fast"]);
    for (package, name) in &names {
        cargo.args(["-p", package, "--test", name]);
    }
    cargo.arg("--").args(filter);
    counted(&mut cargo)
}

fn scenarios(built: &Built, filter: &[String]) -> Result<Tally> {
    peers::jaeger()?;
    peers::collector()?;
    peers::h2spec()?;
    peers::ext_authz()?;
    run::step("testbed scenarios");
    let mut command = testbed::mesh_tests(built)?;
    counted(command.arg("run").args(filter))
}

fn instructions(built: &Built) -> Result<Tally> {
    run::step("instructions of the agents");
    counted(&mut testbed::instructions(built, &[])?)
}

/// A machine that cannot have a cluster skips the group, unless it was asked for by name.
fn on_kubernetes(built: Built, asked: bool, filter: &[String]) -> Result<Tally> {
    run::step("the mesh on Kubernetes");
    if filter.iter().any(|word| word == "--external") {
        return counted(testbed::mesh_tests(&built)?.args(["k8s", "run"]).args(filter));
    }
    match cluster::unable() {
        Some(why) if asked => bail!("no cluster can run here: {why}"),
        Some(why) => Ok(Tally { skipped: 1, unable: Some(why), ..Tally::default() }),
        None => {
            let parts = cluster::parts(built)?;
            let mut tally = chart(&parts, filter)?;
            if !run::interrupted() {
                tally.join(api_server(&parts, filter)?);
            }
            if !run::interrupted() {
                let mut command = parts.command(&["k8s", "run"])?;
                command.env("UM_NETWORK_POLICIES", kubernetes::network_policies()?);
                tally.join(counted(command.args(filter))?);
            }
            Ok(tally)
        }
    }
}

/// What meshctl makes of the chart, against what Helm does; a name filter that is not of this test leaves it out.
fn chart(parts: &cluster::Parts, filter: &[String]) -> Result<Tally> {
    const TEST: &str = "the_chart_renders_to_what_helm_renders_it_to";
    if filter.iter().any(|word| !word.starts_with('-') && !TEST.contains(word)) {
        return Ok(Tally::default());
    }
    run::step("the chart and Helm");
    let helm = kubernetes::helm()?;
    let mut cargo = build::cargo(&parts.built.object)?;
    // Of the whole workspace: with other features everything would be built anew.
    cargo.args(["test", "--workspace", "--lib"]).env("UM_HELM", helm);
    counted(cargo.args(["--", "--ignored", TEST]))
}

/// Integration tests that need an API server and nothing else of a cluster; a name filter that is none of theirs leaves
/// them out.
fn api_server(parts: &cluster::Parts, filter: &[String]) -> Result<Tally> {
    run::step("the control plane on an API server");
    let mut cargo = build::cargo(&parts.built.object)?;
    cargo.args(["test", "--no-fail-fast"]);
    for (package, name) in integration_tests()?.iter().filter(|(_, name)| name.starts_with("kubernetes")) {
        cargo.args(["-p", package, "--test", name]);
    }
    cargo.env("UM_KUBERNETES", &parts.kubernetes);
    // Each starts an etcd and an API server.
    counted(cargo.args(["--", "--test-threads=2"]).args(filter.iter().filter(|word| !word.starts_with('-'))))
}

/// Runs a test command, shows its output, and adds up its closing lines (`test result: ok. 3 passed; 0 failed; …`).
fn counted(command: &mut Command) -> Result<Tally> {
    let line = run::shown(command);
    let mut child =
        command.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot start `{line}`"))?;
    let mut tally = Tally::default();
    let mut listing = false;
    if let Some(stdout) = child.stdout.take() {
        for text in BufReader::new(stdout).lines() {
            let text = text.context("the tests' output is not text")?;
            println!("{text}");
            add(&mut tally, &text);
            listing = failures(&mut tally, listing, &text);
        }
    }
    let status = child.wait().with_context(|| format!("cannot wait for `{line}`"))?;
    if !status.success() && tally.failed == 0 {
        tally.broken = Some(format!("`{line}` ended with {status}"));
    }
    Ok(tally)
}

fn add(tally: &mut Tally, line: &str) {
    let Some(rest) = line.strip_prefix("test result: ") else { return };
    for part in rest.split(['.', ';']) {
        let mut words = part.split_whitespace();
        let (Some(Ok(count)), Some(kind)) = (words.next().map(str::parse::<u64>), words.next()) else {
            continue;
        };
        match kind {
            "passed" => tally.passed += count,
            "failed" => tally.failed += count,
            "ignored" | "skipped" => tally.skipped += count,
            _ => {}
        }
    }
}

/// Collects the list of failures that ends a test program's output, which goes from its head to an empty line; whether
/// the next line is part of one.
fn failures(tally: &mut Tally, listing: bool, line: &str) -> bool {
    if line == "failures:" || line == "failed:" {
        // cargo's tests have two such lists: first what they printed, then their names.
        return true;
    }
    let part = listing && line.starts_with(' ');
    if part {
        tally.failures.push(line.to_owned());
    }
    part
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_of_several_binaries_add_up() {
        let mut tally = Tally::default();
        add(
            &mut tally,
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.1s",
        );
        add(&mut tally, "test result: FAILED. 2 passed; 3 failed; 0 skipped");
        add(&mut tally, "test result_of_something ... ok");
        assert_eq!((tally.passed, tally.failed, tally.skipped), (14, 3, 1));
    }

    #[test]
    fn what_failed_is_named_again_at_the_end() {
        let mut tally = Tally::default();
        let cargo =
            "failures:\n\n---- a::b stdout ----\n  left: 1\n\nfailures:\n    a::b\n\ntest result: FAILED.";
        let ours = "failed:\n  a pod is gone\n    no pod within 60s\n\nskipped:\n  another\n";
        let mut listing = false;
        for line in cargo.lines().chain(ours.lines()) {
            listing = failures(&mut tally, listing, line);
        }
        assert_eq!(tally.failures, ["    a::b", "  a pod is gone", "    no pod within 60s"]);
    }
}
