//! Which of the endpoints that take requests takes this one.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::live::{Live, Pool};
use super::policy::Algorithm;

/// How often an endpoint that is warming up may be passed over for one request.
const WARM_TRIES: usize = 16;
/// The fraction of the golden ratio: steps of it hit every part of a line in proportion to its length, evenly in time.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// What a choice depends on beside the endpoints.
pub(super) struct Chance<'a> {
    pub(super) hash: Option<u64>,
    /// Milliseconds.
    pub(super) now: u64,
    /// Requests so far, for round robin.
    pub(super) cursor: &'a AtomicU64,
    pub(super) rng: &'a mut fastrand::Rng,
}

impl Live {
    /// The level of a request; `avoid` names levels by bits that are used only when there is no other.
    pub(super) fn level(&self, chance: &mut Chance<'_>, avoid: u64) -> Option<usize> {
        if avoid != 0 {
            let other = |at: &usize| avoid >> at & 1 == 0 && !self.levels[*at].pools.is_empty();
            if let Some(other) = (0..self.levels.len().min(64)).find(other) {
                return Some(other);
            }
        }
        if self.levels.len() < 2 {
            return (!self.levels.is_empty()).then_some(0);
        }
        let roll = match chance.hash {
            Some(hash) => (hash % 100) as u32,
            None => chance.rng.u32(..100),
        };
        self.levels.iter().position(|level| roll < level.below)
    }

    /// An endpoint of a level; `tried` ones only when consistent hashing finds no other.
    pub(super) fn choose(
        &self,
        level: usize,
        chance: &mut Chance<'_>,
        tried: impl Fn(usize) -> bool,
    ) -> Option<usize> {
        if let (Some(hash), Some(table)) = (chance.hash, &self.members.levels[level].table) {
            let usable = |at: u32| self.takes(at as usize, chance.now);
            let fresh = |at: u32| usable(at) && !tried(at as usize);
            return table.find(hash, fresh).or_else(|| table.find(hash, usable)).map(|at| at as usize);
        }
        let pools = &self.levels[level].pools;
        let pool = match pools.len() {
            0 => return None,
            1 => &pools[0],
            _ => {
                let roll = chance.rng.f64();
                pools.iter().find(|pool| roll < pool.below).or(pools.last())?
            }
        };
        Some(match self.members.policy.balancer.algorithm {
            Algorithm::RoundRobin => self.warm(chance, |chance| pool.next(chance)),
            Algorithm::LeastRequest => self.less_loaded(pool, chance),
            _ => pool.any(chance),
        })
    }

    /// The less loaded of two (power of two choices), in proportion to their weights.
    fn less_loaded(&self, pool: &Pool, chance: &mut Chance<'_>) -> usize {
        if let [only] = pool.endpoints[..] {
            return only as usize;
        }
        let first = self.warm(chance, |chance| pool.any(chance));
        let second = self.warm(chance, |chance| pool.any_but(first, chance));
        let load = |at: usize| f64::from(self.members.endpoints[at].active());
        let (of_first, of_second) = (self.weight(first, chance.now), self.weight(second, chance.now));
        if load(first) * of_second <= load(second) * of_first { first } else { second }
    }

    /// What an endpoint may carry at this time in proportion to others.
    fn weight(&self, at: usize, now: u64) -> f64 {
        let endpoint = &self.members.endpoints[at];
        f64::from(endpoint.weight) * self.warmth(at, now)
    }

    /// The part of its weight that an endpoint has reached; 1 unless it is new.
    fn warmth(&self, at: usize, now: u64) -> f64 {
        let added = self.members.endpoints[at].state.added;
        match &self.members.policy.balancer.warmup {
            Some(warmup) if added > 0 && now < self.members.warm_at => {
                warmup.factor(Duration::from_millis(now.saturating_sub(added)))
            }
            _ => 1.0,
        }
    }

    /// Draws until an endpoint is taken: one that is new is passed over as often as it lacks of its full share.
    fn warm<'a>(&self, chance: &mut Chance<'a>, draw: impl Fn(&mut Chance<'a>) -> usize) -> usize {
        let mut drawn = draw(chance);
        if chance.now >= self.members.warm_at {
            return drawn;
        }
        for _ in 0..WARM_TRIES {
            if chance.rng.f64() < self.warmth(drawn, chance.now) {
                break;
            }
            drawn = draw(chance);
        }
        drawn
    }
}

impl Pool {
    fn at(&self, place: usize) -> usize {
        self.endpoints[place] as usize
    }

    /// By weight, at random.
    fn any(&self, chance: &mut Chance<'_>) -> usize {
        match self.total() {
            None => self.at(chance.rng.usize(..self.endpoints.len())),
            Some(total) => self.of_weight(chance.rng.u64(..total)),
        }
    }

    /// The same, but another than `first` where weights are equal: two of two are always compared.
    fn any_but(&self, first: usize, chance: &mut Chance<'_>) -> usize {
        if self.sums.is_some() {
            return self.any(chance);
        }
        let drawn = chance.rng.usize(..self.endpoints.len() - 1);
        if self.at(drawn) == first { self.at(self.endpoints.len() - 1) } else { self.at(drawn) }
    }

    /// One after the other; with weights, each as often as its weight says, spread out evenly.
    fn next(&self, chance: &Chance<'_>) -> usize {
        let turn = chance.cursor.fetch_add(1, Ordering::Relaxed);
        match self.total() {
            None => self.at((turn % self.endpoints.len() as u64) as usize),
            Some(total) => {
                let point = (u128::from(turn.wrapping_mul(GOLDEN)) * u128::from(total)) >> 64;
                self.of_weight(point as u64)
            }
        }
    }

    fn total(&self) -> Option<u64> {
        self.sums.as_ref().and_then(|sums| sums.last().copied())
    }

    fn of_weight(&self, point: u64) -> usize {
        let sums = self.sums.as_deref().unwrap_or_default();
        self.at(sums.partition_point(|sum| *sum <= point).min(self.endpoints.len() - 1))
    }
}
