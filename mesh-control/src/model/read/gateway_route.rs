//! Readers of HTTPRoute, GRPCRoute, TCPRoute, TLSRoute and ReferenceGrant (Gateway API v1).

use std::sync::Arc;

use mesh_core::xds::proto::l7;
use mesh_core::xds::proto::l7::http_rule::Action;
use mesh_core::xds::proto::l7::path_match::Kind as Path;
use mesh_core::xds::proto::l7::string_match::Kind as Value;
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::super::l7::{GatewayBackend, GatewayHttp, GatewayRoute, GatewayTcp, Reference, ReferenceGrant};
use super::super::{Kind, Object};
use super::gateway_filters::{FilterText, Filters, filters};
use super::istio::Resource;
use super::{Check, Document, FieldError, meta, shape};

const GATEWAY_GROUP: &str = "gateway.networking.k8s.io";
/// The API's limit of a weight.
const HEAVIEST: i64 = 1_000_000;
/// Tries beside the first where `retry` gives no number (as Istio has it).
const ATTEMPTS: i64 = 2;
/// What is retried under any `retry`, beside its codes (as Istio has it).
const RETRY_ON: [&str; 4] = ["connect-failure", "refused-stream", "unavailable", "cancelled"];
/// Name of the session where none is given.
const SESSION: &str = "mesh-session";

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ParentText {
    group: Option<String>,
    kind: Option<String>,
    namespace: String,
    name: String,
    section_name: String,
    port: Option<i64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct HttpSpec {
    parent_refs: Vec<ParentText>,
    hostnames: Vec<String>,
    use_default_gateways: Option<IgnoredAny>,
    rules: Option<Vec<HttpRuleText>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct HttpRuleText {
    name: String,
    matches: Vec<HttpMatchText>,
    filters: Vec<FilterText>,
    backend_refs: Vec<BackendText>,
    timeouts: Option<TimeoutsText>,
    retry: Option<RetryText>,
    session_persistence: Option<SessionText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct HttpMatchText {
    path: Option<PathText>,
    headers: Vec<ValueMatchText>,
    query_params: Vec<ValueMatchText>,
    method: Option<String>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize)]
enum PathType {
    #[default]
    PathPrefix,
    Exact,
    RegularExpression,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct PathText {
    #[serde(rename = "type")]
    kind: PathType,
    value: Option<String>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize)]
enum ValueType {
    #[default]
    Exact,
    RegularExpression,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ValueMatchText {
    #[serde(rename = "type")]
    kind: ValueType,
    name: String,
    value: String,
}

/// What names a backend, with or without weight and filters.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct BackendText {
    group: String,
    kind: Option<String>,
    namespace: String,
    name: String,
    port: Option<i64>,
    weight: Option<i64>,
    filters: Vec<FilterText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct TimeoutsText {
    request: Option<String>,
    backend_request: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RetryText {
    codes: Vec<i64>,
    attempts: Option<i64>,
    backoff: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct SessionText {
    session_name: String,
    #[serde(rename = "type")]
    kind: SessionType,
    absolute_timeout: Option<String>,
    idle_timeout: Option<IgnoredAny>,
    cookie_config: Option<CookieText>,
    cookie: Option<CookieText>,
    header: Option<HeaderText>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize)]
enum SessionType {
    #[default]
    Cookie,
    Header,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct CookieText {
    name: String,
    path: String,
    lifetime_type: LifetimeType,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize)]
enum LifetimeType {
    #[default]
    Session,
    Permanent,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct HeaderText {
    name: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct GrpcSpec {
    parent_refs: Vec<ParentText>,
    hostnames: Vec<String>,
    use_default_gateways: Option<IgnoredAny>,
    rules: Option<Vec<GrpcRuleText>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct GrpcRuleText {
    name: String,
    matches: Vec<GrpcMatchText>,
    filters: Vec<FilterText>,
    backend_refs: Vec<BackendText>,
    session_persistence: Option<SessionText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct GrpcMatchText {
    method: Option<MethodText>,
    headers: Vec<ValueMatchText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct MethodText {
    #[serde(rename = "type")]
    kind: ValueType,
    service: String,
    method: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct TcpSpec {
    parent_refs: Vec<ParentText>,
    hostnames: Vec<String>,
    use_default_gateways: Option<IgnoredAny>,
    rules: Vec<TcpRuleText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct TcpRuleText {
    name: String,
    backend_refs: Vec<BackendText>,
}

pub(super) fn http_route(doc: &Document<'_>) -> Result<Object, Vec<FieldError>> {
    let object: Resource<HttpSpec> = shape(doc)?;
    let mut check = Check::new(doc);
    let meta = meta(doc, object.metadata, &mut check);
    let spec = object.spec.unwrap_or_default();
    let mut notes = Notes::new(spec.use_default_gateways.is_some());
    let mut http = Vec::new();
    // The API's default is one rule that matches everything.
    for (i, text) in spec.rules.unwrap_or_else(|| vec![HttpRuleText::default()]).into_iter().enumerate() {
        let field = format!("spec.rules[{i}]");
        let mut matches = Vec::new();
        for (m, text) in text.matches.into_iter().enumerate() {
            matches.push(http_match(text, &format!("{field}.matches[{m}]"), &mut check, &mut notes));
        }
        if matches.is_empty() {
            matches.push(l7::HttpMatch { path: Some(whole_path()), ..l7::HttpMatch::default() });
        }
        let mut rule = l7::HttpRule { name: text.name, matches, ..l7::HttpRule::default() };
        if let Some(retry) = text.retry {
            rule.retry = Some(retries(retry, &format!("{field}.retry"), &mut check));
        }
        timeouts(text.timeouts.unwrap_or_default(), &mut rule, &format!("{field}.timeouts"), &mut check);
        let rest = Rest {
            filters: text.filters,
            backends: text.backend_refs,
            session: text.session_persistence,
            grpc: false,
        };
        http.push(rest.into_rule(rule, &field, &mut check, &mut notes));
    }
    let parents = parents(spec.parent_refs, &mut check);
    let hostnames = spec.hostnames;
    let Notes { unsupported, refused } = notes;
    let route = GatewayRoute { meta, parents, hostnames, http, tcp: Vec::new(), unsupported, refused };
    check.finish(Object::Route(Kind::HTTPRoute, Arc::new(route)))
}

pub(super) fn grpc_route(doc: &Document<'_>) -> Result<Object, Vec<FieldError>> {
    let object: Resource<GrpcSpec> = shape(doc)?;
    let mut check = Check::new(doc);
    let meta = meta(doc, object.metadata, &mut check);
    let spec = object.spec.unwrap_or_default();
    let mut notes = Notes::new(spec.use_default_gateways.is_some());
    let mut http = Vec::new();
    for (i, text) in spec.rules.unwrap_or_else(|| vec![GrpcRuleText::default()]).into_iter().enumerate() {
        let field = format!("spec.rules[{i}]");
        let mut matches = Vec::new();
        for (m, text) in text.matches.into_iter().enumerate() {
            let place = format!("{field}.matches[{m}]");
            let path =
                text.method.and_then(|method| grpc_path(&method, &format!("{place}.method"), &mut check));
            let headers = header_matches(text.headers, &place, &mut check, &mut notes);
            matches.push(l7::HttpMatch { path, headers, ..l7::HttpMatch::default() });
        }
        let rule = l7::HttpRule { name: text.name, matches, ..l7::HttpRule::default() };
        let rest = Rest {
            filters: text.filters,
            backends: text.backend_refs,
            session: text.session_persistence,
            grpc: true,
        };
        http.push(rest.into_rule(rule, &field, &mut check, &mut notes));
    }
    let parents = parents(spec.parent_refs, &mut check);
    let hostnames = spec.hostnames;
    let Notes { unsupported, refused } = notes;
    let route = GatewayRoute { meta, parents, hostnames, http, tcp: Vec::new(), unsupported, refused };
    check.finish(Object::Route(Kind::GRPCRoute, Arc::new(route)))
}

pub(super) fn tcp_route(doc: &Document<'_>) -> Result<Object, Vec<FieldError>> {
    connections(doc, Kind::TCPRoute)
}

pub(super) fn tls_route(doc: &Document<'_>) -> Result<Object, Vec<FieldError>> {
    connections(doc, Kind::TLSRoute)
}

fn connections(doc: &Document<'_>, kind: Kind) -> Result<Object, Vec<FieldError>> {
    let object: Resource<TcpSpec> = shape(doc)?;
    let mut check = Check::new(doc);
    let meta = meta(doc, object.metadata, &mut check);
    let spec = object.spec.unwrap_or_default();
    let Notes { mut unsupported, refused } = Notes::new(spec.use_default_gateways.is_some());
    if kind == Kind::TCPRoute && !spec.hostnames.is_empty() {
        check.error("spec.hostnames", "belongs to a TLSRoute; connections of TCP have no names");
    }
    if spec.rules.is_empty() {
        check.error("spec.rules", format!("missing; a {kind} needs one"));
    }
    let mut tcp = Vec::new();
    for (i, rule) in spec.rules.into_iter().enumerate() {
        let field = format!("spec.rules[{i}]");
        if i > 0 {
            unsupported.push(format!("{field} (the first rule takes every connection)"));
        }
        if rule.backend_refs.is_empty() {
            check.error(format!("{field}.backendRefs"), "missing; name at least one backend");
        }
        let mut backends = Vec::new();
        for (b, text) in rule.backend_refs.into_iter().enumerate() {
            let place = format!("{field}.backendRefs[{b}]");
            if !text.filters.is_empty() {
                check.error(format!("{place}.filters"), "has no meaning for connections; remove it");
            }
            let weight = weight(text.weight, &place, &mut check);
            backends.push((reference(text, &place, &mut check), weight));
        }
        tcp.push(GatewayTcp { name: rule.name, backends });
    }
    let parents = parents(spec.parent_refs, &mut check);
    let hostnames = spec.hostnames;
    let route = GatewayRoute { meta, parents, hostnames, http: Vec::new(), tcp, unsupported, refused };
    check.finish(Object::Route(kind, Arc::new(route)))
}

/// What there is to say about fields that are valid.
#[derive(Debug, Default)]
pub(super) struct Notes {
    pub(super) unsupported: Vec<String>,
    pub(super) refused: Vec<String>,
}

impl Notes {
    fn new(default_gateways: bool) -> Self {
        let mut notes = Self::default();
        if default_gateways {
            notes.unsupported.push("spec.useDefaultGateways".to_owned());
        }
        notes
    }
}

/// The parts of a rule that HTTPRoutes and GRPCRoutes have alike.
struct Rest {
    filters: Vec<FilterText>,
    backends: Vec<BackendText>,
    session: Option<SessionText>,
    grpc: bool,
}

impl Rest {
    fn into_rule(
        self,
        mut rule: l7::HttpRule,
        field: &str,
        check: &mut Check<'_>,
        notes: &mut Notes,
    ) -> GatewayHttp {
        let refused = notes.refused.len();
        let found = filters(self.filters, &format!("{field}.filters"), self.grpc, check, notes);
        let prefixes = rule
            .matches
            .iter()
            .filter(|m| matches!(m.path.as_ref().and_then(|p| p.kind.as_ref()), Some(Path::Segments(_))));
        if found.replaces_prefix() && prefixes.count() != rule.matches.len() {
            check.error(
                format!("{field}.filters"),
                "replacePrefixMatch needs matches by PathPrefix only; use replaceFullPath or change the matches",
            );
        }
        let Filters { request_headers, response_headers, redirect, rewrite, cors, mirrors } = found;
        let forwards = !self.backends.is_empty();
        if redirect.is_some() && forwards {
            check.error(format!("{field}.filters"), "RequestRedirect may not stand beside backendRefs");
        }
        let mut references = Vec::new();
        let mut backends = Vec::new();
        for (i, text) in self.backends.into_iter().enumerate() {
            let place = format!("{field}.backendRefs[{i}]");
            let (weighted, reference) = backend(text, &place, self.grpc, check, notes);
            backends.push(weighted);
            references.push(reference);
        }
        let share: u64 = backends.iter().map(|b| u64::from(b.weight)).sum();
        rule.action = Some(match redirect {
            Some(redirect) => Action::Redirect(redirect),
            // A filter that cannot be applied must not be skipped, and there has to be somebody to send to.
            None if notes.refused.len() > refused || share == 0 => {
                Action::DirectResponse(l7::DirectResponse { status: 500, body: Vec::new() })
            }
            None => Action::Forward(l7::Forward { backends }),
        });
        if !matches!(rule.action, Some(Action::Forward(_))) {
            references.clear();
        }
        rule.request_headers = request_headers;
        rule.response_headers = response_headers;
        rule.rewrite = rewrite;
        rule.cors = cors;
        rule.session = self.session.map(|s| session(s, &format!("{field}.sessionPersistence"), check, notes));
        let (wire, mirrors) = mirrors.into_iter().unzip();
        rule.mirrors = wire;
        GatewayHttp { rule, backends: references, mirrors }
    }
}

fn backend(
    mut text: BackendText,
    field: &str,
    grpc: bool,
    check: &mut Check<'_>,
    notes: &mut Notes,
) -> (l7::WeightedBackend, GatewayBackend) {
    let weight = weight(text.weight, field, check);
    let given = std::mem::take(&mut text.filters);
    let found = filters(given, &format!("{field}.filters"), grpc, check, notes);
    if found.cors.is_some() {
        notes.unsupported.push(format!("{field}.filters (CORS of a backend; write it at the rule)"));
    }
    let (wire, mirrors) = found.mirrors.into_iter().unzip();
    let weighted = l7::WeightedBackend {
        backend: None,
        weight,
        request_headers: found.request_headers,
        response_headers: found.response_headers,
        mirrors: wire,
        redirect: found.redirect,
        rewrite: found.rewrite,
    };
    (weighted, GatewayBackend { reference: reference(text, field, check), mirrors })
}

fn weight(value: Option<i64>, field: &str, check: &mut Check<'_>) -> u32 {
    let value = value.unwrap_or(1);
    if !(0..=HEAVIEST).contains(&value) {
        check.error(format!("{field}.weight"), format!("{value} is out of range; write 0 to {HEAVIEST}"));
    }
    u32::try_from(value.clamp(0, HEAVIEST)).unwrap_or_default()
}

pub(super) fn reference(text: BackendText, field: &str, check: &mut Check<'_>) -> Reference {
    if text.name.is_empty() {
        check.error(format!("{field}.name"), "missing; name a Service");
    }
    Reference {
        group: text.group,
        kind: text.kind.unwrap_or_else(|| "Service".to_owned()),
        namespace: text.namespace,
        name: text.name,
        port: text.port.map(|p| check.port(&format!("{field}.port"), p)),
        section_name: String::new(),
    }
}

fn parents(given: Vec<ParentText>, check: &mut Check<'_>) -> Vec<Reference> {
    let mut out = Vec::new();
    for (i, text) in given.into_iter().enumerate() {
        let field = format!("spec.parentRefs[{i}]");
        if text.name.is_empty() {
            check.error(format!("{field}.name"), "missing; name a Service");
        }
        out.push(Reference {
            group: text.group.unwrap_or_else(|| GATEWAY_GROUP.to_owned()),
            kind: text.kind.unwrap_or_else(|| "Gateway".to_owned()),
            namespace: text.namespace,
            name: text.name,
            port: text.port.map(|p| check.port(&format!("{field}.port"), p)),
            section_name: text.section_name,
        });
    }
    out
}

fn whole_path() -> l7::PathMatch {
    l7::PathMatch { kind: Some(Path::Segments("/".to_owned())), ignore_case: false }
}

fn http_match(text: HttpMatchText, field: &str, check: &mut Check<'_>, notes: &mut Notes) -> l7::HttpMatch {
    let path = match text.path {
        None => whole_path(),
        Some(text) => {
            let place = format!("{field}.path.value");
            let value = text.value.unwrap_or_else(|| "/".to_owned());
            if text.kind != PathType::RegularExpression && !value.starts_with('/') {
                check.error(&place, format!("{value:?} is no path; begin it with /"));
            }
            let kind = match text.kind {
                PathType::PathPrefix => Path::Segments(value),
                PathType::Exact => Path::Exact(value),
                PathType::RegularExpression => {
                    check.pattern(&place, &value);
                    Path::Regex(value)
                }
            };
            l7::PathMatch { kind: Some(kind), ignore_case: false }
        }
    };
    let method = text.method.map(|method| {
        if http::Method::from_bytes(method.as_bytes()).is_err() {
            check.error(format!("{field}.method"), format!("{method:?} is no method; write one such as GET"));
        }
        l7::StringMatch { kind: Some(Value::Exact(method)), ignore_case: false }
    });
    let mut query: Vec<l7::QueryMatch> = Vec::new();
    for (i, text) in text.query_params.into_iter().enumerate() {
        let place = format!("{field}.queryParams[{i}]");
        if query.iter().any(|q| q.name == text.name) {
            notes.unsupported.push(format!("{place} (a second one for {:?})", text.name));
            continue;
        }
        let value = value_match(text.kind, text.value, &place, check);
        query.push(l7::QueryMatch { name: text.name, value: Some(value) });
    }
    let headers = header_matches(text.headers, field, check, notes);
    l7::HttpMatch { path: Some(path), method, headers, query, ..l7::HttpMatch::default() }
}

fn value_match(kind: ValueType, value: String, field: &str, check: &mut Check<'_>) -> l7::StringMatch {
    let kind = match kind {
        ValueType::Exact => Value::Exact(value),
        ValueType::RegularExpression => {
            check.pattern(&format!("{field}.value"), &value);
            Value::Regex(value)
        }
    };
    l7::StringMatch { kind: Some(kind), ignore_case: false }
}

fn header_matches(
    given: Vec<ValueMatchText>,
    field: &str,
    check: &mut Check<'_>,
    notes: &mut Notes,
) -> Vec<l7::HeaderMatch> {
    let mut out: Vec<l7::HeaderMatch> = Vec::new();
    for (i, text) in given.into_iter().enumerate() {
        let place = format!("{field}.headers[{i}]");
        let name = check.header_name(&format!("{place}.name"), &text.name);
        if out.iter().any(|h| h.name == name) {
            notes.unsupported.push(format!("{place} (a second one for {name})"));
            continue;
        }
        let value = Some(value_match(text.kind, text.value, &place, check));
        out.push(l7::HeaderMatch { name, value, invert: false, claim: Vec::new() });
    }
    out
}

/// `/<service>/<method>`, where each part may be missing.
fn grpc_path(text: &MethodText, field: &str, check: &mut Check<'_>) -> Option<l7::PathMatch> {
    if text.service.contains('/') || text.method.contains('/') {
        check.error(field, "has a / in a name; write service and method without it");
    }
    let part = |value: &str| match text.kind {
        _ if value.is_empty() => "[^/]+".to_owned(),
        ValueType::Exact => regex::escape(value),
        ValueType::RegularExpression => format!("(?:{value})"),
    };
    let kind = match (text.kind, text.service.as_str(), text.method.as_str()) {
        (_, "", "") => {
            check.error(field, "is empty; write service, method or both");
            return None;
        }
        (ValueType::Exact, service, "") => Path::Segments(format!("/{service}")),
        (ValueType::Exact, service, method) if !service.is_empty() => {
            Path::Exact(format!("/{service}/{method}"))
        }
        (_, service, method) => {
            let pattern = format!("/{}/{}", part(service), part(method));
            check.pattern(field, &pattern);
            Path::Regex(pattern)
        }
    };
    Some(l7::PathMatch { kind: Some(kind), ignore_case: false })
}

fn retries(text: RetryText, field: &str, check: &mut Check<'_>) -> l7::Retry {
    let mut on: Vec<String> = RETRY_ON.iter().map(|w| (*w).to_owned()).collect();
    if !text.codes.is_empty() {
        on.push("retriable-status-codes".to_owned());
    }
    let codes = text.codes.into_iter().enumerate();
    let status_codes = codes.map(|(i, code)| check.status(&format!("{field}.codes[{i}]"), code)).collect();
    l7::Retry {
        attempts: check.count(&format!("{field}.attempts"), text.attempts.unwrap_or(ATTEMPTS)),
        on,
        status_codes,
        backoff: check.timeout(&format!("{field}.backoff"), text.backoff.as_deref()),
        ..l7::Retry::default()
    }
}

/// `backendRequest` is for one try where there may be several, else for the request (as Istio has it).
fn timeouts(text: TimeoutsText, rule: &mut l7::HttpRule, field: &str, check: &mut Check<'_>) {
    rule.timeout = check.timeout(&format!("{field}.request"), text.request.as_deref());
    let each = check.timeout(&format!("{field}.backendRequest"), text.backend_request.as_deref());
    if let (Some(whole), Some(each)) = (rule.timeout, each)
        && (each.seconds, each.nanos) > (whole.seconds, whole.nanos)
    {
        check.error(format!("{field}.backendRequest"), "is longer than request; one try is part of it");
    }
    match (&mut rule.retry, each) {
        (Some(retry), each) => retry.per_try_timeout = each,
        (None, Some(each)) => rule.timeout = Some(each),
        (None, None) => {}
    }
}

fn session(
    text: SessionText,
    field: &str,
    check: &mut Check<'_>,
    notes: &mut Notes,
) -> l7::SessionPersistence {
    let at = |name: &str| format!("{field}.{name}");
    if text.idle_timeout.is_some() {
        notes.unsupported.push(at("idleTimeout"));
    }
    let header = text.kind == SessionType::Header;
    let cookie = text.cookie.or(text.cookie_config).unwrap_or_default();
    let given = if header { text.header.unwrap_or_default().name } else { cookie.name };
    let name = [given, text.session_name, SESSION.to_owned()].into_iter().find(|n| !n.is_empty());
    let permanent = !header && cookie.lifetime_type == LifetimeType::Permanent;
    let lifetime = check.timeout(&at("absoluteTimeout"), text.absolute_timeout.as_deref());
    if permanent && lifetime.is_none() {
        check.error(at("absoluteTimeout"), "missing; a cookie with lifetimeType Permanent needs it");
    }
    if !permanent && lifetime.is_some() {
        notes.unsupported.push(at("absoluteTimeout (only of a cookie with lifetimeType Permanent)"));
    }
    l7::SessionPersistence {
        name: name.unwrap_or_default(),
        header,
        lifetime: lifetime.filter(|_| permanent),
        path: cookie.path,
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct GrantSpec {
    from: Vec<GrantFromText>,
    to: Vec<GrantToText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct GrantFromText {
    group: String,
    kind: String,
    namespace: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct GrantToText {
    group: String,
    kind: String,
    name: Option<String>,
}

pub(super) fn reference_grant(doc: &Document<'_>) -> Result<Object, Vec<FieldError>> {
    let object: Resource<GrantSpec> = shape(doc)?;
    let mut check = Check::new(doc);
    let meta = meta(doc, object.metadata, &mut check);
    let spec = object.spec.unwrap_or_default();
    for (i, from) in spec.from.iter().enumerate() {
        if from.kind.is_empty() || from.namespace.is_empty() {
            check.error(format!("spec.from[{i}]"), "needs kind and namespace");
        }
    }
    for (i, to) in spec.to.iter().enumerate() {
        if to.kind.is_empty() {
            check.error(
                format!("spec.to[{i}].kind"),
                "missing; write the kind that may be named, for example Service",
            );
        }
    }
    if spec.from.is_empty() || spec.to.is_empty() {
        check.error("spec", "needs from and to");
    }
    let from = spec.from.into_iter().map(|f| (f.group, f.kind, f.namespace)).collect();
    let to = spec.to.into_iter().map(|t| (t.group, t.kind, t.name.filter(|n| !n.is_empty()))).collect();
    check.finish(Object::ReferenceGrant(Arc::new(ReferenceGrant { meta, from, to })))
}
