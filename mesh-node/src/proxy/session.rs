//! What is told about one connection: metrics while it lives, a log line and, if it failed, an entry among the
//! failures when it ends.

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use mesh_core::error::Code;
use mesh_core::flows::ConnectionId;
use mesh_core::hbone::copy::{self, Ended, Meter as _};
use mesh_core::hbone::{Baggage, BaggageHeader, Error as TunnelError, HboneStream};
use mesh_core::identity::SpiffeId;
use mesh_core::state::{Workload, WorkloadType};
use mesh_core::telemetry::{AccessRecord, Direction, Event, Opened, Recorder, Reporter};
use tokio::net::TcpStream;

use super::failed::Failed;
use super::failures::{Failure, now_ms};
use super::live::Registered;
use super::worker::PodProxy;

/// One connection from the moment it is attributed to its end.
pub(super) struct Session {
    proxy: Rc<PodProxy>,
    /// Taken when the connection has ended.
    recorder: Option<Rc<Recorder>>,
    trace: Trace,
}

/// What the list of failures says beside the failure.
struct Trace {
    direction: Direction,
    src: SocketAddr,
    identity: Option<SpiffeId>,
    dst: SocketAddr,
}

impl Session {
    /// Counts the connection as opened. `asked` is where the client wanted to go.
    pub(super) fn open(proxy: &Rc<PodProxy>, opened: Opened, asked: SocketAddr) -> Self {
        let trace = Trace {
            direction: direction(opened.connection.reporter),
            src: opened.source,
            identity: opened.connection.source_identity.clone(),
            dst: asked,
        };
        let mut handles = proxy.worker.handles.borrow_mut();
        let recorder = Some(Rc::new(proxy.shared().telemetry.open(&mut handles, opened)));
        Self { proxy: Rc::clone(proxy), recorder, trace }
    }

    /// Moves bytes between the local application's socket and a peer's until both are done or policy ends it.
    pub(super) async fn relay_sockets(
        &mut self,
        application: TcpStream,
        peer: TcpStream,
        registered: Option<&Registered>,
    ) {
        let denied = Cell::new(None);
        let Some(recorder) = &self.recorder else { return };
        let ended = copy::sockets(application, peer, &**recorder, policy(registered, &denied)).await;
        self.end(&ended, denied.take());
    }

    /// Moves bytes between the local application's socket and a tunnel until both are done or policy ends it.
    pub(super) async fn relay_tunnel(
        &mut self,
        application: TcpStream,
        tunnel: HboneStream,
        registered: Option<&Registered>,
    ) {
        let denied = Cell::new(None);
        let Some(recorder) = &self.recorder else { return };
        let cancel = policy(registered, &denied);
        let ended = copy::socket_and_tunnel(application, tunnel, Rc::clone(recorder), cancel).await;
        self.end(&ended, denied.take());
    }

    /// Counts bytes that went to the peer while the connection was made.
    pub(super) fn count_sent(&self, bytes: usize) {
        if let Some(recorder) = self.recorder.as_ref().filter(|_| bytes > 0) {
            recorder.forward(bytes as u64);
        }
    }

    /// The connection could not be made, or was refused.
    pub(super) fn fail(mut self, failed: &Failed) {
        self.finish(Some(failed));
    }

    fn end(&mut self, ended: &Ended, denied: Option<Failed>) {
        let failed = match (ended, denied) {
            // Whichever socket noticed it first.
            _ if self.proxy.pod.gone.is_cancelled() => Some(pod_gone()),
            (_, Some(failed)) => Some(failed),
            // A reset by either application is its own affair.
            (Ended::Finished | Ended::FirstReset(_) | Ended::SecondReset(_) | Ended::Cancelled, None)
            | (Ended::Tunnel(TunnelError::Reset(_)), None) => None,
            (Ended::Tunnel(error), None) => Some(Failed::new(error.code(), format!("h2 failed: {error}"))),
        };
        self.finish(failed.as_ref());
    }

    fn finish(&mut self, failed: Option<&Failed>) {
        let Some(recorder) = self.recorder.take() else { return };
        recorder.finish(failed.map(Failed::to_log));
        if let Some(failed) = failed {
            let Trace { direction, src, identity, dst } = &self.trace;
            remember(&self.proxy, *direction, Some(*src), identity.as_ref(), Some(*dst), failed);
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if self.recorder.is_some() && self.proxy.pod.gone.is_cancelled() {
            self.finish(Some(&pod_gone()));
        }
        // Otherwise the agent leaves, which the recorder says itself.
    }
}

fn pod_gone() -> Failed {
    Failed::new(Code::PodGone, "connection closed: the pod is gone")
}

fn direction(reporter: Reporter) -> Direction {
    match reporter {
        Reporter::Source => Direction::Outbound,
        Reporter::Destination | Reporter::Waypoint => Direction::Inbound,
    }
}

async fn policy(registered: Option<&Registered>, denied: &Cell<Option<Failed>>) {
    match registered {
        Some(registered) => denied.set(Some(registered.denied().await)),
        None => std::future::pending().await,
    }
}

/// Reports a connection that failed before it could be attributed: a log line, no metric.
pub(super) fn report_early(
    proxy: &PodProxy,
    direction: Direction,
    src: SocketAddr,
    dst: Option<SocketAddr>,
    failed: &Failed,
) {
    proxy.shared().telemetry.access_log.write(AccessRecord {
        event: Event::Failed,
        id: ConnectionId::default(),
        at: SystemTime::now(),
        direction,
        source: src,
        destination: dst.unwrap_or(src),
        hbone_target: None,
        connection: None,
        received: 0,
        sent: 0,
        duration: Duration::ZERO,
        failure: Some(failed.to_log()),
        fast_path: false,
        request: None,
    });
    remember(proxy, direction, Some(src), None, dst, failed);
}

fn remember(
    proxy: &PodProxy,
    direction: Direction,
    src: Option<SocketAddr>,
    identity: Option<&SpiffeId>,
    dst: Option<SocketAddr>,
    failed: &Failed,
) {
    proxy.shared().failures.push(Failure {
        at_ms: now_ms(),
        direction: direction.as_str().to_owned(),
        pod: proxy.pod.label.clone(),
        src: src.map(|a| a.to_string()),
        src_identity: identity.map(ToString::to_string),
        dst: dst.map(|a| a.to_string()),
        code: failed.code.code().to_owned(),
        flag: failed.code.flag().as_str().to_owned(),
        error: failed.text.to_string(),
        decided_by: failed.decided_by.as_ref().map(ToString::to_string),
    });
}

/// How a workload describes itself to peers.
pub(super) fn baggage(workload: &Workload) -> Option<BaggageHeader> {
    use mesh_core::hbone::baggage::WorkloadType as Kind;
    let kind = match workload.workload_type {
        WorkloadType::Deployment => Kind::Deployment,
        WorkloadType::CronJob => Kind::CronJob,
        WorkloadType::Pod => Kind::Pod,
        WorkloadType::Job => Kind::Job,
    };
    let baggage = Baggage {
        cluster: workload.cluster_id.to_string(),
        namespace: workload.namespace.to_string(),
        workload_type: kind,
        workload_name: workload.workload_name.to_string(),
        service_name: workload.canonical_name.to_string(),
        service_version: workload.canonical_revision.to_string(),
        region: workload.locality.region.to_string(),
        zone: workload.locality.zone.to_string(),
    };
    baggage.to_header()
}
