//! Memory that connections needed and no longer need goes back to the kernel.
//!
//! The allocator keeps what is freed for the next request. After the start, and after a wave of connections, that is
//! memory which the node's other programs miss. So is the code that only the start ran: it stays mapped page by page
//! until somebody takes it out of the process, and nobody does while the node has memory.

use std::sync::Arc;
use std::time::Duration;

use crate::proxy::limits::Gauge;

/// How often memory is looked at where it is limited.
const WATCH_EVERY: Duration = Duration::from_millis(100);
/// While memory is over its limit, what is free in the heap is given back this often: only what is in use may refuse
/// connections.
const TRIM_EVERY: Duration = Duration::from_millis(500);
/// How often the number of connections is looked at.
const EVERY: Duration = Duration::from_secs(2);
/// What closes last is freed after it is counted, and the tunnels after their streams: so many more looks.
const AGAIN: u8 = 3;

/// Gives memory back once the start is over, and whenever the connections have fallen to less than half.
pub async fn give_back(gauge: Arc<Gauge>) {
    let mut wave = Wave::default();
    let mut start = Some(AGAIN);
    loop {
        tokio::time::sleep(EVERY).await;
        if wave.is_over(gauge.open()) {
            crate::sys::trim_heap();
        }
        start = match start {
            Some(0) => {
                if let Err(error) = crate::sys::unmap_code() {
                    tracing::debug!(%error, "the code of the start stays in memory");
                }
                None
            }
            left => left.map(|left| left - 1),
        };
    }
}

/// The limit in bytes: what is given, else what the agent's cgroup leaves; 0 for none.
#[must_use]
pub fn limit(given_mib: u64) -> usize {
    let bytes = match given_mib {
        0 => cgroup_limit().map_or(0, |max| max / 8 * 7),
        mib => mib.saturating_mul(1 << 20),
    };
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// `memory.max` of the agent's own cgroup (cgroup v2).
fn cgroup_limit() -> Option<u64> {
    let own = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let mounts = std::fs::read_to_string("/proc/self/mounts").ok()?;
    let mount = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_, at, kind) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup2").then_some(at)
    })?;
    std::fs::read_to_string(std::path::Path::new(mount).join(own).join("memory.max"))
        .ok()?
        .trim()
        .parse()
        .ok()
}

/// Tells `gauge` what the agent holds, without end.
pub async fn watch(gauge: Arc<Gauge>) {
    let mut trimmed = tokio::time::Instant::now();
    let mut over = false;
    loop {
        tokio::time::sleep(WATCH_EVERY).await;
        let Some(bytes) = resident() else { continue };
        let now_over = gauge.holds(bytes);
        if now_over != over {
            let (limit, connections) = (gauge.memory_limit(), gauge.open());
            tracing::warn!(bytes, limit, connections, over = now_over, "memory crossed its limit");
            over = now_over;
        }
        if over && trimmed.elapsed() >= TRIM_EVERY {
            crate::sys::trim_heap();
            trimmed = tokio::time::Instant::now();
        }
    }
}

/// Resident bytes of this process.
fn resident() -> Option<usize> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: usize = statm.split(' ').nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size())
}

/// The most connections since memory was last given back; none: it never was.
#[derive(Default)]
struct Wave {
    most: Option<usize>,
    /// Looks that are still due.
    again: u8,
}

impl Wave {
    fn is_over(&mut self, open: usize) -> bool {
        let fell = self.most.is_none_or(|most| open < most.div_ceil(2));
        let over = fell || self.again > 0;
        self.again = if fell { AGAIN } else { self.again.saturating_sub(1) };
        self.most = Some(if fell { open } else { self.most.map_or(open, |most| most.max(open)) });
        over
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_that_is_given_is_in_mebibytes() {
        assert_eq!(limit(3), 3 << 20);
    }

    #[test]
    fn resident_memory_grows_with_what_is_used() {
        let before = resident().unwrap();
        let used = vec![1_u8; 64 << 20];
        let after = resident().unwrap();
        assert!(after > before + (32 << 20), "{before} before, {after} with {} more", used.len());
    }

    #[test]
    fn memory_is_given_back_after_the_start_and_after_each_wave_and_not_in_between() {
        let mut wave = Wave::default();
        let mut looks = |looks: &[usize]| looks.iter().map(|open| wave.is_over(*open)).collect::<Vec<_>>();
        assert_eq!(looks(&[0, 0, 0, 0, 0]), [true, true, true, true, false], "the start");
        assert_eq!(looks(&[900, 1000, 600]), [false; 3], "a wave that comes");
        assert_eq!(looks(&[400, 400, 400, 400, 400]), [true, true, true, true, false], "and goes");
        assert_eq!(looks(&[0, 0, 0, 0, 0]), [true, true, true, true, false]);
    }
}
