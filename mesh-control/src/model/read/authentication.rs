//! Reader of RequestAuthentication, and of what policies of waypoints have as targets.

use std::collections::BTreeMap;
use std::sync::Arc;

use mesh_core::xds::proto::l7;
use mesh_core::xds::proto::l7::jwt_rule::{ClaimHeader, TokenHeader};
use serde::Deserialize;

use super::super::Object;
use super::super::l7::{Reference, RequestAuthentication};
use super::istio::{Resource, SelectorText};
use super::{Check, Document, FieldError, match_labels, meta, shape};

/// The API's limit.
const MOST_TARGETS: usize = 16;
/// Kinds that can be targets, with their groups.
const TARGETS: [(&str, &str); 4] = [
    ("", "Service"),
    ("networking.istio.io", "ServiceEntry"),
    ("gateway.networking.k8s.io", "Gateway"),
    ("gateway.networking.k8s.io", "GatewayClass"),
];

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct TargetText {
    group: String,
    kind: String,
    name: String,
    namespace: String,
}

/// What an object of `namespace` is about: the labels of its `selector`, or its `targetRef` and `targetRefs`.
pub(super) fn binding(
    selector: Option<SelectorText>,
    one: Option<TargetText>,
    several: Vec<TargetText>,
    namespace: &str,
    check: &mut Check<'_>,
) -> (BTreeMap<String, String>, Vec<Reference>) {
    let selector = selector.unwrap_or_default().match_labels;
    match_labels(&selector, "spec.selector.matchLabels", check);
    let targets = targets(one, several, namespace, check);
    if !targets.is_empty() && !selector.is_empty() {
        check.error("spec.selector", "may not stand beside targetRefs; keep one of the two");
    }
    (selector, targets)
}

/// `targetRef` and `targetRefs` of an object of `namespace`.
fn targets(
    one: Option<TargetText>,
    several: Vec<TargetText>,
    namespace: &str,
    check: &mut Check<'_>,
) -> Vec<Reference> {
    if several.len() > MOST_TARGETS {
        check.error("spec.targetRefs", "holds more than 16 targets; split the policy");
    }
    let given = one.into_iter().map(|t| ("spec.targetRef".to_owned(), t));
    let given =
        given.chain(several.into_iter().enumerate().map(|(i, t)| (format!("spec.targetRefs[{i}]"), t)));
    let mut out = Vec::new();
    for (field, target) in given {
        if target.kind.is_empty() || target.name.is_empty() {
            check.error(&field, "needs kind and name");
            continue;
        }
        if !target.namespace.is_empty() && target.namespace != namespace {
            check.error(format!("{field}.namespace"), "must be the policy's own namespace");
        }
        let group = if target.group == "core" { "" } else { target.group.as_str() };
        if !TARGETS.contains(&(group, target.kind.as_str())) {
            let known = TARGETS.map(|(group, kind)| format!("{kind} (group {group:?})")).join(", ");
            check.error(
                &field,
                format!("{} of group {group:?} is no target; write one of {known}", target.kind),
            );
        }
        let (kind, name) = (target.kind, target.name);
        out.push(Reference { group: group.to_owned(), kind, name, ..Reference::default() });
    }
    out
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    selector: Option<SelectorText>,
    target_ref: Option<TargetText>,
    target_refs: Vec<TargetText>,
    jwt_rules: Vec<JwtText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct JwtText {
    issuer: String,
    audiences: Vec<String>,
    #[serde(alias = "jwks_uri")]
    jwks_uri: String,
    jwks: String,
    from_headers: Vec<HeaderText>,
    from_params: Vec<String>,
    from_cookies: Vec<String>,
    output_payload_to_header: String,
    forward_original_token: bool,
    output_claim_to_headers: Vec<ClaimText>,
    timeout: Option<String>,
    space_delimited_claims: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct HeaderText {
    name: String,
    prefix: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ClaimText {
    header: String,
    claim: String,
}

pub(super) fn request_authentication(doc: &Document<'_>) -> Result<Object, Vec<FieldError>> {
    let object: Resource<Spec> = shape(doc)?;
    let mut check = Check::new(doc);
    let meta = meta(doc, object.metadata, &mut check);
    let spec = object.spec.unwrap_or_default();
    let (selector, targets) =
        binding(spec.selector, spec.target_ref, spec.target_refs, &meta.namespace, &mut check);
    let mut rules = Vec::new();
    for (i, text) in spec.jwt_rules.into_iter().enumerate() {
        rules.push(jwt_rule(text, &format!("spec.jwtRules[{i}]"), &mut check));
    }
    let object = RequestAuthentication { meta, selector, targets, rules };
    check.finish(Object::RequestAuthentication(Arc::new(object)))
}

fn jwt_rule(text: JwtText, field: &str, check: &mut Check<'_>) -> l7::JwtRule {
    let at = |name: &str| format!("{field}.{name}");
    if text.issuer.is_empty() {
        check.error(at("issuer"), "missing; write the `iss` of the tokens");
    }
    if text.jwks.is_empty() && text.jwks_uri.is_empty() {
        check
            .error(at("jwksUri"), "missing; write jwksUri or jwks, the keys are not looked up by the issuer");
    }
    let is_url = text.jwks_uri.parse::<http::Uri>().is_ok_and(|uri| {
        matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some_and(|h| !h.is_empty())
    });
    if !text.jwks_uri.is_empty() && !is_url {
        check.error(
            at("jwksUri"),
            format!("{:?} is no URL; begin it with https:// or http://", text.jwks_uri),
        );
    }
    let is_set = |jwks: &str| {
        let value: Option<serde_json::Value> = serde_json::from_str(jwks).ok();
        value.is_some_and(|v| v.get("keys").is_some_and(serde_json::Value::is_array))
    };
    if !text.jwks.is_empty() && !is_set(&text.jwks) {
        check.error(at("jwks"), "is no set of keys; write JSON with a list named keys (RFC 7517)");
    }
    let mut from_headers = Vec::new();
    for (i, header) in text.from_headers.into_iter().enumerate() {
        let name = check.header_name(&at(&format!("fromHeaders[{i}].name")), &header.name);
        from_headers.push(TokenHeader { name, prefix: header.prefix });
    }
    let mut output_claim_to_headers = Vec::new();
    for (i, entry) in text.output_claim_to_headers.into_iter().enumerate() {
        let place = at(&format!("outputClaimToHeaders[{i}]"));
        if entry.claim.is_empty() {
            check.error(format!("{place}.claim"), "missing; name a claim");
        }
        let header = check.header_name(&format!("{place}.header"), &entry.header);
        output_claim_to_headers.push(ClaimHeader { header, claim: entry.claim });
    }
    let output_payload_to_header = match text.output_payload_to_header.as_str() {
        "" => String::new(),
        name => check.header_name(&at("outputPayloadToHeader"), name),
    };
    l7::JwtRule {
        issuer: text.issuer,
        audiences: text.audiences,
        jwks_uri: text.jwks_uri,
        jwks: text.jwks,
        from_headers,
        from_params: text.from_params,
        from_cookies: text.from_cookies,
        output_payload_to_header,
        forward_original_token: text.forward_original_token,
        output_claim_to_headers,
        timeout: check.timeout(&at("timeout"), text.timeout.as_deref()),
        space_delimited_claims: text.space_delimited_claims,
    }
}
