//! Finished spans and lines of access logs on their way to collectors: kept per worker for a second or until there are many, then sent over the
//! worker's own connections, as any request to a service of the mesh.
//!
//! Nobody waits for them: what a collector does not take is counted and lost.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use mesh_core::xds::proto::l7::{self, tracer::Kind};
use prometheus_client::metrics::counter::Counter;
use tokio::sync::Notify;

use super::line::Line;
use super::span::{Service, Span};
use super::{otlp, zipkin};
pub(super) use crate::security::ext_authz::Reply;

/// Spans or lines that a worker keeps for one collector; further ones are lost.
const MOST: usize = 4096;
/// As many are sent at once without waiting for more.
const ENOUGH: usize = 512;
/// How long spans wait for others.
const WAIT: Duration = Duration::from_secs(1);
/// A collector that does not answer within this time has not taken them.
const PATIENCE: Duration = Duration::from_secs(10);

/// What was exported, over all workers.
#[derive(Debug, Clone, Default)]
pub struct Counts {
    /// Taken by a collector.
    pub sent: Counter,
    /// Lost.
    pub lost: Counter,
    /// Lines that a collector took.
    pub lines_sent: Counter,
    /// Lines that were lost.
    pub lines_lost: Counter,
}

/// What goes to one collector: a provider is for one or the other.
#[derive(Debug)]
enum Batch {
    Spans(Vec<Span>),
    Lines(Vec<Line>),
}

impl Batch {
    const fn len(&self) -> usize {
        match self {
            Self::Spans(spans) => spans.len(),
            Self::Lines(lines) => lines.len(),
        }
    }
}

/// Spans of one worker.
#[derive(Debug, Default)]
pub struct Outbox {
    kept: RefCell<Vec<(Arc<l7::Tracer>, Batch)>>,
    some: Notify,
    enough: Notify,
    counts: Counts,
}

impl Outbox {
    /// An empty one.
    #[must_use]
    pub fn new(counts: Counts) -> Self {
        Self { counts, ..Self::default() }
    }

    /// Takes a span for a collector.
    pub fn push(&self, tracer: &Arc<l7::Tracer>, span: Span) {
        self.add(
            tracer,
            &self.counts.lost,
            || Batch::Spans(Vec::new()),
            |batch| match batch {
                Batch::Spans(spans) => spans.push(span),
                Batch::Lines(_) => {}
            },
        );
    }

    /// Takes a line for a collector.
    pub fn push_line(&self, collector: &Arc<l7::Tracer>, line: Line) {
        self.add(
            collector,
            &self.counts.lines_lost,
            || Batch::Lines(Vec::new()),
            |batch| match batch {
                Batch::Lines(lines) => lines.push(line),
                Batch::Spans(_) => {}
            },
        );
    }

    fn add(
        &self,
        to: &Arc<l7::Tracer>,
        lost: &Counter,
        empty: impl FnOnce() -> Batch,
        push: impl FnOnce(&mut Batch),
    ) {
        let mut kept = self.kept.borrow_mut();
        let at = kept.iter().position(|(known, _)| Arc::ptr_eq(known, to)).unwrap_or_else(|| {
            kept.push((Arc::clone(to), empty()));
            kept.len() - 1
        });
        let batch = &mut kept[at].1;
        if batch.len() >= MOST {
            lost.inc();
            return;
        }
        push(batch);
        match batch.len() {
            1 => self.some.notify_one(),
            ENOUGH => self.enough.notify_one(),
            _ => {}
        }
    }

    /// Sends what comes, for ever, by `send`.
    pub async fn run<F>(&self, service: &Service, send: impl Fn(Arc<l7::Tracer>, Request<Bytes>) -> F)
    where
        F: Future<Output = Result<Reply, String>>,
    {
        loop {
            self.some.notified().await;
            tokio::select! {
                () = tokio::time::sleep(WAIT) => {}
                () = self.enough.notified() => {}
            }
            let taken = std::mem::take(&mut *self.kept.borrow_mut());
            for (tracer, batch) in taken {
                let count = batch.len() as u64;
                let counts = &self.counts;
                let (what, sent, lost) = match &batch {
                    Batch::Spans(_) => ("spans", &counts.sent, &counts.lost),
                    Batch::Lines(_) => ("lines of the access log", &counts.lines_sent, &counts.lines_lost),
                };
                match export(&tracer, service, batch, &send).await {
                    Ok(()) => drop(sent.inc_by(count)),
                    Err(error) => {
                        lost.inc_by(count);
                        tracing::warn!(provider = tracer.name, count, %error, "{what} were lost");
                    }
                }
            }
        }
    }
}

async fn export<F>(
    tracer: &Arc<l7::Tracer>,
    service: &Service,
    batch: Batch,
    send: impl Fn(Arc<l7::Tracer>, Request<Bytes>) -> F,
) -> Result<(), String>
where
    F: Future<Output = Result<Reply, String>>,
{
    let to = tracer.service.as_ref().ok_or("the provider has no service")?;
    let host = format!("{}:{}", to.hostname, to.port);
    let (request, timeout) = match (&tracer.kind, &batch) {
        (Some(Kind::Otlp(kind)), Batch::Spans(spans)) => {
            (otlp::request(&host, kind, service, spans), kind.timeout)
        }
        (Some(Kind::Otlp(kind)), Batch::Lines(lines)) => {
            (otlp::log_request(&host, kind, service, lines), kind.timeout)
        }
        (Some(Kind::Zipkin(kind)), Batch::Spans(spans)) => {
            (zipkin::request(&host, kind, service, spans), None)
        }
        _ => return Err("the provider is of a kind that this version does not know".to_owned()),
    };
    let request = request.map_err(|error| error.to_string())?;
    let timeout = timeout.and_then(|t| Duration::try_from(t).ok()).filter(|t| !t.is_zero());
    let sent = tokio::time::timeout(timeout.unwrap_or(PATIENCE), send(Arc::clone(tracer), request));
    let reply = sent.await.map_err(|_elapsed| "no answer in time".to_owned())??;
    match (&tracer.kind, batch) {
        (Some(Kind::Otlp(kind)), Batch::Spans(_)) => otlp::check(kind, &reply),
        (Some(Kind::Otlp(kind)), Batch::Lines(_)) => otlp::check_log(kind, &reply),
        _ => zipkin::check(&reply),
    }
}

/// Whether a collector is spoken to over HTTP/2, as gRPC needs it.
#[must_use]
pub fn http2(tracer: &l7::Tracer) -> bool {
    matches!(&tracer.kind, Some(Kind::Otlp(otlp)) if otlp.http_path.is_empty())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;
    use std::time::SystemTime;

    use http::{HeaderMap, StatusCode};
    use mesh_core::xds::proto::otlp as wire;
    use prost::Message as _;

    use super::super::context::Context;
    use super::*;

    fn span(n: u64) -> Span {
        let context = Context { trace: 7, span: n, parent: Some(9), sampled: true, debug: false };
        Span {
            place: context.into(),
            state: "a=b".into(),
            name: "web.shop:80/*".into(),
            start: SystemTime::UNIX_EPOCH + Duration::from_millis(1500),
            end: SystemTime::UNIX_EPOCH + Duration::from_millis(1502),
            client: false,
            error: n == 2,
            peer: "10.0.0.1:1234".parse().unwrap(),
            tags: vec![("http.method".into(), "GET".into())],
        }
    }

    fn tracer(kind: Kind) -> Arc<l7::Tracer> {
        let service = l7::ServiceRef { hostname: "collector".into(), port: 4317, ..Default::default() };
        Arc::new(l7::Tracer { name: "t".into(), service: Some(service), longest_tag: 0, kind: Some(kind) })
    }

    fn reply(status: StatusCode, trailers: HeaderMap) -> Reply {
        Reply { status, headers: HeaderMap::new(), body: Bytes::new(), trailers }
    }

    fn exported(kind: Kind) -> Request<Bytes> {
        let (tracer, spans) = (tracer(kind), Batch::Spans(vec![span(1), span(2)]));
        let service = Service { name: "wp.shop".into(), ..Service::default() };
        let seen = Rc::new(RefCell::new(None));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let keep = Rc::clone(&seen);
        let done = runtime.block_on(export(&tracer, &service, spans, move |_, request| {
            *keep.borrow_mut() = Some(request);
            let trailers = [("grpc-status".parse().unwrap(), "0".parse().unwrap())].into_iter().collect();
            std::future::ready(Ok(reply(StatusCode::OK, trailers)))
        }));
        done.unwrap();
        seen.borrow_mut().take().unwrap()
    }

    #[test]
    fn otlp_carries_spans_over_grpc_and_http() {
        for path in ["", "/v1/traces"] {
            let request =
                exported(Kind::Otlp(l7::tracer::Otlp { http_path: path.into(), ..Default::default() }));
            let grpc = path.is_empty();
            let at = if grpc { "/opentelemetry.proto.collector.trace.v1.TraceService/Export" } else { path };
            assert_eq!(request.uri().path(), at);
            let body = if grpc { request.body().slice(5..) } else { request.body().clone() };
            let message = wire::ExportTraceServiceRequest::decode(body).unwrap();
            let resource = &message.resource_spans[0];
            assert_eq!(resource.resource.as_ref().unwrap().attributes[0].key, "service.name");
            let spans = &resource.scope_spans[0].spans;
            assert_eq!(spans[0].trace_id, 7_u128.to_be_bytes());
            assert_eq!(spans[0].parent_span_id, 9_u64.to_be_bytes());
            assert_eq!(spans[0].end_time_unix_nano - spans[0].start_time_unix_nano, 2_000_000);
            assert_eq!(spans[1].status.as_ref().unwrap().code(), wire::status::Code::Error);
        }
    }

    #[test]
    fn lines_of_an_access_log_are_records_with_their_log_and_trace() {
        let to = tracer(Kind::Otlp(l7::tracer::Otlp::default()));
        let line = Line {
            log: "mesh".into(),
            at: SystemTime::UNIX_EPOCH + Duration::from_millis(1500),
            body: "GET / 200".into(),
            attributes: vec![("code".into(), "200".into())],
            trace: Some(7),
        };
        let counts = Counts::default();
        let outbox = Outbox::new(counts.clone());
        outbox.push_line(&to, line);
        let seen = Rc::new(RefCell::new(None));
        let keep = Rc::clone(&seen);
        let service = Service { name: "wp.shop".into(), ..Service::default() };
        let run = outbox.run(&service, move |_, request| {
            *keep.borrow_mut() = Some(request);
            let trailers = [("grpc-status".parse().unwrap(), "0".parse().unwrap())].into_iter().collect();
            std::future::ready(Ok(reply(StatusCode::OK, trailers)))
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async { tokio::time::timeout(WAIT + PATIENCE / 10, run).await.unwrap_err() });
        let request = seen.borrow_mut().take().unwrap();
        assert_eq!(request.uri().path(), "/opentelemetry.proto.collector.logs.v1.LogsService/Export");
        let message = wire::ExportLogsServiceRequest::decode(request.body().slice(5..)).unwrap();
        let logs = &message.resource_logs[0];
        assert_eq!(logs.resource.as_ref().unwrap().attributes.last().unwrap().key, "log_name");
        let record = &logs.scope_logs[0].log_records[0];
        assert_eq!((record.time_unix_nano, record.attributes[0].key.as_str()), (1_500_000_000, "code"));
        assert_eq!(record.trace_id, 7_u128.to_be_bytes());
        assert_eq!((counts.lines_sent.get(), counts.sent.get()), (1, 0));
    }

    #[test]
    fn zipkin_gets_json() {
        let request = exported(Kind::Zipkin(l7::tracer::Zipkin::default()));
        assert_eq!(request.uri().path(), "/api/v2/spans");
        let spans: serde_json::Value = serde_json::from_slice(request.body()).unwrap();
        assert_eq!(spans[0]["traceId"], format!("{:032x}", 7));
        assert_eq!(spans[0]["parentId"], format!("{:016x}", 9));
        assert_eq!(
            (spans[0]["timestamp"].as_u64(), spans[0]["duration"].as_u64()),
            (Some(1_500_000), Some(2000))
        );
        assert_eq!(spans[0]["localEndpoint"]["serviceName"], "wp.shop");
        assert_eq!(spans[0]["tags"]["http.method"], "GET");
    }

    #[test]
    fn a_collector_that_refuses_is_heard_of_and_spans_beyond_the_limit_are_counted() {
        let kind = l7::tracer::Otlp::default();
        let refused = [("grpc-status".parse().unwrap(), "14".parse().unwrap())].into_iter().collect();
        assert!(otlp::check(&kind, &reply(StatusCode::OK, refused)).is_err());
        assert!(otlp::check(&kind, &reply(StatusCode::OK, HeaderMap::new())).is_err());
        assert!(zipkin::check(&reply(StatusCode::SERVICE_UNAVAILABLE, HeaderMap::new())).is_err());
        let counts = Counts::default();
        let outbox = Outbox::new(counts.clone());
        let to = tracer(Kind::Otlp(kind));
        (0..=MOST as u64).for_each(|n| outbox.push(&to, span(n + 1)));
        assert_eq!(counts.lost.get(), 1);
        let sent = Cell::new(0);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let service = Service::default();
        let run = outbox.run(&service, |_, _| {
            sent.set(sent.get() + 1);
            let trailers = [("grpc-status".parse().unwrap(), "0".parse().unwrap())].into_iter().collect();
            std::future::ready(Ok(reply(StatusCode::OK, trailers)))
        });
        runtime.block_on(async { tokio::time::timeout(Duration::from_millis(500), run).await.unwrap_err() });
        assert_eq!((sent.get(), counts.sent.get()), (1, MOST as u64));
    }
}
