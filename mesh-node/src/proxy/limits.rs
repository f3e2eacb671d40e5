//! How many connections the agent takes at once: more than that are refused at once instead of making all slow.
//!
//! Four limits, each with a name that logs and metrics say: `node`, all pods together; `pod`, what the operator gives
//! each pod; `share`: while more than one pod is enrolled, a pod holds at most as many connections as the node has
//! free. So one greedy pod stops at half, two at a third each, and there is always room for another pod's next one.
//! And `memory`: above what the agent may hold, pods with at least an average number of connections get no more; the
//! others still do within a reserve, since it is not they who fill it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

/// File descriptors that are kept for what is no connection: logs, pins, maps, admin, the control plane.
const RESERVED_FILES: usize = 256;
/// A proxied connection holds two sockets at most.
const FILES_PER_CONNECTION: usize = 2;
/// This part of the memory limit, on top of it, is for pods with few connections.
const MEMORY_RESERVE: usize = 8;

/// The limit that was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overload {
    /// All pods together.
    Node,
    /// This pod's own.
    Pod,
    /// This pod's fair share.
    Share,
    /// The agent's memory.
    Memory,
}

impl Overload {
    /// For logs and the reason header.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Node => "the node's limit of open connections is reached",
            Self::Pod => "the pod's limit of open connections is reached",
            Self::Share => {
                "the pod's fair share of the node's open connections is reached: it holds as many as are free"
            }
            Self::Memory => "the agent holds as much memory as it may",
        }
    }

    /// For the metric.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Pod => "pod",
            Self::Share => "share",
            Self::Memory => "memory",
        }
    }
}

/// What an operator can set.
#[derive(Debug, Clone, Copy, Default)]
pub struct Limits {
    /// Connections of all pods; 0 means any number.
    pub node: usize,
    /// Connections of each pod; 0 means any number.
    pub per_pod: usize,
    /// Whether one pod must leave room for the others.
    pub fair_share: bool,
    /// Bytes that the agent may hold; 0 means any number.
    pub memory: usize,
}

/// Counts the connections of all pods.
#[derive(Debug)]
pub struct Gauge {
    open: AtomicUsize,
    /// Resident bytes of the agent, as last seen.
    memory: AtomicUsize,
    limits: Limits,
    pods: Mutex<Vec<Weak<PodGauge>>>,
    /// As many as there are in `pods`, for the data path.
    enrolled: AtomicUsize,
}

/// Counts the connections of one pod.
#[derive(Debug)]
pub struct PodGauge {
    label: String,
    open: AtomicUsize,
    /// Nanoseconds that workers spent on it.
    busy: AtomicU64,
    node: Arc<Gauge>,
}

/// A pod's share of the agent at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// `namespace/name`.
    pub label: String,
    /// Open connections.
    pub open: usize,
    /// Time that workers spent on its connections since it was enrolled.
    pub busy: Duration,
}

fn or_any(limit: usize) -> usize {
    if limit == 0 { usize::MAX } else { limit }
}

fn enter(open: &AtomicUsize, limit: usize) -> bool {
    let before = open.fetch_add(1, Ordering::Relaxed);
    if before >= limit {
        open.fetch_sub(1, Ordering::Relaxed);
        return false;
    }
    true
}

impl Gauge {
    /// No pod yet.
    #[must_use]
    pub fn new(limits: Limits) -> Arc<Self> {
        let limits = Limits {
            node: or_any(limits.node),
            per_pod: or_any(limits.per_pod),
            memory: or_any(limits.memory),
            ..limits
        };
        Arc::new(Self {
            open: AtomicUsize::new(0),
            memory: AtomicUsize::new(0),
            limits,
            pods: Mutex::default(),
            enrolled: 0.into(),
        })
    }

    /// Counts for a pod, which is among the node's as long as this lives. `label` is `namespace/name`.
    #[must_use]
    pub fn pod(self: &Arc<Self>, label: &str) -> Arc<PodGauge> {
        let node = Arc::clone(self);
        let pod = Arc::new(PodGauge { label: label.to_owned(), open: 0.into(), busy: 0.into(), node });
        let mut pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        pods.push(Arc::downgrade(&pod));
        self.enrolled.fetch_add(1, Ordering::Relaxed);
        pod
    }

    /// Open connections.
    #[must_use]
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// The limit; `usize::MAX` for none.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.limits.node
    }

    /// Bytes that the agent may hold; `usize::MAX` for any number.
    #[must_use]
    pub fn memory_limit(&self) -> usize {
        self.limits.memory
    }

    /// Says what the agent holds now; whether that is more than it may.
    pub fn holds(&self, bytes: usize) -> bool {
        self.memory.store(bytes, Ordering::Relaxed);
        bytes > self.limits.memory
    }

    /// Whether there is no memory for another connection of a pod that has `open`.
    fn is_full_for(&self, open: usize) -> bool {
        let memory = self.memory.load(Ordering::Relaxed);
        let limit = self.limits.memory;
        if memory <= limit {
            return false;
        }
        let pods = self.enrolled.load(Ordering::Relaxed).max(1);
        let below_average = open < self.open().div_ceil(pods);
        !below_average || memory > limit.saturating_add(limit / MEMORY_RESERVE)
    }

    /// Each pod's share. A pod that left the mesh and came back while connections of before went on is one.
    #[must_use]
    pub fn by_pod(&self) -> Vec<Share> {
        let pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
        // Upgraded and dropped outside of the lock: the last one takes it.
        let pods: Vec<Arc<PodGauge>> = pods.iter().filter_map(Weak::upgrade).collect();
        let share = |pod: &Arc<PodGauge>| Share {
            label: pod.label.clone(),
            open: pod.open(),
            busy: Duration::from_nanos(pod.busy.load(Ordering::Relaxed)),
        };
        let mut shares: Vec<Share> = Vec::with_capacity(pods.len());
        let mut places: HashMap<&str, usize> = HashMap::with_capacity(pods.len());
        for pod in &pods {
            let share = share(pod);
            match places.entry(&pod.label) {
                Entry::Occupied(known) => {
                    let known = &mut shares[*known.get()];
                    known.open += share.open;
                    known.busy += share.busy;
                }
                Entry::Vacant(place) => {
                    place.insert(shares.len());
                    shares.push(share);
                }
            }
        }
        shares
    }
}

impl PodGauge {
    /// Open connections.
    #[must_use]
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// Counts time that a worker spent on the pod.
    pub fn spent(&self, time: Duration) {
        self.busy.fetch_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Admits one connection, or says which limit it would exceed.
    ///
    /// # Errors
    /// The limit that is reached.
    pub fn admit(self: &Arc<Self>) -> Result<Permit, Overload> {
        let Gauge { limits, enrolled, .. } = &*self.node;
        let free = limits.node.saturating_sub(self.node.open());
        if free == 0 {
            return Err(Overload::Node);
        }
        // Workers look and count without a lock: each may let one too many in.
        if limits.fair_share && enrolled.load(Ordering::Relaxed) > 1 && self.open() >= free {
            return Err(Overload::Share);
        }
        if self.node.is_full_for(self.open()) {
            return Err(Overload::Memory);
        }
        if !enter(&self.node.open, limits.node) {
            return Err(Overload::Node);
        }
        if !enter(&self.open, limits.per_pod) {
            self.node.open.fetch_sub(1, Ordering::Relaxed);
            return Err(Overload::Pod);
        }
        Ok(Permit(Arc::clone(self)))
    }
}

impl Drop for PodGauge {
    fn drop(&mut self) {
        let mut pods = self.node.pods.lock().unwrap_or_else(PoisonError::into_inner);
        pods.retain(|pod| pod.strong_count() > 0);
        self.node.enrolled.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The right to hold one connection open; given back on drop.
#[derive(Debug)]
pub struct Permit(Arc<PodGauge>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.node.open.fetch_sub(1, Ordering::Relaxed);
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The number of connections that a limit of `files` open files lets the agent hold.
#[must_use]
pub fn connections_for_files(files: usize) -> usize {
    (files.saturating_sub(RESERVED_FILES) / FILES_PER_CONNECTION).max(1)
}

/// Raises the soft limit of open files to the hard one and returns it.
#[must_use]
pub fn raise_open_files() -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    let current = if setrlimit(Resource::Nofile, raised).is_ok() { limit.maximum } else { limit.current };
    current.map_or(usize::MAX, |n| usize::try_from(n).unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(node: usize, per_pod: usize) -> Arc<Gauge> {
        Gauge::new(Limits { node, per_pod, ..Limits::default() })
    }

    #[test]
    fn a_connection_over_the_pods_limit_is_refused_and_counts_nowhere() {
        let node = limits(10, 2);
        let pod = node.pod("shop/a");
        let _held = [pod.admit().unwrap(), pod.admit().unwrap()];
        assert_eq!(pod.admit().unwrap_err(), Overload::Pod);
        assert_eq!((node.open(), pod.open()), (2, 2));
    }

    #[test]
    fn a_connection_over_the_nodes_limit_is_refused_whatever_pod_it_is_for() {
        let node = limits(1, 0);
        let _held = node.pod("shop/a").admit().unwrap();
        assert_eq!(node.pod("shop/b").admit().unwrap_err(), Overload::Node);
    }

    #[test]
    fn a_closed_connection_makes_room() {
        let pod = limits(1, 1).pod("shop/a");
        drop(pod.admit().unwrap());
        assert!(pod.admit().is_ok());
    }

    /// Connections that the pod gets until it is refused, and why it is.
    fn fill(pod: &Arc<PodGauge>) -> (Vec<Permit>, Overload) {
        let mut held = Vec::new();
        loop {
            match pod.admit() {
                Ok(permit) => held.push(permit),
                Err(overload) => return (held, overload),
            }
        }
    }

    #[test]
    fn greedy_pods_leave_room_for_the_next_one() {
        let node = Gauge::new(Limits { node: 1200, fair_share: true, ..Limits::default() });
        let (greedy, second, third) = (node.pod("shop/a"), node.pod("shop/b"), node.pod("shop/c"));
        let (held, overload) = fill(&greedy);
        assert_eq!((held.len(), overload), (600, Overload::Share), "half of the node");
        let (more, overload) = fill(&second);
        assert_eq!((more.len(), overload), (300, Overload::Share), "half of what was left");
        assert!(third.admit().is_ok());
        drop(held);
        assert_eq!(fill(&second).0.len() + more.len(), 600, "what is free again is anybody's");
    }

    #[test]
    fn the_only_pod_of_a_node_may_have_it_all() {
        let node = Gauge::new(Limits { node: 8, fair_share: true, ..Limits::default() });
        let only = node.pod("shop/a");
        let other = node.pod("shop/b");
        drop(other);
        let (held, overload) = fill(&only);
        assert_eq!((held.len(), overload), (8, Overload::Node));
    }

    #[test]
    fn connections_are_listed_by_pod_until_the_pod_is_gone() {
        let node = limits(0, 0);
        let (a, b) = (node.pod("shop/a"), node.pod("shop/b"));
        let held = b.admit().unwrap();
        let listed = || -> Vec<_> { node.by_pod().into_iter().map(|pod| (pod.label, pod.open)).collect() };
        assert_eq!(listed(), [("shop/a".to_owned(), 0), ("shop/b".to_owned(), 1)]);
        drop((a, b));
        assert_eq!(listed(), [("shop/b".to_owned(), 1)], "its connection is still open");
        drop(held);
        assert!(node.by_pod().is_empty());
    }

    #[test]
    fn a_pod_that_came_back_is_listed_once_with_what_it_had_open_before() {
        let node = limits(0, 0);
        let before = node.pod("shop/a").admit().unwrap();
        let again = node.pod("shop/a");
        let held = [again.admit().unwrap(), again.admit().unwrap()];
        let listed = || -> Vec<_> { node.by_pod().into_iter().map(|pod| (pod.label, pod.open)).collect() };
        assert_eq!(listed(), [("shop/a".to_owned(), 3)]);
        drop(before);
        assert_eq!(listed(), [("shop/a".to_owned(), 2)]);
        drop(held);
    }

    #[test]
    fn when_memory_is_full_the_pods_that_fill_it_get_no_more_connections() {
        let node = Gauge::new(Limits { memory: 800, ..Limits::default() });
        let (large, small) = (node.pod("shop/a"), node.pod("shop/b"));
        let _held: Vec<_> = (0..10).map(|_| large.admit().unwrap()).collect();
        assert!(!node.holds(800));
        assert!(large.admit().is_ok());
        assert!(node.holds(801));
        assert_eq!(large.admit().unwrap_err(), Overload::Memory);
        assert!(small.admit().is_ok(), "within the reserve");
        node.holds(901);
        assert_eq!(small.admit().unwrap_err(), Overload::Memory, "the reserve is full, too");
        node.holds(700);
        assert!(large.admit().is_ok(), "memory is free again");
    }

    #[test]
    fn a_pods_time_adds_up() {
        let node = limits(0, 0);
        let pod = node.pod("shop/a");
        pod.spent(Duration::from_millis(2));
        pod.spent(Duration::from_millis(3));
        assert_eq!(node.by_pod()[0].busy, Duration::from_millis(5));
    }

    #[test]
    fn open_files_bound_the_connections() {
        assert_eq!(connections_for_files(20_000), 9_872);
        assert_eq!(connections_for_files(10), 1);
    }
}
