//! The agent at a glance, and what `why` needs to know of the node.

use std::collections::{BTreeMap, HashMap};
use std::time::{SystemTime, UNIX_EPOCH};

use mesh_core::admin::{NodeStatus, Upstream};
use mesh_core::flows::Filter;
use mesh_core::why::{CertificateFact, Facts};

use super::{Admin, dump};
use crate::config::SameNode;
use crate::generations;
use crate::proxy::OWN_PORTS;

/// Events that an explanation looks at.
const FLOWS: usize = 2000;

pub(super) fn status(admin: &Admin) -> NodeStatus {
    let config = &admin.shared.config;
    let mut certificates: BTreeMap<String, usize> = BTreeMap::new();
    for certificate in dump::certificates(&admin.shared.certificates) {
        *certificates.entry(certificate.state).or_default() += 1;
    }
    let ca = admin.ca.borrow();
    NodeStatus {
        node: config.node.name.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        started_ms: admin.started_ms,
        pending: admin.readiness.list(),
        agents: generations::list(&config.admin.run_dir),
        pods: admin.pods.borrow().clone(),
        xds: xds(admin),
        ca: Upstream {
            address: config.ca.address.clone(),
            connected: ca.connected,
            since_ms: ca.since_ms,
            resources: BTreeMap::new(),
            problem: ca.problem.clone(),
        },
        certificates,
        fail: admin.in_force.borrow().fail().to_owned(),
        capture: admin.in_force.borrow().describe(),
        same_node: match config.proxy.same_node {
            SameNode::Fast => "fast".to_owned(),
            SameNode::Tunnel => "tunnel".to_owned(),
        },
    }
}

fn xds(admin: &Admin) -> Upstream {
    let status = admin.xds.borrow();
    let state = admin.shared.state.load();
    let since = status.last_response.and_then(|at| at.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
    let rejected = status.rejected.last().map(|r| format!("rejected {}: {}", r.name, r.reason));
    let failure = (!status.last_error.is_empty()).then(|| status.last_error.clone());
    Upstream {
        address: admin.shared.config.xds.address.clone(),
        connected: status.connected,
        since_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
        resources: BTreeMap::from([
            ("workloads".to_owned(), state.workload_count()),
            ("services".to_owned(), state.services().count()),
            ("policies".to_owned(), state.policies().count()),
        ]),
        problem: failure.or(rejected),
    }
}

pub(super) fn facts(admin: &Admin) -> Facts {
    let config = &admin.shared.config;
    let slots = admin.shared.certificates.snapshot();
    let certificates: HashMap<_, _> = slots
        .iter()
        .map(|(id, slot)| {
            let validity = slot.certificate.as_ref().map(|c| (c.not_before(), c.not_after()));
            let problem = slot.failure.as_ref().map(ToString::to_string);
            (id.clone(), CertificateFact { validity, problem })
        })
        .collect();
    Facts {
        node: config.node.name.clone(),
        fast_path: config.proxy.same_node == SameNode::Fast,
        pods: admin.pods.borrow().clone(),
        certificates,
        failures: admin.shared.failures.newest(),
        flows: admin.tracer.as_ref().map_or_else(Vec::new, |t| t.last(FLOWS, &Filter::default()).0),
        illegal_ports: OWN_PORTS.to_vec(),
        xds: xds(admin),
        now: SystemTime::now(),
    }
}
