//! Load that runs beside a change, to see what the change did to it.

use super::process::{self, Proc};
use super::{Pod, wait};
use crate::tools::load::Figures;
use anyhow::{Context, Result, bail};
use std::time::Duration;

/// A running `mesh-tests tool load`.
#[derive(Debug)]
pub struct Load {
    proc: Proc,
}

impl Load {
    /// Starts a load that goes on until it is stopped.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(pod: &Pod, to: &str, options: &[&str]) -> Result<Self> {
        let argv = ["mesh-tests", "tool", "load", "--seconds", "0", "--to", to]
            .into_iter()
            .chain(options.iter().copied());
        Ok(Self { proc: pod.spawn(argv)? })
    }

    /// Waits until a holding load has all its connections.
    ///
    /// # Errors
    /// It ends, or some connections failed.
    pub fn wait_holding(&mut self, conns: usize, deadline: Duration) -> Result<()> {
        wait::until_true(&format!("{conns} held connections"), deadline, || {
            let log = self.proc.log();
            match log.lines().find(|line| line.starts_with("holding ")) {
                Some(line) if line.starts_with(&format!("holding {conns} (0 failed")) => Ok(true),
                Some(line) => bail!("{line}"),
                None if self.proc.running()? => Ok(false),
                None => bail!("the load ended: {}", process::tail(&log, 3)),
            }
        })
    }

    /// Whether it still runs; a round-trip load ends by itself when its last connection is gone.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn running(&mut self) -> Result<bool> {
        self.proc.running()
    }

    /// Stops it and returns its figures.
    ///
    /// # Errors
    /// It does not end, or could not even begin.
    pub fn stop(mut self) -> Result<Figures> {
        if self.proc.running()? {
            self.proc.signal(rustix::process::Signal::TERM)?;
        }
        self.figures()
    }

    /// Waits for its own end and returns its figures.
    ///
    /// # Errors
    /// As [`Load::stop`].
    pub fn figures(mut self) -> Result<Figures> {
        self.proc.wait(Duration::from_secs(60))?;
        let log = self.proc.log();
        let last = log.lines().last().unwrap_or_default();
        serde_json::from_str(last).with_context(|| format!("the load said: {}", process::tail(&log, 3)))
    }
}

/// A load for a fixed time, to its figures.
///
/// # Errors
/// It cannot connect, or does not end.
pub fn measure(pod: &Pod, cpu: Option<usize>, argv: &[String], seconds: f64) -> Result<Figures> {
    let mut program = process::Program::from(["mesh-tests", "tool", "load"]);
    program.argv.extend(argv.iter().cloned());
    program.argv.extend(["--seconds".to_owned(), seconds.to_string()]);
    program.cpu = cpu;
    let done = process::finish(&pod.place, program, Duration::from_secs_f64(seconds + 60.0))?;
    let text = done.ok()?;
    serde_json::from_str(text.lines().last().unwrap_or_default())
        .with_context(|| format!("the load said: {text}"))
}
