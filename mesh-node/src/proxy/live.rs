//! The inbound connections of one worker: registered before their first evaluation, evaluated again whenever policy
//! changes, told to end when they are no longer allowed.
//!
//! Registering first closes the gap in which a policy could change between evaluation and registration.

#[cfg(test)]
mod tests;

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};

use mesh_core::policy::{Conn, PolicySet, Verdict, evaluate};
use mesh_core::state::MeshState;

use super::Pod;
use super::failed::Failed;

struct Live {
    pod: Arc<Pod>,
    conn: Conn,
    denied: OnceCell<Failed>,
    /// Of the one task that waits for it.
    waker: RefCell<Option<Waker>>,
}

type Entries = Rc<RefCell<BTreeMap<u64, Rc<Live>>>>;

/// The registry of one worker.
#[derive(Default)]
pub struct Registry {
    entries: Entries,
    next: Cell<u64>,
}

/// A registered connection; dropping it takes it off the registry.
pub struct Registered {
    id: u64,
    live: Rc<Live>,
    entries: Entries,
}

impl Registry {
    /// Registers a connection.
    pub fn register(&self, pod: &Arc<Pod>, conn: Conn) -> Registered {
        let id = self.next.get();
        self.next.set(id + 1);
        let live =
            Rc::new(Live { pod: Arc::clone(pod), conn, denied: OnceCell::new(), waker: RefCell::default() });
        self.entries.borrow_mut().insert(id, Rc::clone(&live));
        Registered { id, live, entries: Rc::clone(&self.entries) }
    }

    /// Evaluates every connection again and ends those that `state` no longer allows. Returns how many.
    pub fn reevaluate(&self, state: &MeshState) -> usize {
        let mut policies: HashMap<*const Pod, Option<PolicySet>> = HashMap::new();
        let mut ended = 0;
        for live in self.entries.borrow().values() {
            let set = policies
                .entry(Arc::as_ptr(&live.pod))
                .or_insert_with(|| state.local_workload(&live.pod.local).map(|w| state.policies_for(w)));
            // A pod that the control plane no longer announces is on its way out; its end ends its connections.
            let Some(set) = set else { continue };
            let Verdict::Deny(reason) = evaluate(set, &live.conn).verdict else { continue };
            // A policy that is listed and not there yet must not cut what it may allow.
            if !reason.is_pending() && live.denied.set(Failed::policy_changed(&reason, set)).is_ok() {
                live.waker.take().into_iter().for_each(Waker::wake);
                ended += 1;
            }
        }
        ended
    }

    /// How many connections there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.borrow().len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The context of each connection with the pod that it belongs to.
    pub fn for_each(&self, mut visit: impl FnMut(&Pod, &Conn)) {
        for live in self.entries.borrow().values() {
            visit(&live.pod, &live.conn);
        }
    }
}

impl Registered {
    /// Resolves when a policy change no longer allows the connection.
    pub async fn denied(&self) -> Failed {
        // Polled with each turn of the connection: a look is all that it may cost.
        poll_fn(|cx| match self.live.denied.get() {
            Some(failed) => Poll::Ready(failed.clone()),
            None => {
                let mut waker = self.live.waker.borrow_mut();
                if !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                    *waker = Some(cx.waker().clone());
                }
                Poll::Pending
            }
        })
        .await
    }

    /// What the connection is, for its first evaluation.
    #[must_use]
    pub fn conn(&self) -> &Conn {
        &self.live.conn
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.entries.borrow_mut().remove(&self.id);
    }
}
