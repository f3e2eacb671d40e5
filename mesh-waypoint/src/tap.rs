//! Requests, one by one, for who listens (`GET /tap`). While nobody does, a request costs one read of a flag for it.
//!
//! A listener names itself and comes again and again; what happens between two visits waits for it, up to a bound, and
//! what finds no room is counted. One that stays away is forgotten.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mesh_core::tap::{Batch, Filter, Tapped};
use tokio::sync::Notify;

/// Listeners at once.
pub const LISTENERS: usize = 16;
/// Requests that wait for one listener.
pub const WAITING: usize = 2048;
/// A listener that stays away for longer than this is forgotten.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest that a visit may take.
pub const LONGEST: Duration = Duration::from_secs(25);

/// What is noted of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Interest {
    /// Nothing: nobody listens.
    None,
    /// All but headers.
    Lines,
    /// Headers, too.
    Headers,
}

/// Who listens.
#[derive(Debug, Default)]
pub struct Tap {
    interest: AtomicU8,
    listeners: Mutex<Vec<Arc<Listener>>>,
}

/// One that listens.
#[derive(Debug)]
pub struct Listener {
    id: String,
    filter: Filter,
    queue: Mutex<Queue>,
    told: Notify,
}

#[derive(Debug)]
struct Queue {
    waiting: VecDeque<Tapped>,
    /// Number of the first that waits.
    first: u64,
    lost: u64,
    /// When it is forgotten.
    until: Instant,
}

/// Nobody more can listen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{LISTENERS} listen already; end one of them")]
pub struct TooMany;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Tap {
    /// What is to be noted of a request that begins.
    #[must_use]
    pub fn interest(&self) -> Interest {
        match self.interest.load(Ordering::Relaxed) {
            0 => Interest::None,
            1 => Interest::Lines,
            _ => Interest::Headers,
        }
    }

    /// The listener of that name, who is here until `until` and some time more.
    ///
    /// # Errors
    /// There are too many.
    pub fn listener(&self, id: &str, filter: Filter, until: Instant) -> Result<Arc<Listener>, TooMany> {
        let mut all = lock(&self.listeners);
        let until = until + PATIENCE;
        if let Some(known) = all.iter().find(|known| known.id == id && known.filter == filter) {
            lock(&known.queue).until = until;
            return Ok(Arc::clone(known));
        }
        all.retain(|known| known.id != id);
        if all.len() >= LISTENERS {
            return Err(TooMany);
        }
        let queue = Mutex::new(Queue { waiting: VecDeque::new(), first: 0, lost: 0, until });
        let new = Arc::new(Listener { id: id.to_owned(), filter, queue, told: Notify::new() });
        all.push(Arc::clone(&new));
        self.note_interest(&all);
        Ok(new)
    }

    /// Forgets those that stayed away; when to look again, if anybody is left.
    pub fn forget(&self, now: Instant) -> Option<Instant> {
        let mut all = lock(&self.listeners);
        all.retain(|listener| lock(&listener.queue).until > now);
        self.note_interest(&all);
        all.iter().map(|listener| lock(&listener.queue).until).min()
    }

    fn note_interest(&self, all: &[Arc<Listener>]) {
        let of = |listener: &Arc<Listener>| if listener.filter.headers { 2 } else { 1 };
        self.interest.store(all.iter().map(of).max().unwrap_or(0), Ordering::Relaxed);
    }

    /// Tells everybody who wants to know of a request that has ended.
    pub fn tell(&self, request: &Tapped) {
        let all = lock(&self.listeners);
        for listener in all.iter().filter(|listener| listener.filter.wants(request)) {
            listener.take(listener.filter.shown(request));
        }
    }
}

impl Listener {
    fn take(&self, request: Tapped) {
        let mut queue = lock(&self.queue);
        if queue.waiting.len() >= WAITING {
            queue.lost += 1;
            return;
        }
        queue.waiting.push_back(request);
        drop(queue);
        self.told.notify_one();
    }

    /// What has come from number `since` on; what came before is forgotten. Empty when nothing has come until `until`.
    pub async fn heard(&self, since: u64, until: Instant) -> Batch {
        let deadline = tokio::time::Instant::from_std(until);
        loop {
            let told = self.told.notified();
            if let Some(batch) = self.batch(since) {
                return batch;
            }
            if tokio::time::timeout_at(deadline, told).await.is_err() {
                return self.batch(since).unwrap_or(Batch { next: since, ..Batch::default() });
            }
        }
    }

    fn batch(&self, since: u64) -> Option<Batch> {
        let mut queue = lock(&self.queue);
        // A listener that was forgotten and comes again begins anew.
        let acknowledged = since.saturating_sub(queue.first).min(queue.waiting.len() as u64);
        for _ in 0..acknowledged {
            queue.waiting.pop_front();
            queue.first += 1;
        }
        if queue.waiting.is_empty() && queue.lost == 0 {
            return None;
        }
        let lost = std::mem::take(&mut queue.lost);
        let requests: Vec<Tapped> = queue.waiting.iter().cloned().collect();
        Some(Batch { next: queue.first + requests.len() as u64, lost, requests })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(path: &str) -> Tapped {
        Tapped { path: path.to_owned(), ..Tapped::default() }
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(20)
    }

    #[tokio::test]
    async fn a_listener_hears_each_request_once_and_only_those_that_it_wants() {
        let tap = Tap::default();
        assert_eq!(tap.interest(), Interest::None);
        let filter = Filter { path: Some("/a".into()), ..Filter::default() };
        let listener = tap.listener("x", filter.clone(), soon()).unwrap();
        assert_eq!(tap.interest(), Interest::Lines);
        for path in ["/a1", "/b", "/a2"] {
            tap.tell(&request(path));
        }
        let batch = listener.heard(0, soon()).await;
        assert_eq!((batch.requests.len(), batch.next, batch.lost), (2, 2, 0));
        // An answer that was lost on its way is given again; one that was acknowledged is not.
        assert_eq!(listener.heard(0, soon()).await.requests.len(), 2);
        assert!(listener.heard(2, soon()).await.requests.is_empty());
        assert!(Arc::ptr_eq(&tap.listener("x", filter, soon()).unwrap(), &listener));
    }

    #[tokio::test]
    async fn what_finds_no_room_is_counted() {
        let tap = Tap::default();
        let listener = tap.listener("x", Filter::default(), soon()).unwrap();
        for _ in 0..WAITING + 5 {
            tap.tell(&request("/"));
        }
        let batch = listener.heard(0, soon()).await;
        assert_eq!((batch.requests.len(), batch.lost), (WAITING, 5));
        tap.tell(&request("/"));
        assert_eq!(
            listener.heard(batch.next, soon()).await.lost,
            1,
            "until it is acknowledged there is no room"
        );
    }

    #[test]
    fn who_stays_away_is_forgotten_and_requests_are_free_again() {
        let tap = Tap::default();
        let now = Instant::now();
        for n in 0..LISTENERS {
            let filter = Filter { headers: n == 0, ..Filter::default() };
            tap.listener(&n.to_string(), filter, now).unwrap();
        }
        assert_eq!(tap.listener("more", Filter::default(), now).unwrap_err(), TooMany);
        assert_eq!(tap.interest(), Interest::Headers);
        assert_eq!(tap.forget(now), Some(now + PATIENCE));
        assert_eq!(tap.forget(now + PATIENCE), None);
        assert_eq!(tap.interest(), Interest::None);
    }
}
