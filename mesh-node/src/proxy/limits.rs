//! How many connections the agent takes at once: more than that are refused at once instead of making all slow.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// File descriptors that are kept for what is no connection: logs, pins, maps, admin, the control plane.
const RESERVED_FILES: usize = 256;
/// A proxied connection holds two sockets at most.
const FILES_PER_CONNECTION: usize = 2;

/// The limit that was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overload {
    /// All pods together.
    Node,
    /// This pod.
    Pod,
}

impl Overload {
    /// For logs and the reason header.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Node => "the node's limit of open connections is reached",
            Self::Pod => "the pod's limit of open connections is reached",
        }
    }
}

/// Counts connections against one limit.
#[derive(Debug)]
pub struct Gauge {
    open: AtomicUsize,
    limit: usize,
}

impl Gauge {
    /// A gauge that lets `limit` connections be open at once; 0 means any number.
    #[must_use]
    pub fn new(limit: usize) -> Arc<Self> {
        let limit = if limit == 0 { usize::MAX } else { limit };
        Arc::new(Self { open: AtomicUsize::new(0), limit })
    }

    /// Open connections.
    #[must_use]
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// The limit; `usize::MAX` for none.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.limit
    }

    fn enter(&self) -> bool {
        let before = self.open.fetch_add(1, Ordering::Relaxed);
        if before >= self.limit {
            self.open.fetch_sub(1, Ordering::Relaxed);
            return false;
        }
        true
    }
}

/// The right to hold one connection open; given back on drop.
#[derive(Debug)]
pub struct Permit {
    node: Arc<Gauge>,
    pod: Arc<Gauge>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.node.open.fetch_sub(1, Ordering::Relaxed);
        self.pod.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Admits one connection, or says which limit it would exceed.
///
/// # Errors
/// The limit that is reached.
pub fn admit(node: &Arc<Gauge>, pod: &Arc<Gauge>) -> Result<Permit, Overload> {
    if !node.enter() {
        return Err(Overload::Node);
    }
    if !pod.enter() {
        node.open.fetch_sub(1, Ordering::Relaxed);
        return Err(Overload::Pod);
    }
    Ok(Permit { node: Arc::clone(node), pod: Arc::clone(pod) })
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

    #[test]
    fn a_connection_over_the_pods_limit_is_refused_and_counts_nowhere() {
        let (node, pod) = (Gauge::new(10), Gauge::new(2));
        let _held = [admit(&node, &pod).unwrap(), admit(&node, &pod).unwrap()];
        assert_eq!(admit(&node, &pod).unwrap_err(), Overload::Pod);
        assert_eq!((node.open(), pod.open()), (2, 2));
    }

    #[test]
    fn a_connection_over_the_nodes_limit_is_refused_whatever_pod_it_is_for() {
        let node = Gauge::new(1);
        let _held = admit(&node, &Gauge::new(0)).unwrap();
        assert_eq!(admit(&node, &Gauge::new(0)).unwrap_err(), Overload::Node);
    }

    #[test]
    fn a_closed_connection_makes_room() {
        let (node, pod) = (Gauge::new(1), Gauge::new(1));
        drop(admit(&node, &pod).unwrap());
        assert!(admit(&node, &pod).is_ok());
    }

    #[test]
    fn open_files_bound_the_connections() {
        assert_eq!(connections_for_files(20_000), 9_872);
        assert_eq!(connections_for_files(10), 1);
    }
}
