//! One cluster: its endpoints as they are now, and what is counted of them.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use arc_swap::{ArcSwap, Guard};
use mesh_core::state::{Mode, Scope, ServiceEndpoints, Str, Workload};

use super::choose::Chance;
use super::clusters::{ClusterKey, Target, UnknownCluster, View, lock};
use super::destinations::{Changes, Rules};
use super::endpoint::{Endpoint, LeftOut, NoEndpoint};
use super::limits::{Limit, Overflow, Permit, Usage};
use super::live::Live;
use super::members::{Input, Members};
use super::outlier::Outcome;
use super::policy::{Algorithm, Policy};
use crate::config::{Labels, Own};

/// How often an endpoint that was tried before may be drawn before the others are looked through (Istio's
/// `hostSelectionRetryMaxAttempts`).
const RESELECT: usize = 5;

/// One backend: endpoints, their policy, and what is counted of them for the whole process.
#[derive(Debug)]
pub struct Cluster {
    key: ClusterKey,
    epoch: Instant,
    live: ArcSwap<Live>,
    basis: Mutex<Option<Basis>>,
    cursor: AtomicU64,
    usage: Usage,
    /// Ejections that `maxEjectionPercent` did not allow.
    pub(super) spared: AtomicU64,
}

/// What a cluster was built from.
#[derive(Debug)]
struct Basis {
    subject: Subject,
    rules: Rules,
    own: Arc<Own>,
    /// Where they matter.
    labels: Option<Arc<HashMap<Str, Arc<Labels>>>>,
    /// Depends on more of the mesh than its own endpoints.
    volatile: bool,
}

#[derive(Debug)]
enum Subject {
    Service(ServiceEndpoints),
    Workload(Arc<Workload>),
}

/// What a pick depends on.
#[derive(Debug, Clone, Copy)]
pub struct PickContext<'a> {
    /// Time.
    pub now: Instant,
    /// For consistent hashing; none: any endpoint.
    pub hash: Option<u64>,
    /// Endpoints that were tried for this request.
    pub tried: &'a [Tried],
    /// Where the client's connection was opened to: what passthrough dials.
    pub original: Option<SocketAddr>,
    /// Whether they are avoided (`retryIgnorePreviousHosts`).
    pub avoid_tried: bool,
    /// Leave the localities of what was tried, if there is something elsewhere (`retryRemoteLocalities`).
    pub leave_localities: bool,
    /// The endpoint of a session ([`Endpoint::sticky`]): taken as long as it takes requests.
    pub sticky: Option<u64>,
}

impl PickContext<'_> {
    /// A first try without anything special.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self {
            now,
            hash: None,
            tried: &[],
            avoid_tried: true,
            original: None,
            leave_localities: false,
            sticky: None,
        }
    }
}

/// An endpoint that was tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tried {
    id: u64,
    level: usize,
}

/// An endpoint that takes a request: counted as active there until this is dropped.
#[derive(Debug)]
pub struct Picked {
    cluster: Arc<Cluster>,
    endpoint: Arc<Endpoint>,
}

impl Cluster {
    pub(super) fn new(key: &ClusterKey, epoch: Instant) -> Self {
        let nothing = Members {
            policy: Arc::default(),
            service: None,
            endpoints: Vec::new(),
            levels: Vec::new(),
            left_out: LeftOut::default(),
            warm_at: 0,
        };
        Self {
            key: key.clone(),
            epoch,
            live: ArcSwap::from_pointee(Live::build(&Arc::new(nothing), 0)),
            basis: Mutex::new(None),
            cursor: AtomicU64::new(0),
            usage: Usage::default(),
            spared: AtomicU64::new(0),
        }
    }

    /// Its name.
    #[must_use]
    pub fn key(&self) -> &ClusterKey {
        &self.key
    }

    /// The policy that is in force.
    #[must_use]
    pub fn policy(&self) -> Arc<Policy> {
        self.live.load().members.policy.clone()
    }

    /// Leave to have one more connection, request or retry.
    ///
    /// # Errors
    /// The limit is reached.
    pub fn admit(self: &Arc<Self>, limit: Limit, now: Instant) -> Result<Permit, Overflow> {
        let live = self.live.load();
        match self.usage.take(limit, &live.members.policy.limits, self.millis(now)) {
            Ok(()) => Ok(Permit::new(self.clone(), limit)),
            Err(max) => Err(Overflow { cluster: self.key.to_string(), limit, max }),
        }
    }

    /// The endpoint that takes a request.
    ///
    /// # Errors
    /// There is none that may.
    pub fn pick(
        self: &Arc<Self>,
        context: &PickContext<'_>,
        rng: &mut fastrand::Rng,
    ) -> Result<Picked, NoEndpoint> {
        let now = self.millis(context.now);
        let live = self.live(now);
        let members = &live.members;
        if members.policy.balancer.algorithm == Algorithm::Passthrough || is_passthrough(members) {
            return self.pass_through(members, context);
        }
        let mut chance = Chance { hash: context.hash, now, cursor: &self.cursor, rng };
        let at = live.find(&mut chance, context).ok_or_else(|| self.nothing(members, now))?;
        Ok(self.picked(members.endpoints[at].clone()))
    }

    fn picked(self: &Arc<Self>, endpoint: Arc<Endpoint>) -> Picked {
        endpoint.state.active.fetch_add(1, Ordering::Relaxed);
        endpoint.state.picked.fetch_add(1, Ordering::Relaxed);
        Picked { cluster: self.clone(), endpoint }
    }

    fn pass_through(
        self: &Arc<Self>,
        members: &Members,
        context: &PickContext<'_>,
    ) -> Result<Picked, NoEndpoint> {
        let Some(destination) = context.original else {
            return Err(NoEndpoint { cluster: self.key.to_string(), left_out: members.left_out });
        };
        let tls = members.policy.tls.clone();
        Ok(self.picked(Arc::new(Endpoint::passthrough(destination, members.service.as_ref(), tls))))
    }

    fn nothing(&self, members: &Members, now: u64) -> NoEndpoint {
        let ejected = members.endpoints.iter().filter(|e| e.state.record.is_ejected(now)).count();
        NoEndpoint { cluster: self.key.to_string(), left_out: LeftOut { ejected, ..members.left_out } }
    }

    /// What takes requests at this time. One caller builds it anew when an ejection has ended; others go on meanwhile.
    fn live(&self, now: u64) -> Guard<Arc<Live>> {
        let live = self.live.load();
        if now < live.until {
            return live;
        }
        if let Ok(_basis) = self.basis.try_lock() {
            self.live.store(Arc::new(Live::build(&self.live.load().members, now)));
        }
        self.live.load()
    }

    /// Ejects an endpoint, unless too many are.
    fn eject(&self, endpoint: &Endpoint, now: u64) {
        let _basis = lock(&self.basis);
        let live = self.live.load_full();
        // Another thread's clock may be ahead: what it has seen to end does not begin again.
        let now = now.max(live.from);
        let members = &live.members;
        let record = &endpoint.state.record;
        record.restart();
        let Some(policy) = &members.policy.outlier else { return };
        let is_member = members.endpoints.iter().any(|e| Arc::ptr_eq(&e.state, &endpoint.state));
        if record.is_ejected(now) || !is_member {
            return;
        }
        let ejected = members.endpoints.iter().filter(|e| e.state.record.is_ejected(now)).count() + 1;
        if ejected * 100 > policy.max_ejection_percent as usize * members.endpoints.len() {
            self.spared.fetch_add(1, Ordering::Relaxed);
            return;
        }
        record.eject(now, policy);
        self.live.store(Arc::new(Live::build(members, now)));
    }

    /// Takes over what has changed of its service, policy or subset since it was refreshed last.
    pub(super) fn refresh(&self, view: &View, changes: &Changes, now: Instant) -> Result<(), UnknownCluster> {
        let subject = self.subject(view)?;
        let mut basis = lock(&self.basis);
        let same = basis.as_ref().is_some_and(|basis| basis.holds(&subject, view));
        if same && !changes.touch(subject.hostname()) {
            return Ok(());
        }
        let rules = self.rules(&subject, view)?;
        if same && basis.as_ref().is_some_and(|basis| basis.rules.is_same(&rules)) {
            return Ok(());
        }
        let previous = basis.is_some().then(|| self.live.load_full());
        let now = self.millis(now).max(self.live.load().from);
        let mut policy = match &subject {
            Subject::Service(_) => rules.policy(self.key.port, &self.key.subset),
            Subject::Workload(_) => view.destinations.mesh_policy(),
        };
        if let Some(tls) = &mut policy.tls
            && let Some(known) = previous.as_ref().and_then(|live| live.members.policy.tls.as_ref())
            && tls == known
        {
            // Connections are pooled by it.
            *tls = Arc::clone(known);
        }
        let policy = Arc::new(policy);
        let input =
            Input { view, policy: &policy, previous: previous.as_ref().map(|live| &*live.members), now };
        let members = match &subject {
            Subject::Service(service) => {
                Members::of_service(input, service, self.key.port, rules.subset_labels(&self.key.subset))
            }
            Subject::Workload(workload) => Members::of_workload(input, workload, self.key.port),
        };
        let volatile = is_volatile(&subject, &members);
        self.live.store(Arc::new(Live::build(&Arc::new(members), now)));
        let labels = (!self.key.subset.is_empty()).then(|| view.labels.clone());
        *basis = Some(Basis { subject, rules, own: view.own.clone(), labels, volatile });
        Ok(())
    }

    fn subject(&self, view: &View) -> Result<Subject, UnknownCluster> {
        match &self.key.target {
            Target::Workload(uid) => {
                let found = view.mesh.workload(uid).ok_or_else(|| UnknownCluster::Workload(uid.clone()))?;
                Ok(Subject::Workload(found.clone()))
            }
            Target::Service(key) => {
                let found = view.mesh.service(key).ok_or_else(|| UnknownCluster::Service(key.clone()))?;
                let (port, ports) = (self.key.port, &found.service.ports);
                if ports.contains_key(&port) {
                    return Ok(Subject::Service(found.clone()));
                }
                let known = list(ports.keys().map(u16::to_string));
                Err(UnknownCluster::Port { service: key.clone(), port, known })
            }
        }
    }

    fn rules(&self, subject: &Subject, view: &View) -> Result<Rules, UnknownCluster> {
        let Subject::Service(found) = subject else { return Ok(view.destinations.no_rules()) };
        let host = &found.service.host;
        let rules = view.destinations.rules(host.namespace(), host.hostname());
        let subset = &self.key.subset;
        if subset.is_empty() || rules.subset_labels(subset).is_some() {
            return Ok(rules);
        }
        let known = list(rules.subsets().into_iter());
        Err(UnknownCluster::Subset { service: host.key().clone(), subset: subset.clone(), known })
    }

    /// What takes requests, as it was built last.
    pub(super) fn snapshot(&self) -> Arc<Live> {
        self.live.load_full()
    }

    pub(super) fn usage(&self) -> &Usage {
        &self.usage
    }

    /// Milliseconds since shortly before the start; never 0.
    pub(super) fn millis(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.epoch).as_millis()).unwrap_or(u64::MAX - 1) + 1
    }
}

impl Subject {
    /// What rules go by; empty when none applies.
    fn hostname(&self) -> &str {
        match self {
            Self::Service(found) => found.service.host.hostname(),
            Self::Workload(_) => "",
        }
    }
}

impl Basis {
    /// Whether everything is as it was, apart from rules.
    fn holds(&self, subject: &Subject, view: &View) -> bool {
        let same_subject = match (&self.subject, subject) {
            (Subject::Service(a), Subject::Service(b)) => a.is_same(b),
            (Subject::Workload(a), Subject::Workload(b)) => Arc::ptr_eq(a, b),
            (Subject::Service(_) | Subject::Workload(_), _) => false,
        };
        !self.volatile
            && same_subject
            && Arc::ptr_eq(&self.own, &view.own)
            && self.labels.as_ref().is_none_or(|labels| Arc::ptr_eq(labels, &view.labels))
    }
}

impl Live {
    /// The endpoint of a session, else one that was not tried, else any.
    fn find(&self, chance: &mut Chance<'_>, context: &PickContext<'_>) -> Option<usize> {
        let tried = |at: usize| {
            let id = self.members.endpoints[at].id;
            context.avoid_tried && context.tried.iter().any(|tried| tried.id == id)
        };
        if let Some(at) = context.sticky.and_then(|id| self.members.by_id(id))
            && self.takes(at, chance.now)
            && !tried(at)
        {
            return Some(at);
        }
        let avoid = if context.leave_localities {
            context
                .tried
                .iter()
                .fold(0, |bits, tried| bits | 1_u64.checked_shl(tried.level as u32).unwrap_or(0))
        } else {
            0
        };
        let level = self.level(chance, avoid)?;
        let mut found = self.choose(level, chance, tried)?;
        if context.tried.is_empty() {
            return Some(found);
        }
        for _ in 0..RESELECT {
            if !tried(found) {
                return Some(found);
            }
            found = self.choose(level, chance, tried)?;
        }
        if !tried(found) {
            return Some(found);
        }
        let fresh = |at: &usize| !tried(*at) && self.takes(*at, chance.now);
        (0..self.members.endpoints.len()).find(fresh).or(Some(found))
    }
}

impl Picked {
    /// The endpoint.
    #[must_use]
    pub fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    /// The cluster that it was picked of.
    #[must_use]
    pub fn cluster(&self) -> &Arc<Cluster> {
        &self.cluster
    }

    /// What the next pick for the same request is to avoid.
    #[must_use]
    pub fn tried(&self) -> Tried {
        Tried { id: self.endpoint.id, level: self.endpoint.level }
    }

    /// Tells how the try went. Once per try, beside [`Outcome::Connected`].
    pub fn report(&self, outcome: Outcome, now: Instant) {
        if outcome.is_failure() {
            self.endpoint.state.failed.fetch_add(1, Ordering::Relaxed);
        }
        let live = self.cluster.live.load();
        let Some(policy) = &live.members.policy.outlier else { return };
        if self.endpoint.state.record.note(outcome, policy) {
            self.cluster.eject(&self.endpoint, self.cluster.millis(now));
        }
    }
}

impl Drop for Picked {
    fn drop(&mut self) {
        self.endpoint.state.active.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The service itself asks for no choice (a ServiceEntry without resolution).
fn is_passthrough(members: &Members) -> bool {
    members.service.as_ref().is_some_and(|service| service.load_balancing.mode == Mode::Passthrough)
}

/// Whether the members depend on more of the mesh than on the service: on gateways, or on where our replicas are.
fn is_volatile(subject: &Subject, members: &Members) -> bool {
    let balancer = &members.policy.balancer;
    let by_labels = [&balancer.locality, &balancer.mesh_locality]
        .into_iter()
        .flatten()
        .any(|setting| !setting.failover_priority.is_empty());
    let by_cluster = match subject {
        Subject::Service(found) => found.service.load_balancing.scopes.contains(&Scope::Cluster),
        Subject::Workload(_) => false,
    };
    let has_remote = members.left_out.unreachable > 0
        || members.endpoints.iter().any(|endpoint| endpoint.route.endpoint.is_some());
    balancer.zone_aware.is_some() || by_labels || by_cluster || has_remote
}

fn list(items: impl Iterator<Item = String>) -> String {
    let items: Vec<_> = items.collect();
    if items.is_empty() { "none".to_owned() } else { items.join(", ") }
}
