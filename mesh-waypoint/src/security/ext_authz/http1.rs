//! The HTTP variant: the request's head is sent to the authorizer, and 200 means yes.

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, StatusCode, header};
use mesh_core::xds::proto::l7;

use super::{Allowed, Answer, Asked, Denied, HeaderChange, PARTIAL_BODY, Reply, is_ours, name_of};

/// In a yes: headers that the request loses, separated by commas.
const TO_REMOVE: &str = "x-envoy-auth-headers-to-remove";

pub(super) fn request(provider: &l7::Provider, asked: &Asked<'_>) -> Result<Request<Bytes>, http::Error> {
    let head = asked.head;
    let query = head.query.map(|query| format!("?{query}")).unwrap_or_default();
    let mut request = Request::builder()
        .method(head.method)
        .uri(format!("http://{}{}{}{query}", head.authority, provider.path_prefix, head.path));
    for (name, value) in head.headers {
        let included = *name == header::AUTHORIZATION || any_matches(&provider.include_request_headers, name);
        if included && !is_ours(name) {
            request = request.header(name, value);
        }
    }
    let (body, partial) =
        asked.body.map_or((Bytes::new(), None), |body| (body.bytes.clone(), Some(body.partial)));
    if let Some(partial) = partial {
        request = request.header(PARTIAL_BODY, partial.to_string());
    }
    request = request.header(header::CONTENT_LENGTH, body.len());
    let mut request = request.body(body)?;
    for header in &provider.additional_headers {
        let name = HeaderName::try_from(header.name.as_str())?;
        let value = HeaderValue::try_from(header.value.as_str())?;
        request.headers_mut().insert(name, value);
    }
    Ok(request)
}

pub(super) fn answer(provider: &l7::Provider, reply: &Reply) -> Result<Answer, String> {
    if reply.status.is_server_error() {
        return Err(format!("answered {}", reply.status));
    }
    let matching = |patterns: &[String]| -> Vec<(HeaderName, HeaderValue)> {
        let found = reply.headers.iter().filter(|(name, _)| !is_ours(name) && any_matches(patterns, name));
        found.map(|(name, value)| (name.clone(), value.clone())).collect()
    };
    if reply.status == StatusCode::OK {
        let mut headers = Vec::new();
        for value in reply.headers.get_all(TO_REMOVE) {
            for name in value.to_str().unwrap_or("").split(',').map(str::trim).filter(|name| !name.is_empty())
            {
                headers.extend(name_of(name)?.map(HeaderChange::Remove));
            }
        }
        headers.extend(as_set(matching(&provider.headers_to_upstream_on_allow)));
        let added = matching(&provider.headers_to_downstream_on_allow).into_iter();
        let response_headers = added.map(|(name, value)| HeaderChange::Append(name, value)).collect();
        return Ok(Answer::Allow(Allowed { headers, query: Vec::new(), response_headers }));
    }
    let patterns = &provider.headers_to_downstream_on_deny;
    let passes = |name: &HeaderName| {
        let always = [header::WWW_AUTHENTICATE, header::LOCATION];
        patterns.is_empty() || always.contains(name) || any_matches(patterns, name)
    };
    let headers = reply.headers.iter().filter(|(name, _)| !is_ours(name) && passes(name));
    Ok(Answer::Deny(Denied {
        status: reply.status,
        headers: headers.map(|(name, value)| (name.clone(), value.clone())).collect(),
        body: reply.body.clone(),
        details: "ext_authz_denied",
    }))
}

/// The first value of a header replaces what the client sent, the others are added.
fn as_set(headers: Vec<(HeaderName, HeaderValue)>) -> Vec<HeaderChange> {
    let mut changes: Vec<HeaderChange> = Vec::new();
    let mut before: Option<HeaderName> = None;
    for (name, value) in headers {
        if before.as_ref() == Some(&name) {
            changes.push(HeaderChange::Append(name, value));
        } else {
            before = Some(name.clone());
            changes.push(HeaderChange::Set(name, value));
        }
    }
    changes
}

/// Exact, `prefix*`, `*suffix` or `*`, whatever the case.
fn any_matches(patterns: &[String], name: &HeaderName) -> bool {
    let name = name.as_str();
    patterns.iter().any(|pattern| {
        let pattern = pattern.to_ascii_lowercase();
        match (pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
            (Some(suffix), _) => name.ends_with(suffix),
            (_, Some(prefix)) => name.starts_with(prefix),
            _ => name == pattern,
        }
    })
}
