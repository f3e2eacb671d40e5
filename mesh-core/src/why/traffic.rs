//! What tracing saw between the two lately: connections, round trips, what was dropped, failed or denied.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, UNIX_EPOCH};

use super::name::Target;
use super::types::{Stage, Step};
use super::walk::Walk;
use super::way::Way;
use crate::flows::{Flow, Kind, Path, Verdict};
use crate::state::Workload;

/// What is older says nothing about now.
const LATELY: Duration = Duration::from_secs(900);

/// What happened between the two; nothing where nothing is traced or seen.
pub(super) fn traffic(walk: &Walk<'_>, way: &Way) -> Option<Step> {
    let since = walk.facts.now.duration_since(UNIX_EPOCH).unwrap_or_default().saturating_sub(LATELY);
    let since = u64::try_from(since.as_micros()).unwrap_or(0);
    let lately = walk.facts.flows.iter().filter(|flow| flow.at_us >= since);
    let seen = Seen::of(lately.filter(|flow| concerns(walk, way, flow)));
    (!seen.is_empty()).then(|| seen.step(walk))
}

fn concerns(walk: &Walk<'_>, way: &Way, flow: &Flow) -> bool {
    let is = |w: &Workload, end: &crate::flows::Party| *w.namespace == *end.namespace && *w.name == *end.pod;
    if !is(&walk.source, &flow.source) {
        return false;
    }
    let known = |ip: IpAddr| way.addresses.contains(&ip.to_canonical());
    let service = match &walk.target {
        Target::Service(service) => service.service.host.hostname() == flow.service,
        Target::Workload(workload) => is(workload, &flow.destination),
        Target::Address(_) => false,
    };
    let port = walk.port.is_none_or(|port| {
        matches!(walk.target, Target::Service(_))
            || flow.destination.address.is_none_or(|address| address.port() == port)
    });
    let reached = way.ends.iter().any(|end| is(&end.workload, &flow.destination));
    let address = flow.destination.address.is_some_and(|address| known(address.ip()));
    port && (service || reached || address)
}

/// The events as counts.
#[derive(Default)]
struct Seen {
    connections: u64,
    paths: Vec<Path>,
    retransmits: u64,
    resets: u64,
    /// Of the newest connection that ended.
    rtt_us: Option<u32>,
    /// Packets by the kernel's reason, and the node.
    drops: BTreeMap<String, (u64, String)>,
    /// Connections by error.
    failures: BTreeMap<String, u64>,
    /// Connections by policy.
    denials: BTreeMap<String, u64>,
}

impl Seen {
    fn of<'a>(flows: impl Iterator<Item = &'a Flow>) -> Self {
        let mut seen = Self::default();
        for flow in flows {
            let times = u64::from(flow.count.max(1));
            match (flow.kind, flow.verdict) {
                (Kind::Proxied, Verdict::Denied) => {
                    *seen.denials.entry(flow.policy.clone()).or_default() += times;
                }
                (Kind::Connect | Kind::Accepted, _) => seen.connections += 1,
                (Kind::Drop, _) => {
                    let (count, node) = seen.drops.entry(flow.reason.clone()).or_default();
                    *count += times;
                    node.clone_from(&flow.node);
                }
                (Kind::Failed, _) => *seen.failures.entry(flow.reason.clone()).or_default() += times,
                (Kind::Closed, _) => {
                    seen.retransmits += u64::from(flow.retransmits.unwrap_or(0));
                    seen.resets += u64::from(flow.closed_with == "rst");
                    seen.rtt_us = flow.srtt_us.or(seen.rtt_us);
                }
                _ => {}
            }
            if flow.path != Path::Unknown && !seen.paths.contains(&flow.path) {
                seen.paths.push(flow.path);
            }
        }
        seen
    }

    fn is_empty(&self) -> bool {
        self.connections == 0
            && self.drops.is_empty()
            && self.failures.is_empty()
            && self.denials.is_empty()
            && self.rtt_us.is_none()
    }

    fn detail(&self, node: &str) -> String {
        let minutes = LATELY.as_secs() / 60;
        let paths: Vec<&str> = self.paths.iter().map(|path| path.as_str()).collect();
        let over = if paths.is_empty() { String::new() } else { format!(" ({})", paths.join(", ")) };
        let mut parts =
            vec![format!("node {node} saw {} connections in {minutes} minutes{over}", self.connections)];
        for (reason, (count, _)) in &self.drops {
            parts.push(format!("{count} packets dropped: {reason}"));
        }
        for (reason, count) in &self.failures {
            parts.push(format!("{count} failed: {reason}"));
        }
        for (policy, count) in &self.denials {
            parts.push(format!("{count} denied: {policy}"));
        }
        if let Some(rtt) = self.rtt_us {
            parts.push(format!("round trip {rtt} us"));
        }
        if self.retransmits > 0 {
            parts.push(format!("{} segments retransmitted", self.retransmits));
        }
        if self.resets > 0 {
            parts.push(format!("{} ended by a reset", self.resets));
        }
        parts.join("; ")
    }

    fn fix(&self, walk: &Walk<'_>) -> Option<String> {
        let source = format!("{}/{}", walk.source.namespace, walk.source.name);
        if let Some((_, node)) = self.drops.get("NETFILTER_DROP") {
            return Some(format!(
                "a NetworkPolicy or firewall rule on node {node} dropped them: see `nft list ruleset` there"
            ));
        }
        let refused = self.drops.contains_key("NO_SOCKET") || self.failures.contains_key("ECONNREFUSED");
        if refused {
            return Some("nobody listens on that port at the destination: check the application".to_owned());
        }
        if self.failures.contains_key("ETIMEDOUT") {
            return Some(format!(
                "nobody answered: look for drops with `meshctl flows --from {source} --verdict dropped` on both nodes"
            ));
        }
        let trouble = !self.drops.is_empty() || !self.failures.is_empty() || !self.denials.is_empty();
        trouble.then(|| format!("see each with `meshctl flows --from {source}`"))
    }

    fn step(&self, walk: &Walk<'_>) -> Step {
        let detail = self.detail(&walk.facts.node);
        match self.fix(walk) {
            Some(fix) => Step::warn(Stage::Traffic, None, detail, fix),
            None => Step::ok(Stage::Traffic, None, detail),
        }
    }
}
