//! Runs scenarios, whatever they run on: each gets its deadline, each ends with a line, all of them with one.

use super::Skip;
use crate::bed::run as this_run;
use anyhow::{Result, bail};
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

/// A scenario with what it runs on.
pub(crate) struct Case<'a> {
    /// The behaviour, as a sentence.
    pub(crate) name: &'static str,
    /// How long it may take.
    pub(crate) deadline: Duration,
    /// The test.
    pub(crate) test: Box<dyn Fn() -> Result<()> + 'a>,
}

/// Longest reason that the closing list repeats, in bytes.
const REASON: usize = 600;

/// A failure as the closing list has it: the reasons stand beside the names, for whoever has only the end of a long log.
fn closing(name: &str, error: &anyhow::Error) -> String {
    let reason = format!("{error:#}");
    let end = reason.floor_char_boundary(REASON);
    let more = if end < reason.len() { " …" } else { "" };
    format!("{name}\n    {}{more}", reason[..end].replace('\n', "\n    "))
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("  | {line}\n")).collect()
}

/// Runs them one after the other; whether all passed.
///
/// # Errors
/// The run was interrupted.
pub(crate) fn run(cases: &[Case<'_>], fail_fast: bool) -> Result<bool> {
    println!("running {} scenarios", cases.len());
    let begin = Instant::now();
    let (mut passed, mut failures, mut skipped) = (0, Vec::new(), Vec::new());
    for case in cases {
        this_run::check()?;
        let start = Instant::now();
        this_run::set_deadline(Some(start + case.deadline));
        let result =
            std::panic::catch_unwind(AssertUnwindSafe(&case.test)).unwrap_or_else(|_| bail!("it panicked"));
        this_run::set_deadline(None);
        this_run::check()?;
        let took = start.elapsed().as_secs_f64();
        match result {
            Ok(()) => {
                passed += 1;
                println!("test {} ... ok ({took:.1} s)", case.name);
            }
            Err(error) => match error.downcast_ref::<Skip>() {
                Some(reason) => {
                    println!("test {} ... skipped: {reason}", case.name);
                    skipped.push(case.name.to_owned());
                }
                None => {
                    println!("test {} ... FAILED ({took:.1} s)\n  {error:#}", case.name);
                    println!("{}", indent(&this_run::last_logs()));
                    failures.push(closing(case.name, &error));
                    if fail_fast {
                        break;
                    }
                }
            },
        }
    }
    for (what, names) in [("failed", &failures), ("skipped", &skipped)] {
        if !names.is_empty() {
            println!("\n{what}:\n  {}", names.join("\n  "));
        }
    }
    let word = if failures.is_empty() { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {word}. {passed} passed; {} failed; {} skipped; finished in {:.0}s",
        failures.len(),
        skipped.len(),
        begin.elapsed().as_secs_f64()
    );
    Ok(failures.is_empty())
}
