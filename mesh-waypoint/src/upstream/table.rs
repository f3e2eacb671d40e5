//! Tables for consistent hashing. They are built of all endpoints, whether these take requests at the moment or not: one
//! that is out is passed over, so that only its own share moves, and comes back when it does.

use super::hash;

/// Points of a ring, at most (Envoy's limit).
const MAX_RING: u64 = 8 * 1024 * 1024;
/// Places of a Maglev table, at most (Envoy's limit).
const MAX_MAGLEV: u64 = 5_000_011;
/// How often Maglev hashes again before it takes the next place.
const MAGLEV_TRIES: u64 = 8;

/// A table to look hashes up in. Values are indexes of endpoints.
#[derive(Debug)]
pub(super) enum Table {
    /// Points in ascending order with their endpoints (ring hash, Ketama).
    Ring(Vec<(u64, u32)>),
    /// Endpoints by place.
    Maglev(Vec<u32>),
}

/// What to build.
#[derive(Debug, Clone, Copy)]
pub(super) enum Build {
    Ring(u64),
    Maglev(u64),
}

impl Table {
    pub(super) fn ring(minimum_size: u64) -> Build {
        Build::Ring(minimum_size.clamp(1, MAX_RING))
    }

    pub(super) fn maglev(size: u64) -> Build {
        Build::Maglev(next_prime(size.clamp(2, MAX_MAGLEV)))
    }

    /// The first endpoint for a hash that `usable` says yes to.
    pub(super) fn find(&self, hash: u64, usable: impl Fn(u32) -> bool) -> Option<u32> {
        match self {
            Self::Ring(points) => {
                let at = points.partition_point(|(point, _)| *point < hash);
                let (before, after) = points.split_at(at);
                after.iter().chain(before).map(|(_, endpoint)| *endpoint).find(|endpoint| usable(*endpoint))
            }
            Self::Maglev(places) => {
                let size = places.len() as u64;
                let again = |n: u64| if n == 0 { hash } else { hash::bytes(&(hash ^ n).to_le_bytes()) };
                let tries = (0..MAGLEV_TRIES).map(|n| places.get((again(n) % size.max(1)) as usize).copied());
                tries.flatten().find(|endpoint| usable(*endpoint)).or_else(|| {
                    let (before, after) = places.split_at((hash % size.max(1)) as usize);
                    after.iter().chain(before).copied().find(|endpoint| usable(*endpoint))
                })
            }
        }
    }
}

impl Build {
    /// Of endpoints with their ids and weights.
    pub(super) fn of(self, entries: &[(u32, u64, f64)]) -> Table {
        match self {
            Self::Ring(size) => Table::Ring(ring(entries, size)),
            Self::Maglev(size) => Table::Maglev(maglev(entries, size)),
        }
    }
}

/// A power of two of points for the lightest endpoint, more for others in proportion: so that the number of endpoints has
/// to double or halve before those that stay get more or fewer points, and keys move between them.
fn ring(entries: &[(u32, u64, f64)], minimum: u64) -> Vec<(u64, u32)> {
    let lightest = entries.iter().map(|(_, _, weight)| *weight).fold(f64::INFINITY, f64::min);
    let units: f64 = entries.iter().map(|(_, _, weight)| weight / lightest).sum();
    let wanted = (minimum as f64 / units).ceil().max(1.0) as u64;
    let per_unit = (wanted.next_power_of_two() as f64).min(MAX_RING as f64 / units);
    let mut points = Vec::new();
    for (endpoint, id, weight) in entries {
        let count = (per_unit * weight / lightest).round().max(1.0) as u64;
        points.extend((0..count).map(|n| {
            let mut text = [0; 16];
            text[..8].copy_from_slice(&id.to_le_bytes());
            text[8..].copy_from_slice(&n.to_le_bytes());
            (hash::bytes(&text), *endpoint)
        }));
    }
    points.sort_unstable();
    points
}

/// Endpoints take turns by weight; each takes the next free place of its own order (Maglev, section 3.4).
fn maglev(entries: &[(u32, u64, f64)], size: u64) -> Vec<u32> {
    struct Turn {
        endpoint: u32,
        at: u64,
        skip: u64,
        weight: f64,
        due: f64,
    }
    let heaviest = entries.iter().map(|(_, _, weight)| *weight).fold(0.0, f64::max);
    let mut turns: Vec<_> = entries
        .iter()
        .map(|(endpoint, id, weight)| Turn {
            endpoint: *endpoint,
            at: hash::bytes(&id.to_le_bytes()) % size,
            skip: hash::bytes(&id.to_be_bytes()) % (size - 1) + 1,
            weight: *weight,
            due: 0.0,
        })
        .collect();
    let mut places = vec![u32::MAX; if entries.is_empty() { 0 } else { size as usize }];
    let mut free = places.len();
    let mut round = 1.0;
    while free > 0 {
        for turn in &mut turns {
            if round * turn.weight < turn.due {
                continue;
            }
            turn.due += heaviest;
            while places[turn.at as usize] != u32::MAX {
                turn.at = (turn.at + turn.skip) % size;
            }
            places[turn.at as usize] = turn.endpoint;
            free -= 1;
            if free == 0 {
                break;
            }
        }
        round += 1.0;
    }
    places
}

/// The size of a Maglev table has to be prime, or some orders never reach some places.
fn next_prime(mut size: u64) -> u64 {
    let is_prime = |n: u64| n >= 2 && (2..).take_while(|d| d * d <= n).all(|d| !n.is_multiple_of(d));
    while !is_prime(size) {
        size += 1;
    }
    size
}
