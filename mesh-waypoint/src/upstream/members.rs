//! The endpoints of a cluster as configuration and the mesh have them: filtered, in levels and groups. Immutable.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

use mesh_core::state::{Mode, Service, ServiceEndpoints, Str, Workload};

use super::clusters::View;
use super::endpoint::{Endpoint, EndpointState, LeftOut, id, target_port, way};
use super::locality::{Scheme, scheme, shares};
use super::policy::{Algorithm, Policy};
use super::table::Table;
use crate::config::Labels;

/// Endpoints by level, and what is computed of them once.
#[derive(Debug)]
pub(super) struct Members {
    pub(super) policy: Arc<Policy>,
    pub(super) service: Option<Arc<Service>>,
    /// By level, then by id.
    pub(super) endpoints: Vec<Arc<Endpoint>>,
    pub(super) levels: Vec<Level>,
    pub(super) left_out: LeftOut,
    /// From this millisecond on no endpoint is new any more.
    pub(super) warm_at: u64,
}

/// Endpoints that are used together; further levels take over what a level cannot.
#[derive(Debug)]
pub(super) struct Level {
    /// In [`Members::endpoints`].
    pub(super) endpoints: Range<usize>,
    pub(super) groups: Vec<Group>,
    pub(super) split: Split,
    /// For consistent hashing.
    pub(super) table: Option<Table>,
}

/// Endpoints of one locality.
#[derive(Debug, Default)]
pub(super) struct Group {
    /// In [`Members::endpoints`].
    pub(super) endpoints: Vec<u32>,
    /// What it is to get, in proportion to the others.
    pub(super) weight: f64,
}

/// How requests are divided between the groups of a level.
#[derive(Debug)]
pub(super) enum Split {
    /// By their weights.
    Weights,
    /// By zones: what each has of this waypoint's replicas (of 1), and which group is our own zone.
    Zones { replicas: Vec<f64>, own: Option<usize> },
}

/// What members are made of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Input<'a> {
    pub(super) view: &'a View,
    pub(super) policy: &'a Arc<Policy>,
    /// What is counted of endpoints goes on.
    pub(super) previous: Option<&'a Members>,
    /// Milliseconds.
    pub(super) now: u64,
}

struct Found {
    workload: Arc<Workload>,
    labels: Option<Arc<Labels>>,
    endpoint: Endpoint,
    distance: usize,
}

impl Members {
    /// The endpoints of a service port; of those with the labels of a subset, where there are some.
    pub(super) fn of_service(
        input: Input<'_>,
        service: &ServiceEndpoints,
        port: u16,
        subset: Option<&BTreeMap<String, String>>,
    ) -> Self {
        let Input { view, policy, .. } = input;
        let lb = &service.service.load_balancing;
        let scheme = scheme(policy, Some(lb), &view.own.locality);
        let mut left_out = LeftOut::default();
        let mut found = Vec::new();
        let states = States::new(input.previous);
        for attached in service.all_endpoints() {
            left_out.endpoints += 1;
            let workload = &attached.workload;
            let labels = view.labels.get(&workload.uid);
            let target = target_port(service, attached.ports.target(port), port);
            let reason = if !service.takes_traffic(attached) {
                &mut left_out.unhealthy
            } else if subset.is_some_and(|wanted| !has_labels(labels, wanted)) {
                &mut left_out.other_subset
            } else if lb.mode == Mode::Strict && !lb.scopes.iter().all(|scope| shares(*scope, view, workload))
            {
                &mut left_out.out_of_scope
            } else if workload.capacity == 0 {
                &mut left_out.without_capacity
            } else if let Some(target) = target {
                match way(&view.mesh, &view.own, workload, Some(&service.service), port, target) {
                    Some(route) => {
                        found.push(Found {
                            workload: workload.clone(),
                            labels: labels.cloned(),
                            endpoint: Endpoint {
                                workload: Some(workload.clone()),
                                port: target,
                                route: route.into(),
                                tls: policy.tls.clone(),
                                id: id(&workload.uid),
                                weight: workload.capacity,
                                level: 0,
                                state: states.of(&workload.uid, input.now),
                            },
                            distance: 0,
                        });
                        continue;
                    }
                    None => &mut left_out.unreachable,
                }
            } else {
                &mut left_out.without_port
            };
            *reason += 1;
        }
        Self::arrange(input, Some(service.service.clone()), &scheme, found, left_out)
    }

    /// A workload that was addressed itself.
    pub(super) fn of_workload(input: Input<'_>, workload: &Arc<Workload>, port: u16) -> Self {
        let mut left_out = LeftOut { endpoints: 1, ..LeftOut::default() };
        let route = way(&input.view.mesh, &input.view.own, workload, None, port, port);
        let found = route.map(|route| Found {
            workload: workload.clone(),
            labels: None,
            endpoint: Endpoint {
                workload: Some(workload.clone()),
                port,
                route: route.into(),
                tls: input.policy.tls.clone(),
                id: id(&workload.uid),
                weight: 1,
                level: 0,
                state: States::new(input.previous).of(&workload.uid, input.now),
            },
            distance: 0,
        });
        left_out.unreachable = usize::from(found.is_none());
        Self::arrange(input, None, &Scheme::Flat, found.into_iter().collect(), left_out)
    }

    fn arrange(
        input: Input<'_>,
        service: Option<Arc<Service>>,
        scheme: &Scheme<'_>,
        mut found: Vec<Found>,
        mut left_out: LeftOut,
    ) -> Self {
        let Input { view, policy, .. } = input;
        if let Scheme::Distribute(shares) = scheme {
            let all = found.len();
            found.retain(|f| shares.iter().any(|(to, share)| *share > 0 && to.matches(&f.workload.locality)));
            left_out.out_of_scope += all - found.len();
        }
        for f in &mut found {
            f.distance = scheme.distance(view, &f.workload, f.labels.as_deref());
        }
        found.sort_by_key(|f| (f.distance, f.endpoint.id));
        let mut levels = Vec::new();
        let mut start = 0;
        for of_level in found.chunk_by_mut(|a, b| a.distance == b.distance) {
            for f in of_level.iter_mut() {
                f.endpoint.level = levels.len();
            }
            levels.push(Level::new(view, policy, scheme, of_level, start));
            start += of_level.len();
        }
        let warm_at = policy.balancer.warmup.map_or(0, |warmup| {
            let newest = found.iter().map(|f| f.endpoint.state.added).max().unwrap_or_default();
            let duration = u64::try_from(warmup.duration.as_millis()).unwrap_or(u64::MAX);
            if newest == 0 { 0 } else { newest.saturating_add(duration) }
        });
        let endpoints = found.into_iter().map(|f| Arc::new(f.endpoint)).collect();
        Self { policy: policy.clone(), service, endpoints, levels, left_out, warm_at }
    }

    /// The endpoint that a sticky session names.
    pub(super) fn by_id(&self, id: u64) -> Option<usize> {
        self.levels.iter().find_map(|level| {
            let of_level = &self.endpoints[level.endpoints.clone()];
            let at = of_level.binary_search_by_key(&id, |endpoint| endpoint.id).ok()?;
            Some(level.endpoints.start + at)
        })
    }
}

impl Level {
    fn new(view: &View, policy: &Policy, scheme: &Scheme<'_>, found: &[Found], start: usize) -> Self {
        let index = |at: usize| u32::try_from(start + at).unwrap_or(u32::MAX);
        let zone_aware = policy.balancer.zone_aware.unwrap_or(u32::MAX) as usize;
        let (groups, split) = match scheme {
            Scheme::Distribute(shares) => {
                let mut groups: Vec<_> = shares
                    .iter()
                    .map(|(_, share)| Group { weight: f64::from(*share), ..Group::default() })
                    .collect();
                for (at, f) in found.iter().enumerate() {
                    let of =
                        shares.iter().position(|(to, share)| *share > 0 && to.matches(&f.workload.locality));
                    if let Some(of) = of {
                        groups[of].endpoints.push(index(at));
                    }
                }
                groups.retain(|group| !group.endpoints.is_empty());
                (groups, Split::Weights)
            }
            Scheme::Zones if found.len() >= zone_aware => zones(view, found, index),
            _ => {
                let endpoints = (0..found.len()).map(index).collect();
                (vec![Group { endpoints, weight: 1.0 }], Split::Weights)
            }
        };
        let table = table(policy, found, &groups, start);
        Self { endpoints: start..start + found.len(), groups, split, table }
    }
}

/// A group for each zone, and where this waypoint's replicas are.
fn zones(view: &View, found: &[Found], index: impl Fn(usize) -> u32) -> (Vec<Group>, Split) {
    let zone = |workload: &Workload| (workload.locality.region.clone(), workload.locality.zone.clone());
    let mut by_zone: BTreeMap<(Str, Str), Group> = BTreeMap::new();
    for (at, f) in found.iter().enumerate() {
        let group = by_zone.entry(zone(&f.workload)).or_default();
        group.endpoints.push(index(at));
        group.weight += f64::from(f.endpoint.weight);
    }
    let here = (view.own.locality.region.clone(), view.own.locality.zone.clone());
    let homes: Vec<_> = view.replicas().iter().map(|replica| zone(replica)).collect();
    let replicas = by_zone.keys().map(|key| {
        if homes.is_empty() {
            return f64::from(u8::from(*key == here));
        }
        homes.iter().filter(|home| *home == key).count() as f64 / homes.len() as f64
    });
    let split =
        Split::Zones { replicas: replicas.collect(), own: by_zone.keys().position(|key| *key == here) };
    (by_zone.into_values().collect(), split)
}

/// The table of a level, with the weights of endpoints and of their groups.
fn table(policy: &Policy, found: &[Found], groups: &[Group], start: usize) -> Option<Table> {
    let build = match policy.balancer.algorithm {
        Algorithm::RingHash(size) => Table::ring(size),
        Algorithm::Maglev(size) => Table::maglev(size),
        _ => return None,
    };
    let weight = |at: u32| f64::from(found[at as usize - start].endpoint.weight);
    let mut entries: Vec<(u32, u64, f64)> = Vec::with_capacity(found.len());
    for group in groups {
        let sum: f64 = group.endpoints.iter().map(|at| weight(*at)).sum();
        entries.extend(group.endpoints.iter().map(|at| {
            let id = found[*at as usize - start].endpoint.id;
            (*at, id, group.weight * weight(*at) / sum)
        }));
    }
    entries.sort_by_key(|(_, id, _)| *id);
    Some(build.of(&entries))
}

fn has_labels(labels: Option<&Arc<Labels>>, wanted: &BTreeMap<String, String>) -> bool {
    wanted.iter().all(|(key, value)| labels.is_some_and(|labels| labels.get(key) == Some(value)))
}

/// What is counted of endpoints, by their ids.
struct States<'a> {
    known: Option<HashMap<u64, &'a Arc<EndpointState>>>,
}

impl<'a> States<'a> {
    fn new(previous: Option<&'a Members>) -> Self {
        Self { known: previous.map(|p| p.endpoints.iter().map(|e| (e.id, &e.state)).collect()) }
    }

    /// Endpoints that come later than the cluster are new; of the first ones nobody knows their age.
    fn of(&self, uid: &Str, now: u64) -> Arc<EndpointState> {
        match &self.known {
            Some(known) => known.get(&id(uid)).map_or_else(
                || Arc::new(EndpointState { added: now, ..EndpointState::default() }),
                |s| Arc::clone(s),
            ),
            None => Arc::default(),
        }
    }
}
