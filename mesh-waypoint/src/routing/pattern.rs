//! Regular expressions as the APIs mean them: RE2, and the whole value.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use regex::bytes::{Regex, RegexBuilder};

/// Of a compiled program, in bytes: what one object can make a waypoint keep.
const SIZE_LIMIT: usize = 256 << 10;
/// Of what a match keeps between calls, in bytes.
const CACHE_LIMIT: usize = 512 << 10;

/// An expression that matches whole values.
#[derive(Debug, Clone)]
pub(super) struct Pattern {
    /// Every value begins with this.
    prefix: Box<str>,
    rest: Rest,
}

/// What follows the prefix.
#[derive(Debug, Clone)]
enum Rest {
    Nothing,
    /// `.*` or `.+`: this many bytes at least, and no end of a line.
    Anything(usize),
    /// The whole expression, not only its rest.
    Regex(Arc<Regex>),
}

impl Pattern {
    /// What every value begins with that matches.
    pub(super) fn prefix(&self) -> &str {
        &self.prefix
    }

    /// As it was written.
    pub(super) fn source(&self) -> String {
        match &self.rest {
            Rest::Nothing => self.prefix.to_string(),
            Rest::Anything(least) => format!("{}.{}", self.prefix, if *least == 0 { '*' } else { '+' }),
            Rest::Regex(regex) => {
                let whole = regex.as_str();
                let inner = whole.strip_prefix(r"\A(?:").and_then(|rest| rest.strip_suffix(r")\z"));
                inner.unwrap_or(whole).to_owned()
            }
        }
    }

    pub(super) fn is_match(&self, value: &[u8]) -> bool {
        // Comparing nothing is slow where it is nowhere: see `PathTree::walk`.
        let prefix = self.prefix.as_bytes();
        let rest = if prefix.is_empty() { Some(value) } else { value.strip_prefix(prefix) };
        let Some(rest) = rest else { return false };
        match &self.rest {
            Rest::Nothing => rest.is_empty(),
            Rest::Anything(least) => rest.len() >= *least && !rest.contains(&b'\n'),
            Rest::Regex(regex) => regex.is_match(value),
        }
    }
}

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
    /// An expression that matches whole values. Most of those that people write need no engine: `/api/.*`, `v2`.
    pub(super) fn whole(&self, pattern: &str) -> Result<Pattern, String> {
        let (prefix, rest) = split_literal(pattern);
        let rest = match rest {
            "" => Rest::Nothing,
            ".*" => Rest::Anything(0),
            ".+" => Rest::Anything(1),
            _ => Rest::Regex(self.whole_regex(pattern)?),
        };
        Ok(Pattern { prefix: prefix.into(), rest })
    }

    /// An expression that matches anywhere.
    pub(super) fn anywhere(&self, pattern: &str) -> Result<Arc<Regex>, String> {
        self.get(pattern.to_owned())
    }

    fn whole_regex(&self, pattern: &str) -> Result<Arc<Regex>, String> {
        // On its own first: `a)(?:b` must not become valid by what is put around it.
        if pattern.contains(')') {
            compile(pattern)?;
        }
        self.get(format!(r"\A(?:{pattern})\z"))
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

/// What an expression begins with literally, and its rest as it is written. In doubt nothing is literal.
fn split_literal(pattern: &str) -> (String, &str) {
    let mut literal = String::new();
    let mut rest = pattern;
    loop {
        let mut characters = rest.chars();
        let character = match (characters.next(), characters.clone().next()) {
            // `\<` and `\>` are ends of words to the engine.
            (Some('\\'), Some(escaped)) if escaped.is_ascii_punctuation() && !"<>".contains(escaped) => {
                characters.next();
                escaped
            }
            (Some(plain), _) if !r"\.+*?()[]{}|^$".contains(plain) => plain,
            _ => break,
        };
        let after = characters.as_str();
        // One that is repeated, or may be absent, is no part of it.
        if after.starts_with(['*', '+', '?', '{']) {
            break;
        }
        literal.push(character);
        rest = after;
    }
    if has_alternatives(rest) { (String::new(), pattern) } else { (literal, rest) }
}

/// Whether there may be a `|` outside of parentheses.
fn has_alternatives(pattern: &str) -> bool {
    if !pattern.contains('|') {
        return false;
    }
    let mut depth = 0;
    let mut characters = pattern.chars();
    while let Some(character) = characters.next() {
        match character {
            '\\' => {
                characters.next();
            }
            '(' => depth += 1,
            ')' => depth -= 1,
            // In a class, parentheses mean themselves.
            '[' => return true,
            '|' if depth <= 0 => return true,
            _ => {}
        }
    }
    false
}

#[cfg(test)]
impl Patterns {
    /// How many expressions are remembered, in use or not.
    pub(super) fn known(&self) -> usize {
        self.0.lock().unwrap().known.len()
    }

    /// As [`Self::whole`], with the engine for everything.
    pub(super) fn whole_by_engine(&self, pattern: &str) -> Result<Arc<Regex>, String> {
        self.whole_regex(pattern)
    }
}
