//! Answers of the API server that are good for a while.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Answers that are remembered at most.
const MOST: usize = 4096;

/// Answers by question.
#[derive(Debug)]
pub(super) struct Remembered<K, V>(Mutex<HashMap<K, (Instant, V)>>);

impl<K, V> Default for Remembered<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + Hash, V: Clone> Remembered<K, V> {
    /// The answer, while it is good.
    pub(super) fn get(&self, key: &K) -> Option<V> {
        let remembered = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (until, answer) = remembered.get(key)?;
        (Instant::now() < *until).then(|| answer.clone())
    }

    /// Remembers an answer for some time.
    pub(super) fn put(&self, key: K, answer: V, good_for: Duration) {
        let now = Instant::now();
        let mut remembered = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if remembered.len() >= MOST {
            remembered.retain(|_, (until, _)| now < *until);
        }
        // Whoever floods us with questions makes us ask, not grow.
        if remembered.len() < MOST {
            remembered.insert(key, (now + good_for, answer));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_good_for_its_time_and_a_flood_makes_nothing_grow() {
        let remembered = Remembered::default();
        remembered.put(0, "yes", Duration::from_millis(500));
        assert_eq!(remembered.get(&0), Some("yes"));
        for key in 1..=2 * MOST {
            remembered.put(key, "no", Duration::from_secs(600));
        }
        assert_eq!(remembered.0.lock().unwrap().len(), MOST);
        std::thread::sleep(Duration::from_millis(500));
        assert_eq!((remembered.get(&0), remembered.get(&1)), (None, Some("no")));
    }
}
