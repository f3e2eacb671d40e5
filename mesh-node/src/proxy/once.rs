//! Something that happens once, on one worker, and that many tasks wait for beside their work.
//!
//! Such a wait is polled with each turn of its task. Here that is a look at a flag; a general-purpose notification takes
//! a lock each time, which was a fifth of what a busy connection costs in user space.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

/// See the module.
#[derive(Default)]
pub(super) struct Once {
    happened: Cell<bool>,
    waiting: RefCell<Waiting>,
}

#[derive(Default)]
struct Waiting {
    wakers: Vec<Option<Waker>>,
    free: Vec<usize>,
}

impl Once {
    /// It happens now.
    pub(super) fn happen(&self) {
        self.happened.set(true);
        let woken = std::mem::take(&mut *self.waiting.borrow_mut());
        woken.wakers.into_iter().flatten().for_each(Waker::wake);
    }

    /// Resolves when it has happened. To be polled by one task only.
    pub(super) const fn wait(&self) -> Wait<'_> {
        Wait { once: self, place: None }
    }
}

/// See [`Once::wait`].
pub(super) struct Wait<'a> {
    once: &'a Once,
    place: Option<usize>,
}

impl Future for Wait<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.once.happened.get() {
            return Poll::Ready(());
        }
        if self.place.is_none() {
            let waiting = &mut *self.once.waiting.borrow_mut();
            let waker = Some(cx.waker().clone());
            self.place = Some(match waiting.free.pop() {
                Some(place) => {
                    waiting.wakers[place] = waker;
                    place
                }
                None => {
                    waiting.wakers.push(waker);
                    waiting.wakers.len() - 1
                }
            });
        }
        Poll::Pending
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        let waiting = &mut *self.once.waiting.borrow_mut();
        if let Some(place) = self.place
            && let Some(slot) = waiting.wakers.get_mut(place)
        {
            *slot = None;
            waiting.free.push(place);
            if waiting.free.len() == waiting.wakers.len() {
                *waiting = Waiting::default();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;

    #[tokio::test(flavor = "local")]
    async fn all_who_wait_are_woken_and_who_comes_later_does_not_wait() {
        let once = Rc::new(Once::default());
        let wait = |once: &Rc<Once>| {
            let once = Rc::clone(once);
            tokio::task::spawn_local(async move { once.wait().await })
        };
        let (first, second, given_up) = (wait(&once), wait(&once), wait(&once));
        tokio::task::yield_now().await;
        given_up.abort();
        tokio::task::yield_now().await;
        let third = wait(&once);
        tokio::task::yield_now().await;
        assert_eq!(once.waiting.borrow().wakers.len(), 3, "a place is used again");
        assert!(!first.is_finished());
        once.happen();
        first.await.unwrap();
        second.await.unwrap();
        third.await.unwrap();
        once.wait().await;
        assert!(once.waiting.borrow().wakers.is_empty());
    }
}
