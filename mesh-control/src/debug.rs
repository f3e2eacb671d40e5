//! 15014: metrics, readiness, and what this process knows, as JSON for `meshctl` and people.

use std::convert::Infallible;
use std::sync::Arc;

use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use mesh_core::admin::slots::{CONNECTION_TIMEOUT, HEAD_TIMEOUT, Slots};
use serde::Serialize;
use serde_json::{Map, Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tracing::{debug, warn};

pub(crate) mod wire;

use crate::ads::{ClientStatus, Clients, TypeStatus};
use crate::enrol::Enrolments;
use crate::hub::Hub;
use crate::metrics::Metrics;
use crate::model::Kind;
use crate::relay::gate::Origin;
use crate::relay::web::{self, Web};

/// What the endpoints read.
#[derive(Debug, Clone)]
pub struct Debug {
    /// Objects and snapshots.
    pub hub: Arc<Hub>,
    /// xDS clients.
    pub clients: Arc<Clients>,
    /// Reports of nodes.
    pub enrolments: Arc<Enrolments>,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// Events of all nodes, for who is on this machine.
    pub web: Web,
}

const INDEX: &str = "\
/ready              200 once the source has been read; before that, what is missing and why
/metrics            Prometheus text
/version            version
/debug/syncz        xDS clients and how far each is
/debug/config_dump  workloads, services and policies as they are pushed
/debug/conditions   what there is to say about objects (status conditions)
/debug/errors       what is wrong in the source: file, line, field, fix
/debug/objects      objects in force
/debug/nodes        nodes, their pods, and what they report as captured
";

impl Debug {
    /// Answers on a listener until `stop` says so. A connection carries one request; how many there are at once and how
    /// long each lasts is bounded ([`mesh_core::admin::slots`]).
    pub async fn serve(self, listener: TcpListener, mut stop: watch::Receiver<bool>) {
        let slots = Slots::default();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = stop.wait_for(|s| *s) => return,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    warn!(%error, "debug listener");
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                    continue;
                }
            };
            let Some(slot) = slots.take(Some(peer.ip())) else {
                debug!(%peer, "debug connection closed: too many are open");
                continue;
            };
            let debug = self.clone();
            tokio::spawn(async move {
                let _slot = slot;
                let service = service_fn(move |request| {
                    let debug = debug.clone();
                    async move { Ok::<_, Infallible>(debug.answer(request, Origin::of(peer.ip())).await) }
                });
                let mut http = hyper::server::conn::http1::Builder::new();
                http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).keep_alive(false);
                let served = http.serve_connection(TokioIo::new(stream), service);
                match tokio::time::timeout(CONNECTION_TIMEOUT, served).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => debug!(%error, "debug connection"),
                    Err(_) => debug!("debug connection closed: it took too long"),
                }
            });
        }
    }

    async fn answer(&self, request: Request<Incoming>, origin: Origin) -> Response<Full<Bytes>> {
        if request.method() != Method::GET && request.method() != Method::HEAD {
            return text(StatusCode::METHOD_NOT_ALLOWED, "only GET is answered\n");
        }
        if web::is_path(request.uri().path()) {
            return self.web.answer(&request.into_parts().0, origin).await;
        }
        self.get(request.uri().path())
    }

    /// Why nobody is served yet.
    fn unready(&self) -> String {
        let waiting = &self.hub.published().source.waiting;
        waiting.iter().fold("the source has not been read yet\n".to_owned(), |text, line| text + line + "\n")
    }

    /// The answer to GET `path`.
    #[must_use]
    pub fn get(&self, path: &str) -> Response<Full<Bytes>> {
        match path {
            "/" | "/debug" | "/debug/" => text(StatusCode::OK, &format!("{INDEX}{}", web::INDEX)),
            "/ready" if self.hub.reachable() => text(StatusCode::OK, "ready\n"),
            "/ready" => text(StatusCode::SERVICE_UNAVAILABLE, &self.unready()),
            "/metrics" => match self.metrics.text() {
                Ok(body) => {
                    typed(StatusCode::OK, "application/openmetrics-text; version=1.0.0; charset=utf-8", body)
                }
                Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error}\n")),
            },
            "/version" => answer(&json!({"name": "mesh-control", "version": env!("CARGO_PKG_VERSION")})),
            "/debug/syncz" => answer(&self.clients.list().iter().map(syncz).collect::<Vec<_>>()),
            "/debug/config_dump" => answer(&wire::config_dump(&self.hub.snapshot())),
            "/debug/conditions" => answer(&self.hub.published().conditions),
            "/debug/errors" => answer(&self.hub.published().source.problems),
            "/debug/objects" => answer(&self.objects()),
            "/debug/nodes" => answer(&self.nodes()),
            _ => text(StatusCode::NOT_FOUND, &format!("{path} is unknown; there are\n{INDEX}{}", web::INDEX)),
        }
    }

    fn objects(&self) -> Value {
        let published = self.hub.published();
        let o = published.objects();
        let keys = |keys: Vec<String>| keys;
        let routes = |kind| o.routes.keys().filter(move |r| r.kind == kind).map(|r| r.key.to_string());
        let routes = |kind| keys(routes(kind).collect());
        json!({
            "counts": o.counts(),
            "mesh": {
                "trustDomain": published.mesh.trust_domain,
                "trustDomainAliases": published.mesh.trust_domain_aliases,
                "rootNamespace": published.mesh.root_namespace,
                "clusterId": published.mesh.cluster_id,
                "undermesh": published.mesh.undermesh,
            },
            "Namespace": o.namespaces.keys().collect::<Vec<_>>(),
            "Node": o.nodes.keys().collect::<Vec<_>>(),
            "ServiceAccount": keys(o.service_accounts.keys().map(ToString::to_string).collect()),
            "Pod": keys(o.pods.keys().map(ToString::to_string).collect()),
            "Service": keys(o.services.keys().map(ToString::to_string).collect()),
            "EndpointSlice": keys(o.endpoint_slices.keys().map(ToString::to_string).collect()),
            "Secret": keys(o.credentials.keys().map(ToString::to_string).collect()),
            "PeerAuthentication": keys(o.peer_authentications.keys().map(ToString::to_string).collect()),
            "AuthorizationPolicy": keys(o.authorization_policies.keys().map(ToString::to_string).collect()),
            "ServiceEntry": keys(o.service_entries.keys().map(ToString::to_string).collect()),
            "WorkloadEntry": keys(o.workload_entries.keys().map(ToString::to_string).collect()),
            "GatewayClass": o.gateway_classes.keys().collect::<Vec<_>>(),
            "Gateway": keys(o.gateways.keys().map(ToString::to_string).collect()),
            "Gateway.networking.istio.io": keys(o.istio_gateways.keys().map(ToString::to_string).collect()),
            "VirtualService": keys(o.virtual_services.keys().map(ToString::to_string).collect()),
            "DestinationRule": keys(o.destination_rules.keys().map(ToString::to_string).collect()),
            "HTTPRoute": routes(Kind::HTTPRoute),
            "GRPCRoute": routes(Kind::GRPCRoute),
            "TCPRoute": routes(Kind::TCPRoute),
            "TLSRoute": routes(Kind::TLSRoute),
            "ReferenceGrant": keys(o.reference_grants.keys().map(ToString::to_string).collect()),
            "RequestAuthentication": keys(o.request_authentications.keys().map(ToString::to_string).collect()),
            "Telemetry": keys(o.telemetries.keys().map(ToString::to_string).collect()),
        })
    }

    fn nodes(&self) -> Value {
        let published = self.hub.published();
        let reports = self.enrolments.reports();
        let connected: Vec<String> = self.clients.list().into_iter().map(|c| c.node).collect();
        let mut names: std::collections::BTreeSet<&str> = reports.keys().map(String::as_str).collect();
        names.extend(published.objects().nodes.keys().map(String::as_str));
        names.extend(published.objects().pods.values().map(|p| p.node.as_str()).filter(|n| !n.is_empty()));
        let node = |name: &str| {
            let report = reports.get(name).cloned().unwrap_or_default();
            let pods: Vec<String> = published
                .objects()
                .pods
                .values()
                .filter(|p| p.node == name)
                .map(|p| p.meta.key().to_string())
                .collect();
            json!({
                "name": name,
                "connected": connected.iter().any(|c| c == name),
                "pods": pods,
                "captured": report.captured,
                "problems": report.problems,
            })
        };
        Value::Array(names.into_iter().map(node).collect())
    }
}

/// A client as tools of Istio read it (`cluster_id`, `proxy`, `proxy_type`, `resources` by type URL), with what ours
/// shows beside that.
fn syncz(client: &ClientStatus) -> Value {
    // Ids are `<type>~<ip>~<pod>.<namespace>~<domain>`.
    let mut parts = client.id.split('~');
    let (kind, proxy) = (parts.next().unwrap_or_default(), parts.nth(1).unwrap_or(&client.id));
    let resource = |status: &TypeStatus| {
        json!({
            "sent": status.sent,
            "acked": status.acked,
            "sentTime": status.sent_at.map(|at| humantime::format_rfc3339_seconds(at).to_string()),
            "lastError": status.last_reject,
        })
    };
    let sent = client.types.values().filter(|status| !status.url.is_empty());
    let resources: Map<String, Value> = sent.map(|s| (s.url.to_owned(), resource(s))).collect();
    let istio = json!({
        "cluster_id": client.cluster, "proxy": proxy, "proxy_type": kind, "resources": resources,
    });
    let mut entry = Map::new();
    for part in [serde_json::to_value(client).unwrap_or_default(), istio] {
        entry.extend(part.as_object().cloned().unwrap_or_default());
    }
    Value::Object(entry)
}

fn answer<T: Serialize>(value: &T) -> Response<Full<Bytes>> {
    match serde_json::to_string_pretty(value) {
        Ok(body) => typed(StatusCode::OK, "application/json", body + "\n"),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error}\n")),
    }
}

fn text(status: StatusCode, body: &str) -> Response<Full<Bytes>> {
    typed(status, "text/plain; charset=utf-8", body.to_owned())
}

fn typed(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}
