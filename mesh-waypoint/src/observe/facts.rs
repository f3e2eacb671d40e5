//! What layouts and expressions read of a request that has ended.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::time::SystemTime;

use http::HeaderMap;
use mesh_core::expression::Attribute;
use mesh_core::state::Workload;
use mesh_core::telemetry::{AccessRecord, Fact, Facts, Field, Part, Peer, RequestRecord, SecurityPolicy};

/// What a request leaves beside its record.
#[derive(Debug, Clone)]
pub struct Kept {
    /// When it came.
    pub started: SystemTime,
    /// `http` or `https`.
    pub scheme: &'static str,
    /// Headers of the request as it came.
    pub request: HeaderMap,
    /// Headers of the answer.
    pub response: HeaderMap,
    /// What came after the answer.
    pub trailers: HeaderMap,
    /// The backend, as Envoy names its clusters; empty: none was chosen.
    pub cluster: String,
    /// The endpoint's address.
    pub upstream: Option<SocketAddr>,
    /// Tries.
    pub attempts: u32,
    /// Labels of the client and of the endpoint.
    pub labels: [Option<std::sync::Arc<crate::config::Labels>>; 2],
}

impl Default for Kept {
    fn default() -> Self {
        Self {
            started: SystemTime::UNIX_EPOCH,
            scheme: "http",
            request: HeaderMap::new(),
            response: HeaderMap::new(),
            trailers: HeaderMap::new(),
            cluster: String::new(),
            upstream: None,
            attempts: 0,
            labels: [None, None],
        }
    }
}

/// A request that has ended.
#[derive(Debug, Clone, Copy)]
pub struct Ended<'a> {
    /// Of the connection.
    pub record: &'a AccessRecord,
    /// Of the request.
    pub request: &'a RequestRecord,
    /// The rest.
    pub kept: &'a Kept,
}

impl Facts for Ended<'_> {
    fn started(&self) -> SystemTime {
        self.kept.started
    }

    fn field(&self, field: Field) -> Fact<'_> {
        let Self { record, request, kept } = self;
        let text = |text: String| Fact::Text(text.into());
        let some = |value: Option<String>| value.map_or(Fact::Absent, text);
        let connection = record.connection.as_ref();
        match field {
            Field::BytesReceived => Fact::Number(record.received),
            Field::BytesSent => Fact::Number(record.sent),
            Field::ConnectionTerminationDetails | Field::RequestedServerName => Fact::Absent,
            Field::DownstreamDirectRemoteAddress | Field::DownstreamRemoteAddress => {
                text(record.source.to_string())
            }
            Field::DownstreamDirectRemoteIp | Field::DownstreamRemoteIp => {
                text(record.source.ip().to_string())
            }
            Field::DownstreamRemotePort => Fact::Number(record.source.port().into()),
            Field::DownstreamLocalAddress => text(record.destination.to_string()),
            Field::DownstreamLocalIp => text(record.destination.ip().to_string()),
            Field::DownstreamLocalPort => Fact::Number(record.destination.port().into()),
            Field::DownstreamLocalUriSan => Fact::Absent,
            Field::DownstreamPeerUriSan => {
                some(connection.and_then(|c| c.source_identity.as_ref()).map(ToString::to_string))
            }
            Field::UpstreamPeerUriSan => {
                some(connection.and_then(|c| c.destination_principal()).map(ToString::to_string))
            }
            Field::Duration => Fact::Number(millis(record.duration)),
            Field::GrpcStatusNumber => {
                request.grpc_status.map_or(Fact::Absent, |status| Fact::Number(status.into()))
            }
            Field::Hostname => some(std::env::var("HOSTNAME").ok().filter(|name| !name.is_empty())),
            Field::Protocol => request.protocol.into(),
            Field::ResponseCode => Fact::Number(request.code.into()),
            Field::ResponseCodeDetails => request.details.as_str().into(),
            Field::ResponseFlags => text(request.flags.to_string()),
            Field::RouteName if request.route.is_empty() => "default".into(),
            Field::RouteName => request.route.as_str().into(),
            Field::TraceId => some(request.trace.map(|trace| format!("{trace:032x}"))),
            Field::UpstreamCluster | Field::UpstreamClusterRaw => kept.cluster.as_str().into(),
            Field::UpstreamHost => some(kept.upstream.map(|address| address.to_string())),
            Field::UpstreamRequestAttemptCount => Fact::Number(kept.attempts.into()),
            Field::UpstreamTransportFailureReason => request.upstream_failure.as_str().into(),
        }
    }

    fn header(&self, part: Part, name: &str) -> Option<Cow<'_, str>> {
        let headers = match part {
            Part::Request => match name {
                ":method" => return Some(self.request.method.as_str().into()),
                ":path" => return Some(self.request.path.as_str().into()),
                ":authority" | "host" => return Some(self.request.authority.as_str().into()),
                ":scheme" => return Some(self.kept.scheme.into()),
                // One may have been made here.
                "x-request-id" => return Some(self.request.request_id.as_str().into()),
                _ => &self.kept.request,
            },
            Part::Response if name == ":status" => return Some(self.request.code.to_string().into()),
            Part::Response => &self.kept.response,
            Part::Trailers => &self.kept.trailers,
        };
        header(headers, name)
    }
}

/// All values of a header, comma-separated.
fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<Cow<'a, str>> {
    let mut values = headers.get_all(name).iter().map(|value| String::from_utf8_lossy(value.as_bytes()));
    let first = values.next()?;
    Some(values.fold(first, |text, next| Cow::Owned(format!("{text},{next}"))))
}

fn millis(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Members of an attribute; those without a value are left out.
#[derive(Default)]
struct Members(Vec<(String, Attribute)>);

impl Members {
    fn text(&mut self, name: &str, text: &str) {
        if !text.is_empty() {
            self.0.push((name.to_owned(), Attribute::Text(text.to_owned())));
        }
    }

    fn number(&mut self, name: &str, number: impl TryInto<i64>) {
        let number = number.try_into().unwrap_or(i64::MAX);
        self.0.push((name.to_owned(), Attribute::Number(number)));
    }

    fn headers(&mut self, name: &str, headers: &HeaderMap) {
        let mut members = Self::default();
        for key in headers.keys() {
            if let Some(value) = header(headers, key.as_str()) {
                members.0.push((key.as_str().to_owned(), Attribute::Text(value.into_owned())));
            }
        }
        self.map(name, members);
    }

    fn map(&mut self, name: &str, members: Self) {
        self.0.push((name.to_owned(), Attribute::Map(members.0)));
    }
}

impl Ended<'_> {
    /// The attributes of one of [`mesh_core::expression::ROOTS`] (Envoy's "Attributes").
    #[must_use]
    pub fn attributes(&self, root: &str) -> Attribute {
        let Self { record, request, kept } = self;
        let mut out = Members::default();
        match root {
            "request" => self.of_request(&mut out),
            "response" => {
                // Without an answer there is no code, not even 0.
                if request.code != 0 {
                    out.number("code", request.code);
                }
                out.text("code_details", &request.details);
                out.number("flags", 0_i64);
                if let Some(status) = request.grpc_status {
                    out.number("grpc_status", status);
                }
                out.headers("headers", &kept.response);
                out.headers("trailers", &kept.trailers);
                out.number("size", record.sent);
                out.number("total_size", record.sent);
            }
            "source" => address(&mut out, record.source),
            "destination" => address(&mut out, record.destination),
            "upstream" => {
                if let Some(upstream) = kept.upstream {
                    address(&mut out, upstream);
                }
                out.text("transport_failure_reason", &request.upstream_failure);
                out.number("request_attempt_count", kept.attempts);
            }
            "connection" => {
                let tls = record.connection.as_ref().is_some_and(|c| c.security == SecurityPolicy::MutualTls);
                out.0.push(("mtls".to_owned(), Attribute::Flag(tls)));
                let peer = record.connection.as_ref().and_then(|c| c.source_identity.as_ref());
                out.text("uri_san_peer_certificate", &peer.map_or_else(String::new, ToString::to_string));
            }
            "xds" => {
                out.text("cluster_name", &kept.cluster);
                out.text("route_name", if request.route.is_empty() { "default" } else { &request.route });
            }
            _ => {
                if let Some(connection) = &record.connection {
                    peer(&mut out, "downstream_peer", &connection.source, kept.labels[0].as_deref());
                    peer(&mut out, "upstream_peer", &connection.destination, kept.labels[1].as_deref());
                }
            }
        }
        Attribute::Map(out.0)
    }

    fn of_request(&self, out: &mut Members) {
        let Self { record, request, kept } = self;
        let (url_path, query) = request.path.split_once('?').unwrap_or((&request.path, ""));
        out.text("path", &request.path);
        out.text("url_path", url_path);
        out.text("query", query);
        out.text("host", &request.authority);
        out.text("scheme", kept.scheme);
        out.text("method", &request.method);
        out.text("protocol", request.protocol);
        out.text("id", &request.request_id);
        out.text("useragent", &request.user_agent);
        out.text("referer", &header(&kept.request, "referer").unwrap_or_default());
        out.headers("headers", &kept.request);
        out.number("size", record.received);
        out.number("total_size", record.received);
    }
}

fn address(out: &mut Members, address: SocketAddr) {
    out.text("address", &address.to_string());
    out.number("port", address.port());
}

/// What Istio's peer metadata says of one side.
fn peer(out: &mut Members, name: &str, peer: &Peer, labels: Option<&crate::config::Labels>) {
    let Peer::Workload(workload) = peer else { return };
    let Workload { name: instance, namespace, canonical_name, canonical_revision, .. } = &**workload;
    let mut members = Members::default();
    members.text("workload", &workload.workload_name);
    members.text("namespace", namespace);
    members.text("name", instance);
    members.text("cluster", &workload.cluster_id);
    members.text("service", canonical_name);
    members.text("revision", canonical_revision);
    members.text("app", canonical_name);
    members.text("version", canonical_revision);
    members.text("type", workload.workload_type.as_str());
    let mut own = Members::default();
    labels.into_iter().flatten().for_each(|(key, value)| own.text(key, value));
    members.map("labels", own);
    out.map(name, members);
}
