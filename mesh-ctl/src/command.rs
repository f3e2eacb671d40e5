//! The commands. Each asks some endpoints and makes a [`Report`].

pub mod analyze;
pub mod certs;
mod control;
pub mod doctor;
mod dumps;
pub mod flows;
pub mod install;
pub mod policies;
pub mod services;
pub mod status;
pub mod tap;
pub mod top;
pub mod version;
pub mod waypoint;
pub mod why;
pub mod workloads;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::CommandFactory as _;

use crate::cli::Cli;
use crate::output::{Exit, Report};

/// `completion SHELL`.
#[must_use]
pub fn completion(shell: clap_complete::Shell) -> Report {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "meshctl", &mut script);
    match String::from_utf8(script) {
        Ok(script) => Report::text(script),
        Err(error) => Report::failed(Exit::Usage, format!("the script for {shell} is no text: {error}")),
    }
}

/// How long ago a moment was, in its largest unit, `5m`; empty for a moment that never was.
fn since(ms: u64) -> String {
    if ms == 0 {
        return String::new();
    }
    let at = UNIX_EPOCH + Duration::from_millis(ms);
    span(SystemTime::now().duration_since(at).unwrap_or_default())
}

/// A span in its largest unit: `90s`, `12m`, `30h`, `12d`.
fn span(span: Duration) -> String {
    match span.as_secs() {
        s @ 0..120 => format!("{s}s"),
        s @ 120..7_200 => format!("{}m", s / 60),
        s @ 7_200..172_800 => format!("{}h", s / 3_600),
        s => format!("{}d", s / 86_400),
    }
}

fn join(items: impl IntoIterator<Item = impl AsRef<str>>) -> String {
    items.into_iter().map(|item| item.as_ref().to_owned()).collect::<Vec<_>>().join(",")
}
