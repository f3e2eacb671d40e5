//! Builders for rules and requests, and what holds for whole sets of routes.

mod actions;
mod headers;
mod invariants;
mod matches;
mod precedence;
mod rewrites;
mod sharing;

use std::collections::BTreeMap;
use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue, Method};
use mesh_core::identity::SpiffeId;
use mesh_core::state::{MeshOptions, MeshState, Service, StateIndex};
use mesh_core::xds::proto::{l7, workload as wire};
use serde_json::{Map, Value};

use super::{Action, Matched, Routed, Routes};
use crate::config::{Labels, Own, Resources};
use crate::request::{Addressed, Head, Source};

const REVIEWS: &str = "reviews.shop.svc.cluster.local";

fn service(namespace: &str, hostname: &str) -> Service {
    let port = |service_port| wire::Port { service_port, target_port: service_port, app_protocol: 0 };
    let name = hostname.split('.').next().unwrap_or_default();
    Service::decode(&wire::Service {
        name: name.to_owned(),
        namespace: namespace.to_owned(),
        hostname: hostname.to_owned(),
        ports: vec![port(80), port(9080)],
        ..wire::Service::default()
    })
    .unwrap()
}

/// `reviews` and `details` of namespace `shop`.
fn mesh() -> MeshState {
    mesh_of([("shop", REVIEWS), ("shop", "details.shop.svc.cluster.local")])
}

fn mesh_of<'a>(services: impl IntoIterator<Item = (&'a str, &'a str)>) -> MeshState {
    let mut index = StateIndex::new(MeshOptions::default());
    for (namespace, hostname) in services {
        index.insert_service(service(namespace, hostname));
    }
    index.state().clone()
}

fn own() -> Own {
    Own { namespace: "mesh".into(), ..Own::default() }
}

fn resources(routes: impl IntoIterator<Item = l7::Route>) -> Resources {
    let named = |route: l7::Route| {
        let origin = route.origin.clone().unwrap_or_default();
        (format!("{}/{}/{}", origin.kind, origin.namespace, origin.name), route.into())
    };
    Resources { routes: routes.into_iter().map(named).collect(), ..Resources::default() }
}

fn build(routes: impl IntoIterator<Item = l7::Route>) -> Routes {
    Routes::build(&resources(routes), &mesh(), &own(), &Routes::default())
}

/// A route of namespace `shop` for `reviews`.
fn route(kind: &str, name: &str, http: impl IntoIterator<Item = l7::HttpRule>) -> l7::Route {
    l7::Route {
        origin: Some(l7::Origin {
            kind: kind.to_owned(),
            namespace: "shop".to_owned(),
            name: name.to_owned(),
            created: 0,
        }),
        parents: vec![parent("shop", REVIEWS, 0)],
        http: http.into_iter().collect(),
        ..l7::Route::default()
    }
}

fn parent(namespace: &str, hostname: &str, port: u32) -> l7::ServiceRef {
    l7::ServiceRef { namespace: namespace.to_owned(), hostname: hostname.to_owned(), port }
}

/// A rule that forwards to `reviews`.
fn rule(name: &str, matches: impl IntoIterator<Item = l7::HttpMatch>) -> l7::HttpRule {
    l7::HttpRule {
        name: name.to_owned(),
        matches: matches.into_iter().collect(),
        action: Some(l7::http_rule::Action::Forward(l7::Forward { backends: vec![backend(REVIEWS, 1)] })),
        ..l7::HttpRule::default()
    }
}

fn backend(hostname: &str, weight: u32) -> l7::WeightedBackend {
    l7::WeightedBackend {
        backend: Some(l7::Backend {
            service: Some(parent("shop", hostname, 9080)),
            ..l7::Backend::default()
        }),
        weight,
        ..l7::WeightedBackend::default()
    }
}

/// A match of the path: `=/exact`, `/prefix*`, `/segments`, `~regex`; `i` in front ignores the case.
fn path(text: &str) -> l7::HttpMatch {
    l7::HttpMatch { path: Some(path_match(text)), ..l7::HttpMatch::default() }
}

fn path_match(text: &str) -> l7::PathMatch {
    use l7::path_match::Kind;
    let (ignore_case, text) = text.strip_prefix('i').map_or((false, text), |rest| (true, rest));
    let kind = match (text.strip_prefix('='), text.strip_suffix('*'), text.strip_prefix('~')) {
        (Some(exact), ..) => Kind::Exact(exact.to_owned()),
        (_, _, Some(regex)) => Kind::Regex(regex.to_owned()),
        (_, Some(prefix), _) => Kind::Prefix(prefix.to_owned()),
        _ => Kind::Segments(text.to_owned()),
    };
    l7::PathMatch { kind: Some(kind), ignore_case }
}

/// A test of a value: `=exact`, `prefix*`, `*suffix`, `~regex`, `*` for present; `i` in front ignores the case.
fn value(text: &str) -> l7::StringMatch {
    use l7::string_match::Kind;
    let (ignore_case, text) = text.strip_prefix('i').map_or((false, text), |rest| (true, rest));
    let kind = if text == "*" {
        Kind::Present(true)
    } else if let Some(exact) = text.strip_prefix('=') {
        Kind::Exact(exact.to_owned())
    } else if let Some(regex) = text.strip_prefix('~') {
        Kind::Regex(regex.to_owned())
    } else if let Some(prefix) = text.strip_suffix('*') {
        Kind::Prefix(prefix.to_owned())
    } else {
        Kind::Suffix(text.trim_start_matches('*').to_owned())
    };
    l7::StringMatch { kind: Some(kind), ignore_case }
}

fn header(name: &str, test: &str) -> l7::HeaderMatch {
    let (invert, test) = test.strip_prefix('!').map_or((false, test), |rest| (true, rest));
    l7::HeaderMatch { name: name.to_owned(), value: Some(value(test)), invert, claim: Vec::new() }
}

fn headers(list: &[(&str, &str)]) -> l7::HttpMatch {
    l7::HttpMatch {
        headers: list.iter().map(|(name, test)| header(name, test)).collect(),
        ..l7::HttpMatch::default()
    }
}

fn query(list: &[(&str, &str)]) -> l7::HttpMatch {
    let one =
        |(name, test): &(&str, &str)| l7::QueryMatch { name: (*name).to_owned(), value: Some(value(test)) };
    l7::HttpMatch { query: list.iter().map(one).collect(), ..l7::HttpMatch::default() }
}

/// A request with everything that rules look at.
#[derive(Debug, Clone)]
struct Request {
    method: Method,
    scheme: &'static str,
    authority: String,
    path: String,
    query: Option<String>,
    headers: HeaderMap,
    claims: Option<Map<String, Value>>,
    source: Source,
    addressed: Addressed,
}

fn get(path: &str) -> Request {
    let (path, query) = path.split_once('?').map_or((path, None), |(p, q)| (p, Some(q.to_owned())));
    Request {
        method: Method::GET,
        scheme: "http",
        authority: "reviews:9080".to_owned(),
        path: path.to_owned(),
        query,
        headers: HeaderMap::new(),
        claims: None,
        source: Source {
            address: "10.0.0.9:40000".parse().unwrap(),
            identity: None,
            workload: None,
            labels: None,
        },
        addressed: Addressed::Service { key: format!("shop/{REVIEWS}").into(), port: 9080 },
    }
}

impl Request {
    fn with(mut self, name: &str, value: &str) -> Self {
        let name: HeaderName = name.parse().unwrap();
        self.headers.append(name, HeaderValue::from_str(value).unwrap());
        self
    }

    fn method(self, method: Method) -> Self {
        Self { method, ..self }
    }

    fn authority(self, authority: &str) -> Self {
        Self { authority: authority.to_owned(), ..self }
    }

    fn scheme(self, scheme: &'static str) -> Self {
        Self { scheme, ..self }
    }

    fn to(self, namespace: &str, hostname: &str, port: u16) -> Self {
        let key = format!("{namespace}/{hostname}").into();
        Self { addressed: Addressed::Service { key, port }, ..self }
    }

    /// To a listener of a gateway, for a host.
    fn outside(self, port: u16, host: &str) -> Self {
        Self { addressed: Addressed::Gateway { port }, authority: host.to_owned(), ..self }
    }

    fn claims(self, claims: &str) -> Self {
        Self { claims: Some(serde_json::from_str(claims).unwrap()), ..self }
    }

    /// From a workload of that namespace with these labels.
    fn from(mut self, namespace: &str, labels: &[(&str, &str)]) -> Self {
        self.source.identity = Some(SpiffeId::new("cluster.local", namespace, "default"));
        let labels: Labels =
            labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<BTreeMap<_, _>>();
        self.source.labels = Some(Arc::new(labels));
        self
    }

    fn head(&self) -> Head<'_> {
        Head {
            source: &self.source,
            destination: "10.1.0.1:9080".parse().unwrap(),
            addressed: &self.addressed,
            method: &self.method,
            scheme: self.scheme,
            authority: &self.authority,
            path: &self.path,
            query: self.query.as_deref(),
            headers: &self.headers,
            claims: self.claims.as_ref(),
        }
    }
}

/// Name of the rule, `default` or `404`.
fn routed(routes: &Routes, request: &Request) -> String {
    match routes.http(&request.head()) {
        Routed::Rule(matched) => matched.rule.name.to_string(),
        Routed::Default => "default".to_owned(),
        Routed::NotFound => "404".to_owned(),
    }
}

fn matched<'a>(routes: &'a Routes, request: &Request) -> Matched<'a> {
    match routes.http(&request.head()) {
        Routed::Rule(matched) => matched,
        other => panic!("{other:?}"),
    }
}

/// The one rule of a VirtualService, for `GET /`.
fn compiled(rule: l7::HttpRule) -> Arc<super::Rule> {
    let routes = build([route("VirtualService", "v", [rule])]);
    matched(&routes, &get("/")).rule.clone()
}

/// The reason of a rule that answers 500.
fn invalid(rule: &super::Rule) -> &str {
    match &rule.action {
        Action::Invalid(reason) => reason,
        other => panic!("{other:?}"),
    }
}
