//! What the map says beside traffic: the page of a service, what was configured and how far it is, and which namespaces could
//! be STRICT. Of what is pushed, not of objects: what nodes and waypoints do is what they were told.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use mesh_core::xds::proto::workload::{self as wire, TunnelProtocol, address};
use mesh_core::xds::proto::{l7, security};
use prost::Message;
use serde::Serialize;

use super::graph::Shown;
use crate::ads::Clients;
use crate::ads::snapshot::{ResourceType, Snapshot};
use crate::ca::store::CaStore;
use crate::convert::Captured;
use crate::debug::wire::ip;
use crate::enrol::Enrolments;
use crate::hub::{Hub, Published};
use crate::model::{Kind, ObjectRef, Objects};

/// The policy that stands for STRICT, in the root namespace.
const STRICT: &str = "/istio_converted_static_strict";
/// What stands for a PeerAuthentication whose ports differ.
const PER_PORT: &str = "/converted_peer_authentication_";

/// Kinds that people configure the mesh with.
const CONFIGURED: [Kind; 15] = [
    Kind::PeerAuthentication,
    Kind::AuthorizationPolicy,
    Kind::RequestAuthentication,
    Kind::Gateway,
    Kind::IstioGateway,
    Kind::VirtualService,
    Kind::DestinationRule,
    Kind::HTTPRoute,
    Kind::GRPCRoute,
    Kind::TCPRoute,
    Kind::TLSRoute,
    Kind::ReferenceGrant,
    Kind::ServiceEntry,
    Kind::WorkloadEntry,
    Kind::Telemetry,
];

/// Where facts come from.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Objects, and what is pushed.
    pub hub: Arc<Hub>,
    /// Proxies.
    pub clients: Arc<Clients>,
    /// Captured pods.
    pub enrolments: Arc<Enrolments>,
    /// Certificates that were issued.
    pub store: Arc<CaStore>,
    /// Where traces are shown.
    pub links: Links,
    /// Since which snapshot each object is as it is.
    pub seen: Arc<Mutex<Seen>>,
}

/// Pages of a tracing back end, with marks to fill in.
#[derive(Debug, Clone, Default)]
pub struct Links {
    /// The traces of a service (`{service}`, `{namespace}`).
    pub service: Option<Arc<str>>,
    /// The spans of a connection (`{connection}`, too).
    pub connection: Option<Arc<str>>,
}

/// Since which snapshot each object is as it is. Looked at when somebody asks: a version counts from the snapshot that it
/// was first seen in, which is never too early.
#[derive(Debug, Default)]
pub struct Seen {
    objects: Arc<Objects>,
    since: HashMap<ObjectRef, u64>,
}

impl Seen {
    fn look(&mut self, published: &Published) {
        let now = &published.source.objects;
        let mut since = HashMap::new();
        for object in configured(now) {
            // The same place in memory, which the kept objects hold: the same version.
            let place = |objects: &Objects| objects.meta(&object).map(std::ptr::from_ref);
            let same = place(&self.objects).is_some() && place(&self.objects) == place(now);
            let known = self.since.get(&object).copied().filter(|_| same);
            since.insert(object, known.unwrap_or(published.snapshot));
        }
        self.since = since;
        self.objects = now.clone();
    }
}

fn configured(objects: &Objects) -> impl Iterator<Item = ObjectRef> + '_ {
    CONFIGURED
        .into_iter()
        .flat_map(|kind| objects.keys(kind).into_iter().map(move |key| ObjectRef { kind, key }))
}

/// A service or workload.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Page {
    services: Vec<ServiceFacts>,
    /// What is asked of clients: `STRICT`, `PERMISSIVE`, or `per port`.
    mode: &'static str,
    pods: Vec<PodFacts>,
    policies: Vec<ObjectFacts>,
    routes: Vec<ObjectFacts>,
    traces: Option<String>,
    connection_traces: Option<String>,
}

impl Page {
    /// Counts a denial by a policy, by the name that events have for it (`AuthorizationPolicy shop/only-frontend`).
    pub fn denied_by(&mut self, policy: &str) {
        for object in &mut self.policies {
            let name = format!("{}/{}", object.namespace, object.name);
            object.denied += u64::from(policy.split([' ', ',']).any(|word| word == name));
        }
    }
}

#[derive(Debug, Serialize)]
struct ServiceFacts {
    hostname: String,
    addresses: Vec<String>,
    ports: Vec<String>,
    waypoint: Option<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct PodFacts {
    name: String,
    node: String,
    captured: bool,
    ready: bool,
    identity: String,
    certificate_until: Option<String>,
}

/// An object, and what it says of a service.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ObjectFacts {
    kind: String,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    says: String,
    /// Connections that it denied, of those that the relay still knows.
    pub denied: u64,
    finding: Option<String>,
}

/// All configuration.
#[derive(Debug, Serialize)]
pub struct Configuration {
    /// Proxies that are connected.
    pub proxies: usize,
    /// Objects.
    pub objects: Vec<Configured>,
}

/// One object.
#[derive(Debug, Serialize)]
pub struct Configured {
    /// Kind, namespace, name.
    #[serde(flatten)]
    pub object: ObjectRef,
    /// What is wrong with it, and what would be right.
    pub findings: Vec<String>,
    programmed: Option<Programmed>,
}

#[derive(Debug, Serialize)]
struct Programmed {
    acked: usize,
    of: usize,
    waiting: Vec<String>,
    rejected: Option<String>,
}

/// A namespace before it is made STRICT.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Space {
    /// Name.
    pub namespace: String,
    /// `strict` already; `ready`; `no`; `unknown` where there was no traffic to judge by.
    pub verdict: &'static str,
    /// What is asked of clients now.
    pub mode: String,
    /// Workloads.
    pub pods: usize,
    /// Those of them that are in the mesh.
    pub captured: usize,
    /// Reasons.
    pub why: Vec<String>,
}

fn identity(workload: &wire::Workload) -> String {
    let domain = if workload.trust_domain.is_empty() { "cluster.local" } else { &workload.trust_domain };
    let account = if workload.service_account.is_empty() { "default" } else { &workload.service_account };
    format!("spiffe://{domain}/ns/{}/sa/{account}", workload.namespace)
}

fn mode(workload: &wire::Workload) -> &'static str {
    let lists = |mark: &str| workload.authorization_policies.iter().any(|policy| policy.contains(mark));
    if lists(PER_PORT) {
        "per port"
    } else if lists(STRICT) {
        "STRICT"
    } else {
        "PERMISSIVE"
    }
}

fn is_captured(workload: &wire::Workload, captured: &Captured) -> bool {
    workload.tunnel_protocol() == TunnelProtocol::Hbone
        || captured.get(&workload.node).is_some_and(|uids| uids.contains(&workload.uid))
}

/// A page with its marks filled in; that of a connection stays for the map.
fn link(page: Option<&str>, namespace: &str, name: &str) -> Option<String> {
    Some(page?.replace("{service}", name).replace("{namespace}", namespace))
}

/// What is pushed of addresses.
fn addresses(snapshot: &Snapshot) -> (Vec<wire::Workload>, Vec<wire::Service>) {
    let (mut workloads, mut services) = (Vec::new(), Vec::new());
    for entry in snapshot.entries(ResourceType::Address).values() {
        match wire::Address::decode(entry.value.as_slice()).ok().and_then(|address| address.r#type) {
            Some(address::Type::Workload(workload)) => workloads.push(workload),
            Some(address::Type::Service(service)) => services.push(service),
            None => {}
        }
    }
    (workloads, services)
}

fn decoded<M: Message + Default>(snapshot: &Snapshot, kind: ResourceType) -> Vec<M> {
    let entries = snapshot.entries(kind).values();
    entries.filter_map(|entry| M::decode(entry.value.as_slice()).ok()).collect()
}

fn waypoint(address: Option<&wire::GatewayAddress>) -> Option<String> {
    use wire::gateway_address::Destination;
    Some(match address?.destination.as_ref()? {
        Destination::Hostname(host) => format!("{}/{}", host.namespace, host.hostname),
        Destination::Address(address) => ip(&address.address),
    })
}

/// Whether a host of a route is a service's; both are complete.
fn covers(host: &str, hostname: &str) -> bool {
    host == hostname || host.strip_prefix('*').is_some_and(|suffix| hostname.ends_with(suffix))
}

impl Facts {
    /// The page of `namespace/name`: a service, a workload or a pod.
    #[must_use]
    pub fn page(&self, namespace: &str, name: &str) -> Page {
        let (snapshot, published) = (self.hub.snapshot(), self.hub.published());
        let (workloads, services) = addresses(&snapshot);
        let mut workloads: Vec<_> = workloads.into_iter().filter(|w| w.namespace == namespace).collect();
        let mut services: Vec<_> = services.into_iter().filter(|s| s.namespace == namespace).collect();
        let is = |w: &wire::Workload| {
            [&w.workload_name, &w.canonical_name, &w.name].into_iter().any(|n| n == name)
        };
        let key = |s: &wire::Service| format!("{}/{}", s.namespace, s.hostname);
        if workloads.iter().any(is) {
            workloads.retain(is);
            services.retain(|s| s.name == name || workloads.iter().any(|w| w.services.contains_key(&key(s))));
        } else {
            services.retain(|s| s.name == name);
            workloads.retain(|w| services.iter().any(|s| w.services.contains_key(&key(s))));
        }
        let captured = self.enrolments.captured();
        let mut modes: BTreeSet<&str> = workloads.iter().map(mode).collect();
        let mode = match (modes.pop_first(), modes.is_empty()) {
            (None, _) => "-",
            (Some(mode), true) => mode,
            _ => "differs by pod",
        };
        let finding = |kind: &str, namespace: &str, name: &str| {
            let of = |o: &ObjectRef| {
                (o.kind.to_string() == kind) && o.key.namespace == namespace && o.key.name == name
            };
            findings(&published)
                .into_iter()
                .find(|(object, _)| of(object))
                .and_then(|(_, f)| f.into_iter().next())
        };
        let page = Page {
            mode,
            pods: workloads.iter().map(|w| self.pod(w, &captured)).collect(),
            policies: policies(&snapshot, &workloads, &services),
            routes: routes(&snapshot, &services),
            services: services.iter().map(service).collect(),
            traces: link(self.links.service.as_deref(), namespace, name),
            connection_traces: link(self.links.connection.as_deref(), namespace, name),
        };
        let with = |list: Vec<ObjectFacts>| {
            let each = list
                .into_iter()
                .map(|o| ObjectFacts { finding: finding(&o.kind, &o.namespace, &o.name), ..o });
            each.collect()
        };
        Page { policies: with(page.policies), routes: with(page.routes), ..page }
    }

    fn pod(&self, workload: &wire::Workload, captured: &Captured) -> PodFacts {
        let identity = identity(workload);
        let until = self.store.issued_until(&identity);
        PodFacts {
            name: workload.name.clone(),
            node: workload.node.clone(),
            captured: is_captured(workload, captured),
            ready: workload.status() == wire::WorkloadStatus::Healthy,
            certificate_until: until.map(|at| humantime::format_rfc3339_seconds(at).to_string()),
            identity,
        }
    }

    /// All objects, with what is wrong and how many proxies have them.
    #[must_use]
    pub fn configuration(&self) -> Configuration {
        let published = self.hub.published();
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.look(&published);
        let mut found = findings(&published);
        let mut counted: HashMap<u64, crate::ads::Programmed> = HashMap::new();
        let mut objects: Vec<Configured> = Vec::new();
        for object in configured(published.objects()) {
            let programmed = seen.since.get(&object).map(|since| {
                let of = counted.entry(*since).or_insert_with(|| self.clients.programmed(*since));
                Programmed {
                    acked: of.current,
                    of: of.current + of.waiting,
                    waiting: of.names.clone(),
                    rejected: of.rejected.clone(),
                }
            });
            objects.push(Configured {
                findings: found.remove(&object).unwrap_or_default(),
                programmed,
                object,
            });
        }
        // What is not in force, and Services and the like that something is wrong with.
        let others = found.into_iter().filter(|(_, findings)| !findings.is_empty());
        objects.extend(others.map(|(object, findings)| Configured { object, findings, programmed: None }));
        objects.sort_by_key(|configured| configured.findings.is_empty());
        Configuration { proxies: self.clients.list().len(), objects }
    }

    /// Which namespaces could be STRICT, by the traffic of the last hour.
    #[must_use]
    pub fn spaces(&self, edges: &[Shown]) -> Vec<Space> {
        spaces(&addresses(&self.hub.snapshot()).0, &self.enrolments.captured(), edges)
    }
}

/// What is wrong with objects.
fn findings(published: &Published) -> BTreeMap<ObjectRef, Vec<String>> {
    let mut found: BTreeMap<ObjectRef, Vec<String>> = BTreeMap::new();
    for problem in &published.source.problems {
        if let Some(object) = &problem.object {
            let words = [&problem.field, &problem.message, &problem.consequence];
            let words: Vec<&str> =
                words.into_iter().map(String::as_str).filter(|word| !word.is_empty()).collect();
            found.entry(object.clone()).or_default().push(words.join(": "));
        }
    }
    for condition in published.conditions.iter().filter(|condition| !condition.status) {
        let text = format!("{}, {}: {}", condition.kind, condition.reason, condition.message);
        found.entry(condition.object.clone()).or_default().push(text);
    }
    found
}

/// A port of a service, and where it leads unless each pod decides.
fn port(port: &wire::Port) -> String {
    match port.target_port {
        0 => port.service_port.to_string(),
        target => format!("{}→{target}", port.service_port),
    }
}

/// So many of something.
fn many(count: usize, of: &str) -> String {
    format!("{count} {of}{}", if count == 1 { "" } else { "s" })
}

fn service(service: &wire::Service) -> ServiceFacts {
    ServiceFacts {
        hostname: service.hostname.clone(),
        addresses: service.addresses.iter().map(|address| ip(&address.address)).collect(),
        ports: service.ports.iter().map(port).collect(),
        waypoint: waypoint(service.waypoint.as_ref()),
    }
}

fn facts(kind: &str, namespace: &str, name: &str, says: String) -> ObjectFacts {
    let (kind, namespace, name) = (kind.to_owned(), namespace.to_owned(), name.to_owned());
    ObjectFacts { kind, namespace, name, says, denied: 0, finding: None }
}

/// Those on connections, that nodes evaluate, and those on requests, that waypoints do.
fn policies(
    snapshot: &Snapshot,
    workloads: &[wire::Workload],
    services: &[wire::Service],
) -> Vec<ObjectFacts> {
    let mut found = BTreeSet::new();
    let listed: BTreeSet<&str> =
        workloads.iter().flat_map(|w| w.authorization_policies.iter().map(String::as_str)).collect();
    let namespaces: BTreeSet<&str> = workloads.iter().map(|w| w.namespace.as_str()).collect();
    for policy in decoded::<security::Authorization>(snapshot, ResourceType::Authorization) {
        let applies = match policy.scope() {
            security::Scope::Global => !workloads.is_empty(),
            security::Scope::Namespace => namespaces.contains(policy.namespace.as_str()),
            security::Scope::WorkloadSelector => {
                listed.contains(format!("{}/{}", policy.namespace, policy.name).as_str())
            }
        };
        if applies {
            let key = format!("/{}", policy.name);
            let peer = key == STRICT || key.starts_with(PER_PORT);
            let kind = if peer { "PeerAuthentication" } else { "AuthorizationPolicy" };
            let name = policy.name.strip_prefix(&PER_PORT[1..]).unwrap_or(&policy.name);
            let dry = if policy.dry_run { ", dry run" } else { "" };
            let says = format!(
                "{}, {}, on connections{dry}",
                policy.action().as_str_name(),
                many(policy.rules.len(), "rule")
            );
            found.insert(facts(kind, &policy.namespace, name, says));
        }
    }
    let waypoints: BTreeSet<String> = services.iter().filter_map(|s| waypoint(s.waypoint.as_ref())).collect();
    for policy in decoded::<l7::Authorization>(snapshot, ResourceType::RequestAuthorization) {
        let origin = policy.origin.clone().unwrap_or_default();
        let named = policy.targets.iter().any(|target| {
            let space = if target.namespace.is_empty() { &origin.namespace } else { &target.namespace };
            services.iter().any(|s| s.namespace == *space && s.name == target.name)
                || waypoints.iter().any(|w| w.starts_with(&format!("{space}/{}.", target.name)))
        });
        if named {
            let dry = if policy.dry_run { ", dry run" } else { "" };
            let says = format!(
                "{}, {}, on requests{dry}",
                policy.action().as_str_name(),
                many(policy.rules.len(), "rule")
            );
            found.insert(facts("AuthorizationPolicy", &origin.namespace, &origin.name, says));
        }
    }
    found.into_iter().collect()
}

/// Routes and destinations that a service's waypoint follows.
fn routes(snapshot: &Snapshot, services: &[wire::Service]) -> Vec<ObjectFacts> {
    let mut found = BTreeSet::new();
    for route in decoded::<l7::Route>(snapshot, ResourceType::Route) {
        let origin = route.origin.clone().unwrap_or_default();
        let of = |s: &wire::Service| {
            let parent = |p: &l7::ServiceRef| {
                (p.namespace.is_empty() || p.namespace == s.namespace) && covers(&p.hostname, &s.hostname)
            };
            route.parents.iter().any(parent)
        };
        if services.iter().any(of) {
            let says = many(route.http.len() + route.tcp.len(), "rule");
            found.insert(facts(&origin.kind, &origin.namespace, &origin.name, says));
        }
    }
    for destination in decoded::<l7::Destination>(snapshot, ResourceType::Destination) {
        let origin = destination.origin.clone().unwrap_or_default();
        if services.iter().any(|s| covers(&destination.hostname, &s.hostname)) {
            let says = many(destination.subsets.len(), "subset");
            found.insert(facts(&origin.kind, &origin.namespace, &origin.name, says));
        }
    }
    found.into_iter().collect()
}

fn spaces(workloads: &[wire::Workload], captured: &Captured, edges: &[Shown]) -> Vec<Space> {
    let mut by: BTreeMap<&str, Vec<&wire::Workload>> = BTreeMap::new();
    for workload in workloads {
        by.entry(&workload.namespace).or_default().push(workload);
    }
    let space = |(namespace, workloads): (&str, Vec<&wire::Workload>)| {
        let inside: Vec<_> = workloads.iter().filter(|w| is_captured(w, captured)).collect();
        let modes: BTreeSet<&str> = inside.iter().map(|w| mode(w)).collect();
        // Plain text to a pod outside of the mesh is not refused by it.
        let reached = |edge: &&Shown| {
            let of = |w: &wire::Workload| {
                [&w.workload_name, &w.canonical_name, &w.name]
                    .into_iter()
                    .any(|n| *n == edge.edge.destination.name)
            };
            edge.edge.destination.namespace == namespace && inside.iter().any(|w| of(w))
        };
        let carried = |edge: &&Shown| edge.opened > 0 || edge.to_server > 0;
        let mut came = edges.iter().filter(reached).filter(carried).peekable();
        let any = came.peek().is_some();
        let mut why: Vec<String> = came
            .filter(|edge| edge.edge.path == "plain")
            .map(|edge| {
                let source = [edge.edge.source.namespace.as_str(), &edge.edge.source.name];
                let source = source.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("/");
                format!(
                    "plain text from {source} to {}, {}",
                    edge.edge.destination.name,
                    many(usize::try_from(edge.opened).unwrap_or(usize::MAX), "connection")
                )
            })
            .collect();
        let verdict = match (modes.iter().all(|mode| *mode == "STRICT"), why.is_empty(), any) {
            _ if inside.is_empty() => "unknown",
            (true, ..) => "strict",
            (_, false, _) => "no",
            (_, true, true) => "ready",
            (_, true, false) => "unknown",
        };
        match verdict {
            "unknown" if inside.is_empty() => why.push("no pod is in the mesh".to_owned()),
            "unknown" => why.push("nobody called in the last hour".to_owned()),
            "ready" => why
                .push("everything that came was identified by its certificate or on its own node".to_owned()),
            _ => {}
        }
        why.truncate(50);
        Space {
            namespace: namespace.to_owned(),
            verdict,
            mode: modes.into_iter().collect::<Vec<_>>().join(", "),
            pods: workloads.len(),
            captured: inside.len(),
            why,
        }
    };
    by.into_iter().map(space).collect()
}

#[cfg(test)]
mod tests {
    use mesh_core::flows::{Flow, Kind as FlowKind, Party, Path};

    use super::super::graph::Graph;
    use super::*;

    fn workload(name: &str, namespace: &str, policies: &[&str]) -> wire::Workload {
        wire::Workload {
            uid: format!("c//Pod/{namespace}/{name}"),
            name: format!("{name}-1"),
            workload_name: name.into(),
            namespace: namespace.into(),
            node: "a".into(),
            authorization_policies: policies.iter().map(|p| (*p).to_owned()).collect(),
            ..wire::Workload::default()
        }
    }

    fn edge(from: [&str; 2], to: [&str; 2], path: Path) -> Flow {
        let party = |[namespace, workload]: [&str; 2]| Party {
            namespace: namespace.into(),
            workload: workload.into(),
            ..Party::default()
        };
        let (source, destination) = (party(from), party(to));
        Flow { kind: FlowKind::Established, at_us: 1_000_000, source, destination, path, ..Flow::default() }
    }

    #[test]
    fn a_namespace_is_ready_for_strict_when_no_plain_text_came_to_pods_of_the_mesh() {
        let strict = "istio-system/istio_converted_static_strict";
        let workloads = [
            workload("pay", "shop", &[]),
            workload("old", "shop", &[]),
            workload("web", "front", &[]),
            workload("db", "data", &[strict]),
            workload("quiet", "idle", &[]),
            workload("far", "outside", &[]),
        ];
        let inside = workloads.iter().filter(|w| !["old", "far"].contains(&w.workload_name.as_str()));
        let captured = Captured::from([("a".to_owned(), inside.map(|w| w.uid.clone()).collect())]);
        let mut graph = Graph::default();
        for flow in [
            edge(["front", "web"], ["shop", "pay"], Path::Tunnel),
            // Not in the mesh: STRICT would not refuse it.
            edge(["outside", "far"], ["shop", "old"], Path::Plain),
            edge(["outside", "far"], ["front", "web"], Path::Plain),
        ] {
            graph.add(&flow, 1);
        }
        let found = spaces(&workloads, &captured, &graph.between(1, 60));
        let verdicts: Vec<_> = found.iter().map(|s| (s.namespace.as_str(), s.verdict, s.captured)).collect();
        let expected = [
            ("data", "strict", 1),
            ("front", "no", 1),
            ("idle", "unknown", 1),
            ("outside", "unknown", 0),
            ("shop", "ready", 1),
        ];
        assert_eq!(verdicts, expected);
        assert_eq!(found[1].why, ["plain text from outside/far to web, 1 connection"]);
    }

    #[test]
    fn what_is_asked_of_clients_is_seen_in_what_nodes_are_told() {
        assert_eq!(mode(&workload("a", "shop", &[])), "PERMISSIVE");
        assert_eq!(mode(&workload("a", "shop", &["root/istio_converted_static_strict"])), "STRICT");
        assert_eq!(mode(&workload("a", "shop", &["shop/converted_peer_authentication_p"])), "per port");
        assert!(covers("*.shop.svc", "pay.shop.svc") && !covers("*.shop.svc", "pay.other.svc"));
    }
}
