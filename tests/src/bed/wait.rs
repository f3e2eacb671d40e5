//! Waiting for a state that can be seen, with a deadline; never for a time that is hoped to be enough.

use super::run;
use anyhow::{Result, bail};
use std::time::{Duration, Instant};

/// An error that no waiting will mend.
#[derive(Debug)]
struct Hopeless(String);

impl std::fmt::Display for Hopeless {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Hopeless {}

/// An error that ends a wait at once: what is waited for cannot come any more.
pub fn hopeless(why: impl Into<String>) -> anyhow::Error {
    Hopeless(why.into()).into()
}

/// Calls `look` until it gives a value, and says what it waited for if it never does.
///
/// `look` returns `Ok(None)` for "not yet"; an error is remembered as the reason and tried again, unless it is
/// [`hopeless`].
///
/// # Errors
/// The deadline passed (with `what` and the last reason), or the run was interrupted.
pub fn until<T>(what: &str, deadline: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    let mut pause = Duration::from_millis(2);
    let mut last = None;
    loop {
        run::check()?;
        match look() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => {}
            Err(error) if error.is::<Hopeless>() => return Err(error.context(format!("no {what}"))),
            Err(error) => last = Some(error),
        }
        if start.elapsed() > deadline {
            match last {
                Some(error) => return Err(error.context(format!("no {what} within {deadline:?}"))),
                None => bail!("no {what} within {deadline:?}"),
            }
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

/// As [`until`], for a plain condition.
///
/// # Errors
/// As [`until`].
pub fn until_true(what: &str, deadline: Duration, mut look: impl FnMut() -> Result<bool>) -> Result<()> {
    until(what, deadline, || Ok(look()?.then_some(())))
}
