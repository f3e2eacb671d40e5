//! What people see of rules: `meshctl waypoint routes`.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use mesh_core::admin::waypoint::{DestinationEntry, RouteTable, RuleEntry};

use super::compiled::Entry;
use super::matching::{Condition, Field, Match, PathTest, ValueTest};
use super::rule::{Action, Forward, Rule};
use super::table::PortRules;
use super::tcp::TcpEntry;
use super::{Backend, Routes};

impl Routes {
    /// The rules of every service and port, in the order in which they are tried.
    #[must_use]
    pub fn dump(&self) -> Vec<RouteTable> {
        let mut hosts: Vec<_> = self.services.iter().collect();
        hosts.sort_by_key(|(host, _)| *host);
        let tables = hosts.into_iter().flat_map(|(host, rules)| {
            rules.all_ports().map(|(port, rules)| RouteTable {
                host: host.to_string(),
                port,
                rules: entries(rules),
            })
        });
        tables.filter(|table| !table.rules.is_empty()).collect()
    }
}

fn entries(rules: &PortRules) -> Vec<RuleEntry> {
    let mut all: Vec<(Option<&Arc<Rule>>, RuleEntry)> = Vec::new();
    for entry in rules.http.iter().flat_map(|index| index.entries()) {
        match all.last_mut() {
            // Matches of one rule that follow one another are one line.
            Some((Some(rule), last)) if Arc::ptr_eq(rule, &entry.rule) => {
                last.matches.extend(matching(&entry.matching));
            }
            _ => all.push((Some(&entry.rule), http(entry))),
        }
    }
    all.extend(rules.tcp_entries().iter().map(|entry| (None, tcp(entry))));
    all.into_iter().map(|(_, entry)| entry).collect()
}

fn http(entry: &Entry) -> RuleEntry {
    let rule = &*entry.rule;
    let (destinations, answer) = match &rule.action {
        Action::Forward(forward) => (destinations(forward), String::new()),
        Action::Redirect(redirect) => (Vec::new(), format!("redirect {}", redirect.status.as_u16())),
        Action::Respond(response) => (Vec::new(), format!("answer {}", response.status.as_u16())),
        Action::Invalid(reason) => (Vec::new(), format!("answer 500: {reason}")),
    };
    RuleEntry {
        object: rule.resource.to_string(),
        rule: rule.name.to_string(),
        protocol: "http".to_owned(),
        matches: matching(&entry.matching).into_iter().collect(),
        destinations,
        answer,
        policies: policies(rule),
        hits: rule.hits.load(Ordering::Relaxed),
    }
}

fn tcp(entry: &TcpEntry) -> RuleEntry {
    let rule = &*entry.rule;
    RuleEntry {
        object: rule.resource.to_string(),
        rule: rule.name.to_string(),
        protocol: "tcp".to_owned(),
        matches: entry.describe(),
        destinations: destinations(&rule.forward),
        answer: rule.invalid.as_ref().map(|reason| format!("reset: {reason}")).unwrap_or_default(),
        policies: Vec::new(),
        hits: rule.hits.load(Ordering::Relaxed),
    }
}

fn destinations(forward: &Forward) -> Vec<DestinationEntry> {
    let one = |at: &super::WeightedBackend| {
        let Backend { hostname, port, subset, invalid, .. } = &at.backend;
        DestinationEntry {
            service: hostname.to_string(),
            port: port.unwrap_or_default(),
            subset: subset.as_deref().unwrap_or_default().to_owned(),
            weight: at.weight,
            invalid: invalid.as_deref().unwrap_or_default().to_owned(),
        }
    };
    forward.backends.iter().map(one).collect()
}

/// What is done to a rule's requests beside sending them on.
fn policies(rule: &Rule) -> Vec<String> {
    let mut all = Vec::new();
    if let Some(timeout) = rule.timeout {
        all.push(format!("timeout {}", humantime::format_duration(timeout)));
    }
    if let Some(retry) = &rule.retry {
        let on = if retry.on.is_empty() { String::new() } else { format!(" on {}", retry.on.join(",")) };
        all.push(format!("retries {}{on}", retry.attempts));
    }
    all.extend(rule.fault.as_ref().map(|fault| format!("fault {fault}")));
    all.extend(
        rule.mirrors.iter().map(|mirror| format!("mirror {} {}", mirror.backend.hostname, mirror.share)),
    );
    if let Some(limit) = &rule.rate_limit {
        all.push(format!("rate limit {} tokens", limit.limit.tokens));
    }
    for (set, name) in [
        (rule.rewrite.is_some(), "rewrite"),
        (rule.cors.is_some(), "cors"),
        (rule.session.is_some(), "session persistence"),
        (!rule.request_headers.is_empty(), "request headers"),
        (!rule.response_headers.is_empty(), "response headers"),
    ] {
        if set {
            all.push(name.to_owned());
        }
    }
    all
}

/// What a match asks for; none: nothing.
fn matching(matching: &Match) -> Option<String> {
    let mut parts = Vec::new();
    if matching.port != 0 {
        parts.push(format!("port {}", matching.port));
    }
    parts.extend(path(&matching.path));
    parts.extend(matching.conditions.iter().map(condition));
    (!parts.is_empty()).then(|| parts.join(", "))
}

fn path(test: &PathTest) -> Option<String> {
    Some(match test {
        PathTest::Any => return None,
        PathTest::Segments(text) if text.text.is_empty() => return None,
        PathTest::Exact(text) => format!("path is {}", text.text),
        PathTest::Prefix(text) => format!("path begins with {}", text.text),
        PathTest::Segments(text) => format!("path within {}", text.text),
        PathTest::Regex(pattern) => format!("path matches {}", pattern.source()),
        PathTest::Broken => "a path that cannot be read".to_owned(),
    })
}

fn condition(condition: &Condition) -> String {
    let mut text = match &condition.field {
        Field::Method => "method".to_owned(),
        Field::Scheme => "scheme".to_owned(),
        Field::Authority => "host".to_owned(),
        Field::Header(name) => format!("header {name}"),
        Field::Query(name) => format!("parameter {name}"),
        Field::SourceNamespace => "source namespace".to_owned(),
        Field::SourceLabel(key) => format!("source label {key}"),
        Field::Claim(path) => format!("claim {}", path.join(".")),
    };
    let not = if condition.invert { "not " } else { "" };
    // Writing to a text cannot fail.
    let _ = match &condition.test {
        ValueTest::Exact(value) => write!(text, " {not}is {}", value.text),
        ValueTest::Prefix(value) => write!(text, " {not}begins with {}", value.text),
        ValueTest::Suffix(value) => write!(text, " {not}ends with {}", value.text),
        ValueTest::Regex(pattern) => write!(text, " {not}matches {}", pattern.source()),
        ValueTest::Present if condition.invert => write!(text, " absent"),
        ValueTest::Present => write!(text, " present"),
        ValueTest::Broken => write!(text, " cannot be compared"),
    };
    text
}
