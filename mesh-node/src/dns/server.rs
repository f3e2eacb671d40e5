//! The thread that serves all pods, and the handle to it.

#[cfg(test)]
mod tests;

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use mesh_core::state::{LocalWorkload, MeshState};
use tokio::sync::mpsc;
use tokio::task::LocalSet;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::answer::Rules;
use super::metrics::Metrics;
use super::pod::{Node, PodNetwork, Served};
use super::{tcp, udp};

/// How long the thread waits for queries that are being answered when the agent ends.
const FAREWELL: Duration = Duration::from_secs(5);

/// Gives the newest snapshot of the mesh; called for every query.
pub type Snapshots = Arc<dyn Fn() -> Arc<MeshState> + Send + Sync>;

/// What an operator and the node's environment decide.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How names are understood.
    pub rules: Rules,
    /// Whom to ask when capture does not know whom the application asked ([`super::resolv::nameservers`]).
    pub fallback: Vec<SocketAddr>,
    /// What a pod, and all of them, may use.
    pub limits: Limits,
}

/// Bounds on what clients can make the agent hold. Beyond them a query is answered with SERVFAIL and a connection
/// reset; datagrams beyond the socket's queue are lost in the kernel.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Queries of one pod that wait for another server. A few hundred bytes each.
    pub waiting_per_pod: usize,
    /// Sockets to other servers of one pod; queries beyond them wait their turn.
    pub sockets_per_pod: usize,
    /// The same of all pods together: descriptors are the node's scarcest good.
    pub sockets: usize,
    /// Connections of one pod.
    pub connections_per_pod: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { waiting_per_pod: 512, sockets_per_pod: 64, sockets: 512, connections_per_pod: 64 }
    }
}

/// A pod to serve.
pub struct Pod {
    /// Who it is.
    pub local: LocalWorkload,
    /// Its search list; that of a Kubernetes pod is [`super::names::ClusterDomain::default_search`].
    pub search: Vec<String>,
    /// Receives its queries; non-blocking.
    pub udp: UdpSocket,
    /// Accepts its connections; non-blocking.
    pub tcp: TcpListener,
    /// Its network namespace.
    pub network: Arc<dyn PodNetwork>,
}

/// Serves a pod as long as it lives. When dropped, what is queued is still answered, then the sockets close.
pub struct PodHandle {
    network: Arc<dyn PodNetwork>,
    _stop: DropGuard,
}

impl PodHandle {
    /// See [`PodNetwork::make_room`].
    pub fn make_room(&self, taken: &[u16]) {
        self.network.make_room(taken);
    }
}

/// A pod on its way to the thread, with its sockets registered.
struct Arrival {
    local: LocalWorkload,
    search: Vec<String>,
    network: Arc<dyn PodNetwork>,
    udp: tokio::net::UdpSocket,
    tcp: tokio::net::TcpListener,
    stop: CancellationToken,
}

/// The DNS proxy. When dropped, the thread stops after the queries that it is answering.
#[derive(Debug)]
pub struct Server {
    arrivals: mpsc::UnboundedSender<Arrival>,
    runtime: tokio::runtime::Handle,
    rules: Rules,
}

impl Server {
    /// Starts the thread.
    ///
    /// # Errors
    /// Out of threads or descriptors.
    pub fn start(settings: Settings, state: Snapshots, metrics: Metrics) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (handle, rules) = (runtime.handle().clone(), settings.rules.clone());
        // As many entries as pods arrive: no need for a bound of its own.
        let (arrivals, queue) = mpsc::unbounded_channel();
        std::thread::Builder::new()
            .name("dns".to_owned())
            .spawn(move || run(&runtime, settings, state, metrics, queue))?;
        Ok(Self { arrivals, runtime: handle, rules })
    }

    /// How names are understood.
    #[must_use]
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// Serves a pod until the handle is dropped.
    ///
    /// # Errors
    /// A socket cannot be polled (it is no socket, or the limit of watches is reached), or the thread has ended.
    pub fn serve(&self, pod: Pod) -> io::Result<PodHandle> {
        let Pod { local, search, udp, tcp, network } = pod;
        let _context = self.runtime.enter();
        let udp = tokio::net::UdpSocket::from_std(udp)?;
        let tcp = tokio::net::TcpListener::from_std(tcp)?;
        let stop = CancellationToken::new();
        let handle = PodHandle { network: Arc::clone(&network), _stop: stop.clone().drop_guard() };
        self.arrivals
            .send(Arrival { local, search, network, udp, tcp, stop })
            .map_err(|_gone| io::Error::new(io::ErrorKind::BrokenPipe, "the DNS thread has ended"))?;
        Ok(handle)
    }
}

/// The thread's life.
fn run(
    runtime: &tokio::runtime::Runtime,
    settings: Settings,
    state: Snapshots,
    metrics: Metrics,
    mut queue: mpsc::UnboundedReceiver<Arrival>,
) {
    let node = Node::new(settings, state, metrics);
    runtime.block_on(LocalSet::new().run_until(async move {
        while let Some(Arrival { local, search, network, udp, tcp, stop }) = queue.recv().await {
            let served = Served::new(node.clone(), local, search, network, stop);
            node.tasks.spawn_local(udp::serve(served.clone(), udp));
            node.tasks.spawn_local(tcp::serve(served, tcp));
        }
        node.tasks.close();
        if tokio::time::timeout(FAREWELL, node.tasks.wait()).await.is_err() {
            tracing::debug!(target: "dns", "queries were left unanswered at the end");
        }
    }));
}
