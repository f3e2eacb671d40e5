//! What really failed between the two, as far as the answering node saw it.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, UNIX_EPOCH};

use super::credentials::ago;
use super::name::Target;
use super::types::{Object, Stage, Step};
use super::walk::Walk;
use super::way::Way;
use crate::admin::Failure;
use crate::error::Code;
use crate::state::Workload;

/// The newest failure that the two had, or that there is none.
pub(super) fn last_failure(walk: &Walk<'_>, way: &Way) -> Step {
    let ends = ends(walk, way);
    let local = walk.is_local(&walk.source) || ends.iter().any(|w| walk.is_local(w));
    if !local {
        let detail = format!("node {} carries neither end", walk.facts.node);
        return Step::elsewhere(Stage::LastFailure, None, detail);
    }
    match walk.facts.failures.iter().find(|failure| concerns(walk, way, &ends, failure)) {
        Some(failure) => describe(walk, failure),
        None => Step::ok(
            Stage::LastFailure,
            None,
            format!("node {} remembers none between the two", walk.facts.node),
        ),
    }
}

fn ends<'a>(walk: &'a Walk<'_>, way: &'a Way) -> Vec<&'a Workload> {
    if !way.ends.is_empty() {
        return way.ends.iter().map(|end| &*end.workload).collect();
    }
    match &walk.target {
        Target::Workload(w) => vec![w],
        Target::Service(s) => s.all_endpoints().map(|e| &*e.workload).collect(),
        Target::Address(_) => Vec::new(),
    }
}

fn concerns(walk: &Walk<'_>, way: &Way, ends: &[&Workload], failure: &Failure) -> bool {
    let source = &walk.source;
    let is = |w: &Workload| failure.pod.split_once('/') == Some((&w.namespace, &w.name));
    let socket = |text: &Option<String>| text.as_deref().and_then(|t| t.parse::<SocketAddr>().ok());
    let address = |text: &Option<String>| socket(text).map(|s| s.ip().to_canonical());
    if failure.direction == "outbound" {
        let Some(dst) = socket(&failure.dst) else { return false };
        let known = |ip: &IpAddr| way.addresses.contains(ip) || ends.iter().any(|w| w.addresses.contains(ip));
        let same_port = match &walk.target {
            // A failure at an endpoint's own port is one of the service's, too.
            Target::Service(_) => true,
            Target::Workload(_) | Target::Address(_) => walk.port.is_none_or(|port| port == dst.port()),
        };
        return is(source) && known(&dst.ip().to_canonical()) && same_port;
    }
    let from_source = match &failure.src_identity {
        Some(identity) => *identity == source.identity.to_string(),
        None => address(&failure.src).is_some_and(|ip| source.addresses.contains(&ip)),
    };
    ends.iter().any(|w| is(w)) && from_source
}

fn describe(walk: &Walk<'_>, failure: &Failure) -> Step {
    let at = UNIX_EPOCH + Duration::from_millis(failure.at_ms);
    let age = ago(walk.facts.now.duration_since(at).unwrap_or_default());
    let code = Code::ALL.iter().find(|code| code.code() == failure.code);
    let detail =
        format!("{age} ago, {} at {}: {} {}", failure.direction, failure.pod, failure.code, failure.error);
    let object = failure.decided_by.as_deref().map(read_object);
    let fix = code.map_or("see the node's access log for that moment", |code| code.fix());
    Step::warn(Stage::LastFailure, object, detail, fix.to_owned())
}

/// `Kind namespace/name`, as objects are displayed.
fn read_object(text: &str) -> Object {
    let (kind, rest) = text.split_once(' ').unwrap_or(("", text));
    let (namespace, name) = rest.split_once('/').unwrap_or(("", rest));
    Object::new(kind, namespace, name)
}
