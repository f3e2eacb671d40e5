//! L4 authorization: who may open a connection to a workload.
//!
//! Istio's `istio.security.Authorization` as nodes receive it. A [`Policy`] is read once; [`evaluate`] is pure and
//! takes the policies that apply to the destination workload ([`crate::state::MeshState::policies_for`]).
//!
//! **Predicates that cannot be evaluated** (a string match of an unknown type, a malformed prefix, a number that is
//! no port, an extension of a match) are neither true nor false but [`Truth::Unknown`]. Unknown travels through
//! and, or and not as in Kleene's logic, and at the end an ALLOW policy that is unknown does not match while a DENY
//! policy that is unknown does. So such a predicate only ever makes the mesh stricter. The reference receiver drops
//! those items from their list, which widens a policy whenever the dropped item was the only one of its list, or
//! was under a `not_` field.
//!
//! **A policy that a workload lists and that has not arrived** denies until it does ([`UnknownPolicy::Deny`]); the
//! reference skips it, which opens the workload during start-up and races. The denial says that it is pending
//! ([`DenyReason::is_pending`]), so that a data path can wait for the policy instead of refusing. A policy that the
//! control plane has removed is known to be gone and denies nothing.

mod decode;
mod dump;
mod evaluate;
#[cfg(test)]
mod tests;

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use ipnet::IpNet;

pub use evaluate::{evaluate, explain};

use crate::identity::SpiffeId;
use crate::state::Str;

/// An L4 policy.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    /// Key `namespace/name`, also the name of the xDS resource.
    pub key: Str,
    /// Namespace of the object.
    pub namespace: Str,
    /// Which workloads it applies to.
    pub scope: Scope,
    /// What a match does.
    pub action: Action,
    /// Matches are reported, nothing is enforced.
    pub dry_run: bool,
    /// OR-ed; a policy without rules never matches.
    pub rules: Vec<Rule>,
}

/// Which workloads a policy applies to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// All.
    Global,
    /// Those of its namespace.
    Namespace,
    /// Those that list its key.
    WorkloadSelector,
}

/// What a match does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Lets the connection through; as soon as one exists, others are refused.
    Allow,
    /// Refuses the connection.
    Deny,
}

/// AND of clauses; without clauses it matches everything.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Rule {
    /// Each must hold.
    pub clauses: Vec<Clause>,
}

/// OR of matches; without matches it holds.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Clause {
    /// One must hold; those without any field are skipped, that is, do not hold.
    pub matches: Vec<Match>,
}

/// AND of its populated fields. Within a field, positive values are OR-ed and none of the `not_` values may match.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Match {
    /// Namespace of the TLS identity; empty for plaintext.
    pub namespaces: Predicates<Text>,
    /// As [`Self::namespaces`], none may match.
    pub not_namespaces: Predicates<Text>,
    /// Identity without `spiffe://`; plaintext matches none.
    pub principals: Predicates<Text>,
    /// As [`Self::principals`], none may match.
    pub not_principals: Predicates<Text>,
    /// Prefixes of the TCP peer's address.
    pub source_ips: Predicates<IpNet>,
    /// As [`Self::source_ips`], none may match.
    pub not_source_ips: Predicates<IpNet>,
    /// Prefixes of the destination address.
    pub destination_ips: Predicates<IpNet>,
    /// As [`Self::destination_ips`], none may match.
    pub not_destination_ips: Predicates<IpNet>,
    /// Application ports.
    pub destination_ports: Predicates<u16>,
    /// As [`Self::destination_ports`], none may match.
    pub not_destination_ports: Predicates<u16>,
    /// Namespace and service account of the identity, in any trust domain; plaintext matches none.
    pub service_accounts: Predicates<ServiceAccount>,
    /// As [`Self::service_accounts`], none may match.
    pub not_service_accounts: Predicates<ServiceAccount>,
    /// A condition of a kind that this version cannot read (an extension).
    pub unreadable: bool,
}

/// The values of one field of a match.
#[derive(Debug, Clone, PartialEq)]
pub struct Predicates<T> {
    /// Values that can be evaluated.
    pub values: Vec<T>,
    /// Whether there were others.
    pub unreadable: bool,
}

impl<T> Default for Predicates<T> {
    fn default() -> Self {
        Self { values: Vec::new(), unreadable: false }
    }
}

/// How a string is compared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Text {
    /// Equal.
    Exact(Str),
    /// Begins with.
    Prefix(Str),
    /// Ends with.
    Suffix(Str),
    /// Not empty.
    Presence,
}

/// A service account of a namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceAccount {
    /// Kubernetes namespace.
    pub namespace: Str,
    /// Its service account.
    pub name: Str,
}

/// What authorization knows of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Conn {
    /// TCP peer.
    pub src: SocketAddr,
    /// Identity from TLS (or from the kernel on the fast path); none for plaintext.
    pub identity: Option<SpiffeId>,
    /// Destination address with the **application** port, after port and tunnel resolution.
    pub dst: SocketAddr,
}

/// What a listed policy that is not known does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UnknownPolicy {
    /// Denies until it is known.
    #[default]
    Deny,
    /// Is skipped, as the reference does.
    Skip,
}

/// The policies that apply to one workload.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PolicySet {
    /// Those that are known.
    pub policies: Vec<Arc<Policy>>,
    /// Keys that the workload lists and that are not known (empty under [`UnknownPolicy::Skip`]).
    pub unknown: Vec<Str>,
}

/// The outcome for one connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// What to do.
    pub verdict: Verdict,
    /// What dry-run policies would have done, in the order in which they were evaluated.
    pub dry_run: Vec<DryRun>,
}

impl Decision {
    /// Whether the connection may proceed.
    #[must_use]
    pub fn is_allowed(&self) -> bool {
        matches!(self.verdict, Verdict::Allow(_))
    }
}

/// What to do with a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Let it through.
    Allow(AllowReason),
    /// Refuse it.
    Deny(DenyReason),
}

/// Why a connection may proceed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AllowReason {
    /// No ALLOW policy applies to the workload.
    NoAllowPolicies,
    /// This ALLOW policy matched.
    Allowed(Str),
}

impl fmt::Display for AllowReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoAllowPolicies => f.write_str("no allow policy applies to the workload"),
            Self::Allowed(key) => write!(f, "allowed by: {key}"),
        }
    }
}

/// Why a connection is refused. The first two texts are those that tools grep ztunnel's logs for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DenyReason {
    /// This DENY policy matched.
    #[error("explicitly denied by: {0}")]
    Explicit(Str),
    /// ALLOW policies apply to the workload and none matched.
    #[error("allow policies exist, but none allowed")]
    NoneAllowed,
    /// The workload lists a policy that has not arrived.
    #[error("policy not yet known: {0}")]
    NotYetKnown(Str),
}

impl DenyReason {
    /// Whether the answer may change by itself soon: the policy is on its way.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        matches!(self, Self::NotYetKnown(_))
    }

    /// The policy that decided, where one did.
    #[must_use]
    pub fn policy(&self) -> Option<&Str> {
        match self {
            Self::Explicit(key) | Self::NotYetKnown(key) => Some(key),
            Self::NoneAllowed => None,
        }
    }
}

/// What dry-run policies would have done.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum DryRun {
    /// This DENY policy would have refused the connection.
    WouldDeny(Str),
    /// This ALLOW policy would have let it through.
    WouldAllow(Str),
    /// No dry-run ALLOW policy matched and no enforced one exists: enforcing them would refuse the connection.
    WouldDenyNoneAllowed,
}

impl fmt::Display for DryRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WouldDeny(key) => write!(f, "dry-run: would be denied by {key}"),
            Self::WouldAllow(key) => write!(f, "dry-run: would be allowed by {key}"),
            Self::WouldDenyNoneAllowed => {
                f.write_str("dry-run: would be denied, no dry-run allow policy matched")
            }
        }
    }
}

/// Kleene's three values, in order: `and` is the minimum, `or` the maximum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Truth {
    /// Does not hold.
    False,
    /// Cannot be evaluated.
    Unknown,
    /// Holds.
    True,
}

/// How one policy judged a connection; for explanations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judgement {
    /// Key of the policy.
    pub policy: Str,
    /// What a match does.
    pub action: Action,
    /// Not enforced.
    pub dry_run: bool,
    /// Whether the policy counts as matching, with unknown resolved to the stricter side.
    pub matched: bool,
    /// Index of the rule that matched.
    pub rule: Option<usize>,
    /// Whether the outcome rests on a predicate that cannot be evaluated.
    pub unreadable: bool,
}
