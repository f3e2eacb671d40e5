//! What nodes say they have captured, and what they are told of their own pods (`undermesh.node.v1.NodeService`).
//!
//! A node's last report outlives its connection and this process (a file in the state directory): a restart
//! must not announce the whole mesh as plain text for the moment until every node has reported again.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use mesh_core::xds::proto::node::node_service_server::NodeService;
use mesh_core::xds::proto::node::{
    EnrolledPod, EnrolmentAck, EnrolmentReport, FlowDemand, FlowReport, NodeAnswer, NodeQuestion,
};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::{info, warn};

use crate::auth::{Access, Caller};
use crate::convert::{Assignments, Captured};
use crate::files;
use crate::hub::Hub;
use crate::metrics::Metrics;
use crate::relay::questions::{self, Agents};
use crate::relay::{Relay, intake};

/// The last report of one node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Workload uids under capture.
    pub captured: BTreeSet<String>,
    /// Workload uids that are not, and why.
    pub problems: BTreeMap<String, String>,
    /// When it came, microseconds since 1970; the later one of a node holds, whichever replica it came to.
    #[serde(default)]
    pub at_us: u64,
}

impl Report {
    /// From the wire.
    #[must_use]
    pub fn of(pods: Vec<EnrolledPod>) -> Self {
        let mut report = Self::default();
        for pod in pods {
            if pod.problem.is_empty() {
                report.captured.insert(pod.workload_uid);
            } else {
                report.problems.insert(pod.workload_uid, pod.problem);
            }
        }
        report
    }

    /// As it goes over the wire.
    #[must_use]
    pub fn pods(&self) -> Vec<EnrolledPod> {
        let captured = self.captured.iter().map(|uid| (uid.clone(), String::new()));
        let problems = self.problems.iter().map(|(uid, problem)| (uid.clone(), problem.clone()));
        let pod = |(workload_uid, problem)| EnrolledPod { workload_uid, problem };
        captured.chain(problems).map(pod).collect()
    }

    fn says_the_same_as(&self, other: &Self) -> bool {
        (&self.captured, &self.problems) == (&other.captured, &other.problems)
    }
}

/// The last report of every node.
#[derive(Debug)]
pub struct Enrolments {
    reports: Mutex<BTreeMap<String, Report>>,
    /// Streams of each node that are open; a node's agent may have two while it is replaced.
    streams: Mutex<BTreeMap<String, usize>>,
    changes: watch::Sender<u64>,
    file: Option<PathBuf>,
}

impl Enrolments {
    /// Starts from the file that an earlier process wrote, when there is one.
    #[must_use]
    pub fn open(file: Option<PathBuf>) -> Self {
        let mut reports = BTreeMap::new();
        if let Some(path) = &file {
            match std::fs::read(path) {
                Ok(bytes) => match serde_json::from_slice(&bytes) {
                    Ok(read) => reports = read,
                    Err(cause) => {
                        warn!(path = %path.display(), %cause, "enrolment reports cannot be read; nodes report again")
                    }
                },
                Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => {}
                Err(cause) => {
                    warn!(path = %path.display(), %cause, "enrolment reports cannot be read; nodes report again")
                }
            }
        }
        let streams = Mutex::default();
        Self { reports: Mutex::new(reports), streams, changes: watch::Sender::new(0), file }
    }

    /// Captured uids of the nodes whose agents are connected here, as these say.
    pub fn connected(&self) -> Captured {
        let streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.captured().into_iter().filter(|(node, _)| streams.contains_key(node)).collect()
    }

    fn opened(&self, node: &str) {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        *streams.entry(node.to_owned()).or_default() += 1;
    }

    fn closed(&self, node: &str) {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = streams.get_mut(node) {
            *open -= 1;
            if *open == 0 {
                streams.remove(node);
            }
        }
    }

    /// Wakes when a report changed what is captured.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Captured uids by node.
    pub fn captured(&self) -> Captured {
        let reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        reports.iter().map(|(node, report)| (node.clone(), report.captured.clone())).collect()
    }

    /// All reports.
    pub fn reports(&self) -> BTreeMap<String, Report> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces a node's report.
    pub fn report(&self, report: EnrolmentReport) {
        self.put(report.node, Report::of(report.pods));
    }

    /// Takes what a node has told another replica, unless a later report is known; says whether it was taken.
    pub fn learn(&self, node: String, report: Report) -> bool {
        let at_us = report.at_us;
        at_us > 0 && self.put(node, report)
    }

    /// A report without a time comes from the node itself, now.
    fn put(&self, node: String, mut report: Report) -> bool {
        let written = {
            let mut reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
            let known = reports.get(&node);
            let last = known.map_or(0, |known| known.at_us);
            if report.at_us == 0 {
                // Clocks of replicas need not agree: what the node itself says is the latest.
                report.at_us = micros(SystemTime::now()).max(last + 1);
            } else if report.at_us <= last {
                return false;
            }
            let same = known.is_some_and(|known| known.says_the_same_as(&report));
            if !same {
                for (uid, problem) in &report.problems {
                    warn!(node, uid, problem, "a pod could not be enrolled");
                }
                info!(node, captured = report.captured.len(), "enrolment report");
            }
            reports.insert(node, report);
            if same {
                return true;
            }
            // Written under the lock, so that an older state never overwrites a newer one.
            self.file.as_ref().map(|path| (path, files::write_json(path, &*reports)))
        };
        if let Some((path, Err(cause))) = written {
            warn!(path = %path.display(), %cause, "enrolment reports cannot be kept over a restart");
        }
        self.changes.send_modify(|n| *n += 1);
        true
    }
}

fn micros(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// The service.
#[derive(Debug, Clone)]
pub struct NodeServer {
    hub: Arc<Hub>,
    enrolments: Arc<Enrolments>,
    relay: Arc<Relay>,
    agents: Arc<Agents>,
    access: Access,
    metrics: Arc<Metrics>,
}

impl NodeServer {
    /// A server that fills `enrolments`, `relay` and `agents`, and tells what `hub` has.
    #[must_use]
    pub fn new(
        hub: Arc<Hub>,
        enrolments: Arc<Enrolments>,
        relay: Arc<Relay>,
        agents: Arc<Agents>,
        access: Access,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { hub, enrolments, relay, agents, access, metrics }
    }

    /// The node's agent that sent a request, as its token says.
    async fn agent<T>(&self, request: &Request<T>) -> Result<Option<Caller>, Status> {
        let caller = self.access.caller(request.metadata()).await.inspect_err(|_| {
            self.metrics.authentication_failure();
        })?;
        if let Some(caller) = caller.as_ref().filter(|caller| !caller.agent) {
            let (namespace, account) = (&caller.namespace, &caller.service_account);
            warn!(namespace, account, "reports as a node's agent and is none");
            return Err(Status::permission_denied("only a node's agent reports"));
        }
        Ok(caller)
    }
}

/// One node's stream.
struct Node {
    /// Its name, once it is known.
    name: Option<String>,
    /// Whether its token says the name.
    proved: bool,
    assignments: watch::Receiver<Arc<Assignments>>,
    /// The name that it has reported under.
    reported: Option<String>,
    /// What it was told last.
    told: Option<EnrolmentAck>,
    out: mpsc::Sender<Result<EnrolmentAck, Status>>,
}

impl Node {
    /// Takes its reports and tells it of its pods, until it goes or says what it must not.
    async fn serve(mut self, inbound: Streaming<EnrolmentReport>, enrolments: Arc<Enrolments>) {
        self.exchange(inbound, &enrolments).await;
        if let Some(node) = self.reported {
            enrolments.closed(&node);
        }
    }

    async fn exchange(&mut self, mut inbound: Streaming<EnrolmentReport>, enrolments: &Enrolments) {
        loop {
            if !self.tell().await {
                return;
            }
            tokio::select! {
                report = inbound.message() => {
                    let Ok(Some(report)) = report else { return };
                    let answer = self.take(report, enrolments);
                    let last = answer.is_err();
                    if self.out.send(answer).await.is_err() || last {
                        return;
                    }
                }
                changed = self.assignments.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Tells it of its pods, if that is something new. False once it is gone.
    async fn tell(&mut self) -> bool {
        let Some(name) = &self.name else { return true };
        let now = self.assignments.borrow_and_update().of(name);
        let Some(now) = now.filter(|now| self.told.as_ref() != Some(now)) else { return true };
        self.told = Some(now.clone());
        self.out.send(Ok(now)).await.is_ok()
    }

    fn take(&mut self, report: EnrolmentReport, enrolments: &Enrolments) -> Result<EnrolmentAck, Status> {
        match &self.name {
            Some(name) if self.proved && *name != report.node => {
                warn!(node = name, claimed = report.node, "a node reports for another");
                return Err(Status::permission_denied("a node reports for itself only"));
            }
            _ if report.node.is_empty() => {
                return Err(Status::invalid_argument("node: missing; write the node's name"));
            }
            _ => {}
        }
        self.name = Some(report.node.clone());
        let node = report.node.clone();
        enrolments.report(report);
        // What an earlier process wrote down counts as said here only once it was said again.
        if self.reported.is_none() {
            enrolments.opened(&node);
            self.reported = Some(node);
        }
        Ok(EnrolmentAck::default())
    }
}

#[tonic::async_trait]
impl NodeService for NodeServer {
    type ReportEnrolmentStream = ReceiverStream<Result<EnrolmentAck, Status>>;

    async fn report_enrolment(
        &self,
        request: Request<Streaming<EnrolmentReport>>,
    ) -> Result<Response<Self::ReportEnrolmentStream>, Status> {
        let caller = self.agent(&request).await?;
        let (out, stream) = mpsc::channel(1);
        let node = Node {
            proved: caller.is_some(),
            name: caller.map(|caller| caller.node),
            assignments: self.hub.assignments(),
            reported: None,
            told: None,
            out,
        };
        tokio::spawn(node.serve(request.into_inner(), self.enrolments.clone()));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    type ReportFlowsStream = ReceiverStream<Result<FlowDemand, Status>>;

    async fn report_flows(
        &self,
        request: Request<Streaming<FlowReport>>,
    ) -> Result<Response<Self::ReportFlowsStream>, Status> {
        // The service is offered with tokens only.
        let caller = self.agent(&request).await?.ok_or_else(|| Status::unauthenticated("who sends this?"))?;
        let (out, stream) = mpsc::channel(1);
        tokio::spawn(intake::follow(self.relay.clone(), caller.node, request.into_inner(), out));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    type AnswerQuestionsStream = ReceiverStream<Result<NodeQuestion, Status>>;

    async fn answer_questions(
        &self,
        request: Request<Streaming<NodeAnswer>>,
    ) -> Result<Response<Self::AnswerQuestionsStream>, Status> {
        let caller = self.agent(&request).await?.ok_or_else(|| Status::unauthenticated("who answers?"))?;
        let (out, stream) = mpsc::channel(1);
        tokio::spawn(questions::follow(self.agents.clone(), caller.node, request.into_inner(), out));
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}
