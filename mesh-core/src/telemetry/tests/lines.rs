//! Lines of the access log and of the programs' logs.

use std::io::Write;
use std::sync::Condvar;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tracing_subscriber::layer::SubscriberExt;

use super::super::log_queue::LogQueue;
use super::super::logging::Lines;
use super::*;

fn record(connection: Option<Connection>) -> AccessRecord {
    let opened = opened(cart_to_pay(&shop(), Reporter::Source));
    AccessRecord {
        id: crate::flows::ConnectionId::default(),
        event: Event::Complete,
        at: UNIX_EPOCH + Duration::from_micros(1_700_000_000_123_456),
        direction: Direction::Outbound,
        source: opened.source,
        destination: opened.destination,
        hbone_target: opened.hbone_target,
        connection,
        received: 300,
        sent: 1200,
        duration: Duration::from_millis(12),
        failure: None,
        fast_path: false,
        request: None,
    }
}

fn line(record: &AccessRecord, format: LogFormat) -> String {
    let mut line = String::new();
    record.format(format, &mut line);
    line
}

#[test]
fn a_complete_connection_has_the_layout_that_kiali_parses() {
    let mut it = record(Some(cart_to_pay(&shop(), Reporter::Source)));
    let names = concat!(
        r#"src.addr=10.0.0.1:40000 src.workload="cart-7d" src.namespace="shop" "#,
        r#"src.identity="spiffe://cluster.local/ns/shop/sa/cart" dst.addr=10.0.0.2:15008 "#,
        r#"dst.hbone_addr=10.0.0.2:8080 dst.service="pay.shop.svc.cluster.local" dst.workload="pay-5c" "#,
        r#"dst.namespace="shop" dst.identity="spiffe://cluster.local/ns/shop/sa/pay" "#,
    );
    assert_eq!(
        line(&it, LogFormat::Text),
        format!(
            "2023-11-14T22:13:20.123456Z\tinfo\taccess\tconnection complete\t{names}\
             direction=\"outbound\" bytes_sent=300 bytes_recv=1200 duration=\"12ms\"\n"
        )
    );
    it.direction = Direction::Inbound;
    let inbound = line(&it, LogFormat::Text);
    assert!(inbound.ends_with("direction=\"inbound\" bytes_sent=1200 bytes_recv=300 duration=\"12ms\"\n"));
}

#[test]
fn what_is_not_known_is_left_out_and_identities_need_mutual_tls() {
    let plain = Connection {
        security: SecurityPolicy::Unknown,
        source: Peer::Unknown,
        service: None,
        ..cart_to_pay(&shop(), Reporter::Destination)
    };
    let it = AccessRecord { hbone_target: None, fast_path: true, ..record(Some(plain)) };
    let text = line(&it, LogFormat::Text);
    assert!(
        text.contains("\tsrc.addr=10.0.0.1:40000 dst.addr=10.0.0.2:15008 dst.workload=\"pay-5c\""),
        "{text}"
    );
    assert!(
        !text.contains("identity") && !text.contains("hbone") && text.ends_with(" path=\"fast\"\n"),
        "{text}"
    );
}

#[test]
fn a_failure_says_why_in_one_quoted_field() {
    let failure = Failure::new(Code::PolicyDenied, "rejected: explicitly denied by: shop/no \"way\"\n\tout");
    let it = AccessRecord { failure: Some(failure), ..record(None) };
    let text = line(&it, LogFormat::Text);
    assert!(text.contains("\terror\taccess\tconnection complete\t"), "{text}");
    let wanted = r#"error="rejected: explicitly denied by: shop/no \"way\"\n\tout" code="M0401""#;
    assert!(text.trim_end().ends_with(wanted), "{text}");
    assert_eq!(text.matches('\n').count(), 1, "a value cannot forge a line: {text:?}");
    assert_eq!(text.matches('\t').count(), 4);
    let early = AccessRecord { event: Event::Failed, ..it };
    let text = line(&early, LogFormat::Text);
    assert!(text.contains("\twarn\taccess\tconnection failed\t") && !text.contains("bytes_sent"), "{text}");
}

#[test]
fn json_has_the_same_fields_with_their_dots() {
    let it = record(Some(cart_to_pay(&shop(), Reporter::Source)));
    let json: serde_json::Value = serde_json::from_str(&line(&it, LogFormat::Json)).unwrap();
    assert_eq!(json["level"], "info");
    assert_eq!(
        (json["scope"].as_str(), json["message"].as_str()),
        (Some("access"), Some("connection complete"))
    );
    assert_eq!(json["time"], "2023-11-14T22:13:20.123456Z");
    assert_eq!(json["src.workload"], "cart-7d");
    assert_eq!((json["bytes_sent"].as_u64(), json["bytes_recv"].as_u64()), (Some(300), Some(1200)));
}

/// Blocks its writer until it is opened.
#[derive(Clone, Default)]
struct Gate(Arc<(Mutex<Written>, Condvar)>);

/// Whether writes may go on, and what was written.
type Written = (bool, Vec<u8>);

impl Gate {
    fn open(&self) {
        self.0.0.lock().unwrap().0 = true;
        self.0.1.notify_all();
    }

    fn text(&self) -> String {
        String::from_utf8(self.0.0.lock().unwrap().1.clone()).unwrap()
    }
}

impl Write for Gate {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let mut state = self.0.1.wait_while(self.0.0.lock().unwrap(), |state| !state.0).unwrap();
        state.1.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn wait_for(what: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !what() {
        assert!(Instant::now() < deadline, "did not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn subscribed() -> tracing::subscriber::DefaultGuard {
    tracing::subscriber::set_default(
        tracing_subscriber::registry().with(tracing_subscriber::fmt::layer().with_writer(std::io::sink)),
    )
}

#[test]
fn a_writer_that_does_not_keep_up_costs_counted_lines_but_never_a_denial() {
    let _guard = subscribed();
    let gate = Gate::default();
    let dropped = Counter::default();
    let log = AccessLog::start(LogFormat::Text, Box::new(gate.clone()), dropped.clone()).unwrap();
    for _ in 0..20_000 {
        log.write(record(None));
    }
    assert!(dropped.get() > 10_000, "the queue is bounded: {}", dropped.get());
    let denied = AccessRecord { failure: Some(Failure::new(Code::PolicyDenied, "denied-1")), ..record(None) };
    let refused = std::thread::spawn(move || {
        let _guard = subscribed();
        log.write(denied);
    });
    gate.open();
    refused.join().unwrap();
    wait_for(|| gate.text().contains("denied-1"));
    let written = |text: &str| text.lines().filter(|l| l.contains("connection complete")).count() as u64;
    wait_for(|| written(&gate.text()) + dropped.get() == 20_001);
}

/// A denial of `source` (its last octet and port) by `policy`.
fn denial(source: u8, port: u16, policy: &str) -> AccessRecord {
    let text = format!("connection closed due to policy rejection: explicitly denied by: {policy}");
    AccessRecord {
        id: crate::flows::ConnectionId::default(),
        source: SocketAddr::from(([10, 0, 0, source], port)),
        failure: Some(Failure::new(Code::PolicyDenied, text)),
        ..record(None)
    }
}

/// Hands `work` to a thread and fails if it does not come back: it would be waiting for the log's reader.
fn without_waiting(work: impl FnOnce() + Send + 'static) {
    let (done, finished) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        work();
        let _ = done.send(());
    });
    finished.recv_timeout(Duration::from_secs(60)).expect("whoever logs waits for the log's reader");
}

/// What `text` tells of: lines of denials, and counts of those that have no line of their own.
fn told(text: &str) -> u64 {
    let count = |line: &str| {
        let (_, rest) = line.split_once(" count=").or_else(|| line.split_once("\tcount="))?;
        rest.split([' ', '\n']).next()?.parse::<u64>().ok()
    };
    text.lines().map(|line| if line.contains("more connections") { count(line).unwrap() } else { 1 }).sum()
}

#[test]
fn an_unread_log_keeps_nobody_waiting_and_tells_of_every_denial_once_it_is_read() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let dropped = Counter::default();
    let log = AccessLog::start(LogFormat::Text, Box::new(writer), dropped.clone()).unwrap();
    without_waiting(move || {
        let _guard = subscribed();
        for n in 0..100_000_u32 {
            let policy = if n % 2 == 0 { "shop/even" } else { "shop/odd" };
            log.write(denial(u8::try_from(n % 50).unwrap(), 40_000, policy));
        }
    });
    let mut text = String::new();
    std::io::Read::read_to_string(&mut reader, &mut text).unwrap();
    assert_eq!((told(&text), dropped.get()), (100_000, 0));
    let summary = text.lines().find(|l| l.contains("more connections denied")).unwrap();
    let columns: Vec<&str> = summary.split('\t').collect();
    assert_eq!(columns[1..4], ["error", "access", "more connections denied"]);
    for wanted in ["src.ip=10.0.0.", " dst.addr=10.0.0.2:15008 ", " count=", " since=\"2023-", "shop/"] {
        assert!(summary.contains(wanted), "no {wanted} in {summary}");
    }
    assert!(text.lines().count() < 20_000, "what is kept while nobody reads is bounded");
}

#[test]
fn denials_of_more_peers_than_are_told_apart_are_still_counted() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let log = AccessLog::start(LogFormat::Json, Box::new(writer), Counter::default()).unwrap();
    without_waiting(move || {
        let _guard = subscribed();
        for n in 0..30_000_u32 {
            log.write(denial(1, 40_000, &format!("shop/policy-{n}")));
        }
    });
    let mut text = String::new();
    std::io::Read::read_to_string(&mut reader, &mut text).unwrap();
    let count = |line: &str| {
        let json: serde_json::Value = serde_json::from_str(line).unwrap();
        json["count"].as_u64().unwrap_or(1)
    };
    assert_eq!(text.lines().map(count).sum::<u64>(), 30_000);
    assert!(text.contains("more connections of other peers denied"));
}

#[test]
fn a_flush_waits_for_the_lines_before_it_and_not_for_ever() {
    let _guard = subscribed();
    let gate = Gate::default();
    let log = AccessLog::start(LogFormat::Text, Box::new(gate.clone()), Counter::default()).unwrap();
    log.write(denial(1, 40_000, "shop/no"));
    assert!(!log.flush(Duration::from_millis(50)), "nobody reads");
    gate.open();
    assert!(log.flush(Duration::from_secs(20)));
    assert!(gate.text().contains("shop/no"));
}

#[test]
fn an_unread_log_of_the_program_keeps_nobody_waiting_and_says_how_much_is_lost() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let queue = LogQueue::start(LogFormat::Text, Box::new(writer)).unwrap();
    without_waiting(move || {
        let layer = tracing_subscriber::fmt::layer().event_format(Lines(LogFormat::Text)).with_writer(queue);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            for n in 0..50_000 {
                tracing::info!(n, "said");
            }
        });
    });
    let mut text = String::new();
    std::io::Read::read_to_string(&mut reader, &mut text).unwrap();
    let said = text.lines().filter(|l| l.contains("\tsaid\t")).count() as u64;
    let lost = |line: &str| line.split_once("\tcount=").map(|(_, n)| n.parse::<u64>().unwrap());
    let lost: u64 = text.lines().filter(|l| l.contains("log lines lost")).filter_map(lost).sum();
    assert!(lost > 0, "the queue is bounded");
    assert_eq!(said + lost, 50_000);
}

#[test]
fn lines_of_a_disabled_level_are_not_written() {
    let sink = Sink::default();
    let log = AccessLog::start(LogFormat::Text, Box::new(sink.clone()), Counter::default()).unwrap();
    let quiet = tracing_subscriber::registry()
        .with(tracing_subscriber::filter::EnvFilter::new("info,access=off"))
        .with(tracing_subscriber::fmt::layer().with_writer(std::io::sink));
    tracing::subscriber::with_default(quiet, || log.write(record(None)));
    let loud = tracing_subscriber::registry()
        .with(tracing_subscriber::filter::EnvFilter::new("info"))
        .with(tracing_subscriber::fmt::layer().with_writer(std::io::sink));
    tracing::subscriber::with_default(loud, || {
        assert!(!AccessLog::logs_opened());
        log.write(AccessRecord { received: 77, ..record(None) });
    });
    wait_for(|| sink.text().contains("bytes_sent=77"));
    assert_eq!(sink.text().lines().count(), 1);
}

#[derive(Clone)]
struct MakeSink(Sink);

impl tracing_subscriber::fmt::MakeWriter<'_> for MakeSink {
    type Writer = Sink;

    fn make_writer(&self) -> Sink {
        self.0.clone()
    }
}

fn logged(format: LogFormat, log: impl FnOnce()) -> String {
    let sink = Sink::default();
    let layer =
        tracing_subscriber::fmt::layer().event_format(Lines(format)).with_writer(MakeSink(sink.clone()));
    tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), log);
    sink.text()
}

#[test]
fn program_lines_share_the_layout() {
    let text = logged(LogFormat::Text, || {
        tracing::warn!(target: "dns", port = 53, name = "a b", who = "x", "no\nanswer");
    });
    let columns: Vec<&str> = text.trim_end().split('\t').collect();
    assert_eq!(columns[1..], ["warn", "dns", "no\\nanswer", "port=53 name=\"a b\" who=x"]);
    assert!(humantime::parse_rfc3339(columns[0]).unwrap() <= SystemTime::now());
    assert_eq!(columns[0].len(), "2023-11-14T22:13:20.123456Z".len(), "microseconds");

    let text = logged(LogFormat::Json, || tracing::info!(target: "dns", port = 53, "hello"));
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((json["level"].as_str(), json["scope"].as_str()), (Some("info"), Some("dns")));
    assert_eq!((json["message"].as_str(), json["port"].as_u64()), (Some("hello"), Some(53)));
}

#[test]
fn log_settings_that_cannot_be_used_say_what_would() {
    assert_eq!(
        "xml".parse::<LogFormat>().unwrap_err().to_string(),
        "log format \"xml\" is not known; use `text` or `json` (LOG_FORMAT)"
    );
    let bad = LogSettings { level: "loud=very".into(), format: LogFormat::Text };
    assert!(bad.start().unwrap_err().to_string().starts_with("log level \"loud=very\" is not valid:"));
}

/// The only test that sets the process's subscriber.
#[test]
fn levels_change_at_run_time_and_go_back() {
    let logging = LogSettings { level: "warn".into(), format: LogFormat::Text }.start().unwrap();
    let shows_dns = || tracing::enabled!(target: "dns", tracing::Level::DEBUG);
    assert!(!shows_dns());
    assert_eq!(logging.set("dns=debug").unwrap(), "warn,dns=debug");
    assert!(shows_dns() && !tracing::enabled!(target: "other", tracing::Level::INFO));
    assert!(logging.set("dns=loud").is_err());
    assert_eq!(logging.level(), "warn,dns=debug", "a bad level changes nothing");
    assert_eq!(logging.set("info").unwrap(), "info", "a plain level replaces all");
    assert!(!shows_dns());
    assert_eq!(logging.set("reset").unwrap(), "warn");
}

#[test]
fn a_request_has_one_line_with_what_was_asked_and_how_it_ended() {
    let request = RequestRecord {
        method: "GET".into(),
        authority: "pay.shop".into(),
        path: "/a?b".into(),
        protocol: "HTTP/1.1",
        code: 503,
        flags: Flags::NO_HEALTHY_UPSTREAM,
        details: "no_healthy_upstream".into(),
        retries: 2,
        request_id: "id-1".into(),
        ..RequestRecord::default()
    };
    let it = AccessRecord {
        event: Event::Request,
        direction: Direction::Inbound,
        request: Some(Box::new(request)),
        ..record(None)
    };
    let line = line(&it, LogFormat::Text);
    let fields = line.split('\t').nth(4).unwrap();
    assert!(line.contains("\tinfo\taccess\trequest complete\t"), "{line}");
    assert_eq!(
        fields.trim_end(),
        "src.addr=10.0.0.1:40000 dst.addr=10.0.0.2:15008 dst.hbone_addr=10.0.0.2:8080 direction=\"inbound\" \
         method=\"GET\" authority=\"pay.shop\" path=\"/a?b\" protocol=\"HTTP/1.1\" response_code=503 \
         response_flags=\"UH\" response_code_details=\"no_healthy_upstream\" request_id=\"id-1\" retries=2 \
         bytes_sent=1200 bytes_recv=300 duration=\"12ms\""
    );
}
