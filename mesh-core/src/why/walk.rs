//! The walk itself: stage by stage, as far as the connection gets.

use std::net::SocketAddr;
use std::sync::Arc;

use super::enrolment::{Enrolment, enrolment};
use super::name::{self, NameError, Question, Target};
use super::types::{Explanation, Facts, Object, Outcome, Path, Stage, Step, Verdict};
use super::way::{self, Way};
use super::{credentials, history, judge, traffic};
use crate::state::{MeshState, Workload};

/// Explains what would happen to a connection now, and what happened to the last one that failed.
///
/// # Errors
/// An end names nothing, or the destination leaves the port open; the error says what would be right.
pub fn explain(state: &MeshState, question: &Question, facts: &Facts) -> Result<Explanation, NameError> {
    let source = name::source(state, &question.src)?;
    let target = name::destination(state, &question.dst, &source)?;
    let port = way::port(&target, question)?;
    let walk = Walk { state, facts, source, target, port };
    Ok(walk.explain(question))
}

/// What every stage looks at.
pub(super) struct Walk<'a> {
    pub(super) state: &'a MeshState,
    pub(super) facts: &'a Facts,
    pub(super) source: Arc<Workload>,
    pub(super) target: Target,
    pub(super) port: Option<u16>,
}

/// A workload that the connection may arrive at, with the port on it.
#[derive(Debug, Clone)]
pub(super) struct End {
    pub(super) workload: Arc<Workload>,
    pub(super) address: Option<SocketAddr>,
}

impl Walk<'_> {
    fn explain(&self, question: &Question) -> Explanation {
        let mut steps = Vec::new();
        steps.extend(self.view());
        steps.push(self.who());
        let (source_enrolment, step) = enrolment(&self.source, self.facts, Stage::SourceEnrolment);
        steps.push(self.whom());
        steps.push(step);

        let way = way::way(self, source_enrolment);
        steps.push(way.step.clone());
        if way.step.outcome != Outcome::Blocked {
            steps.extend(self.ends(&way, source_enrolment));
        }
        steps.push(history::last_failure(self, &way));
        steps.extend(traffic::traffic(self, &way));
        steps.sort_by_key(|step| step.stage);

        let ends = self.local_ends(&way);
        let mut explanation = Explanation {
            node: self.facts.node.clone(),
            source: workload_object(&self.source),
            destination: self.destination_object(question),
            port: self.port,
            verdict: Verdict::Allowed,
            path: way.path,
            summary: String::new(),
            decided_by: None,
            fix: None,
            steps,
            source_is_local: self.is_local(&self.source),
            destination_is_local: ends,
        };
        explanation.conclude();
        explanation
    }

    /// Everything behind routing: the far ends, certificates, policy.
    fn ends(&self, way: &Way, source: Enrolment) -> Vec<Step> {
        let mut steps = Vec::new();
        let ends: Vec<(&End, Enrolment, Step)> = way
            .ends
            .iter()
            .map(|end| {
                let (state, step) = enrolment(&end.workload, self.facts, Stage::DestinationEnrolment);
                (end, state, step)
            })
            .collect();
        if let Some(step) = way::destination_enrolment(way, &ends) {
            steps.push(step);
        }
        if matches!(way.path, Some(Path::Fast | Path::Tunnel | Path::Waypoint | Path::Gateway)) {
            steps.push(credentials::source(self));
            let served_by: Vec<&Arc<Workload>> = way
                .hops
                .first()
                .map_or_else(|| way.ends.iter().map(|e| &e.workload).collect(), |hop| vec![hop]);
            steps.extend(credentials::destination(self, &served_by));
        }
        steps.extend(judge::policies(self, way, source, &ends));
        steps
    }

    /// Only said when it is bad: everything below rests on what the node knows.
    fn view(&self) -> Option<Step> {
        let xds = &self.facts.xds;
        (!xds.connected).then(|| {
            let problem = xds.problem.as_deref().unwrap_or("no connection");
            Step::warn(
                Stage::View,
                None,
                format!("node {} works with what it knew last: {problem}", self.facts.node),
                format!("check that the control plane runs and {} is reachable from the node", xds.address),
            )
        })
    }

    fn who(&self) -> Step {
        let w = &self.source;
        let addresses = join(w.addresses.iter());
        let detail = format!("identity {}, address {addresses}, node {}", w.identity, or_dash(&w.node));
        Step::ok(Stage::Source, Some(workload_object(w)), detail)
    }

    fn whom(&self) -> Step {
        match &self.target {
            Target::Workload(w) => {
                let addresses = join(w.addresses.iter());
                let detail =
                    format!("identity {}, address {addresses}, node {}", w.identity, or_dash(&w.node));
                Step::ok(Stage::Destination, Some(workload_object(w)), detail)
            }
            Target::Service(s) => {
                let service = &s.service;
                let vips = join(service.vips.iter().map(|vip| vip.ip));
                let address = if service.vips.is_empty() { "no virtual address".to_owned() } else { vips };
                let all = s.all_endpoints().count();
                let ready = s.endpoints().count();
                let detail = format!(
                    "{}, {address}, {ready} of {all} endpoints take traffic",
                    service.host.hostname()
                );
                Step::ok(Stage::Destination, Some(service_object(s)), detail)
            }
            Target::Address(ip) => {
                let object = Object::new("Address", "", &ip.to_string());
                let hidden =
                    self.state.hidden_service_by_ip(&self.source.network, *ip, &self.source.namespace);
                match hidden {
                    Some(service) => Step::warn(
                        Stage::Destination,
                        Some(object),
                        format!(
                            "belongs to a service that only its own namespace sees: {}",
                            service.service.host
                        ),
                        "widen the service's visibility (exportTo), or connect from its namespace".to_owned(),
                    ),
                    None => Step::ok(
                        Stage::Destination,
                        Some(object),
                        "the mesh knows nothing of this address".into(),
                    ),
                }
            }
        }
    }

    fn destination_object(&self, question: &Question) -> Object {
        match &self.target {
            Target::Workload(w) => workload_object(w),
            Target::Service(s) => service_object(s),
            Target::Address(_) => Object::new("Address", "", &question.dst),
        }
    }

    /// Whether a workload is a pod of the answering node.
    pub(super) fn is_local(&self, workload: &Workload) -> bool {
        !self.facts.node.is_empty() && *workload.node == *self.facts.node
    }

    fn local_ends(&self, way: &Way) -> bool {
        if !way.ends.is_empty() {
            return way.ends.iter().any(|end| self.is_local(&end.workload));
        }
        match &self.target {
            Target::Workload(w) => self.is_local(w),
            Target::Service(s) => s.all_endpoints().any(|e| self.is_local(&e.workload)),
            Target::Address(_) => false,
        }
    }
}

impl Step {
    pub(super) fn ok(stage: Stage, object: Option<Object>, detail: String) -> Self {
        Self { stage, outcome: Outcome::Ok, object, detail, fix: None }
    }

    pub(super) fn warn(stage: Stage, object: Option<Object>, detail: String, fix: String) -> Self {
        Self { stage, outcome: Outcome::Warn, object, detail, fix: Some(fix) }
    }

    pub(super) fn blocked(stage: Stage, object: Option<Object>, detail: String, fix: String) -> Self {
        Self { stage, outcome: Outcome::Blocked, object, detail, fix: Some(fix) }
    }

    pub(super) fn elsewhere(stage: Stage, object: Option<Object>, detail: String) -> Self {
        Self { stage, outcome: Outcome::Elsewhere, object, detail, fix: None }
    }
}

pub(super) fn workload_object(workload: &Workload) -> Object {
    Object::new("Workload", &workload.namespace, &workload.name)
}

pub(super) fn service_object(service: &crate::state::ServiceEndpoints) -> Object {
    Object::new("Service", service.service.host.namespace(), &service.service.name)
}

pub(super) fn join(items: impl Iterator<Item = impl ToString>) -> String {
    let all: Vec<String> = items.map(|item| item.to_string()).collect();
    or_dash(&all.join(", ")).to_owned()
}

pub(super) fn or_dash(text: &str) -> &str {
    if text.is_empty() { "-" } else { text }
}
