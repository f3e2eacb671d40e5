//! One pod's queries: what is decided at once and what has to wait for another server, within the pod's limits.

use std::cell::RefCell;
use std::io;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::BorrowedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hickory_proto::op::ResponseCode;
use mesh_core::state::{LocalWorkload, Workload};
use mesh_core::telemetry::DnsLabels;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::answer::{Client, Outcome, answer, failure};
use super::message::{self, Query};
use super::metrics::{Metrics, SHED, labels};
use super::server::{Settings, Snapshots};
use super::upstream::{self, Question};
use super::{Transport, names};
use crate::sys::udp::Datagram;

/// How long a forwarded query may take before the client is told that it failed (Istio's value).
pub(super) const DEADLINE: Duration = Duration::from_secs(5);

/// Sockets inside a pod's network namespace, and what capture knows about the pod's DNS traffic.
pub trait PodNetwork: Send + Sync {
    /// A non-blocking, unconnected UDP socket that can reach `server`.
    ///
    /// # Errors
    /// The namespace is gone, or out of descriptors.
    fn udp(&self, server: SocketAddr) -> io::Result<UdpSocket>;

    /// The same for TCP.
    ///
    /// # Errors
    /// As for [`PodNetwork::udp`].
    fn tcp(&self, server: SocketAddr) -> io::Result<TcpStream>;

    /// Receives one query on the pod's DNS socket.
    ///
    /// # Errors
    /// `WouldBlock` if there is none.
    fn receive(&self, socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Datagram>;

    /// Answers a query from the address and port that it was sent to ([`Datagram::local`]); must not block.
    ///
    /// # Errors
    /// The namespace is gone, out of descriptors, or the send queue is full.
    fn reply(&self, answer: &[u8], from: SocketAddr, to: SocketAddr) -> io::Result<()>;

    /// The server that the application wanted to ask, given where its query arrived and from where.
    fn asked(&self, transport: Transport, local: SocketAddr, peer: SocketAddr) -> Option<SocketAddr>;

    /// Told now and then which of the pod's ports stand for nameservers: frees some when few are left.
    fn make_room(&self, _taken: &[u16]) {}
}

/// What all pods share; lives on the DNS thread.
pub(super) struct Node {
    pub(super) settings: Settings,
    pub(super) state: Snapshots,
    pub(super) metrics: Metrics,
    /// Sockets to other servers that all pods together may hold.
    sockets: Semaphore,
    /// What arrives is read into this; never borrowed across an await.
    pub(super) scratch: RefCell<Vec<u8>>,
    random: RefCell<fastrand::Rng>,
    pub(super) tasks: TaskTracker,
}

impl Node {
    pub(super) fn new(settings: Settings, state: Snapshots, metrics: Metrics) -> Rc<Self> {
        Rc::new(Self {
            sockets: Semaphore::new(settings.limits.sockets),
            settings,
            state,
            metrics,
            scratch: RefCell::new(vec![0; usize::from(u16::MAX)]),
            random: RefCell::new(fastrand::Rng::new()),
            tasks: TaskTracker::new(),
        })
    }
}

/// A pod that is being served.
pub(super) struct Served {
    pub(super) node: Rc<Node>,
    pub(super) local: LocalWorkload,
    search: Vec<String>,
    pub(super) network: Arc<dyn PodNetwork>,
    pub(super) stop: CancellationToken,
    /// Queries that wait for another server.
    waiting: Arc<Semaphore>,
    /// Sockets to other servers.
    sockets: Semaphore,
    pub(super) connections: Arc<Semaphore>,
}

/// What becomes of something that arrived.
pub(super) enum Step {
    /// Nothing.
    Drop,
    /// This is sent.
    Reply(Vec<u8>),
    /// Another server is asked.
    Forward(Box<Pending>),
}

/// A query that waits for another server.
pub(super) struct Pending {
    pub(super) query: Query,
    pub(super) bytes: Vec<u8>,
    labels: DnsLabels,
    _permit: OwnedSemaphorePermit,
}

impl Pending {
    pub(super) fn question(&self) -> Question<'_> {
        Question { bytes: &self.bytes, question: &self.query.question }
    }
}

impl Served {
    pub(super) fn new(
        node: Rc<Node>,
        local: LocalWorkload,
        search: Vec<String>,
        network: Arc<dyn PodNetwork>,
        stop: CancellationToken,
    ) -> Rc<Self> {
        let limits = &node.settings.limits;
        Rc::new(Self {
            waiting: Arc::new(Semaphore::new(limits.waiting_per_pod)),
            sockets: Semaphore::new(limits.sockets_per_pod),
            connections: Arc::new(Semaphore::new(limits.connections_per_pod)),
            search: names::normal_search(&search),
            node,
            local,
            network,
            stop,
        })
    }

    /// Decides about what arrived; never waits.
    pub(super) fn step(&self, bytes: &[u8], transport: Transport) -> Step {
        let began = Instant::now();
        let query = match message::read(bytes) {
            Ok(query) => query,
            Err(refused) => {
                self.node.metrics.refused(refused.refusal.as_str());
                tracing::debug!(target: "dns", pod = %self.local, "refused: {}", refused.refusal.as_str());
                return refused.reply.map_or(Step::Drop, Step::Reply);
            }
        };
        let state = (self.node.state)();
        let workload = state.local_workload(&self.local).map(Arc::as_ref);
        let labels = labels(&query.message, transport, workload);
        self.node.metrics.request(&labels);
        let client = workload.map(|workload| Client { workload, search: &self.search });
        let mut random = self.node.random.borrow_mut();
        match answer(&query.message, client, &state, &self.node.settings.rules, &mut random) {
            Outcome::Reply(reply) => {
                log(&query, workload, "answered", reply.answers.len());
                let reply_code = reply.metadata.response_code.low();
                self.node.metrics.answered(&self.local, &query.message, reply_code, true, began.elapsed());
                Step::Reply(message::encode(&reply, limit(&query, transport)))
            }
            Outcome::Forward => {
                self.node.metrics.forwarded(&labels);
                let Ok(permit) = Arc::clone(&self.waiting).try_acquire_owned() else {
                    self.node.metrics.refused(SHED);
                    log(&query, workload, "refused: too many queries of this pod wait", 0);
                    return Step::Reply(failed(&query, transport));
                };
                log(&query, workload, "forwarded", 0);
                Step::Forward(Box::new(Pending { query, bytes: bytes.to_vec(), labels, _permit: permit }))
            }
        }
    }

    /// Asks the server that the application asked, or the agent's own ones if that is not known. The answer is
    /// passed on whatever it says; silence and failures become SERVFAIL.
    pub(super) async fn forward(
        &self,
        pending: &Pending,
        transport: Transport,
        asked: Option<SocketAddr>,
    ) -> Vec<u8> {
        let started = Instant::now();
        let reply = timeout(DEADLINE, self.ask(pending, transport, asked)).await;
        let failed_with = match &reply {
            Ok(Ok(_)) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some("no answer in time".to_owned()),
        };
        self.node.metrics.upstream(&pending.labels, started.elapsed(), failed_with.is_some());
        if let Some(error) = failed_with {
            tracing::debug!(target: "dns", pod = %self.local, server = ?asked, "forwarding failed: {error}");
        }
        let reply = match reply {
            Ok(Ok(reply)) => reply,
            Ok(Err(_)) | Err(_) => failed(&pending.query, transport),
        };
        // The low half of the header's fourth byte (RFC 1035 §4.1.1).
        let code = reply.get(3).map_or(0, |byte| byte & 0xf);
        self.node.metrics.answered(&self.local, &pending.query.message, code, false, started.elapsed());
        reply
    }

    async fn ask(
        &self,
        pending: &Pending,
        transport: Transport,
        asked: Option<SocketAddr>,
    ) -> io::Result<Vec<u8>> {
        // The pod's own limit first: a pod that waits for it holds nothing that others need.
        let _mine = self.sockets.acquire().await.map_err(io::Error::other)?;
        let _node = self.node.sockets.acquire().await.map_err(io::Error::other)?;
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the server that was asked is not known");
        for server in self.servers(asked) {
            let question = pending.question();
            let reply = match transport {
                Transport::Udp => {
                    let limit = limit(&pending.query, transport);
                    upstream::udp(&*self.network, server, question, limit, &self.node.scratch).await
                }
                Transport::Tcp => upstream::tcp(&*self.network, server, question).await,
            };
            match reply {
                Ok(reply) => return Ok(reply),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// The servers to ask, in order.
    pub(super) fn servers(&self, asked: Option<SocketAddr>) -> impl Iterator<Item = SocketAddr> + '_ {
        let fallback = if asked.is_none() { &self.node.settings.fallback[..] } else { &[] };
        asked.into_iter().chain(fallback.iter().copied())
    }
}

/// The largest answer that the client takes.
fn limit(query: &Query, transport: Transport) -> usize {
    match transport {
        Transport::Udp => query.udp_limit(),
        Transport::Tcp => usize::from(u16::MAX),
    }
}

fn failed(query: &Query, transport: Transport) -> Vec<u8> {
    message::encode(&failure(&query.message, ResponseCode::ServFail), limit(query, transport))
}

fn log(query: &Query, source: Option<&Workload>, result: &str, answers: usize) {
    let question = query.message.queries.first();
    let kind = question.map(hickory_proto::op::Query::query_type);
    let name = question.map(hickory_proto::op::Query::name);
    let (workload, namespace) = source.map_or(("unknown", "unknown"), |w| (&*w.name, &*w.namespace));
    tracing::debug!(
        target: "dns",
        query = ?kind,
        domain = ?name,
        src.workload = workload,
        src.namespace = namespace,
        answers,
        "{result}"
    );
}
