//! Regular expressions as the APIs mean them: RE2, and the whole value.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use regex::bytes::{Regex, RegexBuilder};

/// Of a compiled program, in bytes: what one object can make a waypoint keep.
const SIZE_LIMIT: usize = 256 << 10;
/// Of what a match keeps between calls, in bytes.
const CACHE_LIMIT: usize = 512 << 10;

/// Regular expressions in use, so that equal ones are compiled once and survive a change of their object.
#[derive(Debug, Clone, Default)]
pub(super) struct Patterns(Arc<Mutex<Pool>>);

#[derive(Debug, Default)]
struct Pool {
    known: HashMap<Box<str>, Weak<Regex>>,
    /// Entries at which those that nobody uses are dropped.
    sweep_at: usize,
}

impl Patterns {
    /// An expression that matches whole values.
    pub(super) fn whole(&self, pattern: &str) -> Result<Arc<Regex>, String> {
        // On its own first: `a)(?:b` must not become valid by what is put around it.
        if pattern.contains(')') {
            compile(pattern)?;
        }
        self.get(format!(r"\A(?:{pattern})\z"))
    }

    /// An expression that matches anywhere.
    pub(super) fn anywhere(&self, pattern: &str) -> Result<Arc<Regex>, String> {
        self.get(pattern.to_owned())
    }

    fn get(&self, pattern: String) -> Result<Arc<Regex>, String> {
        let mut pool = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(regex) = pool.known.get(&*pattern).and_then(Weak::upgrade) {
            return Ok(regex);
        }
        let regex = Arc::new(compile(&pattern)?);
        if pool.known.len() >= pool.sweep_at {
            pool.known.retain(|_, regex| regex.strong_count() > 0);
            pool.sweep_at = 2 * pool.known.len() + 64;
        }
        pool.known.insert(pattern.into(), Arc::downgrade(&regex));
        Ok(regex)
    }
}

/// RE2's classes (`\w`, `\d`) are ASCII, which the `unicode` mode would widen, at a hundred times the size; what only
/// that mode has (`\pL`, letters beyond ASCII in a class) is compiled with it.
fn compile(pattern: &str) -> Result<Regex, String> {
    let build = |unicode| {
        let mut builder = RegexBuilder::new(pattern);
        builder.unicode(unicode).size_limit(SIZE_LIMIT).dfa_size_limit(CACHE_LIMIT).build()
    };
    match build(false) {
        Ok(regex) => Ok(regex),
        Err(regex::Error::CompiledTooBig(limit)) => {
            Err(format!("is larger than {limit} bytes when compiled"))
        }
        Err(_) => build(true).map_err(|error| one_line(&error)),
    }
}

/// The parser's drawing of where the error is takes several lines.
fn one_line(error: &regex::Error) -> String {
    let text = error.to_string();
    let last = text.lines().last().unwrap_or_default();
    format!("is no regular expression: {}", last.trim_start_matches("error: "))
}
