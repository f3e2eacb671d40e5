//! Connections as spans, for who asks for them (`--connection-spans URL`): one at each end that this node has, under one
//! trace whose id is the connection's own (its high half is zero), so that both nodes' spans are one trace.
//!
//! They are sent once a second over plain HTTP, as OTLP, or as Zipkin's JSON where the path is Zipkin's. Nobody waits for
//! them: what the collector does not take is counted and lost.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::{Request, Uri, header};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use mesh_core::flows::{ConnectionId, Filter, Flow, Kind, Party, Side, Verdict};
use mesh_core::telemetry::{Place, Span, SpanService, otlp_body};
use prometheus_client::metrics::counter::Counter;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use super::Tracer;

/// Spans that come this close after the first go with it.
const TOGETHER: Duration = Duration::from_secs(1);
/// A collector that does not answer within this time has not taken them.
const PATIENCE: Duration = Duration::from_secs(5);
/// An answer that is longer is none of a collector.
const LONGEST_ANSWER: usize = 64 << 10;
/// The path that collectors take OTLP at, unless the address names another.
const OTLP_PATH: &str = "/v1/traces";

/// Where spans go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Collector {
    host: String,
    path: String,
    zipkin: bool,
}

impl std::str::FromStr for Collector {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let uri: Uri = text.parse().map_err(|_malformed| "is no address of the web")?;
        if uri.scheme_str() != Some("http") {
            return Err("does not begin with http://");
        }
        let authority = uri.authority().ok_or("names no host")?;
        let port = authority.port_u16().unwrap_or(80);
        let path = uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
        let path = if path == "/" { OTLP_PATH } else { path };
        let zipkin = path.ends_with("/spans");
        Ok(Self { host: format!("{}:{port}", authority.host()), path: path.to_owned(), zipkin })
    }
}

/// What became of spans.
#[derive(Debug, Clone, Default)]
pub struct Counts {
    /// Taken by the collector.
    pub sent: Counter,
    /// Lost.
    pub lost: Counter,
}

/// Sends for as long as the agent traces.
pub async fn run(collector: &Collector, tracer: Arc<Tracer>, counts: Counts) {
    let everything = Filter::default();
    let mut since = tracer.flows().newest();
    loop {
        tracer.flows().after(since).await;
        sleep(TOGETHER).await;
        let (flows, mark) = tracer.read(since, &everything);
        since = mark.next;
        let spans: Vec<_> = flows.iter().filter_map(of).collect();
        // Each of them may have been one.
        counts.lost.inc_by(mark.forgotten);
        if spans.is_empty() {
            continue;
        }
        let count = spans.len() as u64;
        match timeout(PATIENCE, send(collector, spans))
            .await
            .unwrap_or_else(|_| Err("no answer in time".into()))
        {
            Ok(()) => drop(counts.sent.inc_by(count)),
            Err(error) => {
                counts.lost.inc_by(count);
                tracing::warn!(
                    collector = collector.host,
                    spans = count,
                    error,
                    "spans of connections were lost"
                );
            }
        }
    }
}

/// The span of an event that ends a connection, or the attempt at one.
fn of(flow: &Flow) -> Option<(SpanService, Span)> {
    let ended = match flow.kind {
        Kind::Closed | Kind::Failed => true,
        Kind::Proxied => flow.verdict == Verdict::Denied,
        _ => false,
    };
    let id = flow.connection.filter(|id| ended && !id.is_none())?;
    let client = flow.side == Side::Client;
    let (own, other) =
        if client { (&flow.source, &flow.destination) } else { (&flow.destination, &flow.source) };
    let end = UNIX_EPOCH + Duration::from_micros(flow.at_us);
    let began = flow.duration_us.or(flow.latency_us).unwrap_or(0);
    let start = end.checked_sub(Duration::from_micros(began)).unwrap_or(SystemTime::UNIX_EPOCH);
    let place = place(id, client, flow.kind == Kind::Proxied);
    let port = flow.destination.address.map_or(0, |address| address.port());
    let asked = if flow.service.is_empty() { flow.destination.label() } else { flow.service.clone() };
    let span = Span {
        place,
        state: String::new(),
        name: format!("{asked}:{port}"),
        start,
        end,
        client,
        error: flow.verdict != Verdict::Forwarded,
        peer: other.address.unwrap_or(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))),
        tags: tags(id, flow),
    };
    Some((service(own), span))
}

/// The server's span is below the client's, which is told of on another node, perhaps.
fn place(id: ConnectionId, client: bool, denied: bool) -> Place {
    let of = |side: u64| (id.0 ^ side.wrapping_mul(0x9e37_79b9_7f4a_7c15)).max(1);
    let [asks, asked, refused] = [1, 2, 3].map(of);
    let (span, parent) = match (client, denied) {
        (true, false) => (asks, None),
        (false, false) => (asked, Some(asks)),
        // The agent's own account, beside that of the kernel.
        (true, true) => (of(4), Some(asks)),
        (false, true) => (refused, Some(asks)),
    };
    Place { trace: u128::from(id.0), span, parent, debug: false }
}

/// Its canonical name, as for waypoints: `name.namespace`.
fn service(own: &Party) -> SpanService {
    let name = if own.workload.is_empty() { &own.pod } else { &own.workload };
    let name = match (name.is_empty(), own.address) {
        (false, _) => format!("{name}.{}", own.namespace),
        (true, Some(address)) => address.ip().to_string(),
        (true, None) => "unknown".to_owned(),
    };
    SpanService { name, instance: own.pod.clone(), namespace: own.namespace.clone() }
}

fn tags(id: ConnectionId, flow: &Flow) -> Vec<(String, String)> {
    let number = |value: Option<u64>| value.map(|value| value.to_string()).unwrap_or_default();
    let Flow { source, destination, .. } = flow;
    let all = [
        ("component", "node".to_owned()),
        ("connection.id", id.to_string()),
        ("connection.path", flow.path.as_str().to_owned()),
        ("connection.verdict", flow.verdict.as_str().to_owned()),
        ("connection.reason", flow.reason.clone()),
        ("connection.policy", flow.policy.clone()),
        ("connection.closed_by", flow.closed_by.clone()),
        ("connection.closed_with", flow.closed_with.clone()),
        ("bytes.to_server", number(flow.bytes_to_server)),
        ("bytes.to_client", number(flow.bytes_to_client)),
        ("tcp.rtt_us", number(flow.srtt_us.map(u64::from))),
        ("tcp.retransmits", number(flow.retransmits.map(u64::from))),
        ("process", flow.process.as_ref().map(|process| process.command.clone()).unwrap_or_default()),
        ("node", flow.node.clone()),
        ("istio.source_workload", source.workload.clone()),
        ("istio.source_namespace", source.namespace.clone()),
        ("istio.source_instance_name", source.pod.clone()),
        ("istio.destination_workload", destination.workload.clone()),
        ("istio.destination_namespace", destination.namespace.clone()),
        ("istio.destination_instance_name", destination.pod.clone()),
        ("source.principal", source.identity.clone()),
        ("destination.principal", destination.identity.clone()),
        ("error", if flow.verdict == Verdict::Forwarded { String::new() } else { "true".to_owned() }),
    ];
    let known = all.into_iter().filter(|(_, value)| !value.is_empty());
    known.map(|(name, value)| (name.to_owned(), value)).collect()
}

/// The body of a request, and its type.
fn body(zipkin: bool, spans: Vec<(SpanService, Span)>) -> (Vec<u8>, &'static str) {
    if zipkin {
        let spans: Vec<Value> = spans.iter().map(|(service, span)| span.zipkin(&service.name)).collect();
        return (Value::from(spans).to_string().into_bytes(), "application/json");
    }
    let mut by: BTreeMap<SpanService, Vec<Span>> = BTreeMap::new();
    for (service, span) in spans {
        by.entry(service).or_default().push(span);
    }
    let resources = by.into_iter().map(|(service, spans)| service.spans(spans.iter().map(Span::otlp)));
    (otlp_body(resources.collect()), "application/x-protobuf")
}

async fn send(collector: &Collector, spans: Vec<(SpanService, Span)>) -> Result<(), String> {
    let (body, kind) = body(collector.zipkin, spans);
    let request = Request::post(&collector.path)
        .header(header::HOST, &collector.host)
        .header(header::CONTENT_TYPE, kind)
        .header(header::USER_AGENT, concat!("undermesh/", env!("CARGO_PKG_VERSION")))
        .body(Full::new(Bytes::from(body)))
        .map_err(|error| error.to_string())?;
    let stream = TcpStream::connect(&collector.host).await.map_err(|error| error.to_string())?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| error.to_string())?;
    let asked = async {
        let answer = sender.send_request(request).await.map_err(|error| error.to_string())?;
        let status = answer.status();
        let body = http_body_util::Limited::new(answer.into_body(), LONGEST_ANSWER);
        body.collect().await.map_err(|error| error.to_string())?;
        if status.is_success() { Ok(()) } else { Err(format!("answered {status}")) }
    };
    tokio::select! {
        answered = asked => answered,
        ended = connection => Err(ended.err().map_or_else(|| "ended".to_owned(), |error| error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(kind: Kind, side: Side) -> Flow {
        let party = |name: &str| Party {
            namespace: "shop".into(),
            workload: name.into(),
            pod: name.into(),
            ..Party::default()
        };
        let address = Some("10.0.0.2:8080".parse().unwrap());
        Flow {
            kind,
            side,
            at_us: 2_000_000,
            duration_us: Some(500_000),
            connection: Some(ConnectionId(0x6668_a901_0548_63e0)),
            source: party("frontend"),
            destination: Party { address, ..party("backend") },
            bytes_to_server: Some(77),
            ..Flow::default()
        }
    }

    #[test]
    fn both_ends_of_a_connection_are_one_trace_with_its_id_and_the_servers_is_below_the_clients() {
        let (asks, client) = of(&flow(Kind::Closed, Side::Client)).unwrap();
        let (asked, server) = of(&flow(Kind::Closed, Side::Server)).unwrap();
        assert_eq!((asks.name.as_str(), asked.name.as_str()), ("frontend.shop", "backend.shop"));
        assert_eq!(format!("{:032x}", client.place.trace), "00000000000000006668a901054863e0");
        assert_eq!((server.place.trace, server.place.parent), (client.place.trace, Some(client.place.span)));
        assert_eq!(client.end.duration_since(client.start).unwrap(), Duration::from_millis(500));
        assert!(client.tags.contains(&("bytes.to_server".into(), "77".into())) && !client.error);
        assert!(of(&flow(Kind::Established, Side::Client)).is_none(), "it has not ended");
        assert!(of(&flow(Kind::Proxied, Side::Server)).is_none(), "the kernel tells of it");
        let denied = Flow { verdict: Verdict::Denied, ..flow(Kind::Proxied, Side::Server) };
        assert!(of(&denied).is_some_and(|(_, span)| span.error && span.place.span != server.place.span));
    }

    #[test]
    fn the_path_says_whether_a_collector_is_zipkins() {
        let of = |text: &str| text.parse::<Collector>();
        let otlp = Collector { host: "c:4318".into(), path: "/v1/traces".into(), zipkin: false };
        assert_eq!(of("http://c:4318"), Ok(otlp.clone()));
        assert_eq!(of("http://c:4318/v1/traces"), Ok(otlp));
        assert!(of("http://z:9411/api/v2/spans").is_ok_and(|to| to.zipkin && to.host == "z:9411"));
        for wrong in ["c:4318", "https://c", "", "/v1/traces"] {
            assert!(of(wrong).is_err(), "{wrong}");
        }
    }
}
