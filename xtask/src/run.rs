//! Running other programs: visible, interruptible, with errors that say what was run.
//!
//! On Ctrl-C the terminal signals the whole foreground group, so the child cleans up by itself and we only have to
//! outlive it. A SIGTERM sent to us alone is passed on by the child's own parent-death signal (`mesh-tests`) or ends a
//! cargo that leaves nothing behind.

use anyhow::{Context, Result, bail};
use signal_hook::consts::SIGINT;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

static STOP: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// Keeps SIGINT from ending this process before its child has cleaned up; a second one ends it at once. SIGTERM keeps
/// its default, and the child hears of our end from the kernel.
pub(crate) fn watch_signals() {
    let stop = STOP.get_or_init(|| Arc::new(AtomicBool::new(false)));
    // The first handler only acts once the flag is up, so order matters: exit on the second, note the first.
    let registered = signal_hook::flag::register_conditional_shutdown(SIGINT, 130, Arc::clone(stop))
        .and_then(|_| signal_hook::flag::register(SIGINT, Arc::clone(stop)));
    if let Err(error) = registered {
        eprintln!("warning: cannot catch Ctrl-C ({error}): after one, run `cargo xtask clean`");
    }
}

/// Whether Ctrl-C was pressed.
pub(crate) fn interrupted() -> bool {
    STOP.get().is_some_and(|stop| stop.load(Ordering::Relaxed))
}

/// The command as a person would type it.
pub(crate) fn shown(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        line.push(' ');
        line.push_str(&arg.to_string_lossy());
    }
    line
}

/// Announces a step on standard error, so that `--json` output stays clean.
pub(crate) fn step(text: &str) {
    eprintln!("==> {text}");
}

/// Runs a command to its end with its output on ours; its failure is an error that names it.
pub(crate) fn check(command: &mut Command) -> Result<()> {
    let line = shown(command);
    let status = command.status().with_context(|| format!("cannot start `{line}`: is it installed?"))?;
    if interrupted() {
        bail!("interrupted during `{line}`");
    }
    if !status.success() {
        bail!("`{line}` failed ({status})");
    }
    Ok(())
}

/// Runs a command quietly and returns its standard output; its failure is an error with its standard error.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let line = shown(command);
    let out = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start `{line}`: is it installed?"))?;
    if !out.status.success() {
        bail!("`{line}` failed ({}): {}", out.status, String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Whether a program of this name is in `PATH` (or in the directories that Debian leaves out of it).
pub(crate) fn have(program: &str) -> bool {
    find(program).is_some()
}

/// Where a program of this name is, as [`have`] looks for it.
pub(crate) fn find(program: &str) -> Option<std::path::PathBuf> {
    let path = crate::paths::path_with_tools().ok()?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file())
}
