//! Streams of `NodeService` that are to be open for as long as the agent lives: how one ended, and when the next is tried.

use std::time::Duration;

use mesh_core::xds::channel::ChannelError;
use tonic::{Code, Status};

const FIRST: Duration = Duration::from_millis(200);
const LONGEST: Duration = Duration::from_secs(15);
/// A control plane without the service (Istio's) is asked again this often; it may have been replaced.
const NOT_OFFERED: Duration = Duration::from_secs(60);

/// Why a stream ended that was not closed in order.
#[derive(Debug, thiserror::Error)]
pub enum Ended {
    /// There was none.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The control plane ended it, or has no such service.
    #[error("{0}")]
    Status(Box<Status>),
}

impl From<Status> for Ended {
    fn from(status: Status) -> Self {
        Self::Status(Box::new(status))
    }
}

impl Ended {
    /// Whether the control plane does not speak the service.
    #[must_use]
    pub fn is_not_offered(&self) -> bool {
        matches!(self, Self::Status(status) if status.code() == Code::Unimplemented)
    }
}

/// Doubles from 200 ms to 15 s while nothing works, each up to a fifth more or less.
#[derive(Debug, Default)]
pub struct Attempts {
    failures: u32,
}

impl Attempts {
    /// How long to wait after a stream that was for `what` ended like this.
    pub fn after(&mut self, what: &str, ended: &Result<(), Ended>) -> Duration {
        let wait = match ended {
            Ok(()) => {
                self.failures = 0;
                FIRST
            }
            Err(ended) if ended.is_not_offered() => {
                tracing::debug!("the control plane does not offer {what}");
                NOT_OFFERED
            }
            Err(ended) => {
                tracing::debug!(error = %ended, "{what} ended");
                self.failures = (self.failures + 1).min(7);
                (FIRST * (1 << self.failures)).min(LONGEST)
            }
        };
        wait.mul_f64(0.8 + 0.4 * fastrand::f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_a_bound_start_over_after_a_stream_and_are_long_where_nothing_is_offered() {
        let mut attempts = Attempts::default();
        let mut wait = |ended: Result<(), Ended>| attempts.after("a test", &ended).as_secs_f64();
        let near = |wait: f64, nominal: f64| wait >= nominal * 0.8 && wait <= nominal * 1.2;
        let gone = || Err(Status::unavailable("gone").into());
        for nominal in [0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 15.0, 15.0] {
            let wait = wait(gone());
            assert!(near(wait, nominal), "{wait} for {nominal}");
        }
        assert!(near(wait(Err(Status::unimplemented("none").into())), 60.0));
        assert!(near(wait(Ok(())), 0.2));
        assert!(near(wait(gone()), 0.4));
    }
}
