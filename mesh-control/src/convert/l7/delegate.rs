//! A rule of a VirtualService that another one delegates to, within what the delegating rule matches.
//!
//! As in Istio: the inner match has to lie inside the outer one, a match that does not is left out; what the inner rule
//! does not say, the outer says.

use mesh_core::xds::proto::l7 as wire;
use wire::path_match::Kind as Path;
use wire::string_match::Kind;

/// The inner rule inside the outer; none when no match of the inner lies inside one of the outer.
pub(super) fn merge(outer: &wire::HttpRule, inner: wire::HttpRule) -> Option<wire::HttpRule> {
    let matches = match (outer.matches.as_slice(), inner.matches.as_slice()) {
        (outer, []) => outer.to_vec(),
        ([], inner) => inner.to_vec(),
        (outer, inner) => {
            let pairs = outer.iter().flat_map(|o| inner.iter().map(move |i| (o, i)));
            let merged: Vec<wire::HttpMatch> = pairs.filter_map(|(o, i)| merge_match(o, i)).collect();
            if merged.is_empty() {
                return None;
            }
            merged
        }
    };
    Some(wire::HttpRule {
        name: join(&outer.name, &inner.name),
        matches,
        request_headers: inner.request_headers.or_else(|| outer.request_headers.clone()),
        response_headers: inner.response_headers.or_else(|| outer.response_headers.clone()),
        rewrite: inner.rewrite.or_else(|| outer.rewrite.clone()),
        action: inner.action,
        mirrors: if inner.mirrors.is_empty() { outer.mirrors.clone() } else { inner.mirrors },
        cors: inner.cors.or_else(|| outer.cors.clone()),
        fault: inner.fault.or(outer.fault),
        timeout: inner.timeout.or(outer.timeout),
        retry: inner.retry.or_else(|| outer.retry.clone()),
        session: inner.session.or_else(|| outer.session.clone()),
        rate_limit: inner.rate_limit.or(outer.rate_limit),
    })
}

fn join(outer: &str, inner: &str) -> String {
    match (outer.is_empty(), inner.is_empty()) {
        (false, false) => format!("{outer}-{inner}"),
        _ => format!("{outer}{inner}"),
    }
}

/// Both together; none when they contradict each other.
fn merge_match(outer: &wire::HttpMatch, inner: &wire::HttpMatch) -> Option<wire::HttpMatch> {
    let ignores = |m: &wire::HttpMatch| m.path.as_ref().is_some_and(|p| p.ignore_case);
    if outer.path.is_some() && inner.path.is_some() && ignores(outer) != ignores(inner) {
        return None;
    }
    let mut headers = inner.headers.clone();
    for header in &outer.headers {
        let same = |h: &&wire::HeaderMatch| {
            (&h.name, &h.claim, h.invert) == (&header.name, &header.claim, header.invert)
        };
        match inner.headers.iter().find(same) {
            Some(found) => drop(within(&header.value, &found.value)?),
            None => headers.push(header.clone()),
        }
    }
    let mut query = inner.query.clone();
    for parameter in &outer.query {
        match inner.query.iter().find(|q| q.name == parameter.name) {
            Some(found) => drop(within(&parameter.value, &found.value)?),
            None => query.push(parameter.clone()),
        }
    }
    if outer.port != 0 && inner.port != 0 && outer.port != inner.port {
        return None;
    }
    let namespace =
        |m: &wire::HttpMatch| (!m.source_namespace.is_empty()).then(|| m.source_namespace.clone());
    let source_namespace = match (namespace(outer), namespace(inner)) {
        (Some(outer), Some(inner)) if outer != inner => return None,
        (outer, inner) => inner.or(outer).unwrap_or_default(),
    };
    let mut source_labels = outer.source_labels.clone();
    for (key, value) in &inner.source_labels {
        if source_labels.insert(key.clone(), value.clone()).is_some_and(|old| old != *value) {
            return None;
        }
    }
    Some(wire::HttpMatch {
        name: join(&outer.name, &inner.name),
        path: path_within(&outer.path, &inner.path)?,
        method: within(&outer.method, &inner.method)?,
        scheme: within(&outer.scheme, &inner.scheme)?,
        authority: within(&outer.authority, &inner.authority)?,
        headers,
        query,
        port: if inner.port == 0 { outer.port } else { inner.port },
        source_namespace,
        source_labels,
    })
}

/// What two patterns have in common where the inner one lies inside the outer.
enum Pattern<'a> {
    Exact(&'a str),
    Prefix(&'a str),
    /// A regular expression or another, which cannot be compared.
    Other,
}

fn lies_within(outer: &Pattern<'_>, inner: &Pattern<'_>) -> bool {
    match (outer, inner) {
        (Pattern::Exact(outer), Pattern::Exact(inner)) => outer == inner,
        (Pattern::Prefix(outer), Pattern::Exact(inner) | Pattern::Prefix(inner)) => inner.starts_with(outer),
        _ => false,
    }
}

fn within(
    outer: &Option<wire::StringMatch>,
    inner: &Option<wire::StringMatch>,
) -> Option<Option<wire::StringMatch>> {
    match (outer, inner) {
        (Some(outer), Some(inner)) => {
            let is_present = matches!(outer.kind, Some(Kind::Present(_)));
            (is_present || lies_within(&value_pattern(outer), &value_pattern(inner)))
                .then(|| Some(inner.clone()))
        }
        (outer, inner) => Some(inner.clone().or_else(|| outer.clone())),
    }
}

fn value_pattern(of: &wire::StringMatch) -> Pattern<'_> {
    match &of.kind {
        Some(Kind::Exact(value)) => Pattern::Exact(value),
        Some(Kind::Prefix(value)) => Pattern::Prefix(value),
        _ => Pattern::Other,
    }
}

fn path_within(
    outer: &Option<wire::PathMatch>,
    inner: &Option<wire::PathMatch>,
) -> Option<Option<wire::PathMatch>> {
    match (outer, inner) {
        (Some(outer), Some(inner)) => {
            lies_within(&path_pattern(outer), &path_pattern(inner)).then(|| Some(inner.clone()))
        }
        (outer, inner) => Some(inner.clone().or_else(|| outer.clone())),
    }
}

fn path_pattern(of: &wire::PathMatch) -> Pattern<'_> {
    match &of.kind {
        Some(Path::Exact(value)) => Pattern::Exact(value),
        Some(Path::Prefix(value)) => Pattern::Prefix(value),
        _ => Pattern::Other,
    }
}
