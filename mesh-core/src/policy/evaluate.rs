//! Evaluation of the decision order and of rules, clauses and matches.

use std::cell::OnceCell;
use std::net::IpAddr;

use ipnet::IpNet;

use super::{
    Action, AllowReason, Clause, Conn, Decision, DenyReason, DryRun, Judgement, Match, Policy, PolicySet,
    Predicates, Rule, ServiceAccount, Text, Truth, Verdict,
};

/// Decides on a connection.
///
/// Order: enforced DENY that matches refuses; a listed policy that is not known refuses; without an enforced ALLOW
/// policy the connection proceeds; an enforced ALLOW that matches lets it through; else it is refused. Dry-run
/// policies are only reported: DENY ones always, ALLOW ones when nothing refused the connection before.
#[must_use]
pub fn evaluate(set: &PolicySet, conn: &Conn) -> Decision {
    let facts = Facts::new(conn);
    let mut dry_run = Vec::new();
    let of = |action, dry| set.policies.iter().filter(move |p| p.action == action && p.dry_run == dry);

    for policy in of(Action::Deny, true) {
        if policy.matches(&facts) {
            dry_run.push(DryRun::WouldDeny(policy.key.clone()));
        }
    }
    if let Some(policy) = of(Action::Deny, false).find(|p| p.matches(&facts)) {
        return Decision { verdict: Verdict::Deny(DenyReason::Explicit(policy.key.clone())), dry_run };
    }
    if let Some(key) = set.unknown.first() {
        return Decision { verdict: Verdict::Deny(DenyReason::NotYetKnown(key.clone())), dry_run };
    }

    let enforced_allow_exists = of(Action::Allow, false).next().is_some();
    let mut dry_allows = of(Action::Allow, true).peekable();
    if dry_allows.peek().is_some() {
        match dry_allows.find(|p| p.matches(&facts)) {
            Some(policy) => dry_run.push(DryRun::WouldAllow(policy.key.clone())),
            None if !enforced_allow_exists => dry_run.push(DryRun::WouldDenyNoneAllowed),
            None => {}
        }
    }
    let verdict = if !enforced_allow_exists {
        Verdict::Allow(AllowReason::NoAllowPolicies)
    } else if let Some(policy) = of(Action::Allow, false).find(|p| p.matches(&facts)) {
        Verdict::Allow(AllowReason::Allowed(policy.key.clone()))
    } else {
        Verdict::Deny(DenyReason::NoneAllowed)
    };
    Decision { verdict, dry_run }
}

/// How each policy judges a connection, in the order of the set; for `why`, not for the data path.
#[must_use]
pub fn explain(set: &PolicySet, conn: &Conn) -> Vec<Judgement> {
    let facts = Facts::new(conn);
    set.policies
        .iter()
        .map(|policy| {
            let truths: Vec<Truth> = policy.rules.iter().map(|rule| rule.truth(&facts)).collect();
            let counts = |truth: &Truth| policy.counts_as_match(*truth);
            Judgement {
                policy: policy.key.clone(),
                action: policy.action,
                dry_run: policy.dry_run,
                matched: truths.iter().any(counts),
                rule: truths.iter().position(counts),
                unreadable: truths.iter().max() == Some(&Truth::Unknown),
            }
        })
        .collect()
}

/// A connection, with the text form of its identity made at most once.
struct Facts<'a> {
    conn: &'a Conn,
    principal: OnceCell<String>,
}

impl<'a> Facts<'a> {
    fn new(conn: &'a Conn) -> Self {
        Self { conn, principal: OnceCell::new() }
    }

    fn principal(&self) -> Option<&str> {
        let identity = self.conn.identity.as_ref()?;
        Some(self.principal.get_or_init(|| identity.principal()))
    }
}

impl Policy {
    fn matches(&self, facts: &Facts<'_>) -> bool {
        self.rules.iter().any(|rule| self.counts_as_match(rule.truth(facts)))
    }

    /// Unknown goes to the stricter side of the action.
    fn counts_as_match(&self, truth: Truth) -> bool {
        match self.action {
            Action::Allow => truth == Truth::True,
            Action::Deny => truth >= Truth::Unknown,
        }
    }
}

impl Rule {
    fn truth(&self, facts: &Facts<'_>) -> Truth {
        self.clauses.iter().map(|clause| clause.truth(facts)).min().unwrap_or(Truth::True)
    }
}

impl Clause {
    fn truth(&self, facts: &Facts<'_>) -> Truth {
        self.matches.iter().map(|m| m.truth(facts)).max().unwrap_or(Truth::True)
    }
}

impl Match {
    fn truth(&self, facts: &Facts<'_>) -> Truth {
        let conn = facts.conn;
        let namespace = conn.identity.as_ref().map_or("", |identity| identity.namespace());
        let principal = facts.principal();
        let (src, dst) = (conn.src.ip().to_canonical(), conn.dst.ip().to_canonical());
        let contains = |ip: IpAddr| move |net: &IpNet| net.contains(&ip);
        let account = |account: &ServiceAccount| {
            conn.identity.as_ref().is_some_and(|identity| {
                identity.namespace() == &*account.namespace && identity.service_account() == &*account.name
            })
        };
        // Without an identity nothing can match, readable or not.
        let of_identity = |truth: Truth| if conn.identity.is_some() { truth } else { Truth::False };
        let by_principal =
            |list: &Predicates<Text>| of_identity(list.any(|text| text.matches(principal.unwrap_or(""))));

        let fields = [
            self.namespaces.holds(|list| list.any(|text| text.matches(namespace))),
            self.not_namespaces.holds_not(|list| list.any(|text| text.matches(namespace))),
            self.principals.holds(by_principal),
            self.not_principals.holds_not(by_principal),
            self.source_ips.holds(|list| list.any(contains(src))),
            self.not_source_ips.holds_not(|list| list.any(contains(src))),
            self.destination_ips.holds(|list| list.any(contains(dst))),
            self.not_destination_ips.holds_not(|list| list.any(contains(dst))),
            self.destination_ports.holds(|list| list.any(|port| *port == conn.dst.port())),
            self.not_destination_ports.holds_not(|list| list.any(|port| *port == conn.dst.port())),
            self.service_accounts.holds(|list| of_identity(list.any(account))),
            self.not_service_accounts.holds_not(|list| of_identity(list.any(account))),
            self.unreadable.then_some(Truth::Unknown),
        ];
        // A match without any field is skipped: it does not hold.
        fields.into_iter().flatten().min().unwrap_or(Truth::False)
    }
}

impl<T> Predicates<T> {
    fn is_populated(&self) -> bool {
        self.unreadable || !self.values.is_empty()
    }

    fn any(&self, test: impl Fn(&T) -> bool) -> Truth {
        if self.values.iter().any(test) {
            Truth::True
        } else if self.unreadable {
            Truth::Unknown
        } else {
            Truth::False
        }
    }

    fn holds(&self, any: impl Fn(&Self) -> Truth) -> Option<Truth> {
        self.is_populated().then(|| any(self))
    }

    fn holds_not(&self, any: impl Fn(&Self) -> Truth) -> Option<Truth> {
        self.is_populated().then(|| match any(self) {
            Truth::True => Truth::False,
            Truth::Unknown => Truth::Unknown,
            Truth::False => Truth::True,
        })
    }
}

impl Text {
    fn matches(&self, value: &str) -> bool {
        match self {
            Self::Exact(text) => value == &**text,
            Self::Prefix(text) => value.starts_with(&**text),
            Self::Suffix(text) => value.ends_with(&**text),
            Self::Presence => !value.is_empty(),
        }
    }
}
