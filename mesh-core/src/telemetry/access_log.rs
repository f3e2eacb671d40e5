//! The access log: one line per connection, in the layout that Kiali parses, or as JSON.
//!
//! A record is a handful of reference counts. It goes through a bounded queue to a thread that formats and writes; who
//! hands it over never waits, not even when nobody reads the log. When the queue is full, records are dropped and
//! counted, except those of denied connections: who was refused, and by what, is never lost. They are gathered by kind
//! ([`super::denials`]), and the writer tells of each kind in one line and one count.

use std::fmt::{Display, Write as _};
use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant, SystemTime};

use prometheus_client::metrics::counter::Counter;
use serde_json::{Map, Value};

use super::denials::{Denials, Repeated};
use super::labels::{Connection, Peer, SecurityPolicy};
use super::logging::LogFormat;
use super::request::RequestRecord;
use crate::error::{Code, ResponseFlag};
use crate::flows::ConnectionId;
use crate::hbone::Authority;
use crate::identity::SpiffeId;

/// Records that wait for the writer.
const QUEUE: usize = 8192;
/// The writer rests for this long after what was there is written: so much later may a record be.
const REST: Duration = Duration::from_millis(10);

/// What a record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Established.
    Opened,
    /// Ended.
    Complete,
    /// Refused before it could be recorded.
    Failed,
    /// A request ended.
    Request,
}

/// The direction, seen from the reporting side's workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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
    /// The object that decided, if one did. Not in the line: the text names it.
    pub decided_by: Option<Arc<str>>,
}

impl Failure {
    /// A failure with a stable code, from which its flag follows.
    #[must_use]
    pub fn new(code: Code, text: impl Into<Arc<str>>) -> Self {
        Self { text: text.into(), code: Some(code), flag: code.flag(), decided_by: None }
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
    /// The connection, as flow events name it; zero where nobody named it.
    pub id: ConnectionId,
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
    /// Of [`Event::Request`].
    pub request: Option<Box<RequestRecord>>,
}

impl AccessRecord {
    fn is_denial(&self) -> bool {
        self.failure.as_ref().is_some_and(Failure::is_denial)
    }

    fn level(&self) -> &'static str {
        match (self.event, &self.failure) {
            (Event::Opened, _) => "debug",
            (Event::Complete | Event::Request, None) => "info",
            (Event::Complete | Event::Request, Some(_)) => "error",
            (Event::Failed, _) => "warn",
        }
    }

    fn message(&self) -> &'static str {
        match self.event {
            Event::Opened => "connection opened",
            Event::Complete => "connection complete",
            Event::Failed => "connection failed",
            Event::Request => "request complete",
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
        if let Some(request) = &self.request
            && let Some(lines) = &request.lines
        {
            return lines.write(self, request, line);
        }
        self.own(format, line);
    }

    /// Appends the line in our own layout, with its end.
    fn own(&self, format: LogFormat, line: &mut String) {
        layout(format, self.at, self.level(), self.message(), |put| self.fields(put), line);
    }

    /// The fields in their order; absent values are left out.
    fn fields(&self, put: Put<'_>) {
        put("src.addr", Field::Bare(&self.source));
        self.peers(put);
        if let Some(request) = &self.request {
            request.fields(put);
        }
        if matches!(self.event, Event::Complete | Event::Request) {
            let (sent, received) = match self.direction {
                Direction::Outbound => (self.received, self.sent),
                Direction::Inbound => (self.sent, self.received),
            };
            put("bytes_sent", Field::Number(sent));
            put("bytes_recv", Field::Number(received));
            put("duration", Field::Shown(&format_args!("{}ms", self.duration.as_millis())));
        }
        self.reason(put);
        if self.fast_path {
            put("path", Field::Text("fast"));
        }
        if !self.id.is_none() {
            put("connection", Field::Shown(&self.id));
        }
    }

    /// Who talks to whom, after the source's address.
    fn peers(&self, put: Put<'_>) {
        let connection = self.connection.as_ref();
        let tls = connection.is_some_and(|c| c.security == SecurityPolicy::MutualTls);
        if let Some(c) = connection {
            let identity = c.source_identity.as_ref().filter(|_| tls);
            peer_fields(&c.source, ["src.workload", "src.namespace", "src.identity"], identity, put);
        }
        put("dst.addr", Field::Bare(&self.destination));
        if let Some(target) = &self.hbone_target {
            put("dst.hbone_addr", Field::Bare(target));
        }
        if let Some(c) = connection {
            if let Some(service) = &c.service {
                put("dst.service", Field::Text(service.host.hostname()));
            }
            let identity = c.destination_principal().filter(|_| tls);
            peer_fields(&c.destination, ["dst.workload", "dst.namespace", "dst.identity"], identity, put);
        }
        put("direction", Field::Text(self.direction.as_str()));
    }

    fn reason(&self, put: Put<'_>) {
        if let Some(failure) = &self.failure {
            put("error", Field::Text(&failure.text));
            if let Some(code) = failure.code {
                put("code", Field::Text(code.code()));
            }
        }
    }
}

impl RequestRecord {
    /// The fields in their order; absent values are left out.
    fn fields(&self, put: Put<'_>) {
        put("method", Field::Text(&self.method));
        put("authority", Field::Text(&self.authority));
        put("path", Field::Text(&self.path));
        put("protocol", Field::Text(self.protocol));
        put("response_code", Field::Number(self.code.into()));
        if let Some(status) = self.grpc_status {
            put("grpc_status", Field::Number(status.into()));
        }
        put("response_flags", Field::Shown(&self.flags));
        let texts = [
            ("response_code_details", &*self.details),
            ("upstream_transport_failure_reason", &*self.upstream_failure),
            ("route_name", &*self.route),
            ("request_id", &*self.request_id),
            ("user_agent", &*self.user_agent),
            ("x_forwarded_for", &*self.forwarded_for),
        ];
        for (name, text) in texts.into_iter().filter(|(_, text)| !text.is_empty()) {
            put(name, Field::Text(text));
        }
        if let Some(trace) = self.trace {
            put("trace_id", Field::Shown(&format_args!("{trace:032x}")));
        }
        if self.retries > 0 {
            put("retries", Field::Number(self.retries.into()));
        }
    }
}

impl Repeated {
    /// Appends the first denial's line and, if others followed, one with their count.
    fn format(&self, format: LogFormat, lines: &mut String) {
        let first = &self.first;
        first.format(format, lines);
        if self.more == 0 {
            return;
        }
        let fields = |put: Put<'_>| {
            put("src.ip", Field::Bare(&first.source.ip()));
            first.peers(put);
            put("count", Field::Number(self.more));
            put("since", Field::Shown(&humantime::format_rfc3339_micros(first.at)));
            first.reason(put);
        };
        layout(format, self.last, first.level(), MORE_DENIED, fields, lines);
    }
}

/// Message of a line that stands for several denials; its `count` does not include the line before it.
const MORE_DENIED: &str = "more connections denied";

/// Takes fields in their order.
type Put<'a> = &'a mut dyn FnMut(&'static str, Field<'_>);

/// Appends a line, with its end.
fn layout(
    format: LogFormat,
    at: SystemTime,
    level: &str,
    message: &str,
    fields: impl FnOnce(Put<'_>),
    line: &mut String,
) {
    let time = humantime::format_rfc3339_micros(at);
    match format {
        LogFormat::Text => {
            // Writing to a String cannot fail.
            let _ = write!(line, "{time}\t{level}\taccess\t{message}\t");
            let mut first = true;
            fields(&mut |name, value| {
                if !std::mem::take(&mut first) {
                    line.push(' ');
                }
                line.push_str(name);
                line.push('=');
                match value {
                    Field::Text(text) => quote(line, |line| line.push_str(text)),
                    Field::Shown(value) => quote(line, |line| _ = write!(line, "{value}")),
                    Field::Bare(value) => _ = write!(line, "{value}"),
                    Field::Number(number) => _ = write!(line, "{number}"),
                }
            });
        }
        LogFormat::Json => {
            let mut map = Map::new();
            map.insert("level".to_owned(), level.into());
            map.insert("time".to_owned(), time.to_string().into());
            map.insert("scope".to_owned(), "access".into());
            map.insert("message".to_owned(), message.into());
            fields(&mut |name, value| {
                let value: Value = match value {
                    Field::Text(text) => text.into(),
                    Field::Shown(value) | Field::Bare(value) => value.to_string().into(),
                    Field::Number(number) => number.into(),
                };
                map.insert(name.to_owned(), value);
            });
            let _ = write!(line, "{}", Value::Object(map));
        }
    }
    line.push('\n');
}

/// Appends what `append` does in quotes, escaped where it has to be: hardly ever, and escaping costs more than the rest.
fn quote(line: &mut String, append: impl FnOnce(&mut String)) {
    line.push('"');
    let start = line.len();
    append(line);
    let plain = |byte: u8| matches!(byte, b' '..=b'~') && !matches!(byte, b'"' | b'\\');
    if !line.as_bytes()[start..].iter().all(|byte| plain(*byte)) {
        let escaped = format!("{:?}", &line[start..]);
        line.truncate(start - 1);
        line.push_str(&escaped);
        return;
    }
    line.push('"');
}

/// A value and how text shows it.
enum Field<'a> {
    /// Quoted.
    Text(&'a str),
    /// Quoted.
    Shown(&'a dyn Display),
    /// As it is.
    Bare(&'a dyn Display),
    /// As it is.
    Number(u64),
}

/// Workload here is the instance (the pod) where the model knows it.
fn peer_fields(
    peer: &Peer,
    [workload, namespace, identity]: [&'static str; 3],
    id: Option<&SpiffeId>,
    put: Put<'_>,
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
    if let Some(id) = id {
        put(identity, Field::Shown(id));
    }
}

/// What goes through the queue.
#[allow(clippy::large_enum_variant, reason = "nearly all are records, which a box each would only slow down")]
enum Message {
    /// Boxed: the queue's places are made at the start, and an idle agent would hold megabytes of empty ones.
    Record(Box<AccessRecord>),
    /// Denials are waiting.
    Denials,
    /// Answered when everything before it is written.
    Flush(SyncSender<()>),
}

/// Gets records as they are written.
pub type Listener = Box<dyn Fn(&AccessRecord) + Send>;

/// The access log. Cheap to clone.
#[derive(Clone)]
pub struct AccessLog {
    queue: SyncSender<Message>,
    denials: Arc<Denials>,
    dropped: Counter,
}

impl std::fmt::Debug for AccessLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AccessLog").field("dropped", &self.dropped).finish_non_exhaustive()
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
        Self::start_with(format, output, dropped, None)
    }

    /// As [`Self::start`]; `listener` gets every record that is written, on the writer's thread.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start_with(
        format: LogFormat,
        output: Box<dyn Write + Send>,
        dropped: Counter,
        listener: Option<Listener>,
    ) -> std::io::Result<Self> {
        let (queue, messages) = sync_channel(QUEUE);
        let denials = Arc::new(Denials::default());
        let writer = Writer { messages, denials: Arc::clone(&denials), format, output, listener };
        std::thread::Builder::new().name("access-log".to_owned()).spawn(move || writer.run())?;
        Ok(Self { queue, denials, dropped })
    }

    /// Whether anybody wants lines of opened connections (`access=debug`).
    #[must_use]
    pub fn logs_opened() -> bool {
        tracing::enabled!(target: "access", tracing::Level::DEBUG)
    }

    /// Hands over a record, if its level is enabled. Never waits.
    pub fn write(&self, record: AccessRecord) {
        if !record.is_enabled() {
            return;
        }
        match self.queue.try_send(Message::Record(Box::new(record))) {
            Err(TrySendError::Full(Message::Record(record))) if record.is_denial() => {
                self.denials.add(*record);
                // The writer may have emptied the queue meanwhile. If it is still full, the writer comes by anyway.
                let _ = self.queue.try_send(Message::Denials);
            }
            Err(_) => {
                self.dropped.inc();
            }
            Ok(()) => {}
        }
    }

    /// Waits until everything that was handed over is written, at most for `patience`. Says whether it is.
    #[must_use]
    pub fn flush(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let (done, written) = sync_channel(1);
        let mut message = Message::Flush(done);
        while let Err(error) = self.queue.try_send(message) {
            let TrySendError::Full(back) = error else { return false };
            if Instant::now() >= deadline {
                return false;
            }
            message = back;
            std::thread::sleep(Duration::from_millis(5));
        }
        written.recv_timeout(deadline.saturating_duration_since(Instant::now())).is_ok()
    }
}

/// The thread that formats and writes: the only one that waits for a slow reader.
struct Writer {
    messages: Receiver<Message>,
    denials: Arc<Denials>,
    format: LogFormat,
    output: Box<dyn Write + Send>,
    listener: Option<Listener>,
}

impl Writer {
    fn run(mut self) {
        let mut lines = String::with_capacity(64 * 1024);
        while let Ok(message) = self.messages.recv() {
            let mut asked = Vec::new();
            let mut next = Some(message);
            // Whatever else waits goes out with it, up to a buffer's worth.
            while let Some(message) = next {
                match message {
                    Message::Record(record) => {
                        record.format(self.format, &mut lines);
                        if let Some(listener) = &self.listener {
                            listener(&record);
                        }
                    }
                    Message::Denials => {}
                    Message::Flush(done) => asked.push(done),
                }
                next = if lines.len() < 60 * 1024 { self.messages.try_recv().ok() } else { None };
            }
            self.gather(&mut lines);
            // A log that cannot be written (closed pipe, full disk) must not take traffic with it.
            let _ = self.output.write_all(lines.as_bytes()).and_then(|()| self.output.flush());
            lines.clear();
            // Who asked may have stopped waiting.
            for done in asked {
                let _ = done.try_send(());
            }
            // While it does not wait, it need not be woken, which costs a worker more than the record.
            std::thread::sleep(REST);
        }
    }

    /// The denials that found the queue full.
    fn gather(&self, lines: &mut String) {
        let pile = self.denials.take();
        pile.kinds.iter().for_each(|repeated| repeated.format(self.format, lines));
        if let Some((count, last)) = pile.others {
            let fields = |put: Put<'_>| put("count", Field::Number(count));
            layout(self.format, last, "error", "more connections of other peers denied", fields, lines);
        }
    }
}
