//! `istio_tcp_*`: families, cached handles, and one recorder per connection.
//!
//! `received` counts bytes from client to server and `sent` bytes from server to client, for both reporters; the
//! access log turns them to the reporting side's point of view.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use std::time::{Instant, SystemTime};

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::access_log::{AccessLog, AccessRecord, Direction, Event, Failure};
use super::labels::{Connection, ConnectionLabels, Peer, Reporter, SecurityPolicy};
use super::node::ReporterLabels;
use crate::flows::ConnectionId;
use crate::hbone::Authority;
use crate::hbone::copy::Meter;
use crate::identity::SpiffeId;
use crate::recent::Recent;

/// Handles that a worker keeps, of those that it used lately and of those before: making one costs a few hash lookups.
const CACHED_HANDLES: usize = 2048;
/// How long it keeps at least those that it does not use.
pub(super) const HANDLES_KEPT: Duration = Duration::from_secs(60);

/// The families of TCP metrics.
#[derive(Debug, Clone, Default)]
pub struct TcpMetrics(Arc<Families>);

#[derive(Debug, Default)]
struct Families {
    opened: Family<ConnectionLabels, Counter>,
    closed: Family<ConnectionLabels, Counter>,
    received: Family<ConnectionLabels, Counter>,
    sent: Family<ConnectionLabels, Counter>,
    failed: Family<ConnectionLabels, Counter>,
    sockets: Family<ReporterLabels, Gauge>,
}

impl TcpMetrics {
    /// Creates the families and registers them.
    #[must_use]
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let f = &metrics.0;
        let name = |what: &str| format!("istio_tcp_{what}");
        registry.register(name("connections_opened"), "Connections opened", f.opened.clone());
        registry.register(name("connections_closed"), "Connections closed", f.closed.clone());
        registry.register(name("received_bytes"), "Bytes from client to server", f.received.clone());
        registry.register(name("sent_bytes"), "Bytes from server to client", f.sent.clone());
        registry.register(
            name("connections_failed"),
            "Connections that failed; response_flags says why",
            f.failed.clone(),
        );
        registry.register(name("sockets_open"), "Connections that are being proxied", f.sockets.clone());
        metrics
    }

    /// The metrics of a connection: from the cache when this pair of peers was seen before.
    #[must_use]
    pub fn handle(&self, cache: &mut HandleCache, connection: &Connection) -> Arc<ConnectionMetrics> {
        let Some(key) = Key::new(connection) else { return Arc::new(self.build(connection)) };
        cache.handles.get_or_insert_with(key, || Arc::new(self.build(connection)))
    }

    fn build(&self, connection: &Connection) -> ConnectionMetrics {
        let labels = ConnectionLabels::new(connection);
        let f = &self.0;
        ConnectionMetrics {
            opened: f.opened.get_or_create_owned(&labels),
            closed: f.closed.get_or_create_owned(&labels),
            received: f.received.get_or_create_owned(&labels),
            sent: f.sent.get_or_create_owned(&labels),
            sockets: f.sockets.get_or_create_owned(&ReporterLabels(connection.reporter)),
            labels,
            families: f.clone(),
            connection: connection.clone(),
        }
    }
}

/// Handles by pair of peers, of one worker. Entries keep the workloads and services that they are found by alive, so
/// that an address in memory cannot come to mean another one.
#[derive(Debug)]
pub struct HandleCache {
    handles: Recent<Key, Arc<ConnectionMetrics>>,
}

impl Default for HandleCache {
    fn default() -> Self {
        Self { handles: Recent::new(CACHED_HANDLES, HANDLES_KEPT) }
    }
}

impl HandleCache {
    /// How many pairs of peers are kept.
    #[must_use]
    pub fn len(&self) -> usize {
        self.handles.len()
    }

    /// Whether no pair is kept.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.handles.is_empty()
    }
}

/// Workloads and services by address in memory; identities by value, since each handshake makes a new one.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    reporter: Reporter,
    source: usize,
    source_identity: Option<SpiffeId>,
    destination: usize,
    destination_identity: Option<SpiffeId>,
    service: usize,
    security: SecurityPolicy,
}

impl Key {
    /// None for peers that are only known by what they said: they come with every connection anew.
    pub(super) fn new(connection: &Connection) -> Option<Self> {
        let address = |peer: &Peer| match peer {
            Peer::Unknown => Some(0),
            Peer::Workload(workload) => Some(Arc::as_ptr(workload).addr()),
            Peer::Derived(_) => None,
        };
        Some(Self {
            reporter: connection.reporter,
            source: address(&connection.source)?,
            source_identity: connection.source_identity.clone(),
            destination: address(&connection.destination)?,
            destination_identity: connection.destination_identity.clone(),
            service: connection.service.as_ref().map_or(0, |service| Arc::as_ptr(service).addr()),
            security: connection.security,
        })
    }
}

/// The metrics of connections between one pair of peers.
#[derive(Debug)]
pub struct ConnectionMetrics {
    opened: Counter,
    closed: Counter,
    received: Counter,
    sent: Counter,
    sockets: Gauge,
    labels: ConnectionLabels,
    families: Arc<Families>,
    connection: Connection,
}

impl ConnectionMetrics {
    /// A connection was opened.
    pub fn opened(&self) {
        self.opened.inc();
        self.sockets.inc();
    }

    /// Bytes went from client to server.
    pub fn received(&self, bytes: u64) {
        self.received.inc_by(bytes);
    }

    /// Bytes went from server to client.
    pub fn sent(&self, bytes: u64) {
        self.sent.inc_by(bytes);
    }

    /// A connection ended; a failure counts under its flag.
    pub fn closed(&self, failure: Option<&Failure>) {
        self.sockets.dec();
        match failure {
            None => {
                self.closed.inc();
            }
            Some(failure) => {
                let labels = self.labels.with_flag(failure.flag);
                self.families.closed.get_or_create_owned(&labels).inc();
                self.families.failed.get_or_create_owned(&labels).inc();
            }
        }
    }

    /// What the handle was made for.
    #[must_use]
    pub fn connection(&self) -> &Connection {
        &self.connection
    }
}

/// Where connections are recorded: metrics and access log.
#[derive(Debug, Clone)]
pub struct Telemetry {
    /// The families.
    pub tcp: TcpMetrics,
    /// The log.
    pub access_log: AccessLog,
}

/// A connection at the moment from which it is recorded.
#[derive(Debug, Clone)]
pub struct Opened {
    /// The connection, as flow events name it; zero where nobody named it.
    pub id: ConnectionId,
    /// Who talks to whom.
    pub connection: Connection,
    /// When it was accepted.
    pub started: Instant,
    /// Address of the client.
    pub source: SocketAddr,
    /// What was dialled (outbound), or the address that was connected to (inbound).
    pub destination: SocketAddr,
    /// Target of the tunnel, where there is one.
    pub hbone_target: Option<Authority>,
    /// Whether the kernel carries the bytes.
    pub fast_path: bool,
}

impl Telemetry {
    /// Starts to record a connection: once its outcome is known, that is, established, denied or failed.
    #[must_use]
    pub fn open(&self, cache: &mut HandleCache, opened: Opened) -> Recorder {
        let metrics = self.tcp.handle(cache, &opened.connection);
        metrics.opened();
        let Opened { connection: _, id, started, source, destination, hbone_target, fast_path } = opened;
        let recorder = Recorder {
            metrics,
            log: self.access_log.clone(),
            received: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            opened: RefCell::new(Some(Facts { id, started, source, destination, hbone_target, fast_path })),
        };
        if let Some(opened) = &*recorder.opened.borrow()
            && AccessLog::logs_opened()
        {
            recorder.log.write(recorder.record(opened, Event::Opened, None));
        }
        recorder
    }
}

/// Records one connection. As a [`Meter`], the first endpoint is the reporting side's own application: the client
/// of a source reporter or a waypoint, the server of a destination reporter.
///
/// Dropped without [`Self::finish`], the connection was cut by a drain: it is logged as an error and counted as closed,
/// not as failed.
#[derive(Debug)]
pub struct Recorder {
    metrics: Arc<ConnectionMetrics>,
    log: AccessLog,
    received: AtomicU64,
    sent: AtomicU64,
    /// Taken when the connection has ended.
    opened: RefCell<Option<Facts>>,
}

/// What is the connection's own of [`Opened`]; who talks to whom is in its metrics.
#[derive(Debug)]
struct Facts {
    id: ConnectionId,
    started: Instant,
    source: SocketAddr,
    destination: SocketAddr,
    hbone_target: Option<Authority>,
    fast_path: bool,
}

impl Recorder {
    /// The connection ended, well or not. Only the first word counts.
    pub fn finish(&self, failure: Option<Failure>) {
        if let Some(opened) = self.opened.take() {
            self.metrics.closed(failure.as_ref());
            self.log.write(self.record(&opened, Event::Complete, failure));
        }
    }

    /// Bytes from client to server so far.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Bytes from server to client so far.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Adds bytes from client to server.
    pub fn add_received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
        self.metrics.received(bytes);
    }

    /// Adds bytes from server to client.
    pub fn add_sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
        self.metrics.sent(bytes);
    }

    fn record(&self, opened: &Facts, event: Event, failure: Option<Failure>) -> AccessRecord {
        let connection = self.metrics.connection();
        let direction = match connection.reporter {
            Reporter::Source => Direction::Outbound,
            Reporter::Destination | Reporter::Waypoint => Direction::Inbound,
        };
        AccessRecord {
            event,
            id: opened.id,
            at: SystemTime::now(),
            direction,
            source: opened.source,
            destination: opened.destination,
            hbone_target: opened.hbone_target.clone(),
            connection: Some(connection.clone()),
            received: self.received(),
            sent: self.sent(),
            duration: opened.started.elapsed(),
            failure,
            fast_path: opened.fast_path,
            request: None,
        }
    }
}

impl Meter for Recorder {
    fn forward(&self, bytes: u64) {
        match self.metrics.connection.reporter {
            Reporter::Source | Reporter::Waypoint => self.add_received(bytes),
            Reporter::Destination => self.add_sent(bytes),
        }
    }

    fn backward(&self, bytes: u64) {
        match self.metrics.connection.reporter {
            Reporter::Source | Reporter::Waypoint => self.add_sent(bytes),
            Reporter::Destination => self.add_received(bytes),
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        if let Some(opened) = self.opened.take() {
            self.metrics.closed(None);
            self.log.write(self.record(&opened, Event::Complete, Some(Failure::drained())));
        }
    }
}
