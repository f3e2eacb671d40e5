//! A request's place in its trace, and the spans that it leaves: one for the request as it came, one for each try.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use http::HeaderMap;
use mesh_core::state::Workload;
use mesh_core::telemetry::Peer;

use super::context::{self, Context, Formats};
use super::export::Outbox;
use super::span::Span;
use crate::observe::facts::Ended;
use crate::observe::tracing::Tracing;

/// `tracestate` that goes into spans, bytes (the limit that the W3C asks proxies to keep).
const LONGEST_STATE: usize = 512;

/// A request's trace.
#[derive(Debug)]
pub struct Trace {
    settings: Arc<Tracing>,
    context: Context,
    formats: Formats,
    state: String,
    started: SystemTime,
    /// None unless spans are recorded.
    tries: Vec<Try>,
}

/// One try.
#[derive(Debug)]
struct Try {
    context: Context,
    address: SocketAddr,
    started: SystemTime,
    ended: Option<SystemTime>,
    code: Option<u16>,
}

/// What an endpoint is told.
#[derive(Debug, Clone, Copy)]
pub struct Told {
    context: Context,
    formats: Formats,
}

impl Told {
    /// Writes it.
    pub fn inject(&self, headers: &mut HeaderMap) {
        context::inject(headers, &self.context, self.formats);
    }
}

/// Who the spans are of, beside their service: the same for all requests.
#[derive(Debug, Clone, Default)]
pub struct Proxy {
    /// As the control plane names it: `waypoint~<ip>~<pod>.<namespace>~<domain>`.
    pub node_id: String,
    /// The mesh's id.
    pub mesh: String,
    /// The cluster's id.
    pub cluster: String,
    /// Where it runs.
    pub zone: String,
    /// Its namespace and name, where it speaks for itself (a gateway).
    pub own: Option<[String; 2]>,
}

impl Trace {
    /// Continues the trace that the headers tell of, or begins one; `chance` is from 0 to 1.
    #[must_use]
    pub fn begin(settings: &Arc<Tracing>, headers: &HeaderMap, chance: f64) -> Self {
        let incoming = context::extract(headers);
        let said = incoming.and_then(|incoming| incoming.sampled);
        let sampled = said.unwrap_or(chance * 100.0 < settings.sampling);
        let ids = incoming.and_then(|incoming| incoming.ids);
        let (trace, parent) =
            ids.map_or_else(|| (fastrand::u128(1..), None), |(trace, span)| (trace, Some(span)));
        let came = incoming.map(|incoming| incoming.formats).unwrap_or_default();
        let debug = incoming.is_some_and(|incoming| incoming.debug);
        let records = sampled && settings.report;
        Self {
            settings: Arc::clone(settings),
            context: Context { trace, span: fastrand::u64(1..), parent, sampled, debug },
            formats: settings.formats.with(came),
            state: if records && came.w3c { state(headers) } else { String::new() },
            started: SystemTime::now(),
            tries: Vec::new(),
        }
    }

    /// Of the trace.
    #[must_use]
    pub const fn id(&self) -> u128 {
        self.context.trace
    }

    /// Whether there will be spans.
    #[must_use]
    pub fn records(&self) -> bool {
        self.context.sampled && self.settings.report
    }

    /// A try begins: what its endpoint is told.
    pub fn attempt(&mut self, address: SocketAddr) -> Option<Told> {
        let span = fastrand::u64(1..);
        let context = Context { span, parent: Some(self.context.span), ..self.context };
        if self.records() {
            self.tries.push(Try { context, address, started: SystemTime::now(), ended: None, code: None });
        }
        self.settings.propagate.then_some(Told { context, formats: self.formats })
    }

    /// The head of its answer came, or none will; `over`: there will be no more of it.
    pub fn attempted(&mut self, code: Option<u16>, over: bool) {
        if let Some(last) = self.tries.last_mut() {
            last.code = code;
            last.ended = over.then(SystemTime::now);
        }
    }

    /// Hands the spans over. `headers` are the request's as it came, `name` says what was asked.
    pub fn finish(self, ended: &Ended<'_>, name: &str, proxy: &Proxy, outbox: &Outbox) {
        if !self.records() {
            return;
        }
        let now = SystemTime::now();
        let request = ended.request;
        let longest = self.settings.longest_tag();
        let failed = request.code >= 500 || request.code == 0 || request.grpc_status.is_some_and(is_failure);
        let common = self.common_tags(ended, proxy, longest);
        for attempt in &self.tries {
            let mut tags = common.clone();
            let code = attempt.code.unwrap_or(0);
            tags.push(("upstream_address".into(), attempt.address.to_string()));
            tags.push(("peer.address".into(), attempt.address.to_string()));
            tags.push(("http.status_code".into(), code.to_string()));
            let error = code >= 500 || code == 0;
            if error {
                tags.push(("error".into(), "true".into()));
            }
            let mut span = Span {
                place: attempt.context.into(),
                state: self.state.clone(),
                name: format!("router {} egress", ended.kept.cluster),
                start: attempt.started,
                end: attempt.ended.unwrap_or(now),
                client: true,
                error,
                peer: attempt.address,
                tags,
            };
            span.cut_tags(longest);
            outbox.push(&self.settings.tracer, span);
        }
        let mut tags = common;
        tags.extend(self.server_tags(ended, proxy, failed));
        let mut span = Span {
            place: self.context.into(),
            state: self.state,
            name: name.to_owned(),
            start: self.started,
            end: now,
            client: false,
            error: failed,
            peer: ended.record.source,
            tags,
        };
        span.cut_tags(longest);
        outbox.push(&self.settings.tracer, span);
    }

    /// What both kinds of spans have, by Envoy's names.
    fn common_tags(&self, ended: &Ended<'_>, proxy: &Proxy, longest: usize) -> Vec<(String, String)> {
        let (request, kept) = (ended.request, ended.kept);
        let mut path = request.path.clone();
        if path.len() > longest {
            path.truncate((0..=longest).rev().find(|at| path.is_char_boundary(*at)).unwrap_or(0));
        }
        let url = format!("{}://{}{path}", kept.scheme, request.authority);
        let tags = [
            ("component", "proxy"),
            ("node_id", &proxy.node_id),
            ("zone", &proxy.zone),
            ("guid:x-request-id", &request.request_id),
            ("http.method", &request.method),
            ("http.url", &url),
            ("http.protocol", request.protocol),
            ("upstream_cluster", &kept.cluster),
            ("upstream_cluster.name", &kept.cluster),
            ("downstream_cluster", "-"),
            ("user_agent", &request.user_agent),
        ];
        let set = tags.into_iter().filter(|(_, value)| !value.is_empty());
        set.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    /// What only the request's own span has.
    fn server_tags(&self, ended: &Ended<'_>, proxy: &Proxy, failed: bool) -> Vec<(String, String)> {
        let (record, request) = (ended.record, ended.request);
        let mut tags: Vec<(String, String)> = vec![
            ("peer.address".into(), record.source.ip().to_string()),
            ("http.status_code".into(), request.code.to_string()),
            ("request_size".into(), record.received.to_string()),
            ("response_size".into(), record.sent.to_string()),
            ("response_flags".into(), request.flags.to_string()),
        ];
        if let Some(status) = request.grpc_status {
            tags.push(("grpc.path".into(), request.path.clone()));
            tags.push(("grpc.authority".into(), request.authority.clone()));
            tags.push(("grpc.status_code".into(), status.to_string()));
        }
        if failed {
            tags.push(("error".into(), "true".into()));
        }
        if self.settings.istio_tags {
            istio_tags(ended, proxy, &mut tags);
        }
        for tag in &self.settings.tags {
            if let Some(value) = tag.value(&ended.kept.request, ended) {
                tags.push((tag.name.clone(), value));
            }
        }
        tags
    }
}

/// gRPC statuses that are the server's fault (Envoy's choice).
const fn is_failure(status: u16) -> bool {
    matches!(status, 2 | 4 | 12 | 13 | 14 | 15)
}

fn state(headers: &HeaderMap) -> String {
    let lines = headers.get_all("tracestate").iter().filter_map(|value| value.to_str().ok());
    let state = lines.collect::<Vec<_>>().join(",");
    if state.len() > LONGEST_STATE { String::new() } else { state }
}

/// Who talks to whom; a gateway, of which nothing is behind, says who it is itself.
fn istio_tags(ended: &Ended<'_>, proxy: &Proxy, tags: &mut Vec<(String, String)>) {
    tags.push(("istio.mesh_id".into(), proxy.mesh.clone()));
    tags.push(("istio.cluster_id".into(), proxy.cluster.clone()));
    if let Some([namespace, name]) = &proxy.own {
        tags.push(("istio.namespace".into(), namespace.clone()));
        tags.push(("istio.canonical_service".into(), name.clone()));
        tags.push(("istio.canonical_revision".into(), "latest".into()));
        return;
    }
    if let Some(connection) = &ended.record.connection {
        peer_tags("source", &connection.source, tags);
        peer_tags("destination", &connection.destination, tags);
    }
}

/// Istio's tags of one side.
fn peer_tags(side: &str, peer: &Peer, tags: &mut Vec<(String, String)>) {
    let Peer::Workload(workload) = peer else { return };
    let Workload { name, namespace, canonical_name, canonical_revision, cluster_id, .. } = &**workload;
    for (tag, value) in [
        ("workload", &*workload.workload_name),
        ("namespace", namespace),
        ("cluster_id", cluster_id),
        ("canonical_service", canonical_name),
        ("canonical_revision", canonical_revision),
        ("app", canonical_name),
        ("app_version", canonical_revision),
        ("workload_type", workload.workload_type.as_str()),
        ("instance_name", name),
    ] {
        if !value.is_empty() {
            tags.push((format!("istio.{side}_{tag}"), value.to_owned()));
        }
    }
}
