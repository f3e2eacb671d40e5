//! The access log: one line per connection, in the layout that Kiali parses, or as JSON.
//!
//! A record is a handful of reference counts. It goes through a bounded queue to a thread that formats and writes. When
//! the queue is full, records are dropped and counted, except those of denied connections: who was refused, and by
//! what, is never lost. The refused connection's own worker writes such a line then.

use std::fmt::Write as _;
use std::io::Write;
use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use prometheus_client::metrics::counter::Counter;
use serde_json::{Map, Value};

use super::labels::{Connection, Peer, SecurityPolicy};
use super::logging::LogFormat;
use crate::error::{Code, ResponseFlag};
use crate::hbone::Authority;

/// Records that wait for the writer.
const QUEUE: usize = 8192;

/// What a record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Established.
    Opened,
    /// Ended.
    Complete,
    /// Refused before it could be recorded.
    Failed,
}

/// The direction, seen from the reporting side's workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// It is the server.
    Inbound,
    /// It is the client.
    Outbound,
}

impl Direction {
    /// `inbound` or `outbound`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

/// Why a connection failed.
#[derive(Debug, Clone)]
pub struct Failure {
    /// The text of the `error` field.
    pub text: Arc<str>,
    /// The stable code.
    pub code: Option<Code>,
    /// The `response_flags` label.
    pub flag: ResponseFlag,
}

impl Failure {
    /// A failure with a stable code, from which its flag follows.
    #[must_use]
    pub fn new(code: Code, text: impl Into<Arc<str>>) -> Self {
        Self { text: text.into(), code: Some(code), flag: code.flag() }
    }

    /// The connection was cut when the agent went away.
    pub(super) fn drained() -> Self {
        Self::new(Code::Draining, "connection closed due to connection drain")
    }

    fn is_denial(&self) -> bool {
        self.flag.as_str() == ResponseFlag::Deny.as_str()
    }
}

/// One line of the access log.
#[derive(Debug, Clone)]
pub struct AccessRecord {
    /// What it says.
    pub event: Event,
    /// When.
    pub at: SystemTime,
    /// Seen from the reporting side's workload.
    pub direction: Direction,
    /// Address of the client.
    pub source: SocketAddr,
    /// What was dialled, or connected to.
    pub destination: SocketAddr,
    /// Target of the tunnel.
    pub hbone_target: Option<Authority>,
    /// Who talks to whom; none when it was refused before that was known.
    pub connection: Option<Connection>,
    /// Bytes from client to server.
    pub received: u64,
    /// Bytes from server to client.
    pub sent: u64,
    /// Since it was accepted.
    pub duration: Duration,
    /// Why it failed.
    pub failure: Option<Failure>,
    /// Whether the kernel carried the bytes.
    pub fast_path: bool,
}

impl AccessRecord {
    fn is_denial(&self) -> bool {
        self.failure.as_ref().is_some_and(Failure::is_denial)
    }

    fn level(&self) -> &'static str {
        match (self.event, &self.failure) {
            (Event::Opened, _) => "debug",
            (Event::Complete, None) => "info",
            (Event::Complete, Some(_)) => "error",
            (Event::Failed, _) => "warn",
        }
    }

    fn message(&self) -> &'static str {
        match self.event {
            Event::Opened => "connection opened",
            Event::Complete => "connection complete",
            Event::Failed => "connection failed",
        }
    }

    fn is_enabled(&self) -> bool {
        match self.level() {
            "debug" => AccessLog::logs_opened(),
            "info" => tracing::enabled!(target: "access", tracing::Level::INFO),
            "warn" => tracing::enabled!(target: "access", tracing::Level::WARN),
            _ => tracing::enabled!(target: "access", tracing::Level::ERROR),
        }
    }

    /// Appends the line, with its end.
    pub(super) fn format(&self, format: LogFormat, line: &mut String) {
        let time = humantime::format_rfc3339_micros(self.at);
        match format {
            LogFormat::Text => {
                // Writing to a String cannot fail.
                let _ = write!(line, "{time}\t{}\taccess\t{}\t", self.level(), self.message());
                let mut first = true;
                self.fields(|name, value| {
                    let space = if std::mem::take(&mut first) { "" } else { " " };
                    let _ = match value {
                        Field::Text(text) => write!(line, "{space}{name}={text:?}"),
                        Field::Bare(text) => write!(line, "{space}{name}={text}"),
                        Field::Number(number) => write!(line, "{space}{name}={number}"),
                    };
                });
            }
            LogFormat::Json => {
                let mut map = Map::new();
                map.insert("level".to_owned(), self.level().into());
                map.insert("time".to_owned(), time.to_string().into());
                map.insert("scope".to_owned(), "access".into());
                map.insert("message".to_owned(), self.message().into());
                self.fields(|name, value| {
                    let value: Value = match value {
                        Field::Text(text) | Field::Bare(text) => text.into(),
                        Field::Number(number) => number.into(),
                    };
                    map.insert(name.to_owned(), value);
                });
                let _ = write!(line, "{}", Value::Object(map));
            }
        }
        line.push('\n');
    }

    /// The fields in their order; absent values are left out.
    fn fields(&self, mut put: impl FnMut(&'static str, Field<'_>)) {
        let connection = self.connection.as_ref();
        let tls = connection.is_some_and(|c| c.security == SecurityPolicy::MutualTls);
        put("src.addr", Field::Bare(&self.source.to_string()));
        if let Some(c) = connection {
            let identity = c.source_identity.as_ref().filter(|_| tls).map(ToString::to_string);
            peer_fields(&c.source, ["src.workload", "src.namespace", "src.identity"], identity, &mut put);
        }
        put("dst.addr", Field::Bare(&self.destination.to_string()));
        if let Some(target) = &self.hbone_target {
            put("dst.hbone_addr", Field::Bare(&target.to_string()));
        }
        if let Some(c) = connection {
            if let Some(service) = &c.service {
                put("dst.service", Field::Text(service.host.hostname()));
            }
            let identity = c.destination_principal().filter(|_| tls).map(ToString::to_string);
            peer_fields(
                &c.destination,
                ["dst.workload", "dst.namespace", "dst.identity"],
                identity,
                &mut put,
            );
        }
        put("direction", Field::Text(self.direction.as_str()));
        if self.event == Event::Complete {
            let (sent, received) = match self.direction {
                Direction::Outbound => (self.received, self.sent),
                Direction::Inbound => (self.sent, self.received),
            };
            put("bytes_sent", Field::Number(sent));
            put("bytes_recv", Field::Number(received));
            put("duration", Field::Text(&format!("{}ms", self.duration.as_millis())));
        }
        if let Some(failure) = &self.failure {
            put("error", Field::Text(&failure.text));
            if let Some(code) = failure.code {
                put("code", Field::Text(code.code()));
            }
        }
        if self.fast_path {
            put("path", Field::Text("fast"));
        }
    }
}

/// A value and how text shows it.
enum Field<'a> {
    /// Quoted.
    Text(&'a str),
    /// As it is.
    Bare(&'a str),
    /// As it is.
    Number(u64),
}

/// Workload here is the instance (the pod) where the model knows it.
fn peer_fields(
    peer: &Peer,
    [workload, namespace, identity]: [&'static str; 3],
    id: Option<String>,
    put: &mut impl FnMut(&'static str, Field<'_>),
) {
    let mut put_text = |name, value: &str| {
        if !value.is_empty() {
            put(name, Field::Text(value));
        }
    };
    match peer {
        Peer::Unknown => {}
        Peer::Workload(w) => {
            put_text(workload, &w.name);
            put_text(namespace, &w.namespace);
        }
        Peer::Derived(b) => {
            put_text(workload, if b.workload_name.is_empty() { &b.service_name } else { &b.workload_name });
            put_text(namespace, &b.namespace);
        }
    }
    put_text(identity, id.as_deref().unwrap_or_default());
}

type Output = Arc<Mutex<Box<dyn Write + Send>>>;

/// The access log. Cheap to clone.
#[derive(Clone)]
pub struct AccessLog {
    queue: SyncSender<AccessRecord>,
    output: Output,
    format: LogFormat,
    dropped: Counter,
}

impl std::fmt::Debug for AccessLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AccessLog").field("format", &self.format).field("dropped", &self.dropped).finish()
    }
}

impl AccessLog {
    /// Starts the writer thread. It ends when the last clone is dropped and the queue is written. `dropped` counts the
    /// records that were lost because the writer did not keep up.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(
        format: LogFormat,
        output: Box<dyn Write + Send>,
        dropped: Counter,
    ) -> std::io::Result<Self> {
        let (queue, records) = sync_channel(QUEUE);
        let output: Output = Arc::new(Mutex::new(output));
        let sink = output.clone();
        std::thread::Builder::new()
            .name("access-log".to_owned())
            .spawn(move || write_records(&records, format, &sink))?;
        Ok(Self { queue, output, format, dropped })
    }

    /// Whether anybody wants lines of opened connections (`access=debug`).
    #[must_use]
    pub fn logs_opened() -> bool {
        tracing::enabled!(target: "access", tracing::Level::DEBUG)
    }

    /// Hands over a record, if its level is enabled. Never waits, except for a denial when the queue is full.
    pub fn write(&self, record: AccessRecord) {
        if !record.is_enabled() {
            return;
        }
        match self.queue.try_send(record) {
            Ok(()) => {}
            Err(TrySendError::Full(record) | TrySendError::Disconnected(record)) if record.is_denial() => {
                let mut line = String::with_capacity(512);
                record.format(self.format, &mut line);
                write_out(&self.output, &line);
            }
            Err(_) => {
                self.dropped.inc();
            }
        }
    }
}

fn write_records(records: &Receiver<AccessRecord>, format: LogFormat, output: &Output) {
    let mut lines = String::with_capacity(64 * 1024);
    while let Ok(record) = records.recv() {
        record.format(format, &mut lines);
        // Whatever else waits goes out with it, up to a buffer's worth.
        while lines.len() < 60 * 1024 {
            let Ok(record) = records.try_recv() else { break };
            record.format(format, &mut lines);
        }
        write_out(output, &lines);
        lines.clear();
    }
}

/// A log that cannot be written (closed pipe, full disk) must not take traffic with it.
fn write_out(output: &Output, lines: &str) {
    let mut output = output.lock().unwrap_or_else(PoisonError::into_inner);
    let _ = output.write_all(lines.as_bytes()).and_then(|()| output.flush());
}
