//! Tokens that hold, so that a client's second request with the same token costs no signature check: a check takes longer
//! than everything else that is done for a request.
//!
//! One cache per thread, as a worker owns what it accepted to the end. Only tokens that were verified get in, so that
//! nobody can fill it who has none. Whether a token still holds is for the caller to say: time goes on and keys change.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Held;

/// Bytes of tokens per thread, in two halves; what a token says takes about as much again.
const MAX_BYTES: usize = 1024 * 1024;
/// Longer tokens are checked each time.
const MAX_TOKEN: usize = 8 * 1024;

/// Tells rules apart for as long as the process lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct RuleId(u64);

impl RuleId {
    pub(super) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

type Tokens = HashMap<RuleId, HashMap<Box<str>, Arc<Held>>>;

/// What was used since the young half was last full is in it; the rest is forgotten when it is full again.
#[derive(Default)]
struct Cache {
    young: Tokens,
    young_bytes: usize,
    old: Tokens,
}

thread_local! {
    static CACHE: RefCell<Cache> = RefCell::default();
}

pub(super) fn get(rule: RuleId, token: &str) -> Option<Arc<Held>> {
    CACHE.with_borrow_mut(|cache| {
        if let Some(held) = cache.young.get(&rule).and_then(|tokens| tokens.get(token)) {
            return Some(Arc::clone(held));
        }
        let (token, held) = cache.old.get_mut(&rule)?.remove_entry(token)?;
        cache.put(rule, token, Arc::clone(&held));
        Some(held)
    })
}

pub(super) fn put(rule: RuleId, token: &str, held: &Arc<Held>) {
    if token.len() <= MAX_TOKEN {
        CACHE.with_borrow_mut(|cache| cache.put(rule, token.into(), Arc::clone(held)));
    }
}

impl Cache {
    fn put(&mut self, rule: RuleId, token: Box<str>, held: Arc<Held>) {
        if self.young_bytes + token.len() > MAX_BYTES / 2 {
            self.old = std::mem::take(&mut self.young);
            self.young_bytes = 0;
        }
        let bytes = token.len();
        if self.young.entry(rule).or_default().insert(token, held).is_none() {
            self.young_bytes += bytes;
        }
    }
}

/// Tokens in the cache of this thread.
#[cfg(test)]
pub(super) fn len() -> usize {
    CACHE.with_borrow(|cache| cache.young.values().chain(cache.old.values()).map(HashMap::len).sum())
}
