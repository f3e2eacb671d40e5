//! Reader of AuthorizationPolicy.

use std::sync::Arc;

use ipnet::IpNet;
use serde::Deserialize;

use super::super::{Action, AuthorizationPolicy, Key, Object, Operation, Rule, Source, Values, When};
use super::authentication::{TargetText, binding};
use super::istio::{Resource, SelectorText};
use super::policy_requests::requests;
use super::{Check, Document, FieldError, meta, shape};

#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum ActionText {
    #[default]
    Allow,
    Deny,
    Audit,
    Custom,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PolicySpec {
    selector: Option<SelectorText>,
    target_ref: Option<TargetText>,
    target_refs: Vec<TargetText>,
    action: ActionText,
    provider: Option<ProviderText>,
    rules: Vec<RuleText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ProviderText {
    name: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct RuleText {
    pub(super) from: Vec<FromText>,
    pub(super) to: Vec<ToText>,
    pub(super) when: Vec<WhenText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct FromText {
    pub(super) source: Option<SourceText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct SourceText {
    pub(super) principals: Vec<String>,
    pub(super) not_principals: Vec<String>,
    pub(super) request_principals: Vec<String>,
    pub(super) not_request_principals: Vec<String>,
    pub(super) namespaces: Vec<String>,
    pub(super) not_namespaces: Vec<String>,
    pub(super) service_accounts: Vec<String>,
    pub(super) not_service_accounts: Vec<String>,
    pub(super) trust_domains: Vec<String>,
    pub(super) not_trust_domains: Vec<String>,
    pub(super) ip_blocks: Vec<String>,
    pub(super) not_ip_blocks: Vec<String>,
    pub(super) remote_ip_blocks: Vec<String>,
    pub(super) not_remote_ip_blocks: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct ToText {
    pub(super) operation: Option<OperationText>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct OperationText {
    pub(super) hosts: Vec<String>,
    pub(super) not_hosts: Vec<String>,
    pub(super) ports: Vec<String>,
    pub(super) not_ports: Vec<String>,
    pub(super) methods: Vec<String>,
    pub(super) not_methods: Vec<String>,
    pub(super) paths: Vec<String>,
    pub(super) not_paths: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct WhenText {
    pub(super) key: String,
    pub(super) values: Vec<String>,
    pub(super) not_values: Vec<String>,
}

pub(super) fn authorization_policy(doc: &Document<'_>) -> Result<Object, Vec<FieldError>> {
    let object: Resource<PolicySpec> = shape(doc)?;
    let mut check = Check::new(doc);
    let meta = meta(doc, object.metadata, &mut check);
    let spec = object.spec.unwrap_or_default();
    let (selector, targets) =
        binding(spec.selector, spec.target_ref, spec.target_refs, &meta.namespace, &mut check);
    let action = match spec.action {
        ActionText::Allow => Action::Allow,
        ActionText::Deny => Action::Deny,
        ActionText::Audit => Action::Audit,
        ActionText::Custom => Action::Custom,
    };
    if matches!(action, Action::Custom) != spec.provider.is_some() {
        check.error("spec.provider", "belongs to action CUSTOM and only to it");
    }
    let provider = spec.provider.map(|p| p.name);
    if provider.as_ref().is_some_and(String::is_empty) {
        check.error("spec.provider.name", "missing; name an entry of extensionProviders in MeshConfig");
    }
    let dry_run = match meta.annotation("istio.io/dry-run") {
        None | Some("false") => false,
        Some("true") => true,
        Some(other) => {
            check.error(
                "metadata.annotations.istio.io/dry-run",
                format!("{other:?} is neither \"true\" nor \"false\""),
            );
            false
        }
    };
    let mut wanted = Vec::new();
    for (i, text) in spec.rules.iter().enumerate() {
        wanted.push(requests(text, &format!("spec.rules[{i}]"), &meta.namespace, &mut check));
    }
    let rules = spec
        .rules
        .into_iter()
        .enumerate()
        .map(|(i, r)| rule(r, &format!("spec.rules[{i}]"), &meta.namespace, &mut check))
        .collect();
    check.finish(Object::AuthorizationPolicy(Arc::new(AuthorizationPolicy {
        meta,
        selector,
        targets,
        action,
        provider: provider.unwrap_or_default(),
        dry_run,
        rules,
        requests: wanted,
    })))
}

fn rule(text: RuleText, field: &str, namespace: &str, check: &mut Check<'_>) -> Rule {
    let mut out = Rule::default();
    for (i, from) in text.from.into_iter().enumerate() {
        let place = format!("{field}.from[{i}].source");
        match from.source {
            Some(text) => out.from.push(source(text, &place, namespace, check)),
            None => check.error(place, "missing; every entry of from has a source"),
        }
    }
    for (i, to) in text.to.into_iter().enumerate() {
        let place = format!("{field}.to[{i}].operation");
        match to.operation {
            Some(text) => out.to.push(operation(text, &place, check)),
            None => check.error(place, "missing; every entry of to has an operation"),
        }
    }
    for (i, text) in text.when.into_iter().enumerate() {
        out.when.extend(when(text, &format!("{field}.when[{i}]"), namespace, check));
    }
    out
}

/// String values: none empty, a `*` only at one end.
pub(super) fn strings(values: Vec<String>, field: &str, check: &mut Check<'_>) -> Vec<String> {
    for (i, value) in values.iter().enumerate() {
        let inner = value.strip_prefix('*').unwrap_or(value);
        let inner = if inner.len() == value.len() { inner.strip_suffix('*').unwrap_or(inner) } else { inner };
        if value.is_empty() {
            check.error(format!("{field}[{i}]"), "is empty; write a value, or * for any");
        } else if inner.contains('*') {
            check.error(
                format!("{field}[{i}]"),
                format!("{value:?} has * inside; it may stand alone, first or last"),
            );
        }
    }
    values
}

/// Principals: as strings, and without the scheme that Istio's policies do not write.
fn principals(values: Vec<String>, field: &str, check: &mut Check<'_>) -> Vec<String> {
    for (i, value) in values.iter().enumerate() {
        if let Some(rest) = value.strip_prefix("spiffe://") {
            check.error(format!("{field}[{i}]"), format!("write principals without spiffe://: {rest}"));
        }
    }
    strings(values, field, check)
}

pub(super) fn cidrs(values: &[String], field: &str, check: &mut Check<'_>) -> Vec<IpNet> {
    values.iter().enumerate().filter_map(|(i, v)| check.cidr(&format!("{field}[{i}]"), v)).collect()
}

fn ports(values: &[String], field: &str, check: &mut Check<'_>) -> Vec<u16> {
    values.iter().enumerate().map(|(i, v)| check.port_text(&format!("{field}[{i}]"), v)).collect()
}

/// `namespace/name`, or `name` in the policy's own namespace; no wildcards.
fn accounts(values: &[String], field: &str, namespace: &str, check: &mut Check<'_>) -> Vec<Key> {
    let mut out = Vec::new();
    for (i, value) in values.iter().enumerate() {
        let key = match value.split_once('/') {
            Some((ns, name)) => Key::new(ns, name),
            None => Key::new(namespace, value.as_str()),
        };
        let bad = |s: &str| s.is_empty() || s.contains(['*', '/']);
        if bad(&key.namespace) || bad(&key.name) {
            check.error(
                format!("{field}[{i}]"),
                format!("{value:?} is no service account; write namespace/name or name, without *"),
            );
        }
        out.push(key);
    }
    out
}

fn source(text: SourceText, field: &str, namespace: &str, check: &mut Check<'_>) -> Source {
    let at = |name: &str| format!("{field}.{name}");
    let l7 = set_fields(&[
        ("requestPrincipals", &text.request_principals),
        ("notRequestPrincipals", &text.not_request_principals),
        ("remoteIpBlocks", &text.remote_ip_blocks),
        ("notRemoteIpBlocks", &text.not_remote_ip_blocks),
    ]);
    let with_accounts = !text.service_accounts.is_empty() || !text.not_service_accounts.is_empty();
    if with_accounts && (!text.principals.is_empty() || !text.namespaces.is_empty()) {
        check.error(at("serviceAccounts"), "may not stand beside principals or namespaces in one source");
    }
    let out = Source {
        principals: Values {
            any: principals(text.principals, &at("principals"), check),
            not: principals(text.not_principals, &at("notPrincipals"), check),
        },
        namespaces: Values {
            any: strings(text.namespaces, &at("namespaces"), check),
            not: strings(text.not_namespaces, &at("notNamespaces"), check),
        },
        service_accounts: Values {
            any: accounts(&text.service_accounts, &at("serviceAccounts"), namespace, check),
            not: accounts(&text.not_service_accounts, &at("notServiceAccounts"), namespace, check),
        },
        trust_domains: Values {
            any: strings(text.trust_domains, &at("trustDomains"), check),
            not: strings(text.not_trust_domains, &at("notTrustDomains"), check),
        },
        ip_blocks: Values {
            any: cidrs(&text.ip_blocks, &at("ipBlocks"), check),
            not: cidrs(&text.not_ip_blocks, &at("notIpBlocks"), check),
        },
        l7,
    };
    let empty = out.principals.is_empty()
        && out.namespaces.is_empty()
        && out.service_accounts.is_empty()
        && out.trust_domains.is_empty()
        && text.ip_blocks.is_empty()
        && text.not_ip_blocks.is_empty()
        && out.l7.is_empty();
    if empty {
        check
            .error(field, "is empty; name at least one of principals, namespaces, serviceAccounts, ipBlocks");
    }
    out
}

fn operation(text: OperationText, field: &str, check: &mut Check<'_>) -> Operation {
    let l7 = set_fields(&[
        ("hosts", &text.hosts),
        ("notHosts", &text.not_hosts),
        ("methods", &text.methods),
        ("notMethods", &text.not_methods),
        ("paths", &text.paths),
        ("notPaths", &text.not_paths),
    ]);
    if l7.is_empty() && text.ports.is_empty() && text.not_ports.is_empty() {
        check.error(field, "is empty; name at least one of ports, hosts, methods, paths");
    }
    let ports = Values {
        any: ports(&text.ports, &format!("{field}.ports"), check),
        not: ports(&text.not_ports, &format!("{field}.notPorts"), check),
    };
    Operation { ports, l7 }
}

fn set_fields(fields: &[(&str, &Vec<String>)]) -> Vec<String> {
    fields.iter().filter(|(_, v)| !v.is_empty()).map(|(n, _)| (*n).to_owned()).collect()
}

fn when(text: WhenText, field: &str, namespace: &str, check: &mut Check<'_>) -> Option<When> {
    if text.values.is_empty() && text.not_values.is_empty() {
        check.error(field, "has neither values nor notValues");
        return None;
    }
    let (any, not) = (format!("{field}.values"), format!("{field}.notValues"));
    let mut nets =
        || Values { any: cidrs(&text.values, &any, check), not: cidrs(&text.not_values, &not, check) };
    Some(match text.key.as_str() {
        "source.ip" => When::SourceIp(nets()),
        "destination.ip" => When::DestinationIp(nets()),
        "destination.port" => When::DestinationPort(Values {
            any: ports(&text.values, &any, check),
            not: ports(&text.not_values, &not, check),
        }),
        "source.serviceAccount" => When::SourceServiceAccount(Values {
            any: accounts(&text.values, &any, namespace, check),
            not: accounts(&text.not_values, &not, namespace, check),
        }),
        "source.principal" => When::SourcePrincipal(Values {
            any: principals(text.values, &any, check),
            not: principals(text.not_values, &not, check),
        }),
        key @ ("source.namespace" | "source.trustDomain") => {
            let domain = key == "source.trustDomain";
            let values =
                Values { any: strings(text.values, &any, check), not: strings(text.not_values, &not, check) };
            if domain { When::SourceTrustDomain(values) } else { When::SourceNamespace(values) }
        }
        key if is_l7_key(key) => When::L7(key.to_owned()),
        key => {
            check.error(
                format!("{field}.key"),
                format!(
                    "{key:?} is unknown; keys of connections are source.ip, source.namespace, source.principal, \
                     source.serviceAccount, source.trustDomain, destination.ip, destination.port"
                ),
            );
            return None;
        }
    })
}

fn is_l7_key(key: &str) -> bool {
    matches!(key, "remote.ip" | "connection.sni" | "request.auth.principal" | "request.auth.audiences")
        || key == "request.auth.presenter"
        || key.starts_with("request.headers[")
        || key.starts_with("request.auth.claims[")
        || key.starts_with("experimental.envoy.filters.")
}
