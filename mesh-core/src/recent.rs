//! A cache that forgets what was not asked for lately.
//!
//! For what is found by an address in memory, for example a workload's: every change of the workload makes another one, so
//! that entries of the old one are never asked for again, and keep it alive. Entries are in two generations. What is found
//! in the old one moves to the new one; every so often the old one goes, with what nobody asked for, and the new one takes
//! its place. Nothing is done unless something is added: without new entries nothing grows.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// See the module. Values are handed out as clones, of an `Arc` for example.
#[derive(Debug)]
pub struct Recent<K, V> {
    new: HashMap<K, V>,
    old: HashMap<K, V>,
    /// When the generations last took turns.
    turned: Option<Instant>,
    most: usize,
    keep: Duration,
}

impl<K: Eq + Hash, V: Clone> Recent<K, V> {
    /// Keeps entries that were asked for within `keep`, and at most two times `most`.
    #[must_use]
    pub fn new(most: usize, keep: Duration) -> Self {
        Self { new: HashMap::new(), old: HashMap::new(), turned: None, most, keep }
    }

    /// The entry of `key`.
    pub fn get(&mut self, key: &K) -> Option<V> {
        if let Some(value) = self.new.get(key) {
            return Some(value.clone());
        }
        let (key, value) = self.old.remove_entry(key)?;
        self.new.insert(key, value.clone());
        Some(value)
    }

    /// Adds an entry.
    pub fn insert(&mut self, key: K, value: V) {
        self.insert_at(key, value, Instant::now());
    }

    fn insert_at(&mut self, key: K, value: V, now: Instant) {
        let turned = *self.turned.get_or_insert(now);
        if now.saturating_duration_since(turned) >= self.keep || self.new.len() >= self.most {
            self.old = std::mem::take(&mut self.new);
            self.turned = Some(now);
        }
        self.old.remove(&key);
        self.new.insert(key, value);
    }

    /// The entry of `key`, which `make` makes if there is none.
    pub fn get_or_insert_with(&mut self, key: K, make: impl FnOnce() -> V) -> V {
        self.get(&key).unwrap_or_else(|| {
            let value = make();
            self.insert(key, value.clone());
            value
        })
    }

    /// How many entries are kept.
    #[must_use]
    pub fn len(&self) -> usize {
        self.new.len() + self.old.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEEP: Duration = Duration::from_secs(60);

    #[test]
    fn what_is_asked_for_stays_and_the_rest_goes_within_two_turns() {
        let mut recent = Recent::new(100, KEEP);
        let begin = Instant::now();
        recent.insert_at("used", 1, begin);
        recent.insert_at("unused", 2, begin);
        for turn in 1..=5_u32 {
            recent.insert_at("another", 3, begin + KEEP * turn);
            assert_eq!(recent.get(&"used"), Some(1), "turn {turn}");
        }
        assert_eq!(recent.get(&"unused"), None);
        assert_eq!(recent.len(), 2);
    }

    #[test]
    fn it_holds_two_times_as_many_as_it_was_told_and_nothing_goes_while_nothing_comes() {
        let mut recent = Recent::new(10, KEEP);
        for key in 0..1000 {
            recent.insert(key, key);
            assert!(recent.len() <= 20, "{}", recent.len());
        }
        assert_eq!(recent.get(&999), Some(999));
        assert_eq!(recent.get(&0), None);
        let mut quiet = Recent::new(10, Duration::ZERO);
        quiet.insert_at(1, 1, Instant::now());
        assert_eq!((quiet.get(&1), quiet.get(&1)), (Some(1), Some(1)));
    }

    #[test]
    fn a_value_is_made_once() {
        let mut recent = Recent::new(10, KEEP);
        assert_eq!(recent.get_or_insert_with(1, || 1), 1);
        assert_eq!(recent.get_or_insert_with(1, || 2), 1);
        assert!(!recent.is_empty());
    }
}
