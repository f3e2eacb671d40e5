//! When to try again.

use std::time::Duration;

const FIRST: Duration = Duration::from_millis(10);
/// A control plane that comes back is noticed by every proxy within this; a try costs it a connection that it refuses.
const LONGEST: Duration = Duration::from_secs(5);

/// How a stream ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum End {
    /// The server closed it in order.
    #[error("the control plane closed the stream")]
    Complete,
    /// The server restarts or rebalances.
    #[error("the control plane ended the stream: {0}")]
    Reconnect(String),
    /// The server refused or failed.
    #[error("the stream to the control plane failed: {0}")]
    Failed(String),
    /// There was no stream.
    #[error("{0}")]
    Unreachable(String),
}

/// Doubles from 10 ms to 5 s while nothing works.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
}

impl Backoff {
    /// The control plane answered: start over.
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }

    /// How long to wait after a stream that ended like this. A stream that was answered and ended in order is opened
    /// again at once; one that never was counts as a failure however it ended, so that a server that accepts and
    /// closes is not hammered.
    pub(super) fn after(&mut self, end: &End, answered: bool) -> Duration {
        match end {
            End::Complete if answered => Duration::ZERO,
            End::Reconnect(_) if answered => FIRST,
            _ => {
                let wait = FIRST.saturating_mul(1 << self.failures.min(11)).min(LONGEST);
                self.failures = self.failures.saturating_add(1);
                spread(wait)
            }
        }
    }
}

/// Up to a tenth less, so that the nodes of a mesh do not come back in one instant.
fn spread(wait: Duration) -> Duration {
    wait.mul_f64(fastrand::f64().mul_add(-0.1, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waits(end: &End, answered: bool, times: usize) -> Vec<Duration> {
        let mut backoff = Backoff::default();
        (0..times).map(|_| backoff.after(end, answered)).collect()
    }

    #[test]
    fn failures_double_from_ten_milliseconds_to_five_seconds() {
        let waits = waits(&End::Failed("refused".into()), false, 14);
        let nominal = [10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5000, 5000, 5000, 5000, 5000];
        for (wait, nominal) in waits.iter().zip(nominal) {
            let nominal = Duration::from_millis(nominal);
            assert!(*wait <= nominal && *wait >= nominal.mul_f64(0.9), "{wait:?} for {nominal:?}");
        }
    }

    #[test]
    fn a_stream_that_worked_and_ended_in_order_is_opened_again_at_once() {
        assert_eq!(waits(&End::Complete, true, 3), vec![Duration::ZERO; 3]);
        assert_eq!(waits(&End::Reconnect("goaway".into()), true, 3), vec![FIRST; 3]);
    }

    #[test]
    fn a_server_that_accepts_and_closes_is_not_hammered() {
        let waits = waits(&End::Complete, false, 13);
        assert!(waits[12] > Duration::from_secs(4), "{waits:?}");
    }

    #[test]
    fn an_answer_starts_the_backoff_over() {
        let mut backoff = Backoff::default();
        for _ in 0..8 {
            backoff.after(&End::Failed(String::new()), false);
        }
        backoff.reset();
        assert!(backoff.after(&End::Failed(String::new()), false) <= FIRST);
    }
}
