//! AuthorizationPolicy to L4 authorizations.
//!
//! One rule governs all of it: a predicate that a node cannot evaluate makes the policy stricter. An ALLOW rule
//! that has one is dropped. In a DENY rule it is left out, so that the rule denies more; an entry with nothing
//! left matches everything, so its whole list is left out (Istio sends an empty match there, which never
//! matches, and the rule denies nothing).

use std::collections::{BTreeMap, HashMap};

use ipnet::IpNet;
use mesh_core::xds::proto::security as wire;
use mesh_core::xds::proto::security::string_match::MatchType;

use super::datagrams::Datagrams;
use super::{Mesh, ip_bytes};
use crate::model::{
    Action, AuthorizationPolicy, Condition, Key, Kind, ObjectRef, Objects, Operation, Rule, Source, Values,
    When, selects,
};

const ACCEPTED: &str = "ZtunnelAccepted";

/// Policies that workloads list by key.
#[derive(Default)]
pub(super) struct SelectorPolicies {
    /// Those of the root namespace.
    everywhere: Vec<Selected>,
    by_namespace: HashMap<String, Vec<Selected>>,
}

/// A selector, and the key of the policy that has it.
type Selected = (BTreeMap<String, String>, String);

impl SelectorPolicies {
    pub(super) fn of(&self, namespace: &str, labels: &BTreeMap<String, String>) -> Vec<String> {
        let own = self.by_namespace.get(namespace).into_iter().flatten();
        let all = self.everywhere.iter().chain(own);
        all.filter(|(selector, _)| selects(selector, labels)).map(|(_, key)| key.clone()).collect()
    }
}

/// Converts all policies that nodes enforce.
pub(super) fn convert(
    objects: &Objects,
    mesh: &Mesh,
    out: &mut BTreeMap<String, wire::Authorization>,
    conditions: &mut Vec<Condition>,
) -> SelectorPolicies {
    let mut selectors = SelectorPolicies::default();
    let datagrams = Datagrams::of(objects);
    // Those with targets are for waypoints.
    for policy in objects.authorization_policies.values().filter(|p| p.targets.is_empty()) {
        let object = ObjectRef::of(Kind::AuthorizationPolicy, &policy.meta);
        let (authorization, condition) = authorization(policy, mesh, object);
        conditions.push(condition);
        let Some(authorization) = authorization else { continue };
        conditions.extend(datagrams.condition(objects, policy, &mesh.root_namespace));
        let key = policy.meta.key().to_string();
        let root = policy.meta.namespace == mesh.root_namespace;
        if !policy.selector.is_empty() {
            let selected = (policy.selector.clone(), key.clone());
            if root {
                selectors.everywhere.push(selected);
            } else {
                selectors.by_namespace.entry(policy.meta.namespace.clone()).or_default().push(selected);
            }
        }
        out.insert(key, authorization);
    }
    selectors
}

/// The resource of one policy, none when nodes do not get it, and what to say about it.
pub(super) fn authorization(
    policy: &AuthorizationPolicy,
    mesh: &Mesh,
    object: ObjectRef,
) -> (Option<wire::Authorization>, Condition) {
    let action = match policy.action {
        Action::Allow => wire::Action::Allow,
        Action::Deny => wire::Action::Deny,
        Action::Audit | Action::Custom => {
            let name = if policy.action == Action::Audit { "AUDIT" } else { "CUSTOM" };
            let message = format!("action {name} is not supported by nodes; the policy is not enforced");
            return (None, Condition::new(object, ACCEPTED, false, "UnsupportedValue", message));
        }
    };
    let mut rules = Vec::new();
    let mut dropped = Vec::new();
    let mut stripped = Vec::new();
    for (i, rule) in policy.rules.iter().enumerate() {
        let unsupported = unsupported(rule, &format!("rules[{i}]"));
        if action == wire::Action::Allow && !unsupported.is_empty() {
            dropped.extend(unsupported);
            continue;
        }
        stripped.extend(unsupported);
        rules.extend(rule_groups(rule, mesh));
    }
    let scope = match (policy.selector.is_empty(), policy.meta.namespace == mesh.root_namespace) {
        (false, _) => wire::Scope::WorkloadSelector,
        (true, true) => wire::Scope::Global,
        (true, false) => wire::Scope::Namespace,
    };
    let authorization = wire::Authorization {
        name: policy.meta.name.clone(),
        namespace: policy.meta.namespace.clone(),
        scope: scope.into(),
        action: action.into(),
        rules,
        dry_run: policy.dry_run,
        extensions: Vec::new(),
    };
    let condition = if dropped.is_empty() && stripped.is_empty() {
        let message = if policy.dry_run {
            "attached to nodes, dry run: logged, not enforced"
        } else {
            "attached to nodes"
        };
        Condition::new(object, ACCEPTED, true, "Accepted", message)
    } else if !dropped.is_empty() {
        let message = format!(
            "nodes cannot evaluate {}; ALLOW rules that use them are left out, so the policy allows less",
            dropped.join(", ")
        );
        Condition::new(object, ACCEPTED, true, "UnsupportedValue", message)
    } else {
        let message = format!(
            "nodes cannot evaluate {}; the DENY rules apply without them, so the policy denies more",
            stripped.join(", ")
        );
        Condition::new(object, ACCEPTED, true, "UnsupportedValue", message)
    };
    (Some(authorization), condition)
}

/// Paths of what a node cannot evaluate.
fn unsupported(rule: &Rule, at: &str) -> Vec<String> {
    let mut out = Vec::new();
    for (i, source) in rule.from.iter().enumerate() {
        out.extend(source.l7.iter().map(|f| format!("{at}.from[{i}].source.{f}")));
        for (values, name) in
            [(&source.trust_domains.any, "trustDomains"), (&source.trust_domains.not, "notTrustDomains")]
        {
            if values.iter().any(|v| is_suffix(v)) {
                out.push(format!("{at}.from[{i}].source.{name} (suffix match)"));
            }
        }
    }
    for (i, operation) in rule.to.iter().enumerate() {
        out.extend(operation.l7.iter().map(|f| format!("{at}.to[{i}].operation.{f}")));
    }
    for (i, when) in rule.when.iter().enumerate() {
        match when {
            When::L7(key) => out.push(format!("{at}.when[{i}] ({key})")),
            When::SourceTrustDomain(v) if v.any.iter().chain(&v.not).any(|v| is_suffix(v)) => {
                out.push(format!("{at}.when[{i}] (source.trustDomain, suffix match)"));
            }
            _ => {}
        }
    }
    out
}

/// One rule becomes several only where a source demands two things of one attribute, which one match cannot
/// say: then each source gets a rule of its own (rules are OR-ed, as sources are).
fn rule_groups(rule: &Rule, mesh: &Mesh) -> Vec<wire::Rule> {
    let mut common = Vec::new();
    common.extend(clause(rule.to.iter().map(operation_match).collect()));
    for when in &rule.when {
        let matches = when_matches(when, mesh);
        common.extend(matches.into_iter().filter_map(|m| clause(vec![m])));
    }
    let sources: Vec<Vec<wire::Match>> = rule.from.iter().map(|s| source_matches(s, mesh)).collect();
    if sources.iter().any(Vec::is_empty) || sources.is_empty() {
        // A source with nothing left matches everyone.
        return vec![wire::Rule { clauses: common }];
    }
    if sources.iter().all(|m| m.len() == 1) {
        let matches = sources.into_iter().flatten().collect();
        let clauses = clause(matches).into_iter().chain(common).collect();
        return vec![wire::Rule { clauses }];
    }
    sources
        .into_iter()
        .map(|matches| {
            let own = matches.into_iter().filter_map(|m| clause(vec![m]));
            wire::Rule { clauses: own.chain(common.iter().cloned()).collect() }
        })
        .collect()
}

/// A clause of alternatives; none when there are none, or when one of them matches everything.
fn clause(matches: Vec<wire::Match>) -> Option<wire::Clause> {
    let all = matches.is_empty() || matches.iter().any(|m| *m == wire::Match::default());
    (!all).then_some(wire::Clause { matches })
}

fn operation_match(operation: &Operation) -> wire::Match {
    wire::Match {
        destination_ports: operation.ports.any.iter().map(|p| u32::from(*p)).collect(),
        not_destination_ports: operation.ports.not.iter().map(|p| u32::from(*p)).collect(),
        ..wire::Match::default()
    }
}

/// What a source demands, AND-ed; nothing when everyone satisfies it.
fn source_matches(source: &Source, mesh: &Mesh) -> Vec<wire::Match> {
    let domains = trust_domains(&source.trust_domains, mesh);
    let mut first = wire::Match {
        namespaces: strings(&source.namespaces.any),
        not_namespaces: strings(&source.namespaces.not),
        principals: principals(&source.principals.any, mesh),
        not_principals: principals(&source.principals.not, mesh),
        source_ips: addresses(&source.ip_blocks.any),
        not_source_ips: addresses(&source.ip_blocks.not),
        service_accounts: accounts(&source.service_accounts.any),
        not_service_accounts: accounts(&source.service_accounts.not),
        ..wire::Match::default()
    };
    // Not-fields of one attribute are AND-ed anyway.
    first.not_principals.extend(domains.not);
    let mut second = wire::Match::default();
    if first.principals.is_empty() {
        first.principals = domains.any;
    } else {
        second.principals = domains.any;
    }
    [first, second].into_iter().filter(|m| *m != wire::Match::default()).collect()
}

/// Clauses of one condition; nothing for one that only an L7 proxy can evaluate.
fn when_matches(when: &When, mesh: &Mesh) -> Vec<wire::Match> {
    let empty = wire::Match::default;
    let found = match when {
        When::SourceIp(v) => {
            wire::Match { source_ips: addresses(&v.any), not_source_ips: addresses(&v.not), ..empty() }
        }
        When::DestinationIp(v) => wire::Match {
            destination_ips: addresses(&v.any),
            not_destination_ips: addresses(&v.not),
            ..empty()
        },
        When::DestinationPort(v) => wire::Match {
            destination_ports: v.any.iter().map(|p| u32::from(*p)).collect(),
            not_destination_ports: v.not.iter().map(|p| u32::from(*p)).collect(),
            ..empty()
        },
        When::SourceNamespace(v) => {
            wire::Match { namespaces: strings(&v.any), not_namespaces: strings(&v.not), ..empty() }
        }
        When::SourcePrincipal(v) => wire::Match {
            principals: principals(&v.any, mesh),
            not_principals: principals(&v.not, mesh),
            ..empty()
        },
        When::SourceServiceAccount(v) => wire::Match {
            service_accounts: accounts(&v.any),
            not_service_accounts: accounts(&v.not),
            ..empty()
        },
        When::SourceTrustDomain(v) => {
            let domains = trust_domains(v, mesh);
            wire::Match { principals: domains.any, not_principals: domains.not, ..empty() }
        }
        When::L7(_) => empty(),
    };
    if found == empty() { Vec::new() } else { vec![found] }
}

fn is_suffix(value: &str) -> bool {
    value.len() > 1 && value.starts_with('*')
}

fn string(value: &str) -> wire::StringMatch {
    let kind = if value == "*" {
        MatchType::Presence(())
    } else if let Some(suffix) = value.strip_prefix('*') {
        MatchType::Suffix(suffix.to_owned())
    } else if let Some(prefix) = value.strip_suffix('*') {
        MatchType::Prefix(prefix.to_owned())
    } else {
        MatchType::Exact(value.to_owned())
    };
    wire::StringMatch { match_type: Some(kind) }
}

fn strings(values: &[String]) -> Vec<wire::StringMatch> {
    values.iter().map(|v| string(v)).collect()
}

/// The trust domains that a policy's trust domain means: the mesh's own stands for itself and its aliases, and
/// so do the aliases and `cluster.local`, which Istio reads as "this mesh".
fn meant_domains(domain: &str, mesh: &Mesh) -> Vec<String> {
    let own = domain == mesh.trust_domain
        || domain == mesh_core::identity::DEFAULT_TRUST_DOMAIN
        || mesh.trust_domain_aliases.iter().any(|a| a == domain);
    if !own {
        return vec![domain.to_owned()];
    }
    let mut all = vec![mesh.trust_domain.clone()];
    all.extend(mesh.trust_domain_aliases.iter().filter(|a| **a != mesh.trust_domain).cloned());
    all
}

fn principals(values: &[String], mesh: &Mesh) -> Vec<wire::StringMatch> {
    let expand = |value: &String| match value.split_once('/') {
        Some((domain, rest)) if !domain.contains('*') => {
            meant_domains(domain, mesh).iter().map(|d| string(&format!("{d}/{rest}"))).collect()
        }
        _ => vec![string(value)],
    };
    values.iter().flat_map(expand).collect()
}

/// A trust domain is what a principal starts with. Suffixes cannot be said and are left out with the whole
/// list (the callers of ALLOW rules never get here with one).
fn trust_domains(values: &Values<String>, mesh: &Mesh) -> Values<wire::StringMatch> {
    let convert = |values: &[String]| -> Vec<wire::StringMatch> {
        if values.iter().any(|v| is_suffix(v)) {
            return Vec::new();
        }
        let one = |value: &String| -> Vec<wire::StringMatch> {
            if value.ends_with('*') {
                return vec![string(value)];
            }
            let prefix =
                |d: &String| wire::StringMatch { match_type: Some(MatchType::Prefix(format!("{d}/"))) };
            meant_domains(value, mesh).iter().map(prefix).collect()
        };
        values.iter().flat_map(one).collect()
    };
    Values { any: convert(&values.any), not: convert(&values.not) }
}

fn addresses(nets: &[IpNet]) -> Vec<wire::Address> {
    nets.iter()
        .map(|n| wire::Address { address: ip_bytes(n.addr()), length: n.prefix_len().into() })
        .collect()
}

fn accounts(keys: &[Key]) -> Vec<wire::ServiceAccountMatch> {
    keys.iter()
        .map(|k| wire::ServiceAccountMatch {
            namespace: k.namespace.clone(),
            service_account: k.name.clone(),
        })
        .collect()
}
