//! Authorization policies: whether a request may proceed.
//!
//! Semantics: Istio's AuthorizationPolicy at a waypoint. Any CUSTOM policy that matches has an external authorizer asked;
//! then a DENY policy that matches refuses; then, if there is an ALLOW policy at all, one has to match. AUDIT policies and
//! policies in dry-run are reported and change nothing.
//!
//! What cannot be evaluated (an unknown condition, a malformed prefix, a claim of another type) is neither true nor false
//! but unknown, and travels through and, or and not as in Kleene's logic ([`mesh_core::policy::Truth`]). In the end an
//! ALLOW policy that is unknown does not match, and any other policy that is unknown does: a policy only ever becomes
//! stricter.

pub(super) mod compile;
mod evaluate;
mod facts;
#[cfg(test)]
mod tests;
mod text;

use std::sync::Arc;

use mesh_core::policy::Truth;
use mesh_core::state::Str;
use mesh_core::xds::proto::l7;

use crate::request::{Addressed, Head, Source};
use compile::{Action, Policy};
use facts::Facts;

/// What the client is told: body of the 403.
pub const DENIED_BODY: &str = "RBAC: access denied";

/// A stream that is no HTTP.
#[derive(Debug, Clone, Copy)]
pub struct Stream<'a> {
    /// Who sends.
    pub source: &'a Source,
    /// What the connection was opened to.
    pub destination: std::net::SocketAddr,
    /// What that address is.
    pub addressed: &'a Addressed,
    /// The server name of a TLS greeting that passes through; empty where there is none.
    pub sni: &'a str,
}

/// The outcome for one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// What to do.
    pub verdict: Verdict,
    /// What AUDIT and dry-run policies have to say.
    pub reports: Vec<Report>,
}

/// Whether a request may proceed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It may.
    Allow,
    /// It may not: 403, [`DENIED_BODY`].
    Deny(Denial),
}

/// Why a request is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Denial {
    /// The policy (`namespace/name`) that matched; none when ALLOW policies exist and none of them matched.
    pub policy: Option<Str>,
    /// Index of its rule.
    pub rule: Option<usize>,
}

impl Denial {
    /// Envoy's response code details, which Istio's users look for in access logs.
    #[must_use]
    pub fn details(&self) -> String {
        match (&self.policy, self.rule) {
            (Some(key), Some(rule)) => {
                let (namespace, name) = key.split_once('/').unwrap_or(("", key));
                format!("rbac_access_denied_matched_policy[ns[{namespace}]-policy[{name}]-rule[{rule}]]")
            }
            _ => "rbac_access_denied_matched_policy[none]".to_owned(),
        }
    }
}

/// Something to be logged and counted that changes nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The policy, `namespace/name`; none for [`Effect::WouldDenyNoneAllowed`].
    pub policy: Option<Str>,
    /// Index of its rule.
    pub rule: Option<usize>,
    /// What it would do, or did.
    pub effect: Effect,
}

/// What a policy without effect has to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// An AUDIT policy matched.
    Audit,
    /// A DENY policy in dry-run matched.
    WouldDeny,
    /// An ALLOW policy in dry-run matched.
    WouldAllow,
    /// ALLOW policies in dry-run exist, and none of them nor any enforced one matched.
    WouldDenyNoneAllowed,
    /// A CUSTOM policy in dry-run matched.
    WouldAsk,
}

/// What CUSTOM policies want.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Custom {
    /// All of these have to allow the request.
    pub asks: Vec<Ask>,
    /// A policy names a provider that the mesh settings do not have: 403.
    pub denied: Option<Denial>,
    /// What policies in dry-run have to say.
    pub reports: Vec<Report>,
}

/// An external authorizer to be asked.
#[derive(Debug, Clone, PartialEq)]
pub struct Ask {
    /// Whom.
    pub provider: Arc<l7::Provider>,
    /// The policy that wants it, `namespace/name`.
    pub policy: Str,
    /// Index of its rule.
    pub rule: usize,
}

/// The policies that apply to one service, by action.
#[derive(Debug, Default)]
pub(super) struct PolicySet {
    custom: Vec<CustomPolicy>,
    deny: Vec<Arc<Policy>>,
    allow: Vec<Arc<Policy>>,
    audit: Vec<Arc<Policy>>,
    /// In dry-run, whatever their action.
    dry: Vec<Arc<Policy>>,
    /// How many proxies in front of the mesh are trusted to write `X-Forwarded-For`.
    trusted_hops: usize,
}

#[derive(Debug)]
struct CustomPolicy {
    policy: Arc<Policy>,
    provider: Option<Arc<l7::Provider>>,
}

impl PolicySet {
    pub(super) fn new(policies: &[Arc<Policy>], settings: &l7::Settings) -> Self {
        let mut set = Self { trusted_hops: settings.trusted_proxies as usize, ..Self::default() };
        for policy in policies {
            let policy = Arc::clone(policy);
            match policy.action {
                _ if policy.dry_run => set.dry.push(policy),
                Action::Deny => set.deny.push(policy),
                Action::Allow => set.allow.push(policy),
                Action::Audit => set.audit.push(policy),
                Action::Custom => {
                    let provider = compile::provider(settings, &policy.provider);
                    set.custom.push(CustomPolicy { policy, provider: provider.cloned().map(Arc::new) });
                }
            }
        }
        set
    }

    pub(super) fn is_empty(&self) -> bool {
        self.custom.is_empty()
            && self.deny.is_empty()
            && self.allow.is_empty()
            && self.audit.is_empty()
            && self.dry.is_empty()
    }

    pub(super) fn ask(&self, head: &Head<'_>) -> Custom {
        let mut custom = Custom::default();
        if self.custom.is_empty() && self.dry.is_empty() {
            return custom;
        }
        let facts = Facts::before_tokens(head, self.trusted_hops);
        for CustomPolicy { policy, provider } in &self.custom {
            let Some(rule) = policy.matching_rule(&facts) else { continue };
            let Some(provider) = provider else {
                custom.denied.get_or_insert(Denial { policy: Some(policy.key.clone()), rule: Some(rule) });
                continue;
            };
            // One question is enough, whatever number of policies want it.
            if !custom.asks.iter().any(|ask| ask.provider.name == provider.name) {
                let (provider, policy) = (Arc::clone(provider), policy.key.clone());
                custom.asks.push(Ask { provider, policy, rule });
            }
        }
        custom.reports = self.reports(&self.dry, Action::Custom, Effect::WouldAsk, &facts);
        custom
    }

    pub(super) fn check(&self, head: &Head<'_>) -> Decision {
        if self.deny.is_empty() && self.allow.is_empty() && self.audit.is_empty() && self.dry.is_empty() {
            return Decision { verdict: Verdict::Allow, reports: Vec::new() };
        }
        self.decide(&Facts::of_request(head, self.trusted_hops))
    }

    pub(super) fn check_stream(&self, stream: &Stream<'_>) -> Decision {
        let facts = Facts::of_stream(stream);
        // Nobody can be asked about a stream, as an authorizer decides on requests.
        let custom = self.custom.iter().find_map(|custom| {
            let rule = custom.policy.matching_rule(&facts)?;
            Some(Denial { policy: Some(custom.policy.key.clone()), rule: Some(rule) })
        });
        match custom {
            Some(denial) => Decision { verdict: Verdict::Deny(denial), reports: Vec::new() },
            None => self.decide(&facts),
        }
    }

    fn decide(&self, facts: &Facts<'_>) -> Decision {
        let mut reports = self.reports(&self.audit, Action::Audit, Effect::Audit, facts);
        // In dry-run an AUDIT policy is what it is anyway.
        reports.extend(self.reports(&self.dry, Action::Audit, Effect::Audit, facts));
        reports.extend(self.reports(&self.dry, Action::Deny, Effect::WouldDeny, facts));
        let denied = self.deny.iter().find_map(|policy| {
            let rule = policy.matching_rule(facts)?;
            Some(Denial { policy: Some(policy.key.clone()), rule: Some(rule) })
        });
        if let Some(denial) = denied {
            return Decision { verdict: Verdict::Deny(denial), reports };
        }
        let allowed = self.allow.iter().any(|policy| policy.matching_rule(facts).is_some());
        if self.dry.iter().any(|policy| policy.action == Action::Allow) {
            let would = self.reports(&self.dry, Action::Allow, Effect::WouldAllow, facts);
            if would.is_empty() && !allowed {
                reports.push(Report { policy: None, rule: None, effect: Effect::WouldDenyNoneAllowed });
            }
            reports.extend(would);
        }
        let verdict = if allowed || self.allow.is_empty() {
            Verdict::Allow
        } else {
            Verdict::Deny(Denial { policy: None, rule: None })
        };
        Decision { verdict, reports }
    }

    fn reports(
        &self,
        policies: &[Arc<Policy>],
        action: Action,
        effect: Effect,
        facts: &Facts<'_>,
    ) -> Vec<Report> {
        policies
            .iter()
            .filter(|policy| policy.action == action)
            .filter_map(|policy| {
                let rule = policy.matching_rule(facts)?;
                Some(Report { policy: Some(policy.key.clone()), rule: Some(rule), effect })
            })
            .collect()
    }
}

impl Policy {
    /// The first rule that counts as matching, with unknown on the stricter side.
    fn matching_rule(&self, facts: &Facts<'_>) -> Option<usize> {
        self.rules.iter().position(|rule| match self.action {
            Action::Allow => rule.truth(facts) == Truth::True,
            Action::Deny | Action::Custom | Action::Audit => rule.truth(facts) >= Truth::Unknown,
        })
    }
}
