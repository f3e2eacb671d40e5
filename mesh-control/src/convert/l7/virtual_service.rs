//! VirtualServices: those for hosts become routes, those without are taken in by the ones that delegate to them. One that
//! names gateways becomes further routes for their listeners: see `outside`.

mod outside;

use std::collections::{BTreeMap, BTreeSet};

use mesh_core::xds::proto::l7 as wire;
use mesh_core::xds::proto::l7::http_rule::Action;

use super::super::Context;
use super::delegate::merge;
use super::destination::Subsets;
use super::istio_gateway::{Bound, Servers};
use super::report::{Report, waypoints};
use super::services::{Service, Services, complete};
use super::{L7, exported, exported_to, name_rules, origin, resource_name};
use crate::model::l7::{MESH_GATEWAY, VirtualHttp, VirtualMatch, VirtualTcp};
use crate::model::{Key, Kind, ObjectRef, VirtualService, selects};
use outside::gateway_key;

/// What the conversion of one VirtualService looks at.
struct Scope<'a> {
    context: &'a Context<'a>,
    services: &'a Services,
    servers: &'a Servers,
    subsets: Subsets<'a>,
    gateway_routes: GatewayRoutes<'a>,
}

/// Routes of the Gateway API by the services (namespace, host name) that they name: those of requests, those of
/// connections.
#[derive(Debug, Default)]
struct GatewayRoutes<'a> {
    http: BTreeMap<(&'a str, &'a str), Vec<&'a str>>,
    tcp: BTreeMap<(&'a str, &'a str), Vec<&'a str>>,
}

impl<'a> GatewayRoutes<'a> {
    fn of(l7: &'a L7) -> Self {
        let mut out = Self::default();
        for (name, route) in &l7.routes {
            let routes = match route.origin.as_ref().map(|o| o.kind.as_str()) {
                Some("HTTPRoute" | "GRPCRoute") => &mut out.http,
                Some("TCPRoute" | "TLSRoute") => &mut out.tcp,
                _ => continue,
            };
            for parent in &route.parents {
                routes.entry((&parent.namespace, &parent.hostname)).or_default().push(name);
            }
        }
        out
    }
}

/// Converts all of them. Destinations and routes of the Gateway API have to be in `out` already.
pub(super) fn convert(context: &mut Context<'_>, services: &Services, servers: &Servers, out: &mut L7) {
    let mut conditions = Vec::new();
    let (mut routes, mut redirected) = (BTreeMap::new(), Vec::new());
    let used = delegates(context);
    let (subsets, gateway_routes) = (Subsets::of(out), GatewayRoutes::of(out));
    let scope = Scope { context, services, servers, subsets, gateway_routes };
    for service in context.objects.virtual_services.values() {
        let object = ObjectRef::of(Kind::VirtualService, &service.meta);
        let mut report = Report::new(object.clone(), &service.unsupported);
        if service.hosts.is_empty() {
            match used.get(&service.meta.key()) {
                Some(_) => report.finish(true, &mut conditions),
                None => {
                    let why = "has no hosts, and no VirtualService delegates to it";
                    report.refuse("NoMatchingParent", why, &mut conditions);
                }
            }
            continue;
        }
        let hosts: Vec<String> =
            service.hosts.iter().map(|h| complete(h, &service.meta.namespace, context.mesh)).collect();
        let in_mesh = of_mesh(&service.gateways);
        let mut somewhere = false;
        if in_mesh {
            let route = scope.route(service, &hosts, &mut report);
            somewhere = scope.counts(service, &hosts, &mut report);
            routes.insert(resource_name(&object), route);
        }
        unnamed(service, &mut report);
        let outside = scope.outside(service, &hosts, &mut report);
        if !in_mesh && outside.routes.is_empty() {
            let why = match outside.without.as_slice() {
                [] => "has no rules for what its gateways serve".to_owned(),
                without => without.join("; "),
            };
            report.resolved(&mut conditions);
            report.refuse("NoMatchingParent", why, &mut conditions);
            continue;
        }
        somewhere |= !outside.routes.is_empty();
        for (i, route) in outside.routes.into_iter().enumerate() {
            routes.insert(format!("{}@{i}", resource_name(&object)), route);
        }
        redirected.extend(outside.redirected);
        report.finish(somewhere, &mut conditions);
        if in_mesh {
            waypoints(&object, &hosts, services, &mut conditions);
        }
    }
    out.routes.extend(routes);
    for (name, hosts) in redirected {
        let Some(route) = out.routes.get_mut(&name) else { continue };
        route.hostnames.extend(hosts);
        route.hostnames.sort();
        route.hostnames.dedup();
    }
    context.conditions.extend(conditions);
}

/// Says which matches are for gateways that the object itself does not name: they never hold.
fn unnamed(service: &VirtualService, report: &mut Report) {
    let namespace = &service.meta.namespace;
    let resolved = |name: &String| {
        if name == MESH_GATEWAY { Key::new("", MESH_GATEWAY) } else { gateway_key(name, namespace) }
    };
    let mut own: BTreeSet<Key> = service.gateways.iter().map(resolved).collect();
    if own.is_empty() {
        own.insert(Key::new("", MESH_GATEWAY));
    }
    let http = service.http.iter().map(|rule| rule.matches.iter().map(|m| &m.gateways).collect());
    let tls = service.tls.iter().map(|rule| rule.matches.iter().map(|m| &m.gateways).collect());
    let tcp = service.tcp.iter().map(|rule| rule.matches.iter().map(|m| &m.gateways).collect());
    let parts: [(&str, Vec<Vec<&Vec<String>>>); 3] =
        [("http", http.collect()), ("tls", tls.collect()), ("tcp", tcp.collect())];
    for (part, rules) in parts {
        for (i, matches) in rules.into_iter().enumerate() {
            for (m, gateways) in matches.into_iter().enumerate() {
                for name in gateways.iter().filter(|name| !own.contains(&resolved(name))) {
                    report.unsupported(format!(
                        "spec.{part}[{i}].match[{m}].gateways ({name}, which spec.gateways does not name)"
                    ));
                }
            }
        }
    }
}

fn of_mesh(gateways: &[String]) -> bool {
    gateways.is_empty() || gateways.iter().any(|g| g == MESH_GATEWAY)
}

/// VirtualServices that others delegate to.
fn delegates(context: &Context<'_>) -> BTreeMap<Key, Key> {
    let mut used = BTreeMap::new();
    for root in context.objects.virtual_services.values() {
        for delegate in root.http.iter().filter_map(|http| http.delegate.as_ref()) {
            used.insert(delegate_key(delegate, &root.meta.namespace), root.meta.key());
        }
    }
    used
}

fn delegate_key(delegate: &Key, namespace: &str) -> Key {
    let namespace = if delegate.namespace.is_empty() { namespace } else { &delegate.namespace };
    Key::new(namespace, &delegate.name)
}

impl Scope<'_> {
    fn route(&self, service: &VirtualService, hosts: &[String], report: &mut Report) -> wire::Route {
        let parents = hosts.iter().map(|hostname| wire::ServiceRef {
            namespace: String::new(),
            hostname: hostname.clone(),
            port: 0,
        });
        wire::Route {
            origin: Some(origin(Kind::VirtualService, &service.meta)),
            parents: parents.collect(),
            http: self.http_rules(service, At::Mesh, report),
            tcp: {
                let mut tcp = self.tls(service, hosts, report);
                tcp.extend(self.tcp_rules(service, At::Mesh, report));
                name_rules(&mut tcp, |rule| &mut rule.name);
                tcp
            },
            exported_to: exported(&service.export_to, &service.meta.namespace, report),
            ..wire::Route::default()
        }
    }

    /// `http`, as far as it counts somewhere.
    fn http_rules(&self, service: &VirtualService, at: At<'_>, report: &mut Report) -> Vec<wire::HttpRule> {
        let mut http = Vec::new();
        for (i, rule) in service.http.iter().enumerate() {
            let field = format!("spec.http[{i}]");
            let place = Place { namespace: &service.meta.namespace, field: &field, at };
            let own = self.http(rule, &place, report);
            match &rule.delegate {
                None => http.extend(own),
                Some(delegate) => http.extend(own.into_iter().flat_map(|own| {
                    self.delegated(&own, &delegate_key(delegate, &service.meta.namespace), &place, report)
                })),
            }
        }
        name_rules(&mut http, |rule| &mut rule.name);
        http
    }

    /// `tcp`, as far as it counts somewhere.
    fn tcp_rules(&self, service: &VirtualService, at: At<'_>, report: &mut Report) -> Vec<wire::TcpRule> {
        let mut tcp = Vec::new();
        for (i, rule) in service.tcp.iter().enumerate() {
            let field = format!("spec.tcp[{i}]");
            let place = Place { namespace: &service.meta.namespace, field: &field, at };
            tcp.extend(self.tcp(rule, &place, report));
        }
        name_rules(&mut tcp, |rule| &mut rule.name);
        tcp
    }

    /// A rule with names completed; none when it can never hold.
    fn http(&self, given: &VirtualHttp, place: &Place<'_>, report: &mut Report) -> Option<wire::HttpRule> {
        let mut rule = given.rule.clone();
        rule.matches = matches(&given.matches, place, report)?;
        if let Some(Action::Forward(forward)) = &mut rule.action {
            for (i, weighted) in forward.backends.iter_mut().enumerate() {
                self.backend(&mut weighted.backend, &format!("route[{i}].destination"), place, report);
            }
        }
        for (i, mirror) in rule.mirrors.iter_mut().enumerate() {
            self.backend(&mut mirror.backend, &format!("mirrors[{i}]"), place, report);
        }
        Some(rule)
    }

    fn backend(
        &self,
        backend: &mut Option<wire::Backend>,
        name: &str,
        place: &Place<'_>,
        report: &mut Report,
    ) {
        let Some(wire::Backend { service: Some(service), subset, .. }) = backend else { return };
        service.hostname = complete(&service.hostname, place.namespace, self.context.mesh);
        let field = format!("{}.{name}", place.field);
        if let Some(why) = self.services.missing(&service.hostname, service.port) {
            report.unresolved("BackendNotFound", format!("{field}: {why}"));
        } else if !subset.is_empty() && !self.subsets.has(&service.hostname, subset) {
            let host = &service.hostname;
            let why = format!("{field}.subset: no DestinationRule for {host} has a subset {subset}");
            report.unresolved("SubsetNotFound", why);
        }
    }

    /// The rules of another object, each within what the delegating rule matches.
    fn delegated(
        &self,
        own: &wire::HttpRule,
        key: &Key,
        Place { namespace, field, at }: &Place<'_>,
        report: &mut Report,
    ) -> Vec<wire::HttpRule> {
        let Some(other) = self.context.objects.virtual_services.get(key).filter(|v| v.hosts.is_empty())
        else {
            let why = "names no VirtualService without hosts; the rule is left out";
            report.unresolved("DelegateNotFound", format!("{field}.delegate: {key} {why}"));
            return Vec::new();
        };
        let visible = exported_to(&other.export_to, &key.namespace);
        if !visible.iter().any(|to| to == "*" || to == *namespace) {
            let why = format!("is not exported to {namespace}; the rule is left out");
            report.unresolved("DelegateNotFound", format!("{field}.delegate: {key} {why}"));
            return Vec::new();
        }
        let mut out = Vec::new();
        for (i, rule) in other.http.iter().enumerate() {
            let place = format!("{key} spec.http[{i}]");
            let inside = Place { namespace: &key.namespace, field: &place, at: *at };
            let Some(inner) = self.http(rule, &inside, report) else { continue };
            match merge(own, inner) {
                Some(rule) => out.push(rule),
                None => report.overruled(format!(
                    "{place} matches nothing that {field} matches, so that it never holds"
                )),
            }
        }
        out
    }

    fn tcp(&self, given: &VirtualTcp, place: &Place<'_>, report: &mut Report) -> Option<wire::TcpRule> {
        let matches = matches(&given.matches, place, report)?;
        let mut backends = given.backends.clone();
        for (i, weighted) in backends.iter_mut().enumerate() {
            self.backend(&mut weighted.backend, &format!("route[{i}].destination"), place, report);
        }
        Some(wire::TcpRule { name: String::new(), matches, backends })
    }

    /// A connection at a waypoint is to a service already, so that of the names that clients may ask for only the
    /// service's own can be told: a match counts when it names that alone (as Istio has it).
    fn tls(&self, service: &VirtualService, hosts: &[String], report: &mut Report) -> Vec<wire::TcpRule> {
        let mut out = Vec::new();
        for (i, rule) in service.tls.iter().enumerate() {
            let mut kept = rule.clone();
            kept.matches.clear();
            for (m, given) in rule.matches.iter().enumerate() {
                match given.wire.sni_hosts.as_slice() {
                    [host] if hosts.contains(host) => kept.matches.push(given.clone()),
                    _ => report.unsupported(format!(
                        "spec.tls[{i}].match[{m}].sniHosts (counts where it is one of spec.hosts alone, complete)"
                    )),
                }
            }
            if kept.matches.is_empty() {
                continue;
            }
            let field = format!("spec.tls[{i}]");
            let place = Place { namespace: &service.meta.namespace, field: &field, at: At::Mesh };
            out.extend(self.tcp(&kept, &place, report));
        }
        out
    }

    /// Whether it counts for any service; says for which it does not.
    fn counts(&self, service: &VirtualService, hosts: &[String], report: &mut Report) -> bool {
        let own = &service.meta.namespace;
        let matching: Vec<&Service> = hosts.iter().flat_map(|h| self.services.matching(h)).collect();
        let mut somewhere = matching.is_empty();
        let mut foreign = BTreeSet::new();
        let parts = [
            ("http", !service.http.is_empty(), &self.gateway_routes.http),
            ("tcp and tls", !(service.tcp.is_empty() && service.tls.is_empty()), &self.gateway_routes.tcp),
        ];
        for found in &matching {
            if found.namespace != *own && found.asked.as_ref().is_none_or(|g| g.namespace != *own) {
                foreign.insert(found.hostname.as_str());
                continue;
            }
            for (part, _, routes) in parts.iter().filter(|(_, has, _)| *has) {
                match routes.get(&(found.namespace.as_str(), found.hostname.as_str())) {
                    None => somewhere = true,
                    Some(routes) => report.overruled(format!(
                        "its {part} rules do not count for {}, for which {} does",
                        found.hostname,
                        routes.join(", ")
                    )),
                }
            }
        }
        if !foreign.is_empty() {
            let names: Vec<&str> = foreign.into_iter().collect();
            report.overruled(format!(
                "does not count for {}: only VirtualServices of the service's namespace and of its waypoint's do",
                names.join(", ")
            ));
        }
        somewhere
    }
}

/// Where a rule stands, whose names it uses, and where it is to count.
struct Place<'a> {
    namespace: &'a str,
    field: &'a str,
    at: At<'a>,
}

/// Where a rule is to count.
#[derive(Clone, Copy)]
enum At<'a> {
    Mesh,
    Server(&'a Bound),
}

/// What a match says of where a request or connection has come to, and from where.
trait Conditions: Clone {
    /// Port, namespace and labels of the source.
    fn conditions(&mut self) -> (&mut u32, &mut String, &mut BTreeMap<String, String>);
}

impl Conditions for wire::HttpMatch {
    fn conditions(&mut self) -> (&mut u32, &mut String, &mut BTreeMap<String, String>) {
        (&mut self.port, &mut self.source_namespace, &mut self.source_labels)
    }
}

impl Conditions for wire::TcpMatch {
    fn conditions(&mut self) -> (&mut u32, &mut String, &mut BTreeMap<String, String>) {
        (&mut self.port, &mut self.source_namespace, &mut self.source_labels)
    }
}

/// The matches that can ever hold where a rule is to count; none when there were some and none of them is left.
fn matches<T: Conditions>(
    given: &[VirtualMatch<T>],
    place: &Place<'_>,
    report: &mut Report,
) -> Option<Vec<T>> {
    let mut out = Vec::new();
    for (i, entry) in given.iter().enumerate() {
        let field = format!("{}.match[{i}]", place.field);
        match (place.at, &entry.never) {
            (At::Mesh, _) if !of_mesh(&entry.gateways) => {}
            (At::Mesh, Some(why)) => report.unsupported(format!("{field} ({why}, so that it never holds)")),
            (At::Mesh, None) => out.push(entry.wire.clone()),
            (At::Server(bound), _) => out.extend(at_server(entry, bound, place.namespace)),
        }
    }
    (given.is_empty() || !out.is_empty()).then_some(out)
}

/// A match at a server. Its conditions on the source are about the gateway itself, as in Istio, and those and the port are
/// decided here.
fn at_server<T: Conditions>(entry: &VirtualMatch<T>, bound: &Bound, namespace: &str) -> Option<T> {
    let names_it = |name: &String| gateway_key(name, namespace) == bound.gateway;
    if !entry.gateways.is_empty() && !entry.gateways.iter().any(names_it) {
        return None;
    }
    let mut wire = entry.wire.clone();
    let (port, source_namespace, source_labels) = wire.conditions();
    let is_port = *port == 0 || *port == u32::from(bound.port);
    let is_namespace = source_namespace.is_empty() || *source_namespace == bound.proxies.namespace;
    let is_labelled = source_labels.is_empty() || bound.labels.iter().any(|own| selects(source_labels, own));
    if !(is_port && is_namespace && is_labelled) {
        return None;
    }
    *port = 0;
    source_namespace.clear();
    source_labels.clear();
    Some(wire)
}
