//! Which rule a request falls under, and what the rule does to it.
//!
//! [`Routes`] is compiled from the route objects of both API families and finds the [`Rule`] of a request; the rule says
//! what becomes of it. Nothing here waits, keeps time or draws random numbers: those are arguments.
//!
//! | module | for |
//! |---|---|
//! | `compiled` | one object's rules, shared with its last version where they did not change |
//! | `table` | which objects count for a service, and in what order |
//! | `hosts` | the same for a gateway's listeners, by host |
//! | `index` | the first match among many, at a cost that does not grow with those that do not match |
//! | `matching`, `pattern` | what a match asks for |
//! | `rule` | what a rule does: backends by weight, and the parts below |
//! | `headers`, `rewrite`, `cors`, `fault` | edits, rewrites and redirects, other origins, faults and mirrors |
//! | `tcp` | rules for connections |
//! | `dump` | what people see of rules |
//! | `problem` | what is wrong with an object's rules |
//! | `quick` | hash maps for what the configuration says |

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use mesh_core::state::{MeshState, Service, Str};
use mesh_core::xds::proto::l7;

use crate::config::{Own, Resources};
use crate::request::{self, Addressed, Head};

mod compiled;
mod cors;
mod dump;
mod fault;
mod headers;
mod hosts;
mod index;
mod matching;
mod pattern;
mod problem;
mod quick;
mod rewrite;
mod rule;
mod table;
mod tcp;
#[cfg(test)]
mod tests;

use compiled::CompiledRoute;
pub use cors::Cors;
pub use fault::{Abort, Fault, Injected, Mirror, Share, shadow_authority};
pub use headers::HeaderEdits;
use hosts::Hosts;
pub use matching::MatchedPath;
pub use problem::Problem;
pub(crate) use quick::QuickMap;
pub(crate) use rewrite::split_port;
pub use rewrite::{Redirect, Rewrite, RewriteError};
pub use rule::{Action, Backend, DirectResponse, Forward, RateLimit, Rule, WeightedBackend};
use table::{Named, ServiceRules};
pub use tcp::TcpRule;

/// Rules of all services, compiled. A clone shares everything.
#[derive(Debug, Clone, Default)]
pub struct Routes {
    /// In the order of their resources' names.
    objects: Arc<[Arc<CompiledRoute>]>,
    /// By `namespace/hostname`; only services that have rules. Beside them, hosts of a gateway's listeners.
    services: Arc<QuickMap<Str, Arc<ServiceRules>>>,
    /// Of a gateway's listeners.
    hosts: Arc<Hosts>,
    ground: Ground,
    patterns: pattern::Patterns,
}

/// A route object: as it was told until it is compiled, from then on what was made of it.
#[derive(Debug, Clone)]
pub struct RouteSource(Source);

#[derive(Debug, Clone)]
enum Source {
    Told(Arc<l7::Route>),
    Compiled(Arc<CompiledRoute>),
}

impl From<l7::Route> for RouteSource {
    fn from(route: l7::Route) -> Self {
        Self(Source::Told(Arc::new(route)))
    }
}

/// What decides, beside the objects, which of them count for which service.
#[derive(Debug, Clone, Default, PartialEq)]
struct Ground {
    /// Of [`MeshState::services_version`].
    services: u64,
    /// Of the waypoint.
    namespace: String,
    /// The Gateway that is served.
    gateway: Option<Arc<l7::Gateway>>,
}

/// What becomes of a request.
#[derive(Debug, Clone, Copy)]
pub enum Routed<'a> {
    /// What the rule says.
    Rule(Matched<'a>),
    /// There are no rules: it goes where it is addressed to.
    Default,
    /// There are rules, and none is for it: 404.
    NotFound,
}

/// A rule, and what of the request it has matched.
#[derive(Debug, Clone, Copy)]
pub struct Matched<'a> {
    /// The rule.
    pub rule: &'a Arc<Rule>,
    /// What a prefix is replaced in, by rewrites and redirects.
    pub path: MatchedPath,
    /// Name of the match; mostly empty.
    pub match_name: &'a str,
}

impl Routes {
    /// Compiles all rules. What did not change since `previous` is shared with it: a changed object costs what it and the
    /// services that it names cost.
    #[must_use]
    pub fn build(resources: &Resources, mesh: &MeshState, own: &Own, previous: &Self) -> Self {
        let patterns = previous.patterns.clone();
        let Objects { all, mut gone, mut come } = Objects::compile(resources, &patterns, &previous.objects);
        let ground = Ground {
            services: mesh.services_version(),
            namespace: own.namespace.clone(),
            gateway: resources.gateway(own).cloned(),
        };
        let (mut services, mut hosts) = (Arc::clone(&previous.services), Arc::clone(&previous.hosts));
        if ground != previous.ground {
            services = Arc::default();
            gone.clear();
            come = all.clone();
        }
        if !gone.is_empty() || !come.is_empty() {
            let parents = Parents { mesh, own, gateway: ground.gateway.as_deref() };
            let touched = parents.touched(&gone, &come);
            let gone: HashSet<_> = gone.iter().map(Arc::as_ptr).collect();
            let mut changed = (*services).clone();
            for (key, added) in touched {
                let kept = services.get(&key).into_iter().flat_map(|rules| rules.named());
                let kept = kept.filter(|(route, _)| !gone.contains(&Arc::as_ptr(route))).cloned();
                let mut named: Vec<Named> = kept.chain(added).collect();
                if named.is_empty() {
                    changed.remove(&key);
                    continue;
                }
                named.sort_by(|(a, _), (b, _)| a.precedence().cmp(&b.precedence()));
                let rules = ServiceRules::build(named, previous.services.get(&key));
                changed.insert(key, rules);
            }
            services = Arc::new(changed);
            hosts = Arc::new(Hosts::of(&services));
        }
        Self { objects: all.into(), services, hosts, ground, patterns }
    }

    /// Lets go of objects as they were told, of which these rules have been compiled.
    pub fn settle(&self, sources: &mut BTreeMap<String, RouteSource>) {
        // Both are in the order of names.
        let mut objects = self.objects.iter().peekable();
        for (name, source) in sources {
            while objects.next_if(|object| *object.resource < **name).is_some() {}
            if let Some(object) = objects.next_if(|object| *object.resource == **name) {
                source.0 = Source::Compiled(object.clone());
            }
        }
    }

    /// The rule of a request.
    #[must_use]
    pub fn http(&self, head: &Head<'_>) -> Routed<'_> {
        let (rules, port, otherwise) = match head.addressed {
            Addressed::Service { key, port } => (self.services.get(key), *port, Routed::Default),
            Addressed::Gateway { port } => (self.hosts.find(*port, head.authority), 0, Routed::NotFound),
            // Rules are for services: what is sent to a workload itself goes there.
            Addressed::Workload { .. } => return Routed::Default,
        };
        let Some(index) = rules.and_then(|rules| rules.port(port).http.as_ref()) else { return otherwise };
        match index.find(head, head.addressed.port()) {
            Some((entry, path)) => {
                Routed::Rule(Matched { rule: &entry.rule, path, match_name: &entry.matching.name })
            }
            None => Routed::NotFound,
        }
    }

    /// The rule of a connection whose bytes are not looked into; at a gateway `name` is what a TLS client asks for. `None`:
    /// it goes where it is addressed to, which at a gateway is nowhere.
    #[must_use]
    pub fn tcp(
        &self,
        addressed: &Addressed,
        name: &str,
        source: &request::Source,
        destination: std::net::IpAddr,
    ) -> Option<&Arc<TcpRule>> {
        let (key, port) = match addressed {
            Addressed::Service { key, port } => (key, port),
            // The name that the rules were found by is their match.
            Addressed::Gateway { port } => {
                return self.hosts.find(*port, name)?.port(0).tcp(None, *port, source, destination);
            }
            Addressed::Workload { .. } => return None,
        };
        let hostname = key.split_once('/').map_or("", |(_, hostname)| hostname);
        self.services.get(key)?.port(*port).tcp(Some(hostname), *port, source, destination)
    }

    /// The services that have rules, as `namespace/hostname`, and hosts of listeners, as `:port/host`, in no order.
    pub fn services(&self) -> impl Iterator<Item = &Str> {
        self.services.keys()
    }

    /// The HTTP rules of a service's port with the names of their matches, in the order in which they are tried; a rule
    /// comes once for each of its matches.
    pub fn rules(&self, key: &str, port: u16) -> impl Iterator<Item = (&Arc<Rule>, &str)> {
        let index = self.services.get(key).and_then(|rules| rules.port(port).http.as_ref());
        let entries = index.into_iter().flat_map(|index| index.entries());
        entries.map(|entry| (&entry.rule, &*entry.matching.name))
    }

    /// The rate limits of all rules.
    pub fn rate_limits(&self) -> impl Iterator<Item = &RateLimit> {
        let rules = self.objects.iter().flat_map(|object| &object.http);
        rules.filter_map(|rule| rule.entries.first()?.rule.rate_limit.as_ref())
    }

    /// What is wrong with the rules, by object.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.objects.iter().flat_map(|object| {
            object.problems.iter().chain(object.http.iter().flat_map(|rule| &rule.problems))
        })
    }
}

/// All objects, and what is different from those before.
struct Objects {
    all: Vec<Arc<CompiledRoute>>,
    gone: Vec<Arc<CompiledRoute>>,
    come: Vec<Arc<CompiledRoute>>,
}

impl Objects {
    /// Walks along both versions, which are in the same order.
    fn compile(resources: &Resources, patterns: &pattern::Patterns, previous: &[Arc<CompiledRoute>]) -> Self {
        let (mut all, mut gone, mut come) =
            (Vec::with_capacity(resources.routes.len()), Vec::new(), Vec::new());
        let mut previous = previous.iter().peekable();
        for (name, route) in &resources.routes {
            while let Some(removed) = previous.next_if(|object| *object.resource < **name) {
                gone.push(removed.clone());
            }
            let known = previous.next_if(|object| *object.resource == **name);
            let object = match &route.0 {
                Source::Compiled(object) => object.clone(),
                Source::Told(route) => CompiledRoute::compile(name, route, patterns, known),
            };
            if known.is_none_or(|known| !Arc::ptr_eq(known, &object)) {
                gone.extend(known.cloned());
                come.push(object.clone());
            }
            all.push(object);
        }
        gone.extend(previous.cloned());
        Self { all, gone, come }
    }
}

/// What the objects' parents are looked for in.
struct Parents<'a> {
    mesh: &'a MeshState,
    own: &'a Own,
    gateway: Option<&'a l7::Gateway>,
}

impl Parents<'_> {
    /// The services that objects name which went or came, with those that came and count.
    fn touched(&self, gone: &[Arc<CompiledRoute>], come: &[Arc<CompiledRoute>]) -> QuickMap<Str, Vec<Named>> {
        let mut touched: QuickMap<Str, Vec<Named>> = QuickMap::default();
        for route in gone {
            self.each(route, |service, _| {
                touched.entry(service.clone()).or_default();
            });
        }
        for route in come {
            self.each(route, |service, port| {
                touched.entry(service.clone()).or_default().push((route.clone(), port));
            });
        }
        touched
    }

    /// The services and hosts that an object counts for, by key, with the port that it names.
    fn each(&self, route: &CompiledRoute, mut each: impl FnMut(&Str, u16)) {
        for parent in &route.source.parents {
            // Out of range: listed as a problem.
            let Ok(port) = u16::try_from(parent.port) else { continue };
            let mut add = |service: &Service| {
                let namespace = service.host.namespace();
                let is_it = parent.namespace.is_empty() || parent.namespace == namespace;
                if is_it && table::counts(route, namespace, self.own) {
                    each(service.host.key(), port);
                }
            };
            match parent.hostname.strip_prefix('*') {
                // A service may itself be a wildcard; a name with `*.` in front covers those within.
                Some(suffix) => {
                    let all = self.mesh.services();
                    let covered = all.filter(|s| s.service.host.hostname().ends_with(suffix));
                    covered.for_each(|service| add(&service.service));
                }
                None => self.mesh.services_by_hostname(&parent.hostname).for_each(|s| add(&s.service)),
            }
        }
        let listeners = self.gateway.map_or(&[][..], |gateway| &gateway.listeners);
        for listener in listeners {
            let named = route.source.gateways.iter().any(|named| {
                let own = named.namespace == self.own.namespace && named.name == self.own.gateway;
                own && named.listener == listener.name
            });
            let Some(port) = u16::try_from(listener.port).ok().filter(|_| named) else { continue };
            let own = |host: &String| !hosts::is_of_narrower(listener, listeners, host);
            for host in hosts::common(listener, &route.source.hostnames).into_iter().filter(own) {
                each(&hosts::key(port, &host), 0);
            }
        }
    }
}
