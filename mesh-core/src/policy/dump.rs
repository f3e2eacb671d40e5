//! Policies as JSON, in the shape of ztunnel's config dump.

use std::fmt::Display;

use serde_json::{Map, Value, json};

use super::{Action, Match, Policy, Predicates, Scope, Text};

impl Policy {
    /// One entry of `policies`. `rules` holds rules, their clauses and the matches of each clause.
    #[must_use]
    pub fn dump(&self) -> Value {
        let rules: Value = self
            .rules
            .iter()
            .map(|rule| {
                rule.clauses.iter().map(|c| c.matches.iter().map(dump_match).collect::<Value>()).collect()
            })
            .collect::<Vec<Value>>()
            .into();
        let mut value = json!({
            "name": self.key.split_once('/').map_or(&*self.key, |(_, name)| name),
            "namespace": &*self.namespace,
            "scope": match self.scope {
                Scope::Global => "Global",
                Scope::Namespace => "Namespace",
                Scope::WorkloadSelector => "WorkloadSelector",
            },
            "action": match self.action {
                Action::Allow => "Allow",
                Action::Deny => "Deny",
            },
            "rules": rules,
        });
        if self.dry_run {
            value["dryRun"] = json!(true);
        }
        value
    }
}

fn dump_match(m: &Match) -> Value {
    let mut map = Map::new();
    put(&mut map, "namespaces", &m.namespaces, text);
    put(&mut map, "notNamespaces", &m.not_namespaces, text);
    put(&mut map, "principals", &m.principals, text);
    put(&mut map, "notPrincipals", &m.not_principals, text);
    put(&mut map, "sourceIps", &m.source_ips, display);
    put(&mut map, "notSourceIps", &m.not_source_ips, display);
    put(&mut map, "destinationIps", &m.destination_ips, display);
    put(&mut map, "notDestinationIps", &m.not_destination_ips, display);
    put(&mut map, "destinationPorts", &m.destination_ports, |port| json!(port));
    put(&mut map, "notDestinationPorts", &m.not_destination_ports, |port| json!(port));
    let account = |a: &super::ServiceAccount| json!({"namespace": &*a.namespace, "serviceAccount": &*a.name});
    put(&mut map, "serviceAccounts", &m.service_accounts, account);
    put(&mut map, "notServiceAccounts", &m.not_service_accounts, account);
    if m.unreadable {
        map.insert("unreadable".to_owned(), json!(["extensions"]));
    }
    Value::Object(map)
}

fn put<T>(map: &mut Map<String, Value>, key: &str, list: &Predicates<T>, dump: impl Fn(&T) -> Value) {
    if !list.values.is_empty() {
        map.insert(key.to_owned(), list.values.iter().map(dump).collect());
    }
    if list.unreadable {
        let unreadable = map.entry("unreadable").or_insert_with(|| json!([]));
        if let Some(keys) = unreadable.as_array_mut() {
            keys.push(json!(key));
        }
    }
}

fn display(value: &impl Display) -> Value {
    json!(value.to_string())
}

fn text(text: &Text) -> Value {
    match text {
        Text::Exact(value) => json!({"Exact": &**value}),
        Text::Prefix(value) => json!({"Prefix": &**value}),
        Text::Suffix(value) => json!({"Suffix": &**value}),
        Text::Presence => json!("Presence"),
    }
}
