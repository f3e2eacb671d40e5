//! The tunnels of one pod on one worker, and which of them a new stream may use.
//!
//! Rules (Istio's node proxy): the key is {source identity, expected identities, destination socket, source address};
//! a tunnel takes streams while one more stays below min(100, the peer's limit); one dial per key at a time, the
//! others wait for its outcome; a tunnel without streams is released after five minutes; a closed one is never
//! offered. Of several usable tunnels the fullest is taken, so that the others run empty and are released: at once as
//! such things go, because what a wave of connections needed is memory on both nodes.
//!
//! A pool belongs to one worker: no lock, no other thread.

#[cfg(test)]
mod tests;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::{Duration, Instant};

use mesh_core::identity::SpiffeId;
use tokio::sync::Notify;

/// A tunnel without streams is released after this long while another one to the same peer has room.
const SURPLUS: Duration = Duration::from_secs(2);

/// What two streams must have in common to share a tunnel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Key {
    /// Whose certificate we show.
    pub(crate) source: SpiffeId,
    /// Of these identities the peer must be one.
    pub(crate) expected: Vec<SpiffeId>,
    /// The peer's HBONE socket.
    pub(crate) destination: SocketAddr,
    /// Our pod's address as the peer sees it; `None` lets the kernel choose.
    pub(crate) source_ip: Option<IpAddr>,
}

/// What the pool needs to know of a tunnel.
pub(crate) trait Tunnel: Clone + 'static {
    /// The peer's limit of streams.
    fn max_streams(&self) -> usize;
    /// Whether new streams can still be opened.
    fn is_open(&self) -> bool;
}

struct Pooled<T> {
    tunnel: T,
    streams: Cell<usize>,
    last_used: Cell<Instant>,
}

/// One stream's share of a tunnel; it counts until it is dropped.
pub(crate) struct Lease<T>(Rc<Pooled<T>>);

impl<T> Lease<T> {
    fn new(pooled: &Rc<Pooled<T>>) -> Self {
        pooled.streams.set(pooled.streams.get() + 1);
        Self(Rc::clone(pooled))
    }

    /// The tunnel.
    pub(crate) fn tunnel(&self) -> &T {
        &self.0.tunnel
    }
}

impl<T> Drop for Lease<T> {
    fn drop(&mut self) {
        self.0.streams.set(self.0.streams.get() - 1);
        self.0.last_used.set(Instant::now());
    }
}

/// The outcome of a dial, shared by all that wait for it.
struct Dial<E> {
    failure: RefCell<Option<E>>,
    done: Cell<bool>,
    wake: Notify,
}

struct Entry<T, E> {
    key: Key,
    tunnels: Vec<Rc<Pooled<T>>>,
    dial: Option<Rc<Dial<E>>>,
}

type Entries<T, E> = HashMap<SocketAddr, Vec<Entry<T, E>>>;

/// See the module.
pub(crate) struct Pool<T, E> {
    entries: Rc<RefCell<Entries<T, E>>>,
    max_streams: usize,
}

impl<T: Tunnel, E: Clone + 'static> Pool<T, E> {
    /// A pool whose tunnels take at most `max_streams` streams each.
    pub(crate) fn new(max_streams: usize) -> Self {
        Self { entries: Rc::default(), max_streams }
    }

    /// A share of a tunnel for `key`: an open one with room, else one that `dial` makes.
    ///
    /// `dial` runs as a task of its own, so that a client that gives up does not take the tunnel from those who wait.
    ///
    /// # Errors
    /// The error of the dial that this call made or waited for.
    pub(crate) async fn checkout<F>(&self, key: &Key, dial: impl Fn() -> F) -> Result<Lease<T>, E>
    where
        F: Future<Output = Result<T, E>> + 'static,
    {
        loop {
            let waiting = {
                let mut entries = self.entries.borrow_mut();
                let entry = entry_of(&mut entries, key);
                entry.tunnels.retain(|t| t.tunnel.is_open() || t.streams.get() > 0);
                if let Some(lease) = self.usable(entry) {
                    return Ok(lease);
                }
                match &entry.dial {
                    Some(dial) => Rc::clone(dial),
                    None => {
                        let outcome = Rc::new(Dial {
                            failure: RefCell::new(None),
                            done: Cell::new(false),
                            wake: Notify::new(),
                        });
                        entry.dial = Some(Rc::clone(&outcome));
                        tokio::task::spawn_local(run_dial(
                            Rc::clone(&self.entries),
                            key.clone(),
                            Rc::clone(&outcome),
                            dial(),
                        ));
                        outcome
                    }
                }
            };
            if !waiting.done.get() {
                waiting.wake.notified().await;
            }
            if let Some(error) = &*waiting.failure.borrow() {
                return Err(error.clone());
            }
        }
    }

    fn usable(&self, entry: &Entry<T, E>) -> Option<Lease<T>> {
        entry.tunnels.iter().filter(|t| self.has_room(t)).max_by_key(|t| t.streams.get()).map(Lease::new)
    }

    fn has_room(&self, pooled: &Pooled<T>) -> bool {
        let most = self.max_streams.min(pooled.tunnel.max_streams()).max(2);
        pooled.tunnel.is_open() && pooled.streams.get() + 1 < most
    }

    /// Lets go of tunnels that are closed, had no stream for `idle`, or had none for a while and are not the only one
    /// with room.
    pub(crate) fn release(&self, now: Instant, idle: Duration) {
        let mut entries = self.entries.borrow_mut();
        for same_destination in entries.values_mut() {
            for entry in &mut *same_destination {
                let mut room = entry.tunnels.iter().any(|t| t.streams.get() > 0 && self.has_room(t));
                entry.tunnels.retain(|t| {
                    if t.streams.get() > 0 {
                        return true;
                    }
                    let most = if room { idle.min(SURPLUS) } else { idle };
                    let stays = t.tunnel.is_open() && now.duration_since(t.last_used.get()) < most;
                    room |= stays;
                    stays
                });
            }
            same_destination.retain(|e| !e.tunnels.is_empty() || e.dial.is_some());
        }
        entries.retain(|_, same_destination| !same_destination.is_empty());
    }

    /// Lets go of every tunnel; streams that use one keep it until they end.
    pub(crate) fn clear(&self) {
        self.entries.borrow_mut().clear();
    }

    /// Tunnels held, and streams on them.
    pub(crate) fn size(&self) -> (usize, usize) {
        let entries = self.entries.borrow();
        let tunnels = || entries.values().flatten().flat_map(|e| &e.tunnels);
        (tunnels().count(), tunnels().map(|t| t.streams.get()).sum())
    }
}

fn entry_of<'a, T, E>(entries: &'a mut Entries<T, E>, key: &Key) -> &'a mut Entry<T, E> {
    let same_destination = entries.entry(key.destination).or_default();
    let at = same_destination.iter().position(|e| e.key == *key).unwrap_or_else(|| {
        same_destination.push(Entry { key: key.clone(), tunnels: Vec::new(), dial: None });
        same_destination.len() - 1
    });
    &mut same_destination[at]
}

async fn run_dial<T: Tunnel, E>(
    entries: Rc<RefCell<Entries<T, E>>>,
    key: Key,
    outcome: Rc<Dial<E>>,
    dial: impl Future<Output = Result<T, E>>,
) {
    let result = dial.await;
    {
        let mut entries = entries.borrow_mut();
        let entry = entry_of(&mut entries, &key);
        // Another dial of the same key can only have begun after the pool was cleared.
        if entry.dial.as_ref().is_some_and(|d| Rc::ptr_eq(d, &outcome)) {
            entry.dial = None;
        }
        match result {
            Ok(tunnel) => entry.tunnels.push(Rc::new(Pooled {
                tunnel,
                streams: Cell::new(0),
                last_used: Cell::new(Instant::now()),
            })),
            Err(error) => *outcome.failure.borrow_mut() = Some(error),
        }
    }
    outcome.done.set(true);
    outcome.wake.notify_waiters();
}
