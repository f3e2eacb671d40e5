//! Readers of TCPRoute, TLSRoute and ReferenceGrant (Gateway API v1).

use std::sync::Arc;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::super::l7::{GatewayRoute, GatewayTcp, ReferenceGrant};
use super::super::{Kind, Object};
use super::gateway_route::{BackendText, Notes, ParentText, parents, reference, weight};
use super::istio::Resource;
use super::{Check, Document, FieldError, meta, shape};

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
