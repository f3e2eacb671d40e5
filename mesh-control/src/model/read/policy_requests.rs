//! Rules of an AuthorizationPolicy as waypoints evaluate them: every value as it is written.

use mesh_core::xds::proto::l7;

use super::Check;
use super::policy::{OperationText, RuleText, SourceText, WhenText, cidrs, strings};

/// Checks and carries over one rule. What nodes evaluate, too, is checked with their form of it.
pub(super) fn requests(
    text: &RuleText,
    field: &str,
    namespace: &str,
    check: &mut Check<'_>,
) -> l7::AuthorizationRule {
    let mut rule = l7::AuthorizationRule::default();
    for (i, from) in text.from.iter().enumerate() {
        let place = format!("{field}.from[{i}].source");
        rule.from.extend(from.source.as_ref().map(|s| source(s, &place, namespace, check)));
    }
    for (i, to) in text.to.iter().enumerate() {
        let place = format!("{field}.to[{i}].operation");
        rule.to.extend(to.operation.as_ref().map(|o| operation(o, &place, check)));
    }
    for (i, when) in text.when.iter().enumerate() {
        rule.when.push(condition(when, &format!("{field}.when[{i}]"), namespace, check));
    }
    rule
}

fn source(text: &SourceText, field: &str, namespace: &str, check: &mut Check<'_>) -> l7::PolicySource {
    let at = |name: &str| format!("{field}.{name}");
    strings(text.request_principals.clone(), &at("requestPrincipals"), check);
    strings(text.not_request_principals.clone(), &at("notRequestPrincipals"), check);
    cidrs(&text.remote_ip_blocks, &at("remoteIpBlocks"), check);
    cidrs(&text.not_remote_ip_blocks, &at("notRemoteIpBlocks"), check);
    l7::PolicySource {
        principals: text.principals.clone(),
        not_principals: text.not_principals.clone(),
        request_principals: text.request_principals.clone(),
        not_request_principals: text.not_request_principals.clone(),
        namespaces: text.namespaces.clone(),
        not_namespaces: text.not_namespaces.clone(),
        ip_blocks: text.ip_blocks.clone(),
        not_ip_blocks: text.not_ip_blocks.clone(),
        remote_ip_blocks: text.remote_ip_blocks.clone(),
        not_remote_ip_blocks: text.not_remote_ip_blocks.clone(),
        service_accounts: accounts(&text.service_accounts, namespace),
        not_service_accounts: accounts(&text.not_service_accounts, namespace),
        trust_domains: text.trust_domains.clone(),
        not_trust_domains: text.not_trust_domains.clone(),
    }
}

fn accounts(values: &[String], namespace: &str) -> Vec<String> {
    let complete = |v: &String| if v.contains('/') { v.clone() } else { format!("{namespace}/{v}") };
    values.iter().map(complete).collect()
}

fn operation(text: &OperationText, field: &str, check: &mut Check<'_>) -> l7::Operation {
    let at = |name: &str| format!("{field}.{name}");
    for (name, values) in [
        ("hosts", &text.hosts),
        ("notHosts", &text.not_hosts),
        ("methods", &text.methods),
        ("notMethods", &text.not_methods),
    ] {
        strings(values.clone(), &at(name), check);
    }
    for (name, values) in [("paths", &text.paths), ("notPaths", &text.not_paths)] {
        for (i, value) in values.iter().enumerate() {
            let place = at(&format!("{name}[{i}]"));
            if value.contains(['{', '}']) {
                template(value, &place, check);
            } else {
                strings(vec![value.clone()], &at(name), check);
            }
        }
    }
    l7::Operation {
        hosts: text.hosts.clone(),
        not_hosts: text.not_hosts.clone(),
        ports: text.ports.clone(),
        not_ports: text.not_ports.clone(),
        methods: text.methods.clone(),
        not_methods: text.not_methods.clone(),
        paths: text.paths.clone(),
        not_paths: text.not_paths.clone(),
    }
}

/// `{*}` is one segment, `{**}` any number of them and the last of these two in the template.
fn template(value: &str, field: &str, check: &mut Check<'_>) {
    let mut is_over = false;
    for segment in value.split('/') {
        match segment {
            "{*}" | "{**}" if is_over => {
                check.error(field, format!("{value:?} has {segment} after {{**}}; {{**}} comes last"));
                return;
            }
            "{**}" => is_over = true,
            "{*}" => {}
            other if other.contains(['{', '}', '*']) => {
                let fix = "a template has {*} or {**} as whole segments, and no other * or braces";
                check.error(field, format!("{value:?} has the segment {other:?}; {fix}"));
                return;
            }
            _ => {}
        }
    }
    if !value.starts_with('/') {
        check.error(field, format!("{value:?} is no path; begin it with /"));
    }
}

fn condition(text: &WhenText, field: &str, namespace: &str, check: &mut Check<'_>) -> l7::Condition {
    if text.key == "remote.ip" {
        cidrs(&text.values, &format!("{field}.values"), check);
        cidrs(&text.not_values, &format!("{field}.notValues"), check);
    }
    let values = |given: &[String]| match text.key.as_str() {
        "source.serviceAccount" => accounts(given, namespace),
        _ => given.to_vec(),
    };
    l7::Condition {
        key: text.key.clone(),
        values: values(&text.values),
        not_values: values(&text.not_values),
    }
}
