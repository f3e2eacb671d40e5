//! Which of a cluster's endpoints take requests at the moment, and how requests are divided between them. Built anew when
//! the members change, when an endpoint is ejected, and when an ejection ends.
//!
//! Levels and shares follow Envoy: a level takes what its healthy endpoints can, times 1.4; the rest goes to the next one.

use std::sync::Arc;

use super::endpoint::Endpoint;
use super::members::{Level, Members, Split};

/// A level with 72 of 100 endpoints left still takes everything (Envoy's overprovisioning factor, in percent).
const OVERPROVISIONING: usize = 140;

/// The endpoints that take requests.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) members: Arc<Members>,
    /// Millisecond that this holds from.
    pub(super) from: u64,
    /// Millisecond at which this is to be built anew, because an ejection ends.
    pub(super) until: u64,
    pub(super) levels: Vec<LiveLevel>,
}

/// A level.
#[derive(Debug)]
pub(super) struct LiveLevel {
    /// Of a hundred requests, those that this level or an earlier one takes.
    pub(super) below: u32,
    /// Ejections are disregarded.
    pub(super) panic: bool,
    pub(super) pools: Vec<Pool>,
}

/// The endpoints of a group that take requests.
#[derive(Debug)]
pub(super) struct Pool {
    /// Of one, what this pool or an earlier one of the level gets.
    pub(super) below: f64,
    /// In [`Members::endpoints`].
    pub(super) endpoints: Vec<u32>,
    /// Sums of the weights up to and with each endpoint; none when they are all the same.
    pub(super) sums: Option<Vec<u64>>,
}

impl Live {
    pub(super) fn build(members: &Arc<Members>, now: u64) -> Self {
        let detects = members.policy.outlier.is_some();
        let is_out = |endpoint: &Endpoint| detects && endpoint.state.record.is_ejected(now);
        let until = members.endpoints.iter().filter(|e| is_out(e)).map(|e| e.state.record.until()).min();
        let health: Vec<Health> =
            members.levels.iter().map(|level| Health::of(members, level, is_out)).collect();
        let (loads, panics) = loads(&health, members.policy.outlier.map_or(0, |o| o.min_health_percent));
        let mut below = 0;
        let levels = members.levels.iter().zip(loads.iter().zip(panics)).map(|(level, (load, panic))| {
            below += load;
            let usable = |at: &u32| panic || !is_out(&members.endpoints[*at as usize]);
            LiveLevel { below, panic, pools: pools(members, level, usable) }
        });
        Self {
            from: now,
            levels: levels.collect(),
            until: until.unwrap_or(u64::MAX),
            members: members.clone(),
        }
    }

    /// Whether an endpoint takes requests.
    pub(super) fn takes(&self, at: usize, now: u64) -> bool {
        let now = now.max(self.from);
        let endpoint = &self.members.endpoints[at];
        let panic = self.levels.get(endpoint.level).is_some_and(|level| level.panic);
        panic || self.members.policy.outlier.is_none() || !endpoint.state.record.is_ejected(now)
    }
}

struct Health {
    all: usize,
    open: usize,
}

impl Health {
    fn of(members: &Members, level: &Level, is_out: impl Fn(&Endpoint) -> bool) -> Self {
        let endpoints = &members.endpoints[level.endpoints.clone()];
        Self { all: endpoints.len(), open: endpoints.iter().filter(|e| !is_out(e)).count() }
    }

    /// What it can take of a hundred requests.
    fn percent(&self) -> usize {
        (OVERPROVISIONING * self.open / self.all.max(1)).min(100)
    }
}

/// Of a hundred requests those that each level takes, and which levels panic: they use all of their endpoints, because
/// too few are left.
fn loads(health: &[Health], min_health_percent: u32) -> (Vec<u32>, Vec<bool>) {
    let total: usize = health.iter().map(Health::percent).sum();
    let min = min_health_percent as usize;
    let panics: Vec<bool> = health.iter().map(|h| total < 100 && h.open * 100 < min * h.all).collect();
    let weights: Vec<usize> = if !panics.is_empty() && panics.iter().all(|panic| *panic) {
        health.iter().map(|h| h.all).collect()
    } else if total == 0 {
        health.iter().enumerate().map(|(at, _)| usize::from(at == 0)).collect()
    } else {
        // The first ones take all that they can.
        let mut left = total.min(100);
        let taken = health.iter().map(|h| {
            let taken = h.percent().min(left);
            left -= taken;
            taken
        });
        taken.collect()
    };
    let sum: usize = weights.iter().sum();
    let mut given = 0;
    let mut seen = 0;
    let loads = weights.iter().map(|weight| {
        seen += weight;
        let up_to = u32::try_from(100 * seen / sum.max(1)).unwrap_or(100);
        let load = up_to - given;
        given = up_to;
        load
    });
    (loads.collect(), panics)
}

fn pools(members: &Members, level: &Level, usable: impl Fn(&u32) -> bool) -> Vec<Pool> {
    let open: Vec<Vec<u32>> = level
        .groups
        .iter()
        .map(|group| group.endpoints.iter().copied().filter(|at| usable(at)).collect())
        .collect();
    let weight = |at: &u32| u64::from(members.endpoints[*at as usize].weight);
    let shares: Vec<f64> = match &level.split {
        Split::Weights => {
            let groups = level.groups.iter().zip(&open);
            groups
                .map(|(group, open)| {
                    let part =
                        OVERPROVISIONING as f64 / 100.0 * open.len() as f64 / group.endpoints.len() as f64;
                    group.weight * part.min(1.0)
                })
                .collect()
        }
        Split::Zones { replicas, own } => {
            let sums: Vec<f64> =
                open.iter().map(|open| open.iter().map(weight).sum::<u64>() as f64).collect();
            zone_shares(&sums, replicas, *own)
        }
    };
    let sum: f64 = shares.iter().sum();
    let mut below = 0.0;
    let mut pools: Vec<Pool> = Vec::with_capacity(open.len());
    for (endpoints, share) in open.into_iter().zip(shares) {
        if !endpoints.is_empty() && share > 0.0 {
            below += share / sum;
            pools.push(Pool { below, sums: sums(&endpoints, weight), endpoints });
        }
    }
    pools
}

/// Sums of weights, unless these are all the same.
fn sums(endpoints: &[u32], weight: impl Fn(&u32) -> u64) -> Option<Vec<u64>> {
    let first = endpoints.first().map(&weight)?;
    if endpoints.iter().all(|at| weight(at) == first) {
        return None;
    }
    let mut sum = 0;
    let add = |at| {
        sum += weight(at);
        sum
    };
    Some(endpoints.iter().map(add).collect())
}

/// What each zone gets when every replica of this waypoint prefers its own (Envoy's zone-aware routing): the own zone as
/// much as its part of the endpoints allows for its part of the replicas, the others the rest by what they have to spare.
fn zone_shares(open: &[f64], replicas: &[f64], own: Option<usize>) -> Vec<f64> {
    let sum: f64 = open.iter().sum();
    let part = |at: usize| if sum > 0.0 { open[at] / sum } else { 0.0 };
    let Some(own) = own.filter(|own| open[*own] > 0.0) else { return open.to_vec() };
    if part(own) >= replicas[own] {
        return (0..open.len()).map(|at| f64::from(u8::from(at == own))).collect();
    }
    let here = part(own) / replicas[own];
    let spare = |at: usize| if at == own { 0.0 } else { (part(at) - replicas[at]).max(0.0) };
    let all_spare: f64 = (0..open.len()).map(spare).sum();
    if all_spare <= 0.0 {
        return open.to_vec();
    }
    (0..open.len()).map(|at| if at == own { here } else { (1.0 - here) * spare(at) / all_spare }).collect()
}
