//! What nodes say they have captured (`undermesh.node.v1.NodeService`).
//!
//! A node's last report outlives its connection and this process (a file in the state directory): a restart
//! must not announce the whole mesh as plain text for the moment until every node has reported again.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use mesh_core::xds::proto::node::node_service_server::NodeService;
use mesh_core::xds::proto::node::{EnrolmentAck, EnrolmentReport};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::{info, warn};

use crate::auth::Access;
use crate::convert::Captured;
use crate::files;
use crate::metrics::Metrics;

/// The last report of one node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Workload uids under capture.
    pub captured: BTreeSet<String>,
    /// Workload uids that are not, and why.
    pub problems: BTreeMap<String, String>,
}

/// The last report of every node.
#[derive(Debug)]
pub struct Enrolments {
    reports: Mutex<BTreeMap<String, Report>>,
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
        Self { reports: Mutex::new(reports), changes: watch::Sender::new(0), file }
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
        let mut new = Report::default();
        for pod in report.pods {
            if pod.problem.is_empty() {
                new.captured.insert(pod.workload_uid);
            } else {
                new.problems.insert(pod.workload_uid, pod.problem);
            }
        }
        let written = {
            let mut reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
            if reports.get(&report.node) == Some(&new) {
                return;
            }
            for (uid, problem) in &new.problems {
                warn!(node = report.node, uid, problem, "a pod could not be enrolled");
            }
            info!(node = report.node, captured = new.captured.len(), "enrolment report");
            reports.insert(report.node, new);
            // Written under the lock, so that an older state never overwrites a newer one.
            self.file.as_ref().map(|path| (path, files::write_json(path, &*reports)))
        };
        if let Some((path, Err(cause))) = written {
            warn!(path = %path.display(), %cause, "enrolment reports cannot be kept over a restart");
        }
        self.changes.send_modify(|n| *n += 1);
    }
}

/// The service.
#[derive(Debug, Clone)]
pub struct NodeServer {
    enrolments: Arc<Enrolments>,
    access: Access,
    metrics: Arc<Metrics>,
}

impl NodeServer {
    /// A server that fills `enrolments`.
    #[must_use]
    pub fn new(enrolments: Arc<Enrolments>, access: Access, metrics: Arc<Metrics>) -> Self {
        Self { enrolments, access, metrics }
    }
}

#[tonic::async_trait]
impl NodeService for NodeServer {
    type ReportEnrolmentStream = ReceiverStream<Result<EnrolmentAck, Status>>;

    async fn report_enrolment(
        &self,
        request: Request<Streaming<EnrolmentReport>>,
    ) -> Result<Response<Self::ReportEnrolmentStream>, Status> {
        let caller = self.access.caller(request.metadata()).inspect_err(|_| {
            self.metrics.authentication_failure();
        })?;
        let mut inbound = request.into_inner();
        let (out, stream) = mpsc::channel(1);
        let enrolments = self.enrolments.clone();
        tokio::spawn(async move {
            while let Ok(Some(report)) = inbound.message().await {
                let refusal = match &caller {
                    Some(caller) if caller.node != report.node => {
                        warn!(node = caller.node, claimed = report.node, "a node reports for another");
                        Some(Status::permission_denied("a node reports for itself only"))
                    }
                    _ if report.node.is_empty() => {
                        Some(Status::invalid_argument("node: missing; write the node's name"))
                    }
                    _ => None,
                };
                let answer = match refusal {
                    Some(status) => Err(status),
                    None => {
                        enrolments.report(report);
                        Ok(EnrolmentAck {})
                    }
                };
                let last = answer.is_err();
                if out.send(answer).await.is_err() || last {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}
