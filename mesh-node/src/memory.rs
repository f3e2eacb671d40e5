//! Memory that connections needed and no longer need goes back to the kernel.
//!
//! The allocator keeps what is freed for the next request. After the start, and after a wave of connections, that is
//! memory which the node's other programs miss.

use std::sync::Arc;
use std::time::Duration;

use crate::proxy::limits::Gauge;

/// How often the number of connections is looked at.
const EVERY: Duration = Duration::from_secs(3);

/// Gives memory back once the start is over, and whenever the connections have fallen to less than half.
pub async fn give_back(gauge: Arc<Gauge>) {
    let mut wave = Wave::default();
    loop {
        tokio::time::sleep(EVERY).await;
        if wave.is_over(gauge.open()) {
            crate::sys::trim_heap();
        }
    }
}

/// The most connections since memory was last given back; none: it never was.
#[derive(Default)]
struct Wave {
    most: Option<usize>,
    /// What closes last is freed after it is counted: one more look.
    again: bool,
}

impl Wave {
    fn is_over(&mut self, open: usize) -> bool {
        let fell = self.most.is_none_or(|most| open < most.div_ceil(2));
        let over = fell || self.again;
        self.again = fell;
        self.most = Some(if fell { open } else { self.most.map_or(open, |most| most.max(open)) });
        over
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_given_back_after_the_start_and_after_each_wave_and_not_in_between() {
        let mut wave = Wave::default();
        let looks = [0, 0, 0, 900, 1000, 600, 400, 400, 400, 0, 0, 0];
        let over: Vec<bool> = looks.into_iter().map(|open| wave.is_over(open)).collect();
        let expected = [true, true, false, false, false, false, true, true, false, true, true, false];
        assert_eq!(over, expected);
    }
}
