//! Keys of issuers: cached, refreshed in the background, and never waited for longer than needed.
//!
//! A [`KeyStore`] belongs to the process. Every rule with a URI holds a [`KeySource`] of it; rules with the same URI share
//! one. One [`Fetcher`] per process fetches: one fetch at a time per URI, again every 20 minutes, with backoff after a
//! failure, and soon after a request met a key id that is not known. The last good keys stay in force while that goes on.
//! A source that no rule holds any more is forgotten.

mod fetch;
mod keys;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;

pub(crate) use fetch::system_roots;
pub use fetch::{FetchError, Fetcher, Roots};
pub(in crate::security) use keys::{Algorithm, SignatureError};
pub use keys::{KeySet, KeySetError};

/// When keys are fetched.
#[derive(Debug, Clone, Copy)]
struct Timing {
    /// How long keys are used before they are fetched again.
    refresh: Duration,
    /// Time between two fetches of one URI, whoever wants them: a client with invented key ids must not make us flood an
    /// issuer.
    least: Duration,
    /// Backoff after failures, doubled each time.
    first_retry: Duration,
    longest_retry: Duration,
}

impl Timing {
    /// The refresh is Istio's default.
    const USUAL: Self = Self {
        refresh: Duration::from_secs(20 * 60),
        least: Duration::from_secs(5),
        first_retry: Duration::from_secs(1),
        longest_retry: Duration::from_secs(60),
    };

    fn retry_after(&self, failures: u32) -> Duration {
        let doublings = failures.saturating_sub(1).min(10);
        (self.first_retry * 2_u32.pow(doublings)).min(self.longest_retry)
    }
}

/// Where rules find the keys of their issuers. Cheap to clone.
#[derive(Debug, Clone)]
pub struct KeyStore(Arc<Store>);

#[derive(Debug)]
struct Store {
    sources: Mutex<HashMap<Box<str>, Weak<KeySource>>>,
    new: mpsc::UnboundedSender<Weak<KeySource>>,
    timing: Timing,
}

/// The keys at one URI.
#[derive(Debug)]
pub struct KeySource {
    uri: Box<str>,
    timeout: Duration,
    /// Has it fetched as long as somebody holds this.
    store: Arc<Store>,
    keys: ArcSwapOption<KeySet>,
    /// Fetches that have ended, and the last of them.
    attempts: watch::Sender<Attempts>,
    wanted: Arc<Notify>,
}

#[derive(Debug, Clone, Default)]
struct Attempts {
    count: u64,
    last: Option<Instant>,
    failures: u32,
    error: Option<Arc<str>>,
}

impl KeyStore {
    /// An empty store, and what fetches for it: [`Fetcher::run`] is to be spawned on the control runtime.
    #[must_use]
    pub fn new(roots: Roots) -> (Self, Fetcher) {
        Self::with_timing(roots, Timing::USUAL)
    }

    fn with_timing(roots: Roots, timing: Timing) -> (Self, Fetcher) {
        let (new, sources) = mpsc::unbounded_channel();
        let store = Self(Arc::new(Store { sources: Mutex::default(), new, timing }));
        (store, Fetcher::new(sources, roots))
    }

    /// The source of a URI, which is fetched from now on.
    #[must_use]
    pub fn source(&self, uri: &str, timeout: Duration) -> Arc<KeySource> {
        // The map is whole after any panic: entries are put and taken by single calls.
        let mut sources = self.0.sources.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(source) = sources.get(uri).and_then(Weak::upgrade) {
            return source;
        }
        sources.retain(|_, source| source.strong_count() > 0);
        let source = Arc::new(KeySource {
            uri: uri.into(),
            timeout,
            store: Arc::clone(&self.0),
            keys: ArcSwapOption::empty(),
            attempts: watch::Sender::new(Attempts::default()),
            wanted: Arc::new(Notify::new()),
        });
        sources.insert(uri.into(), Arc::downgrade(&source));
        if self.0.new.send(Arc::downgrade(&source)).is_err() {
            // The process is shutting down.
            tracing::debug!("keys of {uri} are not fetched: the fetcher has ended");
        }
        source
    }
}

impl Drop for KeySource {
    fn drop(&mut self) {
        // Its fetches end.
        self.wanted.notify_one();
    }
}

impl KeySource {
    /// Where the keys are.
    #[must_use]
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Why the last fetch failed; none when it did not.
    #[must_use]
    pub fn error(&self) -> Option<Arc<str>> {
        self.attempts.borrow().error.clone()
    }

    /// Whether these are the keys in force.
    pub(in crate::security) fn has(&self, keys: &Arc<KeySet>) -> bool {
        self.keys.load().as_ref().is_some_and(|own| Arc::ptr_eq(own, keys))
    }

    /// The keys; waits for the first fetch while it is under way. None when it failed, or takes longer than the timeout.
    pub(in crate::security) async fn keys(&self) -> Option<Arc<KeySet>> {
        if let Some(keys) = self.keys.load_full() {
            return Some(keys);
        }
        if self.attempts.borrow().count > 0 {
            self.refresh().await;
        } else {
            self.attempt_after(0).await;
        }
        self.keys.load_full()
    }

    /// Waits for keys that are newer than those of a check that ended before this call, unless they are quite new.
    pub(in crate::security) async fn refresh(&self) {
        let (count, last) = {
            let attempts = self.attempts.borrow();
            (attempts.count, attempts.last)
        };
        let due = last.is_none_or(|last| last.elapsed() >= self.least_interval());
        if due {
            self.wanted.notify_one();
            self.attempt_after(count).await;
        }
    }

    fn least_interval(&self) -> Duration {
        let failures = self.attempts.borrow().failures;
        if failures == 0 { self.store.timing.least } else { self.store.timing.retry_after(failures) }
    }

    async fn attempt_after(&self, count: u64) {
        let mut attempts = self.attempts.subscribe();
        let wait = attempts.wait_for(|attempts| attempts.count > count);
        // Too late is as good as a failure: the caller looks at the keys.
        drop(tokio::time::timeout(self.timeout, wait).await);
    }

    /// As if these had been fetched.
    #[cfg(test)]
    pub(in crate::security) fn publish(&self, document: &str) {
        self.fetched(Ok(KeySet::read(document.as_bytes()).unwrap()));
    }

    fn fetched(&self, result: Result<KeySet, FetchError>) {
        let error = match result {
            Ok(keys) => {
                for why in keys.skipped() {
                    tracing::debug!("keys of {}: {why}", self.uri);
                }
                self.keys.store(Some(Arc::new(keys)));
                None
            }
            Err(error) => {
                let kept = if self.keys.load().is_some() { "; the last good keys stay in use" } else { "" };
                tracing::warn!("keys of {}: {error}{kept}", self.uri);
                Some(Arc::from(error.to_string()))
            }
        };
        self.attempts.send_modify(|attempts| {
            attempts.count += 1;
            attempts.last = Some(Instant::now());
            attempts.failures = if error.is_some() { attempts.failures + 1 } else { 0 };
            attempts.error = error;
        });
    }

    /// Until the next fetch that nobody asks for.
    fn next(&self) -> Duration {
        match self.attempts.borrow().failures {
            0 => self.store.timing.refresh,
            failures => self.store.timing.retry_after(failures),
        }
    }
}
