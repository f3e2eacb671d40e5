//! What L4 policy says at every workload that the connection arrives at.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::enrolment::Enrolment;
use super::types::{Object, Outcome, Path, STRICT_POLICY, Stage, Step};
use super::walk::{End, Walk, workload_object};
use super::way::Way;
use crate::identity::SpiffeId;
use crate::policy::{
    self, Action, AllowReason, Conn, Decision, DenyReason, Match, PolicySet, Predicates, Rule, Text, Verdict,
};
use crate::state::Workload;

/// One step for a waypoint on the way, and one for the ends together: the first end that refuses speaks for all,
/// because a connection may be given to it.
pub(super) fn policies(
    walk: &Walk<'_>,
    way: &Way,
    source: Enrolment,
    ends: &[(&End, Enrolment, Step)],
) -> Vec<Step> {
    let client = walk.source.addresses.first().copied().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    let own = (source == Enrolment::Captured).then(|| walk.source.identity.clone());
    let (hop, caller) = match way.path {
        Some(Path::Gateway) => {
            let detail = "decided in the other network, by the destination's own node".to_owned();
            return vec![Step::elsewhere(Stage::Policy, None, detail)];
        }
        Some(Path::Waypoint) => match way.hops.first() {
            Some(hop) => (Some(hop), Caller::of_waypoint(hop, client)),
            None => return Vec::new(),
        },
        Some(Path::Tunnel | Path::Fast) => (None, Caller { identity: own, address: client }),
        Some(Path::Plaintext) => (None, Caller { identity: None, address: client }),
        Some(Path::Passthrough | Path::Outside) | None => return Vec::new(),
    };
    let at_waypoint = hop.map(|hop| {
        let detail = format!(
            "the waypoint {}/{} decides first, by the policies that are bound to it or to the service",
            hop.namespace, hop.name
        );
        Step::elsewhere(Stage::Policy, Some(workload_object(hop)), detail)
    });
    at_waypoint.into_iter().chain(at_ends(walk, &caller, ends)).collect()
}

/// Who the destination sees.
struct Caller {
    identity: Option<SpiffeId>,
    address: IpAddr,
}

impl Caller {
    fn of_waypoint(hop: &Workload, otherwise: IpAddr) -> Self {
        let address = hop.addresses.first().copied().unwrap_or(otherwise);
        Self { identity: Some(hop.identity.clone()), address }
    }

    fn describe(&self) -> String {
        match &self.identity {
            Some(identity) => format!("the caller is {}", identity.principal()),
            None => format!("the caller has no identity (plain TCP from {})", self.address),
        }
    }
}

fn at_ends(walk: &Walk<'_>, caller: &Caller, ends: &[(&End, Enrolment, Step)]) -> Option<Step> {
    let judged: Vec<Step> = ends.iter().map(|(end, state, _)| at_end(walk, caller, end, *state)).collect();
    let refusing = judged.iter().filter(|step| step.outcome == Outcome::Blocked).count();
    let speaks = judged.iter().find(|step| step.outcome == Outcome::Blocked);
    let mut step =
        speaks.or_else(|| judged.iter().find(|s| s.outcome != Outcome::Ok)).or(judged.first())?.clone();
    if judged.len() > 1 && refusing > 0 {
        step.detail = format!("{} ({refusing} of {} endpoints refuse)", step.detail, judged.len());
    }
    Some(step)
}

fn at_end(walk: &Walk<'_>, caller: &Caller, end: &End, enrolment: Enrolment) -> Step {
    let workload = &end.workload;
    let set = walk.state.policies_for(workload);
    if enrolment != Enrolment::Captured {
        return not_enforced(workload, &set);
    }
    let anywhere = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), walk.port.unwrap_or_default());
    let conn = Conn {
        src: SocketAddr::new(caller.address, 0),
        identity: caller.identity.clone(),
        dst: end.address.unwrap_or(anywhere),
    };
    let Decision { verdict, dry_run } = policy::evaluate(&set, &conn);
    let mut step = match verdict {
        Verdict::Allow(reason) => allowed(&set, &conn, &reason),
        Verdict::Deny(reason) => denied(&set, &conn, caller, &reason),
    };
    for note in dry_run {
        step.detail = format!("{}; {note}", step.detail);
    }
    step
}

fn not_enforced(workload: &Workload, set: &PolicySet) -> Step {
    if set.policies.is_empty() && set.unknown.is_empty() {
        return Step::ok(Stage::Policy, None, "no policy applies to the destination".to_owned());
    }
    let names: Vec<String> = set.policies.iter().map(|p| Object::of_policy(&p.key).to_string()).collect();
    let detail = format!(
        "not enforced, because {}/{} is not captured: {}",
        workload.namespace,
        workload.name,
        names.join(", ")
    );
    let fix = "enrol the destination (label istio.io/dataplane-mode=ambient)".to_owned();
    Step::warn(Stage::Policy, Some(workload_object(workload)), detail, fix)
}

/// Number of the first rule of a policy that matched, counted from 1 as people do.
fn rule_of(set: &PolicySet, conn: &Conn, key: &str) -> (Option<usize>, bool) {
    let judgement = policy::explain(set, conn).into_iter().find(|j| &*j.policy == key);
    judgement.map_or((None, false), |j| (j.rule.map(|rule| rule + 1), j.unreadable))
}

fn allowed(set: &PolicySet, conn: &Conn, reason: &AllowReason) -> Step {
    match reason {
        AllowReason::NoAllowPolicies if set.policies.is_empty() => {
            Step::ok(Stage::Policy, None, "no policy applies to the destination".to_owned())
        }
        AllowReason::NoAllowPolicies => {
            let detail = "no DENY policy matches and no ALLOW policy applies to the destination".to_owned();
            Step::ok(Stage::Policy, None, detail)
        }
        AllowReason::Allowed(key) => {
            let object = Object::of_policy(key);
            let rule = rule_of(set, conn, key).0.map_or_else(String::new, |rule| format!(", rule {rule}"));
            Step::ok(Stage::Policy, Some(object.clone()), format!("allowed by {object}{rule}"))
        }
    }
}

fn denied(set: &PolicySet, conn: &Conn, caller: &Caller, reason: &DenyReason) -> Step {
    let enrol = "enrol the source (label istio.io/dataplane-mode=ambient), so that it has an identity";
    match reason {
        DenyReason::Explicit(key) if is_strict(key) => {
            let detail = format!("mutual TLS is required (mode STRICT) and {}", caller.describe());
            let fix = format!("{enrol}; or relax the PeerAuthentication to PERMISSIVE");
            Step::blocked(Stage::Policy, Some(Object::of_policy(key)), detail, fix)
        }
        DenyReason::Explicit(key) => {
            let object = Object::of_policy(key);
            let (rule, unreadable) = rule_of(set, conn, key);
            let rule = rule.map_or_else(String::new, |rule| format!(" by its rule {rule}"));
            let hedge = if unreadable { ", which rests on a condition that cannot be evaluated" } else { "" };
            let detail = format!("{object} denies it{rule}{hedge}; {}", caller.describe());
            let fix = if caller.identity.is_none() && object.kind == "PeerAuthentication" {
                enrol.to_owned()
            } else {
                format!("change {object} if the connection should be allowed")
            };
            Step::blocked(Stage::Policy, Some(object), detail, fix)
        }
        DenyReason::NotYetKnown(key) => {
            let object = Object::of_policy(key);
            let detail = format!("{object} applies to the destination and has not reached this node");
            let fix = "see `meshctl status`: the node must be connected to the control plane".to_owned();
            Step::blocked(Stage::Policy, Some(object), detail, fix)
        }
        DenyReason::NoneAllowed => none_allowed(set, caller),
    }
}

fn none_allowed(set: &PolicySet, caller: &Caller) -> Step {
    let allows: Vec<_> = set.policies.iter().filter(|p| p.action == Action::Allow && !p.dry_run).collect();
    let wants: Vec<String> = allows
        .iter()
        .map(|policy| {
            let rules: Vec<String> = policy.rules.iter().map(rule_text).collect();
            let rules = if rules.is_empty() { "nothing".to_owned() } else { rules.join("; or ") };
            format!("{} allows {rules}", Object::of_policy(&policy.key))
        })
        .collect();
    let object = allows.first().map(|policy| Object::of_policy(&policy.key));
    let detail = format!("no ALLOW policy matches: {}; {}", wants.join(". "), caller.describe());
    let which = object.as_ref().map_or_else(|| "one of the policies".to_owned(), ToString::to_string);
    let fix = match &caller.identity {
        Some(identity) => {
            format!(
                "add principal {} to a rule of {which} if the connection should be allowed",
                identity.principal()
            )
        }
        None => {
            "enrol the source (label istio.io/dataplane-mode=ambient), so that it has an identity".to_owned()
        }
    };
    Step::blocked(Stage::Policy, object, detail, fix)
}

fn is_strict(key: &str) -> bool {
    key.rsplit('/').next() == Some(STRICT_POLICY)
}

/// A rule as a sentence part: `source namespace shop and port 8080`.
fn rule_text(rule: &Rule) -> String {
    let clauses: Vec<String> = rule
        .clauses
        .iter()
        .filter(|clause| !clause.matches.is_empty())
        .map(|clause| {
            let matches: Vec<String> = clause.matches.iter().map(match_text).collect();
            if matches.len() > 1 { format!("({})", matches.join(" or ")) } else { matches.join("") }
        })
        .collect();
    if clauses.is_empty() { "everybody".to_owned() } else { clauses.join(" and ") }
}

fn match_text(m: &Match) -> String {
    let mut parts = Vec::new();
    let text = |t: &Text| match t {
        Text::Exact(value) => value.to_string(),
        Text::Prefix(value) => format!("{value}*"),
        Text::Suffix(value) => format!("*{value}"),
        Text::Presence => "*".to_owned(),
    };
    let account = |a: &policy::ServiceAccount| format!("{}/{}", a.namespace, a.name);
    put(&mut parts, "namespace", &m.namespaces, text);
    put(&mut parts, "not namespace", &m.not_namespaces, text);
    put(&mut parts, "principal", &m.principals, text);
    put(&mut parts, "not principal", &m.not_principals, text);
    put(&mut parts, "source address", &m.source_ips, ToString::to_string);
    put(&mut parts, "not source address", &m.not_source_ips, ToString::to_string);
    put(&mut parts, "destination address", &m.destination_ips, ToString::to_string);
    put(&mut parts, "not destination address", &m.not_destination_ips, ToString::to_string);
    put(&mut parts, "port", &m.destination_ports, ToString::to_string);
    put(&mut parts, "not port", &m.not_destination_ports, ToString::to_string);
    put(&mut parts, "service account", &m.service_accounts, account);
    put(&mut parts, "not service account", &m.not_service_accounts, account);
    if m.unreadable {
        parts.push("a condition that cannot be evaluated".to_owned());
    }
    if parts.is_empty() { "nobody".to_owned() } else { parts.join(" and ") }
}

fn put<T>(parts: &mut Vec<String>, name: &str, list: &Predicates<T>, show: impl Fn(&T) -> String) {
    let mut values: Vec<String> = list.values.iter().map(show).collect();
    if list.unreadable {
        values.push("(a value that cannot be evaluated)".to_owned());
    }
    if !values.is_empty() {
        parts.push(format!("{name} {}", values.join(" or ")));
    }
}
