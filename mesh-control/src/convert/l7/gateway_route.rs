//! HTTPRoutes, GRPCRoutes, TCPRoutes and TLSRoutes of Services and ServiceEntries.

use std::collections::BTreeMap;

use mesh_core::xds::proto::l7 as wire;
use mesh_core::xds::proto::l7::http_rule::Action;

use super::super::Context;
use super::report::{Report, waypoints};
use super::services::Services;
use super::{L7, name_rules, origin, resource_name};
use crate::model::l7::{GatewayHttp, Reference};
use crate::model::{Condition, GatewayRoute, Key, Kind, ObjectRef};

const ROUTES: &str = "gateway.networking.k8s.io";
const ISTIO: &str = "networking.istio.io";

pub(super) fn convert(context: &mut Context<'_>, services: &Services, out: &mut L7) {
    let mut conditions = Vec::new();
    let mut routes = BTreeMap::new();
    for (object, route) in &context.objects.routes {
        let scope = Scope { context: &*context, services, object, route };
        if let Some(resource) = scope.convert(&mut conditions) {
            routes.insert(resource_name(object), resource);
        }
    }
    out.routes.extend(routes);
    context.conditions.extend(conditions);
}

/// What the conversion of one route looks at.
struct Scope<'a> {
    context: &'a Context<'a>,
    services: &'a Services,
    object: &'a ObjectRef,
    route: &'a GatewayRoute,
}

/// Why a parent is none: reason and text.
type Refusal = (&'static str, String);

impl Scope<'_> {
    fn convert(&self, conditions: &mut Vec<Condition>) -> Option<wire::Route> {
        let mut report = Report::new(self.object.clone(), &self.route.unsupported);
        let mut parents = Vec::new();
        let mut refusals: Vec<Refusal> = Vec::new();
        for (i, parent) in self.route.parents.iter().enumerate() {
            let field = format!("spec.parentRefs[{i}]");
            if !parent.section_name.is_empty() {
                report.unsupported(format!("{field}.sectionName (write port)"));
            }
            match self.parent(parent) {
                Ok(found) => parents.extend(found),
                Err((reason, why)) => refusals.push((reason, format!("{field}: {why}"))),
            }
        }
        if parents.is_empty() {
            let (reason, why) = match refusals.as_slice() {
                [] => (
                    "NoMatchingParent",
                    "spec.parentRefs is missing; name the Service that this is for".into(),
                ),
                [(reason, _), ..] => {
                    let all: Vec<&str> = refusals.iter().map(|(_, why)| why.as_str()).collect();
                    (*reason, all.join("; "))
                }
            };
            report.refuse(reason, why, conditions);
            return None;
        }
        refusals.into_iter().for_each(|(_, why)| report.overruled(why));
        if self.object.kind != Kind::TLSRoute && !self.route.hostnames.is_empty() {
            report.unsupported("spec.hostnames (the host is that of the service)");
        }
        let hosts: Vec<String> = parents.iter().map(|p| p.hostname.clone()).collect();
        let mut http: Vec<wire::HttpRule> = Vec::new();
        for (i, rule) in self.route.http.iter().enumerate() {
            http.push(self.http(rule, &format!("spec.rules[{i}]"), &mut report));
        }
        name_rules(&mut http, |rule| &mut rule.name);
        let tcp = self.tcp(&hosts, &mut report);
        if self.route.refused.is_empty() {
            report.finish(true, conditions);
        } else {
            let fields = self.route.refused.join(", ");
            let why =
                format!("filters that cannot be applied: {fields}; their rules answer 500, the others hold");
            report.refuse("InvalidFilter", why, conditions);
        }
        waypoints(self.object, &hosts, self.services, conditions);
        let origin = Some(origin(self.object.kind, &self.route.meta));
        Some(wire::Route { origin, parents, http, tcp })
    }

    fn namespace<'b>(&'b self, reference: &'b Reference) -> &'b str {
        if reference.namespace.is_empty() { &self.route.meta.namespace } else { &reference.namespace }
    }

    /// The services that a parent stands for.
    fn parent(&self, parent: &Reference) -> Result<Vec<wire::ServiceRef>, Refusal> {
        let namespace = self.namespace(parent);
        let key = Key::new(namespace, &parent.name);
        let hosts = match (parent.group.as_str(), parent.kind.as_str()) {
            ("" | "core", "Service") => {
                let service = self.context.objects.services.get(&key);
                service.map(|_| vec![self.context.mesh.hostname(namespace, &parent.name)])
            }
            (ISTIO, "ServiceEntry") => {
                self.context.objects.service_entries.get(&key).map(|e| e.hosts.clone())
            }
            (ROUTES, "Gateway") => {
                let why =
                    format!("Gateway {key} is not served; to reach a waypoint, name the Service behind it");
                return Err(("NoMatchingParent", why));
            }
            (group, kind) => {
                let why = format!(
                    "{kind} of group {group:?} is no parent; name a Service (group \"\") or a ServiceEntry (group {ISTIO})"
                );
                return Err(("InvalidKind", why));
            }
        };
        let Some(hosts) = hosts else {
            return Err(("NoMatchingParent", format!("{} {key} does not exist", parent.kind)));
        };
        if *namespace != self.route.meta.namespace {
            let why = format!(
                "{} {key} is of another namespace, and a waypoint takes the routes of the service's own only",
                parent.kind
            );
            return Err(("NotAllowedByListeners", why));
        }
        let port = parent.port.map_or(0, u32::from);
        let known = |host: &String| {
            let mut of = self.services.of(host).iter().filter(|s| s.namespace == namespace);
            of.any(|s| port == 0 || s.ports.contains(&port))
        };
        let hosts: Vec<String> = hosts.into_iter().filter(known).collect();
        if hosts.is_empty() {
            let why = match port {
                0 => format!("{} {key} is no service of the mesh", parent.kind),
                port => format!("{} {key} has no port {port}", parent.kind),
            };
            return Err(("NoMatchingParent", why));
        }
        let of = |hostname| wire::ServiceRef { namespace: namespace.to_owned(), hostname, port };
        Ok(hosts.into_iter().map(of).collect())
    }

    fn http(&self, given: &GatewayHttp, field: &str, report: &mut Report) -> wire::HttpRule {
        let mut rule = given.rule.clone();
        self.mirrors(&mut rule.mirrors, &given.mirrors, field, report);
        if let Some(Action::Forward(forward)) = &mut rule.action {
            for (i, (weighted, names)) in forward.backends.iter_mut().zip(&given.backends).enumerate() {
                let field = format!("{field}.backendRefs[{i}]");
                weighted.backend = Some(self.backend(&names.reference, &field, report));
                self.mirrors(&mut weighted.mirrors, &names.mirrors, &field, report);
            }
        }
        rule
    }

    fn mirrors(&self, mirrors: &mut [wire::Mirror], names: &[Reference], field: &str, report: &mut Report) {
        for (mirror, name) in mirrors.iter_mut().zip(names) {
            mirror.backend = Some(self.backend(name, &format!("{field}.filters requestMirror"), report));
        }
    }

    /// The first rule takes every connection: these rules have no matches but, of a TLSRoute, the name of the service.
    fn tcp(&self, hosts: &[String], report: &mut Report) -> Vec<wire::TcpRule> {
        let Some(rule) = self.route.tcp.first() else { return Vec::new() };
        let mut matches = Vec::new();
        if self.object.kind == Kind::TLSRoute && !self.route.hostnames.is_empty() {
            for (i, name) in
                self.route.hostnames.iter().enumerate().filter(|(_, name)| !hosts.contains(*name))
            {
                report.unsupported(format!("spec.hostnames[{i}] ({name} is not the host of the service)"));
            }
            let own: Vec<String> =
                hosts.iter().filter(|h| self.route.hostnames.contains(h)).cloned().collect();
            if own.is_empty() {
                return Vec::new();
            }
            matches.push(wire::TcpMatch { sni_hosts: own, ..wire::TcpMatch::default() });
        }
        let mut backends = Vec::new();
        for (i, (reference, weight)) in rule.backends.iter().enumerate() {
            let backend = self.backend(reference, &format!("spec.rules[0].backendRefs[{i}]"), report);
            let backend = Some(backend);
            backends.push(wire::WeightedBackend { backend, weight: *weight, ..Default::default() });
        }
        let name = if rule.name.is_empty() { "rule-0".to_owned() } else { rule.name.clone() };
        vec![wire::TcpRule { name, matches, backends }]
    }

    fn backend(&self, reference: &Reference, field: &str, report: &mut Report) -> wire::Backend {
        match self.resolve(reference) {
            Ok(service) => wire::Backend { service: Some(service), ..wire::Backend::default() },
            Err((reason, why)) => {
                report.unresolved(reason, format!("{field}: {why}"));
                wire::Backend { invalid: why, ..wire::Backend::default() }
            }
        }
    }

    fn resolve(&self, reference: &Reference) -> Result<wire::ServiceRef, Refusal> {
        let namespace = self.namespace(reference);
        let is_service = matches!(reference.group.as_str(), "" | "core") && reference.kind == "Service";
        let is_hostname = (reference.group.as_str(), reference.kind.as_str()) == (ISTIO, "Hostname");
        if !is_service && !is_hostname {
            let why = format!(
                "{} of group {:?} is no backend; name a Service (group \"\") or a Hostname (group {ISTIO})",
                reference.kind, reference.group
            );
            return Err(("InvalidKind", why));
        }
        let Some(port) = reference.port.map(u32::from) else {
            return Err(("BackendNotFound", format!("port is missing; write that of {}", reference.name)));
        };
        if is_hostname {
            if !reference.namespace.is_empty() {
                let why = "namespace does not go with a Hostname, which is found by its name".to_owned();
                return Err(("InvalidKind", why));
            }
            return match self.services.missing(&reference.name, port) {
                Some(why) => Err(("BackendNotFound", why)),
                None => {
                    Ok(wire::ServiceRef { namespace: String::new(), hostname: reference.name.clone(), port })
                }
            };
        }
        if reference.name.contains('.') {
            let why =
                format!("{:?} is a host; write the name of the Service, or kind Hostname", reference.name);
            return Err(("BackendNotFound", why));
        }
        if namespace != self.route.meta.namespace && !self.granted(namespace, &reference.name) {
            let why = format!(
                "Service {namespace}/{} is of another namespace, and no ReferenceGrant there lets {} of namespace {} name it",
                reference.name, self.object.kind, self.route.meta.namespace
            );
            return Err(("RefNotPermitted", why));
        }
        let hostname = self.context.mesh.hostname(namespace, &reference.name);
        match self.services.missing(&hostname, port) {
            Some(why) => Err(("BackendNotFound", why)),
            None => Ok(wire::ServiceRef { namespace: namespace.to_owned(), hostname, port }),
        }
    }

    fn granted(&self, namespace: &str, name: &str) -> bool {
        let kind = self.object.kind.to_string();
        let own = &self.route.meta.namespace;
        let grants = self.context.objects.reference_grants.values().filter(|g| g.meta.namespace == namespace);
        let mut grants = grants.filter(|g| {
            let from = g.from.iter().any(|(group, k, ns)| group == ROUTES && *k == kind && ns == own);
            from && g.to.iter().any(|(group, kind, only)| {
                matches!(group.as_str(), "" | "core")
                    && kind == "Service"
                    && only.as_deref().is_none_or(|only| only == name)
            })
        });
        grants.next().is_some()
    }
}
