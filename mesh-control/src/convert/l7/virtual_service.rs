//! VirtualServices: those for hosts become routes, those without are taken in by the ones that delegate to them.

use std::collections::{BTreeMap, BTreeSet};

use mesh_core::xds::proto::l7 as wire;
use mesh_core::xds::proto::l7::http_rule::Action;

use super::super::Context;
use super::delegate::merge;
use super::destination::Subsets;
use super::report::{Report, waypoints};
use super::services::{Service, Services, complete};
use super::{L7, exported, exported_to, name_rules, origin, resource_name};
use crate::model::l7::{MESH_GATEWAY, VirtualHttp, VirtualMatch, VirtualTcp};
use crate::model::{Key, Kind, ObjectRef, VirtualService};

/// What the conversion of one VirtualService looks at.
struct Scope<'a> {
    context: &'a Context<'a>,
    services: &'a Services,
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
pub(super) fn convert(context: &mut Context<'_>, services: &Services, out: &mut L7) {
    let mut conditions = Vec::new();
    let mut routes = BTreeMap::new();
    let used = delegates(context);
    let scope =
        Scope { context, services, subsets: Subsets::of(out), gateway_routes: GatewayRoutes::of(out) };
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
        if !of_mesh(&service.gateways) {
            let why = format!(
                "is for gateways {} only, which are not served; add `mesh` to spec.gateways to have it in the mesh",
                service.gateways.join(", ")
            );
            report.refuse("UnsupportedValue", why, &mut conditions);
            continue;
        }
        for gateway in service.gateways.iter().filter(|g| *g != MESH_GATEWAY) {
            report.unsupported(format!("spec.gateways ({gateway}, which is not served)"));
        }
        let hosts: Vec<String> =
            service.hosts.iter().map(|h| complete(h, &service.meta.namespace, context.mesh)).collect();
        let route = scope.route(service, &hosts, &mut report);
        let somewhere = scope.counts(service, &hosts, &mut report);
        routes.insert(resource_name(&object), route);
        report.finish(somewhere, &mut conditions);
        waypoints(&object, &hosts, services, &mut conditions);
    }
    out.routes.extend(routes);
    context.conditions.extend(conditions);
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
        let mut http = Vec::new();
        for (i, rule) in service.http.iter().enumerate() {
            let field = format!("spec.http[{i}]");
            let place = Place { namespace: &service.meta.namespace, field: &field };
            let own = self.http(rule, &place, report);
            match &rule.delegate {
                None => http.extend(own),
                Some(delegate) => http.extend(own.into_iter().flat_map(|own| {
                    self.delegated(&own, &delegate_key(delegate, &service.meta.namespace), &place, report)
                })),
            }
        }
        name_rules(&mut http, |rule| &mut rule.name);
        let mut tcp = self.tls(service, hosts, report);
        for (i, rule) in service.tcp.iter().enumerate() {
            let field = format!("spec.tcp[{i}]");
            let place = Place { namespace: &service.meta.namespace, field: &field };
            tcp.extend(self.tcp(rule, &place, report));
        }
        name_rules(&mut tcp, |rule| &mut rule.name);
        wire::Route {
            origin: Some(origin(Kind::VirtualService, &service.meta)),
            parents: parents.collect(),
            http,
            tcp,
            exported_to: exported(&service.export_to, &service.meta.namespace, report),
            ..wire::Route::default()
        }
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
        Place { namespace, field }: &Place<'_>,
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
            let Some(inner) = self.http(rule, &Place { namespace: &key.namespace, field: &place }, report)
            else {
                continue;
            };
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
            let place = Place { namespace: &service.meta.namespace, field: &field };
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

/// Where a rule stands, and whose names it uses.
struct Place<'a> {
    namespace: &'a str,
    field: &'a str,
}

/// The matches that a waypoint can ever see; none when there were some and none of them is left.
fn matches<T: Clone>(given: &[VirtualMatch<T>], place: &Place<'_>, report: &mut Report) -> Option<Vec<T>> {
    let mut out = Vec::new();
    for (i, entry) in given.iter().enumerate() {
        let field = format!("{}.match[{i}]", place.field);
        for gateway in entry.gateways.iter().filter(|g| *g != MESH_GATEWAY) {
            report.unsupported(format!("{field}.gateways ({gateway}, which is not served)"));
        }
        match &entry.never {
            _ if !of_mesh(&entry.gateways) => {}
            Some(why) => report.unsupported(format!("{field} ({why}, so that it never holds)")),
            None => out.push(entry.wire.clone()),
        }
    }
    (given.is_empty() || !out.is_empty()).then_some(out)
}
