//! Reading policies from the wire.

use super::{Action, Clause, Match, Policy, Predicates, Rule, Scope, ServiceAccount, Text};
use crate::state::{Context, DecodeError, Problem, cidr_from_bytes};
use crate::xds::proto::security as wire;

impl Policy {
    /// Validates the wire form.
    ///
    /// # Errors
    /// A missing name and unknown scopes or actions: what such a policy wants cannot be guessed, so the resource is
    /// rejected and the last version of it stays in force. Values of a match that cannot be evaluated are no
    /// error; they make the policy stricter (module head).
    pub fn decode(msg: &wire::Authorization) -> Result<Self, DecodeError> {
        let key = format!("{}/{}", msg.namespace, msg.name);
        let cx = Context { kind: "authorization policy", key: &key };
        if msg.name.is_empty() {
            return Err(cx.error("name", Problem::Missing("the name of the policy")));
        }
        let scope = match cx.known("scope", msg.scope, "GLOBAL=0, NAMESPACE=1, WORKLOAD_SELECTOR=2")? {
            wire::Scope::Global => Scope::Global,
            wire::Scope::Namespace => Scope::Namespace,
            wire::Scope::WorkloadSelector => Scope::WorkloadSelector,
        };
        let action = match cx.known("action", msg.action, "ALLOW=0, DENY=1")? {
            wire::Action::Allow => Action::Allow,
            wire::Action::Deny => Action::Deny,
        };
        let clause =
            |clause: &wire::Clause| Clause { matches: clause.matches.iter().map(decode_match).collect() };
        let rule = |rule: &wire::Rule| Rule { clauses: rule.clauses.iter().map(clause).collect() };
        let policy = Self {
            namespace: msg.namespace.as_str().into(),
            scope,
            action,
            dry_run: msg.dry_run,
            rules: msg.rules.iter().map(rule).collect(),
            key: key.as_str().into(),
        };
        if policy.is_partly_unreadable() {
            let effect = match action {
                Action::Allow => "rules that need them do not match",
                Action::Deny => "rules that need them match",
            };
            tracing::warn!(
                "authorization policy {key}: has values that this version cannot evaluate; {effect}"
            );
        }
        Ok(policy)
    }

    /// Whether a rule has values that cannot be evaluated.
    #[must_use]
    pub fn is_partly_unreadable(&self) -> bool {
        self.rules
            .iter()
            .flat_map(|rule| &rule.clauses)
            .flat_map(|clause| &clause.matches)
            .any(Match::is_partly_unreadable)
    }
}

impl Match {
    fn is_partly_unreadable(&self) -> bool {
        self.unreadable
            || self.namespaces.unreadable
            || self.not_namespaces.unreadable
            || self.principals.unreadable
            || self.not_principals.unreadable
            || self.source_ips.unreadable
            || self.not_source_ips.unreadable
            || self.destination_ips.unreadable
            || self.not_destination_ips.unreadable
            || self.destination_ports.unreadable
            || self.not_destination_ports.unreadable
            || self.service_accounts.unreadable
            || self.not_service_accounts.unreadable
    }
}

fn decode_match(msg: &wire::Match) -> Match {
    Match {
        namespaces: decode_values(&msg.namespaces, decode_text),
        not_namespaces: decode_values(&msg.not_namespaces, decode_text),
        principals: decode_values(&msg.principals, decode_text),
        not_principals: decode_values(&msg.not_principals, decode_text),
        source_ips: decode_values(&msg.source_ips, |a| cidr_from_bytes(&a.address, a.length)),
        not_source_ips: decode_values(&msg.not_source_ips, |a| cidr_from_bytes(&a.address, a.length)),
        destination_ips: decode_values(&msg.destination_ips, |a| cidr_from_bytes(&a.address, a.length)),
        not_destination_ips: decode_values(&msg.not_destination_ips, |a| {
            cidr_from_bytes(&a.address, a.length)
        }),
        destination_ports: decode_values(&msg.destination_ports, decode_port),
        not_destination_ports: decode_values(&msg.not_destination_ports, decode_port),
        service_accounts: decode_values(&msg.service_accounts, decode_account),
        not_service_accounts: decode_values(&msg.not_service_accounts, decode_account),
        unreadable: !msg.extensions.is_empty(),
    }
}

fn decode_values<W, T>(values: &[W], decode: impl Fn(&W) -> Option<T>) -> Predicates<T> {
    let decoded: Vec<T> = values.iter().filter_map(decode).collect();
    Predicates { unreadable: decoded.len() < values.len(), values: decoded }
}

fn decode_text(msg: &wire::StringMatch) -> Option<Text> {
    use wire::string_match::MatchType;
    Some(match msg.match_type.as_ref()? {
        MatchType::Exact(text) => Text::Exact(text.as_str().into()),
        MatchType::Prefix(text) => Text::Prefix(text.as_str().into()),
        MatchType::Suffix(text) => Text::Suffix(text.as_str().into()),
        MatchType::Presence(_) => Text::Presence,
    })
}

fn decode_port(port: &u32) -> Option<u16> {
    u16::try_from(*port).ok().filter(|port| *port != 0)
}

fn decode_account(msg: &wire::ServiceAccountMatch) -> Option<ServiceAccount> {
    Some(ServiceAccount {
        namespace: msg.namespace.as_str().into(),
        name: msg.service_account.as_str().into(),
    })
}
