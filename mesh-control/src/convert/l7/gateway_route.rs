//! HTTPRoutes, GRPCRoutes, TCPRoutes and TLSRoutes of Services, ServiceEntries and gateways.

use std::collections::BTreeMap;

use mesh_core::xds::proto::l7 as wire;
use mesh_core::xds::proto::l7::http_rule::Action;

use super::super::{Attachments, Context, MESH_CONTROLLER, ParentState, Refusal};
use super::report::{Report, waypoints};
use super::services::Services;
use super::{L7, gateway, name_rules, origin, resource_name};
use crate::model::l7::{GatewayHttp, Reference};
use crate::model::{Condition, GatewayRoute, Key, Kind, ObjectRef};

const ROUTES: &str = "gateway.networking.k8s.io";
const ISTIO: &str = "networking.istio.io";

pub(super) fn convert(
    context: &mut Context<'_>,
    services: &Services,
    attachments: &mut Attachments,
    out: &mut L7,
) {
    let mut conditions = Vec::new();
    let mut routes = BTreeMap::new();
    for (object, route) in &context.objects.routes {
        let scope = Scope { context: &*context, services, attachments, object, route };
        let (parents, resource) = scope.convert(&mut conditions);
        attachments.parents.insert(object.clone(), parents);
        if let Some(resource) = resource {
            if route.refused.is_empty() {
                attachments.count(&resource.gateways);
            }
            routes.insert(resource_name(object), resource);
        }
    }
    out.routes.extend(routes);
    context.conditions.extend(conditions);
}

fn is_gateway(parent: &Reference) -> bool {
    (parent.group.as_str(), parent.kind.as_str()) == (ROUTES, "Gateway")
}

/// What the conversion of one route looks at.
struct Scope<'a> {
    context: &'a Context<'a>,
    services: &'a Services,
    attachments: &'a Attachments,
    object: &'a ObjectRef,
    route: &'a GatewayRoute,
}

/// What a route's parents come to.
#[derive(Default)]
struct Parents {
    services: Vec<wire::ServiceRef>,
    gateways: Vec<wire::GatewayRef>,
    /// What there is to say of each that is ours.
    states: Vec<ParentState>,
    refusals: Vec<Refusal>,
}

impl Scope<'_> {
    /// What there is to say of each parent, and what waypoints and gateways are told.
    fn convert(&self, conditions: &mut Vec<Condition>) -> (Vec<ParentState>, Option<wire::Route>) {
        let mut report = Report::new(self.object.clone(), &self.route.unsupported);
        let Parents { services: parents, gateways, mut states, refusals } = self.parents(&mut report);
        let attached = !parents.is_empty() || !gateways.is_empty();
        if !attached {
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
            // What it names is looked at all the same: the status says it of every parent.
            self.rules(&mut report);
            report.resolved(conditions);
            report.refuse(reason, why, conditions);
            return (states, None);
        }
        refusals.into_iter().for_each(|(_, why)| report.overruled(why));
        let own_host = self.object.kind != Kind::TLSRoute && !parents.is_empty();
        if own_host && !self.route.hostnames.is_empty() {
            report.unsupported("spec.hostnames (the host is that of the service)");
        }
        let hosts: Vec<String> = parents.iter().map(|p| p.hostname.clone()).collect();
        let http = self.rules(&mut report);
        let tcp = self.tcp(&hosts, !gateways.is_empty(), &mut report);
        if self.route.refused.is_empty() {
            report.finish(true, conditions);
        } else {
            let fields = self.route.refused.join(", ");
            let why =
                format!("filters that cannot be applied: {fields}; their rules answer 500, the others hold");
            for state in states.iter_mut().filter(|state| state.refusal.is_none()) {
                state.refusal = Some(("InvalidFilter", why.clone()));
            }
            report.resolved(conditions);
            report.refuse("InvalidFilter", why, conditions);
        }
        if !hosts.is_empty() {
            waypoints(self.object, &hosts, self.services, conditions);
        }
        let origin = Some(origin(self.object.kind, &self.route.meta));
        let hostnames = if gateways.is_empty() { Vec::new() } else { self.route.hostnames.clone() };
        (
            states,
            Some(wire::Route { origin, parents, http, tcp, gateways, hostnames, exported_to: Vec::new() }),
        )
    }

    fn rules(&self, report: &mut Report) -> Vec<wire::HttpRule> {
        let mut http: Vec<wire::HttpRule> = Vec::new();
        for (i, rule) in self.route.http.iter().enumerate() {
            http.push(self.http(rule, &format!("spec.rules[{i}]"), report));
        }
        name_rules(&mut http, |rule| &mut rule.name);
        http
    }

    fn parents(&self, report: &mut Report) -> Parents {
        let mut out = Parents::default();
        for (index, parent) in self.route.parents.iter().enumerate() {
            let field = format!("spec.parentRefs[{index}]");
            let refusal = if is_gateway(parent) {
                self.listeners(parent).map(|found| out.gateways.extend(found)).err()
            } else {
                if !parent.section_name.is_empty() {
                    report.unsupported(format!("{field}.sectionName (write port)"));
                }
                self.parent(parent).map(|found| out.services.extend(found)).err()
            };
            if let Some(controller) = self.controller(parent) {
                out.states.push(ParentState { index, controller, refusal: refusal.clone() });
            }
            out.refusals.extend(refusal.map(|(reason, why)| (reason, format!("{field}: {why}"))));
        }
        out
    }

    /// Who says in the route's status what came of a parent; none where that is somebody else's.
    fn controller(&self, parent: &Reference) -> Option<&'static str> {
        if is_gateway(parent) {
            let key = Key::new(self.namespace(parent), &parent.name);
            return self.context.objects.gateways.get(&key)?.gateway_controller();
        }
        let service = matches!(parent.group.as_str(), "" | "core") && parent.kind == "Service";
        let entry = (parent.group.as_str(), parent.kind.as_str()) == (ISTIO, "ServiceEntry");
        (service || entry).then_some(MESH_CONTROLLER)
    }

    fn namespace<'b>(&'b self, reference: &'b Reference) -> &'b str {
        if reference.namespace.is_empty() { &self.route.meta.namespace } else { &reference.namespace }
    }

    /// The listeners of gateways that a parent stands for.
    fn listeners(&self, parent: &Reference) -> Result<Vec<wire::GatewayRef>, Refusal> {
        let request = gateway::Request {
            parent,
            key: &Key::new(self.namespace(parent), &parent.name),
            kind: self.object.kind,
            namespace: &self.route.meta.namespace,
            hostnames: &self.route.hostnames,
        };
        gateway::listeners(self.context, &self.attachments.listeners, &request)
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
            (group, kind) => {
                let why = format!(
                    "{kind} of group {group:?} is no parent; name a Service (group \"\"), a Gateway or a ServiceEntry (group {ISTIO})"
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

    /// The first rule takes every connection: these rules have no matches but, of a TLSRoute, the name of the service. At a
    /// gateway the names are those that it takes connections for, and no matches.
    fn tcp(&self, hosts: &[String], at_gateway: bool, report: &mut Report) -> Vec<wire::TcpRule> {
        let Some(rule) = self.route.tcp.first() else { return Vec::new() };
        let mut matches = Vec::new();
        if self.object.kind == Kind::TLSRoute && !self.route.hostnames.is_empty() {
            let other = self.route.hostnames.iter().enumerate().filter(|(_, name)| !hosts.contains(*name));
            for (i, name) in other.filter(|_| !hosts.is_empty()) {
                report.unsupported(format!("spec.hostnames[{i}] ({name} is not the host of the service)"));
            }
            let mut own: Vec<String> =
                hosts.iter().filter(|h| self.route.hostnames.contains(h)).cloned().collect();
            if own.is_empty() && !at_gateway {
                return Vec::new();
            }
            if own.is_empty() {
                // Of no service.
                own.clone_from(&self.route.hostnames);
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
        let (kind, key) = (self.object.kind.to_string(), Key::new(namespace, &reference.name));
        if !self.context.objects.may_name(&kind, &self.route.meta.namespace, "Service", &key) {
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
}
