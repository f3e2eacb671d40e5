//! Which way the connection takes: path, waypoint or gateway, and the workloads that it may arrive at.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::enrolment::Enrolment;
use super::name::{NameError, Question, Target};
use super::types::{Object, Outcome, Path, Stage, Step};
use super::walk::{End, Walk, service_object, workload_object};
use crate::error::Code;
use crate::route::{self, Outbound, Protocol, Resolution, Route, RouteError, RouteKind, candidates};
use crate::state::{ServiceEndpoints, Workload};

/// Endpoints that are looked at one by one, at most: enough to see that they differ.
const MAX_ENDS: usize = 64;

/// The result of routing.
#[derive(Debug, Clone)]
pub(super) struct Way {
    pub(super) path: Option<Path>,
    /// Waypoint or gateway on the way.
    pub(super) hops: Vec<Arc<Workload>>,
    /// Where it may arrive.
    pub(super) ends: Vec<End>,
    /// Every address that the connection may have as its original destination or dial; for the history.
    pub(super) addresses: Vec<IpAddr>,
    /// What to say of routing.
    pub(super) step: Step,
}

impl Way {
    fn blocked(object: Option<Object>, detail: String, fix: &str) -> Self {
        let step = Step::blocked(Stage::Routing, object, detail, fix.to_owned());
        Self { path: None, hops: Vec::new(), ends: Vec::new(), addresses: Vec::new(), step }
    }
}

/// The port, or the only one that the destination has.
pub(super) fn port(target: &Target, question: &Question) -> Result<Option<u16>, NameError> {
    if question.port.is_some() {
        return Ok(question.port);
    }
    let mut ports: Vec<u16> = match target {
        Target::Service(service) => service.service.ports.keys().copied().collect(),
        Target::Workload(workload) => {
            workload.services.iter().flat_map(|(_, ports)| ports.iter()).map(|(_, target)| target).collect()
        }
        // Nothing that the mesh decides depends on it.
        Target::Address(_) => return Ok(None),
    };
    ports.sort_unstable();
    ports.dedup();
    let list = ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
    let problem = match ports[..] {
        [port] => return Ok(Some(port)),
        [] => "its port is not known; append it, for example :8080".to_owned(),
        _ => format!("it has the ports {list}; append one, for example :{}", ports[0]),
    };
    let suggestions = ports.iter().map(|port| format!("{}:{port}", question.dst)).collect();
    Err(NameError { role: "destination".to_owned(), name: question.dst.clone(), problem, suggestions })
}

/// Routes the connection as the source's node would, or, for a source that is not captured, as the kernel does.
pub(super) fn way(walk: &Walk<'_>, source: Enrolment) -> Way {
    let asked = asked_addresses(walk);
    let own = |ip: &IpAddr| ip.is_loopback() || walk.source.addresses.contains(ip);
    if !asked.is_empty() && asked.iter().all(own) {
        let detail = "own addresses and loopback are left to the kernel: no policy, no tunnel".to_owned();
        return Way {
            path: Some(Path::Outside),
            hops: Vec::new(),
            ends: Vec::new(),
            addresses: asked,
            step: Step::ok(Stage::Routing, Some(workload_object(&walk.source)), detail),
        };
    }
    let mut way = if source == Enrolment::Captured { captured(walk, &asked) } else { uncaptured(walk) };
    way.addresses.extend(asked);
    way
}

/// The addresses that a client would connect to: the service's virtual one, those of the endpoints of a headless
/// service, or the workload's own.
fn asked_addresses(walk: &Walk<'_>) -> Vec<IpAddr> {
    let v4 = walk.source.addresses.first().is_none_or(IpAddr::is_ipv4);
    let own_family_first = |mut list: Vec<IpAddr>| {
        list.sort_by_key(|ip| ip.is_ipv4() != v4);
        list
    };
    match &walk.target {
        Target::Address(ip) => vec![*ip],
        Target::Workload(w) => own_family_first(w.addresses.clone()).into_iter().take(1).collect(),
        Target::Service(s) => {
            let vips = s.service.vips.iter().filter(|vip| vip.network == walk.source.network);
            let vips = own_family_first(vips.map(|vip| vip.ip).collect());
            if let Some(vip) = vips.first() {
                return vec![*vip];
            }
            let first = |w: &Workload| own_family_first(w.addresses.clone()).into_iter().next();
            s.endpoints().filter_map(|e| first(&e.workload)).take(MAX_ENDS).collect()
        }
    }
}

fn captured(walk: &Walk<'_>, asked: &[IpAddr]) -> Way {
    if asked.is_empty() {
        return without_address(walk);
    }
    // Nothing that the mesh decides about an unknown address depends on the port, so that any will do.
    let port = walk.port.unwrap_or_default();
    let mut routes: Vec<Route> = Vec::new();
    let mut problem: Option<RouteError> = None;
    for ip in asked {
        match routes_to(walk, SocketAddr::new(*ip, port)) {
            Ok(found) => routes.extend(found),
            Err(error) => problem = Some(error),
        }
    }
    let Some(first) = routes.first() else {
        let Some(error) = problem else { return without_address(walk) };
        return Way::blocked(Some(target_object(walk)), error.to_string(), error.code().fix());
    };
    let (path, detail) = describe(walk, first, routes.len());
    let hops = match first.kind {
        RouteKind::ServiceWaypoint | RouteKind::WorkloadWaypoint | RouteKind::Gateway => {
            first.upstream.iter().cloned().collect()
        }
        RouteKind::Unknown | RouteKind::Passthrough | RouteKind::Direct => Vec::new(),
    };
    let ends = if hops.is_empty() { routes.iter().filter_map(end_of).collect() } else { behind(walk) };
    if let Some(port) = ends
        .iter()
        .filter_map(|e: &End| e.address)
        .map(|a| a.port())
        .find(|p| path != Path::Passthrough && walk.facts.illegal_ports.contains(p))
    {
        let detail = format!("port {port} is one of the mesh's own");
        return Way::blocked(Some(target_object(walk)), detail, Code::OwnPort.fix());
    }
    let addresses = ends.iter().filter_map(|end| end.address).map(|a| a.ip()).collect();
    let object = hops.first().map_or_else(|| target_object(walk), |hop| workload_object(hop));
    Way { path: Some(path), hops, ends, addresses, step: Step::ok(Stage::Routing, Some(object), detail) }
}

/// Every route that this connection may get, the same one once.
fn routes_to(walk: &Walk<'_>, destination: SocketAddr) -> Result<Vec<Route>, RouteError> {
    let client = walk.source.addresses.first().copied().unwrap_or(destination.ip());
    // Only the order of the answers depends on it.
    let mut rng = fastrand::Rng::with_seed(1);
    let ask = |excluded: &[_], rng: &mut _| {
        let request = Outbound {
            source: &walk.source,
            client,
            destination,
            excluded,
            illegal_ports: &walk.facts.illegal_ports,
        };
        route::outbound(walk.state, &request, rng)
    };
    let first = ask(&[], &mut rng)?;
    let equals = match (&first.kind, &walk.target) {
        (RouteKind::Direct, Target::Service(service)) => {
            candidates(service, &walk.source, destination.port(), Resolution::Standard, &[]).endpoints.len()
        }
        _ => 1,
    };
    let mut routes = vec![first];
    while routes.len() < equals.min(MAX_ENDS) {
        let excluded: Vec<_> = routes.iter().filter_map(|route| route.chosen().cloned()).collect();
        match ask(&excluded, &mut rng) {
            Ok(next) => routes.push(next),
            Err(_) => break,
        }
    }
    Ok(routes)
}

fn describe(walk: &Walk<'_>, route: &Route, count: usize) -> (Path, String) {
    let upstream =
        route.upstream.as_ref().map_or_else(String::new, |w| format!("{}/{}", w.namespace, w.name));
    let endpoints = match (&walk.target, count) {
        (Target::Service(_), 1) => format!("endpoint {upstream}"),
        (Target::Service(_), n) => format!("one of {n} endpoints, for example {upstream}"),
        _ => upstream.clone(),
    };
    match route.kind {
        RouteKind::Unknown => {
            (Path::Passthrough, "goes out as plain TCP, as it would without the mesh".into())
        }
        RouteKind::Passthrough => {
            (Path::Passthrough, "the service asks for the original destination: goes out as plain TCP".into())
        }
        RouteKind::ServiceWaypoint | RouteKind::WorkloadWaypoint => {
            (Path::Waypoint, format!("through HBONE to the waypoint {upstream}, which decides on the rest"))
        }
        RouteKind::Gateway => (
            Path::Gateway,
            format!("through the gateway {upstream} of another network, in a tunnel of its own"),
        ),
        RouteKind::Direct if route.protocol == Protocol::Tcp => {
            (Path::Plaintext, format!("plain TCP to {endpoints}, which does not speak HBONE"))
        }
        RouteKind::Direct if takes_fast_path(walk, route) => (
            Path::Fast,
            format!("kernel TCP within the node to {endpoints}, once one tunnelled connection was allowed"),
        ),
        RouteKind::Direct => (Path::Tunnel, format!("through HBONE to {endpoints}")),
    }
}

/// Both ends captured on this node, no waypoint, and the pod itself addressed: then the kernel connects them.
fn takes_fast_path(walk: &Walk<'_>, route: &Route) -> bool {
    let local = |w: &Workload| walk.is_local(w);
    walk.facts.fast_path
        && route.service.is_none()
        && local(&walk.source)
        && !walk.source.keeps_to_tunnel()
        && route.upstream.as_ref().is_some_and(|w| {
            local(w) && !w.keeps_to_tunnel() && w.waypoint.is_none() && w.application_tunnel.is_none()
        })
}

fn end_of(route: &Route) -> Option<End> {
    let workload = route.upstream.clone()?;
    let dialled = match &route.dial {
        route::Dial::Address(address) => Some(*address),
        route::Dial::Hostname { .. } => None,
    };
    let address = match &route.protocol {
        Protocol::Hbone(tunnel) => tunnel.authority.to_string().parse().ok(),
        Protocol::Tcp | Protocol::DoubleHbone { .. } => dialled,
    };
    Some(End { workload, address })
}

/// The workloads behind a waypoint: what was addressed, as any client would reach it.
fn behind(walk: &Walk<'_>) -> Vec<End> {
    match &walk.target {
        Target::Service(service) => direct_ends(walk, service),
        Target::Workload(workload) => vec![workload_end(walk, workload)],
        Target::Address(_) => Vec::new(),
    }
}

fn direct_ends(walk: &Walk<'_>, service: &ServiceEndpoints) -> Vec<End> {
    let port = walk.port.unwrap_or_default();
    let target = service.service.ports.get(&port).and_then(|p| p.target);
    let found = candidates(service, &walk.source, port, Resolution::Standard, &[]).endpoints;
    let end = |endpoint: &&crate::state::Endpoint| {
        let port = endpoint.ports.target(port).or(target);
        let ip = endpoint.workload.addresses.first();
        let address = ip.zip(port).map(|(ip, port)| SocketAddr::new(*ip, port));
        End { workload: endpoint.workload.clone(), address }
    };
    found.iter().take(MAX_ENDS).map(end).collect()
}

fn workload_end(walk: &Walk<'_>, workload: &Arc<Workload>) -> End {
    let ip = workload.addresses.first();
    let address = ip.zip(walk.port).map(|(ip, port)| SocketAddr::new(*ip, port));
    End { workload: workload.clone(), address }
}

/// The source is not captured: the kernel, or whatever balances services outside the mesh, picks.
fn uncaptured(walk: &Walk<'_>) -> Way {
    let ends = behind(walk);
    if ends.is_empty() && !matches!(walk.target, Target::Address(_)) {
        let left_out = match &walk.target {
            Target::Service(s) => {
                candidates(s, &walk.source, walk.port.unwrap_or_default(), Resolution::Standard, &[]).left_out
            }
            Target::Workload(_) | Target::Address(_) => route::NoCandidate::default(),
        };
        let detail = format!("no endpoint can take the connection: {left_out}");
        return Way::blocked(Some(target_object(walk)), detail, Code::NoEndpoint.fix());
    }
    let addresses = ends.iter().filter_map(|end| end.address).map(|a| a.ip()).collect();
    let detail = "plain TCP: the source is not captured, so that the mesh does not route it".to_owned();
    let path = if ends.is_empty() { Path::Outside } else { Path::Plaintext };
    let step = Step::ok(Stage::Routing, Some(target_object(walk)), detail);
    Way { path: Some(path), hops: Vec::new(), ends, addresses, step }
}

fn without_address(walk: &Walk<'_>) -> Way {
    let detail = match &walk.target {
        Target::Service(s) if s.all_endpoints().next().is_none() => {
            "the service has neither a virtual address nor endpoints".to_owned()
        }
        Target::Service(_) => {
            "the service has no virtual address and no endpoint that takes traffic".to_owned()
        }
        Target::Workload(_) | Target::Address(_) => "it has no address to connect to".to_owned(),
    };
    Way::blocked(Some(target_object(walk)), detail, Code::NoEndpoint.fix())
}

pub(super) fn target_object(walk: &Walk<'_>) -> Object {
    match &walk.target {
        Target::Workload(w) => workload_object(w),
        Target::Service(s) => service_object(s),
        Target::Address(ip) => Object::new("Address", "", &ip.to_string()),
    }
}

/// One step for all ends: the worst of them speaks. None when the mesh knows no end.
pub(super) fn destination_enrolment(way: &Way, ends: &[(&End, Enrolment, Step)]) -> Option<Step> {
    let tunnelled = matches!(way.path, Some(Path::Tunnel | Path::Fast));
    let refuses = |(end, state, step): &&(&End, Enrolment, Step)| {
        tunnelled && end.workload.is_hbone() && *state == Enrolment::Pending && step.outcome != Outcome::Ok
    };
    if let Some((_, _, step)) = ends.iter().find(refuses) {
        // Peers were told that it speaks HBONE, and nobody listens there.
        return Some(Step { outcome: Outcome::Blocked, ..step.clone() });
    }
    let worst = ends.iter().find(|(_, state, _)| *state != Enrolment::Captured).or(ends.first())?;
    let mut step = worst.2.clone();
    let alike = ends.iter().filter(|(_, state, _)| *state == worst.1).count();
    if ends.len() > 1 {
        step.detail = format!("{} ({alike} of {} endpoints are like this)", step.detail, ends.len());
    }
    Some(step)
}
