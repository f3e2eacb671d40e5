//! Reader of VirtualService.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::ByteString;
use mesh_core::xds::proto::l7;
use mesh_core::xds::proto::l7::http_rule::Action;
use mesh_core::xds::proto::l7::string_match::Kind;
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::super::l7::{MESH_GATEWAY, VirtualHttp, VirtualMatch, VirtualService, VirtualTcp};
use super::super::{Key, Object};
use super::istio::Resource;
use super::traffic::{RetriesText, retries};
use super::values::{ALL, HeadersText, PercentText, StringMatchText};
use super::virtual_actions::{
    CorsText, FaultText, RedirectText, RewriteText, cors, fault, redirect, rewrite,
};
use super::{Check, Document, FieldError, is_dns_name, meta, shape};

/// Bodies of direct responses are part of every push.
const LARGEST_BODY: usize = 1 << 20;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    hosts: Vec<String>,
    gateways: Vec<String>,
    http: Vec<HttpText>,
    tls: Vec<TcpText>,
    tcp: Vec<TcpText>,
    export_to: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct HttpText {
    name: String,
    #[serde(rename = "match")]
    matches: Vec<MatchText>,
    route: Vec<RouteText>,
    headers: HeadersText,
    redirect: Option<RedirectText>,
    direct_response: Option<DirectText>,
    delegate: Option<DelegateText>,
    rewrite: Option<RewriteText>,
    timeout: Option<String>,
    retries: Option<RetriesText>,
    fault: Option<FaultText>,
    mirror: Option<DestinationText>,
    #[serde(alias = "mirror_percent")]
    mirror_percent: Option<i64>,
    mirror_percentage: Option<PercentText>,
    mirrors: Vec<MirrorText>,
    cors_policy: Option<CorsText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct MatchText {
    name: String,
    uri: Option<StringMatchText>,
    scheme: Option<StringMatchText>,
    method: Option<StringMatchText>,
    authority: Option<StringMatchText>,
    headers: BTreeMap<String, StringMatchText>,
    without_headers: BTreeMap<String, StringMatchText>,
    query_params: BTreeMap<String, StringMatchText>,
    ignore_uri_case: bool,
    port: Option<i64>,
    source_labels: BTreeMap<String, String>,
    source_namespace: String,
    gateways: Vec<String>,
    stat_prefix: Option<IgnoredAny>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RouteText {
    destination: DestinationText,
    weight: i64,
    headers: HeadersText,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct DestinationText {
    host: String,
    port: Option<PortText>,
    subset: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct PortText {
    number: i64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct MirrorText {
    destination: DestinationText,
    percentage: Option<PercentText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct DirectText {
    status: i64,
    body: Option<BodyText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct BodyText {
    string: Option<String>,
    bytes: Option<ByteString>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct DelegateText {
    name: String,
    namespace: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct TcpText {
    #[serde(rename = "match")]
    matches: Vec<TcpMatchText>,
    route: Vec<RouteText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct TcpMatchText {
    sni_hosts: Vec<String>,
    destination_subnets: Vec<String>,
    port: Option<i64>,
    source_labels: BTreeMap<String, String>,
    source_subnet: String,
    source_namespace: String,
    gateways: Vec<String>,
}

pub(super) fn virtual_service(doc: &Document<'_>) -> Result<Object, Vec<FieldError>> {
    let object: Resource<Spec> = shape(doc)?;
    let mut check = Check::new(doc);
    let meta = meta(doc, object.metadata, &mut check);
    let spec = object.spec.unwrap_or_default();
    let of_mesh = spec.gateways.is_empty() || spec.gateways.iter().any(|g| g == MESH_GATEWAY);
    for (i, host) in spec.hosts.iter().enumerate() {
        let field = format!("spec.hosts[{i}]");
        if host == "*" {
            if of_mesh {
                check.error(&field, "* would take every service of the mesh; name hosts, or *.domain");
            }
        } else if !is_dns_name(host.strip_prefix("*.").unwrap_or(host)) {
            check.error(&field, format!("{host:?} is no host; write a service's name, or *.domain"));
        }
    }
    if spec.http.is_empty() && spec.tcp.is_empty() && spec.tls.is_empty() {
        check.error("spec", "has no rules; write at least one of http, tls, tcp");
    }
    if spec.hosts.is_empty() && (!spec.tcp.is_empty() || !spec.tls.is_empty()) {
        check.error("spec.hosts", "missing; only http rules can be delegated to");
    }
    let mut unsupported = Vec::new();
    let mut http = Vec::new();
    for (i, text) in spec.http.into_iter().enumerate() {
        http.push(http_rule(text, &format!("spec.http[{i}]"), &mut check, &mut unsupported));
    }
    if spec.hosts.is_empty() && http.iter().any(|rule| rule.delegate.is_some()) {
        check.error("spec.http", "has a delegate in an object without hosts; delegation has one level");
    }
    let mut tcp_rules = |given: Vec<TcpText>, tls: bool| {
        let name = if tls { "tls" } else { "tcp" };
        let mut rules = Vec::new();
        for (i, text) in given.into_iter().enumerate() {
            rules.push(tcp_rule(text, &format!("spec.{name}[{i}]"), tls, &mut check, &mut unsupported));
        }
        rules
    };
    let tls = tcp_rules(spec.tls, true);
    let tcp = tcp_rules(spec.tcp, false);
    let (hosts, gateways, export_to) = (spec.hosts, spec.gateways, spec.export_to);
    check.finish(Object::VirtualService(Arc::new(VirtualService {
        meta,
        hosts,
        gateways,
        export_to,
        http,
        tls,
        tcp,
        unsupported,
    })))
}

fn http_rule(
    text: HttpText,
    field: &str,
    check: &mut Check<'_>,
    unsupported: &mut Vec<String>,
) -> VirtualHttp {
    let at = |name: &str| format!("{field}.{name}");
    let mirrors = mirrors(&text, field, check);
    let action = action(&text, field, check);
    let delegate = text.delegate.as_ref().map(|d| {
        if d.name.is_empty() {
            check.error(at("delegate.name"), "missing; name a VirtualService without hosts");
        }
        Key::new(&d.namespace, &d.name)
    });
    let mut forward = Vec::new();
    let several = text.route.len() > 1;
    for (i, route) in text.route.into_iter().enumerate() {
        forward.push(backend(route, &at(&format!("route[{i}]")), several, check, unsupported));
    }
    weights(&forward, &at("route"), check);
    let rewrite = text.rewrite.and_then(|r| rewrite(r, &at("rewrite"), check));
    if rewrite.is_some() && matches!(action, Some(Action::Redirect(_) | Action::DirectResponse(_))) {
        check.error(at("rewrite"), "has no meaning beside redirect or directResponse; remove one");
    }
    let mut matches = Vec::new();
    for (i, text) in text.matches.into_iter().enumerate() {
        matches.push(http_match(text, &at(&format!("match[{i}]")), check, unsupported));
    }
    let rule = l7::HttpRule {
        name: text.name,
        matches: Vec::new(),
        request_headers: check.header_edits(
            &at("headers.request"),
            text.headers.request.into(),
            true,
            unsupported,
        ),
        response_headers: check.header_edits(
            &at("headers.response"),
            text.headers.response.into(),
            false,
            unsupported,
        ),
        rewrite,
        action: action
            .or_else(|| (!forward.is_empty()).then_some(Action::Forward(l7::Forward { backends: forward }))),
        mirrors,
        cors: text.cors_policy.map(|c| cors(c, &at("corsPolicy"), check)),
        fault: text.fault.and_then(|f| fault(f, &at("fault"), check, unsupported)),
        timeout: check.timeout(&at("timeout"), text.timeout.as_deref()),
        retry: text.retries.map(|r| retries(r, &at("retries"), check)),
        session: None,
        rate_limit: None,
    };
    VirtualHttp { rule, matches, delegate }
}

/// Redirect or direct response, if there is one; and there is exactly one thing to do.
fn action(text: &HttpText, field: &str, check: &mut Check<'_>) -> Option<Action> {
    let set = [
        ("route", !text.route.is_empty()),
        ("redirect", text.redirect.is_some()),
        ("directResponse", text.direct_response.is_some()),
        ("delegate", text.delegate.is_some()),
    ];
    let set: Vec<&str> = set.iter().filter(|(_, set)| *set).map(|(name, _)| *name).collect();
    match set.as_slice() {
        [] => check.error(field, "does nothing; write one of route, redirect, directResponse, delegate"),
        [_] => {}
        several => check.error(field, format!("has {}; keep one", several.join(" and "))),
    }
    if let Some(text) = &text.redirect {
        return Some(Action::Redirect(redirect(text, &format!("{field}.redirect"), check)));
    }
    let text = text.direct_response.as_ref()?;
    let field = format!("{field}.directResponse");
    let status = check.status(&format!("{field}.status"), text.status);
    let body = match text.body.as_ref().map(|b| (&b.string, &b.bytes)) {
        Some((Some(_), Some(_))) => {
            check.error(format!("{field}.body"), "has string and bytes; keep one");
            Vec::new()
        }
        Some((Some(string), None)) => string.as_bytes().to_vec(),
        Some((None, Some(bytes))) => bytes.0.clone(),
        Some((None, None)) | None => Vec::new(),
    };
    if body.len() > LARGEST_BODY {
        check.error(format!("{field}.body"), format!("is larger than {LARGEST_BODY} bytes; serve it"));
    }
    Some(Action::DirectResponse(l7::DirectResponse { status, body }))
}

fn destination(text: &DestinationText, field: &str, check: &mut Check<'_>) -> l7::Backend {
    if text.host.is_empty() {
        check.error(format!("{field}.host"), "missing; name a service");
    } else if !is_dns_name(&text.host) {
        check.error(format!("{field}.host"), format!("{:?} is no host; name a service", text.host));
    }
    let port = text.port.as_ref().map_or(0, |p| check.port(&format!("{field}.port.number"), p.number));
    let service = l7::ServiceRef { namespace: String::new(), hostname: text.host.clone(), port: port.into() };
    l7::Backend { service: Some(service), subset: text.subset.clone(), invalid: String::new() }
}

fn backend(
    text: RouteText,
    field: &str,
    several: bool,
    check: &mut Check<'_>,
    unsupported: &mut Vec<String>,
) -> l7::WeightedBackend {
    let weight = check.count(&format!("{field}.weight"), text.weight);
    let at = |name: &str| format!("{field}.headers.{name}");
    l7::WeightedBackend {
        backend: Some(destination(&text.destination, &format!("{field}.destination"), check)),
        // The only one gets everything, whether it says so or not.
        weight: if several { weight } else { weight.max(1) },
        request_headers: check.header_edits(&at("request"), text.headers.request.into(), true, unsupported),
        response_headers: check.header_edits(
            &at("response"),
            text.headers.response.into(),
            false,
            unsupported,
        ),
        ..l7::WeightedBackend::default()
    }
}

fn weights(backends: &[l7::WeightedBackend], field: &str, check: &mut Check<'_>) {
    let sum: u64 = backends.iter().map(|b| u64::from(b.weight)).sum();
    if backends.len() > 1 && sum == 0 {
        check.error(field, "has only weights of 0; write a weight for at least one destination");
    }
    if sum > u64::from(u32::MAX) {
        check.error(field, format!("has weights that add up to {sum}; at most {} is possible", u32::MAX));
    }
}

fn mirrors(text: &HttpText, field: &str, check: &mut Check<'_>) -> Vec<l7::Mirror> {
    let at = |name: &str| format!("{field}.{name}");
    if text.mirror.is_some() && !text.mirrors.is_empty() {
        check.error(at("mirror"), "may not stand beside mirrors; keep one of the two");
    }
    let mut out = Vec::new();
    if let Some(mirror) = &text.mirror {
        let share = match (&text.mirror_percentage, text.mirror_percent) {
            (Some(percentage), _) => check.percent(&at("mirrorPercentage"), percentage),
            (None, Some(percent)) => check.whole_percent(&at("mirrorPercent"), percent),
            (None, None) => ALL,
        };
        let backend = Some(destination(mirror, &at("mirror"), check));
        out.push(l7::Mirror { backend, parts_per_million: share });
    } else if text.mirror_percentage.is_some() || text.mirror_percent.is_some() {
        check.error(at("mirrorPercentage"), "stands without mirror; name what mirrors the requests");
    }
    for (i, mirror) in text.mirrors.iter().enumerate() {
        let field = at(&format!("mirrors[{i}]"));
        let share =
            mirror.percentage.as_ref().map_or(ALL, |p| check.percent(&format!("{field}.percentage"), p));
        let backend = Some(destination(&mirror.destination, &format!("{field}.destination"), check));
        out.push(l7::Mirror { backend, parts_per_million: share });
    }
    out
}

fn http_match(
    text: MatchText,
    field: &str,
    check: &mut Check<'_>,
    unsupported: &mut Vec<String>,
) -> VirtualMatch<l7::HttpMatch> {
    use l7::path_match::Kind as Path;
    let at = |name: &str| format!("{field}.{name}");
    if text.stat_prefix.is_some() {
        unsupported.push(at("statPrefix"));
    }
    let path = text.uri.and_then(|uri| {
        let kind = match check.string_match(&at("uri"), uri, None).kind? {
            Kind::Prefix(prefix) => Path::Prefix(prefix),
            Kind::Regex(regex) => Path::Regex(regex),
            Kind::Exact(value) | Kind::Suffix(value) => Path::Exact(value),
            Kind::Present(_) => return None,
        };
        let ignore_case = text.ignore_uri_case && !matches!(kind, Path::Regex(_));
        Some(l7::PathMatch { kind: Some(kind), ignore_case })
    });
    let mut headers = Vec::new();
    for (given, invert, name) in
        [(text.headers, false, "headers"), (text.without_headers, true, "withoutHeaders")]
    {
        for (header, value) in given {
            let place = at(&format!("{name}.{header}"));
            if ["uri", "scheme", "method", "authority"].contains(&header.as_str()) {
                unsupported.push(format!("{place} (write {header} beside headers)"));
                continue;
            }
            let value = check.string_match(&place, value, Some(Kind::Present(true)));
            headers.push(header_match(&place, &header, value, invert, check));
        }
    }
    let mut query = Vec::new();
    for (name, value) in text.query_params {
        let value = check.string_match(&at(&format!("queryParams.{name}")), value, Some(Kind::Present(true)));
        query.push(l7::QueryMatch { name, value: Some(value) });
    }
    let mut string = |name: &str, text: Option<StringMatchText>| {
        text.map(|text| check.string_match(&at(name), text, None))
    };
    let (method, scheme, authority) =
        (string("method", text.method), string("scheme", text.scheme), string("authority", text.authority));
    let wire = l7::HttpMatch {
        name: text.name,
        path,
        method,
        scheme,
        authority,
        headers,
        query,
        port: text.port.map_or(0, |p| check.port(&at("port"), p)).into(),
        source_namespace: text.source_namespace,
        source_labels: text.source_labels,
    };
    VirtualMatch { gateways: text.gateways, never: None, wire }
}

/// `@request.auth.claims.a.b` and `@request.auth.claims[a][b]` ask for a claim.
fn header_match(
    field: &str,
    header: &str,
    value: l7::StringMatch,
    invert: bool,
    check: &mut Check<'_>,
) -> l7::HeaderMatch {
    let value = Some(value);
    if let Some(rest) = header.strip_prefix("@request.auth.claims") {
        let claim: Option<Vec<String>> = if let Some(dotted) = rest.strip_prefix('.') {
            Some(dotted.split('.').map(str::to_owned).collect())
        } else {
            let inner = rest.strip_prefix('[').and_then(|r| r.strip_suffix(']'));
            inner.map(|inner| inner.split("][").map(str::to_owned).collect())
        };
        match claim.filter(|c| c.iter().all(|part| !part.is_empty() && !part.contains(['[', ']']))) {
            Some(claim) => return l7::HeaderMatch { name: String::new(), value, invert, claim },
            None => {
                check.error(field, "names no claim; write @request.auth.claims.sub, or [a][b] after claims")
            }
        }
        return l7::HeaderMatch::default();
    }
    l7::HeaderMatch { name: check.header_name(field, header), value, invert, claim: Vec::new() }
}

fn tcp_rule(
    text: TcpText,
    field: &str,
    tls: bool,
    check: &mut Check<'_>,
    unsupported: &mut Vec<String>,
) -> VirtualTcp {
    if text.route.is_empty() {
        check.error(format!("{field}.route"), "missing; name at least one destination");
    }
    if tls && text.matches.is_empty() {
        check.error(format!("{field}.match"), "missing; a tls rule matches sniHosts");
    }
    let several = text.route.len() > 1;
    let mut backends = Vec::new();
    for (i, route) in text.route.into_iter().enumerate() {
        let place = format!("{field}.route[{i}]");
        let headers = &route.headers;
        if *headers != HeadersText::default() {
            check.error(format!("{place}.headers"), "has no meaning for connections; remove it");
        }
        backends.push(backend(route, &place, several, check, unsupported));
    }
    weights(&backends, &format!("{field}.route"), check);
    let mut matches = Vec::new();
    for (i, text) in text.matches.into_iter().enumerate() {
        matches.push(tcp_match(text, &format!("{field}.match[{i}]"), tls, check));
    }
    VirtualTcp { matches, backends }
}

fn tcp_match(
    text: TcpMatchText,
    field: &str,
    tls: bool,
    check: &mut Check<'_>,
) -> VirtualMatch<l7::TcpMatch> {
    let mut never = None;
    if tls && text.sni_hosts.is_empty() {
        check.error(format!("{field}.sniHosts"), "missing; name the hosts that clients ask for");
    }
    if !tls && !text.sni_hosts.is_empty() {
        check.error(format!("{field}.sniHosts"), "belongs to tls rules");
    }
    for (i, host) in text.sni_hosts.iter().enumerate() {
        if host != "*" && !is_dns_name(host.strip_prefix("*.").unwrap_or(host)) {
            check.error(format!("{field}.sniHosts[{i}]"), format!("{host:?} is no host name"));
        }
    }
    // In the mesh the source's address is that of the tunnel's peer for some clients, so that a subnet would lie.
    let mut source_subnets = Vec::new();
    if !text.source_subnet.is_empty() {
        never = Some("sourceSubnet is evaluated at gateways alone".to_owned());
        let net = check.cidr(&format!("{field}.sourceSubnet"), &text.source_subnet);
        source_subnets.extend(net.map(|n| n.to_string()));
    }
    let mut subnets = Vec::new();
    for (i, subnet) in text.destination_subnets.iter().enumerate() {
        let net = check.cidr(&format!("{field}.destinationSubnets[{i}]"), subnet);
        subnets.extend(net.map(|n| n.to_string()));
    }
    let wire = l7::TcpMatch {
        port: text.port.map_or(0, |p| check.port(&format!("{field}.port"), p)).into(),
        sni_hosts: text.sni_hosts,
        destination_subnets: subnets,
        source_subnets,
        source_namespace: text.source_namespace,
        source_labels: text.source_labels,
    };
    VirtualMatch { gateways: text.gateways, never, wire }
}
