//! When to ask the control plane again: a wait that is cut short when there is a reason to.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

/// At least this long between two attempts, however many wish for one.
const LEAST: Duration = Duration::from_millis(250);

/// Shared by everything of a process that asks one control plane: whoever gets through, or has somebody waiting for what
/// the control plane knows, has the others try now. Without it, a node that has lost its control plane for a minute
/// would go on for another quarter of one with what it knew before, while its certificates are long fresh.
#[derive(Debug, Clone)]
pub struct Again(Arc<watch::Sender<()>>);

impl Default for Again {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(())))
    }
}

/// Which of them is shared is no part of what a control plane is.
impl PartialEq for Again {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Again {}

impl Again {
    /// Ends every [`Self::sleep`] that has lasted long enough.
    pub fn now(&self) {
        self.0.send_replace(());
    }

    /// Waits for `wait`, or for [`Self::now`] once a quarter of a second is over; a call before the wait does not count.
    pub async fn sleep(&self, wait: Duration) {
        let mut told = self.0.subscribe();
        let least = wait.min(LEAST);
        tokio::time::sleep(least).await;
        tokio::select! {
            () = tokio::time::sleep(wait.saturating_sub(least)) => {}
            _ = told.changed() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::Instant;

    const LONG: Duration = Duration::from_secs(15);

    async fn slept(again: &Again, wait: Duration, told_after: Option<Duration>) -> Duration {
        let start = Instant::now();
        let tell = async {
            if let Some(after) = told_after {
                tokio::time::sleep(after).await;
                again.now();
            }
        };
        tokio::join!(again.sleep(wait), tell);
        start.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_ends_when_somebody_got_through_and_is_as_long_as_it_should_be_when_nobody_does() {
        let again = Again::default();
        assert_eq!(slept(&again, LONG, None).await, LONG);
        let three = Duration::from_secs(3);
        assert_eq!(slept(&again, LONG, Some(three)).await.as_secs(), 3);
        // What was said before the wait says nothing about its end.
        again.now();
        assert_eq!(slept(&again, LONG, None).await, LONG);
    }

    #[tokio::test(start_paused = true)]
    async fn wishes_do_not_hammer_a_control_plane_that_is_away() {
        let again = Again::default();
        let early = Duration::from_millis(20);
        assert_eq!(slept(&again, LONG, Some(early)).await.as_millis(), LEAST.as_millis());
        assert_eq!(slept(&again, early, Some(early / 2)).await.as_millis(), early.as_millis());
    }

    #[tokio::test(start_paused = true)]
    async fn every_clone_that_waits_is_told() {
        let again = Again::default();
        let (a, b) = (again.clone(), again.clone());
        let start = Instant::now();
        let tell = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            again.now();
        };
        tokio::join!(a.sleep(LONG), b.sleep(LONG), tell);
        assert_eq!(start.elapsed().as_secs(), 1);
    }
}
