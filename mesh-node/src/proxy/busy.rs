//! How much of a worker each pod takes, and that none takes it all.
//!
//! A worker runs one task at a time, every task belongs to a pod, and tasks take turns. A pod with many bulk streams has
//! many long turns, and everybody else's round trips wait for all of them. So while several pods are active on a worker,
//! a pod that has had more of it than another and whose turns are long takes only some of its turns, until it no longer
//! is ahead. A pod alone may have it all.
//!
//! While one pod is alone, asking the clock twice at each turn would cost what it measures: one turn of sixteen is timed
//! then, at random, and counts sixteenfold.

use std::cell::RefCell;
use std::future::poll_fn;
use std::pin::Pin;
use std::ptr;
use std::task::Poll;
use std::time::{Duration, Instant};

use super::limits::PodGauge;

/// Of a pod that is alone, one turn of this many is timed, on average.
const ONE_OF: u32 = 16;
/// A pod is active for this many turns of the worker after its last one.
const ACTIVE: u64 = 256;
/// A pod may have had this much more of the worker than another before it has to wait.
const AHEAD: Duration = Duration::from_millis(1);
/// Only pods with turns like this have to wait: to pass over short ones would cost more than it gives.
const LONG: Duration = Duration::from_micros(50);
/// Who has to wait takes one of this many turns, at random, or the same tasks would always be passed over.
const WAITING: u32 = 8;

thread_local! {
    static WORKER: RefCell<Turns> = RefCell::default();
}

/// What becomes of a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// It is taken, and nobody asks how long.
    Untimed,
    /// It is taken and timed, and counts this many times.
    Timed(u32),
    /// It is passed over: the task comes again after all others that are ready.
    Passed,
}

/// The turns of one worker.
#[derive(Debug, Default)]
struct Turns {
    /// Turns so far.
    now: u64,
    /// Whose the last one was.
    last: usize,
    /// Several pods are active until this turn.
    shared_until: u64,
    /// Turns of a lonely pod until the next one that is timed.
    until_timed: u32,
    /// The active pods.
    pods: Vec<Account>,
}

/// What a pod had of one worker since it became active.
#[derive(Debug)]
struct Account {
    pod: usize,
    time: Duration,
    last_turn: u64,
    long: bool,
}

impl Turns {
    fn begin(&mut self, pod: usize, random: impl Fn(u32) -> u32) -> Turn {
        self.now += 1;
        if self.last != pod {
            self.last = pod;
            self.shared_until = self.now + ACTIVE;
        }
        if self.now >= self.shared_until {
            if self.until_timed > 0 {
                self.until_timed -= 1;
                return Turn::Untimed;
            }
            // Random, or tasks that take turns regularly would be timed always or never.
            self.until_timed = random(2 * ONE_OF - 1);
            return Turn::Timed(ONE_OF);
        }
        let others = self.pods.iter().filter(|other| other.pod != pod && other.last_turn + ACTIVE > self.now);
        let least = others.map(|other| other.time).min();
        let Some(own) = self.pods.iter().find(|own| own.pod == pod && own.last_turn + ACTIVE > self.now)
        else {
            // It begins where the others are: what it did not use before is no credit.
            let now = self.now;
            self.pods.retain(|account| account.pod != pod && account.last_turn + ACTIVE > now);
            let time = least.unwrap_or_default();
            self.pods.push(Account { pod, time, last_turn: now, long: false });
            return Turn::Timed(1);
        };
        let ahead = least.is_some_and(|least| own.time > least + AHEAD);
        if ahead && own.long && random(WAITING) != 0 { Turn::Passed } else { Turn::Timed(1) }
    }

    fn end(&mut self, pod: usize, took: Duration) {
        let now = self.now;
        if let Some(own) = self.pods.iter_mut().find(|own| own.pod == pod) {
            own.time += took;
            own.last_turn = now;
            own.long = took > LONG;
        }
    }
}

/// Runs `task` in turns that count as the pod's. Pinned by the caller: a future that is handed over would have room here
/// and in what makes it.
pub(super) async fn counted<T>(pod: &PodGauge, mut task: Pin<&mut impl Future<Output = T>>) -> T {
    let id = ptr::from_ref(pod).addr();
    poll_fn(|cx| match WORKER.with_borrow_mut(|turns| turns.begin(id, |n| fastrand::u32(..n))) {
        Turn::Untimed => task.as_mut().poll(cx),
        Turn::Timed(counts) => {
            let began = Instant::now();
            let turn = task.as_mut().poll(cx);
            let took = began.elapsed();
            pod.spent(took * counts);
            WORKER.with_borrow_mut(|turns| turns.end(id, took));
            turn
        }
        Turn::Passed => {
            cx.waker().wake_by_ref();
            Poll::Pending
        }
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::rc::Rc;

    use super::*;
    use crate::proxy::limits::{Gauge, Limits};

    /// Never, of anything.
    const NEVER: fn(u32) -> u32 = |n| n - 1;

    /// Works for `turn` at each of many turns.
    async fn work(turn: Duration, turns: u32) {
        for _ in 0..turns {
            let began = Instant::now();
            while began.elapsed() < turn {
                std::hint::spin_loop();
            }
            tokio::task::yield_now().await;
        }
    }

    fn busy_of(node: &Gauge) -> Vec<Duration> {
        node.by_pod().into_iter().map(|pod| pod.busy).collect()
    }

    #[tokio::test]
    async fn the_time_of_tasks_that_take_turns_is_each_pods_own() {
        let node = Gauge::new(Limits::default());
        let (busy, idle) = (node.pod("shop/a"), node.pod("shop/b"));
        let turn = Duration::from_micros(20);
        let (long, short) = (pin!(work(turn, 5_000)), pin!(work(Duration::ZERO, 5_000)));
        tokio::join!(counted(&busy, long), counted(&idle, short));
        let [busy, idle] = [0, 1].map(|i| busy_of(&node)[i]);
        // 100 ms; other programs may interrupt a turn.
        assert!(busy > Duration::from_millis(80), "{busy:?}");
        assert!(idle < busy / 2, "{idle:?} of {busy:?}");
    }

    #[tokio::test]
    async fn the_time_of_a_lonely_pod_is_estimated() {
        let node = Gauge::new(Limits::default());
        let pod = node.pod("shop/a");
        counted(&pod, pin!(work(Duration::from_micros(20), 10_000))).await;
        let busy = busy_of(&node)[0];
        assert!((Duration::from_millis(100)..Duration::from_secs(4)).contains(&busy), "{busy:?} of 200 ms");
    }

    /// Sixteen tasks of one pod beside one task of another, all with something to do all the time.
    #[test]
    fn many_bulk_tasks_of_one_pod_leave_half_of_the_worker_to_another_pods_only_one() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let node = Gauge::new(Limits::default());
        let (many, one) = (node.pod("shop/a"), node.pod("shop/b"));
        let turn = Duration::from_micros(200);
        tokio::task::LocalSet::new().block_on(&runtime, async {
            let many = Rc::new(many);
            for _ in 0..16 {
                let many = Rc::clone(&many);
                tokio::task::spawn_local(async move { counted(&many, pin!(work(turn, u32::MAX))).await });
            }
            counted(&one, pin!(work(turn, 500))).await;
        });
        let busy = node.by_pod();
        let of = |label: &str| busy.iter().find(|pod| pod.label == label).map(|pod| pod.busy);
        let one = of("shop/b").unwrap();
        let all = busy.iter().map(|pod| pod.busy).sum::<Duration>();
        assert!(
            one * 3 > all,
            "one task has {one:?} of {all:?}: in turn with all others it would be a seventeenth"
        );
    }

    #[test]
    fn a_lonely_pod_is_never_passed_over() {
        let mut turns = Turns::default();
        for _ in 0..1_000 {
            assert_ne!(turns.begin(1, NEVER), Turn::Passed);
            turns.end(1, Duration::from_millis(10));
        }
    }

    #[test]
    fn the_pod_that_is_ahead_waits_until_the_other_has_caught_up_or_is_idle() {
        let mut turns = Turns::default();
        let long = Duration::from_millis(2);
        for pod in [1, 2, 1] {
            assert_eq!(turns.begin(pod, NEVER), Turn::Timed(1), "{pod}");
            turns.end(pod, if pod == 1 { long } else { Duration::ZERO });
        }
        assert_eq!(turns.begin(1, NEVER), Turn::Passed);
        assert_eq!(turns.begin(1, |_| 0), Turn::Timed(1), "one of some it does take");
        assert_eq!(turns.begin(2, NEVER), Turn::Timed(1));
        turns.end(2, 3 * long);
        assert_eq!(turns.begin(1, NEVER), Turn::Timed(1), "the other has caught up");
        turns.end(1, 5 * long);
        assert_eq!(turns.begin(1, NEVER), Turn::Passed);
        for _ in 0..ACTIVE {
            turns.begin(1, NEVER);
        }
        assert_ne!(turns.begin(1, NEVER), Turn::Passed, "the other is idle");
    }

    #[test]
    fn short_turns_are_never_passed_over() {
        let mut turns = Turns::default();
        for _ in 0..10_000 {
            for pod in [1, 1, 1, 2] {
                assert_eq!(turns.begin(pod, NEVER), Turn::Timed(1));
                turns.end(pod, LONG);
            }
        }
    }
}
